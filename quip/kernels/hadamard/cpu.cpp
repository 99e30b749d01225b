// D Omega x and Omega^T D x on the middle axis of [outer, n, inner]: the fast form of reference.py.
//
// Lanes run along what lies side by side in memory:
//
//   inner > 1   columns: a strip of them is copied into a tile [n, width];
//   inner = 1   rows, in place: K acts on runs of 2^p numbers, which are whole vectors. Shorter
//               ones do not fill a vector: then LANES rows are transposed into a tile.
//
// K takes four rows of its argument at a time. Of their 16 sums +-a +-b +-c +-d, made with 8 + 4
// additions, each output adds the one that K asks for: K / 4 + 3 additions a number, not K.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64, RADIX = 4;  // of a vector; bits of the largest butterfly in registers
#elif defined(__AVX__)
constexpr int BYTES = 32, RADIX = 3;
#else
constexpr int BYTES = 16, RADIX = 3;
#endif
constexpr int FOUR = 4, SIGNS = 16;   // inputs of a group, and how their signs may be
constexpr int COLUMNS = 2, ROWS = 4;  // vectors of a product with K that stay in registers
constexpr int64_t GROUPS = 12;        // whose sums stay in the first cache
constexpr int64_t TILE = 1 << 14;     // bytes of short rows that are taken together
constexpr int64_t STRIP = 1 << 20;    // bytes of columns: fewer wait for pages, more for the cache

template <class T> constexpr int LANES = BYTES / sizeof(T);
template <class T> struct Vectors {
    typedef T Lanes __attribute__((vector_size(BYTES)));
    typedef T Unaligned __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
};
template <class T> using Lanes = typename Vectors<T>::Lanes;
#define INLINE inline __attribute__((always_inline))

struct Plan {  // as in cpu.py
    int64_t n, runs, blocks;  // n = orders[0] ... orders[factors - 1] runs, runs = 2^p
    int64_t factors;          // K is the product of so many matrices, the outermost first
    int64_t orders[3];
    const uint8_t *codes[3];  // [order / 4, order]: bit k of code i is set where K_4i+k is -1
    double scale;             // 1 / sqrt(n)
};

template <class T> struct Call {
    const T *x;               // [outer, n, inner]
    T *y;                     // the same, out
    const T *before, *after;  // signs, [blocks, n] or null; entry o has those of block o % blocks
    int64_t outer, inner;

    static const T *of(const T *signs, const Plan &p, int64_t index) {
        return signs ? signs + index % p.blocks * p.n : nullptr;
    }
};

template <class T> INLINE Lanes<T> load(const T *from) {
    return *reinterpret_cast<const typename Vectors<T>::Unaligned *>(from);
}

template <class T> INLINE void store(T *to, Lanes<T> x) {
    *reinterpret_cast<typename Vectors<T>::Unaligned *>(to) = x;
}

// Lane l is x_(l ^ BIT)
template <int BIT, class V, class Index, size_t... LANE>
INLINE V swapped(V x, Index, std::index_sequence<LANE...>) {
#ifdef __clang__
    return __builtin_shufflevector(x, x, int(LANE ^ BIT)...);
#else
    return __builtin_shuffle(x, Index{(LANE ^ BIT)...});
#endif
}

// S within a vector: butterflies of lanes that differ in BIT, then of those after it
template <class T, int BIT = 1> INLINE Lanes<T> inside(Lanes<T> x) {
    if constexpr (BIT < LANES<T>) {
        typedef decltype(x < x) Index;
        Lanes<T> sign;
        for (int l = 0; l < LANES<T>; l++) sign[l] = l & BIT ? -1 : 1;
        x = swapped<BIT>(x, Index{}, std::make_index_sequence<LANES<T>>()) + sign * x;
        return inside<T, 2 * BIT>(x);
    }
    return x;
}

// BITS bits of S, of vectors `stride` numbers apart; first those within vectors, where INSIDE
template <class T, int BITS, bool INSIDE> void butterflies(T *x, int64_t count, int64_t stride) {
    constexpr int SIZE = 1 << BITS;
    for (int64_t start = 0; start < count; start += SIZE * stride)
        for (int64_t j = start; j < start + stride; j += LANES<T>) {
            Lanes<T> v[SIZE];
#pragma GCC unroll 16
            for (int i = 0; i < SIZE; i++) {
                v[i] = load(x + j + i * stride);
                if (INSIDE) v[i] = inside<T>(v[i]);
            }
#pragma GCC unroll 4
            for (int half = 1; half < SIZE; half *= 2)
#pragma GCC unroll 16
                for (int i = 0; i < SIZE; i++)
                    if (!(i & half)) {
                        const Lanes<T> sum = v[i] + v[i + half];
                        v[i + half] = v[i] - v[i + half];
                        v[i] = sum;
                    }
#pragma GCC unroll 16
            for (int i = 0; i < SIZE; i++) store(x + j + i * stride, v[i]);
        }
}

