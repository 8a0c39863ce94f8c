"""Which rows of a batch begin alike: those of one token, at one position or, with shortformer positions, at any."""

from dataclasses import dataclass

import torch
from torch import Tensor

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
        self._tokens, self._d_vocab = tokens, net.cfg.d_vocab
        self._placed = net.cfg.positional_embedding_type == "standard"
        self._start = self._d_vocab * net.every if self._placed else 0
        found = torch.zeros(self._d_vocab * (net.n_pos if self._placed else 1), dtype=torch.bool, device=tokens.device)
        found[tokens + self._start] = True
        self._what, self._number = found.nonzero().squeeze(1), found.cumsum(0) - 1
        first = int(net.queries(0)[0]) if self._placed else 0
        self._asks = self._what >= self._d_vocab * first

    def of(self, index: Tensor) -> Beginnings | None:
        """Of the examples Int[chain, example]; None where too few begin alike for it to pay."""
        if len(self._what) > SPARSE * index.shape[1] * self._tokens.shape[1]:
            return None
        numbers = self._number[self._tokens[index] + self._start].flatten(1)
        there = numbers.new_zeros(len(index), len(self._what)).scatter_(1, numbers, 1)
        n = int(there.sum(1).max())
        if n > ALIKE * numbers.shape[1]:
            return None
        # Those that are there first, in their order; chains that have fewer are filled up with others.
        rows = there.argsort(dim=1, descending=True, stable=True)[:, :n].contiguous()
        asking = int((there * ~self._asks).sum(1).min())
        return Beginnings(rows, (there.cumsum(1) - 1).gather(1, numbers), asking)

    def embed(self, parameters: Parameters, rows: Tensor | None = None) -> Tensor:
        """The residual stream before the first layer: of these rows Int[replica, n], or of all, as one replica's."""
        what = self._what[None] if rows is None else self._what[rows]
        resid = rows_of(parameters["embed.W_E"], what % self._d_vocab)
        return resid + rows_of(parameters["pos_embed.W_pos"], what // self._d_vocab) if self._placed else resid
