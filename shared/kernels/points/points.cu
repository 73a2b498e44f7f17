// Sampling, neighbours and interpolation of point clouds on a GPU; README.md has the mathematics, cuda.py compiles and launches
// this file.
//
// Nothing is added or chosen in an order that depends on timing: there are no atomic operations, and every run gives the same
// bits. Steps of a computation are rounded one by one, as on the CPU; no product is fused with a sum.
//
// Macros set by the compiler's command line:
//   OP       the kernel that is compiled: 0 furthest_point_sample, 1 ball_query, 2 three_nn, 3 group_points, 4 add_up,
//            5 three_interpolate, 6 weight_gradient
//   THREADS  of a block, whole warps
//   REAL     of all but OP 3: type of the computation, float or double
//   POINTS   of OP 0: how many a thread keeps in registers; 0 to keep none, for clouds of any size
//   BYTES    of OP 3: of a value: 1, 2, 4 or 8
//   PACK     of OP 3: values that a thread writes at once: 1 or 4, which divides P
//   LONG     of OP 3, 5, 6: 1 where indices are of 64 bits, 0 of 32
//   IO       of OP 4, 5, 6: type of features and their gradients: 0 float, 1 half, 2 bfloat16, 3 double
//   WEIGHTS  of OP 4: 1 where three weighted places share a value, 0 where each has its own
//
// Layouts: coordinates (B, N, 3); features (B, C, N); indices (B, P) or (B, P, 3). Grids have one axis, which alone may be longer
// than 65535.

#define FULL 0xffffffffu
#define WARPS (THREADS / 32)
#define NOBODY 0x7fffffff

#if LONG
typedef long long index_t;
#else
typedef int index_t;
#endif

#if OP != 3

typedef REAL real;

__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double add(double a, double b) { return __dadd_rn(a, b); }

#endif

#if OP < 3

__device__ __forceinline__ real squared_norm(real x, real y, real z) {
    return add(add(multiply(x, x), multiply(y, y)), multiply(z, z));
}

#endif

#if OP == 0

#define PASSED_OVER real(-1)
#define LEFT_OVER real(-2)

__device__ __forceinline__ int min_over_warp(int value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_min_sync(FULL, value);
#else
    for (int by = 16; by > 0; by >>= 1) value = min(value, __shfl_xor_sync(FULL, value, by));
    return value;
#endif
}

__device__ __forceinline__ double max_over_warp(double value) {
    for (int by = 16; by > 0; by >>= 1) value = max(value, __shfl_xor_sync(FULL, value, by));
    return value;
}

__device__ __forceinline__ float max_over_warp(float value) {
#if __CUDA_ARCH__ >= 800
    // as whole numbers of the same order, whose greatest the GPU finds in one step; turning them back is the same again
    int key = (int)__float_as_uint(value);
    key = __reduce_max_sync(FULL, key ^ (key >> 31 & 0x7fffffff));
    return __uint_as_float((unsigned)(key ^ (key >> 31 & 0x7fffffff)));
#else
    for (int by = 16; by > 0; by >>= 1) value = max(value, __shfl_xor_sync(FULL, value, by));
    return value;
#endif
}

__device__ __forceinline__ real first_minimum(real x, real y, real z, double origin) {
    return (double)squared_norm(x, y, z) <= origin ? PASSED_OVER : real(__uint_as_float(0x7f800000u));
}

