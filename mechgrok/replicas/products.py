"""Matrix products, linear maps and norms of a few rows at a time, as loops that numba compiles.

All arrays are flat. A record, `MATRIX` or `NORM`, says where in them a layer's numbers are and how many.
"""

from typing import Any

import numpy as np
from numba import njit
from numba.extending import register_jitable

from mechgrok.replicas.lanes import WIDTH, added, load, minus, number, plus, spread, spread_from, store, times

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}

ZERO, ONE = number(0), number(1)

# x -> x W + b. weight: where W begins, as `packing` lays it out; turned: where W^T does; bias: where the rows of b do,
# n_bias of them, used in turn; all in the array `own` if it moves, otherwise in `shared`. each: one after another for
# each replica; otherwise one serves all. dweight, dbias: where their gradients go, one replica's after another; or -1.
MATRIX = np.dtype(
    [(name, np.int64) for name in ("weight", "turned", "bias", "n_in", "n_out", "n_bias", "dweight", "dbias")]
    + [("moves", np.bool_), ("each", np.bool_)],
    align=True,
)
# x -> (x - mean x if centred) / sqrt(mean square + eps) if scaled; neither: x itself.
NORM = np.dtype([("eps", np.float32), ("centred", np.bool_), ("scaled", np.bool_)], align=True)


@njit(**OPTIONS)
def _eight_rows(out, to, out_row, add, a, at, a_row, a_term, x, of, x_term, n_terms, n):
    """out[r, l] (+)= sum over t of a[r, t] x[t, l]: eight rows, n lanes; the arrays are flat, the strides given."""
    nothing = spread(ZERO)
    s0 = load(out, to, n, ZERO) if add else nothing
    s1 = load(out, to + out_row, n, ZERO) if add else nothing
    s2 = load(out, to + 2 * out_row, n, ZERO) if add else nothing
    s3 = load(out, to + 3 * out_row, n, ZERO) if add else nothing
    s4 = load(out, to + 4 * out_row, n, ZERO) if add else nothing
    s5 = load(out, to + 5 * out_row, n, ZERO) if add else nothing
    s6 = load(out, to + 6 * out_row, n, ZERO) if add else nothing
    s7 = load(out, to + 7 * out_row, n, ZERO) if add else nothing
    for _ in range(n_terms):
        y = load(x, of, n, ZERO)
        s0 = plus(s0, times(spread_from(a, at), y))
        s1 = plus(s1, times(spread_from(a, at + a_row), y))
        s2 = plus(s2, times(spread_from(a, at + 2 * a_row), y))
        s3 = plus(s3, times(spread_from(a, at + 3 * a_row), y))
        s4 = plus(s4, times(spread_from(a, at + 4 * a_row), y))
        s5 = plus(s5, times(spread_from(a, at + 5 * a_row), y))
        s6 = plus(s6, times(spread_from(a, at + 6 * a_row), y))
        s7 = plus(s7, times(spread_from(a, at + 7 * a_row), y))
        of += x_term
        at += a_term
    store(out, to, n, s0)
    store(out, to + out_row, n, s1)
    store(out, to + 2 * out_row, n, s2)
    store(out, to + 3 * out_row, n, s3)
    store(out, to + 4 * out_row, n, s4)
    store(out, to + 5 * out_row, n, s5)
    store(out, to + 6 * out_row, n, s6)
    store(out, to + 7 * out_row, n, s7)


@njit(**OPTIONS)
def _one_row(out, to, add, a, at, a_term, x, of, x_term, n_terms, n):
    row = load(out, to, n, ZERO) if add else spread(ZERO)
    for _ in range(n_terms):
        row = plus(row, times(spread_from(a, at), load(x, of, n, ZERO)))
        of += x_term
        at += a_term
    store(out, to, n, row)


@njit(**OPTIONS)
def product(out, to, out_row, add, a, at, a_row, a_term, x, of, x_term, x_group, n_terms, n_rows, n_lanes):
    """out[r, l] (+)= sum over t of a[r, t] x[t, l], any number of rows, terms and lanes.

    The arrays are flat and the strides given; sixteen lanes of x begin x_group numbers after the sixteen before.
    """
    for lane in range(0, n_lanes, WIDTH):
        n = min(WIDTH, n_lanes - lane)
        group = of + lane // WIDTH * x_group
        row = 0
        while row + 8 <= n_rows:
            _eight_rows(
                out, to + row * out_row + lane, out_row, add, a, at + row * a_row, a_row, a_term,
                x, group, x_term, n_terms, n,
            )  # fmt: skip
            row += 8
        for left in range(row, n_rows):
            _one_row(out, to + left * out_row + lane, add, a, at + left * a_row, a_term, x, group, x_term, n_terms, n)


@register_jitable
def padded(n: int) -> int:
    """n, or the next multiple of sixteen."""
    return (n + WIDTH - 1) // WIDTH * WIDTH


@njit(**OPTIONS)
def _by_packed(m, place, n_in, n_out, replica, shared, own, x, at, n_rows, out, to, add):
    """out (+)= x M of the replica's n_in by n_out matrix M, or of the one that serves all, which begin at `place`."""
    matrices, of = own if m.moves else shared, place + (replica * n_in * padded(n_out) if m.each else 0)
    product(out, to, n_out, add, x, at, n_in, 1, matrices, of, WIDTH, WIDTH * n_in, n_in, n_rows, n_out)


