"""What reads heads through their rank, W_O W, and its gradient, as loops that numba compiles."""

from mechgrok.replicas.linear import linear_back, pairs_of, weigh
from mechgrok.replicas.packing import lay_out
from mechgrok.replicas.products import loop, padded, row_plus


@loop
def compose(p, m, out, reads, replica, shared, own, room):
    """The replica's m = W_O W, laid out in `own` as all its weights are; out: W_O, reads: W."""
    n_in, n_out = m.n_in, reads.n_out
    weigh(reads, replica, shared, own, own, out.plain + replica * n_in * out.n_out, n_in, room, p.made, False)
    made, square = room[p.made : p.made + n_in * n_out], room[p.square :]
    at = m.weight + replica * (pairs_of(n_in) if m.half else n_in) * padded(n_out)
    lay_out(made, 1, 0, n_in, n_out, False, m.half, square, own[at:])
    at = m.turned + replica * (pairs_of(n_out) if m.half else n_out) * padded(n_in)
    lay_out(made, 1, 0, n_in, n_out, True, m.half, square, own[at:])


@loop
def compose_back(p, m, out, reads, replica, shared, own, room, gradients):
    """Add to the gradient by W_O what comes by m."""
    at, n_write = m.dweight + replica * m.n_in * m.n_out, m.n_in * out.n_out
    linear_back(reads, replica, shared, own, gradients, at, m.n_in, room, p.write, False)
    row_plus(room, p.write, True, gradients, out.dweight + replica * n_write, n_write)
