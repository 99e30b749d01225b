// Multiply a few vectors by a packed matrix: the fast form of the product with decoded weights. For
// many vectors, the decoded weights in the dtype of the product.
//
// Weights that share a step and a zero along the whole row are never taken apart: a vector of
// bytes of a plane is masked to one code of each byte, which is 2^shift times that code, and
// multiplied with inputs that have been divided by 2^shift and brought into the same order. With
// groups of columns, a row is unpacked to bytes in the order of the columns.
//
// Steps and zeros are applied to sums: sum_k step (q_k - zero) x_k = step (sum_k q_k x_k - zero
// sum_k x_k). A single row of steps is applied to x.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../lanes.h"
#include "../threads.h"
#include "../unpack.h"

namespace {

#ifdef __AVX512F__
constexpr int ROWS = 8, SUMS = 16;  // at once at most; how many of their sums stay in registers
#else
constexpr int ROWS = 4, SUMS = 8;
#endif
constexpr int MOST = 8;              // vectors at once
constexpr int64_t PIECE = 1 << 16;  // products that are worth a thread
constexpr int WIDTHS[] = {8, 4, 2, 1};

struct Matvec {  // as in cpu.py
    int64_t m, n, tokens, row_bytes, group;  // group: columns that share a step and a zero
    int64_t zero_row;                        // from the zeros of a row to those of the next one
    const uint8_t *words;                    // [m, row_bytes]
    const float *x;                          // [tokens, n]
    const void *step;                        // [m, groups], or [groups] where there are no zeros
    const uint8_t *zero;                     // [m, groups] by strides; null: (2^bits - 1) / 2
    void *y;                                 // [tokens, m], out, in float32
    int32_t bits, step_bytes;                // step_bytes: 2 for bfloat16, 4 for float32
    Threads threads;

