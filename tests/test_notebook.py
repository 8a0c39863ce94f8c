import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import mechgrok

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = {"modular_addition": "modular-addition-quick", "heads": "heads-planted-quick"}


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The finished run of a quick preset, made when it is first asked for."""

    @functools.cache
    def finished(preset: str) -> Path:
        path = tmp_path_factory.mktemp("quick") / preset
        process = mechgrok("run", preset, "--out", path)
        assert process.returncode == 0, process.stderr
        return path

    return finished


@pytest.mark.long
@pytest.mark.xdist_group("quick")
def test_the_quick_preset_still_says_what_the_baseline_says(quick_run: Callable[[str], Path]) -> None:
    """The project's own regression check."""
    process = mechgrok("check", quick_run("modular-addition-quick"), "--against", ROOT / "tests" / "baseline.json")
    assert (process.returncode, process.stdout.strip()) == (0, "nothing moved"), process.stdout


@pytest.mark.long
@pytest.mark.xdist_group("quick")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_on_the_quick_presets(notebook: Path, quick_run: Callable[[str], Path]) -> None:
    preset = QUICK[notebook.stem]
    environment = os.environ | {"MECHGROK_PRESET": preset, "MECHGROK_RUN": str(quick_run(preset))}
    command = [sys.executable, "-m", "pytest", "--nbmake", "-p", "no:xdist", "-q", str(notebook)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(notebook: Path) -> None:
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
