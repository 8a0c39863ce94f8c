"""Which heads carry the answer, and from which stage on: zero, mean and resample ablation of each."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from transformer_lens import HookedTransformer

from analyses.contract import Series, claim, llc_at, strongest
from mechgrok import plotting
from mechgrok.components import HEAD_NAME, head_names
from mechgrok.measures.ablation import ABLATION_KINDS, head_ablations
from mechgrok.types import Claim, LLCCurve, Report, Split, Stage, Study

NAME = "ablation"
TASKS = ("modular-addition",)


def prepare(model: HookedTransformer, split: Split) -> dict[str, Any]:
    """The names of the heads, in the order of the head axis."""
    return {"heads": head_names(model)}


def measure(
    model: HookedTransformer, split: Split, rng: torch.Generator, facts: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """{"<kind>_train", "<kind>_test": increase of the mean loss, nats, [head]} for each kind."""
    everything, n_train = split.train + split.test, len(split.train)
    series = {}
    for kind in ABLATION_KINDS:
        increase = head_ablations(model, everything, kind, rng).numpy()
        series[f"{kind}_train"] = increase[:, :n_train].mean(1)
        series[f"{kind}_test"] = increase[:, n_train:].mean(1)
    return series


def conclude(series: Series, stages: Sequence[Stage], curve: LLCCurve) -> list[Claim]:
    """Do the heads come to carry the answer, do the kinds of ablation agree, and does the wrLLC?"""
    rising, falling = strongest(stages, "rising"), strongest(stages, "falling")

    def every_head_gains(stage: Stage) -> float:
        return float(min(heads_at(series, "zero_train", stage.end) - heads_at(series, "zero_train", stage.start)))

    def kinds_agree(stage: Stage) -> float:
        effects = [heads_at(series, f"{kind}_train", stage.end) for kind in ABLATION_KINDS]
        return min(_rank_correlation(a, b) for a, b in combinations(effects, 2))

    def llc_agrees(stage: Stage) -> float:
        llcs = _head_llcs(curve, stage.start)
        effects = heads_at(series, "zero_train", stage.start)
        return _rank_correlation(llcs, effects) if len(llcs) == len(effects) else float("nan")

    return [
        claim(
            "every head comes to carry training answers while the LLC rises (least gain of zero-ablation loss, nats)",
            rising, every_head_gains, 1.0,
        ),
        claim(
            "zero, mean and resample ablation rank the heads alike when the LLC has fallen (least rank correlation)",
            falling, kinds_agree, 0.8,
        ),
        claim(
            "heads of larger wrLLC cost more to ablate when the LLC peaks (rank correlation over heads)",
            falling, llc_agrees, 0.8,
        ),
    ]  # fmt: skip


def _head_llcs(curve: LLCCurve, step: float) -> np.ndarray:
    """The wrLLC of the followed heads at a step, from healthy points, in the model's order: [head]."""
    heads = sorted((int(m[1]), int(m[2]), name) for name in curve.components if (m := HEAD_NAME.fullmatch(name)))
    return np.array([llc_at(curve, name, step)[0] for _, _, name in heads])


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, NaN for fewer than 4 heads (two are always ranked alike or opposite) and for constants."""
    if len(a) < 4 or not np.ptp(a) > 0 or not np.ptp(b) > 0:
        return float("nan")
    return round(float(spearmanr(a, b).statistic), 12)  # .8 is .8, and holds against .8


def heads_at(series: Series, name: str, step: float) -> np.ndarray:
    """A [checkpoint, head] series at a step, linear in log(1 + step): [head]."""
    x = np.log1p(series["step"])
    return np.array([np.interp(np.log1p(step), x, head) for head in series[name].T])


def plot(report: Report, study: Study) -> dict[str, Figure]:
    """The figures of the report."""
    fig, axes = plotting.panels(len(ABLATION_KINDS))
    for ax, kind in zip(axes, ABLATION_KINDS, strict=True):
        for index, head in enumerate(report.facts["heads"]):
            ax.plot(report.steps, report.series[f"{kind}_train"][:, index], label=head)
        plotting.developmental_axis(ax, study.stages, f"{kind} ablation (nats)")
    axes[0].legend(frameon=False, fontsize=8)
    return {"Increase of the train loss when one head is ablated": fig}
