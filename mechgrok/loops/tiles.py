"""Pieces of matrix products whose sums stay in the processor's registers, for loops that numba compiles."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from mechgrok.loops.lanes import (
    FLOATS,
    WIDTH,
    address,
    call,
    constant,
    fma,
    int32,
    is_first,
    operation,
    put_lanes,
    spread_out,
)

FEW_TERMS = 8  # as many lanes of each of two groups leave half of the registers free


def into_times(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """total + a b."""
    return fma(builder, a, b, total)


def tile(into: Callable[..., ir.Value], n_rows: int, n_groups: int, strides: tuple[int, int] | None = None) -> Any:
    """An operation that makes a piece of a product.

    out[r, l] (+)= sum over t of a[r, t] x[t, l], each term by `into`, for n_rows rows and n_groups times sixteen lanes,
    of the last of which n are there. out[r, l] stands at to + out_row r + l, a[r, t] at `at` + a_row r + a_term t, and
    sixteen lanes of x[t] at of + x_term t, the next sixteen x_group after them.

    strides: (a_row, a_term) where they are known, and then whatever is given for them is not looked at: the processor
    takes rows that lie at fixed distances without counting for each where it is.
    """

    @operation(types.void)
    def piece(builder, out, to, out_row, add, a, at, a_row, a_term, x, of, x_term, x_group, n_terms, n):
        if strides is not None:
            a_row, a_term = (at.type(stride) for stride in strides)
        left = [n if group == n_groups - 1 else n.type(WIDTH) for group in range(n_groups)]
        there = [is_first(builder, each) for each in left]
        cells = [(row, group) for row in range(n_rows) for group in range(n_groups)]
        places = {
            (row, group): builder.add(_along(builder, to, out_row, row), to.type(group * WIDTH)) for row, group in cells
        }
        sums = {cell: cgutils.alloca_once_value(builder, constant(0)) for cell in cells}
        with builder.if_then(add):
            for cell in cells:
                builder.store(_masked(builder, out, places[cell], there[cell[1]]), sums[cell])
        with cgutils.for_range(builder, n_terms) as term:
            term_at, term_of = _along(builder, at, a_term, term.index), _along(builder, of, x_term, term.index)
            terms = [
                _masked(builder, x, _along(builder, term_of, x_group, group), there[group]) for group in range(n_groups)
            ]
            for row in range(n_rows):
                each = _everywhere(builder, a, _along(builder, term_at, a_row, row))
                for group, y in enumerate(terms):
                    held = sums[row, group]
                    builder.store(into(builder, builder.load(held), each, y), held)
        with builder.if_else(builder.icmp_signed(">=", n, n.type(WIDTH))) as (whole, some):
            for branch, counts in ((whole, [n.type(WIDTH)] * n_groups), (some, left)):
                with branch:
                    for cell in cells:
                        place = address(builder, out, places[cell])
                        put_lanes(builder, builder.load(sums[cell]), place, counts[cell[1]])

    return piece


def rows_of_few_terms(n_groups: int) -> Any:
    """Like `tile`, for any number of rows and eight terms, a_term being 1: the lanes of x stay in registers."""

    @operation(types.void)
    def rows(builder, out, to, out_row, add, a, at, a_row, x, of, x_term, x_group, n_rows, n):
        groups = range(n_groups)
        left = [n if group == n_groups - 1 else n.type(WIDTH) for group in groups]
        there = [is_first(builder, each) for each in left]
        held = [
            [
                _masked(builder, x, _along(builder, _along(builder, of, x_term, term), x_group, group), there[group])
                for group in groups
            ]
            for term in range(FEW_TERMS)
        ]

        def each_row(added: bool) -> None:
            with cgutils.for_range(builder, n_rows) as row:
                start, begin = _along(builder, to, out_row, row.index), _along(builder, at, a_row, row.index)
                places = [builder.add(start, to.type(group * WIDTH)) for group in groups]
                sums = [
                    _masked(builder, out, places[group], there[group]) if added else constant(0) for group in groups
                ]
                for term, of_term in enumerate(held):
                    each = _everywhere(builder, a, builder.add(begin, at.type(term)))
                    sums = [fma(builder, each, of_term[group], sums[group]) for group in groups]
                for group in groups:
                    put_lanes(builder, sums[group], address(builder, out, places[group]), left[group])

        with builder.if_else(add) as (adding, making):
            with adding:
                each_row(True)
            with making:
                each_row(False)

    return rows


def _along(builder: ir.IRBuilder, start: ir.Value, step: ir.Value, times: int | ir.Value) -> ir.Value:
    """start + times step."""
    return builder.add(start, builder.mul(step, step.type(times) if isinstance(times, int) else times))


def _masked(builder: ir.IRBuilder, array: ir.Value, place: ir.Value, there: ir.Value) -> ir.Value:
    """The lanes that are there, and 0 in all others."""
    given = (address(builder, array, place), int32(4), there, constant(0))
    return call(builder, "masked.load.v16f32.p0", FLOATS, *given)


def _everywhere(builder: ir.IRBuilder, array: ir.Value, place: ir.Value) -> ir.Value:
    """One number of an array in all lanes."""
    return spread_out(builder, builder.load(builder.gep(array, [place])))
