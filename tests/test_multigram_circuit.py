"""Paths between layers on a model whose costs are known by hand, and migration on invented curves."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformer_lens import HookedTransformer

from analyses import multigram_circuit as analysis
from mechgrok import seeds
from mechgrok.measures.ablation import clean_run
from mechgrok.measures.circuits import direct_effects, layer_path_effects
from mechgrok.measures.in_context import position_losses
from mechgrok.measures.path_ablation import INPUTS, path_ablation
from mechgrok.model import build_model, model_from_parameters
from mechgrok.types import Examples, LLCCurve, Report, Split, Stage
from tests.hand_built import (
    CONFIG,
    GAIN,
    N_CTX,
    N_PLAIN,
    N_TOKENS,
    OUT,
    POSITION,
    PREV,
    SPLIT,
    TOKEN,
    TWINS,
    hand_built_model,
)
from tests.planted import assert_only_the_end_is_judged
from tests.test_attention_measures import ARCHITECTURES, TWICE, random_model

KINDS = ("bigram", "ngram", "close", "never")
BIGRAM, NGRAM, CLOSE, NEVER = range(len(KINDS))
N_ROWS = 4 * N_PLAIN


def mixed_rows() -> Split:
    """Rows of which every eight, of all or of every other one, hold each token once at every position.

    The target is the previous token for "close", the token itself for "bigram" and, at the last position, "ngram".
    Nothing is scored before the third position.
    """
    steps = torch.randint(1, N_PLAIN, (N_CTX,), generator=seeds.stream(0)).cumsum(0)  # never the same twice
    tokens = (1 + (torch.arange(N_PLAIN)[:, None] + steps) % N_PLAIN).repeat_interleave(2, 0)
    tokens = tokens.repeat(N_ROWS // len(tokens), 1)
    kinds = torch.tensor([BIGRAM, CLOSE] * (N_CTX // 2)).expand(N_ROWS, -1).clone()
    kinds[:, -1] = NGRAM
    targets = torch.where(kinds == CLOSE, tokens.roll(1, 1), tokens)
    weights = torch.ones(N_ROWS, N_CTX)
    weights[:, :2] = 0.0
    test = Examples(tokens, targets, weights)
    return replace(SPLIT, test=test, kinds=kinds, kind_names=KINDS)


MIXED = mixed_rows()


def relay(direct: float = 0.0) -> HookedTransformer:
    """L0H0 writes the previous token to `prev`, L1H1 copies `prev` of its own position to `out`, L0H1 copies the token
    to `out` with this gain; all other heads are zero."""
    parameters = {name: torch.zeros_like(q) for name, q in build_model(CONFIG, SPLIT, 0).named_parameters()}
    built = dict(hand_built_model().named_parameters())
    for name in ("embed.W_E", "pos_embed.W_pos", "unembed.W_U"):
        parameters[name] = built[name].detach().clone()
    for letter in "QKVO":
        parameters[f"blocks.0.attn.W_{letter}"][0] = built[f"blocks.0.attn.W_{letter}"][0].detach()
    for layer, head, source, gain in ((1, 1, PREV, 1.0), (0, 1, TOKEN, direct)):
        attn = f"blocks.{layer}.attn"
        parameters[f"{attn}.W_Q"][head, POSITION] = 40 * 24**0.5 * torch.eye(N_CTX)
        parameters[f"{attn}.W_K"][head, POSITION] = torch.eye(N_CTX)
        parameters[f"{attn}.W_V"][head, source, :N_TOKENS] = torch.eye(N_TOKENS)
        parameters[f"{attn}.W_O"][head, :N_TOKENS, OUT] = gain * torch.eye(N_TOKENS)
    return model_from_parameters(CONFIG, SPLIT, parameters)


def measured(model: HookedTransformer, split: Split = MIXED) -> tuple[dict, dict]:
    facts = analysis.prepare(model, split)
    return facts, analysis.measure(model, split, seeds.stream(0), facts)


SURE = GAIN - math.log(math.exp(GAIN) + 8)  # log probability of the token that is written
OTHER = -math.log(math.exp(GAIN) + 8)  # and of any other
UNSURE = GAIN / 8 - math.log(8 * math.exp(GAIN / 8) + 1)  # of a plain token if all are written alike; BOS is not


def test_the_relays_path_costs_what_is_computed_by_hand() -> None:
    facts, row = measured(relay())
    assert facts["kinds"] == list(KINDS) and facts["dearest paths"][CLOSE] == "L0H0 -> L1H1"
    expected = [OTHER - UNSURE, OTHER - UNSURE, SURE - UNSURE, math.nan]
    np.testing.assert_allclose(row["all"], expected, atol=1e-5)
    np.testing.assert_allclose(row["into"][1], expected, atol=1e-5)
    assert row["path"][CLOSE] == pytest.approx(SURE - UNSURE, abs=1e-5)
    assert np.abs(row["into"][[0, 2, 3], :3]).max() == 0.0
    np.testing.assert_allclose(row["direct"][:, :3], 0.0, atol=1e-9)
    assert row["excess"][CLOSE] == pytest.approx(SURE - OTHER, abs=1e-5) and row["excess"][BIGRAM] == 0.0
    np.testing.assert_allclose(row["all_error"][:3], 0.0, atol=1e-6)  # all rows are alike
    assert np.isnan([row[name][..., NEVER] for name in ("all", "excess", "all_error")]).all()
    assert row["V-composition"][0, 1] > 2 and np.isnan(row["K-composition"][1, 0])


def test_what_a_head_tells_the_logits_alone_is_no_path() -> None:
    _, row = measured(relay(direct=0.5))
    half = GAIN / 2
    alone = half - math.log(math.exp(GAIN) + math.exp(half) + 7)  # of the token itself, beside the previous one
    average = half / 8
    without = average - math.log(math.exp(GAIN + average) + 7 * math.exp(average) + 1)
    np.testing.assert_allclose(row["direct"][1, BIGRAM], alone - without, atol=1e-5)
    np.testing.assert_allclose(row["direct"][[0, 2, 3], :3], 0.0, atol=1e-9)
    assert row["into"][1, CLOSE] > 0.1 and np.abs(row["into"][[0, 2, 3], :3]).max() == 0.0


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_all_paths_of_one_sender_are_its_path_ablation(changes) -> None:
    """All other heads of layer 0 say nothing, so that the sender is the only one that can be missed."""
    model = random_model(**changes).to(torch.float64)
    with torch.no_grad():
        model.blocks[0].attn.W_O[1:] = 0.0
    clean = clean_run(model, TWICE)
    for receiver in (0, 2):
        path = path_ablation(model, TWICE, (0, 0), (1, receiver), INPUTS, "mean", seeds.stream(0), clean)
        effect = layer_path_effects(model, TWICE, 0, 1, [receiver], clean)
        torch.testing.assert_close(effect, path, atol=1e-9, rtol=1e-9)
        assert float(path.abs().max()) > 1e-3


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_paths_into_all_heads_and_to_the_logits_make_up_a_heads_ablation(changes) -> None:
    """Without a second layer that answers, only what goes straight to the logits is left of a head."""
    model = random_model(**changes | {"d_mlp": None}).to(torch.float64)
    with torch.no_grad():
        model.blocks[1].attn.W_O.zero_()
    clean = clean_run(model, TWICE)
    assert float(layer_path_effects(model, TWICE, 0, 1, range(4), clean).abs().max()) < 1e-12
    hook = ("blocks.0.attn.hook_z", lambda z, hook: torch.cat([z[:, :, :1].mean(0, True).expand_as(z[:, :, :1]),
                                                               z[:, :, 1:]], 2))  # fmt: skip
    expected = position_losses(model, TWICE, lambda rows: [hook]) - clean.losses
    torch.testing.assert_close(direct_effects(model, TWICE, 0, clean)[0], expected, atol=1e-9, rtol=1e-9)
    assert float(expected.abs().max()) > 1e-3


def test_induction_needs_layer_0_for_repeats_and_a_model_of_one_layer_has_no_paths() -> None:
    kinds = torch.full_like(SPLIT.test.tokens, 0)
    facts, row = measured(hand_built_model(), replace(SPLIT, kinds=kinds, kind_names=("repeat",)))
    receivers = [facts["heads of layer 1"][i] for i in np.flatnonzero(row["into"][:, 0] > 0.1)]
    assert receivers == list(TWINS) and row["all"][0] > row["into"][:, 0].max()
    assert np.isnan(row["excess"]).all()  # nothing to compare with
    facts, row = measured(random_model(n_layers=1), SPLIT)
    assert facts["kinds"] == ["all"] and set(row) == {"direct"} and row["direct"].shape == (4, 1)


def test_examples_are_searched_and_measured_apart_with_their_kinds() -> None:
    split = replace(MIXED, kinds=MIXED.test.tokens)  # so that the kinds tell the rows
    for n_positions, n in ((10, 8), (12 * N_CTX, 12), (10**6, N_ROWS // 2)):
        searched, kinds = analysis.some_rows(split, n_positions, analysis.SEARCHED)
        measured, others = analysis.some_rows(split, n_positions, analysis.MEASURED)
        assert len(searched) == len(measured) == n
        assert torch.equal(searched.tokens, kinds) and torch.equal(measured.tokens, others)
    everything, _ = analysis.some_rows(split, 10**6)
    assert torch.equal(everything.tokens, split.test.tokens)
    lone = replace(split, test=split.test.first(1), kinds=None)
    for part in (analysis.SEARCHED, analysis.MEASURED):
        few, kinds = analysis.some_rows(lone, 100, part)
        assert len(few) == 1 and int(kinds.abs().max()) == 0


def test_many_examples_are_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part has a mean of its own: here both halves have the same."""
    model, facts = relay(), analysis.prepare(relay(), MIXED)
    whole = analysis.measure(model, MIXED, seeds.stream(0), facts)
    monkeypatch.setattr(analysis, "FEW", N_PLAIN * N_CTX)
    parts = analysis.measure(model, MIXED, seeds.stream(0), facts)
    np.testing.assert_allclose(parts["all"], whole["all"], atol=1e-6)


