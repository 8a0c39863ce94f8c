"""What a study has to estimate: which components, on which data, at which checkpoints and settings."""

from collections.abc import Mapping, Sequence

from mechgrok.components import expand_names
from mechgrok.config import REFERENCE, RefinementConfig, RunConfig
from mechgrok.errors import ComponentError, ConfigError
from mechgrok.llc.curve import Unit, assemble_curve
from mechgrok.llc.problem import check_batch_size
from mechgrok.model import build_model
from mechgrok.types import Examples, LLCCurve, LLCEstimate, Split


def component_names(config: RunConfig, split: Split) -> tuple[str, ...]:
    """The components that are followed, by name. Raises ComponentError for one that the model lacks."""
    return _expanded(config, split, config.llc.components, "llc.components")


def check_data(config: RunConfig, split: Split) -> None:
    """Raises ConfigError, before any work, for a batch larger than the data and for a distribution not there."""
    check_batch_size(config.llc.sampling, len(sampled_examples(config, split)))
    taken = {"llc", REFERENCE} & split.distributions.keys()  # llc.nc, and the data that a reference model makes
    if config.llc.refinements and taken:
        raise ConfigError(f"the task's distribution {min(taken)!r} has a name that the run needs itself; rename it")
    for refinement in config.llc.refinements:
        refined_names(config, split, refinement)
        if refinement.distribution == REFERENCE:
            continue
        if refinement.distribution not in split.distributions:
            raise ConfigError(
                f"the task has no distribution {refinement.distribution!r} to refine the LLC with; "
                f"it has {', '.join(split.distributions) or 'none'}"
            )
        check_batch_size(config.llc.sampling, len(split.distributions[refinement.distribution]))


def sampled_examples(config: RunConfig, split: Split) -> Examples:
    """The training examples that the chains draw their batches from."""
    return split.train.first(config.llc.n_examples or len(split.train))


def plan_units(config: RunConfig, names: Sequence[str], split: Split, steps: Sequence[int]) -> dict[str, list[Unit]]:
    """All units of work of a study: {distribution: units}, "" for the training data.

    There the dearest come first: the model also at half the step and at the control.
    """
    sampling, control = config.llc.sampling, config.llc.control
    checked = steps[:: config.llc.checks_every]
    settings = ((sampling.halved(), checked), (sampling, steps), (control, checked))
    whole = [(step, "model", setting) for setting, at in settings for step in at]
    plan = {"": whole + [(step, name, sampling) for name in names if name != "model" for step in steps]}
    for refinement in config.llc.refinements:
        refined = refined_names(config, split, refinement)
        plan[refinement.distribution] = [
            (step, name, sampling) for name in refined for step in steps[:: refinement.every]
        ]
    return plan


def refined_names(config: RunConfig, split: Split, refinement: RefinementConfig) -> tuple[str, ...]:
    """The components of a refinement, by name."""
    return _expanded(config, split, refinement.components, f"components of refinement {refinement.distribution!r}")


def _expanded(config: RunConfig, split: Split, names: Sequence[str], key: str) -> tuple[str, ...]:
    try:
        return expand_names(build_model(config.model, split, config.seed), names)
    except ComponentError as error:
        raise ComponentError(f"{key}: {error}") from None


def curve_of(
    found: Mapping[str, dict[Unit, LLCEstimate]], config: RunConfig, names: Sequence[str], split: Split
) -> LLCCurve:
    """The curve of all components, with the model's controls and the curves on other distributions."""
    sampling, own = config.llc.sampling, found[""]
    control = assemble_curve(own, ["model"], config.llc.control)
    finer = assemble_curve(own, ["model"], sampling.halved())
    refined = {
        refinement.distribution: assemble_curve(
            found[refinement.distribution], refined_names(config, split, refinement), sampling
        )
        for refinement in config.llc.refinements
    }
    return assemble_curve(own, names, sampling, control, finer, refined)
