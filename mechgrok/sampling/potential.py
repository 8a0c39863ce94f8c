"""What a sampler sees of a model: flat parameters of many replicas -> per-example losses and gradients."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from mechgrok.reproducible import differentiable
from mechgrok.types import Component

LossFn = Callable[..., Tensor]  # (module, *batch) -> loss per example [batch]


class Potential(Protocol):
    """A loss over `n_examples` examples as a function of a component's flat parameters.

    Or of each of several components that go together, the members: replicas are then member-major, row
    m * n_chains + c of theta being member m in chain c, and the members of a chain share its batch.
    """

    anchor: Tensor  # w*: Float[param], or Float[member, param]
    n_examples: int

    def losses_and_grad(self, theta: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Per-example losses Float[replica, batch] and the gradient of their mean, Float[replica, param].

        Args:
            theta: Float[replica, param]. index: Int[chain, batch], the examples of each chain.
        """
        ...

    def losses(self, theta: Tensor, index: Tensor) -> Tensor:
        """The per-example losses alone."""
        ...


class ModulePotential:
    """Any module and loss, as they are, by functional_call: parameters outside the component are constants.

    Args:
        together: all replicas at once, under vmap; otherwise one after another, which takes any forward.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        loss_fn: LossFn,
        tensors: Sequence[Tensor],
        component: Component,
        together: bool = True,
    ):
        self.n_examples = len(tensors[0])
        self._tensors = tuple(tensors)
        frozen = {name: parameter.detach() for name, parameter in module.named_parameters()}
        self.anchor = extract(component, frozen)
        self._inside, self._frozen, self._places = _Loss(module, loss_fn), frozen, _places(module)
        insert_component = inserter(component, frozen)

        def mean_and_losses(theta: Tensor, *batch: Tensor) -> tuple[Tensor, Tensor]:
            losses = self._at(insert_component(theta), batch)
            return losses.mean(), losses

        self._alone, self._together = mean_and_losses, together
        self._both = vmap(grad_and_value(mean_and_losses, has_aux=True), randomness="error")
        self._losses = vmap(lambda theta, *batch: mean_and_losses(theta, *batch)[1], randomness="error")

    def has_gradient(self) -> bool:
        """Whether torch can follow the losses back to any of the module's parameters."""
        with differentiable():
            own = {
                name: value.clone().requires_grad_(value.is_floating_point()) for name, value in self._frozen.items()
            }
            return self._at(own, tuple(one[:1] for one in self._tensors)).requires_grad

    def _at(self, parameters: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        """The losses with these parameters in the place, or the places, of the module's own."""
        given = {place: value for name, value in parameters.items() for place in self._places[name]}
        return functional_call(self._inside, given, batch, tie_weights=False)

    @differentiable()
    def losses_and_grad(self, theta: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        if self._together:
            gradient, (_, losses) = self._both(leaf_of(theta).detach(), *(tensor[index] for tensor in self._tensors))
            return losses, gradient
        each = [self._one(*pair) for pair in zip(theta, index, strict=True)]
        return torch.stack([losses for losses, _ in each]), torch.stack([gradient for _, gradient in each])

    @differentiable()
    @torch.no_grad()
    def losses(self, theta: Tensor, index: Tensor) -> Tensor:
        if self._together:
            return self._losses(theta, *(tensor[index] for tensor in self._tensors))
        batches = ((tensor[rows] for tensor in self._tensors) for rows in index)
        return torch.stack([self._alone(own, *batch)[1] for own, batch in zip(theta, batches, strict=True)])

    def _one(self, theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and gradient of one replica."""
        leaf = leaf_of(theta)
        mean, losses = self._alone(leaf, *(tensor[rows] for tensor in self._tensors))
        (gradient,) = torch.autograd.grad(mean, leaf, materialize_grads=True)
        return losses.detach(), gradient


def leaf_of(theta: Tensor) -> Tensor:
    """The same numbers as something to be differentiated by; copied if torch takes no gradient by them."""
    theta = theta.detach()
    return (theta.clone() if theta.is_inference() else theta).requires_grad_()


def _places(module: torch.nn.Module) -> dict[str, list[str]]:
    """Where each parameter is to be put: once for each module that holds it.

    torch's own `tie_weights` puts a value once for each name, and loses the module's own parameter where one module has
    two names.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    places: dict[str, list[str]] = {name: [] for name in names.values()}
    for prefix, part in module.named_modules():  # each module once
        for key, parameter in part._parameters.items():
            if parameter is not None:
                places[names[id(parameter)]].append(".".join(filter(None, ("module", prefix, key))))
    return places


class _Loss(torch.nn.Module):
    """Makes `loss_fn(module, *batch)` a module, so that functional_call can swap what is inside."""

    def __init__(self, module: torch.nn.Module, loss_fn: LossFn):
        super().__init__()
        self.module = module
        self.loss_fn = loss_fn

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss_fn(self.module, *batch)


def extract(component: Component, parameters: Mapping[str, Tensor]) -> Tensor:
    """The component's entries in one vector Float[param], in the order of its masks."""
    return torch.cat(
        [
            parameters[name].flatten() if mask is None else parameters[name][mask]
            for name, mask in component.masks.items()
        ]
    )


def inserter(component: Component, parameters: Mapping[str, Tensor]) -> Callable[[Tensor], dict[str, Tensor]]:
    """The inverse of `extract`: a function from Float[param] to full-size parameters by name.

    What lies outside the component keeps its bits; the result works under grad and vmap.
    """
    flat_index = {
        name: None if mask is None else mask.flatten().nonzero().squeeze(1) for name, mask in component.masks.items()
    }
    sizes = [parameters[name].numel() if at is None else len(at) for name, at in flat_index.items()]

    def insert(theta: Tensor) -> dict[str, Tensor]:
        full = dict(parameters)
        for (name, at), part in zip(flat_index.items(), theta.split(sizes), strict=True):
            own = parameters[name]
            full[name] = (part if at is None else own.flatten().index_copy(0, at, part)).reshape(own.shape)
        return full

    return insert
