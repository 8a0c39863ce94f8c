"""Rows and columns as whole numbers of sixteen bits, two to a lane, as loops that numba compiles.

A processor that multiplies int16s does two products where it does one of float32s. A vector becomes int16s relative to
its own length, so that no sum of products with another overflows, and a scale: what the sum is to be multiplied by. Its
numbers are off by 1.5e-5 of its length at most, and a product by 1e-5 or so of that of both lengths. The order of loops
is ours.
"""

from numba import njit
from numba.extending import register_jitable

from mechgrok.loops.kept import OPTIONS
from mechgrok.loops.lanes import WIDTH, added, load, number, one_of, over, pairs, plus, root, spread, store, times
from mechgrok.replicas.products import ONE, ZERO, loop, padded

PANEL = 256  # terms that are summed as whole numbers, all relative to one scale, a multiple of thirty-two
LARGEST = number(32767)  # of a vector as int16s, its length: so no sum of products passes 2^30
TINY = number(1e-36)  # added to squared lengths, so that a vector of zeros has a scale


@register_jitable
def pairs_of(n: int) -> int:
    """How many pairs hold n numbers."""
    return (n + 1) // 2


@register_jitable
def rows_of_pairs(n: int) -> int:
    """How many rows n terms take as pairs, with their scales after each `PANEL` of them."""
    rest = n % PANEL
    return n // PANEL * (PANEL // 2 + 1) + (pairs_of(rest) + 1 if rest else 0)


@register_jitable
def row_of_pairs(n: int) -> int:
    """How far rows of n terms as pairs begin from one another: no vector of them lies across two lines of the cache."""
    return padded(rows_of_pairs(n))


@register_jitable
def rows_laid_out(n: int, half: bool) -> int:
    """How many rows a matrix of n terms takes as products read it; half: as pairs."""
    return rows_of_pairs(n) if half else n


@register_jitable
def other_of(n: int, c: int) -> tuple[int, int]:
    """Of n terms, those from c on, a multiple of thirty-two: how many pairs come of the next thirty-two, and how many
    of these pairs have a second number. A pair is of terms as far apart as the first number says.
    """
    left = min(2 * WIDTH, n - c)
    return pairs_of(left), left // 2


@loop
def scale_of(squares):
    """(by what vectors of these squared lengths are multiplied to be int16s, by what products are in the end)."""
    back = times(root(plus(squares, spread(TINY))), spread(ONE / LARGEST))
    return over(spread(ONE), back), back


@njit(**OPTIONS)
def _squares(x, at, half, second):
    """Of two times sixteen numbers, or as many as there are."""
    y, z = load(x, at, half, ZERO), load(x, at + half, second, ZERO)
    return plus(times(y, y), times(z, z))


@njit(**OPTIONS)
def _put_pairs(x, at, half, second, by, out, to):
    store(out, to, half, pairs(load(x, at, half, ZERO), load(x, at + half, second, ZERO), by))


