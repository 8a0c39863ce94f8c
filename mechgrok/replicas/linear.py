"""Linear maps and their gradients, a few rows at a time, as loops that numba compiles.

All arrays are flat. A record, `MATRIX`, says where in them a map's numbers are and how many.
"""

import numpy as np

from mechgrok.loops.lanes import WIDTH, load, one_of, plus, spread, store, times
from mechgrok.replicas.pairs import (
    PANEL,
    pair_rows,
    pair_terms,
    pairs_of,
    place_of_row,
    row_of_pairs,
    rows_laid_out,
    rows_of_pairs,
)
from mechgrok.replicas.products import ZERO, clear, loop, padded, product, product_of_pairs, row_plus

# x -> x W + b. weight: where W begins, as `packing` lays it out; turned: where W^T does; bias: where the rows of b do,
# n_bias of them, used in turn; plain: where W does row by row, if it does; all in the array `own` if it moves, else in
# `shared`. each: one after another for each replica; otherwise one serves all.
# dweight, dbias: where their gradients go, one replica's after another; or -1.
# half: products are of int16s, and W lies there in pairs of its terms; b is as ever. spare: where in the array of what
# comes out, or of its gradient, there is room for such pairs.
MATRIX = np.dtype(
    [
        (name, np.int64)
        for name in ("weight", "turned", "bias", "plain", "n_in", "n_out", "n_bias", "dweight", "dbias", "spare")
    ]
    + [("moves", np.bool_), ("each", np.bool_), ("half", np.bool_)],
    align=True,
)


@loop
def ready(m, x, at, n_rows, n, out, to):
    """Where n_rows rows of n numbers are as products with m take them, made from `to` on if need be."""
    if not m.half:
        return at
    pair_terms(x, at, n_rows, n, out, to)
    return to


@loop
def _by_packed(
    m, place, n_in, n_out, first_in, n_terms, first_out, n_lanes, replica, shared, own, x, at, n_rows, out, to, add,
    since,
):  # fmt: skip
    """out = x M for `ready` rows of x of n_terms and rows of out of n_lanes numbers; `add`, `since`: see `product`.

    M is a part, from (first_in, first_out) on, of the replica's n_in by n_out matrix, or of the one that serves all,
    which begin at `place`. first_out is a multiple of sixteen, and so is first_in; of `PANEL`, if M is of pairs.
    """
    matrices = own if m.moves else shared
    height = rows_laid_out(n_in, m.half)
    of = place + (replica * height * padded(n_out) if m.each else 0) + height * first_out
    if not m.half:
        of += first_in * WIDTH
        product(
            out, to, n_lanes, add, since, x, at, n_terms, 1, matrices, of, WIDTH, WIDTH * height, n_terms, n_rows,
            n_lanes,
        )  # fmt: skip
        return
    for begin in range(0, n_terms, PANEL):
        panel, n_pairs = of + rows_of_pairs(first_in + begin) * WIDTH, pairs_of(min(PANEL, n_terms - begin))
        product_of_pairs(
            out, to, n_lanes, add or begin > 0, since if begin == 0 else 0, x, at + rows_of_pairs(begin),
            row_of_pairs(n_terms), 1, matrices, panel, WIDTH, WIDTH * height, n_pairs, n_rows, n_lanes,
        )  # fmt: skip


@loop
def weigh_ready(m, first, n, replica, shared, own, x, at, row, n_rows, out, to, add, since):
    """`weigh_some` of n_rows rows from `row` on of those that are `ready` at `at`; `add`, `since`: see `product`."""
    here = at + row * (row_of_pairs(m.n_in) if m.half else m.n_in)
    _by_packed(
        m, m.weight, m.n_in, m.n_out, 0, m.n_in, first, n, replica, shared, own, x, here, n_rows, out, to, add, since
    )