# ---- the analysis: invented curves

STEPS = np.array([0, 10, 30, 100, 300, 600, 1000, 1500, 3000])
HEADS = tuple(f"L{layer}H{head}" for layer in range(2) for head in range(4))
STAGES = (
    Stage("S1", "rising", 0, 100, None, None, 5, None),
    Stage("S2", "rising", 100, 600, None, None, 20, None),
    Stage("S3", "falling", 600, 3000, None, None, -5, None),
)
RISES = np.array([0, 1, 2, 4, 6, 8, 10, 11, 12.0])
FALLS = np.array([0, 1, 2, 5, 9, 10, 8, 6, 5.0])
FACTS = {
    "kinds": list(KINDS),
    "dearest paths": ["L0H0 -> L1H1"] * 4,
    "heads of layer 0": list(HEADS[:4]),
    "heads of layer 1": list(HEADS[4:]),
}
MIGRATION, NEEDS = slice(0, 3), slice(3, 9)  # of each kind: needed at all, needed more, in one stage


def curve_of(first: np.ndarray, second: np.ndarray, error: float = 0.2, seed: int = 0, **changes) -> LLCCurve:
    """The heads of a layer spread around its curve; their mean errs by the error at most."""
    spread = np.linspace(-1, 1, 4)[:, None]
    noise = error * np.random.default_rng(seed).normal(size=(2, len(STEPS)))
    llc = np.concatenate([first + noise[0] + spread, second + noise[1] + spread])
    reference = LLCCurve(STEPS, HEADS, llc, np.full(llc.shape, error))
    whole = LLCCurve(STEPS, ("model",), RISES[None], np.full((1, len(STEPS)), 0.2))
    return replace(whole, refined={"reference": replace(reference, **changes)})


