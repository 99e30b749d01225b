// diag(after) P' (left (x) right^T) P diag(before) x: the fast form of reference.py and operations.py.
//
//   few vectors    one after the other: lanes run along the q columns of X and of `right`, whose
//                  rows are padded with zeros to whole vectors;
//   many           LANES at a time, transposed to [n, LANES], so that permutations move vectors.
//
// A tile of a product, ROWS rows of WIDTH vectors, stays in registers.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "../lanes.h"
#include "../threads.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 8, WIDTH = 2;  // of a tile in registers, in rows and vectors
#else
constexpr int ROWS = 4, WIDTH = 2;
#endif
constexpr int64_t PIECE = 1 << 18;  // products that are worth a thread

struct Rotation {  // as in cpu.py
    int64_t p, q, count;
    const float *left, *right;    // [p, p], [q, q]
    const int32_t *first, *last;  // [p q]; null leaves the order as it is
    const float *before, *after;  // [p q]; null for factors of 1
    const void *x;                // [count, p q]
    void *y;                      // the same, out
    int32_t x_bytes, y_bytes;     // of a number: 4 of float32, 2 of bfloat16
    Threads threads;
};

// C = A B for ROWS rows of A, fewer at the end, and V vectors of the columns of B
template <int V>
void multiply_rows(const float *A, int64_t A_row, const float *B, float *C, int64_t B_row,
                   int64_t inner, int64_t rows) {
    const float *a[ROWS];
    for (int r = 0; r < ROWS; r++) a[r] = A + std::min<int64_t>(r, rows - 1) * A_row;
    Floats sums[ROWS][V] = {};
    for (int64_t k = 0; k < inner; k++) {
        Floats b[V];
        for (int v = 0; v < V; v++) b[v] = load(B + k * B_row + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < V; v++) sums[r][v] += a[r][k] * b[v];
    }
    for (int64_t r = 0; r < rows && r < ROWS; r++)
        for (int v = 0; v < V; v++) put(C + r * B_row + v * LANES, sums[r][v]);
}

// C = A B, the rows of B and C of `row` numbers, whole vectors
void multiply(const float *A, int64_t A_row, const float *B, float *C, int64_t row, int64_t rows,
              int64_t inner) {
    for (int64_t j = 0; j < row; j += WIDTH * LANES)
        for (int64_t r = 0; r < rows; r += ROWS)
            (row - j < WIDTH * LANES ? multiply_rows<1> : multiply_rows<WIDTH>)(
                A + r * A_row, A_row, B + j, C + r * row + j, row, inner, rows - r);
}

// Fresh pages are dear: kept for the next call
float *scratch(int64_t size) {
    static thread_local std::vector<Floats> kept;
    kept.resize(std::max<size_t>(kept.size(), size / LANES + 1));
    return reinterpret_cast<float *>(kept.data());
}

float number(float x) { return x; }

float number(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

void set(float *to, float x) { *to = x; }
void set(uint16_t *to, float x) { *to = rounded(all(x))[0]; }

// `rows` rows of q numbers, at another distance from each other
void spread(const float *from, int64_t from_row, float *to, int64_t to_row, int64_t rows, int64_t q) {
    for (int64_t i = 0; i < rows; i++) std::copy_n(from + i * from_row, q, to + i * to_row);
}

// to_i = factors_i from_i, n of them
template <class In, class Out>
void scale(const In *from, const float *factors, int64_t n, Out *to) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Floats x = load(from + i);
        put(to + i, factors ? load(factors + i) * x : x);
    }
    for (; i < n; i++) set(to + i, factors ? factors[i] * number(from[i]) : number(from[i]));
}

// One vector, with the rows of `right` padded to `row` numbers
template <class In, class Out>
void rotate_one(const Rotation &a, const In *x, Out *y, const float *right, int64_t row) {
    const int64_t p = a.p, q = a.q, n = p * q;
    float *X = scratch(2 * p * row + n), *Y = X + p * row, *plain = Y + p * row;
    scale(x, a.before, n, plain);
    if (q < row) std::fill(X, X + p * row, 0.0f);
    if (!a.first) spread(plain, q, X, row, p, q);
    for (int64_t i = 0; a.first && i < p; i++)
        for (int64_t j = 0; j < q; j++) X[i * row + j] = plain[a.first[i * q + j]];
    multiply(a.left, p, X, Y, row, p, p);
    multiply(Y, row, right, X, row, p, q);
    spread(X, row, Y, q, p, q);
    for (int64_t i = 0; a.last && i < n; i++) plain[i] = Y[a.last[i]];
    scale(a.last ? plain : Y, a.after, n, y);
}

// Lane l of the result is lane FROM_l of a and b, one after the other
template <size_t... FROM>
[[gnu::always_inline]] inline Floats picked(Floats a, Floats b, std::index_sequence<FROM...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, int(FROM)...);
#else
    return __builtin_shuffle(a, b, Ints{int(FROM)...});
