// The kernel of ../flash_warp.cu that OP names as a function that Python can call.
#include "../../../testing/cuda_on_host.h"

// one copy for all threads of a block
#undef __shared__
#define __shared__ static

#include "../flash_warp.cu"

extern "C" void emulate(int, const int grid[3], int threads, const uint64_t* arguments) {
#if OP == 0
    host::run(host::adapter<flash_warp_energy>, grid, threads, arguments);
#elif OP == 1
    host::run(host::adapter<flash_warp>, grid, threads, arguments);
#else
    host::run(host::adapter<flash_splat>, grid, threads, arguments);
#endif
}
