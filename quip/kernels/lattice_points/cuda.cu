// Nearest points of E8P and E81B, and the way back, on a CUDA device: a thread is a vector.

#include "nearest.cuh"

struct Nearest {  // as in cuda.py
    Lattice lattice;
    int64_t m, row, column;  // strides of x
    const float *x, *scale;  // scale: one
    void *codes;             // [m], out
};

struct Decode {  // as in cuda.py
    Lattice lattice;
    int64_t m, blocks, group;
    const void *codes;    // [m, blocks]
    const float *scales;  // one for each `group` blocks
    float *w;             // [m, 8 blocks], out
};

struct Errors {  // as in cuda.py
    Lattice lattice;
    int64_t m, blocks, row, column;  // strides of x
    const float *x, *h, *scales;     // h: [8 blocks]
    int64_t candidates;
    double *sums;  // [thread blocks, candidates], out
};

namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32;

__global__ void __launch_bounds__(THREADS) nearest(Nearest a) {
    await_previous();
    const float inverse = 1.0f / __ldg(a.scale);  // moves ties alone, where both points are as far
    const int64_t step = int64_t(gridDim.x) * THREADS;
    for (int64_t at = int64_t(blockIdx.x) * THREADS + threadIdx.x; at < a.m; at += step) {
        float x[DIM];
        uint32_t codes[2];
#pragma unroll
        for (int i = 0; i < DIM; i++) x[i] = a.x[at * a.row + i * a.column] * inverse;
        take_nearest(a.lattice, x, codes);
        write_codes(a.lattice, a.codes, at, codes);
    }
}

__global__ void __launch_bounds__(THREADS) decode_all(Decode a) {
    await_previous();
    const int64_t step = int64_t(gridDim.x) * THREADS, count = a.m * a.blocks;
    for (int64_t at = int64_t(blockIdx.x) * THREADS + threadIdx.x; at < count; at += step) {
        float q[DIM];
        uint32_t codes[2];
        read_codes(a.lattice, a.codes, at, codes);
        decode(a.lattice, codes, q);
        const float scale = __ldg(a.scales + at % a.blocks / a.group);
#pragma unroll
        for (int i = 0; i < DIM; i++) q[i] *= scale;
        float4 *to = (float4 *)(a.w + at * DIM);
        to[0] = {q[0], q[1], q[2], q[3]}, to[1] = {q[4], q[5], q[6], q[7]};
    }
}

// sum h_i (x_i - w_hat_i)^2 over the vectors of a thread block, for each scale
__global__ void __launch_bounds__(THREADS) errors(Errors a) {
    double *sums = (double *)shared_memory();  // [candidates, WARPS]
    await_previous();
    const int64_t step = int64_t(gridDim.x) * THREADS, count = a.m * a.blocks;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int candidate = 0; candidate < a.candidates; candidate++) {
        const float scale = __ldg(a.scales + candidate), inverse = 1.0f / scale;
        float total = 0;
        for (int64_t at = int64_t(blockIdx.x) * THREADS + threadIdx.x; at < count; at += step) {
            const int64_t block = at / a.m * DIM, row = at % a.m;  // rows are neighbours in X
            float x[DIM], squares = 0;
            uint32_t codes[2];
#pragma unroll
            for (int i = 0; i < DIM; i++)
                x[i] = a.x[row * a.row + (block + i) * a.column] * inverse;
            take_nearest(a.lattice, x, codes);
#pragma unroll
            for (int i = 0; i < DIM; i++) squares += __ldg(a.h + block + i) * (x[i] * x[i]);
            total += squares;
        }
        for (int across = 16; across; across /= 2) total += __shfl_xor_sync(~0u, total, across);
        if (lane == 0) sums[candidate * WARPS + warp] = double(total) * scale * scale;
    }
    __syncthreads();
    for (int candidate = threadIdx.x; candidate < a.candidates; candidate += THREADS) {
        double total = 0;
        for (int w = 0; w < WARPS; w++) total += sums[candidate * WARPS + w];
        a.sums[blockIdx.x * a.candidates + candidate] = total;
    }
}

}  // namespace

extern "C" int nearest_points(const Nearest *a, cudaStream_t stream) {
    return launch(nearest, (a->m + THREADS - 1) / THREADS, 1, THREADS, 0, stream, *a);
}

extern "C" int decode_points(const Decode *a, cudaStream_t stream) {
    const int64_t blocks = (a->m * a->blocks + THREADS - 1) / THREADS;
    return launch(decode_all, blocks, 1, THREADS, 0, stream, *a);
}

// On at most `blocks` thread blocks: where there are fewer, their sums are left as they were.
extern "C" int sum_errors(const Errors *a, int64_t blocks, cudaStream_t stream) {
    const int bytes = int(sizeof(double) * a->candidates * WARPS);
    return launch(errors, blocks, 1, THREADS, bytes, stream, *a);
}
