"""Ablation on a model with one head that matters and one that is dead by construction."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformer_lens import HookedTransformer, patching

from analyses import ablation as analysis
from mechgrok import seeds
from mechgrok.config import ModelConfig
from mechgrok.measures.ablation import ABLATION_KINDS, head_ablations
from mechgrok.model import build_model, example_losses, model_losses
from mechgrok.tasks import make_split
from mechgrok.types import LLCCurve, Stage
from tests.oracles import planted_fourier_model, tiny_config

SPLIT = make_split(tiny_config().task, 0)


def with_dead_head() -> HookedTransformer:
    model = build_model(tiny_config().model, SPLIT, 0)
    with torch.no_grad():
        model.blocks[0].attn.W_O[1] = 0.0
    return model


@pytest.mark.parametrize("kind", ABLATION_KINDS)
def test_a_dead_head_costs_exactly_nothing_and_a_live_one_does(kind) -> None:
    effect = head_ablations(with_dead_head(), SPLIT.train, kind, seeds.stream(0))
    assert effect.shape == (2, len(SPLIT.train))
    assert torch.equal(effect[1], torch.zeros(len(SPLIT.train), dtype=torch.float64))
    assert effect[0].abs().max() > 1e-3


def test_zero_ablation_equals_a_model_without_that_heads_output() -> None:
    model = with_dead_head()
    effect = head_ablations(model, SPLIT.train, "zero", seeds.stream(0))[0]
    before = model_losses(model, *SPLIT.train.tensors)
    with torch.no_grad():
        model.blocks[0].attn.W_O[0] = 0.0
        torch.testing.assert_close(effect, model_losses(model, *SPLIT.train.tensors) - before)


def test_mean_ablation_equals_a_model_that_writes_the_mean() -> None:
    model = with_dead_head()
    _, cache = model.run_with_cache(SPLIT.train.tokens)
    written = torch.einsum("e,ed->d", cache["blocks.0.attn.hook_z"][:, -1, 0].mean(0), model.W_O[0, 0]).detach()
    effect = head_ablations(model, SPLIT.train, "mean", seeds.stream(0))[0]
    before = model_losses(model, *SPLIT.train.tensors).detach()
    with torch.no_grad():
        model.blocks[0].attn.W_O[0] = 0.0
        model.blocks[0].attn.b_O += written  # right at the last position, the only one that is scored
        torch.testing.assert_close(effect, model_losses(model, *SPLIT.train.tensors) - before, atol=1e-6, rtol=1e-5)


def test_resampling_changes_a_heads_output_to_that_of_other_examples() -> None:
    """The planted adder answers for the pair that it was given: resampled, it answers for another."""
    model, split = planted_fourier_model(11, (1, 2, 4))
    everything = split.train + split.test
    effect = head_ablations(model, everything, "resample", seeds.stream(0))[0]
    others = torch.randperm(len(everything), generator=seeds.stream(0))
    same_answer = everything.targets[others, -1] == everything.targets[:, -1]
    assert effect[same_answer].median() < 0.1
    assert effect[~same_answer].median() > 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization_type": "LN"},
        {"d_mlp": None, "normalization_type": "LN"},
        {"d_mlp": None, "normalization_type": "LN", "positional_embedding_type": "shortformer"},
        {"d_mlp": None, "normalization_type": "RMS", "positional_embedding_type": "rotary"},
    ],
)
@torch.no_grad()
def test_resampling_is_transformer_lenss_patching_from_the_other_examples(changes: dict) -> None:
    shape = tiny_config().model.model_dump() | {"n_layers": 2, "init_std": 0.3} | changes
    model = build_model(ModelConfig(**shape), SPLIT, 0)
    tokens, targets, weights = SPLIT.train.tensors

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return example_losses(logits[:, -targets.shape[1] :], targets, weights).mean()

    before = loss(model(tokens))
    effect = head_ablations(model, SPLIT.train, "resample", seeds.stream(0)).mean(1).view(2, -1)
    assert effect.abs().min() > 1e-3
    rng = seeds.stream(0)
    for layer, head in np.ndindex(*effect.shape):
        _, of_others = model.run_with_cache(tokens[torch.randperm(len(tokens), generator=rng)])
        patched = patching.get_act_patch_attn_head_out_all_pos(model, tokens, of_others, loss)
        assert float(effect[layer, head]) == pytest.approx(float(patched[layer, head] - before), abs=2e-5)


def test_no_hook_is_left_behind() -> None:
    model = with_dead_head()
    before = model(SPLIT.train.tokens)
    for kind in ABLATION_KINDS:
        head_ablations(model, SPLIT.train, kind, seeds.stream(0))
    assert torch.equal(model(SPLIT.train.tokens), before)


def test_wrllc_and_ablation_are_compared_head_by_head_whatever_their_order_in_the_curve() -> None:
    """wrLLC and cost both grow with the head's number, so they agree; an unhealthy point does not count."""
    cost = np.array([1.0, 2.0, 3.0, 4.0])
    steps = np.array([0, 10, 100])
    series = {f"{kind}_{side}": np.tile(cost, (3, 1)) for kind in ABLATION_KINDS for side in ("train", "test")}
    names = ("model", "L0H3", "L0H1", "L0H0", "L0H2")
    llc = np.array([[0, 10, 0], [4, 4, 4], [2, 2, 2], [1, 1, 1], [3, -9, 3]], float)
    healthy = np.ones((5, 3), bool)
    healthy[4, 1] = False
    curve = LLCCurve(steps=steps, components=names, llc=llc, std_error=np.full((5, 3), 0.1), healthy=healthy)
    stages = (
        Stage("S1", "rising", 0, 10, None, None, 10, None),
        Stage("S2", "falling", 10, 100, None, None, -10, None),
    )
    agree = analysis.conclude({"step": steps, **series}, stages, curve)[-1]
    assert agree.value == 1.0 and agree.holds and agree.chance == pytest.approx(4 / 24)
    unsure = analysis.conclude({"step": steps, **series}, stages, replace(curve, std_error=np.full((5, 3), 2.0)))[-1]
    # In the right order, and with errors as large as the differences as likely as not in another.
    normal = np.random.default_rng(1).normal(size=(4000, 4))
    expected = np.mean([spearmanr(cost + 2.0 * z, cost).statistic > 0.79 for z in normal])
    assert unsure.value == pytest.approx(expected, abs=0.06) and 0.3 < expected < 0.7 and not unsure.holds
    few = LLCCurve(steps=steps, components=names[:3], llc=llc[:3], std_error=np.ones((3, 3)), healthy=healthy[:3])
    assert np.isnan(analysis.conclude({"step": steps, **series}, stages, few)[-1].value)
