"""The Numba kernels: a pixel's channels form vector registers, a 4 x 4 patch of which serves all nine samples.

Numba's disk cache does not see a change in what this file takes from `backward_warp`: delete __pycache__ then.

Arrays are flat. A turned block is (H + 3, W + 3, L), L channels of a pixel together, with a row and a column of zeros
before the image and two after it, so that the patch of every point clamped to the image lies inside; L is `LANES`.
"""

import math

from llvmlite import ir
from numba import njit
from numba.core.extending import intrinsic

from shared.kernels.backward_warp.cpu_kernels import find_cells, turn_row, turn_row_back
from shared.kernels.vectors import VectorType, fetch_add, fma, load, row_sums, store

LANES = 8
_BLOCK = (0,) * LANES  # what the functions of backward_warp take the number of lanes from
BAND = 16  # rows of the image that one task of the forward pass computes


@intrinsic
def zeros(typingctx, array):
    """Return a vector of zeros of the array's type."""

    def codegen(context, builder, sig, args):
        return ir.Constant(context.get_value_type(sig.return_type), [0.0] * LANES)

    return VectorType(array.dtype, LANES)(array), codegen


# --- Turning images ---------------------------------------------------------------------------------------------------


@njit
def turn_block(planes, at, present, height, width, target, to):
    """Write `present` planes as a turned block, with its rows and columns of zeros."""
    down = (width + 3) * LANES
    target[to : to + down] = 0
    for y in range(height):
        row = to + (y + 1) * down
        target[row : row + LANES] = 0
        turn_row(_BLOCK, planes, at + y * width, height * width, present, width, target, row + LANES)
        target[row + (width + 1) * LANES : row + down] = 0
    target[to + (height + 1) * down : to + (height + 3) * down] = 0


# --- Sampling ---------------------------------------------------------------------------------------------------------


@njit(forceinline=True)
def patch_row(turned, at, weight):
    """Interpolate one row of a patch sideways: the three values, and the three differences that they move along."""
    a, b = load(LANES, turned, at), load(LANES, turned, at + LANES)
    c, d = load(LANES, turned, at + 2 * LANES), load(LANES, turned, at + 3 * LANES)
    ab, bc, cd = b - a, c - b, d - c
    return (fma(weight, ab, a), fma(weight, bc, b), fma(weight, cd, c)), (ab, bc, cd)


@njit(forceinline=True)
def add_taps(upper, lower, weight, q, products, squares):
    """Interpolate three taps between two rows and add their products with q, and their squares, to the sums."""
    k0 = fma(weight, lower[0] - upper[0], upper[0])
    k1 = fma(weight, lower[1] - upper[1], upper[1])
    k2 = fma(weight, lower[2] - upper[2], upper[2])
    products = (fma(k0, q, products[0]), fma(k1, q, products[1]), fma(k2, q, products[2]))
    squares = (fma(k0, k0, squares[0]), fma(k1, k1, squares[1]), fma(k2, k2, squares[2]))
    return products, squares


@njit(forceinline=True)
def store3(tile, lane, first, vectors):
    """Keep a pixel's three sums, the `first` and following, for adding over the lanes."""
    store(tile, (first * LANES + lane) * LANES, vectors[0])
    store(tile, ((first + 1) * LANES + lane) * LANES, vectors[1])
    store(tile, ((first + 2) * LANES + lane) * LANES, vectors[2])


@njit(nogil=True, cache=True)
def turn(counter, features, sizes, turned):
    """Turn flat features (B, C, H, W) into (B, blocks, H + 3, W + 3, L), taking blocks from `counter`."""
    num_batches, num_channels, height, width = sizes
    blocks = (num_channels + LANES - 1) // LANES
    while True:
        task = fetch_add(counter)
        if task >= num_batches * blocks:
            break
        b, block = task // blocks, task % blocks
        present = min(LANES, num_channels - block * LANES)
        at = (b * num_channels + block * LANES) * height * width
        turn_block(features, at, present, height, width, turned, task * (height + 3) * (width + 3) * LANES)


