"""The mistakes a caller can make. Each message says what was expected, what came, and what to do.

A chain that fails while sampling is not here: that is a value (`ChainHealth`), not an exception.
"""


class MechgrokError(Exception):
    """Base of all errors that a caller can mend; the CLI prints its message and exits with 2."""


class ConfigError(MechgrokError):
    """A preset, a TOML file or a setting is unknown, malformed or out of range."""


class ComponentError(MechgrokError):
    """A component name does not fit the model, or selects no parameter."""


class TogetherError(ComponentError):
    """These components cannot share one batch of draws on this model; each can be sampled alone."""


class ShapeError(MechgrokError):
    """An array does not have the shape that its record or function promises."""


class RunDirectoryError(MechgrokError):
    """A run directory is missing, in use, or belongs to another configuration."""


class CheckpointError(MechgrokError):
    """A checkpoint file is missing, truncated, altered, or of another model."""


class ClusterError(MechgrokError):
    """The workers of a cluster cannot do the work: they die of it, are started wrongly, or their scheduler ended."""


class UnhealthyEstimateError(MechgrokError):
    """An estimate that is asked to carry a conclusion is not healthy enough to."""


class AnalysisError(MechgrokError):
    """An analysis is unknown or does not apply to the task of the study."""


class MeasureError(MechgrokError):
    """A measure has no meaning on this model or these data, such as copying where classes are no tokens."""


def first_line(error: Exception) -> str:
    """What an error of another library says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
