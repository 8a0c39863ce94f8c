"""The records of a calibration: what was tried, what is recommended, and why."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mechgrok.config import LLCConfig
from mechgrok.types import LLCEstimate

Cell = tuple[float, float]  # (nbeta, localization)


@dataclass(frozen=True)
class Trial:
    """One estimate of a sweep: at which checkpoint, and what came out. Its settings are estimate.config."""

    step: int
    estimate: LLCEstimate

    @property
    def rise(self) -> float:
        """By how much the sampled loss lies above that at w*, nats; NaN if no chain stayed finite."""
        finite = np.isfinite(self.estimate.losses).all(axis=1)
        return float(self.estimate.losses[finite].mean() - self.estimate.init_loss) if finite.any() else float("nan")


@dataclass(frozen=True)
class Calibration:
    """A recommended setting, why, and everything it was read from.

    sound: whether all that is asked of a setting holds for this one; `reasons` say what does not.
    sensitivity: (nbeta, localization) -> |d log llc / d log nbeta|, NaN where unusable.
    grid, steps: the sweeps. final, control: the recommended setting, and the same with nbeta = 0.
    acceptance: of mala at the recommended step size, None where it was too dear.
    """

    recommended: LLCConfig
    sound: bool
    reasons: tuple[str, ...]
    sensitivity: Mapping[Cell, float]
    grid: tuple[Trial, ...]
    steps: tuple[Trial, ...]
    final: tuple[Trial, ...]
    control: tuple[Trial, ...]
    acceptance: float | None


def calibration_record(found: Calibration) -> dict[str, Any]:
    """What JSON keeps of a calibration: settings, reasons, and a row for every trial, without its losses."""

    def rows(trials: Iterable[Trial]) -> list[dict[str, Any]]:
        return [
            {
                "step": trial.step, "component": trial.estimate.component,
                **{key: getattr(trial.estimate.config, key) for key in ("nbeta", "localization", "step_size")},
                **{key: _finite(getattr(trial.estimate, key)) for key in ("llc", "std_error")},
                "rise": _finite(trial.rise),
                "health": {
                    key: _finite(value) if isinstance(value, float) else value
                    for key, value in asdict(trial.estimate.health).items()
                },
            }
            for trial in trials
        ]  # fmt: skip

    return {
        "recommended": found.recommended.model_dump(),
        "sound": found.sound,
        "reasons": list(found.reasons),
        "acceptance": found.acceptance,
        "sensitivity": [
            {"nbeta": nbeta, "localization": localization, "slope": _finite(slope)}
            for (nbeta, localization), slope in found.sensitivity.items()
        ],
        **{name: rows(getattr(found, name)) for name in ("grid", "steps", "final", "control")},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
