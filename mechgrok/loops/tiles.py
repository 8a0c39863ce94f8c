"""Pieces of matrix products whose sums stay in the processor's registers, for loops that numba compiles."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from mechgrok.loops.lanes import (
    FLOATS,
    INTS,
    WIDTH,
    address,
    call,
    constant,
    fma,
    guard,
    int32,
    into_dots,
    is_first,
    operation,
    put_lanes,
    spread_out,
)

FEW_TERMS = 8  # as many lanes of each of two groups leave half of the registers free


@dataclass(frozen=True)
class Terms:
    """What the factors of a product are, how a term adds to a sum, and whether each row and lane has a scale.

    Where it has, sums are multiplied by both; they stand where the term after the last one would.
    """

    name: str
    kind: ir.VectorType
    into: Callable[..., ir.Value]
    scaled: bool = False


FLOAT_TERMS = Terms("floats", FLOATS, lambda builder, total, a, b: fma(builder, a, b, total))
PAIR_TERMS = Terms("pairs", INTS, into_dots, scaled=True)


def tile(terms: Terms, n_rows: int, n_groups: int, strides: tuple[int, int] | None = None) -> Any:
    """An operation that makes a piece of a product.

    out[r, l] = sum over t of a[r, t] x[t, l], and if `add` what stood `since` numbers after it, for n_rows rows and
    n_groups times sixteen lanes, of the last of which n are there. out[r, l] stands at to + out_row r + l, a[r, t] at
    `at` + a_row r + a_term t, and sixteen lanes of x[t] at of + x_term t, the next sixteen x_group after them.

    strides: (a_row, a_term) where they are known, and then whatever is given for them is not looked at: the processor
    takes rows that lie at fixed distances without counting for each where it is.
    """

    @operation(types.void)
    def piece(builder, out, to, out_row, add, since, a, at, a_row, a_term, x, of, x_term, x_group, n_terms, n):
        if strides is not None:
            a_row, a_term = (at.type(stride) for stride in strides)
        left = [n if group == n_groups - 1 else n.type(WIDTH) for group in range(n_groups)]
        there = [is_first(builder, each) for each in left]
        cells = [(row, group) for row in range(n_rows) for group in range(n_groups)]
        places = {
            (row, group): builder.add(_along(builder, to, out_row, row), to.type(group * WIDTH)) for row, group in cells
        }
        sums = {cell: cgutils.alloca_once_value(builder, constant(0, terms.kind)) for cell in cells}
        before = {cell: cgutils.alloca_once_value(builder, constant(0)) for cell in cells} if terms.scaled else sums
        with builder.if_then(add):
            for cell in cells:
                place = builder.add(places[cell], since)
                builder.store(_masked(builder, out, place, there[cell[1]], left[cell[1]]), before[cell])

        def lanes_of(term: ir.Value) -> list[ir.Value]:
            begin = _along(builder, of, x_term, term)
            places = (_along(builder, begin, x_group, group) for group in range(n_groups))
            return [_masked(builder, x, *each) for each in zip(places, there, left, strict=True)]

        with cgutils.for_range(builder, n_terms) as term:
            term_at = _along(builder, at, a_term, term.index)
            found = [builder.bitcast(y, terms.kind) for y in lanes_of(term.index)]
            for row in range(n_rows):
                each = builder.bitcast(_everywhere(builder, a, _along(builder, term_at, a_row, row)), terms.kind)
                for group, y in enumerate(found):
                    held = sums[row, group]
                    builder.store(terms.into(builder, builder.load(held), each, y), held)
        if terms.scaled:
            scales, after = lanes_of(n_terms), _along(builder, at, a_term, n_terms)
            for row, group in cells:
                by = _everywhere(builder, a, _along(builder, after, a_row, row))
                total = builder.fmul(builder.sitofp(builder.load(sums[row, group]), FLOATS), scales[group])
                builder.store(fma(builder, total, by, builder.load(before[row, group])), before[row, group])
        with builder.if_else(builder.icmp_signed(">=", n, n.type(WIDTH))) as (whole, some):
            for branch, counts in ((whole, [n.type(WIDTH)] * n_groups), (some, left)):
                with branch:
                    for cell in cells:
                        guard(builder, out, places[cell], counts[cell[1]])
                        place = address(builder, out, places[cell])
                        put_lanes(builder, builder.load(before[cell]), place, counts[cell[1]])

    return piece


def rows_of_few_terms(n_groups: int) -> Any:
    """Like `tile`, for any number of rows and eight terms, a_term being 1: the lanes of x stay in registers."""

    @operation(types.void)
    def rows(builder, out, to, out_row, add, since, a, at, a_row, x, of, x_term, x_group, n_rows, n):
        groups = range(n_groups)
        left = [n if group == n_groups - 1 else n.type(WIDTH) for group in groups]
        there = [is_first(builder, each) for each in left]
        held = [
            [
                _masked(
                    builder,
                    x,
                    _along(builder, _along(builder, of, x_term, term), x_group, group),
                    there[group],
                    left[group],
                )  # fmt: skip
                for group in groups
            ]
            for term in range(FEW_TERMS)
        ]

        def each_row(added: bool) -> None:
            with cgutils.for_range(builder, n_rows) as row:
                start, begin = _along(builder, to, out_row, row.index), _along(builder, at, a_row, row.index)
                places = [builder.add(start, to.type(group * WIDTH)) for group in groups]
                sums = [
                    _masked(builder, out, builder.add(places[group], since), there[group], left[group])
                    if added
                    else constant(0)
                    for group in groups
                ]
                for term, of_term in enumerate(held):
                    each = _everywhere(builder, a, builder.add(begin, at.type(term)))
                    sums = [fma(builder, each, of_term[group], sums[group]) for group in groups]
                for group in groups:
                    guard(builder, out, places[group], left[group])
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


def _masked(builder: ir.IRBuilder, array: ir.Value, place: ir.Value, there: ir.Value, n: ir.Value) -> ir.Value:
    """The lanes that are there, the first n, and 0 in all others."""
    guard(builder, array, place, n)
    given = (address(builder, array, place), int32(4), there, constant(0))
    return call(builder, "masked.load.v16f32.p0", FLOATS, *given)


def _everywhere(builder: ir.IRBuilder, array: ir.Value, place: ir.Value) -> ir.Value:
    """One number of an array in all lanes."""
    guard(builder, array, place, place.type(1))
    return spread_out(builder, builder.load(builder.gep(array, [place])))
