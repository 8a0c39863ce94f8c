"""Which n-grams and skip n-grams the heads memorize, when, and whether more of them mean a larger refined LLC."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from transformer_lens import HookedTransformer

from analyses.contract import CONCENTRATED, Series, claim, concentration, end_of, llc_at
from mechgrok import plotting
from mechgrok.components import head_layer, head_names
from mechgrok.measures.head_types import typed_heads
from mechgrok.measures.multigrams import Multigram, memorized_on, score
from mechgrok.types import Claim, LLCCurve, Report, Split, Stage, Study

NAME = "multigrams"
TASKS = ("planted-language", "text", "hugging-face")
FOUND = 0.8  # precision and recall that are asked for
LEVEL = 0.05  # of the rank correlation's test
MIDDLE = 0.17  # of training, where Wang et al. 2024 regress first: step 8500 of 50,000


def prepare(model: HookedTransformer, split: Split) -> dict[str, Any]:
    """The heads, those of type "multigram", the final model's multigrams, and how many were planted, if known."""
    heads = head_names(model)
    memories = memorized_on(model, split)
    typed = [of.head for of in typed_heads(model, split, memories) if of.type == "multigram"]
    found = [of.multigrams for of in memories]
    shown = [
        f"{head}: " + (", ".join(_text(one, split.labels) for one in mine[:6]) or "none")
        + (f" and {len(mine) - 6} more" if len(mine) > 6 else "")
        for head, mine in zip(heads, found, strict=True)
    ]  # fmt: skip
    planted = {} if split.language is None else {"planted": [split.language.n_multigrams]}
    return {"heads": heads, "multigram heads": typed, "of the final model": shown, **planted}


def measure(
    model: HookedTransformer, split: Split, rng: torch.Generator, facts: Mapping[str, Any]
) -> dict[str, np.ndarray | float]:
    """{"ngrams", "skip_ngrams": [head] counts; "found": different ones, all heads; "precision", "recall"}.

    The last two are NaN where nothing was planted. Rows and resampled examples are the same at every checkpoint.
    """
    found = [of.multigrams for of in memorized_on(model, split)]
    every = {one for mine in found for one in mine}
    nan = float("nan")
    against = score(every, split.language) if split.language is not None else None
    return {
        "ngrams": np.array([sum(one.contiguous for one in mine) for mine in found]),
        "skip_ngrams": np.array([sum(not one.contiguous for one in mine) for mine in found]),
        "found": float(len(every)),
        "precision": against.precision if against else nan,
        "recall": against.recall if against else nan,
    }


def derive(
    series: Series, curve: LLCCurve, facts: Mapping[str, Any], rng: np.random.Generator
) -> dict[str, np.ndarray | float]:
    """Rank correlation over heads of the number memorized with the wrLLC, and its p-value.

    p is one-sided, for a positive correlation. Of multigrams and of n-grams alone; of all heads, of multigram heads,
    which Wang et al. 2024 take, and of each layer's; at the end, and at the checkpoint nearest to MIDDLE of the steps,
    where theirs is. "correlation, <what>, <heads>, <when>" and "p, ...".
    """
    steps, heads = series["step"], facts["heads"]
    layer = np.array([head_layer(head) for head in heads])
    groups = {"all heads": layer >= 0, "multigram heads": np.isin(heads, facts["multigram heads"])}
    groups |= {f"layer {at}": layer == at for at in np.unique(layer)}
    counts = {"multigrams": series["ngrams"] + series["skip_ngrams"], "n-grams": series["ngrams"]}
    found: dict[str, np.ndarray | float] = {}
    for when in (len(steps) - 1, int(np.abs(steps - MIDDLE * steps[-1]).argmin())):
        llc = np.array([_at(curve, head, float(steps[when])) for head in heads])
        for what, count in counts.items():
            for group, mine in groups.items():
                name = f"{what}, {group}, {'the end' if when == len(steps) - 1 else f'step {steps[when]}'}"
                found[f"correlation, {name}"], found[f"p, {name}"] = _rank_correlation(count[when, mine], llc[mine])
    return found


