"""Task and config to a Trajectory: AdamW, checkpoints at given steps or on a log scale, resumable at each.

Or from checkpoints that were trained elsewhere, which are brought into the run once.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from transformer_lens import HookedTransformer

from mechgrok import seeds
from mechgrok.config import ImportedConfig, TrainConfig
from mechgrok.errors import CheckpointError, ConfigError, RunDirectoryError
from mechgrok.model import batch_loss, build_model, evaluate, model_from_parameters
from mechgrok.outside.sources import Source
from mechgrok.reproducible import matmul_precision, reproducible
from mechgrok.store import RunDirectory
from mechgrok.types import CheckpointMetrics, Split, Trajectory

Progress = Callable[[int, int], None]  # (done, total)


def planned_steps(config: TrainConfig | ImportedConfig) -> tuple[int, ...]:
    """The steps at which checkpoints are kept."""
    if isinstance(config, ImportedConfig) or config.checkpoints is not None:
        return config.checkpoints or ()
    assert config.n_checkpoints is not None  # the config has one or the other
    return checkpoint_steps(config.n_steps, config.n_checkpoints)


def checkpoint_steps(n_steps: int, n_checkpoints: int) -> tuple[int, ...]:
    """0, then steps evenly spaced on log(1 + step) up to n_steps, as whole numbers.

    Rounding makes early steps coincide; those are merged, and the spacing is made finer until there
    are n_checkpoints (or all n_steps + 1 steps).
    """
    wanted = min(n_checkpoints, n_steps + 1)
    for n_points in range(wanted, 4 * (n_steps + wanted)):
        steps = np.unique(np.rint(np.expm1(np.linspace(0, np.log1p(n_steps), n_points))).astype(int))
        if len(steps) >= wanted:
            return tuple(int(step) for step in steps)
    return tuple(range(n_steps + 1))


def train(run: RunDirectory, split: Split, progress: Progress = lambda done, total: None) -> Trajectory:
    """Train, or finish training, the model of `run`, and return its trajectory.

    The loss is the mean over the batch, in float64; the batch of a step is drawn with replacement from the
    stream (seed, "batch", step), the same rows on every device. The state of the optimizer is written with each
    checkpoint, and steps are deterministic, so a killed run goes on from the last checkpoint to the same bits.
    An imported run trains nothing: it is loaded.

    Raises:
        ConfigError: the device is not there, or training diverged.
    """
    config = run.config.train
    steps = planned_steps(config)
    if isinstance(config, TrainConfig) and not all(run.has_checkpoint(step) for step in steps):
        check_device("train.device", config.device)
        with reproducible(config.n_threads), matmul_precision("float32"):
            _train_to_the_end(run, split, config, steps, progress)
    return load_trajectory(run, split)


def import_trajectory(
    run: RunDirectory, split: Split, source: Source, progress: Progress = lambda done, total: None
) -> Trajectory:
    """Bring the checkpoints of `source` into an imported run, with their losses on the task's data.

    A checkpoint that is there already must be the same, as estimates may have been made of it.

    Raises:
        CheckpointError: one that cannot be read, does not fit the config, or has no finite loss.
        RunDirectoryError: the run holds another one at that step.
    """
    config, steps = run.config, planned_steps(run.config.train)
    with reproducible(config.llc.n_threads), matmul_precision("float32"):
        for done, step in enumerate(steps):
            progress(done, len(steps))
            model = source.model_at(step, config.model, split)
            parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
            if run.has_checkpoint(step):
                present, _ = run.read_checkpoint(step)
                if any(not torch.equal(present[name], parameters[name]) for name in parameters):
                    raise RunDirectoryError(
                        f"{run.path} holds another checkpoint at step {step} than {source.name}; choose another --out"
                    )
                continue
            metrics = metrics_of(model, split, step, config.llc.n_examples is None)
            if not math.isfinite(metrics.train_loss):
                raise CheckpointError(
                    f"the loss of {source.name} at step {step} is not finite; "
                    "leave that step out of train.checkpoints and choose another --out"
                )
            run.write_checkpoint(parameters, metrics)
        progress(len(steps), len(steps))
    return load_trajectory(run, split)


def check_device(key: str, device: str) -> None:
    """Raise ConfigError if the device that the setting `key` asks for is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{key} is cuda, and this torch sees no such device; install a CUDA build, or set it to cpu")


