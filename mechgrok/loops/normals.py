"""Normal numbers as torch draws them on a CPU, several times as fast: its Mersenne Twister and Box-Muller, in vectors.

A block of sixteen words makes sixteen numbers: with u = word mod 2^24 / 2^24, the first eight words give lengths
sqrt(-2 log(1 - u)), the others angles 2 pi u; eight cosines come first, then eight sines.
Sources: Matsumoto & Nishimura 1998 (ACM Trans. Model. Comput. Simul. 8, 3), the generator; Box & Muller 1958;
the polynomials are those of Cephes' logf, sinf and cosf.
"""

from collections.abc import Sequence

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from torch import Tensor

from mechgrok.loops.entry import holds
from mechgrok.loops.kept import OPTIONS, keeper, serves
from mechgrok.loops.lanes import FLOATS, INTS, WIDTH, address, call, constant, fma, guard, is_first, operation

kept = keeper()

WORDS, FAR = 624, 397  # of the twister's state, and how far on lies the other word that a new one is made of
LARGEST = 2**24  # words count modulo this
LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
       2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)


class Normals:
    """Streams of N(0, 1) that go on where they stopped, one for each generator, which is left as it is.

    The same numbers as `torch.randn(n, generator=...)` of generators that nothing was drawn from, up to rounding: on a
    CPU, in float32 and for 16 numbers or more by `loops` of our own, if they are wanted, else by torch itself.
    """

    def __init__(self, generators: Sequence[torch.Generator], n: int, like: Tensor, loops: bool = True):
        self._generators, self._n, self._like = list(generators), n, like
        self._own = loops and serves(like) and n >= WIDTH
        if self._own:
            # Torch seeds the twister with the last 32 bits, as NumPy's RandomState does.
            seeds = [generator.initial_seed() & 0xFFFF_FFFF for generator in self._generators]
            self._words = np.zeros((len(seeds), 2 * WORDS + 2 * WIDTH), np.uint32)
            for words, seed in zip(self._words, seeds, strict=True):
                words[:WORDS] = np.random.RandomState(seed).get_state(legacy=False)["state"]["key"]
            self._at = np.full(len(seeds), WORDS)  # as many are used up

    def __call__(self) -> Tensor:
        """The next n numbers of each: Float[generator, n]."""
        if self._own:
            drawn = torch.empty(len(self._generators), self._n, dtype=torch.float32)
            n = len(drawn)
            holds("fill", words=(self._words, n * (2 * WORDS + 2 * WIDTH)), at=(self._at, n), out=(drawn, n * WIDTH))
            _fill(self._words, self._at, drawn.numpy())
            return drawn
        dtype, device = self._like.dtype, self._like.device
        return torch.stack(
            [torch.randn(self._n, generator=each, dtype=dtype, device=device) for each in self._generators]
        )


@operation(types.void)
def _twist(builder, words, at):
    """Make sixteen words, 624 after those at `at`."""

    def read(ahead: int) -> ir.Value:
        begin = builder.add(at, at.type(ahead))
        guard(builder, words, begin, at.type(WIDTH))
        return builder.load(builder.bitcast(address(builder, words, begin), INTS.as_pointer()), align=4)

    here, following = builder.and_(read(0), constant(1 << 31, INTS)), builder.and_(read(1), constant(2**31 - 1, INTS))
    both = builder.or_(here, following)
    odd = builder.sub(constant(0, INTS), builder.and_(both, constant(1, INTS)))  # all bits, or none
    new = builder.xor(read(FAR), builder.lshr(both, constant(1, INTS)))
    new = builder.xor(new, builder.and_(odd, constant(0x9908B0DF, INTS)))
    begin = builder.add(at, at.type(WORDS))
    guard(builder, words, begin, at.type(WIDTH))
    builder.store(new, builder.bitcast(address(builder, words, begin), INTS.as_pointer()), align=4)


def _tempered(builder: ir.IRBuilder, words: ir.Value, at: ir.Value) -> ir.Value:
    """Sixteen words as they are given out, modulo 2^24."""
    guard(builder, words, at, at.type(WIDTH))
    x = builder.load(builder.bitcast(address(builder, words, at), INTS.as_pointer()), align=4)
    x = builder.xor(x, builder.lshr(x, constant(11, INTS)))
    for by, mask in ((7, 0x9D2C5680), (15, 0xEFC60000)):
        x = builder.xor(x, builder.and_(builder.shl(x, constant(by, INTS)), constant(mask, INTS)))
    x = builder.xor(x, builder.lshr(x, constant(18, INTS)))
    return builder.and_(x, constant(LARGEST - 1, INTS))


def _series(builder: ir.IRBuilder, coefficients: Sequence[float], x: ir.Value) -> ir.Value:
    total = constant(np.float32(coefficients[0]))
    for c in coefficients[1:]:
        total = fma(builder, total, x, constant(np.float32(c)))
    return total


