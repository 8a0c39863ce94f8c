"""One estimator for the LLC, the wrLLC, the drLLC and the wdrLLC: component and examples are arguments."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mechgrok.config import LLCConfig
from mechgrok.errors import ComponentError, ConfigError, ShapeError
from mechgrok.sampling.chains import sample
from mechgrok.sampling.diagnostics import health, summarize
from mechgrok.sampling.potential import LossFn, ModulePotential, Potential
from mechgrok.types import Component, Examples, LLCEstimate

ComponentLike = str | Component | Mapping[str, Tensor | None] | None


def estimate_llc(
    model: torch.nn.Module,
    data: Examples | Sequence[Tensor],
    *,
    config: LLCConfig,
    seed: int,
    component: ComponentLike = None,
    loss_fn: LossFn | None = None,
    chance_loss: float | None = None,
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
        seed: chain c draws from the streams (seed, "sgld", component name, ..., c).

    Returns:
        LLCEstimate; std_error = nbeta * standard error of the mean sampled loss. `losses` are
        [chain, draw], without burn-in. Look at `health` before use. An unhealthy or negative
        estimate is returned as it is.

    Raises:
        ComponentError, ConfigError, ShapeError: before any sampling.

    Source: Lau et al. 2023 (arXiv:2308.12108); refined: Wang et al. 2024 (arXiv:2410.02984).
    """
    if isinstance(data, Examples):
        if loss_fn is not None:
            raise ConfigError(
                "loss_fn goes with plain tensors; Examples carry their own loss, so leave one of them out"
            )
        potential, init_losses, resolved, chance = _hooked(model, data, component)
        chance_loss = chance if chance_loss is None else chance_loss
    else:
        if loss_fn is None:
            raise ConfigError("tensors need loss_fn=f with f(module, *batch) -> loss per example; or pass Examples")
        if isinstance(data, Tensor):
            raise ShapeError("data must be a sequence of tensors; for a single one write (x,)")
        potential, init_losses, resolved = _module(model, tuple(data), loss_fn, component)
    return _estimate(potential, init_losses, resolved.name, config, seed, chance_loss)


def _hooked(
    model: torch.nn.Module, examples: Examples, component: ComponentLike
) -> tuple[Potential, Tensor, Component, float]:
    from transformer_lens import HookedTransformer

    from mechgrok.components import component as named
    from mechgrok.llc.head_potential import HeadPotential, can_hook
    from mechgrok.model import chance_loss, model_losses

    if not isinstance(model, HookedTransformer):
        raise ConfigError(f"Examples go with a HookedTransformer, got {type(model).__name__}; pass tensors and loss_fn")
    for values, size, what in (
        (examples.tokens, model.cfg.d_vocab, "tokens"),
        (examples.targets, model.cfg.d_vocab_out, "targets"),
    ):
        if int(values.min()) < 0 or int(values.max()) >= size:
            raise ShapeError(f"{what} must lie in 0 ... {size - 1}, got {int(values.min())} ... {int(values.max())}")
    component = "model" if component is None else component
    resolved = named(model, component) if isinstance(component, str) else _resolve(model, component)
    with torch.no_grad():
        init_losses = model_losses(model, *examples.tensors)
    if can_hook(model, resolved):
        return HeadPotential(model, examples, resolved), init_losses, resolved, chance_loss(model)
    return ModulePotential(model, model_losses, examples.tensors, resolved), init_losses, resolved, chance_loss(model)


def _module(
    module: torch.nn.Module, tensors: tuple[Tensor, ...], loss_fn: LossFn, component: ComponentLike
) -> tuple[Potential, Tensor, Component]:
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    if len(lengths) != 1 or lengths == {0}:
        raise ShapeError(f"data must be tensors with a common first axis, not empty; got lengths {sorted(lengths)}")
    if isinstance(component, str):
        raise ComponentError(f"names such as {component!r} need a HookedTransformer; pass a dict of masks instead")
    if any(isinstance(part, torch.nn.modules.dropout._DropoutNd) and part.training for part in module.modules()):
        raise ConfigError("the module is in train mode and has dropout, so its loss is random; call module.eval()")
    resolved = _resolve(module, component)
    with torch.no_grad():
        init_losses = loss_fn(module, *tensors)
    if init_losses.shape != tensors[0].shape[:1]:
        raise ShapeError(
            f"loss_fn must return one loss per example [{len(tensors[0])}], got {tuple(init_losses.shape)}"
        )
    return ModulePotential(module, loss_fn, tensors, resolved), init_losses, resolved


def _resolve(module: torch.nn.Module, component: Component | Mapping[str, Tensor | None] | None) -> Component:
    own = dict(module.named_parameters())
    if component is None:
        return Component("model", dict.fromkeys(own), sum(parameter.numel() for parameter in own.values()))
    masks = component.masks if isinstance(component, Component) else dict(component)
    for name, mask in masks.items():
        if name not in own:
            raise ComponentError(f"the model has no parameter {name!r}; it has {', '.join(own)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != own[name].shape):
            raise ComponentError(
                f"the mask of {name!r} must be bool of shape {tuple(own[name].shape)}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
    if isinstance(component, Component):
        return component
    n_params = sum(own[name].numel() if mask is None else int(mask.sum()) for name, mask in masks.items())
    return Component("masked", masks, n_params)


def check_batch_size(config: LLCConfig, n_examples: int) -> None:
    """Raise ConfigError if a batch asks for more examples than there are."""
    if config.batch_size is not None and config.batch_size > n_examples:
        raise ConfigError(
            f"batch_size {config.batch_size} exceeds the {n_examples} examples; "
            "lower it, or leave it out to use all examples in each step"
        )


def _estimate(
    potential: Potential, init_losses: Tensor, name: str, config: LLCConfig, seed: int, chance_loss: float | None
) -> LLCEstimate:
    check_batch_size(config, potential.n_examples)
    if not bool(init_losses.isfinite().all()):
        raise ConfigError("the loss at the model's own parameters is not finite; nothing can be sampled around it")
    init_loss = float(init_losses.double().mean())
    losses = sample(potential, config, seed, ("sgld", name))[0].numpy()
    summary = summarize(losses)
    return LLCEstimate(
        component=name,
        llc=config.nbeta * (summary.mean - init_loss),
        std_error=config.nbeta * summary.std_error,
        losses=losses,
        init_loss=init_loss,
        # The baseline is evaluated on exactly the data that is sampled, so it has no sampling error.
        init_loss_error=0.0,
        n_params=len(potential.anchor),
        config=config,
        health=health(summary, init_loss, chance_loss),
    )
