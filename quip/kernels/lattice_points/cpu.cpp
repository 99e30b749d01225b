// Nearest points of E8P and E81B, and the way back: the fast form of reference.py.
//
// A lane is a vector of eight weights; each coordinate of LANES vectors is one register. |z_i|
// carries i in its three lowest bits, so that sorting eight keys needs nothing else and no two
// are equal. Where two points are equally far but for 1 part in 2^20, either may be taken.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int DIM = 8, PATTERNS = 32;  // 29, the last of them four times

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Point __attribute__((vector_size(4 * DIM), aligned(4)));

struct Tables {  // as in cpu.py
    const float *magnitudes, *signs, *shifts;  // E8P: [256, 8], [256, 8], [256]
    const int32_t *code_of;                    // [6561]
    const float *patterns;                     // [8, 32], |v| of squared norm 12
    const float *points;                       // E81B: [256, 8]
    const uint8_t *pairs;                      // [8, 8, 2, 2]
};

enum Stage : int32_t { NONE, E8P, E81B };

struct Nearest {  // as in cpu.py
    int64_t m, row, column;  // strides of x
    const float *x, *h;  // h: [8] or null
    void *codes;         // [m], int32 or int64, out
    double *error;       // sum h_i (x_i / scale - q_i)^2 over all vectors, out if there is h
    float scale, ratio;
    Stage first, second;
    int32_t wide;  // codes are int64
};

struct Decode {  // as in cpu.py
    int64_t m, blocks, group;
    int64_t row, block, column;  // strides of w
    const void *codes;           // [m, blocks]
    const float *scales;         // one for each `group` blocks
    float *w;                    // out
    float ratio;
    Stage first, second;
    int32_t wide;
};

constexpr int POWERS[DIM] = {2187, 729, 243, 81, 27, 9, 3, 1};
constexpr int SIGN_BITS[DIM] = {1, 16, 2, 32, 4, 64, 8, 128};

Floats all(float value) { return value - Floats{}; }
Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
Ints as_ints(Floats x) { return (Ints)x; }
Floats as_floats(Ints x) { return (Floats)x; }

// Bit l is that of lane l, which is 0 or -1
uint32_t bits_of(Ints lanes) {
    constexpr uint32_t BITS[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096,
                                 8192, 16384, 32768};
    uint32_t bits[LANES], all = 0;
    std::memcpy(bits, &lanes, sizeof bits);
    for (int l = 0; l < LANES; l++) all |= bits[l] & BITS[l];
    return all;
}

void sort_pair(Ints &larger, Ints &smaller) {
    const Ints a = larger, b = smaller;
    larger = a > b ? a : b;
    smaller = a > b ? b : a;
}

// Eight keys in descending order, by 19 exchanges
[[gnu::always_inline]] inline void sort(Ints *k) {
    constexpr int NETWORK[][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6},
                                  {3, 7}, {0, 1}, {2, 3}, {4, 5}, {6, 7}, {2, 4}, {3, 5},
                                  {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};
#pragma GCC unroll 19
    for (const auto &pair : NETWORK) sort_pair(k[pair[0]], k[pair[1]]);
}

Ints key_of(Floats z, int i) { return (as_ints(z) & 0x7ffffff8) | i; }

// What z = x - shift says about the nearest v: which keys have 3/2 and 5/2, which sign changes
struct Choice {
    Floats gain;              // <v, z> - |v|^2 / 2 + <shift, x>, up to a constant
    Floats bound;             // no pattern of squared norm 12 gains more
    Ints halves, five, flip;  // smallest key with 3/2, with 5/2; the key that changes its sign
};