template <class T, bool INSIDE> void butterflies(int bits, T *x, int64_t count, int64_t stride) {
    switch (bits) {
    case 0: return butterflies<T, 0, INSIDE>(x, count, stride);
    case 1: return butterflies<T, 1, INSIDE>(x, count, stride);
    case 2: return butterflies<T, 2, INSIDE>(x, count, stride);
    case 3: return butterflies<T, 3, INSIDE>(x, count, stride);
    default: return butterflies<T, RADIX, INSIDE>(x, count, stride);
    }
}

// S on the middle axis of [count / runs / inner, runs, inner], in place
template <class T> void sylvester(T *x, int64_t count, int64_t runs, int64_t inner) {
    const bool rows = inner == 1;
    int64_t stride = rows ? LANES<T> : inner;
    int bits = 0;
    while (stride << bits < runs * inner) bits++;
    bool first = rows;
    for (int passes = (bits + RADIX - 1) / RADIX; bits || first; passes--, first = false) {
        const int now = passes ? (bits + passes - 1) / passes : 0;
        first ? butterflies<T, true>(now, x, count, stride)
              : butterflies<T, false>(now, x, count, stride);
        stride <<= now;
        bits -= now;
    }
}

// sums[code] = +-a +-b +-d +-e, where a set bit is a minus
template <class T>
INLINE void all_sums(const T *x, int64_t stride, Lanes<T> (*sums)[COLUMNS], int c) {
    const Lanes<T> a = load(x), b = load(x + stride);
    const Lanes<T> d = load(x + 2 * stride), e = load(x + 3 * stride);
    const Lanes<T> left[] = {a + b, a - b}, right[] = {d + e, d - e};
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < 2; k++) {
            const Lanes<T> plus = left[i] + right[k], minus = left[i] - right[k];
            const int codes = 2 * i + 8 * k, others = 2 * i + 4 + 8 * !k;
            sums[codes][c] = plus;
            sums[SIGNS - 1 - codes][c] = -plus;
            sums[others][c] = minus;
            sums[SIGNS - 1 - others][c] = -minus;
        }
}

// y = K x for WIDTH vectors of columns, whose first entries are at x[c] and y[c]
template <class T, int WIDTH>
void columns(const uint8_t *codes, int64_t order, const T *const *x, T *const *y, int64_t stride) {
    Lanes<T> sums[GROUPS][SIGNS][COLUMNS];
    const int64_t groups = order / FOUR;
    for (int64_t first = 0; first < groups; first += GROUPS) {
        const int64_t now = std::min(GROUPS, groups - first);
        for (int64_t g = 0; g < now; g++)
            for (int c = 0; c < WIDTH; c++)
                all_sums(x[c] + (first + g) * FOUR * stride, stride, sums[g], c);
        for (int64_t i = 0; i < order; i += ROWS) {
            Lanes<T> total[ROWS][WIDTH];
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < WIDTH; c++)
                    total[r][c] = first ? load(y[c] + (i + r) * stride) : Lanes<T>{};
            for (int64_t g = 0; g < now; g++)
                for (int r = 0; r < ROWS; r++) {
                    const Lanes<T> *sum = sums[g][codes[(first + g) * order + i + r]];
                    for (int c = 0; c < WIDTH; c++) total[r][c] += sum[c];
                }
            for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < WIDTH; c++) store(y[c] + (i + r) * stride, total[r][c]);
        }
    }
}

// y = K x on the middle axis of [count / order / run, order, run]
template <class T>
void factor(const uint8_t *codes, int64_t order, const T *x, T *y, int64_t count, int64_t run) {
    const int64_t vectors = count / order / LANES<T>, of_run = run / LANES<T>;
    for (int64_t v = 0; v < vectors;) {
        const T *from[COLUMNS];
        T *to[COLUMNS];
        const int width = v + COLUMNS <= vectors ? COLUMNS : 1;
        for (int c = 0; c < width; c++, v++) {
            const int64_t at = v / of_run * order * run + v % of_run * LANES<T>;
            from[c] = x + at;
            to[c] = y + at;
        }
        (width > 1 ? columns<T, COLUMNS> : columns<T, 1>)(codes, order, from, to, run);
    }
}

// (K x S) on the middle axis of [count / n / inner, n, inner], whose numbers are in `from`; they
// end in `to` if the number of factors is odd and otherwise where they were
template <class T> void transform(const Plan &p, T *from, T *to, int64_t count, int64_t inner) {
    int64_t run = p.n * inner;
    for (int64_t k = 0; k < p.factors; k++, std::swap(from, to)) {
        run /= p.orders[k];
        factor(p.codes[k], p.orders[k], from, to, count, run);
    }
    sylvester(from, count, p.runs, inner);
}

// Fresh pages are dear: kept for the next call
template <class T> T *scratch(int64_t size) {
    static thread_local std::vector<Lanes<T>> kept;
    kept.resize(std::max<size_t>(kept.size(), size / LANES<T> + 1));
    return reinterpret_cast<T *>(kept.data());
}

