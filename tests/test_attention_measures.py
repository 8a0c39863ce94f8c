"""Attention, copying, attribution, ablation and in-context measures: hand-built models, and models at chance."""

import math

import pytest
import torch
from transformer_lens import HookedTransformer

from mechgrok import seeds
from mechgrok.config import ModelConfig
from mechgrok.errors import ShapeError
from mechgrok.measures import attention, copying, in_context
from mechgrok.measures.ablation import head_ablations, position_ablations
from mechgrok.measures.attribution import direct_attributions, head_attributions
from mechgrok.measures.head_types import probe
from mechgrok.model import build_model, evaluate, model_losses, scored_logits
from mechgrok.types import Examples
from tests import hand_built
from tests.hand_built import DEAD, DECOY, INDEX, OFFSET, PREVIOUS, TWINS, hand_built_model

TWICE = hand_built.twice(64, seeds.stream(0, "twice"))
SPLIT = hand_built.SPLIT
FLOOR = math.log(1 + 8 * math.exp(-8))  # both twins: the right logit is 8, the other eight are 0
ONE_TWIN = math.log(1 + 8 * math.exp(-4))
ARCHITECTURES = {
    "plain": {},
    "mlp": {"d_mlp": 32},
    "LNPre": {"normalization_type": "LNPre"},
    "LN, shortformer": {"normalization_type": "LN", "positional_embedding_type": "shortformer"},
    "LN, rotary, mlp": {"normalization_type": "LN", "positional_embedding_type": "rotary", "d_mlp": 32},
}


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return hand_built_model()