@njit(nogil=True, cache=True, error_model="numpy")
def forward(counter, query, flow, turned, sizes, eps, out, norms, rows, tile, sums, first, weights, inside):
    """Correlate band of rows by band of rows, taking bands from `counter` until none is left.

    Args:
        counter: (1,) int64, shared by all threads and 0 at the start.
        query: flat (B, C, H, W).
        flow: flat (B, 2, H, W).
        turned: what `turn` made of the features.
        sizes: (B, C, H, W).
        eps: added to the squared norms.
        out: flat result (B, 9, H, W).
        norms: flat result (B, 10, H, W): one over the norms of the nine samples, then of the query.
        rows: scratch of this thread, C W values, C rounded up to whole vectors.
        tile: scratch, 19 L² values.
        sums: scratch, 19 W values, W rounded up to whole vectors.
        first: scratch, W int32.
        weights: scratch, 2 W values.
        inside: scratch, 2 W bool.
    """
    num_batches, num_channels, height, width = sizes
    blocks = (num_channels + LANES - 1) // LANES
    bands = (height + BAND - 1) // BAND
    plane, down = height * width, (width + 3) * LANES
    whole = (width + LANES - 1) // LANES * LANES
    real = flow.dtype.type
    one, eps = real(1), real(eps)
    while True:
        task = fetch_add(counter)
        if task >= num_batches * bands:
            break
        b, band = task // bands, task % bands
        for y in range(band * BAND, min(band * BAND + BAND, height)):
            find_cells(flow, 2 * b * plane + y * width, plane, y, height, width, width + 3, first, weights, inside)
            for block in range(blocks):
                present = min(LANES, num_channels - block * LANES)
                at = (b * num_channels + block * LANES) * plane + y * width
                turn_row(_BLOCK, query, at, plane, present, width, rows, block * width * LANES)
            for x in range(width):
                fx, fy = weights[x], weights[width + x]
                zero = zeros(rows)
                zero3 = (zero, zero, zero)
                above, middle, below = zero3, zero3, zero3
                square_above, square_middle, square_below = zero3, zero3, zero3
                square = zero
                for block in range(blocks):
                    q = load(LANES, rows, (block * width + x) * LANES)
                    at = (b * blocks + block) * (height + 3) * down + first[x] * LANES
                    row0, _ = patch_row(turned, at, fx)
                    row1, _ = patch_row(turned, at + down, fx)
                    above, square_above = add_taps(row0, row1, fy, q, above, square_above)
                    row2, _ = patch_row(turned, at + 2 * down, fx)
                    middle, square_middle = add_taps(row1, row2, fy, q, middle, square_middle)
                    row3, _ = patch_row(turned, at + 3 * down, fx)
                    below, square_below = add_taps(row2, row3, fy, q, below, square_below)
                    square = fma(q, q, square)
                lane = x % LANES
                store3(tile, lane, 0, above)
                store3(tile, lane, 3, middle)
                store3(tile, lane, 6, below)
                store3(tile, lane, 9, square_above)
                store3(tile, lane, 12, square_middle)
                store3(tile, lane, 15, square_below)
                store(tile, (18 * LANES + lane) * LANES, square)
                if lane == LANES - 1 or x == width - 1:
                    for k in range(19):
                        store(sums, k * whole + x - lane, row_sums(LANES, tile, k * LANES * LANES))
            at = b * 10 * plane + y * width
            for k in range(10):
                for x in range(width):
                    norms[at + k * plane + x] = one / math.sqrt(sums[(9 + k) * whole + x] + eps)
            for k in range(9):
                for x in range(width):
                    unit = norms[at + k * plane + x] * norms[at + 9 * plane + x]
                    out[(b * 9 + k) * plane + y * width + x] = sums[k * whole + x] * unit


@njit(forceinline=True)
def taps_back(upper, lower, weight, q, factors, at, stride, grad_q, grad_v):
    """Go back over three taps.

    Returns:
        The gradients of the six values of the two rows, that of q so far, and its product with dk/dv so far.
    """
    rise0, rise1, rise2 = lower[0] - upper[0], lower[1] - upper[1], lower[2] - upper[2]
    k0, k1, k2 = fma(weight, rise0, upper[0]), fma(weight, rise1, upper[1]), fma(weight, rise2, upper[2])
    along0, along1, along2 = factors[at], factors[at + stride], factors[at + 2 * stride]
    back0, back1, back2 = factors[at + 9 * stride], factors[at + 10 * stride], factors[at + 11 * stride]
    d0, d1, d2 = q * along0 - k0 * back0, q * along1 - k1 * back1, q * along2 - k2 * back2
    grad_q = fma(along2, k2, fma(along1, k1, fma(along0, k0, grad_q)))
    grad_v = fma(d2, rise2, fma(d1, rise1, fma(d0, rise0, grad_v)))
    e0, e1, e2 = d0 * weight, d1 * weight, d2 * weight
    return (d0 - e0, d1 - e1, d2 - e2), (e0, e1, e2), grad_q, grad_v


@njit(forceinline=True)
def patch_row_back(gathered, at, weight, grads, differences, grad_u):
    """Add the gradients of a row's three values to the patch; return that of the sideways weight so far."""
    e0, e1, e2 = grads[0] * weight, grads[1] * weight, grads[2] * weight
    store(gathered, at, load(LANES, gathered, at) + (grads[0] - e0))
    store(gathered, at + LANES, load(LANES, gathered, at + LANES) + (grads[1] - e1 + e0))
    store(gathered, at + 2 * LANES, load(LANES, gathered, at + 2 * LANES) + (grads[2] - e2 + e1))
    store(gathered, at + 3 * LANES, load(LANES, gathered, at + 3 * LANES) + e2)
    return fma(grads[2], differences[2], fma(grads[1], differences[1], fma(grads[0], differences[0], grad_u)))