def load_trajectory(run: RunDirectory, split: Split) -> Trajectory:
    """The trajectory of a trained or imported run. Raises CheckpointError if a checkpoint is missing or damaged."""
    steps = planned_steps(run.config.train)
    if isinstance(run.config.train, ImportedConfig):
        missing = [step for step in steps if not run.has_checkpoint(step)]
        if missing:
            raise CheckpointError(
                f"{run.path} lacks the imported checkpoint of step {', '.join(map(str, missing[:8]))}; "
                f"run `mechgrok import SOURCE --config {run.path / 'config.toml'} --out {run.path}`"
            )
    metrics = tuple(run.read_checkpoint(step)[1] for step in steps)
    return Trajectory(run.config, metrics, partial(_load_model, run, split))


def _load_model(run: RunDirectory, split: Split, step: int) -> HookedTransformer:
    return model_from_parameters(run.config.model, split, run.read_checkpoint(step)[0])


def _train_to_the_end(
    run: RunDirectory, split: Split, config: TrainConfig, steps: tuple[int, ...], progress: Progress
) -> None:
    columns = split.train.tensors
    model = build_model(run.config.model, split, run.config.seed)
    model.to(config.device, print_details=False)
    everything = tuple(column.to(config.device) for column in columns) if config.batch_size is None else ()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=config.betas, fused=True
    )
    resumed = _restore(run, model, optimizer, steps)
    for step in range(resumed or 0, config.n_steps + 1):
        if step in steps and not (step == resumed and run.has_checkpoint(step)):
            metrics = metrics_of(model, split, step, config.batch_size is None)
            if not math.isfinite(metrics.train_loss):
                cause = "train.learning_rate or train.weight_decay" if step else "model.init_std"
                what = f"training diverged by step {step}" if step else "the loss of the untrained model is not finite"
                raise ConfigError(f"{what}: lower {cause} and choose another --out")
            run.write_checkpoint(dict(model.named_parameters()), metrics)
            run.write_training_state(step, _state_tensors(model, optimizer))
            progress(step, config.n_steps)
        if step < config.n_steps:
            batch = everything
            if config.batch_size is not None:
                rng = seeds.stream(run.config.seed, "batch", step)
                rows = torch.randint(len(split.train), (config.batch_size,), generator=rng)
                batch = tuple(column[rows].to(config.device) for column in columns)
            optimizer.zero_grad()
            batch_loss(model, *batch).backward()
            if config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()


def metrics_of(model: HookedTransformer, split: Split, step: int, whole: bool) -> CheckpointMetrics:
    """Losses (nats) and accuracies.

    On all training examples, or, as that is dear where they are many, on as many as there are test examples.
    """
    seen = split.train if whole else split.train.first(len(split.test))
    (train_loss, train_accuracy), (test_loss, test_accuracy) = evaluate(model, seen), evaluate(model, split.test)
    return CheckpointMetrics(step, train_loss, test_loss, train_accuracy, test_accuracy)


def _state_tensors(model: HookedTransformer, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {f"parameter/{name}": parameter for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    return tensors


def _restore(
    run: RunDirectory, model: HookedTransformer, optimizer: torch.optim.Optimizer, steps: tuple[int, ...]
) -> int | None:
    """Load the last training state into model and optimizer; the step to go on from, None if there is none.

    A checkpoint that was deleted from before the saved state can only be made again from the start.
    """
    saved = run.read_training_state()
    if saved is None or not all(run.has_checkpoint(step) for step in steps if step < saved[0]):
        return None
    step, tensors = saved
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"parameter/{name}"])
            keys = [
                key.split("/")[0] for key in tensors if key.endswith(f"/{name}") and not key.startswith("parameter/")
            ]
            optimizer.state[parameter] = {key: tensors[f"{key}/{name}"].to(parameter.device, copy=True) for key in keys}
    return step
