"""`float32x16`, a numba type for vectors of sixteen numbers, and the decorators that compile kernels with it.

LLVM maps the type to whatever registers the processor has (AVX-512, two AVX2, four NEON). Numba's own loop vectoriser
would have to prove that arrays don't overlap.

Kernels and helpers name intrinsics as globals, never as closure variables: numba gives every intrinsic a random name in
each process, and a kernel whose closure holds one would never be found in the cache on disk.
"""

import hashlib
import itertools
import operator
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

from dereflect.util.compiled import compiled

LANES = 16  # numbers in one vector
ROW = 4 * LANES  # bytes of one vector


def njit(function):
    """A helper: compiled into the kernels that call it."""
    return numba.njit(error_model="numpy")(function)


_VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def kernel(arguments: tuple):
    """A function compiled here and now, unless an earlier run left it in numba's cache on disk.

    Numba takes a kernel from the cache as long as the kernel's own source file is unchanged. A hash of this file,
    whose intrinsics are compiled into every kernel, is therefore part of the name by which the kernel is looked up.
    Helpers must stand in this file or in the kernel's own.
    """

    def compile_it(function):
        function.__qualname__ = f"{function.__qualname__}_{_VERSION}"
        return compiled(types.void(*arguments))(function)

    return compile_it


class Float32x16(types.Type):
    def __init__(self):
        super().__init__(name="float32x16")


vector = Float32x16()
F32 = ir.FloatType()
I32 = ir.IntType(32)
VECTOR = ir.VectorType(F32, LANES)
INTEGERS = ir.VectorType(I32, LANES)


@register_model(Float32x16)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, VECTOR)


def constant_vector(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [float(np.float32(value))] * LANES)


def _pointer(builder, address, pointee=VECTOR):
    return builder.inttoptr(address, pointee.as_pointer())


def _in_every_lane(builder, scalar):
    first = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, ir.Constant(VECTOR, ir.Undefined), ir.Constant(INTEGERS, [0] * LANES))


def _shuffle(builder, a, b, lanes):
    return builder.shuffle_vector(a, b, ir.Constant(INTEGERS, lanes))


def _load_rows(builder, address, stride):
    rows = []
    for _ in range(LANES):
        rows.append(builder.load(_pointer(builder, address), align=4))
        address = builder.add(address, stride)
    return rows


def vector_intrinsic(arity, emit):
    """An operation on vectors from `emit(builder, *vectors)`."""

    def typed(*operands):
        return vector(*operands), lambda context, builder, signature, values: emit(builder, *values)

    of_one, of_two = lambda typingctx, a: typed(a), lambda typingctx, a, b: typed(a, b)
    return intrinsic((of_one, of_two, lambda typingctx, a, b, c: typed(a, b, c))[arity - 1])


def multiply_add(builder, a, b, c):
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    # fmuladd, not fma: without the hardware for it the latter becomes sixteen library calls.
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    return builder.call(function, [a, b, c])


def _select(condition: str):
    """where(a condition 0, b, c)"""

    def emit(builder, a, b, c):
        return builder.select(builder.fcmp_ordered(condition, a, constant_vector(0.0)), b, c)

    return emit


def _define_operator(symbol, instruction: str) -> None:
    emit = vector_intrinsic(2, lambda builder, a, b: getattr(builder, instruction)(a, b))

    @overload(symbol)
    def vector_operator(a, b):
        if a is vector and b is vector:
            return lambda a, b: emit(a, b)


_define_operator(operator.add, "fadd")
_define_operator(operator.sub, "fsub")
_define_operator(operator.mul, "fmul")
_define_operator(operator.truediv, "fdiv")

fma = vector_intrinsic(3, multiply_add)
where_positive = vector_intrinsic(3, _select(">"))


@intrinsic
def constant(typingctx, value):
    """The number `value` in every lane."""

    def codegen(context, builder, signature, values):
        return _in_every_lane(builder, builder.fptrunc(values[0], F32))

    return vector(types.float64), codegen


@intrinsic
def load(typingctx, address):
    def codegen(context, builder, signature, values):
        return builder.load(_pointer(builder, values[0]), align=4)

    return vector(address), codegen


