"""A regression check for CI: does a study still say what a baseline says, within its error bars?

Compared by overlap of intervals, never by equal digits: LLCs (with a confidence that allows for
their number), stages (their directions, and the boundaries' own intervals), claims (one has moved
if it holds in one study alone and the values are apart by more than their margins).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from mechgrok.errors import RunDirectoryError
from mechgrok.types import Claim, Report, Study

FORMAT = 1
# Each LLC has an interval of confidence 1 - MISS / (number of LLCs). Two that do not overlap are rarer still
# in an unchanged study, which leaves room for another machine's rounding.
MISS = 0.01
CLAIM_MARGIN = 0.1  # claims carry no error of their own: a value stands for +- this share of value or threshold


def baseline_of(study: Study, reports: Sequence[Report]) -> dict[str, Any]:
    """What `compare` needs of a study, as JSON values."""
    curve = study.curve
    return {
        "format": FORMAT,
        "name": study.config.name,
        "config": study.config.digest(),
        "steps": curve.steps.tolist(),
        "llc": {name: _points(curve.llc[row], curve.std_error[row]) for row, name in enumerate(curve.components)},
        "stages": [
            {
                "name": stage.name,
                "direction": stage.direction,
                "end": stage.end,
                "end_interval": list(stage.end_interval) if stage.end_interval else None,
            }
            for stage in study.stages
        ],
        "claims": {report.analysis: {c.text: _claim(c) for c in report.claims} for report in reports},
    }


def compare(baseline: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What moved from the baseline, one sentence each; empty if nothing did.

    Raises:
        RunDirectoryError: the baseline is none, or of another format, configuration or checkpoints.
    """
    try:
        if baseline["format"] != FORMAT:
            raise RunDirectoryError(f"the baseline has format {baseline['format']}, expected {FORMAT}; write it anew")
        if baseline["config"] != current["config"]:
            raise RunDirectoryError(
                f"the baseline is of another configuration ({baseline['name']}); compare runs of the same preset"
            )
        if baseline["steps"] != current["steps"]:
            raise RunDirectoryError("the baseline has other checkpoints than the run; write it anew with --write")
        return [*_llc_moves(baseline, current), *_stage_moves(baseline, current), *_claim_moves(baseline, current)]
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, ZeroDivisionError):
        raise RunDirectoryError("the baseline is malformed, or no baseline at all; write one with --write") from None


def _points(llc: np.ndarray, std_error: np.ndarray) -> list[list[float | None]]:
    return [[_finite(value), _finite(error)] for value, error in zip(llc, std_error, strict=True)]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _claim(claim: Claim) -> dict[str, Any]:
    return {"value": _finite(claim.value), "threshold": claim.threshold, "holds": claim.holds}


def _apart(old: dict[str, Any], new: dict[str, Any]) -> bool:
    if old["value"] is None or new["value"] is None:
        return True
    margins = (CLAIM_MARGIN * max(abs(claim["value"]), abs(claim["threshold"])) for claim in (old, new))
    return abs(new["value"] - old["value"]) > sum(margins)


def _llc_moves(baseline: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    n_points = sum(len(points) for points in baseline["llc"].values())
    z = float(norm.isf(MISS / n_points / 2))
    for name in sorted(baseline["llc"].keys() | current["llc"].keys()):
        if name not in baseline["llc"] or name not in current["llc"]:
            yield f"LLC of {name}: in only one of the two"
            continue
        for step, old, new in zip(baseline["steps"], baseline["llc"][name], current["llc"][name], strict=True):
            if None in old or None in new:
                if old != new:
                    yield f"LLC of {name} at step {step}: {_shown(old)} -> {_shown(new)}"
            elif abs(new[0] - old[0]) > z * (old[1] + new[1]):
                apart = f"intervals of {z:.1f} standard errors do not meet"
                yield f"LLC of {name} at step {step}: {_shown(old)} -> {_shown(new)} ({apart})"


def _shown(point: list[float | None]) -> str:
    return "not finite" if point[0] is None or point[1] is None else f"{point[0]:.3g} ± {point[1]:.2g}"


def _stage_moves(baseline: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    old, new = baseline["stages"], current["stages"]
    directions = [[stage["direction"] for stage in stages] for stages in (old, new)]
    if directions[0] != directions[1]:
        yield f"stages: {' '.join(directions[0]) or 'none'} -> {' '.join(directions[1]) or 'none'}"
        return
    for before, after in zip(old, new, strict=True):
        a, b = before["end_interval"], after["end_interval"]
        if a is not None and b is not None and (a[1] < b[0] or b[1] < a[0]):
            yield (
                f"end of stage {before['name']}: {before['end']:.0f} [{a[0]:.0f}, {a[1]:.0f}] -> "
                f"{after['end']:.0f} [{b[0]:.0f}, {b[1]:.0f}]"
            )


def _claim_moves(baseline: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    for analysis in sorted(baseline["claims"].keys() | current["claims"].keys()):
        old, new = (which["claims"].get(analysis, {}) for which in (baseline, current))
        for text in dict.fromkeys([*old, *new]):
            if text not in old or text not in new:
                yield f"claim of {analysis} in only one of the two: {text}"
            elif old[text]["holds"] != new[text]["holds"] and _apart(old[text], new[text]):
                verdict = "no longer holds" if old[text]["holds"] else "now holds"
                yield f"claim of {analysis} {verdict} (value {old[text]['value']} -> {new[text]['value']}): {text}"
