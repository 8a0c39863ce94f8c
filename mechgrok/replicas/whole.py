"""Any component of a HookedTransformer: from the first layer that it touches on, in one batch."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok.config import Precision
from mechgrok.replicas import compiled
from mechgrok.replicas.blockwise import AT_ONCE, Blockwise, numbers_of_a_layer
from mechgrok.replicas.calls import Layer
from mechgrok.replicas.cross_entropy import cross_entropy
from mechgrok.replicas.distinct import Distinct
from mechgrok.replicas.network import Parameters
from mechgrok.replicas.packing import Linear
from mechgrok.sampling.potential import extract, inserter
from mechgrok.types import Component, Examples


@dataclass(frozen=True)
class _Compiled:
    """The compiled passes; the layers and the readout that do not move, None for those that do."""

    passes: compiled.Passes
    layers: Sequence[Layer | None]
    readout: Linear | None


class NetworkPotential(Blockwise):
    """Losses and gradients of a component for many replicas; frozen weights are shared, not copied.

    Equal to `ModulePotential` up to float32 rounding.
    """

    def __init__(
        self,
        model: HookedTransformer,
        examples: Examples,
        component: Component,
        memory: float,
        precision: Precision = "float32",
        loops: bool = True,
    ):
        super().__init__(model, examples, memory, loops)
        own = {name: value.detach() for name, value in model.named_parameters()}
        self.anchor = extract(component, own)
        self._moved = tuple(component.masks)
        self._insert = _inserter(component, {name: own[name] for name in self._moved})
        self._first = _first_layer(self._moved, model.cfg.n_layers)
        self._compiled = self._compile(precision) if compiled.why_not(self._net, precision) is None else None
        alike = self._compiled is not None and self._first is None and model.cfg.n_layers > 0
        self._distinct = Distinct(self._net, self._tokens) if alike else None
        kept = self.n_examples * self._net.n_pos * model.cfg.d_model
        self._kept = self._run(self._all()) if self._first is not None and kept <= self._memory else None

    def _compile(self, precision: Precision) -> "_Compiled":
        net, cfg = self._net, self._net.cfg

        def moves(*prefixes: str) -> bool:
            return any(name.startswith(prefixes) for name in self._moved)

        positions = ("pos_embed",) if cfg.positional_embedding_type == "shortformer" else ()
        return _Compiled(
            compiled.Passes(net, precision),
            [
                None if moves(f"blocks.{layer}.", *positions) else compiled.layer_of(net, layer, net.frozen, False)
                for layer in range(cfg.n_layers)
            ],
            None if moves("unembed", "ln_final") else compiled.readout_of(net, net.frozen, False),
        )

    def _numbers(self) -> int:
        cfg = self._net.cfg
        if self._compiled is not None:  # activations take none
            return 3 * self._net.n_pos * cfg.d_model
        return (cfg.n_layers - (self._first or 0)) * numbers_of_a_layer(self._net, cfg.n_heads) + (
            3 * self._net.n_pos * cfg.d_model
        )

    def _nats(self, theta: Tensor, index: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        net = self._net
        parameters = {**net.frozen, **self._insert(theta)}
        distinct = self._distinct if len(theta) == len(index) else None  # a chain's rows are then one replica's
        begun = None if distinct is None else distinct.of(index)
        if distinct is not None and begun is not None:
            resid = distinct.embed(parameters, begun.rows)
        elif self._first is None:
            resid = net.embed(self._tokens[index], parameters)
        elif self._kept is None:
            resid = self._run(index)
        else:
            resid = self._kept.view(self.n_examples, -1, net.cfg.d_model)[index].flatten(1, 2)
        layers = range(self._first or 0, net.cfg.n_layers)
        if self._compiled is not None:
            still = self._compiled
            each = [still.layers[layer] or compiled.layer_of(net, layer, parameters, True) for layer in layers]
            readout = still.readout or compiled.readout_of(net, parameters, True)
            return still.passes(each, readout, resid, len(theta), targets, weights, begun)
        for layer in layers:
            resid = net.layer(layer, resid, parameters)
        read = net.norm("ln_final", parameters)(resid)
        return cross_entropy(read, *net.readout(parameters), targets, weights, net.loops)

    @torch.no_grad()
    def _run(self, index: Tensor) -> Tensor:
        """The residual stream before the first layer that moves, Float[chain, row, d_model]."""
        found = []
        for examples in index.split(AT_ONCE, dim=1):
            resid = self._net.embed(self._tokens[examples], self._net.frozen)
            for layer in range(self._first or 0):
                resid = self._net.layer(layer, resid, self._net.frozen)
            found.append(resid)
        return torch.cat(found, dim=1)


def _inserter(component: Component, own: Parameters) -> Callable[[Tensor], Parameters]:
    """From Float[replica, param] to Float[replica, ...] by name: views, where the component has all of each tensor."""
    if any(mask is not None for mask in component.masks.values()):
        return torch.vmap(inserter(component, own))
    sizes = [own[name].numel() for name in component.masks]

    def insert(theta: Tensor) -> Parameters:
        parts = zip(component.masks, theta.split(sizes, dim=1), strict=True)
        return {name: part.unflatten(1, own[name].shape) for name, part in parts}

    return insert


def _first_layer(names: Iterable[str], n_layers: int) -> int | None:
    """The layer from which on these parameters matter; None if the embedding does already."""
    layers = []
    for name in names:
        if name.startswith(("embed", "pos_embed")):
            return None
        block = re.match(r"blocks\.(\d+)\.", name)
        layers.append(int(block[1]) if block else n_layers)
    return min(layers)
