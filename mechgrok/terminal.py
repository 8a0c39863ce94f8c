"""What the commands print with: results on stdout, bars and notes on stderr."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mechgrok.types import Trajectory

# Piped output is not cut to a terminal's 80 columns.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
err = Console(stderr=True, highlight=False)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, total) that draws bars with the time remaining on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def print_note(text: str) -> None:
    """Something that was chosen or left out, or that is to be looked at, on stderr."""
    err.print(f"note: {text}", markup=False, soft_wrap=True)


def print_trajectory(trajectory: "Trajectory") -> None:
    """Losses and accuracies by step."""
    table = Table("step", "train loss", "test loss", "train accuracy", "test accuracy")
    for row in trajectory.metrics:
        numbers = (row.train_loss, row.test_loss, row.train_accuracy, row.test_accuracy)
        table.add_row(str(row.step), *(f"{number:.3g}" for number in numbers))
    out.print(table)
