// Multiply a few vectors by a matrix of packed lattice codes: the fast form of the product with decoded weights.
//
// A point of E8P is a row of the table of |v| with signs, and +-1/4. The word of four sign bytes
// goes to all lanes, and a shift moves the bit of each lane to where floats have their sign. The
// product with +-1/4 needs no more than the sum of eight x, and is taken by itself.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../threads.h"

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector) && defined(__AVX512F__)
#define TWO_CODES  // in a vector
#endif
#endif

namespace {

#ifdef TWO_CODES
constexpr int LANES = 16, ROWS = 8, SUMS = 16;  // SUMS: how many stay in registers
#else
constexpr int LANES = 8, ROWS = 4, SUMS = 8;
#endif
constexpr int DIM = 8, CODES = LANES / DIM;  // codes in a vector
constexpr int WORD = 4, CHUNK = WORD * LANES;  // codes whose sign bytes make a word, a vector
constexpr int BITS[DIM] = {0, 4, 1, 5, 2, 6, 3, 7};  // of a sign byte, by coordinate
constexpr int64_t PIECE = 1 << 16;  // products that are worth a thread
constexpr uint32_t SIGN = 1u << 31, ONE = 0x3f800000;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float Four __attribute__((vector_size(16)));
typedef float Point __attribute__((vector_size(4 * DIM)));
typedef uint32_t Ints __attribute__((vector_size(4 * LANES)));

enum Stage : int32_t { NONE, E8P, E81B };

struct LatticeMatvec {  // as in cpu.py
    int64_t m, blocks, tokens, row_bytes, group;  // group: blocks that share a scale
    const uint8_t *words;                         // [m, row_bytes]
    const float *x, *scales;                      // [tokens, 8 blocks], [groups]
    const float *magnitudes, *points;             // E8P, E81B: [256, 8]
    float *y;                                     // [tokens, m], out
    float ratio;
    Stage second;
    Threads threads;
};

// What the rows are multiplied with, zeros after the last block: vectors of all T tokens in turn
template <int T>
struct Inputs {
    int64_t padded;           // blocks of `sums`
    std::vector<float> x;     // times the scales
    std::vector<float> sums;  // of each stage, what +1/4 in a block contributes; see add_shifts

