// Warping by a band-limited displacement on a GPU; README.md has the mathematics, cuda.py compiles and launches this file.
//
// A block owns a line of voxels along the last axis: it reads the n numbers of the line's displacement into shared memory, and
// a thread evaluates the displacement of one voxel at a time in registers. The gradient is the products of the line's slopes
// with the basis: a warp sums one product at a time with shuffles, in a fixed order and without atomic additions. Only the
// splat adds atomically, in no fixed order.
//
// Macros set by the compiler's command line:
//   OP       the kernel that is compiled: 0 flash_warp_energy, 1 flash_warp, 2 flash_splat
//   DIM      axes of the image, 2 or 3
//   THREADS  of a block, whole warps
//   REAL     type of everything: float or double
//
// Layouts: lines, gradient (B, DIM, lines, n); basis (n, S_last), turned; target (B, *S); totals (B, lines). Sizes are s0, s1,
// s2, the first 1 where DIM is 2. Grid: (lines, B, 1).

#define MAX_MODES 64
#define WARPS (THREADS / 32)
#define FULL 0xffffffffu

typedef REAL real;

// Explicitly, since near a weight of 1 the rounded product would leave only its error.
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

// Along one axis: the lower neighbour of a point, the step to the upper one, its weight, and whether a gradient passes. A point
// on the upper border has weight 1 in the last cell.
struct Axis {
    int first, step;
    real weight;
    bool inside;
};

__device__ __forceinline__ Axis find_axis(real position, int size) {
    Axis axis;
    real last = real(size - 1);
    axis.inside = position > real(0) && position < last;
    // the comparisons take NaN to 0 before it would become a whole number
    real safe = position > real(0) ? position : real(0);
    safe = safe < last ? safe : last;
    axis.first = min((int)safe, max(size - 2, 0));
    axis.step = size > 1 ? 1 : 0;
    axis.weight = position == position ? safe - real(axis.first) : position;
    return axis;
}

struct Cell {
    Axis axis[DIM];
    long long first;  // place of the first corner in its image
    long long step[DIM];
};

// The numbers of the block's line, (DIM, n).
__device__ __forceinline__ void read_line(const real* lines, int n, real* coefficients) {
    for (int k = threadIdx.x; k < DIM * n; k += THREADS) {
        long long row = ((long long)blockIdx.y * DIM + k / n) * gridDim.x + blockIdx.x;
        coefficients[k] = lines[row * n + k % n];
    }
    __syncthreads();
}

__device__ __forceinline__ Cell find_cell(const real* coefficients, const real* basis, int n, int z, int s0, int s1, int s2) {
    real u[DIM];
#pragma unroll
    for (int i = 0; i < DIM; ++i) u[i] = 0;
    for (int m = 0; m < n; ++m) {
        real value = basis[(long long)m * s2 + z];
#pragma unroll
        for (int i = 0; i < DIM; ++i) u[i] = fused(value, coefficients[i * n + m], u[i]);
    }
    Cell cell;
    cell.axis[DIM - 1] = find_axis(real(z) + u[DIM - 1], s2);
    cell.axis[DIM - 2] = find_axis(real((int)(blockIdx.x % s1)) + u[DIM - 2], s1);
    cell.step[DIM - 1] = cell.axis[DIM - 1].step;
    cell.step[DIM - 2] = (long long)cell.axis[DIM - 2].step * s2;
    cell.first = (long long)cell.axis[DIM - 2].first * s2 + cell.axis[DIM - 1].first;
#if DIM == 3
    long long plane = (long long)s1 * s2;
    cell.axis[0] = find_axis(real((int)(blockIdx.x / s1)) + u[0], s0);
    cell.step[0] = cell.axis[0].step * plane;
    cell.first += cell.axis[0].first * plane;
#endif
    return cell;
}

// Interpolates between the four corners of a cell in a plane; `rise` and `slope` are those along the last but one and last axis.
__device__ __forceinline__ real in_plane(const real* image, long long at, const Cell& cell, real* rise, real* slope) {
    long long right = cell.step[DIM - 1], down = cell.step[DIM - 2];
    real a = image[at], b = image[at + right], c = image[at + down], d = image[at + down + right];
    real upper = fused(cell.axis[DIM - 1].weight, b - a, a);
    *rise = fused(cell.axis[DIM - 1].weight, d - c, c) - upper;
    *slope = fused(cell.axis[DIM - 2].weight, (d - c) - (b - a), b - a);
    return fused(cell.axis[DIM - 2].weight, *rise, upper);
}

// The value of the image in a cell, and its slopes along every axis.
__device__ __forceinline__ real interpolate(const real* image, const Cell& cell, real slopes[DIM]) {
    real value = in_plane(image, cell.first, cell, &slopes[DIM - 2], &slopes[DIM - 1]);
#if DIM == 3
    real rise, slope, weight = cell.axis[0].weight;
    slopes[0] = in_plane(image, cell.first + cell.step[0], cell, &rise, &slope) - value;
    slopes[1] = fused(weight, rise - slopes[1], slopes[1]);
    slopes[2] = fused(weight, slope - slopes[2], slopes[2]);
    value = fused(weight, slopes[0], value);
#endif
    return value;
}

