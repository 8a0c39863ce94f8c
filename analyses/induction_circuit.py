"""Induction circuits by name: a previous-token head whose output a later head reads as its keys; when they form.

A circuit is *found* in the final model where scores, K-composition and ablation of the K path agree
(`measures.circuits.induction_search`). It is *confirmed* on other random tokens: its K path costs more than its Q and V
paths and than the K path of every control pair, and all kinds of ablation of its previous-token head raise the loss.

The strongest circuits, at most MAX_CIRCUITS, are followed through training, and as many control pairs: drawn at random
among those that share one head with a followed circuit and whose other head lacks the score that it would need.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformer_lens import HookedTransformer

from analyses.contract import CONCENTRATED, Series, claim, concentration, end_of, llc_change, since
from mechgrok import plotting, seeds
from mechgrok.components import head_of
from mechgrok.measures.ablation import ABLATION_KINDS, clean_run
from mechgrok.measures.circuits import (
    PairEvidence,
    WeightedMean,
    head_name,
    induction_scores,
    joint_ablation,
    pair_name,
    pair_of,
    path_effect,
    searched_circuits,
    strongest_first,
)
from mechgrok.measures.head_types import DIRECT_NATS, probe
from mechgrok.measures.path_ablation import INPUTS, Head, Input
from mechgrok.stages import usable_points
from mechgrok.types import Claim, LLCCurve, Report, Split, Stage, Study

NAME = "induction_circuit"
TASKS = ("planted-language", "text", "hugging-face")
MAX_CIRCUITS = 3
SCORES = {
    "previous-token": "previous token, first head (times chance)",
    "prefix matching": "prefix matching, second head (times chance)",
    "K-composition": "K-composition (times chance)",
}
K = INPUTS.index("k")


def prepare(model: HookedTransformer, split: Split) -> dict[str, Any]:
    """The circuits of the final model, which of them are followed, and with which control pairs and heads."""
    searched = searched_circuits(model, split)
    found = strongest_first(searched)
    followed = [of.pair for of in found[:MAX_CIRCUITS]]
    senders, receivers = ({pair[place] for pair in followed} for place in (0, 1))
    controls = [
        of.pair
        for of in searched
        if (of.pair[0] in senders and not of.matches) or (of.pair[1] in receivers and not of.looks_back)
    ]
    induction = sorted({of.pair[1] for of in found})
    others = [(layer, head) for layer in sorted({at for at, _ in induction}) for head in range(model.cfg.n_heads)]
    others = [head for head in others if head not in induction]
    return {
        "found": [pair_name(of.pair) for of in found],
        "followed": [pair_name(pair) for pair in followed],
        "controls": [pair_name(pair) for pair in _some(controls, len(followed))],
        "induction heads": [head_name(head) for head in induction],
        "other heads": [head_name(head) for head in _some(others, len(induction))],
        "searched": _counts(searched),
    }


def measure(
    model: HookedTransformer, split: Split, rng: torch.Generator, facts: Mapping[str, Any]
) -> dict[str, np.ndarray | float]:
    """One checkpoint, on repeated random tokens that are the same at every checkpoint, and not those of the search.

    Returns:
        SCORES: [pair], followed circuits first, then controls. "effect", "effect_error": [pair, input], the loss that
        mean ablation of the path through queries, keys or values adds, nats; of controls through keys only, else NaN.
        "margin": [circuit], by how much its K path costs more than the dearest of its Q and V paths and of the
        controls' K paths, at the lower end of the 95 % interval. "sender": [circuit, kind of ablation] and
        "sender_lower": [circuit], the least of the kinds' lower ends. "together": zero ablation of all induction heads
        of found circuits at once; "others": of as many other heads; "together_lower": of the difference, its lower
        end; "apart": the sum of one by one. NaN if there is none.
    """
    repeats = probe(split, _stream("random tokens"))
    examples, n = repeats.examples, len(facts["followed"])
    pairs = [pair_of(name) for name in [*facts["followed"], *facts["controls"]]]
    clean = clean_run(model, examples)
    paths: list[dict[Input, WeightedMean]] = [
        {letter: path_effect(model, examples, pair, (letter,), clean) for letter in INPUTS} for pair in pairs[:n]
    ]
    controls: list[dict[Input, WeightedMean]] = [
        {"k": path_effect(model, examples, pair, ("k",), clean)} for pair in pairs[n:]
    ]
    rivals = [[row["q"], row["v"], *(of["k"] for of in controls)] for row in paths]
    margins = [min(row["k"].less(of).lower() for of in over) for row, over in zip(paths, rivals, strict=True)]
    effects = np.full((2, len(pairs), len(INPUTS)), np.nan)
    for at, row in enumerate([*paths, *controls]):
        for letter, of in row.items():
            effects[:, at, INPUTS.index(letter)] = of.value, of.error

    def ablated(heads: Sequence[Head], kind: Any) -> WeightedMean:
        return joint_ablation(model, examples, heads, kind, _stream("resample"), clean)

    once = {head: [ablated([head], kind) for kind in ABLATION_KINDS] for head, _ in pairs[:n]}
    senders = [once[head] for head, _ in pairs[:n]]
    induction, other = ([head_of(name) for name in facts[key]] for key in ("induction heads", "other heads"))
    together, others = ablated(induction, "zero"), ablated(other, "zero")
    scores = induction_scores(model, repeats, _stream("chance"))
    columns = np.array([scores.of(pair) for pair in pairs]).reshape(len(pairs), len(SCORES))
    return {
        **dict(zip(SCORES, columns.T, strict=True)),
        "effect": effects[0],
        "effect_error": effects[1],
        "margin": np.array(margins),
        "sender": np.array([[of.value for of in row] for row in senders]).reshape(n, len(ABLATION_KINDS)),
        "sender_lower": np.array([min(of.lower() for of in row) for row in senders]),
        "together": together.value if induction else float("nan"),
        "together_lower": together.less(others).lower() if induction else float("nan"),
        "others": others.value if induction else float("nan"),
        "apart": sum(ablated([head], "zero").value for head in induction) if induction else float("nan"),
    }


def derive(
    series: Series, curve: LLCCurve, facts: Mapping[str, Any], rng: np.random.Generator
) -> dict[str, np.ndarray | float]:
    """{"n_found"; "k_effect": [checkpoint], mean over followed circuits, NaN without any; "half_step": [circuit], from
    when on its K path costs half of what it costs at the end; "strongest": the names of the strongest one's heads}."""
    n = len(facts["followed"])
    k_effects = series["effect"][:, :n, K]
    return {
        "n_found": float(len(facts["found"])),
        "k_effect": k_effects.mean(1) if n else np.full(len(series["step"]), np.nan),
        "half_step": np.array([_half_step(series["step"], effect) for effect in k_effects.T]),
        "strongest": np.array(facts["followed"][0].split(" -> ") if n else [], dtype=str),
    }


def conclude(series: Series, stages: Sequence[Stage], curve: LLCCurve) -> list[Claim]:
    """Is a circuit found and confirmed; in which stage does its K path form; what do the LLCs do there?"""
    last = end_of(stages, series)
    n_found = float(series["n_found"])
    forming = max(stages, key=lambda stage: np.nan_to_num(concentration(series, "k_effect", stage)), default=None)

    def confirmed(stage: Stage) -> float:
        return float(np.sum((series["margin"][-1] > 0) & (series["sender_lower"][-1] >= DIRECT_NATS)))

    def k_share(stage: Stage) -> float:
        effects = np.abs(series["effect"][-1, : series["margin"].shape[1]]).sum(0)
        return float(effects[K] / effects.sum()) if n_found else float("nan")

    def sender(stage: Stage) -> float:
        return float(series["sender_lower"][-1, 0]) if n_found else float("nan")

    def rise(stage: Stage, component: str | None) -> float:
        if component is None or component not in curve.components or not n_found:
            return float("nan")
        change, error = llc_change(curve, stage, component)
        return change - 1.96 * error

    first, second = series["strongest"].tolist() or (None, None)
    return [
        claim(
            "induction circuits are found: scores, K-composition and ablation of the K path agree (number)",
            last, lambda s: n_found, 1.0,
        ),
        claim(
            "a circuit is confirmed: its K path costs more than its Q and V paths and than all control pairs, and "
            "every ablation of its previous-token head costs .1 nats (number, each beyond its 95 % interval)",
            last, confirmed, 1.0,
        ),
        claim("the K paths dominate (share of what the circuits' Q, K and V paths change)", last, k_share, 0.5),
        claim(
            "ablating the strongest circuit's previous-token head raises the loss on repeats (least of zero, mean and "
            "resample ablation, less 1.96 standard errors, nats)",
            last, sender, DIRECT_NATS,
        ),
        claim(
            "zeroing the induction heads of all found circuits together does (less zeroing as many other heads of "
            "their layers, less 1.96 standard errors, nats)",
            last, lambda s: float(series["together_lower"][-1]), DIRECT_NATS,
        ),
        claim(
            "the circuits form in one stage (growth of what their K paths cost, share of all growth, less that of "
            "time)",
            forming, lambda s: concentration(series, "k_effect", s), CONCENTRATED,
        ),
        claim(
            "the LLC rises in the stage in which they form (change less 1.96 standard errors)",
            forming, lambda s: rise(s, "model"), 0.0,
        ),
        claim(
            "so does the wrLLC of the strongest circuit's previous-token head",
            forming, lambda s: rise(s, first), 0.0,
        ),
        claim("so does the wrLLC of its induction head", forming, lambda s: rise(s, second), 0.0),
    ]  # fmt: skip


def tables(report: Report) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The followed circuits and controls at the last checkpoint, with dates, and what ablating their heads costs."""
    last = {name: values[-1] for name, values in report.series.items()}
    followed, pairs = report.facts["followed"], [*report.facts["followed"], *report.facts["controls"]]
    rows = []
    for i, name in enumerate(pairs):
        effects = [_pair(value, error) for value, error in zip(last["effect"][i], last["effect_error"][i], strict=True)]
        circuit = i < len(followed)
        date = report.derived["half_step"][i] if circuit else np.nan
        confirmed = circuit and last["margin"][i] > 0 and last["sender_lower"][i] >= DIRECT_NATS
        kind = "control" if not circuit else "confirmed circuit" if confirmed else "circuit"
        rows.append([name, kind, *(_number(last[score][i]) for score in SCORES), *effects, _step(date)])
    senders = {name.split(" -> ")[0]: row for name, row in zip(followed, last["sender"], strict=True)}
    ablations = [[head, *map(_number, row)] for head, row in senders.items()]
    if followed:
        for label, value in (("induction heads", "together"), ("other heads", "others")):
            ablations.append([" + ".join(report.facts[label]), _number(last[value]), "–", "–"])
    titles = [f"{letter.upper()} path (nats)" for letter in INPUTS]
    return {
        "Circuits and control pairs at the last checkpoint": (
            ["pair", "what", *SCORES.values(), *titles, "half of the K path's effect at step"], rows,
        ),
        "Loss on repeats that ablation adds at the last checkpoint (nats); heads with + all at once": (
            ["heads", *ABLATION_KINDS], ablations,
        ),
    }  # fmt: skip


def plot(report: Report, study: Study) -> dict[str, Figure]:
    """What the paths cost, the wrLLCs of the strongest circuit's heads, and the scores of every followed circuit."""
    steps, effect, n = report.steps, report.series["effect"], len(report.facts["followed"])
    costs, (k_paths, inputs, llcs) = plotting.panels(3)
    for i, name in enumerate([*report.facts["followed"], *report.facts["controls"]]):
        style = {"label": name} if i < n else {"label": "controls" if i == n else None, "color": "gray", "ls": ":"}
        error = 1.96 * report.series["effect_error"][:, i, K]
        k_paths.errorbar(steps, effect[:, i, K], error, lw=1, **style)
    for i, letter in enumerate(INPUTS if n else ()):
        inputs.plot(steps, effect[:, :n, i].mean(1), label=letter.upper())
    for head in report.derived["strongest"].tolist():
        if head in study.curve.components:
            row, usable = study.curve.row(head), usable_points(study.curve, head)
            error = 1.96 * study.curve.std_error[row][usable]
            llcs.errorbar(study.curve.steps[usable], study.curve.llc[row][usable], error, lw=1, label=head)
    labels = ("cost of the K path (nats)", "cost of a circuit's path, mean (nats)", "wrLLC, strongest circuit")
    scores, axes = plotting.panels(len(SCORES))
    for ax, name in zip(axes, SCORES, strict=True):
        for i, pair in enumerate(report.facts["followed"]):
            ax.plot(steps, report.series[name][:, i], lw=1, label=pair)
    for ax, label in zip((k_paths, inputs, llcs, *axes), (*labels, *SCORES.values()), strict=True):
        plotting.developmental_axis(ax, study.stages, label)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=7)
    return {"What the paths of induction circuits cost, with 95 % intervals": costs, "Scores of the circuits": scores}


