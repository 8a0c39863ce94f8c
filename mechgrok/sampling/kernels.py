"""The steps of the samplers, as pure functions on flat replica parameters: noise goes in, weights come out.

All aim at exp(-U(theta)), U = nbeta L(theta) + localization / 2 |theta - anchor|^2, and see only its
gradient. `theta`, `force`, `noise` are Float[replica, param]; force = grad U; noise ~ N(0, 1).

step_size (epsilon) is SGLD's. The samplers with a velocity move in time steps h = sqrt(step_size), so that
all drift and diffuse alike over one step, and all are stable on a curvature a of U for step_size * a < 4.

Bias, on a quadratic with curvature a and exact gradients (the target's variance is 1 / a):
    sgld          1 / (a (1 - step_size a / 4))
    rmsprop_sgld  sgld's at the preconditioned step, and a bias at any step size: see there
    sgnht, baoab  1 / a: none at any stable step size; elsewhere first order in step_size, second if momentum is 0
    mala          none at all
Gradient noise of variance s^2 in the force heats sgld by the factor 1 + step_size s^2 / 4 (to first order) and
baoab by (1 + momentum) / (1 - momentum) times as much; sgnht's thermostat takes it out where it is uniform;
mala admits none.
"""

import math

import torch
from torch import Tensor


def sgld(theta: Tensor, force: Tensor, noise: Tensor, *, step_size: float) -> Tensor:
    """Stochastic gradient Langevin dynamics: theta' = theta - step_size / 2 force + sqrt(step_size) noise.

    Source: Welling & Teh 2011, eq. 4; localized: Lau et al. 2023 (arXiv:2308.12108), eq. 17.
    """
    return theta.add(force, alpha=-0.5 * step_size).add_(noise, alpha=step_size**0.5)


def rmsprop_sgld(
    theta: Tensor,
    second_moment: Tensor,
    grad: Tensor,
    force: Tensor,
    noise: Tensor,
    *,
    step_size: float,
    decay: float,
    stability: float,
) -> tuple[Tensor, Tensor]:
    """SGLD preconditioned as in RMSprop; returns (theta', V').

    V' = decay V + (1 - decay) grad^2,   G = 1 / (stability + sqrt(V'))
    theta' = theta - step_size / 2 G force + sqrt(step_size G) noise

    The correction term Gamma_i = dG_ii / dtheta_i of the exact diffusion is left out, as in the
    paper's own algorithm and in devinterp: it is of order (1 - decay). So the stationary law is not
    quite the target's at any step size; on a unit quadratic with nbeta 10 and the defaults the
    variance is a fifth too large.

    Args:
        grad: of the mean loss, not of U: V is in units of the loss, as is `stability`.

    Source: Li, Chen, Carlson & Carin 2016 (arXiv:1512.07666), Algorithm 1.
    """
    second_moment = decay * second_moment + (1 - decay) * grad**2
    scale = 1 / (stability + second_moment.sqrt())
    return theta - 0.5 * step_size * scale * force + (step_size * scale).sqrt() * noise, second_moment


def sgnht(
    theta: Tensor,
    velocity: Tensor,
    friction: Tensor,
    force: Tensor,
    noise: Tensor,
    *,
    step_size: float,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stochastic gradient Nose-Hoover thermostat in the splitting BADODAB; returns (theta', velocity', friction').

    With h = sqrt(step_size), x = the friction of one step, Float[replica, 1], and x0 = -log(momentum):
    v <- v - h force                                                    B
    theta <- theta + h / 2 v                                            A
    x <- x + (|v|^2 / n_params - 1) / 20                                D, thermal mass 10 step_size
    v <- exp(-x) v + sqrt(x0 (1 - exp(-2 x)) / x) noise                 O, exact
    x <- x + (|v|^2 / n_params - 1) / 20                                D
    theta <- theta + h / 2 v                                            A

    It is `baoab` with a friction that adapts until the kinetic energy is that of the target, which
    absorbs gradient noise of unknown size. One friction serves all parameters: with noise that
    differs among them, some stay too hot and some too cold. The thermal mass is in units of the step,
    so that the thermostat settles within tens of steps at any step size.

    Source: Ding et al. 2014 (NIPS), eq. 4, the dynamics; Leimkuhler & Shang 2016 (arXiv:1505.06889), the
    splitting: the Euler scheme of the former is off by (1 - momentum) / (1 + momentum) at any step size.
    """
    h = step_size**0.5
    velocity = velocity - h * force
    theta = theta + 0.5 * h * velocity
    friction = friction + 0.05 * ((velocity**2).mean(1, keepdim=True) - 1)
    # (1 - exp(-2 x)) / x, which is 2 at x = 0.
    spread = torch.where(friction.abs() < 1e-6, 2.0, -torch.expm1(-2 * friction) / friction)
    velocity = torch.exp(-friction) * velocity + (-math.log(momentum) * spread).sqrt() * noise
    friction = friction + 0.05 * ((velocity**2).mean(1, keepdim=True) - 1)
    return theta + 0.5 * h * velocity, velocity, friction


def baoab(
    theta: Tensor, velocity: Tensor, force: Tensor, noise: Tensor, *, step_size: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """Underdamped Langevin dynamics in the splitting BAOAB; returns (theta', velocity').

    With h = sqrt(step_size):
    v <- v - h force                                          B, the second half of one and the first of the next
    theta <- theta + h / 2 v                                  A
    v <- momentum v + sqrt(1 - momentum^2) noise              O, exact; momentum = exp(-friction h)
    theta <- theta + h / 2 v                                  A

    The two half kicks B see the same gradient, so one evaluation serves both, and the positions are
    those of BAOAB. With momentum 0 it is the Leimkuhler-Matthews method, which costs what SGLD costs.

    Source: Leimkuhler & Matthews 2013 (Appl. Math. Res. Express), 2013 (J. Chem. Phys. 138, 174102).
    """
    h = step_size**0.5
    velocity = velocity.add(force, alpha=-h)
    theta = theta.add(velocity, alpha=0.5 * h)
    velocity.mul_(momentum).add_(noise, alpha=(1 - momentum**2) ** 0.5)
    return theta.add_(velocity, alpha=0.5 * h), velocity


def mala_log_acceptance(
    old: Tensor,
    new: Tensor,
    old_energy: Tensor,
    new_energy: Tensor,
    old_force: Tensor,
    new_force: Tensor,
    step_size: float,
) -> Tensor:
    """Log of the Metropolis-Hastings ratio for a step of `sgld` with exact gradients, Float64[replica].

    U(old) - U(new) + log q(old | new) - log q(new | old),  q(b | a) = N(a - step_size / 2 force(a), step_size)

    Source: Roberts & Tweedie 1996 (Bernoulli 2), the Metropolis-adjusted Langevin algorithm.
    """

    def log_q(there: Tensor, here: Tensor, force: Tensor) -> Tensor:
        jump = there.double() - here.double() + 0.5 * step_size * force.double()
        return -(jump**2).sum(1) / (2 * step_size)

    return old_energy - new_energy + log_q(old, new, new_force) - log_q(new, old, old_force)
