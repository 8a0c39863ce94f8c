"""Attention whose scores stay in the cache, with its gradients written out.

Everything is kept head by head, so that one batched product serves all heads and no head is copied apart.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**17  # scores at once: half a megabyte in float32


def read_heads(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """rows weight + bias for every head, Float[head, replica, row, d_head], differentiable by all three.

    Args:
        rows: Float[replica, row, d_model]; weight: Float[replica or 1, head, d_model, d_head].
        bias: Float[replica or 1, pos or 1, head, d_head], the same for every example.
    """
    return _ReadHeads.apply(rows, weight, bias)


def attend(q: Tensor | None, rest: Tensor, bias: Tensor, scale: float) -> Tensor:
    """z = softmax(scale q k^T + bias) v, differentiable by q, k and v.

    Args:
        q: Float[head, example, query, d_head], or None where it comes first in `rest`.
        rest: Float[part, head, example, key, d_head], the parts being q, k, v or k, v.
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


class _ReadHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.bias = bias.shape
        n_heads, d_head = weight.shape[1], weight.shape[3]
        out = rows.new_empty(n_heads, len(rows), rows.shape[1], d_head)
        for head in range(n_heads):  # not one product of `rows` expanded: torch would copy them for every head
            _product(rows, weight[:, head], out[head])
        out.unflatten(2, (-1, bias.shape[1])).add_(bias.permute(2, 0, 1, 3)[:, :, None])
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        drows = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            drows = torch.zeros_like(rows)
            for head, back in enumerate(dout):
                if len(weight) == 1:
                    drows.flatten(0, 1).addmm_(back.flatten(0, 1), weight[0, head].T)
                else:
                    drows.baddbmm_(back, weight[:, head].transpose(1, 2))
        if ctx.needs_input_grad[1]:
            dweight = torch.stack([torch.bmm(rows.transpose(1, 2), back) for back in dout], dim=1)
        if ctx.needs_input_grad[2]:
            each = dout.unflatten(2, (-1, ctx.bias[1])).sum(2).permute(1, 2, 0, 3)
            dbias = each if len(each) == ctx.bias[0] else each.sum(0, keepdim=True)
        return drows, dweight, dbias


class _Attend(torch.autograd.Function):
    """The pattern is kept for the backward pass; its gradient lives for one block only."""

    @staticmethod
    def forward(ctx: Any, q: Tensor | None, rest: Tensor, bias: Tensor, scale: float) -> Tensor:
        first = rest[0] if q is None else q
        query, key, value = (part.flatten(0, 1) for part in (first, *rest[-2:]))
        pattern = query.new_empty(len(query), query.shape[1], key.shape[1])
        z = torch.empty_like(query)
        # With one bias for all heads a block may span them.
        for at, head in _blocks(pattern, len(query) // len(bias)):
            scores = torch.bmm(query[at], key[at].transpose(1, 2), out=pattern[at])
            scores.mul_(scale).add_(bias[head])
            torch.softmax(scores, -1, out=scores)
            torch.bmm(scores, value[at], out=z[at])
        ctx.save_for_backward(q, rest, pattern, z)
        ctx.scale = scale
        return z.view(first.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, rest, pattern, z = ctx.saved_tensors
        dq, drest = None if q is None else torch.empty_like(q), torch.empty_like(rest)
        query, key, value = (part.flatten(0, 1) for part in (rest[0] if q is None else q, *rest[-2:]))
        dquery, dkey, dvalue = (part.flatten(0, 1) for part in (drest[0] if dq is None else dq, *drest[-2:]))
        dz = grad.flatten(0, 1)
        # softmax's backward needs the sum over keys of pattern dpattern, which is z . dz.
        inner = (z * dz).sum(-1, keepdim=True)
        for at, _ in _blocks(pattern, len(pattern)):
            own = pattern[at]
            torch.bmm(own.transpose(1, 2), dz[at], out=dvalue[at])
            dscores = torch.bmm(dz[at], value[at].transpose(1, 2))
            dscores.sub_(inner[at]).mul_(own).mul_(ctx.scale)
            torch.bmm(dscores, key[at], out=dquery[at])
            torch.bmm(dscores.transpose(1, 2), query[at], out=dkey[at])
        return dq, drest, None, None


class _MixHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, resid: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight)
        ctx.mark_dirty(resid)
        for head, own in enumerate(z):
            if len(weight) == 1:
                resid.flatten(0, 1).addmm_(own.flatten(0, 1), weight[0, head])
            else:
                resid.baddbmm_(own, weight[:, head])
        return resid

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        z, weight = ctx.saved_tensors
        dz = torch.empty_like(z)
        dout = dout.contiguous()
        for head in range(len(z)):
            _product(dout, weight[:, head].transpose(1, 2), dz[head])
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = torch.stack([torch.bmm(own.transpose(1, 2), dout) for own in z], dim=1)
        return dz, dweight, dout


def _product(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = rows weight, Float[replica, row, k] times Float[replica or 1, k, m]."""
    if len(weight) == 1:
        torch.mm(rows.flatten(0, 1), weight[0], out=out.flatten(0, 1))
    else:
        torch.bmm(rows, weight, out=out)


def _blocks(pattern: Tensor, run: int) -> Iterator[tuple[slice, int]]:
    """(matrices of a block, the run that they belong to): a block stays within a run."""
    step = max(1, BLOCK // pattern[0].numel())
    for number, start in enumerate(range(0, len(pattern), run)):
        for at in range(start, start + run, step):
            yield slice(at, min(at + step, start + run)), number
