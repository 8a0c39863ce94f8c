"""Which rows of a batch begin alike: those of one token, at one position or, with shortformer positions, at any."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mechgrok.loops.entry import below, holds
from mechgrok.replicas.fused import kept
from mechgrok.replicas.network import Network, Parameters, rows_of

ALIKE = 0.5  # of the rows of a batch at most so many distinct ones, and each is read once
SPARSE = 4  # as many distinct rows in all of the data as so many batches have rows: not worth looking at each batch


@dataclass(frozen=True)
class Beginnings:
    """The distinct rows of a batch. rows: Int[chain, n], numbers of `Distinct`'s. which: Int[chain, row], as which of
    these each row of the batch begins. asking: those before it are of positions that the first layer does not query.
    """

    rows: Tensor
    which: Tensor
    asking: int


class Distinct:
    """The distinct rows before the first layer of all examples, in the order of their positions.

    A row's number here stands for a token, or, with standard positions, for position * d_vocab + token.
    """

    def __init__(self, net: Network, tokens: Tensor):
        self._d_vocab = net.cfg.d_vocab
        self._placed = net.cfg.positional_embedding_type == "standard"
        start = self._d_vocab * net.every if self._placed else 0
        found = torch.zeros(self._d_vocab * (net.n_pos if self._placed else 1), dtype=torch.bool)
        found[tokens + start] = True
        self._what, self._numbers = found.nonzero().squeeze(1), (found.cumsum(0) - 1)[tokens + start]
        first = int(net.queries(0)[0]) if self._placed else 0
        self._asks, self._place = self._what >= self._d_vocab * first, torch.empty_like(self._what)

    def of(self, index: Tensor) -> Beginnings | None:
        """Of the examples Int[chain, example]; None where too few begin alike for it to pay."""
        if len(self._what) > SPARSE * index.shape[1] * self._numbers.shape[1]:
            return None
        numbers = self._numbers[index].flatten(1)
        rows, which = numbers.new_empty(len(index), len(self._what)), torch.empty_like(numbers)
        n_kinds = len(self._what)
        below("distinct", numbers=(numbers, n_kinds))
        holds("distinct", asks=(self._asks, n_kinds), place=(self._place, n_kinds))
        n, asking = _distinct(*(each.numpy() for each in (numbers, self._asks, self._place, rows, which)))
        return None if n > ALIKE * numbers.shape[1] else Beginnings(rows[:, :n].contiguous(), which, asking)

    def embed(self, parameters: Parameters, rows: Tensor | None = None) -> Tensor:
        """The residual stream before the first layer: of these rows Int[replica, n], or of all, as one replica's."""
        what = self._what[None] if rows is None else self._what[rows]
        resid = rows_of(parameters["embed.W_E"], what % self._d_vocab)
        return resid + rows_of(parameters["pos_embed.W_pos"], what // self._d_vocab) if self._placed else resid


@kept
def _distinct(
    numbers: np.ndarray, asks: np.ndarray, place: np.ndarray, rows: np.ndarray, which: np.ndarray
) -> tuple[int, int]:
    """(how many distinct numbers a chain has at most, how many of them at least do not ask).

    rows: receive of each chain those that are there, in their order, and then the others, for chains that have fewer.
    which: receive as which of these each number comes. place: room.
    """
    most, asking = 0, len(asks)
    for chain in range(len(numbers)):
        place[:] = -1
        for number in numbers[chain]:
            place[number] = 0
        n, silent = 0, 0
        for what in range(len(asks)):
            if place[what] == 0:
                rows[chain, n], place[what] = what, n
                n, silent = n + 1, silent + (not asks[what])
        for row in range(numbers.shape[1]):
            which[chain, row] = place[numbers[chain, row]]
        most, asking = max(most, n), min(asking, silent)
        for what in range(len(asks)):
            if place[what] < 0:
                rows[chain, n] = what
                n += 1
    return most, asking