template <class T>
__device__ __forceinline__ T sum_over_warp(T value) {
    for (int by = 16; by > 0; by >>= 1) value += __shfl_xor_sync(FULL, value, by);
    return value;
}

#if OP == 0

// The image is one for all; totals (double) are the sums of squares of the lines; gradient may be a null pointer.
extern "C" __global__ void __launch_bounds__(THREADS)
    flash_warp_energy(const real* image, const real* target, const real* lines, const real* basis, int n, int s0, int s1, int s2,
                      double* totals, real* gradient) {
    __shared__ real coefficients[DIM * MAX_MODES];
    __shared__ real products[DIM * MAX_MODES];
    __shared__ real slopes[DIM * THREADS];
    __shared__ double partial[WARPS];
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    long long line = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    read_line(lines, n, coefficients);
    double total = 0;
    for (int z0 = 0; z0 < s2; z0 += THREADS) {
        int z = z0 + (int)threadIdx.x;
        real slope[DIM];
#pragma unroll
        for (int i = 0; i < DIM; ++i) slope[i] = 0;
        if (z < s2) {
            Cell cell = find_cell(coefficients, basis, n, z, s0, s1, s2);
            real residual = interpolate(image, cell, slope) - target[line * s2 + z];
            total += (double)residual * (double)residual;
#pragma unroll
            for (int i = 0; i < DIM; ++i) slope[i] = cell.axis[i].inside ? 2 * residual * slope[i] : real(0);
        }
        if (!gradient) continue;
#pragma unroll
        for (int i = 0; i < DIM; ++i) slopes[i * THREADS + threadIdx.x] = slope[i];
        __syncthreads();
        int present = min(s2 - z0, THREADS);
        for (int k = warp; k < DIM * n; k += WARPS) {
            const real* column = basis + (long long)(k % n) * s2 + z0;
            real sum = 0;
            for (int j = lane; j < present; j += 32) sum = fused(slopes[k / n * THREADS + j], column[j], sum);
            sum = sum_over_warp(sum);
            if (lane == 0) products[k] = z0 ? products[k] + sum : sum;
        }
        __syncthreads();
    }
    total = sum_over_warp(total);
    if (lane == 0) partial[warp] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int k = 1; k < WARPS; ++k) total += partial[k];
        totals[line] = total;
    }
    if (!gradient) return;
    for (int k = threadIdx.x; k < DIM * n; k += THREADS) {
        long long row = ((long long)blockIdx.y * DIM + k / n) * gridDim.x + blockIdx.x;
        gradient[row * n + k % n] = products[k];
    }
}

#elif OP == 1

// image (B, C, *S), or (1, C, *S) with `shared_image`; out (B, C, *S).
extern "C" __global__ void __launch_bounds__(THREADS)
    flash_warp(const real* image, const real* lines, const real* basis, int n, int s0, int s1, int s2, int channels,
               int shared_image, real* out) {
    __shared__ real coefficients[DIM * MAX_MODES];
    read_line(lines, n, coefficients);
    long long voxels = (long long)gridDim.x * s2;
    for (int z = threadIdx.x; z < s2; z += THREADS) {
        Cell cell = find_cell(coefficients, basis, n, z, s0, s1, s2);
        for (int c = 0; c < channels; ++c) {
            real slopes[DIM];
            long long channel = (long long)blockIdx.y * channels + c;
            real value = interpolate(image + (shared_image ? c : channel) * voxels, cell, slopes);
            out[channel * voxels + (long long)blockIdx.x * s2 + z] = value;
        }
    }
}

#else

// One access for both where the GPU can (from sm_90 on).
__device__ __forceinline__ void add_pair(float* target, float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    atomicAdd(reinterpret_cast<float2*>(target), make_float2(first, second));
#else
    atomicAdd(target, first);
    atomicAdd(target + 1, second);
#endif
}

__device__ __forceinline__ void add_pair(double* target, double first, double second) {
    atomicAdd(target, first);
    atomicAdd(target + 1, second);
}

// image (B, *S); sums (B, *S, 2), filled with zeros, takes the values times their weights and the weights.
extern "C" __global__ void __launch_bounds__(THREADS)
    flash_splat(const real* image, const real* lines, const real* basis, int n, int s0, int s1, int s2, real* sums) {
    __shared__ real coefficients[DIM * MAX_MODES];
    read_line(lines, n, coefficients);
    long long subject = (long long)blockIdx.y * gridDim.x * s2;
    for (int z = threadIdx.x; z < s2; z += THREADS) {
        Cell cell = find_cell(coefficients, basis, n, z, s0, s1, s2);
        real value = image[subject + (long long)blockIdx.x * s2 + z];
#pragma unroll
        for (int corner = 0; corner < 1 << DIM; ++corner) {
            long long at = subject + cell.first;
            real weight = 1;
#pragma unroll
            for (int i = 0; i < DIM; ++i) {
                bool upper = corner >> i & 1;
                at += upper ? cell.step[i] : 0;
                weight *= upper ? cell.axis[i].weight : real(1) - cell.axis[i].weight;
            }
            add_pair(sums + 2 * at, weight * value, weight);
        }
    }
}

#endif
