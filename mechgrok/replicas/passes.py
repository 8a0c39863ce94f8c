"""Forward and backward through a network's layers, a few examples at a time, as loops that numba compiles.

A replica's activations on these examples stay in the processor's own cache from the first product to the last
gradient; torch would carry those of all replicas and examples to memory and back for every operation.
All arrays are flat; `LAYER` and `PASS` are records that say where in them the numbers are.
"""

import numpy as np

from mechgrok.loops.lanes import WIDTH, added, load, minus, plus, spread, store, times
from mechgrok.replicas.beginnings import BEGINNINGS, begin, end_beginnings, hand_back, read_beginnings
from mechgrok.replicas.composed import compose, compose_back, compose_both, side_by_side
from mechgrok.replicas.direct import neurons, neurons_back, take_kept
from mechgrok.replicas.fused import attention, attention_backward, kept
from mechgrok.replicas.linear import MATRIX, bias_of, clear_gradient, linear, linear_back, linear_gradient, weigh
from mechgrok.replicas.loss import loss, shared_logits, take_shared_logits
from mechgrok.replicas.norms import NORM, inverse_rms, normalize, normalize_back, scale_back
from mechgrok.replicas.products import ZERO, clear, copy, gate, loop, rectify

AT_A_TIME = 16  # rows that stay in the first cache with what a layer reads of them
# What reads the residual stream next after heads that stand in for the model's own, and sees them through their rank;
# DIRECT: both MLP and readout do, as `direct` tells.
MLP, NEXT, READOUT, DIRECT = 1, 2, 3, 4

# Of one layer: what reads, `q` where only some positions are queries and the rest of q, k, v; W_O; the MLP, n_in 0
# where there is none; and from `hat` on where in the room its activations are kept for the backward pass.
LAYER = np.dtype(
    [
        ("norm", NORM), ("q", MATRIX), ("rest", MATRIX), ("out", MATRIX),
        ("mlp_norm", NORM), ("mlp_in", MATRIX), ("mlp_out", MATRIX),
        ("n_heads", np.int64), ("d_head", np.int64), ("scale", np.float32), ("some", np.bool_),
        *(
            (name, np.int64)
            for name in ("hat", "inverse", "q_at", "rest_at", "pattern", "z", "mid", "mid_inverse", "active")
        ),
    ],
    align=True,
)  # fmt: skip
# Of the pass: sizes, the readout, where in the room is what needs no keeping; and given, that the first layer is heads
# that stand in for the model's own; low, who reads them through their rank (0: nobody); of how many examples is kept
# what they do not move, and the places of that and of a head's former z; which gradients are wanted.
PASS = np.dtype(
    [
        ("final_norm", NORM), ("readout", MATRIX), ("before", MATRIX), ("before_read", MATRIX),
        ("reads", MATRIX), ("own_read", MATRIX), ("both", MATRIX), ("reads_logits", MATRIX), ("own_logits", MATRIX),
        ("beginnings", BEGINNINGS),
        *(
            (name, np.int64)
            for name in (
                "n_replicas", "n_chains", "n_examples", "at_once", "n_pos", "n_scored", "d_model", "n_classes",
                "resid", "hat", "inverse", "logits", "exponentials", "narrow", "dz", "wide", "turned", "dscores",
                "base", "scaled", "ready", "ready_head", "low", "n_kept", "still", "former", "made", "zs", "write",
                "square",
                # Of `loss`: how many classes and rows at once; for each row its norm's scale, the logit that others are
                # relative to, how far the target's is from it, the sums over the others, and what their exponentials
                # are multiplied by; and room to sum up.
                "classes", "together", "scale", "origin", "target", "others", "along", "factor", "rest", "inner",
                "spot",
            )
        ),
        ("given", np.bool_), ("backward", np.bool_), ("back_to_start", np.bool_),
    ],
    align=True,
)  # fmt: skip


@loop
def _rows_at(x, at, n_examples, n_pos, positions, n, out, to):
    """The rows of these positions of each example, one after another; out may be x itself from the same place on."""
    for example in range(n_examples):
        for i in range(len(positions)):
            row = example * len(positions) + i
            copy(x, at + (example * n_pos + positions[i]) * n, n, out, to + row * n)


