"""Which potential serves: the fastest that is shown to compute what the module does, for the very component asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok.config import LLCPath, Precision
from mechgrok.errors import ConfigError, TogetherError, first_line
from mechgrok.hooked_heads import why_not_hooked
from mechgrok.llc.head_potential import HeadPotential
from mechgrok.model import model_losses
from mechgrok.replicas.heads import LayerHeads
from mechgrok.replicas.network import why_not
from mechgrok.replicas.verify import Losses, disagreement, few_rows, tolerance
from mechgrok.replicas.whole import NetworkPotential
from mechgrok.sampling.potential import LossFn, ModulePotential, Potential
from mechgrok.types import Component, Examples


@dataclass(frozen=True)
class Served:
    """A potential, the path that it is ("compiled", "torch", "hooks" or "module"), and why no faster one serves."""

    potential: Potential
    path: str
    why_not_faster: str | None = None


@dataclass(frozen=True)
class Asked:
    """What is to be served. init_losses: Float64[example], nats, by the module. loops: whether they are wanted."""

    model: HookedTransformer
    examples: Examples
    components: tuple[Component, ...]
    init_losses: Tensor
    memory: float
    precision: Precision
    path: LLCPath
    loops: bool

    @property
    def name(self) -> str:
        return "+".join(component.name for component in self.components)

    @property
    def are_heads(self) -> bool:
        """Whether all are single heads of one layer."""
        heads = [head for component in self.components for head in component.heads]
        return len(heads) == len(self.components) and len({layer for layer, _ in heads}) == 1


def serve(asked: Asked) -> Served:
    """The fastest path that is verified to compute the model; a path that is asked for by name, or ConfigError.

    Paths, fastest first: "compiled" and "torch" compute the layers themselves, by loops of this package or by torch's
    operations; "hooks" runs the model with the heads supplied by hooks; "module" runs it with other parameters put in.

    Raises:
        ComponentError: several components that cannot go together. ConfigError: the path asked for does not serve, or
            the loss is no function of the parameters that can be differentiated.
    """
    refusals: list[str] = []
    attempts: list[tuple[tuple[str, ...], Callable[[Asked], Served | str]]] = [(("compiled", "torch"), _fast)]
    if asked.path == "hooks" or any(component.heads for component in asked.components):
        attempts.append((("hooks",), _hooks))
    for paths, attempt in attempts:
        if asked.path in ("auto", *paths):
            found = attempt(asked)
            if isinstance(found, Served):
                return Served(found.potential, found.path, "; ".join(refusals) or found.why_not_faster)
            refusals += [found] if found not in refusals else []  # both may have met the same
            if asked.path != "auto":
                raise ConfigError(f'path "{asked.path}" does not serve {asked.name}: {found}; leave path out')
    if len(asked.components) > 1:
        raise TogetherError(f"{asked.name.replace('+', ', ')} cannot be sampled together: {'; '.join(refusals)}")
    (component,) = asked.components
    potential, why = module_path(asked.model, model_losses, asked.examples.tensors, component, asked.init_losses)
    return Served(potential, "module", "; ".join([*refusals, *([why] if why else [])]) or None)


def module_path(
    module: torch.nn.Module, loss_fn: LossFn, tensors: Sequence[Tensor], component: Component, init_losses: Tensor
) -> tuple[ModulePotential, str | None]:
    """The module as it is; all replicas at once, or one after another and why.

    Raises ConfigError where the loss is no function of the parameters, or has no gradient by the component's.
    """
    alone = ModulePotential(module, loss_fn, tensors, component, together=False)
    rows = few_rows(alone.n_examples).to(alone.anchor.device)
    before = _state(module)
    if not alone.has_gradient():
        raise ConfigError(
            "the loss that loss_fn returns has no gradient by the module's parameters; compute it from them by torch's "
            "operations, without detach, item, numpy or no_grad"
        )
    losses, _ = alone.losses_and_grad(alone.anchor[None], rows[None])
    if _state(module) != before:
        raise ConfigError("a call of the module changes its own parameters or buffers; call module.eval() first")
    wanted = init_losses[rows.cpu()].double()
    away = (losses[0].double().cpu() - wanted).abs()
    if not float(away.max()) <= tolerance(wanted, alone.anchor.dtype):
        worst = int(away.argmax())
        raise ConfigError(
            f"the loss of example {int(rows[worst])} is {float(wanted[worst]):.6g} in one call and "
            f"{float(losses[0, worst]):.6g} in another at the same parameters: it is random, changes from call to call "
            "or depends on the other examples of the batch; turn that off (module.eval(), no noise in the forward)"
        )
    together = ModulePotential(module, loss_fn, tensors, component)
    try:
        together.losses_and_grad(alone.anchor.repeat(2, 1), rows.expand(2, -1))
        why = disagreement(together, _of_rows(alone, rows), rows, component.name)
    except Exception as error:  # of vmap, which does not take every operation
        why = f"vmap does not take it ({first_line(error)})"
    return (together, None) if why is None else (alone, f"one replica after another: {why}")


def _fast(asked: Asked) -> Served | str:
    """By the layers' own computation, or why not."""
    if (refusal := why_not(asked.model)) is not None:
        return refusal
    if len(asked.components) > 1 and not asked.are_heads:
        return "only single heads of one layer go together"
    how = asked.memory, asked.precision, asked.loops
    potential: LayerHeads | NetworkPotential
    if asked.are_heads:
        (layer, _), *_ = asked.components[0].heads
        which = [head for component in asked.components for _, head in component.heads]
        potential = LayerHeads(asked.model, asked.examples, layer, which, *how)
    else:
        potential = NetworkPotential(asked.model, asked.examples, asked.components[0], *how)
    if asked.path == "compiled" and not potential.loops:
        return "loops take float32 on the CPU"
    rows = few_rows(len(asked.examples))
    if (difference := disagreement(potential, _reference(asked, rows), rows, asked.name)) is not None:
        return difference
    return Served(potential, "compiled" if potential.loops else "torch")


