import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import mechgrok

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = "modular-addition-quick"


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quick") / QUICK
    process = mechgrok("run", QUICK, "--out", path)
    assert process.returncode == 0, process.stderr
    return path


@pytest.mark.long
@pytest.mark.xdist_group("quick")
def test_the_quick_preset_still_says_what_the_baseline_says(quick_run: Path) -> None:
    """The project's own regression check."""
    process = mechgrok("check", quick_run, "--against", ROOT / "tests" / "baseline.json")
    assert (process.returncode, process.stdout.strip()) == (0, "nothing moved"), process.stdout


@pytest.mark.long
@pytest.mark.xdist_group("quick")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_on_the_quick_preset(notebook: Path, quick_run: Path) -> None:
    environment = os.environ | {"MECHGROK_PRESET": QUICK, "MECHGROK_RUN": str(quick_run)}
    command = [sys.executable, "-m", "pytest", "--nbmake", "-p", "no:xdist", "-q", str(notebook)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(notebook: Path) -> None:
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
