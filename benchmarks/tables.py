"""Tables of the benchmarks, as Markdown."""

import argparse
from collections.abc import Sequence
from pathlib import Path

Section = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # (title, column names, rows)


def asked_target() -> str | None:
    """The file that the command line asks to write the tables to, if any."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", help="also write the tables to this Markdown file")
    return parser.parse_args().write


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def written(sections: Sequence[Section], about: str, seconds: float, target: str | None) -> None:
    """Print the sections; write them to `target` too, under a title, if one is given."""
    text = "\n\n".join(f"## {title}\n\n{markdown(columns, rows)}" for title, columns, rows in sections)
    print(f"{text}\n\n{seconds / 60:.1f} minutes")
    if target is not None:
        first, rest = about.strip().split("\n", 1)
        Path(target).write_text(
            f"# {first.rstrip('.')}\n{rest.rstrip()}\n\nTook {seconds / 60:.1f} minutes.\n\n{text}\n"
        )
