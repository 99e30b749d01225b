// The weights of blocks of columns that go down the rows of a matrix: those of two rows at once,
// from tables of halves, of which a load brings both where the table holds them side by side.
//
// The last 16 bits of a column are bytes of two planes: as many columns lie in a register as it has
// bytes. A form of weights goes `Down` a block, two rows at a time, and has what it needs of them
// put into a `Held`, of which it then makes vectors of weights. The lanes of a vector are two rows
// of one column after the other. What is stored is loaded some rows later: a vector is not passed
// on to loads of its parts before it has reached the cache.

#pragma once

#include "walk.h"

#if defined(__AVX512BW__) || (defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512F__))
#define HALVES  // are read

namespace {

typedef uint8_t Plane __attribute__((vector_size(HELD)));  // a byte of each column of a block
typedef uint16_t Twos __attribute__((vector_size(HELD)));
typedef uint32_t Fours __attribute__((vector_size(HELD)));

inline Plane plane_of(uint8_t byte) { return Plane{} + byte; }

// The bits of `one` where those of the mask are set, and those of `other` where not
inline Plane select(Plane mask, Plane one, Plane other) {
#ifdef __AVX512F__
    return (Plane)_mm512_ternarylogic_epi64((__m512i)mask, (__m512i)one, (__m512i)other, 0xca);
#else
    return (one & mask) | (other & ~mask);
#endif
}

// What leaves a byte comes into the one beside it
inline Plane raised(Plane x, int count) { return (Plane)((Twos)x << count); }
inline Plane lowered(Plane x, int count) { return (Plane)((Twos)x >> count); }

constexpr int PLACES = HELD / PIECE_COLUMNS;  // of a block

// Whether the columns of a block are neighbours
inline bool together(const Place *places) {
    return places[PLACES - 1].byte - places[0].byte == HELD - PIECE_COLUMNS;
}

// The codes of neighbours; older bits stand above them
struct Neighbours {
    int64_t byte;
    int right;  // what moves a code to the end of its byte
    Neighbours(const Place *places, int bits)
        : byte(places->byte), right(16 - places->up - bits) {}
    Plane codes(const uint8_t *row) const {
        Plane bytes;
        std::memcpy(&bytes, row + byte, sizeof bytes);
        return lowered(bytes, right);
    }
};

// The same of any columns
struct Pieces {
    const Place *places;
    Fours right = {};
    Pieces(const Place *places, int bits) : places(places) {
        for (int i = 0; i < HELD / 4; i++)
            right[i] = 16 - places[4 * i / PIECE_COLUMNS].up - bits;
    }
    Plane codes(const uint8_t *row) const {
        const auto piece = [&](int i) {
            return _mm_loadu_si128((const __m128i *)(row + places[i].byte));
        };
#ifdef __AVX512F__
        __m512i bytes = _mm512_castsi128_si512(piece(0));
        bytes = _mm512_inserti32x4(bytes, piece(1), 1);
        bytes = _mm512_inserti32x4(bytes, piece(2), 2);
        bytes = _mm512_inserti32x4(bytes, piece(3), 3);
#else
        const __m256i bytes = _mm256_set_m128i(piece(1), piece(0));
#endif
        return (Plane)((Fours)bytes >> right);
    }
};

// The last 16 bits of the columns of a block
struct Planes {
    static constexpr int COLUMNS = PIECE_COLUMNS;
    Plane high = {}, low = {};
    void take(const uint8_t *row, const Place *places, int bits) {
        take(Pieces(places, bits).codes(row), bits);
    }
    void take(Plane codes, int bits) {
        const Plane mask = plane_of((1 << bits) - 1);
        high = select(mask, lowered(low, 8 - bits), raised(high, bits));
        low = select(mask, codes, raised(low, bits));
    }
};

// 16 bits of each column, of which planes have the upper and the lower eight: eight columns are in
// one of the vectors, the next eight in the other
struct Windows {
    Twos even, odd;
    Windows(Plane high, Plane low) {
#ifdef __AVX512BW__
        even = (Twos)_mm512_unpacklo_epi8((__m512i)low, (__m512i)high);
        odd = (Twos)_mm512_unpackhi_epi8((__m512i)low, (__m512i)high);
#else
        even = (Twos)_mm256_unpacklo_epi8((__m256i)low, (__m256i)high);
        odd = (Twos)_mm256_unpackhi_epi8((__m256i)low, (__m256i)high);
#endif
    }
    void put(uint16_t *to) const {
        std::memcpy(to, &even, sizeof even), std::memcpy(to + HELD / 2, &odd, sizeof odd);
    }
};

// 16 of the bits of four windows
inline uint64_t one_of(uint64_t all, int shift) {
#ifdef __BMI__
    return _bextr_u64(all, shift, 16);
#else
    return uint16_t(all >> shift);
#endif
}

// Two halves, from table + WIDTH * at on
template <int WIDTH> inline uint32_t both(const uint16_t *table, uint64_t at) {
    uint32_t both;
    std::memcpy(&both, reinterpret_cast<const char *>(table) + 2 * WIDTH * at, sizeof both);
    return both;
}

// Those of four windows, which are taken apart in registers: loads are what is short
template <int WIDTH>
[[gnu::always_inline]] inline __m128i four(const uint16_t *table, const uint16_t *at) {
    uint64_t all;
    std::memcpy(&all, at, sizeof all);
    __m128i found = _mm_cvtsi32_si128(both<WIDTH>(table, uint16_t(all)));
    found = _mm_insert_epi32(found, both<WIDTH>(table, one_of(all, 16)), 1);
    found = _mm_insert_epi32(found, both<WIDTH>(table, one_of(all, 32)), 2);
    return _mm_insert_epi32(found, both<WIDTH>(table, all >> 48), 3);
}

// Those of all windows of a vector; a shuffle is saved where a broadcast does
#ifdef __AVX512F__
typedef __m256i Halves;
template <int WIDTH>
[[gnu::always_inline]] inline Halves entries(const uint16_t *table, const uint16_t *at) {
    uint64_t all;
    std::memcpy(&all, at + 4, sizeof all);
    Halves found = _mm256_castsi128_si256(four<WIDTH>(table, at));
    found = _mm256_mask_set1_epi32(found, 16, both<WIDTH>(table, uint16_t(all)));
    found = _mm256_mask_set1_epi32(found, 32, both<WIDTH>(table, one_of(all, 16)));
    found = _mm256_mask_set1_epi32(found, 64, both<WIDTH>(table, one_of(all, 32)));
    return _mm256_mask_set1_epi32(found, 128, both<WIDTH>(table, all >> 48));
}
inline Floats numbers(Halves halves) { return (Floats)_mm512_cvtph_ps(halves); }
#else
typedef __m128i Halves;
template <int WIDTH>
[[gnu::always_inline]] inline Halves entries(const uint16_t *table, const uint16_t *at) {
    return four<WIDTH>(table, at);
}
inline Floats numbers(Halves halves) { return (Floats)_mm256_cvtph_ps(halves); }
#endif

struct TwoRows {
    static constexpr int ROWS = 2, WIDTH = 1, EACH = LANES / 2, VECTORS = HELD / EACH;
    using Register = Planes;
    static int step(int v, int lane) { return v * EACH + lane / 2; }
    static int minor(int) { return 0; }