#endif
}

// Lanes whose number has the bit HALF come from b, or those that have it not from a
template <int HALF, size_t... LANE>
[[gnu::always_inline]] inline void exchange(Floats &a, Floats &b, std::index_sequence<LANE...>) {
    const Floats low = picked(
        a, b, std::index_sequence<(LANE & HALF ? LANES + LANE - HALF : LANE)...>());
    b = picked(a, b, std::index_sequence<(LANE & HALF ? LANES + LANE : LANE + HALF)...>());
    a = low;
}

// Lane j of vector i becomes lane i of vector j
template <int HALF = LANES / 2> [[gnu::always_inline]] inline void transpose(Floats *v) {
    if constexpr (HALF > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & HALF)) exchange<HALF>(v[i], v[i + HALF], std::make_index_sequence<LANES>());
        transpose<HALF / 2>(v);
    }
}

// `count` vectors of n numbers to [n, LANES]; the last one stands for those that are missing
template <class In>
void gather(const In *x, const float *factors, int64_t n, int64_t count, float *to) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Floats v[LANES];
        for (int l = 0; l < LANES; l++) v[l] = load(x + std::min<int64_t>(l, count - 1) * n + i);
        transpose(v);
        for (int l = 0; l < LANES; l++)
            put(to + (i + l) * LANES, factors ? factors[i + l] * v[l] : v[l]);
    }
    for (; i < n; i++)
        for (int l = 0; l < LANES; l++)
            to[i * LANES + l] =
                (factors ? factors[i] : 1) * number(x[std::min<int64_t>(l, count - 1) * n + i]);
}

template <class Out>
void scatter(const float *from, const float *factors, int64_t n, int64_t count, Out *y) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Floats v[LANES];
        for (int l = 0; l < LANES; l++) {
            v[l] = load(from + (i + l) * LANES);
            if (factors) v[l] *= factors[i + l];
        }
        transpose(v);
        for (int l = 0; l < LANES && l < count; l++) put(y + l * n + i, v[l]);
    }
    for (; i < n; i++)
        for (int64_t l = 0; l < LANES && l < count; l++)
            set(y + l * n + i, (factors ? factors[i] : 1) * from[i * LANES + l]);
}

void permute(const int32_t *order, int64_t n, const float *from, float *to) {
    for (int64_t i = 0; i < n; i++) put(to + i * LANES, load(from + order[i] * LANES));
}

// LANES vectors at most, by right^T
template <class In, class Out>
void rotate_many(const Rotation &a, const In *x, Out *y, int64_t count, const float *right) {
    const int64_t p = a.p, q = a.q, n = p * q, row = q * LANES;
    float *X = scratch(2 * n * LANES), *Y = X + n * LANES;
    gather(x, a.before, n, count, a.first ? Y : X);
    if (a.first) permute(a.first, n, Y, X);
    multiply(a.left, p, X, Y, row, p, p);
    for (int64_t i = 0; i < p; i++) multiply(right, q, Y + i * row, X + i * row, LANES, q, q);
    if (a.last) permute(a.last, n, X, Y);
    scatter(a.last ? Y : X, a.after, n, count, y);
}

template <class In, class Out> void rotate(const Rotation &a) {
    const In *x = static_cast<const In *>(a.x);
    Out *y = static_cast<Out *>(a.y);
    const int64_t q = a.q, n = a.p * q;
    if (a.count < LANES / 2) {
        const int64_t row = divide_up(q, LANES) * LANES;
        std::vector<float> padded(q < row ? q * row : 0);
        if (q < row) spread(a.right, q, padded.data(), row, q, q);
        const float *right = q < row ? padded.data() : a.right;
        for (int64_t t = 0; t < a.count; t++) rotate_one(a, x + t * n, y + t * n, right, row);
        return;
    }
    std::vector<float> turned(q * q);
    for (int64_t i = 0; i < q; i++)
        for (int64_t j = 0; j < q; j++) turned[j * q + i] = a.right[i * q + j];
    const int64_t size = divide_up(PIECE, n * (a.p + q) * LANES) * LANES;
    share(a.threads, a.count, size, [&](int64_t t, int64_t end) {
        for (; t < end; t += LANES)
            rotate_many(a, x + t * n, y + t * n, std::min<int64_t>(LANES, end - t), turned.data());
    });
}

}  // namespace

extern "C" void rotate_kronecker(const Rotation *a) {
    if (a->x_bytes == 4)
        (a->y_bytes == 4 ? rotate<float, float> : rotate<float, uint16_t>)(*a);
    else
        (a->y_bytes == 4 ? rotate<uint16_t, float> : rotate<uint16_t, uint16_t>)(*a);
}
