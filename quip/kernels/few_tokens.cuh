// y = x W~^T for a few vectors x and packed rows of codes, on tensor cores of int8.
//
// A warp computes 16 rows; the warps of a block share the rows and split the columns, in chunks:
//
//     a row's plane of bytes    | unit of 16 bytes | unit | unit | unit | the next chunk ...
//     lanes 4 g + t             |       t = 0      |   1  |   2  |   3  |   (rows g and g + 8)
//
// A lane reads a unit of every plane of its two rows, a chunk or more ahead. Which columns stand
// where within a product of matrices is free, so codes are decoded where they lie, to unsigned
// bytes, and x is laid out to match: a chunk has SLICES runs of 64 columns, 16 a lane.
//
// x is s (256 hi + lo), or s (65536 hi + 256 mid + lo) for the precision of float32, of signed bytes:
// `parts` columns of a product of 8 columns. Each warp finds s and the bytes of the columns that
// it multiplies by itself. Sums are exact integers until a warp has been through its columns, and
// are added in one order: equal inputs give equal bits.

#ifndef QUIP_FEW_TOKENS
#define QUIP_FEW_TOKENS

#include "device.cuh"

// Not in the namespace below: nvcc makes what takes it invisible outside the library then.
struct Product {  // as in few_tokens.py
    int64_t m, n, tokens, row_bytes, plane_bytes;
    const uint8_t *words;     // [m, row_bytes]: planes, each with 1, 2, 4 or 8 codes a byte
    const float *x;           // [tokens, n]
    const void *factors;      // [groups]: x is multiplied by those of its columns
    int64_t factor_columns;   // that share a factor; 0: there are none
    const void *step;         // [m, groups] by strides, or null: 1
    const uint8_t *zero;      // [m, groups] by strides, or null: `middle`
    int64_t step_row, zero_row, group;  // from one row to the next; columns that share a step
    const uint32_t *tables;   // [TABLES, 256] or null
    float *y;                 // [layers, tokens, m], out: the sum over layers is x W~^T
    float middle, unit, second;  // unit (codes - middle); what a second stage is multiplied by
    int32_t factor_kind, step_kind, parts, warps, layers;
};

