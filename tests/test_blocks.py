"""The measures run the model on few rows at a time: the same numbers as at once, and no tensor of the size of all."""

import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformer_lens import HookedTransformer

import analyses.multigrams
from analyses import contract
from mechgrok import seeds
from mechgrok.config import load_config
from mechgrok.measures import head_types, multigrams
from mechgrok.measures.ablation import clean_run, head_ablations, position_ablations
from mechgrok.measures.attribution import direct_attributions
from mechgrok.measures.circuits import direct_effects, joint_ablation, layer_path_effects
from mechgrok.measures.in_context import bigram_score, bigram_table, position_losses
from mechgrok.measures.path_ablation import INPUTS, path_ablation
from mechgrok.model import build_model, shares
from mechgrok.tasks.next_token import next_token_examples
from mechgrok.types import Split
from tests.hand_built import SPLIT, twice
from tests.test_attention_measures import ARCHITECTURES, random_model

ROWS = twice(6, seeds.stream(0, "blocks"))


def circuits(model: HookedTransformer) -> list[Tensor]:
    clean = clean_run(model, ROWS)
    return [
        *clean.resid, *clean.z, clean.losses,
        path_ablation(model, ROWS, (0, 1), (1, 2), INPUTS, "resample", seeds.stream(1), clean),
        *(joint_ablation(model, ROWS, [(0, 1), (1, 2), (1, 3)], kind, seeds.stream(2), clean).shifts
          for kind in ("zero", "mean", "resample")),
        layer_path_effects(model, ROWS, 0, 1, [0, 2], clean),
        direct_effects(model, ROWS, 0, clean),
    ]  # fmt: skip


def looks(model: HookedTransformer) -> list[Tensor]:
    tokens = ROWS.tokens.numpy()
    seen = multigrams.places(ROWS, SPLIT.labels)
    found = multigrams._looks(multigrams._attention(model, ROWS), tokens, seen, bos=0)
    return [torch.from_numpy(of) for of in vars(found).values()]


def bigrams(model: HookedTransformer) -> list[Tensor]:
    return [torch.tensor(bigram_score(model, ROWS, bigram_table(SPLIT.train, 9, 9)).nats)]


MEASURES: dict[str, Callable[[HookedTransformer], Sequence[Tensor]]] = {
    "position_losses": lambda model: [position_losses(model, ROWS)],
    "bigram_score": bigrams,
    "circuits": circuits,
    "direct_attributions": lambda model: list(direct_attributions(model, ROWS).values()),
    "looks": looks,
    "head_ablations": lambda model: [head_ablations(model, ROWS, "resample", seeds.stream(0))],
    **{
        f"position_ablations, {kind}": lambda model, kind=kind: [position_ablations(model, ROWS, kind, seeds.stream(0))]
        for kind in ("zero", "mean", "resample", "pattern-preserving")
    },
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_rows_one_by_one_give_what_they_give_at_once(measure, changes, monkeypatch) -> None:
    model, found = random_model(**changes).to(torch.float64), []
    for evaluated, n_blocks in ((1, len(ROWS)), (2**40, 1)):
        monkeypatch.setattr("mechgrok.model.EVALUATED", evaluated)
        assert len(list(shares(model, ROWS))) == n_blocks
        found.append(measure(model))
    for one_by_one, at_once in zip(*found, strict=True):
        torch.testing.assert_close(one_by_one, at_once, atol=1e-10, rtol=1e-10)


def test_where_heads_look_is_what_their_patterns_say() -> None:
    model = random_model()
    seen = multigrams.places(ROWS, SPLIT.labels)
    found = multigrams._looks(multigrams._attention(model, ROWS), ROWS.tokens.numpy(), seen, bos=0)
    _, cache = model.run_with_cache(ROWS.tokens)
    for place, (example, pos) in enumerate(zip(seen.example, seen.pos, strict=True)):
        for head in range(8):
            row = cache["pattern", head // 4][example, head % 4, pos].numpy()
            assert (found.token[head, place], found.previous[head, place]) == (row[pos], row[max(pos - 1, 0)])
            far = row[1 : max(pos - 1, 0)]  # without BOS, which is the first
            expected = (far.max(), 1 + far.argmax()) if len(far) else (-1, 0)
            assert (found.at_source[head, place], found.source[head, place]) == expected


# ---- the published vocabulary and context

VOCABULARY, N_CTX, N_ROWS, N_HEADS = 5000, 1024, 3, 2
LOGITS = N_CTX * VOCABULARY  # of one row, which is a block; the patterns of all rows in one layer are more numbers
TABLE = VOCABULARY**2  # of bigrams: it does not grow with the rows


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation returns, the bigram table left out."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        sizes = {tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in tensors}
        self.numbers = max({self.numbers, *sizes} - {TABLE})
        return out


@pytest.fixture(scope="module")
def published() -> Iterator[tuple[HookedTransformer, Split]]:
    """Few rows and a narrow model, but the vocabulary and the context of heads-paper.

    What several analyses ask for is made once, by the first of them.
    """
    config = load_config("heads-paper")
    assert (config.task.vocabulary, config.task.n_ctx) == (VOCABULARY, N_CTX)
    tokens = torch.randint(VOCABULARY, (N_ROWS, N_CTX), generator=seeds.stream(0))
    examples = next_token_examples(tokens)
    split = Split(examples, examples, tuple(map(str, range(VOCABULARY))), VOCABULARY, {"code": examples})
    shape = config.model.model_copy(update={"d_model": 8, "n_heads": N_HEADS, "d_head": 4})
    with pytest.MonkeyPatch.context() as patch:
        for function, modules in (
            ("memorized_on", (head_types, analyses.multigrams)),
            ("head_evidence", (head_types,)),
        ):
            once = made_once(getattr(head_types, function))
            for module in modules:
                patch.setattr(module, function, once)
        yield build_model(shape, split, 0), split


def made_once(function: Callable) -> Callable:
    made: list[Any] = []

    def once(*args: Any) -> Any:
        if not made:
            made.append(function(*args))
        return made[0]

    return once


@pytest.mark.parametrize("name", load_config("heads-paper").analyses.names)
def test_an_analysis_holds_no_logits_and_no_patterns_of_all_rows(name: str, published) -> None:
    model, split = published
    analysis = contract.load(name)
    tracemalloc.start()  # which numpy reports to, and torch does not
    with Largest() as largest:
        facts = contract._prepared(analysis, model, split)
        series = analysis.measure(model, split, seeds.stream(0), facts)
    _, of_numpy = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(isinstance(values, np.ndarray | float) for values in series.values())
    assert largest.numbers <= LOGITS < N_ROWS * N_HEADS * N_CTX**2
    assert of_numpy < 4 * N_ROWS * 2 * N_HEADS * N_CTX**2  # the patterns of all rows in float32
