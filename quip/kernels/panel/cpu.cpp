// Round the columns of a panel in order, with feedback inside it: the fast form of reference.py.
//
// A tile is ROWS rows of a column of W, held in VECTORS registers. COLUMNS columns are brought
// up to date together, so that every load of eta serves COLUMNS products.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2;  // 16 registers
#elif defined(__aarch64__)
constexpr int LANES = 4, VECTORS = 4;
#else
constexpr int LANES = 4, VECTORS = 2;
#endif
constexpr int COLUMNS = 4, ROWS = LANES * VECTORS;
constexpr int64_t CHUNK = 32 * ROWS;  // rows whose columns stay in the cache

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

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

int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

Floats all(float value) { return value - Floats{}; }

// LANES numbers of a column, of which `left` belong to it
Floats load(const float *from, int64_t left, float fill = 0) {
    if (left >= LANES) return *reinterpret_cast<const Unaligned *>(from);
    Floats lanes = all(fill);
    for (int64_t i = 0; i < left; i++) lanes[i] = from[i];
    return lanes;
}

template <class Number, class Lanes> void store(Number *to, const Lanes &lanes, int64_t left) {
    if (left >= LANES)
        std::memcpy(to, &lanes, sizeof lanes);
    else
        for (int64_t i = 0; i < left; i++) to[i] = lanes[i];
}

Floats without_padding(Floats lanes, int64_t left) {
    for (int64_t i = std::max<int64_t>(left, 0); i < LANES; i++) lanes[i] = 0;
    return lanes;
}

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

// The running columns of one panel and, once they are rounded, their errors; padded with 0.
class Columns {
  public:
    Columns(const Panel &p, int64_t stride) : padded(round_up(p.width, COLUMNS)), stride(stride) {
        static thread_local std::vector<Floats> scratch;  // kept: fresh pages are dear
        scratch.resize(padded * stride + padded * padded / LANES + 1);
        x = scratch.data();
        K = reinterpret_cast<float *>(x + padded * stride);
        std::fill(at(p.width, 0), at(padded, 0), Floats{});
        for (int64_t k = 0; k < p.width; k++)
            for (int64_t j = 0; j < k; j++) *feedback(j, k) = p.K[j * p.K_row + k * p.K_column];
    }

    Floats *at(int64_t k, int64_t tile) { return x + k * stride + tile * VECTORS; }

    // x_k += sum_{j < first} K[j, k] eta_j for the COLUMNS columns k from `first` on
    void feed_block(int64_t first, int64_t tile) {
        Floats sums[COLUMNS][VECTORS];
        for (int c = 0; c < COLUMNS; c++)
            for (int v = 0; v < VECTORS; v++) sums[c][v] = at(first + c, tile)[v];
        for (int64_t j = 0; j < first; j++) {
            const Floats *eta = at(j, tile);
            const float *weights = feedback(j, first);
            for (int c = 0; c < COLUMNS; c++)
                for (int v = 0; v < VECTORS; v++) sums[c][v] += weights[c] * eta[v];
        }
        for (int c = 0; c < COLUMNS; c++)
            for (int v = 0; v < VECTORS; v++) at(first + c, tile)[v] = sums[c][v];
    }

    // The same for column k alone, from the columns of its own block
    void feed(int64_t k, int64_t tile) {
        Floats sums[VECTORS];
        for (int v = 0; v < VECTORS; v++) sums[v] = at(k, tile)[v];
        for (int64_t j = k / COLUMNS * COLUMNS; j < k; j++)
            for (int v = 0; v < VECTORS; v++) sums[v] += *feedback(j, k) * at(j, tile)[v];
        for (int v = 0; v < VECTORS; v++) at(k, tile)[v] = sums[v];
    }

  private:
    int64_t padded, stride;
    Floats *x;
    float *K;

    float *feedback(int64_t j, int64_t k) {  // COLUMNS neighbours in k lie side by side
        return K + (k / COLUMNS * padded + j) * COLUMNS + k % COLUMNS;
    }
};

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
    Columns columns(p, (tiles + 1) * VECTORS);  // columns a power of 2 apart would evict each other
    for (int64_t k = 0; k < p.width; k++)
        for (int64_t i = 0, row = start; i < tiles * VECTORS; i++, row += LANES)
            columns.at(k, 0)[i] = load(p.X + k * p.m + row, p.m - row);
    for (int64_t k = 0; k < p.width; k++) {
        double squares = 0;
        for (int64_t tile = 0; tile < tiles; tile++) {
            if (k % COLUMNS == 0) columns.feed_block(k, tile);
            columns.feed(k, tile);
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
