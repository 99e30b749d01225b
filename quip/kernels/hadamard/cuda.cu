// D Omega x and Omega^T D x on a CUDA device, Omega = (K x S) / sqrt(width): reference.py.
//
//   turn_runs    widths 4 to 1024 of S alone, in registers: lanes hold what lies side by side, four
//                numbers or more, and exchange them by shuffles. Blocks of 128 are one warp each.
//   turn_whole   any other width, along the last axis, in shared memory. What a block computes is
//                columns / FOLD of S, for some rows of K, of one vector: it reads all of the vector,
//                and of the bits of S that tell the folds apart it makes one entry, a sum with signs.
//                Few vectors are shared out to many blocks so; of many, a block takes each whole.
//   turn_axis    up to six bits of S along the first axis of a matrix: a thread has a column of 64.

#include "../numbers.cuh"

// Not in the namespace below: nvcc makes what takes them invisible outside the library then.
struct Turn {  // as in cuda.py
    const void *x;               // [vectors, order, runs]
    void *y;                     // the same, out
    const float *before, *after; // signs, [n] or null
    const void *bias;            // [n] or null: added last
    const int8_t *K;             // [order, order], entry i of row k is K_ik
    int64_t vectors;
    int32_t n;                   // numbers with signs of their own, a multiple of order runs
    int32_t order, runs, bits;   // runs = 2^bits
    int32_t fold, shares, rows;  // of S's columns; of K's rows, and how many each has: a multiple of 4
    int32_t x_kind, y_kind, bias_kind;
    float scale;
};

struct Axis {  // as in cuda.py
    const float *x;              // [outer, 2^bits, inner]
    float *y;                    // the same, out
    const float *before, *after; // signs of the rows, or null
    int64_t outer, inner, columns;  // a row of the matrix has `columns` numbers
    int32_t bits;
    float scale;
};

namespace {

constexpr int WARP = 32, FOUR = 4;
constexpr int LANES = WARP * FOUR;  // numbers that a warp holds, four a lane
constexpr int THREADS = 512;        // at most
constexpr int PARTS = 8;            // of a sum over K's columns, at most
constexpr int PASS_BITS = 4;        // of S in one pass over shared memory, at most

template <int POWER> constexpr int BITS_OF = 1 + BITS_OF<POWER / 2>;
template <> constexpr int BITS_OF<1> = 0;

DEVICE float4 &operator*=(float4 &a, const float4 &b) {
    a.x *= b.x, a.y *= b.y, a.z *= b.z, a.w *= b.w;
    return a;
}

DEVICE float4 crossed(const float4 &v, int lane_bit) {
    const float sign = threadIdx.x & lane_bit ? -1.f : 1.f;
    return float4{fmaf(sign, v.x, __shfl_xor_sync(~0u, v.x, lane_bit)),
                  fmaf(sign, v.y, __shfl_xor_sync(~0u, v.y, lane_bit)),
                  fmaf(sign, v.z, __shfl_xor_sync(~0u, v.z, lane_bit)),
                  fmaf(sign, v.w, __shfl_xor_sync(~0u, v.w, lane_bit))};
}

// S of four numbers times `lanes`, of as many lanes
DEVICE float4 turn_lanes(float4 v, int lanes) {
    const float a = v.x + v.y, b = v.x - v.y, c = v.z + v.w, d = v.z - v.w;
    v = float4{a + c, b + d, a - c, b - d};
#pragma unroll
    for (int bit = 1; bit < WARP; bit *= 2)
        if (bit < lanes) v = crossed(v, bit);
    return v;
}

// S of the COUNT numbers of an array
template <int COUNT> DEVICE void turn_registers(float (&v)[COUNT]) {
#pragma unroll
    for (int half = 1; half < COUNT; half *= 2)
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (!(i & half)) {
                const float sum = v[i] + v[i + half];
                v[i + half] = v[i] - v[i + half];
                v[i] = sum;
            }
}

// What is left to do to entry `at` of all numbers, which has sign `of`
DEVICE void finish(const Turn &a, int64_t at, int of, float number) {
    number *= a.scale;
    if (a.after) number *= a.after[of];
    if (a.bias) number += read_number(a.bias, of, a.bias_kind);
    write_number(a.y, at, a.y_kind, number);
}

DEVICE void finish_four(const Turn &a, int64_t at, int of, float4 four) {
    four *= float4{a.scale, a.scale, a.scale, a.scale};
    if (a.after) four *= *(const float4 *)(a.after + of);
    if (a.bias) {
        float4 bias[1];
        read_fours(bias, a.bias, of, 0, a.bias_kind);
        four.x += bias[0].x, four.y += bias[0].y, four.z += bias[0].z, four.w += bias[0].w;
    }
    write_four(a.y, at, a.y_kind, four);
}

// Vectors of `runs` numbers: FOURS of a lane are a warp's only vector, or one is a part of some
template <int FOURS> __global__ void __launch_bounds__(256) turn_runs(const Turn a) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int64_t count = a.vectors * a.runs / FOUR, step = int64_t(gridDim.x) * warps * WARP * FOURS;
    let_next_begin();
    await_previous();
    for (int64_t first = (int64_t(blockIdx.x) * warps + warp) * WARP * FOURS; first < count;
         first += step) {
        // Where the vectors end, lanes read the last numbers again, and write nothing.
        const bool there = first + lane < count;
        const int64_t at = (there ? first + lane : count - 1) * FOUR;
        const int of = int(at % a.n);
        float4 v[FOURS];
        read_fours(v, a.x, at, LANES, a.x_kind);
        if (a.before) {
            float4 signs[FOURS];
#pragma unroll
            for (int i = 0; i < FOURS; i++) signs[i] = *(const float4 *)(a.before + of + i * LANES);
#pragma unroll
            for (int i = 0; i < FOURS; i++) v[i] *= signs[i];
        }
#pragma unroll
        for (int i = 0; i < FOURS; i++) v[i] = turn_lanes(v[i], a.runs / FOUR);
#pragma unroll
        for (int half = 1; half < FOURS; half *= 2)
#pragma unroll
            for (int i = 0; i < FOURS; i++)
                if (!(i & half)) {
                    const float4 x = v[i], y = v[i + half];
                    v[i] = float4{x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w};
                    v[i + half] = float4{x.x - y.x, x.y - y.y, x.z - y.z, x.w - y.w};
                }
        if (there)
#pragma unroll
            for (int i = 0; i < FOURS; i++) finish_four(a, at + i * LANES, of + i * LANES, v[i]);
    }
}

