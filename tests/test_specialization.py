"""Contrasts, tests and ranks against closed forms and their nominal levels; the analysis on planted curves."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binom, chi2, norm

from analyses import specialization as analysis
from mechgrok import seeds
from mechgrok.measures.refined import contrast, equality_test, holm, ranks, specialization
from mechgrok.model import build_model, evaluate
from mechgrok.tasks import make_split
from mechgrok.types import LLCCurve, Report, Stage
from tests.oracles import tiny_config
from tests.planted import assert_only_the_end_is_judged

ERROR = np.array([0.1, 0.2, 0.15, 0.1, 0.3, 0.1, 0.2, 0.1])


@pytest.mark.parametrize("scaled", [False, True])
def test_a_contrast_and_its_covariance_are_those_of_many_draws(scaled: bool) -> None:
    llc, error = np.array([3.0, 1.0, 2.0, 2.5]), np.array([0.05, 0.1, 0.02, 0.08])
    values, covariance = contrast(llc, error, scaled)
    used = llc / llc.mean() if scaled else llc
    np.testing.assert_allclose(values, [used[h] - np.delete(used, h).mean() for h in range(4)])
    draws = llc + error * np.random.default_rng(0).normal(size=(20000, 4))
    drawn = np.array([contrast(draw, error, scaled)[0] for draw in draws])
    np.testing.assert_allclose(covariance, np.cov(drawn.T), rtol=0.05, atol=2e-4)


def test_equality_of_two_numbers_is_the_z_test_and_of_many_cochrans_q() -> None:
    z = (1.3 - 1.0) / np.hypot(0.1, 0.2)
    two = equality_test(np.array([[1.3], [1.0]]), np.array([[[0.01]], [[0.04]]]))
    assert two == pytest.approx(2 * norm.sf(z))
    values, weights = np.array([1.0, 2.0, 2.5]), np.array([4.0, 1.0, 9.0])
    q = np.sum(weights * (values - np.average(values, weights=weights)) ** 2)
    assert equality_test(values[:, None], 1 / weights[:, None, None]) == pytest.approx(chi2.sf(q, 2))


def test_a_layers_test_on_two_distributions_is_that_the_heads_differences_are_equal() -> None:
    """Cochran's Q over heads of llc(a, h) - llc(b, h): another road to the same number."""
    llc = np.random.default_rng(1).normal(2, 0.5, size=(2, 8))
    error = np.stack([ERROR, ERROR[::-1]])
    differences, variance = llc[0] - llc[1], (error**2).sum(0)
    expected = equality_test(differences[:, None], variance[:, None, None])
    assert specialization(llc, error).p_layer == pytest.approx(expected)


def test_the_value_is_the_difference_of_differences_with_its_error() -> None:
    llc, error = np.array([[2.0, 1.0, 1.0], [1.5, 1.7, 1.9]]), np.full((2, 3), 0.1)
    found = specialization(llc, error)
    np.testing.assert_allclose(found.value[:, 0], [1.0 - (1.5 - 1.8), -1.3])
    np.testing.assert_allclose(found.error, np.sqrt(2 * 0.01 * 1.5))
    assert found.p_head[0] == pytest.approx(2 * norm.sf(1.3 / found.error[0, 0]))


def p_values(scaled: bool, how: str, n: int = 1000, n_distributions: int = 3) -> np.ndarray:
    """[seed, head 0 ... 7 and the layer], where distributions add, multiply, or one head is other on one of them."""
    rng = np.random.default_rng(2)
    base = np.array([2.0, 2.5, 3.0, 2.2, 2.8, 2.4, 4.5, 2.6])
    change = np.array([0.0, 1.5, -0.5])[:n_distributions]
    llc = base + change[:, None] if how == "add" else base * (1 + change / 2)[:, None]
    llc[0, 0] += 1.0 if how == "head 0" else 0.0
    error = np.tile(ERROR, (n_distributions, 1))
    found = [specialization(llc + error * rng.normal(size=llc.shape), error, scaled) for _ in range(n)]
    return np.array([[*one.p_head, one.p_layer] for one in found])


