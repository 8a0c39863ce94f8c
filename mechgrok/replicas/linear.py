"""Linear maps and their gradients, a few rows at a time, as loops that numba compiles.

All arrays are flat. A record, `MATRIX`, says where in them a map's numbers are and how many.
"""

import numpy as np
from numba.extending import register_jitable

from mechgrok.loops.lanes import WIDTH, halves, load, pairs, store
from mechgrok.replicas.products import ZERO, clear, loop, padded, product, product_of_pairs, row_plus

# x -> x W + b. weight: where W begins, as `packing` lays it out; turned: where W^T does; bias: where the rows of b do,
# n_bias of them, used in turn; plain: where W does row by row, if it does; all in the array `own` if it moves, else in
# `shared`. each: one after another for each replica; otherwise one serves all.
# dweight, dbias: where their gradients go, one replica's after another; or -1.
# half: products are of bfloat16s and their sums of float32s, and W lies there in pairs of rows; b is as ever. spare:
# where in the array of what comes out, or of its gradient, there is room for such pairs.
MATRIX = np.dtype(
    [
        (name, np.int64)
        for name in ("weight", "turned", "bias", "plain", "n_in", "n_out", "n_bias", "dweight", "dbias", "spare")
    ]
    + [("moves", np.bool_), ("each", np.bool_), ("half", np.bool_)],
    align=True,
)


@register_jitable
def pairs_of(n: int) -> int:
    """How many pairs hold n numbers."""
    return (n + 1) // 2


@loop
def _halve(x, at, n_rows, n, out, to):
    """Each row's numbers as pairs of neighbours; zero is the last one's, if it has none."""
    for row in range(n_rows):
        start, end = at + row * n, to + row * pairs_of(n)
        for c in range(0, n, 2 * WIDTH):
            left = n - c
            first, second = load(x, start + c, left, ZERO), load(x, start + c + WIDTH, left - WIDTH, ZERO)
            store(out, end + c // 2, pairs_of(left), halves(first, second))


@loop
def _pair_rows(x, at, n_rows, n, out, to):
    """Each two rows as one of pairs; zeros are the last one's, if it has none."""
    for row in range(0, n_rows, 2):
        start, end, other = at + row * n, to + row // 2 * n, row + 1 < n_rows
        for c in range(0, n, WIDTH):
            left = n - c
            second = load(x, start + n + c, left if other else 0, ZERO)
            store(out, end + c, left, pairs(load(x, start + c, left, ZERO), second))


@loop
def _by_packed(
    m, place, n_in, n_out, first_in, n_terms, first_out, n_lanes, replica, shared, own, x, at, n_rows, out, to, add
):  # fmt: skip
    """out (+)= x M for rows of x of n_terms and rows of out of n_lanes numbers.

    M is a part, from (first_in, first_out) on, of the replica's n_in by n_out matrix, or of the one that serves all,
    which begin at `place`. Both firsts are multiples of sixteen.
    """
    matrices, height, begin = own if m.moves else shared, n_in, first_in
    if m.half:
        height, begin = pairs_of(n_in), first_in // 2
    of = place + (replica * height * padded(n_out) if m.each else 0) + height * first_out + begin * WIDTH
    if m.half:
        _halve(x, at, n_rows, n_terms, out, m.spare)
        n_pairs = pairs_of(n_terms)
        product_of_pairs(
            out, to, n_lanes, add, out, m.spare, n_pairs, 1, matrices, of, WIDTH, WIDTH * height, n_pairs, n_rows,
            n_lanes,
        )  # fmt: skip
    else:
        product(
            out, to, n_lanes, add, x, at, n_terms, 1, matrices, of, WIDTH, WIDTH * height, n_terms, n_rows, n_lanes
        )  # fmt: skip


@loop
def weigh_some(m, first, n, replica, shared, own, x, at, n_rows, out, to, add):
    """out (+)= n columns of x W, from `first` on, a multiple of sixteen."""
    _by_packed(m, m.weight, m.n_in, m.n_out, 0, m.n_in, first, n, replica, shared, own, x, at, n_rows, out, to, add)


@loop
def weigh(m, replica, shared, own, x, at, n_rows, out, to, add):
    """out (+)= x W for n_rows rows."""
    weigh_some(m, 0, m.n_out, replica, shared, own, x, at, n_rows, out, to, add)


@loop
def linear(m, replica, shared, own, x, at, n_rows, out, to, add):
    """out (+)= x W + b for n_rows rows."""
    if m.n_bias > 0:
        biases, start = bias_of(m, replica, shared, own)
        for row in range(n_rows):
            row_plus(biases, start + row % m.n_bias * m.n_out, add, out, to + row * m.n_out, m.n_out)
    weigh(m, replica, shared, own, x, at, n_rows, out, to, add or m.n_bias > 0)


@loop
def bias_of(m, replica, shared, own):
    """(array, where in it the replica's b begins)."""
    return own if m.moves else shared, m.bias + (replica * m.n_bias * m.n_out if m.each else 0)


@loop
def linear_back_some(m, first, n, replica, shared, own, dout, at, n_rows, dx, to, add):
    """dx (+)= dout W^T of n columns of dout, those of W from `first` on."""
    _by_packed(m, m.turned, m.n_out, m.n_in, first, n, 0, m.n_in, replica, shared, own, dout, at, n_rows, dx, to, add)


@loop
def linear_back(m, replica, shared, own, dout, at, n_rows, dx, to, add):
    """dx (+)= dout W^T."""
    linear_back_some(m, 0, m.n_out, replica, shared, own, dout, at, n_rows, dx, to, add)


@loop
def weight_gradient_some(m, first, n, replica, x, at, dout, of, n_rows, gradients):
    """Add x^T dout to n columns of the gradient of W from `first` on, if it is wanted."""
    if m.dweight < 0:
        return
    to = m.dweight + replica * m.n_in * m.n_out + first
    if m.half:
        n_terms = pairs_of(n_rows)
        behind = m.spare + n_terms * m.n_in
        _pair_rows(x, at, n_rows, m.n_in, dout, m.spare)
        _pair_rows(dout, of, n_rows, n, dout, behind)
        product_of_pairs(
            gradients, to, m.n_out, True, dout, m.spare, 1, m.n_in, dout, behind, n, WIDTH, n_terms, m.n_in, n
        )  # fmt: skip
    else:
        product(gradients, to, m.n_out, True, x, at, 1, m.n_in, dout, of, n, WIDTH, n_rows, m.n_in, n)


@loop
def clear_gradient(m, replica, gradients):
    """Zeros where the gradients of the replica's W and b are added, while they are about to be."""
    n_weight, n_bias = m.n_in * m.n_out, m.n_bias * m.n_out
    if m.dweight >= 0:
        clear(gradients, m.dweight + replica * n_weight, n_weight)
    if m.dbias >= 0:
        clear(gradients, m.dbias + replica * n_bias, n_bias)


@loop
def linear_gradient(m, replica, x, at, dout, of, n_rows, gradients):
    """Add x^T dout and the sums of dout to where the gradients of W and b are wanted."""
    weight_gradient_some(m, 0, m.n_out, replica, x, at, dout, of, n_rows, gradients)
    if m.dbias >= 0:
        to = m.dbias + replica * m.n_bias * m.n_out
        for row in range(n_rows):
            row_plus(dout, of + row * m.n_out, True, gradients, to + row % m.n_bias * m.n_out, m.n_out)
