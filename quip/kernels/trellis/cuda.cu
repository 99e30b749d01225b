// Nearest walks through a trellis on a CUDA device, a tile by a thread block; and the values of walks.
//
// A thread keeps the costs of four overlaps that lie side by side, e ... e + 3. For each u it reads
// the costs that lead there, of the overlap before (two of them where a step brings one bit), and
// the values of the four states: from registers where it has no others to keep, otherwise from L1
// and L2. Costs of one step and the next lie in turn in two halves of the block's memory; which u was
// the lowest, there too where there is room, since one thread walks back.
//
// Each operation is rounded by itself, and of equal costs the first one is kept: codes are those of
// reference.py bit for bit.

#include "../numbers.cuh"

struct Encode {  // as in cuda.py
    int64_t m, d, tiles, back_bytes;
    const float *x;      // [m, d]
    const float *table;  // [2^L, V]
    uint8_t *back;       // [blocks, back_bytes], or null: a block's own memory has room for them
    void *codes;         // [m], out
    int32_t L, longest, wide, blocks, threads, bytes;  // longest: steps of the longest tile
};

struct Decode {  // as in cuda.py
    int64_t m, n, tiles, row_bytes;
    const uint8_t *words;   // [m, row_bytes]: planes of the bits of codes, as in bits.py
    const float *table;     // [2^L, V]
    const float *scales;    // [groups] or null: 1
    const int32_t *order;   // or null: row by row
    void *W;                // [m, n], out
    int32_t bits, stored, L, V, across, kind;  // stored: the bits that a code takes in the planes
    int32_t group;  // columns that share a scale, some tiles; 0: all
};

namespace {

constexpr int QUAD = 4;
constexpr int WARPS = 32;     // of a block, at most
constexpr int RUN = 32;       // steps of a thread that decodes
constexpr int DECODERS = 256;

struct Rows {
    int64_t first, count;
};

// Of a tile: those of the first tiles may be more by one
DEVICE Rows rows_of(int64_t m, int64_t tiles, int64_t tile) {
    const int64_t size = m / tiles, more = m % tiles;
    return {tile * size + (tile < more ? tile : more), size + (tile < more)};
}

template <int BYTES> struct Word;
template <> struct Word<1> { using Type = uint8_t; };
template <> struct Word<2> { using Type = uint16_t; };
template <> struct Word<4> { using Type = uint32_t; };

// BITS of a step of V weights
template <int BITS, int V> struct Step {
    static constexpr int LEADING = 1 << BITS;
    // What a thread notes of a step: u of each of its overlaps
    using Back = typename Word<BITS <= 2 ? 1 : BITS <= 4 ? 2 : 4>::Type;

    struct Values {
        float at[QUAD * V];

        DEVICE void read(const float *table, int state) {
#pragma unroll
            for (int i = 0; i < V; i++) {
                const float4 four = __ldg((const float4 *)(table + state * V) + i);
                at[QUAD * i] = four.x, at[QUAD * i + 1] = four.y;
                at[QUAD * i + 2] = four.z, at[QUAD * i + 3] = four.w;
            }
        }
        DEVICE float distance(int i, const float (&x)[V]) const {
            float total = 0;
#pragma unroll
            for (int v = 0; v < V; v++) {
                const float off = __fsub_rn(at[V * i + v], x[v]), square = __fmul_rn(off, off);
                total = v ? __fadd_rn(total, square) : square;
            }
            return total;
        }
    };

    struct Best {
        float cost[QUAD];
        uint32_t u[QUAD];

        // costs: those of the step before
        DEVICE void take(uint32_t from, int first, const Values &values, const float (&x)[V],
                         const float *costs) {
            float before[2];
            if (BITS == 1) {
                const float2 two = *(const float2 *)(costs + (first >> 1));
                before[0] = two.x, before[1] = two.y;
            } else {
                before[0] = before[1] = costs[first >> BITS];
            }
#pragma unroll
            for (int i = 0; i < QUAD; i++) {
                const float now = __fadd_rn(values.distance(i, x), before[i / 2]);
                if (from == 0 || now < cost[i]) cost[i] = now, u[i] = from;
            }
        }
        DEVICE void write(int quad, float *costs, Back *back) const {
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < QUAD; i++) word |= u[i] << BITS * i;
            *(float4 *)(costs + QUAD * quad) = float4{cost[0], cost[1], cost[2], cost[3]};
            back[quad] = Back(word);
        }
    };

    DEVICE static uint32_t state(const Back *back, uint32_t e, int L) {
        const uint32_t word = back[e / QUAD];
        return (word >> BITS * (e % QUAD) & (LEADING - 1)) << (L - BITS) | e;
    }
};