@pytest.mark.parametrize(("scaled", "how"), [(False, "add"), (True, "multiply")])
def test_heads_that_do_not_specialize_are_found_at_the_nominal_rate(scaled: bool, how: str) -> None:
    """Within 99.9 % of the binomial, for a head, for the layer, and at most for any head after Holm."""
    found = p_values(scaled, how)
    for level in (0.05, 0.2):
        low, high = binom.ppf([0.0005, 0.9995], len(found), level) / len(found)
        assert low <= np.mean(found[:, 0] <= level) <= high
        assert low <= np.mean(found[:, -1] <= level) <= high
        assert np.mean([holm(row[:-1]).min() <= level for row in found]) <= high


def test_a_head_that_specializes_is_found_and_a_common_factor_fools_the_additive_scale_alone() -> None:
    planted = p_values(True, "head 0", 50)
    assert (planted[:, 0] < 0.01).mean() > 0.95 and (planted[:, -1] < 0.01).mean() > 0.95
    assert (p_values(False, "multiply", 50)[:, 6] < 0.01).mean() > 0.95  # the head of the largest LLC
    assert (p_values(True, "multiply", 50)[:, 6] < 0.01).mean() < 0.1


GAP = np.where(np.eye(2, 3) == 1, np.nan, 1.0)


@pytest.mark.parametrize(
    ("llc", "error"),
    [(GAP, 1.0), (np.ones((2, 3)), 0.0), (np.ones((1, 3)), 1.0), (np.ones((2, 1)), 1.0)],
    ids=["a gap", "without errors", "one distribution", "one head"],
)
def test_what_cannot_be_told_is_nan(llc: np.ndarray, error: float) -> None:
    error = np.full(llc.shape, error)
    found = specialization(llc, error)
    assert found.value.shape == llc.shape
    assert np.isnan([*found.value.flat, *found.error.flat, *found.p_head, found.p_layer]).all()


def test_a_layer_without_any_llc_has_no_scale() -> None:
    llc, error = np.array([[0.1, -0.1, 0.05], [1.0, 1.0, 1.0]]), np.full((2, 3), 0.1)
    assert np.isnan(specialization(llc, error, scaled=True).p_layer)
    assert np.isfinite(specialization(llc, error).p_layer)


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, np.nan, 0.03])), [0.03, 0.06, np.nan, 0.06])
    np.testing.assert_allclose(holm(np.array([0.5, 0.9])), [1.0, 1.0])


def test_ranks_and_their_probability() -> None:
    rng = np.random.default_rng(3)
    rank, probability = ranks(np.array([1.0, 3.0, 2.0]), np.array([1.0, 1.0, 1e-9]), rng)
    assert rank.tolist() == [3, 1, 2]
    np.testing.assert_allclose(probability.sum(0), 1)
    np.testing.assert_allclose(probability.sum(1), 1)
    both_below = norm.cdf(1) * norm.cdf(-1)  # heads 0 and 1 below the third, which is sure
    assert probability[2, 0] == pytest.approx(both_below, abs=0.03)
    alike = ranks(np.ones(4), np.full(4, 0.1), rng)[1]
    np.testing.assert_allclose(alike, 0.25, atol=0.04)
    assert np.isnan(ranks(np.array([1.0, np.nan]), np.ones(2), rng)[0]).all()


# ---- the analysis: two layers of four heads, L1H2 the induction head

HEADS = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
TYPES = ["multigram"] * 6 + ["induction", "unclear"]
FACTS = {
    "heads": HEADS,
    "types": [f"{h} {t}" for h, t in zip(HEADS, TYPES, strict=True)],
    "induction head": ["L1H2"],
    "circuit's induction head": ["L1H2"],
}
NO_INDUCTION: dict[str, list[str]] = {"induction head": [], "circuit's induction head": []}
STEPS = np.array([0, 10, 100, 500, 1000, 2000])
STAGES = (Stage("S1", "rising", 0.0, 2000.0, None, None, 3.0, None),)
GROWTH = np.linspace(0.1, 1, len(STEPS))


