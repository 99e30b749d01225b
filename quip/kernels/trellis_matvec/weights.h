// The weights of a block from its states: looked up, or computed as the name of the code says.
//
// A form of weights has the states of ROWS rows `put` into a `Held`, of which it then makes vectors
// of weights: those of lane l of vector v belong to the step step(v, l) of the block, and to one of
// its WIDTH columns or ROWS rows, minor(l).

#pragma once

#include "down.h"
#include "walk.h"

namespace {

inline Shorts low_bits(int count) {
    const uint16_t mask = (1u << count) - 1;
    return Shorts{} + mask;
}

// Looked up one by one: the vectors have ROWS x WIDTH weights of one step after the other
template <int ROWS_, int WIDTH_> struct Listed {
    static constexpr int ROWS = ROWS_, WIDTH = WIDTH_, EACH = LANES / ROWS / WIDTH;
    static constexpr int VECTORS = HELD / EACH, BATCH = GROUP / ROWS;
    using Register = ::Register;
    struct Held {
        alignas(64) uint16_t at[HELD];
    };
    static int step(int v, int lane) { return v * EACH + lane / (ROWS * WIDTH); }
    static int minor(int lane) { return lane % (ROWS * WIDTH); }

    Shorts mask;
    explicit Listed(int bits) : mask(low_bits(bits)) {}
    [[gnu::always_inline]] void put(Held &held, const Shorts *low, const Shorts *high) const {
        const Shorts both[2] = {low[ROWS - 1] & mask, high[ROWS - 1] & mask};
        std::memcpy(held.at, both, sizeof both);
    }
};

template <int WIDTH_> struct Numbers : Listed<1, WIDTH_> {
    using Base = Listed<1, WIDTH_>;
    const float *table;
    Numbers(const float *table, int bits) : Base(bits), table(table) {}
    [[gnu::always_inline]] Floats operator()(const typename Base::Held &held, int v) const {
        constexpr int WIDTH = WIDTH_;
        float lanes[LANES];
        const uint16_t *at = held.at + v * Base::EACH;
#pragma GCC unroll 16
        for (int i = 0; i < Base::EACH; i++)
            std::memcpy(lanes + i * WIDTH, table + at[i] * WIDTH, 4 * WIDTH);
        return load(lanes);
    }
};

#ifdef HALVES
// Two halves an entry, of two columns
struct Doubles : Listed<1, 2> {
    const uint16_t *table;
    Doubles(const uint16_t *table, int bits) : Listed<1, 2>(bits), table(table) {}
    [[gnu::always_inline]] Floats operator()(const Held &held, int v) const {
        return numbers(entries<2>(table, held.at + v * EACH));
    }
};
#endif

// `start` and the sum of the bytes
inline Naturals add_bytes(uint32_t start, Naturals x) {
#ifdef __AVX512VNNI__
    const __m512i ones = _mm512_set1_epi8(1);
    return (Naturals)_mm512_dpbusd_epi32(_mm512_set1_epi32(start), (__m512i)x, ones);
#else
    const Naturals two = (x & 0xff00ff) + (x >> 8 & 0xff00ff);
    return start + (two & 0xffff) + (two >> 16);
#endif
}

// To the 11 bits of a half, of two as near the even one; above its subnormal numbers
inline Floats rounded_to_half(Floats x) {
    const Naturals exponent = (Naturals)x & 0x7f800000;
    const Floats large = (Floats)(exponent + 0x06c00000);  // its power of 2, times 1.5 * 2^13
    return x + large - large;
}

// Computed from words x = factor s + offset: even steps of a vector of states, then odd ones
struct Words32 {
    static constexpr int ROWS = 1, WIDTH = 1, VECTORS = HELD / LANES, BATCH = 1;
    using Register = ::Register;
    struct Held {
        Naturals states[2];
    };
    static int step(int v, int lane) { return v / 2 * STEPS + 2 * lane + v % 2; }
    static int minor(int) { return 0; }

    uint32_t mask, factor, offset;
    [[gnu::always_inline]] void put(Held &held, const Shorts *low, const Shorts *high) const {
        held.states[0] = (Naturals)*low, held.states[1] = (Naturals)*high;
    }
    [[gnu::always_inline]] Naturals word(const Held &held, int v) const {
        const Naturals both = held.states[v / 2];
        return ((v % 2 ? both >> 16 : both) & mask) * factor + offset;
    }
};

#ifdef __FMA__
// x a - b, rounded once: left to the compiler, that is so for some of its flags only
inline Floats product_less(Floats x, float a, float b) {
#ifdef __AVX512F__
    return (Floats)_mm512_fmsub_ps((__m512)x, _mm512_set1_ps(a), _mm512_set1_ps(b));
#else
    return (Floats)_mm256_fmsub_ps((__m256)x, _mm256_set1_ps(a), _mm256_set1_ps(b));
#endif
}
#endif

constexpr uint32_t START = 0x4b000000;  // 2^23, whose last bit is that of 1

// (1024 + the sum of the bytes) a + b as a half; the sum times a has 22 bits
struct Mul1 : Words32 {
    explicit Mul1(uint32_t mask) : Words32{mask, 0x83dcd12d, 0} {}
    [[gnu::always_inline]] Floats operator()(const Held &held, int v) const {
        const Floats sum = (Floats)add_bytes(START + 1024, word(held, v));
#ifdef __FMA__
        return rounded_to_half(product_less(sum, 0x1.bb8p-8f, 0x1.bb94c4p15f));
#else
        return rounded_to_half((sum - 8388608.0f) * 0x1.bb8p-8f - 0x1.4c4p3f);
#endif
    }
};

// (the sum of the bytes of x & bits, less `middle`) unit
struct Bytes32 : Words32 {
    uint32_t bits;
    float middle, unit;
    [[gnu::always_inline]] Floats operator()(const Held &held, int v) const {
        return ((Floats)add_bytes(START, word(held, v) & bits) - (8388608.0f + middle)) * unit;
    }
};

// The sum, as a half, of two halves of random signs, mantissas and low exponents
struct Halves32 : Words32 {
    [[gnu::always_inline]] Floats operator()(const Held &held, int v) const {
        const Naturals y = (word(held, v) & 0x8fff8fff) ^ 0x3b603b60;  // none is subnormal
        const Naturals low = (y << 16 & 0x80000000) | ((y << 13 & 0xfffe000) + 0x38000000);
        const Naturals high = (y & 0x80000000) | ((y >> 3 & 0xfffe000) + 0x38000000);
        return rounded_to_half((Floats)low + (Floats)high);
    }
};

}  // namespace
