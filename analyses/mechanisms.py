"""When the model comes to use bigrams, n-grams, the previous token and induction, and what the LLC does meanwhile.

A mechanism's date is the step from which its measure stays past the middle between what it was without the mechanism
and the best it ever was:

    bigrams         loss on bigram targets (of all targets, where those are not known): from ln(vocabulary) on
    n-grams,        loss on the targets that a planted n-gram or skip n-gram gives, or an n-gram that the test data
    skip n-grams    hold: from the loss that bigrams alone give there, so that what they achieve is not counted
    previous token  the largest attention to the previous token, on random tokens, of a head that a later layer can
                    read: from its chance level
    induction       how much better random tokens are predicted when they come again in the same order than in another,
                    in nats: from 0, so that making likely whatever has been seen, in any order, does not count

The interval of a date is that between the two checkpoints around it. The order of mechanisms in language models is
that of Hoogland et al. 2024 (arXiv:2402.02364); the dates by midpoints are ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformer_lens import HookedTransformer

from analyses.contract import CONCENTRATED, Series, claim, concentration, end_of, llc_at, since
from mechgrok import plotting, seeds
from mechgrok.measures.attention import attention_scores, shuffle_first
from mechgrok.measures.head_types import probe
from mechgrok.measures.in_context import (
    bigram_score,
    bigram_table,
    in_context_score,
    losses_by_kind,
    position_losses,
)
from mechgrok.model import chance_loss
from mechgrok.types import Claim, LLCCurve, Report, Split, Stage, Study

NAME = "mechanisms"
TASKS = ("planted-language", "text", "hugging-face")
ORDER = ("bigrams", "n-grams", "previous token", "induction")
N_EXAMPLES = 256
LEARNED = 0.2  # of what could be gained; with less, a mechanism has no date
ATTENDED = 0.1  # of the attention, over chance: less is no previous-token head
BENEFIT_NATS = 0.5  # that a repetition must gain for induction to be dated
RARE = 1e-4  # the probability of a bigram that the training data lack


def prepare(model: HookedTransformer, split: Split) -> dict[str, Any]:
    """The kinds of targets; the mean loss on each that the training data's bigram table gives, and what is left to who
    knows the planted truth, where there is one; and that of guessing.
    """
    chance = [round(chance_loss(model), 3)]
    table = bigram_table(split.train, model.cfg.d_vocab, model.cfg.d_vocab_out).clamp(min=RARE)
    examples = split.test.first(N_EXAMPLES)
    _, targets, weights = examples.tensors
    losses = -table.log()[examples.tokens[:, -targets.shape[1] :], targets]
    if split.kinds is None:
        return {"kinds": [], "bigram level": [], "floor": [], "chance level": chance}
    kinds = split.kinds[:N_EXAMPLES, -targets.shape[1] :]

    def of_kinds(nats: Tensor) -> list[float]:
        means = [nats[(kinds == index) & (weights > 0)].mean() for index in range(len(split.kind_names))]
        return [round(float(mean), 3) for mean in means]

    return {
        "kinds": list(split.kind_names),
        "bigram level": of_kinds(losses),
        "floor": [] if split.floors is None else of_kinds(split.floors[:N_EXAMPLES, -targets.shape[1] :]),
        "chance level": chance,
    }


def measure(
    model: HookedTransformer, split: Split, rng: torch.Generator, facts: Mapping[str, Any]
) -> dict[str, np.ndarray | float]:
    """Losses in nats; rows and random tokens are the same at every checkpoint.

    "loss"; "by_kind" [kind]; "bigram excess", KL from the training data's bigrams to the model; "previous token", the
    attention of the best head below the last layer, on random tokens; "induction", mean loss on a second copy of random
    tokens after a shuffled first one, less that after the first one as it was; "in-context score", the loss on the
    last quarter of a row less that on its second eighth, which is not 0 for bigrams alone if late targets are easier.
    """
    examples = split.test.first(N_EXAMPLES)
    drawn = seeds.stream(0, NAME, "random tokens")
    repeats = probe(split, drawn)
    shuffled = replace(repeats.examples, tokens=shuffle_first(repeats, drawn))
    second = repeats.examples.tensors[2] > 0
    after_order, after_none = (position_losses(model, rows)[second].mean() for rows in (repeats.examples, shuffled))
    table = bigram_table(split.train, model.cfg.d_vocab, model.cfg.d_vocab_out)
    n_pos = examples.tokens.shape[1]
    by_kind: list[float] = []
    if split.kinds is not None:
        by_kind = list(losses_by_kind(model, examples, split.kinds[:N_EXAMPLES], split.kind_names).values())
    previous = attention_scores(model, repeats.examples)["previous-token"]
    readable = previous.score[: model.cfg.n_heads * max(1, model.cfg.n_layers - 1)]
    return {
        "loss": float((position_losses(model, examples) * examples.tensors[2]).sum() / examples.tensors[2].sum()),
        "by_kind": np.array(by_kind),
        "bigram excess": bigram_score(model, examples, table).excess,
        "previous token": float(readable.max()) - previous.chance,
        "induction": float(after_none - after_order),
        "in-context score": in_context_score(model, examples, (n_pos // 8, n_pos // 4), (3 * n_pos // 4, n_pos)),
    }


def derive(
    series: Series, curve: LLCCurve, facts: Mapping[str, Any], rng: np.random.Generator
) -> dict[str, np.ndarray | float]:
    """{"date of <mechanism>": (step, checkpoint before, checkpoint after)}, NaN for a mechanism that never comes.

    Also "induction window": the steps between which induction's benefit goes from a tenth to nine tenths of its best.
    """
    step = series["step"]
    kinds, levels = facts["kinds"], facts["bigram level"]
    (uniform,) = facts["chance level"]

    def gained(name: str) -> np.ndarray:
        """From what bigrams achieve on the targets of this kind to certainty."""
        at = kinds.index(name)
        return _share(series["by_kind"][:, at], levels[at], 0.0)

    if "bigram" in kinds:
        bigrams, floor = series["by_kind"][:, kinds.index("bigram")], levels[kinds.index("bigram")]
    else:
        bigrams, floor = series["loss"], float(series["loss"].min())
    progress = {
        "bigrams": _if_ever(_share(bigrams, uniform, floor), LEARNED),
        "previous token": _if_ever(series["previous token"], ATTENDED),
        "induction": _if_ever(series["induction"], BENEFIT_NATS),
    }
    for name, kind in (("n-grams", "ngram"), ("skip n-grams", "skip")):
        if kind in kinds:
            progress[name] = _if_ever(gained(kind), LEARNED)
    found = {f"date of {name}": _date(step, values, 0.5) for name, values in progress.items()}
    for name in ORDER:
        found.setdefault(f"date of {name}", np.full(3, np.nan))
    window = [_date(step, progress["induction"], part)[0] for part in (0.1, 0.9)]
    return {**found, "induction window": np.array(window)}


def conclude(series: Series, stages: Sequence[Stage], curve: LLCCurve) -> list[Claim]:
    """Do the mechanisms come in the known order, and does the LLC rise while induction forms?"""
    dated = [series[f"date of {name}"] for name in ORDER]
    dates = [float(step) for step, _, _ in dated]
    start, end = (float(step) for step in series["induction window"])

    def stage_of(step: float) -> Stage | None:
        """Of the run as a whole, where there are no stages; None for a mechanism that never comes."""
        return next((stage for stage in stages or [end_of((), series)] if stage.start <= step <= stage.end), None)

    def rise(_: Stage) -> float:
        (before, error), (after, other) = llc_at(curve, "model", start), llc_at(curve, "model", end)
        return after - before - 1.96 * math.hypot(error, other)

    def later(at: int) -> Claim:
        text = f"the date of {ORDER[at]} is after that of {ORDER[at - 1]} (ratio of the near ends of their intervals)"
        return claim(text, stage_of(dates[at]), lambda _: dated[at][1] / dated[at - 1][2], 1.0)

    return [
        *(later(at) for at in range(1, len(ORDER))),
        claim(
            "the LLC rises while induction forms, from a tenth to nine tenths of its benefit (change less 1.96 "
            "standard errors)",
            stage_of(dates[-1]), rise, 0.0,
        ),
        claim(
            "the stage of induction's date is one in which the LLC rises (change)",
            stage_of(dates[-1]) if stages else None, lambda stage: stage.delta_llc, 0.0,
        ),
        claim(
            "induction forms in one stage (share of the growth of its benefit, less that of time)",
            stage_of(dates[-1]) if stages else None, lambda stage: concentration(series, "induction", stage),
            CONCENTRATED,
        ),
    ]  # fmt: skip


def tables(report: Report) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The dates, and what is left of the loss of each kind."""
    rows = [
        [key.removeprefix("date of "), *(f"{step:.0f}" if np.isfinite(step) else "never" for step in dates)]
        for key, dates in report.derived.items()
        if key.startswith("date of ")
    ]
    rows.sort(key=lambda row: float(row[1]) if row[1] != "never" else math.inf)
    found = {"When mechanisms come": (["mechanism", "step", "checkpoint before", "checkpoint after"], rows)}
    if not report.facts["kinds"]:
        return found
    losses = {"kind": report.facts["kinds"], "bigrams": report.facts["bigram level"]}
    losses["final model"] = [float(loss) for loss in report.series["by_kind"][-1]]
    if report.facts["floor"]:
        losses["floor: known tables, known what has begun"] = report.facts["floor"]
    of_kinds = [[row[0], *(f"{loss:.2f}" for loss in row[1:])] for row in zip(*losses.values(), strict=True)]
    return found | {"Loss by what made the target, in nats": (list(losses), of_kinds)}


