"""Which data a head specializes to: its refined LLCs on several distributions beside those of its layer's other heads.

wdrLLCs are those of Wang et al. 2024 (arXiv:2410.02984); the contrasts, tests and ranks are ours. LLCs have no unit.

The errors of different heads and distributions count as normal and independent. Heads of a layer at one checkpoint and
distribution share their chains' batches, so their errors are not quite independent: as far as they err alike, their
differences are known better than is said here, and the tests are conservative.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

N_DRAWS = 4000


@dataclass(frozen=True)
class Specialization:
    """What `specialization` finds for the heads of a layer; NaN where it could not be computed.

    value, error: Float[distribution, head]. p_head: [head], of "it does not specialize". p_layer: of "none does".
    """

    value: np.ndarray
    error: np.ndarray
    p_head: np.ndarray
    p_layer: float


def specialization(llc: np.ndarray, error: np.ndarray, scaled: bool = False) -> Specialization:
    """By how much more a head exceeds its layer's other heads on one distribution than on the others.

        contrast(q, h) = llc(q, h) - mean of llc(q, other heads)
        value(q, h) = contrast(q, h) - mean of contrast(other distributions, h)

    A distribution that adds the same to all heads leaves the values at 0. One that multiplies all of them does so only
    if `scaled`: then every LLC is first divided by its distribution's mean over the layer (errors to first order). A
    head specializes beyond doubt if it does on both scales.

    p_head: chi-square test that a head's contrast is the same on all distributions; p_layer: that all heads' are.

    Args:
        llc, error: Float[distribution, head], the heads of one layer. Where one of them is not finite, an error is not
            positive, a layer's mean is within two standard errors of 0 (scaled), or there are fewer than two
            distributions or heads, all is NaN.
    """
    n, n_heads = llc.shape
    mean, mean_error = llc.mean(1), np.sqrt((error**2).sum(1)) / n_heads
    complete = bool(np.isfinite(llc).all() and np.isfinite(error).all() and (error > 0).all())
    if min(n, n_heads) < 2 or not complete or (scaled and bool((mean <= 2 * mean_error).any())):
        unknown = np.full(llc.shape, np.nan)
        return Specialization(unknown, unknown, np.full(n_heads, np.nan), float("nan"))
    pairs = [contrast(*row, scaled) for row in zip(llc, error, strict=True)]
    values, covariances = (np.array(part) for part in zip(*pairs, strict=True))
    variance = np.diagonal(covariances, axis1=1, axis2=2)
    heads = [equality_test(values[:, [h]], variance[:, h, None, None]) for h in range(n_heads)]
    layer = equality_test(values[:, 1:], covariances[:, 1:, 1:])  # contrasts sum to 0: all but one tell all
    return Specialization(
        value=n / (n - 1) * (values - values.mean(0)),
        error=np.sqrt(variance + (variance.sum(0) - variance) / (n - 1) ** 2),
        p_head=np.array(heads),
        p_layer=layer,
    )


def contrast(llc: np.ndarray, error: np.ndarray, scaled: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(each head less the mean of the others, covariance) on one distribution: Float[head], Float[head, head].

    scaled: of u = llc / mean(llc). Covariance J diag(error^2) J^T, where J is the derivative by the LLCs.
    """
    n = len(llc)
    mean = llc.mean() if scaled else 1.0
    shares = llc / mean
    derivative = (np.eye(n) - (shares[:, None] if scaled else 1.0) / n) / mean
    to_others = n / (n - 1)
    values = to_others * (shares - shares.mean())
    return values, to_others**2 * (derivative * error**2) @ derivative.T


def equality_test(values: np.ndarray, covariances: np.ndarray) -> float:
    """p-value of "all groups have the same mean vector", for independent normal values of known covariance.

    Q = sum_g (y_g - m)^T W_g (y_g - m), W_g = covariance^-1, m = (sum W)^-1 sum W y, is chi-square with
    (groups - 1) k degrees of freedom: Cochran's Q (1954) where k = 1.

    Args:
        values: Float[group, k]. covariances: Float[group, k, k].
    """
    weights = np.linalg.inv(covariances)
    common = np.linalg.solve(weights.sum(0), np.einsum("gij,gj->i", weights, values))
    rest = values - common
    q = np.einsum("gi,gij,gj->", rest, weights, rest)
    return float(chi2.sf(q, rest.size - rest.shape[1]))


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values for testing all at once (Holm 1979): the chance of any false rejection stays below the level.

    The i-th smallest of m, from 0, times m - i, made monotone, at most 1. NaN stays NaN and does not count.
    """
    adjusted = np.full(p_values.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p_values))
    order = known[np.argsort(p_values[known])]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def ranks(llc: np.ndarray, error: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(rank of each head in its layer, 1 the largest; share of draws within the errors in which it has each rank).

    Args:
        llc, error: Float[head]. All NaN if one is not finite: the first of those that are known need not be first.
    Returns:
        Float[head], Float[head, rank].
    """
    n = len(llc)
    if not (np.isfinite(llc).all() and np.isfinite(error).all()):
        return np.full(n, np.nan), np.full((n, n), np.nan)

    def ranked(values: np.ndarray) -> np.ndarray:
        return (-values).argsort(-1).argsort(-1)

    drawn = ranked(llc + error * rng.normal(size=(N_DRAWS, n)))
    return ranked(llc) + 1.0, (drawn[:, :, None] == np.arange(n)).mean(0)
