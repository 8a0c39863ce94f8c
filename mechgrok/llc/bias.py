"""What a finite step size adds to an estimate: two step sizes, extrapolated."""

import math

from mechgrok.types import LLCEstimate


def step_size_bias(coarse: LLCEstimate, fine: LLCEstimate) -> tuple[float, float]:
    """(bias of `coarse`, its standard error), by Richardson's extrapolation to step size 0.

    bias = 2 (coarse - fine), where fine has half the step size (`LLCConfig.halved`): the leading term of an
    expansion that begins with the first power of the step size. Where it is comparable to the estimate,
    take it as a warning rather than a correction. baoab without momentum begins with the second power,
    so for it this is up to half too large.

    Source: Talay & Tubaro 1990 (Stoch. Anal. Appl. 8), the expansion.
    """
    return 2 * (coarse.llc - fine.llc), 2 * math.hypot(coarse.std_error, fine.std_error)