// A block samples a cloud. A thread owns every THREADS-th point, with its squared distance from the nearest point chosen; the
// greatest of these, and of equal ones the lowest index, is found within threads, warps and the block.
//
// Points whose squared norm is up to `origin` are passed over; none if it is negative. `scratch` (B, N) is used where POINTS is 0
// and may else be a null pointer; out (B, count). Grid: (B, 1, 1).
extern "C" __global__ void __launch_bounds__(THREADS)
    furthest_point_sample(const real* __restrict__ xyz, int size, int count, double origin, real* __restrict__ scratch,
                          int* __restrict__ out) {
    // two of each: a warp may write its next choice while another still reads the last ones
    __shared__ real tops[2][WARPS];
    __shared__ int places[2][WARPS];
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    const real* cloud = xyz + 3LL * size * blockIdx.x;
    int* chosen = out + (long long)count * blockIdx.x;
#if POINTS
    real x[POINTS], y[POINTS], z[POINTS], minima[POINTS];
#pragma unroll
    for (int i = 0; i < POINTS; ++i) {
        int at = i * THREADS + (int)threadIdx.x;
        bool is_there = at < size;
        x[i] = is_there ? cloud[3LL * at] : real(0);
        y[i] = is_there ? cloud[3LL * at + 1] : real(0);
        z[i] = is_there ? cloud[3LL * at + 2] : real(0);
        minima[i] = is_there ? first_minimum(x[i], y[i], z[i], origin) : LEFT_OVER;
    }
#else
    real* minima = scratch + (long long)size * blockIdx.x;
    for (long long at = threadIdx.x; at < size; at += THREADS)
        minima[at] = first_minimum(cloud[3 * at], cloud[3 * at + 1], cloud[3 * at + 2], origin);
#endif
    int last = 0;
    if (threadIdx.x == 0) chosen[0] = 0;
    for (int n = 1; n < count; ++n) {
        real x0 = cloud[3LL * last], y0 = cloud[3LL * last + 1], z0 = cloud[3LL * last + 2];
        real best = LEFT_OVER;
        int place = NOBODY;
#if POINTS
#pragma unroll
        for (int i = 0; i < POINTS; ++i) {
            real distance = squared_norm(x[i] - x0, y[i] - y0, z[i] - z0);
            minima[i] = distance < minima[i] ? distance : minima[i];
            // indices rise, so of equal ones the lowest stays
            if (minima[i] > best) {
                best = minima[i];
                place = i * THREADS + (int)threadIdx.x;
            }
        }
#else
#pragma unroll 4
        for (long long at = threadIdx.x; at < size; at += THREADS) {
            real distance = squared_norm(cloud[3 * at] - x0, cloud[3 * at + 1] - y0, cloud[3 * at + 2] - z0);
            real minimum = minima[at];
            if (distance < minimum) minima[at] = minimum = distance;
            if (minimum > best) {
                best = minimum;
                place = (int)at;
            }
        }
#endif
        real top = max_over_warp(best);
        last = min_over_warp(best == top ? place : NOBODY);
        if (WARPS > 1) {
            if (lane == 0) {
                tops[n % 2][warp] = top;
                places[n % 2][warp] = last;
            }
            __syncthreads();
            best = lane < WARPS ? tops[n % 2][lane] : LEFT_OVER;
            place = lane < WARPS ? places[n % 2][lane] : NOBODY;
            top = max_over_warp(best);
            last = min_over_warp(best == top ? place : NOBODY);
        }
        if (threadIdx.x == 0) chosen[n] = last;
    }
}

#elif OP < 3

#define TILE 1024  // points that a block keeps in shared memory at a time

// Copies up to TILE points of a cloud of `size`, from number `start` on, to shared memory; returns how many.
__device__ __forceinline__ int read_tile(const real* __restrict__ cloud, long long start, int size, real* tile) {
    int present = (int)(size - start < TILE ? size - start : TILE);
    for (int i = threadIdx.x; i < 3 * present; i += THREADS) tile[i] = cloud[3 * start + i];
    __syncthreads();
    return present;
}

__device__ __forceinline__ real squared_distance(const real* point, real x, real y, real z) {
    return squared_norm(point[0] - x, point[1] - y, point[2] - z);
}

#endif

#if OP == 1

// A warp has a centre and looks at 32 points at a time, in their order, until it has found enough; a block stops when all its
// warps have. `limit` is the squared radius; out (B, M, count). Grid: (B times blocks of WARPS centres, 1, 1).
extern "C" __global__ void __launch_bounds__(THREADS)
    ball_query(const real* __restrict__ xyz, const real* __restrict__ centres, int size, int num_centres, real limit, int count,
               int* __restrict__ out) {
    __shared__ real tile[3 * TILE];
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    unsigned blocks = (num_centres - 1) / WARPS + 1;
    long long cloud = blockIdx.x / blocks, centre = (long long)(blockIdx.x % blocks) * WARPS + warp;
    bool is_there = centre < num_centres;
    centre += cloud * num_centres;
    real x = 0, y = 0, z = 0;
    if (is_there) x = centres[3 * centre], y = centres[3 * centre + 1], z = centres[3 * centre + 2];
    int* row = out + centre * count;
    int found = is_there ? 0 : count, first = 0;
    for (long long start = 0; start < size; start += TILE) {
        int present = read_tile(xyz + 3 * cloud * size, start, size, tile);
        for (int i = 0; i < present && found < count; i += 32) {
            int at = i + lane;
            bool is_inside = at < present && squared_distance(tile + 3 * at, x, y, z) < limit;
            unsigned inside = __ballot_sync(FULL, is_inside);
            if (inside == 0) continue;
            if (found == 0) first = (int)start + i + __ffs((int)inside) - 1;
            int place = found + __popc(inside & ((1u << lane) - 1));
            if (is_inside && place < count) row[place] = (int)start + at;
            found += __popc(inside);
        }
        // also keeps the tile until all have read it
        if (!__syncthreads_or(found < count)) break;
    }
    for (int place = found + lane; place < count; place += 32) row[place] = first;
}