    // The window of the first column of vector v; the others follow
    static const uint16_t *window(const uint16_t *all, int v) {
        const int column = v * EACH, eight = column / 8;
        return all + eight % 2 * (HELD / 2) + eight / 2 * 8 + column % 8;
    }

    int bits;
    const uint16_t *table;
    Plane high, low;  // masks of windows
    TwoRows(int bits, const uint16_t *table, int window)
        : bits(bits), table(table), high(plane_of(((1 << window) - 1) >> 8)),
          low(plane_of((1 << window) - 1)) {}
};

// The states of two rows together are a window of L + bits bits, which names an entry
struct Pairs : TwoRows {
    struct Held {
        alignas(64) uint16_t at[HELD];
    };
    Pairs(int bits, const uint16_t *table, int state) : TwoRows(bits, table, state + bits) {}

    template <class Source> struct Down {
        const Pairs &form;
        const Source source;
        const int bits;
        const Plane one, both;  // masks of a code, and of two
        Plane high, low;
        Down(const Pairs &form, const Place *places, const Planes &kept)
            : form(form), source(places, form.bits), bits(form.bits),
              one(plane_of((1 << bits) - 1)), both(plane_of((1 << 2 * bits) - 1)),
              high(kept.high), low(kept.low) {}
        Planes planes() const { return {high, low}; }
        [[gnu::always_inline]] void go(const uint8_t *row, const uint8_t *next, Held &held) {
            const Plane two = select(one, source.codes(next), raised(source.codes(row), bits));
            high = select(both, lowered(low, 8 - 2 * bits), raised(high, 2 * bits));
            low = select(both, two, raised(low, 2 * bits));
            Windows(high & form.high, low & form.low).put(held.at);
        }
    };
    [[gnu::always_inline]] Floats operator()(const Held &held, int v) const {
        return numbers(entries<2>(table, window(held.at, v)));
    }
};

// The same of 2 bits and 2^12 states in half the room: see `circuits` in cpu.py
struct Circuits : TwoRows {
    struct Held {
        alignas(64) uint16_t at[HELD];
#ifdef __AVX512BW__
        uint64_t turned;  // the columns whose two halves lie the other way round
#else
        uint8_t turned[HELD];
#endif
    };
    Plane order;  // of a circuit: where the pair of (u, c) is
    explicit Circuits(const uint16_t *table) : TwoRows(2, table, 14) {
        for (int i = 0; i < HELD; i++) {
            const int u = i % 16 / 4, c = i % 4, turned = (u ^ c) & 1;
            order[i] = 2 * ((u >> 1 ^ (turned & (c == 3))) << 2 | c) + turned;
        }
    }

