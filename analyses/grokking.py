"""Does the LLC's hump tell memorization from generalization? Landmarks of the loss stand beside the stages."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformer_lens import HookedTransformer

from analyses.contract import CONCENTRATED, Series, at, claim, concentration, end_of, llc_change, strongest
from mechgrok import plotting
from mechgrok.measures.landmarks import landmarks
from mechgrok.model import evaluate
from mechgrok.stages import stage_points
from mechgrok.types import Claim, LLCCurve, Report, Split, Stage, Study

NAME = "grokking"
TASKS = ("modular-addition",)


def measure(model: HookedTransformer, split: Split, rng: torch.Generator, facts: Mapping[str, Any]) -> dict[str, float]:
    """Loss (nats) and accuracy on both sides of the split."""
    (train_loss, train_accuracy), (test_loss, test_accuracy) = evaluate(model, split.train), evaluate(model, split.test)
    return {
        "train_loss": train_loss,
        "test_loss": test_loss,
        "train_accuracy": train_accuracy,
        "test_accuracy": test_accuracy,
    }


def conclude(series: Series, stages: Sequence[Stage], curve: LLCCurve) -> list[Claim]:
    """Is there grokking, has the LLC a hump, and which change of accuracy lies in which stage?"""
    rising, falling = strongest(stages, "rising"), strongest(stages, "falling")
    marks = landmarks(series["step"], series["train_accuracy"], series["test_accuracy"])
    delay = marks["generalized"] - marks["memorized"]
    at_memorization = at(series, "test_accuracy", marks["memorized"])
    last = end_of(stages, series)
    hump = falling if rising and falling and rising.start < falling.start else None

    def hump_size(of: LLCCurve | None) -> float:
        """Lower 95 % bound of the smaller of rise and fall, as a share of the range of the points that count."""
        if of is None or rising is None or falling is None:
            return float("nan")
        (rise, rise_error), (fall, fall_error) = llc_change(of, rising), llc_change(of, falling)
        points = of.llc[of.row("model")][stage_points(of)]
        spread = float(np.ptp(points)) if points.size else 0.0
        return min(rise - 1.96 * rise_error, -fall - 1.96 * fall_error) / spread if spread > 0 else float("nan")

    return [
        claim(
            "the final model answers every test pair (test accuracy)",
            last, lambda s: at(series, "test_accuracy", s.end), 1.0,
        ),
        claim("generalization comes later than memorization (steps)", last, lambda s: delay, 150.0),
        claim(
            "test accuracy is still below 5 % when the training set is memorized",
            last, lambda s: at_memorization, 0.05, "<=",
        ),
        claim(
            "the LLC rises, then falls (smaller change less 1.96 standard errors, as a share of the curve's range)",
            hump, lambda s: hump_size(curve), 0.5,
        ),
        claim(
            "the same at the control localization, in the same stages",
            hump, lambda s: hump_size(curve.control), 0.5,
        ),
        claim(
            "training pairs are memorized while the LLC rises (share of the gain of train accuracy, less that of time)",
            rising, lambda s: concentration(series, "train_accuracy", s), CONCENTRATED,
        ),
        claim(
            "the rule is found while the LLC falls (share of the gain of test accuracy, less that of time)",
            falling, lambda s: concentration(series, "test_accuracy", s), CONCENTRATED,
        ),
    ]  # fmt: skip


def plot(report: Report, study: Study) -> dict[str, Figure]:
    """The figures of the report."""
    accuracies = (report.series["train_accuracy"], report.series["test_accuracy"])
    fig, (ax,) = plotting.panels(1)
    for side, values in zip(("train", "test"), accuracies, strict=True):
        ax.plot(report.steps, values, label=side)
    llc = study.curve.llc[study.curve.row("model")]
    ax.plot(study.curve.steps, llc / np.nanmax(llc), color=plotting.INK, ls=":", label="LLC / its largest")
    plotting.developmental_axis(ax, study.stages, "share")
    plotting.mark_steps(ax, landmarks(report.steps, *accuracies))
    ax.legend(frameon=False, fontsize=8)
    return {"Accuracy under the LLC's stages, with the landmarks of the loss": fig}