def series_of(close: np.ndarray, ngram: np.ndarray, error: float = 0.05) -> dict[str, np.ndarray]:
    """What `measure` gives, with these costs of all paths more than those of bigram tokens, which are BASE."""
    nothing = np.zeros(len(STEPS))
    excess = np.stack([nothing, ngram, close, nothing * np.nan], 1)
    composition = np.ones((len(STEPS), 4, 4))
    shapes = {"all": excess + BASE, "excess": excess, "path": excess}
    errors = {f"{name}_error": np.full(excess.shape, error) for name in shapes}
    by_head = {name: np.repeat(excess[:, None], 4, 1) for name in ("into", "direct")}
    return shapes | errors | by_head | {f"{mode}-composition": composition for mode in "KQV"}


BASE = 0.3
LATE, EARLY = (np.interp(np.log1p(STEPS), np.log1p(x), [0, 1]) for x in ((100, 600), (0, 30)))
NEEDED = series_of(LATE, LATE / 2)


def concluded(curve: LLCCurve, series: dict = NEEDED, stages=STAGES, facts: dict = FACTS) -> tuple[dict, list]:
    series = {"step": STEPS} | series
    derived = analysis.derive(series, curve, facts, np.random.default_rng(0))
    return derived, analysis.conclude(series | derived, stages, curve)


