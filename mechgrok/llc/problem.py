"""What is sampled: a model, its data and a component, or heads that go together, made into a potential."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechgrok.config import MEMORY_GB, LLCConfig, Precision
from mechgrok.errors import ComponentError, ConfigError, ShapeError
from mechgrok.sampling.potential import LossFn, ModulePotential, Potential
from mechgrok.types import Component, Examples

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

GROUP = 16
ComponentLike = str | Component | Mapping[str, Tensor | None] | None
Data = Examples | Sequence[Tensor]


@dataclass(frozen=True)
class Problem:
    """Losses of `module` on `tensors` as a function of a component's parameters, around their own values.

    components: one, or heads of one layer that share their batches. init_losses: Float64[example], nats,
    at the module's own parameters w*. chance_loss: that of guessing, None if unknown. settings: memory_gb, precision
    and device, where they are for the module's kind.
    """

    module: torch.nn.Module
    loss_fn: LossFn
    tensors: tuple[Tensor, ...]
    components: tuple[Component, ...]
    potential: Potential
    init_losses: Tensor
    chance_loss: float | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def component(self) -> Component:
        """The component, where there is one."""
        (component,) = self.components
        return component

    @property
    def init_loss(self) -> float:
        """L(w*): the mean over all of the data, nats."""
        return float(self.init_losses.mean())

    def on(self, data: Data) -> "Problem":
        """The same module and component on other data."""
        return make_problem(
            self.module,
            data,
            self.component,
            loss_fn=None if isinstance(data, Examples) else self.loss_fn,
            chance_loss=self.chance_loss,
            **self.settings,
        )


def make_problem(
    model: torch.nn.Module,
    data: Data,
    component: ComponentLike | tuple[str, ...] = None,
    *,
    loss_fn: LossFn | None = None,
    chance_loss: float | None = None,
    canonicalize: bool = False,
    memory_gb: float = MEMORY_GB,
    precision: Precision = "float32",
    device: str = "cpu",
) -> Problem:
    """See `estimate_llc` for the arguments. Raises ComponentError, ConfigError, ShapeError, before any sampling.

    Args:
        component: also the names of heads that one of `groups` puts together.
    """
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model must be a HookedTransformer or another torch module, got {type(model).__name__}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: this torch sees no such device; install a CUDA build, or leave device out")
    if isinstance(data, Examples):
        if loss_fn is not None:
            raise ConfigError(
                "loss_fn goes with plain tensors; Examples carry their own loss, so leave one of them out"
            )
        problem = _hooked(model, data, component, chance_loss, canonicalize, memory_gb * 1e9, precision, device)
        problem = replace(problem, settings={"memory_gb": memory_gb, "precision": precision, "device": device})
    else:
        if loss_fn is None:
            raise ConfigError("tensors need loss_fn=f with f(module, *batch) -> loss per example; or pass Examples")
        if isinstance(data, Tensor):
            raise ShapeError("data must be a sequence of tensors; for a single one write (x,)")
        if not isinstance(data, Sequence) or not all(isinstance(part, Tensor) for part in data):
            got = {type(part).__name__ for part in data} if isinstance(data, Sequence) else {type(data).__name__}
            raise ShapeError(
                f"data must be Examples or a sequence of torch tensors, got {', '.join(sorted(got))}; "
                "of arrays make tensors with torch.as_tensor"
            )
        if canonicalize:
            raise ConfigError("canonicalize needs a HookedTransformer with Examples; leave it out for plain tensors")
        if precision in ("float64", "int16") or device != "cpu" or memory_gb != MEMORY_GB:
            raise ConfigError(
                "memory_gb, device, and precision but bfloat16 are for HookedTransformers with Examples; leave them "
                "out, and move module and tensors"
            )
        if isinstance(component, tuple):
            raise ComponentError("heads are sampled together on HookedTransformers only; give one component")
        problem = _module(model, tuple(data), loss_fn, component, chance_loss)
    if not bool(problem.init_losses.isfinite().all()):
        raise ConfigError("the loss at the model's own parameters is not finite; nothing can be sampled around it")
    return problem


def groups(model: "HookedTransformer", names: Sequence[str]) -> list[tuple[str, ...]]:
    """The names in the groups that are sampled together: heads of a layer, every other component alone.

    At most GROUP heads: beyond, the replicas of one example outgrow the cache, and a head gets dearer.
    """
    from mechgrok.components import HEAD_NAME
    from mechgrok.replicas.network import why_not

    found: dict[str, list[str]] = {}
    for name in names:
        head = HEAD_NAME.fullmatch(name) if why_not(model) is None else None
        found.setdefault(f"heads of layer {head[1]}" if head else name, []).append(name)
    return [tuple(group[at : at + GROUP]) for group in found.values() for at in range(0, len(group), GROUP)]


def check_batch_size(config: LLCConfig, n_examples: int) -> None:
    """Raise ConfigError if a batch asks for more examples than there are."""
    if config.batch_size is not None and config.batch_size > n_examples:
        raise ConfigError(
            f"batch_size {config.batch_size} exceeds the {n_examples} examples; "
            "lower it, or leave it out to use all examples in each step"
        )


def _hooked(
    model: torch.nn.Module,
    examples: Examples,
    component: ComponentLike | tuple[str, ...],
    chance: float | None,
    canonical: bool,
    memory: float,
    precision: Precision,
    device: str,
) -> Problem:
    from transformer_lens import HookedTransformer

    from mechgrok.canonical import canonicalize
    from mechgrok.components import component as named
    from mechgrok.model import chance_loss, model_losses

    if not isinstance(model, HookedTransformer):
        raise ConfigError(f"Examples go with a HookedTransformer, got {type(model).__name__}; pass tensors and loss_fn")
    if model.tokenizer is not None and model.tokenizer.padding_side == "left":
        raise ConfigError(
            "the model's tokenizer pads on the left, where TransformerLens masks and shifts each row by its padding; "
            'give rows that are padded on the right, and set model.tokenizer.padding_side = "right"'
        )
    for values, size, what in (
        (examples.tokens, model.cfg.d_vocab, "tokens"),
        (examples.targets, model.cfg.d_vocab_out, "targets"),
    ):
        if int(values.min()) < 0 or int(values.max()) >= size:
            raise ShapeError(f"{what} must lie in 0 ... {size - 1}, got {int(values.min())} ... {int(values.max())}")
    if examples.tokens.shape[1] > model.cfg.n_ctx:
        raise ShapeError(f"the model has a context of {model.cfg.n_ctx}, got rows of {examples.tokens.shape[1]} tokens")
    asked = component if isinstance(component, tuple) else ("model" if component is None else component,)
    components = tuple(named(model, one) if isinstance(one, str) else _resolve(model, one) for one in asked)
    model = canonicalize(model) if canonical else model
    model = _as_asked(model, precision, device)
    if device != "cpu":
        examples = Examples(*(part.to(device) for part in (examples.tokens, examples.targets, examples.weights)))
    potential = _potential(model, examples, components, memory, precision)
    init_losses = _init_losses(model, examples, memory)
    chance = chance_loss(model) if chance is None else chance
    return Problem(model, model_losses, examples.tensors, components, potential, init_losses, chance)


def _init_losses(model: "HookedTransformer", examples: Examples, memory: float) -> Tensor:
    """The losses at the model's own parameters, by what computes those of the draws if it can: Float64[example]."""
    from mechgrok.components import component
    from mechgrok.model import blocks, model_losses
    from mechgrok.replicas.network import why_not
    from mechgrok.replicas.whole import NetworkPotential

    if why_not(model) is None:
        whole = NetworkPotential(model, examples, component(model, "model"), memory)
        return whole.losses(whole.anchor[None], torch.arange(len(examples), device=whole.anchor.device)[None])[0].cpu()
    with torch.no_grad():
        return torch.cat([model_losses(model, *block) for block in blocks(model, examples)]).double().cpu()


