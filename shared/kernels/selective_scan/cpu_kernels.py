"""The Numba kernels: 16 channels at a time in one vector register, tokens in tiles that stay in the first-level cache.

The notation is that of README.md. All arrays are flat: u[(b*D + d)*L + k], B[((b*G + g)*N + n)*L + k],
states[((b*chunks + c)*N + n)*D + d] = h after chunk c.
"""

from llvmlite import ir
from numba import njit, types
from numba.core.extending import intrinsic

from shared.kernels.vectors import (
    VectorType,
    element_pointer,
    exchange,
    fetch_add,
    fma,
    fused,
    load,
    load_at,
    row_sums,
    splat,
    store,
    store_at,
    strides,
)

LANES = 16
CHUNK = 48  # tokens per tile, and between two saved states
HALO = 2  # the farthest neighbour any `side` looks at

# `hold` reaches the kernels as a tuple whose LENGTH is one of these: Numba specialises on types, so each hold is
# compiled to its own straight code.
ZOH_EULER, ZOH_1, ZOH_EXACT, FOH_0, FOH_1, FOH_2, FOH_EXACT, EXP_TRAP = range(1, 9)


def _constant(vector_type, value):
    return ir.Constant(vector_type, [value] * LANES)


@intrinsic
def spread(typingctx, array, index):
    """Return a vector whose 16 lanes all hold array[index]."""

    def codegen(context, builder, sig, args):
        return splat(builder, builder.load(element_pointer(context, builder, sig.args[0], *args)), LANES)

    return VectorType(array.dtype, LANES)(array, types.intp), codegen


@intrinsic
def zeros_like(typingctx, vector):
    """Return a vector of zeros of the same type."""

    def codegen(context, builder, sig, args):
        return _constant(args[0].type, 0.0)

    return vector(vector), codegen


# --- Moving 16 × 16 blocks --------------------------------------------------------------------------------------------


def _row_pointers(context, builder, array_type, array, offset, stride, num_rows):
    """Return pointers to 16 rows `stride` apart; rows from `num_rows` on repeat the last one."""
    last = builder.sub(num_rows, ir.Constant(num_rows.type, 1))
    for j in range(LANES):
        row = ir.Constant(num_rows.type, j)
        row = builder.select(builder.icmp_signed("<", row, last), row, last)
        index = builder.add(offset, builder.mul(row, stride))
        yield element_pointer(context, builder, array_type, array, index)


@intrinsic
def transpose_in(typingctx, source, offset, stride, num_rows, tile, tile_offset):
    """Copy 16 tokens of 16 channels (rows of `source`, `stride` apart) into `tile` as 16 vectors over the channels."""

    def codegen(context, builder, sig, args):
        source, offset, stride, num_rows, tile, tile_offset = args
        pointers = _row_pointers(context, builder, sig.args[0], source, offset, stride, num_rows)
        rows = [load_at(builder, pointer, LANES) for pointer in pointers]
        for step in strides(LANES):
            rows = exchange(builder, rows, step)
        target = element_pointer(context, builder, sig.args[4], tile, tile_offset)
        for j, row in enumerate(rows):
            store_at(builder, row, builder.gep(target, [ir.Constant(ir.IntType(64), j * LANES)]))
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, types.intp, tile, types.intp), codegen


@intrinsic
def transpose_out(typingctx, tile, tile_offset, target, offset, stride, num_rows):
    """Undo `transpose_in`: 16 vectors over the channels become 16 tokens in each of the `num_rows` rows of `target`."""

    def codegen(context, builder, sig, args):
        tile, tile_offset, target, offset, stride, num_rows = args
        source = element_pointer(context, builder, sig.args[0], tile, tile_offset)
        places = (ir.Constant(ir.IntType(64), j * LANES) for j in range(LANES))
        rows = [load_at(builder, builder.gep(source, [place]), LANES) for place in places]
        for step in strides(LANES):
            rows = exchange(builder, rows, step)
        for j, row in enumerate(rows):
            present = builder.icmp_signed("<", ir.Constant(num_rows.type, j), num_rows)
            with builder.if_then(present):
                index = builder.add(offset, builder.mul(ir.Constant(stride.type, j), stride))
                store_at(builder, row, element_pointer(context, builder, sig.args[2], target, index))
        return context.get_dummy_value()

    return types.void(tile, types.intp, target, types.intp, types.intp, types.intp), codegen


# --- The exponential and its relatives --------------------------------------------------------------------------------

# Polynomials on |r| ≤ ln2/2, lowest power first. float32: minimax fits; float64: Taylor.
_PHI1_FLOAT = (0.999999703, 0.499991474, 0.166676436, 0.0418982588, 0.0082901068)
_PHI3_FLOAT = (0.166666667, 0.0416665543, 0.00833330107, 0.00139262416, 0.000198992044)
_INVERSE_FACTORIALS = [1.0]
for _m in range(1, 16):
    _INVERSE_FACTORIALS.append(_INVERSE_FACTORIALS[-1] / _m)
_PHI1_DOUBLE = tuple(_INVERSE_FACTORIALS[1:15])
_PHI3_DOUBLE = tuple(_INVERSE_FACTORIALS[3:16])


