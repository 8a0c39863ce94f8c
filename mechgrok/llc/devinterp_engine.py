"""devinterp's own sampler behind the same call, to check estimates against another implementation.

Four of its habits are dealt with. It averages burn-in into its LLC: we take its raw losses and leave
burn-in out. It takes no localization unless told: we always tell. It wants rows of tokens with a loss
at every next one: rows are two copies of an example's number, and the loss looks the example up. It
replays one shuffle of the data, so that each batch is the one that was trained on longest ago, which
on small data raises the losses by far: it is given as many rows, drawn with replacement, as it takes.
"""

import contextlib
import io
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mechgrok import seeds
from mechgrok.config import LLCConfig
from mechgrok.errors import ConfigError
from mechgrok.llc.problem import Problem
from mechgrok.sampling.chains import Draws, batch_noise

METHODS = {"sgld": "sgmcmc_sgld", "rmsprop_sgld": "rmsprop_sgld"}


def devinterp_draws(problem: Problem, config: LLCConfig, seed: int) -> Draws:
    """Draws of devinterp 2's `sample` at the same settings; its chains run one after another.

    Raises:
        ConfigError: the module has dropout, which devinterp would switch on.
    """
    from datasets import Dataset
    from devinterp.slt.sampling import sample

    if any(isinstance(part, torch.nn.modules.dropout._DropoutNd) and part.p > 0 for part in problem.module.modules()):
        raise ConfigError("devinterp samples in train mode, where this module's dropout is random; remove the dropout")
    n_examples = len(problem.init_losses)
    numbers = torch.arange(n_examples)
    if config.batch_size is not None:
        size = ((config.n_burnin + config.n_draws) * config.batch_size,)
        rng = seeds.stream(seed, "devinterp", problem.component.name, "rows")
        numbers = torch.randint(n_examples, size, generator=rng)
    rows = Dataset.from_dict({"input_ids": numbers[:, None].expand(-1, 2).tolist()}).with_format("torch")

    def loss_of_rows(module: torch.nn.Module, numbers: Tensor) -> Tensor:
        at = numbers[:, 0]
        return problem.loss_fn(module, *(tensor[at] for tensor in problem.tensors))[:, None]

    settings = {}
    if config.sampler == "rmsprop_sgld":
        settings = {"rmsprop_alpha": config.rmsprop_decay, "rmsprop_eps": config.rmsprop_stability}
    # devinterp hands its results over as a Zarr store on disk.
    with tempfile.TemporaryDirectory() as folder, _global_state_restored(), contextlib.redirect_stderr(io.StringIO()):
        tree = sample(
            problem.module,
            rows,
            observables={},
            param_masks=dict(problem.component.masks),
            lr=config.step_size,
            n_beta=config.nbeta,
            localization=config.localization,
            num_chains=config.n_chains,
            num_draws=config.n_draws,
            num_burnin_steps=config.n_burnin,
            batch_size=config.batch_size or n_examples,
            num_init_loss_batches=1,  # unused: the baseline is ours
            init_seed=seeds.derive(seed, "devinterp", problem.component.name) % 2**31,
            match_sampling_input_ids_across_chains=False,  # else the chains' spread leaves out the batches
            sampling_method=METHODS[config.sampler],
            output_path=Path(folder) / "samples.zarr",
            loss_fn=loss_of_rows,
            device="cpu",
            **settings,
        )
        drawn = tree.dataset.isel(step=slice(config.n_burnin, None)).load()
        tree.close()
    of_examples = torch.from_numpy(drawn.sampling_loss_micro.values.mean(axis=3, dtype=np.float64))
    losses = torch.from_numpy(drawn.sampling_loss_micro.values.mean(axis=(2, 3), dtype=np.float64))
    diverged = (~losses.isfinite()).cummax(1).values
    index = torch.from_numpy(drawn.sampling_input_ids_micro.values[..., 0])
    noise = torch.zeros(2, *losses.shape, dtype=torch.float64)
    if config.batch_size is not None:
        noise = batch_noise(of_examples, problem.init_losses[index])
    return Draws(
        losses=losses.masked_fill(diverged, torch.nan),
        index=None if config.batch_size is None else index,
        theta=torch.empty(0),
        acceptance=torch.ones(config.n_chains, dtype=torch.float64),
        observed=[],
        noise=noise,
    )


@contextlib.contextmanager
def _global_state_restored() -> Iterator[None]:
    """devinterp seeds the global generators; the caller's are put back."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
