"""Vectors for Numba kernels: a type of several values in one register, which Numba itself lacks, and what it can do.

`VectorType` is LLVM's own vector type underneath, which LLVM maps to AVX-512, AVX2, SSE or NEON. What loads a vector
takes its number of lanes first: a whole number that is a global constant of the kernel's file, or a tuple of that
length, which a kernel gets as an argument, since Numba specialises on types.

The functions that take LLVM's `builder` are for writing further intrinsics; the others are called inside kernels.
Arrays are flat, and no index is tested.
"""

# Numba's disk cache looks at the file of the compiled function and does not see this one: after a change here, delete
# the __pycache__ folders of the kernels.

import operator
from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.core.extending import intrinsic, models, register_model
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature


class VectorType(types.Type):
    """Numba's type of `lanes` values of one floating type."""

    def __init__(self, dtype: types.Float, lanes: int):
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"Vector({dtype} x {lanes})")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(dmm.lookup(fe_type.dtype).get_value_type(), fe_type.lanes))


# --- Building LLVM code -----------------------------------------------------------------------------------------------


def element_pointer(context, builder, array_type, array, index):
    """Return a pointer to array[index]."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def shuffle(builder, first, second, lanes: Sequence[int]):
    """Return the vector of the named lanes of two vectors, the second's numbered after the first's."""
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes)))


def splat(builder, scalar, lanes: int):
    """Return a vector whose lanes all hold `scalar`."""
    vector = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    vector = builder.insert_element(vector, scalar, ir.Constant(ir.IntType(32), 0))
    return shuffle(builder, vector, vector, [0] * lanes)


def load_at(builder, pointer, lanes: int):
    """Read a vector, aligned to no more than 4 bytes."""
    loaded = builder.load(builder.bitcast(pointer, ir.VectorType(pointer.type.pointee, lanes).as_pointer()))
    loaded.align = 4
    return loaded


def store_at(builder, vector, pointer):
    """Write a vector, aligned to no more than 4 bytes."""
    builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer())).align = 4


def fused(builder, a, b, c):
    """Return a·b + c for three vectors, fused where the processor can."""
    name = f"llvm.fmuladd.v{a.type.count}{'f32' if isinstance(a.type.element, ir.FloatType) else 'f64'}"
    function = builder.module.globals.get(name)
    if function is None:
        function = ir.Function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def exchange(builder, rows, stride: int):
    """Do one butterfly step of a square transposition: swap the off-diagonal blocks of side `stride`."""
    lanes = range(rows[0].type.count)
    low = [j if not j & stride else len(lanes) + j - stride for j in lanes]
    high = [j + stride if not j & stride else len(lanes) + j for j in lanes]
    result = list(rows)
    for i in range(len(rows)):
        if not i & stride and i + stride < len(rows):
            result[i] = shuffle(builder, rows[i], rows[i + stride], low)
            result[i + stride] = shuffle(builder, rows[i], rows[i + stride], high)
    return result


def strides(lanes: int) -> list[int]:
    """Return the strides of a transposition's butterfly steps: lanes/2, lanes/4 ... 1."""
    return [lanes >> k for k in range(1, lanes.bit_length())]


def _as_vector(context, builder, value, value_type, vector_type):
    if isinstance(value_type, VectorType):
        return value
    return splat(builder, context.cast(builder, value, value_type, vector_type.dtype), vector_type.lanes)


def _count(lanes: types.Type) -> int:
    return lanes.count if isinstance(lanes, types.BaseTuple) else lanes.literal_value


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def _define_operator(python_operator, llvm_name):
    @infer_global(python_operator)
    class _Template(AbstractTemplate):
        def generic(self, args, kws):
            vectors = [arg for arg in args if isinstance(arg, VectorType)]
            if vectors and all(isinstance(arg, VectorType | types.Float | types.Integer) for arg in args):
                return signature(vectors[0], *args)
            return None

    def lower(context, builder, sig, args):
        a, b = (_as_vector(context, builder, x, t, sig.return_type) for x, t in zip(args, sig.args, strict=True))
        return getattr(builder, llvm_name)(a, b)

    for scalar in (types.Float, types.Integer):
        lower_builtin(python_operator, VectorType, scalar)(lower)
        lower_builtin(python_operator, scalar, VectorType)(lower)
    lower_builtin(python_operator, VectorType, VectorType)(lower)


for _operator, _name in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_operator, _name)


@intrinsic
def fma(typingctx, a, b, c):
    """Return a·b + c, fused where the processor can; vectors and scalars mix."""
    vector_type = next(t for t in (a, b, c) if isinstance(t, VectorType))

    def codegen(context, builder, sig, args):
        return fused(
            builder, *(_as_vector(context, builder, x, t, vector_type) for x, t in zip(args, sig.args, strict=True))
        )

    return vector_type(a, b, c), codegen


# --- Memory -----------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def load(typingctx, lanes, array, index):
    """Return array[index : index + lanes] as a vector."""
    vector_type = VectorType(array.dtype, _count(lanes))

    def codegen(context, builder, sig, args):
        return load_at(builder, element_pointer(context, builder, sig.args[1], *args[1:]), vector_type.lanes)

    return vector_type(lanes, array, types.intp), codegen


@intrinsic
def store(typingctx, array, index, vector):
    """Write a vector to array[index], array[index + 1] and so on."""

    def codegen(context, builder, sig, args):
        store_at(builder, args[2], element_pointer(context, builder, sig.args[0], *args[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), codegen


@intrinsic(prefer_literal=True)
def row_sums(typingctx, lanes, tile, index):
    """Return the sums over the lanes of L consecutive vectors of `tile`, one per lane, in a fixed order of adding."""
    vector_type = VectorType(tile.dtype, _count(lanes))

    def codegen(context, builder, sig, args):
        source, count = element_pointer(context, builder, sig.args[1], *args[1:]), vector_type.lanes
        places = (ir.Constant(args[2].type, j * count) for j in range(count))
        rows = [load_at(builder, builder.gep(source, [place]), count) for place in places]
        for stride in strides(count):
            exchanged = exchange(builder, rows, stride)
            rows = [builder.fadd(exchanged[i], exchanged[i + stride]) for i in range(stride)]
        return rows[0]

    return vector_type(lanes, tile, types.intp), codegen


@intrinsic
def fetch_add(typingctx, counter):
    """Return counter[0] and add 1 to it, atomically: how the threads share out the work."""

    def codegen(context, builder, sig, args):
        pointer = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen
