"""Weights laid out as the compiled loops read them: sixteen columns at a time, one matrix after another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechgrok.loops.lanes import WIDTH, load, pairs, plus, spread, store, times, turn
from mechgrok.replicas.fused import kept
from mechgrok.replicas.pairs import PANEL, other_of, pairs_of, rows_of_pairs, scale_of
from mechgrok.replicas.products import ZERO, loop, padded


@dataclass(frozen=True)
class Linear:
    """x W + b. weight: Float[replica or 1, n_in, n_out]; bias: Float[replica or 1, pos or 1, n_out].

    moves: each replica has its own. What does not move is the same object in every call, as it is packed once.
    back: whether the gradient by x is asked for. plain: W lies there row by row too.
    made: by the passes themselves; `weight` tells the shape alone.
    """

    weight: Tensor
    bias: Tensor | None = None
    moves: bool = False
    back: bool = True
    plain: bool = False
    made: bool = False


class Packed:
    """Linears one after another in one flat array; `places` says where each begins, by its identity.

    Args:
        n: of each that moves, how many replicas there are; one may serve them all.
        half: weights as pairs of int16s, each pair in the place of one number, and a scale for each column.
    """

    def __init__(self, linears: Sequence[Linear], n: int = 1, half: bool = False):
        self._linears, self._size = linears, 0
        self.places: dict[int, dict[str, int]] = {}
        weights: list[tuple[int, Tensor, bool]] = []
        plain: list[tuple[int, Tensor]] = []
        for linear in linears:
            place = self.places[id(linear)] = {"each": int(n > 1 or len(linear.weight) > 1), "half": int(half)}
            weight = linear.weight.detach()
            weight, (_, n_in, n_out) = weight if len(weight) > 1 else weight.expand(n, -1, -1), weight.shape
            wanted = {"weight": (n_in, n_out)} | ({"turned": (n_out, n_in)} if linear.back else {})
            for name, (height, n_lanes) in wanted.items():
                place[name] = self._next(len(weight) * (rows_of_pairs(height) if half else height) * padded(n_lanes))
                if not linear.made:
                    weights.append((place[name], weight, name == "turned"))
            if linear.plain:
                place["plain"] = self._next(padded(weight.numel()))
                plain.append((place["plain"], weight))
            if linear.bias is not None:
                bias = linear.bias.detach()
                bias = bias if len(bias) > 1 else bias.expand(len(weight), -1, -1)
                place["bias"] = self._next(padded(bias.numel()))
                plain.append((place["bias"], bias))
        self.flat = torch.empty(self._size + WIDTH)
        room = np.zeros(WIDTH * PANEL, np.float32)
        for at, weight, turned in weights:
            numbers, apart = _flat(weight)
            lay_out(
                numbers.numpy(), len(weight), apart, *weight.shape[1:], turned, half, room, self.flat[at:].numpy()
            )  # fmt: skip
        for at, numbers in plain:
            self.flat[at : at + numbers.numel()].view(numbers.shape).copy_(numbers)

    def holds(self, linears: Sequence[Linear]) -> bool:
        """Whether it is of these very ones."""
        return len(linears) == len(self._linears) and all(a is b for a, b in zip(linears, self._linears, strict=True))

    def _next(self, size: int) -> int:
        at, self._size = self._size, self._size + size
        return at


@kept
def lay_out(matrices, n, apart, n_rows, n_columns, turned, half, room, out):
    """Each of n matrices, `apart` from one another, or its transpose: sixteen columns, and the next sixteen after them.

    The columns left over at the end are never read. half: each `PANEL` rows of it, or of the transpose, as pairs of
    int16s, and the columns' scales after them; terms go into pairs as `other_of` says. room: for so many rows.
    """
    height, n_lanes = (n_columns, n_rows) if turned else (n_rows, n_columns)
    to = 0
    for matrix in range(n):
        for lane in range(0, n_lanes, WIDTH):
            left = min(WIDTH, n_lanes - lane)
            for panel in range(0, height, PANEL):
                end = min(panel + PANEL, height)
                for first in range(panel, end, WIDTH):
                    there = min(WIDTH, end - first)
                    taken, begin = (room, (first - panel) * WIDTH) if half else (out, to)
                    if turned:
                        turn(matrices, matrix * apart + lane * n_columns + first, n_columns, left, there, taken, begin)
                    else:
                        at = matrix * apart + first * n_columns + lane
                        for row in range(there):
                            some = load(matrices, at + row * n_columns, left, ZERO)
                            store(taken, begin + row * WIDTH, WIDTH, some)
                    to += 0 if half else there * WIDTH
                if half:
                    _pair_up(room, end - panel, out, to)
                    to += rows_of_pairs(end - panel) * WIDTH


@loop
def _pair_up(x, n, out, to):
    """n rows of sixteen columns as pairs, and the columns' scales."""
    squares = spread(ZERO)
    for row in range(n):
        y = load(x, row * WIDTH, WIDTH, ZERO)
        squares = plus(squares, times(y, y))
    by, back = scale_of(squares)
    for c in range(0, n, 2 * WIDTH):
        half, second = other_of(n, c)
        for row in range(half):
            low = load(x, (c + row) * WIDTH, WIDTH, ZERO)
            high = load(x, (c + half + row) * WIDTH, WIDTH if row < second else 0, ZERO)
            store(out, to + (c // 2 + row) * WIDTH, WIDTH, pairs(low, high, by))
    store(out, to + pairs_of(n) * WIDTH, WIDTH, back)


def _flat(weight: Tensor) -> tuple[Tensor, int]:
    """(all numbers from the first on, how far each matrix begins from the one before), copied only if it must be."""
    if not weight[0].is_contiguous():
        weight = weight.contiguous()
    n, apart = len(weight), weight.stride(0)
    return weight.as_strided(((n - 1) * apart + weight[0].numel(),), (1,)), apart


def fill(record: Any, linear: Linear | None, places: Mapping[int, dict[str, int]]) -> None:
    """Write a record of `linear.MATRIX`; all zeros, and no gradient, for None."""
    record["dweight"] = record["dbias"] = -1
    if linear is not None:
        record["n_in"], record["n_out"], record["moves"] = *linear.weight.shape[1:], linear.moves
        record["n_bias"] = 0 if linear.bias is None else linear.bias.shape[1]
        for name, at in places[id(linear)].items():
            record[name] = at
