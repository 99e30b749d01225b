// The values of walks: whatever the tiles, every state is the last bits of its walk.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "viterbi.h"

namespace {

struct Decode {  // as in cpu.py
    int64_t m, steps, tiles, across;  // steps of a row; tiles one below the other, steps of a row of one
    const uint8_t *codes;             // [m, steps]
    const int64_t *order;             // [steps of a tile], or null
    float *w;                         // [m, steps V], out
    Trellis trellis;
    Threads threads;
};

template <int V> class Values {
  public:
    Values(const Decode &a, int64_t number)
        : a(a),
          size(a.m / a.tiles),
          first(number * size + std::min(number, a.m % a.tiles)),
          rows(size + (number < a.m % a.tiles)) {}

    // Tiles side by side, a row of all of them after the other: each has a state of its own
    void by_rows(int64_t begin, int64_t end) const {
        std::vector<uint32_t> states(end - begin);
        const int64_t turns = divide_up(a.trellis.window(), a.across);  // that a state reaches back
        for (int64_t r = -turns; r < rows; r++) {
            const int64_t row = first + (r % rows + rows) % rows;
            for (int64_t i = 0; i < a.across; i++) {
                const int64_t at = row * a.steps + begin * a.across + i;
                step(states, a.codes + at, r < 0 ? nullptr : a.w + at * V);
            }
        }
    }

    // Tiles whose sequence has an order of its own
    void in_order(int64_t begin, int64_t end) const {
        const int64_t count = rows * a.across;
        for (int64_t strip = begin; strip < end; strip++) {
            int64_t s = 0;
            for (int64_t t = -a.trellis.window(); t < count; t++) {
                const int64_t place = a.order[(t % count + count) % count];
                const int64_t at = (first + place / a.across) * a.steps + strip * a.across +
                                   place % a.across;
                s = a.trellis.after(s, a.codes[at]);
                for (int v = 0; v < V && t >= 0; v++) a.w[at * V + v] = a.trellis.table[s * V + v];
            }
        }
    }

  private:
    const Decode &a;
    const int64_t size, first, rows;

    void step(std::vector<uint32_t> &states, const uint8_t *codes, float *w) const {
        const uint32_t mask = (uint32_t(1) << a.trellis.L) - 1;
        const int bits = a.trellis.bits;
        const int64_t count = states.size(), apart = a.across;
        const float *table = a.trellis.table;
        uint32_t *state = states.data();
        if (apart == 1)  // known to the compiler: neighbours
            for (int64_t j = 0; j < count; j++) state[j] = (state[j] << bits | codes[j]) & mask;
        else
            for (int64_t j = 0; j < count; j++)
                state[j] = (state[j] << bits | codes[j * apart]) & mask;
        for (int64_t j = 0; w && j < count; j++)
            for (int v = 0; v < V; v++) w[j * apart * V + v] = table[state[j] * V + v];
    }
};

constexpr int64_t STRIPS = 256;  // of tiles side by side that a thread decodes at once

template <int V> void decode_values(const Decode &a) {
    const int64_t strips = a.steps / a.across, parts = divide_up(strips, STRIPS);
    share(a.threads, a.tiles * parts, 1, [&](int64_t from, int64_t to) {
        for (; from < to; from++) {
            const Values<V> values(a, from / parts);
            const int64_t begin = from % parts * STRIPS, end = std::min(begin + STRIPS, strips);
            a.order ? values.in_order(begin, end) : values.by_rows(begin, end);
        }
    });
}

}  // namespace
