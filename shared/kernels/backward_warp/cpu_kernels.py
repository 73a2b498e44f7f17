"""The Numba kernels: one block of channels at a time, turned so that a pixel's channels form one vector register.

Four vector loads then fetch the four neighbours of a point in all channels of the block, and scattering a gradient is
four vector additions.

Arrays are flat. A turned image is (H + 1, W + 1, L), L channels of a pixel together; its last row and column are 0 and
are only read and written with weight 0. The number of channels L reaches the functions as the length of the tuple
`lanes`: Numba specialises on types.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.extending import intrinsic

from shared.kernels.vectors import (
    element_pointer,
    exchange,
    fetch_add,
    fma,
    load,
    load_at,
    row_sums,
    store,
    store_at,
    strides,
)


@intrinsic
def transpose(typingctx, lanes, source, at, stride, num_in, target, to, target_stride, num_out):
    """Transpose a block of L x L: rows of `source` become columns of `target`.

    The rows from `num_in` on are taken to be 0, and those of the result from `num_out` on are not written.
    """

    def codegen(context, builder, sig, args):
        _, source, at, stride, num_in, target, to, target_stride, num_out = args
        count = sig.args[0].count
        rows = []
        for j in range(count):
            number = ir.Constant(at.type, j)
            present = builder.icmp_signed("<", number, num_in)
            offset = builder.select(present, builder.mul(number, stride), ir.Constant(at.type, 0))
            pointer = element_pointer(context, builder, sig.args[1], source, builder.add(at, offset))
            row = load_at(builder, pointer, count)
            rows.append(builder.select(present, row, ir.Constant(row.type, [0.0] * count)))
        for step in strides(count):
            rows = exchange(builder, rows, step)
        for j, row in enumerate(rows):
            number = ir.Constant(to.type, j)
            with builder.if_then(builder.icmp_signed("<", number, num_out)):
                index = builder.add(to, builder.mul(number, target_stride))
                store_at(builder, row, element_pointer(context, builder, sig.args[5], target, index))
        return context.get_dummy_value()

    place = types.intp
    return types.void(lanes, source, place, place, place, target, place, place, place), codegen


# --- Turning images ---------------------------------------------------------------------------------------------------


@njit
def turn_row(lanes, planes, at, stride, present, width, target, to):
    """Write one row of `present` planes, `stride` apart, as `width` vectors; the lanes from `present` on are 0."""
    full = width // len(lanes) * len(lanes)
    for x in range(0, full, len(lanes)):
        transpose(lanes, planes, at + x, stride, present, target, to + x * len(lanes), len(lanes), len(lanes))
    for x in range(full, width):
        for j in range(len(lanes)):
            target[to + x * len(lanes) + j] = planes[at + j * stride + x] if j < present else 0


@njit
def turn_row_back(lanes, source, at, width, planes, to, stride, present):
    """Undo `turn_row`."""
    full = width // len(lanes) * len(lanes)
    for x in range(0, full, len(lanes)):
        transpose(lanes, source, at + x * len(lanes), len(lanes), len(lanes), planes, to + x, stride, present)
    for x in range(full, width):
        for j in range(present):
            planes[to + j * stride + x] = source[at + x * len(lanes) + j]


@njit
def turn_image(lanes, planes, at, present, height, width, target):
    """Write `present` planes as a turned image, with its row and column of zeros."""
    size = len(lanes)
    for y in range(height):
        to = y * (width + 1) * size
        turn_row(lanes, planes, at + y * width, height * width, present, width, target, to)
        target[to + width * size : to + (width + 1) * size] = 0
    target[height * (width + 1) * size : (height + 1) * (width + 1) * size] = 0


# --- Sampling ---------------------------------------------------------------------------------------------------------


@njit
def find_cells(flow, at, plane, y, height, width, pitch, first, weights, inside):
    """Find the cells of four pixels that the points of row y lie in, each clamped to the image.

    Results, over the row: first (W,) the place of a cell's upper left pixel in rows of `pitch`; weights (2W,) that of
    the right neighbours, then that of the lower; inside (2W,) whether a gradient passes to u, then to v. A coordinate
    that is NaN takes the cell at 0 and keeps NaN as weight.
    """
    real = flow.dtype.type
    zero, last_x, last_y, row = real(0), real(width - 1), real(height - 1), real(y)
    for x in range(width):
        u, v = real(x) + flow[at + x], row + flow[at + plane + x]
        # the comparisons take NaN to 0 before it would become a whole number
        safe_u, safe_v = u if u > zero else zero, v if v > zero else zero
        safe_u, safe_v = safe_u if safe_u < last_x else last_x, safe_v if safe_v < last_y else last_y
        column, line = np.int32(safe_u), np.int32(safe_v)
        first[x] = line * np.int32(pitch) + column
        weights[x] = safe_u - real(column) if u == u else u
        weights[width + x] = safe_v - real(line) if v == v else v
        inside[x] = (u > zero) & (u < last_x)
        inside[width + x] = (v > zero) & (v < last_y)


@njit(nogil=True, cache=True)
def forward(lanes, counter, image, flow, sizes, out, turned, rows, first, weights, inside):
    """Warp block of channels by block of channels, taking blocks from `counter` until none is left.

    Args:
        lanes: a tuple of L whole numbers.
        counter: (1,) int64, shared by all threads and 0 at the start.
        image: flat (B, C, H, W).
        flow: flat (B, 2, H, W).
        sizes: (B, C, H, W).
        out: the flat result (B, C, H, W).
        turned: scratch of this thread, (H + 1) (W + 1) L values.
        rows: scratch, 3 W L values, W rounded up to whole vectors.
        first: scratch, W int32.
        weights: scratch, 2 W values.
        inside: scratch, 2 W bool.
    """
    num_batches, num_channels, height, width = sizes
    size = len(lanes)
    blocks = (num_channels + size - 1) // size
    plane = height * width
    down = (width + 1) * size
    while True:
        task = fetch_add(counter)
        if task >= num_batches * blocks:
            break
        b, block = task // blocks, task % blocks
        present = min(size, num_channels - block * size)
        base = (b * num_channels + block * size) * plane
        turn_image(lanes, image, base, present, height, width, turned)
        for y in range(height):
            find_cells(flow, 2 * b * plane + y * width, plane, y, height, width, width + 1, first, weights, inside)
            for x in range(width):
                at = first[x] * size
                a, b_ = load(lanes, turned, at), load(lanes, turned, at + size)
                c, d = load(lanes, turned, at + down), load(lanes, turned, at + down + size)
                upper = fma(weights[x], b_ - a, a)
                lower = fma(weights[x], d - c, c)
                store(rows, x * size, fma(weights[width + x], lower - upper, upper))
            turn_row_back(lanes, rows, 0, width, out, base + y * width, plane, present)


@njit(nogil=True, cache=True)
def backward(
    lanes, counter, image, flow, grad_out, sizes, wants_image, wants_flow, grad_image, grad_flow,
    turned, gathered, rows, first, weights, inside,
):  # fmt: skip
    """Go back block of channels by block of channels: no two tasks write to the same place.

    Arguments as in `forward`, with the gradient `grad_out` (flat (B, C, H, W)) of the output, and `gathered`, scratch
    like `turned`. Results: if `wants_image` `grad_image`, flat (B, C, H, W), and if `wants_flow` `grad_flow`, flat
    (blocks, B, 2, H, W), to be summed over the blocks.
    """
    num_batches, num_channels, height, width = sizes
    size = len(lanes)
    blocks = (num_channels + size - 1) // size
    plane = height * width
    down = (width + 1) * size
    at_du = (width + size - 1) // size * size * size
    at_dv = 2 * at_du
    zero = flow.dtype.type(0)
    while True:
        task = fetch_add(counter)
        if task >= num_batches * blocks:
            break
        b, block = task // blocks, task % blocks
        present = min(size, num_channels - block * size)
        base = (b * num_channels + block * size) * plane
        base_flow = (block * num_batches + b) * 2 * plane
        if wants_flow:
            turn_image(lanes, image, base, present, height, width, turned)
        if wants_image:
            gathered[: (height + 1) * down] = 0
        for y in range(height):
            find_cells(flow, 2 * b * plane + y * width, plane, y, height, width, width + 1, first, weights, inside)
            turn_row(lanes, grad_out, base + y * width, plane, present, width, rows, 0)
            if wants_flow:
                for x in range(width):
                    at = first[x] * size
                    a, b_ = load(lanes, turned, at), load(lanes, turned, at + size)
                    c, d = load(lanes, turned, at + down), load(lanes, turned, at + down + size)
                    upper_slope, lower_slope = b_ - a, d - c
                    rise = fma(weights[x], lower_slope - upper_slope, c - a)
                    slope = fma(weights[width + x], lower_slope - upper_slope, upper_slope)
                    g = load(lanes, rows, x * size)
                    store(rows, at_du + x * size, g * slope)
                    store(rows, at_dv + x * size, g * rise)
                # the sums of L pixels take the place of the first of them
                for x in range(0, width, size):
                    store(rows, at_du + x, row_sums(lanes, rows, at_du + x * size))
                    store(rows, at_dv + x, row_sums(lanes, rows, at_dv + x * size))
                to = base_flow + y * width
                for x in range(width):
                    grad_flow[to + x] = rows[at_du + x] if inside[x] else zero
                    grad_flow[to + plane + x] = rows[at_dv + x] if inside[width + x] else zero
            if wants_image:
                for x in range(width):
                    at = first[x] * size
                    g = load(lanes, rows, x * size)
                    lower = g * weights[width + x]
                    upper = g - lower
                    upper_right, lower_right = upper * weights[x], lower * weights[x]
                    store(gathered, at, load(lanes, gathered, at) + (upper - upper_right))
                    store(gathered, at + size, load(lanes, gathered, at + size) + upper_right)
                    at += down
                    store(gathered, at, load(lanes, gathered, at) + (lower - lower_right))
                    store(gathered, at + size, load(lanes, gathered, at + size) + lower_right)
        if wants_image:
            for y in range(height):
                turn_row_back(lanes, gathered, y * down, width, grad_image, base + y * width, plane, present)
