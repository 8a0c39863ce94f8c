"""Sixteen float32 numbers at once, for loops that numba compiles: LLVM makes the processor's own vectors of them."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, models, register_model

WIDTH = 16
FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
INTS = ir.VectorType(ir.IntType(32), WIDTH)
_BY_LN_2 = 1.4426950408889634
_ROUNDER = 2**23 + 2**22  # added to this a number loses its fraction, and as a whole one stands in the last bits
CONTRACT = ["contract"]  # a * b + c may be one operation, rounded once


numba_settings: Any = config  # which sets what it holds by their names


def _features() -> set[str]:
    """What numba compiles for: the features that NUMBA_CPU_FEATURES lists, else those of this processor.

    Where NUMBA_CPU_NAME asks for another processor nothing is assumed of it: loops that do without an instruction run
    where there is one, and not the other way round.
    """
    name, listed = numba_settings.CPU_NAME, numba_settings.CPU_FEATURES
    if listed is None:
        listed = get_host_cpu_features() if name is None else ""
    return {feature[1:] for feature in listed.split(",") if feature[:1] == "+"}


_FEATURES = _features()
HAS_VNNI = "avx512vnni" in _FEATURES  # whether `into_dots` is one instruction here
_HAS_PERMUTE = "avx512f" in _FEATURES
HAS_AMX = "amx-bf16" in _FEATURES  # whether there are faster ones, which torch's products have

CHECKED = bool(numba_settings.BOUNDSCHECK)  # NUMBA_BOUNDSCHECK=1: for tests, as it is slow
_SIZES: dict[ir.Value, ir.Value] = {}  # of arrays that operations are given, by where they begin

number = np.float32
LEAST, MOST = number(-87), number(88)  # beyond these `exp` stays where it is, at 1e-38 and 1e38


class Lanes(types.Type):
    """The type, in numba's eyes, of sixteen float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, FLOATS)


lanes = Lanes()


def operation(result: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Make what emits LLVM's instructions callable in loops: arrays come as pointers, whole numbers as intp."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def typed(_typing: Any, *kinds: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                given = []
                for kind, value in zip(signature.args, values, strict=True):
                    if not isinstance(kind, types.Array):
                        given.append(value)
                        continue
                    array = context.make_array(kind)(context, builder, value)
                    given.append(data := array.data)
                    if CHECKED:
                        _SIZES[data] = array.nitems
                made = emit(builder, *given)
                return context.get_dummy_value() if result is types.void else made

            whole = (types.intp if isinstance(kind, types.Integer) else kind for kind in kinds)
            return result(*whole), codegen

        typed.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]  # the context in place of the builder
        typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
        return intrinsic(typed)

    return decorate


def constant(value: Any, kind: ir.VectorType = FLOATS) -> ir.Constant:
    """One number in all lanes."""
    return ir.Constant(kind, [int(value) if kind is INTS else float(value)] * WIDTH)


def int32(value: int) -> ir.Constant:
    """A whole number, as LLVM's own functions take it."""
    return ir.Constant(ir.IntType(32), value)


def spread_out(builder: ir.IRBuilder, value: ir.Value, kind: ir.VectorType = FLOATS) -> ir.Value:
    """One value in all lanes."""
    nothing = ir.Constant(kind, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(nothing, value, int32(0)), nothing, constant(0, INTS))


def is_first(builder: ir.IRBuilder, n: ir.Value) -> ir.Value:
    """Which lanes are among the first n."""
    here = ir.Constant(INTS, list(range(WIDTH)))
    return builder.icmp_signed("<", here, spread_out(builder, builder.trunc(n, ir.IntType(32)), INTS))


def address(builder: ir.IRBuilder, array: ir.Value, at: ir.Value) -> ir.Value:
    """Where sixteen numbers of an array begin."""
    return builder.bitcast(builder.gep(array, [at]), FLOATS.as_pointer())


def guard(builder: ir.IRBuilder, array: ir.Value, at: ir.Value, n: ir.Value) -> None:
    """Stop the process if any of the n lanes from `at` on lies beyond the array, where numba checks bounds.

    By itself it checks single numbers alone.
    """
    if not CHECKED:
        return
    last = builder.add(at, builder.select(builder.icmp_signed("<", n, n.type(WIDTH)), n, n.type(WIDTH)))
    outside = builder.or_(builder.icmp_signed("<", at, at.type(0)), builder.icmp_signed(">", last, _SIZES[array]))
    with builder.if_then(builder.and_(builder.icmp_signed(">", n, n.type(0)), outside)):
        call(builder, "trap", ir.VoidType())


def call(builder: ir.IRBuilder, name: str, result: Any, *args: ir.Value, **flags: Any) -> ir.Value:
    """One of LLVM's own functions."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), args, **flags)


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a b + c."""
    return builder.fadd(builder.fmul(a, b, flags=CONTRACT), c, flags=CONTRACT)


