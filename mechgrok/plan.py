"""What a study has to estimate: which components, on which data, at which checkpoints and settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from mechgrok.components import expand_names
from mechgrok.config import REFERENCE, RefinementConfig, RunConfig
from mechgrok.errors import ComponentError, ConfigError
from mechgrok.llc.curve import Unit, assemble_curve
from mechgrok.llc.problem import check_batch_size
from mechgrok.model import build_model
from mechgrok.tasks import make_split
from mechgrok.train import planned_steps
from mechgrok.types import Examples, LLCCurve, LLCEstimate, Split


def checked_split(config: RunConfig) -> tuple[Split, tuple[str, ...]]:
    """The split and the components' names; what the model or the data lack is refused before any work."""
    split = make_split(config.task, config.seed)
    names = component_names(config, split)
    check_data(config, split)
    return split, names


def component_names(config: RunConfig, split: Split) -> tuple[str, ...]:
    """The components that are followed, by name. Raises ComponentError for one that the model lacks."""
    return _expanded(config, split, config.llc.components, "llc.components")


def check_data(config: RunConfig, split: Split) -> None:
    """Raises ConfigError, before any work, for a batch larger than the data and for a distribution not there.

    Also for settings that change nothing of this study: more examples than there are, an interval longer than the
    trajectory, settings for components that are not followed.
    """
    llc, n_train, n_checkpoints = config.llc, len(split.train), len(planned_steps(config.train))
    if (llc.n_examples or 0) > n_train:
        raise ConfigError(
            f"llc.n_examples {llc.n_examples} exceeds the {n_train} training examples; leave it out to use all of them"
        )
    intervals = {"llc.checks_every": llc.checks_every}
    intervals |= {f"every of refinement {one.distribution!r}": one.every for one in llc.refinements}
    for key, every in intervals.items():
        if every > n_checkpoints:
            raise ConfigError(f"{key} is {every} and there are {n_checkpoints} checkpoints; lower it")
    followed = {*component_names(config, split)}.union(*(refined_names(config, split, one) for one in llc.refinements))
    if llc.head_sampling is not None and followed == {"model"}:
        raise ConfigError("llc.head_sampling is for other components than the model, and none is followed; remove it")
    for sampling in map(llc.sampling_of, followed):
        check_batch_size(sampling, len(sampled_examples(config, split)))
    # llc.nc, the data that a reference model makes, and what other curves are called in report.json
    taken = {"llc", REFERENCE, "main", "control", "finer"} & split.distributions.keys()
    if config.llc.refinements and taken:
        raise ConfigError(f"the task's distribution {min(taken)!r} has a name that the run needs itself; rename it")
    for refinement in config.llc.refinements:
        names = refined_names(config, split, refinement)
        if refinement.distribution == REFERENCE:
            continue
        if refinement.distribution not in split.distributions:
            raise ConfigError(
                f"the task has no distribution {refinement.distribution!r} to refine the LLC with; "
                f"it has {', '.join(split.distributions) or 'none'}"
            )
        for sampling in map(config.llc.sampling_of, names):
            check_batch_size(sampling, len(split.distributions[refinement.distribution]))


def sampled_examples(config: RunConfig, split: Split) -> Examples:
    """The training examples that the chains draw their batches from."""
    return split.train.first(config.llc.n_examples or len(split.train))


def plan_units(config: RunConfig, names: Sequence[str], split: Split, steps: Sequence[int]) -> dict[str, list[Unit]]:
    """All units of work of a study: {distribution: units}, "" for the training data.

    There the dearest come first: the model also at half the step and at the control.
    """
    llc, checked = config.llc, steps[:: config.llc.checks_every]
    settings = ((llc.sampling.halved(), checked), (llc.sampling, steps), (llc.control, checked))
    whole = [(step, "model", setting) for setting, at in settings for step in at]
    plan = {"": whole + [(step, name, llc.sampling_of(name)) for name in names if name != "model" for step in steps]}
    for refinement in llc.refinements:
        refined = refined_names(config, split, refinement)
        plan[refinement.distribution] = [
            (step, name, llc.sampling_of(name)) for name in refined for step in steps[:: refinement.every]
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
    llc, own = config.llc, found[""]

    def curve(on: Mapping[Unit, LLCEstimate], components: Sequence[str], **parts: Any) -> LLCCurve:
        return assemble_curve(on, {name: llc.sampling_of(name) for name in components}, **parts)

    return curve(
        own,
        names,
        control=assemble_curve(own, {"model": llc.control}),
        finer=assemble_curve(own, {"model": llc.sampling.halved()}),
        refined={
            one.distribution: curve(found[one.distribution], refined_names(config, split, one), elsewhere=True)
            for one in llc.refinements
        },
    )
