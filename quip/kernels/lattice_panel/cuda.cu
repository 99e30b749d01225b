// Round the columns of a panel to a lattice, eight at a time, on a GPU: reference.py, float32.
//
// Running weights of the rows of a thread block lie in shared memory, with what K has to the right
// of its diagonal blocks of eight. Up to MATES warps share a tile of LANES rows, a row a lane: they
// all round the block that comes next, for that is a chain, and share the work on the columns after
// it. A scale that is fitted needs sums over all rows, of squares and then of errors: the thread
// blocks are all resident, and meet twice a block of columns.

#include "../exchange.cuh"
#include "../lattice_points/nearest.cuh"

struct Panel {  // as in cuda.py; nvcc exports no function of a nameless namespace's types
    Lattice lattice;
    int64_t width, m, K_row;    // of eight columns each, at most 128; K's stride
    const float *X, *K, *base;  // [width, m], [width, width], [width, m] or null
    float *eta;                 // [width, m], out; may be X
    void *codes;                // [blocks, m], out
    float *scales;              // stride below; out [blocks] if there are rhos
    int64_t scale_block;
    const void *old;       // [blocks, m], with metrics [blocks, 8, 8], or null
    const float *metrics;
    const float *h, *rhos;  // [width], [candidates]
    int64_t candidates;
    unsigned *slots;  // [2 blocks, thread blocks, LANES], all EMPTY, if there are rhos
    int32_t tiles;    // of a thread block
};

namespace {

constexpr int MATES = 4, FEW_WARPS = 4, MANY_WARPS = 16, SIZE = DIM * DIM;
constexpr float LEAST = 5.9604645e-8f;  // 2^-24, as in reference.py

// Where in shared memory, in floats. K has a row for each of a block's eight columns, which begins
// with the block after; `running` has one for each column, with all rows of the thread block.
struct Places {
    int blocks, rows;

    __host__ __device__ explicit Places(const Panel &p)
        : blocks(static_cast<int>(p.width) / DIM), rows(p.tiles * LANES) {}
    __host__ __device__ int width(int block) const { return DIM * (blocks - 1 - block); }
    __host__ __device__ int feedback(int block) const {
        return SIZE * (block * (blocks - 1) - block * (block - 1) / 2);
    }
    __host__ __device__ int running() const { return feedback(blocks); }
    __host__ __device__ int metrics() const { return running() + DIM * blocks * rows; }
    __host__ __device__ int errors() const { return metrics() + SIZE * blocks; }
    __host__ __device__ int end() const { return errors() + rows; }
};

// What K has for a lane in one of its rows: four columns, some of the rows asked for at once
DEVICE void load_feedback(const Panel &p, const Places &at, float *memory) {
    const int lane = threadIdx.x % LANES, warps = blockDim.x / LANES, columns = DIM * at.blocks;
    for (int first = threadIdx.x / LANES; first < columns; first += AT_ONCE * warps) {
        float4 weights[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int k = first + i * warps, width = at.width(k / DIM);
            const float4 *from = (const float4 *)(p.K + k * p.K_row + columns - width);
            weights[i] = 4 * lane < width ? __ldg(from + lane) : float4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int k = first + i * warps, width = at.width(k / DIM);
            float4 *to = (float4 *)(memory + at.feedback(k / DIM) + k % DIM * width);
            if (4 * lane < width) to[lane] = weights[i];
        }
    }
}

DEVICE void load(const Panel &p, const Places &at, float *memory) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    const int columns = DIM * at.blocks;
    for (int tile = 0; tile < p.tiles; tile++) {
        const int64_t row = int64_t(blockIdx.x) * at.rows + tile * LANES + lane;
        float *to = memory + at.running() + tile * LANES + lane;
        for (int first = warp; first < columns; first += 2 * AT_ONCE * warps) {
            float x[2 * AT_ONCE];
#pragma unroll
            for (int i = 0; i < 2 * AT_ONCE; i++) {
                const int k = first + i * warps;
                x[i] = row < p.m && k < columns ? p.X[k * p.m + row] : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < 2 * AT_ONCE; i++)
                if (first + i * warps < columns) to[(first + i * warps) * at.rows] = x[i];
        }
    }
    load_feedback(p, at, memory);
    if (p.old)
        for (int i = threadIdx.x; i < SIZE * at.blocks; i += blockDim.x)
            memory[at.metrics() + i] = __ldg(p.metrics + i);
}

