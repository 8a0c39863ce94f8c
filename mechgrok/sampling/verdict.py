"""Whether to believe an estimate: one reason for each thing that makes it say something else than the LLC."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from mechgrok.config import LLCConfig
from mechgrok.health import ChainHealth
from mechgrok.sampling.diagnostics import UNKNOWN, ChainSummary, Measured

# Limits beyond which an estimate is called unhealthy. R-hat: Vehtari et al. 2021 ask 1.01 for
# posterior reporting; a mean within its standard error needs less, 1.1 is Gelman & Rubin's.
MAX_R_HAT = 1.1
MIN_ESS = 20.0
MAX_DRIFT = 0.2  # share of the estimate that may be in motion between halves, or missing yet
SIGNIFICANCE = 3.0  # standard errors from which on a difference counts
MAX_SATURATION = 0.5
MIN_SHARE = 0.05  # of the loss in deciding the estimate, below which that is the localization's alone
MIN_ACCEPTANCE = 0.2
MIN_LEARNED = 0.05  # share of the chance loss that must have been learned before it can be lost
RESOLUTION = 2.0**-23  # of float32: what a loss is known to, relative to itself


@dataclass(frozen=True)
class Findings:
    """What is known beside the losses of the draws, as `ChainHealth` names it; as set here, nothing is.

    prior_rise: mean L(w) - L(w*) under the localization alone, nats. variance: llc_variance. lone: see there.
    """

    prior_rise: Measured = (math.inf, 0.0)
    acceptance: float = 1.0
    variance: Measured = UNKNOWN
    descent: Measured = UNKNOWN
    gradient_variance: Measured = UNKNOWN
    missing: float = math.nan
    still: float = math.nan
    top_share: float = math.nan
    lone: bool = False


def health(
    summary: ChainSummary,
    config: LLCConfig,
    init_loss: float,
    chance_loss: float | None = None,
    found: Findings | None = None,
) -> ChainHealth:
    """Judge a summary of sampled losses against the loss at the anchor and the loss of guessing, all in nats."""
    found = found or Findings()
    rise = summary.mean - init_loss
    llc, std_error = config.nbeta * rise, config.nbeta * summary.std_error
    resolution = config.nbeta * RESOLUTION * abs(init_loss)
    change = summary.half_means[1] - summary.half_means[0]
    drift = change / abs(rise) if rise != 0 else 0.0
    learned = 0.0 if chance_loss is None else chance_loss - init_loss
    can_lose = chance_loss is not None and learned > MIN_LEARNED * chance_loss
    (prior, prior_error), (variance, variance_error) = found.prior_rise, found.variance
    surely = rise - 2 * summary.std_error  # what is not told from 0 is not told from a share either
    ratio = at_most = math.nan
    if variance > 0 and llc > 0:
        ratio = variance / llc
    # Chains that have not come to rest, or are held by nothing, say nothing of what decides where they would.
    at_rest = not (found.still > MAX_DRIFT or found.missing > MAX_DRIFT)
    if ratio > 0 and config.localization > 0 and at_rest:
        at_most = ratio * (1 + 2 * math.hypot(variance_error / variance, std_error / llc))
    of_the_start = tuple(_of_the_start((llc, std_error), resolution, init_loss, chance_loss, found.descent))
    known = ChainHealth(
        r_hat=summary.r_hat, ess=summary.ess,
        drift=drift,
        drifting=abs(drift) > MAX_DRIFT and abs(change) > SIGNIFICANCE * math.hypot(*summary.half_errors),
        diverged=summary.diverged,
        escaped=bool(can_lose and rise >= learned),
        acceptance=found.acceptance, still=found.still, missing=found.missing,
        saturation=rise / prior if prior > 0 else math.nan,
        saturated=bool((prior > 0 and surely > MAX_SATURATION * prior) or at_most < 1 - MAX_SATURATION),
        variance_ratio=ratio,
        descent=found.descent[0], gradient_variance=found.gradient_variance[0],
        gradient_variance_error=found.gradient_variance[1],
        sloping=not of_the_start and (found.descent[0] - 2 * found.descent[1]) / 2 > 2 * std_error + resolution,
        top_share=found.top_share, lone=found.lone, reasons=(), start_reasons=of_the_start,
    )  # fmt: skip
    alone = (prior > 0 and surely > (1 - MIN_SHARE) * (prior + 2 * prior_error)) or at_most < MIN_SHARE
    reasons = [
        *_of_the_chains(known),
        *of_the_start,
        *_of_the_pull(config, known, alone),
    ]
    if known.escaped:
        reasons.append(
            f"left the basin (sampled loss {summary.mean:.2f} against {chance_loss:.2f} of guessing): "
            "raise localization or lower nbeta"
        )
    return replace(known, reasons=tuple(reasons))


def _of_the_chains(known: ChainHealth) -> Iterator[str]:
    """Why the draws are not those of the law that they are meant for."""
    if known.diverged > 0:
        yield f"{known.diverged:.0%} of the chains diverged: lower step_size"
    if known.acceptance < MIN_ACCEPTANCE:
        yield f"{known.acceptance:.0%} of the proposals accepted: lower step_size"
    if known.diverged == 1:
        return
    if known.still > MAX_DRIFT:
        yield (
            f"{known.still:.0%} of the parameters have not moved at all, as the steps are lost in rounding: raise "
            "step_size, or sample in float64"
        )
    elif known.missing > MAX_DRIFT:
        yield (
            f"the chains were too short for flat directions to come to rest, of which up to {known.missing:.0%} of the "
            "LLC may be missing: draw longer chains with more burn-in, or raise step_size or localization"
        )
    if not known.r_hat <= MAX_R_HAT:
        yield f"R-hat {known.r_hat:.2f} > {MAX_R_HAT}: draw longer chains or more burn-in"
    if known.ess < MIN_ESS:
        yield f"effective sample size {known.ess:.0f} < {MIN_ESS:.0f}: draw longer chains"
    if known.drifting:
        yield f"the loss still drifts ({known.drift:+.0%} between halves): more burn-in"


def _of_the_start(
    estimate: Measured, resolution: float, init_loss: float, chance: float | None, descent: Measured
) -> Iterator[str]:
    """Why w* is no minimum of the loss on this data, so that the rise above it is no learning coefficient.

    The slope counts where what it takes from llc is surely more than all that is left: llc then says more of the way
    down than of the width of the valley. See `motion.slope_share`.
    """
    llc, std_error = estimate
    if chance is not None and init_loss >= chance:
        yield (
            f"w* is no minimum of this data's loss: {init_loss:.3g} nats there, and {chance:.3g} by guessing: train "
            "longer, or look whether these are the data and targets that the model was trained on"
        )
    if llc < -SIGNIFICANCE * std_error - resolution:
        yield (
            f"w* is no minimum of this data's loss: the chains found lower losses, llc is {llc:.3g} ± {std_error:.2g}: "
            "train longer, or raise localization or lower nbeta; llc_variance needs no minimum"
        )
    if descent[0] - SIGNIFICANCE * descent[1] > max(llc, resolution):
        yield (
            f"w* is no minimum of this data's loss: its slope there takes {descent[0]:.3g} from llc, more than is left "
            f"({llc:.3g}): train longer, or raise localization or lower nbeta; llc_variance needs no minimum"
        )


def _of_the_pull(config: LLCConfig, known: ChainHealth, alone: bool) -> Iterator[str]:
    """Why the loss has no say in where the chains went."""
    if config.nbeta == 0:
        yield "nbeta is 0, so the loss pulls at nothing and llc is 0 for any model: set nbeta above 0"
    elif alone:
        yield (
            f"the localization alone decides it: less than {MIN_SHARE:.0%} of the estimate is the loss's (saturation "
            f"{known.saturation:.0%}, llc_variance / llc {known.variance_ratio:.0%}): lower localization or raise nbeta"
        )


def top_row(losses: Tensor, std_error: float) -> tuple[float, bool]:
    """(the largest of Float[example] losses at w* as a share of their sum, whether it stands out), nats.

    It stands out if it is more than all others together, if that would not happen by chance, and if it matters: its
    part of the mean is more than the mean sampled loss's 95 % interval. By chance: of n losses with an exponential
    distribution, the one with the largest entropy for its mean, the largest has a share above g >= 1/2 with probability
    n (1 - g)^(n - 1) (Fisher 1929), and that is below one in a thousand. NaN where a loss is negative or none is
    positive.
    """
    total, largest = float(losses.sum()), float(losses.max())
    if float(losses.min()) < 0 or total == 0:
        return math.nan, False
    share, n = largest / total, len(losses)
    surprising = share > 0.5 and n * (1 - share) ** (n - 1) < 1e-3
    return share, bool(surprising and n > 1 and largest / n > 2 * std_error)
