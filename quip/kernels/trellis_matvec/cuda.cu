// y = x W~^T for a few vectors x and packed trellis codes, on tensor cores of int8: tiles of one
// column, whose states go down the rows, and steps of one weight of 2, 3 or 4 bits.
//
// A warp computes 8 strips of 16 rows; the warps of a block share the rows and split the columns, in
// chunks of 16 bytes. A lane 4 g + t reads word t of a chunk in the rows of strip g, and in those above
// whose bits its states hold; the rows above the first ones of a tile are its last ones. It turns
// them to strings that go down a column each:
//
//     byte b of words in 8 / BITS rows             byte b of a word for each of the codes of a byte
//       row 0    c3 c2 c1 c0                          c0:  row 0 | row 1 | row 2 | row 3
//       row 1    c3 c2 c1 c0            ->            c1:  row 0 | row 1 | row 2 | row 3
//       ...      (highest bits first)                 ...
//
// Four such bytes of a column, two of them above, hold the states of 16 / BITS rows. Codes of 3 bits
// are put together from their two planes, as 4 bits of which the highest is 0.
//
// A value is unit (q - middle), where q is the sum of the four bytes of a product with the state
// (MUL1, INT8: they are four entries of a row, and meet the same x), or 16 bits of a table, whose two
// bytes meet x in columns of their own. Sums are exact integers, and added in one order.

#include "../split.cuh"

struct Product {  // as in cuda.py
    Split inputs;
    int64_t m, tiles, row_bytes;
    const uint8_t *words;   // [m, row_bytes]
    const uint16_t *table;  // [2^L] or null; of 3 bits: [2^16], by the 4 bits of four codes
    void *y;                // [layers, tokens, m], out: the sum over layers is x W~^T
    float unit, middle;
    uint32_t factor, increment;  // of the product with a state
    int32_t L, y_kind, layers;
};

