"""The main path on one page: task -> trained trajectory -> LLC curves -> developmental stages. START HERE.

Every step reads what an earlier run of it left in the run directory, so a run that was killed goes
on where it stopped and ends in the same bits. Analyses take the `Study` from here; see `analyses`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from joblib import cpu_count

from mechgrok.components import expand_names
from mechgrok.config import RunConfig, load_config
from mechgrok.errors import RunDirectoryError
from mechgrok.llc.calibrate import calibrate
from mechgrok.llc.curve import Unit, assemble_curve, estimate_units, with_company
from mechgrok.llc.problem import check_batch_size
from mechgrok.model import build_model
from mechgrok.schedule import check_scheduler
from mechgrok.stages import MIN_POINTS, detect_stages, usable_points
from mechgrok.store import RunDirectory, calibration_record
from mechgrok.tasks import make_split
from mechgrok.train import load_trajectory, train
from mechgrok.types import Calibration, LLCCurve, LLCEstimate, Split, Stage, Study, Trajectory

Progress = Callable[[str, int, int], None]  # (what is going on, done, total)


def silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


def run(
    source: str | Path | RunConfig,
    out: str | Path | None = None,
    n_workers: int | None = None,
    progress: Progress = silent,
    scheduler: str | None = None,
) -> Study:
    """Make, or finish, the study that a preset, a TOML file or a RunConfig describes.

    Args:
        out: the run directory, by default runs/<name>. What is there already is not done again.
        n_workers: processes that sample, by default one for each core. The result does not depend on it.
        scheduler: "tcp://host:port" of a Dask cluster that samples instead; docs/cluster.md.

    Raises:
        ConfigError, RunDirectoryError, CheckpointError, ClusterError: before or instead of any harm.
    """
    if scheduler is not None:
        check_scheduler(scheduler)
    config = load_config(source)
    split = make_split(config.task, config.seed)
    names = component_names(config, split)  # a name that the model lacks is refused before any work
    check_batch_size(config.llc.sampling, len(split.train))
    directory = RunDirectory.create(out or Path("runs") / config.name, config)
    with directory.locked():
        trajectory = train(directory, split, lambda done, total: progress("training", done, total))
        curve = follow(directory, trajectory, split, names, n_workers, progress, scheduler)
        stages = find_stages(curve, config)
        directory.write_netcdf("llc.nc", curve.to_dataset())
    return Study(config, split, trajectory, curve, stages)


def train_only(
    source: str | Path | RunConfig, out: str | Path | None = None, progress: Progress = silent
) -> Trajectory:
    """The first part of `run`: the trajectory alone."""
    config = load_config(source)
    split = make_split(config.task, config.seed)
    directory = RunDirectory.create(out or Path("runs") / config.name, config)
    with directory.locked():
        return train(directory, split, lambda done, total: progress("training", done, total))


def load_study(path: str | Path) -> Study:
    """The study in a run directory, from its files alone: nothing is trained or sampled.

    Raises:
        RunDirectoryError: no run there, or one that has not ended yet. CheckpointError: a damaged file.
    """
    directory = RunDirectory.open(path)
    config = directory.config
    split = make_split(config.task, config.seed)
    trajectory = load_trajectory(directory, split)
    names = component_names(config, split)
    units = curve_units(config, names, trajectory.steps)
    found = stored_estimates(directory, units)
    if len(found) < len(units):
        raise RunDirectoryError(
            f"{directory.path} has {len(found)} of {len(units)} estimates; run `mechgrok run` again to finish it"
        )
    curve = curve_of(found, config, names)
    return Study(config, split, trajectory, curve, find_stages(curve, config))


def doubtful_estimates(path: str | Path) -> dict[Unit, LLCEstimate]:
    """Those estimates of a run with `health.reasons` against them, or `health.cautions`, which say what to change."""
    directory = RunDirectory.open(path)
    config = directory.config
    split = make_split(config.task, config.seed)
    steps = load_trajectory(directory, split).steps
    found = stored_estimates(directory, curve_units(config, component_names(config, split), steps))
    return {unit: estimate for unit, estimate in found.items() if estimate.health.reasons or estimate.health.cautions}


def calibrate_run(
    path: str | Path,
    changes: Mapping[str, Any],
    components: Sequence[str] = ("model",),
    n_checkpoints: int = 3,
    n_workers: int | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Recommend sampling settings for a trained run; write calibration.svg, calibration.json, calibrated.toml.

    Args:
        changes: what to keep other than the run's own sampler, momentum, batch_size, n_chains, canonicalize.
    """
    from mechgrok.plotting import calibration_figure, to_svg  # matplotlib, which the other commands do not need

    directory = RunDirectory.open(path)
    config = directory.config
    split = make_split(config.task, config.seed)
    own = config.llc.sampling
    kept = {key: getattr(own, key) for key in ("sampler", "momentum", "batch_size", "n_chains", "canonicalize")}
    found = calibrate(
        load_trajectory(directory, split), split.train, seed=config.seed, components=components,
        n_checkpoints=n_checkpoints, n_workers=n_workers or cpu_count(), progress=progress, **(kept | dict(changes)),
    )  # fmt: skip
    with directory.locked():
        directory.write_text("calibration.svg", to_svg(calibration_figure(found)))
        directory.write_json("calibration.json", calibration_record(found))
        directory.write_text("calibrated.toml", config.with_sampling(found.recommended).to_toml())
    return found


