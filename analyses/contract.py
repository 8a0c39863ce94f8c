"""What an analysis is, and `run`: the one loop over checkpoints, and the chance level of every claim."""

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from transformer_lens import HookedTransformer

from mechgrok import seeds
from mechgrok.config import RunConfig
from mechgrok.errors import AnalysisError
from mechgrok.measures.kinds import with_kinds
from mechgrok.model import build_model
from mechgrok.reproducible import reproducible
from mechgrok.schedule import each_result
from mechgrok.stages import place_stages, smooth, stage_points
from mechgrok.tasks import make_split
from mechgrok.types import Claim, Direction, LLCCurve, Report, Split, Stage, Study, Trajectory

Series = Mapping[str, np.ndarray]  # name -> [checkpoint, ...]; "step" is always among them
Relation = Literal[">=", "<="]

FEW_ROWS = 8
CONCENTRATED = 0.25  # the `concentration` from which growth is said to belong to a stage


class Analysis(Protocol):
    """The parts of an analysis module."""

    NAME: str
    TASKS: tuple[str, ...]

    def measure(
        self, model: HookedTransformer, split: Split, rng: torch.Generator, facts: Mapping[str, Any]
    ) -> Mapping[str, np.ndarray | float]:
        """The numbers of one checkpoint. It knows no step and no stage."""
        ...

    def conclude(self, series: Series, stages: Sequence[Stage], curve: LLCCurve) -> list[Claim]:
        """The same claims in the same order for any stages, so that random ones can score them."""
        ...

    def plot(self, report: Report, study: Study) -> dict[str, Figure]:
        """Titled figures with the stages shaded."""
        ...

    # A module may also have
    #   prepare(model, split) -> facts: what is fixed from the final model;
    #   derive(series, curve, facts, rng) -> arrays by name: what is made once of all checkpoints and knows no
    #     stage; `conclude` finds it among the series, and the report in `derived`;
    #   tables(report) -> {title: (column titles, rows of text)}.


def load(name: str) -> Analysis:
    """The analysis module of that name. Raises AnalysisError for an unknown one."""
    from analyses import REGISTRY

    if name not in REGISTRY:
        raise AnalysisError(f"unknown analysis {name!r}; analyses are {', '.join(REGISTRY)}")
    return cast(Analysis, importlib.import_module(f"analyses.{name}"))


def applicable(name: str, task: str) -> Analysis:
    """The analysis module of that name. Raises AnalysisError for an unknown one, or one of other tasks."""
    analysis = load(name)
    if task not in analysis.TASKS:
        raise AnalysisError(f"analysis {analysis.NAME!r} applies to {', '.join(analysis.TASKS)}, not to {task!r}")
    return analysis


def check(names: Sequence[str], config: RunConfig) -> None:
    """Raise before any work if one of these is unknown or cannot read the configured task or model.

    What cannot be computed shows at once: each is made of the untrained model on a few rows.

    Raises:
        AnalysisError, MeasureError, ShapeError: what is missing.
    """
    if len(set(names)) < len(names):
        raise AnalysisError(f"analyses come twice: {', '.join(names)}; give each once")
    asked = [applicable(name, config.task.name) for name in names]
    split = make_split(config.task, config.seed)
    model, few = build_model(config.model, split, config.seed), with_kinds(split.first(FEW_ROWS))
    for analysis in asked:
        with warnings.catch_warnings(action="ignore"):  # a few rows need not hold every kind of token
            facts = _prepared(analysis, model, few)
            analysis.measure(model, few, seeds.stream(config.seed, "check", analysis.NAME), facts)


def _prepared(analysis: Analysis, model: HookedTransformer, split: Split) -> dict[str, Any]:
    prepare = getattr(analysis, "prepare", None)
    return prepare(model, split) if prepare else {}


def run(name: str, study: Study, n_workers: int = 1) -> Report:
    """Measure every checkpoint that is trusted, conclude, and score each claim against randomly placed stages.

    The null keeps the number of stages and draws their boundaries uniformly on log(1 + step),
    `study.config.analyses.n_null` times. A claim's `null_quantile` is the share of placements
    whose value is less in its favour, ties counted half, among those in which it can be evaluated
    (a random placement may have no falling stage).

    Args:
        n_workers: processes that measure checkpoints; the report does not depend on it.

    Raises:
        AnalysisError: an unknown analysis, or one that does not apply to the study's task.
    """
    analysis = applicable(name, study.config.task.name)
    trusted = trusted_steps(study)
    final, steps = study.trajectory.model_at(trusted[-1]), np.array(trusted)
    split = with_kinds(study.split)
    facts = _prepared(analysis, final, split)
    work = partial(_measure, name, study.trajectory, split, facts)
    shares = [trusted[first::n_workers] for first in range(min(n_workers, len(trusted)))]
    found = {step: row for rows in each_result(work, shares, n_workers) for step, row in rows.items()}
    rows = [found[step] for step in trusted]
    series = {key: np.array([np.asarray(row[key]) for row in rows]) for key in rows[0]}
    derive = getattr(analysis, "derive", None)
    rng = np.random.default_rng(seeds.derive(study.config.seed, "derive", name))
    derived = derive({"step": steps, **series}, study.curve, facts, rng) if derive else {}
    claims = score(analysis, {"step": steps, **series, **derived}, study)
    return Report(name, steps, series, claims, facts, derived)


def trusted_steps(study: Study) -> tuple[int, ...]:
    """The checkpoints, without those that the audit of an import names."""
    return tuple(step for step in study.trajectory.steps if step not in study.suspicious)