def test_migration_is_claimed_where_it_was_planted() -> None:
    derived, claims = concluded(curve_of(FALLS, RISES))
    assert [claim.stage for claim in claims] == ["S3"] * 5 + ["S2", "S3", "S3", "S2"]
    assert all(claim.holds for claim in claims), [(claim.text, claim.value) for claim in claims]
    assert derived["peak_step"] == 600 and derived["fall"] == pytest.approx(5, abs=1)
    np.testing.assert_allclose(derived["reference_error"], 0.2)  # the mean's error at most
    llc = derived["reference_llc"]
    assert claims[2].value == pytest.approx(
        min(llc[0, 5] - llc[0, -1], llc[1, -1] - llc[1, 5]) - 1.96 * 0.2 * math.sqrt(2)
    )


@pytest.mark.parametrize(
    ("first", "second", "holds"),
    [
        (RISES, RISES, [False, False, False]),
        (np.minimum(RISES, 10), RISES, [False, True, False]),
        (FALLS, FALLS, [True, False, False]),
        (RISES, FALLS, [False, False, False]),
    ],
    ids=["both rise", "layer 0 only stops", "both fall", "the other way"],
)
def test_without_migration_none_is_claimed(first: np.ndarray, second: np.ndarray, holds: list[bool]) -> None:
    curve = curve_of(first, second, error=1e-3 if first is not FALLS else 0.2)
    _, claims = concluded(curve)
    found = [claim.holds for claim in claims[MIGRATION]]
    assert found[0] == holds[0] and found[2] == holds[2]
    if holds != [False, True, False]:  # where a plateau peaks is chance
        assert found[1] == holds[1]
    assert all(claim.holds for claim in claims[NEEDS])


def test_a_plateaus_noise_seldom_passes_for_a_fall() -> None:
    plateau, n = np.minimum(RISES, 6), 200
    falls = [concluded(curve_of(plateau, RISES, 0.5, seed))[1][0].holds for seed in range(n)]
    assert 0.0 < np.mean(falls) <= 0.11  # .05, and 4 of its errors at n
    assert np.mean([concluded(curve_of(FALLS, RISES, 0.5, s))[1][0].holds for s in range(20)]) == 1.0


def test_needs_are_claimed_of_the_stage_in_which_they_grow_and_not_without() -> None:
    curve = curve_of(FALLS, RISES)
    _, claims = concluded(curve, series_of(LATE, EARLY))
    assert [claim.stage for claim in claims[NEEDS]] == ["S3", "S3", "S2", "S3", "S3", "S1"]
    assert claims[3].value == pytest.approx(1 + BASE - 1.96 * 0.05)
    assert claims[4].value == pytest.approx(1 - 1.96 * 0.05)
    for close in (-LATE, 0 * LATE, 0.09 * LATE, 0.105 * LATE):  # less than bigrams, nothing, within the errors, little
        _, claims = concluded(curve, series_of(close, LATE))
        assert [claim.holds for claim in claims[NEEDS]] == [close[-1] > -BASE, False, False, True, True, True]
    nothing = series_of(0 * LATE, 0 * LATE, error=0.0)  # paths that do nothing at all
    _, claims = concluded(curve, nothing | {"all": nothing["excess"]})
    assert not any(claim.holds for claim in claims[NEEDS])
    _, claims = concluded(curve, series_of(np.log1p(STEPS), LATE))  # grows all the time alike
    assert [claim.holds for claim in claims[NEEDS]] == [True, True, False, True, True, True]


