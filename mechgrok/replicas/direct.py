"""Heads of a last layer whose MLP and logits no norm stands before, as loops that numba compiles.

Neurons and logits are then straight functions of z: what else they read is the same at every step, so it is made once
for all examples and kept, and the residual stream itself is never made. Neurons write to logits by W_out W_U.
"""

from numba import njit

from mechgrok.loops.kept import OPTIONS
from mechgrok.loops.lanes import WIDTH, prefetch
from mechgrok.replicas.linear import linear_back, linear_gradient, weigh
from mechgrok.replicas.loss import take_logits
from mechgrok.replicas.products import copy, gate, loop, padded, rectify

AHEAD = 8  # rows that are on their way from memory while one is copied: with two, a step takes 3 % longer


@njit(**OPTIONS)
def _kept_at(p, member, index, at, row):
    """As which row it was kept, of a member's examples."""
    return (member * p.n_kept + index[at + row // p.n_scored]) * p.n_scored + row % p.n_scored


@loop
def take_kept(p, layer, member, n_examples, index, at, kept, room):
    """What is kept of these examples, to where the neurons and the logits, some classes after others, are made.

    The examples lie anywhere in memory, so the processor is told some rows ahead which ones will be wanted.
    """
    n_neurons, n_rows = p.own_read.n_out, n_examples * p.n_scored
    logits = padded(n_neurons)
    width = logits + padded(p.n_classes)
    for row in range(-AHEAD, n_rows):
        if row + AHEAD < n_rows:
            of = _kept_at(p, member, index, at, row + AHEAD) * width
            for c in range(0, width, WIDTH):
                prefetch(kept, of + c)
        if row >= 0:
            of = _kept_at(p, member, index, at, row) * width
            copy(kept, of, n_neurons, room, layer.active + row * n_neurons)
            take_logits(p, row, n_rows, kept, of + logits, room)


@loop
def neurons(p, layer, member, n_rows, shared, own, room):
    """Of the MLP, from z and what was kept."""
    weigh(p.own_read, member, shared, own, room, layer.z, n_rows, room, layer.active, True)
    rectify(room, layer.active, n_rows * p.own_read.n_out)


@loop
def neurons_back(p, layer, member, n_rows, shared, own, room, gradients):
    """Add to dz, in the narrow room, what comes by the neurons, whose gradient is in the wide one."""
    gate(room, layer.active, n_rows * p.own_read.n_out, room, p.wide)
    linear_gradient(p.own_read, member, room, layer.z, room, p.wide, n_rows, gradients)
    linear_back(p.own_read, member, shared, own, room, p.wide, n_rows, room, p.narrow, True)