    float step_at(int64_t i) const {
        if (step_bytes == 4) return static_cast<const float *>(step)[i];
        const uint32_t bits = uint32_t(static_cast<const uint16_t *>(step)[i]) << 16;
        float number;
        std::memcpy(&number, &bits, sizeof number);
        return number;
    }
    // What a sum of q x and one of x are multiplied with; group of a matrix with `groups` of them
    float scale(int64_t row, int64_t groups, int64_t g) const {
        return zero ? step_at(row * groups + g) : 1;
    }
    float middle(int64_t row, int64_t g) const {
        return zero ? zero[row * zero_row + g] : ((1 << bits) - 1) / 2.0f;
    }
};

struct Plane {
    int width, low;         // bits of a code in it, and the lowest of them
    int64_t start, size;    // in bytes of a row
    int64_t steps, inputs;  // vectors of bytes; where the inputs of the first one are
};

std::vector<Plane> planes_of(const Matvec &a, int64_t tokens) {
    std::vector<Plane> planes;
    int low = 0;
    int64_t start = 0, inputs = 0;
    for (int width : WIDTHS) {
        if (!(a.bits & width)) continue;
        const int64_t size = divide_up(a.n * width, 8), steps = divide_up(size, LANES);
        planes.push_back({width, low, start, size, steps, inputs});
        low += width;
        start += size;
        inputs += steps * (8 / width) * tokens * LANES;
    }
    return planes;
}

float total(Floats lanes) {
    float sums[LANES];
    std::memcpy(sums, &lanes, sizeof sums);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

// x [tokens, n] times the steps, if those are of columns
std::vector<float> scaled(const Matvec &a) {
    std::vector<float> x(a.x, a.x + a.tokens * a.n);
    if (a.zero) return x;
    std::vector<float> steps(a.n);
    for (int64_t k = 0; k < a.n; k++) steps[k] = a.step_at(k / a.group);
    for (int64_t t = 0; t < a.tokens; t++)
        for (int64_t k = 0; k < a.n; k++) x[t * a.n + k] *= steps[k];
    return x;
}

float sum(const float *x, int64_t n) {
    Floats sums = {};
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) sums += load(x + k);
    return total(sums + load(x + k, n - k));
}

// The inputs of a plane: for each vector of bytes and each code of a byte, those of T tokens
template <int T>
void arrange(const Plane &plane, const float *x, int64_t n, int64_t tokens, float *to) {
    const int held = 8 / plane.width;
    for (int64_t i = 0; i < plane.steps; i++)
        for (int f = 0; f < held; f++) {
            const int64_t from = f * plane.size + i * LANES;
            const int64_t left = std::min(plane.size - i * LANES, n - from);
            const Floats unit = all(std::ldexp(1.0f, plane.low - f * plane.width));
            for (int t = 0; t < T; t++, to += LANES) {
                const bool here = t < tokens && left > 0;
                const Floats lanes = here ? unit * load(x + t * n + from, left) : Floats{};
                std::memcpy(to, &lanes, sizeof lanes);
            }
        }
}

// sums += products of a plane of R rows with T tokens
template <int WIDTH, int T, int R>
[[gnu::always_inline]] inline void add_plane(const Plane &plane, const uint8_t *const *rows,
                                             const float *x, Floats (*sums)[T]) {
    constexpr int HELD = 8 / WIDTH;
    Floats now[R][T];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) now[r][t] = sums[r][t];
    x += plane.inputs;
    for (int64_t i = 0; i < plane.steps; i++) {
        Ints bytes[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) bytes[r] = widened(rows[r] + plane.start + i * LANES);
#pragma GCC unroll 8
        for (int f = 0; f < HELD; f++, x += T * LANES) {
            Floats q[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                q[r] = __builtin_convertvector(bytes[r] & ((1 << WIDTH) - 1) << f * WIDTH, Floats);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) {
                const Floats one = load(x + t * LANES);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) now[r][t] += q[r] * one;
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sums[r][t] = now[r][t];
}

// y of T tokens at most, where a row has one step
template <int T>
void multiply_rows(const Matvec &a, const float *x, float *y) {
    constexpr int R = std::min(ROWS, SUMS / T);
    const std::vector<Plane> planes = planes_of(a, T);
    const Plane &last = planes.back();
    std::vector<float> inputs(last.inputs + last.steps * (8 / last.width) * T * LANES);
    for (const Plane &plane : planes)
        arrange<T>(plane, x, a.n, a.tokens, inputs.data() + plane.inputs);
    float x_sums[T];
    for (int64_t t = 0; t < a.tokens; t++) x_sums[t] = sum(x + t * a.n, a.n);
    const int64_t reach = last.start + last.steps * LANES;  // bytes of a row that are looked at
    const uint8_t *end = a.words + a.m * a.row_bytes;

    const auto some = [&](int64_t first, int64_t stop) {
        static thread_local std::vector<uint8_t> copies;
        copies.resize(R * reach);
        for (int64_t r = first; r < stop; r += R) {
            const uint8_t *rows[R];
            for (int i = 0; i < R; i++) {
                rows[i] = a.words + std::min(r + i, stop - 1) * a.row_bytes;
                if (end - rows[i] >= reach) continue;
                uint8_t *copy = copies.data() + i * reach;
                std::copy(rows[i], rows[i] + std::min<int64_t>(reach, a.row_bytes), copy);
                rows[i] = copy;
            }
            Floats sums[R][T] = {};
            for (const Plane &plane : planes)
                (plane.width == 8   ? add_plane<8, T, R>
                 : plane.width == 4 ? add_plane<4, T, R>
                 : plane.width == 2 ? add_plane<2, T, R>
                                    : add_plane<1, T, R>)(plane, rows, inputs.data(), sums);
            for (int i = 0; i < R && r + i < stop; i++)
                for (int64_t t = 0; t < a.tokens; t++)
                    y[t * a.m + r + i] = a.scale(r + i, 1, 0) *
                        (total(sums[i][t]) - a.middle(r + i, 0) * x_sums[t]);
        }
    };
    share(a.threads, a.m, divide_up(PIECE, a.n * a.tokens * R) * R, some);
}

// y of all tokens, where a row has a step for each group
void multiply_groups(const Matvec &a, const float *x, float *y) {
    const int64_t groups = divide_up(a.n, a.group);
    std::vector<float> x_sums(a.tokens * groups);
    for (int64_t t = 0; t < a.tokens; t++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t start = g * a.group, width = std::min(a.group, a.n - start);
            x_sums[t * groups + g] = sum(x + t * a.n + start, width) / LANES;
        }
    const auto some = [&](int64_t first, int64_t stop) {
        static thread_local std::vector<uint8_t> codes;
        codes.resize(a.n + LANES + sizeof(Words));  // both unpack and the products reach beyond it
        for (int64_t r = first; r < stop; r++) {
            unpack(a.words + r * a.row_bytes, a.bits, a.n, codes.data());
            for (int64_t t = 0; t < a.tokens; t++) {
                Floats sums = {};
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t start = g * a.group, end = std::min(start + a.group, a.n);
                    const Floats step = all(a.scale(r, groups, g));
                    Floats here = {};
                    for (int64_t k = start; k < end; k += LANES)
                        here += __builtin_convertvector(widened(codes.data() + k), Floats) *
                                load(x + t * a.n + k, end - k);
                    // The zero of a group goes from its own sum, an equal part from each lane: all
                    // zeros in one sum at the end would cancel digits.
                    sums += step * (here - a.middle(r, g) * x_sums[t * groups + g]);
                }
                y[t * a.m + r] = total(sums);
            }
        }
    };
    share(a.threads, a.m, divide_up(PIECE, a.n * a.tokens), some);
}

void put(float value, float *to) { *to = value; }

void put(float value, uint16_t *to) {  // to the nearest bfloat16, ties to the even one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    *to = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// step (code - zero) of all rows, to [m, n]
template <class Number> void decode_rows(const Matvec &a, Number *W) {
    const int64_t groups = divide_up(a.n, a.group);
    share(a.threads, a.m, divide_up(PIECE, a.n), [&](int64_t first, int64_t stop) {
        std::vector<uint8_t> codes(a.n + sizeof(Words));
        std::vector<float> steps(a.n), zeros(a.n, a.middle(0, 0));
        for (int64_t k = 0; !a.zero && k < a.n; k++) steps[k] = a.step_at(k / a.group);
        for (int64_t r = first; r < stop; r++) {
            for (int64_t g = 0; a.zero && g < groups; g++) {
                const int64_t start = g * a.group, width = std::min(a.group, a.n - start);
                std::fill_n(steps.data() + start, width, a.scale(r, groups, g));
                std::fill_n(zeros.data() + start, width, a.middle(r, g));
            }
            unpack(a.words + r * a.row_bytes, a.bits, a.n, codes.data());
            const uint8_t *__restrict q = codes.data();
            const float *__restrict step = steps.data(), *__restrict zero = zeros.data();
            Number *__restrict to = W + r * a.n;
            for (int64_t k = 0; k < a.n; k++) put((float(int32_t(q[k])) - zero[k]) * step[k], to + k);
        }
    });
}

}  // namespace

extern "C" void multiply(const Matvec *given, int32_t) {
    Matvec a = *given;
    const std::vector<float> scaled_x = scaled(a);
    const float *x = scaled_x.data();
    float *y = static_cast<float *>(a.y);
    if (a.zero && a.group < a.n) return multiply_groups(a, x, y);
    for (int64_t left = a.tokens; left > 0; left -= MOST) {
        a.tokens = std::min<int64_t>(MOST, left);
        (a.tokens == 1   ? multiply_rows<1>
         : a.tokens == 2 ? multiply_rows<2>
         : a.tokens <= 4 ? multiply_rows<4>
                         : multiply_rows<8>)(a, x, y);
        x += MOST * a.n;
        y += MOST * a.m;
    }
}

// W~ [m, n] to `y`, in float32 or bfloat16
extern "C" void decode(const Matvec *a, int32_t bytes) {
    if (bytes == 4)
        decode_rows(*a, static_cast<float *>(a->y));
    else
        decode_rows(*a, static_cast<uint16_t *>(a->y));
}