@loop
def pair_terms(x, at, n_rows, n, out, to):
    """Each row of n numbers as pairs, and the scale of each `PANEL` of them after these."""
    width = row_of_pairs(n)
    for panel in range(0, n, PANEL):
        end, some = to + rows_of_pairs(panel), min(PANEL, n - panel)
        last, whole = end + pairs_of(some), some // (2 * WIDTH) * 2 * WIDTH
        half, second = other_of(some, whole)
        for row in range(n_rows):
            here, squares = at + row * n + panel, spread(ZERO)
            for c in range(0, whole, 2 * WIDTH):
                squares = plus(squares, _squares(x, here + c, WIDTH, WIDTH))
            if half:
                squares = plus(squares, _squares(x, here + whole, half, second))
            out[last + row * width] = added(squares)
        for row in range(n_rows):
            here, begin = at + row * n + panel, end + row * width
            by, back = scale_of(spread(out[last + row * width]))
            for c in range(0, whole, 2 * WIDTH):
                _put_pairs(x, here + c, WIDTH, WIDTH, by, out, begin + c // 2)
            if half:
                _put_pairs(x, here + whole, half, second, by, out, begin + whole // 2)
            store(out, last + row * width, 1, back)


@njit(**OPTIONS)
def _pair_columns(x, at, some, n, left, out, to):
    """Of the next sixteen columns, or as many as are left, each two rows as one of pairs, and then their scales."""
    squares, others = spread(ZERO), spread(ZERO)
    for row in range(0, some - 1, 2):
        y, z = load(x, at + row * n, left, ZERO), load(x, at + (row + 1) * n, left, ZERO)
        squares, others = plus(squares, times(y, y)), plus(others, times(z, z))
    if some % 2:
        y = load(x, at + (some - 1) * n, left, ZERO)
        squares = plus(squares, times(y, y))
    by, back = scale_of(plus(squares, others))
    for row in range(0, some - 1, 2):
        y, z = load(x, at + row * n, left, ZERO), load(x, at + (row + 1) * n, left, ZERO)
        store(out, to + row // 2 * n, left, pairs(y, z, by))
    if some % 2:
        y = load(x, at + (some - 1) * n, left, ZERO)
        store(out, to + some // 2 * n, left, pairs(y, spread(ZERO), by))
    store(out, to + pairs_of(some) * n, left, back)


@loop
def pair_rows(x, at, n_rows, n, out, to):
    """Each two rows as one of pairs, zeros with one that is left over, and after `PANEL` rows their columns' scales."""
    for panel in range(0, n_rows, PANEL):
        some, start, end = min(PANEL, n_rows - panel), at + panel * n, to + rows_of_pairs(panel) * n
        whole = n // WIDTH * WIDTH
        for c in range(0, whole, WIDTH):
            _pair_columns(x, start + c, some, n, WIDTH, out, end + c)
        if n % WIDTH:
            _pair_columns(x, start + whole, some, n, n % WIDTH, out, end + whole)


@njit(**OPTIONS)
def _unpaired(x, at, scale, half, high):
    """The first or the second numbers of some pairs of a row, with its scale."""
    return times(one_of(load(x, at, half, ZERO), high), spread(x[scale]))


@njit(**OPTIONS)
def _turn_columns(x, at, some, n, c, half, count, high, out, to):
    """What `_pair_columns` makes, of numbers that stand first or second in pairs of their rows."""
    width = row_of_pairs(n)
    place, scale = at + c // 2, at + pairs_of(n)
    squares, others = spread(ZERO), spread(ZERO)
    for row in range(0, some - 1, 2):
        y = _unpaired(x, place + row * width, scale + row * width, half, high)
        z = _unpaired(x, place + (row + 1) * width, scale + (row + 1) * width, half, high)
        squares, others = plus(squares, times(y, y)), plus(others, times(z, z))
    if some % 2:
        y = _unpaired(x, place + (some - 1) * width, scale + (some - 1) * width, half, high)
        squares = plus(squares, times(y, y))
    by, back = scale_of(plus(squares, others))
    for row in range(0, some - 1, 2):
        y = _unpaired(x, place + row * width, scale + row * width, half, high)
        z = _unpaired(x, place + (row + 1) * width, scale + (row + 1) * width, half, high)
        store(out, to + row // 2 * n, count, pairs(y, z, by))
    if some % 2:
        y = _unpaired(x, place + (some - 1) * width, scale + (some - 1) * width, half, high)
        store(out, to + some // 2 * n, count, pairs(y, spread(ZERO), by))
    store(out, to + pairs_of(some) * n, count, back)


@loop
def turn_pairs(x, at, n_rows, n, out, to):
    """From what `pair_terms` made of n <= `PANEL` numbers in each row, what `pair_rows` makes."""
    width = row_of_pairs(n)
    for panel in range(0, n_rows, PANEL):
        some, start, end = min(PANEL, n_rows - panel), at + panel * width, to + rows_of_pairs(panel) * n
        whole = n // (2 * WIDTH) * 2 * WIDTH
        for c in range(0, whole, 2 * WIDTH):
            _turn_columns(x, start, some, n, c, WIDTH, WIDTH, False, out, end + c)
            _turn_columns(x, start, some, n, c, WIDTH, WIDTH, True, out, end + c + WIDTH)
        half, second = other_of(n, whole)
        if half:
            _turn_columns(x, start, some, n, whole, half, half, False, out, end + whole)
        if second:
            _turn_columns(x, start, some, n, whole, half, second, True, out, end + whole + half)


@loop
def place_of_row(n, row):
    """Of n rows of sixteen columns that are there as pairs, where one is: (the numbers before it, whether it is second
    in its pairs, the numbers before its scales).
    """
    panel = row // PANEL * PANEL
    some, c, first = min(PANEL, n - panel), (row - panel) // (2 * WIDTH) * 2 * WIDTH, rows_of_pairs(panel)
    half, _ = other_of(some, c)
    place = row - panel - c
    return (first + c // 2 + place % half) * WIDTH, place >= half, (first + pairs_of(some)) * WIDTH