def conclude(series: Series, stages: Sequence[Stage], curve: LLCCurve) -> list[Claim]:
    """Are the planted ones found, is memorizing the work of one stage, and does the wrLLC count them?"""
    last = end_of(stages, series)
    growing = max(stages, key=lambda stage: np.nan_to_num(concentration(series, "found", stage)), default=None)
    return [
        claim(
            "planted multigrams are found at the end (recall)", last,
            lambda s: float(series["recall"][-1]), FOUND,
        ),
        claim(
            "what is found at the end was planted (precision)", last,
            lambda s: float(series["precision"][-1]), FOUND,
        ),
        claim(
            "multigrams are memorized in one stage (share of the growth of their number, less that of time)",
            growing, lambda s: concentration(series, "found", s), CONCENTRATED,
        ),
        claim(
            "heads that memorized more have a larger wrLLC at the end (rank correlation over all heads, p-value)",
            last, lambda s: float(series["p, multigrams, all heads, the end"]), LEVEL, "<=", LEVEL,
        ),
        claim(
            "beside it: multigram heads alone (p-value)",
            last, lambda s: float(series["p, multigrams, multigram heads, the end"]), LEVEL, "<=", LEVEL,
        ),
    ]  # fmt: skip


def tables(report: Report) -> dict[str, tuple[list[str], list[list[str]]]]:
    """How many each head has memorized at the end, and the correlation of that number with the wrLLC."""
    rows = [
        [head, str(report.series["ngrams"][-1][i]), str(report.series["skip_ngrams"][-1][i])]
        for i, head in enumerate(report.facts["heads"])
    ]
    names = [key.removeprefix("p, ") for key in report.derived if key.startswith("p, ")]
    correlations = [
        [name, *(_number(report.derived[f"{key}, {name}"]) for key in ("correlation", "p"))] for name in names
    ]
    return {
        "Memorized at the last checkpoint": (["head", "n-grams", "skip n-grams"], rows),
        "Number memorized against wrLLC": (
            ["number, heads, when", "rank correlation", "p-value, one-sided"],
            correlations,
        ),
    }


def plot(report: Report, study: Study) -> dict[str, Figure]:
    """Multigrams of every head over training, and precision and recall where the truth is known."""
    known = not np.isnan(report.series["recall"]).all()
    fig, axes = plotting.panels(2 if known else 1)
    for index, head in enumerate(report.facts["heads"]):
        axes[0].plot(report.steps, (report.series["ngrams"] + report.series["skip_ngrams"])[:, index], label=head, lw=1)
    axes[0].legend(frameon=False, fontsize=7, ncols=2)
    plotting.developmental_axis(axes[0], study.stages, "memorized multigrams")
    if known:
        for name in ("precision", "recall"):
            axes[1].plot(report.steps, report.series[name], label=name)
        axes[1].axhline(FOUND, color="gray", lw=1, ls=":")
        axes[1].legend(frameon=False)
        plotting.developmental_axis(axes[1], study.stages, "against what was planted")
    return {"N-grams and skip n-grams that the heads have memorized": fig}


def _at(curve: LLCCurve, head: str, step: float) -> float:
    return llc_at(curve, head, step)[0] if head in curve.components else float("nan")


def _rank_correlation(count: np.ndarray, llc: np.ndarray) -> tuple[float, float]:
    """Spearman's and its one-sided p-value, NaN with fewer than 5 heads and for constants."""
    usable = np.isfinite(llc)
    if usable.sum() < 5 or not np.ptp(count[usable]) > 0 or not np.ptp(llc[usable]) > 0:
        return float("nan"), float("nan")
    result = spearmanr(count[usable], llc[usable], alternative="greater")
    return float(result.statistic), float(result.pvalue)


def _text(one: Multigram, labels: Sequence[str]) -> str:
    gap = " " if one.contiguous else " … "
    return f"{labels[one.source]}{gap}{labels[one.token]} → {labels[one.target]}"


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2g}"
