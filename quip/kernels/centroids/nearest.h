// The nearest centroids of LANES vectors at once: a lane is a row of W, whose columns come in turn.
//
// With y_i = -2 h_i x_i the nearest centroid has the least sum_i h_i c_i^2 + c_i y_i: its squared
// distance but for what all have in common. `Shared` serves rows of one group: a centroid costs
// d + 3 operations, its norm being shared by all lanes. `Lanes` serves rows of any groups, each lane
// having a table of its own: 2 d + 3. Of numbers (d = 1) the nearest centroid is the last whose
// lower bound is passed: 2, and h has no say.

#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../lanes.h"

namespace {

// Which of G even row groups a row belongs to: the first m % G have one row more than the others.
struct Groups {
    int64_t m, count;

    int64_t start(int64_t group) const { return group * (m / count) + std::min(group, m % count); }

    int64_t of(int64_t row) const {
        const int64_t size = m / count, more = m % count, wide = more * (size + 1);
        return row < wide ? row / (size + 1) : more + (row - wide) / size;
    }
};

struct Books {
    Groups groups;
    int64_t k;
    const float *centroids;      // [G, k, d]
    std::vector<int32_t> order;  // [G, k], where d is 1: how the centroids of a group are sorted

    Books(Groups groups, int64_t k, const float *centroids, int dim)
        : groups(groups), k(k), centroids(centroids), order(dim == 1 ? groups.count * k : 0) {
        for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int32_t>(i % k);
    }
};

// Whether groups are so large that few lanes stay idle if each begins a unit of rows of its own
inline bool fills(const Groups &groups, int dim, int64_t unit) {
    const int64_t rows = std::max<int64_t>(groups.m / groups.count, 1);
    return dim > 1 && (dim + 3) * divide_up(rows, unit) * unit <= (2 * dim + 3) * rows;
}

template <int D> class Shared {
  public:
    static constexpr int MOST = VECTORS;  // registers of rows that are served together

    void set(const Books &books, int64_t row, int64_t) {
        k = books.k;
        stride = divide_up(k, LANES);
        centroids.assign(D * stride, Floats{});
        norms.resize(stride);
        const float *from = books.centroids + books.groups.of(row) * k * D;
        for (int64_t c = 0; c < k; c++)
            for (int i = 0; i < D; i++) coordinate(i)[c] = from[c * D + i];
    }

    // codes [columns, vectors] of x [columns, D, vectors]
    void find(const Floats *x, int vectors, const float *h, int64_t columns, Ints *codes) {
        for (int64_t j = 0; j < columns; j++, x += D * vectors, h += D, codes += vectors) {
            if (vectors == 1) find_in<1>(x, h, codes);
            if (vectors == 2) find_in<2>(x, h, codes);
            if constexpr (MOST > 2) {
                if (vectors == 3) find_in<3>(x, h, codes);
                if (vectors == 4) find_in<4>(x, h, codes);
            }
        }
    }

  private:
    int64_t k = 0, stride = 0;
    std::vector<Floats> centroids, norms;  // [D, k], [k]

    float *coordinate(int i) { return reinterpret_cast<float *>(centroids.data() + i * stride); }

    template <int V> void find_in(const Floats *x, const float *h, Ints *code) {
        for (int64_t s = 0; s < stride; s++) {
            norms[s] = Floats{};
            for (int i = 0; i < D; i++) {
                const Floats c = centroids[i * stride + s];
                norms[s] += h[i] * c * c;
            }
        }
        Floats y[D][V], best[V];
        for (int v = 0; v < V; v++) {
            for (int i = 0; i < D; i++) y[i][v] = -2 * h[i] * x[i * V + v];
            best[v] = all(INFINITY);
            code[v] = Ints{};
        }
        const float *norm = reinterpret_cast<const float *>(norms.data()), *at[D];
        for (int i = 0; i < D; i++) at[i] = coordinate(i);
        for (int64_t c = 0; c < k; c++) {
            const Ints number = Ints{} + static_cast<int32_t>(c);
            for (int v = 0; v < V; v++) {
                Floats score = all(norm[c]);
                for (int i = 0; i < D; i++) score += at[i][c] * y[i][v];
                const Ints better = score < best[v];
                best[v] = better ? score : best[v];
                code[v] = better ? number : code[v];
            }
        }
    }
};

template <int D> class Lanes {
  public:
    static constexpr int MOST = 1;

    void set(const Books &books, int64_t row, int64_t rows) {
        k = books.k;
        table.assign(2 * D * k, Floats{});
        for (int64_t l = 0; l < rows; l++) {
            const float *from = books.centroids + books.groups.of(row + l) * k * D;
            for (int64_t c = 0; c < k; c++)
                for (int i = 0; i < D; i++) table[2 * D * c + i][l] = from[c * D + i];
        }
        for (int64_t c = 0; c < k; c++)
            for (int i = 0; i < D; i++)
                table[2 * D * c + D + i] = table[2 * D * c + i] * table[2 * D * c + i];
    }

    void find(const Floats *x, int, const float *h, int64_t columns, Ints *codes) {
        int64_t j = 0;
        for (; j + TOGETHER <= columns; j += TOGETHER)
            find_some<TOGETHER>(x + j * D, h + j * D, codes + j);
        for (; j < columns; j++) find_some<1>(x + j * D, h + j * D, codes + j);
    }

  private:
    static constexpr int TOGETHER = D == 2 ? VECTORS : VECTORS / 2;  // columns
    int64_t k = 0;
    std::vector<Floats> table;  // [k, 2 D]: c_i and their squares

    template <int N> void find_some(const Floats *x, const float *h, Ints *code) {
        Floats y[N][D], metric[N][D], best[N];
        for (int n = 0; n < N; n++) {
            for (int i = 0; i < D; i++) {
                metric[n][i] = all(h[n * D + i]);
                y[n][i] = -2 * h[n * D + i] * x[n * D + i];
            }
            best[n] = all(INFINITY);
            code[n] = Ints{};
        }
        const Floats *at = table.data();
        for (int64_t c = 0; c < k; c++, at += 2 * D) {
            const Ints number = Ints{} + static_cast<int32_t>(c);
            for (int n = 0; n < N; n++) {
                Floats score{};
                for (int i = 0; i < D; i++) score += at[D + i] * metric[n][i] + at[i] * y[n][i];
                const Ints better = score < best[n];
                best[n] = better ? score : best[n];
                code[n] = better ? number : code[n];
            }
        }
    }
};

template <> class Lanes<1> {
  public:
    static constexpr int MOST = 1;

    void set(Books &books, int64_t row, int64_t rows) {
        k = books.k;
        bounds.assign(k, Floats{});
        codes.assign(k, Ints{});
        gather(books, row, rows);
        for (uint32_t left = unsorted(); left; left &= left - 1)
            sort(books, books.groups.of(row + __builtin_ctz(left)));
        gather(books, row, rows);
        for (int64_t r = 1; r < k; r++)  // of equal ones the first
            codes[r] = bounds[r] == bounds[r - 1] ? codes[r - 1] : codes[r];
        for (int64_t r = k - 1; r > 0; r--) bounds[r] = bound(r);
    }

    void find(const Floats *x, int, const float *, int64_t columns, Ints *found) {
        int64_t j = 0;
        for (; j + TOGETHER <= columns; j += TOGETHER) find_some<TOGETHER>(x + j, found + j);
        for (; j < columns; j++) find_some<1>(x + j, found + j);
    }

  private:
    static constexpr int TOGETHER = VECTORS;
    int64_t k = 0;
    std::vector<Floats> bounds;  // [k], ascending
    std::vector<Ints> codes;     // [k]

    void gather(const Books &books, int64_t row, int64_t rows) {
        for (int64_t l = 0; l < rows; l++) {
            const int64_t start = books.groups.of(row + l) * k;
            for (int64_t r = 0; r < k; r++) {
                codes[r][l] = books.order[start + r];
                bounds[r][l] = books.centroids[start + books.order[start + r]];
            }
        }
    }

    uint32_t unsorted() const {
        Ints wrong{};
        for (int64_t r = 1; r < k; r++) {
            const Ints equal = bounds[r - 1] == bounds[r];
            wrong |= (bounds[r - 1] > bounds[r]) | (equal & (codes[r - 1] > codes[r]));
        }
        return bits_of(wrong);
    }

    static void sort(Books &books, int64_t group) {
        const float *of = books.centroids + group * books.k;
        const auto key = [of](int32_t c) {  // in the order of floats, and total for all of them
            int32_t bits;
            std::memcpy(&bits, of + c, sizeof bits);
            return std::make_pair(bits ^ (bits >> 31 & INT32_MAX), c);
        };
        const auto order = books.order.begin() + group * books.k;
        std::sort(order, order + books.k, [key](int32_t a, int32_t b) { return key(a) < key(b); });
    }

    // The least float that is nearer to the r-th centroid than to the one before it
    Floats bound(int64_t r) const {
        const Floats middle = 0.5f * (bounds[r - 1] + bounds[r]);
        const Ints bits = (Ints)middle, one = Ints{} + 1;
        const Ints next = middle > 0 ? bits + 1 : middle < 0 ? bits - 1 : one;
        return codes[r] < codes[r - 1] ? middle : (Floats)next;  // ties: the lowest code
    }

    template <int N> void find_some(const Floats *x, Ints *found) {
        Ints code[N];
        for (int n = 0; n < N; n++) code[n] = codes[0];
        for (int64_t r = 1; r < k; r++)
            for (int n = 0; n < N; n++) code[n] = x[n] >= bounds[r] ? codes[r] : code[n];
        for (int n = 0; n < N; n++) found[n] = code[n];
    }
};

}  // namespace
