"""Every benchmark that can be called runs to its end at a size that takes seconds; what it prints is no measurement."""

import ast
import re
import runpy
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import joblib
import pytest

import mechgrok as mg
from benchmarks import (
    accuracy,
    calibration,
    coverage,
    effective,
    grokking_seeds,
    head_seeds,
    head_settings,
    main_job,
    scaling,
    speed,
)
from mechgrok.llc.calibrate import calibrate
from mechgrok.types import Study
from tests.planted import language_run_config
from tests.settings_walk import SHORT
from tests.truth import crossing_case, deep_linear_case, reduced_rank_case, regular

ROOT = Path(__file__).parent.parent


class Toy:
    """A benchmark with other sizes, called as from the command line, and what it printed."""

    def __init__(self, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, folder: Path):
        self.patch, self.capsys, self.folder = patch, capsys, folder

    def __call__(self, module: ModuleType, *arguments: Any, flags: tuple[str, ...] = (), **sizes: Any) -> str:
        for name, value in sizes.items():
            self.patch.setattr(module, name, value)
        self.patch.setattr(sys, "argv", [module.__name__, *flags])
        module.main(*arguments)
        return self.capsys.readouterr().out


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Iterator[Toy]:
    monkeypatch.chdir(tmp_path)
    with joblib.parallel_config(backend="sequential"):  # other processes would have the sizes as they are
        yield Toy(monkeypatch, capsys, tmp_path)


def rows(text: str) -> dict[str, list[list[str]]]:
    """The cells of each table of a Markdown text, by its title."""
    found: dict[str, list[list[str]]] = {}
    for section in text.split("## ")[1:]:
        title, *lines = section.splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
        found[title] = cells[2:]
    return found


def test_each_benchmark_with_a_main_is_run_here() -> None:
    nodes = [node for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Call)]
    called = {ast.unparse(node.args[0]) for node in nodes if ast.unparse(node.func) == "toy"}
    sources = {path.stem: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    has_main = {name for name, text in sources.items() if re.search(r"^def main", text, re.M)}
    assert called == has_main
    assert len(has_main) > 8


@pytest.mark.long
def test_accuracy(toy: Toy) -> None:
    toy.patch.setattr(coverage, "N_RUNS", 2)
    toy.patch.setattr(coverage, "N_RUNS_WITH_BATCHES", 2)
    few = {"n_chains": 2, "n_burnin": 10, "n_draws": 20}
    found = rows(
        toy(
            accuracy, _budget=lambda case: few, other_cases=lambda: [regular([1.0]), crossing_case((2, 2))],
            learning_cases=lambda: [reduced_rank_case(4, 4, 4, 2), deep_linear_case((5, 6, 5, 6), 2)],
            masked_cases=lambda: [regular([0.1, 1.0], 1)],
        )
    )  # fmt: skip
    assert len(found["Case by case"]) == 2 and len(found["By sampler: the cases below 50000 parameters"]) == 7
    assert len(found["Coverage of the 95 % interval"]) == 20


@pytest.mark.long
def test_calibration(toy: Toy) -> None:
    small = partial(calibrate, nbetas=(10.0,), localizations=(1e4,), n_chains=2)
    toy.patch.setattr(mg, "calibrate", lambda *args, n_workers, **more: small(*args, n_workers=1, **more))
    models = partial(calibration.modular_addition, steps=(1,))
    found = rows(toy(calibration, STEPS=(1,), modular_addition=lambda preset, steps: models(preset)))
    assert [row[0] for row in found["What was recommended"]][2:] == ["planted sequences, 2 layers", "sorter, 1 layer"]


def test_effective(toy: Toy) -> None:
    sizes = {"N_CHAINS": 2, "N_DRAWS": 8, "N_BURNIN": 1}
    found = rows(toy(effective, SHAPES={"small": speed.TOY, "modular-addition": speed.TOY}, **sizes))
    assert [len(table) for table in found.values()] == [9, 9]  # four samplers of each target, heads with a witness


def test_grokking_seeds(toy: Toy) -> None:
    Path("short.toml").write_text(SHORT.to_toml())
    lines = toy(grokking_seeds, 2, "short.toml").splitlines()
    assert [line.split()[0] for line in lines] == ["seed", "0", "1"]


def test_main_job(toy: Toy) -> None:
    Path("short.toml").write_text(SHORT.to_toml())
    text = toy(main_job, "short.toml")
    assert "training, 2 steps" in text and "report" in text and "largest process" in text


@pytest.fixture
def small_preset(toy: Toy) -> None:
    """heads-planted and its control, as small as their analyses allow."""
    small = language_run_config(train={"n_steps": 20, "n_checkpoints": 6}, analyses={"names": ("mechanisms",)})
    toy.patch.setattr(head_seeds, "load_config", lambda name: small.model_copy(update={"name": name}))
    toy.patch.setattr(head_seeds, "N_WORKERS", 1)


def test_head_seeds(toy: Toy, small_preset: None) -> None:
    found = rows(toy(head_seeds, SEEDS=(0,)))
    assert [row[0] for row in found["LLC of the model while induction forms"]] == ["0", "0"]
    assert {row[0] for row in found["Claims"]} == {"mechanisms"}


def test_head_settings(toy: Toy, small_preset: None) -> None:
    # Of 20 steps no induction head comes.
    toy.patch.setattr(head_settings.specialization, "prepare", lambda model, split: {"induction head": ("L1H0",)})
    found = rows(toy(head_settings, N_WORKERS=1, STEPS=(20,)))
    assert len(found["All heads on the training data"]) == 5


@pytest.mark.long
def test_scaling(toy: Toy) -> None:
    deep = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_head": 4}
    shapes = {"modular-addition": speed.TOY, "paper": language_of_two_layers()}
    found = rows(toy(scaling, N_HEADS=(2, 2, 2), DEEP=deep, SHAPES=shapes, DURATION=0.1))
    assert [len(table) for table in found.values()] == [5, 3, 1, 2, 2]


def language_of_two_layers() -> speed.Shape:
    make = speed.language(24, 8, 32, n_layers=2, d_model=8, n_heads=2, d_head=4)
    return speed.Shape("two layers", make, 2, speed.TOY.settings, 8, 8)


@pytest.mark.long
def test_speed(toy: Toy) -> None:
    toy.patch.setenv("PYTHONPATH", str(ROOT))
    found = rows(toy(speed, flags=("--shapes", "toy", "--engines", "mechgrok", "plain path")))
    ((title, table),) = found.items()
    assert title.startswith("toy: ") and [row[1] for row in table] == ["mechgrok", "plain path", "devinterp"] * 2


def test_the_docs_figures(tiny_run: tuple[Path, Study], toy: Toy) -> None:
    Path("docs/images").mkdir(parents=True)
    main = runpy.run_path(str(ROOT / "docs" / "make_figures.py"))["main"]
    main(str(tiny_run[0]), "tiny")
    assert {path.name for path in Path("docs/images").iterdir()} == {"tiny-llc.png", "tiny-heads.png"}