@loop
def weigh_some(m, first, n, replica, shared, own, x, at, n_rows, out, to, add):
    """out (+)= n columns of x W, from `first` on, a multiple of sixteen."""
    if m.half:
        pair_terms(x, at, n_rows, m.n_in, out, m.spare)
        weigh_ready(m, first, n, replica, shared, own, out, m.spare, 0, n_rows, out, to, add, 0)
    else:
        weigh_ready(m, first, n, replica, shared, own, x, at, 0, n_rows, out, to, add, 0)


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
def back_by_ready(m, first, n, replica, shared, own, dout, at, n_rows, dx, to, add):
    """dx (+)= dout W^T of n columns of dout, those of W from `first` on, of rows that are `ready` at `at`."""
    _by_packed(
        m, m.turned, m.n_out, m.n_in, first, n, 0, m.n_in, replica, shared, own, dout, at, n_rows, dx, to, add, 0
    )


@loop
def add_column(m, column, by, factor, replica, shared, own, out, to):
    """out = factor (out + by times a column of W, as its transpose has it)."""
    height = rows_laid_out(m.n_out, m.half)
    matrices, of = own if m.moves else shared, m.turned + (replica * height * padded(m.n_in) if m.each else 0)
    before, second, scales = place_of_row(m.n_out, column) if m.half else (column * WIDTH, False, 0)
    by, factor = spread(by), spread(factor)
    for lane in range(0, m.n_in, WIDTH):
        strip, left = of + lane * height, min(WIDTH, m.n_in - lane)
        y = load(matrices, strip + before, left, ZERO)
        if m.half:
            y = times(one_of(y, second), load(matrices, strip + scales, left, ZERO))
        store(out, to + lane, left, times(plus(load(out, to + lane, left, ZERO), times(y, by)), factor))


@loop
def linear_back(m, replica, shared, own, dout, at, n_rows, dx, to, add):
    """dx (+)= dout W^T."""
    if m.half:
        pair_terms(dout, at, n_rows, m.n_out, dx, m.spare)
        back_by_ready(m, 0, m.n_out, replica, shared, own, dx, m.spare, n_rows, dx, to, add)
    else:
        back_by_ready(m, 0, m.n_out, replica, shared, own, dout, at, n_rows, dx, to, add)


@loop
def products_of_columns(out, to, out_row, half, x, at, n_in, y, of, n, n_rows):
    """out += x^T y for n_rows rows of n_in and of n numbers; half: both as `pair_rows` makes them."""
    if not half:
        product(out, to, out_row, True, 0, x, at, 1, n_in, y, of, n, WIDTH, n_rows, n_in, n)
        return
    for row in range(0, n_rows, PANEL):
        begin, n_pairs = rows_of_pairs(row), pairs_of(min(PANEL, n_rows - row))
        product_of_pairs(
            out, to, out_row, True, 0, x, at + begin * n_in, 1, n_in, y, of + begin * n, n, WIDTH, n_pairs, n_in, n
        )


@loop
def weight_gradient(m, replica, x, at, dout, of, n_rows, gradients):
    """Add x^T dout to the gradient of W, if it is wanted."""
    if m.dweight < 0:
        return
    to, here, there = m.dweight + replica * m.n_in * m.n_out, m.spare, m.spare + rows_of_pairs(n_rows) * m.n_in
    if m.half:
        pair_rows(x, at, n_rows, m.n_in, dout, here)
        pair_rows(dout, of, n_rows, m.n_out, dout, there)
        products_of_columns(gradients, to, m.n_out, True, dout, here, m.n_in, dout, there, m.n_out, n_rows)
    else:
        products_of_columns(gradients, to, m.n_out, False, x, at, m.n_in, dout, of, m.n_out, n_rows)


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
    weight_gradient(m, replica, x, at, dout, of, n_rows, gradients)
    if m.dbias >= 0:
        to = m.dbias + replica * m.n_bias * m.n_out
        for row in range(n_rows):
            row_plus(dout, of + row * m.n_out, True, gradients, to + row % m.n_bias * m.n_out, m.n_out)
