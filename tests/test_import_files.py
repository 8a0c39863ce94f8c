"""Checkpoints as people have them: their files, names and folders are read, or refused in one sentence."""

import argparse
import ast
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechgrok import pipeline
from mechgrok.errors import CheckpointError, ConfigError
from mechgrok.model import build_model
from mechgrok.outside.find import open_source
from mechgrok.outside.names import step_of
from mechgrok.outside.tensor_files import KEYS, read_tensors
from tests.oracles import tiny_config
from tests.outside_models import SPLIT, checkout, neox, outside_config

SHAPE = tiny_config().model
ROOT = Path(__file__).parent.parent


def state_at(step: int) -> dict[str, Tensor]:
    return dict(build_model(SHAPE, SPLIT, step).state_dict())


def logits_at(step: int) -> Tensor:
    return build_model(SHAPE, SPLIT, step)(SPLIT.test.tokens)


def imported(source: Path, steps: tuple[int, ...], out: Path) -> list[str]:
    """Import and hold every step's logits to those of the model that was saved: the notes."""
    notes: list[str] = []
    trajectory = pipeline.import_run(str(source), outside_config(SHAPE, steps), out, note=notes.append)
    assert trajectory.steps == steps
    for step, model in trajectory:
        assert torch.equal(model(SPLIT.test.tokens), logits_at(step))
    assert json.loads((out / "import.json").read_text())["notes"] == notes
    return notes


