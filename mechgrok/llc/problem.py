"""What is sampled: a model, its data and a component, or heads that go together, made into a potential."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechgrok.config import MEMORY_GB, LLCConfig, LLCPath, Precision
from mechgrok.errors import ComponentError, ConfigError, ShapeError
from mechgrok.llc.prepared import prepared, prepared_data
from mechgrok.reproducible import differentiable
from mechgrok.sampling.motion import Start, gradient_at_start
from mechgrok.sampling.potential import LossFn, Potential
from mechgrok.types import Component, Examples
from mechgrok.unwrap import unwrapped

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

GROUP = 16
ComponentLike = str | Component | Mapping[str, Tensor | None] | None
Data = Examples | Sequence[Tensor]


@dataclass(frozen=True)
class Problem:
    """Losses of `module` on `tensors` as a function of a component's parameters, around their own values.

    components: one, or heads of one layer that share their batches. init_losses: Float64[example], nats,
    at the module's own parameters w*, by the module itself. chance_loss: that of guessing, None if unknown. path: what
    computes the losses (see `LLCConfig`), and why_not_faster: why nothing faster does. settings: what `make_problem`
    was given besides, where it is for the module's kind.
    """

    module: torch.nn.Module
    loss_fn: LossFn
    tensors: tuple[Tensor, ...]
    components: tuple[Component, ...]
    potential: Potential
    init_losses: Tensor
    chance_loss: float | None
    path: str
    why_not_faster: str | None = None
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

    @cached_property
    def start(self) -> Start:
        """What the draws are held against: the losses and their gradient at w*, on all of the data."""
        return Start(self.init_losses, gradient_at_start(self.potential))

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


@differentiable()
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
    path: LLCPath = "auto",
    loops: bool = True,
) -> Problem:
    """See `estimate_llc` for the arguments. Raises ComponentError, ConfigError, ShapeError, before any sampling.

    Args:
        component: also the names of heads that one of `groups` puts together.
        loops: whether compiling loops pays (`work.loops_pay`), if `path` leaves it open.
    """
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model must be a HookedTransformer or another torch module, got {type(model).__name__}")
    model = unwrapped(model)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: this torch sees no such device; install a CUDA build, or leave device out")
    if isinstance(data, Examples):
        if loss_fn is not None:
            raise ConfigError(
                "loss_fn goes with plain tensors; Examples carry their own loss, so leave one of them out"
            )
        settings = {"memory_gb": memory_gb, "precision": precision, "device": device, "path": path, "loops": loops}
        problem = _hooked(model, data, component, chance_loss, canonicalize, settings)
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
        if path not in ("auto", "module"):
            raise ConfigError(f'path "{path}" is for HookedTransformers with Examples; leave it out for plain tensors')
        if isinstance(component, tuple):
            raise ComponentError("heads are sampled together on HookedTransformers only; give one component")
        problem = _module(model, tuple(data), loss_fn, component, chance_loss)
    return problem


def groups(model: "HookedTransformer", names: Sequence[str]) -> list[tuple[str, ...]]:
    """The names in the groups that are sampled together: heads of a layer, every other component alone.

    At most GROUP heads: beyond, the replicas of one example outgrow the cache, and a head gets dearer.
    """
    from mechgrok.components import HEAD_NAME
    from mechgrok.replicas.network import why_not

    found: dict[str, list[str]] = {}
    together = why_not(model) is None
    for name in names:
        head = HEAD_NAME.fullmatch(name) if together else None
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
    settings: Mapping[str, Any],
) -> Problem:
    from transformer_lens import HookedTransformer

    from mechgrok.canonical import canonicalize
    from mechgrok.components import component as named
    from mechgrok.llc.paths import Asked, serve
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
    device = settings["device"]
    model = prepared(model, settings["precision"], device if device != "cpu" else None)
    parts = prepared_data((examples.tokens, examples.targets, examples.weights), model)
    examples = Examples(*(part.to(device) if device != "cpu" else part for part in parts))
    init_losses = _init_losses(model, examples)
    path: LLCPath = settings["path"]
    loops = path == "compiled" or (path == "auto" and settings["loops"])
    served = serve(
        Asked(model, examples, components, init_losses, settings["memory_gb"] * 1e9, settings["precision"], path, loops)
    )
    chance = chance_loss(model) if chance is None else chance
    return Problem(
        model, model_losses, examples.tensors, components, served.potential, init_losses, chance, served.path,
        served.why_not_faster, settings,
    )  # fmt: skip


@torch.no_grad()
def _init_losses(model: "HookedTransformer", examples: Examples) -> Tensor:
    """The losses at the model's own parameters, by the model itself: Float64[example]."""
    from mechgrok.model import blocks, model_losses

    return _finite(torch.cat([model_losses(model, *block) for block in blocks(model, examples)]).double().cpu())


def _finite(losses: Tensor) -> Tensor:
    if not bool(losses.isfinite().all()):
        raise ConfigError("the loss at the model's own parameters is not finite; nothing can be sampled around it")
    return losses


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
    from mechgrok.llc.paths import module_path

    if not callable(loss_fn):
        raise ConfigError(f"loss_fn must be a function (module, *batch) -> loss of each example, got {loss_fn!r}")
    module = prepared(module)
    tensors, resolved = prepared_data(tensors, module), _resolve(module, component)
    with torch.no_grad():
        init_losses = loss_fn(module, *tensors)
    if not isinstance(init_losses, Tensor) or init_losses.shape != tensors[0].shape[:1]:
        got = tuple(init_losses.shape) if isinstance(init_losses, Tensor) else type(init_losses).__name__
        raise ShapeError(f"loss_fn must return one loss per example [{len(tensors[0])}], got {got}")
    init_losses = _finite(init_losses.double().cpu())
    potential, why = module_path(module, loss_fn, tensors, resolved, init_losses)
    return Problem(module, loss_fn, tensors, (resolved,), potential, init_losses, chance, "module", why)


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
        if mask is not None and not (
            isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == own[name].shape
        ):
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
            raise ComponentError(
                f"the mask of {name!r} must be None, for all of it, or a bool tensor of shape "
                f"{tuple(own[name].shape)}, got {got}"
            )
    if isinstance(component, Component):
        return component
    n_params = sum(own[name].numel() if mask is None else int(mask.sum()) for name, mask in masks.items())
    return Component("masked", masks, n_params)
