"""Rows that many examples begin with are read once, as loops that numba compiles.

The residual stream before the first layer is a token's, at its position or at any: where tokens are few, most rows of a
batch begin alike. Each distinct one goes through the first layer's norm, if that moves, and to queries, keys and values
once for a replica, and its gradient comes back once.
"""

import numpy as np

from mechgrok.loops.lanes import WIDTH, load, plus, store
from mechgrok.replicas.linear import bias_of, linear_back, weigh, weight_gradient
from mechgrok.replicas.norms import normalize, normalize_back
from mechgrok.replicas.products import ZERO, clear, copy, loop, row_plus

# n: how many distinct rows a chain has, 0 where rows are not told apart; asking: the first of those that ask, where
# only some positions are queries. Where in the room they are, normalized, and what comes back of them; and, for each
# replica of a chain after the other, what is read of them, q of its own, and what comes back of that.
BEGINNINGS = np.dtype(
    [
        (name, np.int64)
        for name in ("n", "asking", "hat", "inverse", "dhat", "dresid", "read", "asked", "dread", "dasked")
    ],
    align=True,
)


@loop
def _of(p, replica, place, n, m):
    """Where the replica's part begins of what lies at `place`: n rows of what m reads."""
    return place + replica // p.n_chains * n * m.n_out


@loop
def read_beginnings(p, layer, replica, shared, own, rows, room):
    """Before a replica's first examples: its distinct rows, normalized and read, but for biases; nothing came back.

    rows: Float[chain or replica, distinct, d_model], normalized already where p.given.
    """
    b, d, at_once = p.beginnings, p.d_model, p.at_once * p.n_pos
    if p.given:
        copy(rows, replica % p.n_chains * b.n * d, b.n * d, room, b.hat)
    else:
        normalize(layer.norm, rows, replica * b.n * d, b.n, d, room, b.hat, b.inverse)
    read, asked = _of(p, replica, b.read, b.n, layer.rest), _of(p, replica, b.asked, b.n, layer.q)
    if p.backward:
        clear(room, _of(p, replica, b.dread, b.n, layer.rest), b.n * layer.rest.n_out)
        clear(room, _of(p, replica, b.dasked, b.n, layer.q), b.n * layer.q.n_out)
        if not p.given:
            clear(room, b.dresid, b.n * d)
    for first in range(0, b.n, at_once):
        n, at = min(at_once, b.n - first), b.hat + first * d
        weigh(layer.rest, replica, shared, own, room, at, n, room, read + first * layer.rest.n_out, False)
    if layer.some:
        for first in range(b.asking, b.n, at_once):
            n, at = min(at_once, b.n - first), b.hat + first * d
            weigh(layer.q, replica, shared, own, room, at, n, room, asked + first * layer.q.n_out, False)


@loop
def _spread(m, replica, n_examples, n_pos, positions, which, at, shared, own, room, read, to):
    """What m reads of the rows at these positions of each example, with its bias."""
    biases, start = bias_of(m, replica, shared, own)
    for example in range(n_examples):
        for i in range(len(positions)):
            of = read + which[at + example * n_pos + positions[i]] * m.n_out
            out = to + (example * len(positions) + i) * m.n_out
            for c in range(0, m.n_out, WIDTH):
                n = min(WIDTH, m.n_out - c)
                y = load(biases, start + i % m.n_bias * m.n_out + c, n, ZERO)
                store(room, out + c, n, plus(load(room, of + c, n, ZERO), y))


@loop
def _gathered(m, replica, n_examples, n_pos, positions, which, at, room, back, dread, gradients):
    """The inverse: the gradient by what m read, from `back` on, added to that by the distinct rows and by the bias."""
    for example in range(n_examples):
        for i in range(len(positions)):
            row = back + (example * len(positions) + i) * m.n_out
            row_plus(room, row, True, room, dread + which[at + example * n_pos + positions[i]] * m.n_out, m.n_out)
            if m.dbias >= 0:
                bias = m.dbias + (replica * m.n_bias + i % m.n_bias) * m.n_out
                row_plus(room, row, True, gradients, bias, m.n_out)


@loop
def begin(p, layer, replica, n_examples, every, queries, which, at, shared, own, resid, room):
    """For some examples what the layer reads of their rows; and in the room the residual stream at the queries, but
    where it is given.
    """
    b, n_pos, d = p.beginnings, p.n_pos, p.d_model
    read = _of(p, replica, b.read, b.n, layer.rest)
    _spread(layer.rest, replica, n_examples, n_pos, every, which, at, shared, own, room, read, layer.rest_at)
    if layer.some:
        asked = _of(p, replica, b.asked, b.n, layer.q)
        _spread(layer.q, replica, n_examples, n_pos, queries, which, at, shared, own, room, asked, layer.q_at)
    if p.given:
        return
    for example in range(n_examples):
        for i in range(len(queries)):
            first = replica * b.n + which[at + example * n_pos + queries[i]]
            copy(resid, first * d, d, room, p.resid + (example * len(queries) + i) * d)


@loop
def hand_back(p, layer, replica, n_examples, every, queries, which, at, room, gradients):
    """From dq, dk, dv in the wide room and the gradient by the residual stream: what comes back of distinct rows."""
    b, n_pos, d = p.beginnings, p.n_pos, p.d_model
    dread = _of(p, replica, b.dread, b.n, layer.rest)
    _gathered(layer.rest, replica, n_examples, n_pos, every, which, at, room, p.wide, dread, gradients)
    if layer.some:
        dq, dasked = p.wide + n_examples * n_pos * layer.rest.n_out, _of(p, replica, b.dasked, b.n, layer.q)
        _gathered(layer.q, replica, n_examples, n_pos, queries, which, at, room, dq, dasked, gradients)
    if p.given:
        return
    for example in range(n_examples):
        for i in range(len(queries)):
            row, first = example * len(queries) + i, which[at + example * n_pos + queries[i]]
            row_plus(room, p.resid + row * d, True, room, b.dresid + first * d, d)


@loop
def _through(p, m, replica, asking, dread, add, shared, own, room, gradients):
    """The gradients by m, and, but where they are given, by the distinct rows from `asking` on."""
    b, d, at_once = p.beginnings, p.d_model, p.at_once * p.n_pos
    for first in range(asking, b.n, at_once):
        n, at = min(at_once, b.n - first), dread + first * m.n_out
        weight_gradient(m, replica, room, b.hat + first * d, room, at, n, gradients)
        if not p.given:
            linear_back(m, replica, shared, own, room, at, n, room, b.dhat + first * d, add)


@loop
def end_beginnings(p, layer, replica, shared, own, room, gradients, dresid):
    """After a replica's last examples: the gradients by what reads the distinct rows, and by these."""
    b, d = p.beginnings, p.d_model
    dread = _of(p, replica, b.dread, b.n, layer.rest)
    _through(p, layer.rest, replica, 0, dread, False, shared, own, room, gradients)
    if layer.some:
        dasked = _of(p, replica, b.dasked, b.n, layer.q)
        _through(p, layer.q, replica, b.asking, dasked, True, shared, own, room, gradients)
    if p.given:
        return
    normalize_back(layer.norm, room, b.dhat, b.n, d, room, b.hat, b.inverse, room, b.dresid)
    copy(room, b.dresid, b.n * d, dresid, replica * b.n * d)