namespace {

constexpr int ROWS = 16;            // of a warp, and of its block
constexpr int RUN = 64;             // columns of a slice
constexpr int WIDTH = 8;            // columns of x that tensor cores multiply at once
constexpr int SPACED = ROWS + 4;    // floats from one column of sums to the next: no bank conflicts
constexpr int COPIES = 32;          // of each entry of a table, one a lane: no bank conflicts either
constexpr int ENTRIES = 256;        // of a table
enum Kind { FLOAT, BFLOAT, HALF };  // what a number is stored as

DEVICE float number(const void *from, int64_t at, int kind) {
    if (kind == FLOAT) return ((const float *)from)[at];
    const uint16_t bits = ((const uint16_t *)from)[at];
    return kind == BFLOAT ? __uint_as_float(uint32_t(bits) << 16)
                          : __half2float(__ushort_as_half(bits));
}

__host__ DEVICE int rounded_up(int64_t count, int64_t by) { return int((count + by - 1) / by); }

// Where things lie in the memory of a block, and which chunks are a warp's: first + warp + warps i
template <class Code> struct Layout {
    int first, last, rounds, column_bytes, sums, scales;
    __host__ __device__ Layout(const Product &a, int layer) {
        const int64_t chunks = rounded_up(a.plane_bytes, RUN);
        first = int(chunks * layer / a.layers), last = int(chunks * (layer + 1) / a.layers);
        rounds = rounded_up(rounded_up(chunks, a.layers), a.warps * Code::AHEAD) * Code::AHEAD;
        // Two columns are read together: they must not start at the same bank.
        column_bytes = a.warps * rounds * Code::SLICES * RUN;
        column_bytes += column_bytes % 128 ? 0 : RUN;
        sums = rounded_up(Code::TABLES * ENTRIES * COPIES * 4 + columns(a) * column_bytes, 128) * 128;
        scales = sums + 2 * a.warps * columns(a) * SPACED * 4;
    }
    __host__ __device__ static int columns(const Product &a) { return int(a.tokens) * a.parts; }
    __host__ __device__ int bytes(const Product &a) const {
        return scales + 2 * a.warps * int(a.tokens) * 4;
    }
};

// Four numbers of x times their factors; 0 beyond the row or the layer
template <class Code>
DEVICE float4 read_four(const Product &a, const float *x, int chunk, int last, int slice, int at) {
    const int column = Code::column(a, chunk, slice, at);
    if (chunk >= last || column < 0) return float4{0, 0, 0, 0};
    float4 four = *(const float4 *)(x + column);
    if (a.factor_columns == 1) {
        four.x *= number(a.factors, column, a.factor_kind);
        four.y *= number(a.factors, column + 1, a.factor_kind);
        four.z *= number(a.factors, column + 2, a.factor_kind);
        four.w *= number(a.factors, column + 3, a.factor_kind);
    } else if (a.factor_columns) {
        const int columns = int(a.factor_columns);
        four.x *= number(a.factors, column / columns, a.factor_kind);
        four.y *= number(a.factors, (column + 1) / columns, a.factor_kind);
        four.z *= number(a.factors, (column + 2) / columns, a.factor_kind);
        four.w *= number(a.factors, (column + 3) / columns, a.factor_kind);
    }
    return four;
}

// The lowest byte of each number, signed, as one word; what is left of the numbers is a 256th
DEVICE uint32_t split_bytes(int (&v)[4]) {
    uint32_t word = 0;
    for (int e = 0; e < 4; e++) {
        const int byte = int8_t(v[e]);
        word |= uint32_t(byte & 255) << 8 * e;
        v[e] = (v[e] - byte) >> 8;
    }
    return word;
}

// Write the bytes of a warp's columns of x, their scale, and the sum of what they stand for.
template <class Code>
DEVICE void split_inputs(const Product &a, const Layout<Code> &at, uint8_t *columns, float *scales) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int quads = at.rounds * Code::SLICES * RUN / 4;
    for (int token = 0; token < a.tokens; token++) {
        const float *x = a.x + token * a.n;
        const auto read = [&](int quad) {
            const int run = quad / (RUN / 4), chunk = at.first + warp + a.warps * (run / Code::SLICES);
            return read_four<Code>(a, x, chunk, at.last, run % Code::SLICES, quad % (RUN / 4) * 4);
        };
        uint32_t top = 0;  // the bits of |x| are ordered as it is, and NaN is above all
#pragma unroll 4
        for (int quad = lane; quad < quads; quad += 32) {
            const float4 four = read(quad);
            for (float each : {four.x, four.y, four.z, four.w}) {
                const uint32_t size = __float_as_uint(each) & 0x7fffffff;
                top = size > top ? size : top;
            }
        }
        const float most = __uint_as_float(largest_of_warp(top));
        // The highest byte is 127 at most, also where the product below is rounded upwards.
        const float levels = a.parts == 2 ? 127 * 256 : 127 * 65536;
        const float inverse = most > 1e-30f ? levels / most : 0;
        float scale = most > 1e-30f ? most / levels : 0, sum = 0;
        if (!(most < INFINITY)) scale = NAN;
#pragma unroll 4
        for (int quad = lane; quad < quads; quad += 32) {
            const float4 four = read(quad);
            int v[4] = {__float2int_rn(four.x * inverse), __float2int_rn(four.y * inverse),
                        __float2int_rn(four.z * inverse), __float2int_rn(four.w * inverse)};
            sum += float(v[0] + v[1]) + float(v[2] + v[3]);
            uint8_t *to = columns + token * a.parts * at.column_bytes + 4 * quad;
            to += warp * at.rounds * Code::SLICES * RUN;
            for (int part = 0; part < a.parts; part++, to += at.column_bytes)
                *(uint32_t *)to = split_bytes(v);
        }
        for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
        if (lane == 0) {
            scales[(2 * token) * a.warps + warp] = scale;
            scales[(2 * token + 1) * a.warps + warp] = scale * sum;
        }
    }
}

template <class Code> struct Unit {  // what a lane reads of one chunk
    uint4 low[Code::PLANES], high[Code::PLANES];  // of rows g and g + 8
};