// The best of the seven shapes of e8p.py. Those of even sum come first, then those of odd sum;
// pairs of 3/2 gain less and less, so the second pair is only better where the first is.
[[gnu::always_inline]] inline Choice best_shape(const Floats *x, float shift) {
    const Ints never = Ints{} + INT32_MAX;
    Ints k[DIM], parity{};
    Floats sum{}, half_sum{};
    for (int i = 0; i < DIM; i++) {
        const Floats z = x[i] - shift;
        parity ^= as_ints(z);
        k[i] = key_of(z, i);
        sum += x[i];
        half_sum += as_floats(k[i]);
    }
    const Ints odd = parity < 0;  // of the negatives
    sort(k);
    Floats a[DIM];
    for (int i = 0; i < DIM; i++) a[i] = as_floats(k[i]) - 1;
    const Floats least = as_floats(k[7]), zero{};

    const Floats first = a[0] + a[1], second = a[2] + a[3], five = 2 * a[0] - 1;
    Floats even_gain = maximum(first, zero) + maximum(second, zero);
    Ints even_halves = second > zero ? k[3] : first > zero ? k[1] : never, even_five = never;
    even_halves = five > even_gain ? k[0] : even_halves;
    even_five = five > even_gain ? k[0] : never;
    even_gain = maximum(five, even_gain) - (odd ? least : zero);

    const Floats third = a[1] + a[2], fives = 2 * a[0] + a[1] - 1;
    Floats odd_gain = a[0] + maximum(third, zero);
    Ints odd_halves = third > zero ? k[2] : k[0];
    odd_halves = fives > odd_gain ? k[1] : odd_halves;
    const Ints odd_five = fives > odd_gain ? k[0] : never;
    const Floats odd_cost = odd ? zero : least;
    odd_gain = maximum(fives, odd_gain) - odd_cost;

    const Ints odd_better = odd_gain > even_gain;
    const Floats base = 0.5f * half_sum + shift * sum;
    Choice choice;
    choice.gain = base + maximum(odd_gain, even_gain);
    choice.bound = base + (a[0] + a[1] + a[2] + a[3] + a[4]) - odd_cost;
    choice.halves = odd_better ? odd_halves : even_halves;
    choice.five = odd_better ? odd_five : even_five;
    choice.flip = odd_better ^ odd ? k[7] : Ints{} - 1;
    return choice;
}

// One lane against the patterns of squared norm 12: takes their code if they gain more.
void try_patterns(const Tables &t, const float *x, float shift, float &gain, int32_t &code) {
    float a[DIM], base = 0;
    int32_t signs = shift < 0, negatives = 0;
    for (int i = 0; i < DIM; i++) {
        const float z = x[i] - shift;
        a[i] = z < 0 ? -z : z;
        signs ^= z < 0 ? SIGN_BITS[i] : 0;
        negatives += z < 0;
        base += shift * x[i];
    }
    const bool even = negatives % 2 == 0;  // 9 is odd: then one more sign has to change
    float gains[PATTERNS], best = gain;
    uint32_t better = 0;
    for (int from = 0; from < PATTERNS; from += LANES) {
        Floats product{}, least = all(1e38f);
        for (int i = 0; i < DIM; i++) {
            const float *pattern = t.patterns + i * PATTERNS + from;
            Floats v;
            std::memcpy(&v, pattern, sizeof v);
            v *= a[i];
            product += v;
            least = v < least ? v : least;
        }
        product += base - 5 - (even ? 2 * least : Floats{});
        std::memcpy(gains + from, &product, sizeof product);
        better |= bits_of(product > gain) << from;
    }
    if (!better) return;
    int row = 0, flipped = 0;
    for (; better; better &= better - 1) {
        const int j = __builtin_ctz(better);
        if (gains[j] > best) best = gains[j], row = j;
    }
    float least = 1e38f;
    for (int i = 0; i < DIM; i++) {
        const float cost = a[i] * t.patterns[i * PATTERNS + row];
        if (cost < least) least = cost, flipped = i;
    }
    gain = best;
    code = ((227 + row) << 8 | 128) ^ signs ^ (even ? SIGN_BITS[flipped] : 0);
}

