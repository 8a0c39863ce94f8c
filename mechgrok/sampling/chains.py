"""Many chains advance together; each has its own streams, so it draws the same alone or among others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from mechgrok import seeds
from mechgrok.config import LLCConfig
from mechgrok.loops.normals import Normals
from mechgrok.sampling.kernels import mala_log_acceptance
from mechgrok.sampling.motion import Motion, Start, Watch
from mechgrok.sampling.potential import Potential
from mechgrok.sampling.samplers import SAMPLERS, Slope, State


@dataclass(frozen=True)
class Draws:
    """losses: Float64[chain, draw], each the mean over that draw's own batch, at the draw's weights.

    index: Int[chain, draw, batch], the examples of those batches; None where every batch is all examples. theta:
    Float[chain, param], where the chains ended. acceptance: Float64[chain], the share of accepted proposals (1 for
    samplers that propose nothing). observed: what `observe` returned, a list over draws. noise: Float64[2, chain,
    draw], nats^2, the variance that the batch alone gives each of these losses and, second, each less its batch's loss
    at w*; 0 where every batch is all examples. motion: where some draws lie from w*. None: unknown. Of a potential with
    several members the axis is [member chain], until `of` picks one.
    """

    losses: Tensor
    index: Tensor | None
    theta: Tensor
    acceptance: Tensor
    observed: list[Tensor]
    noise: Tensor | None = None
    motion: Motion | None = None

    def of(self, member: int, n_chains: int) -> "Draws":
        """The draws of one member."""
        own = slice(member * n_chains, (member + 1) * n_chains)
        return Draws(
            losses=self.losses[own],
            index=self.index,
            theta=self.theta[own],
            acceptance=self.acceptance[own],
            observed=[seen[own] for seen in self.observed],
            noise=None if self.noise is None else self.noise[:, own],
            motion=None if self.motion is None else self.motion.of(own),
        )


@dataclass(frozen=True)
class _Point:
    """Weights with what was evaluated there: losses of examples Float64[chain, batch] and their means Float64[chain],
    |theta - anchor|^2 Float64[chain], the slope.

    The square is for those alone who accept or reject by it, and nothing otherwise.
    """

    theta: Tensor
    of_examples: Tensor
    losses: Tensor
    square: Tensor
    slope: Slope

    def energy(self, config: LLCConfig) -> Tensor:
        """U, Float64[chain]."""
        return config.nbeta * self.losses + 0.5 * config.localization * self.square


def sample(
    potential: Potential,
    config: LLCConfig,
    seed: int,
    names: Sequence[seeds.Name],
    members: Sequence[seeds.Name] = ("model",),
    observe: Callable[[Tensor], Tensor] | None = None,
    start: Start | None = None,
    loops: bool = False,
) -> Draws:
    """Draw from exp(-nbeta L(theta) - localization / 2 |theta - anchor|^2), starting at the anchor.

    A draw's loss is that of its own batch at the weights before the step, so batch and weights are
    independent and the loss is unbiased. Batches are drawn with replacement. A chain whose loss or
    weights leave the finite numbers stays NaN from there on and does not touch the others.

    Args:
        names: what tells this run from others with the same seed; chain c draws its batches, which all
            members share, from the stream (seed, *names, "batch", c).
        members: names of the potential's members; in chain c each draws from (seed, *names, member, "noise", c)
            and, for mala, (seed, *names, member, "accept", c).
        observe: called with the weights of every draw, Float[chain, param]; costs the chains nothing else.
        start: what the draws are held against; they are the same without it.
        loops: noise and steps by compiled loops, where they take the numbers: the same up to rounding.
    """
    sampler = SAMPLERS[config.sampler]
    n_examples, n_params = potential.n_examples, potential.anchor.shape[-1]
    anchor = potential.anchor.reshape(-1, n_params).repeat_interleave(config.n_chains, 0)
    if len(anchor) != len(members) * config.n_chains:
        raise ValueError(f"the potential has {len(anchor) // config.n_chains} members, {len(members)} were named")

    device = anchor.device

    def streams(what: str) -> list[torch.Generator]:
        each = product(members, range(config.n_chains))
        return [seeds.stream(seed, *names, member, what, chain, device=device) for member, chain in each]

    normal, coins = Normals(streams("noise"), n_params, anchor, loops), streams("accept")
    batches = [seeds.stream(seed, *names, "batch", chain, device=device) for chain in range(config.n_chains)]

    everything = torch.arange(n_examples, device=device).expand(config.n_chains, -1)
    # Nothing leaves the device before the end: a GPU would wait for it in every step.
    losses = torch.full((len(anchor), config.n_draws), torch.nan, dtype=torch.float64, device=device)
    noise = torch.zeros(2, *losses.shape, dtype=torch.float64, device=device)
    at_start = None if start is None else start.losses.to(device)
    gradient = None if start is None else start.gradient.repeat_interleave(config.n_chains, 0)
    watch = Watch(anchor, config.n_draws, gradient)
    accepted = torch.zeros(len(anchor), dtype=torch.float64, device=device)
    indices, observed = [], []
    theta = anchor.clone()
    state, advance = sampler.start(theta, normal, config), sampler.step_of(theta, loops)
    point: _Point | None = None
    for step in range(config.n_burnin + config.n_draws):
        index = everything
        if config.batch_size is not None:
            size = (config.batch_size,)
            index = torch.stack([torch.randint(n_examples, size, generator=rng, device=device) for rng in batches])
        new = _evaluate(potential, state.theta, anchor, index, config)
        if sampler.metropolis and point is not None:
            accept = _accept(point, new, coins, config)
            accepted += accept
            new = _choose(accept, new, point)
            state = State(new.theta)
        point = new
        if step >= config.n_burnin:
            draw = step - config.n_burnin
            losses[:, draw] = point.losses
            if config.batch_size is not None:
                luck = None if at_start is None else at_start[index].repeat(len(members), 1)
                noise[:, :, draw] = batch_noise(point.of_examples, luck)
            watch.look(draw, point.theta, point.slope.grad)
            indices.append(index)
            if observe is not None:
                observed.append(observe(point.theta))
        state = advance(state, point.slope, normal(), config)
    losses = losses.cpu()
    diverged = (~losses.isfinite()).cummax(1).values
    n_proposals = config.n_burnin + config.n_draws - 1
    return Draws(
        losses=losses.masked_fill(diverged, torch.nan),
        index=None if config.batch_size is None else torch.stack(indices, dim=1).cpu(),
        theta=point.theta if sampler.metropolis and point is not None else state.theta,
        acceptance=accepted.cpu() / n_proposals if sampler.metropolis else torch.ones(len(anchor), dtype=torch.float64),
        observed=observed,
        noise=noise.cpu(),
        motion=watch.notes(),
    )


def batch_noise(losses: Tensor, luck: Tensor | None) -> Tensor:
    """s^2 / batch of Float64[..., batch] losses, and of them less their `luck`, the same examples' at w*: [2, ...].

    s^2 is the variance within the batch. NaN where there is none: in a batch of one, and without the luck.
    """
    both = torch.stack([losses, torch.full_like(losses, torch.nan) if luck is None else losses - luck])
    size = losses.shape[-1]
    return both.var(-1) / size if size > 1 else both[..., 0] * torch.nan


def _evaluate(potential: Potential, theta: Tensor, anchor: Tensor, index: Tensor, config: LLCConfig) -> _Point:
    example_losses, grad = potential.losses_and_grad(theta, index)
    example_losses = example_losses.double()
    losses = example_losses.mean(1)
    metropolis = SAMPLERS[config.sampler].metropolis
    square = (theta - anchor).double().square().sum(1) if metropolis else torch.zeros_like(losses)
    return _Point(theta, example_losses, losses, square, Slope(grad, anchor))


def _accept(old: _Point, new: _Point, coins: Sequence[torch.Generator], config: LLCConfig) -> Tensor:
    """Which proposals are taken, Bool[chain]. One that is not finite never is."""
    energies = old.energy(config), new.energy(config)
    forces = old.slope.force(old.theta, config), new.slope.force(new.theta, config)
    log_ratio = mala_log_acceptance(old.theta, new.theta, *energies, *forces, config.step_size)
    coin = torch.cat([torch.rand(1, generator=rng, dtype=torch.float64, device=rng.device) for rng in coins])
    return coin.log() < log_ratio


def _choose(take: Tensor, new: _Point, old: _Point) -> _Point:
    rows = take[:, None]
    return _Point(
        torch.where(rows, new.theta, old.theta),
        torch.where(rows, new.of_examples, old.of_examples),
        torch.where(take, new.losses, old.losses),
        torch.where(take, new.square, old.square),
        Slope(torch.where(rows, new.slope.grad, old.slope.grad), new.slope.anchor),
    )
