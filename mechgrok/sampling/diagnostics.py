"""What the losses of several chains say of their mean: its standard error, R-hat, effective sample size."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student_t

Measured = tuple[float, float]  # a value with its standard error
UNKNOWN: Measured = (math.nan, math.nan)
WINDOW = 10.0  # autocorrelation times that the estimate of the ess looks back on


@dataclass(frozen=True)
class ChainSummary:
    """mean and std_error of the losses over all surviving chains, nats, with r_hat and ess."""

    mean: float
    std_error: float
    r_hat: float
    ess: float
    half_means: tuple[float, float]
    half_errors: tuple[float, float]
    diverged: float


def summarize(losses: np.ndarray) -> ChainSummary:
    """Mean, Monte Carlo standard error, split R-hat and effective sample size of [chain, draw].

    std_error = sd / sqrt(ess) * t / 1.96 with the multi-chain ess of Vehtari et al. 2021 (eqs. 10-13), whose
    variance estimate holds the spread between chains and whose autocorrelations hold that within
    them. The ess is itself an estimate, with relative variance 2 / freedom, freedom = ess / 10 (Sokal
    1997, for a window of ten autocorrelation times) and at least the number of chains less 1; t is
    Student's 97.5 % quantile for it. So mean +- 1.96 std_error covers 95 % of the time also where the
    chains are short: measured, in docs/accuracy.md.
    Chains with a NaN are left out, and counted in `diverged`. Chains that do not move at all have no
    error: std_error 0, r_hat 1, ess = number of draws.
    """
    finite = np.isfinite(losses).all(axis=1)
    kept = losses[finite]
    diverged = 1.0 - float(finite.mean())
    if len(kept) == 0:
        nan = math.nan
        return ChainSummary(nan, nan, nan, 0.0, (nan, nan), (nan, nan), 1.0)
    half = kept.shape[1] // 2
    first, second = mean_and_error(kept[:, :half]), mean_and_error(kept[:, half:])
    mean, std_error = mean_and_error(kept)
    return ChainSummary(
        mean,
        std_error,
        _r_hat(kept),
        effective_sample_size(kept),
        (first[0], second[0]),
        (first[1], second[1]),
        diverged,
    )


def mean_and_error(losses: np.ndarray) -> tuple[float, float]:
    """The mean of [chain, draw] and its standard error, as `summarize` has them."""
    spread = float(losses.std(ddof=1))
    if spread == 0:
        return float(losses.mean()), 0.0
    ess = effective_sample_size(losses)
    freedom = max(ess / WINDOW, len(losses) - 1)
    return float(losses.mean()), spread / math.sqrt(ess) * widening(freedom)


def widening(freedom: float) -> float:
    """t / 1.96: what a standard error is multiplied by that is itself known with so much freedom."""
    return float(student_t.ppf(0.975, freedom) / norm.ppf(0.975))


def effective_sample_size(losses: np.ndarray) -> float:
    """How many independent values have a mean as well known as that of [chain, draw]; all, if none differs."""
    from arviz_stats.base import array_stats

    if np.ptp(losses) == 0:
        return float(losses.size)
    return float(array_stats.ess(losses, chain_axis=0, draw_axis=1, method="mean"))


def _r_hat(losses: np.ndarray) -> float:
    from arviz_stats.base import array_stats

    if np.ptp(losses) == 0:
        return 1.0
    return float(array_stats.rhat(losses, chain_axis=0, draw_axis=1, method="rank"))