void nearest_e8p(const Tables &t, const Floats *x, int32_t *codes) {
    const Choice plus = best_shape(x, 0.25f), minus = best_shape(x, -0.25f);
    const Ints other = minus.gain > plus.gain;
    const Floats shift = other ? all(-0.25f) : all(0.25f);
    const Ints halves = other ? minus.halves : plus.halves, five = other ? minus.five : plus.five;
    const Ints flip = other ? minus.flip : plus.flip;
    Ints index{}, signs = other & 1;
    for (int i = 0; i < DIM; i++) {
        const Floats z = x[i] - shift;
        const Ints key = key_of(z, i);
        index += ((key >= halves) & POWERS[i]) + ((key >= five) & POWERS[i]);
        signs ^= ((as_ints(z) < 0) ^ (key == flip)) & SIGN_BITS[i];
    }
    Floats gain = maximum(minus.gain, plus.gain);
    int32_t at[LANES];  // memory, because lanes of a register are slow to reach
    std::memcpy(at, &index, sizeof at);
    std::memcpy(codes, &signs, sizeof signs);
    for (int l = 0; l < LANES; l++) codes[l] ^= t.code_of[at[l]];
    // About one in twenty Gaussian vectors
    uint32_t left = bits_of((plus.bound > gain) | (minus.bound > gain));
    for (; left; left &= left - 1) {
        const int l = __builtin_ctz(left);
        float lane[DIM], best = gain[l];
        for (int i = 0; i < DIM; i++) lane[i] = x[i][l];
        if (plus.bound[l] > best) try_patterns(t, lane, 0.25f, best, codes[l]);
        if (minus.bound[l] > best) try_patterns(t, lane, -0.25f, best, codes[l]);
    }
}

// 0, +-e_i +-e_j, +-1/2 everywhere or +-2 e_i, each at the largest |x_i|
void nearest_e81b(const Tables &t, const Floats *x, int32_t *codes) {
    Ints k[DIM], parity{}, negatives{};
    Floats half_sum{};
    for (int i = 0; i < DIM; i++) {
        k[i] = key_of(x[i], i);
        parity ^= as_ints(x[i]);
        negatives |= (as_ints(x[i]) < 0) & (1 << i);
        half_sum += as_floats(k[i]);
    }
    sort(k);
    const Floats least = as_floats(k[7]), a = as_floats(k[0]), b = as_floats(k[1]);
    const Ints odd = parity < 0, i = k[0] & 7, j = k[1] & 7, s = negatives >> i & 1;
    const Floats pair = a + b - 1, zero{};
    const Floats half = 0.5f * half_sum - 1 - (odd ? least : zero);
    const Floats single = ((i == 7) & (s == 1)) ? pair : 2 * a - 2;  // -2 e_7 is not there
    const Floats gain = maximum(pair, maximum(half, single));
    // The rows of half points count in binary: coordinate 0 first, 1 if positive, 7 follows
    Ints row{};
    const Ints changed = negatives ^ (odd ? (Ints{} + 1) << (k[7] & 7) : Ints{});
    for (int c = 0; c < 7; c++) row |= (~changed >> c & 1) << (6 - c);
    const Ints key = i << 5 | j << 2 | s << 1 | (negatives >> j & 1);
    const Ints others = half >= gain ? 113 + row : 241 + i + 8 * s;
    const Ints whole = ~((half > pair) | (single > pair)), none = zero >= gain;
    for (int l = 0; l < LANES; l++)
        codes[l] = none[l] ? 56 : whole[l] ? t.pairs[key[l]] : others[l];
}

Point decoded(const Tables &t, Stage stage, int32_t code) {
    Point a, b;
    if (stage == E81B) {
        std::memcpy(&a, t.points + (code & 255) * DIM, sizeof a);
        return a;
    }
    std::memcpy(&a, t.magnitudes + (code >> 8 & 255) * DIM, sizeof a);
    std::memcpy(&b, t.signs + (code & 255) * DIM, sizeof b);
    return a * b + t.shifts[code & 255];
}

