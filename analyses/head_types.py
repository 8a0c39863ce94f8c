"""Which type each attention head is of, and in which stage previous-token heads and prefix matching form.

The rules and thresholds are those of `measures.head_types`, with the multigrams that `measures.multigrams` counts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformer_lens import HookedTransformer

from analyses.contract import CONCENTRATED, Series, claim, concentration, end_of, llc_change, since
from mechgrok import plotting, seeds
from mechgrok.components import head_layer, head_names
from mechgrok.measures.copying import eigenvalue_copying
from mechgrok.measures.head_types import HEAD_TYPES, TIMES_CHANCE, probe, typed_heads
from mechgrok.types import Claim, LLCCurve, Report, Split, Stage, Study

NAME = "head_types"
TASKS = ("planted-language", "text", "hugging-face")

SCORES = {
    "previous-token": "previous token (times chance)",
    "current-token": "current token (times chance)",
    "first-token": "first token (times chance)",
    "duplicate-token": "earlier equal token (times chance)",
    "prefix matching": "prefix matching (times chance)",
    "copying": "copying (times chance)",
    "direct effect": "direct effect on repeats (nats)",
    "ablation": "zero ablation (nats)",
    "brackets": "zero ablation on closing brackets (nats)",
    "multigrams": "memorized multigrams",
    "harm to multigrams": "resample ablation at its multigrams (nats a row)",
    "harm to repeats": "the same at repeats (nats a row)",
}


def prepare(model: HookedTransformer, split: Split) -> dict[str, Any]:
    """The names of the heads, in the order of the head axis. Raises ShapeError where rows are too short to repeat."""
    probe(split, seeds.stream(0, NAME))
    return {"heads": head_names(model)}


def measure(
    model: HookedTransformer, split: Split, rng: torch.Generator, facts: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """{score: [head]} for SCORES and "eigenvalue copying", and "type", an index into HEAD_TYPES.

    The random tokens are the same at every checkpoint, whatever `rng`, so that only the model changes.
    """
    evidence = typed_heads(model, split)
    series = {name: np.array([of.scores[name] for of in evidence]) for name in SCORES}
    tokens = range(min(len(split.labels), split.n_classes))  # a task of next tokens: these are its classes
    series["eigenvalue copying"] = eigenvalue_copying(model, tokens).numpy()
    series["type"] = np.array([HEAD_TYPES.index(of.type) for of in evidence])
    return series


def derive(
    series: Series, curve: LLCCurve, facts: Mapping[str, Any], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """{"best previous-token", "best prefix matching": [checkpoint]}, the largest score of a head, times chance.

    Of previous-token heads those below the last layer count, whose output an induction head can read; of one layer all.
    """
    layer = np.array([head_layer(head) for head in facts["heads"]])
    read = layer < max(1, layer.max())
    scores = {"previous-token": series["previous-token"][:, read], "prefix matching": series["prefix matching"]}
    return {f"best {name}": np.nan_to_num(of, nan=0.0).max(1) for name, of in scores.items()}


def conclude(series: Series, stages: Sequence[Stage], curve: LLCCurve) -> list[Claim]:
    """Does a previous-token head form in one stage, and prefix matching; does the LLC rise there; are heads found?"""
    names = ("previous-token", "prefix matching")
    best = {"step": series["step"]} | {name: series[f"best {name}"] for name in names}
    last = end_of(stages, series)

    def where(name: str) -> Stage | None:
        """The stage with most of the growth for its length; random stages may choose theirs as well."""
        return max(stages, key=lambda stage: np.nan_to_num(concentration(best, name, stage)), default=None)

    def formed(name: str, stage: Stage) -> float:
        reached = best[name].max() >= TIMES_CHANCE
        return concentration(best, name, stage) if reached else float("nan")

    def llc_rise(stage: Stage) -> float:
        change, error = llc_change(curve, stage)
        return change - 1.96 * error if best["prefix matching"].max() >= TIMES_CHANCE else float("nan")

    def number(kind: str) -> float:
        return float(np.sum(series["type"][-1] == HEAD_TYPES.index(kind)))

    return [
        claim(
            "a previous-token head forms in one stage (growth of the best head's attention over chance, share of all "
            "growth, less that of time)",
            where("previous-token"), lambda s: formed("previous-token", s), CONCENTRATED,
        ),
        claim(
            "prefix matching forms in one stage (the same of the best head's prefix matching)",
            where("prefix matching"), lambda s: formed("prefix matching", s), CONCENTRATED,
        ),
        claim(
            "the LLC rises in the stage in which prefix matching forms (change less 1.96 standard errors)",
            where("prefix matching"), llc_rise, 0.0,
        ),
        claim(
            "the previous-token head is there before prefix matching is (half their growth: ratio of the near ends of "
            "the intervals)",
            last, lambda s: float(_half(best, "prefix matching")[1] / _half(best, "previous-token")[2]), 1.0,
        ),
        claim("the final model has a previous-token head (number)", last, lambda s: number("previous-token"), 1.0),
        claim("the final model has an induction head (number)", last, lambda s: number("induction"), 1.0),
    ]  # fmt: skip


def tables(report: Report) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Type and evidence of every head at the last checkpoint, and when each type appears."""
    heads, types = report.facts["heads"], report.series["type"]
    evidence = [
        [head, HEAD_TYPES[types[-1][i]], *(_number(report.series[name][-1][i]) for name in SCORES)]
        for i, head in enumerate(heads)
    ]
    since = []
    for index, kind in enumerate(HEAD_TYPES):
        mine = types == index
        if mine[-1].any():
            absent = np.flatnonzero(~mine.any(1))
            first = report.steps[absent[-1] + 1] if len(absent) else report.steps[0]
            since.append([kind, ", ".join(head for head, yes in zip(heads, mine[-1], strict=True) if yes), str(first)])
    return {
        "Heads at the last checkpoint": (["head", "type", *SCORES.values()], evidence),
        "Since when there is a head of the type": (["type", "heads at the end", "since step"], since),
    }


def plot(report: Report, study: Study) -> dict[str, Figure]:
    """Previous-token attention, prefix matching and direct effect of every head over training."""
    fig, axes = plotting.panels(3)
    for ax, name in zip(axes, ("previous-token", "prefix matching", "direct effect"), strict=True):
        for index, head in enumerate(report.facts["heads"]):
            ax.plot(report.steps, report.series[name][:, index], label=head, lw=1)
        if name != "direct effect":
            ax.axhline(TIMES_CHANCE, color="gray", lw=1, ls=":")
        plotting.developmental_axis(ax, study.stages, SCORES[name])
    axes[0].legend(frameon=False, fontsize=7, ncols=2)
    return {"What the heads attend to, and what they do": fig}


def _half(series: Series, name: str) -> np.ndarray:
    """`since` when a series is above the middle of its range; NaN where it never passed TIMES_CHANCE."""
    values = series[name]
    ever = values.max() >= TIMES_CHANCE
    return since(series["step"], values, (values.min() + values.max()) / 2 if ever else float("nan"))


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2g}"
