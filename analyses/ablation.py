"""Which heads carry the answer, and from which stage on: zero, mean and resample ablation of each."""

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations, permutations
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import rankdata
from transformer_lens import HookedTransformer

from analyses.contract import Series, claim, llc_at, strongest
from mechgrok import plotting, seeds
from mechgrok.components import HEAD_NAME, head_names
from mechgrok.measures.ablation import ABLATION_KINDS, head_ablations
from mechgrok.types import Claim, LLCCurve, Report, Split, Stage, Study

NAME = "ablation"
TASKS = ("modular-addition",)
ALIKE = 0.8  # a rank correlation from which two orders of the heads count as one
N_DRAWS = 1000  # of the wrLLCs within their errors
MAX_PERMUTED = 8  # heads whose orders are all counted for the chance level


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
        llcs, errors = _head_llcs(curve, stage.start)
        effects = heads_at(series, "zero_train", stage.start)
        return _surely_alike(llcs, errors, effects) if len(llcs) == len(effects) else float("nan")

    n_heads = series["zero_train"].shape[1]
    return [
        claim(
            "every head comes to carry training answers while the LLC rises (least gain of zero-ablation loss, nats)",
            rising, every_head_gains, 1.0,
        ),
        claim(
            "zero, mean and resample ablation rank the heads alike when the LLC has fallen (least rank correlation)",
            falling, kinds_agree, ALIKE,
        ),
        claim(
            "heads of larger wrLLC cost more to ablate when the LLC peaks (probability of a rank correlation of "
            f"{ALIKE} within the errors)",
            falling, llc_agrees, 0.95, chance=_chance_alike(n_heads),
        ),
    ]  # fmt: skip


def _head_llcs(curve: LLCCurve, step: float) -> tuple[np.ndarray, np.ndarray]:
    """The wrLLC of the followed heads at a step, in the model's order, and its standard errors: [head]."""
    heads = sorted((int(m[1]), int(m[2]), name) for name in curve.components if (m := HEAD_NAME.fullmatch(name)))
    found = np.array([llc_at(curve, name, step) for _, _, name in heads]).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _surely_alike(values: np.ndarray, errors: np.ndarray, others: np.ndarray) -> float:
    """The probability, within the errors of `values`, that their rank correlation with `others` is ALIKE or more."""
    if np.isnan(values + errors).any() or len(values) < 4:
        return float("nan")
    normal = np.random.default_rng(seeds.derive(0, NAME, "errors")).standard_normal((N_DRAWS, len(values)))
    return float(np.mean(_rank_correlations(values + errors * normal, others) >= ALIKE))


@cache
def _chance_alike(n: int) -> float | None:
    """How probable ALIKE or more is for n heads whose orders have nothing to do with each other; None for many."""
    if not 4 <= n <= MAX_PERMUTED:
        return None
    orders = np.array(list(permutations(range(n))), dtype=float)
    return float(np.mean(_rank_correlations(orders, np.arange(n)) >= ALIKE))


def _rank_correlations(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Spearman's of each row, [row, head], with the others, [head]."""
    ranks, fixed = rankdata(rows, axis=1), rankdata(others)
    ranks, fixed = ranks - ranks.mean(1, keepdims=True), fixed - fixed.mean()
    with np.errstate(invalid="ignore"):
        found = ranks @ fixed / np.sqrt((ranks**2).sum(1) * (fixed**2).sum())
    return found.round(12)  # .8 is .8, and holds against .8


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, NaN for fewer than 4 heads (two are always ranked alike or opposite) and for constants."""
    if len(a) < 4 or not np.ptp(a) > 0 or not np.ptp(b) > 0:
        return float("nan")
    return float(_rank_correlations(a[None], b)[0])


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