@intrinsic
def store(typingctx, address, value):
    def codegen(context, builder, signature, values):
        builder.store(values[1], _pointer(builder, values[0]), align=4)

    return types.void(address, value), codegen


@intrinsic
def broadcast(typingctx, address):
    """The number at `address` in every lane."""

    def codegen(context, builder, signature, values):
        return _in_every_lane(builder, builder.load(_pointer(builder, values[0], F32), align=4))

    return vector(address), codegen


@intrinsic
def prefetch(typingctx, address):
    """Have the line of memory at `address` brought into the level-two cache, to be read later."""

    def codegen(context, builder, signature, values):
        pointer, number = _pointer(builder, values[0], I32), (ir.Constant(I32, n) for n in (0, 2, 1))
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [pointer, *number])

    return types.void(address), codegen


@intrinsic
def copy_number(typingctx, source, target):
    def codegen(context, builder, signature, values):
        number = builder.load(_pointer(builder, values[0], F32), align=4)
        builder.store(number, _pointer(builder, values[1], F32), align=4)

    return types.void(source, target), codegen


@intrinsic
def transpose(typingctx, source, source_stride, target, target_stride):
    """Sixteen rows of sixteen numbers become columns; strides, in bytes, lead from row to row."""

    def codegen(context, builder, signature, values):
        source, source_stride, target, target_stride = values
        rows = _load_rows(builder, source, source_stride)
        for s in (1, 2, 4, 8):  # swap the off-diagonal s x s blocks of every 2s x 2s block
            upper = [j if not j & s else LANES + (j ^ s) for j in range(LANES)]
            lower = [j ^ s if not j & s else LANES + j for j in range(LANES)]
            for i in range(LANES):
                if not i & s:
                    a, b = rows[i], rows[i + s]
                    rows[i], rows[i + s] = _shuffle(builder, a, b, upper), _shuffle(builder, a, b, lower)
        for row in rows:
            builder.store(row, _pointer(builder, target), align=4)
            target = builder.add(target, target_stride)

    return types.void(source, source_stride, target, target_stride), codegen


@intrinsic
def row_sums(typingctx, source):
    """Lane i of the result is the sum of the i-th of sixteen vectors at `source`."""

    def codegen(context, builder, signature, values):
        rows = _load_rows(builder, values[0], ir.Constant(ir.IntType(64), ROW))
        for s in (1, 2, 4, 8):  # add neighbours within each vector while two vectors are merged into one
            even = [j if not j & s else LANES + j for j in range(LANES)]
            odd = [j ^ s if not j & s else LANES + (j ^ s) for j in range(LANES)]
            rows = [
                builder.fadd(_shuffle(builder, a, b, even), _shuffle(builder, a, b, odd))
                for a, b in itertools.pairwise(rows)
            ][::2]
        return rows[0]

    return vector(source), codegen


# Parts of a vector, and bfloat16 in memory ---------------------------------------------------------------


def _integers(value: int) -> ir.Constant:
    return ir.Constant(INTEGERS, [value] * LANES)


def _short_mask(builder, lanes):
    """The first `lanes` lanes."""
    nothing = ir.Constant(INTEGERS, ir.Undefined)
    first = builder.insert_element(nothing, builder.trunc(lanes, I32), ir.Constant(I32, 0))
    everywhere = _shuffle(builder, first, nothing, [0] * LANES)
    return builder.icmp_unsigned("<", ir.Constant(INTEGERS, list(range(LANES))), everywhere)


def _load_part(builder, kind, name, address, lanes):
    pointer = _pointer(builder, address, kind)
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind, [pointer.type, I32, BITS, kind]),
        f"llvm.masked.load.v{LANES}{name}.p0",
    )
    return builder.call(function, [pointer, ir.Constant(I32, 1), _short_mask(builder, lanes), ir.Constant(kind, None)])


def _store_part(builder, kind, name, address, value, lanes):
    pointer = _pointer(builder, address, kind)
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [kind, pointer.type, I32, BITS]),
        f"llvm.masked.store.v{LANES}{name}.p0",
    )
    builder.call(function, [value, pointer, ir.Constant(I32, 1), _short_mask(builder, lanes)])


