"""mechgrok: interpretability of transformers through training, each finding tied to a stage of the LLC.

Names are imported when first used, because torch and TransformerLens take seconds to import.
"""

import importlib
from typing import Any

_HOME = {
    "LLCConfig": "mechgrok.config",
    "RunConfig": "mechgrok.config",
    "StageConfig": "mechgrok.config",
    "load_config": "mechgrok.config",
    "preset_names": "mechgrok.config",
    "MechgrokError": "mechgrok.errors",
    "Calibration": "mechgrok.calibration",
    "Claim": "mechgrok.types",
    "Component": "mechgrok.types",
    "Examples": "mechgrok.types",
    "LLCCurve": "mechgrok.types",
    "LLCEstimate": "mechgrok.types",
    "Report": "mechgrok.types",
    "Stage": "mechgrok.types",
    "Study": "mechgrok.types",
    "Trajectory": "mechgrok.types",
    "component": "mechgrok.components",
    "detect_stages": "mechgrok.stages",
    "calibrate": "mechgrok.llc.calibrate",
    "canonicalize": "mechgrok.canonical",
    "estimate_llc": "mechgrok.llc.estimate",
    "influences": "mechgrok.llc.observe",
    "llc_curve": "mechgrok.llc.curve",
    "load_study": "mechgrok.pipeline",
    "observe": "mechgrok.llc.observe",
    "run": "mechgrok.pipeline",
    "susceptibilities": "mechgrok.llc.observe",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mechgrok' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