#elif OP == 2

__device__ __forceinline__ float root(float x) { return __fsqrt_rn(x); }
__device__ __forceinline__ double root(double x) { return __dsqrt_rn(x); }

// A thread has a query and keeps its three nearest points so far in registers. A distance that is not yet known is NaN, which
// gives way to anything; the third nearest does not give way to a later point as far away. dist, out (B, n, 3). Grid: (B times
// blocks of THREADS queries, 1, 1).
extern "C" __global__ void __launch_bounds__(THREADS)
    three_nn(const real* __restrict__ queries, const real* __restrict__ points, int num_queries, int size,
             real* __restrict__ dist, int* __restrict__ out) {
    __shared__ real tile[3 * TILE];
    unsigned blocks = (num_queries - 1) / THREADS + 1;
    long long cloud = blockIdx.x / blocks, query = (long long)(blockIdx.x % blocks) * THREADS + threadIdx.x;
    bool is_there = query < num_queries;
    query += cloud * num_queries;
    real x = 0, y = 0, z = 0;
    if (is_there) x = queries[3 * query], y = queries[3 * query + 1], z = queries[3 * query + 2];
    real a, b, c;
    a = b = c = __uint_as_float(0x7fc00000u);
    int p = 0, q = 0, r = 0;
    for (long long start = 0; start < size; start += TILE) {
        int present = read_tile(points + 3 * cloud * size, start, size, tile);
        for (int i = 0; i < present; ++i) {
            real d = squared_distance(tile + 3 * i, x, y, z);
            if (d >= c) continue;
            c = d, r = (int)start + i;
            if (!(c >= b)) {
                c = b, r = q, b = d, q = (int)start + i;
                if (!(b >= a)) b = a, q = p, a = d, p = (int)start + i;
            }
        }
        __syncthreads();
    }
    if (!is_there) return;
    dist[3 * query] = root(a), dist[3 * query + 1] = root(b), dist[3 * query + 2] = root(c);
    out[3 * query] = p, out[3 * query + 1] = q, out[3 * query + 2] = r;
}

#elif OP == 3

#define CHANNELS 8  // for which a thread reads its indices once

#if BYTES == 1
typedef unsigned char value_t;
#elif BYTES == 2
typedef unsigned short value_t;
#elif BYTES == 4
typedef unsigned value_t;
#else
typedef unsigned long long value_t;
#endif

struct __align__(PACK * BYTES) Pack {
    value_t values[PACK];
};

// A thread copies PACK neighbouring places of CHANNELS channels; they are `total` threads. Grid: (blocks of THREADS, 1, 1).
extern "C" __global__ void __launch_bounds__(THREADS)
    group_points(const value_t* __restrict__ features, const index_t* __restrict__ idx, int channels, int size, long long count,
                 long long total, value_t* __restrict__ out) {
    long long task = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (task >= total) return;
    int groups = (channels - 1) / CHANNELS + 1;
    long long place = task % (count / PACK) * PACK, rest = task / (count / PACK), cloud = rest / groups;
    int channel = (int)(rest % groups) * CHANNELS, end = min(channel + CHANNELS, channels);
    index_t from[PACK];
#pragma unroll
    for (int k = 0; k < PACK; ++k) from[k] = idx[cloud * count + place + k];
#pragma unroll 4
    for (int c = channel; c < end; ++c) {
        long long row = cloud * channels + c;
        Pack pack;
#pragma unroll
        for (int k = 0; k < PACK; ++k) pack.values[k] = features[row * size + from[k]];
        *reinterpret_cast<Pack*>(out + row * count + place) = pack;
    }
}

#else

#if IO == 3
typedef double io_t;
#elif IO == 0
typedef float io_t;
#else
typedef unsigned short io_t;  // the bits of a half or a bfloat16
#endif

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
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"((float)value));
    target[index] = bits;
