"""Work that another process does while this one goes on with its own."""

import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from mechgrok.errors import ConfigError
from mechgrok.pipeline import references
from mechgrok.schedule import alongside
from mechgrok.store import RunDirectory
from mechgrok.tasks import make_split
from mechgrok.train import planned_steps, train
from tests.planted import language_run_config


def _tell(path: Path, seconds: float) -> None:
    time.sleep(seconds)
    path.write_text(str(os.getpid()))


def _refuse() -> None:
    raise ConfigError("lower it")


def test_it_is_done_by_another_process_when_the_block_has_ended(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with alongside([partial(_tell, told, 0.5)], 2):
        assert not told.exists()
    assert int(told.read_text()) != os.getpid()


def test_one_worker_leaves_it_to_whoever_needs_it(tmp_path: Path) -> None:
    with alongside([partial(_tell, tmp_path / "told", 0.0)], 1):
        pass
    assert not (tmp_path / "told").exists()


def test_what_it_raises_is_raised() -> None:
    with pytest.raises(ConfigError, match="lower it"), alongside([_refuse], 2):
        pass


def test_another_process_trains_the_same_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechgrok.pipeline.cpu_count", lambda: 2)
    config = language_run_config()
    split = make_split(config.task, config.seed)
    by_other, by_this = (RunDirectory.create(tmp_path / name, config) for name in ("other", "this"))
    with alongside(references(by_other, split), 2):
        pass
    own = RunDirectory.create(by_this.path / "reference", config.as_reference(1))
    train(own, split)
    steps = planned_steps(own.config.train)
    there = RunDirectory.open(by_other.path / "reference")
    for step in steps:
        mine, theirs = own.read_checkpoint(step), there.read_checkpoint(step)
        assert mine[1] == theirs[1] and all(torch.equal(mine[0][name], theirs[0][name]) for name in mine[0])
    assert references(by_other, split) == []  # it is there
    monkeypatch.setattr("mechgrok.pipeline.cpu_count", lambda: 1)
    assert references(RunDirectory.create(tmp_path / "alone", config), split) == []  # no core is free