// What a block computes: columns first ... first + columns of S, rows row ... row + rows of K
struct Tile {
    int64_t start;  // of its vector
    int fold, columns, first, row, rows, of;

    DEVICE Tile(const Turn &a, int64_t tile) {
        const int width = a.order * a.runs;
        const int64_t folds = a.vectors * a.fold, vector = tile % folds / a.fold;
        fold = int(tile % a.fold), columns = a.runs / a.fold, first = fold * columns;
        row = int(tile / folds) * a.rows, rows = min(a.rows, a.order - row);
        start = vector * width, of = int(vector % (a.n / width)) * width;
    }
};

// z = S x for the columns of a tile, but for bits beyond those of a warp
template <int FOLD> DEVICE void fold_columns(const Turn &a, const Tile &tile, float *z) {
    const int lane = threadIdx.x % WARP, lanes = tile.columns / FOUR;
    const int count = a.order * lanes, bits = a.bits - BITS_OF<FOLD * FOUR>;
    for (int first = int(threadIdx.x) - lane; first < count; first += blockDim.x) {
        const int here = first + lane;
        float4 sum = {0, 0, 0, 0};
        if (here < count) {
            const int at = (here >> bits) * a.runs + here % lanes * FOUR;
            float4 x[FOLD];
            read_fours(x, a.x, tile.start + at, tile.columns, a.x_kind);
            if (a.before) {
                const float *from = a.before + tile.of + at;
                float4 signs[FOLD];
#pragma unroll
                for (int h = 0; h < FOLD; h++) signs[h] = *(const float4 *)(from + h * tile.columns);
#pragma unroll
                for (int h = 0; h < FOLD; h++) x[h] *= signs[h];
            }
#pragma unroll
            for (int h = 0; h < FOLD; h++) {
                const float sign = __popc(h & tile.fold) & 1 ? -1.f : 1.f;
                sum.x = fmaf(sign, x[h].x, sum.x), sum.y = fmaf(sign, x[h].y, sum.y);
                sum.z = fmaf(sign, x[h].z, sum.z), sum.w = fmaf(sign, x[h].w, sum.w);
            }
        }
        sum = turn_lanes(sum, lanes);
        if (here < count) *(float4 *)(z + here * FOUR) = sum;
    }
}

