import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechgrok.config import load_config
from mechgrok.errors import ConfigError
from mechgrok.model import build_model, evaluate, model_losses
from mechgrok.reproducible import reproducible, without_denormals
from mechgrok.store import RunDirectory
from mechgrok.tasks import make_split
from mechgrok.train import checkpoint_steps, train
from tests.oracles import tiny_config


@given(st.integers(1, 5000), st.integers(2, 100))
def test_checkpoints_run_from_0_to_the_end_and_are_as_many_as_asked(n_steps: int, n_checkpoints: int) -> None:
    steps = checkpoint_steps(n_steps, n_checkpoints)
    assert steps[0] == 0 and steps[-1] == n_steps
    assert all(a < b for a, b in zip(steps[:-1], steps[1:], strict=True))
    assert min(n_checkpoints, n_steps + 1) <= len(steps) <= min(n_checkpoints, n_steps + 1) + 1


def test_checkpoints_are_even_on_log_steps() -> None:
    steps = np.array(checkpoint_steps(100_000, 60))
    gaps = np.diff(np.log1p(steps[steps > 200]))
    assert gaps.max() / gaps.min() < 1.1


def test_training_is_adamw_on_the_mean_loss_step_by_step(tmp_path: Path) -> None:
    """Against AdamW written out: decoupled decay times the learning rate, betas (0.9, 0.98)."""
    config = tiny_config(train={"n_steps": 3, "n_checkpoints": 4, "learning_rate": 0.01, "weight_decay": 0.5})
    split = make_split(config.task, config.seed)
    run = RunDirectory.create(tmp_path / "run", config)
    train(run, split)
    model = build_model(config.model, split, config.seed)
    moments = {name: (torch.zeros_like(q), torch.zeros_like(q)) for name, q in model.named_parameters()}
    for step in range(1, 4):
        model.zero_grad()
        model_losses(model, *split.train.tensors).mean().backward()
        with torch.no_grad():
            for name, q in model.named_parameters():
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * q.grad)
                second.mul_(0.98).add_(0.02 * q.grad**2)
                q.mul_(1 - 0.01 * 0.5)
                q.sub_(0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.98**step)).sqrt() + 1e-8))
        saved, metrics = run.read_checkpoint(step)
        for name, q in model.named_parameters():
            if not name.endswith("b_K"):  # its gradient is 0 up to rounding, of which Adam makes full steps
                torch.testing.assert_close(saved[name], q.detach(), rtol=2e-4, atol=2e-5)
        assert metrics.train_loss == pytest.approx(evaluate(model, split.train)[0], rel=1e-4)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_training_twice_gives_the_same_bits_on_any_number_of_threads(n_threads: int, tmp_path: Path) -> None:
    """On the main preset's shapes, where two threads race in the embedding's gradient if they are let."""
    config = load_config("modular-addition")
    short = config.train.model_copy(update={"n_steps": 6, "n_checkpoints": 2, "n_threads": n_threads})
    config = config.model_copy(update={"train": short})
    split = make_split(config.task, config.seed)
    finals = []
    for attempt in range(3):
        run = RunDirectory.create(tmp_path / str(attempt), config)
        train(run, split)
        finals.append(run.read_checkpoint(6)[0])
    for other in finals[1:]:
        assert all(torch.equal(other[name], finals[0][name]) for name in other)


@pytest.mark.parametrize("own", [None, ":16:8"])
@pytest.mark.parametrize("warns", [False, True])
def test_reproducible_restores_what_was_set_even_after_an_error(
    own: str | None, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state() -> tuple[int, bool, bool, bool, str | None]:
        fills = torch.utils.deterministic.fill_uninitialized_memory
        how = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.get_num_threads(), *how, fills, os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if own is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", own)
    torch.use_deterministic_algorithms(warns, warn_only=warns)
    try:
        before = state()
        with pytest.raises(KeyError), reproducible(2):
            assert state() == (2, True, False, False, own or ":4096:8")
            raise KeyError
        assert state() == before
    finally:
        torch.use_deterministic_algorithms(False)


def takes_denormals_as_zero() -> list[bool]:
    """Whether arithmetic does, on each thread that has a part of the numbers."""
    denormal = torch.full((2**18,), 1e-40)
    return (denormal * 1 == 0).unique().tolist()


def test_one_thread_takes_denormals_as_zero_and_of_several_none_does() -> None:
    with reproducible(2):
        assert takes_denormals_as_zero() == [False]
        with pytest.raises(KeyError), reproducible(1):
            assert takes_denormals_as_zero() == [True]
            raise KeyError
        assert takes_denormals_as_zero() == [False]
    with reproducible(1), without_denormals():
        assert takes_denormals_as_zero() == [True]
    assert takes_denormals_as_zero() == [False]


def test_the_published_preset_builds_and_takes_a_step(tmp_path: Path) -> None:
    config = load_config("modular-addition-113")
    short = config.train.model_copy(update={"n_steps": 1, "n_checkpoints": 2})
    config = config.model_copy(update={"train": short})
    split = make_split(config.task, config.seed)
    assert len(split.train) == 3830
    trajectory = train(RunDirectory.create(tmp_path / "run", config), split)
    first, last = trajectory.metrics
    assert abs(first.train_loss - math.log(113)) < 0.5
    assert last.train_loss < first.train_loss


def test_training_fits_the_training_set_and_progress_is_told(tmp_path: Path) -> None:
    config = tiny_config(train={"n_steps": 200})
    told = []
    split = make_split(config.task, config.seed)
    trajectory = train(RunDirectory.create(tmp_path / "run", config), split, lambda *at: told.append(at))
    assert trajectory.metrics[-1].train_accuracy == 1.0
    assert told == [(step, 200) for step in trajectory.steps]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"init_std": 1e18}}, "the loss of the untrained model is not finite: lower model.init_std"),
        (
            {"train": {"weight_decay": 1e18}},
            "training diverged by step 1: lower train.learning_rate or train.weight_decay",
        ),
    ],
)
def test_what_diverges_is_told_with_what_can_be_the_cause(changes: dict, message: str, tmp_path: Path) -> None:
    config = tiny_config(**changes)
    with pytest.raises(ConfigError) as error:
        train(RunDirectory.create(tmp_path / "run", config), make_split(config.task, config.seed))
    assert str(error.value) == f"{message} and choose another --out"
