"""One estimator for the LLC, the wrLLC, the drLLC and the wdrLLC: component and examples are arguments."""

import math
from dataclasses import replace

import numpy as np
import torch

from mechgrok import seeds
from mechgrok.config import LLCConfig
from mechgrok.llc.bias import step_size_bias
from mechgrok.llc.problem import ComponentLike, Data, Problem, check_batch_size, make_problem
from mechgrok.sampling.chains import Draws, sample
from mechgrok.sampling.diagnostics import health, summarize
from mechgrok.sampling.potential import LossFn
from mechgrok.types import LLCEstimate

N_PRIOR_DRAWS = 4  # from the localization alone, per chain; their mean loss is only held against a factor of two


def estimate_llc(
    model: torch.nn.Module,
    data: Data,
    *,
    config: LLCConfig,
    seed: int,
    component: ComponentLike = None,
    loss_fn: LossFn | None = None,
    chance_loss: float | None = None,
    bias: bool = False,
) -> LLCEstimate:
    """Estimate the local learning coefficient of a component at the model's own parameters w*.

    llc = nbeta * (E[L(w)] - L(w*)), the mean over draws w ~ exp(-nbeta L(w) - localization/2 |w - w*|^2)
    that move the component alone. All of it: the LLC. A head: its weight-refined LLC (wrLLC). On
    other data than it was trained on: the data-refined LLC (drLLC), which may be negative, as w* is
    no minimum there. L(w*) is the mean over all of `data`, evaluated once, before any chain.

    Args:
        model: a HookedTransformer with `Examples`, or any module with `loss_fn` and tensors.
        data: Examples, or tensors (x, y, ...) with a common first axis.
        component: a name such as "L0H1" (HookedTransformers), a Component, or a dict
            {parameter name: bool mask of its shape, or None for all of it}; None: every parameter.
        loss_fn: (module, *batch) -> loss of each example in nats, Float[batch]; with tensors only.
        chance_loss: the loss of guessing, nats, to tell an escaped chain; a HookedTransformer has
            ln(d_vocab_out), another module none unless given.
        seed: chain c draws from the streams (seed, sampler, component name, settings, ..., c).
        bias: also sample at half the step size, for twice as many steps, and extrapolate what the
            step size adds to llc; three times the cost.

    Returns:
        LLCEstimate; std_error = nbeta * standard error of the mean sampled loss. `losses` are
        [chain, draw], without burn-in. Look at `health` before use. An unhealthy or negative
        estimate is returned as it is.

    Raises:
        ComponentError, ConfigError, ShapeError: before any sampling.

    Source: Lau et al. 2023 (arXiv:2308.12108); refined: Wang et al. 2024 (arXiv:2410.02984).
    """
    problem = make_problem(
        model, data, component, loss_fn=loss_fn, chance_loss=chance_loss, canonicalize=config.canonicalize
    )
    check_batch_size(config, len(problem.init_losses))
    estimate = estimate_problem(problem, config, seed)
    if not bias:
        return estimate
    found, error = step_size_bias(estimate, estimate_problem(problem, config.halved(), seed))
    return replace(estimate, bias=found, bias_error=error)


def estimate_problem(problem: Problem, config: LLCConfig, seed: int) -> LLCEstimate:
    """`estimate_llc` of a problem that is made already."""
    return estimate_of(problem, config, _draw(problem, config, seed), seed)


def stream_names(problem: Problem, config: LLCConfig) -> tuple[seeds.Name, ...]:
    """What names the streams of an estimate: other settings draw other noise, more chains do not."""
    settings = f"nbeta={config.nbeta!r} step_size={config.step_size!r} localization={config.localization!r}"
    return (config.sampler, problem.component.name, settings)


def estimate_of(problem: Problem, config: LLCConfig, draws: Draws, seed: int) -> LLCEstimate:
    """The estimate that these draws of the problem give."""
    init_loss = problem.init_loss
    losses, paired = _less_the_batches_luck(draws, problem)
    summary = summarize(losses)
    prior_rise = _prior_rise(problem, config, seed)
    return LLCEstimate(
        component=problem.component.name,
        llc=config.nbeta * (summary.mean - init_loss),
        std_error=config.nbeta * summary.std_error,
        losses=losses,
        init_loss=init_loss,
        # The baseline is evaluated on exactly the data that is sampled, so it has no sampling error.
        init_loss_error=0.0,
        n_params=len(problem.potential.anchor),
        config=config,
        health=health(summary, init_loss, problem.chance_loss, prior_rise, float(draws.acceptance.mean())),
        paired=paired,
    )


def _draw(problem: Problem, config: LLCConfig, seed: int) -> Draws:
    if config.engine == "devinterp":
        from mechgrok.llc.devinterp_engine import devinterp_draws

        return devinterp_draws(problem, config, seed)
    return sample(problem.potential, config, seed, stream_names(problem, config))


def _less_the_batches_luck(draws: Draws, problem: Problem) -> tuple[np.ndarray, bool]:
    """(losses [chain, draw], whether they are paired), whichever varies less.

    Paired: L_b(w) - L_b(w*) + L_n(w*). Batches are drawn uniformly, so both have the same mean; the
    pairing takes out what batches of irreducible loss add to the variance, and adds some where the
    losses at w and at w* have nothing to do with each other.
    """
    plain = draws.losses.numpy()
    if draws.index is None:
        return plain, False
    luck = problem.init_losses[draws.index].mean(-1).numpy() - problem.init_loss
    finite = np.isfinite(plain).all(axis=1)
    if not finite.any() or (plain - luck)[finite].std() >= plain[finite].std():
        return plain, False
    return plain - luck, True


def _prior_rise(problem: Problem, config: LLCConfig, seed: int) -> float:
    """Mean L(w) - L(w*) over w ~ N(w*, 1 / localization), nats: the control with nbeta = 0, drawn exactly."""
    if config.localization == 0:
        return math.inf
    potential, rises = problem.potential, []
    for draw in range(N_PRIOR_DRAWS * config.n_chains):
        rng = seeds.stream(seed, "prior", problem.component.name, repr(config.localization), draw)
        noise = torch.randn(potential.anchor.shape, generator=rng, dtype=potential.anchor.dtype)
        index = torch.arange(potential.n_examples)
        if config.batch_size is not None:
            index = torch.randint(potential.n_examples, (config.batch_size,), generator=rng)
        theta = potential.anchor + noise / config.localization**0.5
        losses = potential.losses(theta[None], index[None])[0]
        rises.append(float((losses.double() - problem.init_losses[index]).mean()))
    rise = float(np.mean(rises))
    return math.inf if math.isnan(rise) else rise
