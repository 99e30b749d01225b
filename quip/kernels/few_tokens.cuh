// y = x W~^T for a few vectors x and packed rows of codes, on tensor cores of int8.
//
// A warp computes 16 rows; the warps of a block share the rows and split the columns, in chunks:
//
//     a row's plane of bytes    | unit of 16 bytes | unit | unit | unit | the next chunk ...
//     lanes 4 g + t             |       t = 0      |   1  |   2  |   3  |   (rows g and g + 8)
//
// A lane reads a unit of every plane of its two rows, a chunk or more ahead, over the end of the rows
// too. Which columns stand where within a product of matrices is free, so codes are decoded where they
// lie, to unsigned bytes: a chunk has SLICES slices of 64 columns, 16 a lane.
//
// x comes as signed bytes (split.cuh), `parts` columns of a product of 8 columns for each token. A
// block keeps those of its columns in shared memory. Sums are exact integers until a warp has been
// through its columns, or a group of them, and are added in one order: equal inputs give equal bits.
//
// The kernel starts while x is still being made, and fetches weights to L2 until it is there.

#ifndef QUIP_FEW_TOKENS
#define QUIP_FEW_TOKENS

#include "planes.cuh"
#include "split.cuh"

// Not in the namespace below: nvcc makes what takes it invisible outside the library then.
struct Product {  // as in few_tokens.py
    Split inputs;
    int64_t m, row_bytes, plane_bytes;
    const uint8_t *words;     // [m, row_bytes]: planes, each with 1, 2, 4 or 8 codes a byte
    const void *step;         // [m, groups] by strides, or null: 1
    const uint8_t *zero;      // [m, groups] by strides, or null: `middle`
    int64_t step_row, zero_row, group;  // from one row to the next; columns that share a step
    const uint32_t *tables;   // [TABLES, 256] or null
    void *y;                  // [layers, tokens, m], out: the sum over layers is x W~^T
    float middle, unit, second;  // unit (codes - middle); what a second stage is multiplied by
    int32_t step_kind, y_kind, warps, layers;
};

