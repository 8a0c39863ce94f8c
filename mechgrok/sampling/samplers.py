"""What a sampler is to a chain: how it starts, how it steps, and how stiff a slope it bears."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mechgrok.config import LLCConfig, SamplerName
from mechgrok.loops import steps
from mechgrok.loops.kept import serves
from mechgrok.sampling import kernels

Normal = Callable[[], Tensor]


class State(NamedTuple):
    """theta: Float[replica, param], where the loss is evaluated next; carried: what else the sampler remembers."""

    theta: Tensor
    carried: tuple[Tensor, ...] = ()


class Slope(NamedTuple):
    """What U = nbeta L + localization / 2 |theta - anchor|^2 falls by: the gradient of the mean loss L, and the anchor.

    Float[replica, param] each.
    """

    grad: Tensor
    anchor: Tensor

    def force(self, theta: Tensor, config: LLCConfig) -> Tensor:
        """The gradient of U at theta, where `grad` was taken."""
        return (theta - self.anchor).mul_(config.localization).add_(self.grad, alpha=config.nbeta)


@dataclass(frozen=True)
class Sampler:
    """start(theta, normal, config) -> State, normal() drawing N(0, 1); step(state, slope, noise, config) -> State.

    stiffness(config): a product of step_size and the largest curvature of U that is safe to begin with;
    sgld's variance is then within 5 % of the target's, and those without a bias on quadratics stay well
    below the limit of 4.
    forgetting(config, curvature): what is left after one step of the variance of a displacement along a direction
    in which U has this curvature, step_size curvature < 2: the square of the step's largest eigenvalue there.
    metropolis: proposals are accepted or rejected, which needs exact losses and gradients.
    looped: the same step by one compiled loop, for numbers that such loops take.
    """

    start: Callable[[Tensor, Normal, LLCConfig], State]
    step: Callable[[State, Slope, Tensor, LLCConfig], State]
    stiffness: Callable[[LLCConfig], float]
    forgetting: Callable[[LLCConfig, float], float]
    metropolis: bool = False
    looped: Callable[[State, Slope, Tensor, LLCConfig], State] | None = None

    def step_of(self, theta: Tensor, loops: bool) -> Callable[[State, Slope, Tensor, LLCConfig], State]:
        """The step for weights such as these; loops: whether compiled ones are wanted."""
        return self.looped if self.looped is not None and loops and serves(theta) else self.step


def _at_rest(theta: Tensor, normal: Normal, config: LLCConfig) -> State:
    return State(theta)


def _sgld(state: State, slope: Slope, noise: Tensor, config: LLCConfig) -> State:
    return State(kernels.sgld(state.theta, slope.force(state.theta, config), noise, step_size=config.step_size))


def _sgld_loop(state: State, slope: Slope, noise: Tensor, config: LLCConfig) -> State:
    return State(steps.sgld(state.theta, *slope, noise, config))


def _no_second_moment(theta: Tensor, normal: Normal, config: LLCConfig) -> State:
    return State(theta, (torch.zeros_like(theta),))


def _rmsprop_sgld(state: State, slope: Slope, noise: Tensor, config: LLCConfig) -> State:
    (second_moment,) = state.carried
    theta, second_moment = kernels.rmsprop_sgld(
        state.theta, second_moment, slope.grad, slope.force(state.theta, config), noise,
        step_size=config.step_size, decay=config.rmsprop_decay, stability=config.rmsprop_stability,
    )  # fmt: skip
    return State(theta, (second_moment,))


def _moving(theta: Tensor, normal: Normal, config: LLCConfig) -> State:
    return State(theta, (normal(),))  # the velocity, from its stationary law N(0, 1)


def _moving_with_thermostat(theta: Tensor, normal: Normal, config: LLCConfig) -> State:
    friction = -math.log(config.momentum)  # what exact gradients need
    return State(theta, (normal(), torch.full_like(theta[:, :1], friction)))


def _sgnht(state: State, slope: Slope, noise: Tensor, config: LLCConfig) -> State:
    velocity, friction = state.carried
    theta, velocity, friction = kernels.sgnht(
        state.theta, velocity, friction, slope.force(state.theta, config), noise,
        step_size=config.step_size, momentum=config.momentum,
    )  # fmt: skip
    return State(theta, (velocity, friction))


def _baoab(state: State, slope: Slope, noise: Tensor, config: LLCConfig) -> State:
    (velocity,) = state.carried
    force = slope.force(state.theta, config)
    theta, velocity = kernels.baoab(
        state.theta, velocity, force, noise, step_size=config.step_size, momentum=config.momentum
    )
    return State(theta, (velocity,))


def _baoab_loop(state: State, slope: Slope, noise: Tensor, config: LLCConfig) -> State:
    (velocity,) = state.carried
    theta, velocity = steps.baoab(state.theta, velocity, *slope, noise, config)
    return State(theta, (velocity,))


def _forgets(config: LLCConfig, curvature: float) -> float:
    return (1 - config.step_size * curvature / 2) ** 2


def _forgets_at_most(config: LLCConfig, curvature: float) -> float:
    """The preconditioner is at most 1 / stability, and nearly that where the gradients are small."""
    return (1 - config.step_size / config.rmsprop_stability * curvature / 2) ** 2


def _forgets_with_velocity(config: LLCConfig, curvature: float) -> float:
    """(theta, velocity) goes by a matrix of trace 1 + m - step_size a (1 + m) / 2 and determinant m, the momentum."""
    m = config.momentum
    trace = 1 + m - config.step_size * curvature * (1 + m) / 2
    square = trace**2 - 4 * m
    return m if square < 0 else ((abs(trace) + math.sqrt(square)) / 2) ** 2


SAMPLERS: dict[SamplerName, Sampler] = {
    "sgld": Sampler(_at_rest, _sgld, lambda config: 0.2, _forgets, looped=_sgld_loop),
    # The preconditioner is at most 1 / stability.
    "rmsprop_sgld": Sampler(
        _no_second_moment, _rmsprop_sgld, lambda config: 0.2 * config.rmsprop_stability, _forgets_at_most
    ),
    "sgnht": Sampler(_moving_with_thermostat, _sgnht, lambda config: 1.0, _forgets_with_velocity),
    "baoab": Sampler(_moving, _baoab, lambda config: 1.0, _forgets_with_velocity, looped=_baoab_loop),
    "mala": Sampler(_at_rest, _sgld, lambda config: 0.2, _forgets, metropolis=True, looped=_sgld_loop),
}
