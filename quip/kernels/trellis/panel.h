// Round the columns of a panel to walks, each column with the errors of those before it.
//
// Tiles know nothing of each other: a thread rounds all columns of one, or of two side by side.
#pragma once

#include <cstdint>
#include <vector>

#include "search.h"

namespace {

struct Panel {  // as in cpu.py
    int64_t n, m, d, tiles, scale_count, K_row, K_column;
    const float *X, *K, *base, *scales, *metrics;  // [n, m], [n, n] by its strides, [n, m] or null,
                                                   // 1 or [n / d], [n / d, d, d]
    const void *kept;                              // [n / d, m], or null
    float *eta;                                    // [n, m], out
    void *codes;                                   // [n / d, m], int32 or int64, out
    Trellis trellis;
    Threads threads;
};

// Codes of rows, int32 or int64
struct Codes {
    const void *from;
    bool wide;

    uint64_t operator[](int64_t at) const {
        return wide ? static_cast<const uint64_t *>(from)[at]
                    : static_cast<const uint32_t *>(from)[at];
    }
};

inline void put_code(void *to, bool wide, int64_t at, uint64_t code) {
    if (wide)
        static_cast<uint64_t *>(to)[at] = code;
    else
        static_cast<uint32_t *>(to)[at] = static_cast<uint32_t>(code);
}

class Rounder {
  public:
    Rounder(const Panel &p, const Search &search) : p(p), search(search) {}

    void run(int64_t number, int64_t count) {
        static thread_local Tile tiles[2];  // kept: fresh pages are dear
        std::vector<float> x[2], z[2];
        for (int64_t i = 0; i < count; i++) {
            tiles[i].open(p.trellis, p.m, p.tiles, number + i, p.d / p.trellis.V);
            x[i].resize(tiles[i].rows * p.d);
            z[i].resize(tiles[i].rows * p.d);
            tiles[i].x = z[i].data();
        }
        for (int64_t block = 0; block < p.n / p.d; block++) {
            for (int64_t i = 0; i < count; i++) feed(tiles[i], block, x[i].data(), z[i].data());
            search.run(tiles, count);
            for (int64_t i = 0; i < count; i++) finish(tiles[i], block, x[i].data());
        }
    }

  private:
    const Panel &p;
    const Search &search;
    std::vector<uint64_t> codes;
    std::vector<float> w_new, w_old;  // [steps, V]

    float scale(int64_t block) const { return p.scales[p.scale_count > 1 ? block : 0]; }

    // x [d, rows] receives the errors of the columns before the block; z [rows, d] = x / scale
    void feed(const Tile &tile, int64_t block, float *x, float *z) const {
        const float unit = scale(block);
        for (int64_t i = 0; i < p.d; i++, x += tile.rows) {
            const int64_t k = block * p.d + i;
            std::copy_n(p.X + k * p.m + tile.first, tile.rows, x);
            for (int64_t j = 0; j < block * p.d; j++) {
                const float *eta = p.eta + j * p.m + tile.first;
                const float weight = p.K[j * p.K_row + k * p.K_column];
                for (int64_t r = 0; r < tile.rows; r++) x[r] += weight * eta[r];
            }
            for (int64_t r = 0; r < tile.rows; r++) z[r * p.d + i] = x[r] / unit;
        }
    }

    // Codes and errors go out: those of the walk, or of the kept codes if these are as near
    void finish(const Tile &tile, int64_t block, const float *x) {
        const int64_t V = p.trellis.V, across = p.d / V, mask = p.trellis.branches() - 1;
        const float unit = scale(block);
        codes.assign(tile.rows, 0);
        w_new.resize(tile.steps * V);
        search.walk_back(tile, [&](int64_t t, int64_t s) {
            codes[t / across] |= uint64_t(s & mask) << (t % across * p.trellis.bits);
            for (int v = 0; v < V; v++) w_new[t * V + v] = unit * p.trellis.table[s * V + v];
        });
        if (p.kept) keep(tile, block, x, unit);
        for (int64_t r = 0; r < tile.rows; r++) {
            const int64_t row = tile.first + r;
            put_code(p.codes, p.trellis.wide, block * p.m + row, codes[r]);
            for (int64_t i = 0; i < p.d; i++) {
                const int64_t to = (block * p.d + i) * p.m + row;
                p.eta[to] = (p.base ? p.base[to] : x[i * tile.rows + r]) - w_new[r * p.d + i];
            }
        }
    }

    // The kept codes and their weights take the place of the new ones, unless those are nearer
    void keep(const Tile &tile, int64_t block, const float *x, float unit) {
        const Codes kept{p.kept, p.trellis.wide != 0};
        const int64_t V = p.trellis.V, across = p.d / V, mask = p.trellis.branches() - 1;
        const auto code = [&](int64_t t) {
            const uint64_t row = kept[block * p.m + tile.first + t / across];
            return int64_t(row >> (t % across * p.trellis.bits)) & mask;
        };
        w_old.resize(tile.steps * V);
        int64_t s = 0;
        for (int64_t t = -p.trellis.window(); t < tile.steps; t++) {
            s = p.trellis.after(s, code((t % tile.steps + tile.steps) % tile.steps));
            for (int v = 0; v < V && t >= 0; v++) w_old[t * V + v] = unit * p.trellis.table[s * V + v];
        }
        const float *metric = p.metrics + block * p.d * p.d;
        if (error(tile, x, w_old.data(), metric) - error(tile, x, w_new.data(), metric) > 0) return;
        w_new.swap(w_old);
        for (int64_t r = 0; r < tile.rows; r++) codes[r] = kept[block * p.m + tile.first + r];
    }

    // sum of e^T metric e over the rows
    double error(const Tile &tile, const float *x, const float *w, const float *metric) const {
        double total = 0;
        for (int64_t r = 0; r < tile.rows; r++)
            for (int64_t i = 0; i < p.d; i++) {
                float sum = 0;
                for (int64_t j = 0; j < p.d; j++)
                    sum += (x[j * tile.rows + r] - w[r * p.d + j]) * metric[j * p.d + i];
                total += sum * (x[i * tile.rows + r] - w[r * p.d + i]);
            }
        return total;
    }
};

}  // namespace