def _measure(
    name: str, trajectory: Trajectory, split: Split, facts: Mapping[str, Any], steps: Sequence[int]
) -> dict[int, Mapping[str, np.ndarray | float]]:
    """The analysis' measurements at some steps."""
    config, measure = trajectory.config, load(name).measure
    with reproducible(config.llc.n_threads):
        return {
            step: measure(trajectory.model_at(step), split, seeds.stream(config.seed, "analysis", name, step), facts)
            for step in steps
        }


def score(analysis: Analysis, series: Series, study: Study) -> tuple[Claim, ...]:
    """The claims of the study's own stages, each with its null quantile."""
    claims = analysis.conclude(series, study.stages, study.curve)
    if not study.stages:
        return tuple(claims)  # no boundaries, so there is nothing to place at random
    fit = smooth(study.curve, study.config.stages, seed=study.config.seed)
    rng = np.random.default_rng(seeds.derive(study.config.seed, "null", analysis.NAME))
    nulls = []
    for _ in range(study.config.analyses.n_null):
        places = np.sort(rng.uniform(fit.x[0], fit.x[-1], len(study.stages) - 1))
        stages = place_stages(study.curve, fit, [float(step) for step in np.expm1(places)])
        nulls.append([claim.value for claim in analysis.conclude(series, stages, study.curve)])
    columns = np.array(nulls).T
    return tuple(
        replace(claim, null_quantile=_quantile(claim, null)) for claim, null in zip(claims, columns, strict=True)
    )


def _quantile(claim: Claim, null: np.ndarray) -> float | None:
    sign = 1.0 if claim.relation == ">=" else -1.0
    others = sign * null[~np.isnan(null)]
    if len(others) == 0 or np.isnan(claim.value):
        return None
    return float(np.mean(others < sign * claim.value) + 0.5 * np.mean(others == sign * claim.value))


# ---- for `conclude`


def strongest(stages: Sequence[Stage], direction: Direction) -> Stage | None:
    """The stage in which the LLC moves most in that direction, None if it moves so in none."""
    moving = [stage for stage in stages if stage.direction == direction]
    return max(moving, key=lambda stage: abs(stage.delta_llc), default=None)


def claim(
    text: str,
    stage: Stage | None,
    value: Callable[[Stage], float],
    threshold: float,
    relation: Relation = ">=",
    chance: float | None = None,
) -> Claim:
    """A claim about a stage; where there is no such stage its value is NaN, and it does not hold."""
    if stage is None:
        return Claim(text, "none", float("nan"), threshold, relation, chance=chance)
    return Claim(text, stage.name, float(value(stage)), threshold, relation, chance=chance)


def end_of(stages: Sequence[Stage], series: Series) -> Stage:
    """The last stage, for claims about the end of a run; where there are no stages, the run as a whole."""
    start, end = (float(step) for step in series["step"][[0, -1]])
    return stages[-1] if stages else Stage("run", "plateau", start, end, None, None, float("nan"), None)


def at(series: Series, name: str, step: float) -> float:
    """A scalar series at a step, linear in log(1 + step) between checkpoints."""
    return float(np.interp(np.log1p(step), np.log1p(series["step"]), series[name]))


def change(series: Series, name: str, stage: Stage) -> float:
    """By how much a scalar series grows over a stage."""
    return at(series, name, stage.end) - at(series, name, stage.start)


def concentration(series: Series, name: str, stage: Stage) -> float:
    """How much more of a series' growth lies in a stage than the stage's share of log time.

    (growth over the stage) / (largest - smallest value of the run) - (share of log(1 + step)).
    0 if the growth is spread evenly, near 1 if all of it is in a short stage; NaN for a constant.
    """
    spread = float(np.ptp(series[name]))
    time = np.log1p(stage.end) - np.log1p(stage.start)
    share = change(series, name, stage) / spread if spread > 0 else float("nan")
    return share - float(time / (np.log1p(series["step"][-1]) - np.log1p(series["step"][0])))


def since(steps: np.ndarray, values: np.ndarray, level: float) -> np.ndarray:
    """(step, checkpoint before, checkpoint after) from where values stay at or above a level, linear in log(1 + step).

    NaN where they are there from the start, or not at the end, or the level is NaN.
    """
    below = np.flatnonzero(~(values >= level))
    if not len(below) or below[-1] + 1 == len(steps):
        return np.full(3, np.nan)
    at = int(below[-1])
    x = np.log1p(steps[at : at + 2].astype(float))
    middle = float(np.expm1(np.interp(level, values[at : at + 2], x)))
    return np.array([middle, float(steps[at]), float(steps[at + 1])])


def mean_over(series: Series, name: str, stage: Stage, n_points: int = 50) -> float:
    """Mean of a scalar series over a stage, uniform in log(1 + step)."""
    points = np.linspace(np.log1p(stage.start), np.log1p(stage.end), n_points)
    return float(np.interp(points, np.log1p(series["step"]), series[name]).mean())


def llc_at(curve: LLCCurve, component: str, step: float) -> tuple[float, float]:
    """(LLC of a component at a step, its standard error), linear between the points that stages may rest on, NaN
    without any: an estimate that is surely negative measures no minimum, and no change begins or ends there.
    """
    usable = stage_points(curve, component)
    if not usable.any():
        return float("nan"), float("nan")
    row, x = curve.row(component), np.log1p(curve.steps[usable])
    llc, error = (np.interp(np.log1p(step), x, values[row][usable]) for values in (curve.llc, curve.std_error))
    return float(llc), float(error)


def llc_change(curve: LLCCurve, stage: Stage, component: str = "model") -> tuple[float, float]:
    """(change of a component's LLC over a stage, its standard error)."""
    (start, start_error), (end, end_error) = (llc_at(curve, component, step) for step in (stage.start, stage.end))
    return end - start, float(np.hypot(start_error, end_error))
