// Multiply a few vectors by a packed matrix of trellis codes, or decode it.
//
// The inputs of a block lie in the order of its weights, and stay in registers while it goes down
// the rows of a group.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../lanes.h"
#include "../threads.h"
#include "walk.h"
#include "weights.h"

namespace {

constexpr int64_t PIECE = 1 << 16;  // products that are worth a thread
constexpr int SOME = 8;             // pairs of rows, whose windows are made before they are used

// x times the scales, in the order of the weights: vectors of all T tokens in turn
template <class Weights, int T>
std::vector<float> inputs(const TrellisMatvec &a, const std::vector<Place> &all) {
    constexpr int WIDTH = Weights::WIDTH, VECTORS = Weights::VECTORS;
    constexpr int COLUMNS = Weights::Register::COLUMNS, PLACES = HELD / COLUMNS;
    const int64_t n = a.steps * WIDTH;
    std::vector<float> scaled(a.x, a.x + a.tokens * n);
    for (int64_t t = 0; t < a.tokens; t++)
        for (int64_t from = 0, g = 0; from < n; from += a.group, g++)
            for (int64_t k = from; k < std::min(from + a.group, n); k++)
                scaled[t * n + k] *= a.scales[g];
    std::vector<float> x(all.size() / PLACES * VECTORS * T * LANES);
    float *to = x.data();
    for (size_t p = 0; p < all.size(); p += PLACES)
        for (int v = 0; v < VECTORS; v++, to += T * LANES)
            for (int l = 0; l < LANES; l++) {
                const int step = Weights::step(v, l);
                const Place &place = all[p + step / COLUMNS];
                if (step % COLUMNS >= place.count) continue;
                const float *from = scaled.data() + (place.first + step % COLUMNS) * WIDTH +
                    Weights::minor(l) % WIDTH;
                for (int64_t t = 0; t < a.tokens; t++) to[t * LANES + l] = from[t * n];
            }
    return x;
}

// sums += x times two rows, or as many as the weights have together
template <class Weights, int T>
[[gnu::always_inline]] inline void add(const Weights &weights, const typename Weights::Held &held,
                                       const float *x, const Floats *kept, Floats *sums) {
    Floats now[2][T] = {};
    for (int t = 0; t < T; t++) now[0][t] = sums[t];
#pragma GCC unroll 8
    for (int v = 0; v < Weights::VECTORS; v++) {
        const Floats w = weights(held, v);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++)
            now[v % 2][t] += w * (T == 1 ? kept[v] : load(x + (v * T + t) * LANES));
    }
    for (int t = 0; t < T; t++) sums[t] = now[0][t] + now[1][t];
}

// sums += products of a block with the inputs of T tokens
template <class Weights, int T>
[[gnu::always_inline]] inline void add_block(Walk<Register> &walk, int64_t b,
                                             const Weights &weights, const float *x,
                                             Floats (*sums)[T]) {
    constexpr int ROWS = Weights::ROWS, VECTORS = Weights::VECTORS, BATCH = Weights::BATCH;
    Block block(walk, b);
    Floats kept[T == 1 ? VECTORS : 1];
    for (int v = 0; v < VECTORS && T == 1; v++) kept[v] = load(x + v * LANES);
    for (int first = 0; first < walk.rows; first += BATCH * ROWS) {
        typename Weights::Held held[BATCH];  // all, before any is looked up
        for (int i = 0; i < BATCH && first + i * ROWS < walk.rows; i++) {
            Shorts low[ROWS], high[ROWS];
            for (int j = 0; j < ROWS; j++) block.go(first + i * ROWS + j, low[j], high[j]);
            weights.put(held[i], low, high);
        }
        for (int i = 0; i < BATCH && first + i * ROWS < walk.rows; i++)
            add<Weights, T>(weights, held[i], x, kept, sums[first / ROWS + i]);
    }
}

// sums += products of all blocks
template <class Weights, int T>
void add_blocks(Walk<Register> &walk, const Weights &weights, const float *x, Floats (*sums)[T]) {
    for (size_t b = 0; b < walk.registers.size(); b++, x += Weights::VECTORS * T * LANES)
        add_block<Weights, T>(walk, b, weights, x, sums);
}

#ifdef HALVES
// sums += products of block b, which goes down two rows at once
template <class Source, class Weights, int T>
[[gnu::always_inline]] inline void add_down(Walk<Planes> &walk, int64_t b, const Weights &weights,
                                            const float *x, Floats (*sums)[T]) {
    constexpr int VECTORS = Weights::VECTORS;
    const int pairs = (walk.rows + 1) / 2;
    const Place *places = &walk.all[b * PLACES];
    Floats kept[T == 1 ? VECTORS : 1];
    for (int v = 0; v < VECTORS && T == 1; v++) kept[v] = load(x + v * LANES);
    if (b == 0 || places[-1].byte < places->byte)  // these bytes are read first: bring the next
        for (int row = 0; row < walk.rows; row++)
            __builtin_prefetch(walk.at[row] + places->byte + HELD);
    typename Weights::template Down<Source> down(weights, places, walk.registers[b]);
    for (int first = 0; first < pairs; first += SOME) {
        typename Weights::Held held[SOME];
        const int stop = std::min(first + SOME, pairs);
        for (int i = first; i < stop; i++)
            down.go(walk.at[2 * i], walk.at[2 * i + 1], held[i - first]);
        for (int i = first; i < stop; i++)
            add<Weights, T>(weights, held[i - first], x, kept, sums[i]);
    }
    walk.registers[b] = down.planes();
}

