// Warping and splatting of images on a GPU; README.md has the mathematics, cuda.py compiles and launches this file.
//
// A thread owns one point and goes through the channels: neighbouring threads read neighbouring voxels wherever the
// displacement is smooth. What is scattered is added atomically, in no fixed order; the gradient of the displacement is a sum
// in the thread's registers.
//
// Macros set by the compiler's command line:
//   IO     type of images and what has their shape: 0 float, 1 half, 2 bfloat16, 3 double
//   REAL   type of the computation, the displacement and what is summed: float or double
//   DIM    axes of an image: 2 or 3
//   SPLAT  0 for the kernels of the warp, 1 for those of the splat
//
// Layouts: images (B, C, *S), or (1, C, *S) where `shared`; displacements (B, DIM, *S); denominators (B, 1, *S). S is (depth,
// height, width), without the depth in 2-D. Grid: (blocks of points, 1, B).

#define THREADS 256
#define CORNERS (1 << DIM)

typedef REAL real;
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

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }
// exact at the weights 0 and 1
__device__ __forceinline__ real lerp(real a, real b, real weight) { return fused(weight, b, fused(-weight, a, a)); }

// The cell that a point lies in: the places of its corners in an image, the weight of the upper ones along every axis, and
// whether a gradient passes. Corner k is the upper one along axis i where bit DIM - 1 - i of k is set.
struct Cell {
    long long corner[CORNERS];
    real weight[DIM];
    bool inside[DIM];
};

__device__ __forceinline__ Cell find_cell(const real* displacement, long long point, const int* shape, long long plane) {
    Cell cell;
    long long first = 0, stride = 1, rest = point, step[DIM];
#pragma unroll
    for (int i = DIM - 1; i >= 0; --i) {
        int size = shape[i], along = (int)(rest % size);
        rest /= size;
        real position = real(along) + displacement[i * plane + point], last = real(size - 1);
        cell.inside[i] = position > real(0) && position < last;
        // the comparisons take NaN to 0 before it would become a whole number
        real safe = position > real(0) ? position : real(0);
        safe = safe < last ? safe : last;
        int lower = min((int)safe, max(size - 2, 0));
        cell.weight[i] = position == position ? safe - real(lower) : position;
        first += lower * stride;
        step[i] = size > 1 ? stride : 0;
        stride *= size;
    }
#pragma unroll
    for (int k = 0; k < CORNERS; ++k) {
        cell.corner[k] = first;
#pragma unroll
        for (int i = 0; i < DIM; ++i)
            if (k >> (DIM - 1 - i) & 1) cell.corner[k] += step[i];
    }
    return cell;
}

__device__ __forceinline__ void read_corners(const io_t* image, long long base, const Cell& cell, real* values) {
#pragma unroll
    for (int k = 0; k < CORNERS; ++k) values[k] = read(image, base + cell.corner[k]);
}

// Interpolate between the corners; along `axis` take the slope instead. -1: along none.
__device__ __forceinline__ real between(const real* corners, const Cell& cell, int axis) {
    real values[CORNERS];
#pragma unroll
    for (int k = 0; k < CORNERS; ++k) values[k] = corners[k];
#pragma unroll
    for (int i = DIM - 1; i >= 0; --i)
#pragma unroll
        for (int k = 0; k < 1 << i; ++k) {
            real a = values[2 * k], b = values[2 * k + 1];
            values[k] = i == axis ? b - a : lerp(a, b, cell.weight[i]);
        }
    return values[0];
}

__device__ __forceinline__ real weight_of(const Cell& cell, int k) {
    real weight = 1;
#pragma unroll
    for (int i = 0; i < DIM; ++i) weight *= k >> (DIM - 1 - i) & 1 ? cell.weight[i] : real(1) - cell.weight[i];
    return weight;
}

// Add to `slopes` those of the channel at `base`, times g.
__device__ __forceinline__ void add_slopes(const real* corners, const Cell& cell, real g, real* slopes) {
#pragma unroll
    for (int i = 0; i < DIM; ++i) slopes[i] += g * between(corners, cell, i);
}