@loop
def _rows_back(x, at, n_examples, n_pos, positions, n):
    """Put the rows of x back to their positions in place, and 0 to all others."""
    for example in range(n_examples - 1, -1, -1):
        i = len(positions) - 1
        for pos in range(n_pos - 1, -1, -1):
            to = at + (example * n_pos + pos) * n
            if i >= 0 and positions[i] == pos:
                copy(x, at + (example * len(positions) + i) * n, n, x, to)
                i -= 1
            else:
                clear(x, to, n)


@loop
def _attend(p, layer, n_examples, n_keys, room):
    """z of all heads from q, k, v in the room."""
    width, n_queries = layer.n_heads * layer.d_head, len(n_keys)
    rest = room[layer.rest_at : layer.rest_at + n_examples * p.n_pos * layer.rest.n_out]
    q, q_example, q_row = rest, p.n_pos * layer.rest.n_out, layer.rest.n_out
    if layer.some:
        q, q_example, q_row = room[layer.q_at : layer.q_at + n_examples * n_queries * width], n_queries * width, width
    strides = (n_queries * width, layer.d_head, width)
    attention(
        q, q_example, q_row, rest, layer.rest.n_out, p.n_pos, n_keys, layer.scale, layer.n_heads, layer.d_head,
        room[p.turned :], room[layer.pattern :], True, room[:0], room[layer.z :], strides,
    )  # fmt: skip


@loop
def _attend_back(p, layer, n_examples, n_keys, room):
    """dq, dk, dv in the wide room from dz in the narrow one; dq of its own after them."""
    width, n_queries = layer.n_heads * layer.d_head, len(n_keys)
    n_rest = n_examples * p.n_pos * layer.rest.n_out
    rest, drest = room[layer.rest_at : layer.rest_at + n_rest], room[p.wide : p.wide + n_rest]
    q, dq, q_example, q_row = rest, drest, p.n_pos * layer.rest.n_out, layer.rest.n_out
    if layer.some:
        q, dq = room[layer.q_at : layer.q_at + n_examples * n_queries * width], room[p.wide + n_rest :]
        q_example, q_row = n_queries * width, width
    strides = (n_queries * width, layer.d_head, width)
    attention_backward(
        q, q_example, q_row, rest, layer.rest.n_out, p.n_pos, n_keys, layer.scale, layer.n_heads, layer.d_head,
        room[p.turned :], room[layer.pattern :], True, room[:0], room[p.narrow :], strides,
        room[p.dscores :], dq, drest,
    )  # fmt: skip


@loop
def _read(p, layer, replica, n_examples, scored, shared, own, room):
    """q, k and v from the normalized rows."""
    linear(layer.rest, replica, shared, own, room, layer.hat, n_examples * p.n_pos, room, layer.rest_at, False)
    if layer.some:
        _rows_at(room, layer.hat, n_examples, p.n_pos, scored, p.d_model, room, p.narrow)
        linear(layer.q, replica, shared, own, room, p.narrow, n_examples * len(scored), room, layer.q_at, False)


@loop
def _read_gradient(p, layer, replica, n_examples, scored, room, gradients):
    """Of what reads, from dq, dk, dv in the wide room."""
    n_rows = n_examples * p.n_pos
    linear_gradient(layer.rest, replica, room, layer.hat, room, p.wide, n_rows, gradients)
    if layer.some:
        _rows_at(room, layer.hat, n_examples, p.n_pos, scored, p.d_model, room, p.narrow)
        dq = p.wide + n_rows * layer.rest.n_out
        linear_gradient(layer.q, replica, room, p.narrow, room, dq, n_examples * len(scored), gradients)


@loop
def _low_read(p, norm, m, member, n_rows, own_z, hat, inverse, shared, own, room, to):
    """What m reads of the normalized residual stream, which is kept itself in place of its normalized rows, of a head
    that moved it, through that head's rank: m's bias + inverse (base + [z, own_z] p.both), base being the same for all
    heads of a chain. m itself does not move. A few rows at a time go through all steps, while they are in the first
    cache.
    """
    copy(room, p.resid, n_rows * p.d_model, room, hat)
    biases, start = bias_of(m, member, shared, own)
    side_by_side(p, own_z, n_rows, room)
    for row in range(n_rows):
        room[inverse + row] = inverse_rms(norm, room, p.resid + row * p.d_model, p.d_model)
    for first in range(0, n_rows, AT_A_TIME):
        n, begin = min(AT_A_TIME, n_rows - first), to + first * m.n_out
        copy(room, p.base + first * m.n_out, n * m.n_out, room, begin)
        weigh(p.both, member, shared, own, room, p.zs + first * p.both.n_in, n, room, begin, True)
        for row in range(first, first + n):
            by, here, bias = spread(room[inverse + row]), to + row * m.n_out, start + row % m.n_bias * m.n_out
            for c in range(0, m.n_out, WIDTH):
                left = min(WIDTH, m.n_out - c)
                y = times(load(room, here + c, left, ZERO), by)
                store(room, here + c, left, plus(y, load(biases, bias + c, left, ZERO)))


