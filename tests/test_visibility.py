"""What positions see and what classes mean: bidirectional and windowed attention, classes that are no tokens."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok import seeds
from mechgrok.errors import MeasureError, ShapeError
from mechgrok.measures import attention, copying
from mechgrok.measures.ablation import clean_run, put_head
from mechgrok.measures.circuits import searched_circuits
from mechgrok.measures.head_types import probe, typed_heads
from mechgrok.measures.in_context import in_context_score, position_losses, target_losses
from mechgrok.measures.multigrams import Memory, memorized_on
from mechgrok.measures.needs import check_next_tokens, visible_positions
from mechgrok.measures.path_ablation import INPUTS, path_ablation
from mechgrok.tasks import make_split
from tests import hand_built
from tests.all_measures import REPEATS, ROWS, SPLIT, other_model
from tests.oracles import tiny_config
from tests.planted import language_config

N_POS = SPLIT.test.tokens.shape[1]
PLACE = torch.arange(N_POS)
WINDOW = {"use_local_attn": True, "window_size": 10}
SEEN = {
    "causal": ({}, PLACE[:, None] >= PLACE),
    "alibi": ({"positional_embedding_type": "alibi"}, PLACE[:, None] >= PLACE),
    "bidirectional": ({"attention_dir": "bidirectional"}, torch.ones(N_POS, N_POS, dtype=torch.bool)),
    "windows": (
        {**WINDOW, "attn_types": ["local"] * 3}, (PLACE[:, None] >= PLACE) & (PLACE[:, None] - PLACE < 10)
    ),
}  # fmt: skip
VISIBILITIES = pytest.mark.parametrize(("changes", "seen"), SEEN.values(), ids=SEEN)


def keys(kind: str, row: list[int], query: int) -> list[int]:
    """The positions that a kind asks about, spelled out."""
    return {
        "previous-token": [query - 1],
        "current-token": [query],
        "first-token": [0],
        "duplicate-token": [key for key in range(query) if row[key] == row[query]],
    }[kind]


@VISIBILITIES
def test_scores_and_chance_are_those_of_a_count_by_hand(changes: dict, seen: Tensor) -> None:
    model, rows = other_model(**changes), SPLIT.test.first(3)
    assert torch.equal(visible_positions(model, rows.tokens), seen.expand(3, -1, -1))
    _, cache = model.run_with_cache(rows.tokens)
    pattern = torch.stack([cache["pattern", layer] for layer in range(3)], 1).flatten(1, 2).detach()
    assert bool(((pattern > 0) <= seen).all())
    found = attention.attention_scores(model, rows)
    for kind in attention.ATTENTION_KINDS:
        scores, chances = [], []
        for index, row in enumerate(rows.tokens.tolist()):
            for query in range(2, N_POS):
                asked = [key for key in keys(kind, row, query) if seen[query, key]]
                if asked:
                    scores.append(pattern[index, :, query, asked].sum(-1))
                    chances.append(len(asked) / int(seen[query].sum()))
        torch.testing.assert_close(found[kind].score, torch.stack(scores).mean(0))
        assert found[kind].chance == pytest.approx(sum(chances) / len(chances), rel=1e-12)


@pytest.mark.parametrize("kind_of_attention", sorted(SEEN.keys() - {"alibi"}))  # whose attention is not uniform
def test_uniform_attention_is_at_chance_whatever_is_visible(kind_of_attention: str) -> None:
    model = other_model(**SEEN[kind_of_attention][0])
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.zero_()
            block.attn.b_Q.zero_()
    found = attention.attention_scores(model, SPLIT.test) | {"prefix": attention.prefix_matching(model, REPEATS)}
    for kind, of in found.items():
        torch.testing.assert_close(of.times_chance, torch.ones(12, dtype=torch.float64), msg=kind)
        assert float(of.spread.max()) < 1e-6


def test_layers_that_see_differently_have_no_one_chance_unless_rows_are_short() -> None:
    model = other_model(**WINDOW, attn_types=["global", "local", "global"])
    with pytest.raises(MeasureError, match=r"the heads of blocks\.1\.attn do not all see .* no longer than the window"):
        attention.attention_scores(model, SPLIT.test)
    short = hand_built.cut(SPLIT.test, 10)
    expected = sum(1 / (query + 1) for query in range(2, 10)) / 8
    assert attention.attention_scores(model, short)["previous-token"].chance == pytest.approx(expected)


def refused(model: HookedTransformer) -> dict[str, Callable[[], object]]:
    """What predicts the next token from those before it."""
    return {
        "in-context score": lambda: in_context_score(model, SPLIT.test, (2, 8), (16, 24)),
        "search for multigrams": lambda: memorized_on(model, SPLIT),
        "head's type": lambda: typed_heads(model, SPLIT, [Memory((), 0.0, 0.0)] * 12),
        "search for induction circuits": lambda: searched_circuits(model, SPLIT),
    }


@pytest.mark.parametrize("name", refused(other_model()))
def test_what_predicts_from_the_tokens_before_is_refused_where_later_ones_are_seen(name: str) -> None:
    ask = refused(other_model(attention_dir="bidirectional"))[name]
    with pytest.raises(MeasureError, match=f"{name} asks .* positions see later ones .attention_dir 'bidirectional'"):
        ask()


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_dir": "bidirectional", "normalization_type": "LN"},
        {"normalization_type": "RMS", "use_normalization_before_and_after": True},
    ],
    ids=["bidirectional", "a norm after the heads"],
)
def test_a_path_equals_a_change_at_transformer_lens_own_split_inputs(changes: dict) -> None:
    """By as much as the sender's ablation changes what its layer writes, which a norm may see first."""
    model = other_model(**changes)
    clean = clean_run(model, ROWS)
    mean = clean.z[0][:, :, 1].mean(0, keepdim=True)
    wrote = []
    for hooks in ([], [put_head("blocks.0.attn.hook_z", 1, mean)]):
        with model.hooks(hooks):
            _, cache = model.run_with_cache(ROWS.tokens, stop_at_layer=1)
        wrote.append(cache["blocks.0.hook_attn_out"].detach())
    change = wrote[1] - wrote[0]

    def add(x: Tensor, hook: object) -> Tensor:
        return x.index_add(2, torch.tensor([3]), change[:, :, None])

    model.set_use_split_qkv_input(True)
    hooks = [(f"blocks.2.hook_{letter}_input", add) for letter in INPUTS]
    logits = model.run_with_hooks(ROWS.tokens, fwd_hooks=hooks).detach()[:, -7:]
    model.set_use_split_qkv_input(False)
    found = path_ablation(model, ROWS, (0, 1), (2, 3), INPUTS, "mean", seeds.stream(0), clean)
    torch.testing.assert_close(found, target_losses(logits, ROWS.tensors[1]) - clean.losses, rtol=1e-9, atol=1e-9)
    assert float(found.abs().max()) > 1e-3