// The lowest cost, and of equal ones the first overlap: in all threads
DEVICE uint32_t first_lowest(const float *costs, int overlaps, uint32_t *found) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    uint32_t most = 0, at = 0;  // costs are ordered as their bits are, from 0 on
    for (int e = threadIdx.x; e < overlaps; e += blockDim.x) {
        const uint32_t up = ~__float_as_uint(costs[e]);
        if (up > most) most = up, at = e;
    }
    uint32_t top = largest_of_warp(most), place = largest_of_warp(most == top ? ~at : 0);
    if (lane == 0) found[warp] = top, found[WARPS + warp] = place;
    __syncthreads();
    most = lane < warps ? found[lane] : 0, at = lane < warps ? found[WARPS + lane] : 0;
    top = largest_of_warp(most), place = largest_of_warp(most == top ? at : 0);
    __syncthreads();
    return ~place;
}

// HELD: a thread has at most one quad, whose values stay in its registers
template <int BITS, int V, bool HELD, int MOST>
__global__ void __launch_bounds__(MOST, 1) encode(const Encode a) {
    using Of = Step<BITS, V>;
    using Back = typename Of::Back;
    const int overlaps = 1 << (a.L - BITS), quads = overlaps / QUAD, me = threadIdx.x;
    float *costs = (float *)shared_memory(), *x = costs + 2 * overlaps;
    uint32_t *found = (uint32_t *)(x + a.longest * V);
    Back *back = (Back *)(a.back ? a.back + blockIdx.x * a.back_bytes : (uint8_t *)(found + 2 * WARPS));
    await_previous();
    typename Of::Values held[HELD ? Of::LEADING : 1];
    if (HELD && me < quads)
#pragma unroll
        for (int u = 0; u < (HELD ? Of::LEADING : 1); u++)
            held[u].read(a.table, (u << (a.L - BITS)) + QUAD * me);

    // One step, and what it says of it; the values of all that is not held are read in turns, so
    // that what L1 still has of them is read first
    const auto advance = [&](int t, int at) {
        const float *before = costs + t % 2 * overlaps;
        float *after = costs + (t + 1) % 2 * overlaps, now[V];
#pragma unroll
        for (int v = 0; v < V; v++) now[v] = x[at * V + v];
        typename Of::Best best;
        if constexpr (HELD) {
            if (me < quads) {
#pragma unroll
                for (int u = 0; u < Of::LEADING; u++)
                    best.take(u, (u << (a.L - BITS)) + QUAD * me, held[u], now, before);
                best.write(me, after, back + t * quads);
            }
        } else {
            const int threads = blockDim.x;
            for (int done = 0; done < quads; done += threads) {
                const int quad = (t % 2 && quads > threads ? quads - threads - done : done) + me;
                if (quad >= quads) continue;
#pragma unroll 4
                for (int u = 0; u < Of::LEADING; u++) {
                    const int first = (u << (a.L - BITS)) + QUAD * quad;
                    typename Of::Values values;
                    values.read(a.table, first);
                    best.take(u, first, values, now, before);
                }
                best.write(quad, after, back + t * quads);
            }
        }
        __syncthreads();
    };
    for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
        const Rows rows = rows_of(a.m, a.tiles, tile);
        const int across = int(a.d / V), steps = int(rows.count) * across, half = steps / 2;
        for (int i = me; i < steps * V; i += blockDim.x) x[i] = read_fresh(a.x + rows.first * a.d + i);
        for (int e = me; e < overlaps; e += blockDim.x) costs[e] = 0;
        __syncthreads();
        for (int t = 0; t < steps; t++) advance(t, t + half < steps ? t + half : t + half - steps);
        uint32_t e = first_lowest(costs + steps % 2 * overlaps, overlaps, found);
        if (me == 0) {
            for (int t = steps - 1; t >= steps - half; t--)
                e = Of::state(back + t * quads, e, a.L) >> BITS;
            found[0] = e;
        }
        __syncthreads();
        const uint32_t seam = found[0];
        for (int i = me; i < overlaps; i += blockDim.x) costs[i] = i == int(seam) ? 0 : INFINITY;
        __syncthreads();
        for (int t = 0; t < steps; t++) advance(t, t);
        if (me == 0) {
            e = seam;
            uint64_t code = 0;
            int64_t row = rows.first + rows.count;
            for (int t = steps - 1, place = across - 1; t >= 0; t--) {
                const uint32_t s = Of::state(back + t * quads, e, a.L);
                code |= uint64_t(s & (Of::LEADING - 1)) << BITS * place;
                e = s >> BITS;
                if (place-- > 0) continue;
                row--, place = across - 1;
                if (a.wide)
                    ((int64_t *)a.codes)[row] = int64_t(code);
                else
                    ((int32_t *)a.codes)[row] = int32_t(code);
                code = 0;
            }
        }
        __syncthreads();
    }
}