def _counts(searched: Sequence[PairEvidence]) -> list[str]:
    """How many pairs meet each condition."""
    attend = [of for of in searched if of.looks_back and of.matches]
    return [
        f"{len(searched)} pairs",
        f"{len(attend)} of a previous-token head and one that matches prefixes",
        f"{sum(of.composes for of in attend)} of these compose through K",
        f"{sum(of.costs for of in attend)} of these cost through K",
        f"{sum(of.costs and not (of.looks_back and of.matches) for of in searched)} other pairs cost through K",
    ]


def _some(candidates: Sequence[Any], n: int) -> list[Any]:
    """At most n of them at random, the same for the same candidates."""
    order = torch.randperm(len(candidates), generator=_stream("controls"))[:n]
    return sorted(candidates[i] for i in order.tolist())


def _stream(name: str) -> torch.Generator:
    return seeds.stream(0, NAME, name)


def _half_step(steps: np.ndarray, values: np.ndarray) -> float:
    """The step from which values stay at half of the last one or more, on log(1 + step); NaN if the last is not > 0."""
    half = values[-1] / 2
    if not half > 0:
        return float("nan")
    return float(steps[0]) if (values >= half).all() else float(since(steps, values, half)[0])


def _number(value: float) -> str:
    return f"{value:.2g}" if np.isfinite(value) else "–"


def _pair(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.2g}" if np.isfinite(value) else "–"


def _step(value: float) -> str:
    return f"{value:.0f}" if np.isfinite(value) else "–"
