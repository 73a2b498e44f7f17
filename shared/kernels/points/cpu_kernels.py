"""The Numba kernels: vectors over the points of a leaf of a k-d tree, bits for those that count.

A cloud is three rows of `width` places: x, y, z. A tree has 1, 16, 32, 64 ... leaves, each with the same number of
points, give or take one. `points` holds x, y and z of a leaf's points and `numbers` their numbers in the cloud; places
left over hold infinity, and a number above all. `boxes` are the leaves' (lowest x, highest x, lowest y and so on) and
`halls` those of 16 leaves each; boxes left over are infinitely far. All rows are as long as whole vectors need. A tree
of one leaf keeps the cloud's order.

Bounds are exact in floating point: rounding never turns an order around, so a point is never nearer than its box when
both distances are computed in the same steps. Nothing here may be fused or reordered.

Arrays are flat. L is the length of the tuple `lanes`, on which Numba specialises.
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.extending import intrinsic, models, register_model

from shared.kernels.vectors import VectorType, element_pointer, fetch_add, load, shuffle, splat, store, strides

GROUP = 16  # leaves whose common box is looked at first; a multiple of every L
CHANNELS = 4  # rows that share the reading of the indices
QUERIES = 128  # of a task
NOBODY = 2**31 - 1
# minima, below those of points to choose from
PASSED_OVER, LEFT_OVER = -1.0, -2.0


class Tree(NamedTuple):
    """A k-d tree of a cloud; of several clouds the arrays lie one after the other."""

    width: int  # places of a row of the cloud
    size: int  # N
    leaves: int
    stride: int  # places of a leaf
    step: int  # places of a row of boxes
    reach: int  # places of a row of halls
    points: np.ndarray  # (leaves, 3, stride)
    numbers: np.ndarray  # (leaves, stride) int32
    boxes: np.ndarray  # (6, step)
    halls: np.ndarray  # (6, reach)
    axes: np.ndarray  # (leaves,) int32, axis of the plane through node n, whose halves are nodes 2n and 2n + 1
    splits: np.ndarray  # (leaves,), place of that plane; the root is node 1


# --- What vectors.py lacks --------------------------------------------------------------------------------------------


def _vectors(context, builder, sig, args):
    lanes = next(t.lanes for t in sig.args if isinstance(t, VectorType))
    dtype = next(t.dtype for t in sig.args if isinstance(t, VectorType))
    return [
        x if isinstance(t, VectorType) else splat(builder, context.cast(builder, x, t, dtype), lanes)
        for x, t in zip(args, sig.args, strict=True)
    ]


def _select(sign):
    def select(typingctx, a, b):
        def codegen(context, builder, sig, args):
            first, second = _vectors(context, builder, sig, args)
            return builder.select(builder.fcmp_ordered(sign, first, second), first, second)

        return a(a, b), codegen

    return select


def _bits(sign):
    def bits(typingctx, a, b):
        def codegen(context, builder, sig, args):
            is_so = builder.fcmp_ordered(sign, *_vectors(context, builder, sig, args))
            return builder.zext(builder.bitcast(is_so, ir.IntType(a.lanes)), ir.IntType(64))

        return types.int64(a, b), codegen

    return bits


lesser = intrinsic(_select("<"))  # of a vector and a vector or number, lane by lane
greater = intrinsic(_select(">"))
bits_below = intrinsic(_bits("<"))  # a whole number, whose bit j says whether lane j of a is below lane j of b
bits_up_to = intrinsic(_bits("<="))
bits_equal = intrinsic(_bits("=="))


@intrinsic
def get(typingctx, array, index):
    """Return array[index]; no negative indices, which cost a test each."""

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
def greatest(typingctx, vector):
    """Return the greatest lane."""

    def codegen(context, builder, sig, args):
        (x,) = args
        for stride in strides(vector.lanes):
            other = shuffle(builder, x, x, [lane ^ stride for lane in range(vector.lanes)])
            x = builder.select(builder.fcmp_ordered(">", x, other), x, other)
        return builder.extract_element(x, ir.Constant(ir.IntType(32), 0))

    return vector.dtype(vector), codegen


class WideKey(types.Type):
    """Numba's type of a key of 128 bits."""

    def __init__(self):
        super().__init__(name="WideKey")