@operation(lanes)
def load(builder, array, at, n, other):
    """The n numbers of a one-dimensional array from `at` on, and `other` in the lanes left, which are not read."""
    guard(builder, array, at, n)
    given = (address(builder, array, at), int32(4), is_first(builder, n), spread_out(builder, other))
    return call(builder, "masked.load.v16f32.p0", FLOATS, *given)


def put_lanes(builder: ir.IRBuilder, x: ir.Value, place: ir.Value, n: ir.Value) -> None:
    """Write the first n lanes of x. All of them without a mask: what a masked store wrote can be read again only when
    it has reached the cache, which takes a processor tens of cycles.
    """
    with builder.if_else(builder.icmp_signed(">=", n, n.type(WIDTH))) as (whole, some):
        with whole:
            builder.store(x, place, align=4)
        with some:
            given = (x, place, int32(4), is_first(builder, n))
            call(builder, "masked.store.v16f32.p0", ir.VoidType(), *given)


@operation(types.void)
def store(builder, array, at, n, x):
    """Write the first n lanes of x to a one-dimensional array from `at` on."""
    guard(builder, array, at, n)
    put_lanes(builder, x, address(builder, array, at), n)


@operation(types.void)
def prefetch(builder, array, at):
    """Have the number at `at` brought into the first cache, to be read, without waiting for it."""
    to_read, near, data = int32(0), int32(3), int32(1)
    call(builder, "prefetch.p0", ir.VoidType(), address(builder, array, at), to_read, near, data)


@operation(types.void)
def turn(builder, x, at, row, n_rows, n, out, to):
    """out[to + 16 d + lane] = x[at + row lane + d], d < n <= 16: rows become lanes; after n_rows the last one again."""
    last = builder.sub(n_rows, n_rows.type(1))
    rows = []
    for lane in range(WIDTH):
        own = n_rows.type(lane)
        own = builder.select(builder.icmp_signed("<", own, last), own, last)
        begin = builder.add(at, builder.mul(own, row))
        guard(builder, x, begin, n)
        place = address(builder, x, begin)
        given = (place, int32(4), is_first(builder, n), constant(0))
        rows.append(call(builder, "masked.load.v16f32.p0", FLOATS, *given))
    for step in (1, 2, 4, 8):  # of each two rows, swap what lies off the diagonal of each square of twice the step
        low = [lane + WIDTH - step if lane & step else lane for lane in range(WIDTH)]
        high = [lane + WIDTH if lane & step else lane + step for lane in range(WIDTH)]
        for one in range(WIDTH):
            if not one & step:
                pair = rows[one], rows[one + step]
                rows[one], rows[one + step] = (
                    builder.shuffle_vector(*pair, ir.Constant(INTS, picked)) for picked in (low, high)
                )
    for d, each in enumerate(rows):
        with builder.if_then(builder.icmp_signed("<", n.type(d), n)):
            place = builder.add(to, n.type(WIDTH * d))
            guard(builder, out, place, n.type(WIDTH))
            builder.store(each, address(builder, out, place), align=4)


@operation(lanes)
def where_above(builder, limit, value, x, other):
    """x in the lanes where limit is above a number, and another number in all others."""
    return builder.select(builder.fcmp_ordered(">", limit, spread_out(builder, value)), x, spread_out(builder, other))


@operation(lanes)
def first(builder, x, n):
    """The first n lanes of x, and 0 in all others."""
    return builder.select(is_first(builder, n), x, constant(0))


@operation(lanes)
def spread(builder, value):
    """One number in all lanes."""
    return spread_out(builder, value)


@operation(lanes)
def plus(builder, a, b):
    """a + b."""
    return builder.fadd(a, b, flags=CONTRACT)


@operation(lanes)
def minus(builder, a, b):
    """a - b."""
    return builder.fsub(a, b, flags=CONTRACT)


@operation(lanes)
def times(builder, a, b):
    """a * b."""
    return builder.fmul(a, b, flags=CONTRACT)


@operation(lanes)
def over(builder, a, b):
    """a / b."""
    return builder.fdiv(a, b)


