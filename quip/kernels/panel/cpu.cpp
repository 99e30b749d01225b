// Round the columns of a panel in order, with feedback inside it: the fast form of reference.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../columns.h"

namespace {

constexpr int64_t CHUNK = 32 * ROWS;  // rows whose columns stay in the cache

struct Panel {  // as in cpu.py
    int64_t width, m;
    const float *X, *K, *base;  // [width, m], [width, width], [width, m] or null
    int64_t K_row, K_column;    // strides
    float *eta;                 // [width, m], out
    uint8_t *codes;             // [width, m], out
    float *step;                // strides below; out if there are rhos
    const float *zero;
    int64_t step_column, step_row, zero_column, zero_row;
    const float *rhos;
    int64_t candidates;
    int32_t top, bfloat16;  // bfloat16: round fitted steps to it
};

float sum(Floats lanes) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += lanes[i];
    return total;
}

// clamp(floor(t + 1/2), 0, top): clamped first, since conversion truncates towards 0
inline Ints nearest(Floats t, float top) {
    t += 0.5f;
    t = t > 0 ? t : Floats{};
    t = t < top ? t : top - Floats{};
    return __builtin_convertvector(t, Ints);
}

// A tile of column k from `row` on: codes and errors go out, and errors take the place of x.
void round_tile(const Panel &p, int64_t k, int64_t row, Floats *x) {
    const float *steps = p.step + k * p.step_column, *zeros = p.zero + k * p.zero_column;
    Floats step = all(*steps), zero = all(*zeros);
    for (int v = 0; v < VECTORS; v++, row += LANES) {
        const int64_t left = p.m - row, at = k * p.m + row;
        if (p.step_row) step = load(steps + row, left, 1);
        if (p.zero_row) zero = load(zeros + row, left);
        const Ints q = nearest(x[v] / step + zero, p.top);
        const Floats w_hat = step * (__builtin_convertvector(q, Floats) - zero);
        x[v] = without_padding((p.base ? load(p.base + at, left) : x[v]) - w_hat, left);
        store(p.eta + at, x[v], left);
        store(p.codes + at, __builtin_convertvector(q, Bytes), left);
    }
}

float to_bfloat16(float x) {  // to nearest, ties to even; x is finite and positive
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    std::memcpy(&x, &bits, 4);
    return x;
}

// sum |x - w_hat|^2 over a column. A product by 1 / step moves ties alone, where both are as far.
double squared_error(const Panel &p, const Floats *x, float step, float zero) {
    const float inverse = 1 / step;
    double total = 0;
    for (int64_t row = 0; row < p.m;) {
        Floats squares{};
        for (int v = 0; v < VECTORS; v++, x++, row += LANES) {
            const Ints q = nearest(*x * inverse + zero, p.top);
            Floats e = *x - step * (__builtin_convertvector(q, Floats) - zero);
            e = without_padding(e, p.m - row);
            squares += e * e;
        }
        total += sum(squares);
    }
    return total;
}

// The step rho 2 / top RMS(x) of the rho whose levels are nearest to the column x.
float fitted_step(const Panel &p, const Floats *x, double squares, float zero) {
    const float rms = static_cast<float>(std::sqrt(squares / p.m));
    const float unit = static_cast<float>(2.0 / p.top) * rms;
    float best = 0;
    double least = INFINITY;
    for (int64_t i = 0; i < p.candidates; i++) {
        float step = std::max(p.rhos[i] * unit, 1.17549435e-38f);
        if (p.bfloat16) step = to_bfloat16(step);
        const double error = p.candidates > 1 ? squared_error(p, x, step, zero) : 0;
        if (i == 0 || error < least) least = error, best = step;
    }
    return best;
}

// All columns, on the rows from `start` to `stop`. A step that is fitted needs all rows of its
// column before any of them is rounded.
void round_rows(const Panel &p, int64_t start, int64_t stop) {
    const int64_t tiles = (stop - start + ROWS - 1) / ROWS;
    Columns columns(p.width, p.K, p.K_row, p.K_column, tiles);
    for (int64_t k = 0; k < p.width; k++)
        for (int64_t i = 0, row = start; i < tiles * VECTORS; i++, row += LANES)
            columns.at(k, 0)[i] = load(p.X + k * p.m + row, p.m - row);
    for (int64_t k = 0; k < p.width; k++) {
        double squares = 0;
        for (int64_t tile = 0; tile < tiles; tile++) {
            if (k % COLUMNS == 0) columns.feed_block(k, tile);
            columns.feed(k, tile, k);
            const Floats *x = columns.at(k, tile);
            for (int v = 0; p.candidates && v < VECTORS; v++) squares += sum(x[v] * x[v]);
        }
        if (p.candidates)
            p.step[k * p.step_column] = fitted_step(p, columns.at(k, 0), squares, *p.zero);
        for (int64_t tile = 0; tile < tiles; tile++)
            round_tile(p, k, start + tile * ROWS, columns.at(k, tile));
    }
}

}  // namespace

extern "C" void round_panel(const Panel *p) {
    const int64_t rows = p->candidates ? p->m : CHUNK;
    for (int64_t start = 0; start < p->m; start += rows)
        round_rows(*p, start, std::min(start + rows, p->m));
}