@njit(forceinline=True)
def add3(a, b):
    """Return a + b for three vectors."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


@njit
def find_factors(out, norms, grad_out, b, at, plane, width, factors):
    """Write, over a row, what stands before q and k in the gradients: dk_j = a_j q - b_j k_j, dq = Σ a_j k_j - e q.

    Places 0 to 8 of `factors` (19, W) are the a_j, 9 to 17 the b_j and 18 is e.
    """
    for x in range(width):
        factors[18 * width + x] = 0
    at_query = (b * 10 + 9) * plane + at
    for k in range(9):
        at_out, at_norm = (b * 9 + k) * plane + at, (b * 10 + k) * plane + at
        for x in range(width):
            norm, norm_query, g = norms[at_norm + x], norms[at_query + x], grad_out[at_out + x]
            factors[k * width + x] = g * norm * norm_query
            factors[(9 + k) * width + x] = g * out[at_out + x] * norm * norm
            factors[18 * width + x] += g * out[at_out + x] * norm_query * norm_query


@njit(nogil=True, cache=True)
def backward(
    counter, query, features, flow, out, norms, grad_out, sizes, grad_query, grad_features, grad_flow,
    turned, gathered, rows, factors, first, weights, inside,
):  # fmt: skip
    """Go back block of channels by block of channels: no two tasks write to the same place.

    Arguments as in `forward`, with the flat `features` (B, C, H, W), what `forward` wrote, and the gradient `grad_out`
    (flat (B, 9, H, W)) of the correlations. Results, flat: `grad_query` and `grad_features` (B, C, H, W), and
    `grad_flow` (blocks, B, 2, H, W), to be summed over the blocks. Scratch: `turned` and `gathered`, (H + 3) (W + 3) L
    values each, `rows`, 4 W L with W rounded up to whole vectors, `factors`, 19 W, and those of `forward`.
    """
    num_batches, num_channels, height, width = sizes
    blocks = (num_channels + LANES - 1) // LANES
    plane, down = height * width, (width + 3) * LANES
    at_dq = (width + LANES - 1) // LANES * LANES * LANES
    at_du, at_dv = 2 * at_dq, 3 * at_dq
    zero = flow.dtype.type(0)
    while True:
        task = fetch_add(counter)
        if task >= num_batches * blocks:
            break
        b, block = task // blocks, task % blocks
        present = min(LANES, num_channels - block * LANES)
        base = (b * num_channels + block * LANES) * plane
        base_flow = (block * num_batches + b) * 2 * plane
        turn_block(features, base, present, height, width, turned, 0)
        gathered[: (height + 3) * down] = 0
        for y in range(height):
            find_cells(flow, 2 * b * plane + y * width, plane, y, height, width, width + 3, first, weights, inside)
            find_factors(out, norms, grad_out, b, y * width, plane, width, factors)
            turn_row(_BLOCK, query, base + y * width, plane, present, width, rows, 0)
            for x in range(width):
                fx, fy = weights[x], weights[width + x]
                q = load(LANES, rows, x * LANES)
                at = first[x] * LANES
                grad_q = q * -factors[18 * width + x]
                grad_u = grad_v = zeros(rows)
                row0, along0 = patch_row(turned, at, fx)
                row1, along1 = patch_row(turned, at + down, fx)
                d0, d1, grad_q, grad_v = taps_back(row0, row1, fy, q, factors, x, width, grad_q, grad_v)
                grad_u = patch_row_back(gathered, at, fx, d0, along0, grad_u)
                row2, along2 = patch_row(turned, at + 2 * down, fx)
                e1, d2, grad_q, grad_v = taps_back(row1, row2, fy, q, factors, 3 * width + x, width, grad_q, grad_v)
                grad_u = patch_row_back(gathered, at + down, fx, add3(d1, e1), along1, grad_u)
                row3, along3 = patch_row(turned, at + 3 * down, fx)
                e2, d3, grad_q, grad_v = taps_back(row2, row3, fy, q, factors, 6 * width + x, width, grad_q, grad_v)
                grad_u = patch_row_back(gathered, at + 2 * down, fx, add3(d2, e2), along2, grad_u)
                grad_u = patch_row_back(gathered, at + 3 * down, fx, d3, along3, grad_u)
                store(rows, at_dq + x * LANES, grad_q)
                store(rows, at_du + x * LANES, grad_u)
                store(rows, at_dv + x * LANES, grad_v)
            turn_row_back(_BLOCK, rows, at_dq, width, grad_query, base + y * width, plane, present)
            # the sums of L pixels take the place of the first of them
            for x in range(0, width, LANES):
                store(rows, at_du + x, row_sums(LANES, rows, at_du + x * LANES))
                store(rows, at_dv + x, row_sums(LANES, rows, at_dv + x * LANES))
            to = base_flow + y * width
            for x in range(width):
                grad_flow[to + x] = rows[at_du + x] if inside[x] else zero
                grad_flow[to + plane + x] = rows[at_dv + x] if inside[width + x] else zero
        for y in range(height):
            at = (y + 1) * down + LANES
            turn_row_back(_BLOCK, gathered, at, width, grad_features, base + y * width, plane, present)