# ---- .pt and .pth


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("key", [None, *KEYS])
def test_files_of_torch_save_are_read(key: str | None, suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for step in (0, 5):
        weights = state_at(step)
        optimizer = torch.optim.AdamW(build_model(SHAPE, SPLIT, 0).parameters()).state_dict()
        whole = weights if key is None else {key: weights, "optimizer": optimizer, "epoch": 3, "loss": 1.5}
        torch.save(whole, folder / f"step-{step}{suffix}")
    torch.save(optimizer, folder / "optimizer.pt")  # beside them
    notes = imported(folder, (0, 5), tmp_path / "run")
    assert notes == ([] if key is None else [f"of each file the state dict under {key!r} is read"])


def test_a_single_file_is_a_trajectory_of_one_step(tmp_path: Path) -> None:
    torch.save(state_at(0), tmp_path / "sorter.pt")
    assert imported(tmp_path / "sorter.pt", (0,), tmp_path / "run") == ["sorter.pt names no step, so it is step 0"]
    torch.save(state_at(70), tmp_path / "sorter_epoch_70.pth")
    assert not imported(tmp_path / "sorter_epoch_70.pth", (70,), tmp_path / "other")
    save_file(state_at(9), tmp_path / "step-9.safetensors")
    assert not imported(tmp_path / "step-9.safetensors", (9,), tmp_path / "third")
    (tmp_path / "step-9.ckpt").write_bytes(b"")
    with pytest.raises(ConfigError, match="step-9.ckpt is a pickle, which can run code when read"):
        open_source(tmp_path / "step-9.ckpt")


def test_a_file_that_was_converted_is_read_in_place_of_the_pickle(tmp_path: Path) -> None:
    torch.save(state_at(1), tmp_path / "step-0.pt")
    save_file(state_at(0), tmp_path / "step-0.safetensors")
    imported(tmp_path, (0,), tmp_path.parent / "converted")


class Evil:
    """Code that runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            lambda at: Evil(at / "ran"),
            r"holds more than tensors \(io.open\), which can run code when read, so it is not;",
        ),
        (lambda at: {"model": state_at(0), "callback": Evil(at / "ran")}, r"\(io.open\).*safetensors.torch.save_file"),
        (lambda at: torch.nn.Linear(2, 2), r"\(torch.nn.modules.linear.Linear\).* save its model.state_dict\(\) with"),
        (lambda at: {"model": state_at(0), "args": argparse.Namespace(lr=1)}, r"\(argparse.Namespace\)"),
        (lambda at: [state_at(0)], "holds a list and no state dict; save the model's with torch.save"),
        (lambda at: {"optimizer": {"state": 1}}, "holds a dict and no state dict"),
        (lambda at: {}, "holds a dict and no state dict"),
        (lambda at: {"model": state_at(0), "state_dict": state_at(1)}, "holds state dicts under state_dict and model;"),
        (lambda at: {"w": torch.zeros(1).expand(10**6, 10**6)}, "w claims more entries than the file has"),
        (lambda at: {"w": torch.eye(3).to_sparse()}, "w is sparse"),
        (lambda at: {"embed.W_E": torch.ones(2).int()}, "embed.W_E is torch.int32, which is no kind of weight"),
        (lambda at: {"w": torch.ones(2), "_orig_mod.w": torch.ones(2)}, "with and without `_orig_mod.`"),
    ],
)
def test_what_holds_more_than_weights_is_refused_and_does_not_run(
    what: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    torch.save(what(tmp_path), folder / "step-0.pt")
    for suffix, call in (
        ("config", lambda: pipeline.import_run(str(folder), outside_config(SHAPE, (0,)), tmp_path / "run")),
        ("audit", lambda: pipeline.audit_source(str(folder))),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            call()
        assert "\n" not in str(error.value) and "step-0.pt" in str(error.value), suffix
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["truncated", "garbage", "empty", "text", "script"])
def test_a_damaged_file_of_torch_save_is_said_to_be_one(how: str, tmp_path: Path) -> None:
    path = tmp_path / "step-0.pt"
    torch.save(state_at(0), path)
    whole = path.read_bytes()
    if how == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    else:
        broken = {"truncated": whole[:-100], "garbage": b"\xff" * 999, "empty": b"", "text": b"weights"}
        path.write_bytes(broken[how])
    message = "is a TorchScript archive; save" if how == "script" else "is truncated or no file of torch.save; fetch it"
    with pytest.raises(CheckpointError, match=message):
        read_tensors(path, lambda text: None)


def test_one_place_alone_reads_a_pickle_and_of_it_weights_alone() -> None:
    """Whoever calls a `load` of torch or of a module that unpickles, or takes an Unpickler, in any file."""
    unpickling = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jit", "hub"}
    names = {"load", "loads", "Unpickler", "read_pickle", "load_state_dict_from_url", "_load", "legacy_load"}
    found = []
    for path in [path for package in ("mechgrok", "analyses") for path in (ROOT / package).rglob("*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in unpickling | {"torch"}:
                assert not {alias.name for alias in node.names} & names, path
            if isinstance(node, ast.Call):
                assert not any(one.arg == "allow_pickle" for one in node.keywords), path
            if isinstance(node, ast.Attribute) and node.attr in names:
                owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
                if owner in unpickling | {"torch", "serialization", "np", "numpy", "pd"}:
                    found.append((path.name, ast.unparse(node)))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert {one.arg: ast.unparse(one.value) for one in node.keywords}["weights_only"] == "True"
    assert found == [("tensor_files.py", "torch.load")]
    banned = (ROOT / "pyproject.toml").read_text()
    assert '"torch.load".msg' in banned and '"pickle".msg' in banned  # lint holds the files to come to it


# ---- names


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("ckpt_100", 100), ("epoch-3", 3), ("model-step-100", 100), ("Step-100", 100), ("0", 0), ("00100", 100),
        ("step_000100", 100), ("checkpoint-500", 500), ("CKPT100", 100), ("model_7", 7), ("iter_0000100", 100),
        ("global_step1000", 1000), ("epoch=3-step=100", 100), ("step-100-epoch-3", 100), ("step1000-tokens4B", 1000),
        ("model_v2_step_5", 5), ("state_dict_12", 12), ("weights.40", 40),
        ("model", None), ("final", None), ("model-00001-of-00003", None), ("footstep-3", None), ("pythia-14m", None),
        ("step-1.5", None), ("step-10k", None), ("step", None), ("gpt2", None), ("step-1234567890123", None),
    ],
)  # fmt: skip
def test_the_step_that_a_name_tells(name: str, step: int | None) -> None:
    told = step_of(name)
    assert (told and told[0]) == step


@pytest.mark.parametrize(
    "form", ["ckpt_{}.pt", "epoch-{}.pth", "model-step-{}.safetensors", "Step-{}.pt", "{}.safetensors"]
)
def test_checkpoints_of_any_usual_name_are_found(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for step in (0, 3):
        (save_file if form.endswith("safetensors") else torch.save)(state_at(step), folder / form.format(step))
    assert not imported(folder, (0, 3), tmp_path / "run")


def test_steps_and_epochs_are_not_mixed(tmp_path: Path) -> None:
    for name in ("step-100.pt", "epoch-3.pt"):
        torch.save(state_at(0), tmp_path / name)
    with pytest.raises(ConfigError, match="step-100.pt counts steps and .*epoch-3.pt epochs; rename one kind"):
        open_source(tmp_path)
    (tmp_path / "step-100.pt").rename(tmp_path / "best.pt")
    with pytest.raises(ConfigError, match="best.pt names no step; call it step-100.pt, or move it away"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("prefix", "told"),
    [
        ("_orig_mod.", ["_orig_mod."]), ("module.", ["module."]), ("model.", ["model."]),
        ("module._orig_mod.", ["_orig_mod.", "module."]), ("model.module.", ["model.", "module."]),
    ],
)  # fmt: skip
def test_prefixes_of_wrappers_are_left_out_with_a_note(prefix: str, told: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for step in (0, 3):
        torch.save({prefix + name: tensor for name, tensor in state_at(step).items()}, folder / f"step-{step}.pt")
    notes = imported(folder, (0, 3), tmp_path / "run")
    assert len(notes) == len(told) and all(f"`{one}`" in note for one, note in zip(told, notes, strict=True))
    inner = {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in state_at(0).items()}
    torch.save(inner, tmp_path / "step-0.pt")  # one block was compiled
    assert read_tensors(tmp_path / "step-0.pt", lambda text: None).keys() == state_at(0).keys()


# ---- folders of Hugging Face models


def test_a_trainers_final_model_beside_its_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "trainer"
    for step in (500, 1000):
        neox(step).save_pretrained(folder / f"checkpoint-{step}")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            (folder / f"checkpoint-{step}" / name).write_bytes(b"no weights")
    neox(1200).save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"no weights")
    source = open_source(folder)
    assert source.steps == (500, 1000)
    assert source.notes == [f"the model in {folder} itself is left out, as no trainer_state.json tells its step"]
    (folder / "trainer_state.json").write_text('{"global_step": 1000}')
    assert open_source(folder).steps == (500, 1000)
    assert "as checkpoint-1000 is step 1000 too" in open_source(folder).notes[0]
    (folder / "trainer_state.json").write_text('{"global_step": 1200}')
    assert open_source(folder).steps == (500, 1000, 1200) and not open_source(folder).notes
    config = outside_config(pipeline.import_template(str(folder)).model, (500, 1200))
    for step, model in pipeline.import_run(str(folder), config, tmp_path / "run"):
        with torch.no_grad():
            expected = neox(step)(SPLIT.test.tokens).logits
        torch.testing.assert_close(model(SPLIT.test.tokens), expected, atol=2e-5, rtol=1e-5)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """models--org--tiny as the hub's client lays it out: references, snapshots of links, and blobs."""
    plain = checkout(tmp_path / "plain", neox, (0, 1000))
    folder = tmp_path / "hub" / "models--org--tiny"
    for kind in ("blobs", "refs", "snapshots"):
        (folder / kind).mkdir(parents=True)
    for step in (0, 1000):
        commit = f"{step:040x}"
        (folder / "snapshots" / commit).mkdir()
        for path in (plain / f"step{step}").iterdir():
            blob = folder / "blobs" / f"{step}-{path.name}"
            shutil.copy(path, blob)
            (folder / "snapshots" / commit / path.name).symlink_to(os.path.relpath(blob, folder / "snapshots" / commit))
        (folder / "refs" / f"step{step}").write_text(commit)
    (folder / "refs" / "main").write_text(f"{1000:040x}")
    return folder


def test_the_hubs_cache_is_read_by_its_references(cache: Path, tmp_path: Path) -> None:
    for place in (cache, cache.parent):
        source = open_source(place)
        assert source.steps == (0, 1000)
        assert source.notes == ["of models--org--tiny, main is left out, as its name tells no step"]
    config = outside_config(pipeline.import_template(str(cache)).model, (0, 1000))
    for step, model in pipeline.import_run(str(cache), config, tmp_path / "run"):
        with torch.no_grad():
            expected = neox(step)(SPLIT.test.tokens).logits
        torch.testing.assert_close(model(SPLIT.test.tokens), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("weights elsewhere", "model.safetensors is a symbolic link to .*elsewhere; put what it stands for"),
        ("another file elsewhere", "generation_config.json is a symbolic link to .*elsewhere"),
        ("snapshot elsewhere", "is a symbolic link to .*elsewhere"),
        ("through a link", "model.safetensors is a symbolic link to"),
        ("dangling", "model.safetensors is a link to what is not in the cache; download it again"),
        ("commit", "lacks the snapshot of step0; run `hf download` for that revision again"),
        ("no snapshot", "lacks the snapshot of step0"),
        ("no step", "no reference in .*refs names a step; run `hf download` with --revision step1000"),
        ("two", "holds models--org--other, models--org--tiny; give one of these folders"),
        ("outside a cache", "model.safetensors is a symbolic link to"),
    ],
)
def test_links_out_of_the_cache_and_what_it_lacks_are_refused(
    how: str, message: str, cache: Path, tmp_path: Path
) -> None:
    snapshot, source = cache / "snapshots" / f"{0:040x}", cache
    link, elsewhere = snapshot / "model.safetensors", tmp_path / "elsewhere"
    if how == "snapshot elsewhere":
        snapshot.rename(elsewhere)
        snapshot.symlink_to(elsewhere)
    elif how == "through a link":  # a blob that is a link itself
        link.resolve().rename(elsewhere)
        (cache / "blobs" / "0-model.safetensors").symlink_to(elsewhere)
    elif how in ("weights elsewhere", "another file elsewhere"):
        link = snapshot / "generation_config.json" if how.startswith("another") else link
        shutil.copy(link.resolve(), elsewhere)
        link.unlink()
        link.symlink_to(elsewhere)
    elif how == "dangling":
        link.resolve().unlink()
    elif how == "commit":
        (cache / "refs" / "step0").write_text("../../../plain/step0")
    elif how == "no snapshot":
        shutil.rmtree(snapshot)
    elif how == "no step":
        for step in (0, 1000):
            (cache / "refs" / f"step{step}").unlink()
    elif how == "two":
        shutil.copytree(cache, cache.parent / "models--org--other", symlinks=True)
        source = cache.parent
    elif how == "outside a cache":
        source = tmp_path / "mine"
        (source / "step0").mkdir(parents=True)
        shutil.copy(snapshot / "config.json", source / "step0")
        (source / "step0" / "model.safetensors").symlink_to(link.resolve())
    with pytest.raises(ConfigError, match=message) as error:
        open_source(source)
    assert "\n" not in str(error.value)