// The lane's row of a block of columns
DEVICE void read_running(const float *memory, const Places &at, int block, int tile,
                         float (&x)[DIM]) {
    const float *from = memory + at.running() + tile * LANES + threadIdx.x % LANES;
#pragma unroll
    for (int i = 0; i < DIM; i++) x[i] = from[(DIM * block + i) * at.rows];
}

// x / scale, and what its codes leave of it
DEVICE void divide_and_take(const Panel &p, const float (&x)[DIM], float scale, float (&left)[DIM],
                            uint32_t (&codes)[2]) {
    const float inverse = 1.0f / scale;  // moves ties alone, where both points are as far
#pragma unroll
    for (int i = 0; i < DIM; i++) left[i] = x[i] * inverse;
    take_nearest(p.lattice, left, codes);
}

// Whether e^T metric e is less than it is for the other e
DEVICE bool is_nearer(const float (&e)[DIM], const float (&other)[DIM], const float *metric) {
    float its = 0, others = 0;
#pragma unroll
    for (int i = 0; i < DIM; i++) {
        const float4 low = *(const float4 *)(metric + DIM * i);
        const float4 high = *(const float4 *)(metric + DIM * i + 4);
        const float row[DIM] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        float product = 0, others_product = 0;
#pragma unroll
        for (int j = 0; j < DIM; j++) {
            product += row[j] * e[j];
            others_product += row[j] * other[j];
        }
        its += e[i] * product;
        others += other[i] * others_product;
    }
    return its < others;
}

// Of the candidates RMS / rho, a lane each, that with the least error; all threads get it.
DEVICE float fitted_scale(const Panel &p, const Places &at, int block, float *memory,
                          Exchange &exchange) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    const float *running = memory + at.running() + DIM * block * at.rows;
    const int candidates = static_cast<int>(p.candidates);
    float squares[1] = {0};
    for (int i = threadIdx.x; i < DIM * at.rows; i += blockDim.x)
        squares[0] += running[i] * running[i];
    const float total = __shfl_sync(ALL, exchange.sum<1>(squares), 0);
    const float rms = sqrtf(total / static_cast<float>(DIM * p.m));
    const float given = rms / __ldg(p.rhos + min(lane, candidates - 1));
    const float candidate = to_bfloat16(given > 0.0f ? fmaxf(given, TINY) : LEAST);
    if (candidates == 1) return candidate;

    float *errors = memory + at.errors();  // [tiles, LANES]
    for (int job = warp; job < p.tiles * candidates; job += warps) {
        const int tile = job / candidates, which = job % candidates;
        const float scale = __shfl_sync(ALL, candidate, which);
        const int64_t row = int64_t(blockIdx.x) * at.rows + tile * LANES + lane;
        float x[DIM], left[DIM], error = 0;
        uint32_t codes[2];
        read_running(memory, at, block, tile, x);
        divide_and_take(p, x, scale, left, codes);
#pragma unroll
        for (int i = 0; i < DIM; i++) error += __ldg(p.h + DIM * block + i) * (left[i] * left[i]);
        error = row < p.m ? error * scale * scale : 0.0f;
#pragma unroll
        for (int across = LANES / 2; across; across /= 2)
            error += __shfl_xor_sync(ALL, error, across);
        if (lane == 0) errors[tile * LANES + which] = error;
    }
    __syncthreads();
    float error = 0;
    if (warp == 0 && lane < candidates)
        for (int tile = 0; tile < p.tiles; tile++) error += errors[tile * LANES + lane];
    error = exchange.over_blocks(error, candidates);
    return __shfl_sync(ALL, candidate, least(lane < candidates ? error : INFINITY));
}