// BITS bits of S of z, of numbers `stride` apart; the last ones of all where there is no K
template <int BITS>
DEVICE void pass(const Turn &a, const Tile &tile, float *z, int stride, bool last) {
    constexpr int SIZE = 1 << BITS;
    for (int i = threadIdx.x; i < a.order * tile.columns >> BITS; i += blockDim.x) {
        const int at = i / stride * stride * SIZE + i % stride;
        float v[SIZE];
#pragma unroll
        for (int s = 0; s < SIZE; s++) v[s] = z[at + s * stride];
        turn_registers(v);
#pragma unroll
        for (int s = 0; s < SIZE; s++) {
            const int to = at + s * stride;
            if (last)
                finish(a, tile.start + tile.first + to, tile.of + tile.first + to, v[s]);
            else
                z[to] = v[s];
        }
    }
}

DEVICE void turn_rest(const Turn &a, const Tile &tile, float *z) {
    const bool alone = a.order == 1;
    int stride = LANES, left = 0;
    while (stride << left < tile.columns) left++;
    for (int passes = (left + PASS_BITS - 1) / PASS_BITS; passes || alone; passes--) {
        const int now = passes ? (left + passes - 1) / passes : 0;
        const bool last = alone && passes <= 1;
        switch (now) {
            case 0: pass<0>(a, tile, z, stride, last); break;
            case 1: pass<1>(a, tile, z, stride, last); break;
            case 2: pass<2>(a, tile, z, stride, last); break;
            case 3: pass<3>(a, tile, z, stride, last); break;
            default: pass<4>(a, tile, z, stride, last);
        }
        if (last) return;
        __syncthreads();
        stride <<= now, left -= now;
    }
}

// The rows of K that a tile has, as [order, rows]; those beyond the last are 0
DEVICE void read_rows(const Turn &a, const Tile &tile, float *K) {
    const int fours = a.rows / FOUR;
    for (int i = threadIdx.x; i < a.order * fours; i += blockDim.x) {
        const int k = i / fours, row = i % fours * FOUR;
        uint32_t four = 0;
        if (row < tile.rows) four = *(const uint32_t *)(a.K + k * a.order + tile.row + row);
        *(float4 *)(K + i * FOUR) = float4{float(int8_t(four)), float(int8_t(four >> 8)),
                                           float(int8_t(four >> 16)), float(int8_t(four >> 24))};
    }
}

// y = K z for the rows of a tile, four and a column at a time; the sums of few have several threads
DEVICE void multiply_rows(const Turn &a, const Tile &tile, const float *z, const float *K, float *sums) {
    const int columns = tile.columns, items = tile.rows / FOUR * columns;
    int parts = 1;
    while (2 * parts <= PARTS && 2 * parts * items <= int(blockDim.x)) parts *= 2;
    const int span = (a.order + parts - 1) / parts;
    const auto place = [&](int row, int column) { return (tile.row + row) * a.runs + tile.first + column; };
    for (int i = threadIdx.x; i < parts * items; i += blockDim.x) {
        const int part = i / items, row = i % items / columns * FOUR, column = i % columns;
        const int last = min(a.order, (part + 1) * span);
        float4 sum = {0, 0, 0, 0};
#pragma unroll 4
        for (int k = part * span; k < last; k++) {
            const float x = z[k * columns + column];
            const float4 four = *(const float4 *)(K + k * a.rows + row);
            sum.x = fmaf(four.x, x, sum.x), sum.y = fmaf(four.y, x, sum.y);
            sum.z = fmaf(four.z, x, sum.z), sum.w = fmaf(four.w, x, sum.w);
        }
        const float each[FOUR] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int r = 0; r < FOUR; r++) {
            const int at = place(row + r, column);
            if (parts == 1)
                finish(a, tile.start + at, tile.of + at, each[r]);
            else
                sums[(part * tile.rows + row + r) * columns + column] = each[r];
        }
    }
    if (parts == 1) return;
    __syncthreads();
    const int size = tile.rows * columns;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        float sum = 0;
        for (int part = 0; part < parts; part++) sum += sums[part * size + i];
        const int at = place(i / columns, i % columns);
        finish(a, tile.start + at, tile.of + at, sum);
    }
}

