"""Heads as a potential: hooks supply them at every replica's parameters, and the model runs as it is."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok.hooked_heads import heads_at
from mechgrok.model import example_losses, scored_logits
from mechgrok.plain import why_not_plain
from mechgrok.reproducible import differentiable
from mechgrok.sampling.potential import extract, inserter, leaf_of
from mechgrok.types import Component, Examples


class HeadPotential:
    """Losses and gradients of heads, or unions of heads, for many replicas in one batch: the reference for heads.

    Differentiates with respect to the heads' own parameters only. Of a plain model (`mechgrok.plain`) the residual
    stream that enters the first layer of these heads is computed once, for all examples; where the model carries hooks
    or parts of its own all of it is run in each call. Equal to `ModulePotential` up to float32 rounding.

    Args:
        components: one, or members that share their batches; `theta` is then member-major, as `Potential` has it.
    """

    def __init__(self, model: HookedTransformer, examples: Examples, components: Component | Sequence[Component]):
        self._components = (components,) if isinstance(components, Component) else tuple(components)
        self.n_examples = len(examples)
        self._model, self._examples = model, examples
        _, self._targets, self._weights = examples.tensors
        heads = tuple(dict.fromkeys(head for one in self._components for head in one.heads))
        self._all = Component("+".join(one.name for one in self._components), {}, 1, heads)
        frozen = {name: model.get_parameter(name).detach() for one in self._components for name in one.masks}
        anchors = [extract(one, frozen) for one in self._components]
        self.anchor = torch.stack(anchors) if len(anchors) > 1 else anchors[0]
        self._insert = [torch.vmap(inserter(one, frozen)) for one in self._components]
        self._first_layer: int | None = None
        self._plain = why_not_plain(model) is None
        if self._plain and model.cfg.positional_embedding_type in ("standard", "rotary"):
            self._first_layer = min(layer for layer, _ in heads)
            with torch.no_grad():
                self._resid_pre = model(examples.tokens, stop_at_layer=self._first_layer)

    @differentiable()
    def losses_and_grad(self, theta: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        leaf = leaf_of(theta)
        losses = self._evaluate(leaf, index)
        gradient = torch.autograd.grad(losses.sum() / index.shape[1], leaf)[0]
        return losses.detach(), gradient

    @differentiable()
    @torch.no_grad()
    def losses(self, theta: Tensor, index: Tensor) -> Tensor:
        return self._evaluate(theta, index)

    def _evaluate(self, theta: Tensor, index: Tensor) -> Tensor:
        members = zip(self._insert, theta.chunk(len(self._insert)), strict=True)
        each = [insert(own) for insert, own in members]
        parameters = {name: torch.cat([one[name] for one in each]) for name in each[0]}
        flat = index.flatten().repeat(len(each))
        targets, weights = self._targets[flat], self._weights[flat]
        inputs = self._examples.tokens[flat] if self._first_layer is None else self._resid_pre[flat]
        with heads_at(self._model, self._all, parameters):
            logits = scored_logits(self._model, inputs, targets.shape[1], (), self._first_layer, self._plain)
        return example_losses(logits, targets, weights).reshape(len(theta), -1)
