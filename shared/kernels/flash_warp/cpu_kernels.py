"""The Numba kernels: one line of voxels along the last axis at a time, whose displacement never leaves the cache.

A line goes through passes over scratch memory of some kilobytes: the displacement from its n numbers and the cells in
which the points lie (vectors), the voxels around the points (one load for the two neighbours along the last axis),
interpolation (vectors), and for the gradient the products with the basis (vectors).

Arrays are flat. L is the length of the tuple `lanes`, on which Numba specialises; P is the length of a line and M the
number of modes, both rounded up to whole vectors. The d axes of the image have `sizes`, and `steps` between neighbours.
"""

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.extending import intrinsic

from shared.kernels.vectors import (
    VectorType,
    element_pointer,
    fetch_add,
    fma,
    load,
    load_at,
    shuffle,
    splat,
    store,
    store_at,
)

PAIR, QUAD = (0,) * 2, (0,) * 4  # like `lanes`
LINES_PER_TASK = 16


# --- What vectors.py lacks --------------------------------------------------------------------------------------------


@intrinsic
def find_cell(typingctx, position, size):
    """Find the cells of points along an axis of `size` voxels.

    Returns:
        The lower neighbour (whole numbers), the weight of the upper one, NaN where the point is NaN, and 1 where a
        gradient passes, 0 where the point is clamped. A point on the upper border has weight 1 in the last cell.
    """
    places = VectorType(types.int32, position.lanes)
    result = types.Tuple((places, position, position))

    def codegen(context, builder, sig, args):
        point, length = args
        zero, one = (ir.Constant(point.type, [x] * position.lanes) for x in (0.0, 1.0))
        whole = ir.VectorType(ir.IntType(32), position.lanes)
        number = ir.Constant(length.type, 1)
        last = builder.sub(length, number)
        border = splat(builder, context.cast(builder, last, types.intp, position.dtype), position.lanes)
        above, below = builder.fcmp_ordered(">", point, zero), builder.fcmp_ordered("<", point, border)
        # the comparisons take NaN to 0 before it would become a whole number
        safe = builder.select(above, point, zero)
        safe = builder.select(builder.fcmp_ordered("<", safe, border), safe, border)
        only = builder.icmp_signed("<", last, number)
        top = builder.select(only, ir.Constant(last.type, 0), builder.sub(last, number))
        top = splat(builder, builder.trunc(top, ir.IntType(32)), position.lanes)
        first = builder.fptosi(safe, whole)
        first = builder.select(builder.icmp_signed("<", first, top), first, top)
        weight = builder.fsub(safe, builder.sitofp(first, point.type))
        weight = builder.select(builder.fcmp_unordered("uno", point, point), point, weight)
        passes = builder.select(builder.and_(above, below), one, zero)
        return context.make_tuple(builder, result, [first, weight, passes])

    return result(position, types.intp), codegen


@intrinsic
def steps_along(typingctx, first, step):
    """Return first · step for a vector of whole numbers."""

    def codegen(context, builder, sig, args):
        number = builder.trunc(args[1], ir.IntType(32))
        return builder.mul(args[0], splat(builder, number, first.lanes))

    return first(first, types.intp), codegen


@intrinsic
def add_places(typingctx, a, b):
    """Return a + b for two vectors of whole numbers."""

    def codegen(context, builder, sig, args):
        return builder.add(*args)

    return a(a, b), codegen


@intrinsic
def join(typingctx, first, second):
    """Return the lanes of two vectors in one."""
    result = VectorType(first.dtype, 2 * first.lanes)

    def codegen(context, builder, sig, args):
        return shuffle(builder, *args, range(result.lanes))

    return result(first, first), codegen


