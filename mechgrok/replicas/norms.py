"""Norms of rows and their gradients, as loops that numba compiles. All arrays are flat."""

import numpy as np

from mechgrok.loops.lanes import WIDTH, added, load, minus, number, plus, spread, store, times
from mechgrok.replicas.products import ONE, ZERO, loop, row_plus

TOGETHER = 32  # rows that go through each step before the next one

# x -> (x - mean x if centred) / sqrt(mean square + eps) if scaled; neither: x itself.
NORM = np.dtype([("eps", np.float32), ("centred", np.bool_), ("scaled", np.bool_)], align=True)


@loop
def normalize(norm, x, at, n_rows, n, hat, to, inverse):
    """hat, from `to` on: the normalized rows of x; after them, from `inverse` on, 1 / root mean square of each."""
    for begin in range(0, n_rows, TOGETHER):  # so that no row waits for its sums
        group = range(begin, min(begin + TOGETHER, n_rows))
        for row in group:
            total = spread(ZERO)
            if norm.centred:
                for c in range(0, n, WIDTH):
                    total = plus(total, load(x, at + row * n + c, min(WIDTH, n - c), ZERO))
            hat[inverse + row] = added(total) / number(n)
        for row in group:
            mean, squares = spread(hat[inverse + row]), spread(ZERO)
            for c in range(0, n, WIDTH):
                left = min(WIDTH, n - c)
                y = minus(load(x, at + row * n + c, left, hat[inverse + row]), mean)
                squares = plus(squares, times(y, y))
                store(hat, to + row * n + c, left, y)
            hat[inverse + row] = ONE / np.sqrt(added(squares) / number(n) + norm.eps) if norm.scaled else ONE
        if norm.scaled:
            for row in group:
                by = spread(hat[inverse + row])
                for c in range(0, n, WIDTH):
                    left, here = min(WIDTH, n - c), to + row * n + c
                    store(hat, here, left, times(load(hat, here, left, ZERO), by))


@loop
def inverse_rms(norm, x, at, n):
    """1 / root mean square of n numbers that are centred if the norm centres; 1 if it does not scale."""
    if not norm.scaled:
        return ONE
    total = spread(ZERO)
    for c in range(0, n, WIDTH):
        y = load(x, at + c, min(WIDTH, n - c), ZERO)
        total = plus(total, times(y, y))
    return ONE / np.sqrt(added(total) / number(n) + norm.eps)


@loop
def normalize_back(norm, dhat, at, n_rows, n, hat, of, inverse, dx, to):
    """dx += inverse (dhat - mean dhat if centred - hat mean (dhat hat)) if scaled, else dhat."""
    for row in range(n_rows):
        start, here, end = at + row * n, of + row * n, to + row * n
        if not norm.scaled:
            row_plus(dhat, start, True, dx, end, n)
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


@loop
def scale_back(dscale, scale, x, at, n, add, dx, to):
    """dx (+)= the gradient by a row of n numbers that comes by its scale (|x|^2 / n + eps)^(-1/2)."""
    by = spread(-dscale * scale * scale * scale / number(n))
    for c in range(0, n, WIDTH):
        left = min(WIDTH, n - c)
        y = times(load(x, at + c, left, ZERO), by)
        store(dx, to + c, left, plus(load(dx, to + c, left, ZERO), y) if add else y)
