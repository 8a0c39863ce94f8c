"""Do the layers come to work together on multigrams: which tokens need what layer 0 tells layer 1, and does the
prediction of multigrams migrate from layer 0 to layer 1?

Two kinds of evidence. *Paths*: from the heads of layer 0 into the heads of layer 1, through queries, keys and values
together, mean-ablated; what they cost on tokens by what made them, each pair alone, and all at once: single paths stand
in for each other, or cancel. *Refined LLCs on the reference*: inputs whose
targets a shallower model drew, so that the loss is, up to a constant, the divergence from it. Wang et al. 2024
(arXiv:2410.02984) see it peak after n-grams are learned, then fall in layer 0 while it still rises in layer 1.

A layer's LLC is here the mean over its heads. They share their chains' batches, so their errors are not independent;
the mean's error is taken as the mean of the errors, the largest that it can be.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression
from torch import Tensor
from transformer_lens import HookedTransformer

from analyses.contract import CONCENTRATED, Series, claim, concentration, end_of
from mechgrok import plotting, seeds
from mechgrok.components import HEAD_NAME
from mechgrok.config import REFERENCE
from mechgrok.measures.ablation import clean_run
from mechgrok.measures.circuits import (
    PATH_NATS,
    Pair,
    WeightedMean,
    all_pairs,
    direct_effects,
    head_name,
    layer_path_effects,
    pair_name,
    pair_of,
    weighted_mean,
)
from mechgrok.measures.composition import MODES, composition_scores
from mechgrok.measures.path_ablation import INPUTS, path_ablation
from mechgrok.stages import usable_points
from mechgrok.types import Claim, Examples, LLCCurve, Report, Split, Stage, Study

NAME = "multigram_circuit"
TASKS = ("planted-language", "text", "hugging-face")
FEW, MANY = 3 * 2**9, 3 * 2**13  # positions of test examples: for some 25 runs at every checkpoint, and for three
MIN_ROWS = 8
EVERY, SEARCHED, MEASURED = slice(None), slice(0, None, 2), slice(1, None, 2)  # test examples
NEEDY, PLAIN = ("close", "ngram"), ("bigram", "other")  # kinds of tokens: of the planted language, and found in others
N_DRAWS = 2000


def prepare(model: HookedTransformer, split: Split) -> dict[str, Any]:
    """The kinds of tokens and, of each, the path from layer 0 to layer 1 that costs most in the final model.

    Every pair of heads is searched, on test examples that are not measured later.
    """
    kinds = split.kind_names if split.kinds is not None else ("all",)
    pairs = [pair for pair in all_pairs(model) if (pair[0][0], pair[1][0]) == (0, 1)]
    costs, _ = _paths(model, *some_rows(split, 4 * FEW, SEARCHED), pairs, len(kinds))
    best = [int(cost.argmax()) for cost in np.nan_to_num(costs.T, nan=-np.inf)] if pairs else []
    return {
        "kinds": list(kinds),
        "dearest paths": [pair_name(pairs[i]) for i in best],
        "heads of layer 0": [head_name((0, head)) for head in range(model.cfg.n_heads)],
        "heads of layer 1": [head_name((1, head)) for head in range(model.cfg.n_heads)] if pairs else [],
    }


def measure(
    model: HookedTransformer, split: Split, rng: torch.Generator, facts: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """One checkpoint, on test examples that are the same at every checkpoint. NaN for a kind that they lack.

    Returns:
        Loss that is added, nats. "path", "path_error": [kind], without the dearest path of that kind; "into": [head of
        layer 1, kind], without all paths into one head; "direct": [head of layer 0, kind], without what the head tells
        the logits and no other head. On more examples: "all", "all_error": [kind], without all paths at once; "excess",
        "excess_error": [kind], by how much that exceeds the same of plain tokens. Standard errors are over examples.
        "<mode>-composition": [head of layer 0, head of layer 1], times chance.
    """
    n_kinds, heads = len(facts["kinds"]), range(len(facts["heads of layer 1"]))
    examples, kinds = some_rows(split, FEW, MEASURED)
    clean = clean_run(model, examples)
    found = {"direct": by_kind(direct_effects(model, examples, 0, clean), examples, kinds, n_kinds)[0]}
    if not heads:
        return found
    into = (layer_path_effects(model, examples, 0, 1, [head], clean) for head in heads)
    names = facts["dearest paths"]
    once = sorted(set(names))
    paths = _paths(model, examples, kinds, [pair_of(name) for name in once], n_kinds)
    path, path_error = ([of[once.index(name), kind] for kind, name in enumerate(names)] for of in paths)
    composition = composition_scores(model, seeds.stream(0, NAME, "chance"))
    return found | {
        "path": np.array(path),
        "path_error": np.array(path_error),
        "into": by_kind(into, examples, kinds, n_kinds)[0],
        **_all_paths(model, split, facts["kinds"]),
        **{f"{mode}-composition": of.times_chance[0, :, 1].numpy() for mode, of in composition.items()},
    }


def by_kind(increases: Iterable[Tensor], examples: Examples, kinds: Tensor, n_kinds: int) -> np.ndarray:
    """Means of several increases and their errors: Float[2, increase, kind]."""
    means = [means_by_kind(increase, examples, kinds, n_kinds) for increase in increases]
    pairs = [[(of.value, of.error) for of in row] for row in means]
    return np.array(pairs).reshape(-1, n_kinds, 2).transpose(2, 0, 1)


def _paths(
    model: HookedTransformer, examples: Examples, kinds: Tensor, pairs: Sequence[Pair], n_kinds: int
) -> np.ndarray:
    """What each path costs alone, and the error: Float[2, pair, kind]."""
    clean = clean_run(model, examples)
    alone = (path_ablation(model, examples, *pair, INPUTS, "mean", torch.Generator(), clean) for pair in pairs)
    return by_kind(alone, examples, kinds, n_kinds)


def _all_paths(model: HookedTransformer, split: Split, names: Sequence[str]) -> dict[str, np.ndarray]:
    everything = range(model.cfg.n_heads)
    examples, kinds = some_rows(split, MANY)
    n_pos = examples.tokens.shape[1]
    increase = torch.zeros(examples.tokens.shape, dtype=torch.float64)
    n_parts = max(1, len(examples) * n_pos // (2 * FEW))  # each with a mean of its own, as few rows at once are faster
    for rows in torch.arange(len(examples)).tensor_split(n_parts):
        part = Examples(examples.tokens[rows], examples.targets[rows], examples.weights[rows])
        costs = layer_path_effects(model, part, 0, 1, everything, clean_run(model, part))
        increase[rows, n_pos - costs.shape[1] :] = costs
    means = means_by_kind(increase, examples, kinds, len(names))
    plain = [mean for mean, name in zip(means, names, strict=True) if name in PLAIN]
    more = [of.less(plain[0]) for of in means] if plain else []
    unknown = np.full(len(names), np.nan)
    return {
        "all": np.array([of.value for of in means]),
        "all_error": np.array([of.error for of in means]),
        "excess": np.array([of.value for of in more]) if more else unknown,
        "excess_error": np.array([of.error for of in more]) if more else unknown,
    }


def means_by_kind(increase: Tensor, examples: Examples, kinds: Tensor, n_kinds: int) -> list[WeightedMean]:
    """Weighted means over the positions of each kind. increase: [example, last pos]; kinds: Int[example, pos]."""
    weights, scored = (of[:, -increase.shape[1] :] for of in (examples.weights, kinds))
    return [weighted_mean(increase, weights * (scored == kind)) for kind in range(n_kinds)]


def some_rows(split: Split, n_positions: int, part: slice = EVERY) -> tuple[Examples, Tensor]:
    """Evenly spaced test examples of at most so many positions, but MIN_ROWS, and the kinds of their targets.

    part: of which test examples; of all, if it holds none. Without kinds, all are of kind 0.
    """
    test = split.test
    every = torch.arange(len(test))
    mine = every[part] if len(every[part]) else every
    n = min(len(mine), max(MIN_ROWS, n_positions // test.tokens.shape[1]))
    chosen = mine[torch.linspace(0, len(mine) - 1, n).long()]
    kinds = torch.zeros_like(test.tokens) if split.kinds is None else split.kinds
    return Examples(test.tokens[chosen], test.targets[chosen], test.weights[chosen]), kinds[chosen]


def derive(
    series: Series, curve: LLCCurve, facts: Mapping[str, Any], rng: np.random.Generator
) -> dict[str, np.ndarray | float]:
    """What the LLCs on the reference say of layers 0 and 1; NaN, or empty, without them.

    Returns:
        "reference_step": [checkpoint], those at which every head of both layers has a healthy estimate;
        "reference_llc", "reference_error": [layer, checkpoint]. "peak_step": of layer 0. "fall": by how much layer 0's
        has fallen from its peak to the end, with "fall_error"; "fall_noise": the 95 % quantile of what noise of these
        errors makes of a curve that never falls, as the largest of many noisy points is the peak. "rise",
        "rise_error": how much layer 1's rises over the same time. Falls and rises are NaN if the peak is the end.
        "all_<kind>", "excess_<kind>" and their "_error": [checkpoint], of the kinds NEEDY.
    """
    steps, llc, error = _layers(curve)
    found: dict[str, np.ndarray | float] = dict.fromkeys(
        ("peak_step", "fall", "fall_error", "fall_noise", "rise", "rise_error"), float("nan")
    )
    if len(steps) > 1:
        peak = int(llc[0].argmax())
        found |= {"peak_step": float(steps[peak]), "fall_noise": _fall_of_noise(llc[0], error[0], rng)}
        if peak < len(steps) - 1:
            found |= {
                "fall": float(llc[0, peak] - llc[0, -1]),
                "fall_error": float(np.hypot(error[0, peak], error[0, -1])),
                "rise": float(llc[1, -1] - llc[1, peak]),
                "rise_error": float(np.hypot(error[1, peak], error[1, -1])),
            }
    of_kinds = {}
    for kind in NEEDY:
        index = facts["kinds"].index(kind) if kind in facts["kinds"] else None
        for what, suffix in product(("all", "excess"), ("", "_error")):
            unknown = index is None or what not in series  # a model of one layer has no paths
            column = np.full(len(series["step"]), np.nan) if unknown else series[f"{what}{suffix}"][:, index]
            of_kinds[f"{what}_{kind}{suffix}"] = column
    return {"reference_step": steps, "reference_llc": llc, "reference_error": error, **found, **of_kinds}


def _layers(curve: LLCCurve) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps, mean LLC over the heads of layers 0 and 1 on the reference, its error at most)."""
    nothing = np.empty(0), np.empty((2, 0)), np.empty((2, 0))
    if REFERENCE not in curve.refined:
        return nothing
    of = curve.refined[REFERENCE]
    heads = [(int(match[1]), name) for name in of.components if (match := HEAD_NAME.fullmatch(name))]
    rows = [[of.row(name) for layer, name in heads if layer == wanted] for wanted in (0, 1)]
    if not all(rows):
        return nothing
    usable = np.all([usable_points(of, of.components[row]) for row in rows[0] + rows[1]], axis=0)
    llc, error = (np.array([values[own].mean(0) for own in rows]) for values in (of.llc, of.std_error))
    return of.steps[usable], llc[:, usable], error[:, usable]


