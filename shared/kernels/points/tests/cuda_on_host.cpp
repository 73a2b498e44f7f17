// The kernel of ../points.cu that OP names as a function that Python can call.
#include "../../../testing/cuda_on_host.h"

// one copy for all threads of a block
#undef __shared__
#define __shared__ static

// Each step rounded: what is volatile is never fused.
template <class T>
inline T rounded(T value) {
    volatile T kept = value;
    return kept;
}
inline float __fmul_rn(float a, float b) { return rounded(a * b); }
inline double __dmul_rn(double a, double b) { return rounded(a * b); }
inline float __fadd_rn(float a, float b) { return rounded(a + b); }
inline double __dadd_rn(double a, double b) { return rounded(a + b); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dsqrt_rn(double x) { return std::sqrt(x); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline unsigned __ballot_sync(unsigned, bool predicate) {
    static unsigned votes[32];
    unsigned warp = host::current / 32, bit = 1u << host::current % 32;
    __syncwarp();
    votes[warp] = 0;
    __syncwarp();
    votes[warp] |= predicate ? bit : 0u;
    __syncwarp();
    return votes[warp];
}

inline int __syncthreads_or(bool predicate) {
    static bool any;
    __syncthreads();
    any = false;
    __syncthreads();
    any = any || predicate;
    __syncthreads();
    return any;
}

inline int __reduce_min_sync(unsigned, int value) {
    for (int by = 16; by > 0; by >>= 1) value = min(value, __shfl_xor_sync(~0u, value, by));
    return value;
}
inline int __reduce_max_sync(unsigned, int value) {
    for (int by = 16; by > 0; by >>= 1) value = max(value, __shfl_xor_sync(~0u, value, by));
    return value;
}

#include "../points.cu"

extern "C" void emulate(int, const int grid[3], int threads, const uint64_t* arguments) {
#if OP == 0
    host::run(host::adapter<furthest_point_sample>, grid, threads, arguments);
#elif OP == 1
    host::run(host::adapter<ball_query>, grid, threads, arguments);
#elif OP == 2
    host::run(host::adapter<three_nn>, grid, threads, arguments);
#elif OP == 3
    host::run(host::adapter<group_points>, grid, threads, arguments);
#elif OP == 4
    host::run(host::adapter<add_up>, grid, threads, arguments);
#elif OP == 5
    host::run(host::adapter<three_interpolate>, grid, threads, arguments);
#else
    host::run(host::adapter<weight_gradient>, grid, threads, arguments);
#endif
}