@intrinsic
def split_quads(typingctx, lanes, array, index):
    """Read L times four values from array[index] on and return the vectors of their first, second, third and fourth."""
    vector_type = VectorType(array.dtype, lanes.count)
    result = types.UniTuple(vector_type, 4)

    def codegen(context, builder, sig, args):
        pointer, count = element_pointer(context, builder, sig.args[1], *args[1:]), lanes.count
        places = [ir.Constant(args[2].type, k * count) for k in range(4)]
        quarters = [load_at(builder, builder.gep(pointer, [place]), count) for place in places]
        even, odd = (
            [shuffle(builder, *quarters[k : k + 2], range(start, 2 * count, 2)) for k in (0, 2)] for start in (0, 1)
        )
        parts = [shuffle(builder, *half, range(start, 2 * count, 2)) for start in (0, 1) for half in (even, odd)]
        return context.make_tuple(builder, result, parts)

    return result(lanes, array, types.intp), codegen


@intrinsic
def store_quads(typingctx, array, index, a, b, c, d):
    """Write the lanes of four vectors in turn, four values together, to array[index] and on."""

    def codegen(context, builder, sig, args):
        count = a.lanes
        halves = [shuffle(builder, *pair, range(2 * count)) for pair in (args[2:4], args[4:6])]
        turned = shuffle(builder, *halves, [k * count + lane for lane in range(count) for k in range(4)])
        store_at(builder, turned, element_pointer(context, builder, sig.args[0], *args[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, a, b, c, d), codegen


@intrinsic
def widen(typingctx, vector):
    """Return the vector in double precision."""
    result = VectorType(types.float64, vector.lanes)

    def codegen(context, builder, sig, args):
        if vector == result:
            return args[0]
        return builder.fpext(args[0], ir.VectorType(ir.DoubleType(), vector.lanes))

    return result(vector), codegen


@intrinsic
def spread(typingctx, lanes, array, index):
    """Return a vector whose lanes all hold array[index]."""
    vector_type = VectorType(array.dtype, lanes.count)

    def codegen(context, builder, sig, args):
        return splat(builder, builder.load(element_pointer(context, builder, sig.args[1], *args[1:])), lanes.count)

    return vector_type(lanes, array, types.intp), codegen


@intrinsic
def copy(typingctx, source, at, target, to, count):
    """Copy `count` values from source[at] on to target[to] and on."""

    def codegen(context, builder, sig, args):
        source, at, target, to, count = args
        source = element_pointer(context, builder, sig.args[0], source, at)
        target = element_pointer(context, builder, sig.args[2], target, to)
        itemsize = context.get_abi_sizeof(source.type.pointee)
        cgutils.raw_memcpy(builder, target, source, count, itemsize)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp, types.intp), codegen


# --- One line ---------------------------------------------------------------------------------------------------------


@njit
def place_along(axis, position, sizes, steps, padded, z, weights, passes):
    """Store weights and passes of L points from z on along one axis, and return the places of their cells along it."""
    lower, weight, passing = find_cell(position, sizes[axis])
    store(weights, axis * padded + z, weight)
    store(passes, axis * padded + z, passing)
    return steps_along(lower, steps[axis])


@njit
def find_cells(lanes, lines, at, number, num_modes, rows, ramp, sizes, steps, first, weights, passes):
    """Evaluate the displacement of line `number` and find the cells of its points.

    Args:
        lanes: a tuple of L whole numbers.
        lines: flat (d, lines, n) from `at` on.
        at: as said.
        number: of the line among those of the image.
        num_modes: n.
        rows: flat (n, P), the basis turned.
        ramp: 0, 1 .. P - 1.
        sizes: of the image.
        steps: as said above.
        first: (P,) int32 result: place of the first corner of each point's cell.
        weights: (d, P) result: that of the upper neighbour along each axis.
        passes: (d, P) result: 1 where a gradient passes, 0 where the point is clamped.
    """
    real = lines.dtype.type
    size, padded = len(sizes), len(ramp)
    num_lines = 1
    for i in range(size - 1):
        num_lines *= sizes[i]
    x, y = number // sizes[-2], number % sizes[-2]
    from_0 = at + number * num_modes
    from_1 = from_0 + num_lines * num_modes
    from_2 = from_1 + num_lines * num_modes
    for z in range(0, padded, len(lanes)):
        row = load(lanes, rows, z)
        u_0, u_1 = row * spread(lanes, lines, from_0), row * spread(lanes, lines, from_1)
        u_2 = row * spread(lanes, lines, from_2) if size == 3 else u_1
        for m in range(1, num_modes):
            row = load(lanes, rows, m * padded + z)
            u_0 = fma(spread(lanes, lines, from_0 + m), row, u_0)
            u_1 = fma(spread(lanes, lines, from_1 + m), row, u_1)
            if size == 3:
                u_2 = fma(spread(lanes, lines, from_2 + m), row, u_2)
        along = load(lanes, ramp, z)
        if size == 2:
            place = place_along(0, u_0 + real(y), sizes, steps, padded, z, weights, passes)
            place = add_places(place, place_along(1, u_1 + along, sizes, steps, padded, z, weights, passes))
        else:
            place = place_along(0, u_0 + real(x), sizes, steps, padded, z, weights, passes)
            place = add_places(place, place_along(1, u_1 + real(y), sizes, steps, padded, z, weights, passes))
            place = add_places(place, place_along(2, u_2 + along, sizes, steps, padded, z, weights, passes))
        store(first, z, place)


@njit
def gather(image, base, first, sizes, steps, corners):
    """Copy the voxels around the points to corners, (2^(d - 2), P, 4): the four in a plane together, in their order."""
    padded = len(first)
    down = steps[-2] if sizes[-2] > 1 else 0
    across = steps[0] if sizes[0] > 1 else 0
    for z in range(padded):
        at = base + first[z]
        store(corners, 4 * z, join(load(PAIR, image, at), load(PAIR, image, at + down)))
        if len(sizes) == 3:
            at += across
            store(corners, 4 * (padded + z), join(load(PAIR, image, at), load(PAIR, image, at + down)))


@njit
def in_plane(lanes, corners, at, down, right):
    """Interpolate between four corners of cells; return values and slopes along the last but one and the last axis."""
    a, b, c, d = split_quads(lanes, corners, at)
    upper_slope, lower_slope = b - a, d - c
    upper = fma(right, upper_slope, a)
    rise = fma(right, lower_slope, c) - upper
    return fma(down, rise, upper), rise, fma(down, lower_slope - upper_slope, upper_slope)


@njit
def interpolate(lanes, sizes, corners, weights, padded, z):
    """Return the value at L points from z on and its slopes along the three axes (of two the last stands twice)."""
    size = len(sizes)
    down = load(lanes, weights, (size - 2) * padded + z)
    right = load(lanes, weights, (size - 1) * padded + z)
    value, rise, slope = in_plane(lanes, corners, 4 * z, down, right)
    if size == 2:
        return value, rise, slope, slope
    across = load(lanes, weights, z)
    value_2, rise_2, slope_2 = in_plane(lanes, corners, 4 * (padded + z), down, right)
    step = value_2 - value
    return fma(across, step, value), step, fma(across, rise_2 - rise, rise), fma(across, slope_2 - slope, slope)


@njit
def project(lanes, columns, sizes, slopes, padded, modes, projected):
    """Write the products of the columns of the basis with the slopes along each axis: projected is (d, M).

    The even and the odd voxels are added up beside one another, in order.
    """
    size = len(sizes)
    for m in range(0, modes, len(lanes)):
        row, row_ = load(lanes, columns, m), load(lanes, columns, modes + m)
        a_0, a_1 = row * spread(lanes, slopes, 0), row * spread(lanes, slopes, padded)
        b_0, b_1 = row_ * spread(lanes, slopes, 1), row_ * spread(lanes, slopes, padded + 1)
        a_2 = row * spread(lanes, slopes, 2 * padded) if size == 3 else a_1
        b_2 = row_ * spread(lanes, slopes, 2 * padded + 1) if size == 3 else b_1
        for z in range(2, padded, 2):
            row, row_ = load(lanes, columns, z * modes + m), load(lanes, columns, (z + 1) * modes + m)
            a_0 = fma(spread(lanes, slopes, z), row, a_0)
            b_0 = fma(spread(lanes, slopes, z + 1), row_, b_0)
            a_1 = fma(spread(lanes, slopes, padded + z), row, a_1)
            b_1 = fma(spread(lanes, slopes, padded + z + 1), row_, b_1)
            if size == 3:
                a_2 = fma(spread(lanes, slopes, 2 * padded + z), row, a_2)
                b_2 = fma(spread(lanes, slopes, 2 * padded + z + 1), row_, b_2)
        store(projected, m, a_0 + b_0)
        store(projected, modes + m, a_1 + b_1)
        if size == 3:
            store(projected, 2 * modes + m, a_2 + b_2)


@njit
def scatter(sizes, steps, first, weights, padded, quads, start, sums):
    """Add every other point of a line from `start` on to the corners of its cell.

    Neighbouring points overlap by two voxels, and to read what was written a moment ago in other portions is slow.
    """
    size = len(sizes)
    down = 2 * steps[-2] if sizes[-2] > 1 else 0
    across = 2 * steps[0] if sizes[0] > 1 else 0
    for z in range(start, sizes[-1], 2):
        quad, to = load(QUAD, quads, 4 * z), 2 * first[z]
        lower = quad * spread(QUAD, weights, (size - 2) * padded + z)
        upper = quad - lower
        if size == 3:
            weight = spread(QUAD, weights, z)
            lower_2, upper_2 = lower * weight, upper * weight
            lower, upper = lower - lower_2, upper - upper_2
            store(sums, to + across, load(QUAD, sums, to + across) + upper_2)
            store(sums, to + across + down, load(QUAD, sums, to + across + down) + lower_2)
        store(sums, to, load(QUAD, sums, to) + upper)
        store(sums, to + down, load(QUAD, sums, to + down) + lower)


# --- The kernels ------------------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def energy(
    lanes, counter, image, target, lines, num_modes, rows, columns, ramp, present, sizes, steps, wants_gradient,
    totals, gradient, first, weights, passes, slopes, corners, expected, projected, sums,
):  # fmt: skip
    """Compare lines of the warped image with the target, taking runs of lines from `counter` until none is left.

    Args:
        lanes: a tuple of L whole numbers.
        counter: (1,) int64, shared by all threads and 0 at the start.
        image: flat, of `steps`.
        target: flat (B, *S).
        lines: flat (B, d, lines, n).
        num_modes: n.
        rows: flat (n, P): the basis turned, its last column repeated up to P.
        columns: flat (P, M): the basis with zeros.
        ramp: 0, 1 .. P - 1.
        present: (P,), 1 within the line and 0 beyond.
        sizes: S.
        steps: between neighbours of the image along each axis, the last 1.
        wants_gradient: whether to compute it.
        totals: result (B, lines) float64: the sums of squares.
        gradient: flat result (B, d, lines, n).
        first: scratch of this thread, P int32.
        weights: scratch, d P values.
        passes: scratch, d P values.
        slopes: scratch, d P values.
        corners: scratch, 2^d P values.
        expected: scratch, P values, 0 at the start.
        projected: scratch, d M values.
        sums: scratch, L float64.
    """
    size, padded, length = len(sizes), len(ramp), sizes[-1]
    modes = len(columns) // padded
    num_lines = 1
    for i in range(size - 1):
        num_lines *= sizes[i]
    total_lines = len(totals)
    while True:
        start = fetch_add(counter) * LINES_PER_TASK
        if start >= total_lines:
            break
        for line in range(start, min(start + LINES_PER_TASK, total_lines)):
            b, number = line // num_lines, line % num_lines
            at = b * size * num_lines * num_modes
            find_cells(lanes, lines, at, number, num_modes, rows, ramp, sizes, steps, first, weights, passes)
            gather(image, 0, first, sizes, steps, corners)
            copy(target, line * length, expected, 0, length)
            for j in range(len(lanes)):
                sums[j] = 0.0
            for z in range(0, padded, len(lanes)):
                value, slope_0, slope_1, slope_2 = interpolate(lanes, sizes, corners, weights, padded, z)
                residual = (value - load(lanes, expected, z)) * load(lanes, present, z)
                wide = widen(residual)
                store(sums, 0, fma(wide, wide, load(lanes, sums, 0)))
                if wants_gradient:
                    twice = residual + residual
                    store(slopes, z, twice * slope_0 * load(lanes, passes, z))
                    store(slopes, padded + z, twice * slope_1 * load(lanes, passes, padded + z))
                    if size == 3:
                        store(slopes, 2 * padded + z, twice * slope_2 * load(lanes, passes, 2 * padded + z))
            total = 0.0
            for j in range(len(lanes)):
                total += sums[j]
            totals[line] = total
            if wants_gradient:
                project(lanes, columns, sizes, slopes, padded, modes, projected)
                for i in range(size):
                    to = at + (i * num_lines + number) * num_modes
                    copy(projected, i * modes, gradient, to, num_modes)


