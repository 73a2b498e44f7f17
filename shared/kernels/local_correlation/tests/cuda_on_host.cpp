// The kernels of ../local_correlation.cu as functions that Python can call.
#include "../../../testing/cuda_on_host.h"

#include "../local_correlation.cu"

extern "C" void emulate(int backward, const int grid[3], int threads, const uint64_t* arguments) {
    host::run(backward ? host::adapter<local_correlation_backward> : host::adapter<local_correlation_forward>, grid, threads,
              arguments);
}
