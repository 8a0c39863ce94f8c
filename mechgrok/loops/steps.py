"""A sampler's step in one pass: each number is read, kicked, moved and written while it is in a register.

Torch's operations would carry all parameters of all replicas to memory and back five to nine times.
"""

import torch
from numba import njit
from torch import Tensor

from mechgrok.config import LLCConfig
from mechgrok.loops.entry import holds
from mechgrok.loops.kept import OPTIONS, flat, keeper
from mechgrok.loops.lanes import WIDTH, load, minus, number, plus, spread, store, times

kept = keeper()
ZERO = number(0)


def sgld(theta: Tensor, grad: Tensor, anchor: Tensor, noise: Tensor, config: LLCConfig) -> Tensor:
    """`kernels.sgld` with the force nbeta grad + localization (theta - anchor); all are Float[replica, param]."""
    moved, by = torch.empty_like(theta), 0.5 * config.step_size
    n = theta.numel()
    holds("sgld", grad=(grad, n), anchor=(anchor, n), noise=(noise, n))
    factors = (by * config.nbeta, by * config.localization, config.step_size**0.5)
    _sgld(*flat(theta, grad, anchor, noise), *map(number, factors), *flat(moved))
    return moved


def baoab(
    theta: Tensor, velocity: Tensor, grad: Tensor, anchor: Tensor, noise: Tensor, config: LLCConfig
) -> tuple[Tensor, Tensor]:
    """`kernels.baoab`, (theta', velocity'), with that force."""
    moved, changed, h = torch.empty_like(theta), torch.empty_like(theta), config.step_size**0.5
    n = theta.numel()
    holds("baoab", velocity=(velocity, n), grad=(grad, n), anchor=(anchor, n), noise=(noise, n))
    wide = (1 - config.momentum**2) ** 0.5
    factors = (h * config.nbeta, h * config.localization, 0.5 * h, config.momentum, wide)
    _baoab(*flat(theta, velocity, grad, anchor, noise), *map(number, factors), *flat(moved, changed))
    return moved, changed


@kept
def _sgld(theta, grad, anchor, noise, by_grad, by_away, wide, moved):
    for at in range(0, len(theta), WIDTH):
        n = min(WIDTH, len(theta) - at)
        x, kick = _kicked(theta, grad, anchor, by_grad, by_away, at, n)
        store(moved, at, n, plus(minus(x, kick), times(spread(wide), load(noise, at, n, ZERO))))


@kept
def _baoab(theta, velocity, grad, anchor, noise, by_grad, by_away, half, momentum, wide, moved, changed):
    for at in range(0, len(theta), WIDTH):
        n = min(WIDTH, len(theta) - at)
        x, kick = _kicked(theta, grad, anchor, by_grad, by_away, at, n)
        v = minus(load(velocity, at, n, ZERO), kick)
        new = plus(times(spread(momentum), v), times(spread(wide), load(noise, at, n, ZERO)))
        store(changed, at, n, new)
        store(moved, at, n, plus(x, times(spread(half), plus(v, new))))


@njit(**OPTIONS)
def _kicked(theta, grad, anchor, by_grad, by_away, at, n):
    """(sixteen numbers of theta, by_grad grad + by_away (theta - anchor))."""
    x = load(theta, at, n, ZERO)
    away = minus(x, load(anchor, at, n, ZERO))
    return x, plus(times(spread(by_grad), load(grad, at, n, ZERO)), times(spread(by_away), away))