template <class Weights, int T>
void add_blocks(Walk<Planes> &walk, const Weights &weights, const float *x, Floats (*sums)[T]) {
    for (size_t b = 0; b < walk.registers.size(); b++, x += Weights::VECTORS * T * LANES)
        if (together(&walk.all[b * PLACES]))
            add_down<Neighbours, Weights, T>(walk, b, weights, x, sums);
        else
            add_down<Pieces, Weights, T>(walk, b, weights, x, sums);
}
#endif

template <class Weights, int T>
void multiply_tokens(const TrellisMatvec &a, const Weights &weights) {
    using Register = typename Weights::Register;
    constexpr int ROWS = Weights::ROWS;
    const std::vector<Place> all = places(a, Register::COLUMNS);
    const std::vector<float> x = inputs<Weights, T>(a, all);
    const int64_t size = divide_up(PIECE, a.steps * a.width * T * GROUP) * GROUP;
    float *y = static_cast<float *>(a.out);
    share(a.threads, a.m, std::max<int64_t>(size, 2 * GROUP), [&](int64_t first, int64_t stop) {
        Walk<Register> walk(a, all, first, stop);
        while (walk.go()) {
            Floats sums[GROUP / ROWS][T] = {};
            add_blocks<Weights, T>(walk, weights, x.data(), sums);
            for (int64_t t = 0; t < a.tokens; t++)
                for (int i = 0; i < walk.rows; i++) {
                    float total = 0;
                    for (int l = i % ROWS; l < LANES; l += ROWS) total += sums[i / ROWS][t][l];
                    y[t * a.m + walk.row + i] = total;
                }
        }
    });
}

template <class Weights> void multiply_with(TrellisMatvec a, const Weights &weights) {
    for (int64_t left = a.tokens; left > 0; left -= 8) {
        a.tokens = std::min<int64_t>(8, left);
        (a.tokens == 1   ? multiply_tokens<Weights, 1>
         : a.tokens <= 4 ? multiply_tokens<Weights, 4>
                         : multiply_tokens<Weights, 8>)(a, weights);
        a.x += 8 * a.steps * a.width;
        a.out = static_cast<float *>(a.out) + 8 * a.m;
    }
}

template <class Weights, class Number>
void decode_rows(const TrellisMatvec &a, const Weights &weights, Number *W) {
    constexpr int WIDTH = Weights::WIDTH, VECTORS = Weights::VECTORS / 2;  // of a place
    const std::vector<Place> all = places(a, STEPS);
    const int64_t n = a.steps * WIDTH;
    std::vector<float> scales(n + LANES);
    for (int64_t k = 0; k < n; k++) scales[k] = a.scales[k / a.group];
    share(a.threads, a.m, divide_up(PIECE, n * GROUP) * GROUP, [&](int64_t first, int64_t stop) {
        Walk<Register> walk(a, all, first, stop);
        while (walk.go())
            for (size_t p = 0; p < all.size(); p += 2) {
                Block block(walk, p / 2);
                for (int i = 0; i < walk.rows; i++) {
                    typename Weights::Held held;
                    Shorts low, high;
                    block.go(i, low, high);
                    weights.put(held, &low, &high);
                    for (int v = 0; v < 2 * VECTORS; v++) {
                        const Place &place = all[p + v / VECTORS];
                        const int64_t from = v % VECTORS * LANES, left = place.count * WIDTH - from;
                        if (left <= 0) continue;
                        const int64_t k = place.first * WIDTH + from;
                        Number numbers[LANES];
                        put(numbers, weights(held, v) * load(scales.data() + k));
                        std::copy_n(numbers, std::min<int64_t>(LANES, left),
                                    W + (walk.row + i) * n + k);
                    }
                }
            }
    });
}

template <class Weights>
void decode_with(const TrellisMatvec &a, const Weights &weights, int bytes) {
    if (bytes == 4)
        decode_rows(a, weights, static_cast<float *>(a.out));
    else
        decode_rows(a, weights, static_cast<uint16_t *>(a.out));
}

}  // namespace

// W~ [m, n] to `out`, in float32 or bfloat16
extern "C" void decode_trellis(const TrellisMatvec *a, int32_t bytes) {
    if (a->width == 2)
        decode_with(*a, Numbers<2>(a->table, a->state_bits), bytes);
    else
        decode_with(*a, Numbers<1>(a->table, a->state_bits), bytes);
}

extern "C" void multiply_trellis(const TrellisMatvec *given, int32_t) {
    const TrellisMatvec &a = *given;
    const int bits = a.state_bits;
    const uint32_t mask = (1u << bits) - 1;
    switch (a.kind) {
    case MUL1: return multiply_with(a, Mul1(mask));
    case MCG: return multiply_with(a, Halves32{mask, 0xcbac1fed, 0});
    case THREE_INST: return multiply_with(a, Halves32{mask, 89226354, 64248484});
    case ONE_MAD:
        return multiply_with(a, Bytes32{{mask, 34038481, 76625530}, ~0u, 510, 1 / 147.800537f});
    case INT8: return multiply_with(a, Bytes32{{mask, 0xcbac1fed, 0}, 0x3f3f3f3f, 126, 1});
    case TABLE: break;
    }
#ifdef HALVES
    if (a.halves && a.width == 2) return multiply_with(a, Doubles(a.halves, bits));
    if (a.circuits) return multiply_with(a, Circuits(a.circuits));
    if (a.pairs) return multiply_with(a, Pairs(a.bits, a.pairs, bits));
    if (a.halves && a.across == 1) return multiply_with(a, Singles(a.bits, a.halves, bits));
#endif
    if (a.width == 2) return multiply_with(a, Numbers<2>(a.table, bits));
    multiply_with(a, Numbers<1>(a.table, bits));
}
