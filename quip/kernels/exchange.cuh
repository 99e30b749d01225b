// Sums over all thread blocks of a launch while they run, and what else fitted panels share.

#ifndef QUIP_EXCHANGE
#define QUIP_EXCHANGE

#include "device.cuh"

namespace {

constexpr int LANES = 32, MAX_WARPS = 16;
constexpr int AT_ONCE = 8;  // loads that are asked for together
constexpr unsigned ALL = 0xffffffffu;
constexpr unsigned EMPTY = 0xffffffffu;  // no sum: a NaN that comes out of a sum has other bits
constexpr float TINY = 1.17549435e-38f;

// Sums over the rows of all thread blocks, in an order that does not change from run to run.
class Exchange {
  public:
    __device__ Exchange(unsigned *slots, float *scratch)
        : slots(slots), ours(scratch), theirs(scratch + MAX_WARPS * LANES) {}

    // The lane i < COUNT of each warp gets the sum of values[i]; COUNT is a power of 2, and values
    // from USED on are none.
    template <int USED, int COUNT> __device__ float sum(float (&values)[COUNT]) {
        const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
        const int warps = blockDim.x / LANES;
        ours[warp * LANES + lane] = of_copies<COUNT>(of_warp(values, lane));
        __syncthreads();
        float total = 0;
        if (warp == 0)
            for (int w = 0; w < warps; w++) total += ours[w * LANES + lane];
        return over_blocks(total, USED);
    }

    // The lane i < used of each warp gets the sum of what the lanes i of all first warps give. The
    // threads of a block must have met since they were here before.
    __device__ float over_blocks(float total, int used) {
        const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
        const int warps = blockDim.x / LANES;
        if (warp == 0 && lane < used) {
            volatile unsigned *slot = slots + blockIdx.x * LANES + lane;
            const unsigned bits = __float_as_uint(total);
            *slot = bits == EMPTY ? EMPTY >> 1 : bits;
        }
        theirs[warp * LANES + lane] = lane < used ? of_blocks(warp, warps, lane) : 0.0f;
        __syncthreads();
        total = 0;
        for (int w = 0; w < warps; w++) total += theirs[w * LANES + lane];
        slots += gridDim.x * LANES;
        return total;
    }

  private:
    unsigned *slots;  // of the next exchange
    float *ours, *theirs;

    // Half of the values go to the lane across, until each lane has one
    template <int COUNT> __device__ static float of_warp(float (&values)[COUNT], int lane) {
        if constexpr (COUNT > 1) {
            constexpr int HALF = COUNT / 2;
            float halves[HALF];
#pragma unroll
            for (int i = 0; i < HALF; i++) {
                const float sent = lane & HALF ? values[i] : values[i + HALF];
                const float kept = lane & HALF ? values[i + HALF] : values[i];
                halves[i] = kept + __shfl_xor_sync(ALL, sent, HALF);
            }
            return of_warp(halves, lane);
        } else {
            return values[0];
        }
    }

    // Of lanes that hold the same value of COUNT
    template <int COUNT> __device__ static float of_copies(float total) {
#pragma unroll
        for (int across = COUNT; across < LANES; across *= 2)
            total += __shfl_xor_sync(ALL, total, across);
        return total;
    }

    // Whether the sums of every `warps`-th thread block from `first` on are there. Volatile: a load
    // by __ldcv, compiled, is moved out of the loop that waits for it.
    __device__ bool arrived(int first, int warps, int lane, unsigned (&bits)[AT_ONCE]) const {
        const volatile unsigned *from = slots + lane;
        bool all = true;
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int block = first + i * warps;
            bits[i] = block < static_cast<int>(gridDim.x) ? from[block * LANES] : 0;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) all &= bits[i] != EMPTY;
        return all;
    }

    // Every `warps`-th thread block's sum, some of them asked for at once
    __device__ float of_blocks(int warp, int warps, int lane) const {
        const int blocks = gridDim.x;
        float total = 0;
        for (int block = warp; block < blocks; block += warps * AT_ONCE) {
            unsigned bits[AT_ONCE];
            while (!arrived(block, warps, lane, bits)) __nanosleep(20);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) total += __uint_as_float(bits[i]);
        }
        return total;
    }
};

// To nearest, ties to even; x is finite and positive
__device__ float to_bfloat16(float x) {
    const unsigned bits = __float_as_uint(x);
    return __uint_as_float((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

// The lane whose value is least, the first of several
__device__ int least(float value) {
    float low = value;
#pragma unroll
    for (int across = LANES / 2; across; across /= 2)
        low = fminf(low, __shfl_xor_sync(ALL, low, across));
    const int lane = __ffs(__ballot_sync(ALL, value == low)) - 1;
    return lane < 0 ? 0 : lane;  // all are NaN
}

template <class Kernel> cudaError_t allow(Kernel *kernel, size_t bytes) {
    return cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// All thread blocks must be resident at once, or the driver refuses.
template <class Kernel, class Argument>
cudaError_t start_together(
    Kernel *kernel, Argument argument, int blocks, int threads, size_t bytes, cudaStream_t stream) {
    void *arguments[] = {&argument};
    if (const cudaError_t error = allow(kernel, bytes)) return error;
    return cudaLaunchCooperativeKernel(
        kernel, dim3(blocks), dim3(threads), arguments, bytes, stream);
}

}  // namespace

#endif
