"""`mechgrok import`: checkpoints that were trained elsewhere, held against each other and made a run of."""

from pathlib import Path
from typing import Annotated

import typer

from mechgrok.errors import ConfigError
from mechgrok.terminal import out, print_note, print_trajectory, progress_bars


def import_(
    source: Annotated[
        str, typer.Argument(help="A folder of checkpoints, one file, or a name that TransformerLens knows.")
    ],
    config: Annotated[Path | None, typer.Option(help="A .toml file that describes the run.")] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="The run directory; by default runs/<name>.")] = None,
    init: Annotated[bool, typer.Option("--init", help="Only print such a file to begin with.")] = False,
    audit: Annotated[
        bool, typer.Option("--audit", help="Only hold the checkpoints against each other; exit 1 if any stands out.")
    ] = False,
    expect_loss: Annotated[
        list[str] | None, typer.Option(help="STEP=NATS: the train loss that a step is known to have.")
    ] = None,
) -> None:
    """Make a run of checkpoints that were trained elsewhere; see docs/import.md."""
    if init and (config is not None or audit) or not (init or audit or config is not None):
        raise ConfigError(
            "give either --config my.toml to import, --init to print a config to begin with, or --audit to look alone"
        )
    if init and out_dir is not None:
        raise ConfigError("--init writes no run, so leave --out out")
    if audit and out_dir is not None:
        raise ConfigError("--audit makes no run directory; leave --out out, or leave --audit out to import")
    if expect_loss and config is None:
        raise ConfigError("--expect-loss needs --config my.toml, whose task tells the data")
    with progress_bars() as progress:
        progress("starting", 0, 1)
        from mechgrok import importing
        from mechgrok.outside.expected import ExpectedLoss

        progress("starting", 1, 1)
        expected = [ExpectedLoss.parse(text) for text in expect_loss or ()]
        if init:
            text = importing.import_template(source).to_toml()
        elif audit:
            found = importing.audit_source(source, config, expected, progress, print_note)
        elif config is not None:
            trajectory = importing.import_run(source, config, out_dir, progress, expected, print_note)
    if init:
        notice = f"# [model] and [train] are those of {source}. Choose the task and how to sample."
        out.print(f"{notice}\n{text}", end="", markup=False, soft_wrap=True)
    elif audit:
        for step, why in found.named.items():
            out.print(f"step {step}: {why}", markup=False, soft_wrap=True)
        out.print(
            f"{len(found.named) or 'none'} of {len(found.steps)} steps named; neighbouring steps lie "
            f"{found.typical_distance:.3g} apart (median of the relative distances)",
            soft_wrap=True,
        )
        raise typer.Exit(1 if found.named else 0)
    else:
        print_trajectory(trajectory)
