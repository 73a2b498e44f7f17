// The kernels of ../image_warp.cu as functions that Python can call.
#include "../../../testing/cuda_on_host.h"

#include "../image_warp.cu"

#if SPLAT
#define FORWARD image_splat_forward
#define BACKWARD image_splat_backward
#else
#define FORWARD image_warp_forward
#define BACKWARD image_warp_backward
#endif

extern "C" void emulate(int backward, const int grid[3], int threads, const uint64_t* arguments) {
    host::run(backward ? host::adapter<BACKWARD> : host::adapter<FORWARD>, grid, threads, arguments);
}
