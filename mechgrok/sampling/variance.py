"""The learning coefficient from how much the sampled loss varies: it needs no loss at w*."""

import math

import numpy as np
from scipy.stats import kurtosis

from mechgrok.sampling.diagnostics import WINDOW, effective_sample_size, widening


def variance_llc(losses: np.ndarray, noise: np.ndarray, nbeta: float) -> tuple[float, float]:
    """(llc_variance, its standard error) from the losses of all chains that stayed finite.

    llc_variance = nbeta^2 ( Var(L_b) - mean(noise) )

    L_b is a draw's loss on its own batch b, and the variance is over all draws: (L_b - mean)^2 averaged, over 1 - 1 /
    ess for the mean that was taken from the same draws. Batches are drawn with replacement, so Var(L_b) is the variance
    of L(w) over draws and, on top, the batches' s^2 / batch; the latter is taken off draw by draw, as it is found
    within each batch. What is left may be negative, and is returned as it is.

    On L = 1/2 sum h_i w_i^2, with r_i = nbeta h_i / (nbeta h_i + localization), the long-run value is 1/2 sum r_i^2,
    and that of the mean estimator 1/2 sum r_i. Where nbeta L is distributed as at a singular minimum without a
    localization, Gamma(lambda, 1), both are lambda. A finite step size adds to both: sgld's variance of a direction of
    curvature a of the sampled energy is 1 / (a (1 - step_size a / 4)) in place of 1 / a, and it enters squared here.

    The error is that of the mean of the squared deviations, as `diagnostics.summarize` has it of the mean, with three
    differences, as squares have a long tail. The ess is that of the squared deviations. Student's freedom counts that
    the variance of what has kurtosis k is known from n values to the relative variance (k - 1) / n, beside that of the
    ess, 2 WINDOW / n. And the error of a variance goes with its size, so the interval belongs around its logarithm: the
    longer arm of that one is taken, v (exp(e / v) - 1) with v = Var(L_b), for both.

    Args:
        losses: Float[chain, draw], nats. noise: Float[chain, draw], nats^2: the variance, over batches, of each of
        them.

    Source: arXiv:2606.22389, the estimator, without its clamp at 0; the error is ours.
    """
    kept = np.isfinite(losses).all(axis=1)
    losses, noise = losses[kept], noise[kept]
    if len(losses) == 0 or not np.isfinite(noise).all():
        return math.nan, math.nan
    if np.ptp(losses) == 0:  # the chains stand still, or the loss is flat
        return -(nbeta**2) * float(noise.mean()), 0.0
    square = (losses - losses.mean()) ** 2
    own, total = square - noise, float(square.mean())
    n = effective_sample_size(own)
    freedom = max(2 * n / (2 * WINDOW + float(kurtosis(own, axis=None, fisher=False)) - 1), len(losses) - 1)
    error = float(own.std(ddof=1)) / math.sqrt(n) * widening(freedom)
    with np.errstate(over="ignore"):
        longer = total * float(np.expm1(1.96 * error / total)) / 1.96
    scale = nbeta**2 / (1 - 1 / effective_sample_size(losses))
    return scale * float(own.mean()), scale * longer