namespace {

constexpr int OWN = 16, STRIPS = 8;        // rows of a lane, and strips of a warp
constexpr int ROWS = OWN * STRIPS, SPACED = ROWS + 4;
constexpr int CHUNK = 16;                  // bytes
constexpr int COLUMNS = 8;                 // of x, that tensor cores multiply at once

DEVICE uint32_t down(uint32_t word, int by) { return by < 0 ? word << -by : word >> by; }

// One byte of x four times, and two bytes of it where a digit is the one of this lane's column
DEVICE uint32_t repeated(uint32_t x, int byte) { return __byte_perm(x, 0, 0x1111 * byte); }
DEVICE uint32_t spread(uint32_t x, int first, int digit) {
    return __byte_perm(x, 0, digit ? 0x1404 + 0x1010 * first : 0x4140 + 0x0101 * first);
}

// Strings of four columns: [half][column], the rows of a half are the lower 16 bits
template <int BITS> struct Strings {
    static constexpr int HALF = 16 / BITS, HALVES = OWN / HALF;  // rows, of a lane
    uint32_t at[HALVES][4];
};

// The sum of four bytes; MASKED: of six bits each
template <bool MASKED> struct Hashes {
    static constexpr int DIGITS = 1, WARPS = 8, BLOCKS = 2;  // of a block, and of a multiprocessor

    template <int BITS>
    DEVICE static uint32_t read(const Product &a, uint32_t string, int row) {
        // Bytes `at` and `at + 1` once the string is moved up to them: fewer shifts, and no mask
        const int low = BITS * (Strings<BITS>::HALF - 1 - row), at = (low + 7) / 8;
        const uint32_t state = __byte_perm(string << (8 * at - low), 0, 0x4400 | (at + 1) << 4 | at);
        const uint32_t product = state * a.factor + a.increment;
        return MASKED ? product & 0x3f3f3f3f : product;
    }
    template <int BITS>
    DEVICE static void multiply(const Product &a, const Strings<BITS> &strings, uint32_t x, int, int,
                                int (&sums)[OWN / 2][4], const uint8_t *) {
        using Of = Strings<BITS>;
#pragma unroll
        for (int pair = 0; pair < 4; pair += 2)
#pragma unroll
            for (int i = 0; i < OWN / 2; i++) {
                const int low = i / Of::HALF, high = low + Of::HALVES / 2, row = i % Of::HALF;
                const uint32_t entries[4] = {
                    read<BITS>(a, strings.at[low][pair], row), read<BITS>(a, strings.at[high][pair], row),
                    read<BITS>(a, strings.at[low][pair + 1], row),
                    read<BITS>(a, strings.at[high][pair + 1], row)};
                multiply_add(sums[i], entries, repeated(x, pair), repeated(x, pair + 1));
            }
    }
    DEVICE static void fill(const Product &, int, uint8_t *) {}
};

// 16 bits of a table; PAIRED: of two rows at once, by L + BITS bits
template <bool PAIRED> struct Lookups {
    static constexpr int DIGITS = 2, WARPS = 12, BLOCKS = 1;

    // copy: what is added to an offset, where a table has copies of each value
    template <int BITS>
    DEVICE static void multiply(const Product &a, const Strings<BITS> &strings, uint32_t x, int digit,
                                int copy, int (&sums)[OWN / 2][4], const uint8_t *table) {
        using Of = Strings<BITS>;
        constexpr int STEP = PAIRED ? 2 : 1;
        const uint32_t mask = PAIRED ? ((1u << (a.L + BITS)) - 1) << 2 : ((1u << a.L) - 1) << 1;
        const uint32_t first = spread(x, 0, digit), second = spread(x, 2, digit);
#pragma unroll
        for (int i = 0; i < OWN / 2; i += STEP) {
            const int low = i / Of::HALF, row = i % Of::HALF + STEP - 1;
            const int by = BITS * (Of::HALF - 1 - row) - STEP;
            uint32_t found[2][4];  // of the two halves, four columns
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int column = 0; column < 4; column++) {
                    const uint32_t string = strings.at[low + half * (Of::HALVES / 2)][column];
                    const uint8_t *from = table + ((down(string, by) & mask) | copy);
                    found[half][column] = PAIRED ? *(const uint32_t *)from : *(const uint16_t *)from;
                }
#pragma unroll
            for (int j = 0; j < STEP; j++) {
                const int both = j ? 0x7632 : 0x5410;
                const uint32_t entries[4] = {__byte_perm(found[0][0], found[0][1], both),
                                             __byte_perm(found[1][0], found[1][1], both),
                                             __byte_perm(found[0][2], found[0][3], both),
                                             __byte_perm(found[1][2], found[1][3], both)};
                multiply_add(sums[i + j], entries, first, second);
            }
        }
    }
    DEVICE static void fill(const Product &a, int bits, uint8_t *table) {
        const int states = 1 << a.L;
        if (PAIRED)
#pragma unroll 4
            for (int i = threadIdx.x; i < states << bits; i += blockDim.x)
                ((uint32_t *)table)[i] =
                    __ldg(a.table + (i >> bits)) | uint32_t(__ldg(a.table + (i & (states - 1)))) << 16;
        else
#pragma unroll 4
            for (int i = threadIdx.x; i < states / 8; i += blockDim.x)
                ((uint4 *)table)[i] = __ldg((const uint4 *)a.table + i);
    }
};

// Where a lane's rows begin, and the rows above them
template <int BITS> struct Strip {
    static constexpr int ABOVE = 16 / BITS;
    const uint8_t *own, *above;
    int64_t row;

    __host__ DEVICE static int64_t per_tile(const Product &a) {
        return ((a.m + a.tiles - 1) / a.tiles + OWN - 1) / OWN;
    }
    // The last strip of a tile may begin in the one before it: both find the same sums.
    DEVICE Strip(const Product &a, int64_t strip) {
        const int64_t each = per_tile(a), all = a.tiles * each;
        strip = strip < all ? strip : all - 1;
        const int64_t tile = strip / each, size = a.m / a.tiles, more = a.m % a.tiles;
        const int64_t first = tile * size + (tile < more ? tile : more), rows = size + (tile < more);
        const int64_t begin = strip % each * OWN, start = begin + OWN <= rows ? begin : rows - OWN;
        row = first + start;
        own = a.words + row * a.row_bytes;
        above = a.words + ((start ? row : first + rows) - ABOVE) * a.row_bytes;
    }
};

