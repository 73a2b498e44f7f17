// Local correlation on a GPU; README.md has the mathematics, cuda.py compiles and launches this file.
//
// A thread owns one point and goes through the channels. Of each channel it reads the 4 x 4 patch around the point, which
// gives all nine samples, since they have one fractional part; products and squares are summed in registers. The backward
// pass makes the samples again. The gradient of the features is scattered with atomic additions, in no fixed order.
//
// Macros set by the compiler's command line:
//   QUERY, FEATURES  their types: 0 float, 1 half, 2 bfloat16, 3 double
//   REAL             type of the computation and of everything else: float or double
//
// Layouts: query, features and their gradients (B, C, H, W); flow, grad_flow (B, 2, H, W); out, grad_out (B, 9, H, W);
// norms (B, 10, H, W), one over the norms of the nine samples, then of the query. Grid: (blocks of H W points, 1, B).

#define THREADS 128

typedef REAL real;

// What a pointer to a type points to, and how it is read.
template <int type>
struct Stored;
template <>
struct Stored<0> {
    typedef float bits;
    static __device__ __forceinline__ real number(bits x) { return x; }
};
template <>
struct Stored<1> {
    typedef unsigned short bits;
    static __device__ __forceinline__ real number(bits x) {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x));
        return value;
    }
};
template <>
struct Stored<2> {
    typedef unsigned short bits;
    static __device__ __forceinline__ real number(bits x) { return __uint_as_float((unsigned)x << 16); }
};
template <>
struct Stored<3> {
    typedef double bits;
    static __device__ __forceinline__ real number(bits x) { return real(x); }
};
typedef Stored<QUERY>::bits query_t;
typedef Stored<FEATURES>::bits features_t;

// Explicitly, since near a weight of 1 the rounded product would leave only its error.
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

__device__ __forceinline__ float inverse_root(float x) { return 1.f / sqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return 1. / sqrt(x); }

// Along one axis: the lower neighbour of a point, the weight of the upper one, and whether a gradient passes.
struct Axis {
    int first;
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
    axis.first = (int)safe;
    axis.weight = position == position ? safe - real(axis.first) : position;
    return axis;
}

struct Patch {
    Axis x, y;
    long long first;     // place of the upper left pixel in its plane, which may lie one row and one column before it
    unsigned on_plane;   // bit 4 r + c: whether pixel (r, c) lies on the plane; the others are 0
};

__device__ __forceinline__ Patch find_patch(const real* flow, long long point, long long plane, int width, int height) {
    Patch patch;
    int row = (int)(point / width), column = (int)(point - (long long)row * width);
    patch.x = find_axis(real(column) + flow[point], width);
    patch.y = find_axis(real(row) + flow[plane + point], height);
    int left = patch.x.first - 1, top = patch.y.first - 1;
    patch.first = (long long)top * width + left;
    patch.on_plane = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c)
            if (top + r >= 0 && top + r < height && left + c >= 0 && left + c < width) patch.on_plane |= 1u << (4 * r + c);
    return patch;
}