def plot(report: Report, study: Study) -> dict[str, Figure]:
    """Loss by what made the target, and the previous token and induction."""
    kinds = report.facts["kinds"]
    fig, axes = plotting.panels(3)
    if kinds:
        for index, kind in enumerate(kinds):
            axes[0].plot(report.steps, report.series["by_kind"][:, index], label=kind, lw=1)
    else:
        axes[0].plot(report.steps, report.series["loss"], label="all", lw=1)
    axes[0].legend(frameon=False, fontsize=8)
    plotting.developmental_axis(axes[0], study.stages, "loss by kind of target (nats)")
    axes[1].plot(report.steps, report.series["previous token"])
    plotting.developmental_axis(axes[1], study.stages, "previous token (attention over chance)")
    axes[2].plot(report.steps, report.series["induction"])
    plotting.developmental_axis(axes[2], study.stages, "gain of a second copy in order (nats)")
    fig_context, axes = plotting.panels(2)
    for ax, name in zip(axes, ("bigram excess", "in-context score"), strict=True):
        ax.plot(report.steps, report.series[name])
        plotting.developmental_axis(ax, study.stages, f"{name} (nats)")
    return {
        "What the model uses": fig,
        "How far the model is from bigrams, and how much better it predicts late in a row": fig_context,
    }


def _share(losses: np.ndarray, without: float, floor: float) -> np.ndarray:
    """How much of the way from `without` down to `floor` is gone, 0 to 1; NaN where there is no way to go."""
    return (without - losses) / (without - floor) if without > floor else np.full(len(losses), np.nan)


def _if_ever(values: np.ndarray, least: float) -> np.ndarray:
    """The values, or NaN throughout if none reaches `least`."""
    return values if values.max() >= least else np.full(len(values), np.nan)


def _date(step: np.ndarray, progress: np.ndarray, part: float) -> np.ndarray:
    """`since` when progress is at `part` of its best."""
    return since(step, progress, part * progress.max())
