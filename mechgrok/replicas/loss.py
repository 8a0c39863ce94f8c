"""The loss of a network's logits, and its gradients, some classes at a time, as loops that numba compiles.

The logits of thousands of classes would not stay in a core's own cache. So those of some classes are made, and their
exponentials taken relative to the largest logit so far, as in the online softmax of FlashAttention (Dao et al. 2022).
Once the sums over all classes are known, the gradient by a logit is its exponential times a number of the row and of
these classes; the rows that the logits came from are multiplied by it, which are shorter. The order of loops is ours.
"""

from numba import njit

from mechgrok.loops.kept import OPTIONS
from mechgrok.loops.lanes import (
    LEAST,
    WIDTH,
    added,
    exp,
    lane0,
    larger,
    largest,
    load,
    minus,
    number,
    over,
    plus,
    put,
    spread,
    store,
    times,
)
from mechgrok.replicas.fused import IN_CACHE
from mechgrok.replicas.linear import bias_of, linear_back_some, weigh_some, weight_gradient_some
from mechgrok.replicas.norms import inverse_rms, normalize, normalize_back, scale_back
from mechgrok.replicas.products import LOWEST, ONE, ZERO, clear, copy, loop, product

FARTHEST = number(-60)  # a largest logit farther below that of all classes counts as so far: e^60 is still a float32


@loop
def _power(x):
    return lane0(exp(spread(x)))


@loop
def shared_logits(p, shared, own, resid, start, n_rows, room):
    """What all heads of a chain share of their logits, as `loss` takes it: some classes of all rows after others."""
    for first in range(0, p.n_classes, p.classes):
        n = min(p.classes, p.n_classes - first)
        weigh_some(p.readout, first, n, 0, shared, own, resid, start, n_rows, room, p.base + first * n_rows, False)