// A unit of a row's planes, 16 bytes each; 0 beyond their ends
template <class Code>
DEVICE void read_unit(uint4 (&to)[Code::PLANES], const uint8_t *row, int64_t offset,
                      int64_t plane_bytes, bool wide) {
#pragma unroll
    for (int plane = 0; plane < Code::PLANES; plane++, row += plane_bytes) {
        to[plane] = uint4{0, 0, 0, 0};
        if (wide) {
            if (offset < plane_bytes) to[plane] = read_once((const uint4 *)(row + offset));
        } else {
            const uint32_t *from = (const uint32_t *)(row + offset);
            if (offset < plane_bytes) to[plane].x = from[0];
            if (offset + 4 < plane_bytes) to[plane].y = from[1];
            if (offset + 8 < plane_bytes) to[plane].z = from[2];
            if (offset + 12 < plane_bytes) to[plane].w = from[3];
        }
    }
}

// The sums of one slice by its columns' steps and zeros: to += step (sum of codes x - zero sum of x)
template <class Code, int TILES>
DEVICE void add_group(const Product &a, int row, int column, float weight, const uint4 (&x)[TILES],
                      const int (&sums)[TILES][4], float (&to)[TILES][4]) {
    const uint32_t ones[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
    const int64_t group = column < 0 ? 0 : column / a.group;
    const int64_t next = row + 8 < a.m ? row + 8 : a.m - 1;
    const float step[2] = {number(a.step, row * a.step_row + group, a.step_kind),
                           number(a.step, next * a.step_row + group, a.step_kind)};
    const float zero[2] = {float(a.zero[row * a.zero_row + group]),
                           float(a.zero[next * a.zero_row + group])};
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        int total[4] = {};
        multiply_add(total, ones, x[tile].x, x[tile].y);
        multiply_add(total, ones, x[tile].z, x[tile].w);
#pragma unroll
        for (int i = 0; i < 4; i++)
            to[tile][i] += step[i / 2] * (weight * sums[tile][i] - zero[i / 2] * total[i]);
    }
}

// Each entry COPIES times, a warp an entry
DEVICE void copy_tables(uint32_t *to, const uint32_t *from, int entries) {
    for (int i = threadIdx.x; i < entries * COPIES / 4; i += blockDim.x) {
        const uint32_t word = from[i / (COPIES / 4)];
        ((uint4 *)to)[i] = uint4{word, word, word, word};
    }
}

// y of the rows of a tile: what the warps have summed, in their order
DEVICE void finish(const Product &a, int64_t tile, const float *sums, const float *scales) {
    const int columns = int(a.tokens) * a.parts;
    for (int i = threadIdx.x; i < ROWS * a.tokens; i += blockDim.x) {
        const int64_t row = tile * ROWS + i % ROWS, token = i / ROWS;
        if (row >= a.m) continue;
        float sum = 0, total = 0;
        for (int warp = 0; warp < a.warps; warp++) {
            for (int part = 0; part < a.parts; part++)
                sum += sums[(warp * columns + token * a.parts + part) * SPACED + i % ROWS];
            total += scales[(2 * token + 1) * a.warps + warp];
        }
        if (!a.group) {  // otherwise both are in the sums
            sum -= total * (a.zero ? float(a.zero[row * a.zero_row]) : a.middle);
            if (a.step) sum *= number(a.step, row * a.step_row, a.step_kind);
        }
        a.y[(blockIdx.y * a.tokens + token) * a.m + row] = a.unit * sum;
    }
}