@loop
def _low_read_back(p, norm, m, member, n_rows, own_z, hat, inverse, read, dread, shared, own, room, gradients):
    """From the gradient by what m read: dz by the head's rank, and what the scale adds to the residual stream's."""
    biases, start = bias_of(m, member, shared, own)
    d_head = p.own_read.n_in
    for first in range(0, n_rows, AT_A_TIME):
        n = min(AT_A_TIME, n_rows - first)
        for row in range(first, first + n):
            scale = room[inverse + row]
            by, here, bias, along = spread(scale), row * m.n_out, start + row % m.n_bias * m.n_out, spread(ZERO)
            for c in range(0, m.n_out, WIDTH):
                left = min(WIDTH, m.n_out - c)
                d = load(room, dread + here + c, left, ZERO)
                scaled = minus(load(room, read + here + c, left, ZERO), load(biases, bias + c, left, ZERO))
                along = plus(along, times(d, scaled))
                store(room, dread + here + c, left, times(d, by))
            if norm.scaled:
                at = row * p.d_model
                scale_back(added(along) / scale, scale, room, hat + at, p.d_model, True, room, p.resid + at)
        z, dsum = own_z + first * d_head, dread + first * m.n_out
        linear_gradient(p.own_read, member, room, z, room, dsum, n, gradients)
        linear_back(p.own_read, member, shared, own, room, dsum, n, room, p.dz + first * d_head, False)


@loop
def _forward(p, layers, i, replica, n_examples, scored, n_keys, shared, own, room):
    """The residual stream in the room, before layer i -> after it; where rows begin alike, the first one's is read."""
    layer, own_z, begun = layers[i], layers[0].z, i == 0 and p.beginnings.n > 0
    member = replica // p.n_chains
    n_all, n_rows = n_examples * p.n_pos, n_examples * len(n_keys)
    if p.low == NEXT and i == 1:
        _low_read(
            p, layer.norm, layer.rest, member, n_all, own_z, layer.hat, layer.inverse, shared, own, room,
            layer.rest_at,
        )  # fmt: skip
    elif not begun:
        if i > 0 or not p.given:
            normalize(layer.norm, room, p.resid, n_all, p.d_model, room, layer.hat, layer.inverse)
        _read(p, layer, replica, n_examples, scored, shared, own, room)
    _attend(p, layer, n_examples, n_keys, room)
    if p.low == DIRECT:
        neurons(p, layer, member, n_rows, shared, own, room)
        return
    if layer.some and not begun and (i > 0 or not p.given):
        _rows_at(room, p.resid, n_examples, p.n_pos, scored, p.d_model, room, p.resid)
    linear(layer.out, replica, shared, own, room, layer.z, n_rows, room, p.resid, True)
    if layer.mlp_in.n_in == 0:
        return
    if p.low == MLP and i == 0:
        _low_read(
            p, layer.mlp_norm, layer.mlp_in, member, n_rows, own_z, layer.mid, layer.mid_inverse, shared, own,
            room, layer.active,
        )  # fmt: skip
    else:
        normalize(layer.mlp_norm, room, p.resid, n_rows, p.d_model, room, layer.mid, layer.mid_inverse)
        linear(layer.mlp_in, replica, shared, own, room, layer.mid, n_rows, room, layer.active, False)
    rectify(room, layer.active, n_rows * layer.mlp_in.n_out)
    linear(layer.mlp_out, replica, shared, own, room, layer.active, n_rows, room, p.resid, True)