@njit(nogil=True, cache=True)
def warp(
    lanes, counter, image, plane, num_channels, is_shared, lines, num_modes, rows, ramp, sizes, steps, out,
    first, weights, passes, corners, warped,
):  # fmt: skip
    """Warp line by line, taking runs of lines from `counter` until none is left.

    Arguments as in `energy`, with `plane`, the distance of the image's channels, and `is_shared`, whether one image is
    there for all subjects. Result: `out`, flat (B, C, *S). `warped` is scratch, P values.
    """
    size, padded, length = len(sizes), len(ramp), sizes[-1]
    num_lines = 1
    for i in range(size - 1):
        num_lines *= sizes[i]
    total_lines = len(out) // (num_channels * length)
    while True:
        start = fetch_add(counter) * LINES_PER_TASK
        if start >= total_lines:
            break
        for line in range(start, min(start + LINES_PER_TASK, total_lines)):
            b, number = line // num_lines, line % num_lines
            at = b * size * num_lines * num_modes
            find_cells(lanes, lines, at, number, num_modes, rows, ramp, sizes, steps, first, weights, passes)
            for c in range(num_channels):
                base = c * plane if is_shared else (b * num_channels + c) * plane
                gather(image, base, first, sizes, steps, corners)
                for z in range(0, padded, len(lanes)):
                    store(warped, z, interpolate(lanes, sizes, corners, weights, padded, z)[0])
                to = ((b * num_channels + c) * num_lines + number) * length
                copy(warped, 0, out, to, length)


