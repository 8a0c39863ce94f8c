"""Attention of many heads on many examples: compiled loops where they serve, torch's operations elsewhere."""

from typing import Any

import torch
from torch import Tensor

from mechgrok.loops.entry import LoopError, below, holds
from mechgrok.loops.kept import serves
from mechgrok.replicas import fused
from mechgrok.reproducible import without_denormals


def attend(
    q: Tensor | None,
    rest: Tensor,
    n_keys: Tensor,
    scale: float,
    bias: Tensor | None = None,
    apart: bool = False,
    loops: bool = True,
) -> Tensor:
    """z = softmax(scale q k^T + bias) v, differentiable by q, k and v.

    Args:
        q: Float[example, query, head, d_head], or None where it comes first in `rest`.
        rest: Float[example, key, part, head, d_head], the parts being q, k, v or k, v.
        n_keys: Int[query]: each query sees that many keys, from the first on; never fewer than the query before
            it, and one at least.
        bias: Float[head, query, key].
        apart: each head by itself. loops: whether compiled ones may be used.

    Returns:
        Float[example, query, head, d_head], or Float[head, example, query, d_head] if `apart`.
    """
    if loops and bias is None and serves(rest):
        return _Fused.apply(q, rest, n_keys, scale, apart)
    return _plain(q, rest, n_keys, scale, bias, apart)


def _plain(q: Tensor | None, rest: Tensor, n_keys: Tensor, scale: float, bias: Tensor | None, apart: bool) -> Tensor:
    query, key, value = rest[:, :, 0] if q is None else q, rest[:, :, -2], rest[:, :, -1]
    scores = scale * torch.einsum("eqhd,ekhd->hqek", query, key)
    if bias is not None:
        scores = scores + bias[:, :, None]
    hidden = torch.arange(key.shape[1], device=key.device) >= n_keys[:, None]
    pattern = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    return torch.einsum("hqek,ekhd->heqd" if apart else "hqek,ekhd->eqhd", pattern, value)


class _Fused(torch.autograd.Function):
    """Two numbers of each softmax are kept for the backward pass, which makes the pattern again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor | None, rest: Tensor, n_keys: Tensor, scale: float, apart: bool) -> Tensor:
        q, rest = None if q is None else q.contiguous(), rest.contiguous()
        n_examples, _, _, n_heads, d_head = rest.shape
        n_queries = len(n_keys)
        shape = (n_heads, n_examples, n_queries, d_head) if apart else (n_examples, n_queries, n_heads, d_head)
        z = rest.new_empty(shape)
        sums = rest.new_empty(n_examples * n_heads * -(-n_queries // fused.WIDTH) * 2 * fused.WIDTH)
        ctx.given = _arguments(q, rest, n_keys, scale, sums)
        ctx.strides = (z.stride(1), z.stride(0), z.stride(2)) if apart else (z.stride(0), z.stride(2), z.stride(1))
        ctx.save_for_backward(q, rest)
        _check(q, rest, n_keys, z)
        with without_denormals():
            fused.attention(*ctx.given, _flat(z), ctx.strides)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        q, rest = ctx.saved_tensors
        dq, drest = None if q is None else torch.empty_like(q), torch.empty_like(rest)
        gradients = _flat(drest if dq is None else dq), _flat(drest)
        n_keys = torch.from_numpy(ctx.given[6])
        _check(q, rest, n_keys, dz)
        dscores = _flat(rest.new_empty(rest.shape[1] * fused.WIDTH))
        with without_denormals():
            fused.attention_backward(*ctx.given, _flat(dz.contiguous()), ctx.strides, dscores, *gradients)
        return dq, drest, None, None, None


def _check(q: Tensor | None, rest: Tensor, n_keys: Tensor, z: Tensor) -> None:
    """Of what `fused.attention` indexes, all that the caller has made."""
    n_examples, n_pos, n_parts, n_heads, d_head = rest.shape
    width = n_examples * n_heads * d_head
    holds("attention", z=(z, width * len(n_keys)), q=(rest if q is None else q, width * len(n_keys)))
    if n_parts != (3 if q is None else 2):
        raise LoopError(f"attention: {n_parts} parts beside {'no ' if q is None else ''}q of its own")
    below("attention", n_keys=(n_keys - 1, n_pos), more_keys=(n_keys.diff(), n_pos))


def _arguments(q: Tensor | None, rest: Tensor, n_keys: Tensor, scale: float, sums: Tensor) -> tuple[Any, ...]:
    """What `fused.attention` and its backward pass both take first."""
    _, n_pos, n_parts, n_heads, d_head = rest.shape
    rest_row = n_parts * n_heads * d_head
    first, row = (rest, rest_row) if q is None else (q, n_heads * d_head)
    return (
        _flat(first), first.shape[1] * row, row, _flat(rest), rest_row, n_pos,
        n_keys.to(torch.float32).numpy(), fused.number(scale), n_heads, d_head,
        _flat(rest.new_empty(d_head * fused.WIDTH)), _flat(rest.new_empty(n_pos * fused.WIDTH)), False, _flat(sums),
    )  # fmt: skip


def _flat(tensor: Tensor) -> Any:
    return tensor.detach().view(-1).numpy()