def _as_asked(model: "HookedTransformer", precision: Precision, device: str) -> "HookedTransformer":
    """The model itself, or a copy in float64 or on another device."""
    if precision != "float64" and device == "cpu":
        return model
    model = copy.deepcopy(model)
    if precision == "float64":
        model.to(torch.float64)
    if device != "cpu":
        model.to(device)
    return model


def _potential(
    model: "HookedTransformer",
    examples: Examples,
    components: tuple[Component, ...],
    memory: float,
    precision: Precision,
) -> Potential:
    """The fastest that computes this architecture; the last two leave all of it to TransformerLens."""
    from mechgrok.llc.head_potential import HeadPotential, can_hook
    from mechgrok.model import model_losses
    from mechgrok.replicas.heads import LayerHeads
    from mechgrok.replicas.network import why_not
    from mechgrok.replicas.whole import NetworkPotential

    refusal = why_not(model)
    heads = [head for component in components for head in component.heads]
    together = len(heads) == len(components) and len({layer for layer, _ in heads}) == 1
    if len(components) > 1 and (refusal or not together):
        raise ComponentError(
            f"{', '.join(component.name for component in components)} cannot be sampled together"
            f"{': ' + refusal if refusal else '; only single heads of one layer can'}"
        )
    if refusal is None and together:
        return LayerHeads(model, examples, heads[0][0], [head for _, head in heads], memory, precision)
    (component,) = components
    if refusal is None:
        return NetworkPotential(model, examples, component, memory, precision)
    if can_hook(model, component):
        return HeadPotential(model, examples, component)
    return ModulePotential(model, model_losses, examples.tensors, component)