    explicit Inputs(const LatticeMatvec &a)
        : padded((a.blocks + CHUNK - 1) / CHUNK * CHUNK),
          x((a.blocks + WORD - 1) / WORD * WORD * DIM * T),
          sums(2 * padded * T) {
        for (int64_t t = 0; t < a.tokens; t++)
            for (int64_t b = 0; b < a.blocks; b++) {
                const float *from = a.x + (t * a.blocks + b) * DIM, scale = a.scales[b / a.group];
                float *to = x.data() + (b / CODES * T + t) * LANES + b % CODES * DIM, sum = 0;
                for (int i = 0; i < DIM; i++) {
                    to[i] = from[i] * scale;
                    sum += to[i];
                }
                const int64_t vector = b / CHUNK * WORD + b % WORD, lane = b % CHUNK / WORD;
                const int64_t at = (vector * T + t) * LANES + lane;
                sums[at] = sum / 4;
                sums[at + padded * T] = sum / 4 / a.ratio;
            }
    }
};

template <typename To>
To load(const void *from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

float total(const Floats &lanes) {
    Four parts[LANES / 4];
    std::memcpy(parts, &lanes, sizeof parts);
    for (int i = 1; i < LANES / 4; i++) parts[0] += parts[i];
    return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

// The rows of a table that CODES bytes name
[[gnu::always_inline]] inline Floats rows_of(const float *table, const uint8_t *bytes,
                                             const int64_t *at) {
#ifdef TWO_CODES
    const auto low = load<Point>(table + DIM * bytes[at[0]]);
    const auto high = load<Point>(table + DIM * bytes[at[1]]);
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    return load<Floats>(table + DIM * bytes[at[0]]);
#endif
}

// What moves, from a word of four sign bytes, the bit of each lane to the top
struct Up {
    Ints of[WORD / CODES];
    Up() {
        for (int c = 0; c < WORD; c++)
            for (int i = 0; i < DIM; i++) of[c / CODES][c % CODES * DIM + i] = 31 - 8 * c - BITS[i];
    }
};

// Adds the products of a row with its +-1/4, which is negative where a sign byte is odd. Keeps the
// bytes, with the sign of coordinate 0 in bit 0, where the file has it XOR that parity.
template <int T>
void add_shifts(const uint8_t *bytes, int64_t blocks, const float *x_sums, uint8_t *signs,
                Floats *sums) {
    Floats now[T];
    std::memcpy(now, sums, sizeof now);
    for (int64_t b = 0; b < blocks; b += CHUNK) {
        uint8_t chunk[CHUNK] = {};
        const bool inside = b + CHUNK <= 2 * blocks;  // as many bytes of magnitudes follow
        if (!inside) std::memcpy(chunk, bytes + b, blocks - b);
        const Ints given = load<Ints>(inside ? bytes + b : chunk);
        Ints odd = given ^ given >> 4;
        odd ^= odd >> 2;
        odd = (odd ^ odd >> 1) & 0x01010101;
        const Ints fixed = given ^ odd;
        std::memcpy(signs + b, &fixed, sizeof fixed);
        for (int i = 0; i < WORD; i++, x_sums += T * LANES) {  // byte i of all words
            const Floats one = (Floats)((odd << (31 - 8 * i) & SIGN) | ONE);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) now[t] += one * load<Floats>(x_sums + t * LANES);
        }
    }
    std::memcpy(sums, now, sizeof now);
}

// CODES points without their shifts: code c of the word at b and those after it, whose
// magnitudes are at[c] ...
template <Stage second>
[[gnu::always_inline]] inline Floats points_of(const LatticeMatvec &a, const uint8_t *row,
                                               const uint8_t *signs, const uint8_t *more_signs,
                                               const int64_t *at, int64_t b, int c, const Up &up) {
    const auto e8p = [&](const uint8_t *bytes, const uint8_t *word) __attribute__((always_inline)) {
        const Ints bits = Ints{} + load<uint32_t>(word + b);
        const Ints v = (Ints)rows_of(a.magnitudes, bytes, at + c);
        return (Floats)(v ^ (bits << up.of[c / CODES] & SIGN));
    };
    const int64_t k = a.blocks;
    Floats q = e8p(row + k, signs);
    if (second == E8P) q += 1 / a.ratio * e8p(row + 3 * k, more_signs);
    if (second == E81B) q += 1 / a.ratio * rows_of(a.points, row + 2 * k, at + c);
    return q;
}

// y of R rows and T tokens
template <Stage second, int T, int R>
void multiply_rows(const LatticeMatvec &a, const Inputs<T> &in, int64_t r, uint8_t *signs,
                   float *y) {
    const int64_t k = a.blocks, padded = in.padded;
    const uint8_t *rows[R];
    Floats shifted[R][T] = {}, sums[R][T];  // two, so that the compiler keeps sums in registers
    for (int i = 0; i < R; i++) {
        rows[i] = a.words + std::min(r + i, a.m - 1) * a.row_bytes;
        const float *x_sums = in.sums.data();
        uint8_t *to = signs + 2 * i * padded;
        add_shifts<T>(rows[i], k, x_sums, to, shifted[i]);
        if (second == E8P)
            add_shifts<T>(rows[i] + 2 * k, k, x_sums + padded * T, to + padded, shifted[i]);
    }
    const Up up;
    const auto step = [&](int64_t b, const int64_t *at) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int c = 0; c < WORD; c += CODES) {
            Floats q[R];
#pragma GCC unroll 8
            for (int i = 0; i < R; i++) {
                const uint8_t *kept = signs + 2 * i * padded;
                q[i] = points_of<second>(a, rows[i], kept, kept + padded, at, b, c, up);
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const auto x = load<Floats>(in.x.data() + (b + c) * DIM * T + t * LANES);
#pragma GCC unroll 8
                for (int i = 0; i < R; i++) sums[i][t] += q[i] * x;
            }
        }
    };
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sums[i][t] = shifted[i][t];
    int64_t b = 0;
    for (; b + WORD <= k; b += WORD) {
        const int64_t at[WORD] = {b, b + 1, b + 2, b + 3};
        step(b, at);
    }
    if (b < k) {  // x is 0 after the last block, which may stand for those
        const int64_t last = k - 1;
        const int64_t at[WORD] = {b, std::min(b + 1, last), std::min(b + 2, last), last};
        step(b, at);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) y[t * R + i] = total(sums[i][t]);
}

template <Stage second, int T>
void multiply_tokens(const LatticeMatvec &a) {
    constexpr int R = std::min(ROWS, std::max(1, SUMS / T));
    const Inputs<T> in(a);
    const int64_t rows = (PIECE / (DIM * a.blocks * T * R) + 1) * R;
    share(a.threads, a.m, rows, [&](int64_t first, int64_t stop) {
        std::vector<uint8_t> signs(2 * R * in.padded);
        float y[T * R];
        for (int64_t r = first; r < stop; r += R) {
            multiply_rows<second, T, R>(a, in, r, signs.data(), y);
            for (int64_t t = 0; t < a.tokens; t++)
                for (int i = 0; i < R && r + i < stop; i++) a.y[t * a.m + r + i] = y[t * R + i];
        }
    });
}

template <Stage second>
void multiply_stages(LatticeMatvec a) {
    for (int64_t left = a.tokens; left > 0; left -= 8) {
        a.tokens = std::min<int64_t>(8, left);
        (a.tokens == 1   ? multiply_tokens<second, 1>
         : a.tokens == 2 ? multiply_tokens<second, 2>
         : a.tokens <= 4 ? multiply_tokens<second, 4>
                         : multiply_tokens<second, 8>)(a);
        a.x += 8 * DIM * a.blocks;
        a.y += 8 * a.m;
    }
}

}  // namespace

extern "C" void multiply_lattice(const LatticeMatvec *a) {
    (a->second == NONE  ? multiply_stages<NONE>
     : a->second == E8P ? multiply_stages<E8P>
                        : multiply_stages<E81B>)(*a);
}
