"""Every measure of one model as a function of the model alone, and models that no setting of [model] describes."""

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from mechgrok import seeds
from mechgrok.measures import attention, copying
from mechgrok.measures.ablation import clean_run, position_ablations
from mechgrok.measures.attribution import direct_attributions
from mechgrok.measures.circuits import direct_effects, induction_search, joint_ablation, layer_path_effects
from mechgrok.measures.composition import composition_scores
from mechgrok.measures.head_types import head_evidence, probe
from mechgrok.measures.in_context import bigram_score, bigram_table, in_context_score, position_losses
from mechgrok.measures.multigrams import memorized
from mechgrok.measures.path_ablation import INPUTS, Input, path_ablation
from tests import hand_built

SPLIT = hand_built.SPLIT.first(16)
ROWS = hand_built.twice(16, seeds.stream(0, "rows"))  # of which the last seven positions are scored
REPEATS = probe(SPLIT, seeds.stream(0, "repeats"))
Measure = Callable[[HookedTransformer], Tensor]


def other_model(**changes: object) -> HookedTransformer:
    """Three layers of four heads in float64, every parameter random, with any entry of a HookedTransformerConfig."""
    settings: dict[str, object] = {
        "n_layers": 3, "d_model": 20, "n_heads": 4, "d_head": 6, "d_mlp": 24, "act_fn": "relu", "n_ctx": 24,
        "d_vocab": hand_built.N_TOKENS, "normalization_type": None, "init_weights": False, "default_prepend_bos": False,
        "dtype": torch.float64, "device": "cpu",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(HookedTransformerConfig(**(settings | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=seeds.stream(0, name)))
            if name.endswith(".w"):
                parameter.add_(1.0)
    return model.eval()


def scores(found: attention.AttentionScores) -> Tensor:
    return torch.stack([found.score, torch.full_like(found.score, found.chance), found.spread])


def _path(inputs: tuple[Input, ...], kind: str = "mean") -> Measure:
    """From L0H1 into every head of the last layer, with a layer between."""
    return lambda model: torch.stack(
        [path_ablation(model, ROWS, (0, 1), (2, head), inputs, kind, seeds.stream(0)) for head in range(4)]  # type: ignore[arg-type]
    )


def _types(model: HookedTransformer) -> Tensor:
    memories = memorized(model, SPLIT.test, SPLIT.labels, SPLIT.bos, "mean", seeds.stream(0))
    evidence = head_evidence(model, SPLIT, seeds.stream(0), memories)
    return torch.tensor([list(of.scores.values()) for of in evidence])


def _search(model: HookedTransformer) -> Tensor:
    found = induction_search(model, REPEATS, seeds.stream(0))
    return torch.tensor(
        [[of.looks_back, of.matches, of.composes, of.k_effect.value, of.k_effect.error] for of in found]
    )


OF_ATTENTION: Mapping[str, Measure] = {
    "attention": lambda m: torch.stack([scores(of) for of in attention.attention_scores(m, SPLIT.test).values()]),
    "prefix matching": lambda m: scores(attention.prefix_matching(m, REPEATS)),
}
OF_LOSSES: Mapping[str, Measure] = {
    "losses": lambda m: position_losses(m, ROWS),
    "in-context": lambda m: torch.tensor(in_context_score(m, SPLIT.test, (2, 8), (16, 24))),
    "bigrams": lambda m: torch.tensor(bigram_score(m, SPLIT.test, bigram_table(SPLIT.train, 9, 9)).nats),
    **{
        f"{kind} ablation": lambda m, kind=kind: position_ablations(m, ROWS, kind, seeds.stream(0))
        for kind in ("zero", "mean", "resample", "pattern-preserving")
    },
    "joint ablation": lambda m: torch.tensor(
        joint_ablation(m, ROWS, [(0, 1), (1, 2), (1, 3)], "zero", seeds.stream(0), clean_run(m, ROWS)).value
    ),
    **{f"{letter} path": _path((letter,)) for letter in INPUTS},
    "resampled path": _path(INPUTS, "resample"),
    "paths between layers": lambda m: layer_path_effects(m, ROWS, 0, 2, [1, 2], clean_run(m, ROWS)),
    "neighbours": lambda m: layer_path_effects(m, ROWS, 1, 2, [3], clean_run(m, ROWS)),
    "direct effects": lambda m: direct_effects(m, ROWS, 0, clean_run(m, ROWS)),
}
OF_PARTS: Mapping[str, Measure] = {"attributions": lambda m: torch.stack(list(direct_attributions(m, ROWS).values()))}
OF_WEIGHTS: Mapping[str, Measure] = {  # in part or in all
    "copying": lambda m: copying.copying_scores(m, REPEATS, REPEATS.first).share,
    "eigenvalues": copying.eigenvalue_copying,
    "composition": lambda m: torch.stack([of.scores for of in composition_scores(m, seeds.stream(0)).values()]),
}
TOGETHER: Mapping[str, Measure] = {"head types": _types, "induction search": _search}
ALL = OF_ATTENTION | OF_LOSSES | OF_PARTS | OF_WEIGHTS | TOGETHER


def assert_same(one: Tensor, other: Tensor) -> None:
    """Up to rounding in float64; NaN where both are."""
    np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-7, atol=1e-9, equal_nan=True)