// y_i = scale signs_i x_i
template <class T>
INLINE void product(const T *x, T *y, int64_t count, const T *signs, T scale) {
    int64_t i = 0;
    for (; i + LANES<T> <= count; i += LANES<T>)
        store<T>(y + i, scale * load(signs + i) * load(x + i));
    for (; i < count; i++) y[i] = scale * signs[i] * x[i];
}

// y = scale x
template <class T> INLINE void product(const T *x, T *y, int64_t count, T scale) {
    int64_t i = 0;
    for (; i + LANES<T> <= count; i += LANES<T>) store<T>(y + i, scale * load(x + i));
    for (; i < count; i++) y[i] = scale * x[i];
}

// y = scale signs x for `count` rows, the first of which is `row`; signs may be null
template <class T>
void scaled(const Plan &p, const T *x, T *y, int64_t row, int64_t count, const T *signs, T scale) {
    if (!signs) return product(x, y, count * p.n, scale);
    for (int64_t r = row; r < row + count; r++, x += p.n, y += p.n)
        product(x, y, p.n, Call<T>::of(signs, p, r), scale);
}

// Rows whose runs are whole vectors, some at a time where they are short
template <class T> void along_rows(const Plan &p, const Call<T> &a) {
    const int64_t rows = std::max<int64_t>(1, TILE / int64_t(sizeof(T)) / p.n);
    T *from = scratch<T>(2 * rows * p.n), *to = from + rows * p.n;
    const T *made = p.factors % 2 ? to : from;
    for (int64_t row = 0; row < a.outer; row += rows) {
        const int64_t count = std::min(rows, a.outer - row);
        scaled(p, a.x + row * p.n, from, row, count, a.before, T(p.scale));
        transform(p, from, to, count * p.n, 1);
        scaled<T>(p, made, a.y + row * p.n, row, count, a.after, 1);
    }
}

// y_i = scale signs_i x_i for the n rows of a strip
template <class T>
void scaled_strip(const Plan &p, const T *x, int64_t x_row, T *y, int64_t y_row, int64_t count,
                  const T *signs, T scale) {
    for (int64_t i = 0; i < p.n; i++, x += x_row, y += y_row)
        product(x, y, count, signs ? scale * signs[i] : scale);
}

// Strips of columns, each as [n, width]
template <class T> void along_columns(const Plan &p, const Call<T> &a) {
    const int64_t fit = STRIP / int64_t(sizeof(T)) / p.n, lanes = LANES<T>;
    const int64_t most = std::min(fit, a.inner + lanes - 1) / lanes * lanes;
    const int64_t width = std::max(lanes, most);
    T *from = scratch<T>(2 * p.n * width), *to = from + p.n * width;
    T *made = p.factors % 2 ? to : from;
    for (int64_t o = 0; o < a.outer; o++)
        for (int64_t column = 0; column < a.inner; column += width) {
            const int64_t count = std::min(width, a.inner - column);
            const int64_t at = o * p.n * a.inner + column;
            const T *before = a.of(a.before, p, o), *after = a.of(a.after, p, o);
            if (count < width) std::fill(from, from + p.n * width, T(0));
            scaled_strip(p, a.x + at, a.inner, from, width, count, before, T(p.scale));
            transform(p, from, to, p.n * width, width);
            scaled_strip<T>(p, made, width, a.y + at, a.inner, count, after, 1);
        }
}

// LANES rows at a time, transposed to [n, LANES]
template <class T> void along_short_rows(const Plan &p, const Call<T> &a) {
    constexpr int64_t width = LANES<T>;
    T *from = scratch<T>(3 * p.n * width), *to = from + p.n * width, *rows = to + p.n * width;
    const T *made = p.factors % 2 ? to : from;
    for (int64_t row = 0; row < a.outer; row += width) {
        const int64_t count = std::min(width, a.outer - row);
        scaled(p, a.x + row * p.n, rows, row, count, a.before, T(p.scale));
        for (int64_t i = 0; i < p.n; i++)
            for (int64_t l = 0; l < width; l++)
                from[i * width + l] = l < count ? rows[l * p.n + i] : 0;
        transform(p, from, to, p.n * width, width);
        for (int64_t l = 0; l < count; l++)
            for (int64_t i = 0; i < p.n; i++) rows[l * p.n + i] = made[i * width + l];
        scaled<T>(p, rows, a.y + row * p.n, row, count, a.after, 1);
    }
}

template <class T> void rotate(const Plan &p, const Call<T> &a) {
    if (a.inner != 1)
        along_columns(p, a);
    else if (p.runs % LANES<T> == 0)
        along_rows(p, a);
    else
        along_short_rows(p, a);
}

}  // namespace

extern "C" void rotate_float(const Plan *p, const float *x, float *y, const float *before,
                             const float *after, int64_t outer, int64_t inner) {
    rotate<float>(*p, {x, y, before, after, outer, inner});
}

extern "C" void rotate_double(const Plan *p, const double *x, double *y, const double *before,
                              const double *after, int64_t outer, int64_t inner) {
    rotate<double>(*p, {x, y, before, after, outer, inner});
}