@loop
def _backward(p, layers, i, replica, n_examples, scored, n_keys, shared, own, room, gradients):
    """The gradient by the residual stream in the room, after layer i -> before it, if anything asks; and by weights."""
    layer, own_z, member = layers[i], layers[0].z, replica // p.n_chains
    n_all, n_rows = n_examples * p.n_pos, n_examples * len(n_keys)
    if p.low == DIRECT:
        neurons_back(p, layer, member, n_rows, shared, own, room, gradients)
    elif layer.mlp_in.n_in > 0:
        linear_gradient(layer.mlp_out, replica, room, layer.active, room, p.resid, n_rows, gradients)
        linear_back(layer.mlp_out, replica, shared, own, room, p.resid, n_rows, room, p.wide, False)
        gate(room, layer.active, n_rows * layer.mlp_in.n_out, room, p.wide)
        if p.low == MLP and i == 0:  # where a neuron is off, what it read does not matter
            _low_read_back(
                p, layer.mlp_norm, layer.mlp_in, member, n_rows, own_z, layer.mid, layer.mid_inverse, layer.active,
                p.wide, shared, own, room, gradients,
            )  # fmt: skip
        else:
            linear_gradient(layer.mlp_in, replica, room, layer.mid, room, p.wide, n_rows, gradients)
            linear_back(layer.mlp_in, replica, shared, own, room, p.wide, n_rows, room, p.narrow, False)
            normalize_back(
                layer.mlp_norm, room, p.narrow, n_rows, p.d_model, room, layer.mid, layer.mid_inverse, room, p.resid
            )
    if p.low != DIRECT:
        low = p.low > 0 and i == 0
        linear_gradient(layer.out, replica, room, layer.z, room, p.resid, n_rows, gradients)
        if low:
            copy(room, p.dz, n_rows * layer.out.n_in, room, p.narrow)
        linear_back(layer.out, replica, shared, own, room, p.resid, n_rows, room, p.narrow, low)
    _attend_back(p, layer, n_examples, n_keys, room)
    if p.low == NEXT and i == 1:
        _low_read_back(
            p, layer.norm, layer.rest, member, n_all, own_z, layer.hat, layer.inverse, layer.rest_at, p.wide, shared,
            own, room, gradients,
        )  # fmt: skip
        return
    if i == 0 and p.beginnings.n > 0:
        return
    _read_gradient(p, layer, replica, n_examples, scored, room, gradients)
    if i == 0 and not p.back_to_start:
        return
    if layer.some:  # their rows are spread out, and what the keys and values add to all rows follows
        dq = p.wide + n_all * layer.rest.n_out
        linear_back(layer.q, replica, shared, own, room, dq, n_rows, room, p.narrow, False)
        _rows_back(room, p.narrow, n_examples, p.n_pos, scored, p.d_model)
        _rows_back(room, p.resid, n_examples, p.n_pos, scored, p.d_model)
    linear_back(layer.rest, replica, shared, own, room, p.wide, n_all, room, p.narrow, layer.some)
    normalize_back(layer.norm, room, p.narrow, n_all, p.d_model, room, layer.hat, layer.inverse, room, p.resid)


@loop
def _take(x, first, index, at, n_examples, n, out, to):
    """n numbers of each of these examples, of which `first` is the one with number 0: one after another."""
    for example in range(n_examples):
        copy(x, (first + index[at + example]) * n, n, out, to + example * n)


