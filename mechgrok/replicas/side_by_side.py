"""Flat parameters of heads, as what reads for them takes them: the weights of several letters side by side."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def side_by_side(
    theta: Tensor, d_model: int, d_head: int, groups: Sequence[str]
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Of one head's parameters for each replica, Float[replica, param], in the order of `components.HEAD_PARAMETERS`.

    Returns:
        For each group of letters, "QKV" or "Q" and "KV", its weights and biases side by side, Float[replica, d_model,
        letter and d_head] and Float[replica, 1, letter and d_head]; and W_O, Float[replica, d_head, d_model].
    """
    *parts, out = _SideBySide.apply(theta, d_model, d_head, [len(letters) for letters in groups])
    return list(zip(parts[::2], parts[1::2], strict=True)), out


class _SideBySide(torch.autograd.Function):
    """Each number is copied once, and its gradient once back: torch's split, stack and permute copy both several times,
    and take twice as long (.28 ms in place of .14 for a step of 16 heads of modular addition).
    """

    @staticmethod
    def forward(ctx: Any, theta: Tensor, d_model: int, d_head: int, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.sizes = (d_model, d_head), sizes
        *parts, out = _parts(theta, d_model, d_head, sizes)
        own = (torch.empty(part.shape, dtype=theta.dtype).copy_(part).flatten(2) for part in parts)
        return *own, out.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (d_model, d_head), n_replicas = ctx.shape, len(gradients[0])
        dtheta = gradients[0].new_empty(n_replicas, 4 * d_model * d_head + 3 * d_head)
        for part, gradient in zip(_parts(dtheta, d_model, d_head, ctx.sizes), gradients, strict=True):
            part.copy_(gradient.view(part.shape))
        return dtheta, None, None, None


def _parts(theta: Tensor, d_model: int, d_head: int, sizes: Sequence[int]) -> list[Tensor]:
    """Views: for each group of so many letters its weights, Float[replica, d_model, letter, d_head], and its biases,
    Float[replica, 1, letter, d_head]; and W_O, Float[replica, d_head, d_model].
    """
    size = d_model * d_head
    weights, out, biases = theta.split([3 * size, size, 3 * d_head], dim=1)
    weights = weights.unflatten(1, (3, d_model, d_head)).transpose(1, 2).split(sizes, dim=2)
    each = biases.unflatten(1, (1, 3, d_head)).split(sizes, dim=2)
    return [*(part for pair in zip(weights, each, strict=True) for part in pair), out.unflatten(1, (d_head, d_model))]