#elif IO == 2
    unsigned bits = __float_as_uint((float)value);
    // round to nearest even; a NaN stays a NaN
    target[index] = value == value ? (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : 0x7fffu;
#else
    target[index] = value;
#endif
}

#endif

#if OP == 4

#define CHANNELS 2  // for which a thread reads the order once; more rows of gradients would not stay in the L1 cache

// A block adds the gradients of some channels of a cloud up to its points. A thread goes through the places that name its point,
// from the first to the last. `order` (B, P) holds the places sorted by the point that they name, `starts` (B, N + 1) where each
// point's begin; weight (B, P), or a null pointer without WEIGHTS; grads (B, C, count), where count is P, or P / 3 with WEIGHTS.
// Grid: (B times groups of CHANNELS channels, 1, 1).
extern "C" __global__ void __launch_bounds__(THREADS)
    add_up(const io_t* __restrict__ grads, const real* __restrict__ weight, const int* __restrict__ order,
           const int* __restrict__ starts, int channels, int size, int count, io_t* __restrict__ out) {
    unsigned groups = (channels - 1) / CHANNELS + 1;
    long long cloud = blockIdx.x / groups, places = WEIGHTS ? 3LL * count : count;
    int channel = (int)(blockIdx.x % groups) * CHANNELS, present = min(channels - channel, CHANNELS);
    long long row = cloud * channels + channel;
    order += cloud * places;
    starts += cloud * (size + 1LL);
    for (long long n = threadIdx.x; n < size; n += THREADS) {
        real sums[CHANNELS];
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) sums[c] = 0;
        int end = starts[n + 1];
#pragma unroll 4
        for (int j = starts[n]; j < end; ++j) {
            int place = order[j];
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) {
                if (c >= present) continue;
#if WEIGHTS
                sums[c] = add(sums[c], multiply(weight[cloud * places + place], read(grads, (row + c) * count + place / 3)));
#else
                sums[c] = add(sums[c], read(grads, (row + c) * count + place));
#endif
            }
        }
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c)
            if (c < present) write(out, (row + c) * size + n, sums[c]);
    }
}

#elif OP == 5

#define CHANNELS 8  // for which a thread reads indices and weights once

// A thread interpolates CHANNELS channels at a point; they are `total` threads. idx, weight (B, n, 3); out (B, C, n). Grid:
// (blocks of THREADS, 1, 1).
extern "C" __global__ void __launch_bounds__(THREADS)
    three_interpolate(const io_t* __restrict__ features, const index_t* __restrict__ idx, const real* __restrict__ weight,
                      int channels, int size, int count, long long total, io_t* __restrict__ out) {
    long long task = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (task >= total) return;
    int groups = (channels - 1) / CHANNELS + 1;
    long long place = task % count, rest = task / count, cloud = rest / groups, at = 3 * (cloud * count + place);
    int channel = (int)(rest % groups) * CHANNELS, end = min(channel + CHANNELS, channels);
    index_t p = idx[at], q = idx[at + 1], r = idx[at + 2];
    real a = weight[at], b = weight[at + 1], c = weight[at + 2];
#pragma unroll 4
    for (int i = channel; i < end; ++i) {
        long long row = cloud * channels + i, from = row * size;
        real sum = add(multiply(a, read(features, from + p)), multiply(b, read(features, from + q)));
        write(out, row * count + place, add(sum, multiply(c, read(features, from + r))));
    }
}

#elif OP == 6

// A thread adds up the gradients of a point's three weights over the channels; they are `total` threads. grads (B, C, n); idx,
// out (B, n, 3). Grid: (blocks of THREADS, 1, 1).
extern "C" __global__ void __launch_bounds__(THREADS)
    weight_gradient(const io_t* __restrict__ grads, const io_t* __restrict__ features, const index_t* __restrict__ idx,
                    int channels, int size, int count, long long total, real* __restrict__ out) {
    long long task = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (task >= total) return;
    long long place = task % count, cloud = task / count;
    index_t p = idx[3 * task], q = idx[3 * task + 1], r = idx[3 * task + 2];
    real a = 0, b = 0, c = 0;
#pragma unroll 4
    for (int i = 0; i < channels; ++i) {
        long long row = cloud * channels + i, from = row * size;
        real grad = read(grads, row * count + place);
        a = add(a, multiply(grad, read(features, from + p)));
        b = add(b, multiply(grad, read(features, from + q)));
        c = add(c, multiply(grad, read(features, from + r)));
    }
    out[3 * task] = a, out[3 * task + 1] = b, out[3 * task + 2] = c;
}

#endif