def unrefined(curve: LLCCurve) -> LLCCurve:
    return replace(curve, refined={})


@pytest.mark.parametrize(
    "curve",
    [
        unrefined(curve_of(FALLS, RISES)),
        replace(curve_of(FALLS, RISES), refined={"reference": curve_of(FALLS, RISES)}),
        curve_of(FALLS, RISES, healthy=np.arange(8)[:, None] != np.full((1, len(STEPS)), 5)),
    ],
    ids=["no reference", "a reference without heads", "one head is never healthy"],
)
def test_without_estimates_on_the_reference_migration_is_nan(curve: LLCCurve) -> None:
    derived, claims = concluded(curve)
    assert np.isnan([claim.value for claim in claims[MIGRATION]]).all()
    assert not any(claim.holds for claim in claims[MIGRATION]) and all(claim.holds for claim in claims[NEEDS])
    assert len(derived["reference_step"]) == 0
    report = Report("multigram_circuit", STEPS, NEEDED, tuple(claims), FACTS, derived)
    assert len(analysis.tables(report)) == 2
    assert analysis.plot(report, SimpleNamespace(stages=STAGES, curve=curve))


def test_an_unhealthy_head_takes_its_checkpoint_along() -> None:
    healthy = np.ones((8, len(STEPS)), bool)
    healthy[3, 5] = False
    derived, _ = concluded(curve_of(FALLS, RISES, healthy=healthy))
    assert derived["reference_step"].tolist() == [step for step in STEPS if step != 600]
    assert derived["peak_step"] == 300


@pytest.mark.parametrize("n_layers", [1, 2])
def test_text_without_kinds_has_no_needs_and_still_reports(n_layers: int) -> None:
    model, split = random_model(n_layers=n_layers), replace(SPLIT, kinds=None)
    facts, row = measured(model, split)
    series = {name: np.stack([value] * len(STEPS)) for name, value in row.items()}
    curve = unrefined(curve_of(FALLS, RISES))
    derived, claims = concluded(curve, series, facts=facts)
    assert len(claims) == 9 and np.isnan([claim.value for claim in claims]).all()
    report = Report("multigram_circuit", STEPS, series, tuple(claims), facts, derived)
    for columns, rows in analysis.tables(report).values():
        assert all(len(row) == len(columns) for row in rows)
    assert analysis.plot(report, SimpleNamespace(stages=STAGES, curve=curve))


def test_the_claims_are_the_same_for_any_stages_and_without_any_only_those_on_the_end_are_judged() -> None:
    curve = curve_of(FALLS, RISES)
    _, claims = concluded(curve)
    _, without = concluded(curve, stages=())
    assert_only_the_end_is_judged(without, claims)


def test_tables_and_figures() -> None:
    curve = curve_of(FALLS, RISES)
    derived, claims = concluded(curve)
    report = Report("multigram_circuit", STEPS, NEEDED, tuple(claims), FACTS, derived)
    paths, composition, reference = analysis.tables(report).values()
    for columns, rows in (paths, composition, reference):
        assert rows and all(len(row) == len(columns) for row in rows)
    assert paths[1][CLOSE][:3] == ["close", "1.300 ± 0.05", "1.000 ± 0.05"] and paths[1][NEVER][1] == "–"
    assert reference[0] == ["layer", "step 0", "step 600", "step 3000"]
    figures = analysis.plot(report, SimpleNamespace(stages=STAGES, curve=curve))
    assert all(isinstance(figure, Figure) for figure in figures.values())


def test_measuring_needs_no_draw_and_leaves_the_model_alone() -> None:
    model, state = relay(), torch.random.get_rng_state()
    before: dict[str, Tensor] = {name: q.detach().clone() for name, q in model.named_parameters()}
    (_, one), (_, other) = measured(model), measured(model)
    assert all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(q, before[name]) for name, q in model.named_parameters())
    assert not any(hook.fwd_hooks for hook in model.hook_dict.values())