def refinement(final: list[float], seed: int, steps: np.ndarray = STEPS, error: float = 0.05) -> LLCCurve:
    noise = error * np.random.default_rng(seed).normal(size=(9, len(STEPS)))
    llc = np.outer([*final, 9.0], GROWTH) + noise
    kept = np.isin(STEPS, steps)
    return LLCCurve(
        steps=steps,
        components=(*HEADS, "model"),
        llc=llc[:, kept],
        std_error=np.full((9, kept.sum()), error),
    )


ALIKE = [2.0, 2.5, 3.0, 2.2, 1.8, 1.6, 1.3, 1.7]
ON_REPEATS = [2.5, 3.0, 3.5, 2.7, 1.1, 0.9, 2.0, 1.0]


def planted(repeats: list[float] = ON_REPEATS, names: tuple[str, str] = ("ngram-heavy", "repeat-heavy")) -> LLCCurve:
    refined = dict(zip(names, (refinement(ALIKE, 0), refinement(repeats, 1)), strict=True))
    return LLCCurve(
        steps=STEPS, components=("model",), llc=GROWTH[None], std_error=np.ones((1, len(STEPS))), refined=refined
    )


def concluded(curve: LLCCurve, facts: dict = FACTS, stages: tuple[Stage, ...] = STAGES) -> tuple[dict, list]:
    series = {"step": STEPS}
    derived = analysis.derive(series, curve, facts, np.random.default_rng(0))
    return derived, analysis.conclude(series | derived, stages, curve)


def test_the_planted_induction_head_is_found_first_on_repeats_and_last_on_ngrams() -> None:
    derived, claims = concluded(planted())
    assert len(claims) == 13
    assert [claim.text for claim in claims if not claim.holds] == []
    repeats = list(derived["distributions"]).index("repeat-heavy")
    assert derived["rank"][repeats].tolist() == [4, 2, 1, 3, 2, 4, 1, 3]
    assert derived["final_specialization"][repeats, 6] == pytest.approx((2.0 - 1.0) - (1.3 - 1.7), abs=0.2)
    assert holm(derived["p_layer"])[1] < 0.001 < holm(derived["p_layer"])[0]
    assert derived["specialization"].shape == (2, 8, len(STEPS))
    # One induction head among the four of its layer, all of them as often first if they were alike.
    of_one = [0.25, 0.25, 0.75, 0.75]
    assert [claim.chance for claim in claims] == [0.05, 0.05, *of_one, *of_one, 0.25, 0.75, 0.025]


def test_the_head_of_the_strongest_circuit_is_judged_by_its_own_ranks() -> None:
    """L1H0 ranks second on repeats and first on n-grams; no induction head is asked for the claims on the other."""
    derived, claims = concluded(planted(), FACTS | {"circuit's induction head": ["L1H0"]})
    assert "of the strongest circuit" in claims[6].text
    assert [claim.holds for claim in claims] == [*[True] * 6, *[False] * 4, *[True] * 3]
    assert claims[6].value == derived["rank"][1, 4] == 2 and claims[8].value == derived["rank"][0, 4] == 1
    _, without = concluded(planted(), FACTS | {"circuit's induction head": []})
    assert np.isnan([claim.value for claim in without[6:10]]).all()
    assert all(claim.holds for claim in [*without[:6], *without[10:]])