def random_model(init_std: float = 0.3, **changes: object) -> HookedTransformer:
    """Untrained, every parameter random, biases and gains too."""
    settings = {"n_layers": 2, "d_model": 20, "n_heads": 4, "d_head": 6, "init_std": init_std}
    model = build_model(ModelConfig.model_validate(settings | changes), SPLIT, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.split(".")[-1].startswith("W_"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=seeds.stream(0, name))
    return model


def of(values: torch.Tensor, *names: str) -> list[float]:
    return [float(values[INDEX[name]]) for name in names]


def test_the_hand_built_model_copies_the_second_time(model) -> None:
    loss, accuracy = evaluate(model, TWICE)
    assert accuracy == 1.0
    assert loss == pytest.approx(FLOOR, abs=1e-6) and round(loss, 3) == 0.003


# ---- attention


def test_every_head_attends_as_built(model) -> None:
    scores = attention.attention_scores(model, SPLIT.test)
    queries = torch.arange(2, 24)
    uniform = float((1 / (queries + 1)).mean())
    previous = scores["previous-token"]
    assert previous.chance == pytest.approx(uniform) == scores["current-token"].chance == scores["first-token"].chance
    assert of(previous.score, PREVIOUS, OFFSET) == pytest.approx([1, 0], abs=1e-6)
    assert of(scores["first-token"].score, PREVIOUS, OFFSET) == pytest.approx([0, 1 / 22], abs=1e-6)  # at position 2
    for kind in attention.ATTENTION_KINDS:
        assert of(scores[kind].times_chance, *DEAD) == pytest.approx([1, 1, 1], abs=1e-5)  # uniform attention
        assert scores[kind].spread[INDEX[DEAD[0]]] < 1e-4


def test_attention_to_equal_tokens_is_found_and_its_chance_counts_the_copies() -> None:
    """A first-layer head that looks for its own token divides its attention over all copies, itself included."""
    model = hand_built_model()
    with torch.no_grad():
        for name in ("W_Q", "W_K"):
            weight = getattr(model.blocks[0].attn, name)
            weight[0] = 0.0
            weight[0, hand_built.TOKEN, :9] = (40 * 24**0.5 if name == "W_Q" else 1.0) * torch.eye(9)
    scores = attention.attention_scores(model, SPLIT.test)
    copies = torch.tensor([1.0] * 8 + [2.0] * 7)  # before position 9 ... 23 of BOS + eight tokens thrice
    positions = torch.arange(9, 24)
    duplicate = scores["duplicate-token"]
    assert float(duplicate.score[0]) == pytest.approx(float((copies / (copies + 1)).mean()), abs=1e-5)
    assert duplicate.chance == pytest.approx(float((copies / (positions + 1)).mean()), abs=1e-6)
    current = scores["current-token"].score[0]
    assert float(current) == pytest.approx((7 + float((1 / (copies + 1)).sum())) / 22, abs=1e-5)


def test_prefix_matching_of_the_twins_and_the_decoy_is_1_and_of_a_dead_head_uniform(model) -> None:
    rows = torch.cat([TWICE.tokens, TWICE.targets[:, -1:]], dim=1)
    place = torch.arange(17).expand(64, -1)
    repeats = attention.RepeatedTokens(rows, rows, (place > 0) & (place < 9), place >= 9, 1)
    scores = attention.prefix_matching(model, repeats)
    assert of(scores.score, *TWINS, DECOY) == pytest.approx([1, 1, 1], abs=1e-6)
    assert of(scores.score, DEAD[-1])[0] == pytest.approx(scores.chance) and round(scores.chance, 2) == 0.08
    assert of(scores.score, PREVIOUS, OFFSET) == pytest.approx([0, 0], abs=1e-6)


def test_repeats_are_distinct_tokens_of_jittered_length_that_follow_the_start_token() -> None:
    repeats = attention.repeated_tokens(seeds.stream(0), 64, range(8, 60), bos=0, n_rows=200)
    assert repeats.tokens.shape == (200, 51) and bool((repeats.tokens[:, 0] == 0).all())
    lengths = repeats.first.sum(1)
    assert {int(n) for n in lengths} == set(range(13, 26)) and torch.equal(repeats.second.sum(1), lengths)
    for row, (tokens, length) in enumerate(zip(repeats.tokens, lengths, strict=True)):
        block = tokens[1 : 1 + length]
        assert len(block.unique()) == length and torch.equal(tokens[1 + length : 1 + 2 * length], block)
        assert torch.equal(repeats.targets[row, 1 + length : 1 + 2 * length], block.roll(-1))
        assert bool((block >= 8).all())
    again = attention.repeated_tokens(seeds.stream(0), 64, range(8, 60), bos=0, n_rows=200)
    assert torch.equal(again.tokens, repeats.tokens)
    without = attention.repeated_tokens(seeds.stream(0), 64, range(8, 60), bos=None)
    assert bool(without.first[:, 0].all()) and without.start == 0


def test_a_head_of_fixed_offset_is_no_induction_head_on_jittered_repeats() -> None:
    """Offset 7 hits every match where blocks have 8 tokens, and only some where their length varies."""
    model = hand_built_model()
    source = torch.zeros(24, 24)
    source[torch.arange(24), (torch.arange(24) - 7).clamp(min=0)] = 1
    with torch.no_grad():
        model.blocks[0].attn.W_Q[0, hand_built.POSITION] = 40 * 24**0.5 * source
    repeats = probe(SPLIT, seeds.stream(1))
    scores = attention.prefix_matching(model, repeats)
    eight = (repeats.first.sum(1) == 8)[:, None] & repeats.second
    assert float(scores.score[0]) == pytest.approx(float(eight.sum() / repeats.second.sum()), abs=1e-6)


def test_untrained_models_are_at_chance() -> None:
    repeats = probe(SPLIT, seeds.stream(2))
    model = random_model(init_std=0.1)
    scores = attention.attention_scores(model, SPLIT.test) | {"prefix": attention.prefix_matching(model, repeats)}
    for kind, found in scores.items():
        assert found.times_chance.sub(1).abs().max() < 0.1, kind
    copies = copying.copying_scores(model, repeats, repeats.first)
    assert copies.share.sub(copies.chance).abs().max() < 0.1
    assert abs(float(copying.eigenvalue_copying(model).mean())) < 0.35  # eight heads, each near 0 +- .3


@pytest.mark.parametrize(("direction", "n_seen"), [("causal", 21), ("bidirectional", 24)])
def test_the_spread_is_that_of_shuffled_attention(direction: str, n_seen: int) -> None:
    """One weight pattern per row, shuffled: the score's standard deviation over shuffles is the stated one."""
    model, rng = hand_built_model(), seeds.stream(3)
    model.cfg.attention_dir = direction
    n_rows = 16
    rows = hand_built.full_rows(n_rows, rng)
    at = torch.zeros(n_rows, 24, 24, dtype=torch.bool)
    at[:, 20, 5] = True  # one query a row, so that nothing is said about queries of one row
    weights = torch.rand(n_seen, generator=rng)
    scores = []
    for _ in range(400):
        shuffled = torch.zeros(n_rows, 4, 24, 24)
        for row in range(n_rows):
            shuffled[row, :, 20, :n_seen] = weights[torch.randperm(n_seen, generator=rng)] / weights.sum()
        with model.hooks([("blocks.0.attn.hook_pattern", lambda pattern, hook, new=shuffled: new)]):
            found = attention._scores(model, rows, {"k": lambda tokens: at}, at.any(-1))["k"]
        scores.append(float(found.score[0]))
    sample = torch.tensor(scores)
    assert float(found.spread[0]) == pytest.approx(float(sample.std()), rel=0.12)
    assert found.chance == pytest.approx(1 / n_seen)
    assert float(sample.mean()) == pytest.approx(1 / n_seen, abs=4 * float(sample.std()) / 20)


def test_rows_are_scored_alike_in_one_chunk_or_many(model, monkeypatch) -> None:
    whole = attention.attention_scores(model, SPLIT.test)["duplicate-token"]
    monkeypatch.setattr("mechgrok.model.EVALUATED", 4 * 24**2 * 7)
    parts = attention.attention_scores(model, SPLIT.test)["duplicate-token"]
    torch.testing.assert_close(parts.score, whole.score)
    torch.testing.assert_close(parts.spread, whole.spread)
    assert parts.chance == pytest.approx(whole.chance)


def test_too_short_a_context_is_refused() -> None:
    with pytest.raises(ShapeError, match="a context of 5"):
        attention.repeated_tokens(seeds.stream(0), 4, range(1, 9), bos=0)
    with pytest.raises(ShapeError, match="two plain tokens"):
        attention.repeated_tokens(seeds.stream(0), 24, [3], bos=0)


# ---- copying


def test_the_twins_copy_and_the_decoy_raises_nothing(model) -> None:
    repeats = probe(SPLIT, seeds.stream(4))
    scores = copying.copying_scores(model, repeats, repeats.second)
    assert of(scores.share, *TWINS) == pytest.approx([1, 1]) and of(scores.rescaled, *TWINS) == pytest.approx([1, 1])
    assert all(math.isnan(share) for share in of(scores.share, PREVIOUS, OFFSET, DECOY, *DEAD))
    assert scores.chance == pytest.approx(float((1 / repeats.first.sum(1)).mean()))
    eigenvalues = copying.eigenvalue_copying(model)
    assert of(eigenvalues, *TWINS) == pytest.approx([1, 1])
    assert all(math.isnan(score) for score in of(eigenvalues, PREVIOUS, OFFSET, DECOY, *DEAD))


def test_on_tokens_that_do_not_repeat_a_twin_raises_all_it_sees_alike(model) -> None:
    """No match, so attention is uniform: the attended token gets 1 / (tokens seen) of what is raised."""
    repeats = attention.repeated_tokens(seeds.stream(5), 24, range(1, 8), bos=0)
    lengths = repeats.first.sum(1)
    expected = torch.stack([(1 / torch.arange(1, n + 1)).mean() for n in lengths]).mean()
    share = copying.copying_scores(model, repeats, repeats.first).share
    assert of(share, TWINS[0])[0] == pytest.approx(float(expected), abs=1e-5)


def test_a_head_that_lowers_what_it_attends_to_does_not_copy() -> None:
    model = hand_built_model()
    with torch.no_grad():
        model.blocks[1].attn.W_O[0] *= -1
    repeats = probe(SPLIT, seeds.stream(4))
    assert of(copying.copying_scores(model, repeats, repeats.second).share, *TWINS) == pytest.approx([0, 1])
    assert of(copying.eigenvalue_copying(model), *TWINS) == pytest.approx([-1, 1])


@pytest.mark.parametrize("normalization", ["LN", "RMS"])
def test_the_last_norms_gain_is_in_what_a_head_raises(normalization: str) -> None:
    """A gain of the unembedding's rows, or the same gain of the norm before it."""
    gains = torch.linspace(0.2, 3.0, 20)[torch.randperm(20, generator=seeds.stream(6))]
    in_norm, in_readout = (random_model(normalization_type=normalization) for _ in range(2))
    with torch.no_grad():
        in_norm.ln_final.w.mul_(gains)
        in_readout.unembed.W_U.mul_(gains[:, None])
    repeats = probe(SPLIT, seeds.stream(4))
    plain, one, other = (
        copying.copying_scores(model, repeats, repeats.first).share
        for model in (random_model(normalization_type=normalization), in_norm, in_readout)
    )
    torch.testing.assert_close(one, other)
    assert (one - plain).abs().max() > 1e-3


# ---- direct logit attribution


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_attributions_sum_to_the_logit(changes) -> None:
    model = random_model(**changes)
    terms = direct_attributions(model, TWICE)
    tokens, targets, _ = TWICE.tensors
    logits = scored_logits(model, tokens, targets.shape[1]).double()
    expected = logits.gather(-1, targets[..., None])[..., 0] - logits.mean(-1)
    torch.testing.assert_close(sum(terms.values()), expected, atol=1e-4, rtol=1e-4)
    heads = head_attributions(model, TWICE)
    assert heads.shape == (8, *targets.shape) and torch.equal(heads[5], terms["L1H1"])
    assert float((sum(terms.values()) - heads.sum(0)).abs().max()) > 0.1  # the others matter to the sum


@pytest.mark.parametrize("normalization", [None, "LNPre"])
def test_attributions_agree_with_transformer_lens_where_it_has_them(normalization) -> None:
    model = random_model(normalization_type=normalization)
    _, cache = model.run_with_cache(TWICE.tokens)
    stack = cache.stack_head_results()
    theirs = cache.logit_attrs(stack, TWICE.targets)
    mean = torch.stack([cache.logit_attrs(stack, torch.full_like(TWICE.targets, c)) for c in range(9)]).mean(0)
    torch.testing.assert_close(
        head_attributions(model, TWICE), (theirs - mean)[:, :, -7:].double(), atol=1e-4, rtol=1e-4
    )


def test_only_the_twins_write_to_the_logit(model) -> None:
    """Half of 8 each, less the mean over nine classes."""
    effects = head_attributions(model, TWICE).mean((1, 2))
    assert of(effects, *TWINS) == pytest.approx([4 * 8 / 9] * 2, abs=1e-5)
    assert of(effects, PREVIOUS, OFFSET, DECOY, *DEAD) == [0.0] * 6


# ---- ablation


def test_zero_ablation_gives_the_known_numbers(model) -> None:
    increase = head_ablations(model, TWICE, "zero", seeds.stream(0)).mean(1)
    assert of(increase, PREVIOUS)[0] == pytest.approx(2.49, abs=0.01)
    assert of(increase, *TWINS) == pytest.approx([ONE_TWIN - FLOOR] * 2, abs=1e-6)
    assert round(ONE_TWIN - FLOOR, 3) == 0.134
    assert of(increase, OFFSET, DECOY, *DEAD) == [0.0] * 5


def test_the_twins_hide_each_other(model) -> None:
    with_neither = hand_built_model()
    with torch.no_grad():
        with_neither.blocks[1].attn.W_O[:2] = 0.0
        both = float(model_losses(with_neither, *TWICE.tensors).mean()) - FLOOR
    assert both == pytest.approx(math.log(9) - FLOOR, abs=1e-6) == pytest.approx(2.20, abs=0.01)


def test_preserving_the_patterns_hides_the_previous_token_head_and_not_the_twins(model) -> None:
    increase = head_ablations(model, TWICE, "pattern-preserving", seeds.stream(0)).mean(1)
    assert of(increase, PREVIOUS, OFFSET, DECOY, *DEAD) == pytest.approx([0.0] * 6, abs=1e-6)
    assert of(increase, *TWINS) == pytest.approx([ONE_TWIN - FLOOR] * 2, abs=1e-6)


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("kind", ["zero", "mean", "resample", "pattern-preserving"])
def test_position_ablations_average_to_head_ablations(kind, changes) -> None:
    model = random_model(**changes)
    by_position = position_ablations(model, TWICE, kind, seeds.stream(0))
    assert by_position.shape == (8, 64, 7)
    torch.testing.assert_close(by_position.mean(2), head_ablations(model, TWICE, kind, seeds.stream(0)))
    assert by_position.abs().max() > 1e-3


# ---- loss by position, bigram and kind


def test_the_in_context_score_is_the_known_drop_of_the_loss(model) -> None:
    """Before anything repeats, attention is uniform; the second copy is at the floor."""
    everywhere = Examples(TWICE.tokens, TWICE.targets, torch.ones(64, 16))
    score = in_context.in_context_score(model, everywhere, early=(1, 8), late=(9, 16))
    losses = in_context.position_losses(model, everywhere)
    assert score == pytest.approx(FLOOR - float(losses[:, 1:8].mean()), abs=1e-6) and score < -2
    untrained = in_context.in_context_score(random_model(init_std=0.01), everywhere, early=(1, 8), late=(9, 16))
    assert abs(untrained) < 0.2
    with pytest.raises(ShapeError, match=r"no scored position in window \(0, 9\)"):
        in_context.in_context_score(model, TWICE, early=(0, 9), late=(9, 16))
    with pytest.raises(ShapeError, match=r"window \(9, 20\) of rows of 16"):
        in_context.in_context_score(model, TWICE, early=(9, 16), late=(9, 20))


def test_a_bigram_model_reaches_the_bigram_entropy_and_others_do_not() -> None:
    rng = seeds.stream(6)
    rows = torch.randint(0, 4, (200, 17), generator=rng)
    rows[:, 1::2] = (rows[:, 0:-1:2] + torch.randint(0, 2, (200, 8), generator=rng)) % 4
    examples = Examples(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.ones(200, 16))
    table = in_context.bigram_table(examples, 9, 9)
    assert table[:4].sum(1).tolist() == pytest.approx([1.0] * 4) and float(table[4:].sum()) == 0.0
    count = ((examples.tokens == 1) & (examples.targets == 2)).sum() / (examples.tokens == 1).sum()
    assert float(table[1, 2]) == pytest.approx(float(count))

    model = random_model(d_model=20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[:, :9] = torch.eye(9)
        model.unembed.W_U[:9] = table.log().clamp(min=-60).float()
    score = in_context.bigram_score(model, examples, table)
    assert score.excess == pytest.approx(0.0, abs=1e-6)
    seen = examples.tokens.flatten()
    entropy = torch.tensor([float(torch.special.entr(table[t]).sum()) for t in range(9)], dtype=torch.float64)
    assert score.floor == pytest.approx(float(entropy[seen].mean()))
    untrained = in_context.bigram_score(random_model(init_std=1e-3), examples, table)
    assert untrained.nats == pytest.approx(math.log(9), abs=0.5) and untrained.excess > 0.5


def test_losses_by_kind_separate_what_can_be_predicted(model) -> None:
    everywhere = Examples(TWICE.tokens, TWICE.targets, torch.ones(64, 16))
    kinds = (torch.arange(16) >= 9).long().expand(64, -1)
    losses = in_context.losses_by_kind(model, everywhere, kinds, ("new", "repeated", "never"))
    assert losses["repeated"] == pytest.approx(FLOOR, abs=1e-6) and losses["new"] > 2
    assert math.isnan(losses["never"])
    cut = in_context.losses_by_kind(model, TWICE, kinds, ("new", "repeated"))
    assert cut["repeated"] == pytest.approx(FLOOR, abs=1e-6) and math.isnan(cut["new"])
    with pytest.raises(ShapeError, match="kinds must have the shape"):
        in_context.losses_by_kind(model, TWICE, kinds[:, :5], ("new", "repeated"))
