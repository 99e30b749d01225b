// The weights of blocks of columns that go down the rows of a matrix: those of two rows at once, from tables of
// halves, of which a load brings both where the table holds them side by side.
//
// A form of weights goes `Down` a block, two rows at a time, and has what it needs of them put into a `Held`, of
// which it then makes vectors of weights. The lanes of a vector are two rows of one column after the other.

#pragma once

#include "walk.h"

#if defined(__AVX512BW__) || (defined(__AVX2__) && defined(__F16C__) && !defined(__AVX512F__))
#define HALVES  // are read

namespace {

typedef uint8_t Plane __attribute__((vector_size(HELD)));  // a byte of each column of a block
typedef uint16_t Twos __attribute__((vector_size(HELD)));

inline Plane plane(const uint8_t *from) {
    Plane to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

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

// The last 16 bits of the columns of a block
struct Planes {
    static constexpr int COLUMNS = HELD;
    Plane high = {}, low = {};
    void take(const uint8_t *bytes, int top, int bits) {  // top: from a code's first bit to that of 16
        const Plane codes = lowered(plane(bytes), 16 - top - bits);
        high = select(plane_of((1 << bits) - 1), lowered(low, 8 - bits), raised(high, bits));
        low = select(plane_of((1 << bits) - 1), codes, raised(low, bits));
    }
};

constexpr int EACH = LANES / 2;  // columns of a vector

// What are the bytes above and below of 16 bits each: those of groups of 8 columns in turn, and the others
inline void pair_up(Plane high, Plane low, Twos &even, Twos &odd) {
#ifdef __AVX512BW__
    even = (Twos)_mm512_unpacklo_epi8((__m512i)low, (__m512i)high);
    odd = (Twos)_mm512_unpackhi_epi8((__m512i)low, (__m512i)high);
#else
    even = (Twos)_mm256_unpacklo_epi8((__m256i)low, (__m256i)high);
    odd = (Twos)_mm256_unpackhi_epi8((__m256i)low, (__m256i)high);
#endif
}

inline void put(uint16_t *to, Twos even, Twos odd) {
    std::memcpy(to, &even, sizeof even), std::memcpy(to + HELD / 2, &odd, sizeof odd);
}

// Windows of 16 bits in the order of `window`
inline void put(uint16_t *to, Plane high, Plane low) {
    Twos even, odd;
    pair_up(high, low, even, odd);
    put(to, even, odd);
}

// Of the first column of vector v; the others follow
inline const uint16_t *window(const uint16_t *all, int v) {
    const int column = v * EACH, eight = column / 8;
    return all + eight % 2 * (HELD / 2) + eight / 2 * 8 + column % 8;
}

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

// Two halves for each of four windows, from table + WIDTH * window on; windows lie in memory and are
// taken apart in registers: loads are what is short
template <int WIDTH>
[[gnu::always_inline]] inline __m128i entries(const uint16_t *table, const uint16_t *at) {
    uint64_t all;
    std::memcpy(&all, at, sizeof all);
    __m128i found = _mm_cvtsi32_si128(both<WIDTH>(table, uint16_t(all)));
    found = _mm_insert_epi32(found, both<WIDTH>(table, one_of(all, 16)), 1);
    found = _mm_insert_epi32(found, both<WIDTH>(table, one_of(all, 32)), 2);
    return _mm_insert_epi32(found, both<WIDTH>(table, all >> 48), 3);
}

#ifdef __AVX512F__
// Of eight windows; some come in without a shuffle, of which fewer are done in a cycle
template <int WIDTH>
[[gnu::always_inline]] inline __m256i eight(const uint16_t *table, const uint16_t *at) {
    uint64_t all;
    std::memcpy(&all, at + 4, sizeof all);
    __m256i found = _mm256_castsi128_si256(entries<WIDTH>(table, at));
    found = _mm256_mask_set1_epi32(found, 16, both<WIDTH>(table, uint16_t(all)));
    found = _mm256_mask_set1_epi32(found, 32, both<WIDTH>(table, one_of(all, 16)));
    found = _mm256_mask_set1_epi32(found, 64, both<WIDTH>(table, one_of(all, 32)));
    return _mm256_mask_set1_epi32(found, 128, both<WIDTH>(table, all >> 48));
}
#endif

[[gnu::always_inline]] inline Floats numbers(__m128i low, __m128i high) {
#ifdef __AVX512F__
    return (Floats)_mm512_cvtph_ps(_mm256_set_m128i(high, low));
#else
    return (Floats)_mm256_cvtph_ps(low);
#endif
}

// Of two rows, whose states together are a window of L + bits bits, which names an entry
struct Pairs {
    static constexpr int ROWS = 2, WIDTH = 1, VECTORS = HELD / EACH;
    using Register = Planes;
    struct Held {
        alignas(64) uint16_t at[HELD];
    };
    static int step(int v, int lane) { return v * EACH + lane / 2; }
    static int minor(int) { return 0; }

    const uint16_t *table;
    int bits;
    Plane high, low;  // masks
    Pairs(const uint16_t *table, int window, int bits)
        : table(table), bits(bits), high(plane_of(((1 << window) - 1) >> 8)), low(plane_of((1 << window) - 1)) {}

    struct Down {
        const Pairs &form;
        Planes &kept, now;
        const int right, bits;
        const Plane one, both;
        Down(const Pairs &form, Planes &kept, int top)
            : form(form), kept(kept), now(kept), right(16 - top - form.bits), bits(form.bits),
              one(plane_of((1 << bits) - 1)), both(plane_of((1 << 2 * bits) - 1)) {}
        ~Down() { kept = now; }
        [[gnu::always_inline]] void go(const uint8_t *row, const uint8_t *next, Held &held) {
            const Plane first = lowered(plane(row), right), second = lowered(plane(next), right);
            const Plane codes = select(one, second, raised(first, bits));
            now.high = select(both, lowered(now.low, 8 - 2 * bits), raised(now.high, 2 * bits));
            now.low = select(both, codes, raised(now.low, 2 * bits));
            put(held.at, now.high & form.high, now.low & form.low);
        }
    };
    [[gnu::always_inline]] Floats operator()(const Held &held, int v) const {
        const uint16_t *at = window(held.at, v);
#ifdef __AVX512F__
        return (Floats)_mm512_cvtph_ps(eight<2>(table, at));
#else
        return (Floats)_mm256_cvtph_ps(entries<2>(table, at));
#endif
    }
};

// The same of 14 bits, in half the room: see `circuits` in cpu.py
struct Circuits {
    static constexpr int ROWS = 2, WIDTH = 1, VECTORS = HELD / EACH;
    using Register = Planes;
    struct Held {
        alignas(64) uint16_t at[HELD];
#ifdef __AVX512BW__
        uint64_t turned;
#else
        alignas(64) uint8_t turned[HELD];
#endif
    };
    static int step(int v, int lane) { return v * EACH + lane / 2; }
    static int minor(int) { return 0; }

    const uint16_t *table;
    Plane places;
    Circuits(const uint16_t *table) : table(table) {
        for (int i = 0; i < HELD; i++) {
            const int u = i % 16 / 4, c = i % 4, odd = (u ^ c) & 1;
            places[i] = 2 * ((u >> 1 ^ (odd & (c == 3))) << 2 | c) + odd;
        }
    }

    // Codes of the rows up to the first of two: `older`, `old` and `now` have four of them, and end
    // two rows one after the other
    struct Down {
        const Circuits &form;
        Planes &kept;
        const int right;
        Plane old, now, last;
        Down(const Circuits &form, Planes &kept, int top)
            : form(form), kept(kept), right(14 - top),
              old(select(plane_of(3), lowered(kept.low, 6), raised(kept.high, 2))),
              now(select(plane_of(0x3f), lowered(kept.low, 2), raised(kept.high, 6))), last(kept.low) {}
        ~Down() {
            kept.high = lowered(old, 2) & plane_of(0x3f);
            kept.low = select(plane_of(3), last, raised(now, 2));
        }
        [[gnu::always_inline]] void go(const uint8_t *row, const uint8_t *next, Held &held) {
            const Plane first = select(plane_of(3), lowered(plane(row), right), raised(last, 2));
            const Plane older = old, shifted = raised(now, 4);
            last = lowered(plane(next), right);
            old = now, now = select(plane_of(15), first, shifted);
            const Plane which = select(plane_of(3), last, older) & plane_of(15);
            const Plane place = shuffled(form.places, which);
            const Plane low = select(plane_of(0xf0), raised(now, 4), place);
            Twos even, odd;
            pair_up(old, low, even, odd);
            put(held.at, at(even), at(odd));
#ifdef __AVX512BW__
            held.turned = _mm512_test_epi8_mask((__m512i)place, (__m512i)plane_of(1));
#else
            const Plane turned = raised(place, 7);
            std::memcpy(held.turned, &turned, sizeof turned);
#endif
        }
        static Twos at(Twos all) { return (all & 0x3fff) + (all >> 4 & 0x3ff); }
        static Plane shuffled(Plane table, Plane at) {
#ifdef __AVX512BW__
            return (Plane)_mm512_shuffle_epi8((__m512i)table, (__m512i)at);
#else
            return (Plane)_mm256_shuffle_epi8((__m256i)table, (__m256i)at);
#endif
        }
    };
    [[gnu::always_inline]] Floats operator()(const Held &held, int v) const {
        const uint16_t *at = window(held.at, v);
#ifdef __AVX512BW__
        __m256i all = eight<1>(table, at);
        return (Floats)_mm512_cvtph_ps(_mm256_mask_rol_epi32(all, held.turned >> 8 * v, all, 16));
#else
        const __m128i low = entries<1>(table, at);
        int32_t four;
        std::memcpy(&four, held.turned + EACH * v, sizeof four);
        const __m128i turned = _mm_cvtepi8_epi32(_mm_cvtsi32_si128(four));
        const __m128i order = _mm_set_epi8(13, 12, 15, 14, 9, 8, 11, 10, 5, 4, 7, 6, 1, 0, 3, 2);
        return numbers((__m128i)_mm_blendv_ps((__m128)low, (__m128)_mm_shuffle_epi8(low, order), (__m128)turned), low);
#endif
    }
};

// Of two rows of single halves in turn
[[gnu::always_inline]] inline __m128i alternating(const uint16_t *table, const uint16_t *row, const uint16_t *next) {
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
struct Singles {
    static constexpr int ROWS = 2, WIDTH = 1, VECTORS = HELD / EACH;
    using Register = Planes;
    struct Held {
        alignas(64) uint16_t at[2][HELD];
    };
    static int step(int v, int lane) { return v * EACH + lane / 2; }
    static int minor(int) { return 0; }

    const uint16_t *table;
    int bits;
    Plane high, low;  // masks
    Singles(const uint16_t *table, int state, int bits)
        : table(table), bits(bits), high(plane_of(((1 << state) - 1) >> 8)), low(plane_of((1 << state) - 1)) {}

    struct Down {
        const Singles &form;
        Planes &kept, now;
        const int top;
        Down(const Singles &form, Planes &kept, int top) : form(form), kept(kept), now(kept), top(top) {}
        ~Down() { kept = now; }
        [[gnu::always_inline]] void go(const uint8_t *row, const uint8_t *next, Held &held) {
            now.take(row, top, form.bits);
            put(held.at[0], now.high & form.high, now.low & form.low);
            now.take(next, top, form.bits);
            put(held.at[1], now.high & form.high, now.low & form.low);
        }
    };
    [[gnu::always_inline]] Floats operator()(const Held &held, int v) const {
        const uint16_t *row = window(held.at[0], v), *next = window(held.at[1], v);
        constexpr int LAST = EACH - 4;
        return numbers(alternating(table, row, next), alternating(table, row + LAST, next + LAST));
    }
};

}  // namespace
#endif