def _fall_of_noise(llc: np.ndarray, error: np.ndarray, rng: np.random.Generator) -> float:
    """95 % quantile of (peak - end) of the best curve that never falls, plus noise of these errors."""
    never_falling = isotonic_regression(llc, weights=1 / np.maximum(error, 1e-12) ** 2).x
    drawn = never_falling + error * rng.normal(size=(N_DRAWS, len(llc)))
    return float(np.quantile(drawn.max(1) - drawn[:, -1], 0.95))


def conclude(series: Series, stages: Sequence[Stage], curve: LLCCurve) -> list[Claim]:
    """Do multigrams migrate between the layers, and do closing brackets and n-grams need the paths between them?"""
    steps, llc, error = (series[f"reference_{name}"] for name in ("step", "llc", "error"))
    last = end_of(stages, series)

    def moves(stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """(change over the stage, its error), of both layers."""
        if not len(steps):
            return np.full(2, np.nan), np.full(2, np.nan)
        x = np.log1p(steps)

        def between(values: np.ndarray, step: float) -> np.ndarray:
            return np.array([np.interp(np.log1p(step), x, row) for row in values])

        change = between(llc, stage.end) - between(llc, stage.start)
        return change, np.hypot(between(error, stage.end), between(error, stage.start))

    def both(stage: Stage) -> float:
        change, width = moves(stage)
        return float(min(-change[0] - 1.96 * width[0], change[1] - 1.96 * width[1]))

    def gathered(kind: str) -> Stage | None:
        """The stage with most of the growth for its length; random stages may choose theirs as well."""
        return max(
            stages, key=lambda stage: np.nan_to_num(concentration(series, f"excess_{kind}", stage)), default=None
        )

    def surely(name: str) -> float:
        return float(series[name][-1] - 1.96 * series[f"{name}_error"][-1])

    def grown(kind: str, stage: Stage) -> float:
        more = surely(f"excess_{kind}") >= PATH_NATS  # else there is nothing that could have formed
        return concentration(series, f"excess_{kind}", stage) if more else float("nan")

    def needs(kind: str) -> list[Claim]:
        return [
            claim(
                f"layer 1 needs layer 0 for {kind!r} tokens at the end (loss without all paths between them, less 1.96 "
                "standard errors, nats)",
                last, lambda s: surely(f"all_{kind}"), PATH_NATS,
            ),
            claim(
                f"it needs it more for {kind!r} than for plain tokens (difference less 1.96 standard errors, nats)",
                last, lambda s: surely(f"excess_{kind}"), PATH_NATS,
            ),
            claim(
                f"it comes to in one stage (growth of this difference for {kind!r}, share of all growth, less that of "
                "time)",
                gathered(kind), lambda s: grown(kind, s), CONCENTRATED,
            ),
        ]  # fmt: skip

    falling = min(stages, key=lambda stage: np.nan_to_num(moves(stage)[0][0]), default=None)
    return [
        claim(
            "layer 0's refined LLC on the one-layer reference falls from its peak to the end (fall less the 95 % "
            "quantile of that of noise around a curve that never falls)",
            falling, lambda s: float(series["fall"]) - float(series["fall_noise"]), 0.0,
        ),
        claim(
            "layer 1's rises over the same time (change less 1.96 standard errors)",
            falling, lambda s: float(series["rise"]) - 1.96 * float(series["rise_error"]), 0.0,
        ),
        claim(
            "in one stage layer 0's falls while layer 1's rises (the smaller move, less 1.96 standard errors)",
            falling, both, 0.0,
        ),
        *(one for kind in NEEDY for one in needs(kind)),
    ]  # fmt: skip


def tables(report: Report) -> dict[str, tuple[list[str], list[list[str]]]]:
    """At the last checkpoint: the paths by kind of token, and composition; the layers' LLCs on the reference."""
    last, found = {name: values[-1] for name, values in report.series.items()}, report.derived
    facts, steps = report.facts, found["reference_step"]
    senders, receivers = facts["heads of layer 0"], facts["heads of layer 1"]
    kinds = [
        [
            kind,
            _pair(last["all"][i], last["all_error"][i]),
            _pair(last["excess"][i], last["excess_error"][i]),
            _largest(receivers, last["into"][:, i]),
            f"{facts['dearest paths'][i]}: {_pair(last['path'][i], last['path_error'][i])}",
            _largest(senders, last["direct"][:, i]),
        ]
        for i, kind in enumerate(facts["kinds"] if receivers else ())
    ]
    pairs = [f"{sender} -> {receiver}" for sender in senders for receiver in receivers]
    composition = [
        [mode, _number(_mean(last[f"{mode}-composition"])), _largest(pairs, last[f"{mode}-composition"].ravel())]
        for mode in (MODES if receivers else ())
    ]
    shown = {
        "Loss that ablating paths from layer 0 to layer 1 adds at the last checkpoint (nats, ± standard error)": (
            ["tokens", "all at once", "more than plain", "all into a head", "one path", "a head straight to logits"],
            kinds,
        ),
        "Composition of heads of layer 0 with heads of layer 1 at the last checkpoint (times chance)": (
            ["through", "mean", "largest"], composition,
        ),
    }  # fmt: skip
    if len(steps):
        peak = int(np.searchsorted(steps, found["peak_step"]))
        shown["Mean refined LLC of a layer's heads on the reference, ± standard error at most"] = (
            ["layer", *(f"step {steps[i]}" for i in (0, peak, -1))],
            [
                [str(layer), *(_pair(llc[i], error[i]) for i in (0, peak, -1))]
                for layer, (llc, error) in enumerate(zip(found["reference_llc"], found["reference_error"], strict=True))
            ],
        )
    return shown


def plot(report: Report, study: Study) -> dict[str, Figure]:
    """The paths by kind of token, composition, and the layers' LLCs on the reference."""
    series, found = report.series, report.derived
    costs, (everything, path, direct) = plotting.panels(3)
    for i, kind in enumerate(report.facts["kinds"]):
        if "all" in series:
            everything.errorbar(report.steps, series["all"][:, i], 1.96 * series["all_error"][:, i], lw=1, label=kind)
            name, error = report.facts["dearest paths"][i], 1.96 * series["path_error"][:, i]
            path.errorbar(report.steps, series["path"][:, i], error, lw=1, label=f"{kind}: {name}")
        direct.plot(report.steps, series["direct"][:, :, i].sum(1), lw=1, label=kind)
    layers, (composition, reference) = plotting.panels(2)
    for mode in MODES if "path" in series else ():
        of_pairs = series[f"{mode}-composition"].reshape(len(report.steps), -1)
        composition.plot(report.steps, np.fmax.reduce(of_pairs, axis=1), lw=1, label=mode)  # without dead heads
    for layer in (0, 1) if len(found["reference_step"]) else ():
        llc, error = found["reference_llc"][layer], 1.96 * found["reference_error"][layer]
        reference.errorbar(found["reference_step"], llc, error, lw=1, marker="o", markersize=3, label=f"layer {layer}")
    for ax, label in (
        (everything, "all paths at once (nats)"),
        (path, "the dearest path (nats)"),
        (direct, "heads straight to logits, sum (nats)"),
        (composition, "largest composition (times chance)"),
        (reference, "LLC on the reference, mean of heads"),
    ):
        plotting.developmental_axis(ax, study.stages, label)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=7)
    return {
        "What ablating paths from layer 0 to layer 1 costs, by kind of token, with 95 % intervals": costs,
        "How the layers compose, and each layer's refined LLC on the reference": layers,
    }


def _largest(names: Sequence[str], values: np.ndarray) -> str:
    if not np.isfinite(values).any():
        return "–"
    best = int(np.nanargmax(values))
    return f"{names[best]}: {values[best]:.2g}"


def _mean(values: np.ndarray) -> float:
    """Of what is finite: a pair with a dead head has no composition."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _pair(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.2g}" if np.isfinite(value) else "–"


def _number(value: float) -> str:
    return f"{value:.2g}" if np.isfinite(value) else "–"
