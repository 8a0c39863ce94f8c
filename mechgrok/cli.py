"""The command line. Heavy imports live inside the commands, so that --help answers at once."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich import box
from rich.table import Table

from mechgrok.errors import ConfigError, MechgrokError
from mechgrok.import_command import import_
from mechgrok.terminal import err, out, print_note, print_trajectory, progress_bars

if TYPE_CHECKING:
    from mechgrok.types import Report, Study

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("import")(import_)

Source = Annotated[str, typer.Argument(help="A preset, or the path of a .toml file.")]
Run = Annotated[Path, typer.Argument(help="A run directory, such as runs/modular-addition.")]
Out = Annotated[Path | None, typer.Option("--out", help="The run directory; by default runs/<name>.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes that sample; by default one for each core.")]
Scheduler = Annotated[str | None, typer.Option(help="tcp://host:port of a Dask cluster that samples instead.")]


@app.callback()
def _about() -> None:
    """Interpretability of transformers through training: each finding tied to a stage of the LLC."""


@app.command()
def run(
    source: Source,
    out_dir: Out = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    memory: Annotated[
        float | None, typer.Option(help="GB that one estimate may take; by default the config's.")
    ] = None,
) -> None:
    """Train, sample, find the stages, analyse and report. Goes on where a killed run stopped."""
    if memory is not None and not memory > 0:
        raise ConfigError(f"--memory must be greater than 0, got {memory:g}")
    with progress_bars() as progress:
        progress("starting", 0, 1)  # TransformerLens takes seconds to import
        from analyses import contract
        from mechgrok import pipeline
        from mechgrok.config import load_config

        config = load_config(source) if memory is None else load_config(source).with_memory(memory)
        contract.check(config.analyses.names, config)  # refused before hours of work
        progress("starting", 1, 1)
        study = pipeline.run(config, out_dir, workers, progress, scheduler)
        reports = _analyse(study, study.config.analyses.names, progress, workers)
        path = _write_report(study, reports, out_dir or Path("runs") / study.config.name)
    _print_stages(study)
    for report in reports:
        _print_claims(report)
    out.print(f"report: {path}", soft_wrap=True)


@app.command()
def train(source: Source, out_dir: Out = None) -> None:
    """Train the model of a preset and keep its checkpoints."""
    with progress_bars() as progress:
        progress("starting", 0, 1)
        from mechgrok import pipeline

        progress("starting", 1, 1)
        trajectory = pipeline.train_only(source, out_dir, progress)
    print_trajectory(trajectory)


@app.command()
def llc(run_dir: Run, workers: Workers = None, scheduler: Scheduler = None) -> None:
    """Sample the LLC of every component at every checkpoint of a run."""
    with progress_bars() as progress:
        progress("starting", 0, 1)
        import numpy as np

        from mechgrok import pipeline
        from mechgrok.store import RunDirectory

        progress("starting", 1, 1)
        study = pipeline.run(RunDirectory.open(run_dir).config, run_dir, workers, progress, scheduler)
    curve = study.curve
    table = Table("step", *curve.components)
    for column, step in enumerate(curve.steps):
        marks = np.where(~curve.healthy[:, column], " !", np.where(curve.saturated[:, column], " ~", ""))
        cells = zip(curve.llc[:, column], curve.std_error[:, column], marks, strict=True)
        table.add_row(str(step), *(f"{value:.2f} ± {error:.2f}{mark}" for value, error, mark in cells))
    out.print(table)
    _print_audit(study)
    for (data, step, name, config), estimate in pipeline.doubtful_estimates(run_dir).items():
        setting = f"{data + ', ' if data else ''}localization {config.localization:g}, step size {config.step_size:g}"
        for mark, reasons in (("!", estimate.health.reasons), ("~", estimate.health.cautions)):
            if reasons:
                out.print(f"{mark} {name} at step {step}, {setting}: {'; '.join(reasons)}", soft_wrap=True)


@app.command()
def calibrate(
    run_dir: Run,
    sampler: Annotated[str | None, typer.Option(help="By default the run's own.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=0, help="By default the run's own; 0: all examples.")] = None,
    components: Annotated[str, typer.Option(help="Components to sweep on, with commas between.")] = "model",
    checkpoints: Annotated[
        int | None, typer.Option(min=1, help="How many checkpoints to sweep on; by default 3.")
    ] = None,
    workers: Workers = None,
) -> None:
    """Sweep nbeta, localization and step size on a trained run and recommend one setting for all of it.

    Writes calibration.svg, calibration.json and calibrated.toml, a config to run with, into the run
    directory. Exit code 1 if no sound setting was found.
    """
    with progress_bars() as progress:
        progress("starting", 0, 1)
        from mechgrok import pipeline

        progress("starting", 1, 1)
        changes: dict[str, Any] = {} if sampler is None else {"sampler": sampler}
        if batch_size is not None:
            changes["batch_size"] = batch_size or None
        found = pipeline.calibrate_run(run_dir, changes, components.split(","), checkpoints, workers, progress)
    out.print(f"{'sound' if found.sound else 'not sound'}:", markup=False)
    for reason in found.reasons:
        out.print(f"  {reason}", soft_wrap=True, markup=False)
    table = Table("step", "component", "LLC", "unhealthy because", box=box.SIMPLE)
    for trial in found.final:
        estimate = trial.estimate
        reasons = "; ".join(estimate.health.reasons)
        table.add_row(str(trial.step), estimate.component, f"{estimate.llc:.2f} ± {estimate.std_error:.2f}", reasons)
    out.print(table)
    out.print(f"figure: {run_dir / 'calibration.svg'}", soft_wrap=True)
    out.print(f"config: {run_dir / 'calibrated.toml'}", soft_wrap=True)
    raise typer.Exit(0 if found.sound else 1)


@app.command()
def stages(run_dir: Run) -> None:
    """Show the developmental stages of a finished run."""
    with progress_bars() as progress:
        study = _load(run_dir, progress)
    _print_stages(study)


@app.command()
def analyse(
    run_dir: Run,
    names: Annotated[list[str] | None, typer.Argument(help="Analyses; by default those of the run's config.")] = None,
) -> None:
    """Make analyses of a finished run and show their claims."""
    with progress_bars() as progress:
        study = _load(run_dir, progress)
        reports = _analyse(study, names or study.config.analyses.names, progress)
    for report in reports:
        _print_claims(report)


@app.command()
def report(run_dir: Run) -> None:
    """Write report.html, report.json and report.md of a finished run."""
    with progress_bars() as progress:
        study = _load(run_dir, progress)
        path = _write_report(study, _analyse(study, study.config.analyses.names, progress), run_dir)
    out.print(f"report: {path}", soft_wrap=True)


@app.command()
def check(
    run_dir: Run,
    against: Annotated[Path | None, typer.Option(help="The baseline to compare with.")] = None,
    write: Annotated[Path | None, typer.Option(help="Write the baseline here.")] = None,
) -> None:
    """Regression check: exit 1 if LLCs, stages or claims moved from a baseline beyond their error bars."""
    from mechgrok import store
    from mechgrok.regression import baseline_of, compare

    if (against is None) == (write is None):
        raise ConfigError("give either --against BASELINE to compare or --write BASELINE to make one")
    baseline = None if against is None else store.read_json(against)
    with progress_bars() as progress:
        study = _load(run_dir, progress)
        current = baseline_of(study, _analyse(study, study.config.analyses.names, progress))
    if against is None:
        store.write_json(cast(Path, write), current)
        out.print(f"baseline: {write}", soft_wrap=True)
        return
    moves = compare(cast("dict[str, Any]", baseline), current)
    for move in moves:
        out.print(f"moved: {move}", soft_wrap=True)
    out.print(f"{len(moves)} moved" if moves else "nothing moved")
    raise typer.Exit(1 if moves else 0)


@app.command("list")
def list_(root: Annotated[Path, typer.Option(help="Where the runs lie.")] = Path("runs")) -> None:
    """List presets, analyses and runs."""
    from analyses import REGISTRY
    from mechgrok import store
    from mechgrok.config import preset_names

    runs = ", ".join(map(str, store.run_directories(root)))
    out.print(f"presets:  {', '.join(preset_names())}", soft_wrap=True)
    out.print(f"analyses: {', '.join(REGISTRY)}", soft_wrap=True)
    out.print(f"runs:     {runs or f'none in {root}'}", soft_wrap=True)


def main() -> None:
    """Run the command line; a caller's mistake is one sentence on stderr and exit code 2."""
    try:
        app()
    except MechgrokError as error:
        err.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(2)


