"""The Numba kernels: sampling into columns, the product with the weights, and the adjoint of both.

An image is first packed: the channels of one offset group lie side by side, padded to whole vectors of four, in a plane
with one zero row and column before the image and two after it. A sample then is four vector loads and four
multiply-adds for four channels, and needs no test: points outside read the zeros of the border. The columns of CHUNK
pixels and one group stay in the first-level cache between sampling and product.

All arrays are flat; the notation is that of README.md, with w weight groups:

    planes[(((b*G + g)*(H + 3) + r + 1)*(W + 3) + s + 1)*L + c]     L = C/G rounded up to a multiple of 4
    offset[(((b*G + g)*K + k)*2 + (0: dy, 1: dx))*P + p], mask[((b*G + g)*K + k)*P + p]
    raw: per image 2GK channels read like offset, then GK read like mask; flow[(b*2 + (0: u, 1: v))*P + p]
"""

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.extending import intrinsic, overload

from shared.kernels.vectors import (
    VectorType,
    element_pointer,
    fetch_add,
    fma,
    fused,
    load,
    load_at,
    shuffle,
    splat,
    store,
    store_at,
)

LANES = 4  # channels of a vector
BLOCK = 8  # rows and columns of the products' inner block
CHUNK = 64  # pixels that are worked on together
SCRATCH_ROWS = 13  # rows of CHUNK values that a thread needs

_OPTIONS = {"nogil": True, "cache": True, "fastmath": {"contract"}, "error_model": "numpy"}


# --- Vectors ----------------------------------------------------------------------------------------------------------


def _corners(builder, pointer, below, right):
    """Return pointers to a pixel, the one to its right, the one below it and the one diagonally below."""
    lower = builder.gep(pointer, [below])
    return pointer, builder.gep(pointer, [right]), lower, builder.gep(lower, [right])


def _weights(builder, pointer, lanes):
    """Return the four weights of a point, rows _W00 to _W11 of a thread's scratch memory, as vectors."""
    rows = (builder.gep(pointer, [ir.Constant(ir.IntType(64), i * CHUNK)]) for i in range(4))
    return [splat(builder, builder.load(row), lanes) for row in rows]


@intrinsic
def get(typingctx, array, index):
    """Return array[index]; no negative indices, which would keep LLVM from vectorising."""

    def codegen(context, builder, sig, args):
        return builder.load(element_pointer(context, builder, sig.args[0], *args))

    return array.dtype(array, types.intp), codegen