def component_names(config: RunConfig, split: Split) -> tuple[str, ...]:
    """The components that are followed, by name. Raises ComponentError for one that the model lacks."""
    return expand_names(build_model(config.model, split, config.seed), config.llc.components)


def follow(
    directory: RunDirectory,
    trajectory: Trajectory,
    split: Split,
    names: Sequence[str],
    n_workers: int | None,
    progress: Progress,
    scheduler: str | None,
) -> LLCCurve:
    """The LLC of every component at every checkpoint; the model's also as its controls are sampled."""
    config = directory.config
    units = curve_units(config, names, trajectory.steps)
    found = stored_estimates(directory, units)
    missing = with_company(trajectory, units, [unit for unit in units if unit not in found])
    n_workers = n_workers or max(1, cpu_count() // config.llc.n_threads)
    work = estimate_units(trajectory, split.train, missing, config.seed, n_workers, config.llc.n_threads, scheduler)
    for unit, estimate in work:
        directory.write_estimate(unit[0], estimate)
        found[unit] = estimate
        progress("sampling", len(found), len(units))
    return curve_of(found, config, names)


def find_stages(curve: LLCCurve, config: RunConfig) -> tuple[Stage, ...]:
    """The stages of the model's curve; unhealthy points are left out, and the report counts them.

    None if too few points are left to find any: at the end of a long run that is a result, not an error.
    """
    if usable_points(curve).sum() < MIN_POINTS:
        return ()
    return detect_stages(curve, config.stages, drop_unhealthy=True, seed=config.seed)


def curve_units(config: RunConfig, names: Sequence[str], steps: Sequence[int]) -> list[Unit]:
    """All units of work of a study, the dearest first: the model also at half the step and at the control."""
    sampling, control = config.llc.sampling, config.llc.control
    whole = [(step, "model", setting) for setting in (sampling.halved(), sampling, control) for step in steps]
    return whole + [(step, name, sampling) for name in names if name != "model" for step in steps]


def stored_estimates(directory: RunDirectory, units: list[Unit]) -> dict[Unit, LLCEstimate]:
    """The units that are done already."""
    stored = {unit: directory.read_estimate(*unit) for unit in units}
    return {unit: estimate for unit, estimate in stored.items() if estimate is not None}


def curve_of(found: dict[Unit, LLCEstimate], config: RunConfig, names: Sequence[str]) -> LLCCurve:
    """The curve of all components, with the whole model's at the control localization and at half the step."""
    control = assemble_curve(found, ["model"], config.llc.control)
    finer = assemble_curve(found, ["model"], config.llc.sampling.halved())
    return assemble_curve(found, names, config.llc.sampling, control, finer)
