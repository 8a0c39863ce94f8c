"""kill -9 at several points of a real run; the same command again ends in the same bits."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mechgrok.store import RunDirectory
from tests.conftest import mechgrok
from tests.oracles import tiny_config

CONFIG = tiny_config(train={"n_steps": 300, "n_checkpoints": 9})


def files(path: Path) -> dict[str, bytes]:
    """Every result, by name; of llc.nc the numbers are in the estimates already."""
    kept = (
        p for p in path.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json", ".md", ".html", ".toml")
    )
    return {str(p.relative_to(path)): p.read_bytes() for p in kept}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "c.toml").write_text(CONFIG.to_toml())
    assert mechgrok("run", "c.toml", "--out", "run", "--workers", 1, cwd=folder).returncode == 0
    return files(folder / "run")


POINTS = {
    "in training": lambda run: len(list(run.glob("checkpoints/*.safetensors"))) >= 4,
    "as sampling begins": lambda run: len(list(run.glob("llc/*/*/*.safetensors"))) >= 1,
    "in sampling": lambda run: len(list(run.glob("llc/*/*/*.safetensors"))) >= 15,
    "when all is sampled": lambda run: (run / "llc.nc").exists(),
    "in the report": lambda run: (run / "report.json").exists(),
}


@pytest.mark.long
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_to_the_same_bits(point: str, undisturbed: dict, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(CONFIG.to_toml())
    command = [sys.executable, "-m", "mechgrok.cli", "run", "c.toml", "--out", "run", "--workers", "2"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not POINTS[point](tmp_path / "run"):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(files(tmp_path / "run")) < len(undisturbed)
    again = mechgrok("run", "c.toml", "--out", "run", "--workers", 1, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert files(tmp_path / "run") == undisturbed
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_training_resumes_inside_to_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Stop at every checkpoint in turn: each time a new process of training takes over."""
    from mechgrok import train
    from mechgrok.tasks import make_split

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise StopError

    split = make_split(CONFIG.task, CONFIG.seed)
    whole, broken = (RunDirectory.create(tmp_path / name, CONFIG) for name in ("whole", "broken"))
    train.train(whole, split)
    interruptions = 0
    while not broken.has_checkpoint(CONFIG.train.n_steps) and interruptions < 50:
        with pytest.raises(StopError):
            train.train(broken, split, stop)
        interruptions += 1
    assert interruptions == CONFIG.train.n_checkpoints
    assert files(whole.path) == files(broken.path)
