"""Losses on other data at the draws of an estimate, and what their covariances say."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mechgrok.config import LLCConfig
from mechgrok.errors import ConfigError, ShapeError
from mechgrok.llc.estimate import as_set, check_config, draw, estimates_of
from mechgrok.llc.precision import say_if_idle
from mechgrok.llc.problem import ComponentLike, Data, Problem, check_batch_size, make_problem
from mechgrok.llc.work import estimate_work, loops_pay
from mechgrok.sampling.potential import LossFn
from mechgrok.types import LLCEstimate

BLOCK = 256  # examples whose losses are evaluated at once, for every chain


@dataclass(frozen=True)
class Observation:
    """An estimate, with the losses of other examples at its very draws.

    losses: name -> Float64[chain, draw, example], nats. init_losses: name -> Float64[example], at w*.
    """

    estimate: LLCEstimate
    losses: Mapping[str, np.ndarray]
    init_losses: Mapping[str, np.ndarray]

    def of(self, name: str) -> np.ndarray:
        """The losses of one observed set, from chains that did not diverge: Float64[chain, draw, example]."""
        if name not in self.losses:
            raise ConfigError(f"nothing was observed under {name!r}; observed are {', '.join(self.losses)}")
        kept = np.isfinite(self.estimate.losses).all(axis=1)
        if kept.sum() < 2:
            raise ConfigError("fewer than two chains stayed finite, so nothing can be said; lower step_size")
        return self.losses[name][kept]


@dataclass(frozen=True)
class Covariances:
    """values with the standard error of each, by leaving out one chain at a time."""

    values: np.ndarray
    std_error: np.ndarray


def observe(
    model: torch.nn.Module,
    data: Data,
    observed: Mapping[str, Data],
    *,
    config: LLCConfig,
    seed: int,
    component: ComponentLike = None,
    loss_fn: LossFn | None = None,
) -> Observation:
    """Sample as `estimate_llc` does, and evaluate every observed example at every draw.

    The chains run on `data` and are those of `estimate_llc` at the same settings and seed, to the bit:
    what is observed does not change them. Costs a forward pass over all observed examples per draw.

    Raises:
        ComponentError, ConfigError, ShapeError: before any sampling.
    """
    check_config(config)
    if config.engine != "mechgrok":
        raise ConfigError("observables need mechgrok's own engine; leave engine out")
    loops = loops_pay([estimate_work(model, data, config)], [config])
    problem = make_problem(model, data, component, loss_fn=loss_fn, loops=loops, **as_set(config))
    check_batch_size(config, len(problem.init_losses))
    say_if_idle(config, model, data)
    if not isinstance(observed, Mapping) or not observed:
        raise ConfigError('nothing to observe; give at least one named set of examples, as in {"test": examples}')
    others = {name: problem.on(examples) for name, examples in observed.items()}

    def losses_at(theta: torch.Tensor) -> torch.Tensor:
        return torch.cat([_losses(other, theta) for other in others.values()], dim=1)

    draws = draw(problem, config, seed, observe=losses_at)
    (estimate,) = estimates_of(problem, config, draws, seed)
    sizes = [len(other.init_losses) for other in others.values()]
    parts = torch.stack(draws.observed, dim=1).split(sizes, dim=2)
    return Observation(
        estimate=estimate,
        losses={name: part.numpy() for name, part in zip(others, parts, strict=True)},
        init_losses={name: other.init_losses.numpy() for name, other in others.items()},
    )


def influences(observation: Observation, of: str, on: str) -> Covariances:
    """Bayesian influence of each example of one observed set on each of another, Float[example of, example on].

    influence_ij = -Cov(loss_i, loss_j) over all draws, nats^2: the derivative of E[loss_j] by the weight
    of loss_i in the sampled energy. Negative: more of i lowers the loss of j.

    Source: Kreer et al. 2025 (arXiv:2509.26544), the local Bayesian influence function.
    """
    first, second = observation.of(of), observation.of(on)

    def negative_covariance(chains: np.ndarray) -> np.ndarray:
        a, b = (losses[chains].reshape(-1, losses.shape[2]) for losses in (first, second))
        return -(a - a.mean(0)).T @ (b - b.mean(0)) / (len(a) - 1)

    return _jackknife(negative_covariance, len(first))


def susceptibilities(full: Observation, restricted: Observation, data: str, on: str) -> Covariances:
    """How a component answers to a shift of the data towards each observed example: Float[example].

    chi_z = -(E_C[phi (l_z - L)] - E_C[phi] E[l_z - L]),   phi = L(w) - L(w*)

    E_C is over draws that move the component alone, E over draws that move the whole model. Negative:
    the component expresses what the example needs. The scale depends on the component in an unknown
    way, so compare examples within a component, not raw values between components.

    Args:
        full, restricted: observations of the same sets with component=None and with the component.
        data: the observed set that stands for the sampled data; its mean loss is L.
        on: the observed set whose examples are asked about.

    Source: Baker et al. 2025 (arXiv:2504.18274), appendix C.4, for each example rather than token.
    """
    for name in (data, on):
        if not np.array_equal(full.init_losses.get(name), restricted.init_losses.get(name)):  # type: ignore[arg-type]
            raise ShapeError(f"both observations must hold the same examples under {name!r}")
    init_loss = restricted.init_losses[data].mean()
    losses, shift = {}, {}
    for key, observation in (("full", full), ("restricted", restricted)):
        losses[key] = observation.of(data).mean(axis=2)
        shift[key] = observation.of(on) - losses[key][:, :, None]
    n_chains = min(len(shift["full"]), len(shift["restricted"]))

    def chi(chains: np.ndarray) -> np.ndarray:
        phi = losses["restricted"][chains, :, None] - init_loss
        together = (phi * shift["restricted"][chains]).mean((0, 1))
        return -(together - phi.mean() * shift["full"][chains].mean((0, 1)))

    return _jackknife(chi, n_chains)


def _losses(problem: Problem, theta: torch.Tensor) -> torch.Tensor:
    blocks = torch.arange(len(problem.init_losses), device=theta.device).split(BLOCK)
    found = [problem.potential.losses(theta, block.expand(len(theta), -1)) for block in blocks]
    return torch.cat(found, dim=1).double().cpu()


def _jackknife(statistic: Callable[[np.ndarray], np.ndarray], n_chains: int) -> Covariances:
    """The statistic of all chains, and its standard error from leaving one chain out at a time."""
    everyone = np.arange(n_chains)
    without = np.stack([statistic(np.delete(everyone, chain)) for chain in everyone])
    spread = (without - without.mean(0)) ** 2
    return Covariances(statistic(everyone), np.sqrt((n_chains - 1) / n_chains * spread.sum(0)))
