"""What is known of an estimate's chains and of the point they started from, and what to mind."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ChainHealth:
    """What the chains of one estimate say about it; `reasons` is empty when it is healthy. NaN: not known.

    Of the chains.
    r_hat: split rank-normalized R-hat. ess: effective sample size of the mean, all chains.
    drift: change of the estimate between the halves of the run, as a share of the estimate's size.
    drifting: it is large and significant, so the chain has not settled.
    diverged: share of chains that left the finite numbers.
    escaped: the sampled loss lost all that training had gained over chance.
    acceptance: share of accepted proposals, 1 for samplers without any.
    still: share of the parameters that stand where they stood at the start in every chain, to the last bit.
    missing: largest share of the LLC that may be missing because flat directions have not had the time to come to
    rest, as `sampling.verdict.missing_share` has it.

    Of what decides the number.
    saturation: rise of the sampled loss as a share of its rise under the localization alone (nbeta = 0);
    near 1 the loss does not shape the draws. NaN where the localization raises no loss.
    variance_ratio: llc_variance / llc where both are positive. With r_i = nbeta h_i / (nbeta h_i + localization) it is
    sum r_i^2 / sum r_i on a quadratic, which is 1 - d log llc / d log nbeta, and 1 + d log llc / d log localization;
    saturation is there the mean of 1 - r_i, weighted by h_i, so the ratio is at most 1 - saturation.
    saturated: the one is surely above a half, or the other below, so the localization decides more of the estimate
    than the loss does, and it grows with nbeta by more than the square root. That makes no estimate unhealthy, as the
    chains are sound: it says how flat the loss is at the localization's scale.

    Of w*.
    descent: what the slope at w* takes from llc, -nbeta times the mean of g . (w - w*), g the gradient of the loss on
    all of the data at w*. On a quadratic nbeta^2 g' A^-1 g, A = nbeta H + localization; 0 at a minimum.
    sloping: at least half of it is lost on a quadratic, and that half is surely more than the error bar.
    gradient_variance, gradient_variance_error: at most what the slope at w* adds to llc_variance, with its standard
    error: nbeta^2 Cov(L(w), g . (w - w*)). On a quadratic that is nbeta^2 localization g' A^-2 g, the slope's own share
    nbeta^2 localization^2 g' A^-3 g, and both are nbeta^2 |g|^2 / localization where the loss is flat along g, and less
    where it is not.
    start_reasons: those of the reasons that say that w* is no minimum of this data's loss, as is to be expected on
    other data than the model was trained on.
    top_share: the largest loss of one example at w* as a share of all of them together; lone: that is more than a half,
    more than chance has it, and more than the error bar.
    """

    r_hat: float
    ess: float
    drift: float
    drifting: bool
    diverged: float
    escaped: bool
    saturation: float
    saturated: bool
    acceptance: float
    reasons: tuple[str, ...]
    still: float = math.nan
    missing: float = math.nan
    variance_ratio: float = math.nan
    descent: float = math.nan
    gradient_variance: float = math.nan
    gradient_variance_error: float = math.nan
    sloping: bool = False
    top_share: float = math.nan
    lone: bool = False
    start_reasons: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        return not self.reasons

    @property
    def sound(self) -> bool:
        """Whether nothing speaks against it but that w* is no minimum, which a data-refined LLC need not have."""
        return set(self.reasons) <= set(self.start_reasons)

    @property
    def cautions(self) -> tuple[str, ...]:
        """What to mind in a healthy estimate, and what to change."""
        found = []
        if self.saturated:
            found.append(
                f"saturated (the loss rises {self.saturation:.0%} as much as under the localization alone, and "
                f"llc_variance is {self.variance_ratio:.0%} of llc: the localization decides more of it than the loss "
                "does): lower localization or raise nbeta"
            )
        if self.sloping:
            found.append(
                f"w* is not quite a minimum of this data's loss: its slope there takes {self.descent / 2:.2g} to "
                f"{self.descent:.2g} from llc: train longer, or raise localization or lower nbeta"
            )
        if self.lone:
            found.append(
                f"one example makes {self.top_share:.0%} of the loss at w*: look whether its target is right, and "
                "estimate without it too"
            )
        return tuple(found)
