// Round the columns of a panel in order, with feedback inside it, on a GPU: reference.py, float32.
//
// K's upper triangle lies in shared memory. BLOCK columns of a row sit in the registers of a
// thread, which rounds them one after the other. With the steps known, rows know nothing of each
// other. A step that is fitted needs sums over all rows of its column: the thread blocks, all
// resident, write theirs to slots that each of them reads, once a column (`Exchange`).

#include "../exchange.cuh"

struct Panel {  // as in cuda.py; nvcc exports no function of a nameless namespace's types
    int64_t width, m, K_row;    // K's stride
    const float *X, *K, *base;  // [width, m], [width, width], [width, m] or null; eta may be X
    float *eta;                 // [width, m], out
    uint8_t *codes;             // [width, m], out
    float *step;                // strides below; out [width] if there are rhos
    const float *zero;
    int64_t step_column, step_row, zero_column, zero_row;
    const float *rhos;
    int64_t candidates;
    unsigned *slots;  // [exchanges, thread blocks, LANES], all EMPTY, if there are rhos
    int32_t top, bfloat16;  // bfloat16: round fitted steps to it
};

namespace {

constexpr int WIDTH = 128, BLOCK = 16;

__host__ __device__ int padded(int64_t width) {
    return static_cast<int>((width + BLOCK - 1) / BLOCK * BLOCK);
}

// K[j, k] for j < k, else 0, at j * WIDTH + k: four columns a lane, read at once where they can be
__device__ void load_feedback(const Panel &p, float *K) {
    const int width = static_cast<int>(p.width), columns = padded(p.width);
    const int k = 4 * (threadIdx.x % LANES), warps = blockDim.x / LANES;
    const bool aligned = (p.K_row | width | reinterpret_cast<uintptr_t>(p.K) / 4) % 4 == 0;
#pragma unroll 8
    for (int j = threadIdx.x / LANES; j < columns; j += warps) {
        const float *row = p.K + j * p.K_row;
        float4 w = {0, 0, 0, 0};
        const bool real = j < k + 3 && j < width && k < width;
        if (real && aligned) {
            w = __ldg(reinterpret_cast<const float4 *>(row + k));
        } else if (real) {
            w.x = row[k];
            w.y = k + 1 < width ? row[k + 1] : 0.0f;
            w.z = k + 2 < width ? row[k + 2] : 0.0f;
            w.w = k + 3 < width ? row[k + 3] : 0.0f;
        }
        w.x = j < k ? w.x : 0.0f, w.y = j < k + 1 ? w.y : 0.0f, w.z = j < k + 2 ? w.z : 0.0f;
        *reinterpret_cast<float4 *>(K + j * WIDTH + k) = w;
    }
}

// clamp(floor(t + 1/2), 0, top) for t_half = t + 1/2
__device__ float nearest(float t_half, float top) {
    return fminf(fmaxf(floorf(t_half), 0.0f), top);
}

// ------------------------------------------------------------------------------ steps are known

// Steps and zeros of a row, of the columns from `first` on
template <int COLUMNS>
__device__ void read_grids(
    const Panel &p, int first, int64_t row, float (&step)[COLUMNS], float (&zero)[COLUMNS]) {
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        const bool real = row < p.m && first + c < p.width;
        step[c] = real ? __ldg(p.step + (first + c) * p.step_column + row * p.step_row) : 1.0f;
        zero[c] = real ? __ldg(p.zero + (first + c) * p.zero_column + row * p.zero_row) : 0.0f;
    }
}

