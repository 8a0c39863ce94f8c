"""Loops that numba compiles: attention, and the softmax of a loss, each while its numbers are in the first cache."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit

from mechgrok.replicas.lanes import (
    LEAST,
    WIDTH,
    added,
    exp,
    larger,
    load,
    minus,
    number,
    over,
    plus,
    prefetch,
    spread,
    spread_from,
    store,
    times,
)

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}

ZERO, ONE = number(0), number(1)
LOWEST = number(-1e30)  # a score that nothing sees: finite, so that no difference of two is NaN


def serves(like: torch.Tensor) -> bool:
    """Whether these loops take such numbers."""
    return like.dtype == torch.float32 and like.device.type == "cpu"


def _kept(loop: Callable[..., None]) -> Any:
    """Compile it, and keep the result on disk where that can be written."""
    try:
        return njit(cache=True, **OPTIONS)(loop)
    except RuntimeError:  # numba found no place for it
        return njit(**OPTIONS)(loop)


@njit(**OPTIONS)
def _fetch_next(array, size, part, n_parts, now):
    """Ask for a part of what follows `now`, of `size` numbers each: heads read a line here and there, which no
    processor foresees, and would wait for each.
    """
    for at in range(part * size // n_parts, (part + 1) * size // n_parts, WIDTH):
        prefetch(array, (now + 1) * size + at)


@njit(**OPTIONS)
def _largest(x, spare):
    store(spare, 0, WIDTH, x)
    top = spare[0]
    for lane in range(1, WIDTH):  # written so that NaN stays
        top = top if top > spare[lane] else spare[lane]
    return top


@njit(**OPTIONS)
def _eight_rows(out, to, out_row, add, a, at, a_row, a_term, x, of, x_term, n_terms, n):
    """out[r, l] (+)= sum over t of a[r, t] x[t, l]: eight rows, n lanes; the arrays are flat, the strides given."""
    nothing = spread(ZERO)
    s0 = load(out, to, n, ZERO) if add else nothing
    s1 = load(out, to + out_row, n, ZERO) if add else nothing
    s2 = load(out, to + 2 * out_row, n, ZERO) if add else nothing
    s3 = load(out, to + 3 * out_row, n, ZERO) if add else nothing
    s4 = load(out, to + 4 * out_row, n, ZERO) if add else nothing
    s5 = load(out, to + 5 * out_row, n, ZERO) if add else nothing
    s6 = load(out, to + 6 * out_row, n, ZERO) if add else nothing
    s7 = load(out, to + 7 * out_row, n, ZERO) if add else nothing
    for _ in range(n_terms):
        y = load(x, of, n, ZERO)
        s0 = plus(s0, times(spread_from(a, at), y))
        s1 = plus(s1, times(spread_from(a, at + a_row), y))
        s2 = plus(s2, times(spread_from(a, at + 2 * a_row), y))
        s3 = plus(s3, times(spread_from(a, at + 3 * a_row), y))
        s4 = plus(s4, times(spread_from(a, at + 4 * a_row), y))
        s5 = plus(s5, times(spread_from(a, at + 5 * a_row), y))
        s6 = plus(s6, times(spread_from(a, at + 6 * a_row), y))
        s7 = plus(s7, times(spread_from(a, at + 7 * a_row), y))
        of += x_term
        at += a_term
    store(out, to, n, s0)
    store(out, to + out_row, n, s1)
    store(out, to + 2 * out_row, n, s2)
    store(out, to + 3 * out_row, n, s3)
    store(out, to + 4 * out_row, n, s4)
    store(out, to + 5 * out_row, n, s5)
    store(out, to + 6 * out_row, n, s6)
    store(out, to + 7 * out_row, n, s7)


@njit(**OPTIONS)
def _one_row(out, to, add, a, at, a_term, x, of, x_term, n_terms, n):
    row = load(out, to, n, ZERO) if add else spread(ZERO)
    for _ in range(n_terms):
        row = plus(row, times(spread_from(a, at), load(x, of, n, ZERO)))
        of += x_term
        at += a_term
    store(out, to, n, row)


@njit(**OPTIONS)
def _product(out, to, out_row, add, a, at, a_row, a_term, x, of, x_term, n_terms, n_rows, n_lanes):
    """out[r, l] (+)= sum over t of a[r, t] x[t, l], any number of rows, terms and lanes."""
    for lane in range(0, n_lanes, WIDTH):
        n = min(WIDTH, n_lanes - lane)
        row = 0
        while row + 8 <= n_rows:
            _eight_rows(
                out, to + row * out_row + lane, out_row, add, a, at + row * a_row, a_row, a_term,
                x, of + lane, x_term, n_terms, n,
            )  # fmt: skip
            row += 8
        for left in range(row, n_rows):
            _one_row(
                out, to + left * out_row + lane, add, a, at + left * a_row, a_term, x, of + lane, x_term, n_terms, n
            )


@njit(**OPTIONS)
def _turned(x, at, row, n_rows, n_numbers, out):
    """out[d, l] = x[l, d]: a block of at most 16 rows with its rows as lanes; the lanes left keep what they hold."""
    for lane in range(n_rows):
        for d in range(n_numbers):
            out[d * WIDTH + lane] = x[at + lane * row + d]


@njit(**OPTIONS)
def _scores(q, query, q_row, n, d_head, rest, key, rest_row, n_keys, first, turned, scores):
    """Of a block of n queries, by key: Float[key, 16], LOWEST where a query does not see the key."""
    seen = n_keys[first + n - 1]
    _turned(q, query, q_row, n, d_head, turned)
    _product(scores, 0, WIDTH, False, rest, key, rest_row, 1, turned, 0, WIDTH, d_head, seen, WIDTH)
    for lane in range(n):
        for j in range(n_keys[first + lane], seen):
            scores[j * WIDTH + lane] = LOWEST


@_kept
def attention(
    q, q_example, q_row, rest, rest_row, n_pos, n_keys, scale, n_heads, d_head, turned, scores, sums, z, z_strides
):
    """z = softmax(scale q k^T) v, query i seeing the first n_keys[i] keys, which never become fewer.

    All arrays are flat. Sixteen queries at a time are the lanes of their scores, key by key, so that a softmax
    needs no sum across lanes, and no score is made that none of the sixteen sees. The gradient makes the scores
    again, so they take no memory. Source: FlashAttention (Dao et al. 2022); this order of loops is ours.

    Args:
        q: query i of head h of example e begins at e q_example + i q_row + h d_head.
        rest: row e n_pos + j ends in the keys of all heads and then their values.
        turned, scores: room for 16 d_head numbers, all finite, and for 16 n_pos; much slower if not at multiples
            of 64 bytes.
        sums: [example, head, block of queries, 2, 16], receives the largest scaled score and 1 / the sum over keys.
        z: query i of head h of example e begins at e z_strides[0] + h z_strides[1] + i z_strides[2].
    """
    n_queries = len(n_keys)
    kept = 0
    for example in range(len(rest) // (n_pos * rest_row)):
        for head in range(n_heads):
            key = example * n_pos * rest_row + rest_row + (head - 2 * n_heads) * d_head
            value = key + n_heads * d_head
            _fetch_next(rest, n_pos * rest_row, head, n_heads, example)
            for first in range(0, n_queries, WIDTH):
                n = min(WIDTH, n_queries - first)
                seen = n_keys[first + n - 1]
                query = example * q_example + first * q_row + head * d_head
                _scores(q, query, q_row, n, d_head, rest, key, rest_row, n_keys, first, turned, scores)
                top = spread(LOWEST)
                for j in range(seen):
                    top = larger(top, load(scores, j * WIDTH, WIDTH, ZERO))
                top, total = times(top, spread(scale)), spread(ZERO)
                for j in range(seen):
                    each = _share(scores, j, scale, top)
                    store(scores, j * WIDTH, WIDTH, each)
                    total = plus(total, each)
                inverse = over(spread(ONE), total)
                store(sums, kept, WIDTH, top)
                store(sums, kept + WIDTH, WIDTH, inverse)
                kept += 2 * WIDTH
                for j in range(seen):
                    store(scores, j * WIDTH, WIDTH, times(load(scores, j * WIDTH, WIDTH, ZERO), inverse))
                to = example * z_strides[0] + head * z_strides[1] + first * z_strides[2]
                _product(z, to, z_strides[2], False, scores, 0, 1, WIDTH, rest, value, rest_row, seen, n, d_head)


@njit(**OPTIONS)
def _share(scores, j, scale, top):
    """exp(scale scores - top) of one key."""
    return exp(minus(times(load(scores, j * WIDTH, WIDTH, ZERO), spread(scale)), top))


@_kept
def attention_backward(
    q, q_example, q_row, rest, rest_row, n_pos, n_keys, scale, n_heads, d_head, turned, pattern, sums,
    dz, z_strides, dscores, dkeys, dvalues, dq, drest,
):  # fmt: skip
    """dq and drest of `attention`, from its sums and dz, laid out like z; dkeys and dvalues: room for n_pos d_head."""
    n_queries = len(n_keys)
    step, kept = z_strides[2], 0
    for example in range(len(rest) // (n_pos * rest_row)):
        for head in range(n_heads):
            key = example * n_pos * rest_row + rest_row + (head - 2 * n_heads) * d_head
            value = key + n_heads * d_head
            _fetch_next(rest, n_pos * rest_row, head, n_heads, example)
            _fetch_next(dz, n_queries * n_heads * d_head, head, n_heads, example)
            for at in range(n_pos * d_head):
                dkeys[at], dvalues[at] = ZERO, ZERO
            for first in range(0, n_queries, WIDTH):
                n = min(WIDTH, n_queries - first)
                seen = n_keys[first + n - 1]
                query = example * q_example + first * q_row + head * d_head
                back = example * z_strides[0] + head * z_strides[1] + first * step
                _scores(q, query, q_row, n, d_head, rest, key, rest_row, n_keys, first, turned, pattern)
                _turned(dz, back, step, n, d_head, turned)
                _product(dscores, 0, WIDTH, False, rest, value, rest_row, 1, turned, 0, WIDTH, d_head, seen, WIDTH)
                top, inverse = load(sums, kept, WIDTH, ZERO), load(sums, kept + WIDTH, WIDTH, ZERO)
                kept += 2 * WIDTH
                inner = spread(ZERO)  # softmax's backward needs the sum over keys of pattern dpattern
                for j in range(seen):
                    each = times(_share(pattern, j, scale, top), inverse)
                    store(pattern, j * WIDTH, WIDTH, each)
                    inner = plus(inner, times(each, load(dscores, j * WIDTH, WIDTH, ZERO)))
                for j in range(seen):
                    each = times(load(pattern, j * WIDTH, WIDTH, ZERO), spread(scale))
                    change = minus(load(dscores, j * WIDTH, WIDTH, ZERO), inner)
                    store(dscores, j * WIDTH, WIDTH, times(each, change))
                _product(dvalues, 0, d_head, True, pattern, 0, WIDTH, 1, dz, back, step, n, seen, d_head)
                _product(dq, query, q_row, False, dscores, 0, 1, WIDTH, rest, key, rest_row, seen, n, d_head)
                _product(dkeys, 0, d_head, True, dscores, 0, WIDTH, 1, q, query, q_row, n, seen, d_head)
            _copy_rows(dkeys, drest, key, rest_row, n_pos, d_head)
            _copy_rows(dvalues, drest, value, rest_row, n_pos, d_head)


@njit(**OPTIONS)
def _copy_rows(x, out, to, out_row, n_rows, n_numbers):
    for row in range(n_rows):
        for d in range(0, n_numbers, WIDTH):
            n = min(WIDTH, n_numbers - d)
            store(out, to + row * out_row + d, n, load(x, row * n_numbers + d, n, ZERO))


@_kept
def softmax(logits, scale, bias, target, others, away, along):
    """Of the logits y = scale x + bias of each row, in place: softmax(y) - onehot(target).

    Args:
        logits: x, flat [row, class]. scale: [row], positive. bias: [class]. target: [row].
        others: receives the sum over all classes but the target of exp(y - top). away: y - top of the target.
        along: the derivative of the loss by scale, the sum over classes of x times what `logits` becomes.
    """
    n_classes = len(bias)
    spare = np.empty(WIDTH, np.float32)
    for row in range(len(target)):
        start, by, top = row * n_classes, spread(scale[row]), spread(LOWEST)
        for c in range(0, n_classes, WIDTH):
            n = min(WIDTH, n_classes - c)
            y = plus(times(load(logits, start + c, n, LOWEST), by), load(bias, c, n, ZERO))
            store(logits, start + c, n, y)
            top = larger(top, y)
        highest = _largest(top, spare)
        own = logits[start + target[row]] - highest
        logits[start + target[row]] = highest + LEAST  # as good as nothing, while the others are summed
        rest, inner, by = spread(ZERO), spread(ZERO), spread(highest)
        for c in range(0, n_classes, WIDTH):
            n = min(WIDTH, n_classes - c)
            y = minus(load(logits, start + c, n, highest + LEAST), by)
            each = exp(y)
            store(logits, start + c, n, each)
            rest = plus(rest, each)
            inner = plus(inner, times(each, minus(y, load(bias, c, n, ZERO))))  # less the top: the gradient sums to 0
        others[row], away[row] = added(rest), own
        share = ONE / (others[row] + np.exp(own))
        along[row] = (added(inner) - others[row] * (own - bias[target[row]])) * share / scale[row]
        logits[start + target[row]] = -others[row]
        for c in range(0, n_classes, WIDTH):
            n = min(WIDTH, n_classes - c)
            store(logits, start + c, n, times(load(logits, start + c, n, ZERO), spread(share)))
