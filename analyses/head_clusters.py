"""Do heads whose wrLLC runs alike through training do alike things? Clusters of curves against types of behaviour.

The primary clustering, fixed before any run was looked at: K-means on raw curves, layer by layer.
K-means and layer by layer, because that is what Wang et al. 2024 (arXiv:2410.02984) did. Raw, because their finding is
about the level (low where a head does something simple, high where it has memorized much), which standardizing takes
away; it would also blow up to full size the noise of a head whose curve is flat. The other variants stand beside it,
and none is picked for its result. The same on the norms of the heads' weights shows what the wrLLC adds.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from transformer_lens import HookedTransformer

from analyses.contract import Series, claim, end_of
from mechgrok import plotting
from mechgrok.components import head_layer, head_of
from mechgrok.measures.clustering import Method, agreement, cluster, perturbed, resample, standardize, types_test
from mechgrok.measures.head_types import typed_heads
from mechgrok.stages import usable_points
from mechgrok.types import Claim, LLCCurve, Report, Split, Stage, Study

NAME = "head_clusters"
TASKS = ("planted-language", "text", "hugging-face")
N_DRAWS = 50
STABLE = 0.65  # from here on an adjusted Rand index counts as moderate recovery (Steinley 2004)
ALPHA = 0.05


class Variant(NamedTuple):
    """One way to cluster the heads; of their "wrLLC" curves, or of the "norm" of their weights for comparison."""

    method: Method
    features: str  # "raw" or "standardized"
    scope: str  # "per layer" or "all heads"
    of: str = "wrLLC"

    def __str__(self) -> str:
        return ", ".join(self) if self.of != "wrLLC" else ", ".join(self[:3])


METHODS: tuple[Method, ...] = ("K-means", "agglomerative")
PRIMARY = Variant("K-means", "raw", "per layer")
_CHOICES = product(("per layer", "all heads"), ("raw", "standardized"), METHODS)
VARIANTS = (*(Variant(method, features, scope) for scope, features, method in _CHOICES), PRIMARY._replace(of="norm"))


def prepare(model: HookedTransformer, split: Split) -> dict[str, Any]:
    """The heads, in the order of the head axis, and the type of each in the final model."""
    evidence = typed_heads(model, split)
    return {"heads": [head.head for head in evidence], "types": [f"{head.head} {head.type}" for head in evidence]}


def measure(
    model: HookedTransformer, split: Split, rng: torch.Generator, facts: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """{"weight_norm": of each head's W_Q, W_K, W_V and W_O together, [head]}; shared keys and values count for each."""
    weights = (model.W_Q, model.W_K, model.W_V, model.W_O)
    squares = sum(weight.detach().double().square().sum((-2, -1)) for weight in weights)
    assert isinstance(squares, torch.Tensor)
    return {"weight_norm": squares.sqrt().flatten().cpu().numpy()}


def derive(
    series: Series, curve: LLCCurve, facts: Mapping[str, Any], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """All clusterings, in the order of VARIANTS.

    Returns:
        "cluster": Float[variant, head], NaN where not clustered. For each variant: "silhouette" (mean over clustered
        heads), "stability" (mean adjusted Rand index of the clusters of the curves and of 50 draws within
        their errors, the number of clusters chosen anew), and against the types, heads of no clear type left out:
        "ari", "ari_null_95", "p_value" (types permuted within layers). "compared": how many heads of known type are
        in a cluster of the primary clustering.
    """
    heads = facts["heads"]
    layers = np.array([head_layer(head) for head in heads])
    types = _codes(facts["types"])
    values, error, usable = _aligned(curve, heads)
    draws = list(perturbed(values, error, N_DRAWS, rng))
    norms = np.asarray(series["weight_norm"]).T
    rows = []
    for variant in VARIANTS:
        groups = layers if variant.scope == "per layer" else np.zeros_like(layers)
        if variant.of == "norm":
            labels, silhouette = _clusters(variant, series["step"], norms, np.ones_like(norms, bool), groups, rng)
            again = []  # norms have no error
        else:
            labels, silhouette = _clusters(variant, curve.steps, values, usable, groups, rng)
            redrawn = (_clusters(variant, curve.steps, draw, usable, groups, rng)[0] for draw in draws)
            again = [agreement(other, labels, groups) for other in redrawn]
        test = types_test(labels, types, groups, layers, rng)
        rows.append((labels, _mean(silhouette), _mean(np.array(again)), *test))
    names = ("cluster", "silhouette", "stability", "ari", "ari_null_95", "p_value")
    found = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    in_both = np.isfinite(found["cluster"][VARIANTS.index(PRIMARY)]) & np.isfinite(types)
    return found | {"compared": np.array(in_both.sum())}


def _clusters(
    variant: Variant,
    steps: np.ndarray,
    values: np.ndarray,
    usable: np.ndarray,
    groups: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    features = resample(steps, values, usable)
    return cluster(
        standardize(features) if variant.features == "standardized" else features, groups, variant.method, rng
    )


def conclude(series: Series, stages: Sequence[Stage], curve: LLCCurve) -> list[Claim]:
    """Clusters and types, by the primary clustering; then the other variants of the curves, as they come."""
    last = end_of(stages, series)

    def of(name: str, variant: Variant) -> Callable[[Stage], float]:
        return lambda stage: float(series[name][VARIANTS.index(variant)])

    others = [variant for variant in VARIANTS if variant.of == "wrLLC" and variant != PRIMARY]
    return [
        claim(
            f"clusters of wrLLC curves agree with the heads' types ({PRIMARY}: the primary clustering; p-value of the "
            "adjusted Rand index, types permuted within layers)",
            last, of("p_value", PRIMARY), ALPHA, "<=", ALPHA,
        ),
        claim(
            f"the clusters stand when the curves are drawn within their errors ({PRIMARY}; mean adjusted Rand index)",
            last, of("stability", PRIMARY), STABLE,
        ),
        *(
            claim(
                f"beside it: they agree with types ({variant}; p-value)",
                last, of("p_value", variant), ALPHA, "<=", ALPHA,
            )  # fmt: skip
            for variant in others
        ),
    ]  # fmt: skip


def tables(report: Report) -> dict[str, tuple[list[str], list[list[str]]]]:
    """What each variant found, and the cluster of every head under each."""
    derived, columns = report.derived, ["silhouette", "stability", "ari", "ari_null_95", "p_value"]
    found = [
        [str(variant), *(_number(derived[name][index]) for name in columns)] for index, variant in enumerate(VARIANTS)
    ]
    clusters = [
        [*text.split(" ", 1), *(_name(label) for label in derived["cluster"][:, index])]
        for index, text in enumerate(report.facts["types"])
    ]
    titles = ["silhouette", "stability", "adjusted Rand index", "95 % of chance", "p-value"]
    return {
        f"Clusterings; {int(derived['compared'])} heads of known type are compared, 'unclear' ones are not": (
            ["clustering", *titles], found,
        ),
        "Clusters of the heads": (["head", "type", *map(str, VARIANTS)], clusters),
    }  # fmt: skip


def plot(report: Report, study: Study) -> dict[str, Figure]:
    """The curves of each layer, coloured by the primary clustering."""
    labels = report.derived["cluster"][VARIANTS.index(PRIMARY)]
    heads, curve = report.facts["heads"], study.curve
    layers = sorted({head_layer(head) for head in heads})
    fig, axes = plotting.panels(len(layers))
    for ax, layer in zip(axes, layers, strict=True):
        for head, text, label in zip(heads, report.facts["types"], labels, strict=True):
            if head_layer(head) != layer or head not in curve.components:
                continue
            usable, row = usable_points(curve, head), curve.row(head)
            color = f"C{int(label)}" if np.isfinite(label) else "0.6"
            ax.errorbar(curve.steps[usable], curve.llc[row][usable], 1.96 * curve.std_error[row][usable],
                        color=color, lw=1, elinewidth=0.5, marker=f"${head_of(head)[1]}$", label=text)  # fmt: skip
        plotting.developmental_axis(ax, study.stages, f"wrLLC, layer {layer}")
        if ax.has_data() and ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=7)
    return {f"wrLLC of the heads, coloured by cluster ({PRIMARY}), with 95 % intervals": fig}


def _aligned(curve: LLCCurve, heads: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values, std_error, usable) [head, checkpoint]; what is not usable is 0, and heads not in the curve are so."""
    values, error = np.zeros((2, len(heads), len(curve.steps)))
    usable = np.zeros(values.shape, dtype=bool)
    for index, head in enumerate(heads):
        if head in curve.components:
            usable[index], row = usable_points(curve, head), curve.row(head)
            values[index] = np.where(usable[index], curve.llc[row], 0.0)
            error[index] = np.where(usable[index], curve.std_error[row], 0.0)
    return values, error, usable


def _codes(types: Sequence[str]) -> np.ndarray:
    """A number for every type, NaN for "unclear", which is the lack of one: Float[head]."""
    names = [text.split(" ", 1)[1] for text in types]
    known = sorted(set(names) - {"unclear"})
    return np.array([known.index(name) if name in known else np.nan for name in names], dtype=float)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _number(value: float) -> str:
    return f"{value:.2g}" if np.isfinite(value) else "–"


def _name(label: float) -> str:
    return str(int(label) + 1) if np.isfinite(label) else "–"
