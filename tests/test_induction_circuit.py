"""Induction circuits of the hand-built model, near misses of them, and the analysis over a planted run."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from transformer_lens import HookedTransformer

from analyses import induction_circuit as analysis
from mechgrok import seeds
from mechgrok.errors import ComponentError
from mechgrok.measures.ablation import ABLATION_KINDS, clean_run, head_ablations
from mechgrok.measures.circuits import (
    WeightedMean,
    induction_search,
    joint_ablation,
    pair_name,
    pair_of,
    weighted_mean,
)
from mechgrok.measures.head_types import probe
from mechgrok.measures.path_ablation import INPUTS, path_ablation
from mechgrok.types import LLCCurve, Report, Stage
from tests import hand_built
from tests.hand_built import SPLIT, TOKEN, hand_built_model
from tests.planted import assert_only_the_end_is_judged
from tests.test_attention_measures import ARCHITECTURES, TWICE, random_model

CIRCUITS = ["L0H0 -> L1H0", "L0H0 -> L1H1"]
DECOY = "L0H0 -> L1H2"


def search(model: HookedTransformer) -> dict:
    repeats = probe(SPLIT, seeds.stream(0))
    return {pair_name(of.pair): of for of in induction_search(model, repeats, seeds.stream(1))}


def found(model: HookedTransformer) -> list[str]:
    return [name for name, of in search(model).items() if of.found]


def test_the_circuits_that_were_built_are_found_by_name_and_no_others() -> None:
    searched = search(hand_built_model())
    assert len(searched) == 16
    assert [name for name, of in searched.items() if of.found] == CIRCUITS
    assert {name for name, of in searched.items() if of.costs} == set(CIRCUITS)
    decoy = searched[DECOY]  # it attends and composes as the twins do; only ablation tells it apart
    assert decoy.looks_back and decoy.matches and decoy.composes and not decoy.costs
    offset = searched["L0H2 -> L1H0"]
    assert not offset.looks_back and offset.matches and not offset.composes


def test_a_path_through_the_keys_alone_makes_no_circuit_without_the_scores() -> None:
    """Queries spread over all tokens: the receiver reads the sender, but matches nothing."""
    model = hand_built_model()
    with torch.no_grad():
        model.blocks[1].attn.W_Q[0, TOKEN, :9] = model.blocks[1].attn.W_Q[0, TOKEN, :9].roll(1, 1)
    of = search(model)[CIRCUITS[0]]
    assert of.looks_back and of.composes and not of.matches and not of.found
    assert found(model) == CIRCUITS[1:]


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_nothing_is_found_in_random_models(changes) -> None:
    assert found(random_model(**changes)) == []
    assert found(random_model(n_layers=1, **changes)) == []


def test_a_circuit_needs_all_of_the_evidence() -> None:
    circuit = search(hand_built_model())[CIRCUITS[0]]
    assert circuit.found
    for flag in ("looks_back", "matches", "composes"):
        assert not replace(circuit, **{flag: False}).found
    exact, noisy = torch.zeros(64), torch.ones(64)
    for value, shifts, costs in ((0.02, exact, True), (0.009, exact, False), (5.0, noisy, False), (-1.0, exact, False)):
        assert replace(circuit, k_effect=WeightedMean(value, shifts)).found is costs


def test_of_too_many_pairs_the_likeliest_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechgrok.measures.circuits.MAX_PAIRS", 3)
    searched = search(hand_built_model())
    assert list(searched) == [*CIRCUITS, DECOY]
    assert found(hand_built_model()) == CIRCUITS


def test_joint_ablation_of_one_head_is_its_ablation_and_of_twins_more_than_their_sum() -> None:
    model = hand_built_model()
    clean = clean_run(model, TWICE)
    for kind in ABLATION_KINDS:
        one = joint_ablation(model, TWICE, [(0, 0)], kind, seeds.stream(0), clean)
        assert one.value == pytest.approx(float(head_ablations(model, TWICE, kind, seeds.stream(0))[0].mean()))
    apart = [joint_ablation(model, TWICE, [(1, h)], "zero", seeds.stream(0), clean).value for h in (0, 1)]
    together = joint_ablation(model, TWICE, [(1, 0), (1, 1)], "zero", seeds.stream(0), clean)
    assert together.value == pytest.approx(np.log(9) - float(clean.losses.mean()), abs=1e-5)  # nothing is written
    assert together.value > 5 * sum(apart)
    assert joint_ablation(model, TWICE, [], "zero", seeds.stream(0), clean).value == 0.0


def test_a_weighted_mean_errs_as_many_draws_do() -> None:
    """Rows of correlated positions and of random weight: the error is the spread over samples of rows."""
    rng = np.random.default_rng(0)
    drawn, errors, differences, difference_errors = [], [], [], []
    for _ in range(400):
        common = rng.normal(size=(60, 1))
        values = torch.tensor(1.0 + common + rng.normal(size=(60, 6)))
        weights, others = (torch.tensor(rng.random((60, 6)) < share) for share in (0.3, 0.6))
        mean, other = weighted_mean(values, weights), weighted_mean(values, others)
        drawn.append(mean.value)
        errors.append(mean.error)
        differences.append(mean.less(other).value)
        difference_errors.append(mean.less(other).error)
    assert np.mean(errors) == pytest.approx(np.std(drawn), rel=0.1)
    assert np.mean(difference_errors) == pytest.approx(np.std(differences), rel=0.1)
    assert np.mean(difference_errors) < np.mean(errors)  # what is common to both cancels
    plain = weighted_mean(values, torch.ones(60, 6))
    rows = values.mean(1).numpy()
    assert plain.value == pytest.approx(rows.mean()) and plain.error == pytest.approx(rows.std(ddof=1) / 60**0.5)
    assert plain.lower() == pytest.approx(plain.value - 1.96 * plain.error)
    assert np.isnan(weighted_mean(values, torch.zeros(60, 6)).value) and np.isnan(
        weighted_mean(values[:1], weights[:1]).error
    )


def test_names_of_pairs() -> None:
    assert pair_of("L0H3 -> L11H15") == ((0, 3), (11, 15)) and pair_name(((0, 3), (11, 15))) == "L0H3 -> L11H15"
    for wrong in ("L0H3", "L0H3 -> ", "L0H3 -> L1H5 -> L2H0", "a -> b"):
        with pytest.raises(ComponentError, match='a head reads "L0H3"'):
            pair_of(wrong)


# ---- the analysis

STEPS = np.array([0, 10, 30, 100, 300, 1000, 3000])
STAGES = (
    Stage("S1", "rising", 0, 100, None, None, 5, None),
    Stage("S2", "rising", 100, 1000, None, None, 20, None),
    Stage("S3", "falling", 1000, 3000, None, None, -5, None),
)


@pytest.fixture(scope="module")
def planted() -> tuple[dict, dict, LLCCurve]:
    """The hand-built model, whose twins are switched on within the second stage, the previous-token head before."""
    facts = analysis.prepare(hand_built_model(), SPLIT)
    rows = []
    for previous, match in ((0, 0), (0, 0), (0, 0), (0.6, 0), (1, 0.02), (1, 1), (1, 1)):
        model = hand_built_model()
        with torch.no_grad():
            model.blocks[0].attn.W_Q[0] *= previous
            model.blocks[1].attn.W_Q[:2] *= match
        rows.append(analysis.measure(model, SPLIT, seeds.stream(len(rows)), facts))
    series = {"step": STEPS} | {key: np.array([row[key] for row in rows]) for key in rows[0]}
    llc = np.array([[10, 12, 14, 15, 20, 35, 30.0], [1, 1, 1, 2, 3, 5, 5], [1, 1, 1, 1, 2, 4, 3]])
    curve = LLCCurve(STEPS, ("model", "L0H0", "L1H0"), llc, np.full((3, 7), 0.5))
    return facts, series | analysis.derive(series, curve, facts, np.random.default_rng(0)), curve


def test_facts_name_circuits_and_as_many_controls(planted) -> None:
    facts, series, _ = planted
    assert sorted(facts["found"]) == sorted(facts["followed"]) == CIRCUITS
    assert len(facts["controls"]) == 2 and not {*CIRCUITS, DECOY} & set(facts["controls"])
    for sender, receiver in map(pair_of, facts["controls"]):
        assert sender == (0, 0) or receiver in ((1, 0), (1, 1))
    assert facts["induction heads"] == ["L1H0", "L1H1"] and facts["other heads"] == ["L1H2", "L1H3"]
    assert facts["searched"][:3] == ["16 pairs", "3 of a previous-token head and one that matches prefixes",
                                     "3 of these compose through K"]  # fmt: skip
    assert series["effect"].shape == (7, 4, 3)


def test_the_measured_paths_are_path_ablations_on_tokens_that_were_not_searched(planted) -> None:
    facts, series, _ = planted
    model, circuit = hand_built_model(), pair_of(facts["followed"][0])
    examples = probe(SPLIT, analysis._stream("random tokens")).examples
    assert not torch.equal(examples.tokens, probe(SPLIT, analysis._stream("search")).tokens)
    for i, letter in enumerate(INPUTS):
        increase = path_ablation(model, examples, *circuit, (letter,), "mean", seeds.stream(0))
        weights = examples.tensors[2]
        assert series["effect"][-1, 0, i] == pytest.approx(float((increase * weights).sum() / weights.sum()))
    k, error = series["effect"][-1, 0, 1], series["effect_error"][-1, 0, 1]
    assert series["margin"][-1, 0] == pytest.approx(k - 1.96 * error)  # the rivals cost nothing at all
    assert np.abs(series["effect"][-1, 2:, 1]).max() == 0.0 and np.isnan(series["effect"][-1, 2:, 0]).all()


def test_what_forms_in_a_planted_stage_is_claimed_of_that_stage(planted) -> None:
    _, series, curve = planted
    claims = analysis.conclude(series, STAGES, curve)
    assert [claim.stage for claim in claims] == ["S3"] * 5 + ["S2"] * 4
    assert all(claim.holds for claim in claims), [(claim.text, claim.value) for claim in claims]
    assert [claims[0].value, claims[1].value, claims[2].value] == [2.0, 2.0, 1.0]
    change = 1.96 * np.hypot(0.5, 0.5)
    assert [claim.value for claim in claims[6:]] == pytest.approx([20 - change, 3 - change, 3 - change])
    assert series["together"][-1] > series["apart"][-1]


def test_the_date_is_that_of_half_the_final_effect() -> None:
    steps = np.array([0, 9, 99, 999])
    assert analysis._half_step(steps, np.array([0, 0, 1.0, 1.0])) == pytest.approx(np.sqrt(10 * 100) - 1)
    assert analysis._half_step(steps, np.array([0, 2.0, 0.2, 1.0])) == pytest.approx(np.expm1(
        np.log(100) + np.log(10) * 0.3 / 0.8))  # fmt: skip  # from then on for good
    assert analysis._half_step(steps, np.ones(4)) == 0.0
    assert np.isnan(analysis._half_step(steps, np.array([1.0, 1.0, 1.0, -0.1])))


def test_claims_are_the_same_for_any_stages_and_fail_where_they_must(planted) -> None:
    _, series, curve = planted
    claims = analysis.conclude(series, STAGES, curve)
    without = analysis.conclude(series, (), curve)
    assert_only_the_end_is_judged(without, claims)
    # A control that costs as much, a Q path that does, heads without effect: each undoes its claim alone.
    for change, undone in (
        ({"margin": -np.abs(series["margin"])}, {1}),
        ({"effect": series["effect"][:, :, [1, 0, 2]]}, {2}),
        ({"sender_lower": 0 * series["sender_lower"]}, {1, 3}),
        ({"together_lower": 0 * series["together_lower"]}, {4}),
        ({"k_effect": np.log1p(STEPS)}, {5}),
        ({"n_found": 0.0}, {0, 2, 3, 6, 7, 8}),
    ):
        failed = {i for i, claim in enumerate(analysis.conclude(series | change, STAGES, curve)) if not claim.holds}
        assert undone <= failed, (change, failed)
        assert failed <= undone | ({6, 7, 8} if "k_effect" in change else set()), (change, failed)
    flat = LLCCurve(STEPS, ("model",), np.full((1, 7), 9.0), np.full((1, 7), 0.5))
    assert [c.holds for c in analysis.conclude(series, STAGES, flat)[5:]] == [True, False, False, False]


def test_an_untrained_run_claims_nothing_and_still_reports() -> None:
    model = random_model(init_std=0.1)
    facts = analysis.prepare(model, SPLIT)
    assert facts["found"] == facts["followed"] == facts["controls"] == []
    row = analysis.measure(model, SPLIT, seeds.stream(0), facts)
    series = {name: np.stack([np.asarray(value)] * len(STEPS)) for name, value in row.items()}
    curve = LLCCurve(STEPS, ("model",), np.arange(7.0)[None], np.full((1, 7), 0.1))
    derived = analysis.derive({"step": STEPS} | series, curve, facts, np.random.default_rng(0))
    claims = analysis.conclude({"step": STEPS} | series | derived, STAGES, curve)
    assert not any(claim.holds for claim in claims)
    report = Report("induction_circuit", STEPS, series, tuple(claims), facts, derived)
    assert all(rows == [] for _, rows in analysis.tables(report).values())
    assert analysis.plot(report, SimpleNamespace(stages=STAGES, curve=curve))


def test_tables_and_figures(planted) -> None:
    facts, series, curve = planted
    derived = {name: series[name] for name in ("n_found", "k_effect", "half_step", "strongest")}
    measured = {name: values for name, values in series.items() if name not in (*derived, "step")}
    report = Report("induction_circuit", STEPS, measured, (), facts, derived)
    (columns, rows), (titles, ablations) = analysis.tables(report).values()
    assert [row[:2] for row in rows[:2]] == [[name, "confirmed circuit"] for name in facts["followed"]]
    assert [row[1] for row in rows[2:]] == ["control"] * 2
    assert all(len(row) == len(columns) for row in rows) and all(len(row) == len(titles) for row in ablations)
    assert 100 < float(rows[0][-1]) < 1000 and rows[2][-1] == "–"
    assert [row[0] for row in ablations] == ["L0H0", "L1H0 + L1H1", "L1H2 + L1H3"]
    figures = analysis.plot(report, SimpleNamespace(stages=STAGES, curve=curve))
    assert all(isinstance(figure, Figure) for figure in figures.values())


def test_rows_too_short_to_repeat_are_refused() -> None:
    from mechgrok.errors import ShapeError

    short = replace(SPLIT, test=hand_built.cut(SPLIT.test, 4))
    with pytest.raises(ShapeError, match="use a task with longer rows"):
        analysis.prepare(hand_built_model(), short)
