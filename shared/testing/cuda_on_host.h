// Runs a CUDA kernel on the CPU, block by block, so that its logic can be tested where there is no GPU.
//
// Every thread of a block is a fiber; __syncthreads, __syncwarp and the shuffles hand over to the next fiber until all have
// arrived. Shared memory is filled with NaN before every block. A barrier that not all threads reach stops the program.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes)

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};
inline Dim3 threadIdx, blockIdx, gridDim;
alignas(64) inline unsigned char shared_memory[1 << 20];

template <class T>
inline T min(T a, T b) { return b < a ? b : a; }
template <class T>
inline T max(T a, T b) { return a < b ? b : a; }
template <class T>
inline void atomicAdd(T* target, T value) { *target += value; }
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

namespace host {

struct Barrier {
    unsigned arrived = 0;
    unsigned long generation = 0;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 * 1024);
    bool done = false;
    unsigned parity = 0;  // which of the two shuffle slots the next shuffle uses
};

inline std::vector<Fiber> fibers;
inline std::vector<Barrier> warp_barriers;
inline Barrier block_barrier;
inline double slots[2][1024];
inline ucontext_t scheduler;
inline unsigned current, idle_rounds;
inline void (*body)(const uint64_t*);
inline const uint64_t* body_arguments;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline void wait(Barrier& barrier, unsigned members) {
    unsigned long mine = barrier.generation;
    if (++barrier.arrived == members) {
        barrier.arrived = 0;
        ++barrier.generation;
        idle_rounds = 0;
    }
    while (barrier.generation == mine) yield();
}

inline void fiber_main() {
    body(body_arguments);
    fibers[current].done = true;
    idle_rounds = 0;
    yield();
}

inline void run(void (*kernel)(const uint64_t*), const int grid[3], int threads, const uint64_t* arguments) {
    body = kernel;
    body_arguments = arguments;
    gridDim = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
    fibers = std::vector<Fiber>(threads);
    for (unsigned z = 0; z < gridDim.z; ++z)
        for (unsigned y = 0; y < gridDim.y; ++y)
            for (unsigned x = 0; x < gridDim.x; ++x) {
                blockIdx = {x, y, z};
                std::memset(shared_memory, 0xff, sizeof shared_memory);
                warp_barriers.assign(threads / 32, {});
                block_barrier = {};
                for (auto& fiber : fibers) {
                    fiber.done = false;
                    fiber.parity = 0;
                    getcontext(&fiber.context);
                    fiber.context.uc_stack.ss_sp = fiber.stack.data();
                    fiber.context.uc_stack.ss_size = fiber.stack.size();
                    fiber.context.uc_link = &scheduler;
                    makecontext(&fiber.context, fiber_main, 0);
                }
                idle_rounds = 0;
                for (bool running = true; running;) {
                    running = false;
                    if (++idle_rounds > 10) {
                        std::fprintf(stderr, "deadlock: not all threads reached a barrier\n");
                        std::abort();
                    }
                    for (current = 0; current < fibers.size(); ++current) {
                        if (fibers[current].done) continue;
                        running = true;
                        threadIdx = {current, 0, 0};
                        swapcontext(&scheduler, &fibers[current].context);
                    }
                }
            }
    fibers.clear();
}

template <class T, class From>
inline T shuffle(T value, From from) {
    unsigned lane = current % 32, parity = fibers[current].parity ^= 1;
    slots[parity][current] = value;
    wait(warp_barriers[current / 32], 32);
    int source = from((int)lane);
    return source < 0 || source > 31 ? value : (T)slots[parity][current - lane + source];
}

// Turn a kernel into a function of an array with one 64-bit place per parameter.
template <auto kernel, class... P, size_t... I>
inline void unpack(const uint64_t* slots, void (*)(P...), std::index_sequence<I...>) {
    auto get = [&](auto* typed, size_t i) {
        std::memcpy(typed, slots + i, sizeof *typed);
        return *typed;
    };
    [&](P... parameters) { kernel(get(&parameters, I)...); }(P{}...);
}
template <auto kernel, class... P>
inline void unpack_all(const uint64_t* slots, void (*pointer)(P...)) {
    unpack<kernel>(slots, pointer, std::index_sequence_for<P...>{});
}
template <auto kernel>
inline void adapter(const uint64_t* slots) { unpack_all<kernel>(slots, kernel); }

}  // namespace host

inline void __syncthreads() { host::wait(host::block_barrier, (unsigned)host::fibers.size()); }
inline void __syncwarp() { host::wait(host::warp_barriers[host::current / 32], 32); }
template <class T>
inline T __shfl_up_sync(unsigned, T value, int by) { return host::shuffle(value, [=](int lane) { return lane - by; }); }
template <class T>
inline T __shfl_down_sync(unsigned, T value, int by) { return host::shuffle(value, [=](int lane) { return lane + by; }); }
template <class T>
inline T __shfl_xor_sync(unsigned, T value, int mask) { return host::shuffle(value, [=](int lane) { return lane ^ mask; }); }
template <class T>
inline T __shfl_sync(unsigned, T value, int source) { return host::shuffle(value, [=](int) { return source; }); }
