"""The Numba kernels: row by row, first the cells of a row's points in vectors, then its channels voxel by voxel.

Arrays are flat. The shape S of an image reaches the functions as a tuple whose length is the number of axes: Numba
specialises on types, so that 2-D images pay for no third axis. A row lies along the last axis, and the cell of a point
is named by the place of its lowest corner in the image. Along an axis of size 1 both corners are the same voxel.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.extending import intrinsic

from shared.kernels.vectors import (
    VectorType,
    element_pointer,
    fetch_add,
    fma,
    load,
    load_at,
    shuffle,
    store,
)

# a*b + c may be fused; nothing else is loosened, so that what is no number stays so
_FUSED = {"contract"}
_LANES = (0,) * 8  # points of a row that are sampled together
_ONE = (0,)  # and where fewer are left


@intrinsic
def gather_pairs(typingctx, lanes, image, base, step, first, at):
    """Return image[base + i] and image[base + i + step] for the L cells i from first[at] on, as two vectors.

    `step` counts for a single lane only: rows long enough for several have a neighbour beside every cell.
    """
    vector_type = VectorType(image.dtype, lanes.count)

    def codegen(context, builder, sig, args):
        _, image, base, step, first, at = args
        count = lanes.count
        start = element_pointer(context, builder, sig.args[1], image, base)
        cells = element_pointer(context, builder, sig.args[4], first, at)
        loaded = (builder.load(builder.gep(cells, [ir.Constant(at.type, j)])) for j in range(count))
        pointers = [builder.gep(start, [builder.sext(place, at.type)]) for place in loaded]
        if count == 1:
            both = [load_at(builder, x, 1) for x in (pointers[0], builder.gep(pointers[0], [step]))]
        else:
            pairs = [load_at(builder, pointer, 2) for pointer in pointers]
            while len(pairs) > 1:
                together = range(2 * pairs[0].type.count)
                pairs = [shuffle(builder, a, b, together) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]
            both = [shuffle(builder, pairs[0], pairs[0], range(odd, 2 * count, 2)) for odd in (0, 1)]
        return context.make_tuple(builder, sig.return_type, both)

    return types.UniTuple(vector_type, 2)(lanes, image, types.intp, types.intp, first, types.intp), codegen


@njit
def steps_of(shape):
    """Return the distances of neighbours along the last three axes, 0 along an axis that is missing or of size 1."""
    width, height = shape[len(shape) - 1], shape[len(shape) - 2]
    back = width * height if len(shape) == 3 and shape[0] > 1 else 0
    return back, width if height > 1 else 0, 1 if width > 1 else 0


@njit
def num_voxels(shape):
    """Return the number of voxels of an image."""
    product = 1
    for size in shape:
        product *= size
    return product


# --- Cells ------------------------------------------------------------------------------------------------------------


@njit
def find_axis(displacement, at, start, along, size, stride, is_first, width, first, weights, inside, to):
    """Do the work of `find_cells` for one axis, where voxel x of the row lies at start + along x."""
    real = displacement.dtype.type
    zero, last, last_cell = real(0), real(size - 1), real(max(size - 2, 0))
    step = np.int32(stride)
    for i in range(width):
        # 32 bits for what is computed and no sign for what counts from the array's end: else LLVM makes no vectors
        x = np.uint64(i)
        position = start + along * real(np.int32(i)) + displacement[np.uint64(at) + x]
        # the comparisons take NaN to 0 before it would become a whole number
        safe = position if position > zero else zero
        safe = safe if safe < last else last
        cell = np.floor(safe)
        cell = cell if cell < last_cell else last_cell
        place = np.int32(np.int32(cell) * step)
        first[x] = place if is_first else np.int32(first[x] + place)
        weights[np.uint64(to) + x] = safe - cell if position == position else position
        inside[np.uint64(to) + x] = (position > zero) & (position < last)


@njit
def find_cells(displacement, at, shape, row, first, weights, inside):
    """Find the cells that the points of a row lie in, each clamped to the image.

    Reads the row's displacements from `at` on, components one image apart. Results, over the row of W: first (W,) the
    cells; weights (dW,) those of the upper neighbours, axis by axis; inside (dW,) whether a gradient passes. A
    coordinate that is NaN takes the cell at 0 and keeps NaN as weight; on the upper border the weight is 1.
    """
    real = displacement.dtype.type
    width, plane = shape[len(shape) - 1], num_voxels(shape)
    stride = plane
    for axis in range(len(shape)):
        size = shape[axis]
        stride //= size
        rows = axis < len(shape) - 1
        start = real(row // (stride // width) % size) if rows else real(0)
        along = real(0) if rows else real(1)
        source = at + axis * plane
        find_axis(
            displacement, source, start, along, size, stride, axis == 0, width, first, weights, inside, axis * width
        )


@njit
def reaches(displacement, at, start, width, begin, end):
    """Return whether a row at `start` of the first axis may add to the voxels from `begin` to below `end` of it."""
    touched = False
    for x in range(width):
        position = start + displacement[at + x]
        touched |= (not position < begin) & (not position >= end)
    return touched


# --- Sampling ---------------------------------------------------------------------------------------------------------


@njit
def lerp(a, b, weight):
    """Return a (1 - weight) + b weight, exact at the weights 0 and 1; vectors."""
    return fma(weight, b, fma(0 - weight, a, a))


@njit
def sample_face(lanes, image, base, down, step, first, x, weight_y, weight):
    """Interpolate along the last two axes, at L points from x on."""
    a, b = gather_pairs(lanes, image, base, step, first, x)
    c, d = gather_pairs(lanes, image, base + down, step, first, x)
    return lerp(lerp(a, b, weight), lerp(c, d, weight), weight_y)


@njit
def sample_points(lanes, image, base, shape, first, weights, x, out, to):
    """Interpolate the image that begins at `base` at L points of a row, from x on."""
    width = shape[len(shape) - 1]
    back, down, step = steps_of(shape)
    u, y = load(lanes, weights, x), load(lanes, weights, width + x)
    if len(shape) == 2:
        store(out, to + x, sample_face(lanes, image, base, down, step, first, x, u, y))
    else:
        z = load(lanes, weights, 2 * width + x)
        near = sample_face(lanes, image, base, down, step, first, x, y, z)
        far = sample_face(lanes, image, base + back, down, step, first, x, y, z)
        store(out, to + x, lerp(near, far, u))


@njit
def sample_row(image, base, shape, first, weights, out, to):
    """Interpolate the image that begins at `base` at the points of a row."""
    width = shape[len(shape) - 1]
    full = width // len(_LANES) * len(_LANES)
    for x in range(0, full, len(_LANES)):
        sample_points(_LANES, image, base, shape, first, weights, x, out, to)
    for x in range(full, width):
        sample_points(_ONE, image, base, shape, first, weights, x, out, to)


@njit
def add(lanes, target, at, factor, value):
    """Add factor·value to L entries of `target`."""
    store(target, at, fma(factor, value, load(lanes, target, at)))


@njit
def slope_points(lanes, image, base, shape, first, weights, x, g, slopes, to, plane):
    """Do the work of `slope_row` at L points from x on, where the gradient of the sample is g."""
    width = shape[len(shape) - 1]
    back, down, step = steps_of(shape)
    u, y = load(lanes, weights, x), load(lanes, weights, width + x)
    a, b = gather_pairs(lanes, image, base, step, first, x)
    c, d = gather_pairs(lanes, image, base + down, step, first, x)
    if len(shape) == 2:
        add(lanes, slopes, to + x, g, lerp(c - a, d - b, y))
        add(lanes, slopes, to + plane + x, g, lerp(b - a, d - c, u))
    else:
        z = load(lanes, weights, 2 * width + x)
        e, f = gather_pairs(lanes, image, base + back, step, first, x)
        h, k = gather_pairs(lanes, image, base + back + down, step, first, x)
        ab, cd, ef, hk = lerp(a, b, z), lerp(c, d, z), lerp(e, f, z), lerp(h, k, z)
        add(lanes, slopes, to + x, g, lerp(ef - ab, hk - cd, y))
        add(lanes, slopes, to + plane + x, g, lerp(cd - ab, hk - ef, u))
        add(lanes, slopes, to + 2 * plane + x, g, lerp(lerp(b - a, d - c, y), lerp(f - e, k - h, y), u))


@njit
def slope_row(image, base, shape, first, weights, grad, at_grad, slopes, to, plane):
    """Add to `slopes` the slopes of the image at the points of a row, times `grad`; axes are `plane` apart."""
    width = shape[len(shape) - 1]
    full = width // len(_LANES) * len(_LANES)
    for x in range(0, full, len(_LANES)):
        g = load(_LANES, grad, at_grad + x)
        slope_points(_LANES, image, base, shape, first, weights, x, g, slopes, to, plane)
    for x in range(full, width):
        g = load(_ONE, grad, at_grad + x)
        slope_points(_ONE, image, base, shape, first, weights, x, g, slopes, to, plane)


@njit(nogil=True, cache=True)
def sample(counter, rows_per_task, image, displacement, sizes, shape, shared, out, first, weights, inside):
    """Warp images, taking rows from `counter` until none is left.

    Args:
        counter: (1,) int64, shared by all threads and 0 at the start.
        rows_per_task: that a thread takes at a time.
        image: flat (B, C, *S), or (1, C, *S) if `shared`.
        displacement: flat (B, d, *S).
        sizes: (B, C).
        shape: S.
        shared: whether one image serves all.
        out: the flat result (B, C, *S).
        first: scratch of this thread, W int32.
        weights: scratch, d W values.
        inside: scratch, d W bool.
    """
    num_batches, num_channels = sizes
    plane, width = num_voxels(shape), shape[len(shape) - 1]
    rows = plane // width
    per_image = (rows + rows_per_task - 1) // rows_per_task
    while True:
        task = fetch_add(counter)
        if task >= num_batches * per_image:
            break
        b, begin = task // per_image, task % per_image * rows_per_task
        source = 0 if shared else b * num_channels * plane
        for row in range(begin, min(begin + rows_per_task, rows)):
            at = row * width
            find_cells(displacement, b * len(shape) * plane + at, shape, row, first, weights, inside)
            for c in range(num_channels):
                to = (b * num_channels + c) * plane + at
                sample_row(image, source + c * plane, shape, first, weights, out, to)


@njit
def clear(values, at, keep, at_keep, count):
    """Set to 0 what is not to be kept."""
    zero = values.dtype.type(0)
    for i in range(count):
        place = np.uint64(at) + np.uint64(i)
        values[place] = values[place] if keep[np.uint64(at_keep) + np.uint64(i)] else zero


@njit(nogil=True, cache=True)
def slope(
    counter, rows_per_task, image, displacement, sizes, shape, shared, grad, extra, ones, grad_displacement,
    first, weights, inside,
):  # fmt: skip
    """Differentiate the sum of `grad` times the warped images with respect to the displacement.

    Arguments as in `sample`, with `grad` flat (B, C, *S); `extra` flat (B, 1, *S), one more channel whose `grad` is 1
    everywhere, or empty; `ones`, scratch of W values. The result is flat (B, d, *S).
    """
    num_batches, num_channels = sizes
    plane, width = num_voxels(shape), shape[len(shape) - 1]
    rows = plane // width
    per_image = (rows + rows_per_task - 1) // rows_per_task
    ones[:] = 1
    while True:
        task = fetch_add(counter)
        if task >= num_batches * per_image:
            break
        b, begin = task // per_image, task % per_image * rows_per_task
        source = 0 if shared else b * num_channels * plane
        for row in range(begin, min(begin + rows_per_task, rows)):
            at = row * width
            to = b * len(shape) * plane + at
            find_cells(displacement, to, shape, row, first, weights, inside)
            for axis in range(len(shape)):
                grad_displacement[to + axis * plane : to + axis * plane + width] = 0
            for c in range(num_channels):
                at_grad = (b * num_channels + c) * plane + at
                base = source + c * plane
                slope_row(image, base, shape, first, weights, grad, at_grad, grad_displacement, to, plane)
            if len(extra) > 0:
                slope_row(extra, b * plane, shape, first, weights, ones, 0, grad_displacement, to, plane)
            for axis in range(len(shape)):
                clear(grad_displacement, to + axis * plane, inside, axis * width, width)


# --- Scattering -------------------------------------------------------------------------------------------------------


@njit(fastmath=_FUSED)
def add_pair(target, at, step, weight, value):
    """Share a value out between two neighbours along the last axis."""
    upper = value * weight
    target[at] += value - upper
    target[at + step] += upper


@njit(fastmath=_FUSED)
def add_face(target, at, down, step, weight_y, weight, value):
    """Share a value out between four neighbours along the last two axes."""
    upper = value * weight_y
    add_pair(target, at, step, weight, value - upper)
    add_pair(target, at + down, step, weight, upper)


@njit(fastmath=_FUSED)
def scatter_row(values, at_values, shape, first, weights, begin, end, target, base):
    """Share the values of a row out between the corners of their cells, as far as these are in [begin, end)."""
    width = shape[len(shape) - 1]
    back, down, step = steps_of(shape)
    back, down, step = np.uint64(back), np.uint64(down), np.uint64(step)
    far = back if len(shape) == 3 else down
    for x in range(width):
        place = np.uint64(first[x])
        at = np.uint64(base) + place
        value = values[at_values + x]
        upper = value * weights[x]
        lower = value - upper
        if begin <= place < end:
            if len(shape) == 2:
                add_pair(target, at, step, weights[width + x], lower)
            else:
                add_face(target, at, down, step, weights[width + x], weights[2 * width + x], lower)
        if begin <= place + far < end:
            if len(shape) == 2:
                add_pair(target, at + far, step, weights[width + x], upper)
            else:
                add_face(target, at + far, down, step, weights[width + x], weights[2 * width + x], upper)


@njit(nogil=True, cache=True)
def scatter(
    counter, slabs, values, displacement, sizes, shape, shared, ones, numerator, denominator, first, weights, inside,
):  # fmt: skip
    """Do the transpose of `sample`, taking slabs of the results from `counter` until none is left.

    A slab, some planes across the first axis, belongs to one task, which goes through all rows that reach it in order:
    what a voxel receives is added up in the same order however many slabs there are.

    Arguments as in `sample`, with `values` flat (B, C, *S) and `slabs` those that an image is cut into. Results:
    `numerator` flat (B, C, *S), or (1, C, *S), summed over B, if `shared`; if not empty, `denominator` flat (B, 1, *S),
    the transpose of ones. `ones` is scratch, W values.
    """
    num_batches, num_channels = sizes
    plane, width, size = num_voxels(shape), shape[len(shape) - 1], shape[0]
    across = plane // size
    real = values.dtype.type
    ones[:] = 1
    while True:
        task = fetch_add(counter)
        if task >= (1 if shared else num_batches) * slabs:
            break
        owner, slab = task // slabs, task % slabs
        low, high = slab * size // slabs, (slab + 1) * size // slabs
        begin, end = np.uint64(low * across), np.uint64(high * across)
        for c in range(num_channels):
            to = (owner * num_channels + c) * plane
            numerator[to + low * across : to + high * across] = 0
        if len(denominator) > 0:
            denominator[owner * plane + low * across : owner * plane + high * across] = 0
        # beyond the image lies its border
        nearest = real(low - 1) if low > 0 else real(-np.inf)
        farthest = real(high) if high < size else real(np.inf)
        for b in range(0 if shared else owner, num_batches if shared else owner + 1):
            for row in range(plane // width):
                at = row * width
                source = b * len(shape) * plane + at
                start = real(at // across)
                if slabs > 1 and not reaches(displacement, source, start, width, nearest, farthest):
                    continue
                find_cells(displacement, source, shape, row, first, weights, inside)
                for c in range(num_channels):
                    at_values = (b * num_channels + c) * plane + at
                    to = (owner * num_channels + c) * plane
                    scatter_row(values, at_values, shape, first, weights, begin, end, numerator, to)
                if len(denominator) > 0:
                    scatter_row(ones, 0, shape, first, weights, begin, end, denominator, owner * plane)