template <int BITS, int V> int start_encoding(const Encode &a, cudaStream_t stream) {
    constexpr int MOST = V << BITS <= 4 ? 1024 : 512;  // threads that have the registers for it
    if constexpr (V << BITS <= 16)
        if (QUAD * MOST << BITS >= 1 << a.L)
            return launch(encode<BITS, V, true, MOST>, a.blocks, 1, a.threads, a.bytes, stream, a);
    return launch(encode<BITS, V, false, 1024>, a.blocks, 1, a.threads, a.bytes, stream, a);
}

// Where the code of a step lies in each plane of a row
struct Places {
    int at[4], shift[4];

    DEVICE Places(const Decode &a, int step) {
        const int count = int(a.n) / a.V;
        int plane = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int width = 8 >> i, bytes = (count * width + 7) / 8;
            at[i] = shift[i] = 0;
            if (!(a.stored & width)) continue;
            const int part = step / bytes;
            at[i] = plane + step - part * bytes, shift[i] = width * part;
            plane += bytes;
        }
    }
    DEVICE uint32_t read(const Decode &a, int64_t row) const {
        const uint8_t *from = a.words + row * a.row_bytes;
        uint32_t code = 0;
        int low = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int width = 8 >> i;
            if (!(a.stored & width)) continue;
            code |= (uint32_t(from[at[i]]) >> shift[i] & ((1u << width) - 1)) << low;
            low += width;
        }
        return code;
    }
};

// A thread takes RUN steps of a sequence, neighbours those of the tiles side by side. DOWN: tiles are a
// step wide, and their sequences go down the rows.
template <int V, bool DOWN> __global__ void __launch_bounds__(DECODERS) decode(const Decode a) {
    const int across = DOWN ? 1 : a.across, beside = int(a.n) / (V * across);
    const int window = (a.L + a.bits - 1) / a.bits;
    const int64_t longest = (a.m + a.tiles - 1) / a.tiles * across, runs = (longest + RUN - 1) / RUN;
    const uint32_t mask = (1u << a.L) - 1;
    await_previous();
    const int64_t all = a.tiles * runs * beside, stride = int64_t(gridDim.x) * DECODERS;
    for (int64_t i = int64_t(blockIdx.x) * DECODERS + threadIdx.x; i < all; i += stride) {
        const int64_t tile = i / beside / runs;
        const int block = int(i % beside), first = int(i / beside - tile * runs) * RUN;
        const Rows rows = rows_of(a.m, a.tiles, tile);
        const int steps = int(rows.count) * across, last = first + RUN < steps ? first + RUN : steps;
        const float scale = a.scales ? a.scales[a.group ? block * across * V / a.group : 0] : 1;
        Places places(a, block * across);
        uint32_t state = 0;
        for (int t = first - window + 1; t < last; t++) {
            int down = t, step = block;
            while (down < 0) down += steps;
            if constexpr (!DOWN) {
                const int place = a.order ? a.order[down] : down;
                down = place / across, step = block * across + place - down * across;
                places = Places(a, step);
            }
            const int64_t row = rows.first + down;
            state = (state << a.bits | places.read(a, row)) & mask;
            if (t < first) continue;
#pragma unroll
            for (int v = 0; v < V; v++) {
                const float w = __fmul_rn(__ldg(a.table + state * V + v), scale);
                write_number(a.W, row * a.n + step * V + v, a.kind, w);
            }
        }
    }
}

template <int V> int start_decoding(const Decode &a, cudaStream_t stream) {
    const int64_t longest = (a.m + a.tiles - 1) / a.tiles * a.across;
    const int64_t threads = a.tiles * ((longest + RUN - 1) / RUN) * (a.n / (V * a.across));
    const auto kernel = a.across == 1 && !a.order ? decode<V, true> : decode<V, false>;
    return launch(kernel, (threads + DECODERS - 1) / DECODERS, 1, DECODERS, 0, stream, a);
}

}  // namespace

// bits and V: of a step. What comes back is a cudaError_t.
extern "C" int encode_walks(const Encode *a, int bits, int V, cudaStream_t stream) {
    switch (16 * V + bits) {
        case 17: return start_encoding<1, 1>(*a, stream);
        case 18: return start_encoding<2, 1>(*a, stream);
        case 19: return start_encoding<3, 1>(*a, stream);
        case 20: return start_encoding<4, 1>(*a, stream);
        case 34: return start_encoding<2, 2>(*a, stream);
        case 35: return start_encoding<3, 2>(*a, stream);
        case 36: return start_encoding<4, 2>(*a, stream);
        case 37: return start_encoding<5, 2>(*a, stream);
        case 38: return start_encoding<6, 2>(*a, stream);
        case 39: return start_encoding<7, 2>(*a, stream);
        case 40: return start_encoding<8, 2>(*a, stream);
    }
    return cudaErrorInvalidValue;
}

extern "C" int decode_walks(const Decode *a, cudaStream_t stream) {
    switch (a->V) {
        case 1: return start_decoding<1>(*a, stream);
        case 2: return start_decoding<2>(*a, stream);
    }
    return cudaErrorInvalidValue;
}
