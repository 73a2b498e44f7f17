// Runs the kernels of ../deform_conv2d.cu on the CPU, thread after thread: they share no memory and meet at no barrier.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define __device__
#define __global__
#define __forceinline__ inline

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};
static Dim3 threadIdx, blockIdx, blockDim;

template <class T>
inline void atomicAdd(T* target, T value) { *target += value; }

#include "../deform_conv2d.cu"

// Calls a kernel with one 64-bit place for every parameter.
template <class... P, size_t... I>
void call(void (*kernel)(P...), const uint64_t* places, std::index_sequence<I...>) {
    auto get = [&](auto* typed, size_t i) {
        std::memcpy(typed, places + i, sizeof *typed);
        return *typed;
    };
    [&](P... parameters) { kernel(get(&parameters, I)...); }(P{}...);
}

template <class... P>
void run(void (*kernel)(P...), const int grid[3], int threads, const uint64_t* places) {
    blockDim.x = threads;
    for (blockIdx.z = 0; (int)blockIdx.z < grid[2]; ++blockIdx.z)
        for (blockIdx.y = 0; (int)blockIdx.y < grid[1]; ++blockIdx.y)
            for (blockIdx.x = 0; (int)blockIdx.x < grid[0]; ++blockIdx.x)
                for (threadIdx.x = 0; (int)threadIdx.x < threads; ++threadIdx.x)
                    call(kernel, places, std::index_sequence_for<P...>{});
}

extern "C" void emulate(int backward, const int grid[3], int threads, const uint64_t* places) {
    if (backward)
        run(deform_sample_backward, grid, threads, places);
    else
        run(deform_sample, grid, threads, places);
}
