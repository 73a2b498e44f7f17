// The selective scan on a GPU; README.md has the mathematics, cuda.py compiles and launches this file.
//
// A block owns CHANNELS channels of one group and walks through the sequence in tiles of TILE tokens. Inside a tile a warp owns
// one channel and a lane ITEMS consecutive tokens: every lane scans its own tokens, the lanes' results are scanned with shuffles,
// and the lane goes over its tokens again from the right start. B and C of the tile are read once per block, into shared memory.
//
// Macros set by the compiler's command line:
//   HOLD      0..7, the place of the hold in reference.HOLDS
//   STATES    N
//   WIDTH     channels of a block and tokens of a lane, 8 or 4: what shared memory has room for
//   IO        type of u, delta, B, C, z and the output: 0 float, 1 half, 2 bfloat16, 3 double (which computes in double)
//
// Layouts: u, delta, z (b, D, L); A (D, N); B, C (b, G, N, L); states (b, tiles, N, D) = h after each tile.

#define ZOH_EULER 0
#define ZOH_1 1
#define ZOH_EXACT 2
#define FOH_0 3
#define FOH_1 4
#define FOH_2 5
#define FOH_EXACT 6
#define EXP_TRAP 7

#define CHANNELS WIDTH  // channels, and so warps, of a block
#define ITEMS WIDTH     // tokens of a lane
#define TILE (32 * ITEMS)
#define THREADS (32 * CHANNELS)
#define HALO 2  // the farthest neighbour any `side` looks at
#define FULL 0xffffffffu

#define NEEDS_PHIS (HOLD == ZOH_EXACT || HOLD == FOH_EXACT)
#define TERMS (HOLD == ZOH_EULER || HOLD == ZOH_EXACT || HOLD == FOH_0 ? 1 : HOLD == FOH_2 ? 3 : 2)

#if IO == 3
typedef double real;
typedef double io_t;
#else
typedef float real;
#if IO == 0
typedef float io_t;
#else
typedef unsigned short io_t;  // the bits of a half or a bfloat16
#endif
#endif

static_assert(TILE == THREADS, "every thread sums dB and dC of one token of the tile");

__device__ __forceinline__ real read(const io_t* source, long long index) {
#if IO == 1
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(source[index]));
    return value;
#elif IO == 2
    return __uint_as_float((unsigned)source[index] << 16);
#else
    return source[index];
#endif
}

