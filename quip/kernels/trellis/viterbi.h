// The Viterbi algorithm over the overlaps of a bitshift trellis: reference.py says what it computes.
//
// A lane is an overlap. The states of LANES neighbours and one u are neighbours too, and the costs
// D that they start from are LANES >> bits numbers, each spread over 1 << bits lanes:
//
//     e        0  1  2  3  4  5  6  7 ...
//     C        C[u E + e]                     E overlaps; s = u E + e
//     D        0  0  0  0  1  1  1  1 ...     + (u E >> bits), 2 bits
//
// A tournament finds the least of all u. The outcome of each comparison is a bit of a lane, stored
// as it is: number i says whether the winner of the u above i beats that of the u up to i, in the
// part of the tournament where they meet.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../lanes.h"

namespace {

#if defined(__AVX512F__)
typedef uint16_t Outcome;
#else
typedef uint8_t Outcome;
#endif
constexpr int MOST = 16;  // u of one tournament; more take part in one after the other

struct Trellis {         // as in cpu.py
    const float *table;  // [2^L, V]
    int32_t bits, L, V;  // bits of a step, of a state; weights of a step
    int32_t wide;        // codes of rows are int64

    int64_t overlaps() const { return int64_t(1) << (L - bits); }
    int64_t branches() const { return int64_t(1) << bits; }
    int64_t blocks() const { return divide_up(overlaps(), LANES); }
    int64_t outcomes() const { return blocks() * (branches() - 1); }  // of a step
    int64_t window() const { return divide_up(L, bits); }             // steps whose bits a state has
    int64_t after(int64_t state, int64_t code) const {
        return (state << bits | code) & ((int64_t(1) << L) - 1);
    }
};

// The lesser of a and b, and whether that is b; of equal ones a
#if defined(__AVX512F__)
inline Floats lesser(Floats a, Floats b, Outcome *second) {
    *second = _mm512_cmp_ps_mask(b, a, _CMP_LT_OQ);
    return _mm512_min_ps(b, a);
}
#elif defined(__AVX__)
inline Floats lesser(Floats a, Floats b, Outcome *second) {
    *second = _mm256_movemask_ps(_mm256_cmp_ps(b, a, _CMP_LT_OQ));
    return _mm256_min_ps(b, a);
}
#else
inline Floats lesser(Floats a, Floats b, Outcome *second) {
    const Ints less = b < a;
    *second = bits_of(less);
    return less ? b : a;
}
#endif

inline Floats lesser(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(b, a);
#elif defined(__AVX__)
    return _mm256_min_ps(b, a);
#else
    return b < a ? b : a;
#endif
}

// Lane l has number l >> BITS
template <int BITS> inline Floats spread(const float *from) {
    if constexpr (LANES >> BITS <= 1) return all(*from);
#if defined(__AVX512F__)
    if constexpr (BITS == 1) {
        const __m512i lanes = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
        return _mm512_permutexvar_ps(lanes, _mm512_castps256_ps512(_mm256_loadu_ps(from)));
    } else if constexpr (BITS == 2) {
        const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(from)), lanes);
    } else {
        const __m512i lanes = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        double pair;
        std::memcpy(&pair, from, sizeof pair);
        return _mm512_permutevar_ps(_mm512_castpd_ps(_mm512_set1_pd(pair)), lanes);
    }
#elif defined(__AVX__)
    if constexpr (BITS == 1) {
        const __m256i lanes = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
        return _mm256_permutevar_ps(_mm256_broadcast_ps((const __m128 *)from), lanes);
    } else {
        const __m256i lanes = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
        double pair;
        std::memcpy(&pair, from, sizeof pair);
        return _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(pair)), lanes);
    }
#else
    Floats to;
    for (int l = 0; l < LANES; l++) to[l] = from[l >> BITS];
    return to;
#endif
}

// The u by which the best walk to overlap e comes, from the outcomes of a step
inline int64_t winner(const Trellis &trellis, const Outcome *outcomes, int64_t e) {
    const int64_t branches = trellis.branches(), lane = e % LANES;
    outcomes += e / LANES * (branches - 1);
    int64_t u = std::max<int64_t>(branches - MOST, 0);
    while (u > 0 && !(outcomes[u - 1] >> lane & 1)) u -= MOST;
    for (int64_t count = std::min<int64_t>(branches, MOST) / 2; count; count /= 2)
        if (outcomes[u + count - 1] >> lane & 1) u += count;
    return u;
}

// One search at a time: a step takes D from `now` to `next`
struct Walk {
    const float *x;  // [V], of the step
    const float *now;
    float *next;
    Outcome *outcomes;  // of the step
};

template <int N> struct Several { Floats of[N]; };

// The step of N walks; BITS is 4 for more bits too
template <int BITS, int V, int N, bool KEPT> class Step {
  public:
    Step(const Trellis &trellis, const Floats *table, const Walk *given)
        : branches(BITS < 4 ? 1 << BITS : trellis.branches()),
          overlap_bits(trellis.L - trellis.bits),
          bits(BITS < 4 ? BITS : trellis.bits),
          blocks(trellis.blocks()),
          table(table) {
        for (int n = 0; n < N; n++) {
            walks[n] = given[n];
            for (int v = 0; v < V; v++) x[n][v] = all(walks[n].x[v]);
        }
    }

    void take() {
        for (int64_t block = 0; block < blocks; block++) {
            first = block * LANES;
            Several<N> best;
            for (int64_t u = 0; u < branches; u += 1 << BITS) {
                const Several<N> found = least<1 << BITS>(u);
                best = u ? better(best, found, u - 1) : found;
            }
            for (int n = 0; n < N; n++) {
                put(walks[n].next + first, best.of[n]);
                walks[n].outcomes += branches - 1;
            }
            table += branches * V;
        }
    }

  private:
    const int64_t branches;
    const int overlap_bits, bits;
    const int64_t blocks;
    const Floats *table;  // [branches, V] of the block
    Walk walks[N];
    Floats x[N][V];
    int64_t first;  // overlap of the block

    // Of the walks that come by u ... u + COUNT - 1
    template <int COUNT> [[gnu::always_inline]] inline Several<N> least(int64_t u) const {
        if constexpr (COUNT == 1) {
            Several<N> costs;
            const int64_t from = (u << overlap_bits >> bits) + (first >> bits);
            for (int n = 0; n < N; n++) {
                Floats squares = square(table[u * V] - x[n][0]);
                for (int v = 1; v < V; v++) squares += square(table[u * V + v] - x[n][v]);
                costs.of[n] = squares + spread<BITS>(walks[n].now + from);
            }
            return costs;
        } else {
            const auto low = least<COUNT / 2>(u);
            return better(low, least<COUNT / 2>(u + COUNT / 2), u + COUNT / 2 - 1);
        }
    }

    [[gnu::always_inline]] inline Several<N> better(const Several<N> &a, const Several<N> &b,
                                                    int64_t number) const {
        Several<N> found;
        for (int n = 0; n < N; n++)
            if constexpr (KEPT)
                found.of[n] = lesser(a.of[n], b.of[n], walks[n].outcomes + number);
            else
                found.of[n] = lesser(a.of[n], b.of[n]);
        return found;
    }

    static Floats square(Floats x) { return x * x; }
};

}  // namespace
