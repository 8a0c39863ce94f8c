"""In place of training: checkpoints that were trained elsewhere are found, held against each other, and made a run."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mechgrok.config import ImportedConfig, RunConfig, load_config
from mechgrok.errors import CheckpointError, ConfigError
from mechgrok.outside.audit import Audit, Finding, audit
from mechgrok.outside.expected import ExpectedLoss
from mechgrok.outside.find import open_source
from mechgrok.outside.sources import Source, check_fits
from mechgrok.plan import checked_split
from mechgrok.store import RunDirectory
from mechgrok.train import import_trajectory, metrics_of
from mechgrok.types import Split, Trajectory

Progress = Callable[[str, int, int], None]  # (what is going on, done, total)
Note = Callable[[str], None]
# What an import is refused for, and what to do.
REFUSED = {"not finite": "leave that step out of train.checkpoints", "loss": "correct the one that is wrong"}


def silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


def unsaid(text: str) -> None:
    """No note printed."""


def import_run(
    source: str,
    config: str | Path | RunConfig,
    out: str | Path | None = None,
    progress: Progress = silent,
    expected: Sequence[ExpectedLoss] = (),
    note: Note = unsaid,
) -> Trajectory:
    """A run of checkpoints that were trained elsewhere, in place of training; `run` and the rest go on from it.

    What `outside.audit` finds is kept in audit.json; the steps that it names are kept out of the stages and the
    analyses.

    Args:
        source: see `mechgrok.outside.find`. config: settings whose [train] is `source = "imported"` with the steps.
        expected: losses that steps are known to have.
        note: is told what was chosen or left out, and which steps are named.

    Raises:
        ConfigError, CheckpointError, RunDirectoryError: what is missing or does not fit. Before anything is written:
            a parameter that is not finite, or another loss than expected.
    """
    config = load_config(config)
    split, found, steps = _imported(source, config)
    audited = _audited(found, steps, config, split, expected, progress)
    for finding in audited.findings:
        if finding.kind in REFUSED:
            raise CheckpointError(f"{source} at step {finding.step} {finding.why}; {REFUSED[finding.kind]}")
    directory = RunDirectory.create(out or Path("runs") / config.name, config)
    with directory.locked():
        trajectory = import_trajectory(directory, split, found, lambda done, total: progress("importing", done, total))
        directory.write_json("import.json", {"kind": found.kind, "source": found.name, "notes": found.notes})
        directory.write_json("audit.json", {"named": {str(step): why for step, why in audited.named.items()}})
    for text in found.notes:
        note(text)
    for step, why in audited.named.items():
        note(f"step {step} {why}; kept out of the stages and the analyses")
    return trajectory


def audit_source(
    source: str,
    config: str | Path | RunConfig | None = None,
    expected: Sequence[ExpectedLoss] = (),
    progress: Progress = silent,
    note: Note = unsaid,
) -> Audit:
    """What `outside.audit` finds in checkpoints, and which have another loss than expected. Nothing is written.

    Args:
        config: where it is given, the steps are its own and not all of the source's.

    Raises:
        ConfigError, CheckpointError: what is missing, cannot be read or does not fit.
    """
    if config is None:
        found = open_source(source)
        audited = _audited(found, found.steps, None, None, expected, progress)
    else:
        config = load_config(config)
        split, found, steps = _imported(source, config)
        audited = _audited(found, steps, config, split, expected, progress)
    for text in found.notes:
        note(text)
    return audited


def import_template(source: str) -> RunConfig:
    """Settings to begin with for an import: model and steps of the source, the rest from the preset heads-planted.

    Raises:
        ConfigError: as `open_source`, or the source does not tell the model's shape.
    """
    found, base = open_source(source), load_config("heads-planted")
    shape = found.shape(found.steps[-1])
    if shape is None:
        raise ConfigError(f"{source} has no config.json; save `cfg.to_dict()` as that, or write [model] by hand")
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(found.name).name).strip("-") or "imported"
    refinements = tuple(one for one in base.llc.refinements if one.reference_layers is None)
    return base.model_copy(
        update={
            "name": name,
            "model": shape,
            "train": ImportedConfig(source="imported", checkpoints=found.steps),
            "llc": base.llc.model_copy(update={"refinements": refinements}),
        }
    )


def _imported(source: str, config: RunConfig) -> tuple[Split, Source, tuple[int, ...]]:
    """(data, checkpoints, steps) of an import, checked against each other."""
    if not isinstance(config.train, ImportedConfig):
        raise ConfigError(
            f'[train] of {config.name} describes training; for an import write source = "imported" and '
            "checkpoints = [...], the steps"
        )
    split, _ = checked_split(config)
    found = open_source(source)
    check_fits(found, config.model, split, config.train.checkpoints)
    return split, found, config.train.checkpoints


def _audited(
    found: Source,
    steps: Sequence[int],
    config: RunConfig | None,
    split: Split | None,
    expected: Sequence[ExpectedLoss],
    progress: Progress,
) -> Audit:
    for one in expected:
        if config is None or split is None or one.step not in steps:
            raise ConfigError(f"a loss is expected at step {one.step}, which is none of [train] checkpoints")

    def read() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for done, step in enumerate(steps):
            progress("auditing", done, len(steps))
            yield step, found.parameters_at(step, config.model if config else None, split)
        progress("auditing", len(steps), len(steps))

    audited = audit(read())
    broken = {finding.step for finding in audited.findings if finding.kind == "not finite"}
    losses = []
    for one in expected:
        if config is not None and split is not None and one.step not in broken:
            model = found.model_at(one.step, config.model, split)
            loss = metrics_of(model, split, one.step, config.llc.n_examples is None).train_loss
            if (why := one.against(loss)) is not None:
                losses.append(Finding(one.step, "loss", why))
    return replace(audited, findings=(*audited.findings, *losses))
