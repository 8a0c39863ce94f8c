"""The loss that a checkpoint is known to have: what its parameters do not tell, such as eps, shows in it."""

import re
from dataclasses import dataclass
from decimal import Decimal

from mechgrok.errors import ConfigError

ROUNDING = 1e-5  # of the loss: sums in float32 differ from one library to another


@dataclass(frozen=True)
class ExpectedLoss:
    """Mean loss in nats on the task's training rows at a step, and how far off it may be."""

    step: int
    nats: float
    within: float

    @classmethod
    def parse(cls, text: str) -> "ExpectedLoss":
        """STEP=NATS, as `2000=1.234`: within half a unit of the last digit written, or ROUNDING if that is more.

        Raises:
            ConfigError: it is written otherwise.
        """
        match = re.fullmatch(r"(\d{1,12})=(\d+\.?\d*|\.\d+)", text.strip())
        if match is None:
            raise ConfigError(f"--expect-loss reads STEP=NATS, such as 2000=1.234, got {text!r}")
        exponent = Decimal(match[2]).as_tuple().exponent
        assert isinstance(exponent, int)  # it is a number
        nats = float(match[2])
        return cls(int(match[1]), nats, max(0.5 * 10.0**exponent, ROUNDING * nats))

    def against(self, loss: float) -> str | None:
        """What is wrong with a loss, None if it is the one that is expected."""
        if abs(loss - self.nats) <= self.within:
            return None
        return (
            f"has a train loss of {loss:.6g} nats, not {self.nats:g} within {self.within:.2g}: eps, act_fn or the "
            "rotary settings of [model] are other ones, or [task] is"
        )