def test_of_twins_neither_is_surely_first_but_one_of_them_is() -> None:
    twins = [*ON_REPEATS[:5], 2.0, 2.0, 1.0]
    facts = FACTS | {
        "types": [text if i not in (5, 6) else f"L1H{i - 4} induction" for i, text in enumerate(FACTS["types"])]
    }
    _, claims = concluded(planted(twins), facts)
    assert not claims[3].holds and claims[10].holds and claims[11].holds
    assert [claim.chance for claim in claims[10:12]] == [0.5, 0.5]
    _, alone = concluded(planted(twins))  # the other twin is of another type
    assert not alone[10].holds


def test_what_a_reference_model_drew_is_no_distribution_to_specialize_to() -> None:
    curve = planted()
    with_reference = replace(curve, refined={**curve.refined, "reference": refinement([-9.0] * 8, 2, STEPS[:2])})
    (derived, claims), (same, others) = concluded(with_reference), concluded(curve)
    assert derived["distributions"].tolist() == same["distributions"].tolist() == ["ngram-heavy", "repeat-heavy"]
    assert repr(claims) == repr(others)


def test_where_all_heads_gain_alike_none_specializes() -> None:
    _, claims = concluded(planted([llc + 0.5 for llc in ALIKE]))
    of_one = [False, False, True, True]
    assert [claim.holds for claim in claims] == [False, False, *of_one, *of_one, False, True, False]


def test_a_common_factor_is_no_specialization_on_both_scales() -> None:
    _, claims = concluded(planted([3 * llc for llc in ALIKE]))
    assert [claim.holds for claim in claims[:2]] == [True, False]
    assert not claims[-1].holds


def test_other_studies_get_the_claims_that_any_can_have() -> None:
    _, claims = concluded(planted(names=("code", "prose")), FACTS | NO_INDUCTION)
    assert len(claims) == 2 and all(claim.holds for claim in claims)


def test_without_an_induction_head_its_claims_are_nan() -> None:
    _, claims = concluded(planted(), FACTS | NO_INDUCTION)
    assert all(claim.holds for claim in claims[:2])
    assert all(np.isnan(claim.value) and not claim.holds for claim in claims[2:])


def with_change(curve: LLCCurve, name: str, **changes) -> LLCCurve:
    return replace(curve, refined={**curve.refined, name: replace(curve.refined[name], **changes)})


def test_the_end_is_the_latest_healthy_estimate_of_the_last_fifth_and_a_rank_needs_the_whole_layer() -> None:
    curve = planted()
    healthy = np.ones((9, len(STEPS)), bool)
    healthy[7, -1] = False  # a head beside the induction head
    derived, claims = concluded(with_change(curve, "repeat-heavy", healthy=healthy))
    assert np.isnan(derived["rank"][1, 4:]).all() and np.isfinite(derived["rank"][0]).all()
    assert np.isnan(derived["p_head"][4:]).all() and np.isfinite(derived["p_head"][:4]).all()
    assert np.isnan([claims[2].value, claims[-1].value]).all() and not claims[2].holds
    assert claims[4].holds  # the rank on the other data
    late = with_change(curve, "repeat-heavy", healthy=healthy, steps=np.array([0, 10, 100, 500, 1800, 2000]))
    late = with_change(late, "ngram-heavy", steps=np.array([0, 10, 100, 500, 1800, 2000]))
    series = {"step": np.array([0, 10, 100, 500, 1800, 2000])}
    derived = analysis.derive(series, late, FACTS, np.random.default_rng(0))
    assert derived["final_llc"][1, 7] == late.refined["repeat-heavy"].llc[7, 4]
    assert derived["final_llc"][1, 6] == late.refined["repeat-heavy"].llc[6, 5]


def test_distributions_meet_at_the_checkpoints_that_they_share() -> None:
    some = refinement(ON_REPEATS, 1, STEPS[[0, 2, 5]])
    whole = planted()
    derived, claims = concluded(replace(whole, refined={**whole.refined, "repeat-heavy": some}))
    assert derived["refined_step"].tolist() == [0, 100, 2000]
    assert all(claim.holds for claim in claims)
    early = refinement(ON_REPEATS, 1, STEPS[:4])
    _, claims = concluded(replace(whole, refined={**whole.refined, "repeat-heavy": early}))
    assert np.isnan([claim.value for claim in claims]).all()


