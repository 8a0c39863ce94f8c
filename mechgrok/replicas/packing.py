"""Weights laid out as the compiled loops read them: sixteen columns at a time, one matrix after another."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechgrok.loops.entry import holds
from mechgrok.loops.lanes import WIDTH, load, pairs, plus, spread, store, times, turn
from mechgrok.replicas.fused import kept
from mechgrok.replicas.pairs import PANEL, other_of, pairs_of, rows_laid_out, rows_of_pairs, scale_of
from mechgrok.replicas.products import ZERO, loop, padded


@dataclass(frozen=True)
class Linear:
    """x W + b. weight: Float[replica or 1, n_in, n_out]; bias: Float[replica or 1, pos or 1, n_out].

    moves: each replica has its own. What does not move is the same object in every call, as it is packed once.
    back: whether the gradient by x is asked for. plain: W lies there row by row too. forward: whether x W is asked for.
    """

    weight: Tensor
    bias: Tensor | None = None
    moves: bool = False
    back: bool = True
    plain: bool = False
    forward: bool = True

    def shape(self) -> tuple[Hashable, ...]:
        """All but the numbers."""
        bias = None if self.bias is None else self.bias.shape
        return self.weight.shape, bias, self.moves, self.back, self.plain, self.forward


@dataclass(frozen=True)
class Layout:
    """Where linears of some shapes lie, one after another, in the first `size` numbers of one flat array.

    places: of each linear, by their names in `linear.MATRIX`. n: replicas that each linear which moves has at least;
    one may serve them all. half: weights as pairs of int16s, each pair in the place of one number, and a scale for
    each column.
    """

    places: tuple[dict[str, int], ...]
    size: int
    n: int
    half: bool

    def pack(self, linears: Sequence[Linear]) -> Tensor:
        """The array: all weights of these, laid out as the loops take them, but for what the passes make."""
        packed, room = torch.empty(self.size + WIDTH, dtype=torch.float32), np.zeros(WIDTH * PANEL, np.float32)
        for linear, place in zip(linears, self.places, strict=True):
            weight = _of_each(linear.weight, self.n)
            for name in ("weight", "turned"):
                if name in place:
                    numbers, apart = _flat(weight)
                    n_in, n_out = weight.shape[1:] if name == "weight" else weight.shape[:0:-1]
                    size = len(weight) * rows_laid_out(n_in, self.half) * padded(n_out)
                    needed = (len(weight) - 1) * apart + n_in * n_out
                    holds("lay_out", matrices=(numbers, needed), out=(packed[place[name] :], size))
                    lay_out(
                        numbers.numpy(), len(weight), apart, *weight.shape[1:], name == "turned", self.half, room,
                        packed[place[name] :].numpy(),
                    )  # fmt: skip
            for name, part in (("plain", weight), ("bias", linear.bias)):
                if name in place and part is not None:
                    numbers = _of_each(part, len(weight))
                    packed[place[name] : place[name] + numbers.numel()].view(numbers.shape).copy_(numbers)
        return packed


def laid_out(linears: Sequence[Linear], n: int = 1, half: bool = False, after: int = 0) -> Layout:
    """The layout of linears of these shapes, `after` so many numbers."""
    places: list[dict[str, int]] = []
    size = after
    for linear in linears:
        places.append(place := {"each": int(n > 1 or len(linear.weight) > 1), "half": int(half)})
        n_each, (_, n_in, n_out) = max(n, len(linear.weight)), linear.weight.shape
        wanted = {
            "weight": n_each * rows_laid_out(n_in, half) * padded(n_out) if linear.forward else 0,
            "turned": n_each * rows_laid_out(n_out, half) * padded(n_in) if linear.back else 0,
            "plain": padded(n_each * n_in * n_out) if linear.plain else 0,
            "bias": 0 if linear.bias is None else padded(max(n_each, len(linear.bias)) * linear.bias[0].numel()),
        }
        for name, numbers in wanted.items():
            if numbers:
                place[name], size = size, size + numbers
    return Layout(tuple(places), size, n, half)


def _of_each(part: Tensor, n: int) -> Tensor:
    """Of each of n replicas, where one serves them all."""
    return part.detach() if len(part) > 1 else part.detach().expand(n, -1, -1)


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


def fill(record: Any, linear: Linear, place: Mapping[str, int]) -> None:
    """Write a record of `linear.MATRIX`; without gradients where `place` has none."""
    record["dweight"] = record["dbias"] = -1
    record["n_in"], record["n_out"], record["moves"] = *linear.weight.shape[1:], linear.moves
    record["n_bias"] = 0 if linear.bias is None else linear.bias.shape[1]
    for name, at in place.items():
        record[name] = at
