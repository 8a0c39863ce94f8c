"""Flat parameters of heads, as what reads for them takes them: the weights of several letters side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

Group = tuple[Tensor, Tensor]


def side_by_side(theta: Tensor, d_model: int, d_head: int, groups: Sequence[str]) -> tuple[list[Group], Tensor]:
    """Of one head's parameters for each replica, Float[replica, param], in the order of `components.HEAD_PARAMETERS`.

    Each number is copied once: torch's split, stack and permute copy them several times.

    Returns:
        For each group of letters, "QKV" or "Q" and "KV", its weights and biases side by side, Float[replica, d_model,
        letter and d_head] and Float[replica, 1, letter and d_head]; and W_O, Float[replica, d_head, d_model].
    """
    *parts, out = _parts(theta, d_model, d_head, groups)
    own = [torch.empty(part.shape, dtype=theta.dtype).copy_(part).flatten(2) for part in parts]
    return list(zip(own[::2], own[1::2], strict=True)), out.clone()


def one_after_another(parts: Sequence[Group], out: Tensor, groups: Sequence[str]) -> Tensor:
    """The inverse: Float[replica, param]."""
    n_replicas, d_head, d_model = out.shape
    theta = out.new_empty(n_replicas, 4 * d_model * d_head + 3 * d_head)
    own = [part for pair in parts for part in pair]
    for place, part in zip(_parts(theta, d_model, d_head, groups), [*own, out], strict=True):
        place.copy_(part.view(place.shape))
    return theta


def _parts(theta: Tensor, d_model: int, d_head: int, groups: Sequence[str]) -> list[Tensor]:
    """Views: for each group of letters its weights, Float[replica, d_model, letter, d_head], and its biases,
    Float[replica, 1, letter, d_head]; and W_O, Float[replica, d_head, d_model].
    """
    size, sizes = d_model * d_head, [len(letters) for letters in groups]
    weights, out, biases = theta.split([3 * size, size, 3 * d_head], dim=1)
    weights = weights.unflatten(1, (3, d_model, d_head)).transpose(1, 2).split(sizes, dim=2)
    each = biases.unflatten(1, (1, 3, d_head)).split(sizes, dim=2)
    return [*(part for pair in zip(weights, each, strict=True) for part in pair), out.unflatten(1, (d_head, d_model))]