__device__ __forceinline__ void write(io_t* target, long long index, real value) {
#if IO == 1
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    target[index] = bits;
#elif IO == 2
    unsigned bits = __float_as_uint(value);
    // round to nearest even; a NaN stays a NaN
    target[index] = value == value ? (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : 0x7fffu;
#else
    target[index] = value;
#endif
}

#if IO == 3
__device__ __forceinline__ real exponential(real z) { return exp(z); }
__device__ __forceinline__ real log_one_plus(real t) { return log1p(t); }
#else
__device__ __forceinline__ real exponential(real z) { return exp2f(z * 1.44269504f); }
__device__ __forceinline__ real log_one_plus(real t) { return log1pf(t); }
#endif

__device__ __forceinline__ real sigmoid(real x) { return real(1) / (real(1) + exponential(-x)); }

// --- The holds: Δs = Σ_i c_i(z) m_i, as in cpu_kernels.py ---------------------------------------------------------------

struct Phis {
    real alpha, phi1, phi2, phi3;
};

// e^z and, for the holds that need them, φ1, φ2, φ3: their series for |z| < 1/2, quotients of e^z elsewhere.
__device__ __forceinline__ Phis decay(real z, real z_inverse) {
    Phis f;
#if NEEDS_PHIS
    const int terms = sizeof(real) == 8 ? 15 : 7;
    real inverse_factorial[15] = {1. / 6,          1. / 24,          1. / 120,          1. / 720,           1. / 5040,
                                  1. / 40320,      1. / 362880,      1. / 3628800,      1. / 39916800,      1. / 479001600,
                                  1. / 6227020800, 1. / 87178291200, 1. / 1307674368e3, 1. / 20922789888e3, 1. / 355687428096e3};
    real series = inverse_factorial[terms - 1];
#pragma unroll
    for (int m = terms - 2; m >= 0; --m) series = series * z + inverse_factorial[m];
    real series2 = real(0.5) + z * series;
    real series1 = real(1) + z * series2;
    bool small = z > real(-0.5) && z < real(0.5);
    f.alpha = small ? real(1) + z * series1 : exponential(z);
    f.phi1 = small ? series1 : (f.alpha - real(1)) * z_inverse;
    f.phi2 = small ? series2 : (f.phi1 - real(1)) * z_inverse;
    f.phi3 = small ? series : (f.phi2 - real(0.5)) * z_inverse;
#else
    f.alpha = exponential(z);
    f.phi1 = f.phi2 = f.phi3 = 0;
#endif
    return f;
}

// m_i without their factor Δ
__device__ __forceinline__ void mixtures(real left, real right, real m[TERMS]) {
#if HOLD == ZOH_1
    m[0] = left, m[1] = real(0.5) * left;
#elif HOLD == FOH_0
    m[0] = real(0.5) * (left + right);
#elif HOLD == FOH_1 || HOLD == FOH_2
    m[0] = real(0.5) * (left + right), m[1] = left * real(1. / 3) + right * real(1. / 6);
#if HOLD == FOH_2
    m[2] = left * real(1. / 8) + right * real(1. / 24);
#endif
#elif HOLD == FOH_EXACT
    m[0] = left, m[1] = right - left;
#elif HOLD == EXP_TRAP
    m[0] = real(0.5) * right, m[1] = real(0.5) * left;
#else
    m[0] = left;
#endif
}

// the transpose of `mixtures`
__device__ __forceinline__ void unmix(const real d[TERMS], real* left, real* right) {
#if HOLD == ZOH_1
    *left = d[0] + real(0.5) * d[1], *right = 0;
#elif HOLD == FOH_0
    *left = *right = real(0.5) * d[0];
#elif HOLD == FOH_1
    *left = real(0.5) * d[0] + real(1. / 3) * d[1], *right = real(0.5) * d[0] + real(1. / 6) * d[1];
#elif HOLD == FOH_2
    *left = real(0.5) * d[0] + real(1. / 3) * d[1] + real(1. / 8) * d[2];
    *right = real(0.5) * d[0] + real(1. / 6) * d[1] + real(1. / 24) * d[2];
#elif HOLD == FOH_EXACT
    *left = d[0] - d[1], *right = d[1];
#elif HOLD == EXP_TRAP
    *left = real(0.5) * d[1], *right = real(0.5) * d[0];
#else
    *left = d[0], *right = 0;
#endif
}

// Δs
__device__ __forceinline__ real drive(real z, const Phis& f, const real m[TERMS]) {
#if HOLD == ZOH_EXACT
    return f.phi1 * m[0];
#elif HOLD == FOH_EXACT
    return f.phi1 * m[0] + f.phi2 * m[1];
#elif HOLD == EXP_TRAP
    return m[0] + f.alpha * m[1];
#elif HOLD == ZOH_1 || HOLD == FOH_1
    return m[0] + z * m[1];
#elif HOLD == FOH_2
    return m[0] + z * (m[1] + z * m[2]);
#else
    return m[0];
#endif
}

// Δs' = Σ_i c_i'(z) m_i
__device__ __forceinline__ real drive_slope(real z, const Phis& f, const real m[TERMS]) {
#if HOLD == ZOH_EXACT
    return (f.phi1 - f.phi2) * m[0];
#elif HOLD == FOH_EXACT
    return (f.phi1 - f.phi2) * m[0] + (f.phi2 - real(2) * f.phi3) * m[1];
#elif HOLD == EXP_TRAP
    return f.alpha * m[1];
#elif HOLD == ZOH_1 || HOLD == FOH_1
    return m[1];
#elif HOLD == FOH_2
    return m[1] + real(2) * z * m[2];
#else
    return 0;
#endif
}

// d[i] += t c_i(z)
__device__ __forceinline__ void add_terms(real t, real z, const Phis& f, real d[TERMS]) {
#if HOLD == ZOH_EXACT
    d[0] += t * f.phi1;
#elif HOLD == FOH_EXACT
    d[0] += t * f.phi1, d[1] += t * f.phi2;
#elif HOLD == EXP_TRAP
    d[0] += t, d[1] += t * f.alpha;
#elif HOLD == ZOH_1 || HOLD == FOH_1
    d[0] += t, d[1] += t * z;
#elif HOLD == FOH_2
    d[0] += t, d[1] += t * z, d[2] += t * z * z;
#else
    d[0] += t;
#endif
}

// --- Moving tiles -------------------------------------------------------------------------------------------------------

// Where token t of a tile lies in a shared row: lanes that each read 4 of their ITEMS tokens touch 32 different banks.
__device__ __forceinline__ int place(int t) { return (t % ITEMS / 4) * (TILE * 4 / ITEMS) + t / ITEMS * 4 + t % 4; }

// Stage N rows of TILE tokens; tokens after the end are 0.
__device__ void stage(const io_t* source, real* rows, int first, int L) {
    for (int i = threadIdx.x; i < STATES * TILE; i += THREADS) {
        int n = i / TILE, t = i % TILE;
        rows[n * TILE + place(t)] = first + t < L ? read(source, (long long)n * L + first + t) : real(0);
    }
}

// One warp reads a row coalesced and every lane gets its own ITEMS tokens; tokens after the end are 0.
__device__ __forceinline__ void fetch(const io_t* row, real* buffer, int first, int L, real item[ITEMS]) {
    int lane = threadIdx.x % 32;
    __syncwarp();
    for (int i = 0; i < ITEMS; ++i) {
        int t = i * 32 + lane;
        buffer[place(t)] = first + t < L ? read(row, first + t) : real(0);
    }
    __syncwarp();
    for (int i = 0; i < ITEMS; ++i) item[i] = buffer[place(lane * ITEMS + i)];
}

// The reverse of `fetch`; tokens from `from` on are written, those before are the caller's business.
__device__ __forceinline__ void deliver(io_t* row, real* buffer, int first, int L, const real item[ITEMS], int from, bool present) {
    int lane = threadIdx.x % 32;
    __syncwarp();
    for (int i = 0; i < ITEMS; ++i) buffer[place(lane * ITEMS + i)] = item[i];
    __syncwarp();
    for (int i = 0; i < ITEMS; ++i) {
        int t = i * 32 + lane;
        if (present && t >= from && first + t < L) write(row, first + t, buffer[place(t)]);
    }
}

struct Rule {
    int offset, row, swap, zero_last;  // neighbour.Neighbour of this group
};

// The token that token k looks at: k + offset, clamped to k's row.
__device__ __forceinline__ int neighbour_of(int k, const Rule& rule, int L) {
    int start = rule.row >= L ? 0 : k / rule.row * rule.row;
    int end = min(rule.row >= L ? L : start + rule.row, L) - 1;
    return max(start, min(k + rule.offset, end));
}

struct Tokens {
    real here[ITEMS], other[ITEMS], step[ITEMS], slope[ITEMS];  // u, its neighbour, Δ, dΔ/d(delta)
    real m[ITEMS][TERMS];                                       // Δm_i
};

__device__ __forceinline__ void fetch_tokens(
    const io_t* u, const io_t* delta, real bias, int softplus, const Rule& rule, real* buffer, int first, int L, Tokens& x) {
    int lane = threadIdx.x % 32;
    fetch(delta, buffer, first, L, x.step);
    __syncwarp();
    for (int t = lane; t < TILE + 2 * HALO; t += 32) {
        int k = first + t - HALO;
        buffer[t] = k >= 0 && k < L ? read(u, k) : real(0);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        int t = lane * ITEMS + i, k = first + t;
        x.here[i] = x.other[i] = buffer[t + HALO];
        if (rule.offset != 0 && k < L) {
            x.other[i] = rule.zero_last && k == L - 1 ? real(0) : buffer[neighbour_of(k, rule, L) - first + HALO];
        }
        real raw = x.step[i] + bias;
        x.slope[i] = 1;
        if (softplus && !(raw > real(20))) {
            real t = exponential(-fabs(raw));
            x.slope[i] = (raw > 0 ? real(1) : t) / (real(1) + t);
            raw = (raw > 0 ? raw : real(0)) + log_one_plus(t) + real(0) * raw;  // the last term keeps a NaN
        }
        x.step[i] = k < L ? raw : real(0);  // a step of 0 changes nothing: e^0 = 1 and no drive
        mixtures(rule.swap ? x.other[i] : x.here[i], rule.swap ? x.here[i] : x.other[i], x.m[i]);
        for (int j = 0; j < TERMS; ++j) x.m[i][j] *= x.step[i];
    }
}

// --- Scans over the lanes of a warp -----------------------------------------------------------------------------------------

// Lane l maps a state x to product·x + sum. Returns the state before lane l when `start` is the state before lane 0, and
// leaves the state after the last lane in `end`.
__device__ __forceinline__ real scan_up(real product, real sum, real start, real* end) {
    int lane = threadIdx.x % 32;
    if (lane == 0) sum += product * start;
#pragma unroll
    for (int stride = 1; stride < 32; stride *= 2) {
        real left_product = __shfl_up_sync(FULL, product, stride);
        real left_sum = __shfl_up_sync(FULL, sum, stride);
        if (lane >= stride) {
            sum += product * left_sum;
            product *= left_product;
        }
    }
    *end = __shfl_sync(FULL, sum, 31);
    real before = __shfl_up_sync(FULL, sum, 1);
    return lane == 0 ? start : before;
}

// The same from the last lane to the first.
__device__ __forceinline__ real scan_down(real product, real sum, real start, real* end) {
    int lane = threadIdx.x % 32;
    if (lane == 31) sum += product * start;
#pragma unroll
    for (int stride = 1; stride < 32; stride *= 2) {
        real right_product = __shfl_down_sync(FULL, product, stride);
        real right_sum = __shfl_down_sync(FULL, sum, stride);
        if (lane + stride < 32) {
            sum += product * right_sum;
            product *= right_product;
        }
    }
    *end = __shfl_sync(FULL, sum, 0);
    real after = __shfl_down_sync(FULL, sum, 1);
    return lane == 31 ? start : after;
}

__device__ __forceinline__ real warp_sum(real value) {
#pragma unroll
    for (int stride = 16; stride > 0; stride /= 2) value += __shfl_xor_sync(FULL, value, stride);
    return value;
}

// --- Kernels ------------------------------------------------------------------------------------------------------------------

#if NEEDS_PHIS
#define INVERSE(x) (real(1) / (x))
#else
#define INVERSE(x) real(0)
#endif

// Grid (ceil(E / CHANNELS), G, b), block THREADS, with E = D / G. Null pointers stand for absent inputs.
// Dynamic shared memory: FORWARD_VALUES reals.
#define FORWARD_VALUES (2 * STATES * TILE + CHANNELS * (TILE + 2 * HALO))

extern "C" __global__ void __launch_bounds__(THREADS) selective_scan_forward(
    const io_t* u, const io_t* delta, const real* A, const io_t* B, const io_t* C, const real* D, const io_t* z, const real* bias,
    int E, int L, int softplus, int offset, const int* rows, int swap, int zero_last, io_t* out, real* states) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    real* shared_b = (real*)shared_memory;
    real* shared_c = shared_b + STATES * TILE;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    real* buffer = shared_c + STATES * TILE + warp * (TILE + 2 * HALO);

    int G = gridDim.y, g = blockIdx.y, b = blockIdx.z;
    int channel = blockIdx.x * CHANNELS + warp;
    bool present = channel < E;  // absent warps compute the last channel again and write nothing
    int d = g * E + min(channel, E - 1), num_channels = G * E;
    long long base = ((long long)b * num_channels + d) * L;
    long long base_bc = (long long)(b * G + g) * STATES * L;
    Rule rule = {offset, rows[g], swap, zero_last};
    real step_bias = bias ? bias[d] : real(0), skip = D ? D[d] : real(0);
    int tiles = (L + TILE - 1) / TILE;

    for (int tile = 0; tile < tiles; ++tile) {
        int first = tile * TILE;
        __syncthreads();
        stage(B + base_bc, shared_b, first, L);
        stage(C + base_bc, shared_c, first, L);
        __syncthreads();
        Tokens x;
        fetch_tokens(u + base, delta + base, step_bias, softplus, rule, buffer, first, L, x);
        real total = 0, inverse[ITEMS], y[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            total += x.step[i];
            inverse[i] = INVERSE(x.step[i]);
            y[i] = skip * x.here[i];
        }
#pragma unroll 1
        for (int n = 0; n < STATES; ++n) {
            real a = A[d * STATES + n], a_inverse = INVERSE(a);
            long long at_state = ((long long)b * tiles + tile) * STATES * num_channels + (long long)n * num_channels + d;
            real h_start = tile > 0 ? states[at_state - (long long)STATES * num_channels] : real(0);
            real alpha[ITEMS], push[ITEMS], sum = 0;
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                real step_z = x.step[i] * a;
                Phis f = decay(step_z, inverse[i] * a_inverse);
                alpha[i] = f.alpha;
                push[i] = drive(step_z, f, x.m[i]) * shared_b[n * TILE + place(lane * ITEMS + i)];
                sum = alpha[i] * sum + push[i];
            }
            real h_end;
            // the product of a lane's decays is e^(aΣΔ)
            real h = scan_up(exponential(a * total), sum, h_start, &h_end);
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                h = alpha[i] * h + push[i];
                y[i] += shared_c[n * TILE + place(lane * ITEMS + i)] * h;
            }
            __syncwarp();
            if (present && lane == 0) states[at_state] = h_end;
            __syncwarp();
        }
        if (z) {
            real gate[ITEMS];
            fetch(z + base, buffer, first, L, gate);
            for (int i = 0; i < ITEMS; ++i) y[i] *= gate[i] * sigmoid(gate[i]);
        }
        deliver(out + base, buffer, first, L, y, 0, present);
    }
}

