"""Where the chains went from w*: how far down the slope that the loss has there, and whether loss and pull balance."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechgrok.config import LLCConfig
from mechgrok.sampling.diagnostics import UNKNOWN, Measured, mean_and_error
from mechgrok.sampling.potential import Potential
from mechgrok.sampling.samplers import SAMPLERS

N_WATCHED = 64  # draws of a chain that are looked at, evenly spaced: each costs a few passes over the weights
BLOCK = 256  # examples whose gradient is taken at once


@dataclass(frozen=True)
class Start:
    """What is known at w* before any chain: losses Float64[example], nats, and the gradient of their mean.

    gradient: Float[member, param].
    """

    losses: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Motion:
    """Of the watched draws, Float64[chain, watched] each, with x = w - w*.

    at: Int[watched], which draws. work: x . grad L_b(w), nats, b the draw's own batch. square: |x|^2.
    descent: x . g, nats, g the gradient at w* on all of the data; NaN where that was not told.
    """

    at: Tensor
    work: Tensor
    square: Tensor
    descent: Tensor

    def of(self, chains: slice | Tensor) -> "Motion":
        """Those of some chains."""
        return Motion(self.at, self.work[chains], self.square[chains], self.descent[chains])


class Watch:
    """Takes notes of chains that start at `anchor`, Float[chain, param], where the loss has this `gradient`."""

    def __init__(self, anchor: Tensor, n_draws: int, gradient: Tensor | None) -> None:
        self._anchor, self._gradient = anchor, gradient
        n_watched = min(n_draws, N_WATCHED)
        self._at = [i * (n_draws - 1) // (n_watched - 1) for i in range(n_watched)]
        self._found: list[Tensor] = []

    def look(self, draw: int, theta: Tensor, grad: Tensor) -> None:
        """theta, grad: Float[chain, param], the weights of this draw and the gradient there."""
        if draw != self._at[min(len(self._found), len(self._at) - 1)]:
            return
        away = theta - self._anchor
        descent = torch.full_like(away[:, 0], torch.nan) if self._gradient is None else _dot(away, self._gradient)
        self._found.append(torch.stack([_dot(away, grad), _dot(away, away), descent]).double())

    def notes(self) -> Motion:
        """After the last draw."""
        work, square, descent = torch.stack(self._found, dim=2).cpu().unbind()
        return Motion(torch.tensor(self._at), work, square, descent)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)


def gradient_at_start(potential: Potential) -> Tensor:
    """The gradient of the mean loss over all examples at the anchor, Float[member, param]: one pass over the data."""
    anchor = potential.anchor.reshape(-1, potential.anchor.shape[-1])
    total = torch.zeros_like(anchor)
    for block in torch.arange(potential.n_examples, device=anchor.device).split(BLOCK):
        total += potential.losses_and_grad(anchor, block[None])[1] * (len(block) / potential.n_examples)
    return total


def slope_share(motion: Motion, losses: np.ndarray, nbeta: float) -> tuple[Measured, Measured]:
    """(descent, gradient_variance), as `ChainHealth` has them, in units of the LLC, with their standard errors.

    descent = -nbeta mean(x . g),   gradient_variance = nbeta^2 Cov(L, x . g)   over the watched draws

    On L = g . x + x' H x / 2 the draws lie around m = -nbeta A^-1 g, A = nbeta H + localization, with variance A^-1,
    and the slope there is g + H m = localization A^-1 g. So descent is nbeta^2 g' A^-1 g. Of it llc loses between a
    half (where nbeta H is most of A) and all (where the localization is): llc = 1/2 sum r - nbeta^2 g' A^-1 (1 - r / 2)
    g. And Var L gains (g + H m)' A^-1 (g + H m) = localization^2 g' A^-3 g, while Cov(L, x . g) is localization g' A^-2
    g, which is at least as much and needs no curvature to be known.

    Args:
        motion, losses: of the chains that stayed finite; losses Float[chain, draw].
    """
    along = motion.descent.numpy()
    if not np.isfinite(along).all():
        return UNKNOWN, UNKNOWN
    mean, error = mean_and_error(along)
    watched = losses[:, motion.at]
    covariance, its_error = mean_and_error((watched - watched.mean()) * (along - mean))
    return (-nbeta * mean, nbeta * error), (nbeta**2 * covariance, nbeta**2 * its_error)


def missing_share(motion: Motion | None, config: LLCConfig, n_params: int, llc: float) -> float:
    """The largest share of the LLC that directions may lack because the chains were too short for them.

    Each chain starts at w*, so a direction of curvature a of the sampled energy has, after t steps, its variance less
    the share f(a)^t, f being the sampler's `forgetting`. Two bounds, of which the smaller holds:

    1. From the settings. No curvature is below the localization, so no direction lacks more than f(localization)^t,
       averaged over the draws.
    2. From the draws. x . grad U has mean n_params under any law exp(-U), x = w - w*, and on a quadratic each direction
       that is at rest makes 1 of it and one that has not moved 0. So at most b = (n_params - mean(x . grad U)) / 2
       is missing of 1/2 sum r_i, and b / (llc + b) of the LLC. Three standard errors are taken off b, so that noise
       accuses nobody.

    Exact for sgld on quadratics; a step size or batches that heat sharp directions hide as much in the second.

    Without a localization flat directions never come to rest, and nothing bounds what they lack: NaN, but 1 where
    surely not even one direction is at rest, as then nothing has happened yet.
    """
    first = unsettled_share(config, config.localization)
    if motion is None:
        return first if config.localization > 0 else math.nan
    mean, error = mean_and_error((config.nbeta * motion.work + config.localization * motion.square).numpy())
    if config.localization == 0:
        return 1.0 if mean + 3 * error < 1 else math.nan
    lacking = max(0.0, (n_params - mean - 3 * error) / 2)
    return min(first, lacking / (max(llc, 0.0) + lacking) if lacking > 0 else 0.0)


def unsettled_share(config: LLCConfig, curvature: float) -> float:
    """f^t averaged over the draws of a chain, t their number of steps from w*, f the `forgetting` at this curvature."""
    left, n = SAMPLERS[config.sampler].forgetting(config, curvature), config.n_draws
    if left >= 1:  # nothing is forgotten, or the step is too large for any law to be reached
        return 1.0
    return left**config.n_burnin * (1 - left**n) / (n * (1 - left))
