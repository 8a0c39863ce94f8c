"""Weights laid out as the compiled loops read them: sixteen columns at a time, one matrix after another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechgrok.replicas.lanes import WIDTH
from mechgrok.replicas.linear import pairs_of
from mechgrok.replicas.products import padded


@dataclass(frozen=True)
class Linear:
    """x W + b. weight: Float[replica or 1, n_in, n_out]; bias: Float[replica or 1, pos or 1, n_out].

    moves: each replica has its own. What does not move is the same object in every call, as it is packed once.
    back: whether the gradient by x is asked for.
    """

    weight: Tensor
    bias: Tensor | None = None
    moves: bool = False
    back: bool = True


class Packed:
    """Linears one after another in one flat array; `places` says where each begins, by its identity.

    Args:
        n: of each that moves, how many replicas there are; one may serve them all.
        half: weights as pairs of bfloat16s, of two rows, each pair in the place of one number.
    """

    def __init__(self, linears: Sequence[Linear], n: int = 1, half: bool = False):
        self._linears, self._size = linears, 0
        self.places: dict[int, dict[str, int]] = {}
        parts: list[tuple[int, Tensor, bool]] = []
        for linear in linears:
            place = self.places[id(linear)] = {"each": int(n > 1 or len(linear.weight) > 1), "half": int(half)}
            weight = linear.weight.detach()
            weight = weight if len(weight) > 1 else weight.expand(n, -1, -1)
            wanted = {"weight": weight} | ({"turned": weight.transpose(1, 2)} if linear.back else {})
            for name, matrix in wanted.items():
                matrix = _in_pairs(matrix) if half else matrix
                place[name] = self._next(len(matrix) * matrix.shape[1] * padded(matrix.shape[2]))
                parts.append((place[name], matrix, True))
            if linear.bias is not None:
                bias = linear.bias.detach()
                bias = bias if len(bias) > 1 else bias.expand(len(weight), -1, -1)
                place["bias"] = self._next(padded(bias.numel()))
                parts.append((place["bias"], bias, False))
        self.flat = torch.empty(self._size + WIDTH)
        for at, part, in_columns in parts:
            if in_columns:
                _lay_out(part, self.flat[at:])
            else:
                self.flat[at : at + part.numel()].view(part.shape).copy_(part)

    def holds(self, linears: Sequence[Linear]) -> bool:
        """Whether it is of these very ones."""
        return len(linears) == len(self._linears) and all(a is b for a, b in zip(linears, self._linears, strict=True))

    def _next(self, size: int) -> int:
        at, self._size = self._size, self._size + size
        return at


def _in_pairs(matrix: Tensor) -> Tensor:
    """Float[n, n_in, n_out] -> [n, n_in / 2, n_out], the bits of two bfloat16s in each number."""
    n, n_in, n_out = matrix.shape
    rounded = matrix.new_zeros(n, pairs_of(n_in), n_out, 2, dtype=torch.bfloat16)
    rounded[..., 0].copy_(matrix[:, ::2])
    rounded[:, : n_in // 2, :, 1].copy_(matrix[:, 1::2])
    return rounded.view(torch.float32).squeeze(-1)


def _lay_out(matrix: Tensor, out: Tensor) -> None:
    """Float[n, n_in, n_out] -> [n, sixteen columns, n_in, 16]; the columns left over at the end are never read."""
    n, n_in, n_out = matrix.shape
    whole = n_out // WIDTH
    place = out[: n * n_in * padded(n_out)].view(n, -1, n_in, WIDTH)
    place[:, :whole].copy_(matrix[:, :, : whole * WIDTH].unflatten(2, (whole, WIDTH)).transpose(1, 2))
    if rest := n_out % WIDTH:
        place[:, whole, :, :rest].copy_(matrix[:, :, whole * WIDTH :])


def fill(record: Any, linear: Linear | None, places: Mapping[int, dict[str, int]]) -> None:
    """Write a record of `linear.MATRIX`; all zeros, and no gradient, for None."""
    record["dweight"] = record["dbias"] = -1
    if linear is not None:
        record["n_in"], record["n_out"], record["moves"] = *linear.weight.shape[1:], linear.moves
        record["n_bias"] = 0 if linear.bias is None else linear.bias.shape[1]
        for name, at in places[id(linear)].items():
            record[name] = at
