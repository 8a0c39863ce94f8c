import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mechgrok import pipeline, seeds
from mechgrok.config import parse_config
from mechgrok.errors import CheckpointError, RunDirectoryError
from mechgrok.store import RunDirectory, compiled_folder, read_json, run_directories, write_json
from mechgrok.types import CheckpointMetrics
from tests.oracles import tiny_config

METRICS = CheckpointMetrics(5, 0.1, 1 / 3, 1.0, float("nan"))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", tiny_config())


@pytest.fixture
def copied(tiny_run: tuple, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run[0], tmp_path / "copy"))


def test_checkpoints_keep_every_bit_and_their_metrics(run: RunDirectory) -> None:
    tensors = {
        "a": torch.randn(3, 4, generator=seeds.stream(0)),
        "b": torch.tensor([float("inf"), -0.0]),
    }
    run.write_checkpoint(tensors, METRICS)
    read, metrics = run.read_checkpoint(5)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert repr(metrics) == repr(METRICS)
    with safe_open(run.path / "checkpoints" / "step-00000005.safetensors", "pt") as file:
        assert '"train_loss": 0.1' in file.metadata()["mechgrok"]  # plain text, readable without us


def test_estimates_keep_every_number(tiny_run: tuple) -> None:
    study = tiny_run[1]
    run = RunDirectory.open(tiny_run[0])
    llc = study.config.llc
    estimate = run.read_estimate(40, "L0H1", llc.sampling)
    assert estimate.llc == study.curve.llc[study.curve.row("L0H1"), -1]
    assert estimate.llc == llc.sampling.nbeta * (estimate.losses.mean() - estimate.init_loss)
    assert run.read_estimate(40, "L0H1", llc.control) is None  # the control follows the model alone
    assert run.read_estimate(40, "model", llc.control).config == llc.control


def rewritten(run: RunDirectory, edit: Callable[[dict], None]) -> None:
    """The estimate of L0H1 at step 40, with its record edited."""
    sampling = run.config.llc.sampling
    path = run._estimate(40, "L0H1", sampling, "")
    tensors, record = run._read_tensors(path, "estimate")
    edit(record["estimate"])
    run._write_tensors(path, tensors, {key: value for key, value in record.items() if key != "config"})


def test_estimates_of_older_runs_are_read_and_those_of_later_ones_are_refused(copied: Path) -> None:
    run = RunDirectory.open(copied)

    def as_before(record: dict) -> None:
        del record["llc_variance"], record["llc_variance_error"]
        known = [
            "r_hat",
            "ess",
            "drift",
            "drifting",
            "diverged",
            "escaped",
            "saturation",
            "saturated",
            "acceptance",
            "reasons",
        ]
        record["health"] = {key: record["health"][key] for key in known}

    now = run.read_estimate(40, "L0H1", run.config.llc.sampling)
    assert now.health.top_share > 0 and np.isfinite(now.llc_variance)
    rewritten(run, as_before)
    before = run.read_estimate(40, "L0H1", run.config.llc.sampling)
    assert (before.llc, before.health.reasons) == (now.llc, now.health.reasons)
    assert np.isnan(before.llc_variance) and np.isnan(before.health.top_share)
    assert np.isnan(pipeline.load_study(copied).curve.llc_variance).sum() == 1
    rewritten(run, lambda record: record.update(of_the_future=1))
    with pytest.raises(CheckpointError, match=r"another version of mechgrok; delete that file"):
        run.read_estimate(40, "L0H1", run.config.llc.sampling)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_text("note.txt", "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunDirectoryError, match="cannot write .*note.txt: disk full"):
        run.write_text("note.txt", "new")
    assert (run.path / "note.txt").read_text() == "old"
    assert sorted(p.name for p in run.path.iterdir()) == ["config.toml", "note.txt"]


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_checkpoint_is_named(copied: Path, keep: int) -> None:
    path = copied / "checkpoints" / "step-00000040.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"step-00000040.safetensors is truncated.*delete that file"):
        pipeline.load_study(copied)


def test_a_flipped_bit_an_edited_number_and_a_swapped_file_are_noticed(copied: Path) -> None:
    path = copied / "checkpoints" / "step-00000040.safetensors"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-3] ^= 1
    edited = good.replace(b'\\"test_accuracy\\": 0', b'\\"test_accuracy\\": 1')
    assert edited != good
    for bad in (bytes(flipped), edited):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="SHA-256 differs"):
            pipeline.load_study(copied)
    shutil.copy(copied / "checkpoints" / "step-00000000.safetensors", path)
    with pytest.raises(CheckpointError, match="holds step 0"):
        pipeline.load_study(copied)