// LANES rows a thread block, one a lane. Its warps all round the BLOCK columns that come next, for
// that is a chain, and share the work on the columns after them. Columns share a grid, if ONE.
template <bool ONE> __global__ void __launch_bounds__(128) round_columns(Panel p) {
    extern __shared__ __align__(16) float memory[];
    float *K = memory, *running = memory + padded(p.width) * WIDTH;  // [width, LANES]
    const int width = static_cast<int>(p.width), columns = padded(p.width);
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * LANES + lane;
    const bool inside = row < p.m;
    const float top = static_cast<float>(p.top);
    float step[ONE ? 1 : BLOCK], zero[ONE ? 1 : BLOCK];
    if (ONE) read_grids(p, 0, row, step, zero);

    for (int first = BLOCK * warp; first < columns; first += BLOCK * warps) {
        float x[BLOCK];
#pragma unroll
        for (int i = 0; i < BLOCK; i++)
            x[i] = inside && first + i < width ? p.X[(first + i) * p.m + row] : 0.0f;
#pragma unroll
        for (int i = 0; i < BLOCK; i++) running[(first + i) * LANES + lane] = x[i];
    }
    load_feedback(p, K);

    for (int first = 0; first < columns; first += BLOCK) {
        if (!ONE) read_grids(p, first, row, step, zero);
        float target[BLOCK] = {};
        if (p.base)
#pragma unroll
            for (int c = 0; c < BLOCK; c++)
                if (inside && first + c < width) target[c] = __ldg(p.base + (first + c) * p.m + row);
        __syncthreads();
        float x[BLOCK], e[BLOCK];
#pragma unroll
        for (int c = 0; c < BLOCK; c++) x[c] = running[(first + c) * LANES + lane];
        uint32_t codes[BLOCK / 4] = {};
#pragma unroll
        for (int c = 0; c < BLOCK; c++) {
            const float its = step[ONE ? 0 : c], middle = zero[ONE ? 0 : c];
            const float q = nearest(fmaf(x[c], 1.0f / its, middle + 0.5f), top);
            e[c] = (p.base ? target[c] : x[c]) - its * (q - middle);
            codes[c / 4] |= static_cast<uint32_t>(q) << 8 * (c % 4);
#pragma unroll
            for (int j = c + 1; j < BLOCK; j++) x[j] += K[(first + c) * WIDTH + first + j] * e[c];
        }
#pragma unroll
        for (int c = 0; c < BLOCK; c++) {  // not before: a store would hold up the loads behind it
            const int64_t at = (first + c) * p.m + row;
            if (inside && first + c < width && c % warps == warp) {
                p.eta[at] = e[c];
                p.codes[at] = static_cast<uint8_t>(codes[c / 4] >> 8 * (c % 4));
            }
        }
        for (int k = first + BLOCK + 4 * warp; k < columns; k += 4 * warps) {
            float sums[4];
#pragma unroll
            for (int i = 0; i < 4; i++) sums[i] = running[(k + i) * LANES + lane];
#pragma unroll
            for (int c = 0; c < BLOCK; c++) {
                const float4 weights =
                    *reinterpret_cast<const float4 *>(K + (first + c) * WIDTH + k);
                sums[0] += weights.x * e[c];
                sums[1] += weights.y * e[c];
                sums[2] += weights.z * e[c];
                sums[3] += weights.w * e[c];
            }
#pragma unroll
            for (int i = 0; i < 4; i++) running[(k + i) * LANES + lane] = sums[i];
        }
    }
}

// -------------------------------------------------------------------------- steps fitted on the way

