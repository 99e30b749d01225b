// The walk near to a tile that ends where it begins, by two passes over it (QTIP, Algorithm 4).
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../threads.h"
#include "viterbi.h"

namespace {

// The table as a Step reads it; to overlaps beyond the last one nothing is near
inline std::vector<Floats> laid_out(const Trellis &trellis) {
    const int64_t overlaps = trellis.overlaps(), branches = trellis.branches(), V = trellis.V;
    std::vector<Floats> to(trellis.blocks() * branches * V, all(INFINITY));
    auto *numbers = reinterpret_cast<float *>(to.data());
    for (int64_t u = 0; u < branches; u++)
        for (int64_t e = 0; e < overlaps; e++)
            for (int64_t v = 0; v < V; v++)
                numbers[((e / LANES * branches + u) * V + v) * LANES + e % LANES] =
                    trellis.table[(u * overlaps + e) * V + v];
    return to;
}

// Rows of a matrix that are searched as one sequence
struct Tile {
    int64_t first, rows, steps;
    const float *x;             // [steps, V]
    std::vector<Floats> costs;  // D before and after a step
    std::vector<Outcome> outcomes;
    int64_t overlap;  // of the last step with the first one

    // Number `number` of `count` even ones of m rows, with `across` steps a row
    void open(const Trellis &trellis, int64_t m, int64_t count, int64_t number, int64_t across) {
        const int64_t size = m / count, more = m % count;
        first = number * size + std::min(number, more);
        rows = size + (number < more);
        steps = rows * across;
        costs.resize(2 * (trellis.blocks() + 1));  // beyond the last one a `spread` may read
        outcomes.resize(steps * trellis.outcomes());
    }
};

// D before step t
inline float *costs(const Trellis &trellis, Tile &tile, int64_t t) {
    return reinterpret_cast<float *>(tile.costs.data() + t % 2 * (trellis.blocks() + 1));
}

// Step t of N tiles, which begin in the middle if they are turned
template <int BITS, int V, int N>
void take(const Trellis &trellis, const Floats *table, Tile *tiles, int64_t t, bool turned) {
    Walk walks[N];
    for (int n = 0; n < N; n++) {
        Tile &tile = tiles[n];
        int64_t from = turned ? t + tile.steps / 2 : t;
        if (from >= tile.steps) from -= tile.steps;
        walks[n] = {tile.x + from * V, costs(trellis, tile, t), costs(trellis, tile, t + 1),
                    tile.outcomes.data() + t * trellis.outcomes()};
    }
    // The first half of the first pass is never walked back
    if (turned && t < tiles[N - 1].steps / 2)
        Step<BITS, V, N, false>(trellis, table, walks).take();
    else
        Step<BITS, V, N, true>(trellis, table, walks).take();
}

class Search {
  public:
    explicit Search(const Trellis &trellis) : trellis(trellis), table(laid_out(trellis)) {
        trellis.V == 1 ? choose<1>() : choose<2>();
    }

    // One tile or two, of which the first may be the longer one
    void run(Tile *tiles, int64_t count) const {
        for (Tile *tile = tiles; tile < tiles + count; tile++)
            std::fill(tile->costs.begin(), tile->costs.end(), Floats{});
        pass(tiles, count, true);
        for (Tile *tile = tiles; tile < tiles + count; tile++) {
            const float *D = costs(trellis, *tile, tile->steps);
            int64_t e = std::min_element(D, D + trellis.overlaps()) - D;
            for (int64_t t = tile->steps; t > tile->steps - tile->steps / 2;)
                e = state(*tile, --t, e) >> trellis.bits;
            std::fill(tile->costs.begin(), tile->costs.end(), all(INFINITY));
            costs(trellis, *tile, 0)[e] = 0;
            tile->overlap = e;
        }
        pass(tiles, count, false);
    }

    // visit(t, s) for the states of the walk, the last one first
    template <class Visit> void walk_back(const Tile &tile, const Visit &visit) const {
        int64_t e = tile.overlap;
        for (int64_t t = tile.steps; t-- > 0;) {
            const int64_t s = state(tile, t, e);
            visit(t, s);
            e = s >> trellis.bits;
        }
    }

  private:
    typedef void (*Take)(const Trellis &, const Floats *, Tile *, int64_t, bool);
    const Trellis &trellis;
    const std::vector<Floats> table;
    Take one = nullptr, two = nullptr;

    template <int V> void choose() {
        if (trellis.bits == 1) one = take<1, V, 1>, two = take<1, V, 2>;
        if (trellis.bits == 2) one = take<2, V, 1>, two = take<2, V, 2>;
        if (trellis.bits == 3) one = take<3, V, 1>, two = take<3, V, 2>;
        if (trellis.bits >= 4) one = take<4, V, 1>, two = take<4, V, 2>;
    }

    // All steps, in their order or from the middle one on
    void pass(Tile *tiles, int64_t count, bool turned) const {
        int64_t t = 0;
        if (count == 2)
            for (; t < tiles[1].steps; t++) two(trellis, table.data(), tiles, t, turned);
        for (; t < tiles->steps; t++) one(trellis, table.data(), tiles, t, turned);
    }

    // That of step t on the way to overlap e
    int64_t state(const Tile &tile, int64_t t, int64_t e) const {
        const Outcome *at = tile.outcomes.data() + t * trellis.outcomes();
        return winner(trellis, at, e) << (trellis.L - trellis.bits) | e;
    }
};

// work(search, first tile, how many of them: 1, or 2 where there are enough for all threads)
template <class Work>
void share_tiles(const Threads &threads, const Trellis &trellis, int64_t count, const Work &work) {
    const Search search(trellis);
    const int64_t together = count >= 2 * threads.count ? 2 : 1;
    share(threads, count, together,
          [&](int64_t first, int64_t last) { work(search, first, last - first); });
}

}  // namespace
