// The kernels of ../backward_warp.cu as functions that Python can call.
#include "../../../testing/cuda_on_host.h"

#include "../backward_warp.cu"

extern "C" void emulate(int backward, const int grid[3], int threads, const uint64_t* arguments) {
    host::run(backward ? host::adapter<backward_warp_backward> : host::adapter<backward_warp_forward>, grid, threads, arguments);
}