def _load(run_dir: Path, progress: Callable[[str, int, int], None]) -> "Study":
    progress("reading the run", 0, 1)
    from mechgrok import pipeline

    study = pipeline.load_study(run_dir)
    progress("reading the run", 1, 1)
    return study


def _analyse(
    study: "Study", names: Sequence[str], progress: Callable[[str, int, int], None], workers: int | None = None
) -> list["Report"]:
    from joblib import cpu_count

    import analyses
    from analyses import contract

    names = list(dict.fromkeys(names))
    for name in names:
        contract.applicable(name, study.config.task.name)
    reports = []
    for done, name in enumerate(names):
        progress("analysing", done, len(names))
        reports.append(analyses.run(name, study, workers or cpu_count()))
    progress("analysing", len(names), len(names))
    return reports


def _write_report(study: "Study", reports: Sequence["Report"], run_dir: Path) -> Path:
    from analyses import render
    from mechgrok.store import RunDirectory

    directory = RunDirectory.open(run_dir)
    with directory.locked():
        directory.write_json("report.json", render.to_json(study, reports))
        directory.write_text("report.md", render.to_markdown(study, reports))
        return directory.write_text("report.html", render.to_html(study, reports))


def _print_audit(study: "Study") -> None:
    from analyses.render import audit_note

    if note := audit_note(study):
        print_note(note)


def _print_stages(study: "Study") -> None:
    from analyses.render import stage_row

    _print_audit(study)
    if not study.stages:
        out.print(
            "no stage was found: the LLC curve cannot be told from a constant, or too few of its points are healthy"
        )
        return
    titles = ("stage", "LLC", "from", "to", "end, interval", "change of LLC", "of train loss")
    table = Table(*titles, title="stages of the LLC", title_justify="left", box=box.SIMPLE)
    for stage in study.stages:
        table.add_row(*stage_row(stage).values())
    out.print(table)


def _print_claims(report: "Report") -> None:
    from analyses.render import claim_row

    table = Table(title=f"claims: {report.analysis}", title_justify="left", box=box.SIMPLE)
    for title in ("", "stage", "value", "threshold", "vs random", "by chance"):
        table.add_column(title, no_wrap=True)
    table.add_column("claim")
    for one in report.claims:
        row = claim_row(one)
        verdict = f"[{'green' if one.holds else 'red'}]{row['holds']}"
        table.add_row(verdict, row["stage"], row["value"], row["threshold"], row["null"], row["chance"], row["text"])
    out.print(table)


if __name__ == "__main__":
    main()
