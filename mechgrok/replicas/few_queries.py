"""Attention of a few queries to a few keys: modular addition has one and three. Their numbers are the lanes.

`fused.attention` has sixteen queries as lanes, of which most would be empty here.
"""

from numba import njit

from mechgrok.loops.kept import OPTIONS
from mechgrok.loops.lanes import (
    WIDTH,
    added,
    exp,
    first,
    lane,
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
def patterns(q, query, q_row, rest, key, rest_row, n_keys, scale, d_head, pattern, place):
    """softmax(scale q k^T) of each query, from `place` on: Float[query, 16], 0 where it sees no key."""
    for i in range(len(n_keys)):
        seen, at = int(n_keys[i]), place + i * WIDTH
        scores = spread(LOWEST)
        for j in range(seen):
            scores = put(scores, j, scale * _dot(q, query + i * q_row, rest, key + j * rest_row, d_head))
        each = first(exp(minus(scores, spread(largest(scores)))), seen)
        store(pattern, at, WIDTH, times(each, spread(ONE / added(each))))


@njit(**OPTIONS)
def _sum(weights, x, at, row, n_rows, out, to, n):
    """out = the sum over rows of x of each times its lane of the weights, n numbers."""
    for c in range(0, n, WIDTH):
        left, total = min(WIDTH, n - c), spread(ZERO)
        for j in range(n_rows):
            total = plus(total, times(lane(weights, j), load(x, at + j * row + c, left, ZERO)))
        store(out, to + c, left, total)


@njit(**OPTIONS)
def values(pattern, place, rest, value, rest_row, n_keys, d_head, z, to, z_row):
    """z of each query."""
    for i in range(len(n_keys)):
        shares = load(pattern, place + i * WIDTH, WIDTH, ZERO)
        _sum(shares, rest, value, rest_row, int(n_keys[i]), z, to + i * z_row, d_head)


@njit(**OPTIONS)
def patterns_back(
    q, query, q_row, rest, key, value, rest_row, n_keys, scale, d_head, pattern, place, dz, back, z_row, dq, drest
):  # fmt: skip
    """dq, and the gradients by the keys and values that some query sees, in drest.

    What is made of one key after another stays in a register: a number that is read again right after it was written
    has to be waited for, and in some runs, as its address happened to be, twice as long as all of this takes.
    """
    n_queries = len(n_keys)
    for i in range(n_queries - 1, -1, -1):  # the last one sees all keys that any does, and is not added
        seen, own, asks = int(n_keys[i]), back + i * z_row, query + i * q_row
        shares, dshares = load(pattern, place + i * WIDTH, WIDTH, ZERO), spread(ZERO)
        for j in range(seen):
            dshares = put(dshares, j, _dot(dz, own, rest, value + j * rest_row, d_head))
            _add(lane(shares, j), dz, own, i < n_queries - 1, drest, value + j * rest_row, d_head)
        inner = added(times(shares, dshares))
        dscores = times(times(shares, spread(scale)), minus(dshares, spread(inner)))
        for j in range(seen):
            _add(lane(dscores, j), q, asks, i < n_queries - 1, drest, key + j * rest_row, d_head)
        _sum(dscores, rest, key, rest_row, seen, dq, asks, d_head)


@njit(**OPTIONS)
def _add(by, x, at, add, out, to, n):
    """out (+)= by x, n numbers."""
    for c in range(0, n, WIDTH):
        left = min(WIDTH, n - c)
        y = times(by, load(x, at + c, left, ZERO))
        store(out, to + c, left, plus(load(out, to + c, left, ZERO), y) if add else y)
