"""What the losses of several chains say: their mean's standard error, and whether to believe it."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student_t

from mechgrok.types import ChainHealth

# Limits beyond which an estimate is called unhealthy. R-hat: Vehtari et al. 2021 ask 1.01 for
# posterior reporting; a mean within its standard error needs less, 1.1 is Gelman & Rubin's.
MAX_R_HAT = 1.1
MIN_ESS = 20.0
WINDOW = 10.0  # autocorrelation times that the estimate of the ess looks back on
MAX_DRIFT = 0.2
DRIFT_SIGNIFICANCE = 3.0  # a drift counts when it is also this many standard errors
MAX_SATURATION = 0.5
MIN_ACCEPTANCE = 0.2
MIN_LEARNED = 0.05  # share of the chance loss that must have been learned before it can be lost


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
    first, second = _mean_and_error(kept[:, :half]), _mean_and_error(kept[:, half:])
    mean, std_error = _mean_and_error(kept)
    return ChainSummary(
        mean, std_error, _r_hat(kept), _ess(kept), (first[0], second[0]), (first[1], second[1]), diverged
    )


def health(
    summary: ChainSummary,
    init_loss: float,
    chance_loss: float | None,
    prior_rise: float = math.inf,
    acceptance: float = 1.0,
) -> ChainHealth:
    """Judge a summary against the loss at the anchor and the loss of guessing, both in nats.

    prior_rise: by how much the loss rises under the localization alone, nats; infinite without one.
    """
    size = abs(summary.mean - init_loss)
    change = summary.half_means[1] - summary.half_means[0]
    error = math.hypot(*summary.half_errors)
    drift = change / size if size > 0 else 0.0
    drifting = abs(drift) > MAX_DRIFT and abs(change) > DRIFT_SIGNIFICANCE * error
    learned = 0.0 if chance_loss is None else chance_loss - init_loss
    can_lose = chance_loss is not None and learned > MIN_LEARNED * chance_loss
    escaped = bool(can_lose and summary.mean - init_loss >= learned)
    saturation = (summary.mean - init_loss) / prior_rise if prior_rise > 0 else math.nan
    # What is not told from 0 is not told from a share either.
    saturated = prior_rise > 0 and summary.mean - 2 * summary.std_error - init_loss > MAX_SATURATION * prior_rise
    reasons = []
    if summary.diverged > 0:
        reasons.append(f"{summary.diverged:.0%} of the chains diverged: lower step_size")
    if summary.diverged < 1:
        if not summary.r_hat <= MAX_R_HAT:
            reasons.append(f"R-hat {summary.r_hat:.2f} > {MAX_R_HAT}: draw longer chains or more burn-in")
        if summary.ess < MIN_ESS:
            reasons.append(f"effective sample size {summary.ess:.0f} < {MIN_ESS:.0f}: draw longer chains")
        if drifting:
            reasons.append(f"the loss still drifts ({drift:+.0%} between halves): more burn-in")
    if escaped:
        reasons.append(
            f"left the basin (sampled loss {summary.mean:.2f} against {chance_loss:.2f} of guessing): "
            "raise localization or lower nbeta"
        )
    if acceptance < MIN_ACCEPTANCE:
        reasons.append(f"{acceptance:.0%} of the proposals accepted: lower step_size")
    return ChainHealth(
        r_hat=summary.r_hat, ess=summary.ess, drift=drift, drifting=drifting, diverged=summary.diverged,
        escaped=escaped, saturation=saturation, saturated=saturated, acceptance=acceptance, reasons=tuple(reasons),
    )  # fmt: skip


def _mean_and_error(losses: np.ndarray) -> tuple[float, float]:
    spread = float(losses.std(ddof=1))
    if spread == 0:
        return float(losses.mean()), 0.0
    ess = _ess(losses)
    freedom = max(ess / WINDOW, len(losses) - 1)
    widening = student_t.ppf(0.975, freedom) / norm.ppf(0.975)
    return float(losses.mean()), spread / math.sqrt(ess) * float(widening)


def _ess(losses: np.ndarray) -> float:
    from arviz_stats.base import array_stats

    if np.ptp(losses) == 0:
        return float(losses.size)
    return float(array_stats.ess(losses, chain_axis=0, draw_axis=1, method="mean"))


def _r_hat(losses: np.ndarray) -> float:
    from arviz_stats.base import array_stats

    if np.ptp(losses) == 0:
        return 1.0
    return float(array_stats.rhat(losses, chain_axis=0, draw_axis=1, method="rank"))
