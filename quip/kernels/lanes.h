// Vectors of floats as wide as the processor's registers, and numbers in and out of them.

#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {  // a library is one source

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2;  // 16 registers
#elif defined(__aarch64__)
constexpr int LANES = 4, VECTORS = 4;
#else
constexpr int LANES = 4, VECTORS = 2;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Naturals __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

inline int64_t divide_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

inline Floats all(float value) { return value - Floats{}; }

inline Floats load(const float *from) { return *reinterpret_cast<const Unaligned *>(from); }

// LANES numbers of which `left` are there
inline Floats load(const float *from, int64_t left, float fill = 0) {
    if (left >= LANES) return load(from);
    Floats lanes = all(fill);
    for (int64_t i = 0; i < left; i++) lanes[i] = from[i];
    return lanes;
}

// LANES bytes as numbers. g++ takes __builtin_convertvector apart, byte by byte
inline Ints widened(const uint8_t *from) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from)));
#else
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Ints);
#endif
}

// LANES numbers of bfloat16, the upper halves of floats
inline Floats load(const uint16_t *from) {
#if defined(__AVX512F__)
    const auto *at = reinterpret_cast<const __m256i *>(from);
    const Naturals low = (Naturals)_mm512_cvtepu16_epi32(_mm256_loadu_si256(at));
#elif defined(__AVX2__)
    const auto *at = reinterpret_cast<const __m128i *>(from);
    const Naturals low = (Naturals)_mm256_cvtepu16_epi32(_mm_loadu_si128(at));
#else
    Naturals low;
    for (int i = 0; i < LANES; i++) low[i] = from[i];
#endif
    return (Floats)(low << 16);
}

// The bits of the nearest bfloat16, of two as near those of the even one; NaN stays NaN
inline Naturals rounded(Floats x) {
    const Naturals bits = (Naturals)x, up = bits + 0x7fff + (bits >> 16 & 1);
    return (x == x ? up : bits | 0x400000) >> 16;
}

inline void put(float *to, Floats x) { std::memcpy(to, &x, sizeof x); }

inline void put(uint16_t *to, Floats x) {
    const Naturals bits = rounded(x);
#ifdef __AVX512F__
    const __m256i halves = _mm512_cvtepi32_epi16((__m512i)bits);
    std::memcpy(to, &halves, sizeof halves);
#else
    for (int i = 0; i < LANES; i++) to[i] = bits[i];
#endif
}

template <class Number, class Vector> void store(Number *to, const Vector &lanes, int64_t left) {
    if (left >= LANES)
        std::memcpy(to, &lanes, sizeof lanes);
    else
        for (int64_t i = 0; i < left; i++) to[i] = lanes[i];
}

inline void store_codes(void *to, bool wide, int64_t at, Ints codes, int64_t left) {
    if (wide)
        store(static_cast<int32_t *>(to) + at, codes, left);
    else
        store(static_cast<uint8_t *>(to) + at, __builtin_convertvector(codes, Bytes), left);
}

inline Floats without_padding(Floats lanes, int64_t left) {
    for (int64_t i = left > 0 ? left : 0; i < LANES; i++) lanes[i] = 0;
    return lanes;
}

// Bit l is that of lane l, which is 0 or -1
inline uint32_t bits_of(Ints lanes) {
    constexpr uint32_t BITS[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096,
                                 8192, 16384, 32768};
    uint32_t bits[LANES], all = 0;
    std::memcpy(bits, &lanes, sizeof bits);
    for (int l = 0; l < LANES; l++) all |= bits[l] & BITS[l];
    return all;
}

}  // namespace