// A word of each row of a lane, those above first
template <int BITS, class Take>
DEVICE void read_rows(const Product &a, const Strip<BITS> &strip, int offset, bool some, Take take) {
    const uint8_t *from = strip.above + offset;
#pragma unroll
    for (int i = 0; i < Strip<BITS>::ABOVE + OWN; i++, from += a.row_bytes) {
        if (i == Strip<BITS>::ABOVE) from = strip.own + offset;
        take(i, some ? __ldg((const uint32_t *)from) : 0);
    }
}

// Words of all rows, which are turned to words of bytes of each code of a byte
template <int BITS> struct Words {
    static constexpr int CODES = 8 / BITS, BYTES = (16 / BITS + OWN) / CODES;
    uint32_t at[BYTES][CODES];  // [.., row] until they are turned, then [.., code of the byte]

    DEVICE uint32_t &of(int row) { return at[row / CODES][row % CODES]; }
    DEVICE void turn() {
#pragma unroll
        for (int byte = 0; byte < BYTES; byte++) {
            uint32_t(&w)[CODES] = at[byte];
            if constexpr (BITS == 2) {
                exchange<2>(w[0], w[1]), exchange<2>(w[2], w[3]);
                exchange<4>(w[0], w[2]), exchange<4>(w[1], w[3]);
            } else {
                exchange<4>(w[0], w[1]);
            }
        }
    }
    // Fields of BITS of each byte: the lower ones of both rows, and the higher ones, the first row above
    template <int FIELD> DEVICE static void exchange(uint32_t &first, uint32_t &second) {
        constexpr uint32_t LOW = FIELD == 2 ? 0x33333333 : 0x0f0f0f0f;
        const uint32_t low = (first << FIELD & ~LOW) | (second & LOW);
        second = (first & ~LOW) | (second >> FIELD & LOW);
        first = low;
    }
    // Those of one code of a byte; its four columns lie side by side
    DEVICE Strings<BITS> strings(int code) const {
        Strings<BITS> to;
#pragma unroll
        for (int half = 0; half < Strings<BITS>::HALVES; half++) {
            const uint32_t a = at[2 * half][code], b = at[2 * half + 1][code];
            const uint32_t c = at[2 * half + 2][code], d = at[2 * half + 3][code];
            const uint32_t ab = __byte_perm(a, b, 0x1504), cd = __byte_perm(c, d, 0x1504);
            const uint32_t AB = __byte_perm(a, b, 0x3726), CD = __byte_perm(c, d, 0x3726);
            to.at[half][0] = __byte_perm(cd, ab, 0x5410), to.at[half][1] = __byte_perm(cd, ab, 0x7632);
            to.at[half][2] = __byte_perm(CD, AB, 0x5410), to.at[half][3] = __byte_perm(CD, AB, 0x7632);
        }
        return to;
    }
};

// What a lane reads at a time, of chunk `pair` or one of a pair; x as the codes of its bytes need it
template <int BITS> struct Unit {
    static constexpr int FIELD = BITS, PARTS = 1, CODES = 8 / BITS, SLICES = CODES;
    Words<BITS> words;
    uint32_t x[SLICES];

    DEVICE static int chunk(int pair, int odd) { return 2 * pair + odd; }  // one line of the caches

    DEVICE void read(const Product &a, const Strip<BITS> &strip, const uint8_t *inputs, int plane_bytes,
                     int offset, int, bool some) {
        read_rows(a, strip, offset, some, [&](int row, uint32_t word) { words.of(row) = word; });
#pragma unroll
        for (int i = 0; i < SLICES; i++)
            x[i] = some ? read_fresh((const uint32_t *)(inputs + i * plane_bytes + offset)) : 0;
    }
    DEVICE Words<BITS> part(int) const { return words; }
};