@loop
def _exponentials(p, first, n, n_rows, biases, bias, targets, at, room):
    """x of n classes -> exp(y - top), y = scale x + bias, top being the row's largest y so far; and the row's sums."""
    here, tops = p.logits + first * n_rows, p.tops + first // p.classes * n_rows
    at_once = max(1, IN_CACHE // n)  # rows of a group go through each step together: they do not wait for sums
    for start in range(0, n_rows, at_once):
        group = range(start, min(start + at_once, n_rows))
        for row in group:
            by, top = spread(room[p.scale + row]), spread(LOWEST if first == 0 else room[p.top + row])
            for c in range(0, n, WIDTH):
                left, place = min(WIDTH, n - c), here + row * n + c
                y = plus(times(load(room, place, left, LOWEST), by), load(biases, bias + first + c, left, ZERO))
                store(room, place, left, y)
                top = larger(top, y)
            room[tops + row] = largest(top)
        for row in group:
            highest, own = room[tops + row], targets[at + row] - first
            if first == 0:
                room[p.origin + row] = highest
            if 0 <= own < n:
                room[p.target + row] = room[here + row * n + own]
            rest, inner, by, origin = spread(ZERO), spread(ZERO), spread(highest), spread(room[p.origin + row])
            for c in range(0, n, WIDTH):
                left, place = min(WIDTH, n - c), here + row * n + c
                y = load(room, place, left, highest + LEAST)
                away = minus(y, by)
                if own // WIDTH * WIDTH == c:
                    away = put(away, own - c, LEAST)  # as good as nothing: the sums are of the others
                each = exp(away)
                store(room, place, left, each)
                rest = plus(rest, each)
                moved = minus(minus(y, origin), load(biases, bias + first + c, left, ZERO))
                inner = plus(inner, times(each, moved))
            others, along = added(rest), added(inner)
            if first > 0:
                by_now = _power(room[p.top + row] - highest)
                others, along = others + room[p.others + row] * by_now, along + room[p.along + row] * by_now
            room[p.top + row], room[p.others + row], room[p.along + row] = highest, others, along


@loop
def loss(
    p, low, direct, own_z, active, replica, n_rows, z, mine, at, to, shared, own, targets,
    weights, room, others, away, gradients
):  # fmt: skip
    """From the residual stream in the room after all layers: the losses, and the gradient by it in its place.

    Args:
        low: whether the logits see the head through its rank: base W_U + z p.before_read + own_z p.own_read, the first
            term being what `shared_logits` made, and the norm's scale apart.
        direct: whether they are what was kept + own_z p.own_logits + neurons, from `active` on, p.readout. Then what is
            left are gradients: by the neurons, in the wide room, and by own_z, in the narrow one.
        others, away: [replica, row]; receive the sum over all classes but the target of exp(y - top), and y - top of
            the target.
    """
    d = p.d_model
    m, x = (p.own_read, own_z) if low else (p.readout, active if direct else p.hat)
    if not low and not direct:
        normalize(p.final_norm, room, p.resid, n_rows, d, room, p.hat, p.inverse)
    for row in range(n_rows):
        room[p.scale + row] = inverse_rms(p.final_norm, room, p.resid + row * d, d) if low else ONE
    biases, bias = bias_of(p.readout, replica, shared, own)
    for first in range(0, p.n_classes, p.classes):
        n, here = min(p.classes, p.n_classes - first), p.logits + first * n_rows
        if low or direct:
            copy(room, p.base + first * n_rows, n_rows * n, room, here)
        if low:
            weigh_some(p.before_read, first, n, replica // p.n_chains, shared, own, z, mine, n_rows, room, here, True)
        if direct:
            weigh_some(p.own_logits, first, n, replica, shared, own, room, own_z, n_rows, room, here, True)
        weigh_some(m, first, n, replica, shared, own, room, x, n_rows, room, here, low or direct)
        _exponentials(p, first, n, n_rows, biases, bias, targets, at, room)
    for row in range(0, n_rows, WIDTH):
        left = min(WIDTH, n_rows - row)
        store(others, to + row, left, load(room, p.others + row, left, ZERO))
        moved = minus(load(room, p.target + row, left, ZERO), load(room, p.top + row, left, ZERO))
        store(away, to + row, left, moved)
    if not p.backward:
        return
    _settle(p, n_rows, targets, weights, at, biases, bias, room)
    dx = p.dz if low else (p.wide if direct else p.narrow)
    for first in range(0, p.n_classes, p.classes):
        n, here = min(p.classes, p.n_classes - first), p.logits + first * n_rows
        by = p.tops + first // p.classes * n_rows
        through = n <= m.n_in  # whatever is shorter is multiplied
        if through:
            _rows_times(room, here, n_rows, n, by, False, room, here)
            for row in range(n_rows):
                room[by + row] = ONE
        if p.readout.dbias >= 0:
            to = p.readout.dbias + replica * p.n_classes + first
            product(gradients, to, n, True, room, by, 0, 1, room, here, n, WIDTH, n_rows, 1, n)
        _classes_back(p, m, first, n_rows, replica, x, through, shared, own, room, gradients, dx)
        if direct:
            _classes_back(
                p, p.own_logits, first, n_rows, replica, own_z, through, shared, own, room, gradients, p.narrow
            )
    if direct:
        return
    if low:
        for row in range(n_rows):
            dscale = room[p.along + row] if p.final_norm.scaled else ZERO
            scale_back(dscale, room[p.scale + row], room, p.resid + row * d, d, False, room, p.resid + row * d)
        return
    clear(room, p.resid, n_rows * d)
    normalize_back(p.final_norm, room, p.narrow, n_rows, d, room, p.hat, p.inverse, room, p.resid)


@loop
def _settle(p, n_rows, targets, weights, at, biases, bias, room):
    """The sums are known: the derivative by each row's scale; what their exponentials are to be multiplied by; and the
    target's own, which together with it gives weight (p - 1). Sixteen rows at a time.
    """
    for row in range(n_rows):
        target = targets[at + row]
        # The gradient by the logits sums to zero, so the distance to any one number serves.
        room[p.origin + row] = room[p.target + row] - room[p.origin + row] - biases[bias + target]
        room[p.dz + row] = room[p.tops + target // p.classes * n_rows + row]
    for row in range(0, n_rows, WIDTH):
        left = min(WIDTH, n_rows - row)
        total, top = load(room, p.others + row, left, ONE), load(room, p.top + row, left, ZERO)
        scale, weight = load(room, p.scale + row, left, ONE), load(weights, at + row, left, ZERO)
        share = over(weight, plus(total, exp(minus(load(room, p.target + row, left, ZERO), top))))
        along = minus(load(room, p.along + row, left, ZERO), times(total, load(room, p.origin + row, left, ZERO)))
        store(room, p.along + row, left, over(times(along, share), scale))
        store(room, p.dz + row, left, over(minus(spread(ZERO), total), _less(room, p.dz + row, left, top)))
        for first in range(0, p.n_classes, p.classes):
            tops = p.tops + first // p.classes * n_rows + row
            store(room, tops, left, times(times(share, scale), _less(room, tops, left, top)))
    for row in range(n_rows):
        first = targets[at + row] // p.classes * p.classes
        n = min(p.classes, p.n_classes - first)
        room[p.logits + first * n_rows + row * n + targets[at + row] - first] = room[p.dz + row]


@njit(**OPTIONS)
def _less(room, tops, n, top):
    """What the exponentials of some classes, relative to their own largest logit, are larger by."""
    return exp(larger(minus(load(room, tops, n, ZERO), top), spread(FARTHEST)))


@loop
def _classes_back(p, m, first, n_rows, replica, x, through, shared, own, room, gradients, dx):
    """What some classes add to the gradients of m and to dx; through: their own numbers are the gradient by now."""
    n, here, by = min(p.classes, p.n_classes - first), p.logits + first * n_rows, p.tops + first // p.classes * n_rows
    if through:
        linear_back_some(m, first, n, replica, shared, own, room, here, n_rows, room, dx, first > 0)
        weight_gradient_some(m, first, n, replica, room, x, room, here, n_rows, gradients)
        return
    linear_back_some(m, first, n, replica, shared, own, room, here, n_rows, room, p.scaled, False)
    _rows_times(room, p.scaled, n_rows, m.n_in, by, first > 0, room, dx)
    if m.dweight >= 0:
        _rows_times(room, x, n_rows, m.n_in, by, False, room, p.scaled)
        weight_gradient_some(m, first, n, replica, room, p.scaled, room, here, n_rows, gradients)


@loop
def _rows_times(x, at, n_rows, n, by, add, out, to):
    """out (+)= each row of x times its own number, from `by` on."""
    for row in range(n_rows):
        factor = spread(x[by + row])
        for c in range(0, n, WIDTH):
            left, here = min(WIDTH, n - c), to + row * n + c
            y = times(load(x, at + row * n + c, left, ZERO), factor)
            store(out, here, left, plus(load(out, here, left, ZERO), y) if add else y)