    // Four codes each: `now` ends with the first of two rows, `old` two rows above it, and so on;
    // `last` ends with the second row
    template <class Source> struct Down {
        const Circuits &form;
        const Source source;
        Plane old, now, last;
        Down(const Circuits &form, const Place *places, const Planes &kept)
            : form(form), source(places, 2),
              old(select(plane_of(0x03), lowered(kept.low, 6), raised(kept.high, 2))),
              now(select(plane_of(0x3f), lowered(kept.low, 2), raised(kept.high, 6))),
              last(kept.low) {}
        Planes planes() const {
            return {lowered(old, 2), select(plane_of(0x03), last, raised(now, 2))};
        }
        [[gnu::always_inline]] void go(const uint8_t *row, const uint8_t *next, Held &held) {
            const Plane two = select(plane_of(0x03), source.codes(row), raised(last, 2));
            const Plane older = old;
            old = now, now = select(plane_of(0x0f), two, raised(now, 4));
            last = source.codes(next);
            const Plane which = select(plane_of(0x03), last, older) & plane_of(0x0f);  // u and c
            const Plane place = shuffled(form.order, which);
            Windows at(old, select(plane_of(0xf0), raised(now, 4), place));  // u, e, place
            at.even = (at.even & 0x3fff) + (at.even >> 4 & 0x3ff);           // 17 e + place
            at.odd = (at.odd & 0x3fff) + (at.odd >> 4 & 0x3ff);
            at.put(held.at);
#ifdef __AVX512BW__
            held.turned = _mm512_test_epi8_mask((__m512i)place, (__m512i)plane_of(1));
#else
            const Plane turned = raised(place, 7);
            std::memcpy(held.turned, &turned, sizeof turned);
#endif
        }
        static Plane shuffled(Plane table, Plane at) {
#ifdef __AVX512BW__
            return (Plane)_mm512_shuffle_epi8((__m512i)table, (__m512i)at);
#else
            return (Plane)_mm256_shuffle_epi8((__m256i)table, (__m256i)at);
#endif
        }
    };
    [[gnu::always_inline]] Floats operator()(const Held &held, int v) const {
        Halves all = entries<1>(table, window(held.at, v));
#ifdef __AVX512BW__
        all = _mm256_mask_rol_epi32(all, held.turned >> EACH * v, all, 16);
#else
        int32_t bytes;
        std::memcpy(&bytes, held.turned + EACH * v, sizeof bytes);
        const __m128i turned = _mm_cvtepi8_epi32(_mm_cvtsi32_si128(bytes));
        const __m128i other = _mm_or_si128(_mm_slli_epi32(all, 16), _mm_srli_epi32(all, 16));
        all = (__m128i)_mm_blendv_ps((__m128)all, (__m128)other, (__m128)turned);
#endif
        return numbers(all);
    }
};

// Of two rows of single halves in turn
[[gnu::always_inline]] inline __m128i alternating(const uint16_t *table, const uint16_t *row,
                                                  const uint16_t *next) {
    uint64_t a, b;
    std::memcpy(&a, row, sizeof a), std::memcpy(&b, next, sizeof b);
    __m128i found = _mm_cvtsi32_si128(table[uint16_t(a)]);
    found = _mm_insert_epi16(found, table[uint16_t(b)], 1);
    found = _mm_insert_epi16(found, table[one_of(a, 16)], 2);
    found = _mm_insert_epi16(found, table[one_of(b, 16)], 3);
    found = _mm_insert_epi16(found, table[one_of(a, 32)], 4);
    found = _mm_insert_epi16(found, table[one_of(b, 32)], 5);
    found = _mm_insert_epi16(found, table[a >> 48], 6);
    return _mm_insert_epi16(found, table[b >> 48], 7);
}

// From a table of single halves
struct Singles : TwoRows {
    struct Held {
        alignas(64) uint16_t at[2][HELD];
    };
    Singles(int bits, const uint16_t *table, int state) : TwoRows(bits, table, state) {}

    template <class Source> struct Down {
        const Singles &form;
        const Source source;
        Planes now;
        Down(const Singles &form, const Place *places, const Planes &kept)
            : form(form), source(places, form.bits), now(kept) {}
        const Planes &planes() const { return now; }
        [[gnu::always_inline]] void go(const uint8_t *row, const uint8_t *next, Held &held) {
            now.take(source.codes(row), form.bits);
            Windows(now.high & form.high, now.low & form.low).put(held.at[0]);
            now.take(source.codes(next), form.bits);
            Windows(now.high & form.high, now.low & form.low).put(held.at[1]);
        }
    };
    [[gnu::always_inline]] Floats operator()(const Held &held, int v) const {
        const uint16_t *row = window(held.at[0], v), *next = window(held.at[1], v);
        const __m128i low = alternating(table, row, next);
#ifdef __AVX512F__
        return numbers(_mm256_set_m128i(alternating(table, row + 4, next + 4), low));
#else
        return numbers(low);
#endif
    }
};

}  // namespace
#endif
