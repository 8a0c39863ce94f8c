"""Which data does a head specialize to? Its refined LLC on each sub-distribution beside its layer's other heads'.

wdrLLC and drLLC are sampled on the sub-distribution (`curve.refined`), as in Wang et al. 2024 (arXiv:2410.02984).
What a head has that its layer has not is a difference (`measures.refined.specialization`, where the caveats on errors
stand), and a distribution may add to all heads or multiply them: both scales are reported. A head that specializes
pushes the contrasts of the others the other way, each by a share of its own.

"The end of training" is, for each estimate, its latest healthy one in the last fifth of the run's steps.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, TypeVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformer_lens import HookedTransformer

from analyses.contract import Series, claim, end_of
from mechgrok import plotting
from mechgrok.components import head_layer
from mechgrok.config import REFERENCE
from mechgrok.measures.circuits import head_name, searched_circuits, strongest_first
from mechgrok.measures.head_types import typed_heads
from mechgrok.measures.refined import holm, ranks, specialization
from mechgrok.model import evaluate
from mechgrok.stages import usable_points
from mechgrok.types import Claim, LLCCurve, Report, Split, Stage, Study

T = TypeVar("T")

NAME = "specialization"
TASKS = ("planted-language", "text", "hugging-face")
REPEATS, NGRAMS = "repeat-heavy", "ngram-heavy"  # of the planted language
PREFIX_MATCHING = "prefix matching"  # the score of that name in `head_types`
ALPHA = 0.05
N_EXAMPLES = 256
LATE = 0.8  # the share of training after which an estimate speaks for its end


def prepare(model: HookedTransformer, split: Split) -> dict[str, Any]:
    """The heads in order and their types in the final model; of its induction heads, of which there may be several or
    none, the one that matches prefixes most, and the one to which the strongest circuit leads.
    """
    evidence = typed_heads(model, split)
    induction = sorted(
        (head for head in evidence if head.type == "induction"), key=lambda head: head.scores[PREFIX_MATCHING]
    )
    return {
        "heads": [head.head for head in evidence],
        "types": [f"{head.head} {head.type}" for head in evidence],
        "induction head": [head.head for head in induction[-1:]],
        "circuit's induction head": [
            head_name(of.pair[1]) for of in strongest_first(searched_circuits(model, split))[:1]
        ],
    }


def measure(model: HookedTransformer, split: Split, rng: torch.Generator, facts: Mapping[str, Any]) -> dict[str, float]:
    """{"loss_test", "loss_<distribution>": mean loss, nats}."""
    data = {"test": split.test, **_no_reference(split.distributions)}
    return {f"loss_{name}": evaluate(model, examples.first(N_EXAMPLES))[0] for name, examples in data.items()}


def derive(
    series: Series, curve: LLCCurve, facts: Mapping[str, Any], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Refined LLCs, contrasts, tests and ranks; NaN where an estimate that is needed is missing or unhealthy.

    Returns:
        "distributions": their names, in the order of the axis; all were sampled at one setting. "refined_step":
        [checkpoint], those that all distributions share. "specialization" and "specialization_error":
        Float[distribution, head, checkpoint]. At the end of training: "final_llc", "final_specialization",
        "final_scaled" (the same on the other scale) and their "_error", and "rank": Float[distribution, head];
        "rank_probability": Float[distribution, head, rank]; "p_head", "p_head_scaled": [head]; "p_layer",
        "p_layer_scaled": [layer]; "final_drllc" of the whole model and its "_error": [distribution].
        "layer", "is_induction": [head]. "induction_head", "circuit_head": the index of either among the heads, or NaN.
    """
    heads = list(facts["heads"])
    refined = _no_reference(curve.refined)
    steps = reduce(np.intersect1d, [of.steps for of in refined.values()], np.asarray(series["step"]))
    values, errors = _aligned(refined, [*heads, "model"], steps)
    finals, final_errors = _latest(values, errors, steps >= LATE * series["step"][-1])
    llc, error, final, final_error = values[:, :-1], errors[:, :-1], finals[:, :-1], final_errors[:, :-1]
    layers = np.array([head_layer(head) for head in heads])
    n_layers, n_ranks = layers.max() + 1, np.bincount(layers).max()

    shifts, scaled = np.full((2, 2, *final.shape), np.nan)  # (value, error) on both scales
    over_time = np.full((2, *llc.shape), np.nan)
    p_head, p_layer = np.full((2, len(heads)), np.nan), np.full((2, n_layers), np.nan)
    rank, probability = np.full(final.shape, np.nan), np.full((*final.shape, n_ranks), np.nan)
    for layer in range(n_layers):
        mine = np.flatnonzero(layers == layer)
        for scale, kept in enumerate((shifts, scaled)):
            found = specialization(final[:, mine], final_error[:, mine], scaled=bool(scale))
            kept[:, :, mine] = found.value, found.error
            p_head[scale, mine], p_layer[scale, layer] = found.p_head, found.p_layer
        for time in range(len(steps)):
            found = specialization(llc[:, mine, time], error[:, mine, time])
            over_time[:, :, mine, time] = found.value, found.error
        for index in range(len(final)):
            placed, chances = ranks(final[index, mine], final_error[index, mine], rng)
            rank[index, mine], probability[index, mine, : len(mine)] = placed, chances
    return {
        "distributions": np.array(list(refined), dtype=str),
        "refined_step": steps,
        "specialization": over_time[0],
        "specialization_error": over_time[1],
        "final_llc": final,
        "final_llc_error": final_error,
        "final_specialization": shifts[0],
        "final_specialization_error": shifts[1],
        "final_scaled": scaled[0],
        "final_scaled_error": scaled[1],
        "p_head": p_head[0],
        "p_head_scaled": p_head[1],
        "p_layer": p_layer[0],
        "p_layer_scaled": p_layer[1],
        "rank": rank,
        "rank_probability": probability,
        "final_drllc": finals[:, -1],
        "final_drllc_error": final_errors[:, -1],
        "layer": layers,
        "is_induction": _induction(facts["types"], heads),
        "induction_head": _index(facts["induction head"], heads),
        "circuit_head": _index(facts["circuit's induction head"], heads),
    }