def _widened(builder, shorts):
    """bfloat16 to float32: the upper half of its bits."""
    return builder.bitcast(builder.shl(builder.zext(shorts, INTEGERS), _integers(16)), VECTOR)


def _rounded(builder, value):
    """float32 to bfloat16, to the nearest, ties to even; NaN stays NaN."""
    if _ROUNDS_ITSELF:
        return builder.bitcast(builder.fptrunc(value, BFLOATS), SHORTS)
    bits = builder.bitcast(value, INTEGERS)
    odd = builder.and_(builder.lshr(bits, _integers(16)), _integers(1))
    rounded = builder.lshr(builder.add(builder.add(bits, _integers(0x7FFF)), odd), _integers(16))
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), _integers(0x7FC0), rounded)
    return builder.trunc(rounded, SHORTS)


class _BFloat(ir.types._BaseFloatType):
    """LLVM's bfloat, which llvmlite doesn't name."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self):
        return "bfloat"


_BFloat._create_instance()
BFLOATS = ir.VectorType(_BFloat(), LANES)
# Where the processor has an instruction for it; elsewhere LLVM may call a function for each number.
_ROUNDS_ITSELF = llvmlite.binding.get_host_cpu_features().get("avx512bf16", False)
BITS = ir.VectorType(ir.IntType(1), LANES)
SHORTS = ir.VectorType(ir.IntType(16), LANES)


@intrinsic
def load_bf16(typingctx, address):
    def codegen(context, builder, signature, values):
        return _widened(builder, builder.load(_pointer(builder, values[0], SHORTS), align=2))

    return vector(address), codegen


@intrinsic
def store_bf16(typingctx, address, value):
    def codegen(context, builder, signature, values):
        builder.store(_rounded(builder, values[1]), _pointer(builder, values[0], SHORTS), align=2)

    return types.void(address, value), codegen


@intrinsic
def load_first(typingctx, address, lanes):
    """The first `lanes` numbers at `address`, then zeros."""

    def codegen(context, builder, signature, values):
        return _load_part(builder, VECTOR, "f32", *values)

    return vector(address, types.int64), codegen


@intrinsic
def store_first(typingctx, address, value, lanes):
    def codegen(context, builder, signature, values):
        _store_part(builder, VECTOR, "f32", *values)

    return types.void(address, value, types.int64), codegen


@intrinsic
def load_first_bf16(typingctx, address, lanes):
    def codegen(context, builder, signature, values):
        return _widened(builder, _load_part(builder, SHORTS, "i16", *values))

    return vector(address, types.int64), codegen


@intrinsic
def store_first_bf16(typingctx, address, value, lanes):
    def codegen(context, builder, signature, values):
        address, value, lanes = values
        _store_part(builder, SHORTS, "i16", address, _rounded(builder, value), lanes)

    return types.void(address, value, types.int64), codegen


@intrinsic
def get_number(typingctx, address):
    def codegen(context, builder, signature, values):
        return builder.fpext(builder.load(_pointer(builder, values[0], F32), align=4), ir.DoubleType())

    return types.float64(address), codegen


@intrinsic
def set_number(typingctx, address, value):
    def codegen(context, builder, signature, values):
        builder.store(builder.fptrunc(values[1], F32), _pointer(builder, values[0], F32), align=4)

    return types.void(address, types.float64), codegen


@njit
def read(address, size, lanes):
    """`lanes` numbers at `address`, bfloat16 where a number has 2 bytes, float32 where it has 4; then zeros."""
    if lanes == LANES:
        if size == 2:
            return load_bf16(address)
        return load(address)
    if size == 2:
        return load_first_bf16(address, lanes)
    return load_first(address, lanes)


@njit
def write(address, value, size, lanes):
    """The first `lanes` numbers of `value`, as `read` reads them."""
    if lanes == LANES:
        if size == 2:
            store_bf16(address, value)
        else:
            store(address, value)
    elif size == 2:
        store_first_bf16(address, value, lanes)
    else:
        store_first(address, value, lanes)