// A word of the plane of 2 bits, first of its first half and then of the other, and one of the plane
// of 1 bit: bit i of a byte there belongs to code i / 2 of the byte of half i % 2
template <> struct Unit<3> {
    static constexpr int FIELD = 4, PARTS = 2, CODES = 2, SLICES = 4, ALL = 16 / FIELD + OWN;
    uint32_t two[ALL], one[ALL], x[SLICES];

    DEVICE static int chunk(int pair, int) { return pair; }

    DEVICE void read(const Product &a, const Strip<FIELD> &strip, const uint8_t *inputs, int plane_bytes,
                     int offset, int odd, bool some) {
        read_rows(a, strip, odd * plane_bytes + offset, some, [&](int row, uint32_t word) { two[row] = word; });
        read_rows(a, strip, 2 * plane_bytes + offset, some,
                  [&](int row, uint32_t word) { one[row] = word >> odd; });
#pragma unroll
        for (int i = 0; i < SLICES; i++)
            x[i] = some ? read_fresh((const uint32_t *)(inputs + (2 * i + odd) * plane_bytes + offset)) : 0;
    }
    DEVICE Words<FIELD> part(int index) const {
        Words<FIELD> words;
#pragma unroll
        for (int row = 0; row < ALL; row++) {
            const uint32_t low = two[row] >> 4 * index, high = one[row] >> 4 * index;
            words.of(row) = (low & 0x03030303) | (low << 2 & 0x30303030) | (high << 2 & 0x04040404) |
                            (high << 4 & 0x40404040);
        }
        return words;
    }
};

// y of a block's rows: what the warps have summed, in their order
template <class Values>
DEVICE void finish(const Product &a, const int64_t *rows, const float *sums, const float *scales) {
    constexpr int digits = Values::DIGITS;
    const int tokens = int(a.inputs.tokens), parts = a.inputs.parts, columns = tokens * parts * digits;
    for (int i = threadIdx.x; i < ROWS * tokens; i += blockDim.x) {
        const int token = i / ROWS, place = i % ROWS;
        float sum = 0;
        for (int warp = 0; warp < Values::WARPS; warp++) {
            const float *from = sums + (warp * columns + token * parts * digits) * SPACED + place;
            float joined = 0;
            for (int part = parts - 1; part >= 0; part--) {
                float value = from[part * digits * SPACED];
                if (digits == 2) value += 256 * from[(part * digits + 1) * SPACED];
                joined = 256 * joined + value;
            }
            sum += joined;
        }
        sum *= scales[token];
        if (blockIdx.y == 0) sum -= scales[tokens + token] * a.middle;
        const int64_t row = rows[place % STRIPS] + place / STRIPS;
        write_number(a.y, (int64_t(blockIdx.y) * tokens + token) * a.m + row, a.y_kind, a.unit * sum);
    }
}

// Where things lie behind the table in the memory of a block
struct Layout {
    int rows, scales, sums, all;
    __host__ DEVICE Layout(const Product &a, int table_bytes, int warps, int digits) {
        const int tokens = int(a.inputs.tokens);
        rows = table_bytes, scales = rows + 8 * STRIPS, sums = scales + 2 * 4 * tokens;
        all = sums + warps * tokens * a.inputs.parts * digits * SPACED * 4;
    }
};

