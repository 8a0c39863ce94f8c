"""One estimator for the LLC, the wrLLC, the drLLC and the wdrLLC: component and examples are arguments."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechgrok import seeds
from mechgrok.config import LLCConfig
from mechgrok.errors import ComponentError, ConfigError, TogetherError
from mechgrok.llc.bias import step_size_bias
from mechgrok.llc.precision import say_if_idle
from mechgrok.llc.problem import ComponentLike, Data, Problem, check_batch_size, make_problem
from mechgrok.llc.work import estimate_work, loops_pay
from mechgrok.reproducible import differentiable, matmul_precision
from mechgrok.sampling.chains import Draws, sample
from mechgrok.sampling.diagnostics import UNKNOWN, Measured, summarize
from mechgrok.sampling.motion import missing_share, slope_share
from mechgrok.sampling.potential import LossFn
from mechgrok.sampling.variance import variance_llc
from mechgrok.sampling.verdict import Findings, health, top_row
from mechgrok.types import Component, Examples, LLCEstimate

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
        seed: chain c draws its noise from the stream (seed, sampler, settings, component name, "noise", c), and
            its batches, which all components share, from (seed, sampler, settings, "batch", c).
        bias: also sample at half the step size, for twice as many steps, and extrapolate what the
            step size adds to llc; three times the cost.

    Returns:
        LLCEstimate; std_error = nbeta * standard error of the mean sampled loss. `losses` are
        [chain, draw], without burn-in. Look at `health` before use. An unhealthy or negative
        estimate is returned as it is. llc_variance is from the same draws: see `sampling.variance.variance_llc`.

    Raises:
        ComponentError, ConfigError, ShapeError: before any sampling.

    Source: Lau et al. 2023 (arXiv:2308.12108); refined: Wang et al. 2024 (arXiv:2410.02984).
    """
    check_config(config)
    if isinstance(component, tuple):
        raise ComponentError('one component at a time: write "L0H0+L0H1" for both heads as one, or call this for each')
    loops = loops_pay([estimate_work(model, data, config)], [config])
    problem = make_problem(
        model, data, component, loss_fn=loss_fn, chance_loss=chance_loss, loops=loops, **as_set(config)
    )
    check_batch_size(config, len(problem.init_losses))
    say_if_idle(config, model, data)
    estimate = estimate_problem(problem, config, seed)
    if not bias:
        return estimate
    found, error = step_size_bias(estimate, estimate_problem(problem, config.halved(), seed))
    return replace(estimate, bias=found, bias_error=error)


def check_config(config: object) -> None:
    """Raise ConfigError for anything but settings."""
    if not isinstance(config, LLCConfig):
        raise ConfigError(f"config must be an LLCConfig, got {type(config).__name__}; write LLCConfig(nbeta=..., ...)")


def estimate_group(
    model: torch.nn.Module,
    examples: Examples,
    names: tuple[str, ...],
    *,
    config: LLCConfig,
    seed: int,
    loops: bool | None = None,
) -> list[LLCEstimate]:
    """`estimate_llc` of every head of a group, as `problem.groups` makes them, in one batch.

    Each head draws the noise that it draws alone, and all heads of a chain the batches that each
    draws alone, so an estimate equals that of the head alone up to the rounding of the matrix products.

    loops: whether compiling loops pays, None: as for this work alone.
    """
    if loops is None:
        loops = loops_pay([estimate_work(model, examples, config, len(names))], [config])
    try:
        if config.engine == "devinterp":  # it samples one component at a time
            raise TogetherError("devinterp samples one component at a time")
        problem = make_problem(model, examples, names, loops=loops, **as_set(config))
    except TogetherError:
        each = [make_problem(model, examples, name, loops=loops, **as_set(config)) for name in names]
        check_batch_size(config, len(each[0].init_losses))
        return [estimate_problem(problem, config, seed) for problem in each]
    check_batch_size(config, len(problem.init_losses))
    return estimates_of(problem, config, draw(problem, config, seed), seed)


def estimate_problem(problem: Problem, config: LLCConfig, seed: int) -> LLCEstimate:
    """`estimate_llc` of a problem that is made already."""
    (estimate,) = estimates_of(problem, config, draw(problem, config, seed), seed)
    return estimate


def stream_names(config: LLCConfig) -> tuple[seeds.Name, ...]:
    """What names the streams of an estimate: other settings draw other noise, more chains do not."""
    settings = f"nbeta={config.nbeta!r} step_size={config.step_size!r} localization={config.localization!r}"
    return (config.sampler, settings)


def members(problem: Problem) -> tuple[seeds.Name, ...]:
    """What tells the noise of the problem's components apart."""
    return tuple(component.name for component in problem.components)