def _no_reference(by_name: Mapping[str, T]) -> dict[str, T]:
    """Without what a reference model has drawn: the same inputs as the training data's, under another loss."""
    return {name: of for name, of in by_name.items() if name != REFERENCE}


def _induction(types: Sequence[str], heads: Sequence[str]) -> np.ndarray:
    """Which heads are induction heads: Bool[head]."""
    kind = dict(text.split(" ", 1) for text in types)
    return np.array([kind.get(head) == "induction" for head in heads])


def _index(named: Sequence[str], heads: Sequence[str]) -> np.ndarray:
    """Where the one that is named stands among the heads; NaN if none is."""
    return np.array(heads.index(named[0]) if named else np.nan)


def _aligned(
    refined: Mapping[str, LLCCurve], components: Sequence[str], steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(llc, std_error) on each distribution at shared steps, NaN unless healthy: [distribution, component, checkpoint].

    An estimate without an error cannot be compared, so it counts as missing.
    """
    llc, error = np.full((2, len(refined), len(components), len(steps)), np.nan)
    for index, of in enumerate(refined.values()):
        at = np.isin(of.steps, steps)
        for column, name in enumerate(components):
            if name in of.components:
                row = of.row(name)
                usable = usable_points(of, name) & (of.std_error[row] > 0)
                llc[index, column] = np.where(usable, of.llc[row], np.nan)[at]
                error[index, column] = np.where(usable, of.std_error[row], np.nan)[at]
    return llc, error


def _latest(llc: np.ndarray, error: np.ndarray, late: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(llc, std_error) at the last late checkpoint that has them, NaN without any: [distribution, component]."""
    final, final_error = np.full((2, *llc.shape[:2]), np.nan)
    for time in np.flatnonzero(late):
        there = np.isfinite(llc[:, :, time])
        final, final_error = np.where(there, llc[:, :, time], final), np.where(there, error[:, :, time], final_error)
    return final, final_error


def conclude(series: Series, stages: Sequence[Stage], curve: LLCCurve) -> list[Claim]:
    """Does any head specialize, and, where the distributions are the planted language's, the induction head?"""
    last = end_of(stages, series)
    both = np.maximum(series["p_head"], series["p_head_scaled"])
    claims = [
        claim(
            "some head specializes to a distribution at the end of training (smallest p-value, Holm over heads)",
            last, lambda s: _least(holm(series["p_head"])), ALPHA, "<=", ALPHA,
        ),
        claim(
            "some head does on both scales, whether a distribution adds to all heads of a layer or multiplies them",
            last, lambda s: _least(holm(both)), ALPHA, "<=", ALPHA,
        ),
    ]  # fmt: skip
    if not {REPEATS, NGRAMS} <= set(curve.refined):
        return claims
    names, head = series["distributions"].tolist(), float(series["induction_head"])
    kind = series["is_induction"] & _beside(series, head)
    # Of heads that are all alike, each is first as often.
    chance = kind.sum() / _beside(series, head).sum() if np.isfinite(head) else float("nan")
    added, multiplied = (series[name] / series[f"{name}_error"] for name in ("final_specialization", "final_scaled"))

    def some(distribution: str) -> float:
        first = series["rank_probability"][names.index(distribution), :, 0]
        return float(first[kind].sum()) if kind.any() else float("nan")

    return [
        *claims,
        *_ranks_first("the induction head that matches prefixes most", head, series, last),
        *_ranks_first("the induction head of the strongest circuit", float(series["circuit_head"]), series, last),
        claim(
            f"some induction head ranks first in their layer on {REPEATS} data at the end (probability)",
            last, lambda s: some(REPEATS), 0.95, chance=chance,
        ),
        claim(
            f"none does on {NGRAMS} data (probability that one does)",
            last, lambda s: some(NGRAMS), 0.05, "<=", 1 - chance,
        ),
        claim(
            f"the one that matches prefixes most specializes to {REPEATS} data (in standard errors, on the less "
            "favourable scale)",
            last, lambda s: _at(np.minimum(added, multiplied), names.index(REPEATS), head), 1.96, chance=0.025,
        ),
    ]  # fmt: skip


def _ranks_first(who: str, head: float, series: Series, last: Stage) -> list[Claim]:
    """One head's rank in its layer: the first on repeats, and not on n-grams."""
    repeats, ngrams = (series["distributions"].tolist().index(name) for name in (REPEATS, NGRAMS))
    rank, first = series["rank"], series["rank_probability"][:, :, 0]
    chance = 1 / _beside(series, head).sum() if np.isfinite(head) else float("nan")
    return [
        claim(
            f"the wdrLLC of {who} ranks first in its layer on {REPEATS} data at the end (rank)",
            last, lambda s: _at(rank, repeats, head), 1.0, "<=", chance,
        ),
        claim(
            "it does so within the errors (probability of the first rank)",
            last, lambda s: _at(first, repeats, head), 0.95, chance=chance,
        ),
        claim(
            f"it does not rank first on {NGRAMS} data (rank)",
            last, lambda s: _at(rank, ngrams, head), 2.0, chance=1 - chance,
        ),
        claim(
            "nor does it within the errors (probability of the first rank)",
            last, lambda s: _at(first, ngrams, head), 0.05, "<=", 1 - chance,
        ),
    ]  # fmt: skip


def _beside(series: Series, head: float) -> np.ndarray:
    """The heads of its layer: Bool[head]; none if there is no such head."""
    layer = series["layer"]
    return layer == layer[int(head)] if np.isfinite(head) else np.zeros(len(layer), dtype=bool)


def _at(values: np.ndarray, distribution: int, head: float) -> float:
    return float(values[distribution, int(head)]) if np.isfinite(head) else float("nan")


def tables(report: Report) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The end of training: the model, each head, each layer."""
    found, names = report.derived, report.derived["distributions"].tolist()
    if not names:
        return {}
    adjusted, adjusted_scaled = holm(found["p_head"]), holm(found["p_head_scaled"])
    rows = []
    for head, text in enumerate(report.facts["types"]):
        shift, error = found["final_specialization"][:, head], found["final_specialization_error"][:, head]
        most = int(np.argmax(shift)) if np.isfinite(shift).all() else None
        towards = "–" if most is None else f"{names[most]}: {_pair(shift[most], error[most])}"
        of_each = [_placed(found, index, head) for index in range(len(names))]
        rows.append([*text.split(" ", 1), *of_each, towards, _number(adjusted[head]), _number(adjusted_scaled[head])])
    drllc = zip(names, found["final_drllc"], found["final_drllc_error"], strict=True)
    layers = enumerate(zip(holm(found["p_layer"]), holm(found["p_layer_scaled"]), strict=True))
    added, multiplied = "p-value, Holm", "the same, scaled"
    return {
        "drLLC of the model at the end of training, ± standard error": (
            ["distribution", "drLLC"], [[name, _pair(*value)] for name, *value in drllc],
        ),
        "wdrLLC of each head at the end of training, ± standard error; its rank in its layer, and how sure that is": (
            ["head", "type", *names, "specializes to (by how much)", added, multiplied], rows,
        ),
        "Do the heads of a layer differ between distributions? Chi-square test of 'all alike'": (
            ["layer", added, multiplied], [[str(layer), *map(_number, values)] for layer, values in layers],
        ),
    }  # fmt: skip


def plot(report: Report, study: Study) -> dict[str, Figure]:
    """The loss and the model's drLLC on each distribution; by layer, the wdrLLCs of the heads and what they tell."""
    found, refined, heads = report.derived, _no_reference(study.curve.refined), report.facts["heads"]
    fig, (losses, drllc) = plotting.panels(2)
    for name, values in report.series.items():
        losses.plot(report.steps, values, label=name.removeprefix("loss_"))
    for name, of in refined.items():
        _draw(drllc, of, "model", name)
    _finish(losses, study, "loss (nats)")
    _finish(drllc, study, "drLLC of the model")
    figures = {"Loss and drLLC on each distribution, with 95 % intervals": fig}
    shown = list(enumerate(refined))[: 1 if len(refined) == 2 else None]  # two mirror each other
    for layer in sorted({head_layer(head) for head in heads}) if refined else []:
        mine = [(index, head) for index, head in enumerate(heads) if head_layer(head) == layer]
        fig, axes = plotting.panels(len(refined))
        for ax, (name, of) in zip(axes, refined.items(), strict=True):
            for _, head in mine:
                _draw(ax, of, head, head)
            _finish(ax, study, f"wdrLLC, {name}")
        low, high = min(ax.get_ylim()[0] for ax in axes), max(ax.get_ylim()[1] for ax in axes)
        for ax in axes:
            ax.set_ylim(low, high)
        figures[f"wdrLLC of the heads of layer {layer} on each distribution, with 95 % intervals"] = fig
        fig, axes = plotting.panels(len(shown))
        for ax, (row, name) in zip(axes, shown, strict=True):
            for index, head in mine:
                value, error = found["specialization"][row, index], found["specialization_error"][row, index]
                ax.errorbar(found["refined_step"], value, 1.96 * error, lw=1, marker="o", markersize=3, label=head)
            ax.axhline(0, color="black", lw=0.5)
            _finish(ax, study, f"specialization to {name}")
        title = f"By how much more than on other data each head of layer {layer} exceeds the layer's other heads"
        figures[title] = fig
    return figures


def _draw(ax: Axes, curve: LLCCurve, component: str, label: str) -> None:
    """The healthy estimates with 95 % intervals, if the curve follows the component."""
    if component in curve.components:
        usable, row = usable_points(curve, component), curve.row(component)
        error = 1.96 * curve.std_error[row][usable]
        ax.errorbar(curve.steps[usable], curve.llc[row][usable], error, lw=1, marker="o", markersize=3, label=label)


def _finish(ax: Axes, study: Study, ylabel: str) -> None:
    plotting.developmental_axis(ax, study.stages, ylabel)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=7)


def _least(p_values: np.ndarray) -> float:
    known = p_values[np.isfinite(p_values)]
    return float(known.min()) if known.size else float("nan")


def _placed(found: Mapping[str, np.ndarray], distribution: int, head: int) -> str:
    rank = found["rank"][distribution, head]
    value = _pair(found["final_llc"][distribution, head], found["final_llc_error"][distribution, head])
    if not np.isfinite(rank):
        return value
    return f"{value}; {rank:.0f} ({found['rank_probability'][distribution, head, int(rank) - 1]:.0%})"


def _pair(value: float, error: float) -> str:
    return f"{value:.2f} ± {error:.2g}" if np.isfinite(value) else "–"


def _number(value: float) -> str:
    return f"{value:.2g}" if np.isfinite(value) else "–"