def _module(
    module: torch.nn.Module,
    tensors: tuple[Tensor, ...],
    loss_fn: LossFn,
    component: ComponentLike,
    chance: float | None,
) -> Problem:
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    if len(lengths) != 1 or lengths == {0}:
        raise ShapeError(f"data must be tensors with a common first axis, not empty; got lengths {sorted(lengths)}")
    if isinstance(component, str):
        raise ComponentError(f"names such as {component!r} need a HookedTransformer; pass a dict of masks instead")
    changing = torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._BatchNorm
    if any(isinstance(part, changing) and part.training for part in module.modules()):
        raise ConfigError(
            "the module is in train mode and has dropout or batch normalization, so its loss is random or depends on "
            "the other examples; call module.eval()"
        )
    if not callable(loss_fn):
        raise ConfigError(f"loss_fn must be a function (module, *batch) -> loss of each example, got {loss_fn!r}")
    resolved = _resolve(module, component)
    with torch.no_grad():
        init_losses = loss_fn(module, *tensors)
    if not isinstance(init_losses, Tensor) or init_losses.shape != tensors[0].shape[:1]:
        got = tuple(init_losses.shape) if isinstance(init_losses, Tensor) else type(init_losses).__name__
        raise ShapeError(f"loss_fn must return one loss per example [{len(tensors[0])}], got {got}")
    potential = ModulePotential(module, loss_fn, tensors, resolved)
    if not potential.has_gradient():
        raise ConfigError(
            "the loss that loss_fn returns has no gradient by the module's parameters; compute it from them by torch's "
            "operations, without detach, item, numpy or no_grad"
        )
    return Problem(module, loss_fn, tensors, (resolved,), potential, init_losses.double(), chance)


def _resolve(module: torch.nn.Module, component: Component | Mapping[str, Tensor | None] | None) -> Component:
    own = dict(module.named_parameters())
    if component is None:
        return Component("model", dict.fromkeys(own), sum(parameter.numel() for parameter in own.values()))
    if not isinstance(component, Component | Mapping):
        raise ComponentError(f"component must be a name, a Component or a dict of masks, got {component!r}")
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