@pytest.mark.parametrize("names", [(), ("code",), ("ngram-heavy", "repeat-heavy")])
def test_without_refined_heads_nothing_holds_and_nothing_fails(names: tuple[str, ...]) -> None:
    plain = LLCCurve(steps=STEPS, components=("model",), llc=GROWTH[None], std_error=np.ones((1, len(STEPS))))
    curve = replace(plain, refined=dict.fromkeys(names, plain))
    derived, claims = concluded(curve)
    assert len(claims) == (13 if len(names) == 2 else 2)
    assert not any(claim.holds for claim in claims)
    series = {"loss_test": np.ones(len(STEPS))}
    report = Report("specialization", STEPS, series, tuple(claims), FACTS, derived)
    assert bool(analysis.tables(report)) == bool(names)
    assert analysis.plot(report, SimpleNamespace(curve=curve, stages=STAGES))


def test_the_claims_are_the_same_for_any_stages_and_without_any_only_those_on_the_end_are_judged() -> None:
    _, claims = concluded(planted())
    _, without = concluded(planted(), stages=())
    assert_only_the_end_is_judged(without, claims)


def test_tables_and_figures() -> None:
    curve = planted()
    derived, claims = concluded(curve)
    series = {"loss_test": np.ones(len(STEPS)), "loss_repeat-heavy": np.ones(len(STEPS))}
    report = Report("specialization", STEPS, series, tuple(claims), FACTS, derived)
    tables = analysis.tables(report)
    for titles, rows in tables.values():
        assert rows and {len(row) for row in rows} == {len(titles)}
    heads = list(tables.values())[1][1]
    assert [row[:2] for row in heads] == [text.split(" ", 1) for text in FACTS["types"]]
    assert heads[6][3].endswith("; 1 (100%)") and heads[6][4].startswith("repeat-heavy: 1.")
    figures = analysis.plot(report, SimpleNamespace(curve=curve, stages=STAGES))
    assert [len(figure.axes) for figure in figures.values()] == [2, 2, 1, 2, 1]


def test_prepare_names_the_strongest_induction_head_and_measure_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    def head(name: str, kind: str, score: float) -> SimpleNamespace:
        return SimpleNamespace(head=name, type=kind, scores={analysis.PREFIX_MATCHING: score})

    evidence = [head("L0H0", "unclear", 0.9), head("L0H1", "induction", 0.2), head("L1H0", "induction", 0.4)]
    monkeypatch.setattr(analysis, "typed_heads", lambda model, split: tuple(evidence))
    split = make_split(tiny_config().task, 0)
    model = build_model(tiny_config().model, split, 0)
    pairs = [((0, 0), (1, 1), 0.2, True), ((0, 1), (1, 0), 0.3, True), ((0, 0), (1, 0), 0.9, False)]
    searched = [
        SimpleNamespace(pair=(sender, receiver), k_effect=SimpleNamespace(value=cost), found=found)
        for sender, receiver, cost, found in pairs
    ]
    monkeypatch.setattr(analysis, "searched_circuits", lambda model, split: searched)
    facts = analysis.prepare(model, split)
    assert facts["induction head"] == ["L1H0"] and facts["types"][0] == "L0H0 unclear"
    assert facts["circuit's induction head"] == ["L1H0"]
    del evidence[1:], searched[1:]
    facts = analysis.prepare(model, split)
    assert facts["induction head"] == [] and facts["circuit's induction head"] == ["L1H1"]
    searched.clear()
    assert analysis.prepare(model, split)["circuit's induction head"] == []
    losses = analysis.measure(model, replace(split, distributions={"half": split.train}), seeds.stream(0), facts)
    assert losses == {"loss_test": evaluate(model, split.test)[0], "loss_half": evaluate(model, split.train)[0]}
