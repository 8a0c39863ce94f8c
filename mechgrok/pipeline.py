"""The main path on one page: task -> trained trajectory -> LLC curves -> developmental stages. START HERE.

Every step reads what an earlier run of it left in the run directory, so a run that was killed goes
on where it stopped and ends in the same bits. Analyses take the `Study` from here; see `analyses`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from joblib import cpu_count

from mechgrok import seeds
from mechgrok.calibration import Calibration, calibration_record
from mechgrok.compiling import compile_ahead, worth_compiling
from mechgrok.config import MOVING, REFERENCE, ImportedConfig, LLCConfig, RunConfig, load_config
from mechgrok.errors import RunDirectoryError
from mechgrok.importing import Progress, silent
from mechgrok.importing import audit_source as audit_source
from mechgrok.importing import import_run as import_run
from mechgrok.importing import import_template as import_template
from mechgrok.llc.calibrate import calibrate
from mechgrok.llc.curve import Unit, estimate_units, with_company, without_steps
from mechgrok.model import with_drawn_targets
from mechgrok.plan import checked_split, component_names, curve_of, plan_units, sampled_examples
from mechgrok.schedule import alongside, check_scheduler
from mechgrok.stages import MIN_POINTS, detect_stages, stage_points
from mechgrok.store import RunDirectory
from mechgrok.tasks import make_split
from mechgrok.train import check_device, load_trajectory, planned_steps, train
from mechgrok.types import LLCCurve, LLCEstimate, Split, Stage, Study, Trajectory


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
    path = Path(out or Path("runs") / config.name)
    if not RunDirectory.holds(path, "llc.nc"):  # a run that has ended is only read
        check_device("train.device", getattr(config.train, "device", "cpu"))
        for key, sampling in config.llc.each_sampling.items():
            check_device(f"llc.{key}.device", sampling.device if scheduler is None else "cpu")
    split, names = checked_split(config)
    directory = RunDirectory.create(path, config)
    with directory.locked():
        with alongside(
            [*references(directory, split), *loops_ahead(directory, split, names)], n_workers or cpu_count()
        ):
            trajectory = _trained(directory, split, progress)
        split = with_reference(directory, split, train)
        suspicious = directory.suspicious()
        curve = without_steps(follow(directory, trajectory, split, names, n_workers, progress, scheduler), suspicious)
        stages = find_stages(curve, config)
        for name, part in {"llc": curve, **curve.refined}.items():
            directory.write_netcdf(f"{name}.nc", part.to_dataset())
    return Study(config, split, trajectory, curve, stages, directory.makers(), suspicious)


def train_only(
    source: str | Path | RunConfig, out: str | Path | None = None, progress: Progress = silent
) -> Trajectory:
    """The first part of `run`: the trajectory alone."""
    config = load_config(source)
    path = Path(out or Path("runs") / config.name)
    if not RunDirectory.holds(path, "checkpoints"):
        check_device("train.device", getattr(config.train, "device", "cpu"))
    split, _ = checked_split(config)
    directory = RunDirectory.create(path, config)
    with directory.locked():
        return _trained(directory, split, progress)


def load_study(path: str | Path) -> Study:
    """The study in a run directory, from its files alone: nothing is trained or sampled.

    Raises:
        RunDirectoryError: no run there, or one that has not ended yet. CheckpointError: a damaged file.
    """
    directory = RunDirectory.open(path)
    config = directory.config
    split = make_split(config.task, config.seed)
    trajectory = load_trajectory(directory, split)
    split = with_reference(directory, split, load_trajectory)
    names = component_names(config, split)
    plan = plan_units(config, names, split, trajectory.steps)
    found = {data: stored_estimates(directory, units, data) for data, units in plan.items()}
    done, total = sum(map(len, found.values())), sum(map(len, plan.values()))
    if done < total:
        raise RunDirectoryError(
            f"{directory.path} has {done} of {total} estimates; run `mechgrok run` again to finish it"
        )
    suspicious = directory.suspicious()
    curve = without_steps(curve_of(found, config, names, split), suspicious)
    return Study(config, split, trajectory, curve, find_stages(curve, config), directory.makers(), suspicious)


def doubtful_estimates(path: str | Path) -> dict[tuple[str, int, str, LLCConfig], LLCEstimate]:
    """Those estimates of a run with `health.reasons` against them, or `health.cautions`, which say what to change.

    By (distribution, step, component, settings).
    """
    directory = RunDirectory.open(path)
    config = directory.config
    split = make_split(config.task, config.seed)
    plan = plan_units(config, component_names(config, split), split, load_trajectory(directory, split).steps)
    found = [(data, stored_estimates(directory, units, data)) for data, units in plan.items()]
    return {
        (data, *unit): estimate
        for data, estimates in found
        for unit, estimate in estimates.items()
        if estimate.health.reasons or estimate.health.cautions
    }


def calibrate_run(
    path: str | Path,
    changes: Mapping[str, Any],
    components: Sequence[str] = ("model",),
    n_checkpoints: int | None = None,
    n_workers: int | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Recommend sampling settings for a trained run; write calibration.svg, calibration.json, calibrated.toml.

    Args:
        changes: what to keep other than the run's own sampler, momentum, batch_size, n_chains, canonicalize.
        components: where they are the model alone, settings that the run has for heads stay as they are.
    """
    from mechgrok.plotting import calibration_figure, to_svg  # matplotlib, which the other commands do not need

    directory = RunDirectory.open(path)
    config = directory.config
    split = make_split(config.task, config.seed)
    own = config.llc.sampling
    kept = {key: getattr(own, key) for key in ("sampler", "momentum", "batch_size", "n_chains", "canonicalize")}
    trajectory, suspicious = load_trajectory(directory, split), directory.suspicious()
    trusted = tuple(row for row in trajectory.metrics if row.step not in suspicious)
    if changes.get("sampler", own.sampler) not in MOVING:
        kept["momentum"] = 0.0  # of another sampler
    found = calibrate(
        replace(trajectory, metrics=trusted), sampled_examples(config, split), seed=config.seed, components=components,
        like=own, n_checkpoints=n_checkpoints, n_workers=n_workers or cpu_count(), progress=progress,
        **(kept | dict(changes)),
    )  # fmt: skip
    calibrated = config.with_sampling(found.recommended, heads=set(components) != {"model"})
    with directory.locked():
        directory.write_text("calibration.svg", to_svg(calibration_figure(found)))
        directory.write_json("calibration.json", calibration_record(found))
        directory.write_text("calibrated.toml", calibrated.to_toml())
    return found


