"""Dates of mechanisms, on invented series whose dates are known and on a model that has learned nothing."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens import HookedTransformer

from analyses import mechanisms
from mechgrok import seeds
from mechgrok.config import ModelConfig
from mechgrok.measures.head_types import probe
from mechgrok.measures.in_context import position_losses
from mechgrok.model import build_model, model_from_parameters
from mechgrok.tasks import make_split
from mechgrok.types import Claim, LLCCurve, Report, Split, Stage
from tests import hand_built
from tests.planted import language_config

STEP = np.array([0, *np.rint(np.expm1(np.linspace(np.log1p(10), np.log1p(3000), 39))).astype(int)])
X = np.log1p(STEP)
VOCABULARY = 40
UNIFORM = math.log(VOCABULARY)
KINDS = ["bigram", "free", "ngram", "skip"]
LEVELS = [2.0, 3.0, 2.5, 2.5]  # what bigrams alone give
FACTS = {"kinds": KINDS, "bigram level": LEVELS, "floor": [1.9, 2.8, 0.0, 0.0], "chance level": [UNIFORM]}
STAGES = [
    Stage("S1", "rising", 0.0, 100.0, None, None, 10.0, None),
    Stage("S2", "falling", 100.0, 600.0, None, None, -3.0, None),
    Stage("S3", "rising", 600.0, 3000.0, None, None, 8.0, None),
]


def grown(date: float, width: float = 0.25) -> np.ndarray:
    """From 0 to 1, half of it at `date`; 0 throughout if it never comes. `width` is in log steps."""
    return np.zeros(len(X)) if math.isinf(date) else 1 / (1 + np.exp(-(X - np.log1p(date)) / width))


def invented(bigrams: float, ngrams: float, previous: float, induction: float, skips: float = 200.0) -> dict[str, Any]:
    """A series in which each mechanism comes at its date, beside others: bigrams help n-grams first."""
    by_kind = np.stack(
        [
            UNIFORM - (UNIFORM - LEVELS[0]) * grown(bigrams),
            np.full(len(STEP), 3.0),
            UNIFORM - (UNIFORM - LEVELS[2]) * grown(bigrams) - LEVELS[2] * grown(ngrams),
            UNIFORM - (UNIFORM - LEVELS[3]) * grown(bigrams) - LEVELS[3] * grown(skips),
        ],
        axis=1,
    )
    loss = by_kind.mean(1)
    return {
        "step": STEP, "loss": loss - loss[0] + UNIFORM, "by_kind": by_kind,
        "previous token": 0.8 * grown(previous), "induction": 3.0 * grown(induction),
    }  # fmt: skip


def curve(rises_at: float) -> LLCCurve:
    return LLCCurve(STEP, ("model",), 20.0 * grown(rises_at)[None], np.full((1, len(STEP)), 0.5))


def derived(series: dict[str, Any], facts: dict[str, Any] = FACTS) -> dict[str, Any]:
    return dict(mechanisms.derive(series, curve(10.0), facts, np.random.default_rng(0)))


def claims(series: dict[str, Any], rises_at: float = 1000.0, stages: list[Stage] = STAGES) -> list[Claim]:
    return mechanisms.conclude({**series, **derived(series)}, stages, curve(rises_at))


IN_ORDER = {"bigrams": 20.0, "ngrams": 120.0, "previous": 400.0, "induction": 1000.0}


def test_planted_dates_are_found_between_their_checkpoints() -> None:
    found = derived(invented(**IN_ORDER))
    planted = {"bigrams": 20.0, "n-grams": 120.0, "skip n-grams": 200.0, "previous token": 400.0, "induction": 1000.0}
    for name, date in planted.items():
        middle, before, after = found[f"date of {name}"]
        assert middle == pytest.approx(date, rel=0.1)
        assert before <= date <= after and before <= middle <= after
        assert {before, after} <= set(STEP.tolist())
        assert np.flatnonzero(after == STEP) == np.flatnonzero(before == STEP) + 1
    tenth, nine_tenths = found["induction window"]
    for part, step in ((0.1, tenth), (0.9, nine_tenths)):
        assert math.log1p(step) == pytest.approx(math.log1p(1000) + 0.25 * math.log(part / (1 - part)), abs=0.05)


def test_a_date_is_interpolated_in_log_steps() -> None:
    series = invented(**IN_ORDER)
    series |= {"step": np.array([0, 3, 15]), "induction": np.array([0.0, 1.0, 3.0]), "loss": np.array([3.0, 2.0, 1.0])}
    series |= {"by_kind": np.array([[3.0, 3, 3, 3], [2.5, 3, 3, 3], [2.0, 3, 3, 3]]), "previous token": np.zeros(3)}
    found = derived(series)
    # Half of the best, 1.5, is a quarter of the way from 1 to 3: ln(1 + step) = ln 4 + ln 4 / 4.
    assert found["date of induction"] == pytest.approx([4**1.25 - 1, 3, 15])


def test_the_known_order_holds_where_it_was_planted() -> None:
    found = claims(invented(**IN_ORDER))
    assert all(claim.holds for claim in found)
    assert [claim.stage for claim in found] == ["S2", "S2", "S3", "S3", "S3", "S3"]
    # The near ends of the intervals are checkpoints, so the ratios are below those of the planted dates.
    dates = derived(invented(**IN_ORDER))
    for index, (earlier, later) in enumerate(pairwise(mechanisms.ORDER)):
        assert found[index].value == dates[f"date of {later}"][1] / dates[f"date of {earlier}"][2]
    assert 4 < found[0].value < 6 and 1.7 < found[2].value < 2.5


def test_dates_between_the_same_checkpoints_are_in_no_order() -> None:
    found = claims(invented(**(IN_ORDER | {"induction": 401.0})))
    assert not found[2].holds and found[2].value < 1


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"bigrams": 300.0}, 0),
        ({"previous": 60.0}, 1),
        ({"induction": 200.0}, 2),
    ],
)
def test_a_broken_order_breaks_the_claim_about_it(change: dict[str, float], broken: int) -> None:
    order = claims(invented(**(IN_ORDER | change)))[:3]
    assert not order[broken].holds and order[broken].value < 1
    assert [claim.holds for claim in order].count(False) == 1


@pytest.mark.parametrize(
    ("missing", "date", "failing"),
    [
        ("bigrams", "bigrams", {0}),
        ("ngrams", "n-grams", {0, 1}),
        ("previous", "previous token", {1, 2}),
        ("induction", "induction", {2, 3, 4, 5}),
    ],
)
def test_a_mechanism_that_never_comes_has_no_date_and_its_claims_do_not_hold(
    missing: str, date: str, failing: set[int]
) -> None:
    series = invented(**(IN_ORDER | {missing: math.inf}))
    assert np.isnan(derived(series)[f"date of {date}"]).all()
    found = claims(series)
    assert {index for index, claim in enumerate(found) if not claim.holds} == failing
    assert all(math.isnan(found[index].value) for index in failing)


def test_what_bigrams_alone_gain_is_no_ngram() -> None:
    """The loss on n-gram targets falls to what bigrams give, and no further."""
    assert np.isnan(derived(invented(**(IN_ORDER | {"ngrams": math.inf})))["date of n-grams"]).all()


def test_a_passing_moment_and_a_faint_growth_are_no_mechanism() -> None:
    series = invented(**IN_ORDER)
    passing = np.where((STEP > 100) & (STEP < 200), 3.0, 0.0)
    assert np.isnan(derived(series | {"induction": passing})["date of induction"]).all()
    assert np.isnan(derived(series | {"induction": series["induction"] * 0.16})["date of induction"]).all()
    assert np.isfinite(derived(series | {"induction": series["induction"] * 0.2})["date of induction"]).all()
    from_the_start = np.full(len(STEP), 3.0)
    assert np.isnan(derived(series | {"induction": from_the_start})["date of induction"]).all()


def test_the_llc_rises_while_induction_forms_or_it_does_not() -> None:
    series = invented(**IN_ORDER)
    assert claims(series, rises_at=1000.0)[3].value == pytest.approx(0.8 * 20 - 1.96 * math.hypot(0.5, 0.5), abs=0.5)
    for elsewhere in (30.0, math.inf):
        still = claims(series, rises_at=elsewhere)[3]
        assert not still.holds and still.value == pytest.approx(-1.96 * math.hypot(0.5, 0.5), abs=0.1)


def test_the_stage_of_induction_may_be_a_falling_one_and_its_growth_may_be_spread() -> None:
    falling = [
        Stage("S1", "rising", 0.0, 600.0, None, None, 8.0, None),
        Stage("S2", "falling", 600.0, 3000.0, None, None, -8.0, None),
    ]
    found = claims(invented(**IN_ORDER), stages=falling)
    assert (found[4].value, found[4].holds) == (-8.0, False)
    spread = invented(**IN_ORDER) | {"induction": 3.0 * X / X[-1]}
    assert not claims(spread)[5].holds


def test_without_kinds_only_what_needs_none_has_a_date() -> None:
    series = invented(**IN_ORDER) | {"by_kind": np.zeros((len(STEP), 0))}
    found = derived(series, {"kinds": [], "bigram level": [], "chance level": [UNIFORM]})
    assert np.isnan(found["date of n-grams"]).all()
    assert np.isfinite(found["date of previous token"]).all() and np.isfinite(found["date of bigrams"]).all()
    concluded = mechanisms.conclude({**series, **found}, STAGES, curve(1000.0))
    assert [claim.holds for claim in concluded] == [False, False, True, True, True, True]


def test_the_table_names_every_mechanism_in_the_order_of_its_date() -> None:
    series = invented(**(IN_ORDER | {"induction": math.inf}))
    report = Report("mechanisms", STEP, series, (), FACTS, derived(series))
    (columns, rows), (losses, of_kinds) = mechanisms.tables(report).values()
    assert [row[0] for row in rows] == ["bigrams", "n-grams", "skip n-grams", "previous token", "induction"]
    assert rows[-1][1:] == ["never"] * 3 and len(columns) == 4
    last = f"{series['by_kind'][-1, 2]:.2f}"
    assert of_kinds[2] == ["ngram", "2.50", last, "0.00"] and len(losses) == 4
    without = Report("mechanisms", STEP, series, (), FACTS | {"floor": []}, derived(series))
    assert mechanisms.tables(without)["Loss by what made the target, in nats"][1][2] == ["ngram", "2.50", last]


@pytest.mark.parametrize("known", [True, False])
def test_an_untrained_model_is_at_chance(known: bool) -> None:
    split = make_split(language_config(n_train=256, n_test=128), seed=0)
    if not known:
        split = Split(split.train, split.test, split.labels, split.n_classes, bos=split.bos, plain=split.plain)
    shape = ModelConfig(n_layers=2, d_model=16, n_heads=2, d_head=8, normalization_type="LN")
    model = build_model(shape, split, seed=0)
    facts = mechanisms.prepare(model, split)
    found = mechanisms.measure(model, split, seeds.stream(0, "x"), facts)
    chance = math.log(split.n_classes)
    assert found["loss"] == pytest.approx(chance, abs=0.05)
    assert found["induction"] == pytest.approx(0.0, abs=0.02)
    assert found["in-context score"] == pytest.approx(0.0, abs=0.02)
    assert found["previous token"] == pytest.approx(0.0, abs=0.02)
    assert found["bigram excess"] > 0.5
    by_kind = np.asarray(found["by_kind"])
    assert by_kind.shape == (len(split.kind_names) if known else 0,)
    assert by_kind == pytest.approx(chance, abs=0.05)
    if known:
        levels = dict(zip(facts["kinds"], facts["bigram level"], strict=True))
        assert facts["chance level"] == [round(chance, 3)]
        assert all(1 < levels[kind] < chance for kind in ("bigram", "ngram", "repeat"))
        floors = dict(zip(facts["kinds"], facts["floor"], strict=True))
        assert floors["ngram"] == floors["repeat"] == floors["skip"] == 0
        # Of a chain's targets bigrams know nearly all, but for the rate at which something else begins.
        assert 0.5 * levels["bigram"] < floors["bigram"] < chance and floors["free"] > floors["bigram"]
    # The same model at every checkpoint has no date for anything, and nothing is divided by nothing.
    series = {"step": STEP} | {key: np.array([value] * len(STEP)) for key, value in found.items()}
    dates = mechanisms.derive(series, curve(10.0), facts, np.random.default_rng(0))
    assert all(np.isnan(dates[f"date of {name}"]).all() for name in mechanisms.ORDER)


def cache(gain: float) -> HookedTransformer:
    """One head that looks at all that came before alike, and makes it likely: a cache, and no induction."""
    n, config = hand_built.N_TOKENS, ModelConfig(n_layers=1, d_model=2 * hand_built.N_TOKENS, n_heads=1, d_head=9)
    own = dict(build_model(config, hand_built.SPLIT, 0).named_parameters())
    parameters = {name: torch.zeros_like(q) for name, q in own.items()}
    parameters["embed.W_E"][:, :n] = torch.eye(n)
    parameters["blocks.0.attn.W_V"][0, :n] = torch.eye(n)
    parameters["blocks.0.attn.W_O"][0, :, n:] = gain * torch.eye(n)
    parameters["unembed.W_U"][n:] = torch.eye(n)
    return model_from_parameters(config, hand_built.SPLIT, parameters)


def test_a_cache_is_no_induction_and_a_late_head_no_previous_token_head() -> None:
    split = replace(hand_built.SPLIT, plain=tuple(range(1, 5)))  # four of eight tokens, so that a cache has a gain
    facts = mechanisms.prepare(hand_built.hand_built_model(), split)

    def measured(model: HookedTransformer) -> dict[str, Any]:
        return dict(mechanisms.measure(model, split, seeds.stream(0, "x"), facts))

    repeats = probe(split, seeds.stream(0, "x"))
    both = replace(repeats.examples, weights=torch.ones(repeats.tokens.shape))
    losses = position_losses(cache(20.0), both)
    assert losses[repeats.first].mean() - losses[repeats.second].mean() > 0.5  # as if it were induction
    for gain in (5.0, 20.0):
        assert measured(cache(gain))["induction"] == pytest.approx(0.0, abs=1e-6)
    whole = hand_built.hand_built_model()
    assert measured(whole)["induction"] > 1.0 and measured(whole)["previous token"] > 0.5
    for part in ("W_Q", "W_K", "W_V", "W_O"):  # the previous-token head moves from layer 0 to layer 1
        first, last = (getattr(block.attn, part) for block in whole.blocks)
        with torch.no_grad():
            last[0], first[0] = first[0].clone(), 0.0
    assert measured(whole)["previous token"] < 0.1


def test_a_run_that_begins_late_does_not_take_its_first_loss_for_chance() -> None:
    """Checkpoints from elsewhere may start when a quarter of the bigrams is learned, or all of it."""
    series = invented(**IN_ORDER)

    def since(step: int) -> dict[str, Any]:
        return derived({name: values[step <= STEP] for name, values in series.items()})

    assert since(16)["date of bigrams"][0] == pytest.approx(derived(series)["date of bigrams"][0])
    assert np.isnan(since(50)["date of bigrams"]).all()
    assert np.isfinite(since(50)["date of induction"]).all()


def test_a_model_that_is_never_better_than_guessing_has_no_date_of_bigrams() -> None:
    series = invented(**IN_ORDER) | {"loss": UNIFORM + 1 - grown(100.0), "by_kind": np.zeros((len(STEP), 0))}
    found = derived(series, {"kinds": [], "bigram level": [], "chance level": [UNIFORM]})
    assert np.isnan(found["date of bigrams"]).all()


def test_rows_and_random_tokens_are_the_same_at_every_checkpoint() -> None:
    split = make_split(language_config(n_train=64, n_test=32), seed=0)
    shape = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_head=8, init_std=0.3)
    model = build_model(shape, split, seed=0)
    facts = mechanisms.prepare(model, split)
    first, again = (mechanisms.measure(model, split, seeds.stream(seed, "x"), facts) for seed in (0, 1))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
    assert torch.isfinite(torch.tensor([first["loss"], first["induction"]])).all()


def test_of_text_n_grams_have_a_date_and_skip_n_grams_have_none() -> None:
    """The kinds that data show: no bigram targets are known, so the loss on all dates bigrams."""
    series = invented(**IN_ORDER)
    kinds = {"kinds": ["other", "close", "ngram"], "bigram level": [2.0, 2.0, 2.5], "chance level": [UNIFORM]}
    found = derived(series | {"by_kind": series["by_kind"][:, [0, 1, 2]]}, kinds)
    assert found["date of n-grams"] == pytest.approx(derived(series)["date of n-grams"])
    assert np.isfinite(found["date of bigrams"]).all() and "date of skip n-grams" not in found
    none = derived(series | {"by_kind": np.full((len(STEP), 3), np.nan)}, kinds | {"bigram level": [np.nan] * 3})
    assert np.isnan(none["date of n-grams"]).all()
