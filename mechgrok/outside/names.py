"""The step that the name of a checkpoint tells."""

import re
from collections.abc import Iterable
from pathlib import Path

from mechgrok.errors import ConfigError

_WORDS = "step|checkpoint|ckpt|epoch|iteration|iter|model|weights|state_?dict"
_COUNTED = re.compile(rf"(?<![a-z])({_WORDS})s?[-_=. ]?(\d{{1,12}})(?!\d)", re.IGNORECASE)
_TOKENS = re.compile(r"[-_]tokens?\d+[kmbt]?$", re.IGNORECASE)  # how much data the step has seen


def step_of(name: str) -> tuple[int, str] | None:
    """(step, "step" or "epoch") of the name of a folder, or of a file without its suffix; None if it tells none.

    `100`, or a name that ends in a word such as step, checkpoint, ckpt, epoch or model with a number:
    `step_000100`, `ckpt_100`, `epoch-3`, `model-step-100`, `Step-100`. A step counts before an epoch beside it.
    """
    name = _TOKENS.sub("", name)
    if re.fullmatch(r"\d{1,12}", name):
        return int(name), "step"
    found = list(_COUNTED.finditer(name))
    if not found or found[-1].end() != len(name):
        return None
    chosen = next((one for one in found if one[1].lower() == "step"), found[-1])
    return int(chosen[2]), "epoch" if chosen[1].lower() == "epoch" else "step"


def by_step(named: Iterable[tuple[str, Path]]) -> dict[int, Path]:
    """The paths by the step that their names tell.

    Raises:
        ConfigError: a name tells none, two tell the same, or some count steps and others epochs.
    """
    found: dict[int, Path] = {}
    units: dict[str, Path] = {}
    for name, path in named:
        told = step_of(name)
        if told is None:
            raise ConfigError(f"{path} names no step; call it step-100{path.suffix}, or move it away")
        step, unit = told
        if step in found:
            raise ConfigError(f"{found[step]} and {path} are both step {step}; move one of them away")
        found[step] = units[unit] = path
    if len(units) > 1:
        raise ConfigError(f"{units['step']} counts steps and {units['epoch']} epochs; rename one kind or move it away")
    return found