// Grid (splits, G, b), block THREADS. A block owns `share` times CHANNELS channels. It adds up the dB and dC of CHANNELS of them
// in shared memory and the `share` sums in its own slice of grad_B and grad_C (splits, b, G, N, L), always in the same order.
// grad_A (b, D, N); grad_D, grad_bias (b, D). Dynamic shared memory: BACKWARD_VALUES(share) reals.
#define BACKWARD_VALUES(share) \
    (2 * STATES * TILE + 4 * CHANNELS * TILE + CHANNELS * (TILE + 2 * HALO) + (share) * CHANNELS * (2 * STATES + 2 + 2 * HALO))

extern "C" __global__ void __launch_bounds__(THREADS) selective_scan_backward(
    const io_t* u, const io_t* delta, const real* A, const io_t* B, const io_t* C, const real* D, const io_t* z, const real* bias,
    int E, int L, int softplus, int offset, const int* rows, int swap, int zero_last, const real* states, const io_t* grad_out,
    const real* grad_last, int share, io_t* grad_u, io_t* grad_delta, real* grad_A, real* grad_B, real* grad_C, real* grad_D,
    io_t* grad_z, real* grad_bias) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    real* shared_b = (real*)shared_memory;
    real* shared_c = shared_b + STATES * TILE;
    real* exchange = shared_c + STATES * TILE;  // [parity][dB, dC][warp][TILE]: one state's contributions of all warps
    real* buffers = exchange + 4 * CHANNELS * TILE;
    // [share][warp]: per channel N running α λ, N dA, dD, dbias, HALO owed to the left tile, HALO waiting for it
    real* running_all = buffers + CHANNELS * (TILE + 2 * HALO);
    const int record = 2 * STATES + 2 + 2 * HALO;

    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    real* buffer = buffers + warp * (TILE + 2 * HALO);
    int G = gridDim.y, g = blockIdx.y, b = blockIdx.z, num_channels = G * E;
    long long base_bc = (long long)(b * G + g) * STATES * L;
    long long base_grad_bc = (((long long)blockIdx.x * gridDim.z + b) * G + g) * STATES * L;
    Rule rule = {offset, rows[g], swap, zero_last};
    int tiles = (L + TILE - 1) / TILE;

    for (int part = 0; part < share; ++part) {
        int channel = (blockIdx.x * share + part) * CHANNELS + warp, d = g * E + min(channel, E - 1);
        real* own = running_all + (part * CHANNELS + warp) * record;
        for (int i = lane; i < record; i += 32)  // an absent channel starts, and stays, at λ = 0
            own[i] = i < STATES && grad_last && channel < E ? grad_last[((long long)b * num_channels + d) * STATES + i] : real(0);
    }

    for (int tile = tiles - 1; tile >= 0; --tile) {
        int first = tile * TILE;
        __syncthreads();
        stage(B + base_bc, shared_b, first, L);
        stage(C + base_bc, shared_c, first, L);
        __syncthreads();
#pragma unroll 1
        for (int part = 0; part < share; ++part) {
            int channel = (blockIdx.x * share + part) * CHANNELS + warp;
            bool present = channel < E;
            int d = g * E + min(channel, E - 1);
            long long base = ((long long)b * num_channels + d) * L;
            real* own = running_all + (part * CHANNELS + warp) * record;
            real step_bias = bias ? bias[d] : real(0), skip = D ? D[d] : real(0);
            Tokens x;
            fetch_tokens(u + base, delta + base, step_bias, softplus, rule, buffer, first, L, x);
            real grad_y[ITEMS], gate[ITEMS], raw[ITEMS], y[ITEMS];
            fetch(grad_out + base, buffer, first, L, raw);
            if (z) fetch(z + base, buffer, first, L, gate);
            real total = 0, grad_skip = 0, inverse[ITEMS], through_z[ITEMS], grad_m[ITEMS][TERMS];
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                grad_y[i] = present ? raw[i] : real(0);
                if (z) grad_y[i] *= gate[i] * sigmoid(gate[i]);
                total += x.step[i];
                inverse[i] = INVERSE(x.step[i]);
                y[i] = skip * x.here[i];
                grad_skip += grad_y[i] * x.here[i];
                through_z[i] = 0;
                for (int j = 0; j < TERMS; ++j) grad_m[i][j] = 0;
            }
#pragma unroll 1
            for (int n = 0; n < STATES; ++n) {
                real a = A[d * STATES + n], a_inverse = INVERSE(a);
                real h_start = 0;
                if (tile > 0) h_start = states[(((long long)b * tiles + tile - 1) * STATES + n) * num_channels + d];
                Phis f[ITEMS];
                real h[ITEMS], sum = 0, sum_back = 0, end;
                const real* tile_b = shared_b + n * TILE;
                const real* tile_c = shared_c + n * TILE;
#pragma unroll
                for (int i = 0; i < ITEMS; ++i) {
                    f[i] = decay(x.step[i] * a, inverse[i] * a_inverse);
                    h[i] = drive(x.step[i] * a, f[i], x.m[i]) * tile_b[place(lane * ITEMS + i)];
                    sum = f[i].alpha * sum + h[i];
                }
#pragma unroll
                for (int i = ITEMS - 1; i >= 0; --i)
                    sum_back = f[i].alpha * (tile_c[place(lane * ITEMS + i)] * grad_y[i] + sum_back);
                real product = exponential(a * total);
                real before = scan_up(product, sum, h_start, &end);
                real running = scan_down(product, sum_back, own[n], &end);
                __syncwarp();
                if (lane == 0) own[n] = end;
#pragma unroll
                for (int i = 0; i < ITEMS; ++i) {
                    h[i] += f[i].alpha * (i > 0 ? h[i - 1] : before);
                    y[i] += tile_c[place(lane * ITEMS + i)] * h[i];
                }
                real* share_b = exchange + (n % 2 * 2 * CHANNELS + warp) * TILE;
                real* share_c = share_b + CHANNELS * TILE;
                real grad_a = 0;
#pragma unroll
                for (int i = ITEMS - 1; i >= 0; --i) {
                    int at = place(lane * ITEMS + i);
                    real step_z = x.step[i] * a;
                    real lambda = tile_c[at] * grad_y[i] + running;
                    share_c[at] = grad_y[i] * h[i];
                    share_b[at] = lambda * drive(step_z, f[i], x.m[i]);
                    real w = f[i].alpha * (i > 0 ? h[i - 1] : before) + tile_b[at] * drive_slope(step_z, f[i], x.m[i]);
                    grad_a += lambda * w * x.step[i];
                    through_z[i] += a * lambda * w;
                    add_terms(lambda * tile_b[at], step_z, f[i], grad_m[i]);
                    running = f[i].alpha * lambda;
                }
                grad_a = warp_sum(grad_a);
                if (lane == 0) own[STATES + n] += grad_a;
                // one barrier per state is enough: two sets of buffers take turns
                __syncthreads();
                const real* all_b = exchange + n % 2 * 2 * CHANNELS * TILE + place(threadIdx.x);
                real total_b = 0, total_c = 0;
#pragma unroll
                for (int w = 0; w < CHANNELS; ++w) {
                    total_b += all_b[w * TILE];
                    total_c += all_b[(CHANNELS + w) * TILE];
                }
                if (first + (int)threadIdx.x < L) {
                    long long at = base_grad_bc + (long long)n * L + first + threadIdx.x;
                    grad_B[at] = part > 0 ? grad_B[at] + total_b : total_b;
                    grad_C[at] = part > 0 ? grad_C[at] + total_c : total_c;
                }
            }
            __syncthreads();  // the next part starts with the first set again

            real grad_here[ITEMS], grad_other[ITEMS], grad_step[ITEMS], grad_bias_sum = 0;
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                real left, right;
                unmix(grad_m[i], &left, &right);
                grad_here[i] = rule.swap ? right : left;
                grad_other[i] = rule.swap ? left : right;
                grad_step[i] = (through_z[i] + grad_here[i] * x.here[i] + grad_other[i] * x.other[i]) * x.slope[i];
                if (first + lane * ITEMS + i >= L) grad_step[i] = 0;
                grad_bias_sum += grad_step[i];
                grad_here[i] = grad_here[i] * x.step[i] + skip * grad_y[i];
                grad_other[i] *= x.step[i];
                if (rule.zero_last && first + lane * ITEMS + i == L - 1) grad_other[i] = 0;
            }
            deliver(grad_delta + base, buffer, first, L, grad_step, 0, present);
            grad_bias_sum = warp_sum(grad_bias_sum);
            grad_skip = warp_sum(grad_skip);
            if (lane == 0) {
                own[2 * STATES] += grad_skip;
                own[2 * STATES + 1] += grad_bias_sum;
            }

            // every token collects from the tokens that look at it, in increasing order
            __syncwarp();
            for (int i = lane; i < HALO; i += 32) buffer[i] = buffer[TILE + HALO + i] = 0;
            for (int i = 0; i < ITEMS; ++i) buffer[lane * ITEMS + i + HALO] = grad_other[i];
            __syncwarp();
            real collected = 0;  // lane 0, 1: what the first tokens of the right tile still wait for; lane 2, 3: debt to the left
            if (rule.offset != 0) {
#pragma unroll
                for (int i = 0; i <= ITEMS; ++i) {
                    int t = i < ITEMS ? lane * ITEMS + i : lane < HALO ? TILE + lane : lane - 2 * HALO;
                    int k = first + t;
                    if ((i == ITEMS && lane >= 2 * HALO) || k < 0 || k >= L) continue;
                    int start = rule.row >= L ? 0 : k / rule.row * rule.row;
                    int end = min(rule.row >= L ? L : start + rule.row, L) - 1;
                    real sum = 0;
                    for (int source = max(max(k - HALO, start), first); source <= min(min(k + HALO, end), first + TILE - 1); ++source)
                        if (max(start, min(source + rule.offset, end)) == k) sum += buffer[source - first + HALO];
                    if (i < ITEMS) grad_here[i] += sum;
                    else collected = sum;
                }
            }
            real* debt = own + 2 * STATES + 2;
            real* waiting = debt + HALO;
            for (int i = 0; i < ITEMS; ++i) {
                int t = lane * ITEMS + i - (TILE - HALO);
                if (t >= 0) grad_here[i] += debt[t];
            }
            __syncwarp();
            if (tile < tiles - 1 && lane < HALO && present && first + TILE + lane < L)
                write(grad_u + base, first + TILE + lane, waiting[lane] + collected);
            __syncwarp();
            if (lane >= HALO && lane < 2 * HALO) debt[lane - HALO] = collected;
            for (int i = 0; i < HALO && lane == 0; ++i) waiting[i] = grad_here[i];
            deliver(grad_u + base, buffer, first, L, grad_here, tile > 0 ? HALO : 0, present);

            if (z) {
                real grad_gate[ITEMS];
                for (int i = 0; i < ITEMS; ++i) {
                    real s = sigmoid(gate[i]);
                    grad_gate[i] = raw[i] * y[i] * s * (real(1) + gate[i] * (real(1) - s));
                }
                deliver(grad_z + base, buffer, first, L, grad_gate, 0, present);
            }
            __syncwarp();
            if (tile == 0 && present) {
                for (int n = lane; n < STATES; n += 32) grad_A[((long long)b * num_channels + d) * STATES + n] = own[STATES + n];
                if (lane == 0 && D) grad_D[(long long)b * num_channels + d] = own[2 * STATES];
                if (lane == 0 && bias) grad_bias[(long long)b * num_channels + d] = own[2 * STATES + 1];
            }
        }
    }
}
