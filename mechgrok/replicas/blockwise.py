"""What both potentials of this package do: targets, weights, and examples in blocks that fit the memory."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok.replicas.network import Network
from mechgrok.reproducible import differentiable
from mechgrok.sampling.potential import leaf_of
from mechgrok.types import Examples

AT_ONCE = 64  # examples that the frozen part of the model is run on at once
WORKING_SET = 2**24  # numbers that a block's activations may take, if the memory allows: 64 MB in float32


class Blockwise(ABC):
    """A potential (see `sampling.potential`) that evaluates a block of examples for all replicas at once.

    Args:
        memory: bytes for activations, kept ones and those of a block each at most half of it.
        loops: whether compiled loops may be used.
    """

    anchor: Tensor

    def __init__(self, model: HookedTransformer, examples: Examples, memory: float, loops: bool = True):
        self.n_examples = len(examples)
        self._net = Network(model, examples, loops)
        self._tokens = examples.tokens
        self._targets = examples.targets[:, self._net.scored]
        weights = examples.weights[:, self._net.scored].to(model.W_E.dtype)
        self._weights = weights / weights.sum(1, keepdim=True)
        self._memory = memory / self._weights.element_size() / 2  # in numbers

    @property
    def loops(self) -> bool:
        """Whether compiled loops are used."""
        return self._net.loops

    @differentiable()
    def losses_and_grad(self, theta: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradient = [], None
        for block in self._blocks(len(theta), index):
            weights = self._weights[block]
            nats, own = self._differentiated(
                theta, block, self._targets_of(block), (weights / index.shape[1]).flatten(1)
            )
            gradient = own if gradient is None else gradient.add_(own)
            losses.append(_of_examples(nats, weights))
        assert gradient is not None  # there is a block
        return torch.cat(losses, dim=1), gradient

    @differentiable()
    @torch.no_grad()
    def losses(self, theta: Tensor, index: Tensor) -> Tensor:
        found = []
        for block in self._blocks(len(theta), index):
            weights = self._weights[block]
            nats, _ = self._nats(theta, block, self._targets_of(block), weights.flatten(1))
            found.append(_of_examples(nats, weights))
        return torch.cat(found, dim=1)

    def _all(self) -> Tensor:
        """Every example, as one chain's: Int[1, example]."""
        return torch.arange(self.n_examples, device=self._tokens.device)[None]

    @abstractmethod
    def _nats(self, theta: Tensor, index: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """As `cross_entropy` returns them; targets and weights are Float[chain, row]."""

    @abstractmethod
    def _numbers(self) -> int:
        """How many numbers the activations of one replica on one example take, about."""

    def _blocks(self, n_replicas: int, index: Tensor) -> tuple[Tensor, ...]:
        at_once = max(1, int(min(WORKING_SET, self._memory) / (self._numbers() * n_replicas)))
        n_blocks = math.ceil(index.shape[1] / at_once)  # of one size: a small rest would cost as many calls
        return index.split(math.ceil(index.shape[1] / n_blocks), dim=1)

    def _differentiated(self, theta: Tensor, index: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """(nats, the gradient by theta of their sum with these weights)."""
        leaf = leaf_of(theta)
        nats, total = self._nats(leaf, index, targets, weights)
        (gradient,) = torch.autograd.grad(total, leaf, torch.ones_like(total))
        return nats, gradient

    def _targets_of(self, index: Tensor) -> Tensor:
        return self._targets[index].flatten(1)


def _of_examples(nats: Tensor, weights: Tensor) -> Tensor:
    """Of Float[replica, row] and weights Float[chain, example, scored]: losses Float64[replica, example]."""
    return (nats.double().view(-1, *weights.shape) * weights).sum(-1).flatten(0, 1)


def numbers_of_a_layer(net: Network, n_heads: int) -> int:
    """What a layer keeps for its backward pass, and the gradients of that, about: patterns, q, k, v, z, MLP."""
    cfg, n_pos = net.cfg, net.n_pos
    mlp = 0 if cfg.attn_only else 4 * (cfg.d_mlp or 0)
    patterns = n_heads * n_pos if net.keeps_patterns else 0
    return n_pos * (patterns + 8 * n_heads * cfg.d_head + 6 * cfg.d_model + mlp)