@njit(nogil=True, cache=True)
def splat_subjects(
    lanes, counter, image, lines, num_modes, rows, ramp, sizes, steps, numerator, denominator,
    first, weights, passes, given, quads, sums,
):  # fmt: skip
    """Splat subject by subject, taking subjects from `counter` until none is left.

    A voxel's two sums lie side by side while they are taken, and those of the two neighbours along the last axis make
    one vector.

    Arguments as in `energy`, where `image` is flat (B, *S) and `steps` are those of the sums. Results: `numerator` and
    `denominator`, flat (B, *S). Scratch: `given`, P values, 0 at the start; `quads`, 4 P values; `sums`, two for every
    voxel, with two voxels along the last axis where there is one.
    """
    size, padded, length = len(sizes), len(ramp), sizes[-1]
    num_lines = 1
    for i in range(size - 1):
        num_lines *= sizes[i]
    while True:
        b = fetch_add(counter)
        if b * num_lines * length >= len(image):
            break
        sums[:] = 0
        for number in range(num_lines):
            at = b * size * num_lines * num_modes
            find_cells(lanes, lines, at, number, num_modes, rows, ramp, sizes, steps, first, weights, passes)
            copy(image, (b * num_lines + number) * length, given, 0, length)
            for z in range(0, padded, len(lanes)):
                value, right = load(lanes, given, z), load(lanes, weights, (size - 1) * padded + z)
                left, product = 1 - right, value * right
                store_quads(quads, 4 * z, value - product, left, product, right)
            scatter(sizes, steps, first, weights, padded, quads, 0, sums)
            scatter(sizes, steps, first, weights, padded, quads, 1, sums)
        for number in range(num_lines):
            at, to = 2 * number * steps[-2], (b * num_lines + number) * length
            for z in range(length):
                numerator[to + z] = sums[at + 2 * z]
                denominator[to + z] = sums[at + 2 * z + 1]
