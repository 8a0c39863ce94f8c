"""The presets of the head studies: the published numbers, and a few steps of each from end to end."""

from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import analyses
from mechgrok import pipeline
from mechgrok.config import RunConfig, load_config
from mechgrok.errors import ConfigError
from mechgrok.model import batch_loss, build_model, model_losses
from mechgrok.store import RunDirectory
from mechgrok.tasks.next_token import next_token_examples
from mechgrok.train import planned_steps, train
from mechgrok.types import Split
from tests.oracles import tiny_config

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def shrunk(name: str, task: dict[str, object]) -> RunConfig:
    """A preset with as few steps, draws and rows as its whole path takes."""
    kept = load_config(name).model_dump()
    few = {"n_steps": 4, "checkpoints": (0, 4), "batch_size": 4, "device": "cpu"}
    kept["train"] |= few
    kept["task"] |= {"n_train": 64, "n_test": 16} | task
    kept["llc"] |= {"n_examples": 32, "checks_every": 2}
    kept["llc"]["sampling"] |= {
        "n_chains": 2,
        "n_draws": 8,
        "n_burnin": 0,
        "batch_size": 4,
        "device": "cpu",
        "memory_gb": 1.0,
    }
    for refinement in kept["llc"]["refinements"]:
        refinement["every"] = 2
    return RunConfig.model_validate(kept)


def rows(n: int, n_ctx: int, vocabulary: int) -> Split:
    """A split of zeros with the shape of a text task's."""
    examples = next_token_examples(torch.zeros(n, n_ctx, dtype=torch.int64))
    return Split(examples, examples, tuple(map(str, range(vocabulary))), vocabulary)


def test_the_published_numbers_are_the_papers() -> None:
    config = load_config("heads-paper")
    steps = planned_steps(config.train)
    assert steps == (0, 100, *range(200, 10_000, 200), *range(10_000, 20_000, 400), *range(20_000, 50_001, 1000))
    assert len(steps) == 107
    split = rows(1, config.task.n_ctx, config.task.vocabulary)
    sizes = [
        sum(p.numel() for p in build_model(shape, split, 0).parameters())
        for shape in (config.model, config.as_reference(1).model)
    ]
    assert sizes == [3_355_016, 3_091_336]
    sampling = config.llc.sampling
    assert (sampling.nbeta, sampling.localization, sampling.step_size) == (30.0, 200.0, 1e-3)
    assert (sampling.n_chains, sampling.n_draws, sampling.n_burnin, sampling.batch_size) == (4, 200, 0, 32)
    tokens = config.train.n_steps * config.train.batch_size * config.task.n_ctx
    assert tokens == 5_120_000_000 and config.train.max_grad_norm == 1.0


@pytest.mark.long
def test_a_few_steps_of_the_published_preset_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its datasets by local ones, the GPU by the CPU, and small numbers of rows, tokens, steps and draws."""
    monkeypatch.setenv("MECHGROK_CACHE", str(tmp_path / "cache"))
    sources = []
    for source in load_config("heads-paper").task.sources:
        texts = [" ".join(f"{source.label} {j * k % 97}" for k in range(60)) for j in range(40)]
        saved = datasets.Dataset.from_dict({source.column: texts})
        saved.save_to_disk(tmp_path / source.label)
        sources.append(source.model_dump() | {"path": str(tmp_path / source.label)})
    task = {"sources": tuple(sources), "vocabulary": 300, "n_ctx": 24, "test_fraction": 0.5}
    study = pipeline.run(shrunk("heads-paper", task), tmp_path / "run", n_workers=1)
    assert study.trajectory.steps == (0, 4)
    losses = study.trajectory.column("train_loss")
    assert losses[1] < losses[0] - 0.05
    heads = tuple(f"L{layer}H{head}" for layer in range(2) for head in range(8))
    assert study.curve.components == ("model", *heads) and bool(torch.tensor(study.curve.llc).isfinite().all())
    refined = {name: curve.components for name, curve in study.curve.refined.items()}
    assert refined == {"code": ("model", *heads), "prose": ("model", *heads), "reference": heads}
    names = study.config.analyses.names
    assert names == load_config("heads-planted").analyses.names
    for name in names:
        report = analyses.run(name, study)
        assert report.claims and all(len(values) == 2 for values in report.series.values())


def test_a_few_steps_of_real_text_from_end_to_end(tmp_path: Path) -> None:
    config = shrunk("heads-text", {"n_ctx": 16})
    study = pipeline.run(config, tmp_path / "run", n_workers=1)
    assert len(study.curve.components) == 17 and set(study.curve.refined) == {"code", "prose", "reference"}
    losses = study.trajectory.column("train_loss")
    assert losses[1] < losses[0]


@pytest.mark.parametrize(("block", "n_blocks"), [(1, 8), (3 * 16 * 20, 3), (10**9, 0)])
def test_the_loss_in_blocks_has_the_bits_and_the_gradient_of_the_loss_at_once(
    block: int, n_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks = Mock(wraps=checkpoint)
    monkeypatch.setattr("mechgrok.model.checkpoint", in_blocks)
    monkeypatch.setattr("mechgrok.model.BLOCK", block)
    split = rows(8, 16, 20)
    model = build_model(load_config("heads-text").model, split, 0)
    tokens = torch.arange(8 * 16).view(8, 16) ** 2 % 20
    batch = next_token_examples(tokens).tensors
    found = []
    for loss in (batch_loss(model, *batch), model_losses(model, *batch).mean()):
        model.zero_grad()
        loss.backward()
        found.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (blocked, gradient), (whole, expected) = found
    assert in_blocks.call_count == n_blocks and torch.equal(blocked, whole)
    assert all(torch.equal(gradient[name], expected[name]) for name in expected)


def test_a_device_that_is_not_there_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tiny_config(train={"device": "cuda"})
    with pytest.raises(ConfigError, match="train.device is cuda, and this torch sees no such device; .* cpu"):
        pipeline.train_only(config, tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize("device", DEVICES)
def test_training_on_a_device_is_training_on_the_cpu_and_resumes_to_the_same_bits(device: str, tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise StopError

    changes = {"n_steps": 10, "n_checkpoints": 4, "batch_size": 8, "max_grad_norm": 1.0}
    ends = {}
    for name, used in (("cpu", "cpu"), ("whole", device), ("broken", device)):
        config = tiny_config(train=changes | {"device": used})
        run = RunDirectory.create(tmp_path / name, config)
        split = pipeline.make_split(config.task, config.seed)
        while name == "broken" and not run.has_checkpoint(10):
            with pytest.raises(StopError):
                train(run, split, stop)
        ends[name] = train(run, split).model_at(10).state_dict()
    for key, value in ends["cpu"].items():
        assert torch.equal(ends["whole"][key], ends["broken"][key])
        torch.testing.assert_close(ends["whole"][key], value, rtol=1e-3, atol=1e-3)