@register_model(WideKey)
class _WideKeyModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.IntType(128))


@intrinsic
def key(typingctx, value, number):
    """Return a key: keys are in the order of their values, which are not negative, then in that of their numbers."""
    result = types.int64 if value == types.float32 else WideKey()

    def codegen(context, builder, sig, args):
        wide = context.get_value_type(result)
        high, low = builder.bitcast(args[0], ir.IntType(value.bitwidth)), builder.zext(args[1], wide)
        return builder.or_(builder.shl(builder.zext(high, wide), ir.Constant(wide, 32)), low)

    return result(value, types.int32), codegen


@intrinsic
def value_of(typingctx, key):
    """Return the value of a key."""
    result = types.float32 if key == types.int64 else types.float64

    def codegen(context, builder, sig, args):
        high = builder.lshr(args[0], ir.Constant(args[0].type, 32))
        return builder.bitcast(builder.trunc(high, ir.IntType(result.bitwidth)), context.get_value_type(result))

    return result(key), codegen


@intrinsic
def number_of(typingctx, key):
    """Return the number of a key."""

    def codegen(context, builder, sig, args):
        return builder.trunc(args[0], ir.IntType(32))

    return types.int32(key), codegen


@intrinsic
def in_order(typingctx, a, b):
    """Return two keys, the first in order before the other."""

    def codegen(context, builder, sig, args):
        is_so = builder.icmp_unsigned("<", *args)
        first, second = builder.select(is_so, *args), builder.select(is_so, *reversed(args))
        return context.make_tuple(builder, sig.return_type, [first, second])

    return types.UniTuple(a, 2)(a, a), codegen


@intrinsic
def third_at_most(typingctx, vector):
    """Return a number that three lanes or more do not exceed: the third least of four lanes' minima."""

    def codegen(context, builder, sig, args):
        def both(a, b):
            is_less = builder.fcmp_ordered("<", a, b)
            return builder.select(is_less, a, b), builder.select(is_less, b, a)

        def beside(x, stride):
            return shuffle(builder, x, x, [lane ^ stride for lane in range(vector.lanes)])

        (x,) = args
        for stride in strides(vector.lanes)[:-2]:
            x, _ = both(x, beside(x, stride))
        low, high = both(x, beside(x, 1))
        # of two pairs the second greatest: the lesser of the greater two, or the greater of the lesser two
        (middle, _), (_, other) = both(high, beside(high, 2)), both(low, beside(low, 2))
        return builder.extract_element(both(middle, other)[1], ir.Constant(ir.IntType(32), 0))

    return vector.dtype(vector), codegen