namespace {

constexpr int ROWS = 16;           // of a warp, and of its block
constexpr int RUN = 64;            // columns of a slice
constexpr int WIDTH = 8;           // columns of x that tensor cores multiply at once
constexpr int SPACED = ROWS + 4;   // floats from one column of sums to the next: no bank conflicts
constexpr int STEPS = 9 * 16;      // bytes of a group's steps, with a gap for the same reason
constexpr int RESIDENT = 16;       // warps of a multiprocessor: more get into each other's way
constexpr int PREFETCHED = 1536;   // bytes of a row, until x is there
constexpr int BASE = 0x4b400000;   // the bits of 1.5 * 2^23: those of BASE + i are it plus i,
constexpr float BASED = 12582912;  // for |i| < 2^22

__host__ DEVICE int divided_up(int count, int by) { return (count + by - 1) / by; }

// Which chunks are a warp's, first + warp + warps i, and where things lie in the memory of a block.
// A run is what x has of consecutive columns: a slice of grids, or all of a row of lattices' codes,
// of which a lane has UNITS times 16 bytes in each chunk.
template <class Code, bool GROUPED> struct Layout {
    static constexpr int RUNS = Code::SLICES / Code::UNITS;
    static constexpr int LANE = 16 * (Code::UNITS + Code::UNITS / 8);  // bytes, with gaps as above

    int first, last, most, rounds, columns, run_bytes, column_bytes, steps, sums, scales, bytes;

    __host__ __device__ Layout(const Product &a, int layer) {
        const int chunks = divided_up(int(a.plane_bytes), RUN), tokens = int(a.inputs.tokens);
        first = chunks * layer / a.layers, last = chunks * (layer + 1) / a.layers;
        most = divided_up(chunks, a.layers);
        rounds = divided_up(most, a.warps * Code::AHEAD) * Code::AHEAD;
        columns = tokens * a.inputs.parts;
        run_bytes = most * 4 * LANE;
        column_bytes = RUNS * run_bytes;
        // Two columns are read together: they must not start at the same bank.
        column_bytes += column_bytes % 128 ? 0 : 64;
        steps = divided_up(Code::TABLES * ENTRIES * COPIES * 4 + columns * column_bytes, 128) * 128;
        sums = steps + (GROUPED ? divided_up(int(a.inputs.n), int(a.group)) * STEPS : 0);
        scales = sums + 2 * a.warps * columns * SPACED * 4;
        bytes = scales + 2 * tokens * 4;
    }
};

// The first bytes of the rows of a tile to L2
template <class Code> DEVICE void prefetch_rows(const Product &a, int tile, int first_chunk) {
    const int begin = first_chunk * RUN;
    const int lines = divided_up(min(int(a.plane_bytes) - begin, PREFETCHED / Code::PLANES), 128);
    for (int i = threadIdx.x; i < ROWS * lines; i += blockDim.x) {
        const int64_t row = int64_t(tile) * ROWS + i % ROWS;
        if (row >= a.m) continue;
        const uint8_t *from = a.words + row * a.row_bytes + begin + i / ROWS * 128;
#pragma unroll
        for (int plane = 0; plane < Code::PLANES; plane++) prefetch(from + plane * a.plane_bytes);
    }
}

// What a layer multiplies of the bytes of x; 0 beyond the ends of runs, where words may stand for points
template <class Code, bool GROUPED>
DEVICE void copy_inputs(const Product &a, const Layout<Code, GROUPED> &at, uint8_t *to) {
    using Lay = Layout<Code, GROUPED>;
    const int run_columns = int(a.inputs.n) / Lay::RUNS, begin = at.first * RUN * Code::UNITS;
    const int units = at.most * 4 * Code::UNITS;  // of a run
    const uint32_t inverse = ~0u / uint32_t(units);
    const bool wide = Lay::RUNS == 1 || run_columns % 16 == 0;
    for (int i = threadIdx.x; i < at.columns * Lay::RUNS * units; i += blockDim.x) {
        const int place = divided(i, inverse), unit = i - place * units, offset = begin + 16 * unit;
        const int column = place / Lay::RUNS, run = place % Lay::RUNS;
        const uint8_t *from = a.inputs.bytes + column * a.inputs.n + run * run_columns + offset;
        uint8_t *into = to + column * at.column_bytes + run * at.run_bytes;
        into += unit / Code::UNITS * Lay::LANE + unit % Code::UNITS * 16;
        if (wide && offset < run_columns) {
            copy_fresh(into, from);
            continue;
        }
        *(uint4 *)into = uint4{0, 0, 0, 0};
        for (int byte = 0; byte < 16 && offset + byte < run_columns; byte += 4)
            *(uint32_t *)(into + byte) = read_fresh((const uint32_t *)(from + byte));
    }
}

// {step, step * zero} of each group of a row; FULL: steps are of float32
template <bool FULL> DEVICE void copy_row(const Product &a, int64_t row, int groups, uint8_t *to) {
    const uint8_t *zeros = a.zero + row * a.zero_row;
    for (int first = threadIdx.x % 32; first < groups; first += 4 * 32) {
        float steps[4];
        uint8_t zero[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {  // all at once
            const int group = min(first + 32 * i, groups - 1);
            steps[i] = number(a.step, row * a.step_row + group, FULL ? FLOAT : a.step_kind);
            zero[i] = zeros[group];
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (first + 32 * i < groups)
                *(float2 *)(to + (first + 32 * i) * STEPS) = float2{steps[i], steps[i] * float(zero[i])};
    }
}

// For each group, and each g, {step, step * zero} of rows g and g + 8 of a tile; those of the next one
// to L2
DEVICE void copy_steps(const Product &a, int tile, int groups, uint8_t *to) {
    const int lane = threadIdx.x % 32, size = a.step_kind == FLOAT ? 4 : 2;
    for (int row = threadIdx.x / 32; row < ROWS; row += a.warps) {
        const int64_t at = min(int64_t(tile) * ROWS + row, a.m - 1), next = min(at + ROWS, a.m - 1);
        uint8_t *into = to + row % 8 * 16 + row / 8 * 8;
        for (int i = 128 * lane; i < groups * size; i += 32 * 128)
            prefetch((const uint8_t *)a.step + next * a.step_row * size + i);
        for (int i = 128 * lane; i < groups; i += 32 * 128) prefetch(a.zero + next * a.zero_row + i);
        if (a.step_kind == FLOAT)
            copy_row<true>(a, at, groups, into);
        else
            copy_row<false>(a, at, groups, into);
    }
}

// The sums of one slice by its columns' steps and zeros: to += step (sum of codes x - zero sum of x).
// `sums` are BASE more than they are, and weigh `weight`; step: of rows g and g + 8
template <int TILES>
DEVICE void add_group(const float4 &step, float weight, const uint4 (&x)[TILES],
                      const int (&sums)[TILES][4], float (&to)[TILES][4]) {
    const uint32_t ones[4] = {0x01010101, 0x01010101, 0x01010101, 0x01010101};
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        int totals[4] = {BASE, BASE, BASE, BASE};
        multiply_add(totals, ones, x[tile].x, x[tile].y);
        multiply_add(totals, ones, x[tile].z, x[tile].w);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // Exact: a power of two, and a difference of neighbours
            const float sum = weight * __uint_as_float(uint32_t(sums[tile][i])) - weight * BASED;
            const float total = __uint_as_float(uint32_t(totals[i])) - BASED;
            to[tile][i] += (i < 2 ? step.x : step.z) * sum;
            to[tile][i] -= (i < 2 ? step.y : step.w) * total;
        }
    }
}

// y of the rows of a tile: what the warps have summed, in their order
DEVICE void finish(const Product &a, int tile, int columns, const float *sums, const float *scales) {
    const int tokens = int(a.inputs.tokens), parts = a.inputs.parts;
    for (int i = threadIdx.x; i < ROWS * tokens; i += blockDim.x) {
        const int64_t row = int64_t(tile) * ROWS + i % ROWS;
        const int token = i / ROWS;
        if (row >= a.m) continue;
        float sum = 0;
        for (int warp = 0; warp < a.warps; warp++) {
            const float *from = sums + (warp * columns + token * parts) * SPACED + i % ROWS;
            float joined = 0;
            for (int part = parts - 1; part >= 0; part--) joined = 256 * joined + from[part * SPACED];
            sum += joined;
        }
        sum *= scales[token];
        if (!a.group) {  // otherwise both are in the sums
            if (blockIdx.y == 0)
                sum -= scales[tokens + token] * (a.zero ? float(a.zero[row * a.zero_row]) : a.middle);
            if (a.step) sum *= number(a.step, row * a.step_row, a.step_kind);
        }
        write_number(a.y, (int64_t(blockIdx.y) * tokens + token) * a.m + row, a.y_kind, a.unit * sum);
    }
}

// The threads of a block, and how many of such blocks a multiprocessor is to have registers for: 80 a
// thread where they are 768 together, which leaves some to the kernels that come next; 128 at 512.
template <class Code, int TILES, bool GROUPED> struct Held {
    static constexpr int THREADS = TILES == 1 ? 32 * Code::WARPS : 256;
    static constexpr int LEFT = Code::HELD + 1 - TILES - GROUPED;
    static constexpr int BLOCKS = THREADS > 256 || LEFT < 1 ? 1 : LEFT;
};

// TILES: of WIDTH columns of x. GROUPED: steps and zeros are those of a row's groups of columns.
template <class Code, int TILES, bool GROUPED, class Of = Held<Code, TILES, GROUPED>>
__global__ void __launch_bounds__(Of::THREADS, Of::BLOCKS) multiply_few(const Product a) {
    using Lay = Layout<Code, GROUPED>;
    uint8_t *memory = shared_memory();
    const Lay at(a, blockIdx.y);
    uint8_t *tables = memory, *columns = memory + Code::TABLES * ENTRIES * COPIES * 4;
    float *scales = (float *)(memory + at.scales);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const uint32_t tiles = divided_up(int(a.m), ROWS);
    const int first = tiles * blockIdx.x / gridDim.x, last = tiles * (blockIdx.x + 1) / gridDim.x;
    const int plane_bytes = int(a.plane_bytes);
    const bool wide = a.row_bytes % 16 == 0 && plane_bytes % 16 == 0 && (uintptr_t)a.words % 16 == 0;

    let_next_begin();
    prefetch_rows<Code>(a, first, at.first);
    if (Code::TABLES) copy_tables((uint32_t *)tables, a.tables, Code::TABLES * ENTRIES);
    await_previous();

    Unit<Code> now[Code::AHEAD], next[Code::AHEAD];
    const uint8_t *low, *high;  // rows g and g + 8 of the tile that is read
    const auto go_to = [&](int tile) {
        low = a.words + min(int64_t(tile) * ROWS + g, a.m - 1) * a.row_bytes;
        high = a.words + min(int64_t(tile) * ROWS + g + 8, a.m - 1) * a.row_bytes;
    };
    const auto fetch = [&](Unit<Code>(&to)[Code::AHEAD], int round) {
#pragma unroll
        for (int s = 0; s < Code::AHEAD; s++) {
            const int chunk = at.first + warp + a.warps * (round + s);
            const int offset = chunk < at.last ? chunk * RUN + 16 * t : plane_bytes;
            read_unit<Code>(to[s].low, low, offset, plane_bytes, wide);
            read_unit<Code>(to[s].high, high, offset, plane_bytes, wide);
        }
    };
    go_to(first);
    fetch(now, 0);
    copy_inputs<Code, GROUPED>(a, at, columns);
    copy_scales(a.inputs, scales);

    const uint8_t *x[TILES];  // of column g of each tile; columns beyond the last have the first one's
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const int column = WIDTH * i + g < at.columns ? WIDTH * i + g : 0;
        x[i] = columns + column * at.column_bytes + t * Lay::LANE;
    }
    const int groups = GROUPED ? divided_up(int(a.inputs.n), int(a.group)) : 0;
    const uint32_t by_group = GROUPED ? ~0u / (uint32_t(a.group) / RUN) : 0;
    for (int tile = first; tile < last; tile++) {
        if (GROUPED) copy_steps(a, tile, groups, memory + at.steps);
        if (GROUPED || tile == first) {
            await_copies();
            __syncthreads();
        }
        int exact[Code::SUMS][TILES][4] = {};
        float grouped[TILES][4] = {};
        for (int round = 0; round < at.rounds; round += Code::AHEAD) {
            const bool done = round + Code::AHEAD >= at.rounds;
            if (done) go_to(tile + 1);
            if (!done || tile + 1 < last) fetch(next, done ? 0 : round + Code::AHEAD);
#pragma unroll
            for (int s = 0; s < Code::AHEAD; s++) {
                const int mine = warp + a.warps * (round + s), chunk = at.first + mine;
                if (chunk >= at.last) continue;
                const int place = 4 * mine * Lay::LANE;
#pragma unroll
                for (int slice = 0; slice < Code::SLICES; slice++) {
                    const int offset = slice / Code::UNITS * at.run_bytes + slice % Code::UNITS * 16;
                    uint4 four[TILES];
#pragma unroll
                    for (int i = 0; i < TILES; i++) four[i] = *(const uint4 *)(x[i] + place + offset);
                    if constexpr (GROUPED) {
                        int sums[1][TILES][4];
#pragma unroll
                        for (int i = 0; i < 4 * TILES; i++) sums[0][i / 4][i % 4] = BASE;
                        Code::multiply(slice, now[s], four, sums, tables);
                        const int group = divided(slice * (plane_bytes / RUN) + chunk, by_group);
                        const float4 step = *(const float4 *)(memory + at.steps + group * STEPS + 16 * g);
                        add_group(step, Code::weight(slice), four, sums[0], grouped);
                    } else {
                        Code::multiply(slice, now[s], four, exact, tables);
                    }
                }
            }
#pragma unroll
            for (int s = 0; s < Code::AHEAD; s++) now[s] = next[s];
        }
        float *sums = (float *)(memory + at.sums) + (tile - first) % 2 * a.warps * at.columns * SPACED;
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int column = WIDTH * i + 2 * t + j % 2;
                const float sum = GROUPED ? grouped[i][j] : Code::join(a, exact, i, j);
                if (column < at.columns) sums[(warp * at.columns + column) * SPACED + g + j / 2 * 8] = sum;
            }
        __syncthreads();
        finish(a, tile, at.columns, sums, scales);
    }
}

template <class Code, bool GROUPED> int start(const Product &a, cudaStream_t stream) {
    if (const int status = a.inputs.x ? start_split(a.inputs, stream) : 0) return status;
    const Layout<Code, GROUPED> at(a, 0);
    auto kernel = at.columns <= WIDTH ? multiply_few<Code, 1, GROUPED> : multiply_few<Code, 2, GROUPED>;
    if constexpr (!GROUPED)
        if (at.columns > 2 * WIDTH) kernel = multiply_few<Code, 4, false>;
    const int resident = divided_up(processors() * RESIDENT, a.warps * a.layers);
    return launch(kernel, min(resident, divided_up(int(a.m), ROWS)), a.layers, 32 * a.warps, at.bytes, stream, a);
}

}  // namespace

#endif
