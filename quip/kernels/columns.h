// The running columns of a panel of W, with feedback inside it: for sources that round them.
//
// A tile is ROWS rows of a column, held in VECTORS registers. COLUMNS columns are brought up to
// date together, so that every load of eta serves COLUMNS products.

#pragma once

#include <algorithm>
#include <vector>

#include "lanes.h"

namespace {

constexpr int COLUMNS = 4, ROWS = LANES * VECTORS;

// The running columns of `tiles` tiles and, once they are rounded, their errors; padded with 0.
class Columns {
  public:
    // K [width, width] by its strides, read above its diagonal
    Columns(int64_t width, const float *from, int64_t row, int64_t column, int64_t tiles)
        : padded(divide_up(width, COLUMNS) * COLUMNS),
          stride((tiles + 1) * VECTORS) {  // a power of 2 apart they would evict each other
        static thread_local std::vector<Floats> scratch;  // kept: fresh pages are dear
        scratch.resize(padded * stride + padded * padded / LANES + 1);
        x = scratch.data();
        K = reinterpret_cast<float *>(x + padded * stride);
        std::fill(at(width, 0), at(padded, 0), Floats{});
        for (int64_t k = 0; k < width; k++)
            for (int64_t j = 0; j < k; j++) *feedback(j, k) = from[j * row + k * column];
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

    // The same for column k alone, from the columns of its own block that come before `stop`
    void feed(int64_t k, int64_t tile, int64_t stop) {
        Floats sums[VECTORS];
        for (int v = 0; v < VECTORS; v++) sums[v] = at(k, tile)[v];
        for (int64_t j = k / COLUMNS * COLUMNS; j < stop; j++)
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

}  // namespace