// A row a thread. Of y = x_{k+1} without the feedback of column k, sums of y^2, of y e and of e^2
// for each candidate's errors e say what x_{k+1} = y + K[k, k+1] e sums to in squares, whichever is
// taken: so a column costs one exchange and not two.
template <int CANDIDATES, int COUNT> __global__ void __launch_bounds__(32 * MAX_WARPS)
fit_and_round_columns(Panel p) {
    extern __shared__ __align__(16) float memory[];
    __shared__ float scratch[2 * MAX_WARPS * LANES];
    float *K = memory;
    const int width = static_cast<int>(p.width), lane = threadIdx.x % LANES;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const bool inside = row < p.m;
    const float top = static_cast<float>(p.top), zero = 0.5f * top;
    const float rho = p.rhos[lane < p.candidates ? lane : p.candidates - 1];
    const float *x_in = p.X + row;
    Exchange exchange(p.slots, scratch);

    load_feedback(p, K);
    __syncthreads();
    for (int first = 0; first < width; first += BLOCK) {
        float x[BLOCK];
#pragma unroll
        for (int c = 0; c < BLOCK; c++)
            x[c] = inside && first + c < width ? x_in[(first + c) * p.m] : 0.0f;
#pragma unroll 4
        for (int j = 0; j < first; j++) {
            const float e = inside ? p.eta[j * p.m + row] : 0.0f;
            const float4 *weights = reinterpret_cast<const float4 *>(K + j * WIDTH + first);
#pragma unroll
            for (int i = 0; i < BLOCK / 4; i++) {
                const float4 w = weights[i];
                x[4 * i] += w.x * e;
                x[4 * i + 1] += w.y * e;
                x[4 * i + 2] += w.z * e;
                x[4 * i + 3] += w.w * e;
            }
        }
        float of_first[1] = {x[0] * x[0]};
        float squares = exchange.sum<1>(of_first);
        squares = __shfl_sync(ALL, squares, 0);

        const int last = min(first + BLOCK, width);
        for (int k = first; k < last; k++) {
            // Lane i holds candidate i
            const float rms = sqrtf(fmaxf(squares, 0.0f) / static_cast<float>(p.m));
            float candidate = fmaxf(rho * (static_cast<float>(2.0 / p.top) * rms), TINY);
            if (p.bfloat16) candidate = to_bfloat16(candidate);
            const float its_inverse = 1.0f / candidate;
            const float y = inside ? x[1] : 0.0f;
            float weights[BLOCK - 1];
#pragma unroll
            for (int i = 0; i + 1 < BLOCK; i++)
                weights[i] = k + 1 + i < last ? K[k * WIDTH + k + 1 + i] : 0.0f;
            float sums[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; i++) sums[i] = 0;
#pragma unroll
            for (int i = 0; i < CANDIDATES; i++) {
                const float step = __shfl_sync(ALL, candidate, i);
                const float inverse = __shfl_sync(ALL, its_inverse, i);
                const float q = nearest(fmaf(x[0], inverse, zero + 0.5f), top);
                const float e = inside ? x[0] - step * (q - zero) : 0.0f;
                sums[i] = e * e;
                sums[CANDIDATES + i] = y * e;
            }
            sums[2 * CANDIDATES] = y * y;
            const float total = exchange.sum<2 * CANDIDATES + 1>(sums);

            const int chosen = least(lane < CANDIDATES ? total : INFINITY);
            const float step = __shfl_sync(ALL, candidate, chosen);
            const float q = nearest(fmaf(x[0], 1.0f / step, zero + 0.5f), top);
            const float e = x[0] - step * (q - zero);
            const float of_e = __shfl_sync(ALL, total, chosen);
            const float of_both = __shfl_sync(ALL, total, CANDIDATES + chosen);
            squares = __shfl_sync(ALL, total, 2 * CANDIDATES) +
                      weights[0] * (2.0f * of_both + weights[0] * of_e);
            // x moves on by a column. What comes in at its end is not looked at.
#pragma unroll
            for (int i = 0; i + 1 < BLOCK; i++) x[i] = x[i + 1] + weights[i] * e;

            if (inside) {
                p.eta[k * p.m + row] = e;
                p.codes[k * p.m + row] = static_cast<uint8_t>(q);
            }
            if (blockIdx.x == 0 && threadIdx.x == 0) p.step[k] = step;
        }
    }
}

}  // namespace

extern "C" int round_panel(const Panel *panel, cudaStream_t stream) {
    Panel p = *panel;
    const size_t bytes = sizeof(float) * padded(p.width) * (WIDTH + LANES);
    const unsigned blocks = static_cast<unsigned>((p.m + LANES - 1) / LANES);
    void *arguments[] = {&p};
    const bool one = p.step_column == 0 && p.zero_column == 0;
    const auto kernel = one ? round_columns<true> : round_columns<false>;
    if (const cudaError_t error = allow(kernel, bytes)) return error;
    return cudaLaunchKernel(kernel, dim3(blocks), dim3(128), arguments, bytes, stream);
}

extern "C" int fit_and_round_panel(
    const Panel *panel, int blocks, int threads, cudaStream_t stream) {
    const size_t bytes = sizeof(float) * padded(panel->width) * WIDTH;
    if (panel->candidates == 1)
        return start_together(fit_and_round_columns<1, 4>, *panel, blocks, threads, bytes, stream);
    return start_together(fit_and_round_columns<10, 32>, *panel, blocks, threads, bytes, stream);
}
