// Round the columns of a panel to learned centroids, d at a time, with feedback inside it.
//
// Rows know nothing of each other. A chunk of them has its running columns in the cache: rows of
// one group where groups fill tiles (`Shared`), else any rows, with a table for each register.

#pragma once

#include "../columns.h"
#include "nearest.h"

namespace {

struct Panel {  // as in cpu.py
    int64_t n, m, groups, k, block;  // `block` columns share a scale
    const float *X, *K, *base, *scales;  // [n, m], [n, n], [n, m] or null, [n / block, m] or null
    const float *h, *centroids;          // [n], [groups, k, d]
    const void *kept;                    // [n / d, m] codes as those that go out, or null
    const float *metrics;                // [n / d, d, d], if there are kept ones
    int64_t K_row, K_column;             // strides
    float *eta;                          // [n, m], out
    void *codes;                         // [n / d, m], uint8 or int32, out
    int32_t dim, wide;
};

template <int D, template <int> class Finder> class Rounder {
  public:
    explicit Rounder(const Panel &p)
        : p(p), groups{p.m, p.groups}, books(groups, p.k, p.centroids, D) {}

    void round() {
        for (int64_t start = 0; start < p.m;) {
            int64_t stop = std::min(start + (SHARED ? 32 : 8) * ROWS, p.m);
            if (SHARED) stop = std::min(stop, groups.start(groups.of(start) + 1));
            round_rows(start, stop);
            start = stop;
        }
    }

  private:
    static constexpr int TOGETHER = Finder<D>::MOST;  // registers of rows that are rounded at once
    static constexpr bool SHARED = TOGETHER > 1;
    const Panel &p;
    const Groups groups;
    Books books;
    std::vector<Finder<D>> finders;        // one, or one for each register of rows
    std::vector<const float *> centroids;  // of each row at hand

    void round_rows(int64_t start, int64_t stop) {
        const int64_t tiles = divide_up(stop - start, ROWS);
        set(start, stop);
        Columns columns(p.n, p.K, p.K_row, p.K_column, tiles);
        for (int64_t k = 0; k < p.n; k++)
            for (int64_t v = 0, row = start; row < stop; v++, row += LANES)
                columns.at(k, 0)[v] = load(p.X + k * p.m + row, stop - row);
        for (int64_t lo = 0; lo < p.n; lo += D)
            for (int64_t tile = 0; tile < tiles; tile++) {
                if (lo % COLUMNS == 0) columns.feed_block(lo, tile);
                for (int i = 0; i < D; i++) columns.feed(lo + i, tile, lo);
                const int64_t row = tile * ROWS;
                for (int v = 0; v < VECTORS && start + row + v * LANES < stop; v += TOGETHER)
                    round_vectors(columns, lo, tile, v, start, stop);
            }
    }

    void set(int64_t start, int64_t stop) {
        finders.resize(SHARED ? 1 : divide_up(stop - start, LANES));
        for (size_t i = 0; i < finders.size(); i++) {
            const int64_t row = start + i * LANES;
            finders[i].set(books, row, std::min<int64_t>(stop - row, LANES));
        }
        centroids.resize(stop - start);
        for (int64_t row = start; row < stop; row++)
            centroids[row - start] = p.centroids + groups.of(row) * p.k * D;
    }

    // The registers from the v-th one of a tile on: codes and errors go out, and errors take the
    // place of x.
    void round_vectors(
        Columns &columns, int64_t lo, int64_t tile, int v, int64_t start, int64_t stop
    ) {
        const int64_t row = start + tile * ROWS + v * LANES;
        const int64_t there = divide_up(stop - row, LANES);
        const int vectors = there < TOGETHER ? static_cast<int>(there) : TOGETHER;
        Floats z[D * TOGETHER], scales[TOGETHER] = {};
        for (int n = 0; n < vectors; n++) {
            const int64_t at = row + n * LANES;
            scales[n] = all(1);
            if (p.scales) scales[n] = load(p.scales + lo / p.block * p.m + at, stop - at, 1);
            for (int i = 0; i < D; i++)
                z[i * vectors + n] = columns.at(lo + i, tile)[v + n] / scales[n];
        }
        Ints codes[TOGETHER];
        finders[SHARED ? 0 : tile * VECTORS + v].find(z, vectors, p.h + lo, 1, codes);
        for (int n = 0; n < vectors; n++) {
            Floats x[D];
            for (int i = 0; i < D; i++) x[i] = columns.at(lo + i, tile)[v + n];
            const int64_t at = row + n * LANES;
            finish(lo, at, start, stop, codes[n], x, scales[n]);
            for (int i = 0; i < D; i++) columns.at(lo + i, tile)[v + n] = x[i];
        }
    }

    // x becomes the error of the better of the new code and the kept one
    void finish(
        int64_t lo, int64_t row, int64_t start, int64_t stop, Ints code, Floats *x, Floats scale
    ) {
        const int64_t left = stop - row, at = lo / D * p.m + row;
        const float *const *book = centroids.data() + (row - start);
        Floats w_hat[D];
        decode(book, left, code, scale, w_hat);
        if (p.kept) {
            const Ints old = kept(at, left);
            Floats w_old[D];
            decode(book, left, old, scale, w_old);
            const float *metric = p.metrics + lo * D;
            const Ints better = error(x, w_old, metric) - error(x, w_hat, metric) > 0;
            code = better ? code : old;
            for (int i = 0; i < D; i++) w_hat[i] = better ? w_hat[i] : w_old[i];
        }
        for (int i = 0; i < D; i++) {
            const int64_t to = (lo + i) * p.m + row;
            x[i] = without_padding((p.base ? load(p.base + to, left) : x[i]) - w_hat[i], left);
            store(p.eta + to, x[i], left);
        }
        store_codes(p.codes, p.wide, at, code, left);
    }

    void decode(
        const float *const *book, int64_t left, const Ints &code, Floats scale, Floats *w_hat
    ) const {
        float lanes[D][LANES] = {};
        int32_t codes[LANES];  // memory, because lanes of a register are slow to reach
        std::memcpy(codes, &code, sizeof codes);
        for (int l = 0; l < std::min<int64_t>(left, LANES); l++)
            for (int i = 0; i < D; i++) lanes[i][l] = book[l][codes[l] * D + i];
        for (int i = 0; i < D; i++) w_hat[i] = scale * load(lanes[i]);
    }

    Ints kept(int64_t at, int64_t left) const {
        Ints codes{};
        for (int64_t l = 0; l < std::min<int64_t>(left, LANES); l++)
            codes[l] = p.wide ? static_cast<const int32_t *>(p.kept)[at + l]
                              : static_cast<const uint8_t *>(p.kept)[at + l];
        return codes;
    }

    // e^T metric e of every lane
    static Floats error(const Floats *x, const Floats *w_hat, const float *metric) {
        Floats total{};
        for (int i = 0; i < D; i++) {
            Floats sum{};
            for (int j = 0; j < D; j++) sum += metric[j * D + i] * (x[j] - w_hat[j]);
            total += sum * (x[i] - w_hat[i]);
        }
        return total;
    }
};

}  // namespace
