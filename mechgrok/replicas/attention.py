"""Attention whose scores stay in the cache, with the gradients written out and no head ever copied apart.

Queries, keys and values are read as the projections leave them, the heads side by side; z is kept
head by head, so that the output projection adds one head after another.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**17  # scores at once: half a megabyte in float32


def attend(q: Tensor | None, rest: Tensor, bias: Tensor, scale: float) -> Tensor:
    """z = softmax(scale q k^T + bias) v, differentiable by q, k and v.

    Args:
        q: Float[example, query, head, d_head], or None where it comes first in `rest`.
        rest: Float[example, key, part, head, d_head], the parts being q, k, v or k, v.
        bias: Float[head or 1, query, key]: -inf where a query may not look. It must see one key at least.

    Returns:
        Float[head, example, query, d_head].
    """
    return _Attend.apply(q, rest, bias, scale)


def mix_heads(z: Tensor, weight: Tensor, resid: Tensor, bias: Tensor) -> Tensor:
    """resid + bias + sum over heads of z W_O, differentiable by all four.

    Args:
        z: Float[head, replica, row, d_head]; weight: Float[replica or 1, head, d_head, d_model].
        resid: Float[replica, row, d_model]; bias: Float[replica or 1, 1, d_model].
    """
    return _MixHeads.apply(z, weight, resid + bias)


class _Attend(torch.autograd.Function):
    """The pattern is kept for the backward pass; its gradient lives for one block only."""

    @staticmethod
    def forward(ctx: Any, q: Tensor | None, rest: Tensor, bias: Tensor, scale: float) -> Tensor:
        query, (key, value) = rest[:, :, 0] if q is None else q, rest[:, :, -2:].unbind(2)
        n, n_query, n_heads, d_head = query.shape
        pattern = query.new_empty(n_heads, n, n_query, key.shape[1])
        z = query.new_empty(n_heads, n, n_query, d_head)
        for at, head in _blocks(pattern):
            scores = pattern[head, at]
            torch.bmm(query[at, :, head], key[at, :, head].transpose(1, 2), out=scores)
            scores.mul_(scale).add_(bias[head % len(bias)])
            torch.softmax(scores, -1, out=scores)
            torch.bmm(scores, value[at, :, head], out=z[head, at])
        ctx.save_for_backward(q, rest, pattern, z)
        ctx.scale = scale
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        q, rest, pattern, z = ctx.saved_tensors
        query, (key, value) = rest[:, :, 0] if q is None else q, rest[:, :, -2:].unbind(2)
        drest, dq = torch.empty_like(rest), None if q is None else torch.empty_like(q)
        dquery, (dkey, dvalue) = drest[:, :, 0] if dq is None else dq, drest[:, :, -2:].unbind(2)
        for at, head in _blocks(pattern):
            own, back = pattern[head, at], dz[head, at]
            dvalue[at, :, head] = torch.bmm(own.transpose(1, 2), back)
            dscores = torch.bmm(back, value[at, :, head].transpose(1, 2))
            # softmax's backward needs the sum over keys of pattern dpattern, which is z . dz.
            dscores.sub_((z[head, at] * back).sum(-1, keepdim=True)).mul_(own).mul_(ctx.scale)
            dquery[at, :, head] = torch.bmm(dscores, key[at, :, head])
            dkey[at, :, head] = torch.bmm(dscores.transpose(1, 2), query[at, :, head])
        return dq, drest, None, None


class _MixHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, resid: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight)
        ctx.mark_dirty(resid)
        out = resid
        for head, own in enumerate(z):
            if len(weight) == 1:
                out.flatten(0, 1).addmm_(own.flatten(0, 1), weight[0, head])
            else:
                out.baddbmm_(own, weight[:, head])
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        z, weight = ctx.saved_tensors
        dz = torch.empty_like(z)
        for head in range(len(z)):
            torch.matmul(dout, weight[:, head].transpose(1, 2) if len(weight) > 1 else weight[0, head].T, out=dz[head])
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = torch.stack([torch.bmm(own.transpose(1, 2), dout) for own in z], dim=1)
        return dz, dweight, dout


def _blocks(pattern: Tensor) -> Iterator[tuple[slice, int]]:
    """(examples of a block, head)."""
    n_heads, n = pattern.shape[:2]
    step = max(1, BLOCK // pattern[0, 0].numel())
    for start in range(0, n, step):
        for head in range(n_heads):
            yield slice(start, start + step), head