# ---- classes that are no tokens


def test_eigenvalues_are_refused_where_classes_are_no_tokens() -> None:
    """A classifier's class 1 is not its token 1."""
    model = other_model(d_vocab_out=2)
    with pytest.raises(MeasureError, match="this model reads 9 tokens and answers with 2 classes; name the `tokens`"):
        copying.eigenvalue_copying(model)
    with pytest.raises(MeasureError, match="for ids below 2, got 0 to 8"):
        copying.eigenvalue_copying(model, range(9))


def test_eigenvalues_of_the_tokens_that_are_classes_too() -> None:
    """As of modular addition: nine tokens, of which the last, '=', is no class. By the whole matrix of each head."""
    model = other_model(d_vocab_out=8)
    found = copying.eigenvalue_copying(model, [5, 1, 3]).unflatten(0, (3, 4))
    ids = torch.tensor([5, 1, 3])
    for layer, block in enumerate(model.blocks):
        for head in range(4):
            whole = model.W_E[ids] @ block.attn.W_V[head] @ block.attn.W_O[head] @ model.W_U[:, ids]
            values = torch.linalg.eigvals(whole.detach())
            assert float(found[layer, head]) == pytest.approx(float(values.real.sum() / values.abs().sum()), abs=1e-6)


def test_copying_needs_repeated_tokens_that_are_classes_and_the_start_token_need_be_none() -> None:
    with pytest.raises(MeasureError, match="token 8 is none of the model's 8 classes"):
        copying.copying_scores(other_model(d_vocab_out=8), REPEATS, REPEATS.first)
    last = 8  # the start token, where it has the last id
    moved = replace(REPEATS, tokens=torch.where(REPEATS.tokens == 0, last, REPEATS.tokens - 1))
    with_class, without = other_model(), other_model(d_vocab_out=8)
    with torch.no_grad():  # the same readers of the tokens, less their mean: a start token of mean logits changes none
        read = with_class.W_U[:, :8]
        without.unembed.W_U.copy_(read)
        with_class.unembed.W_U[:, last] = read.mean(1)
    with_start, apart = (copying.copying_scores(m, moved, moved.first) for m in (with_class, without))
    torch.testing.assert_close(with_start.share, apart.share)
    assert with_start.chance == apart.chance


def test_repeats_are_of_tasks_that_predict_tokens() -> None:
    """Three kinds of target: the next token, a class at the end, and one of another meaning at every place."""
    check_next_tokens(make_split(language_config(), 0).test, "it")
    addition = make_split(tiny_config().task, 0)
    labelled = replace(SPLIT, test=replace(SPLIT.test, targets=SPLIT.test.tokens % 2), n_classes=2)
    for split in (addition, labelled):
        with pytest.raises(MeasureError, match="takes class i for token i, and the targets of these examples are not"):
            probe(split, seeds.stream(0))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"d_vocab": 8}, "need 9 tokens and the model has 8"), ({"d_vocab_out": 5}, "need 9 classes and the model has 5"),
     ({"n_ctx": 10}, "need 16 positions in a row and the model has 10")],
)  # fmt: skip
def test_examples_of_another_task_are_refused_by_what_they_need(changes: dict, sentence: str) -> None:
    with pytest.raises(ShapeError, match=sentence):
        position_losses(other_model(**changes), ROWS)