void nearest_of(const Tables &t, Stage stage, const Floats *x, int32_t *codes) {
    stage == E8P ? nearest_e8p(t, x, codes) : nearest_e81b(t, x, codes);
}

// LANES vectors, of which `left` belong to x: a coordinate each
void load(const Nearest &a, int64_t from, int64_t left, Floats *x) {
    float lanes[DIM][LANES] = {};
    const float *start = a.x + from * a.row;
    if (left >= LANES && a.row == 1) {
        for (int i = 0; i < DIM; i++) std::memcpy(x + i, start + i * a.column, sizeof *x);
    } else {
        for (int64_t l = 0; l < std::min<int64_t>(left, LANES); l++)
            for (int i = 0; i < DIM; i++) lanes[i][l] = start[l * a.row + i * a.column];
        std::memcpy(x, lanes, sizeof lanes);
    }
    const float inverse = 1 / a.scale;  // moves ties alone, where both points are as far
    for (int i = 0; i < DIM; i++) x[i] *= inverse;
}

void subtract(const Tables &t, Stage stage, const int32_t *codes, Floats *x) {
    float q[DIM][LANES];
    for (int l = 0; l < LANES; l++) {
        const Point point = decoded(t, stage, codes[l]);
        for (int i = 0; i < DIM; i++) q[i][l] = point[i];
    }
    for (int i = 0; i < DIM; i++) {
        Floats lanes;
        std::memcpy(&lanes, q[i], sizeof lanes);
        x[i] -= lanes;
    }
}

double weighted_squares(const Floats *x, const float *h, float unit, int64_t count) {
    Floats squares{};
    for (int i = 0; i < DIM; i++) squares += h[i] * (x[i] * x[i]);
    float total = 0;
    for (int64_t l = 0; l < count; l++) total += squares[l];
    return total * unit * unit;
}

}  // namespace

extern "C" void nearest(const Tables *tables, const Nearest *given) {
    const Tables &t = *tables;
    const Nearest &a = *given;
    for (int64_t from = 0; from < a.m; from += LANES) {
        const int64_t count = std::min<int64_t>(LANES, a.m - from);
        Floats x[DIM];
        int32_t codes[LANES], second[LANES] = {};
        load(a, from, a.m - from, x);
        nearest_of(t, a.first, x, codes);
        if (a.second != NONE || a.h) subtract(t, a.first, codes, x);
        if (a.second != NONE) {
            for (int i = 0; i < DIM; i++) x[i] *= a.ratio;
            nearest_of(t, a.second, x, second);
            if (a.h) subtract(t, a.second, second, x);
        }
        if (a.h) *a.error += weighted_squares(x, a.h, a.second == NONE ? 1 : 1 / a.ratio, count);
        for (int64_t l = 0; l < count; l++) {
            const int64_t code = codes[l] | int64_t(second[l]) << 16;
            if (a.wide)
                static_cast<int64_t *>(a.codes)[from + l] = code;
            else
                static_cast<int32_t *>(a.codes)[from + l] = static_cast<int32_t>(code);
        }
    }
}

// w = scale (q_0 + q_1 / ratio)
extern "C" void decode(const Tables *tables, const Decode *given) {
    const Tables &t = *tables;
    const Decode &a = *given;
    for (int64_t r = 0, at = 0; r < a.m; r++)
        for (int64_t b = 0; b < a.blocks; b++, at++) {
            const int64_t code = a.wide ? static_cast<const int64_t *>(a.codes)[at]
                                        : static_cast<const int32_t *>(a.codes)[at];
            Point w = decoded(t, a.first, static_cast<int32_t>(code & 0xffff));
            if (a.second != NONE)
                w += decoded(t, a.second, static_cast<int32_t>(code >> 16)) / a.ratio;
            w *= a.scales[b / a.group];
            float *to = a.w + r * a.row + b * a.block;
            if (a.column == 1)
                std::memcpy(to, &w, sizeof w);
            else
                for (int i = 0; i < DIM; i++) to[i * a.column] = w[i];
        }
}