class _Exponential:
    """Builds e^z for one vector type: z = k ln2 + r, a polynomial in r, then k added to the exponent bits."""

    def __init__(self, builder, vector_type):
        self.builder, self.type = builder, vector_type
        self.single = isinstance(vector_type.element, ir.FloatType)
        self.lowest, self.highest = (-87.0, 88.0) if self.single else (-708.0, 709.0)
        self.mantissa_bits = 23 if self.single else 52
        self.integer = ir.VectorType(ir.IntType(32 if self.single else 64), LANES)

    def number(self, value):
        return _constant(self.type, value)

    def clamp(self, z):
        # a NaN fails both comparisons and so passes through
        for name, limit in (("<", self.lowest), (">", self.highest)):
            outside = self.builder.fcmp_ordered(name, z, self.number(limit))
            z = self.builder.select(outside, self.number(limit), z)
        return z

    def reduce(self, z):
        """Return (z·log2 e rounded to an integer and still carrying the magic number, the integer, r)."""
        # adding 1.5·2^mantissa rounds to an integer and leaves it in the low bits
        magic = self.number(1.5 * 2.0**self.mantissa_bits)
        shifted = fused(self.builder, z, self.number(1.4426950408889634), magic)
        integer = self.builder.fsub(shifted, magic)
        r = fused(self.builder, integer, self.number(-0.6931471805599453), z)
        if not self.single:
            r = fused(self.builder, integer, self.number(-2.3190468138462996e-17), r)
        return shifted, integer, r

    def horner(self, r, coefficients):
        result = self.number(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            result = fused(self.builder, result, r, self.number(coefficient))
        return result

    def scale(self, value, shifted):
        """Return value · 2^integer."""
        bits = self.builder.shl(
            self.builder.bitcast(shifted, self.integer), _constant(self.integer, self.mantissa_bits)
        )
        return self.builder.bitcast(self.builder.add(self.builder.bitcast(value, self.integer), bits), self.type)


@intrinsic
def exp(typingctx, z):
    """Return e^z to 1e-7 relative (float64: 3e-16); z is clamped to the range of normal numbers."""

    def codegen(context, builder, sig, args):
        e = _Exponential(builder, args[0].type)
        shifted, _, r = e.reduce(e.clamp(args[0]))
        phi1 = e.horner(r, _PHI1_FLOAT if e.single else _PHI1_DOUBLE)
        return e.scale(fused(builder, r, phi1, e.number(1.0)), shifted)

    return z(z), codegen


@intrinsic
def exp_and_phis(typingctx, z, z_inverse):
    """Return e^z, φ1(z), φ2(z), φ3(z).

    The polynomial of the exponential's range reduction IS φ3(r), and φ2, φ1, e^r follow from it by one multiplication
    each. Where |z| ≤ ln2/2 the integer part is 0 and r = z: these are the answers, with no cancellation. Elsewhere the
    quotients (e^z - 1)/z ... are safe, and `z_inverse` = 1/z is only used there (for tiny z it may be infinite or NaN).
    """

    def codegen(context, builder, sig, args):
        z, z_inverse = args
        e = _Exponential(builder, z.type)
        one, half = e.number(1.0), e.number(0.5)
        shifted, integer, r = e.reduce(e.clamp(z))
        series3 = e.horner(r, _PHI3_FLOAT if e.single else _PHI3_DOUBLE)
        series2 = fused(builder, r, series3, half)
        series1 = fused(builder, r, series2, one)
        alpha = e.scale(fused(builder, r, series1, one), shifted)
        small = builder.fcmp_ordered("==", integer, e.number(0.0))
        minus_inverse = builder.fneg(z_inverse)  # x/z - 1/z = (x - 1)/z in one fused step
        phi1 = builder.select(small, series1, fused(builder, alpha, z_inverse, minus_inverse))
        phi2 = builder.select(small, series2, fused(builder, phi1, z_inverse, minus_inverse))
        phi3 = builder.select(small, series3, builder.fmul(builder.fsub(phi2, half), z_inverse))
        return context.make_tuple(builder, sig.return_type, (alpha, phi1, phi2, phi3))

    return types.UniTuple(z, 4)(z, z_inverse), codegen


@intrinsic
def softplus_and_slope(typingctx, x):
    """Return softplus(x) and its derivative σ(x); above 20 they are x and 1."""

    def codegen(context, builder, sig, args):
        (x,) = args
        e = _Exponential(builder, x.type)
        one, zero, two = e.number(1.0), e.number(0.0), e.number(2.0)
        positive = builder.fcmp_ordered(">", x, zero)
        shifted, _, r = e.reduce(e.clamp(builder.select(positive, builder.fneg(x), x)))
        phi1 = e.horner(r, _PHI1_FLOAT if e.single else _PHI1_DOUBLE)
        t = e.scale(fused(builder, r, phi1, one), shifted)  # e^-|x| in (0, 1]
        # log(1 + t) = 2 artanh(t / (2 + t)), whose argument is at most 1/3: no cancellation for small t
        s = builder.fdiv(t, builder.fadd(two, t))
        series = e.horner(builder.fmul(s, s), [1 / (2 * m + 1) for m in range(8 if e.single else 17)])
        log1p = builder.fmul(builder.fmul(two, s), series)
        softplus = builder.fadd(builder.select(positive, x, zero), log1p)
        sigmoid = builder.fdiv(builder.select(positive, one, t), builder.fadd(one, t))
        linear = builder.fcmp_ordered(">", x, e.number(20.0))
        softplus = builder.select(linear, x, softplus)
        sigmoid = builder.select(linear, one, sigmoid)
        # a NaN made every comparison false and was lost in max(x, 0): put it back
        softplus = builder.fadd(softplus, builder.fmul(x, zero))
        return context.make_tuple(builder, sig.return_type, (softplus, sigmoid))

    return types.UniTuple(x, 2)(x), codegen


@njit(forceinline=True)
def sigmoid(x):
    """Return 1/(1 + e^-x)."""
    return 1.0 / (exp(zeros_like(x) - x) + 1.0)


# The scratch of one thread, in sections of CHUNK vectors. Those that reach beyond the tile have a halo on both sides.
# One vector of padding: sections a power of two apart would all compete for the same few lines of the cache.
SECTION = (CHUNK + 1) * LANES
WITH_HALO = SECTION + 2 * HALO * LANES
AT_U = 0
AT_OTHER = AT_U + WITH_HALO  # the neighbour of every token
AT_DELTA = AT_OTHER + SECTION
AT_INVERSE = AT_DELTA + SECTION  # 1/Δ, for the holds that divide by z
AT_SIGMA = AT_INVERSE + SECTION  # dΔ/d(delta)
AT_M = AT_SIGMA + SECTION  # Δm_0, Δm_1, Δm_2
AT_Y = AT_M + 3 * SECTION
AT_GATE = AT_Y + SECTION
AT_BIAS = AT_GATE + SECTION  # one vector, as the next two
AT_SKIP = AT_BIAS + LANES
AT_PRESENT = AT_SKIP + LANES  # 1 in the lanes that hold a channel, 0 in the others
AT_A = AT_PRESENT + LANES
# forward: N vectors of A, then N of the state
AT_G = AT_A  # backward only, from here on: the gradient of y
AT_GRAD_U = AT_G + SECTION
AT_GRAD_M = AT_GRAD_U + WITH_HALO
AT_DECAY = AT_GRAD_M + 3 * SECTION  # Σ_n a λ w, the part of dΔ that comes through z
AT_GRAD_SKIP = AT_DECAY + SECTION
AT_GRAD_BIAS = AT_GRAD_SKIP + LANES
AT_STATES = AT_GRAD_BIAS + LANES  # two sets (a pair of states) of the STATE_* sections
STATE_ALPHA, STATE_W, STATE_PHI1, STATE_PHI2, STATE_GRAD_B, STATE_GRAD_C, STATE_SIZE = (i * SECTION for i in range(7))
AT_A_BACKWARD = AT_STATES + 2 * STATE_SIZE  # N vectors of A, N of its gradient, N of the running α λ


def scratch_size(num_states: int) -> int:
    """Return how many values of scratch one thread needs."""
    return AT_A_BACKWARD + 3 * num_states * LANES


# --- The holds --------------------------------------------------------------------------------------------------------
# Every hold is Δs = Σ_i c_i(z) m_i: functions c_i of z = Δa, times numbers m_i that do not depend on n and are made
# once per (channel, token) from Δ and the two ends of the interval, l and r. Its derivative is Δs' = Σ_i c_i'(z) m_i.
#
#   hold        c                m
#   zoh_euler   1                Δl
#   zoh_1       1, z             Δl, Δl/2
#   zoh_exact   φ1               Δl                              φ1' = φ1 - φ2
#   foh_0       1                Δ(l+r)/2
#   foh_1       1, z             Δ(l+r)/2, Δ(l/3 + r/6)
#   foh_2       1, z, z²         Δ(l+r)/2, Δ(l/3 + r/6), Δ(l/8 + r/24)
#   foh_exact   φ1, φ2           Δl, Δ(r-l)                      φ2' = φ2 - 2φ3
#   exp_trap    1, e^z           Δr/2, Δl/2


@njit(forceinline=True)
def needs_phis(hold):
    """Tell whether the hold uses φ1 and φ2."""
    return len(hold) == ZOH_EXACT or len(hold) == FOH_EXACT


@njit(forceinline=True)
def mixtures(hold, left, right):
    """Return m_0, m_1, m_2 without their factor Δ."""
    zero = zeros_like(left)
    if len(hold) == ZOH_1:
        return left, left * 0.5, zero
    if len(hold) == FOH_0:
        return (left + right) * 0.5, zero, zero
    if len(hold) == FOH_1 or len(hold) == FOH_2:
        return (left + right) * 0.5, fma(left, 1 / 3, right * (1 / 6)), fma(left, 1 / 8, right * (1 / 24))
    if len(hold) == FOH_EXACT:
        return left, right - left, zero
    if len(hold) == EXP_TRAP:
        return right * 0.5, left * 0.5, zero
    return left, zero, zero


@njit(forceinline=True)
def unmix(hold, d0, d1, d2):
    """Return the gradients of left and right from those of m_0, m_1, m_2 (the transpose of `mixtures`)."""
    zero = zeros_like(d0)
    if len(hold) == ZOH_1:
        return fma(d1, 0.5, d0), zero
    if len(hold) == FOH_0:
        return d0 * 0.5, d0 * 0.5
    if len(hold) == FOH_1:
        return fma(d1, 1 / 3, d0 * 0.5), fma(d1, 1 / 6, d0 * 0.5)
    if len(hold) == FOH_2:
        return fma(d2, 1 / 8, fma(d1, 1 / 3, d0 * 0.5)), fma(d2, 1 / 24, fma(d1, 1 / 6, d0 * 0.5))
    if len(hold) == FOH_EXACT:
        return d0 - d1, d1
    if len(hold) == EXP_TRAP:
        return d1 * 0.5, d0 * 0.5
    return d0, zero


@njit(forceinline=True)
def num_terms(hold):
    """Return how many m_i the hold has."""
    if len(hold) == ZOH_EULER or len(hold) == ZOH_EXACT or len(hold) == FOH_0:
        return 1
    return 3 if len(hold) == FOH_2 else 2


@njit(forceinline=True)
def constant_drive(hold):
    """Tell whether Δs does not depend on z, so that Δs' = 0."""
    return len(hold) == ZOH_EULER or len(hold) == FOH_0


@njit(forceinline=True)
def load_mixtures(hold, tile, k):
    """Load Δm_0, Δm_1, Δm_2 of token k; those the hold does not have are 0."""
    m0 = load(LANES, tile, AT_M + k * LANES)
    m1 = m2 = zeros_like(m0)
    if num_terms(hold) > 1:
        m1 = load(LANES, tile, AT_M + SECTION + k * LANES)
    if num_terms(hold) > 2:
        m2 = load(LANES, tile, AT_M + 2 * SECTION + k * LANES)
    return m0, m1, m2


@njit(forceinline=True)
def load_grad_mixtures(hold, tile, k):
    """Load the gradients of Δm_0, Δm_1, Δm_2 of token k; those the hold does not have are 0."""
    d0 = load(LANES, tile, AT_GRAD_M + k * LANES)
    d1 = d2 = zeros_like(d0)
    if num_terms(hold) > 1:
        d1 = load(LANES, tile, AT_GRAD_M + SECTION + k * LANES)
    if num_terms(hold) > 2:
        d2 = load(LANES, tile, AT_GRAD_M + 2 * SECTION + k * LANES)
    return d0, d1, d2


@njit(forceinline=True)
def drive(hold, z, alpha, phi1, phi2, m0, m1, m2):
    """Return Δs."""
    if len(hold) == ZOH_EXACT:
        return phi1 * m0
    if len(hold) == FOH_EXACT:
        return fma(phi1, m0, phi2 * m1)
    if len(hold) == EXP_TRAP:
        return fma(alpha, m1, m0)
    if len(hold) == ZOH_1 or len(hold) == FOH_1:
        return fma(z, m1, m0)
    if len(hold) == FOH_2:
        return fma(z, fma(z, m2, m1), m0)
    return m0


@njit(forceinline=True)
def advance(hold, h, z, z_inverse, m, b):
    """Return h_k = e^z h_{k-1} + B_k Δs."""
    if needs_phis(hold):
        alpha, phi1, phi2, _ = exp_and_phis(z, z_inverse)
    else:
        alpha = exp(z)
        phi1 = phi2 = z
    return fma(alpha, h, drive(hold, z, alpha, phi1, phi2, m[0], m[1], m[2]) * b)


# --- Tiles ------------------------------------------------------------------------------------------------------------


@njit
def load_tile(source, base, stride, num_rows, first, count, tile, at):
    """Bring tokens first ... first + count - 1 of up to 16 channels into `tile` at `at`, one vector per token."""
    full = count // LANES * LANES
    for k in range(0, full, LANES):
        transpose_in(source, base + first + k, stride, num_rows, tile, at + k * LANES)
    for k in range(full, count):
        for j in range(LANES):
            tile[at + k * LANES + j] = source[base + min(j, num_rows - 1) * stride + first + k]


@njit
def store_tile(tile, at, target, base, stride, num_rows, first, count):
    """Undo `load_tile`, for the channels that exist."""
    full = count // LANES * LANES
    for k in range(0, full, LANES):
        transpose_out(tile, at + k * LANES, target, base + first + k, stride, num_rows)
    for k in range(full, count):
        for j in range(num_rows):
            target[base + j * stride + first + k] = tile[at + k * LANES + j]


@njit
def clamp_to_row(j, k, row_length, L):
    """Return j clamped to the row of token k."""
    start = k // row_length * row_length
    return max(start, min(j, min(start + row_length, L) - 1))


@njit(forceinline=True)
def neighbour_of(k, offset, row_length, L):
    """Return the token that token k looks at: k + offset, clamped to k's row."""
    if row_length >= L:
        return max(0, min(k + offset, L - 1))
    return clamp_to_row(k + offset, k, row_length, L)


@njit(forceinline=True)
def load_inputs(
    hold, u, delta, has_bias, softplus, geometry, base, num_rows, row_length, first, count, tile, with_sigma
):
    """Fill the tile's input sections for tokens first ... first + count - 1 of one block of channels."""
    L, offset, swap, zero_last = geometry
    load_tile(u, base, L, num_rows, first, count, tile, AT_U + HALO * LANES)
    load_tile(delta, base, L, num_rows, first, count, tile, AT_DELTA)
    for k in range(max(first - HALO, 0) if offset < 0 else first, first):
        for j in range(LANES):
            tile[AT_U + (k - first + HALO) * LANES + j] = u[base + min(j, num_rows - 1) * L + k]
    for k in range(first + count, min(first + count + HALO, L) if offset > 0 else 0):
        for j in range(LANES):
            tile[AT_U + (k - first + HALO) * LANES + j] = u[base + min(j, num_rows - 1) * L + k]
    for k in range(count):
        step = load(LANES, tile, AT_DELTA + k * LANES)
        if has_bias:
            step = step + load(LANES, tile, AT_BIAS)
        if softplus:
            if with_sigma:
                step, sigma = softplus_and_slope(step)
                store(tile, AT_SIGMA + k * LANES, sigma)
            else:
                step, _ = softplus_and_slope(step)
        store(tile, AT_DELTA + k * LANES, step)
        if needs_phis(hold):
            store(tile, AT_INVERSE + k * LANES, 1.0 / step)
        here = load(LANES, tile, AT_U + (k + HALO) * LANES)
        other = here
        if offset != 0:
            j = neighbour_of(first + k, offset, row_length, L)
            other = load(LANES, tile, AT_U + (j - first + HALO) * LANES)
            if zero_last and first + k == L - 1:
                other = zeros_like(here)
        store(tile, AT_OTHER + k * LANES, other)
        left, right = here, other
        if swap:
            left, right = other, here
        m0, m1, m2 = mixtures(hold, left, right)
        store(tile, AT_M + k * LANES, m0 * step)
        if num_terms(hold) > 1:
            store(tile, AT_M + SECTION + k * LANES, m1 * step)
        if num_terms(hold) > 2:
            store(tile, AT_M + 2 * SECTION + k * LANES, m2 * step)


@njit
def gather_lanes(source, offset, stride, num_rows, tile, at):
    """Put source[offset + j·stride] for the 16 channels into one vector of the tile."""
    for j in range(LANES):
        tile[at + j] = source[offset + min(j, num_rows - 1) * stride]


@njit(nogil=True, cache=True)
def forward(hold, counter, u, delta, A, B, C, D, gate, bias, rows, sizes, geometry, softplus, out, states, tile):
    """Scan forward, block of 16 channels by block, taking blocks from `counter` until none is left.

    `hold` is a tuple whose length names the hold; `counter` (1,) int64 is shared by all threads and 0 at the start.
    u, delta, A, B, C are flat; D, gate, bias too, empty if absent. `rows` (G,) int64 has the row length of each group's
    neighbour rule, `sizes` is (b, D, G, N, L), `geometry` (L, offset, swap, zero_last). With `softplus` the step is
    softplus(delta + bias). `out` and `states` are the flat results, `tile` this thread's `scratch_size(N)` values.
    """
    num_batches, num_channels, num_groups, N, L = sizes
    per_group = num_channels // num_groups
    blocks = (per_group + LANES - 1) // LANES
    chunks = (L + CHUNK - 1) // CHUNK
    at_h = AT_A + N * LANES
    while True:
        task = fetch_add(counter)
        if task >= num_batches * num_groups * blocks:
            break
        b, g, block = task // blocks // num_groups, task // blocks % num_groups, task % blocks
        d0 = g * per_group + block * LANES
        num_rows = min(LANES, per_group - block * LANES)
        base = (b * num_channels + d0) * L
        base_bc = (b * num_groups + g) * N * L
        for n in range(N):
            gather_lanes(A, d0 * N + n, N, num_rows, tile, AT_A + n * LANES)
            for j in range(LANES):
                tile[at_h + n * LANES + j] = 0
        if bias.size:
            gather_lanes(bias, d0, 1, num_rows, tile, AT_BIAS)
        if D.size:
            gather_lanes(D, d0, 1, num_rows, tile, AT_SKIP)
        for chunk in range(chunks):
            first = chunk * CHUNK
            count = min(CHUNK, L - first)
            load_inputs(
                hold, u, delta, bias.size > 0, softplus, geometry, base, num_rows, rows[g], first, count, tile, False
            )
            for k in range(count):
                here = load(LANES, tile, AT_U + (k + HALO) * LANES)
                store(tile, AT_Y + k * LANES, load(LANES, tile, AT_SKIP) * here if D.size else zeros_like(here))
            for n in range(0, N, 2):
                # two states share the loads of the tokens and the constants; an odd N computes its last state twice
                twin = min(n + 1, N - 1)
                twin_counts = 1.0 if twin > n else 0.0
                a, a_twin = load(LANES, tile, AT_A + n * LANES), load(LANES, tile, AT_A + twin * LANES)
                h, h_twin = load(LANES, tile, at_h + n * LANES), load(LANES, tile, at_h + twin * LANES)
                at_b, at_b_twin = base_bc + n * L + first, base_bc + twin * L + first
                a_inverse, a_twin_inverse = 1.0 / a, 1.0 / a_twin
                for k in range(count):
                    step = load(LANES, tile, AT_DELTA + k * LANES)
                    step_inverse = load(LANES, tile, AT_INVERSE + k * LANES) if needs_phis(hold) else step
                    m = load_mixtures(hold, tile, k)
                    h = advance(hold, h, step * a, step_inverse * a_inverse, m, spread(B, at_b + k))
                    h_twin = advance(
                        hold, h_twin, step * a_twin, step_inverse * a_twin_inverse, m, spread(B, at_b_twin + k)
                    )
                    y = fma(spread(C, at_b + k), h, load(LANES, tile, AT_Y + k * LANES))
                    y = fma(spread(C, at_b_twin + k) * twin_counts, h_twin, y)
                    store(tile, AT_Y + k * LANES, y)
                store(tile, at_h + twin * LANES, h_twin)
                store(tile, at_h + n * LANES, h)
            at_state = (b * chunks + chunk) * N * num_channels + d0
            for n in range(N):
                if num_rows == LANES:
                    store(states, at_state + n * num_channels, load(LANES, tile, at_h + n * LANES))
                else:
                    for j in range(num_rows):
                        states[at_state + n * num_channels + j] = tile[at_h + n * LANES + j]
            if gate.size:
                load_tile(gate, base, L, num_rows, first, count, tile, AT_GATE)
                for k in range(count):
                    x = load(LANES, tile, AT_GATE + k * LANES)
                    store(tile, AT_Y + k * LANES, load(LANES, tile, AT_Y + k * LANES) * x * sigmoid(x))
            store_tile(tile, AT_Y, out, base, L, num_rows, first, count)


@njit(forceinline=True)
def recompute(hold, h, z, z_inverse, m, b, g, tile, at, k):
    """Do one forward step of one state again and keep what the way back needs; return h_k."""
    slope = m[1]  # Δs' = Σ c_i' m_i
    if needs_phis(hold):
        alpha, phi1, phi2, phi3 = exp_and_phis(z, z_inverse)
        slope = (phi1 - phi2) * m[0]
        store(tile, at + STATE_PHI1 + k * LANES, phi1)
        if len(hold) == FOH_EXACT:
            slope = fma(phi2 - 2.0 * phi3, m[1], slope)
            store(tile, at + STATE_PHI2 + k * LANES, phi2)
    else:
        alpha = exp(z)
        phi1 = phi2 = z
        if len(hold) == FOH_2:
            slope = fma(z * 2.0, m[2], m[1])
        elif len(hold) == EXP_TRAP:
            slope = alpha * m[1]
    kept = alpha * h
    h = fma(drive(hold, z, alpha, phi1, phi2, m[0], m[1], m[2]), b, kept)
    store(tile, at + STATE_ALPHA + k * LANES, alpha)
    store(tile, at + STATE_W + k * LANES, kept if constant_drive(hold) else fma(b, slope, kept))
    store(tile, at + STATE_GRAD_C + k * LANES, g * h)
    return h


@njit(forceinline=True)
def step_back(hold, running, a, step, m, b, c, g, grad_a, tile, at, k):
    """Go back over token k in one state.

    Returns:
        α_k λ_k, the gradient of a so far, a λ w, and this state's part of the gradients of Δm_0, Δm_1, Δm_2.
    """
    z = step * a
    alpha = load(LANES, tile, at + STATE_ALPHA + k * LANES)
    phi1 = phi2 = z
    if needs_phis(hold):
        phi1 = load(LANES, tile, at + STATE_PHI1 + k * LANES)
        if len(hold) == FOH_EXACT:
            phi2 = load(LANES, tile, at + STATE_PHI2 + k * LANES)
    lambda_k = fma(c, g, running)
    store(tile, at + STATE_GRAD_B + k * LANES, lambda_k * drive(hold, z, alpha, phi1, phi2, m[0], m[1], m[2]))
    t = lambda_k * b
    r = lambda_k * load(LANES, tile, at + STATE_W + k * LANES)
    d0 = d1 = d2 = t
    if needs_phis(hold):
        d0, d1 = t * phi1, t * phi2
    elif len(hold) == EXP_TRAP:
        d1 = t * alpha
    elif num_terms(hold) > 1:
        d1 = t * z
        d2 = d1 * z
    return alpha * lambda_k, fma(r, step, grad_a), a * r, d0, d1, d2


@njit
def write_row_sums(tile, at, target, index, count, add):
    """Sum `count` vectors of the tile over their lanes into target[index:], or add the sums to it."""
    full = count // LANES * LANES
    for k in range(0, full, LANES):
        sums = row_sums(LANES, tile, at + k * LANES)
        store(target, index + k, load(LANES, target, index + k) + sums if add else sums)
    for k in range(full, count):
        total = target[index + k] if add else tile[at] * 0
        for j in range(LANES):
            total += tile[at + k * LANES + j]
        target[index + k] = total


@njit(nogil=True, cache=True)
def backward(
    hold, counter, u, delta, A, B, C, D, gate, bias, rows, sizes, geometry, softplus,
    states, grad_out, grad_last, splits,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_gate, grad_bias, tile,
):  # fmt: skip
    """Go back from the last tile to the first, recomputing h inside each tile from the state before it.

    One task is one batch entry, one group and one of the `splits` shares of the group's blocks. Which blocks a share
    has depends on the sizes only, so that every sum is added in the same order whatever the number of threads.

    The arguments up to `softplus` are those of `forward`. `states` is what it wrote, `grad_out` (b·D·L) the gradient of
    the output, `grad_last` (b·D·N) that of the last state, or empty. Results, flat: grad_u, grad_delta, grad_gate
    (b·D·L), grad_A (b·D·N), grad_B and grad_C (splits·b·G·N·L), to be summed over splits, grad_D and grad_bias (b·D).
    """
    num_batches, num_channels, num_groups, N, L = sizes
    _, offset, swap, zero_last = geometry
    per_group = num_channels // num_groups
    blocks = (per_group + LANES - 1) // LANES
    share = (blocks + splits - 1) // splits
    chunks = (L + CHUNK - 1) // CHUNK
    at_a = AT_A_BACKWARD
    at_grad_a = at_a + N * LANES
    at_running = at_grad_a + N * LANES
    while True:
        task = fetch_add(counter)
        if task >= num_batches * num_groups * splits:
            break
        b, g, split = task // splits // num_groups, task // splits % num_groups, task % splits
        base_bc = (b * num_groups + g) * N * L
        base_grad_bc = ((split * num_batches + b) * num_groups + g) * N * L
        for block in range(split * share, min((split + 1) * share, blocks)):
            add = block > split * share
            d0 = g * per_group + block * LANES
            num_rows = min(LANES, per_group - block * LANES)
            base = (b * num_channels + d0) * L
            for n in range(N):
                gather_lanes(A, d0 * N + n, N, num_rows, tile, at_a + n * LANES)
                for j in range(LANES):
                    tile[at_grad_a + n * LANES + j] = 0
                    tile[at_running + n * LANES + j] = 0
                if grad_last.size:
                    for j in range(num_rows):
                        tile[at_running + n * LANES + j] = grad_last[(b * num_channels + d0 + j) * N + n]
            for j in range(LANES):
                tile[AT_PRESENT + j] = 1 if j < num_rows else 0
                tile[AT_SKIP + j] = 0
                tile[AT_GRAD_SKIP + j] = 0
                tile[AT_GRAD_BIAS + j] = 0
                for k in range(HALO):
                    tile[AT_GRAD_U + k * LANES + j] = 0
            if bias.size:
                gather_lanes(bias, d0, 1, num_rows, tile, AT_BIAS)
            if D.size:
                gather_lanes(D, d0, 1, num_rows, tile, AT_SKIP)
            for chunk in range(chunks - 1, -1, -1):
                first = chunk * CHUNK
                count = min(CHUNK, L - first)
                load_inputs(
                    hold, u, delta, bias.size > 0, softplus, geometry, base, num_rows, rows[g], first, count, tile, True
                )
                load_tile(grad_out, base, L, num_rows, first, count, tile, AT_G)
                if gate.size:
                    load_tile(gate, base, L, num_rows, first, count, tile, AT_GATE)
                present = load(LANES, tile, AT_PRESENT)
                skip = load(LANES, tile, AT_SKIP)
                zero = zeros_like(skip)
                # what the tile to the right owes to the last tokens of this one
                debt0, debt1 = load(LANES, tile, AT_GRAD_U), load(LANES, tile, AT_GRAD_U + LANES)
                for k in range(-HALO, count + HALO):
                    store(tile, AT_GRAD_U + (k + HALO) * LANES, zero)
                if chunk < chunks - 1:
                    store(tile, AT_GRAD_U + (count - 2 + HALO) * LANES, debt0)
                    store(tile, AT_GRAD_U + (count - 1 + HALO) * LANES, debt1)
                grad_skip = load(LANES, tile, AT_GRAD_SKIP)
                for k in range(count):
                    here = load(LANES, tile, AT_U + (k + HALO) * LANES)
                    gradient = load(LANES, tile, AT_G + k * LANES) * present
                    if gate.size:
                        x = load(LANES, tile, AT_GATE + k * LANES)
                        gradient = gradient * (x * sigmoid(x))
                        store(tile, AT_Y + k * LANES, skip * here)
                    store(tile, AT_G + k * LANES, gradient)
                    grad_skip = fma(gradient, here, grad_skip)
                    store(tile, AT_GRAD_M + k * LANES, zero)
                    if num_terms(hold) > 1:
                        store(tile, AT_GRAD_M + SECTION + k * LANES, zero)
                    if num_terms(hold) > 2:
                        store(tile, AT_GRAD_M + 2 * SECTION + k * LANES, zero)
                    store(tile, AT_DECAY + k * LANES, zero)
                store(tile, AT_GRAD_SKIP, grad_skip)
                for n in range(0, N, 2):
                    # as in `forward`; the copy of an odd N's last state has λ = 0 and its results are overwritten
                    twin = min(n + 1, N - 1)
                    twin_counts = 1.0 if twin > n else 0.0
                    a, a_twin = load(LANES, tile, at_a + n * LANES), load(LANES, tile, at_a + twin * LANES)
                    a_inverse, a_twin_inverse = 1.0 / a, 1.0 / a_twin
                    at_b, at_b_twin = base_bc + n * L + first, base_bc + twin * L + first
                    at, at_twin = AT_STATES, AT_STATES + STATE_SIZE
                    h = h_twin = zero
                    if chunk > 0:
                        before = (b * chunks + chunk - 1) * N * num_channels + d0
                        gather_lanes(states, before + n * num_channels, 1, num_rows, tile, at)
                        gather_lanes(states, before + twin * num_channels, 1, num_rows, tile, at_twin)
                        h, h_twin = load(LANES, tile, at), load(LANES, tile, at_twin)
                    for k in range(count):
                        step = load(LANES, tile, AT_DELTA + k * LANES)
                        inverse = load(LANES, tile, AT_INVERSE + k * LANES) if needs_phis(hold) else step
                        m = load_mixtures(hold, tile, k)
                        gradient = load(LANES, tile, AT_G + k * LANES)
                        h = recompute(
                            hold, h, step * a, inverse * a_inverse, m, spread(B, at_b + k), gradient, tile, at, k
                        )
                        h_twin = recompute(
                            hold, h_twin, step * a_twin, inverse * a_twin_inverse, m, spread(B, at_b_twin + k),
                            gradient, tile, at_twin, k,
                        )  # fmt: skip
                        if gate.size:
                            y = fma(spread(C, at_b + k), h, load(LANES, tile, AT_Y + k * LANES))
                            y = fma(spread(C, at_b_twin + k) * twin_counts, h_twin, y)
                            store(tile, AT_Y + k * LANES, y)
                    grad_a = load(LANES, tile, at_grad_a + n * LANES)
                    grad_a_twin = load(LANES, tile, at_grad_a + twin * LANES)
                    running = load(LANES, tile, at_running + n * LANES)
                    running_twin = load(LANES, tile, at_running + twin * LANES) * twin_counts
                    for k in range(count - 1, -1, -1):
                        step = load(LANES, tile, AT_DELTA + k * LANES)
                        gradient = load(LANES, tile, AT_G + k * LANES)
                        m = load_mixtures(hold, tile, k)
                        running, grad_a, decay, d0_, d1_, d2_ = step_back(
                            hold, running, a, step, m, spread(B, at_b + k), spread(C, at_b + k), gradient,
                            grad_a, tile, at, k,
                        )  # fmt: skip
                        c_twin = spread(C, at_b_twin + k) * twin_counts
                        running_twin, grad_a_twin, decay_twin, e0, e1, e2 = step_back(
                            hold, running_twin, a_twin, step, m, spread(B, at_b_twin + k), c_twin, gradient,
                            grad_a_twin, tile, at_twin, k,
                        )  # fmt: skip
                        decay_so_far = load(LANES, tile, AT_DECAY + k * LANES)
                        store(tile, AT_DECAY + k * LANES, decay_so_far + (decay + decay_twin))
                        store(tile, AT_GRAD_M + k * LANES, load(LANES, tile, AT_GRAD_M + k * LANES) + (d0_ + e0))
                        if num_terms(hold) > 1:
                            at_d = AT_GRAD_M + SECTION + k * LANES
                            store(tile, at_d, load(LANES, tile, at_d) + (d1_ + e1))
                        if num_terms(hold) > 2:
                            at_d = AT_GRAD_M + 2 * SECTION + k * LANES
                            store(tile, at_d, load(LANES, tile, at_d) + (d2_ + e2))
                    store(tile, at_running + twin * LANES, running_twin)
                    store(tile, at_running + n * LANES, running)
                    store(tile, at_grad_a + twin * LANES, grad_a_twin)
                    store(tile, at_grad_a + n * LANES, grad_a)
                    at_grad = base_grad_bc + n * L + first
                    write_row_sums(tile, at + STATE_GRAD_B, grad_B, at_grad, count, add)
                    write_row_sums(tile, at + STATE_GRAD_C, grad_C, at_grad, count, add)
                    if twin > n:
                        write_row_sums(tile, at_twin + STATE_GRAD_B, grad_B, at_grad + L, count, add)
                        write_row_sums(tile, at_twin + STATE_GRAD_C, grad_C, at_grad + L, count, add)
                grad_bias_sum = load(LANES, tile, AT_GRAD_BIAS)
                for k in range(count):
                    here, other = load(LANES, tile, AT_U + (k + HALO) * LANES), load(LANES, tile, AT_OTHER + k * LANES)
                    m0, m1, m2 = load_grad_mixtures(hold, tile, k)
                    grad_left, grad_right = unmix(hold, m0, m1, m2)
                    grad_here, grad_other = grad_left, grad_right
                    if swap:
                        grad_here, grad_other = grad_right, grad_left
                    step = load(LANES, tile, AT_DELTA + k * LANES)
                    grad_step = load(LANES, tile, AT_DECAY + k * LANES) + fma(grad_here, here, grad_other * other)
                    if softplus:
                        grad_step = grad_step * load(LANES, tile, AT_SIGMA + k * LANES)
                    grad_bias_sum = grad_bias_sum + grad_step
                    gradient = load(LANES, tile, AT_G + k * LANES)
                    at_here = AT_GRAD_U + (k + HALO) * LANES
                    store(tile, at_here, fma(grad_here, step, fma(skip, gradient, load(LANES, tile, at_here))))
                    if offset != 0 and not (zero_last and first + k == L - 1):
                        j = neighbour_of(first + k, offset, rows[g], L)
                        at_other = AT_GRAD_U + (j - first + HALO) * LANES
                        store(tile, at_other, fma(grad_other, step, load(LANES, tile, at_other)))
                    store(tile, AT_DELTA + k * LANES, grad_step)
                store(tile, AT_GRAD_BIAS, grad_bias_sum)
                store_tile(tile, AT_DELTA, grad_delta, base, L, num_rows, first, count)
                store_tile(tile, AT_GRAD_U + HALO * LANES, grad_u, base, L, num_rows, first, count)
                for k in range(first + count, min(first + count + HALO, L) if offset > 0 else 0):
                    for j in range(num_rows):
                        grad_u[base + j * L + k] += tile[AT_GRAD_U + (k - first + HALO) * LANES + j]
                if gate.size:
                    load_tile(grad_out, base, L, num_rows, first, count, tile, AT_G)
                    for k in range(count):
                        x = load(LANES, tile, AT_GATE + k * LANES)
                        s = sigmoid(x)
                        slope = s * fma(x, 1.0 - s, 1.0 + zero)
                        gradient = load(LANES, tile, AT_G + k * LANES) * load(LANES, tile, AT_Y + k * LANES) * slope
                        store(tile, AT_G + k * LANES, gradient)
                    store_tile(tile, AT_G, grad_gate, base, L, num_rows, first, count)
            for j in range(num_rows):
                for n in range(N):
                    grad_A[(b * num_channels + d0 + j) * N + n] = tile[at_grad_a + n * LANES + j]
                if D.size:
                    grad_D[b * num_channels + d0 + j] = tile[AT_GRAD_SKIP + j]
                if bias.size:
                    grad_bias[b * num_channels + d0 + j] = tile[AT_GRAD_BIAS + j]
