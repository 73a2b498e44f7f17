// Deformable convolution on a GPU: sampling into columns, and its adjoint. README.md has the mathematics, cuda.py compiles and
// launches this file and does the products with the weights.
//
// One thread works on one output pixel of one image and one offset group, tap after tap; threads of a warp own neighbouring
// pixels, so that offsets, masks and columns are read and written whole lines at a time.
//
// Macros set by the compiler's command line:
//   DOUBLE    0 float, 1 double
//   GUIDED    1: `offset` is raw and `mask` is the flow; tanh, flow and sigmoid are applied here
//
// Layouts: input (B, G, C/G, H, W); offset (B, G, K, (dy, dx), P); mask (B, G, K, P) or null; raw (B, 3GK, P), its first 2GK
// channels read like offset, the rest like mask; flow (B, (u, v), P); columns (B, G, C/G, K, P).

#if DOUBLE
typedef double real;
#else
typedef float real;
#endif

struct Sizes {
    int per_group, height, width, groups, taps, kernel_width, out_pixels, out_width;
    int stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
};

// Every kernel takes the sizes as whole numbers, in the order of cuda.py, and puts them together again.
#define SIZES_PARAMETERS                                                                                                  \
    int per_group, int height, int width, int groups, int taps, int kernel_width, int out_pixels, int out_width, int stride_y, \
        int stride_x, int pad_y, int pad_x, int dilation_y, int dilation_x
#define SIZES                                                                                                                  \
    {per_group, height, width, groups, taps, kernel_width, out_pixels, out_width, stride_y, stride_x, pad_y, pad_x, dilation_y, \
     dilation_x}

// A point between four pixels; those outside the image count as 0.
struct Point {
    int upper_left;  // may lie outside
    bool has00, has01, has10, has11;
    real dy, dx, mask, tanh_y, tanh_x;
};

#if DOUBLE
__device__ __forceinline__ real tanh_of(real x) { return tanh(x); }
__device__ __forceinline__ real exp_of(real x) { return exp(x); }
__device__ __forceinline__ real floor_of(real x) { return floor(x); }
#else
__device__ __forceinline__ real tanh_of(real x) { return tanhf(x); }
__device__ __forceinline__ real exp_of(real x) { return expf(x); }
__device__ __forceinline__ real floor_of(real x) { return floorf(x); }
#endif

__device__ __forceinline__ Point locate(const real* offset, const real* mask, real max_residual, const Sizes& s, int image,
                                        int group, int tap, int pixel) {
    Point point;
    long long pairs = (long long)s.groups * s.taps, at = (long long)group * s.taps + tap, step = s.out_pixels;
    real y, x;
#if GUIDED
    const real* raw = offset + image * 3 * pairs * step;
    const real* flow = mask + image * 2 * step;
    point.tanh_y = tanh_of(raw[2 * at * step + pixel]);
    point.tanh_x = tanh_of(raw[(2 * at + 1) * step + pixel]);
    point.mask = real(1) / (real(1) + exp_of(-raw[(2 * pairs + at) * step + pixel]));
    y = max_residual * point.tanh_y + flow[step + pixel];
    x = max_residual * point.tanh_x + flow[pixel];
#else
    const real* own = offset + (image * pairs + at) * 2 * step;
    y = own[pixel];
    x = own[step + pixel];
    point.mask = mask ? mask[(image * pairs + at) * step + pixel] : real(1);
    point.tanh_y = point.tanh_x = 0;
#endif
    y += real(pixel / s.out_width * s.stride_y - s.pad_y + tap / s.kernel_width * s.dilation_y);
    x += real(pixel % s.out_width * s.stride_x - s.pad_x + tap % s.kernel_width * s.dilation_x);
    // a NaN fails every comparison: it samples zeros outside, times a NaN
    if (y != y) point.mask = y;
    if (x != x) point.mask = x;
    y = y > real(-1) && y < real(s.height) ? y : real(s.height);
    x = x > real(-1) && x < real(s.width) ? x : real(s.width);
    real above = floor_of(y), before = floor_of(x);
    point.dy = y - above;
    point.dx = x - before;
    int row = (int)above, column = (int)before;
    bool has0 = row >= 0 && row < s.height, has1 = row + 1 < s.height;
    bool left = column >= 0 && column < s.width, right = column + 1 < s.width;
    point.has00 = has0 && left;
    point.has01 = has0 && right;
    point.has10 = has1 && left;
    point.has11 = has1 && right;
    point.upper_left = row * s.width + column;
    return point;
}