@intrinsic
def lowest_bit(typingctx, bits):
    """Return the place of the lowest bit that is set; one must be."""

    def codegen(context, builder, sig, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


@njit
def distances(lanes, points, at, step, x, y, z):
    """Return the squared distances of L points, whose x begin at points[at], from one."""
    dx, dy, dz = load(lanes, points, at) - x, load(lanes, points, at + step) - y, load(lanes, points, at + 2 * step) - z
    return (dx * dx + dy * dy) + dz * dz


@njit
def box_distances(lanes, boxes, at, step, x, y, z):
    """Return the squared distances of L boxes, from number `at` on, from a point: 0 inside."""
    dx = greater(greater(load(lanes, boxes, at) - x, x - load(lanes, boxes, at + step)), 0)
    dy = greater(greater(load(lanes, boxes, at + 2 * step) - y, y - load(lanes, boxes, at + 3 * step)), 0)
    dz = greater(greater(load(lanes, boxes, at + 4 * step) - z, z - load(lanes, boxes, at + 5 * step)), 0)
    return (dx * dx + dy * dy) + dz * dz


# --- The tree ---------------------------------------------------------------------------------------------------------


@njit
def extent(lanes, values, low, high):
    """Return the lowest and the highest of values[low:high], at least L of them."""
    least = most = load(lanes, values, high - len(lanes))
    for i in range(low, high - len(lanes), len(lanes)):
        vector = load(lanes, values, i)
        least, most = lesser(least, vector), greater(most, vector)
    return -greatest(0 - least), greatest(most)


@njit
def widest(cloud, width, order, low, high):
    """Return the axis along which the points order[low:high] reach furthest, and their lowest place along it."""
    best, place, found = cloud.dtype.type(-1), cloud.dtype.type(0), 0
    for axis in range(3):
        least = most = get(cloud, axis * width + get(order, low))
        for i in range(low + 1, high):
            value = get(cloud, axis * width + get(order, i))
            least = value if value < least else least
            most = value if value > most else most
        if most - least > best:
            best, place, found = most - least, least, axis
    return found, place


@njit
def swap(array, i, j):
    """Exchange two values."""
    a, b = get(array, i), get(array, j)
    put(array, i, b)
    put(array, j, a)


@njit
def select(keys, first, last, middle):
    """Order the keys from `first` to `last`, which all differ, so that none before `middle` is above one after it."""
    seed = 1
    while last - first > 1:
        third = (last - first + 1) // 3
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF  # against an order of the cloud that always misleads
        at = first + (seed >> 8) % third
        a, b, c = get(keys, at), get(keys, at + third), get(keys, at + 2 * third)
        pivot, to = max(min(a, b), min(max(a, b), c)), first  # one is below it, so that the keys always divide
        for i in range(first, last + 1):
            value = get(keys, i)
            put(keys, i, get(keys, to))
            put(keys, to, value)
            to += value < pivot
        if middle < to:
            last = to - 1
        else:
            first = to
    if last > first and get(keys, first) > get(keys, last):
        swap(keys, first, last)


@njit
def plant(lanes, cloud, tree, order, keys):
    """Make the tree of a cloud.

    Args:
        lanes: of the vectors.
        cloud: three rows.
        tree: all its arrays are overwritten.
        order: scratch, (size,) int32.
        keys: scratch, (size,) int64.
    """
    width, size, leaves, stride, step = tree.width, tree.size, tree.leaves, tree.stride, tree.step
    for i in range(size):
        put(order, i, np.int32(i))
    nodes = 1
    while nodes < leaves:
        for k in range(nodes):
            low, high, middle = size * k // nodes, size * (k + 1) // nodes, size * (2 * k + 1) // (2 * nodes)
            axis, place = widest(cloud, width, order, low, high)
            row = axis * width
            for i in range(low, high):
                number = get(order, i)
                put(keys, i, key(np.float32(get(cloud, row + number) - place), number))
            select(keys, low, high - 1, middle)
            for i in range(low, high):
                put(order, i, number_of(get(keys, i)))
            tree.axes[nodes + k], tree.splits[nodes + k] = axis, cloud[row + order[middle]]
        nodes *= 2
    tree.points[:], tree.numbers[:], tree.boxes[:], tree.halls[:] = np.inf, NOBODY, np.inf, np.inf
    for leaf in range(leaves):
        low = size * leaf // leaves
        count = size * (leaf + 1) // leaves - low
        for axis in range(3):
            to = (3 * leaf + axis) * stride
            for j in range(count):
                put(tree.points, to + j, get(cloud, axis * width + get(order, low + j)))
            least, most = -np.inf, np.inf  # of a single leaf, which may have too few points for a vector
            if leaves > 1:
                least, most = extent(lanes, tree.points, to, to + count)
            tree.boxes[2 * axis * step + leaf], tree.boxes[(2 * axis + 1) * step + leaf] = least, most
        for j in range(count):
            put(tree.numbers, leaf * stride + j, get(order, low + j))
    for group in range(leaves // GROUP):
        for axis in range(3):
            low, high = 2 * axis * step + group * GROUP, (2 * axis + 1) * step + group * GROUP
            tree.halls[2 * axis * tree.reach + group] = extent(lanes, tree.boxes, low, low + GROUP)[0]
            tree.halls[(2 * axis + 1) * tree.reach + group] = extent(lanes, tree.boxes, high, high + GROUP)[1]


@njit
def tree_of(trees, k):
    """Return tree k of several, which share its arrays in that order."""
    places = trees.leaves * trees.stride
    return Tree(
        trees.width, trees.size, trees.leaves, trees.stride, trees.step, trees.reach,
        trees.points[3 * k * places : 3 * (k + 1) * places], trees.numbers[k * places : (k + 1) * places],
        trees.boxes[6 * k * trees.step : 6 * (k + 1) * trees.step],
        trees.halls[6 * k * trees.reach : 6 * (k + 1) * trees.reach],
        trees.axes[k * trees.leaves : (k + 1) * trees.leaves], trees.splits[k * trees.leaves : (k + 1) * trees.leaves],
    )  # fmt: skip


@njit(nogil=True, cache=True)
def plant_all(lanes, counter, clouds, trees, order, keys):
    """Make the trees of all clouds.

    Args:
        lanes: of the vectors.
        counter: (1,) zero at first, common to the threads.
        clouds: their rows, one cloud after the other.
        trees: likewise; overwritten.
        order: see `plant`.
        keys: see `plant`.
    """
    rows = 3 * trees.width
    while True:
        k = fetch_add(counter)
        if k * rows >= len(clouds):
            break
        plant(lanes, clouds[k * rows : (k + 1) * rows], tree_of(trees, k), order, keys)


# --- Sampling ---------------------------------------------------------------------------------------------------------


@njit
def come_nearer(lanes, tree, minima, leaf, x, y, z):
    """Lower the minima of a leaf by the distances from a newly chosen point; return the greatest."""
    at, to, top = 3 * leaf * tree.stride, leaf * tree.stride, load(lanes, minima, leaf * tree.stride) * 0 + LEFT_OVER
    for j in range(0, tree.stride, len(lanes)):
        near = lesser(distances(lanes, tree.points, at + j, tree.stride, x, y, z), load(lanes, minima, to + j))
        store(minima, to + j, near)
        top = greater(top, near)
    return greatest(top)


@njit
def first_of(lanes, tree, minima, leaf, value):
    """Return the lowest number of the leaf's points with this minimum; one must have it."""
    lowest = NOBODY
    for j in range(leaf * tree.stride, (leaf + 1) * tree.stride, len(lanes)):
        bits = bits_equal(load(lanes, minima, j), value)
        while bits != 0:
            lowest = min(lowest, get(tree.numbers, j + lowest_bit(bits)))
            bits &= bits - 1
        if tree.leaves == 1 and lowest < NOBODY:
            break  # which is in order
    return lowest


@njit
def choose(lanes, tree, minima, tops):
    """Return the lowest number of the points with the greatest minimum, and that minimum."""
    top = load(lanes, tops, 0)
    for first in range(len(lanes), tree.step, len(lanes)):
        top = greater(top, load(lanes, tops, first))
    best, chosen = greatest(top), NOBODY
    for first in range(0, tree.step, len(lanes)):
        bits = bits_equal(load(lanes, tops, first), best)
        while bits != 0:
            chosen = min(chosen, first_of(lanes, tree, minima, first + lowest_bit(bits), best))
            bits &= bits - 1
    return chosen, best


@njit(nogil=True, cache=True)
def sample(lanes, counter, clouds, trees, minima, tops, origin, count, out):
    """Choose `count` points of each cloud: each time that with the greatest minimum, of equal ones the first.

    Args:
        lanes: of the vectors.
        counter: (1,) zero at first, common to the threads.
        clouds: their rows, one cloud after the other.
        trees: of all clouds.
        minima: scratch, (leaves, stride): of each point the squared distance from those chosen.
        tops: scratch, (step,): of each leaf the greatest minimum.
        origin: squared norm up to which a point is passed over; negative for none.
        count: how many to choose.
        out: (clouds, count) int32.
    """
    width, step = trees.width, trees.step
    while True:
        k = fetch_add(counter)
        if k * count >= len(out):
            break
        cloud, tree = clouds[3 * k * width : 3 * (k + 1) * width], tree_of(trees, k)
        tops[:] = LEFT_OVER
        for j in range(len(minima)):
            at, leaf = tree.numbers[j], j // tree.stride
            minima[j] = LEFT_OVER if at == NOBODY else np.inf
            if origin >= 0 and at != NOBODY:
                x, y, z = cloud[at], cloud[width + at], cloud[2 * width + at]
                if (x * x + y * y) + z * z <= origin:
                    minima[j] = PASSED_OVER
            tops[leaf] = max(tops[leaf], minima[j])
        chosen, best = 0, minima.dtype.type(np.inf)
        for n in range(count):
            out[k * count + n] = chosen
            if best <= 0:
                continue  # every place is taken: no minimum changes any more
            x, y, z = cloud[chosen], cloud[width + chosen], cloud[2 * width + chosen]
            for first in range(0, step, len(lanes)):
                bits = bits_below(box_distances(lanes, tree.boxes, first, step, x, y, z), load(lanes, tops, first))
                while bits != 0:
                    leaf = first + lowest_bit(bits)
                    tops[leaf] = come_nearer(lanes, tree, minima, leaf, x, y, z)
                    bits &= bits - 1
            chosen, best = choose(lanes, tree, minima, tops)


# --- Neighbours -------------------------------------------------------------------------------------------------------


@njit
def first_in_order(lanes, cloud, width, places, x, y, z, limit, out, to, count):
    """Write the first `count` numbers below `places` of points nearer than the limit; return how many there are."""
    found = 0
    for j in range(0, places, len(lanes)):
        bits = bits_below(distances(lanes, cloud, j, width, x, y, z), limit)
        while bits != 0:
            put(out, to + found, np.int32(j + lowest_bit(bits)))
            found += 1
            if found == count:
                return found
            bits &= bits - 1
    return found


@njit
def leaves_within(lanes, tree, x, y, z, limit, near):
    """Write the leaves whose boxes are nearer than the limit; return how many there are."""
    found = 0
    for hall in range(0, tree.reach, len(lanes)):
        groups = bits_below(box_distances(lanes, tree.halls, hall, tree.reach, x, y, z), limit)
        while groups != 0:
            start = GROUP * (hall + lowest_bit(groups))
            groups &= groups - 1
            for first in range(start, start + GROUP, len(lanes)):
                bits = bits_below(box_distances(lanes, tree.boxes, first, tree.step, x, y, z), limit)
                while bits != 0:
                    put(near, found, np.int32(first + lowest_bit(bits)))
                    found += 1
                    bits &= bits - 1
    return found


@njit
def mark(lanes, tree, leaf, x, y, z, limit, words, pages):
    """Set the bits of the leaf's points that are nearer than the limit, and those of the words they are in."""
    for j in range(0, tree.stride, len(lanes)):
        near = distances(lanes, tree.points, 3 * leaf * tree.stride + j, tree.stride, x, y, z)
        bits = bits_below(near, limit)
        while bits != 0:
            number = np.int64(get(tree.numbers, leaf * tree.stride + j + lowest_bit(bits)))
            word, page = number >> 6, number >> 12
            put(words, word, get(words, word) | (1 << (number & 63)))
            put(pages, page, get(pages, page) | (1 << (word & 63)))
            bits &= bits - 1


@njit
def collect(words, pages, out, to, count):
    """Write the first `count` numbers whose bits are set and clear all bits; return how many were written."""
    found = 0
    for page in range(len(pages)):
        bits = get(pages, page)
        put(pages, page, np.int64(0))
        while bits != 0:
            word = (page << 6) + lowest_bit(bits)
            bits &= bits - 1
            inner = get(words, word)
            put(words, word, np.int64(0))
            while inner != 0 and found < count:
                put(out, to + found, np.int32((word << 6) + lowest_bit(inner)))
                found += 1
                inner &= inner - 1
    return found


@njit(nogil=True, cache=True)
def ball(lanes, counter, clouds, trees, centres, num_centres, limit, near, words, pages, count, out):
    """Find the first `count` points, in the order of their numbers, whose squared distance is below the limit.

    A tree of one leaf is not used: the cloud is read in order until enough are found.

    Args:
        lanes: of the vectors.
        counter: (1,) zero at first, common to the threads.
        clouds: their rows, one cloud after the other.
        trees: of all clouds.
        centres: (clouds, num_centres, 3).
        num_centres: of a cloud.
        limit: squared radius.
        near: scratch, (leaves,) int32.
        words: scratch, a bit for every point, int64; zero before and after.
        pages: scratch, a bit for every word, likewise.
        count: K.
        out: (clouds, num_centres, K) int32.
    """
    tasks, width, size = (num_centres + QUERIES - 1) // QUERIES, trees.width, trees.size
    while True:
        task = fetch_add(counter)
        k = task // tasks
        if 3 * k * num_centres >= len(centres):
            break
        cloud, tree = clouds[3 * k * width : 3 * (k + 1) * width], tree_of(trees, k)
        start = task % tasks * QUERIES
        for centre in range(k * num_centres + start, k * num_centres + min(start + QUERIES, num_centres)):
            x, y, z = centres[3 * centre], centres[3 * centre + 1], centres[3 * centre + 2]
            to, found, num_near, places = centre * count, 0, 0, width
            if tree.leaves > 1:
                num_near = leaves_within(lanes, tree, x, y, z, limit, near)
                candidates = num_near * (size // tree.leaves)
                # some third of them will count; where that is many, the first ones come soon in the cloud's order
                places = min(4 * candidates, width) if candidates * candidates > size * count else 0
            if places > 0:
                found = first_in_order(lanes, cloud, width, places, x, y, z, limit, out, to, count)
            if found < count and places < width:
                for i in range(num_near):
                    mark(lanes, tree, near[i], x, y, z, limit, words, pages)
                found = collect(words, pages, out, to, count)
            first = out[to] if found > 0 else np.int32(0)
            for i in range(to + found, to + count):
                put(out, i, first)


@njit
def look_into(lanes, tree, leaf, x, y, z, bound, a, b, c):
    """Return the keys of the three nearest of a leaf's points and of a, b, c, in order.

    Points further than the bound are passed over.
    """
    at, to, stride = 3 * leaf * tree.stride, leaf * tree.stride, tree.stride
    for start in range(0, stride, 64):
        limit, bits = value_of(c), 0
        limit = bound if bound < limit else limit
        for j in range(start, min(start + 64, stride), len(lanes)):
            near = distances(lanes, tree.points, at + j, stride, x, y, z)
            bits |= bits_up_to(near, limit) << (j - start)
        while bits != 0:
            i = start + lowest_bit(bits)
            bits &= bits - 1
            dx, dy = get(tree.points, at + i) - x, get(tree.points, at + i + stride) - y
            dz = get(tree.points, at + i + 2 * stride) - z
            a, d = in_order(a, key((dx * dx + dy * dy) + dz * dz, get(tree.numbers, to + i)))
            b, d = in_order(b, d)
            c, d = in_order(c, d)
    return a, b, c


@njit
def bound_in(lanes, tree, leaf, x, y, z):
    """Return a squared distance that at least three of the leaf's points do not exceed."""
    at, least = 3 * leaf * tree.stride, distances(lanes, tree.points, 3 * leaf * tree.stride, tree.stride, x, y, z)
    for j in range(len(lanes), tree.stride, len(lanes)):
        least = lesser(least, distances(lanes, tree.points, at + j, tree.stride, x, y, z))
    return third_at_most(least)


@njit(nogil=True, cache=True)
def nearest(lanes, counter, trees, queries, num_queries, dist, out):
    """Find the three nearest points of every query.

    First the leaf on whose side of all planes it lies is looked into, then those whose boxes are not further than the
    third nearest.

    Args:
        lanes: of the vectors.
        counter: (1,) zero at first, common to the threads.
        trees: of all clouds.
        queries: (clouds, num_queries, 3).
        num_queries: of a cloud.
        dist: (clouds, num_queries, 3), distances.
        out: (clouds, num_queries, 3) int32, numbers.
    """
    tasks = (num_queries + QUERIES - 1) // QUERIES
    far = queries.dtype.type(np.inf)
    nobody = key(far, np.int32(NOBODY))
    while True:
        task = fetch_add(counter)
        k = task // tasks
        if 3 * k * num_queries >= len(queries):
            break
        tree = tree_of(trees, k)
        start = task % tasks * QUERIES
        for query in range(k * num_queries + start, k * num_queries + min(start + QUERIES, num_queries)):
            x, y, z = queries[3 * query], queries[3 * query + 1], queries[3 * query + 2]
            node = 1
            while node < tree.leaves:
                node = 2 * node + (get(queries, 3 * query + get(tree.axes, node)) >= get(tree.splits, node))
            home = node - tree.leaves
            bound = bound_in(lanes, tree, home, x, y, z)
            a, b, c = look_into(lanes, tree, home, x, y, z, bound, nobody, nobody, nobody)
            for hall in range(0, tree.reach if tree.leaves > 1 else 0, len(lanes)):
                groups = bits_up_to(box_distances(lanes, tree.halls, hall, tree.reach, x, y, z), value_of(c))
                while groups != 0:
                    start_leaf = GROUP * (hall + lowest_bit(groups))
                    groups &= groups - 1
                    # boxes left over are infinitely far, and so may be the third nearest
                    for first in range(start_leaf, min(start_leaf + GROUP, tree.leaves), len(lanes)):
                        bits = bits_up_to(box_distances(lanes, tree.boxes, first, tree.step, x, y, z), value_of(c))
                        while bits != 0:
                            leaf = first + lowest_bit(bits)
                            bits &= bits - 1
                            if leaf != home:
                                a, b, c = look_into(lanes, tree, leaf, x, y, z, far, a, b, c)
            for i, near in enumerate((a, b, c)):
                put(dist, 3 * query + i, np.sqrt(value_of(near)))
                put(out, 3 * query + i, number_of(near))


# --- Features ---------------------------------------------------------------------------------------------------------


@njit(nogil=True, cache=True)
def gather(counter, features, num_channels, size, idx, count, out):
    """Copy the values of `count` indices of each cloud, a few channels at a time.

    Args:
        counter: (1,) zero at first, common to the threads.
        features: (clouds, num_channels, size) of a whole-numbered type: bits are copied.
        num_channels: C.
        size: points of a cloud.
        idx: (clouds, count) int32.
        count: indices of a cloud.
        out: (clouds, num_channels, count).
    """
    tasks = (num_channels + CHANNELS - 1) // CHANNELS
    while True:
        task = fetch_add(counter)
        start = task // tasks * count
        if start >= len(idx):
            break
        channel = task % tasks * CHANNELS
        row = task // tasks * num_channels + channel
        if channel + CHANNELS <= num_channels:
            at, to = row * size, row * count
            for j in range(count):
                i = np.int64(get(idx, start + j))
                put(out, to + j, get(features, at + i))
                put(out, to + count + j, get(features, at + size + i))
                put(out, to + 2 * count + j, get(features, at + 2 * size + i))
                put(out, to + 3 * count + j, get(features, at + 3 * size + i))
        else:
            for k in range(row, row + num_channels - channel):
                for j in range(count):
                    put(out, k * count + j, get(features, k * size + get(idx, start + j)))


@njit(nogil=True, cache=True)
def scatter(counter, grads, num_channels, size, idx, count, out):
    """Add values to the places that the indices name, in the order of the indices: the adjoint of `gather`.

    Args:
        counter: (1,) zero at first, common to the threads.
        grads: (clouds, num_channels, count).
        num_channels: C.
        size: points of a cloud.
        idx: (clouds, count) int32.
        count: indices of a cloud.
        out: (clouds, num_channels, size).
    """
    tasks = (num_channels + CHANNELS - 1) // CHANNELS
    while True:
        task = fetch_add(counter)
        start = task // tasks * count
        if start >= len(idx):
            break
        channel = task % tasks * CHANNELS
        row = task // tasks * num_channels + channel
        rows = min(CHANNELS, num_channels - channel)
        out[row * size : (row + rows) * size] = 0
        if rows == CHANNELS:
            at, to = row * count, row * size
            for j in range(count):
                i = to + get(idx, start + j)
                put(out, i, get(out, i) + get(grads, at + j))
                put(out, i + size, get(out, i + size) + get(grads, at + count + j))
                put(out, i + 2 * size, get(out, i + 2 * size) + get(grads, at + 2 * count + j))
                put(out, i + 3 * size, get(out, i + 3 * size) + get(grads, at + 3 * count + j))
        else:
            for k in range(row, row + rows):
                for j in range(count):
                    i = k * size + get(idx, start + j)
                    put(out, i, get(out, i) + get(grads, k * count + j))


@njit(nogil=True, cache=True)
def interpolate(counter, features, num_channels, size, idx, weight, count, out):
    """Add up three weighted values per point.

    Args:
        counter: (1,) zero at first, common to the threads.
        features: (clouds, num_channels, size).
        num_channels: C.
        size: points of a cloud.
        idx: (clouds, count, 3) int32.
        weight: (clouds, count, 3).
        count: points to interpolate at.
        out: (clouds, num_channels, count).
    """
    while True:
        row = fetch_add(counter)
        if row * count >= len(out):
            break
        at, to, start = row * size, row * count, row // num_channels * count * 3
        for j in range(count):
            i = start + 3 * j
            a = get(weight, i) * get(features, at + get(idx, i))
            b = get(weight, i + 1) * get(features, at + get(idx, i + 1))
            c = get(weight, i + 2) * get(features, at + get(idx, i + 2))
            put(out, to + j, (a + b) + c)


@njit(nogil=True, cache=True)
def interpolate_backward(counter, grads, num_channels, size, idx, weight, count, out):
    """Add the weighted gradients to the features, point by point.

    Args:
        counter: (1,) zero at first, common to the threads.
        grads: (clouds, num_channels, count).
        num_channels: C.
        size: points of a cloud.
        idx: (clouds, count, 3) int32.
        weight: (clouds, count, 3).
        count: points interpolated at.
        out: (clouds, num_channels, size).
    """
    while True:
        row = fetch_add(counter)
        if row * size >= len(out):
            break
        at, to, start = row * count, row * size, row // num_channels * count * 3
        out[to : to + size] = 0
        for j in range(count):
            grad = get(grads, at + j)
            for i in range(start + 3 * j, start + 3 * j + 3):
                place = to + get(idx, i)
                put(out, place, get(out, place) + get(weight, i) * grad)


@njit(nogil=True, cache=True)
def weight_backward(counter, grads, features, num_channels, size, idx, count, out):
    """Add up the products of gradients and features over the channels, in their order.

    Args:
        counter: (1,) zero at first, common to the threads.
        grads: (clouds, num_channels, count).
        features: (clouds, num_channels, size).
        num_channels: C.
        size: points of a cloud.
        idx: (clouds, count, 3) int32.
        count: points interpolated at.
        out: (clouds, count, 3).
    """
    tasks = (count + QUERIES - 1) // QUERIES
    while True:
        task = fetch_add(counter)
        k = task // tasks
        if 3 * k * count >= len(out):
            break
        start = task % tasks * QUERIES
        stop = min(start + QUERIES, count)
        out[3 * (k * count + start) : 3 * (k * count + stop)] = 0
        for row in range(k * num_channels, (k + 1) * num_channels):
            for j in range(start, stop):
                grad = get(grads, row * count + j)
                for i in range(3 * (k * count + j), 3 * (k * count + j) + 3):
                    put(out, i, get(out, i) + grad * get(features, row * size + get(idx, i)))