def _hooks(asked: Asked) -> Served | str:
    """By hooks, or why not."""
    for component in asked.components:
        if (refusal := why_not_hooked(asked.model, component)) is not None:
            return refusal
    rows = few_rows(len(asked.examples))
    try:
        potential = HeadPotential(asked.model, asked.examples, asked.components)
        difference = disagreement(potential, _by_module(asked, rows), rows, asked.name)
    except Exception as error:  # of hooks that are not ours
        return f"with the heads supplied by hooks the model fails ({first_line(error)})"
    return Served(potential, "hooks") if difference is None else f"by hooks {difference}"


def _reference(asked: Asked, rows: Tensor) -> Losses:
    """What the fast path is held against: heads by hooks, other components with the parameters put in."""
    if all(component.heads for component in asked.components):
        return _of_rows(HeadPotential(asked.model, asked.examples.at(rows), asked.components), torch.arange(len(rows)))
    return _by_module(asked, rows)


def _by_module(asked: Asked, rows: Tensor) -> Losses:
    """The losses of every member with its parameters put in, one replica after another."""
    few, all_rows = asked.examples.at(rows), torch.arange(len(rows))
    each = [
        _of_rows(ModulePotential(asked.model, model_losses, few.tensors, one, together=False), all_rows)
        for one in asked.components
    ]
    return lambda theta: torch.cat([of(own) for of, own in zip(each, theta.chunk(len(each)), strict=True)])


def _of_rows(potential: Potential, rows: Tensor) -> Losses:
    """`losses` of a potential on the same rows for every replica of a chain of two."""
    return lambda theta: potential.losses(theta, rows.to(theta.device).expand(2, -1))


def _state(module: torch.nn.Module) -> list[tuple[int, int]]:
    """What changes when a parameter or a buffer does."""
    return [(id(one), one._version) for one in (*module.parameters(), *module.buffers())]
