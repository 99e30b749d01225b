// Trellis codes: the fast forms of reference.py.
//
// To be compiled without contraction (Rounding of native.py): a fused product would take other walks.

#include <cstdint>
#include <vector>

#include "../threads.h"
#include "decode.h"
#include "panel.h"
#include "search.h"

namespace {

struct Encode {  // as in cpu.py
    int64_t m, d, tiles;
    const float *x;  // [m, d]
    void *codes;     // [m], int32 or int64, out
    Trellis trellis;
    Threads threads;
};

void encode_tiles(const Encode &a, const Search &search, int64_t number, int64_t count) {
    static thread_local Tile tiles[2];  // kept: fresh pages are dear
    const int64_t across = a.d / a.trellis.V, mask = a.trellis.branches() - 1;
    for (int64_t i = 0; i < count; i++) {
        tiles[i].open(a.trellis, a.m, a.tiles, number + i, across);
        tiles[i].x = a.x + tiles[i].first * a.d;
    }
    search.run(tiles, count);
    for (const Tile *tile = tiles; tile < tiles + count; tile++) {
        uint64_t code = 0;
        search.walk_back(*tile, [&](int64_t t, int64_t s) {
            code = code << a.trellis.bits | (s & mask);
            if (t % across) return;
            put_code(a.codes, a.trellis.wide, tile->first + t / across, code);
            code = 0;
        });
    }
}

}  // namespace

extern "C" void encode(const Encode *a) {
    share_tiles(a->threads, a->trellis, a->tiles,
                [a](const Search &search, int64_t first, int64_t count) {
                    encode_tiles(*a, search, first, count);
                });
}

extern "C" void round_columns(const Panel *p) {
    share_tiles(p->threads, p->trellis, p->tiles,
                [p](const Search &search, int64_t first, int64_t count) {
                    Rounder(*p, search).run(first, count);
                });
}

extern "C" void decode(const Decode *a) {
    a->trellis.V == 1 ? decode_values<1>(*a) : decode_values<2>(*a);
}