// One row of a patch, interpolated sideways: the three values and the differences that they move along.
__device__ __forceinline__ void patch_row(const features_t* features, long long base, const Patch& patch, int r, int width,
                                          real values[3], real differences[3]) {
    real pixels[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        pixels[c] = 0;
        if (patch.on_plane >> (4 * r + c) & 1u)
            pixels[c] = Stored<FEATURES>::number(features[base + patch.first + (long long)r * width + c]);
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) {
        differences[c] = pixels[c + 1] - pixels[c];
        values[c] = fused(patch.x.weight, differences[c], pixels[c]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    local_correlation_forward(const query_t* query, const features_t* features, const real* flow, int channels, int height,
                              int width, double eps, real* out, real* norms) {
    long long plane = (long long)height * width;
    long long point = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (point >= plane) return;
    Patch patch = find_patch(flow + 2 * plane * blockIdx.z, point, plane, width, height);
    real products[9], squares[9], square = 0;
#pragma unroll
    for (int j = 0; j < 9; ++j) products[j] = squares[j] = 0;
    for (int channel = 0; channel < channels; ++channel) {
        long long base = ((long long)blockIdx.z * channels + channel) * plane;
        real q = Stored<QUERY>::number(query[base + point]);
        square += q * q;
        real upper[3], lower[3], differences[3];
        patch_row(features, base, patch, 0, width, upper, differences);
#pragma unroll
        for (int r = 0; r < 3; ++r) {
            patch_row(features, base, patch, r + 1, width, lower, differences);
#pragma unroll
            for (int c = 0; c < 3; ++c) {
                real k = fused(patch.y.weight, lower[c] - upper[c], upper[c]);
                products[3 * r + c] += q * k;
                squares[3 * r + c] += k * k;
                upper[c] = lower[c];
            }
        }
    }
    real norm_query = inverse_root(square + real(eps));
    long long at_norm = 10 * plane * blockIdx.z + point, at_out = 9 * plane * blockIdx.z + point;
    norms[at_norm + 9 * plane] = norm_query;
#pragma unroll
    for (int j = 0; j < 9; ++j) {
        real norm = inverse_root(squares[j] + real(eps));
        norms[at_norm + j * plane] = norm;
        out[at_out + j * plane] = products[j] * norm * norm_query;
    }
}

// Add the gradients of a row's three values to the patch's pixels.
__device__ __forceinline__ void patch_row_back(real* grad_features, long long base, const Patch& patch, int r, int width,
                                               const real grads[3]) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        real value = 0;
        if (c < 3) value = grads[c] - patch.x.weight * grads[c];
        if (c > 0) value += patch.x.weight * grads[c - 1];
        if (patch.on_plane >> (4 * r + c) & 1u)
            atomicAdd(grad_features + base + patch.first + (long long)r * width + c, value);
    }
}

// grad_features comes filled with zeros.
extern "C" __global__ void __launch_bounds__(THREADS)
    local_correlation_backward(const real* grad_out, const real* out, const real* norms, const query_t* query,
                               const features_t* features, const real* flow, int channels, int height, int width,
                               real* grad_query, real* grad_features, real* grad_flow) {
    long long plane = (long long)height * width;
    long long point = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (point >= plane) return;
    Patch patch = find_patch(flow + 2 * plane * blockIdx.z, point, plane, width, height);
    // dk_j = along_j q - back_j k_j and dq = Σ along_j k_j - back_query q
    real along[9], back[9], back_query = 0;
    long long at_norm = 10 * plane * blockIdx.z + point, at_out = 9 * plane * blockIdx.z + point;
    real norm_query = norms[at_norm + 9 * plane];
#pragma unroll
    for (int j = 0; j < 9; ++j) {
        real g = grad_out[at_out + j * plane], norm = norms[at_norm + j * plane];
        real cosine = out[at_out + j * plane];
        along[j] = g * norm * norm_query;
        back[j] = g * cosine * norm * norm;
        back_query += g * cosine * norm_query * norm_query;
    }
    real grad_u = 0, grad_v = 0;
    for (int channel = 0; channel < channels; ++channel) {
        long long base = ((long long)blockIdx.z * channels + channel) * plane;
        real q = Stored<QUERY>::number(query[base + point]);
        real grad_q = -back_query * q;
        real upper[3], lower[3], upper_slope[3], lower_slope[3], pending[3] = {0, 0, 0};
        patch_row(features, base, patch, 0, width, upper, upper_slope);
#pragma unroll
        for (int r = 0; r < 3; ++r) {
            patch_row(features, base, patch, r + 1, width, lower, lower_slope);
            real grads[3];
#pragma unroll
            for (int c = 0; c < 3; ++c) {
                real rise = lower[c] - upper[c];
                real k = fused(patch.y.weight, rise, upper[c]);
                real d = along[3 * r + c] * q - back[3 * r + c] * k;
                grad_q += along[3 * r + c] * k;
                grad_v += d * rise;
                real below = d * patch.y.weight;
                grads[c] = pending[c] + (d - below);
                pending[c] = below;
                grad_u += grads[c] * upper_slope[c];
                upper[c] = lower[c];
                upper_slope[c] = lower_slope[c];
            }
            patch_row_back(grad_features, base, patch, r, width, grads);
        }
#pragma unroll
        for (int c = 0; c < 3; ++c) grad_u += pending[c] * upper_slope[c];
        patch_row_back(grad_features, base, patch, 3, width, pending);
        grad_query[base + point] = grad_q;
    }
    long long base = 2 * plane * blockIdx.z;
    grad_flow[base + point] = patch.x.inside ? grad_u : real(0);
    grad_flow[base + plane + point] = patch.y.inside ? grad_v : real(0);
}