def test_an_estimate_under_another_name_is_noticed(copied: Path) -> None:
    folder = copied / "llc" / "localization-200.0-step-size-0.001"
    shutil.copy(folder / "L0H0" / "step-00000040.safetensors", folder / "L0H1" / "step-00000040.safetensors")
    with pytest.raises(CheckpointError, match="holds another estimate than its name says"):
        pipeline.load_study(copied)


def test_a_file_of_another_kind_is_noticed(copied: Path) -> None:
    estimate = copied / "llc" / "localization-200.0-step-size-0.001" / "L0H0" / "step-00000040.safetensors"
    checkpoint = copied / "checkpoints" / "step-00000040.safetensors"
    kept = checkpoint.read_bytes()
    shutil.copy(estimate, checkpoint)
    with pytest.raises(CheckpointError, match="holds something else than its name says"):
        pipeline.load_study(copied)
    checkpoint.write_bytes(kept)
    shutil.copy(checkpoint, estimate)
    with pytest.raises(CheckpointError, match="holds something else than its name says"):
        pipeline.load_study(copied)


def test_foreign_safetensors_and_other_configurations_are_refused(copied: Path, tmp_path: Path) -> None:
    path = copied / "checkpoints" / "step-00000040.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="was not written by mechgrok"):
        pipeline.load_study(copied)
    other = RunDirectory.create(tmp_path / "other", tiny_config(train={"weight_decay": 0.5}))
    other.write_checkpoint({"a": torch.zeros(2)}, METRICS)
    shutil.copy(other.path / "checkpoints" / "step-00000005.safetensors", path)
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        pipeline.load_study(copied)


def test_a_changed_config_toml_is_blamed_and_not_the_files_made_before(copied: Path) -> None:
    config = copied / "config.toml"
    config.write_text(config.read_text().replace("nbeta = 10.0", "nbeta = 11.0"))
    with pytest.raises(CheckpointError) as error:
        pipeline.run(config, copied, n_workers=1)
    path = copied / "checkpoints" / "step-00000000.safetensors"
    assert str(error.value) == (
        f"{path} belongs to another configuration than {config}; if that was changed in more than "
        "stages and analyses, put it back as it was, or run it with another --out"
    )


def test_a_run_that_has_ended_is_read_without_the_device_that_made_it(
    tiny_run: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(llc={"sampling": tiny_run[1].config.llc.sampling.model_dump() | {"device": "cuda"}})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "llc.nc").touch()
    with pytest.raises(RunDirectoryError, match="is not a mechgrok run"):  # and not that cuda is missing
        pipeline.run(config, tmp_path, n_workers=1)


def test_what_is_damaged_or_missing_is_named_with_what_to_do(copied: Path) -> None:
    (copied / "made-with.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="made-with.json is damaged; delete it"):
        pipeline.load_study(copied)
    config = (copied / "config.toml").read_text()
    (copied / "config.toml").unlink()
    with pytest.raises(RunDirectoryError, match="has checkpoints but no config.toml; put that back as it was"):
        RunDirectory.create(copied, parse_config(config, "config.toml"))
    with pytest.raises(RunDirectoryError, match="it is a folder; give the name of a file"):
        write_json(copied, {})


def test_a_changed_config_is_refused_and_nothing_is_lost(tiny_run: tuple) -> None:
    path = tiny_run[0]
    before = sorted((p, p.stat().st_mtime_ns) for p in path.rglob("*"))
    with pytest.raises(RunDirectoryError, match=r"another configuration \(train.weight_decay: 1.0 -> 0.5\)"):
        pipeline.run(tiny_config(train={"weight_decay": 0.5}), path, n_workers=1)
    assert sorted((p, p.stat().st_mtime_ns) for p in path.rglob("*")) == before


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(RunDirectoryError, match="is not a mechgrok run"):
        RunDirectory.create(tmp_path, tiny_config())
    with pytest.raises(RunDirectoryError, match="is not a mechgrok run"):
        RunDirectory.open(tmp_path)
    with pytest.raises(RunDirectoryError, match="is not a mechgrok run"):
        RunDirectory.create(tmp_path / "thesis.tex", tiny_config())


def test_what_a_killed_process_left_is_swept_up_and_does_not_block_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / ".config.toml.ab12.tmp").write_text("name = ")  # killed while it wrote the very first file
    run = RunDirectory.create(path, tiny_config())
    with run.locked():
        assert sorted(p.name for p in path.iterdir()) == [".lock", "config.toml"]


