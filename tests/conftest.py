import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mechgrok import pipeline
from mechgrok.types import Study
from tests.oracles import tiny_config
from tests.planted import language_run_config

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study]:
    """A finished tiny run and its study."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    return path, pipeline.run(tiny_config(), path, n_workers=1)


@pytest.fixture(scope="session")
def language_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study]:
    """A finished tiny run on the planted language and its study."""
    path = tmp_path_factory.mktemp("runs") / "language"
    return path, pipeline.run(language_run_config(), path, n_workers=1)


def mechgrok(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "mechgrok.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
