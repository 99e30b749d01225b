// P' (left (x) right^T) P x, one vector after the other: the fast form of reference.py.
//
// Lanes run along the q columns of X and of `right`, whose rows are padded with zeros to whole
// vectors. A tile of the products, ROWS rows of VECTORS vectors, stays in registers.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../lanes.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 8, WIDTH = 2;  // of a tile in registers, in rows and vectors
#else
constexpr int ROWS = 4, WIDTH = 2;
#endif

struct Rotation {  // as in cpu.py
    int64_t p, q, count;
    const float *left, *right;    // [p, p], [q, q]
    const int32_t *first, *last;  // [p q]; null leaves the order as it is
    const float *x;               // [count, p q]
    float *y;                     // the same, out
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

}  // namespace

extern "C" void rotate_kronecker(const Rotation *given) {
    const Rotation &a = *given;
    const int64_t p = a.p, q = a.q, n = p * q, row = divide_up(q, LANES) * LANES;
    static thread_local std::vector<float> scratch;  // kept: fresh pages are dear
    scratch.resize((2 * p + q) * row + n);
    float *X = scratch.data(), *Y = X + p * row, *right = Y + p * row, *flat = right + q * row;
    std::fill(X, right + q * row, 0.0f);
    for (int64_t k = 0; k < q; k++) std::copy_n(a.right + k * q, q, right + k * row);
    for (int64_t t = 0; t < a.count; t++) {
        const float *x = a.x + t * n;
        float *y = a.y + t * n;
        for (int64_t i = 0; i < p; i++)
            for (int64_t j = 0; j < q; j++) X[i * row + j] = x[a.first ? a.first[i * q + j] : i * q + j];
        multiply(a.left, p, X, Y, row, p, p);
        multiply(Y, row, right, X, row, p, q);
        float *to = a.last ? flat : y;
        for (int64_t i = 0; i < p; i++) std::copy_n(X + i * row, q, to + i * q);
        if (a.last)
            for (int64_t i = 0; i < n; i++) y[i] = flat[a.last[i]];
    }
}