@loop
def _clear(p, layers, replica, gradients):
    """No gradient of the replica's weights yet."""
    for i in range(len(layers)):
        clear_gradient(layers[i].q, replica, gradients)
        clear_gradient(layers[i].rest, replica, gradients)
        clear_gradient(layers[i].out, replica, gradients)
        clear_gradient(layers[i].mlp_in, replica, gradients)
        clear_gradient(layers[i].mlp_out, replica, gradients)
    clear_gradient(p.own_read, replica // p.n_chains, gradients)
    clear_gradient(p.own_logits, replica // p.n_chains, gradients)
    clear_gradient(p.readout, replica, gradients)


@kept
def run(
    p, layers, scored, every, keys, some_keys, shared, own, x, resid, which, z, kept, index, targets, weights,
    room, others, away, gradients, dresid,
):  # fmt: skip
    """The loss of every replica on its chain's examples, through all layers, and its gradients.

    Args:
        p, layers: records of PASS and LAYER. scored: the positions that the last layer goes on with. every: all.
        keys, some_keys: how many keys each position, and each scored one, sees.
        shared, own: packed weights.
        resid: Float[chain or replica, row, d_model], the residual stream before the first layer.
        index: where p.given, which of p.n_kept examples each of a chain's is, Int[chain, example]. Of those are x,
            Float[example, pos, d_model], what the first layer reads; resid, after its attention instead; z,
            Float[head, example, row, d_head], which times p.before is added to that; and kept, if it is not empty:
            what logits are besides what a chain's heads add to them, Float[example, scored, class, padded]; or where
            p.low == DIRECT, what neurons and logits are besides, Float[head, example, scored, neurons and logits, both
            padded].
        which: where p.beginnings.n > 0, the row of x, if given, or of resid, that each row begins as, Int[chain, row];
            they are then Float[chain or replica, distinct row, d_model].
        targets, weights: [chain, row]. room: for everything between.
        others, away: [replica, row], as `loss` tells them.
        gradients: of weights. dresid: [replica, row, d_model], where p.back_to_start.
    """
    d, n_layers = p.d_model, len(layers)
    first_rows = p.n_scored if n_layers == 0 or (p.given and layers[0].some) else p.n_pos
    n_resid, n_scored = p.n_examples * first_rows * d, p.n_examples * p.n_scored
    each = not p.given and len(resid) > p.n_chains * n_resid
    own_z, begun, direct = layers[0].z if p.given else 0, p.beginnings.n > 0, p.low == DIRECT
    queries = scored if begun and layers[0].some else every
    for chain in range(p.n_chains):
        for first in range(0, p.n_examples, p.at_once):
            n = min(p.at_once, p.n_examples - first)
            n_first, n_rows, here = n * first_rows, n * p.n_scored, chain * p.n_examples + first
            if p.given and not direct:
                _take(resid, 0, index, here, n, first_rows * d, room, p.still)
            if p.low == MLP:
                weigh(layers[0].mlp_in, 0, shared, own, room, p.still, n_first, room, p.base, False)
            elif p.low == NEXT:
                weigh(layers[1].rest, 0, shared, own, room, p.still, n_first, room, p.base, False)
            elif p.low == READOUT and len(kept) > 0:
                take_shared_logits(p, n, index, here, kept, room)
            elif p.low == READOUT:
                shared_logits(p, shared, own, n_first, room)
            if p.given and not begun:
                _take(x, 0, index, here, n, p.n_pos * d, room, layers[0].hat)
            for replica in range(chain, p.n_replicas, p.n_chains):
                if p.backward and first == 0:
                    _clear(p, layers, replica, gradients)
                member = replica // p.n_chains
                if begun and first == 0:
                    read_beginnings(p, layers[0], replica, shared, own, x if p.given else resid, room)
                if p.low > 0 and first == 0:
                    if not direct:
                        compose_both(p, layers[0].out, replica, shared, own, room)
                    else:
                        compose(p, p.own_read, layers[0].out, p.reads, replica, shared, own, room)
                        compose(p, p.own_logits, layers[0].out, p.reads_logits, replica, shared, own, room)
                if begun:
                    begin(p, layers[0], replica, n, every, queries, which, here * p.n_pos, shared, own, resid, room)
                if direct:
                    take_kept(p, layers[0], member, n, index, here, kept, room)
                elif p.given:
                    _take(z, member * p.n_kept, index, here, n, first_rows * layers[0].d_head, room, p.former)
                    copy(room, p.still, n_first * d, room, p.resid)
                    linear(p.before, member, shared, own, room, p.former, n_first, room, p.resid, True)
                elif not begun:
                    start = (replica if each else chain) * n_resid + first * first_rows * d
                    copy(resid, start, n_first * d, room, p.resid)
                for i in range(n_layers):
                    seen = some_keys if layers[i].some else keys
                    _forward(p, layers, i, replica, n, scored, seen, shared, own, room)
                at, to = chain * n_scored + first * p.n_scored, replica * n_scored + first * p.n_scored
                loss(
                    p, p.low == READOUT, direct, own_z, layers[0].active, member if p.given else replica, n_rows,
                    at, to, shared, own, targets, weights, room, others, away, gradients,
                )  # fmt: skip
                if not p.backward:
                    continue
                for i in range(n_layers - 1, -1, -1):
                    seen = some_keys if layers[i].some else keys
                    _backward(p, layers, i, replica, n, scored, seen, shared, own, room, gradients)
                if begun:
                    hand_back(p, layers[0], replica, n, every, queries, which, here * p.n_pos, room, gradients)
                    if first + n == p.n_examples:
                        end_beginnings(p, layers[0], replica, shared, own, room, gradients, dresid)
                if p.low > 0 and first + n == p.n_examples:
                    compose_back(p, p.own_read, layers[0].out, p.reads, replica, shared, own, room, gradients)
                    if direct:
                        write = layers[0].out
                        compose_back(p, p.own_logits, write, p.reads_logits, replica, shared, own, room, gradients)
                if p.back_to_start and not begun:
                    back = (replica * p.n_examples + first) * first_rows * d
                    copy(room, p.resid, n_first * d, dresid, back)