__device__ __forceinline__ void write_slopes(const Cell& cell, const real* slopes, real* target, long long point, long long plane) {
#pragma unroll
    for (int i = 0; i < DIM; ++i) target[i * plane + point] = cell.inside[i] ? slopes[i] : real(0);
}

#if DIM == 2
#define SHAPE {height, width}
#else
#define SHAPE {depth, height, width}
#endif

// Sets `plane`, the voxels of an image, `point`, `b` and `cell`; threads beyond the image are done.
#define FIND_POINT                                                       \
    const int shape[DIM] = SHAPE;                                        \
    long long plane = (long long)depth * height * width;                 \
    long long point = (long long)blockIdx.x * THREADS + threadIdx.x;     \
    if (point >= plane) return;                                          \
    long long b = blockIdx.z;                                            \
    Cell cell = find_cell(displacement + b * DIM * plane, point, shape, plane);

#if SPLAT == 0

extern "C" __global__ void __launch_bounds__(THREADS)
    image_warp_forward(const io_t* image, const real* displacement, int channels, int depth, int height, int width, int shared,
                       io_t* out) {
    FIND_POINT
    for (int c = 0; c < channels; ++c) {
        real corners[CORNERS];
        read_corners(image, ((shared ? 0 : b) * channels + c) * plane, cell, corners);
        write(out, (b * channels + c) * plane + point, between(corners, cell, -1));
    }
}

// grad_image, of type real, comes filled with zeros; either result may be a null pointer.
extern "C" __global__ void __launch_bounds__(THREADS)
    image_warp_backward(const io_t* grad_out, const io_t* image, const real* displacement, int channels, int depth, int height,
                        int width, int shared, real* grad_image, real* grad_displacement) {
    FIND_POINT
    real slopes[DIM] = {};
    for (int c = 0; c < channels; ++c) {
        long long base = ((shared ? 0 : b) * channels + c) * plane;
        real g = read(grad_out, (b * channels + c) * plane + point);
        if (grad_displacement) {
            real corners[CORNERS];
            read_corners(image, base, cell, corners);
            add_slopes(corners, cell, g, slopes);
        }
        if (grad_image)
#pragma unroll
            for (int k = 0; k < CORNERS; ++k) atomicAdd(grad_image + base + cell.corner[k], g * weight_of(cell, k));
    }
    if (grad_displacement) write_slopes(cell, slopes, grad_displacement + b * DIM * plane, point, plane);
}

#else

// Both results, of type real, come filled with zeros.
extern "C" __global__ void __launch_bounds__(THREADS)
    image_splat_forward(const io_t* image, const real* displacement, int channels, int depth, int height, int width,
                        real* numerator, real* denominator) {
    FIND_POINT
    real weights[CORNERS];
#pragma unroll
    for (int k = 0; k < CORNERS; ++k) {
        weights[k] = weight_of(cell, k);
        atomicAdd(denominator + b * plane + cell.corner[k], weights[k]);
    }
    for (int c = 0; c < channels; ++c) {
        long long base = (b * channels + c) * plane;
        real value = read(image, base + point);
#pragma unroll
        for (int k = 0; k < CORNERS; ++k) atomicAdd(numerator + base + cell.corner[k], value * weights[k]);
    }
}

// Either result may be a null pointer.
extern "C" __global__ void __launch_bounds__(THREADS)
    image_splat_backward(const io_t* grad_numerator, const io_t* grad_denominator, const io_t* image, const real* displacement,
                         int channels, int depth, int height, int width, io_t* grad_image, real* grad_displacement) {
    FIND_POINT
    real slopes[DIM] = {}, corners[CORNERS];
    for (int c = 0; c < channels; ++c) {
        long long base = (b * channels + c) * plane;
        read_corners(grad_numerator, base, cell, corners);
        if (grad_image) write(grad_image, base + point, between(corners, cell, -1));
        if (grad_displacement) add_slopes(corners, cell, read(image, base + point), slopes);
    }
    if (grad_displacement) {
        read_corners(grad_denominator, b * plane, cell, corners);
        add_slopes(corners, cell, real(1), slopes);
        write_slopes(cell, slopes, grad_displacement + b * DIM * plane, point, plane);
    }
}

#endif