def estimates_of(problem: Problem, config: LLCConfig, draws: Draws, seed: int) -> list[LLCEstimate]:
    """The estimate of each component of the problem that these draws give."""
    rises = _prior_rises(problem, config, seed)
    anchors = problem.potential.anchor.reshape(len(problem.components), -1)
    return [
        _estimate(problem, component, config, draws.of(member, config.n_chains), anchors[member], rises[member])
        for member, component in enumerate(problem.components)
    ]


def _estimate(
    problem: Problem, component: Component, config: LLCConfig, draws: Draws, anchor: Tensor, prior_rise: Measured
) -> LLCEstimate:
    init_loss = problem.init_loss
    losses, paired = _less_the_batches_luck(draws, problem)
    summary = summarize(losses)
    llc = config.nbeta * (summary.mean - init_loss)
    noise = np.full(losses.shape, math.nan) if draws.noise is None else draws.noise[int(paired)].numpy()
    variance = variance_llc(losses, noise, config.nbeta)
    kept = np.isfinite(losses).all(axis=1)
    motion = None if draws.motion is None or not kept.any() else draws.motion.of(torch.from_numpy(kept))
    descent, gradient_variance = (UNKNOWN,) * 2 if motion is None else slope_share(motion, losses[kept], config.nbeta)
    top_share, lone = top_row(problem.init_losses, summary.std_error)
    found = Findings(
        prior_rise=prior_rise,
        acceptance=float(draws.acceptance.mean()),
        variance=variance,
        descent=descent,
        gradient_variance=gradient_variance,
        missing=missing_share(motion, config, len(anchor), llc),
        still=float((draws.theta == anchor).all(0).double().mean()) if draws.theta.numel() else math.nan,
        top_share=top_share,
        lone=lone,
    )
    return LLCEstimate(
        component=component.name,
        llc=llc,
        std_error=config.nbeta * summary.std_error,
        losses=losses,
        init_loss=init_loss,
        # The baseline is evaluated on exactly the data that is sampled, so it has no sampling error.
        init_loss_error=0.0,
        n_params=problem.potential.anchor.shape[-1],
        config=config,
        health=health(summary, config, init_loss, problem.chance_loss, found),
        paired=paired,
        path=config.engine if config.engine == "devinterp" else problem.path,
        why_not_faster=problem.why_not_faster,
        llc_variance=variance[0],
        llc_variance_error=variance[1],
    )


@differentiable()
def draw(problem: Problem, config: LLCConfig, seed: int, observe: Callable[[Tensor], Tensor] | None = None) -> Draws:
    """The chains of an estimate. observe: as `sample` takes it, by mechgrok's own engine alone."""
    if config.engine == "devinterp":
        from mechgrok.llc.devinterp_engine import devinterp_draws

        return devinterp_draws(problem, config, seed)
    with matmul_precision(config.precision):
        loops = problem.path == "compiled"
        return sample(
            problem.potential, config, seed, stream_names(config), members(problem), observe, problem.start, loops
        )


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


def _prior_rises(problem: Problem, config: LLCConfig, seed: int) -> list[Measured]:
    """Mean L(w) - L(w*) over w ~ N(w*, 1 / localization), nats: the control with nbeta = 0, drawn exactly."""
    if config.localization == 0:
        return [(math.inf, 0.0)] * len(problem.components)
    potential, rises = problem.potential, []
    anchor = potential.anchor.reshape(len(problem.components), -1)
    device = anchor.device
    for draw in range(N_PRIOR_DRAWS * config.n_chains):
        noise = []
        for name in members(problem):
            rng = seeds.stream(seed, "prior", name, repr(config.localization), draw, device=device)
            noise.append(torch.randn(anchor.shape[1], generator=rng, dtype=anchor.dtype, device=device))
        index = torch.arange(potential.n_examples, device=device)
        if config.batch_size is not None:
            rng = seeds.stream(seed, "prior", "batch", repr(config.localization), draw, device=device)
            index = torch.randint(potential.n_examples, (config.batch_size,), generator=rng, device=device)
        losses = potential.losses(anchor + torch.stack(noise) / config.localization**0.5, index[None])
        rises.append((losses.cpu().double() - problem.init_losses[index.cpu()]).mean(1))
    found = torch.stack(rises)
    means, errors = found.mean(0).tolist(), (found.std(0) / len(found) ** 0.5).tolist()
    return [(math.inf, 0.0) if math.isnan(mean) else (mean, error) for mean, error in zip(means, errors, strict=True)]


def as_set(config: LLCConfig) -> dict[str, Any]:
    """The settings that the problem depends on."""
    return {key: getattr(config, key) for key in ("canonicalize", "memory_gb", "precision", "device", "path")}