// TILES: of WIDTH columns of x. GROUPED: steps and zeros are those of a row's groups of columns
template <class Code, int TILES, bool GROUPED>
__global__ void __launch_bounds__(TILES == 1 ? 512 : 256, GROUPED || Code::PLANES == 4 ? 1 : TILES) multiply_few(const Product a) {
    uint8_t *memory = shared_memory();
    const Layout<Code> at(a, blockIdx.y);
    uint8_t *tables = memory, *columns = memory + Code::TABLES * ENTRIES * COPIES * 4;
    float *sums = (float *)(memory + at.sums), *scales = (float *)(memory + at.scales);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int64_t tiles = (a.m + ROWS - 1) / ROWS;
    const int64_t first = tiles * blockIdx.x / gridDim.x, last = tiles * (blockIdx.x + 1) / gridDim.x;
    const bool wide = a.row_bytes % 16 == 0 && a.plane_bytes % 16 == 0 && (uintptr_t)a.words % 16 == 0;

    let_next_begin();
    const int64_t begin = first * ROWS * a.row_bytes, end = min(a.m, (first + 1) * ROWS) * a.row_bytes;
    for (int64_t i = begin + 128 * threadIdx.x; i < end; i += 128 * blockDim.x) prefetch(a.words + i);
    if (Code::TABLES) copy_tables((uint32_t *)tables, a.tables, Code::TABLES * ENTRIES);
    await_previous();

    Unit<Code> now[Code::AHEAD], next[Code::AHEAD];
    const auto fetch = [&](Unit<Code>(&to)[Code::AHEAD], int64_t tile, int round) {
        const int64_t row = min(tile * ROWS + g, a.m - 1), other = min(tile * ROWS + g + 8, a.m - 1);
#pragma unroll
        for (int s = 0; s < Code::AHEAD; s++) {
            const int chunk = at.first + warp + a.warps * (round + s);
            const int64_t offset = chunk < at.last ? chunk * RUN + 16 * t : a.plane_bytes;
            read_unit<Code>(to[s].low, a.words + row * a.row_bytes, offset, a.plane_bytes, wide);
            read_unit<Code>(to[s].high, a.words + other * a.row_bytes, offset, a.plane_bytes, wide);
        }
    };
    if (first < last) fetch(now, first, 0);
    split_inputs<Code>(a, at, columns, scales);
    if (Code::TABLES) __syncthreads();
    __syncwarp();

    const uint8_t *x[TILES];      // of column g of each tile
    float weights[TILES][2];      // what sums of columns 2 t and 2 t + 1 are multiplied by
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const int column = WIDTH * tile + g < at.columns(a) ? WIDTH * tile + g : 0;
        x[tile] = columns + column * at.column_bytes + warp * at.rounds * Code::SLICES * RUN + 16 * t;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int mine = min(WIDTH * tile + 2 * t + i, at.columns(a) - 1), part = mine % a.parts;
            weights[tile][i] = scales[2 * (mine / a.parts) * a.warps + warp] * float(1 << 8 * part);
        }
    }
    for (int64_t tile = first; tile < last; tile++) {
        int exact[Code::SUMS][TILES][4] = {};
        float grouped[TILES][4] = {};
        for (int round = 0; round < at.rounds; round += Code::AHEAD) {
            const bool done = round + Code::AHEAD >= at.rounds;
            if (!done || tile + 1 < last) fetch(next, done ? tile + 1 : tile, done ? 0 : round + Code::AHEAD);
#pragma unroll
            for (int s = 0; s < Code::AHEAD; s++) {
#pragma unroll
                for (int slice = 0; slice < Code::SLICES; slice++) {
                    uint4 four[TILES];
#pragma unroll
                    for (int i = 0; i < TILES; i++)
                        four[i] = *(const uint4 *)(x[i] + ((round + s) * Code::SLICES + slice) * RUN);
                    if constexpr (GROUPED) {
                        int part[1][TILES][4] = {};
                        Code::multiply(slice, now[s], four, part, tables);
                        const int chunk = at.first + warp + a.warps * (round + s);
                        const int column = chunk < at.last ? Code::column(a, chunk, slice, 0) : -1;
                        add_group<Code>(a, min(tile * ROWS + g, a.m - 1), column, Code::weight(a, slice),
                                        four, part[0], grouped);
                    } else {
                        Code::multiply(slice, now[s], four, exact, tables);
                    }
                }
            }
#pragma unroll
            for (int s = 0; s < Code::AHEAD; s++) now[s] = next[s];
        }
        float *to = sums + (tile - first) % 2 * a.warps * at.columns(a) * SPACED;
        to += warp * at.columns(a) * SPACED;
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int column = WIDTH * i + 2 * t + j % 2;
                const float sum = GROUPED ? grouped[i][j] : Code::join(a, exact, i, j);
                if (column < at.columns(a)) to[column * SPACED + g + j / 2 * 8] = weights[i][j % 2] * sum;
            }
        __syncthreads();
        finish(a, tile, sums + (tile - first) % 2 * a.warps * at.columns(a) * SPACED, scales);
    }
}

template <class Code, bool GROUPED> int start(const Product &a, cudaStream_t stream) {
    const Layout<Code> at(a, 0);
    const int64_t tiles = (a.m + ROWS - 1) / ROWS;
    const auto kernel =
        at.columns(a) <= WIDTH ? multiply_few<Code, 1, GROUPED> : multiply_few<Code, 2, GROUPED>;
    return launch(kernel, tiles, a.layers, 32 * a.warps, at.bytes(a), stream, a);
}

}  // namespace

#endif
