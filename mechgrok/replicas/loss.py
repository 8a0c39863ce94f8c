"""The loss of a network's logits, and its gradients, some classes at a time, as loops that numba compiles.

The logits of thousands of classes would not stay in a core's own cache. So those of few rows and classes are made, and
turned into exponentials while they are in the first cache, relative to one logit of the row, as a softmax may be; only
rows where another is so much larger that its exponential is no float32 are done anew, relative to the largest. Once the
sums over all classes are known, the gradient by a logit is its exponential times a number of the row, so where the rows
that the logits came from are shorter, these are multiplied by it. Few classes are all there at once, and so are their
sums: then exponentials become gradients in place. The order of loops is ours.
"""

from numba import njit

from mechgrok.loops.kept import OPTIONS
from mechgrok.loops.lanes import (
    WIDTH,
    added,
    exp,
    first,
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
from mechgrok.replicas.composed import side_by_side
from mechgrok.replicas.linear import (
    add_column,
    back_by_ready,
    bias_of,
    products_of_columns,
    ready,
    weigh_ready,
    weigh_some,
)
from mechgrok.replicas.norms import inverse_rms, normalize, normalize_back, scale_back
from mechgrok.replicas.pairs import pair_rows, row_of_pairs, rows_of_pairs, turn_pairs
from mechgrok.replicas.products import LOWEST, ONE, ZERO, clear, copy, loop, padded

IN_FIRST_CACHE = 8192  # logits that stay there until their exponentials are made and multiplied
LARGEST_SUM = number(1e16)  # of exponentials, whose squares are numbers still; a row that has more is done anew


@loop
def shared_logits(p, shared, own, n_rows, room):
    """What all heads of a chain share of their logits, as `loss` takes it: some classes of all rows after others."""
    for begin in range(0, p.n_classes, p.classes):
        n = min(p.classes, p.n_classes - begin)
        weigh_some(p.readout, begin, n, 0, shared, own, room, p.still, n_rows, room, p.base + begin * n_rows, False)


@loop
def take_logits(p, row, n_rows, kept, of, room):
    """The same of one of n_rows rows, from where it was kept."""
    for begin in range(0, p.n_classes, p.classes):
        n = min(p.classes, p.n_classes - begin)
        copy(kept, of + begin, n, room, p.base + begin * n_rows + row * n)


@loop
def take_shared_logits(p, n_examples, index, at, kept, room):
    """The same of all rows of these examples."""
    n_rows, width = n_examples * p.n_scored, padded(p.n_classes)
    for row in range(n_rows):
        example = index[at + row // p.n_scored]
        take_logits(p, row, n_rows, kept, (example * p.n_scored + row % p.n_scored) * width, room)


@loop
def _logits(p, low, direct, x, head, replica, row, n_rows, begin, n, base, shared, own, room, to):
    """x of n classes from `begin` on and of n_rows rows from `row` on; base: of all rows, what `low` and `direct` heads
    add theirs to. x, head: where what p.both or p.readout reads, and p.own_logits, is `ready`.
    """
    since = base + row * n - to
    if low:
        weigh_ready(p.both, begin, n, replica, shared, own, room, x, row, n_rows, room, to, True, since)
        return
    if direct:
        weigh_ready(p.own_logits, begin, n, replica, shared, own, room, head, row, n_rows, room, to, True, since)
    weigh_ready(p.readout, begin, n, replica, shared, own, room, x, row, n_rows, room, to, direct, 0)


@loop
def _raise_origins(p, row, n_rows, n, room, here, biases, bias, anew):
    """Each row's origin: the largest of the first sixteen of n logits y = scale x + bias, or, if not `anew`, of all of
    them and the origin so far.
    """
    for r in range(row, row + n_rows):
        top, by = spread(LOWEST if anew else room[p.origin + r]), spread(room[p.scale + r])
        for c in range(0, min(WIDTH, n) if anew else n, WIDTH):
            left, place = min(WIDTH, n - c), here + (r - row) * n + c
            y = plus(times(load(room, place, left, LOWEST), by), load(biases, bias + c, left, ZERO))
            top = larger(top, y)
        room[p.origin + r] = largest(top)


@njit(**OPTIONS)
def _some(p, row, c, n, target, by, origin, biases, bias, room, place, sums, along):
    """A row's n <= 16 exponentials from class c on, as `_exponentials` makes them; and the sums with them."""
    moved = minus(times(load(room, place + c, n, ZERO), by), origin)
    away = plus(moved, load(biases, bias + c, n, ZERO))
    each = first(exp(away), n)
    if c <= target < c + WIDTH:
        store(room, p.spot, WIDTH, away)
        room[p.target + row] = room[p.spot + target - c]
        each = put(each, target - c, ZERO)
    store(room, place + c, n, each)
    return plus(sums, each), plus(along, times(each, moved))


@loop
def _exponentials(p, row, n_rows, begin, n, room, here, biases, bias, targets, at):
    """x of n classes from `begin` on -> exp(y - origin), y = scale x + bias, and 0 for the row's target, whose distance
    is noted; and sums over these: of the exponentials, and of them times their logit's distance but for the bias.
    """
    for r in range(row, row + n_rows):
        place, target = here + (r - row) * n, targets[at + r] - begin
        by, origin = spread(room[p.scale + r]), spread(room[p.origin + r])
        rest, inner = p.rest + r * WIDTH, p.inner + r * WIDTH
        sums, along = load(room, rest, WIDTH, ZERO), load(room, inner, WIDTH, ZERO)
        for c in range(0, n // WIDTH * WIDTH, WIDTH):
            sums, along = _some(p, r, c, WIDTH, target, by, origin, biases, bias, room, place, sums, along)
        if n % WIDTH:
            c = n // WIDTH * WIDTH
            sums, along = _some(p, r, c, n % WIDTH, target, by, origin, biases, bias, room, place, sums, along)
        store(room, rest, WIDTH, sums)
        store(room, inner, WIDTH, along)


@loop
def _sum_up(
    p, low, direct, x, head, keep, replica, n_rows, at, shared, own, targets, weights, biases, bias, room, known
):  # fmt: skip
    """The exponentials of all logits, relative to each row's origin, which is found first if it is not known; while
    they are in the first cache the rows that logits came from get theirs times W^T. keep: all of the exponentials too.
    """
    m, dx = (p.own_read, p.dz) if low else (p.readout, p.wide if direct else p.narrow)
    clear(room, p.rest, n_rows * WIDTH)
    clear(room, p.inner, n_rows * WIDTH)
    for begin in range(0, p.n_classes, p.classes):
        n, base = min(p.classes, p.n_classes - begin), p.base + begin * n_rows
        for row in range(0, n_rows, p.together):
            some, to, end = min(p.together, n_rows - row), p.logits, p.exponentials
            if keep and p.readout.half:
                end += row_of_pairs(p.classes) * (begin // p.classes) * n_rows + row * row_of_pairs(n)
            elif keep:
                to = p.exponentials + begin * n_rows + row * n
            _logits(p, low, direct, x, head, replica, row, some, begin, n, base, shared, own, room, to)
            if not known and begin == 0:
                _raise_origins(p, row, some, n, room, to, biases, bias, True)
            _exponentials(p, row, some, begin, n, room, to, biases, bias + begin, targets, at)
            if p.backward:
                if p.n_classes <= p.classes:
                    _add_up(p, row, some, room)
                    _settle(p, row, some, targets, weights, at, biases, bias, room)
                    _into_gradients(p, row, some, room, to, targets, at)
                each, here, more = ready(m, room, to, some, n, room, end), dx + row * m.n_in, begin > 0
                back_by_ready(m, begin, n, replica, shared, own, room, each, some, room, here, more)
                if direct:
                    here = p.narrow + row * p.own_logits.n_in
                    back_by_ready(p.own_logits, begin, n, replica, shared, own, room, each, some, room, here, more)
    if not p.backward or p.n_classes > p.classes:
        _add_up(p, 0, n_rows, room)


@loop
def _add_up(p, row, n_rows, room):
    """The sums of n_rows rows from `row` on, from those of each lane."""
    for r in range(row, row + n_rows):
        room[p.others + r] = added(load(room, p.rest + r * WIDTH, WIDTH, ZERO))
        room[p.along + r] = added(load(room, p.inner + r * WIDTH, WIDTH, ZERO))


@loop
def _into_gradients(p, row, n_rows, room, here, targets, at):
    """All exponentials of n_rows rows from `row` on -> the gradients by x: they sum to zero with the target's own."""
    for r in range(row, row + n_rows):
        place, factor = here + (r - row) * p.n_classes, room[p.factor + r]
        by = spread(factor)
        for c in range(0, p.n_classes, WIDTH):
            left = min(WIDTH, p.n_classes - c)
            store(room, place + c, left, times(load(room, place + c, left, ZERO), by))
        room[place + targets[at + r]] = -room[p.others + r] * factor
        room[p.factor + r] = ONE


@loop
def _largest_sum(p, n_rows, room):
    """Of the rows; 0 if it is NaN."""
    most = ZERO
    for row in range(n_rows):
        if room[p.others + row] > most:
            most = room[p.others + row]
    return most


@loop
def loss(
    p, low, direct, own_z, active, replica, n_rows, at, to, shared, own, targets,
    weights, room, others, away, gradients
):  # fmt: skip
    """From the residual stream in the room after all layers: the losses, and the gradient by it in its place.

    Args:
        replica: as which one it has weights of its own: its member, where those are W_O W.
        low: whether the logits see the head through its rank: base W_U + [z, own_z] p.both, the first term
            being what `shared_logits` made, and the norm's scale apart.
        direct: whether they are what was kept + own_z p.own_logits + neurons, from `active` on, p.readout. Then what is
            left are gradients: by the neurons, in the wide room, and by own_z, in the narrow one.
        others, away: [replica, row]; receive the sum over all classes but the target of exp(y - origin), and
            y - origin of the target, for one number of each row.
    """
    d = p.d_model
    if not low and not direct:
        normalize(p.final_norm, room, p.resid, n_rows, d, room, p.hat, p.inverse)
    for row in range(n_rows):
        room[p.scale + row] = inverse_rms(p.final_norm, room, p.resid + row * d, d) if low else ONE
    biases, bias = bias_of(p.readout, replica, shared, own)
    if low:
        side_by_side(p, own_z, n_rows, room)
    reads, read = (p.both, p.zs) if low else (p.readout, active if direct else p.hat)
    m, dx = (p.own_read, p.dz) if low else (p.readout, p.wide if direct else p.narrow)
    moved, by = (p.own_logits, own_z) if direct else (m, own_z if low else p.hat)  # of what a gradient may be wanted
    keep = moved.dweight >= 0 or p.readout.dbias >= 0
    x, head = ready(reads, room, read, n_rows, reads.n_in, room, p.ready), own_z
    if direct:
        head = ready(p.own_logits, room, own_z, n_rows, p.own_logits.n_in, room, p.ready_head)
    _sum_up(
        p, low, direct, x, head, keep, replica, n_rows, at, shared, own, targets, weights, biases, bias, room, False
    )
    if _largest_sum(p, n_rows, room) > LARGEST_SUM:
        for begin in range(0, p.n_classes, p.classes):
            n, base = min(p.classes, p.n_classes - begin), p.base + begin * n_rows
            for row in range(0, n_rows, p.together):
                some = min(p.together, n_rows - row)
                _logits(p, low, direct, x, head, replica, row, some, begin, n, base, shared, own, room, p.logits)
                _raise_origins(p, row, some, n, room, p.logits, biases, bias + begin, False)
        _sum_up(
            p, low, direct, x, head, keep, replica, n_rows, at, shared, own, targets, weights, biases, bias, room, True
        )
    copy(room, p.others, n_rows, others, to)
    copy(room, p.target, n_rows, away, to)
    if not p.backward:
        return
    if p.n_classes > p.classes:
        _settle(p, 0, n_rows, targets, weights, at, biases, bias, room)
        _end_back(p, m, replica, n_rows, targets, at, shared, own, room, dx)
        if direct:
            _end_back(p, p.own_logits, replica, n_rows, targets, at, shared, own, room, p.narrow)
    if keep:
        _gradients(p, moved, replica, by, n_rows, targets, at, room, gradients)
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
def _end_back(p, m, replica, n_rows, targets, at, shared, own, room, dx):
    """The exponentials' sums with W^T -> the gradient by what m reads: the target's own, and each row's factor."""
    for row in range(n_rows):
        others, factor, to = room[p.others + row], room[p.factor + row], dx + row * m.n_in
        add_column(m, targets[at + row], -others, factor, replica, shared, own, room, to)


@loop
def _gradients(p, m, replica, x, n_rows, targets, at, room, gradients):
    """Those of m, which reads x, and of the readout's bias from the exponentials, if they are wanted."""
    half, by, ones, settled = p.readout.half, x, p.factor, p.n_classes <= p.classes
    to, db = m.dweight + replica * m.n_in * m.n_out, p.readout.dbias + replica * p.n_classes
    if m.dweight >= 0 and not settled:
        by = p.scaled
        _rows_times(room, x, n_rows, m.n_in, p.factor, room, by)
    if half:
        scaled, by, ones = by, p.ready, p.ready + rows_of_pairs(n_rows) * m.n_in
        pair_rows(room, scaled, n_rows, m.n_in, room, by)
        pair_rows(room, p.factor, n_rows, 1, room, ones)
    for begin in range(0, p.n_classes, p.classes):
        n = min(p.classes, p.n_classes - begin)
        of = p.exponentials + (begin // p.classes * row_of_pairs(p.classes) if half else begin) * n_rows
        if half:
            turn_pairs(room, of, n_rows, n, room, m.spare)
            of = m.spare
        if m.dweight >= 0:
            products_of_columns(gradients, to + begin, m.n_out, half, room, by, m.n_in, room, of, n, n_rows)
        if p.readout.dbias >= 0:
            products_of_columns(gradients, db + begin, n, half, room, ones, 1, room, of, n, n_rows)
        for row in range(0 if settled else n_rows):  # the targets' own, whose sum with all others is zero
            target = targets[at + row]
            if begin <= target < begin + n:
                if m.dweight >= 0:
                    for i in range(m.n_in):
                        gradients[to + i * m.n_out + target] -= room[p.others + row] * room[p.scaled + row * m.n_in + i]
                if p.readout.dbias >= 0:
                    gradients[db + target] -= room[p.others + row] * room[p.factor + row]


@loop
def _settle(p, first_row, n_rows, targets, weights, at, biases, bias, room):
    """The sums are known: the derivative by each row's scale, and by what its exponentials are to be multiplied. The
    target's own is less than zero, what they sum to: together with the factor that is weight (p - 1). Sixteen rows at a
    time.
    """
    end = first_row + n_rows
    for row in range(first_row, end):
        room[p.factor + row] = biases[bias + targets[at + row]]
    for row in range(first_row, end, WIDTH):
        left = min(WIDTH, end - row)
        total, away = load(room, p.others + row, left, ONE), load(room, p.target + row, left, ZERO)
        scale, weight = load(room, p.scale + row, left, ONE), load(weights, at + row, left, ZERO)
        share = over(weight, plus(total, exp(away)))
        # The gradient by the logits sums to zero, so the distance to any one number serves.
        moved = minus(away, load(room, p.factor + row, left, ZERO))
        along = minus(load(room, p.along + row, left, ZERO), times(total, moved))
        store(room, p.along + row, left, over(times(along, share), scale))
        store(room, p.factor + row, left, times(share, scale))


@loop
def _rows_times(x, at, n_rows, n, by, out, to):
    """out = each row of n numbers times its own of the numbers from `by` on."""
    for row in range(n_rows):
        factor = spread(x[by + row])
        for c in range(0, n, WIDTH):
            left, here = min(WIDTH, n - c), row * n + c
            store(out, to + here, left, times(load(x, at + here, left, ZERO), factor))
