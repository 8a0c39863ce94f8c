"""Heads as a potential: hooks supply them at every replica's parameters, the rest is shared and frozen."""

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok.components import head_hooks
from mechgrok.model import example_losses, scored_logits
from mechgrok.sampling.potential import extract, inserter
from mechgrok.types import Component, Examples


def can_hook(model: HookedTransformer, component: Component) -> bool:
    """Whether `HeadPotential` serves: heads, on an architecture that can start at a layer with plain inputs."""
    cfg = model.cfg
    plain = not (cfg.use_split_qkv_input or cfg.use_attn_in or cfg.use_normalization_before_and_after)
    return bool(component.heads) and plain and cfg.positional_embedding_type in ("standard", "rotary")


class HeadPotential:
    """Losses and gradients of a head, or a union of heads, for many replicas in one batch.

    The residual stream that enters the component's first layer does not move: it is computed once,
    for all examples. Each call runs the model from that layer on, all replicas in one batch, and
    differentiates with respect to the heads' own parameters only. Equal to `ModulePotential` up to
    float32 rounding.
    """

    def __init__(self, model: HookedTransformer, examples: Examples, component: Component):
        self.n_examples = len(examples)
        self._model, self._component = model, component
        _, self._targets, self._weights = examples.tensors
        self._first_layer = min(layer for layer, _ in component.heads)
        frozen = {name: model.get_parameter(name).detach() for name in component.masks}
        self.anchor = extract(component, frozen)
        self._insert = torch.vmap(inserter(component, frozen))
        with torch.no_grad():
            self._resid_pre = model(examples.tokens, stop_at_layer=self._first_layer)

    def losses_and_grad(self, theta: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        leaf = theta.detach().requires_grad_()
        losses = self._evaluate(leaf, index)
        gradient = torch.autograd.grad(losses.sum() / index.shape[1], leaf)[0]
        return losses.detach(), gradient

    @torch.no_grad()
    def losses(self, theta: Tensor, index: Tensor) -> Tensor:
        return self._evaluate(theta, index)

    def _evaluate(self, theta: Tensor, index: Tensor) -> Tensor:
        flat = index.flatten()
        hooks = head_hooks(self._model, self._component, self._insert(theta))
        targets, weights = self._targets[flat], self._weights[flat]
        logits = scored_logits(self._model, self._resid_pre[flat], targets.shape[1], hooks, self._first_layer)
        return example_losses(logits, targets, weights).reshape(index.shape)
