// P' (left (x) right^T) P x for a few vectors on a CUDA device, in one launch, with factors of what
// enters and leaves, and casts: operations.py.
//
// With X = x[first] as p x q, a block makes four columns of Y = (left X) right, as left (X right'), of
// one vector at a time: it reads all of x and left, and four columns of right. A warp sums four rows
// at once, over its lanes.

#include "../numbers.cuh"

// Not in the namespace below: nvcc makes what takes it invisible outside the library then.
struct Rotation {  // as in cuda.py
    const void *x;                // [vectors, p q]
    void *y;                      // the same, out
    const float *left, *right;    // [p, p], [q, q]
    const int32_t *first, *place; // [p q] or null; entry i of left X right goes to place[i]
    const float *before, *after;  // factors of x and of y, [p q] or null
    int64_t vectors;
    int32_t p, q, x_kind, y_kind;
};

namespace {

constexpr int WARP = 32, THREADS = 512, WARPS = THREADS / WARP;
constexpr int COLUMNS = 4, ROWS = 4;  // that a block makes; that a warp sums at once

DEVICE void add_product(float4 &sum, float x, const float4 &four) {
    sum.x = fmaf(x, four.x, sum.x), sum.y = fmaf(x, four.y, sum.y);
    sum.z = fmaf(x, four.z, sum.z), sum.w = fmaf(x, four.w, sum.w);
}

// Which of four sums over a warp a lane gets
DEVICE int sum_of_lane() { return threadIdx.x >> 3 & 3; }

// The sums of a warp's fours: lanes exchange halves of what they have, until each has one
DEVICE float sum_over_warp(const float4 &four) {
    const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
    const float a = (upper ? four.z : four.x) + __shfl_xor_sync(~0u, upper ? four.x : four.z, 16);
    const float b = (upper ? four.w : four.y) + __shfl_xor_sync(~0u, upper ? four.y : four.w, 16);
    float sum = (odd ? b : a) + __shfl_xor_sync(~0u, odd ? a : b, 8);
#pragma unroll
    for (int across = 4; across; across /= 2) sum += __shfl_xor_sync(~0u, sum, across);
    return sum;
}

DEVICE void copy_numbers(float *to, const void *from, int64_t at, int count, int kind) {
    if (kind == FLOAT) {
#pragma unroll 8
        for (int i = threadIdx.x; i < count; i += THREADS) to[i] = read_fresh((const float *)from + at + i);
    } else {
#pragma unroll 8
        for (int i = threadIdx.x; i < count; i += THREADS) to[i] = read_number(from, at + i, kind);
    }
}

// Of what this thread has copied
DEVICE void multiply_numbers(float *to, const float *factors, int count) {
#pragma unroll 8
    for (int i = threadIdx.x; i < count; i += THREADS) to[i] *= factors[i];
}

// For rows of A [count, width], where entry(row, k) is A_rowk: sums of A_rowk times[k] over k
template <class Entry, class Finish>
DEVICE void multiply_rows(int count, int width, const float4 *times, Entry entry, Finish finish) {
    const int lane = threadIdx.x % WARP;
    for (int row = threadIdx.x / WARP * ROWS; row < count; row += WARPS * ROWS) {
        float4 sums[ROWS] = {};
#pragma unroll 4
        for (int k = lane; k < width; k += WARP) {
            float each[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) each[r] = entry(min(row + r, count - 1), k);
            const float4 four = times[k];
#pragma unroll
            for (int r = 0; r < ROWS; r++) add_product(sums[r], each[r], four);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float sum = sum_over_warp(sums[r]);
            if (lane % 8 == 0 && row + r < count) finish(row + r, sum_of_lane(), sum);
        }
    }
}

// Bring what does not depend on the kernel before this one to L2.
DEVICE void prefetch_constants(const Rotation &a) {
    constexpr int LINE = 128 / sizeof(float);
    const int64_t at = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * LINE;
    if (at < a.p * a.p) prefetch(a.left + at);
    if (at < a.q * a.q) prefetch(a.right + at);
    if (a.first && at < a.p * a.q) prefetch(a.first + at);
    if (a.place && at < a.p * a.q) prefetch(a.place + at);
    if (a.before && at < a.p * a.q) prefetch(a.before + at);
    if (a.after && at < a.p * a.q) prefetch(a.after + at);
}

__global__ void __launch_bounds__(THREADS, 1) rotate_few(const Rotation a) {
    const int p = a.p, q = a.q;
    float4 *right = (float4 *)shared_memory(), *made = right + q;  // columns of right, and of X right
    float *left = (float *)(made + p), *x = left + p * p;
    const int64_t tiles = (q + COLUMNS - 1) / COLUMNS * a.vectors;
    int64_t held = -1;
    let_next_begin();
    prefetch_constants(a);
    await_previous();
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t strip = tile / a.vectors, start = tile % a.vectors * p * q;
        const int column = int(strip) * COLUMNS;
        if (held < 0) copy_numbers(left, a.left, 0, p * p, FLOAT);
        if (held != strip)
            for (int i = threadIdx.x; i < COLUMNS * q; i += THREADS) {
                const int k = i / COLUMNS, c = column + i % COLUMNS;
                ((float *)right)[i] = c < q ? a.right[k * q + c] : 0;
            }
        held = strip;
        copy_numbers(x, a.x, start, p * q, a.x_kind);
        if (a.before) multiply_numbers(x, a.before, p * q);
        __syncthreads();
        multiply_rows(
            p, q, right,
            [&](int row, int k) { return x[a.first ? a.first[row * q + k] : row * q + k]; },
            [&](int row, int c, float sum) { ((float *)(made + row))[c] = sum; });
        __syncthreads();
        multiply_rows(
            p, p, made, [&](int row, int k) { return left[row * p + k]; },
            [&](int row, int c, float sum) {
                if (column + c >= q) return;
                const int made = row * q + column + c, at = a.place ? a.place[made] : made;
                if (a.after) sum *= a.after[at];
                write_number(a.y, start + at, a.y_kind, sum);
            });
    }
}

}  // namespace

// What comes back is a cudaError_t.
extern "C" int rotate_kronecker(const Rotation *given, int bytes, cudaStream_t stream) {
    const int64_t strips = (given->q + COLUMNS - 1) / COLUMNS;
    return launch(rotate_few, strips * given->vectors, 1, THREADS, bytes, stream, *given);
}
