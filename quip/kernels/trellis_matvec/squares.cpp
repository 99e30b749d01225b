// Multiply a few vectors by a packed matrix of trellis codes on tiles of 16 x 16 weights, whose
// steps stand in an order of their own; or decode it.
//
//     s = (s << bits | code of step t) mod 2^L,   weight at order[t] = scale table[s]
//
// A row of tiles is unpacked to bytes. Some tiles side by side are decoded at once, so that the
// processor need not wait for the state of one; their weights are used while they are in L1.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../lanes.h"
#include "../threads.h"
#include "../unpack.h"

namespace {

constexpr int SIDE = 16, STEPS = SIDE * SIDE;
constexpr int BESIDE = 4, WIDTH = BESIDE * SIDE;  // tiles at once, and their columns
constexpr int64_t PIECE = 1 << 15;                // weights that are worth a thread

struct TrellisSquares {  // as in squares.py
    int64_t m, n, tokens, row_bytes;
    const uint8_t *words;  // [m, row_bytes]
    const uint8_t *order;  // [STEPS], places in a tile, row by row
    const float *table;    // [2^state_bits]
    const float *scale;    // of all weights
    const float *x;        // [tokens, n]
    void *out;             // y [tokens, m] in float32, or W [m, n]
    int32_t bits, state_bits, out_bytes;  // out_bytes: 2 for bfloat16, 4 for float32
    Threads threads;
};

float total(Floats lanes) {
    float sums[LANES], sum = 0;
    std::memcpy(sums, &lanes, sizeof sums);
    for (float one : sums) sum += one;
    return sum;
}

// take(column, panel) for every WIDTH columns of a row of tiles, panel [SIDE, WIDTH] being their
// weights over the scale; where the matrix ends within a panel, the rest of it means nothing
template <class Take> void decode_row(const TrellisSquares &a, int64_t tile, const Take &take) {
    static thread_local std::vector<uint8_t> codes;
    const int64_t stride = a.n + WIDTH;
    codes.resize(SIDE * stride);
    for (int r = 0; r < SIDE; r++)
        unpack(a.words + (tile * SIDE + r) * a.row_bytes, a.bits, a.n, &codes[r * stride]);
    int64_t from[STEPS];
    int to[STEPS];
    for (int t = 0; t < STEPS; t++) {
        from[t] = a.order[t] / SIDE * stride + a.order[t] % SIDE;
        to[t] = a.order[t] / SIDE * WIDTH + a.order[t] % SIDE;
    }
    const uint32_t mask = (1u << a.state_bits) - 1;
    for (int64_t column = 0; column < a.n; column += WIDTH) {
        const uint8_t *const here = codes.data() + column;
        float panel[SIDE * WIDTH];
        uint32_t s[BESIDE] = {};
        const auto step = [&](int t) {
            for (int q = 0; q < BESIDE; q++)
                s[q] = (s[q] << a.bits | here[from[t] + q * SIDE]) & mask;
        };
        // The string is a circle: before step 0 the state holds the codes of the last steps.
        for (int t = STEPS - (a.state_bits + a.bits - 1) / a.bits; t < STEPS; t++) step(t);
        for (int t = 0; t < STEPS; t++) {
            step(t);
            for (int q = 0; q < BESIDE; q++) panel[to[t] + q * SIDE] = a.table[s[q]];
        }
        take(column, panel);
    }
}

// work(tile) for every row of tiles
template <class Work> void share_rows(const TrellisSquares &a, const Work &work) {
    share(a.threads, a.m / SIDE, divide_up(PIECE, a.n * SIDE), [&](int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; tile++) work(tile);
    });
}

template <class Number> void decode(const TrellisSquares &a) {
    const Floats scale = all(*a.scale);
    share_rows(a, [&](int64_t tile) {
        decode_row(a, tile, [&](int64_t column, const float *panel) {
            const int64_t width = std::min<int64_t>(WIDTH, a.n - column);
            for (int r = 0; r < SIDE; r++)
                for (int64_t i = 0; i < width; i += LANES)
                    put(static_cast<Number *>(a.out) + (tile * SIDE + r) * a.n + column + i,
                        scale * load(panel + r * WIDTH + i));
        });
    });
}

void multiply(const TrellisSquares &a) {
    share_rows(a, [&](int64_t tile) {
        static thread_local std::vector<Floats> sums;
        sums.assign(a.tokens * SIDE, Floats{});
        decode_row(a, tile, [&](int64_t column, const float *panel) {
            const int64_t width = std::min<int64_t>(WIDTH, a.n - column);
            for (int64_t t = 0; t < a.tokens; t++)
                for (int r = 0; r < SIDE; r++) {
                    Floats sum = sums[t * SIDE + r];
                    for (int64_t i = 0; i < width; i += LANES)
                        sum += load(panel + r * WIDTH + i) * load(a.x + t * a.n + column + i);
                    sums[t * SIDE + r] = sum;
                }
        });
        for (int64_t t = 0; t < a.tokens; t++)
            for (int r = 0; r < SIDE; r++)
                static_cast<float *>(a.out)[t * a.m + tile * SIDE + r] =
                    *a.scale * total(sums[t * SIDE + r]);
    });
}

}  // namespace

extern "C" void multiply_squares(const TrellisSquares *a) { multiply(*a); }

extern "C" void decode_squares(const TrellisSquares *a) {
    a->out_bytes == 2 ? decode<uint16_t>(*a) : decode<float>(*a);
}
