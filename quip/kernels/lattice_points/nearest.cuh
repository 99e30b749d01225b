// The nearest points of E8P and E81B to a vector of eight weights in the registers of a thread, and
// the points of codes: what cpu.cpp does for many vectors at once.
//
// |z_i| carries i in its three lowest bits, so that sorting eight keys needs nothing else and no two
// are equal. Where two points are equally far but for 1 part in 2^18, either may be taken.

#ifndef QUIP_NEAREST
#define QUIP_NEAREST

#include "../device.cuh"

struct Tables {  // as in cpu.py
    const float *magnitudes, *signs, *shifts;  // E8P: [256, 8], [256, 8], [256]
    const int32_t *code_of;                    // [6561]
    const float *patterns;                     // not read here
    const float *points;                       // E81B: [256, 8]
    const uint8_t *pairs;                      // [8, 8, 2, 2]
};

enum Stage : int32_t { NONE, E8P, E81B };

struct Lattice {  // as in cuda.py: q_0 + q_1 / ratio
    Tables tables;
    Stage first, second;
    float ratio;
    int32_t wide;  // codes are int64
};

namespace {

constexpr int DIM = 8, ROWS = 29;
// Rows 227 to 255 of e8p.py: bit i where coordinate i is 1/2 and not 3/2
__constant__ constexpr uint8_t PATTERNS[ROWS] = {
    0x0e, 0x0d, 0x0b, 0x07, 0xc8, 0xa8, 0x98, 0x68, 0x58, 0x38, 0xc4, 0xa4, 0x94, 0x64, 0x54,
    0x34, 0xc2, 0xa2, 0x92, 0x62, 0x52, 0x31, 0xc1, 0xa1, 0x91, 0x61, 0x51, 0x13, 0x8c};

struct Point {
    uint32_t digits;     // |v_i| - 1/2, in two bits each
    uint32_t negatives;  // bit i: v_i < 0
    bool minus;          // the shift is -1/4
};

// What z = x - shift says about the nearest v: which keys have 3/2 and 5/2, which sign changes
struct Choice {
    float gain;              // <v, z> - |v|^2 / 2 + <shift, x>, up to a constant
    float bound;             // no pattern of squared norm 12 gains more
    int halves, five, flip;  // smallest key with 3/2, with 5/2; the key that changes its sign
};

DEVICE uint32_t is_negative(float z) { return __float_as_uint(z) >> 31; }

DEVICE int key_of(float z, int i) { return (__float_as_int(z) & 0x7ffffff8) | i; }

DEVICE void sort_pair(int &larger, int &smaller) {
    const int a = larger, b = smaller;
    larger = a > b ? a : b;
    smaller = a > b ? b : a;
}

// Eight keys in descending order, by 19 exchanges
DEVICE void sort(int (&k)[DIM]) {
    sort_pair(k[0], k[2]), sort_pair(k[1], k[3]), sort_pair(k[4], k[6]), sort_pair(k[5], k[7]);
    sort_pair(k[0], k[4]), sort_pair(k[1], k[5]), sort_pair(k[2], k[6]), sort_pair(k[3], k[7]);
    sort_pair(k[0], k[1]), sort_pair(k[2], k[3]), sort_pair(k[4], k[5]), sort_pair(k[6], k[7]);
    sort_pair(k[2], k[4]), sort_pair(k[3], k[5]);
    sort_pair(k[1], k[4]), sort_pair(k[3], k[6]);
    sort_pair(k[1], k[2]), sort_pair(k[3], k[4]), sort_pair(k[5], k[6]);
}

// The best of the seven shapes of reference.py. Those of even sum come first, then those of odd
// sum; pairs of 3/2 gain less and less, so the second pair is only better where the first is.
DEVICE Choice best_shape(const float (&x)[DIM], float shift) {
    constexpr int NEVER = 0x7fffffff;
    int k[DIM], parity = 0;
    float sum = 0, size = 0;
#pragma unroll
    for (int i = 0; i < DIM; i++) {
        const float z = x[i] - shift;
        parity ^= __float_as_int(z);
        k[i] = key_of(z, i);
        sum += x[i];
        size += __int_as_float(k[i]);
    }
    const bool odd = parity < 0;  // of the negatives
    sort(k);
    float a[DIM];
#pragma unroll
    for (int i = 0; i < DIM; i++) a[i] = __int_as_float(k[i]) - 1.0f;
    const float least = __int_as_float(k[7]), even_cost = odd ? least : 0.0f;
    const float odd_cost = odd ? 0.0f : least;

    const float first = a[0] + a[1], second = a[2] + a[3], five = 2.0f * a[0] - 1.0f;
    const float pairs = fmaxf(first, 0.0f) + fmaxf(second, 0.0f);
    int even_halves = second > 0.0f ? k[3] : first > 0.0f ? k[1] : NEVER;
    even_halves = five > pairs ? k[0] : even_halves;
    const int even_five = five > pairs ? k[0] : NEVER;
    const float even_gain = fmaxf(five, pairs) - even_cost;

    const float third = a[1] + a[2], fives = 2.0f * a[0] + a[1] - 1.0f;
    const float singles = a[0] + fmaxf(third, 0.0f);
    int odd_halves = third > 0.0f ? k[2] : k[0];
    odd_halves = fives > singles ? k[1] : odd_halves;
    const int odd_five = fives > singles ? k[0] : NEVER;
    const float odd_gain = fmaxf(fives, singles) - odd_cost;

    const bool odd_better = odd_gain > even_gain;
    const float base = 0.5f * size + shift * sum;
    Choice choice;
    choice.gain = base + fmaxf(odd_gain, even_gain);
    choice.bound = base + (a[0] + a[1] + a[2] + a[3] + a[4]) - odd_cost;
    choice.halves = odd_better ? odd_halves : even_halves;
    choice.five = odd_better ? odd_five : even_five;
    choice.flip = odd_better != odd ? k[7] : -1;
    return choice;
}

DEVICE constexpr int half_of(int row, int nth) {  // the nth coordinate of a pattern that is 1/2
    int i = 0;
    while (!(PATTERNS[row] >> i & 1) || nth--) i++;
    return i;
}

// What a pattern gains less than 3/2 everywhere would, with its row in the five lowest bits
template <int ROW> DEVICE int lost(const float (&a)[DIM], float thrice, bool even) {
    constexpr int I = half_of(ROW, 0), J = half_of(ROW, 1), K = half_of(ROW, 2);
    const float flip = fminf(fminf(fminf(a[I], a[J]), a[K]), thrice);
    const float all = a[I] + a[J] + a[K] + (even ? flip : 0.0f);
    return (__float_as_int(all) & ~31) | ROW;
}

template <int ROW> DEVICE void least_lost(const float (&a)[DIM], float thrice, bool even, int (&low)[4]) {
    if constexpr (ROW < ROWS) {
        const int one = lost<ROW>(a, thrice, even);
        low[ROW % 4] = one < low[ROW % 4] ? one : low[ROW % 4];
        least_lost<ROW + 1>(a, thrice, even, low);
    }
}

// The patterns of squared norm 12 for one shift: takes the best if it gains more. Its sum is odd;
// where z has an even number of negatives the coordinate of the least |z_i| |v_i| changes its sign.
DEVICE void try_patterns(const float (&x)[DIM], float shift, float &gain, Point &point) {
    float a[DIM], sum = 0, size = 0, least = INFINITY;
    uint32_t negatives = 0;
#pragma unroll
    for (int i = 0; i < DIM; i++) {
        const float z = x[i] - shift;
        a[i] = fabsf(z);
        negatives |= is_negative(z) << i;
        sum += x[i];
        size += a[i];
        least = fminf(least, a[i]);
    }
    const bool even = __popc(negatives) % 2 == 0;
    int low[4] = {0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff};
    least_lost<0>(a, 3.0f * least, even, low);
    sort_pair(low[0], low[1]), sort_pair(low[2], low[3]), sort_pair(low[1], low[3]);
    const float gained = 1.5f * size + shift * sum - 5.0f - __int_as_float(low[3] & ~31);
    if (!(gained > gain)) return;
    const uint32_t halves = PATTERNS[low[3] & 31];
    uint32_t digits = 0, flipped = 0;
    float cost = INFINITY;
#pragma unroll
    for (int i = 0; i < DIM; i++) {
        const bool half = halves >> i & 1;
        const float its = half ? a[i] : 3.0f * a[i];
        flipped = its < cost ? 1u << i : flipped;
        cost = fminf(its, cost);
        digits |= (half ? 0u : 1u) << 2 * i;
    }
    gain = gained;
    point = {digits, negatives ^ (even ? flipped : 0), shift < 0.0f};
}

DEVICE Point nearest_e8p(const float (&x)[DIM]) {
    const Choice plus = best_shape(x, 0.25f), minus = best_shape(x, -0.25f);
    const bool other = minus.gain > plus.gain;
    const float shift = other ? -0.25f : 0.25f;
    const int halves = other ? minus.halves : plus.halves, five = other ? minus.five : plus.five;
    const int flip = other ? minus.flip : plus.flip;
    Point point = {0, 0, other};
#pragma unroll
    for (int i = 0; i < DIM; i++) {
        const float z = x[i] - shift;
        const int key = key_of(z, i);
        point.digits |= ((key >= halves ? 1u : 0u) + (key >= five ? 1u : 0u)) << 2 * i;
        point.negatives |= (is_negative(z) ^ (key == flip ? 1u : 0u)) << i;
    }
    // About one in twenty Gaussian vectors, so most warps, but both shifts of a vector seldom
    float gain = fmaxf(plus.gain, minus.gain);
    bool by_plus = plus.bound > gain, by_minus = minus.bound > gain;
#pragma unroll 1
    while (by_plus || by_minus) {
        try_patterns(x, by_plus ? 0.25f : -0.25f, gain, point);
        by_minus = by_plus && by_minus && minus.bound > gain;
        by_plus = false;
    }
    return point;
}

DEVICE uint32_t code_of(const Tables &t, const Point &point) {
    int index = 0;
    uint32_t signs = point.minus;
#pragma unroll
    for (int i = 0; i < DIM; i++) {
        index = 3 * index + (point.digits >> 2 * i & 3);
        signs ^= (point.negatives >> i & 1) << (i / 2 + i % 2 * 4);  // the order of e8p.py
    }
    return __ldg(t.code_of + index) ^ signs;
}

DEVICE float coordinate(const Point &point, int i) {
    const float size = (point.digits >> 2 * i & 3) + 0.5f;
    return (point.negatives >> i & 1 ? -size : size) + (point.minus ? -0.25f : 0.25f);
}

// 0, +-e_i +-e_j, +-1/2 everywhere or +-2 e_i, each at the largest |x_i|
DEVICE uint32_t nearest_e81b(const Tables &t, const float (&x)[DIM]) {
    int k[DIM];
    uint32_t negatives = 0;
    float size = 0;
#pragma unroll
    for (int n = 0; n < DIM; n++) {
        k[n] = key_of(x[n], n);
        negatives |= is_negative(x[n]) << n;
        size += __int_as_float(k[n]);
    }
    sort(k);
    const bool odd = __popc(negatives) % 2;
    const uint32_t i = k[0] & 7, j = k[1] & 7, s = negatives >> i & 1;
    const float pair = __int_as_float(k[0]) + __int_as_float(k[1]) - 1.0f;
    const float half = 0.5f * size - 1.0f - (odd ? __int_as_float(k[7]) : 0.0f);
    // -2 e_7 is not there
    const float single = i == 7 && s ? pair : 2.0f * __int_as_float(k[0]) - 2.0f;
    const float gain = fmaxf(pair, fmaxf(half, single));
    // The rows of half points count in binary: coordinate 0 first, 1 if positive, 7 follows
    const uint32_t changed = negatives ^ (odd ? 1u << (k[7] & 7) : 0);
    uint32_t row = 0;
#pragma unroll
    for (int c = 0; c < 7; c++) row |= (~changed >> c & 1) << (6 - c);
    if (!(gain > 0.0f)) return 56;
    if (half >= gain) return 113 + row;
    if (single > pair) return 241 + i + 8 * s;
    return __ldg(t.pairs + (i << 5 | j << 2 | s << 1 | (negatives >> j & 1)));
}

// A row of eight numbers
DEVICE void read_row(const float *from, float (&to)[DIM]) {
    const float4 low = __ldg((const float4 *)from), high = __ldg((const float4 *)from + 1);
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}

// The point of a code of one stage
DEVICE void read_point(const Tables &t, Stage stage, uint32_t code, float (&q)[DIM]) {
    if (stage == E81B) return read_row(t.points + (code & 255) * DIM, q);
    float signs[DIM];
    read_row(t.magnitudes + (code >> 8 & 255) * DIM, q);
    read_row(t.signs + (code & 255) * DIM, signs);
    const float shift = __ldg(t.shifts + (code & 255));
#pragma unroll
    for (int i = 0; i < DIM; i++) q[i] = q[i] * signs[i] + shift;
}

// The codes of x, which becomes what they leave of it
DEVICE void take_nearest(const Lattice &a, float (&x)[DIM], uint32_t (&codes)[2]) {
    codes[0] = codes[1] = 0;
    float q[DIM];
#pragma unroll 1
    for (int stage = 0; stage < (a.second == NONE ? 1 : 2); stage++) {
        uint32_t code;
        if ((stage ? a.second : a.first) == E8P) {
            const Point point = nearest_e8p(x);
            code = code_of(a.tables, point);
#pragma unroll
            for (int i = 0; i < DIM; i++) q[i] = coordinate(point, i);
        } else {
            code = nearest_e81b(a.tables, x);
            read_point(a.tables, E81B, code, q);
        }
        codes[0] = stage ? codes[0] : code;
        codes[1] = stage ? code : 0;
        const float unit = stage || a.second == NONE ? 1.0f : a.ratio;
#pragma unroll
        for (int i = 0; i < DIM; i++) x[i] = (x[i] - q[i]) * unit;
    }
    if (a.second != NONE)
#pragma unroll
        for (int i = 0; i < DIM; i++) x[i] *= 1.0f / a.ratio;
}

// q_0 + q_1 / ratio
DEVICE void decode(const Lattice &a, const uint32_t (&codes)[2], float (&q)[DIM]) {
    read_point(a.tables, a.first, codes[0], q);
    if (a.second == NONE) return;
    float second[DIM];
    read_point(a.tables, a.second, codes[1], second);
#pragma unroll
    for (int i = 0; i < DIM; i++) q[i] += second[i] / a.ratio;
}

DEVICE void read_codes(const Lattice &a, const void *from, int64_t at, uint32_t (&codes)[2]) {
    const int64_t code = a.wide ? ((const int64_t *)from)[at] : ((const int32_t *)from)[at];
    codes[0] = code & 0xffff, codes[1] = code >> 16 & 0xffff;
}

DEVICE void write_codes(const Lattice &a, void *to, int64_t at, const uint32_t (&codes)[2]) {
    if (a.wide)
        ((int64_t *)to)[at] = codes[0] | int64_t(codes[1]) << 16;
    else
        ((int32_t *)to)[at] = int32_t(codes[0] | codes[1] << 16);
}

}  // namespace

#endif
