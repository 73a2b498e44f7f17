// Backward warping on a GPU; README.md has the mathematics, cuda.py compiles and launches this file.
//
// A thread owns one point and goes through the channels: neighbouring threads read neighbouring pixels wherever the flow is
// smooth. The gradient of the image is scattered with atomic additions, in no fixed order; that of the flow is a sum in the
// thread's registers.
//
// Macros set by the compiler's command line:
//   IO    type of the image and the output: 0 float, 1 half, 2 bfloat16, 3 double
//   REAL  type of the computation, the flow and the gradients: float or double
//
// Layouts: image, out, grad_out, grad_image (B, C, H, W); flow, grad_flow (B, 2, H, W). Grid: (blocks of H W points,
// groups of channels, B); the backward pass has one group.

#define THREADS 256

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

// Explicitly, since near a weight of 1 the rounded product would leave only its error.
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

// Along one axis: the lower neighbour of a point, the step to the upper one, its weight, and whether a gradient passes.
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
    axis.first = (int)safe;
    axis.step = axis.first < size - 1 ? 1 : 0;
    axis.weight = position == position ? safe - real(axis.first) : position;
    return axis;
}

struct Cell {
    Axis x, y;
    long long first;  // place of the upper left pixel in its plane
    long long right, down;
};

__device__ __forceinline__ Cell find_cell(const real* flow, long long point, long long plane, int width, int height) {
    Cell cell;
    int row = (int)(point / width), column = (int)(point - (long long)row * width);
    cell.x = find_axis(real(column) + flow[point], width);
    cell.y = find_axis(real(row) + flow[plane + point], height);
    cell.first = (long long)cell.y.first * width + cell.x.first;
    cell.right = cell.x.step;
    cell.down = (long long)cell.y.step * width;
    return cell;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    backward_warp_forward(const io_t* image, const real* flow, int channels, int height, int width, int per_group, io_t* out) {
    long long plane = (long long)height * width;
    long long point = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (point >= plane) return;
    Cell cell = find_cell(flow + 2 * plane * blockIdx.z, point, plane, width, height);
    int begin = (int)blockIdx.y * per_group, end = min(begin + per_group, channels);
    for (int c = begin; c < end; ++c) {
        long long base = ((long long)blockIdx.z * channels + c) * plane;
        long long at = base + cell.first;
        real a = read(image, at), b = read(image, at + cell.right);
        real d = read(image, at + cell.down), e = read(image, at + cell.down + cell.right);
        real upper = fused(cell.x.weight, b - a, a);
        real lower = fused(cell.x.weight, e - d, d);
        write(out, base + point, fused(cell.y.weight, lower - upper, upper));
    }
}

// grad_image, of type real, comes filled with zeros; either result may be a null pointer.
extern "C" __global__ void __launch_bounds__(THREADS)
    backward_warp_backward(const io_t* grad_out, const io_t* image, const real* flow, int channels, int height, int width,
                           real* grad_image, real* grad_flow) {
    long long plane = (long long)height * width;
    long long point = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (point >= plane) return;
    Cell cell = find_cell(flow + 2 * plane * blockIdx.z, point, plane, width, height);
    real grad_u = 0, grad_v = 0;
    for (int c = 0; c < channels; ++c) {
        long long base = ((long long)blockIdx.z * channels + c) * plane;
        long long at = base + cell.first;
        real g = read(grad_out, base + point);
        if (grad_flow) {
            real a = read(image, at), b = read(image, at + cell.right);
            real d = read(image, at + cell.down), e = read(image, at + cell.down + cell.right);
            real twist = (e - d) - (b - a);
            grad_u += g * ((b - a) + cell.y.weight * twist);
            grad_v += g * ((d - a) + cell.x.weight * twist);
        }
        if (grad_image) {
            real lower = g * cell.y.weight, upper = g - lower;
            real upper_right = upper * cell.x.weight, lower_right = lower * cell.x.weight;
            atomicAdd(grad_image + at, upper - upper_right);
            atomicAdd(grad_image + at + cell.right, upper_right);
            atomicAdd(grad_image + at + cell.down, lower - lower_right);
            atomicAdd(grad_image + at + cell.down + cell.right, lower_right);
        }
    }
    if (grad_flow) {
        long long base = 2 * plane * blockIdx.z;
        grad_flow[base + point] = cell.x.inside ? grad_u : real(0);
        grad_flow[base + plane + point] = cell.y.inside ? grad_v : real(0);
    }
}