extern "C" __global__ void deform_sample(const real* input, const real* offset, const real* mask, real max_residual,
                                         SIZES_PARAMETERS, real* columns) {
    const Sizes s = SIZES;
    int pixel = blockIdx.x * blockDim.x + threadIdx.x, group = blockIdx.y, image = blockIdx.z;
    if (pixel >= s.out_pixels) return;
    long long plane_size = (long long)s.height * s.width, first = ((long long)image * s.groups + group) * s.per_group;
    for (int tap = 0; tap < s.taps; ++tap) {
        Point p = locate(offset, mask, max_residual, s, image, group, tap, pixel);
        real upper = p.mask * (1 - p.dy), lower = p.mask * p.dy;
        real w00 = upper * (1 - p.dx), w01 = upper * p.dx, w10 = lower * (1 - p.dx), w11 = lower * p.dx;
        for (int c = 0; c < s.per_group; ++c) {
            const real* plane = input + (first + c) * plane_size + p.upper_left;
            real value = w00 * (p.has00 ? plane[0] : real(0)) + w01 * (p.has01 ? plane[1] : real(0)) +
                         w10 * (p.has10 ? plane[s.width] : real(0)) + w11 * (p.has11 ? plane[s.width + 1] : real(0));
            columns[((first + c) * s.taps + tap) * s.out_pixels + pixel] = value;
        }
    }
}

// Fills the columns again and takes their gradient back. grad_input must be zero before. For the guided form grad_offset is that
// of raw and grad_mask the flow's, one for each group, (B, G, (u, v), P).
extern "C" __global__ void deform_sample_backward(const real* input, const real* offset, const real* mask, real max_residual,
                                                  SIZES_PARAMETERS, const real* grad_columns, real* columns,
                                                  real* grad_input, real* grad_offset, real* grad_mask) {
    const Sizes s = SIZES;
    int pixel = blockIdx.x * blockDim.x + threadIdx.x, group = blockIdx.y, image = blockIdx.z;
    if (pixel >= s.out_pixels) return;
    long long plane_size = (long long)s.height * s.width, first = ((long long)image * s.groups + group) * s.per_group;
    long long pairs = (long long)s.groups * s.taps, step = s.out_pixels;
#if GUIDED
    real flow_y = 0, flow_x = 0;
#endif
    for (int tap = 0; tap < s.taps; ++tap) {
        Point p = locate(offset, mask, max_residual, s, image, group, tap, pixel);
        real upper = p.mask * (1 - p.dy), lower = p.mask * p.dy;
        real w00 = upper * (1 - p.dx), w01 = upper * p.dx, w10 = lower * (1 - p.dx), w11 = lower * p.dx;
        real s00 = 0, s01 = 0, s10 = 0, s11 = 0;
        for (int c = 0; c < s.per_group; ++c) {
            long long corner = (first + c) * plane_size + p.upper_left;
            long long place = ((first + c) * s.taps + tap) * step + pixel;
            real grad = grad_columns[place];
            real v00 = p.has00 ? input[corner] : real(0), v01 = p.has01 ? input[corner + 1] : real(0);
            real v10 = p.has10 ? input[corner + s.width] : real(0), v11 = p.has11 ? input[corner + s.width + 1] : real(0);
            columns[place] = w00 * v00 + w01 * v01 + w10 * v10 + w11 * v11;
            s00 += grad * v00, s01 += grad * v01, s10 += grad * v10, s11 += grad * v11;
            if (p.has00) atomicAdd(grad_input + corner, grad * w00);
            if (p.has01) atomicAdd(grad_input + corner + 1, grad * w01);
            if (p.has10) atomicAdd(grad_input + corner + s.width, grad * w10);
            if (p.has11) atomicAdd(grad_input + corner + s.width + 1, grad * w11);
        }
        real top = (1 - p.dx) * s00 + p.dx * s01, bottom = (1 - p.dx) * s10 + p.dx * s11;
        real grad_y = p.mask * (bottom - top);
        real grad_x = p.mask * ((1 - p.dy) * (s01 - s00) + p.dy * (s11 - s10));
        real grad_m = (1 - p.dy) * top + p.dy * bottom;
        long long at = (long long)group * s.taps + tap;
#if GUIDED
        real* grad_raw = grad_offset + image * 3 * pairs * step;
        grad_raw[2 * at * step + pixel] = grad_y * max_residual * (1 - p.tanh_y * p.tanh_y);
        grad_raw[(2 * at + 1) * step + pixel] = grad_x * max_residual * (1 - p.tanh_x * p.tanh_x);
        grad_raw[(2 * pairs + at) * step + pixel] = grad_m * p.mask * (1 - p.mask);
        flow_y += grad_y, flow_x += grad_x;
#else
        real* own = grad_offset + (image * pairs + at) * 2 * step;
        own[pixel] = grad_y;
        own[step + pixel] = grad_x;
        if (grad_mask) grad_mask[(image * pairs + at) * step + pixel] = grad_m;
#endif
    }
#if GUIDED
    real* grad_flow = grad_mask + ((long long)image * s.groups + group) * 2 * step;
    grad_flow[pixel] = flow_x;
    grad_flow[step + pixel] = flow_y;
#endif
}