// Bring signs to L2 before x is there.
DEVICE void prefetch_signs(const Turn &a) {
    constexpr int LINE = 128 / sizeof(float);
    const int64_t at = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * LINE;
    if (a.before && at < a.n) prefetch(a.before + at);
    if (a.after && at < a.n) prefetch(a.after + at);
}

template <int FOLD>
__global__ void __launch_bounds__(THREADS, FOLD == 1 ? 2 : 1) turn_whole(const Turn a) {
    float *z = (float *)shared_memory();
    float *K = z + a.order * (a.runs / FOLD), *sums = K + a.order * a.rows;
    const int64_t tiles = a.vectors * FOLD * a.shares;
    int held = -1;
    let_next_begin();
    prefetch_signs(a);
    for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
        const Tile tile(a, i);
        if (a.order > 1 && held != tile.row) read_rows(a, tile, K);
        held = tile.row;
        await_previous();
        fold_columns<FOLD>(a, tile, z);
        __syncthreads();
        turn_rest(a, tile, z);
        if (a.order > 1) multiply_rows(a, tile, z, K, sums);
        __syncthreads();
    }
}

template <int BITS> __global__ void __launch_bounds__(256) turn_axis(const Axis a) {
    constexpr int SIZE = 1 << BITS;
    const int64_t count = a.outer * a.inner, rows = a.inner / a.columns;
    let_next_begin();
    await_previous();
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
         i += int64_t(gridDim.x) * blockDim.x) {
        const int64_t at = i / a.inner * SIZE * a.inner + i % a.inner;
        const float *x = a.x + at;
        float *y = a.y + at;
        float v[SIZE];
#pragma unroll
        for (int s = 0; s < SIZE; s++) v[s] = read_fresh(x + s * a.inner);
        if (a.before) {
            const float *signs = a.before + at / a.columns;
#pragma unroll
            for (int s = 0; s < SIZE; s++) v[s] *= signs[s * rows];
        }
        turn_registers(v);
        if (a.after) {
            const float *signs = a.after + at / a.columns;
#pragma unroll
            for (int s = 0; s < SIZE; s++) v[s] *= signs[s * rows];
        }
#pragma unroll
        for (int s = 0; s < SIZE; s++) y[s * a.inner] = a.scale * v[s];
    }
}

template <int FOURS> int start_runs(const Turn &a, cudaStream_t stream) {
    constexpr int MOST = 256;
    const int64_t warps = (a.vectors * a.runs + LANES * FOURS - 1) / (LANES * FOURS);
    const int64_t threads = warps * WARP < MOST ? warps * WARP : MOST;
    return launch(turn_runs<FOURS>, (warps * WARP + threads - 1) / threads, 1, int(threads), 0, stream, a);
}

template <int FOLD> int start_whole(const Turn &a, int threads, int bytes, cudaStream_t stream) {
    return launch(turn_whole<FOLD>, a.vectors * FOLD * a.shares, 1, threads, bytes, stream, a);
}

template <int BITS> int start_axis(const Axis &a, cudaStream_t stream) {
    constexpr int MOST = 256;
    return launch(turn_axis<BITS>, (a.outer * a.inner + MOST - 1) / MOST, 1, MOST, 0, stream, a);
}

}  // namespace

// What comes back is a cudaError_t.
extern "C" int turn_short_vectors(const Turn *given, cudaStream_t stream) {
    switch (given->runs) {
        case 256: return start_runs<2>(*given, stream);
        case 512: return start_runs<4>(*given, stream);
        case 1024: return start_runs<8>(*given, stream);
    }
    return start_runs<1>(*given, stream);
}

extern "C" int turn_vectors(const Turn *given, int threads, int bytes, cudaStream_t stream) {
    switch (given->fold) {
        case 1: return start_whole<1>(*given, threads, bytes, stream);
        case 8: return start_whole<8>(*given, threads, bytes, stream);
        case 16: return start_whole<16>(*given, threads, bytes, stream);
    }
    return cudaErrorInvalidValue;
}

extern "C" int turn_rows(const Axis *given, cudaStream_t stream) {
    switch (given->bits) {
        case 1: return start_axis<1>(*given, stream);
        case 2: return start_axis<2>(*given, stream);
        case 3: return start_axis<3>(*given, stream);
        case 4: return start_axis<4>(*given, stream);
        case 5: return start_axis<5>(*given, stream);
        case 6: return start_axis<6>(*given, stream);
    }
    return cudaErrorInvalidValue;
}