// One tile of a block of columns by one of its `mates` warps
DEVICE void round_tile(const Panel &p, const Places &at, int block, int tile, float scale,
                       int mate, int mates, float *memory) {
    const int lane = threadIdx.x % LANES;
    const int64_t row = int64_t(blockIdx.x) * at.rows + tile * LANES + lane;
    const int64_t first = int64_t(DIM) * block * p.m + row;
    const bool inside = row < p.m;
    float x[DIM], e[DIM], target[DIM];
    uint32_t codes[2], old[2] = {0, 0};
    read_running(memory, at, block, tile, x);
    if (p.old && inside) read_codes(p.lattice, p.old, block * p.m + row, old);
#pragma unroll
    for (int i = 0; i < DIM; i++)
        target[i] = p.base && inside ? __ldg(p.base + first + i * p.m) : x[i];
    divide_and_take(p, x, scale, e, codes);
#pragma unroll
    for (int i = 0; i < DIM; i++) e[i] *= scale;
    if (p.old) {
        float e_old[DIM];
        decode(p.lattice, old, e_old);
#pragma unroll
        for (int i = 0; i < DIM; i++) e_old[i] = x[i] - scale * e_old[i];
        const bool nearer = is_nearer(e, e_old, memory + at.metrics() + SIZE * block);
        codes[0] = nearer ? codes[0] : old[0], codes[1] = nearer ? codes[1] : old[1];
#pragma unroll
        for (int i = 0; i < DIM; i++) e[i] = nearer ? e[i] : e_old[i];
    }
#pragma unroll
    for (int i = 0; i < DIM; i++) {
        e[i] = inside ? e[i] + (target[i] - x[i]) : 0.0f;
        if (inside && i % mates == mate) p.eta[first + i * p.m] = e[i];
    }
    if (inside && mate == 0) write_codes(p.lattice, p.codes, block * p.m + row, codes);

    const int width = at.width(block);
    const float *K = memory + at.feedback(block);
    float *after = memory + at.running() + DIM * (block + 1) * at.rows + tile * LANES + lane;
    for (int k = 4 * mate; k < width; k += 4 * mates) {
        float sums[4];
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = after[(k + i) * at.rows];
#pragma unroll
        for (int c = 0; c < DIM; c++) {
            const float4 weights = *(const float4 *)(K + c * width + k);
            sums[0] += weights.x * e[c];
            sums[1] += weights.y * e[c];
            sums[2] += weights.z * e[c];
            sums[3] += weights.w * e[c];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) after[(k + i) * at.rows] = sums[i];
    }
}

template <bool FITTED, int WARPS>
__global__ void __launch_bounds__(LANES *WARPS, 1) round_blocks(Panel p) {
    __shared__ float scratch[FITTED ? 2 * MAX_WARPS * LANES : 1];
    float *memory = (float *)shared_memory();
    const Places at(p);
    const int warp = threadIdx.x / LANES;
    const int mates = p.tiles * MATES <= WARPS ? MATES : p.tiles * 2 <= WARPS ? 2 : 1;
    Exchange exchange(p.slots, scratch);
    load(p, at, memory);
    for (int block = 0; block < at.blocks; block++) {
        __syncthreads();
        const float scale = FITTED ? fitted_scale(p, at, block, memory, exchange)
                                   : __ldg(p.scales + block * p.scale_block);
        for (int tile = warp / mates; tile < p.tiles; tile += WARPS / mates)
            round_tile(p, at, block, tile, scale, warp % mates, mates, memory);
        if (FITTED && blockIdx.x == 0 && threadIdx.x == 0) p.scales[block] = scale;
    }
}

int bytes_of(const Panel &p) { return static_cast<int>(sizeof(float)) * Places(p).end(); }

}  // namespace

extern "C" int round_lattice_panel(const Panel *panel, int blocks, cudaStream_t stream) {
    Panel p = *panel;
    const auto kernel = round_blocks<false, FEW_WARPS>;
    void *arguments[] = {&p};
    if (const cudaError_t error = allow(kernel, bytes_of(p))) return error;
    return cudaLaunchKernel(
        kernel, dim3(blocks), dim3(FEW_WARPS * LANES), arguments, bytes_of(p), stream);
}

extern "C" int fit_and_round_lattice_panel(const Panel *panel, int blocks, cudaStream_t stream) {
    return start_together(round_blocks<true, MANY_WARPS>, *panel, blocks, MANY_WARPS * LANES,
                          bytes_of(*panel), stream);
}
