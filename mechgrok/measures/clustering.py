"""Heads clustered by a curve of theirs over training, and held against what the heads are known to do.

Clustering heads by their wrLLC curves with K-means, layer by layer, is that of Wang et al. 2024
(arXiv:2410.02984, figure 1). How many clusters, how stable they are, and whether they agree with the heads'
types beyond chance: ours. Pure functions of arrays; everywhere NaN means "not clustered".
"""

from collections.abc import Iterator
from typing import Literal, cast

import numpy as np
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score

Method = Literal["K-means", "agglomerative"]
N_GRID = 50
N_INIT = 10  # starts of K-means
MIN_HEADS = 4  # among fewer, two clusters of at least two heads each cannot be
MIN_POINTS = 6
MIN_SHARE = 0.5


def resample(steps: np.ndarray, values: np.ndarray, usable: np.ndarray, n_grid: int = N_GRID) -> np.ndarray:
    """Every head's curve on one grid that is even in log(1 + step): Float[head, grid].

    Linear in log(1 + step) between usable points. The grid spans the steps over which all heads that are kept have
    usable points, so that nothing is extrapolated. A head is kept if at least 6 of its points, and half of them,
    are usable; the row of one that is not is NaN.

    Args:
        steps: [checkpoint]. values: Float[head, checkpoint]. usable: bool[head, checkpoint].
    """
    features = np.full((len(values), n_grid), np.nan)
    kept = np.flatnonzero(usable.sum(1) >= max(MIN_POINTS, MIN_SHARE * len(steps)))
    if not kept.size:
        return features
    x = np.log1p(np.asarray(steps, dtype=float))
    grid = np.linspace(max(x[usable[head]][0] for head in kept), min(x[usable[head]][-1] for head in kept), n_grid)
    for head in kept:
        features[head] = np.interp(grid, x[usable[head]], values[head][usable[head]])
    return features


def standardize(features: np.ndarray) -> np.ndarray:
    """Every row less its mean, over its standard deviation: the shape alone. A constant row becomes 0."""
    spread = features.std(1, keepdims=True)
    return (features - features.mean(1, keepdims=True)) / np.where(spread == 0, 1.0, spread)


def perturbed(
    values: np.ndarray, std_error: np.ndarray, n_draws: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Draws of the curves within their errors: values + std_error * normal, Float[head, checkpoint] each.

    Errors count as independent. Heads of a layer that were sampled on the same batches err alike, so their
    differences are known better than these draws say; and the estimates have erred once already. For both
    reasons the stability that is read from the draws is, if anything, too low.
    """
    for _ in range(n_draws):
        yield values + std_error * rng.normal(size=values.shape)


def cluster(
    features: np.ndarray, groups: np.ndarray, method: Method, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(label of every head, silhouette of every head's group): Float[head] each, labels from 0 in every group.

    Each group (the layer, or one for all heads) is clustered alone. The number of clusters is that of the largest
    mean silhouette (Rousseeuw 1987) among 2 ... half of the heads; it is never 1, so a silhouette near 0 and a low
    stability are what tells that there are no clusters. Agglomerative: Ward's linkage.

    Args:
        features: Float[head, grid]; heads with NaN are left out, and a group with fewer than 4 others wholly.
        groups: Int[head].
    """
    labels, silhouettes = np.full((2, len(features)), np.nan)
    for group in np.unique(groups):
        members = np.flatnonzero((groups == group) & np.isfinite(features).all(1))
        if len(members) >= MIN_HEADS:
            labels[members], silhouettes[members] = _best(features[members], method, rng)
    return labels, silhouettes


def _best(points: np.ndarray, method: Method, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    most = min(len(points) // 2, len(np.unique(points, axis=0)))
    best = np.full(len(points), np.nan), float("nan")
    for n_clusters in range(2, most + 1):
        if method == "K-means":
            fit = KMeans(n_clusters, n_init=N_INIT, random_state=int(rng.integers(2**31)))
        else:
            fit = AgglomerativeClustering(n_clusters)
        labels = fit.fit_predict(points)
        score = float(silhouette_score(points, labels))
        if not score <= best[1]:  # the first, whose rival is NaN, counts as better
            best = _in_order(labels), score
    return best


def _in_order(labels: np.ndarray) -> np.ndarray:
    """The labels renumbered by where they first occur, so that like partitions look alike."""
    _, first, label = np.unique(labels, return_index=True, return_inverse=True)
    return first.argsort().argsort()[label]


def agreement(labels: np.ndarray, others: np.ndarray, groups: np.ndarray) -> float:
    """Adjusted Rand index (Hubert and Arabie 1985) of two labellings, the mean over groups.

    1 for the same partition, 0 on average for independent ones. NaN where either labelling has NaN in every head of
    every group; heads that one labelling leaves out do not count.
    """
    known = np.isfinite(labels) & np.isfinite(others)
    scores = [
        adjusted_rand_score(others[mine], labels[mine])
        for group in np.unique(groups)
        if (mine := known & (groups == group)).sum() >= 2
    ]
    return float(np.mean(scores)) if scores else float("nan")


def types_test(
    labels: np.ndarray,
    types: np.ndarray,
    groups: np.ndarray,
    strata: np.ndarray,
    rng: np.random.Generator,
    n_permutations: int = 999,
) -> tuple[float, float, float]:
    """(adjusted Rand index of clusters and types, 95 % quantile of its null, p-value): is there more than chance?

    The index is the mean over groups in which more than one type occurs. Null: the types permuted among the heads
    of a stratum. With layers for strata the layer alone, which tells much of the type, explains nothing.
    p = (1 + number of permutations at least as good) / (1 + n_permutations): never below its nominal level, however
    few the heads and however many the ties (Phipson and Smyth 2010).

    Args:
        labels, types: Float[head], NaN where unknown. groups: those that were clustered, Int[head]. strata: Int[head].
    Returns:
        Three NaN if no group has 4 heads of known label and two types.
    """
    known = np.isfinite(labels) & np.isfinite(types)
    telling = [
        mine
        for group in np.unique(groups)
        if len(mine := np.flatnonzero(known & (groups == group))) >= MIN_HEADS and len(np.unique(types[mine])) > 1
    ]
    if not telling:
        return float("nan"), float("nan"), float("nan")
    order = np.tile(np.arange(len(types)), (n_permutations + 1, 1))  # row 0 permutes nothing
    for stratum in np.unique(strata):
        mine = np.flatnonzero(known & (strata == stratum))
        order[1:, mine] = rng.permuted(order[1:, mine], axis=1)
    index = np.mean([_rand_indices(labels[mine], types[order[:, mine]]) for mine in telling], axis=0)
    p_value = np.mean(index >= index[0] - 1e-9)  # the observed order is one of those counted
    return float(index[0]), float(np.quantile(index[1:], 0.95)), float(p_value)


def _rand_indices(labels: np.ndarray, types: np.ndarray) -> np.ndarray:
    """`adjusted_rand_score` of labels [head] with each row of types [permutation, head], by counting pairs of heads."""
    upper = np.triu_indices(len(labels), 1)
    together = (labels[:, None] == labels)[upper]
    alike = (types[:, :, None] == types[:, None, :])[:, *upper]
    in_both, in_labels, in_types = (together & alike).sum(1), together.sum(), alike.sum(1)
    by_chance = in_labels * in_types / len(together)
    return cast(np.ndarray, (in_both - by_chance) / ((in_labels + in_types) / 2 - by_chance))
