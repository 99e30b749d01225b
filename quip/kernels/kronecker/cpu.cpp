// P' (left (x) right^T) P x, one vector after the other: the fast form of reference.py.
//
// Lanes run along the q columns of X and of `right`, whose rows are padded with zeros to whole
// vectors. A tile of the products, ROWS rows of VECTORS vectors, stays in registers.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../lanes.h"
#include "../threads.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 8, WIDTH = 2;  // of a tile in registers, in rows and vectors
#else
constexpr int ROWS = 4, WIDTH = 2;
#endif
constexpr int TOGETHER = 4;          // vectors that are permuted by one reading of the indices
constexpr int64_t PIECE = 1 << 18;  // products that are worth a thread

struct Rotation {  // as in cpu.py
    int64_t p, q, count;
    const float *left, *right;    // [p, p], [q, q]
    const int32_t *first, *last;  // [p q]; null leaves the order as it is
    const float *x;               // [count, p q]
    float *y;                     // the same, out
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
        for (int v = 0; v < V; v++) store(C + r * B_row + v * LANES, sums[r][v], LANES);
}

// C = A B, the rows of B and C padded to `row` numbers, whole vectors
void multiply(const float *A, int64_t A_row, const float *B, float *C, int64_t row, int64_t rows,
              int64_t inner) {
    for (int64_t r = 0; r < rows; r += ROWS)
        for (int64_t j = 0; j < row; j += WIDTH * LANES)
            (row - j < WIDTH * LANES ? multiply_rows<1> : multiply_rows<WIDTH>)(
                A + r * A_row, A_row, B + j, C + r * row + j, row, inner, rows - r);
}

// T vectors, one `to_pitch` or `from_pitch` after the other: to_i = from_(order_i)
template <int T>
void permute(const int32_t *order, int64_t n, const float *from, int64_t from_pitch, float *to,
             int64_t to_pitch) {
    for (int64_t i = 0; i < n; i++)
        for (int t = 0; t < T; t++) to[t * to_pitch + i] = from[t * from_pitch + order[i]];
}

// `rows` rows of q numbers, at another distance from each other
void spread(const float *from, int64_t from_row, float *to, int64_t to_row, int64_t rows, int64_t q) {
    for (int64_t i = 0; i < rows; i++) std::copy_n(from + i * from_row, q, to + i * to_row);
}

// T vectors, by the matrix `right` with padded rows
template <int T> void rotate(const Rotation &a, int64_t token, const float *right, int64_t row) {
    const int64_t p = a.p, q = a.q, n = p * q, size = p * row;
    static thread_local std::vector<float> scratch;  // kept: fresh pages are dear
    scratch.resize(2 * T * size);
    float *X = scratch.data(), *Y = X + T * size, *y = a.y + token * n;
    const float *x = a.x + token * n;
    if (q < row) std::fill(X, X + T * size, 0.0f);
    for (int64_t i = 0; a.first && i < p; i++)
        permute<T>(a.first + i * q, q, x, n, X + i * row, size);
    if (!a.first) spread(x, q, X, row, T * p, q);
    for (int t = 0; t < T; t++) multiply(a.left, p, X + t * size, Y + t * size, row, p, p);
    multiply(Y, row, right, X, row, T * p, q);
    if (!a.last) return spread(X, row, y, q, T * p, q);
    if (q < row) spread(X, row, Y, q, T * p, q);
    permute<T>(a.last, n, q < row ? Y : X, n, y, n);
}

}  // namespace

extern "C" void rotate_kronecker(const Rotation *given) {
    const Rotation &a = *given;
    const int64_t q = a.q, row = divide_up(q, LANES) * LANES;
    std::vector<float> padded(q < row ? q * row : 0);
    if (q < row) spread(a.right, q, padded.data(), row, q, q);
    const float *right = q < row ? padded.data() : a.right;
    const int64_t cost = a.p * q * (a.p + q) * TOGETHER;
    share(a.threads, a.count, divide_up(PIECE, cost) * TOGETHER, [&](int64_t token, int64_t end) {
        for (; token + TOGETHER <= end; token += TOGETHER) rotate<TOGETHER>(a, token, right, row);
        for (; token < end; token++) rotate<1>(a, token, right, row);
    });
}
