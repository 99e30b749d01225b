// Vectors of weights to the nearest centroid of their row group, and centroids to the means of
// their vectors.
//
// Rows are packed in tiles of up to MOST registers, all columns of a tile side by side; a tile
// belongs to one group where groups fill registers, and else to whichever groups its rows have.
// Centroids are improved group by group, or several small ones together, so that what an
// iteration reads stays in the cache. Sums follow the vectors that change their cluster alone.

#pragma once

#include "nearest.h"

namespace {

struct Problem {  // as in cpu.py
    int64_t g, m, groups, k;    // columns and rows of W
    const float *X, *h, *mass;  // [g, m], [g], [g / d, m] or null
    float *centroids;           // [groups, k, d], improved in place
    void *codes;                // [g / d, m], uint8 or int32, out
    int32_t dim, wide, iterations;
};

struct Tile {
    int64_t row, rows;
    int vectors;
    bool settled = false;         // none of its groups moves any more
    std::vector<int64_t> groups;  // [rows], counted from the first one at hand
    std::vector<Floats> x, mass;  // [g, vectors], [g / d, vectors]
    std::vector<Ints> codes;      // [g / d, vectors]
};

template <int D> struct Cluster {
    double sum[D] = {}, weight[D] = {};
    int32_t heavy[D] = {};  // vectors whose weight is not 0: what is left of sums is not noise
    int64_t size = 0;

    void add(const double (&x)[D], const double (&w)[D], int sign) {
        size += sign;
        for (int i = 0; i < D; i++) {
            heavy[i] += w[i] != 0 ? sign : 0;
            sum[i] = heavy[i] ? sum[i] + sign * w[i] * x[i] : 0;
            weight[i] = heavy[i] ? weight[i] + sign * w[i] : 0;
        }
    }
};

template <int D, template <int> class Finder> class Quantizer {
  public:
    explicit Quantizer(const Problem &p)
        : p(p), groups{p.m, p.groups}, books(groups, p.k, p.centroids, D) {}

    void assign() {
        for (int64_t group = 0; group < p.groups;) {
            const int64_t last = whole(group, LANES);
            for (Tile &tile : cut(group, last)) {
                pack(tile);
                find(tile);
                write(tile);
            }
            group = last;
        }
    }

    void improve() {
        for (int64_t group = 0; group < p.groups;) {
            const int64_t last = whole(group, 8 * LANES);
            improve_groups(group, last);
            group = last;
        }
    }

  private:
    static constexpr bool SHARED = Finder<D>::MOST > 1;
    const Problem &p;
    const Groups groups;
    Books books;
    Finder<D> finder;
    std::vector<Ints> found;           // the codes of a tile
    std::vector<Cluster<D>> clusters;  // of the groups at hand
    std::vector<int64_t> moved;        // how many vectors of each group changed their cluster

    // The end of as many groups from the first one on as have no more than so many rows, or of one
    int64_t whole(int64_t first, int64_t rows) const {
        int64_t last = first + 1;
        const int64_t stop = groups.start(first) + rows;
        while (!SHARED && last < p.groups && groups.start(last + 1) <= stop) last++;
        return last;
    }

    std::vector<Tile> cut(int64_t first, int64_t last) const {
        const int64_t stop = groups.start(last);
        std::vector<Tile> tiles;
        for (int64_t row = groups.start(first); row < stop;) {
            const int64_t rows = std::min<int64_t>(stop - row, Finder<D>::MOST * LANES);
            Tile tile{};
            tile.row = row, tile.rows = rows;
            tile.vectors = static_cast<int>(divide_up(rows, LANES));
            tiles.push_back(std::move(tile));
            row += rows;
        }
        return tiles;
    }

    void pack(Tile &tile) const {
        tile.x = packed(tile, p.X, p.g);
        if (p.mass) tile.mass = packed(tile, p.mass, p.g / D);
    }

    std::vector<Floats> packed(const Tile &tile, const float *from, int64_t columns) const {
        std::vector<Floats> lanes(columns * tile.vectors);
        for (int64_t j = 0, at = 0; j < columns; j++)
            for (int v = 0; v < tile.vectors; v++)
                lanes[at++] = load(from + j * p.m + tile.row + v * LANES, tile.rows - v * LANES);
        return lanes;
    }

    // Writes `found`
    void find(const Tile &tile) {
        found.resize(p.g / D * tile.vectors);
        finder.set(books, tile.row, tile.rows);
        finder.find(tile.x.data(), tile.vectors, p.h, p.g / D, found.data());
    }

    void write(const Tile &tile) const {
        for (int64_t j = 0, n = 0; j < p.g / D; j++)
            for (int64_t row = 0; row < tile.rows; row += LANES, n++)
                store_codes(p.codes, p.wide, j * p.m + tile.row + row, found[n], tile.rows - row);
    }

    void improve_groups(int64_t first, int64_t last) {
        std::vector<Tile> tiles = cut(first, last);
        for (Tile &tile : tiles) {
            pack(tile);
            tile.codes.resize(p.g / D * tile.vectors);
            for (int64_t r = 0; r < tile.rows; r++)
                tile.groups.push_back(groups.of(tile.row + r) - first);
        }
        clusters.assign((last - first) * p.k, {});
        for (int iteration = 0; iteration < p.iterations; iteration++) {
            moved.assign(last - first, 0);
            for (Tile &tile : tiles) {
                if (tile.settled) continue;
                find(tile);
                iteration ? move<false>(tile) : move<true>(tile);
                tile.codes.swap(found);
            }
            for (int64_t group = first; group < last; group++)
                if (moved[group - first]) move_centroids(group, first, tiles);
            if (!settle(tiles)) return;
        }
    }

    // Vectors from the clusters of their codes to those of the codes found. NEW: from none
    template <bool NEW> void move(const Tile &tile) {
        for (int64_t j = 0, n = 0; j < p.g / D; j++)
            for (int v = 0; v < tile.vectors; v++, n++) {
                const int64_t left = std::min<int64_t>(tile.rows - v * LANES, LANES);
                uint32_t lanes = (1u << left) - 1;
                if (!NEW) lanes &= bits_of(found[n] != tile.codes[n]);
                for (; lanes; lanes &= lanes - 1) move_vector<NEW>(tile, j, v, __builtin_ctz(lanes));
            }
    }

    template <bool NEW> void move_vector(const Tile &tile, int64_t j, int v, int l) {
        const int64_t group = tile.groups[v * LANES + l], n = j * tile.vectors + v;
        double x[D], w[D];
        for (int i = 0; i < D; i++) {
            x[i] = tile.x[(j * D + i) * tile.vectors + v][l];
            w[i] = double(p.h[j * D + i]) * mass(tile, j, v, l);
        }
        clusters[group * p.k + found[n][l]].add(x, w, 1);
        if (!NEW) clusters[group * p.k + tile.codes[n][l]].add(x, w, -1);
        moved[group]++;
    }

    float mass(const Tile &tile, int64_t j, int v, int l) const {
        return p.mass ? tile.mass[j * tile.vectors + v][l] : 1;
    }

    // Whether any tile has a group that moved
    bool settle(std::vector<Tile> &tiles) const {
        bool any = false;
        for (Tile &tile : tiles) {
            tile.settled = true;
            for (int64_t group : tile.groups) tile.settled &= !moved[group];
            any |= !tile.settled;
        }
        return any;
    }

    void move_centroids(int64_t group, int64_t first, const std::vector<Tile> &tiles) {
        float *c = p.centroids + group * p.k * D;
        const Cluster<D> *of = clusters.data() + (group - first) * p.k;
        std::vector<float *> empty;
        for (int64_t i = 0; i < p.k; i++)
            if (!of[i].size) empty.push_back(c + i * D);
        const std::vector<Place> places = worst(group, tiles, empty.size());
        for (int64_t n = 0; n < p.k * D; n++) {
            const Cluster<D> &cluster = of[n / D];
            if (cluster.heavy[n % D]) c[n] = float(cluster.sum[n % D] / cluster.weight[n % D]);
        }
        for (size_t n = 0; n < empty.size(); n++) {
            const Place &place = places[std::min(n, places.size() - 1)];
            for (int i = 0; i < D; i++) empty[n][i] = p.X[(place.j * D + i) * p.m + place.row];
        }
    }

    struct Place {
        float error;
        int64_t j, row;
        bool operator<(const Place &other) const {  // worse, or as bad and before
            if (error != other.error) return error > other.error;
            return j != other.j ? j < other.j : row < other.row;
        }
    };

    // So many vectors of a group, those farthest from their centroids first
    std::vector<Place> worst(int64_t group, const std::vector<Tile> &tiles, size_t count) const {
        std::vector<Place> places;
        if (!count) return places;
        const int64_t start = groups.start(group), stop = groups.start(group + 1);
        for (const Tile &tile : tiles) {
            const int64_t to = std::min(stop, tile.row + tile.rows);
            for (int64_t row = std::max(start, tile.row); row < to; row++)
                for (int64_t j = 0; j < p.g / D; j++)
                    places.push_back({error(tile, j, row, p.centroids + group * p.k * D), j, row});
        }
        count = std::min(count, places.size());
        std::partial_sort(places.begin(), places.begin() + count, places.end());
        places.resize(count);
        return places;
    }

    float error(const Tile &tile, int64_t j, int64_t row, const float *centroids) const {
        const int v = static_cast<int>((row - tile.row) / LANES), l = (row - tile.row) % LANES;
        const float *c = centroids + tile.codes[j * tile.vectors + v][l] * D;
        float total = 0;
        for (int i = 0; i < D; i++) {
            const float e = tile.x[(j * D + i) * tile.vectors + v][l] - c[i];
            total += p.h[j * D + i] * e * e;
        }
        return total * mass(tile, j, v, l);
    }
};

}  // namespace