@intrinsic
def put(typingctx, array, index, value):
    """Set array[index] = value; no negative indices."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], element_pointer(context, builder, sig.args[0], *args[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), codegen


@intrinsic
def store_transposed(typingctx, array, index, step, a, b, c, d):
    """Write lane i of the four vectors to array[index + i·step : index + i·step + 4]."""

    def codegen(context, builder, sig, args):
        array, index, step, a, b, c, d = args
        low, high = (0, 4, 1, 5), (2, 6, 3, 7)
        ab, cd = shuffle(builder, a, b, low), shuffle(builder, c, d, low)
        ab_high, cd_high = shuffle(builder, a, b, high), shuffle(builder, c, d, high)
        pointer = element_pointer(context, builder, sig.args[0], array, index)
        for first, second in ((ab, cd), (ab_high, cd_high)):
            for lanes in ((0, 1, 4, 5), (2, 3, 6, 7)):
                store_at(builder, shuffle(builder, first, second, lanes), pointer)
                pointer = builder.gep(pointer, [step])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, a, a, a, a), codegen


@intrinsic
def interpolate(typingctx, plane, index, below, right, weights, at):
    """Return the sum of the pixels around a point at plane[index], times weights[at], [at + CHUNK] and so on."""

    def codegen(context, builder, sig, args):
        pointers = _corners(builder, element_pointer(context, builder, sig.args[0], *args[:2]), *args[2:4])
        first, *rest = _weights(builder, element_pointer(context, builder, sig.args[4], *args[4:]), LANES)
        total = builder.fmul(first, load_at(builder, pointers[0], LANES))
        for weight, pointer in zip(rest, pointers[1:], strict=True):
            total = fused(builder, weight, load_at(builder, pointer, LANES), total)
        return total

    vector = VectorType(plane.dtype, LANES)
    return vector(plane, types.intp, types.intp, types.intp, weights, types.intp), codegen


@intrinsic
def spread(typingctx, plane, index, below, right, weights, at, vector):
    """Add vector·weight to the pixels around a point: the adjoint of `interpolate`."""

    def codegen(context, builder, sig, args):
        pointers = _corners(builder, element_pointer(context, builder, sig.args[0], *args[:2]), *args[2:4])
        factors = _weights(builder, element_pointer(context, builder, sig.args[4], *args[4:6]), LANES)
        for weight, pointer in zip(factors, pointers, strict=True):
            store_at(builder, fused(builder, weight, args[6], load_at(builder, pointer, LANES)), pointer)
        return context.get_dummy_value()

    return types.void(plane, types.intp, types.intp, types.intp, weights, types.intp, vector), codegen


@intrinsic
def corner_products(typingctx, plane, index, below, right, vector):
    """Return the scalar products of a vector with the pixels around a point, one per lane."""

    def codegen(context, builder, sig, args):
        pointers = _corners(builder, element_pointer(context, builder, sig.args[0], *args[:2]), *args[2:4])
        products = [builder.fmul(args[4], load_at(builder, pointer, LANES)) for pointer in pointers]

        def add_pairs(a, b):
            return builder.fadd(shuffle(builder, a, b, (0, 2, 4, 6)), shuffle(builder, a, b, (1, 3, 5, 7)))

        return add_pairs(add_pairs(*products[:2]), add_pairs(*products[2:]))

    return vector(plane, types.intp, types.intp, types.intp, vector), codegen


# --- Products ---------------------------------------------------------------------------------------------------------


@njit(**_OPTIONS)
def multiply_add(a, a_start, a_step, a_next, b, b_start, b_step, out, out_start, out_step, depth, rows, width):
    """Add Σ_k a[k, m]·b[k, n] to out[m, n], for `rows` and `width` that are multiples of BLOCK.

    a[k, m] is a[a_start + k·a_step + m·a_next]; b and out have steps of 1 in n.
    """
    for n in range(0, width, BLOCK):
        for m in range(0, rows, BLOCK):
            at = out_start + m * out_step + n
            c0, c1 = load(BLOCK, out, at), load(BLOCK, out, at + out_step)
            c2, c3 = load(BLOCK, out, at + 2 * out_step), load(BLOCK, out, at + 3 * out_step)
            c4, c5 = load(BLOCK, out, at + 4 * out_step), load(BLOCK, out, at + 5 * out_step)
            c6, c7 = load(BLOCK, out, at + 6 * out_step), load(BLOCK, out, at + 7 * out_step)
            for k in range(depth):
                row = load(BLOCK, b, b_start + k * b_step + n)
                p = a_start + k * a_step + m * a_next
                c0 = fma(get(a, p), row, c0)
                c1 = fma(get(a, p + a_next), row, c1)
                c2 = fma(get(a, p + 2 * a_next), row, c2)
                c3 = fma(get(a, p + 3 * a_next), row, c3)
                c4 = fma(get(a, p + 4 * a_next), row, c4)
                c5 = fma(get(a, p + 5 * a_next), row, c5)
                c6 = fma(get(a, p + 6 * a_next), row, c6)
                c7 = fma(get(a, p + 7 * a_next), row, c7)
            store(out, at, c0)
            store(out, at + out_step, c1)
            store(out, at + 2 * out_step, c2)
            store(out, at + 3 * out_step, c3)
            store(out, at + 4 * out_step, c4)
            store(out, at + 5 * out_step, c5)
            store(out, at + 6 * out_step, c6)
            store(out, at + 7 * out_step, c7)


# --- tanh and sigmoid -------------------------------------------------------------------------------------------------

_LOG2_E = np.float32(1.4426950408889634)
_LN_2 = np.float32(0.6931471805599453)
# adding 1.5·2^23 rounds to a whole number and leaves it in the low bits
_MAGIC = np.float32(1.5 * 2**23)
# (e^r - 1)/r on |r| ≤ ln2/2 to 4e-9 relative: its Taylor series
_PHI1 = tuple(np.float32(1 / math.factorial(n)) for n in range(1, 9))
_ONE, _TWO, _TEN, _EIGHTY = np.float32(1), np.float32(2), np.float32(10), np.float32(80)


@intrinsic
def _power_of_two(typingctx, shifted):
    """Return 2^n for the whole number n in the low bits of n + 1.5·2^23."""

    def codegen(context, builder, sig, args):
        word = ir.IntType(32)
        bits = builder.shl(builder.bitcast(args[0], word), ir.Constant(word, 23))
        return builder.bitcast(builder.add(bits, ir.Constant(word, 0x3F800000)), args[0].type)

    return types.float32(types.float32), codegen


@njit(**_OPTIONS)
def _reduced(z):
    """Return s = 2^n and q = e^r - 1 with e^z = s·(1 + q), |r| ≤ ln2/2."""
    shifted = z * _LOG2_E + _MAGIC
    r = z - (shifted - _MAGIC) * _LN_2
    p = _PHI1[7]
    p = p * r + _PHI1[6]
    p = p * r + _PHI1[5]
    p = p * r + _PHI1[4]
    p = p * r + _PHI1[3]
    p = p * r + _PHI1[2]
    p = p * r + _PHI1[1]
    p = p * r + _PHI1[0]
    return _power_of_two(shifted), p * r


def tanh(x):
    """Return tanh x; in float32 by a polynomial that LLVM vectorises."""
    return np.tanh(x)


def sigmoid(x):
    """Return 1/(1 + e^-x); in float32 by a polynomial that LLVM vectorises."""
    return 1 / (1 + np.exp(-x))


@overload(tanh, jit_options=_OPTIONS)
def _tanh(x):
    if x != types.float32:
        return lambda x: math.tanh(x)

    def single(x):
        # tanh is ±1 to the last bit beyond 10; a NaN fails both comparisons and passes through
        x = _TEN if x > _TEN else x
        x = -_TEN if x < -_TEN else x
        s, q = _reduced(_TWO * x)
        e = s * q + (s - _ONE)  # e^2x - 1, without cancellation
        return e / (e + _TWO)

    return single


@overload(sigmoid, jit_options=_OPTIONS)
def _sigmoid(x):
    if x != types.float32:
        return lambda x: 1.0 / (1.0 + math.exp(-x))

    def single(x):
        x = _EIGHTY if x > _EIGHTY else x
        x = -_EIGHTY if x < -_EIGHTY else x
        s, q = _reduced(-x)
        return _ONE / (_ONE + (s * q + s))

    return single


# --- Layout -----------------------------------------------------------------------------------------------------------


@njit(**_OPTIONS)
def pack(counter, image, sizes, planes):
    """Copy images (B, C, H, W) into padded planes; one task per image and group."""
    tasks, per_group, height, width = sizes
    lanes = -(-per_group // LANES) * LANES
    plane_size = (height + 3) * (width + 3) * lanes
    while True:
        task = fetch_add(counter)
        if task >= tasks:
            return
        plane = task * plane_size
        planes[plane : plane + plane_size] = 0
        for c in range(per_group):
            source = (task * per_group + c) * height * width
            for y in range(height):
                target = plane + ((y + 1) * (width + 3) + 1) * lanes + c
                for x in range(width):
                    put(planes, target + x * lanes, get(image, source + y * width + x))


@njit(**_OPTIONS)
def unpack(counter, planes, sizes, image):
    """Copy padded planes back into images: the adjoint of `pack`."""
    tasks, per_group, height, width = sizes
    lanes = -(-per_group // LANES) * LANES
    plane_size = (height + 3) * (width + 3) * lanes
    while True:
        task = fetch_add(counter)
        if task >= tasks:
            return
        for c in range(per_group):
            target = (task * per_group + c) * height * width
            for y in range(height):
                source = task * plane_size + ((y + 1) * (width + 3) + 1) * lanes + c
                for x in range(width):
                    put(image, target + y * width + x, get(planes, source + x * lanes))


# --- Where to sample --------------------------------------------------------------------------------------------------

# rows of a thread's scratch memory, CHUNK values each
_TOP, _LEFT, _Y, _X, _M, _TANH_Y, _TANH_X, _W00, _W01, _W10, _W11, _DY, _DX = (CHUNK * i for i in range(13))


@njit(**_OPTIONS)
def _start(pixel, count, geometry, work):
    """Fill the rows _TOP and _LEFT with the position of the first tap for `count` pixels from `pixel` on."""
    number = work.dtype.type
    out_width, stride_y, stride_x, pad_y, pad_x = geometry[6], geometry[7], geometry[8], geometry[9], geometry[10]
    row, column = pixel // out_width, pixel % out_width
    for j in range(count):
        put(work, _TOP + j, number(row * stride_y - pad_y))
        put(work, _LEFT + j, number(column * stride_x - pad_x))
        column += 1
        if column == out_width:
            row, column = row + 1, 0


@njit(**_OPTIONS)
def _locate(batch, group, tap, pixel, count, offset, mask, residual, geometry, work, places):
    """Work out position, mask, neighbours and their weights for one tap of `count` pixels.

    `places` receives the position of the upper left neighbour in the plane, in pixels. For the flow-guided form
    `offset` is raw and `mask` is the flow.
    """
    number = work.dtype.type
    height, width, groups, taps, kernel_width, out_pixels = geometry[:6]
    dilation_y, dilation_x, guided = geometry[11], geometry[12], geometry[13]
    one = number(1)
    tap_y, tap_x = number(tap // kernel_width * dilation_y), number(tap % kernel_width * dilation_x)
    point = group * taps + tap
    pairs = groups * taps
    if not guided:
        source = (batch * pairs + point) * 2 * out_pixels + pixel
        for j in range(count):
            put(work, _Y + j, get(work, _TOP + j) + tap_y + get(offset, source + j))
        source += out_pixels
        for j in range(count):
            put(work, _X + j, get(work, _LEFT + j) + tap_x + get(offset, source + j))
        if mask.size:
            source = (batch * pairs + point) * out_pixels + pixel
            for j in range(count):
                put(work, _M + j, get(mask, source + j))
        else:
            for j in range(count):
                put(work, _M + j, one)
    else:
        source = (batch * 3 * pairs + 2 * point) * out_pixels + pixel
        for j in range(count):
            put(work, _TANH_Y + j, tanh(get(offset, source + j)))
        source += out_pixels
        for j in range(count):
            put(work, _TANH_X + j, tanh(get(offset, source + j)))
        source = (batch * 3 * pairs + 2 * pairs + point) * out_pixels + pixel
        for j in range(count):
            put(work, _M + j, sigmoid(get(offset, source + j)))
        u, v = 2 * batch * out_pixels + pixel, (2 * batch + 1) * out_pixels + pixel
        for j in range(count):
            shift = residual * get(work, _TANH_Y + j) + get(mask, v + j)
            put(work, _Y + j, get(work, _TOP + j) + tap_y + shift)
        for j in range(count):
            shift = residual * get(work, _TANH_X + j) + get(mask, u + j)
            put(work, _X + j, get(work, _LEFT + j) + tap_x + shift)

    bottom, right, nan = number(height), number(width), number(np.nan)
    for j in range(count):
        y, x, m = get(work, _Y + j), get(work, _X + j), get(work, _M + j)
        # a NaN fails every comparison: it samples the zero border, times a NaN
        m = m if y == y else nan
        m = m if x == x else nan
        y = y if (y > -one) & (y < bottom) else bottom
        x = x if (x > -one) & (x < right) else right
        above, before = np.floor(y), np.floor(x)
        dy, dx = y - above, x - before
        upper, lower = m * (one - dy), m * dy
        put(work, _M + j, m)
        put(work, _DY + j, dy)
        put(work, _DX + j, dx)
        put(work, _W00 + j, upper * (one - dx))
        put(work, _W01 + j, upper * dx)
        put(work, _W10 + j, lower * (one - dx))
        put(work, _W11 + j, lower * dx)
        put(places, j, (np.int32(above) + np.int32(1)) * np.int32(width + 3) + np.int32(before) + np.int32(1))
    # four pixels are sampled at a time
    for j in range(count, -(-count // 4) * 4):
        put(work, _W00 + j, number(0))
        put(work, _W01 + j, number(0))
        put(work, _W10 + j, number(0))
        put(work, _W11 + j, number(0))
        put(places, j, 0)


@njit(**_OPTIONS)
def _value(planes, plane, lanes, below, right, work, places, j):
    """Return a vector of channels at the place of pixel j, times its mask."""
    return interpolate(planes, plane + get(places, j) * lanes, below, right, work, _W00 + j)


# --- The operation ----------------------------------------------------------------------------------------------------


@njit(**_OPTIONS)
def forward(
    counter, planes, offset, mask, residual, weight, bias, geometry, channels, out, work, places, columns, tile
):  # fmt: skip
    """Convolve; one task per image and CHUNK pixels.

    weight: (G, K·C/G, rows), the C_out/w output channels padded to `rows`, a multiple of BLOCK.
    channels: C/G, w, C_out/w and `rows`; scratch memory: `columns` (K·C/G + 3, CHUNK) and `tile` (w·rows, CHUNK).
    """
    height, width, groups, taps, _, out_pixels = geometry[:6]
    images = geometry[14]
    per_group, parts, per_part, rows = channels
    lanes = -(-per_group // LANES) * LANES
    below, right = (width + 3) * lanes, lanes
    depth = taps * per_group
    chunks = -(-out_pixels // CHUNK)
    while True:
        task = fetch_add(counter)
        if task >= images * chunks:
            return
        image, pixel = task // chunks, task % chunks * CHUNK
        count = min(CHUNK, out_pixels - pixel)
        _start(pixel, count, geometry, work)
        tile[:] = 0
        for group in range(groups):
            plane = (image * groups + group) * (height + 3) * (width + 3) * lanes
            for tap in range(taps):
                _locate(image, group, tap, pixel, count, offset, mask, residual, geometry, work, places)
                for c in range(0, per_group, LANES):
                    # lanes beyond the group's channels spill into the next tap's rows, which are written later
                    target = (tap * per_group + c) * CHUNK
                    for j in range(0, count, 4):
                        v0 = _value(planes, plane + c, lanes, below, right, work, places, j)
                        v1 = _value(planes, plane + c, lanes, below, right, work, places, j + 1)
                        v2 = _value(planes, plane + c, lanes, below, right, work, places, j + 2)
                        v3 = _value(planes, plane + c, lanes, below, right, work, places, j + 3)
                        store_transposed(columns, target + j, CHUNK, v0, v1, v2, v3)
            multiply_add(
                weight, group * depth * rows, rows, 1, columns, 0, CHUNK,
                tile, group // (groups // parts) * rows * CHUNK, CHUNK, depth, rows, -(-count // BLOCK) * BLOCK,
            )  # fmt: skip
        for part in range(parts):
            for o in range(per_part):
                channel = part * per_part + o
                shift = bias[channel]
                target = (image * parts * per_part + channel) * out_pixels + pixel
                source = (part * rows + o) * CHUNK
                for j in range(count):
                    put(out, target + j, get(tile, source + j) + shift)


@njit(**_OPTIONS)
def backward(
    counter, planes, offset, mask, residual, weight, grad_out, geometry, channels,
    grad_planes, grad_offset, grad_mask, grad_weight, work, places, columns, grad_columns, tile, products,
):  # fmt: skip
    """Take a gradient back to everything but the bias; one task per image and offset group.

    A task owns its plane of `grad_planes` and its part of `grad_weight`: nothing is added by two threads, and always in
    the same order. For the flow-guided form `grad_offset` is that of raw and `grad_mask` the flow's, one for each
    group, (B, G, (u, v), P).

    weight: (G, C_out/w, size), the K·C/G columns padded with zeros to a multiple of BLOCK with 3 to spare.
    grad_weight: (B, G, rows, size), and grad_planes filled with zeros.
    Scratch memory: `columns` and `grad_columns` (CHUNK, size), `tile` (rows, CHUNK) and `products`
    (CHUNK, 4).
    """
    number = work.dtype.type
    one = number(1)
    height, width, groups, taps, _, out_pixels = geometry[:6]
    guided, images = geometry[13], geometry[14]
    per_group, parts, per_part, rows = channels
    lanes = -(-per_group // LANES) * LANES
    below, right = (width + 3) * lanes, lanes
    pairs = groups * taps
    size = -(-(taps * per_group + LANES - 1) // BLOCK) * BLOCK
    while True:
        task = fetch_add(counter)
        if task >= images * groups:
            return
        image, group = task // groups, task % groups
        plane = task * (height + 3) * (width + 3) * lanes
        first_channel = image * parts * per_part + group // (groups // parts) * per_part
        for pixel in range(0, out_pixels, CHUNK):
            count = min(CHUNK, out_pixels - pixel)
            tile[:] = 0
            for o in range(per_part):
                source = (first_channel + o) * out_pixels + pixel
                for j in range(count):
                    put(tile, o * CHUNK + j, get(grad_out, source + j))
            grad_columns[:] = 0
            multiply_add(
                tile, 0, CHUNK, 1, weight, group * per_part * size, size, grad_columns, 0, size, per_part, CHUNK, size
            )  # fmt: skip
            _start(pixel, count, geometry, work)
            flow = task * 2 * out_pixels + pixel
            if guided:
                for j in range(count):
                    put(grad_mask, flow + j, number(0))
                    put(grad_mask, flow + out_pixels + j, number(0))
            for tap in range(taps):
                _locate(image, group, tap, pixel, count, offset, mask, residual, geometry, work, places)
                for j in range(count):
                    place = plane + get(places, j) * lanes
                    at = j * size + tap * per_group
                    grad = load(LANES, grad_columns, at)
                    product = corner_products(planes, place, below, right, grad)
                    store(columns, at, interpolate(planes, place, below, right, work, _W00 + j))
                    spread(grad_planes, place, below, right, work, _W00 + j, grad)
                    for c in range(LANES, per_group, LANES):
                        grad = load(LANES, grad_columns, at + c)
                        product = product + corner_products(planes, place + c, below, right, grad)
                        store(columns, at + c, interpolate(planes, place + c, below, right, work, _W00 + j))
                        spread(grad_planes, place + c, below, right, work, _W00 + j, grad)
                    store(products, 4 * j, product)
                for j in range(count):
                    s00, s01 = get(products, 4 * j), get(products, 4 * j + 1)
                    s10, s11 = get(products, 4 * j + 2), get(products, 4 * j + 3)
                    dy, dx, m = get(work, _DY + j), get(work, _DX + j), get(work, _M + j)
                    upper, lower = (one - dx) * s00 + dx * s01, (one - dx) * s10 + dx * s11
                    put(work, _Y + j, m * (lower - upper))
                    put(work, _X + j, m * ((one - dy) * (s01 - s00) + dy * (s11 - s10)))
                    put(work, _W00 + j, (one - dy) * upper + dy * lower)
                point = group * taps + tap
                if not guided:
                    to_y = (image * pairs + point) * 2 * out_pixels + pixel
                    for j in range(count):
                        put(grad_offset, to_y + j, get(work, _Y + j))
                        put(grad_offset, to_y + out_pixels + j, get(work, _X + j))
                    if grad_mask.size:
                        to_mask = (image * pairs + point) * out_pixels + pixel
                        for j in range(count):
                            put(grad_mask, to_mask + j, get(work, _W00 + j))
                else:
                    for j in range(count):
                        u, v = flow + j, flow + out_pixels + j
                        put(grad_mask, u, get(grad_mask, u) + get(work, _X + j))
                        put(grad_mask, v, get(grad_mask, v) + get(work, _Y + j))
                    to_y = (image * 3 * pairs + 2 * point) * out_pixels + pixel
                    to_mask = (image * 3 * pairs + 2 * pairs + point) * out_pixels + pixel
                    for j in range(count):
                        t, m = get(work, _TANH_Y + j), get(work, _M + j)
                        put(grad_offset, to_y + j, get(work, _Y + j) * residual * (one - t * t))
                        put(grad_offset, to_mask + j, get(work, _W00 + j) * m * (one - m))
                    for j in range(count):
                        t = get(work, _TANH_X + j)
                        put(grad_offset, to_y + out_pixels + j, get(work, _X + j) * residual * (one - t * t))
            multiply_add(
                tile, 0, 1, CHUNK, columns, 0, size, grad_weight, task * rows * size, size, count, rows, size
            )  # fmt: skip
