// What `ptx.unavailable` runs once, to see that a kernel starts and is handed its launch number.
#include "common.cuh"

KERNEL(32, 1) trial(const int* in, int* out) {
    out[threadIdx.x] = in[threadIdx.x] + launch_number<SHARED_SIZE>();
}