@operation(lanes)
def larger(builder, a, b):
    """a where it is larger than b, else b: so NaN in b stays, and NaN in a does not."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@operation(lanes)
def gated(builder, x, y):
    """y where x is positive, else 0."""
    return builder.select(builder.fcmp_ordered(">", x, constant(0)), y, constant(0))


@operation(types.float32)
def added(builder, x):
    """The sum of the lanes."""
    start = ir.Constant(ir.FloatType(), 0.0)
    return call(builder, "vector.reduce.fadd.v16f32", ir.FloatType(), start, x, fastmath=["reassoc"])


_HALF = 16  # bits


def _whole(builder: ir.IRBuilder, x: ir.Value, by: ir.Value) -> ir.Value:
    """x by, rounded to a whole number, whose last sixteen bits are those of an int16."""
    return builder.bitcast(fma(builder, x, by, constant(_ROUNDER)), INTS)


@operation(lanes)
def pairs(builder, x, y, by):
    """x by and y by, each lane of both as the two int16s of one lane; none may be larger than 32767."""
    low = builder.and_(_whole(builder, x, by), constant(0xFFFF, INTS))
    return builder.bitcast(builder.or_(low, builder.shl(_whole(builder, y, by), constant(_HALF, INTS))), FLOATS)


@operation(lanes)
def one_of(builder, x, high):
    """Of each lane, two int16s, the first or the second, as a number."""
    bits = builder.bitcast(x, INTS)
    first = builder.shl(bits, constant(_HALF, INTS))
    return builder.sitofp(builder.ashr(builder.select(high, bits, first), constant(_HALF, INTS)), FLOATS)


def into_dots(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """total + a b of whole numbers, where each lane of a and b is two int16s and a b the sum of both products."""
    if HAS_VNNI:  # of its two instructions the one that saturates: LLVM makes two of the other
        return call(builder, "x86.avx512.vpdpwssds.512", INTS, total, a, b)
    low = (builder.ashr(builder.shl(factor, constant(_HALF, INTS)), constant(_HALF, INTS)) for factor in (a, b))
    high = (builder.ashr(factor, constant(_HALF, INTS)) for factor in (a, b))
    return builder.add(total, builder.add(builder.mul(*low), builder.mul(*high)))


@operation(lanes)
def root(builder, x):
    """The square root of x."""
    return call(builder, "sqrt.v16f32", FLOATS, x)


@operation(lanes)
def put(builder, x, at, value):
    """x with a number in lane `at`, if there is such a lane."""
    here = ir.Constant(INTS, list(range(WIDTH)))
    lane = spread_out(builder, builder.trunc(at, ir.IntType(32)), INTS)
    return builder.select(builder.icmp_signed("==", here, lane), spread_out(builder, value), x)


@operation(lanes)
def lane(builder, x, at):
    """The number in lane `at` in all lanes, without a way through memory where one instruction does it."""
    at = builder.trunc(at, ir.IntType(32))
    if _HAS_PERMUTE:
        return call(builder, "x86.avx512.permvar.sf.512", FLOATS, x, spread_out(builder, at, INTS))
    return spread_out(builder, builder.extract_element(x, at))


@operation(types.float32)
def lane0(builder, x):
    """The number in the first lane."""
    return builder.extract_element(x, int32(0))


@operation(types.float32)
def largest(builder, x):
    """The largest of the lanes; where some are NaN, a number or NaN."""
    nothing = ir.Constant(FLOATS, ir.Undefined)
    for step in (8, 4, 2, 1):
        other = builder.shuffle_vector(x, nothing, ir.Constant(INTS, [lane ^ step for lane in range(WIDTH)]))
        x = builder.select(builder.fcmp_ordered(">", x, other), x, other)
    return builder.extract_element(x, int32(0))


@operation(lanes)
def exp(builder, x):
    """exp x, to 1e-7 of it; x below LEAST counts as LEAST, above MOST as MOST. NaN stays NaN.

    2^n 2^r with n = round(x / ln 2), and a polynomial for 2^r, |r| <= 1/2, within 2e-9 of it.
    """
    # As the constants of comparisons come first, NaN in x stays.
    x = builder.select(builder.fcmp_ordered(">", constant(LEAST), x), constant(LEAST), x)
    x = builder.select(builder.fcmp_ordered("<", constant(MOST), x), constant(MOST), x)
    shifted = fma(builder, x, constant(number(_BY_LN_2)), constant(_ROUNDER))
    n = builder.fsub(shifted, constant(_ROUNDER))
    # 1 / ln 2 in two parts; LLVM by itself would round the product, as it is there already.
    r = call(builder, "fma.v16f32", FLOATS, x, constant(number(_BY_LN_2)), builder.fneg(n))
    r = fma(builder, x, constant(number(_BY_LN_2 - float(number(_BY_LN_2)))), r)
    series = constant(number(1.53533616e-4))
    for c in (1.33988745e-3, 9.61843736e-3, 5.55033247e-2, 2.40226479e-1, 6.93147203e-1, 1.0):
        series = fma(builder, series, r, constant(number(c)))
    exponent = builder.shl(builder.bitcast(shifted, INTS), constant(23, INTS))
    return builder.bitcast(builder.add(builder.bitcast(series, INTS), exponent), FLOATS)