def _log(builder: ir.IRBuilder, whole: ir.Value) -> ir.Value:
    """log(whole / 2^24) of whole numbers from 1 to 2^24."""
    bits = builder.bitcast(builder.sitofp(whole, FLOATS), INTS)
    fraction = builder.and_(bits, constant(2**23 - 1, INTS))
    large = builder.zext(builder.icmp_unsigned(">", fraction, constant(0x3504F3, INTS)), INTS)  # above sqrt 2
    exponent = builder.sub(builder.add(builder.lshr(bits, constant(23, INTS)), large), constant(127 + 24, INTS))
    one = builder.sub(constant(127 << 23, INTS), builder.shl(large, constant(23, INTS)))  # 1, or 1 / 2
    x = builder.fsub(builder.bitcast(builder.or_(fraction, one), FLOATS), constant(1))
    e, square = builder.sitofp(exponent, FLOATS), builder.fmul(x, x)
    y = builder.fmul(builder.fmul(_series(builder, LOG, x), square), x)
    y = fma(builder, e, constant(np.float32(-2.12194440e-4)), y)  # ln 2 in two parts, the second exact
    y = fma(builder, square, constant(-0.5), y)
    return fma(builder, e, constant(0.693359375), builder.fadd(x, y))


def _circle(builder: ir.IRBuilder, whole: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(cos, sin) of 2 pi whole / 2^24."""
    quarter = builder.lshr(builder.add(whole, constant(LARGEST // 8, INTS)), constant(22, INTS))  # the nearest
    rest = builder.sitofp(builder.sub(whole, builder.shl(quarter, constant(22, INTS))), FLOATS)
    x = builder.fmul(rest, constant(np.float32(2 * np.pi / LARGEST)))
    square = builder.fmul(x, x)
    sin = fma(builder, builder.fmul(_series(builder, SIN, square), square), x, x)
    cos = fma(builder, square, constant(-0.5), constant(1))
    cos = fma(builder, builder.fmul(_series(builder, COS, square), square), square, cos)
    turned = builder.icmp_unsigned("!=", builder.and_(quarter, constant(1, INTS)), constant(0, INTS))

    def signed(x: ir.Value, ahead: int) -> ir.Value:
        """-x where the quarter, and so many more, end in a negative half."""
        two = builder.and_(builder.add(quarter, constant(ahead, INTS)), constant(2, INTS))
        sign = builder.shl(two, constant(30, INTS))
        return builder.bitcast(builder.xor(builder.bitcast(x, INTS), sign), FLOATS)

    return signed(builder.select(turned, sin, cos), 1), signed(builder.select(turned, cos, sin), 0)


@operation(types.void)
def _box_muller(builder, words, at, out, to, n):
    """Sixteen numbers of as many words, and another sixteen of the following if n is 32."""
    pair = [_tempered(builder, words, builder.add(at, at.type(ahead))) for ahead in (0, WIDTH)]
    half = WIDTH // 2
    halves = [
        ir.Constant(INTS, [*range(first, first + half), *range(first + WIDTH, first + WIDTH + half)])
        for first in (0, half)
    ]
    lengths, angles = (builder.shuffle_vector(*pair, which) for which in halves)
    log = _log(builder, builder.sub(constant(LARGEST, INTS), lengths))
    length = call(builder, "sqrt.v16f32", FLOATS, builder.fmul(log, constant(-2)))
    found = [builder.fmul(length, part) for part in _circle(builder, angles)]
    for place, which in enumerate(halves):
        left, begin = builder.sub(n, n.type(place * WIDTH)), builder.add(to, to.type(place * WIDTH))
        guard(builder, out, begin, left)
        there, goes = is_first(builder, left), address(builder, out, begin)
        given = (builder.shuffle_vector(*found, which), goes, ir.Constant(ir.IntType(32), 4), there)
        call(builder, "masked.store.v16f32.p0", ir.VoidType(), *given)


@njit(**OPTIONS)
def _next(words, at):
    """Where the words from `at` on stand, once the first 624 are used up: then the next ones are moved there."""
    if at < WORDS:
        return at
    for begin in range(0, WORDS, WIDTH):
        _twist(words, begin)
    for place in range(WORDS):
        words[place] = words[place + WORDS]
    # A block may reach over the end.
    for begin in range(0, 2 * WIDTH, WIDTH):
        _twist(words, begin)
    return at - WORDS


@kept
def _fill(words, at, out):
    """Each row of `out` from the words of its own, as torch fills it: a rest of n mod 16 is passed over, and the last
    sixteen numbers are made anew.
    """
    for row in range(len(out)):
        own, numbers, now, n = words[row], out[row], at[row], out.shape[1]
        for to in range(0, n - WIDTH + 1, 2 * WIDTH):
            now = _next(own, now)
            here = min(2 * WIDTH, (n - to) // WIDTH * WIDTH)
            _box_muller(own, now, numbers, to, here)
            now += here
        if n % WIDTH:
            now = _next(own, now + n % WIDTH)
            _box_muller(own, now, numbers, n - WIDTH, WIDTH)
            now += WIDTH
        at[row] = now
