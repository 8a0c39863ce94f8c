"""Loops that numba compiles: attention, and the softmax of a loss, each while its numbers are in the first cache."""

from pathlib import Path

from numba import njit

from mechgrok.loops.kept import OPTIONS, keeper
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
    prefetch,
    put,
    spread,
    store,
    times,
    turn,
    where_above,
)
from mechgrok.loops.tiles import FEW_TERMS, FLOAT_TERMS, rows_of_few_terms, tile
from mechgrok.replicas.few_queries import are_few, patterns, patterns_back, values
from mechgrok.replicas.products import LOWEST, ONE, ZERO, product

kept = keeper(Path(__file__).parent)
IN_CACHE = 2**12  # numbers that stay in the first cache from one step to the next
# Sixteen rows of a pattern [key, 16] times something: its queries', and its keys'.
_by_queries, _by_keys = tile(FLOAT_TERMS, WIDTH, 1, (1, WIDTH)), tile(FLOAT_TERMS, WIDTH, 1, (WIDTH, 1))
_with_lanes = rows_of_few_terms(1)


@njit(**OPTIONS)
def _fetch_next(array, size, part, n_parts, now):
    """Ask for a part of what follows `now`, of `size` numbers each: heads read a line here and there, which no
    processor foresees, and would wait for each.
    """
    for at in range(part * size // n_parts, (part + 1) * size // n_parts, WIDTH):
        prefetch(array, (now + 1) * size + at)


@njit(**OPTIONS)
def _turned(x, at, row, n_rows, n_numbers, out):
    """out[d, l] = x[l, d]: a block of at most 16 rows with its rows as lanes."""
    for d in range(0, n_numbers, WIDTH):
        turn(x, at + d, row, n_rows, min(WIDTH, n_numbers - d), out, d * WIDTH)


@njit(**OPTIONS)
def _with_queries(out, to, rest, at, row, turned, d_head, seen):
    """Products of `seen` keys, or values, with a block of queries as lanes: Float[key, 16], from `to` on."""
    if d_head % FEW_TERMS:
        product(out, to, WIDTH, False, 0, rest, at, row, 1, turned, 0, WIDTH, WIDTH, d_head, seen, WIDTH)
        return
    for term in range(0, d_head, FEW_TERMS):
        _with_lanes(
            out, to, WIDTH, term > 0, 0, rest, at + term, row, turned, term * WIDTH, WIDTH, WIDTH, seen, WIDTH
        )  # fmt: skip


@njit(**OPTIONS)
def _sums_of_keys(out, to, out_row, pattern, place, rest, at, row, seen, n, d_head):
    """out = pattern^T x for n queries of a block, x being the first `seen` keys or values."""
    if n < WIDTH:
        product(out, to, out_row, False, 0, pattern, place, 1, WIDTH, rest, at, row, WIDTH, seen, n, d_head)
        return
    for c in range(0, d_head, WIDTH):
        left = min(WIDTH, d_head - c)
        _by_queries(out, to + c, out_row, False, 0, pattern, place, 1, WIDTH, rest, at + c, row, WIDTH, seen, left)


@njit(**OPTIONS)
def _sums_of_queries(out, to, out_row, add, pattern, place, x, at, row, seen, n, d_head):
    """out (+)= pattern x for the first `seen` keys, x being the rows of n queries of a block."""
    many = seen // WIDTH * WIDTH
    for r in range(0, many, WIDTH):
        for c in range(0, d_head, WIDTH):
            left = min(WIDTH, d_head - c)
            _by_keys(
                out, to + r * out_row + c, out_row, add, 0, pattern, place + r * WIDTH, WIDTH, 1, x, at + c, row, WIDTH,
                n, left,
            )  # fmt: skip
    product(
        out, to + many * out_row, out_row, add, 0, pattern, place + many * WIDTH, WIDTH, 1, x, at, row, WIDTH, n,
        seen - many, d_head,
    )  # fmt: skip


@njit(**OPTIONS)
def _scores(q, query, q_row, n, d_head, rest, key, rest_row, n_keys, first, turned, scores, to):
    """Of a block of n queries, by key, from `to` on: Float[key, 16], LOWEST where a query does not see the key."""
    seen = int(n_keys[first + n - 1])
    _turned(q, query, q_row, n, d_head, turned)
    _with_queries(scores, to, rest, key, rest_row, turned, d_head, seen)
    limit = load(n_keys, first, n, ZERO)
    for j in range(int(n_keys[first]), seen):
        at = to + j * WIDTH
        store(scores, at, WIDTH, where_above(limit, number(j), load(scores, at, WIDTH, ZERO), LOWEST))


@kept
def attention(
    q, q_example, q_row, rest, rest_row, n_pos, n_keys, scale, n_heads, d_head, turned, pattern, keep, sums,
    z, z_strides,
):  # fmt: skip
    """z = softmax(scale q k^T) v, query i seeing the first n_keys[i] keys, which never become fewer.

    All arrays are flat. Sixteen queries at a time are the lanes of their scores, key by key, so that a softmax
    needs no sum across lanes, and no score is made that none of the sixteen sees. The gradient takes the pattern as it
    is, or makes it again, so that it takes no memory. Source: FlashAttention (Dao et al. 2022); this order of loops
    is ours.

    Args:
        q: query i of head h of example e begins at e q_example + i q_row + h d_head.
        rest: row e n_pos + j ends in the keys of all heads and then their values.
        turned: room for 16 d_head numbers; much slower, as all room here, if not at a multiple of 64 bytes.
        pattern: if keep [example, head, block of queries, key, 16], receives the pattern; otherwise room for 16 n_pos.
        sums: unless keep [example, head, block of queries, 2, 16], receives the largest scaled score and 1 / the sum.
        z: query i of head h of example e begins at e z_strides[0] + h z_strides[1] + i z_strides[2].
    """
    n_queries = len(n_keys)
    few, block = are_few(n_queries, n_pos), 0
    for example in range(len(rest) // (n_pos * rest_row)):
        for head in range(n_heads):
            key = example * n_pos * rest_row + rest_row + (head - 2 * n_heads) * d_head
            value = key + n_heads * d_head
            _fetch_next(rest, n_pos * rest_row, head, n_heads, example)
            if few:
                query, to = example * q_example + head * d_head, example * z_strides[0] + head * z_strides[1]
                place = block * WIDTH * n_pos if keep else 0
                patterns(q, query, q_row, rest, key, rest_row, n_keys, scale, d_head, pattern, place)
                values(pattern, place, rest, value, rest_row, n_keys, d_head, z, to, z_strides[2])
                block += 1
                continue
            for first in range(0, n_queries, WIDTH):
                n = min(WIDTH, n_queries - first)
                seen = int(n_keys[first + n - 1])
                query = example * q_example + first * q_row + head * d_head
                place = block * WIDTH * n_pos if keep else 0
                _scores(q, query, q_row, n, d_head, rest, key, rest_row, n_keys, first, turned, pattern, place)
                end = place + seen * WIDTH
                top = spread(LOWEST)
                for at in range(place, end, WIDTH):
                    top = larger(top, load(pattern, at, WIDTH, ZERO))
                top, total = times(top, spread(scale)), spread(ZERO)
                for at in range(place, end, WIDTH):
                    each = _share(pattern, at, scale, top)
                    store(pattern, at, WIDTH, each)
                    total = plus(total, each)
                inverse = over(spread(ONE), total)
                if not keep:
                    store(sums, block * 2 * WIDTH, WIDTH, top)
                    store(sums, block * 2 * WIDTH + WIDTH, WIDTH, inverse)
                for at in range(place, end, WIDTH):
                    store(pattern, at, WIDTH, times(load(pattern, at, WIDTH, ZERO), inverse))
                to = example * z_strides[0] + head * z_strides[1] + first * z_strides[2]
                _sums_of_keys(z, to, z_strides[2], pattern, place, rest, value, rest_row, seen, n, d_head)
                block += 1


@njit(**OPTIONS)
def _share(scores, at, scale, top):
    """exp(scale scores - top) of one key."""
    return exp(minus(times(load(scores, at, WIDTH, ZERO), spread(scale)), top))


@kept
def attention_backward(
    q, q_example, q_row, rest, rest_row, n_pos, n_keys, scale, n_heads, d_head, turned, pattern, keep, sums,
    dz, z_strides, dscores, dq, drest,
):  # fmt: skip
    """dq and drest of `attention`, from what it kept and dz, laid out like z. dscores: room for 16 n_pos."""
    n_queries = len(n_keys)
    step, few, n_blocks = z_strides[2], are_few(n_queries, n_pos), (n_queries + WIDTH - 1) // WIDTH
    for example in range(len(rest) // (n_pos * rest_row)):
        for head in range(n_heads):
            key = example * n_pos * rest_row + rest_row + (head - 2 * n_heads) * d_head
            value = key + n_heads * d_head
            before = (example * n_heads + head) * n_blocks
            _fetch_next(rest, n_pos * rest_row, head, n_heads, example)
            _fetch_next(dz, n_queries * n_heads * d_head, head, n_heads, example)
            for at in range(int(n_keys[n_queries - 1]), n_pos):  # what no query sees
                for c in range(d_head):
                    drest[key + at * rest_row + c] = ZERO
                    drest[value + at * rest_row + c] = ZERO
            if few:
                query, back = example * q_example + head * d_head, example * z_strides[0] + head * z_strides[1]
                place = before * WIDTH * n_pos if keep else 0
                if not keep:
                    patterns(q, query, q_row, rest, key, rest_row, n_keys, scale, d_head, pattern, place)
                patterns_back(
                    q, query, q_row, rest, key, value, rest_row, n_keys, scale, d_head, pattern, place, dz, back, step,
                    dq, drest,
                )  # fmt: skip
                continue
            for block in range(n_blocks - 1, -1, -1):  # the last one sees all keys that any does, and is not added
                first, add = block * WIDTH, block < n_blocks - 1
                n = min(WIDTH, n_queries - first)
                seen = int(n_keys[first + n - 1])
                query = example * q_example + first * q_row + head * d_head
                back = example * z_strides[0] + head * z_strides[1] + first * step
                place = (before + block) * WIDTH * n_pos if keep else 0
                if not keep:
                    _scores(q, query, q_row, n, d_head, rest, key, rest_row, n_keys, first, turned, pattern, place)
                    top = load(sums, (before + block) * 2 * WIDTH, WIDTH, ZERO)
                    inverse = load(sums, (before + block) * 2 * WIDTH + WIDTH, WIDTH, ZERO)
                    for at in range(0, seen * WIDTH, WIDTH):
                        store(pattern, at, WIDTH, times(_share(pattern, at, scale, top), inverse))
                _turned(dz, back, step, n, d_head, turned)
                _with_queries(dscores, 0, rest, value, rest_row, turned, d_head, seen)
                inner = spread(ZERO)  # softmax's backward needs the sum over keys of pattern dpattern
                for at in range(0, seen * WIDTH, WIDTH):
                    inner = plus(inner, times(load(pattern, place + at, WIDTH, ZERO), load(dscores, at, WIDTH, ZERO)))
                for at in range(0, seen * WIDTH, WIDTH):
                    each = times(load(pattern, place + at, WIDTH, ZERO), spread(scale))
                    store(dscores, at, WIDTH, times(each, minus(load(dscores, at, WIDTH, ZERO), inner)))
                _sums_of_queries(drest, value, rest_row, add, pattern, place, dz, back, step, seen, n, d_head)
                _sums_of_keys(dq, query, q_row, dscores, 0, rest, key, rest_row, seen, n, d_head)
                _sums_of_queries(drest, key, rest_row, add, dscores, 0, q, query, q_row, seen, n, d_head)


@kept
def softmax(logits, scale, bias, target, factor, others, away, along):
    """Of the logits y = scale x + bias of each row, in place: factor (softmax(y) - onehot(target)).

    Args:
        logits: x, flat [row, class]. scale: [row], positive. bias: [class]. target, factor: [row].
        others: receives the sum over all classes but the target of exp(y - top). away: y - top of the target.
        along: the derivative of the loss by scale, the sum over classes of x (softmax(y) - onehot(target)).
    """
    n_classes, n_rows = len(bias), len(target)
    at_once = max(1, IN_CACHE // n_classes)  # rows of a group go through each step together: they do not wait for sums
    for start in range(0, n_rows, at_once):
        group = range(start, min(start + at_once, n_rows))
        for row in group:
            by, top = spread(scale[row]), spread(LOWEST)
            for c in range(0, n_classes, WIDTH):
                n, at = min(WIDTH, n_classes - c), row * n_classes + c
                y = plus(times(load(logits, at, n, LOWEST), by), load(bias, c, n, ZERO))
                store(logits, at, n, y)
                top = larger(top, y)
            away[row] = largest(top)
        for row in group:
            highest, own = away[row], target[row]
            away[row] = logits[row * n_classes + own] - highest
            rest, inner, by = spread(ZERO), spread(ZERO), spread(highest)
            for c in range(0, n_classes, WIDTH):
                n, at = min(WIDTH, n_classes - c), row * n_classes + c
                y = minus(load(logits, at, n, highest + LEAST), by)
                if own // WIDTH * WIDTH == c:
                    y = put(y, own - c, LEAST)  # as good as nothing: the sum is of the others
                each = exp(y)
                store(logits, at, n, each)
                rest = plus(rest, each)
                inner = plus(
                    inner, times(each, minus(y, load(bias, c, n, ZERO)))
                )  # less the top: the gradient sums to 0
            others[row], along[row] = added(rest), added(inner)
        for row in group:
            own, total = target[row], others[row]
            share = ONE / (total + lane0(exp(spread(away[row]))))
            along[row] = (along[row] - total * (away[row] - bias[own])) * share / scale[row]
            by = spread(share * factor[row])
            for c in range(0, n_classes, WIDTH):
                n, at = min(WIDTH, n_classes - c), row * n_classes + c
                each = load(logits, at, n, ZERO)
                if own // WIDTH * WIDTH == c:
                    each = put(each, own - c, -total)
                store(logits, at, n, times(each, by))