@njit(**OPTIONS)
def weigh(m, replica, shared, own, x, at, n_rows, out, to, add):
    """out (+)= x W for n_rows rows."""
    _by_packed(m, m.weight, m.n_in, m.n_out, replica, shared, own, x, at, n_rows, out, to, add)


@njit(**OPTIONS)
def linear(m, replica, shared, own, x, at, n_rows, out, to, add):
    """out (+)= x W + b for n_rows rows."""
    if m.n_bias > 0:
        biases, start = bias_of(m, replica, shared, own)
        for row in range(n_rows):
            _row_plus(biases, start + row % m.n_bias * m.n_out, add, out, to + row * m.n_out, m.n_out)
    weigh(m, replica, shared, own, x, at, n_rows, out, to, add or m.n_bias > 0)


@njit(**OPTIONS)
def bias_of(m, replica, shared, own):
    """(array, where in it the replica's b begins)."""
    return own if m.moves else shared, m.bias + (replica * m.n_bias * m.n_out if m.each else 0)


@njit(**OPTIONS)
def linear_back(m, replica, shared, own, dout, at, n_rows, dx, to, add):
    """dx (+)= dout W^T."""
    _by_packed(m, m.turned, m.n_out, m.n_in, replica, shared, own, dout, at, n_rows, dx, to, add)


@njit(**OPTIONS)
def linear_gradient(m, replica, x, at, dout, of, n_rows, gradients):
    """Add x^T dout and the sums of dout to where the gradients of W and b are wanted."""
    if m.dweight >= 0:
        to = m.dweight + replica * m.n_in * m.n_out
        product(
            gradients, to, m.n_out, True, x, at, 1, m.n_in, dout, of, m.n_out, WIDTH, n_rows, m.n_in, m.n_out
        )  # fmt: skip
    if m.dbias >= 0:
        to = m.dbias + replica * m.n_bias * m.n_out
        for row in range(n_rows):
            _row_plus(dout, of + row * m.n_out, True, gradients, to + row % m.n_bias * m.n_out, m.n_out)


@njit(**OPTIONS)
def _row_plus(x, at, add, out, to, n):
    """out (+)= x, n numbers."""
    for c in range(0, n, WIDTH):
        left = min(WIDTH, n - c)
        y = load(x, at + c, left, ZERO)
        store(out, to + c, left, plus(load(out, to + c, left, ZERO), y) if add else y)


@njit(**OPTIONS)
def copy(x, at, n, out, to):
    """out = x, n numbers."""
    _row_plus(x, at, False, out, to, n)


@njit(**OPTIONS)
def normalize(norm, x, at, n_rows, n, hat, to, inverse):
    """hat, from `to` on: the normalized rows of x; after them, from `inverse` on, 1 / root mean square of each."""
    for row in range(n_rows):
        start, end = at + row * n, to + row * n
        copy(x, start, n, hat, end)
        if norm.centred:
            total = spread(ZERO)
            for c in range(0, n, WIDTH):
                total = plus(total, load(x, start + c, min(WIDTH, n - c), ZERO))
            mean = spread(added(total) / number(n))
            for c in range(0, n, WIDTH):
                left = min(WIDTH, n - c)
                store(hat, end + c, left, minus(load(x, start + c, left, ZERO), mean))
        if norm.scaled:
            by = inverse_rms(norm, hat, end, n)
            hat[inverse + row] = by
            for c in range(0, n, WIDTH):
                left = min(WIDTH, n - c)
                store(hat, end + c, left, times(load(hat, end + c, left, ZERO), spread(by)))


@njit(**OPTIONS)
def inverse_rms(norm, x, at, n):
    """1 / root mean square of n numbers that are centred if the norm centres; 1 if it does not scale."""
    if not norm.scaled:
        return ONE
    total = spread(ZERO)
    for c in range(0, n, WIDTH):
        y = load(x, at + c, min(WIDTH, n - c), ZERO)
        total = plus(total, times(y, y))
    return ONE / np.sqrt(added(total) / number(n) + norm.eps)


@njit(**OPTIONS)
def normalize_back(norm, dhat, at, n_rows, n, hat, of, inverse, dx, to):
    """dx += inverse (dhat - mean dhat if centred - hat mean (dhat hat)) if scaled, else dhat."""
    for row in range(n_rows):
        start, here, end = at + row * n, of + row * n, to + row * n
        if not norm.scaled:
            _row_plus(dhat, start, True, dx, end, n)
            continue
        total, inner = spread(ZERO), spread(ZERO)
        for c in range(0, n, WIDTH):
            left = min(WIDTH, n - c)
            y = load(dhat, start + c, left, ZERO)
            total = plus(total, y)
            inner = plus(inner, times(y, load(hat, here + c, left, ZERO)))
        mean = spread(added(total) / number(n) if norm.centred else ZERO)
        along, by = spread(added(inner) / number(n)), spread(hat[inverse + row])
        for c in range(0, n, WIDTH):
            left = min(WIDTH, n - c)
            y = minus(load(dhat, start + c, left, ZERO), plus(mean, times(load(hat, here + c, left, ZERO), along)))
            store(dx, end + c, left, plus(load(dx, end + c, left, ZERO), times(y, by)))
