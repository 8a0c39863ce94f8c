"""The steps of the samplers, as pure functions on flat replica parameters: noise goes in, weights come out."""

from torch import Tensor


def sgld_step(
    theta: Tensor, grad: Tensor, anchor: Tensor, noise: Tensor, *, nbeta: float, step_size: float, localization: float
) -> Tensor:
    """One step of localized SGLD.

    theta' = theta - (step_size / 2) * (nbeta * grad + localization * (theta - anchor)) + sqrt(step_size) * noise

    On L = 1/2 sum_i h_i w_i^2 with full gradients and anchor 0, its stationary variance is
    1 / (a_i (1 - step_size a_i / 4)) with a_i = nbeta h_i + localization (for step_size a_i < 4),
    against 1 / a_i of the distribution it aims at: the step-size bias is first order in step_size a_i.

    Args:
        theta, grad, noise: Float[replica, param]; grad is that of the mean loss; noise ~ N(0, 1).
        anchor: Float[param], w*.

    Source: Welling & Teh 2011; localized: Lau et al. 2023 (arXiv:2308.12108), eq. 17.
    """
    drift = nbeta * grad + localization * (theta - anchor)
    return theta - 0.5 * step_size * drift + step_size**0.5 * noise