def with_reference(directory: RunDirectory, split: Split, make: Callable[[RunDirectory, Split], Trajectory]) -> Split:
    """The split with the distribution "reference", where one is asked for: targets that the reference model draws.

    make: `train` or `load_trajectory`; the reference is a run of its own, inside the run directory.
    """
    config, own = directory.config, _reference(directory)
    if own is None:
        return split
    trained = make(own, split)
    model = trained.model_at(trained.steps[-1])
    rng = seeds.stream(config.seed, REFERENCE, "targets")
    drawn = with_drawn_targets(model, sampled_examples(config, split), rng)
    return replace(split, distributions={**split.distributions, REFERENCE: drawn})


def references(directory: RunDirectory, split: Split) -> list[Callable[[], None]]:
    """What trains the reference model, to be called by another process, if that is to be done and there are cores."""
    own, how = _reference(directory), directory.config.train
    if own is None or isinstance(how, ImportedConfig):
        return []
    if all(own.has_checkpoint(step) for step in planned_steps(own.config.train)):
        return []
    free = how.device == "cpu" and cpu_count() >= 2 * how.n_threads
    return [partial(_train, own, split)] if free else []


def loops_ahead(directory: RunDirectory, split: Split, names: Sequence[str]) -> list[Callable[[], None]]:
    """What compiles the loops of the estimates, to be called by another process while this one trains."""
    config, how = directory.config, directory.config.train
    plan = plan_units(config, names, split, planned_steps(how))
    ready = isinstance(how, ImportedConfig) or all(directory.has_checkpoint(step) for step in planned_steps(how))
    if ready or cpu_count() < 2 or not worth_compiling(config, split, plan):
        return []
    return [partial(compile_ahead, config, split, plan)]


def _trained(directory: RunDirectory, split: Split, progress: Progress) -> Trajectory:
    """The trajectory, with a note of what makes the rest of it."""
    if not all(directory.has_checkpoint(step) for step in planned_steps(directory.config.train)):
        directory.note_maker("training")
    return train(directory, split, lambda done, total: progress("training", done, total))


def _train(own: RunDirectory, split: Split) -> None:
    train(own, split)


def _reference(directory: RunDirectory) -> RunDirectory | None:
    config = directory.config
    for refinement in config.llc.refinements:
        if refinement.reference_layers is not None:
            return RunDirectory.create(directory.path / REFERENCE, config.as_reference(refinement.reference_layers))
    return None


def follow(
    directory: RunDirectory,
    trajectory: Trajectory,
    split: Split,
    names: Sequence[str],
    n_workers: int | None,
    progress: Progress,
    scheduler: str | None,
) -> LLCCurve:
    """The LLC of every component at every checkpoint, on the training data and on every refinement's."""
    config = directory.config
    plan = plan_units(config, names, split, trajectory.steps)
    found = {data: stored_estimates(directory, units, data) for data, units in plan.items()}
    total = sum(map(len, plan.values()))
    if sum(map(len, found.values())) < total:
        directory.note_maker("sampling")
    n_workers = n_workers or max(1, cpu_count() // config.llc.n_threads)
    loops = worth_compiling(config, split, plan)
    for data, units in plan.items():
        missing = with_company(trajectory, units, [unit for unit in units if unit not in found[data]])
        examples = split.distributions[data] if data else sampled_examples(config, split)
        seed = seeds.derive(config.seed, "refined", data) if data else config.seed
        work = estimate_units(trajectory, examples, missing, seed, n_workers, config.llc.n_threads, scheduler, loops)
        for unit, estimate in work:
            directory.write_estimate(unit[0], estimate, data)
            found[data][unit] = estimate
            progress("sampling", sum(map(len, found.values())), total)
    return curve_of(found, config, names, split)


def find_stages(curve: LLCCurve, config: RunConfig) -> tuple[Stage, ...]:
    """The stages of the model's curve; unhealthy points are left out, and the report counts them.

    None if too few points are left to find any: at the end of a long run that is a result, not an error.
    """
    if stage_points(curve).sum() < MIN_POINTS:
        return ()
    return detect_stages(curve, config.stages, drop_unhealthy=True, seed=config.seed)


def stored_estimates(directory: RunDirectory, units: list[Unit], data: str) -> dict[Unit, LLCEstimate]:
    """The units that are done already."""
    stored = {unit: directory.read_estimate(*unit, data) for unit in units}
    return {unit: estimate for unit, estimate in stored.items() if estimate is not None}
