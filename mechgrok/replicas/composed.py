"""What reads heads through their rank, W_O W, and its gradient, as loops that numba compiles.

It is made for one chain's members after the other's, in the same places: the fewer these are, the nearer they stay.
"""

from mechgrok.replicas.linear import linear_back, weigh
from mechgrok.replicas.packing import lay_out
from mechgrok.replicas.pairs import rows_laid_out
from mechgrok.replicas.products import copy, loop, padded, row_plus


@loop
def compose(p, m, out, reads, replica, shared, own, room):
    """The replica's m = W_O W, laid out in `own` as all its weights are; out: W_O, reads: W."""
    n_in, n_out, square, member = m.n_in, reads.n_out, room[p.square :], replica // p.n_chains
    weigh(reads, replica, shared, own, own, out.plain + replica * n_in * out.n_out, n_in, room, p.made, False)
    made = room[p.made :]
    at = m.weight + member * rows_laid_out(n_in, m.half) * padded(n_out)
    lay_out(made, 1, 0, n_in, n_out, False, m.half, square, own[at:])
    _lay_out_turned(m, member, made, square, own)


@loop
def compose_both(p, out, replica, shared, own, room):
    """The same of p.own_read, turned alone, and of p.both: it and, above it, what takes away the head as it was before.
    So one product reads both, which is longer and takes less time than two.
    """
    m, n_out, square, member = p.own_read, p.reads.n_out, room[p.square :], replica // p.n_chains
    size = m.n_in * n_out
    copy(shared, p.before_read.plain + member * size, size, room, p.made)
    start = out.plain + replica * m.n_in * out.n_out
    weigh(p.reads, replica, shared, own, own, start, m.n_in, room, p.made + size, False)
    at = p.both.weight + member * rows_laid_out(2 * m.n_in, m.half) * padded(n_out)
    lay_out(room[p.made :], 1, 0, 2 * m.n_in, n_out, False, m.half, square, own[at:])
    _lay_out_turned(m, member, room[p.made + size :], square, own)


@loop
def _lay_out_turned(m, member, made, square, own):
    at = m.turned + member * rows_laid_out(m.n_out, m.half) * padded(m.n_in)
    lay_out(made, 1, 0, m.n_in, m.n_out, True, m.half, square, own[at:])


@loop
def side_by_side(p, own_z, n_rows, room):
    """The rows that p.both reads: z of the head as it was before, and then the replica's own."""
    d_head = p.own_read.n_in
    for row in range(n_rows):
        to = p.zs + 2 * row * d_head
        copy(room, p.former + row * d_head, d_head, room, to)
        copy(room, own_z + row * d_head, d_head, room, to + d_head)


@loop
def compose_back(p, m, out, reads, replica, shared, own, room, gradients):
    """Add to the gradient by W_O what comes by m."""
    at, n_write = m.dweight + replica // p.n_chains * m.n_in * m.n_out, m.n_in * out.n_out
    linear_back(reads, replica, shared, own, gradients, at, m.n_in, room, p.write, False)
    row_plus(room, p.write, True, gradients, out.dweight + replica * n_write, n_write)
