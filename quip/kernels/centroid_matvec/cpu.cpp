// Multiply a few vectors by a packed matrix of learned codebooks: the fast form of the product with
// decoded weights.
//
// Columns that share a codebook and a scale are a run. Codebooks of a few numbers or pairs stay in
// registers, where a permutation looks up a vector of codes: pairs are taken apart, and x is
// brought into the order of the weights once. Centroids of larger codebooks are loaded one by one
// from the cache.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../threads.h"
#include "../unpack.h"

#if defined(__AVX2__) && !defined(__clang__)
#define PERMUTED  // codebooks in registers
#endif
#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define JOINED  // vectors, without a way through memory
#endif
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, SUMS = 16;  // SUMS: how many stay in registers
#else
constexpr int LANES = 8, SUMS = 8;
#endif
constexpr int PERMUTED_ROWS = 8, COPIED_ROWS = 4;  // at once, at most
constexpr int64_t PIECE = 1 << 16;                 // products that are worth a thread
constexpr int SPARE = 64;                          // bytes after the codes of a row: vectors reach beyond its end

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float Two __attribute__((vector_size(8)));
typedef float Four __attribute__((vector_size(16)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Sixteen __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

struct CentroidMatvec {  // as in cpu.py; columns are counted in codes
    int64_t m, n, tokens, row_bytes;
    int64_t columns, row_groups, block, dim;  // of a codebook; of a scale
    const uint8_t *words;                     // [m, row_bytes]
    const float *x;                           // [tokens, dim n]
    const float *centroids;                   // [column groups, row groups, 2^bits, dim]
    const float *scales;                      // [m, blocks]; null: all are 1
    float *y;                                 // [tokens, m], out
    int32_t bits;
    Threads threads;

    int64_t row_group(int64_t row) const {
        const int64_t size = m / row_groups, more = m % row_groups, longer = more * (size + 1);
        return row < longer ? row / (size + 1) : more + (row - longer) / size;
    }
};

struct Run {
    int64_t start, codes, column_group, block;
    int64_t steps, x;  // of HELD x PLANES vectors, and where the inputs of the first one are
};

// What the rows are multiplied with, in the order in which `Weights` has those of a run: zeros
// after the last one, and vectors of all T tokens in turn.
template <int T, typename Weights>
struct Inputs {
    std::vector<Run> runs;
    std::vector<float> x;

    explicit Inputs(const CentroidMatvec &a) {
        constexpr int PLANES = Weights::PLANES, HELD = Weights::HELD;
        int64_t size = 0;
        for (int64_t start = 0; start < a.n;) {
            const int64_t group = start / a.columns, block = start / a.block;
            const int64_t end = std::min({a.n, (group + 1) * a.columns, (block + 1) * a.block});
            const int64_t codes = end - start, numbers = codes * (a.dim / PLANES);
            const int64_t steps = (numbers + HELD * LANES - 1) / (HELD * LANES);
            runs.push_back({start, codes, group, block, steps, size});
            size += steps * HELD * PLANES * T * LANES;
            start = end;
        }
        x.resize(size);
        for (const Run &run : runs)
            for (int64_t t = 0; t < a.tokens; t++) {
                const float *from = a.x + (t * a.n + run.start) * a.dim;
                for (int64_t i = 0; i < run.codes * a.dim; i++) {
                    const int64_t number = i / PLANES, step = number / (HELD * LANES);
                    const int64_t lane = number % (HELD * LANES) / HELD;
                    const int64_t vector = (step * HELD + number % HELD) * PLANES + i % PLANES;
                    x[run.x + (vector * T + t) * LANES + lane] = from[i];
                }
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

// What a row is in a run: codes, whose bits from the ninth on are in `high` if there are any
struct Row {
    const uint8_t *low, *high;
    const float *codebook;
    float scale;
};

// sums += scale w x of a run, for the weights of R rows and T tokens
template <int R, int T, typename Weights>
[[gnu::always_inline]] inline void add_products(const Row *given, const float *x, int64_t steps,
                                                Floats *sums) {
    Weights rows[R];
    for (int r = 0; r < R; r++) rows[r].set(given[r]);
    Floats now[R][T] = {};
    for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 8
        for (int i = 0; i < Weights::HELD * Weights::PLANES; i++, x += T * LANES) {
            Floats w[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) w[r] = rows[r].weights(step, i);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const auto one = load<Floats>(x + t * LANES);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) now[r][t] += w[r] * one;
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sums[r * T + t] += given[r].scale * now[r][t];
}

#ifdef PERMUTED
// Codes of a row that are looked up in a codebook of K points of D numbers. A word holds four, and
// a permutation reads no more of its lanes than the lowest bits.
template <int K, int D>
struct Permuted {
    static constexpr int PLANES = D, HELD = 4, PARTS = (K + LANES - 1) / LANES;
    static_assert(PARTS <= 4);
    Floats table[D][PARTS];
    const uint8_t *from;

    void set(const Row &row) {
        from = row.low;
        Floats raw[D * PARTS] = {};
        std::memcpy(raw, row.codebook, sizeof(float) * K * D);
        for (int plane = 0; plane < D; plane++)
            for (int part = 0; part < PARTS; part++)
                table[plane][part] = D == 1 ? raw[part] : every_other(raw + D * part, plane);
    }

    static Floats every_other(const Floats *pair, int first) {
        Ints at;
        for (int i = 0; i < LANES; i++) at[i] = 2 * i + first;
        return __builtin_shuffle(pair[0], pair[1], at);
    }

    Floats weights(int64_t step, int i) const {
        const Ints codes = load<Ints>(from + step * HELD * LANES) >> (8 * (i / PLANES));
        const Floats *parts = table[i % PLANES];
        if constexpr (PARTS == 1) return __builtin_shuffle(parts[0], codes);
        const Floats low = __builtin_shuffle(parts[0], parts[1], codes);
        if constexpr (PARTS == 2) return low;
        const Floats high = __builtin_shuffle(parts[2], parts[3], codes);
        return (codes & 2 * LANES) != 0 ? high : low;
    }
};
#endif

// Vectors of half the width side by side
#ifdef JOINED
Four join(Two low, Two high) { return __builtin_shufflevector(low, high, 0, 1, 2, 3); }
Eight join(Four low, Four high) {
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
}
[[maybe_unused]] Sixteen join(Eight low, Eight high) {
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#else
template <typename To, typename Half>
To join_halves(Half low, Half high) {
    To to;
    std::memcpy(&to, &low, sizeof low);
    std::memcpy(reinterpret_cast<char *>(&to) + sizeof low, &high, sizeof high);
    return to;
}
Four join(Two low, Two high) { return join_halves<Four>(low, high); }
Eight join(Four low, Four high) { return join_halves<Eight>(low, high); }
[[maybe_unused]] Sixteen join(Eight low, Eight high) { return join_halves<Sixteen>(low, high); }
#endif

// N weights, from centroids of D numbers
template <int N, int D, typename From>
[[gnu::always_inline]] inline auto join_centroids(const From &from, int first) {
    if constexpr (N == D) {
        return load<std::conditional_t<D == 4, Four, Two>>(from(first));
    } else {
        const auto low = join_centroids<N / 2, D>(from, first);
        return join(low, join_centroids<N / 2, D>(from, first + N / 2 / D));
    }
}

// Codes of a row whose centroids of D numbers are copied from the codebook
template <int D, bool WIDE>
struct Copied {
    static constexpr int PLANES = 1, HELD = 1, CODES = LANES / D;
    Row row;

    void set(const Row &given) { row = given; }

    Floats weights(int64_t step, int) const {
        const int64_t first = step * CODES;
        const auto from = [&](int i) __attribute__((always_inline)) {
            const int code = row.low[first + i] | (WIDE ? row.high[first + i] << 8 : 0);
            return row.codebook + D * code;
        };
        if constexpr (D == 1) {
            Floats to;
            for (int i = 0; i < LANES; i++) to[i] = *from(i);
            return to;
        } else {
            return join_centroids<LANES, D>(from, 0);
        }
    }
};

// y, the weights of R rows at once in the form `Weights`
template <int T, int R, typename Weights>
void multiply_rows(const CentroidMatvec &a) {
    const Inputs<T, Weights> in(a);
    const int64_t pitch = a.n + SPARE, blocks = (a.n + a.block - 1) / a.block;
    const bool wide = a.bits > 8;
    const int64_t together = (PIECE / (a.n * a.dim * T * R) + 1) * R;
    share(a.threads, a.m, together, [&](int64_t begin, int64_t stop) {
        std::vector<uint8_t> low(R * pitch), high(wide ? R * pitch : 0);
        for (int64_t first = begin; first < stop; first += R) {
            int64_t numbers[R], groups[R];
            for (int i = 0; i < R; i++) {
                numbers[i] = std::min(first + i, a.m - 1);
                groups[i] = a.row_group(numbers[i]);
                const uint8_t *row = a.words + numbers[i] * a.row_bytes;
                unpack(row, std::min(a.bits, 8), a.n, low.data() + i * pitch);
                if (wide) unpack(row + a.n, a.bits - 8, a.n, high.data() + i * pitch);
            }
            Floats sums[R * T] = {};
            for (const Run &run : in.runs) {
                Row rows[R];
                for (int i = 0; i < R; i++) {
                    const int64_t at = i * pitch + run.start;
                    const int64_t tile = run.column_group * a.row_groups + groups[i];
                    rows[i] = {low.data() + at, wide ? high.data() + at : nullptr,
                               a.centroids + (tile * a.dim << a.bits),
                               a.scales ? a.scales[numbers[i] * blocks + run.block] : 1};
                }
                add_products<R, T, Weights>(rows, in.x.data() + run.x, run.steps, sums);
            }
            for (int64_t t = 0; t < a.tokens; t++)
                for (int i = 0; i < R && first + i < stop; i++)
                    a.y[t * a.m + first + i] = total(sums[i * T + t]);
        }
    });
}

#ifdef PERMUTED
template <int T, int K, int D>
void multiply_permuted(const CentroidMatvec &a) {
    constexpr int MOST = K * D > 64 ? 1 : K * D > 16 ? 4 : PERMUTED_ROWS;  // tables stay in registers
    multiply_rows<T, std::min(MOST, SUMS / T), Permuted<K, D>>(a);
}
#endif

template <int T, int D>
void multiply_copied(const CentroidMatvec &a) {
    constexpr int R = std::min(COPIED_ROWS, SUMS / T);
    (a.bits > 8 ? multiply_rows<T, R, Copied<D, true>> : multiply_rows<T, R, Copied<D, false>>)(a);
}

template <int T>
void multiply_tokens(const CentroidMatvec &a) {
#ifdef PERMUTED
    const int64_t form = 10 * a.bits + a.dim;
    if (form == 11) return multiply_permuted<T, 2, 1>(a);
    if (form == 21) return multiply_permuted<T, 4, 1>(a);
    if (form == 31) return multiply_permuted<T, 8, 1>(a);
    if (form == 41) return multiply_permuted<T, 16, 1>(a);
    if (form == 22) return multiply_permuted<T, 4, 2>(a);
    if (form == 42) return multiply_permuted<T, 16, 2>(a);
    if constexpr (LANES == 16) {
        if (form == 62) return multiply_permuted<T, 64, 2>(a);
    }
#endif
    (a.dim == 1   ? multiply_copied<T, 1>
     : a.dim == 2 ? multiply_copied<T, 2>
                  : multiply_copied<T, 4>)(a);
}

}  // namespace

extern "C" void multiply_centroids(const CentroidMatvec *given) {
    CentroidMatvec a = *given;
    for (int64_t left = a.tokens; left > 0; left -= 8) {
        a.tokens = std::min<int64_t>(8, left);
        (a.tokens == 1   ? multiply_tokens<1>
         : a.tokens == 2 ? multiply_tokens<2>
         : a.tokens <= 4 ? multiply_tokens<4>
                         : multiply_tokens<8>)(a);
        a.x += 8 * a.dim * a.n;
        a.y += 8 * a.m;
    }
}
