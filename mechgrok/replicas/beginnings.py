"""Rows that many examples begin with are read once, as loops that numba compiles.

The residual stream before the first layer is a token's, at its position or at any: where tokens are few, most rows of a
batch begin alike. Each distinct one goes through the first layer's norm and its keys and values (and queries, where all
positions are queried) once for a replica, and its gradient comes back once.
"""

import numpy as np

from mechgrok.replicas.linear import bias_of, linear, linear_back, linear_gradient, weigh, weight_gradient_some
from mechgrok.replicas.norms import normalize, normalize_back
from mechgrok.replicas.products import clear, copy, loop, row_plus

# n: how many distinct rows a chain has, 0 where rows are not told apart. Where in the room is what they are, normalized
# and read, and what comes back of each.
BEGINNINGS = np.dtype(
    [(name, np.int64) for name in ("n", "hat", "inverse", "read", "dread", "dhat", "dresid")], align=True
)


@loop
def read_beginnings(p, layer, replica, shared, own, resid, room):
    """Before a chain's examples: its distinct rows, normalized and read, but for the bias; nothing has come back."""
    b, d, n_out, at_once = p.beginnings, p.d_model, layer.rest.n_out, p.at_once * p.n_pos
    normalize(layer.norm, resid, replica * b.n * d, b.n, d, room, b.hat, b.inverse)
    for first in range(0, b.n, at_once):
        n, rows = min(at_once, b.n - first), b.hat + first * d
        weigh(layer.rest, replica, shared, own, room, rows, n, room, b.read + first * n_out, False)
    if p.backward:
        clear(room, b.dread, b.n * n_out)
        clear(room, b.dhat, b.n * d)
        clear(room, b.dresid, b.n * d)


@loop
def _taken(p, n_examples, queries, which, at, x, of, out, to):
    """The distinct row of x that each query of each example begins as, one after another."""
    for example in range(n_examples):
        for i in range(len(queries)):
            row, first = example * len(queries) + i, which[at + example * p.n_pos + queries[i]]
            copy(x, of + first * p.d_model, p.d_model, out, to + row * p.d_model)


@loop
def _added(p, n_examples, queries, which, at, room, x, to):
    """Add the rows of x, one for each query of each example, to those of the distinct rows."""
    for example in range(n_examples):
        for i in range(len(queries)):
            row, first = example * len(queries) + i, which[at + example * p.n_pos + queries[i]]
            row_plus(room, x + row * p.d_model, True, room, to + first * p.d_model, p.d_model)


@loop
def begin(p, layer, replica, n_examples, queries, which, at, shared, own, resid, room):
    """For some examples what the layer reads of their rows, and in the room the residual stream at the queries."""
    b, m = p.beginnings, layer.rest
    biases, start = bias_of(m, replica, shared, own)
    for row in range(n_examples * p.n_pos):
        to = layer.rest_at + row * m.n_out
        row_plus(biases, start + row % m.n_bias * m.n_out, False, room, to, m.n_out)
        row_plus(room, b.read + which[at + row] * m.n_out, True, room, to, m.n_out)
    _taken(p, n_examples, queries, which, at, resid, replica * b.n * p.d_model, room, p.resid)
    if layer.some:
        _taken(p, n_examples, queries, which, at, room, b.hat, room, p.narrow)
        n_rows = n_examples * len(queries)
        linear(layer.q, replica, shared, own, room, p.narrow, n_rows, room, layer.q_at, False)


@loop
def hand_back(p, layer, replica, n_examples, queries, which, at, shared, own, room, gradients):
    """From dq, dk, dv in the wide room and the gradient by the residual stream: what comes back of distinct rows."""
    b, m, n_all, n_rows = p.beginnings, layer.rest, n_examples * p.n_pos, n_examples * len(queries)
    for row in range(n_all):
        dread = p.wide + row * m.n_out
        row_plus(room, dread, True, room, b.dread + which[at + row] * m.n_out, m.n_out)
        if m.dbias >= 0:
            bias = m.dbias + (replica * m.n_bias + row % m.n_bias) * m.n_out
            row_plus(room, dread, True, gradients, bias, m.n_out)
    _added(p, n_examples, queries, which, at, room, p.resid, b.dresid)
    if layer.some:
        dq = p.wide + n_all * m.n_out
        _taken(p, n_examples, queries, which, at, room, b.hat, room, p.narrow)
        linear_gradient(layer.q, replica, room, p.narrow, room, dq, n_rows, gradients)
        linear_back(layer.q, replica, shared, own, room, dq, n_rows, room, p.narrow, False)
        _added(p, n_examples, queries, which, at, room, p.narrow, b.dhat)


@loop
def end_beginnings(p, layer, replica, shared, own, room, gradients, dresid):
    """After a chain's examples: the gradients by what reads the distinct rows, and by these."""
    b, m, d, at_once = p.beginnings, layer.rest, p.d_model, p.at_once * p.n_pos
    for first in range(0, b.n, at_once):
        n, rows, dread = min(at_once, b.n - first), b.hat + first * d, b.dread + first * m.n_out
        weight_gradient_some(m, 0, m.n_out, replica, room, rows, room, dread, n, gradients)
        linear_back(m, replica, shared, own, room, dread, n, room, b.dhat + first * d, layer.some)
    normalize_back(layer.norm, room, b.dhat, b.n, d, room, b.hat, b.inverse, room, b.dresid)
    copy(room, b.dresid, b.n * d, dresid, replica * b.n * d)
