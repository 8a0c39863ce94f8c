"""The contract of analyses: one common test for all of them, and the chance level of claims."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import analyses
from analyses import contract, grokking
from mechgrok.errors import AnalysisError
from mechgrok.measures.landmarks import landmarks
from mechgrok.stages import place_stages, smooth
from mechgrok.types import Claim, LLCCurve, Stage, Study
from tests.oracles import tiny_config
from tests.planted import language_run_config
from tests.test_stages import PEAK, STEPS, X, hump


@pytest.fixture(params=analyses.REGISTRY)
def applied(request: pytest.FixtureRequest) -> tuple[str, Study]:
    """Every analysis, with a tiny study of a task that it applies to."""
    language = "planted-language" in contract.load(request.param).TASKS
    return request.param, request.getfixturevalue("language_run" if language else "tiny_run")[1]


def test_every_analysis_keeps_the_contract(applied: tuple[str, Study]) -> None:
    name, study = applied
    model = study.trajectory.model_at(study.trajectory.steps[-1])
    study = replace(study, trajectory=replace(study.trajectory, load=lambda step: model))
    before = {key: q.detach().clone() for key, q in model.named_parameters()}
    state = torch.random.get_rng_state()
    report, again = analyses.run(name, study), analyses.run(name, study)
    assert report.claims and report.series
    for key, values in report.series.items():
        assert len(values) == len(study.trajectory.steps), key
        np.testing.assert_array_equal(values, again.series[key])
    assert [repr(claim) for claim in report.claims] == [repr(claim) for claim in again.claims]
    assert {claim.stage for claim in report.claims} <= {stage.name for stage in study.stages} | {"none", "run"}
    figures = contract.load(name).plot(report, study)
    assert figures
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(q, before[key]) for key, q in model.named_parameters())


def test_the_report_does_not_depend_on_the_number_of_workers(language_run: tuple) -> None:
    one, two = (analyses.run("multigrams", language_run[1], n_workers=n) for n in (1, 2))
    assert [repr(claim) for claim in one.claims] == [repr(claim) for claim in two.claims]
    for key, values in one.series.items():
        np.testing.assert_array_equal(values, two.series[key])


def test_without_stages_only_claims_about_the_end_of_the_run_are_judged(applied: tuple[str, Study]) -> None:
    name, study = applied
    report = analyses.run(name, replace(study, stages=()))
    assert report.claims
    for claim in report.claims:
        assert claim.stage in ("none", "run") and claim.null_quantile is None
        assert np.isnan(claim.value) or claim.stage == "run"


def test_the_end_is_that_of_the_last_stage_or_of_the_run() -> None:
    series = {"step": np.array([10, 100, 1000])}
    stages = [
        Stage("S1", "rising", 10, 50, None, None, 1.0, None),
        Stage("S2", "falling", 50, 900, None, None, 1.0, None),
    ]
    assert contract.end_of(stages, series) is stages[1]
    end = contract.end_of((), series)
    assert (end.name, end.start, end.end) == ("run", 10, 1000)
    judged = contract.claim("accuracy", end, lambda s: s.end, 1000.0, chance=0.5)
    assert judged.holds and judged.stage == "run" and judged.chance == 0.5
    assert contract.claim("rise", None, lambda s: s.end, 0.0).holds is False


def test_an_analysis_that_does_not_fit_the_task_is_refused_before_any_work() -> None:
    with pytest.raises(
        AnalysisError, match="'mechanisms' applies to planted-language, text, hugging-face, not to 'mod"
    ):
        contract.check(["mechanisms"], tiny_config())


def test_every_analysis_of_a_language_passes_the_check_on_few_rows_of_a_larger_test_set() -> None:
    config = language_run_config()
    assert config.task.n_test > contract.FEW_ROWS
    names = [name for name in analyses.REGISTRY if "planted-language" in contract.load(name).TASKS]
    assert len(names) == 7
    contract.check(names, config)


def test_an_untrained_trajectory_shows_nothing_that_belongs_to_a_stage(applied: tuple[str, Study]) -> None:
    """The same untrained model at every step, under stages that were planted: no gain can hold."""
    name, study = applied
    first = study.trajectory.model_at(0)
    steps = np.array(study.trajectory.steps)
    rise_and_fall = np.minimum(np.arange(len(steps)), 5.0)[None] - 2 * np.maximum(np.arange(len(steps)) - 4.0, 0)[None]
    curve = LLCCurve(steps=steps, components=("model",), llc=rise_and_fall, std_error=np.full((1, len(steps)), 0.1))
    stages = place_stages(curve, smooth(curve), [float(steps[4])])
    assert [stage.direction for stage in stages] == ["rising", "falling"]
    untrained = replace(study.trajectory, load=lambda step: first)
    report = analyses.run(name, replace(study, trajectory=untrained, curve=curve, stages=stages))
    holding = [claim.text for claim in report.claims if claim.holds]
    # What is said of the LLC itself is true of the planted curve; ranks and levels of one model are constant.
    allowed = ("the LLC rises, then falls", "zero, mean and resample", "without the key", "test accuracy is still")
    assert [text for text in holding if not text.startswith(allowed)] == []


def test_unknown_and_inapplicable_analyses_are_refused(tiny_run: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AnalysisError, match="unknown analysis 'forier'; analyses are grokking, fourier"):
        analyses.run("forier", tiny_run[1])
    monkeypatch.setattr(grokking, "TASKS", ("sorting",))
    with pytest.raises(AnalysisError, match="applies to sorting, not to 'modular-addition'"):
        analyses.run("grokking", tiny_run[1])


NAN = float("nan")


class Invented:
    """One claim that belongs to the falling stage, one against it, one that knows no stage."""

    NAME = "invented"

    @staticmethod
    def conclude(series, stages, curve):
        falling = contract.strongest(stages, "falling")
        return [
            contract.claim("tied", falling, lambda s: contract.concentration(series, "y", s), 0.5),
            contract.claim("against", falling, lambda s: contract.concentration(series, "y", s), 0.5, "<="),
            contract.claim("constant", stages[-1], lambda s: 1.0, 0.5),
        ]


def test_a_claim_that_belongs_to_its_stage_beats_random_stages_and_a_constant_one_does_not(tiny_run: tuple) -> None:
    rng = np.random.default_rng(0)
    noisy = hump(X)[None] + rng.normal(size=(1, len(X)))
    curve = LLCCurve(steps=STEPS, components=("model",), llc=noisy, std_error=np.ones((1, len(X))))
    end = 1500.0
    stages = place_stages(curve, smooth(curve), [30.0, PEAK, end])
    # y grows in the falling stage only, evenly over all of it.
    low, high = np.log1p(PEAK), np.log1p(end)
    series = {"step": STEPS, "y": np.clip((X - low) / (high - low), 0, 1)}
    study = replace(tiny_run[1], config=tiny_config(analyses={"n_null": 200}), curve=curve, stages=stages)
    tied, against, constant = contract.score(Invented(), series, study)
    assert tied.value == pytest.approx(1 - (high - low) / X[-1], abs=0.1) and tied.holds
    assert tied.null_quantile > 0.95
    assert not against.holds and against.null_quantile < 0.05
    assert constant.null_quantile == 0.5


@pytest.mark.parametrize(
    ("value", "relation", "holds"),
    [
        (1.0, ">=", True),
        (0.4, ">=", False),
        (0.4, "<=", True),
        (0.6, "<=", False),
        (NAN, ">=", False),
        (NAN, "<=", False),
    ],
)
def test_a_claim_holds_by_its_relation_and_never_for_nan(value: float, relation: str, holds: bool) -> None:
    assert Claim("c", "S1", value, 0.5, relation).holds is holds


def invented_run(memorized: int, generalized: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    steps = np.array([0, 10, 100, 1000, 3000])
    test = np.zeros(5) if generalized is None else (steps >= generalized).astype(float)
    return steps, (steps >= memorized).astype(float), test


def test_landmarks_of_the_loss() -> None:
    assert landmarks(*invented_run(100, 3000)) == {"memorized": 100, "generalized": 3000}
    never = landmarks(*invented_run(100, None))
    assert np.isnan(never["generalized"])
    relapse = invented_run(100, 10)
    relapse[2][3] = 0.5
    assert landmarks(*relapse)["generalized"] == 3000


def test_series_are_read_between_checkpoints_on_log_steps() -> None:
    series = {"step": np.array([0, 3, 15]), "y": np.array([0.0, 1.0, 3.0])}
    assert contract.at(series, "y", 3) == 1.0
    assert contract.at(series, "y", 7) == pytest.approx(2.0)  # log1p: ln 8 is midway between ln 4 and ln 16


def test_too_few_healthy_points_end_in_a_report_not_in_an_error(tiny_run: tuple) -> None:
    from analyses import render
    from mechgrok.pipeline import find_stages

    study: Study = tiny_run[1]
    healthy = np.zeros_like(study.curve.healthy)
    healthy[:, :3] = True
    poor = replace(study, curve=replace(study.curve, healthy=healthy))
    stages = find_stages(poor.curve, poor.config)
    assert stages == ()
    reports = [analyses.run("grokking", replace(poor, stages=stages))]
    page = render.to_html(replace(poor, stages=stages), reports)
    assert "Only 3 were left, and stages need 6" in page
