"""Flat parameters of heads, as what reads for them takes them: the weights of several letters side by side."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def side_by_side(
    theta: Tensor, d_model: int, d_head: int, groups: Sequence[str]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Of one head's parameters for each replica, Float[replica, param], in the order of `components.HEAD_PARAMETERS`.

    Returns:
        For each group of letters, "QKV" or "Q" and "KV", its weights side by side, Float[replica, d_model, letter and
        d_head]; W_O, Float[replica, d_head, d_model]; b_Q, b_K and b_V, Float[replica, 3, d_head].
    """
    *weights, out, biases = _SideBySide.apply(theta, d_model, d_head, [len(letters) for letters in groups])
    return weights, out, biases


class _SideBySide(torch.autograd.Function):
    """Each number is copied once, and its gradient once back: torch's split, stack and permute copy both several times,
    and take twice as long (.28 ms in place of .14 for a step of 16 heads of modular addition).
    """

    @staticmethod
    def forward(ctx: Any, theta: Tensor, d_model: int, d_head: int, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.sizes = (d_model, d_head), sizes
        reads, out, biases = _parts(theta, d_model, d_head)
        weights = [theta.new_empty(len(theta), d_model, size, d_head) for size in sizes]
        for weight, part in zip(weights, reads.split(sizes, dim=2), strict=True):
            weight.copy_(part)
        return *(weight.flatten(2) for weight in weights), out.clone(), biases.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *weights, dout, dbiases = gradients
        (d_model, d_head), n_replicas = ctx.shape, len(dout)
        dtheta = dout.new_empty(n_replicas, 4 * d_model * d_head + 3 * d_head)
        reads, out, biases = _parts(dtheta, d_model, d_head)
        for part, weight in zip(reads.split(ctx.sizes, dim=2), weights, strict=True):
            part.copy_(weight.view(part.shape))
        out.copy_(dout)
        biases.copy_(dbiases)
        return dtheta, None, None, None


def _parts(theta: Tensor, d_model: int, d_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views: W_Q, W_K and W_V, Float[replica, d_model, 3, d_head]; W_O; the biases, Float[replica, 3, d_head]."""
    size = d_model * d_head
    read, out, biases = theta.split([3 * size, size, 3 * d_head], dim=1)
    reads = read.unflatten(1, (3, d_model, d_head)).transpose(1, 2)
    return reads, out.unflatten(1, (d_head, d_model)), biases.unflatten(1, (3, d_head))
