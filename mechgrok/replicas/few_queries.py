"""Attention of a few queries to a few keys: modular addition has one and three. Their numbers are the lanes.

`fused.attention` has sixteen queries as lanes, of which most would be empty here.
"""

from numba import njit

from mechgrok.loops.kept import OPTIONS
from mechgrok.loops.lanes import (
    WIDTH,
    added,
    exp,
    largest,
    load,
    minus,
    plus,
    put,
    spread,
    store,
    times,
)
from mechgrok.replicas.products import LOWEST, ONE, ZERO

FEW = 3  # queries of an example, up to which this pays


@njit(**OPTIONS)
def are_few(n_queries, n_pos):
    """Whether these loops take so many queries of so many positions."""
    return n_queries <= FEW and n_pos <= WIDTH


@njit(**OPTIONS)
def _dot(a, at, b, of, n):
    """The sum of n products."""
    total = spread(ZERO)
    for c in range(0, n, WIDTH):
        left = min(WIDTH, n - c)
        total = plus(total, times(load(a, at + c, left, ZERO), load(b, of + c, left, ZERO)))
    return added(total)


@njit(**OPTIONS)
def _add(by, x, at, add, out, to, n):
    """out (+)= by x, n numbers."""
    for c in range(0, n, WIDTH):
        left = min(WIDTH, n - c)
        y = times(spread(by), load(x, at + c, left, ZERO))
        store(out, to + c, left, plus(load(out, to + c, left, ZERO), y) if add else y)


@njit(**OPTIONS)
def patterns(q, query, q_row, rest, key, rest_row, n_keys, scale, d_head, pattern, place):
    """softmax(scale q k^T) of each query, from `place` on: Float[query, 16], 0 where it sees no key."""
    for i in range(len(n_keys)):
        seen, at = int(n_keys[i]), place + i * WIDTH
        scores = spread(LOWEST)
        for j in range(seen):
            scores = put(scores, j, scale * _dot(q, query + i * q_row, rest, key + j * rest_row, d_head))
        store(pattern, at, WIDTH, spread(ZERO))
        store(pattern, at, seen, exp(minus(scores, spread(largest(scores)))))
        each = load(pattern, at, WIDTH, ZERO)
        store(pattern, at, WIDTH, times(each, spread(ONE / added(each))))


@njit(**OPTIONS)
def values(pattern, place, rest, value, rest_row, n_keys, d_head, z, to, z_row):
    """z of each query."""
    for i in range(len(n_keys)):
        for j in range(int(n_keys[i])):
            _add(pattern[place + i * WIDTH + j], rest, value + j * rest_row, j > 0, z, to + i * z_row, d_head)


@njit(**OPTIONS)
def patterns_back(
    q, query, q_row, rest, key, value, rest_row, n_keys, scale, d_head, pattern, place, dz, back, z_row,
    dq, dkeys, dvalues,
):  # fmt: skip
    """dq, and what is added to the gradients by the keys and values of one head, Float[pos, d_head]."""
    for i in range(len(n_keys)):
        seen, at, own, asks = int(n_keys[i]), place + i * WIDTH, back + i * z_row, query + i * q_row
        shares, dshares = load(pattern, at, WIDTH, ZERO), spread(ZERO)
        for j in range(seen):
            dshares = put(dshares, j, _dot(dz, own, rest, value + j * rest_row, d_head))
            _add(pattern[at + j], dz, own, True, dvalues, j * d_head, d_head)
        inner = added(times(shares, dshares))
        # The pattern has served, so its place takes the gradient by the scores.
        store(pattern, at, WIDTH, times(times(shares, spread(scale)), minus(dshares, spread(inner))))
        for j in range(seen):
            dscore = pattern[at + j]
            _add(dscore, rest, key + j * rest_row, j > 0, dq, asks, d_head)
            _add(dscore, q, asks, True, dkeys, j * d_head, d_head)
