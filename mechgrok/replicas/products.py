"""Matrix products of a few rows at a time, as loops that numba compiles. All arrays are flat."""

from collections.abc import Callable
from typing import Any

from numba.extending import overload, register_jitable

from mechgrok.loops.kept import OPTIONS, named
from mechgrok.loops.lanes import WIDTH, gated, larger, load, number, plus, spread, store
from mechgrok.loops.tiles import FEW_TERMS, FLOAT_TERMS, PAIR_TERMS, Terms, rows_of_few_terms, tile

ZERO, ONE = number(0), number(1)
LOWEST = number(-1e30)  # a score that nothing sees: finite, so that no difference of two is NaN


def loop(function: Callable[..., Any]) -> Any:
    """Make it callable in compiled loops, and compiled once: `njit` by itself would compile it anew for every
    combination of arguments that are literals where it is called.

    Raises what `named` does.
    """
    function = named(function)

    def called(*_: Any) -> None:
        raise TypeError(f"{function.__name__} is for compiled loops alone")

    options: Any = OPTIONS
    overload(called, jit_options=options, strict=False)(lambda *_: function)
    return called


def _strip_by(terms: Terms, n_groups: int) -> Any:
    """A product of no more lanes than n_groups times sixteen, the last of which there are n of."""
    eight, four, two, one = (tile(terms, rows, n_groups) for rows in (8, 4, 2, 1))

    def strip(out, to, out_row, add, since, a, at, a_row, a_term, x, of, x_term, x_group, n_terms, n_rows, n):
        r = 0
        while r + 8 <= n_rows:
            eight(
                out, to + r * out_row, out_row, add, since, a, at + r * a_row, a_row, a_term,
                x, of, x_term, x_group, n_terms, n,
            )  # fmt: skip
            r += 8
        # A row by itself would wait for each sum before the next term, so those left over go together.
        if r + 4 <= n_rows:
            four(
                out, to + r * out_row, out_row, add, since, a, at + r * a_row, a_row, a_term,
                x, of, x_term, x_group, n_terms, n,
            )  # fmt: skip
            r += 4
        if r + 2 <= n_rows:
            two(
                out, to + r * out_row, out_row, add, since, a, at + r * a_row, a_row, a_term,
                x, of, x_term, x_group, n_terms, n,
            )  # fmt: skip
            r += 2
        if r < n_rows:
            one(
                out, to + r * out_row, out_row, add, since, a, at + r * a_row, a_row, a_term,
                x, of, x_term, x_group, n_terms, n,
            )  # fmt: skip

    strip.__qualname__ = f"strip_of_{terms.name}_by_{n_groups}"
    return loop(strip)


def _product_of(terms: Terms) -> Any:
    wide, narrow = _strip_by(terms, 2), _strip_by(terms, 1)  # eight rows of 32 sums are what AVX-512's registers hold

    def made(out, to, out_row, add, since, a, at, a_row, a_term, x, of, x_term, x_group, n_terms, n_rows, n_lanes):
        for lane in range(0, n_lanes, 2 * WIDTH):
            n, here, group = n_lanes - lane, to + lane, of + lane // WIDTH * x_group
            if n > WIDTH:
                last = min(WIDTH, n - WIDTH)
                wide(
                    out,
                    here,
                    out_row,
                    add,
                    since,
                    a,
                    at,
                    a_row,
                    a_term,
                    x,
                    group,
                    x_term,
                    x_group,
                    n_terms,
                    n_rows,
                    last,
                )
            else:
                narrow(
                    out, here, out_row, add, since, a, at, a_row, a_term, x, group, x_term, x_group, n_terms, n_rows, n
                )

    made.__qualname__ = f"product_of_{terms.name}"
    return loop(made)


_one_group, _two_groups = rows_of_few_terms(1), rows_of_few_terms(2)


@loop
def _few_terms(out, to, out_row, add, since, a, at, a_row, x, of, x_term, x_group, n_terms, n_rows, n_lanes):
    """A product of eight terms or sixteen, whose rows are too soon done for tiles to pay."""
    for lane in range(0, n_lanes, 2 * WIDTH):
        n, here, group = n_lanes - lane, to + lane, of + lane // WIDTH * x_group
        for term in range(0, n_terms, FEW_TERMS):
            more, start, begin = add or term > 0, at + term, group + term * x_term
            beside = 0 if term > 0 else since
            if n > WIDTH:
                last = min(WIDTH, n - WIDTH)
                _two_groups(out, here, out_row, more, beside, a, start, a_row, x, begin, x_term, x_group, n_rows, last)
            else:
                _one_group(out, here, out_row, more, beside, a, start, a_row, x, begin, x_term, x_group, n_rows, n)


_any_terms = _product_of(FLOAT_TERMS)


@loop
def product(out, to, out_row, add, since, a, at, a_row, a_term, x, of, x_term, x_group, n_terms, n_rows, n_lanes):
    """out[r, l] = sum over t of a[r, t] x[t, l], and if `add` what stood `since` numbers after it, any number of rows,
    terms and lanes.

    The arrays are flat, and where each begins and its strides are given, as `tiles.tile` takes them.
    """
    if a_term == 1 and (n_terms == FEW_TERMS or n_terms == 2 * FEW_TERMS):
        _few_terms(out, to, out_row, add, since, a, at, a_row, x, of, x_term, x_group, n_terms, n_rows, n_lanes)
    else:
        _any_terms(out, to, out_row, add, since, a, at, a_row, a_term, x, of, x_term, x_group, n_terms, n_rows, n_lanes)


# The same where each number of a and x is a pair of int16s, and so each term two. What is made of a row of a, or of a
# lane of x, is multiplied by its scale, a[r, n_terms] or x[n_terms, l].
product_of_pairs = _product_of(PAIR_TERMS)


@register_jitable
def padded(n: int) -> int:
    """n, or the next multiple of sixteen."""
    return (n + WIDTH - 1) // WIDTH * WIDTH


@loop
def row_plus(x, at, add, out, to, n):
    """out (+)= x, n numbers."""
    for c in range(0, n, WIDTH):
        left = min(WIDTH, n - c)
        y = load(x, at + c, left, ZERO)
        store(out, to + c, left, plus(load(out, to + c, left, ZERO), y) if add else y)


@loop
def copy(x, at, n, out, to):
    """out = x, n numbers."""
    row_plus(x, at, False, out, to, n)


@loop
def clear(out, to, n):
    """out = 0, n numbers."""
    nothing = spread(ZERO)
    for c in range(0, n, WIDTH):
        store(out, to + c, min(WIDTH, n - c), nothing)


@loop
def rectify(x, at, n):
    """x = max(x, 0), n numbers."""
    nothing = spread(ZERO)
    for c in range(0, n, WIDTH):
        left = min(WIDTH, n - c)
        store(x, at + c, left, larger(nothing, load(x, at + c, left, ZERO)))


@loop
def gate(x, at, n, y, of):
    """y = 0 where x is not positive, n numbers."""
    for c in range(0, n, WIDTH):
        left = min(WIDTH, n - c)
        store(y, of + c, left, gated(load(x, at + c, left, ZERO), load(y, of + c, left, ZERO)))