template <int BITS, class Values>
__global__ void __launch_bounds__(32 * Values::WARPS, Values::BLOCKS) multiply_few(const Product a, const Layout at) {
    using Of = Unit<BITS>;
    using Rows = Strip<Of::FIELD>;
    uint8_t *memory = shared_memory();
    int64_t *rows = (int64_t *)(memory + at.rows);
    float *scales = (float *)(memory + at.scales), *sums = (float *)(memory + at.sums);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int plane_bytes = int(a.inputs.n) / (Of::SLICES * Of::PARTS);
    const int chunks = (plane_bytes + CHUNK - 1) / CHUNK;
    const int begin = chunks * blockIdx.y / a.layers, end = chunks * (blockIdx.y + 1) / a.layers;
    const int columns = int(a.inputs.tokens) * a.inputs.parts * Values::DIGITS;
    const int digit = g % Values::DIGITS, copy = BITS == 3 ? lane % 2 * 16 : 0;
    const uint8_t *x = a.inputs.bytes + (g < columns ? g / Values::DIGITS : 0) * a.inputs.n;
    const int64_t blocks = (a.tiles * Rows::per_tile(a) + STRIPS - 1) / STRIPS;
    let_next_begin();
    Values::fill(a, BITS, memory);
    await_previous();
    copy_scales(a.inputs, scales);
    __syncthreads();

    const auto chunk_of = [&](int i) { return begin + Of::chunk(warp + Values::WARPS * (i / 2), i % 2); };
    for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
        const Rows strip(a, block * STRIPS + g);
        if (warp == 0 && t == 0) rows[g] = strip.row;
        int exact[OWN / 2][4] = {};
        Of now, next;
        const auto fetch = [&](Of &to, int i) {
            const int chunk = chunk_of(i), offset = CHUNK * chunk + 4 * t;
            to.read(a, strip, x, plane_bytes, offset, i % 2, chunk < end && offset < plane_bytes);
        };
        fetch(now, 0);
        for (int i = 0; chunk_of(i) < end; i++) {
            fetch(next, i + 1);
#pragma unroll
            for (int part = 0; part < Of::PARTS; part++) {
                auto words = now.part(part);
                words.turn();
#pragma unroll
                for (int code = 0; code < Of::CODES; code++)
                    Values::template multiply<Of::FIELD>(a, words.strings(code), now.x[part * Of::CODES + code],
                                                         digit, copy, exact, memory);
            }
            now = next;
        }
#pragma unroll
        for (int i = 0; i < OWN / 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int column = 2 * t + j % 2, place = (i + j / 2 * (OWN / 2)) * STRIPS + g;
                if (column < columns) sums[(warp * columns + column) * SPACED + place] = float(exact[i][j]);
            }
        __syncthreads();
        finish<Values>(a, rows, sums, scales);
        __syncthreads();
    }
}

template <int BITS, class Values> int start(const Product &a, int table_bytes, cudaStream_t stream) {
    if (a.inputs.tokens * a.inputs.parts * Values::DIGITS > COLUMNS) return cudaErrorInvalidValue;
    if (const int status = a.inputs.x ? start_split(a.inputs, stream) : 0) return status;
    const int64_t blocks = (a.tiles * Strip<Unit<BITS>::FIELD>::per_tile(a) + STRIPS - 1) / STRIPS;
    const Layout at(a, table_bytes, Values::WARPS, Values::DIGITS);
    return launch(multiply_few<BITS, Values>, blocks, a.layers, 32 * Values::WARPS, at.all, stream, a, at);
}

template <int BITS> int start_kind(const Product &a, int kind, cudaStream_t stream) {
    switch (kind) {
        case 0: return start<BITS, Hashes<false>>(a, 0, stream);
        case 1: return start<BITS, Hashes<true>>(a, 0, stream);
        case 2: return start<BITS, Lookups<false>>(a, 2 << a.L, stream);
        case 3: return start<BITS, Lookups<true>>(a, 4 << (a.L + BITS), stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

// kind: the enum Kind of cuda.py. What comes back is a cudaError_t.
extern "C" int multiply_trellis(const Product *a, int bits, int kind, cudaStream_t stream) {
    switch (bits) {
        case 2: return start_kind<2>(*a, kind, stream);
        case 3: return start<3, Lookups<false>>(*a, 2 << a->L, stream);
        case 4: return start_kind<4>(*a, kind, stream);
    }
    return cudaErrorInvalidValue;
}
