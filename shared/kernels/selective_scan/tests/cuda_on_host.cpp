// The kernels of ../selective_scan.cu as functions that Python can call.
#include "../../../testing/cuda_on_host.h"

#include "../selective_scan.cu"

extern "C" void emulate(int backward, const int grid[3], int threads, const uint64_t* arguments) {
    host::run(backward ? host::adapter<selective_scan_backward> : host::adapter<selective_scan_forward>, grid, threads, arguments);
}
