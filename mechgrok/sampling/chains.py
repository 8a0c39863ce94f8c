"""Many chains advance together; each has its own streams, so it draws the same alone or among others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mechgrok import seeds
from mechgrok.config import LLCConfig
from mechgrok.sampling.kernels import sgld_step
from mechgrok.sampling.potential import Potential


def sample(potential: Potential, config: LLCConfig, seed: int, names: Sequence[seeds.Name]) -> tuple[Tensor, Tensor]:
    """Localized SGLD from the anchor: (losses Float64[chain, draw], final theta Float[chain, param]).

    A draw's loss is that of its own batch at the weights before the step, so batch and weights are
    independent and the loss is unbiased. Batches are drawn with replacement. A chain whose loss or
    weights leave the finite numbers stays NaN from there on and does not touch the others.

    Args:
        names: what tells this run from others with the same seed; chain c draws from the streams
            (seed, *names, "noise", c) and (seed, *names, "batch", c).
    """
    noises = [seeds.stream(seed, *names, "noise", chain) for chain in range(config.n_chains)]
    batches = [seeds.stream(seed, *names, "batch", chain) for chain in range(config.n_chains)]
    anchor = potential.anchor
    theta = anchor.expand(config.n_chains, -1).clone()
    losses = torch.full((config.n_chains, config.n_draws), torch.nan, dtype=torch.float64)
    every_example = torch.arange(potential.n_examples).expand(config.n_chains, -1)
    for step in range(config.n_burnin + config.n_draws):
        index = every_example
        if config.batch_size is not None:
            size = (config.batch_size,)
            index = torch.stack([torch.randint(potential.n_examples, size, generator=rng) for rng in batches])
        example_losses, grad = potential.losses_and_grad(theta, index)
        if step >= config.n_burnin:
            losses[:, step - config.n_burnin] = example_losses.double().mean(1)
        noise = torch.stack([torch.randn(anchor.shape, generator=rng, dtype=anchor.dtype) for rng in noises])
        theta = sgld_step(
            theta, grad, anchor, noise,
            nbeta=config.nbeta, step_size=config.step_size, localization=config.localization,
        )  # fmt: skip
    diverged = (~losses.isfinite()).cummax(1).values
    return losses.masked_fill(diverged, torch.nan), theta
