"""The largest curvature of a loss, and the step size that it allows."""

import math

import torch
from torch import Tensor

from mechgrok import seeds
from mechgrok.config import LLCConfig
from mechgrok.sampling.chains import sample
from mechgrok.sampling.potential import Potential
from mechgrok.sampling.samplers import SAMPLERS

MAX_EXAMPLES = 512  # enough for a scale
N_PILOT = 30


def sharpness(potential: Potential, at: Tensor, seed: int, n_iterations: int = 12) -> float:
    """|largest eigenvalue| of the mean loss's Hessian at `at`, Float[param], by power iteration.

    Hessian-vector products are central differences of gradients, H v = (g(at + r v) - g(at - r v)) / 2 r with
    r = .001 |at| (or .001 sqrt(n_params) at the origin), on at most 512 examples. A lower bound that
    a dozen iterations bring within a few percent where one eigenvalue leads.
    """
    rng = seeds.stream(seed, "sharpness")
    index = torch.randperm(potential.n_examples, generator=rng)[:MAX_EXAMPLES].expand(2, -1).to(at.device)
    direction = torch.randn(at.shape, generator=rng, dtype=at.dtype).to(at.device)
    norm = float(at.norm())
    radius = 1e-3 * (norm if norm > 0 else len(at) ** 0.5)
    curvature = 0.0
    for _ in range(n_iterations):
        direction = direction / direction.norm().clamp_min(1e-30)
        shift = radius * direction
        _, (ahead, behind) = potential.losses_and_grad(torch.stack([at + shift, at - shift]), index)
        direction = (ahead - behind) / (2 * radius)
        curvature = float(direction.norm())
    return curvature


def allowed_step_size(potential: Potential, config: LLCConfig, seed: int, curvature: float | None = None) -> float:
    """The sampler's stiffness over the largest curvature of U, at the anchor and where a short chain ends.

    The pilot chain counts because a flat minimum can lie among steep walls. Where it diverges it is
    run again at a tenth of the step size, up to four times. config.step_size plays no part.

    Args:
        curvature: the sharpness at the anchor, if it is known already.
    """
    stiffness = SAMPLERS[config.sampler].stiffness(config)
    if curvature is None:
        curvature = sharpness(potential, potential.anchor, seed)
    step_size = stiffness / (config.nbeta * curvature + config.localization)
    for _ in range(4):
        pilot = config.model_copy(update={"step_size": step_size, "n_draws": N_PILOT, "n_burnin": 0})
        end = sample(potential, pilot, seed, ("pilot",)).theta[0]
        there = sharpness(potential, end, seed, 6) if bool(end.isfinite().all()) else math.inf
        if math.isfinite(there):
            return stiffness / (config.nbeta * max(curvature, there) + config.localization)
        step_size /= 10
    return step_size