def test_two_processes_do_not_write_one_run(run: RunDirectory) -> None:
    second = RunDirectory.open(run.path)
    in_use = pytest.raises(RunDirectoryError, match="in use by another mechgrok process")
    with run.locked(), in_use, second.locked():
        raise AssertionError("both hold the lock")


def test_each_maker_of_a_part_is_kept_once(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.makers() == {}
    for version in ("1", "1", "2"):
        monkeypatch.setattr("mechgrok.store.made_with", lambda version=version: {"torch": version})
        run.note_maker("sampling")
    assert run.makers() == {"sampling": [{"torch": "1"}, {"torch": "2"}]}


def test_a_finished_run_is_not_done_again_and_reads_the_same(tiny_run: tuple) -> None:
    path, study = tiny_run
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*.safetensors")}
    again, loaded = pipeline.run(tiny_config(), path, n_workers=1), pipeline.load_study(path)
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*.safetensors")} == before
    for other in (again, loaded):
        assert np.array_equal(other.curve.llc, study.curve.llc)
        assert other.stages == study.stages
        assert other.trajectory.metrics == study.trajectory.metrics


def test_an_unfinished_run_is_not_loaded(copied: Path) -> None:
    (copied / "llc" / "localization-200.0-step-size-0.001" / "model" / "step-00000040.safetensors").unlink()
    with pytest.raises(RunDirectoryError, match="39 of 40 estimates; run `mechgrok run` again"):
        pipeline.load_study(copied)


def test_a_deleted_checkpoint_is_made_again_with_the_same_bits(copied: Path, tiny_run: tuple) -> None:
    names = [p.name for p in sorted((copied / "checkpoints").iterdir())]
    for name in (names[2], names[-1]):
        (copied / "checkpoints" / name).unlink()
        pipeline.run(tiny_config(), copied, n_workers=1)
        assert (copied / "checkpoints" / name).read_bytes() == (tiny_run[0] / "checkpoints" / name).read_bytes()


def test_runs_are_found_and_bad_json_is_named(run: RunDirectory, tmp_path: Path) -> None:
    assert run_directories(tmp_path) == [run.path]
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="bad.json is not valid JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(RunDirectoryError, match="cannot read"):
        read_json(tmp_path / "none.json")


def test_what_was_compiled_is_kept_apart_for_each_state_of_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MECHGROK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.py").write_text("x = 1")
    before = compiled_folder(tmp_path)
    assert compiled_folder(tmp_path) == before and before.parent == tmp_path / "cache"
    (tmp_path / "a.py").write_text("x = 2")
    assert compiled_folder(tmp_path) != before


@pytest.mark.skipif(os.name != "posix", reason="permissions of another kind")
def test_a_folder_that_others_can_write_keeps_nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba unpickles what it finds there."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MECHGROK_CACHE", str(folder))
    assert compiled_folder(tmp_path) is not None and folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o755)
    assert compiled_folder(tmp_path) is not None
    folder.chmod(0o775)
    assert compiled_folder(tmp_path) is None
    monkeypatch.setenv("MECHGROK_CACHE", str(tmp_path / "a file" / "below"))
    (tmp_path / "a file").write_text("")
    assert compiled_folder(tmp_path) is not None  # numba will find no place there by itself
