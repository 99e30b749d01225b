// Multiply a few vectors by a packed matrix: the fast form of the product with decoded weights.
//
// A row is unpacked to bytes, which stay in the cache, and multiplied with every vector. Steps and
// zeros are applied to sums: sum_k step (q_k - zero) x_k = step (sum_k q_k x_k - zero sum_k x_k).

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int SUMS = 64;  // independent ones, so that products need not wait for each other
typedef uint64_t Words __attribute__((vector_size(64)));

struct Matvec {  // as in cpu.py
    int64_t m, n, tokens, row_bytes, group;  // group: columns that share a step and a zero
    const uint8_t *words;                    // [m, row_bytes]
    const float *x, *sums;                   // [tokens, n], [tokens, groups]
    const float *step, *zero;                // [m, groups], or [1, groups] by a stride of 0
    int64_t step_row, zero_row;
    float *y;  // [tokens, m], out
    int32_t bits;
};

// to = (from >> shift & mask) << low, or that added to it, for `size` bytes
template <bool add>
void extract(const uint8_t *__restrict from, uint8_t *__restrict to, int64_t size, int shift,
             uint8_t mask, int low) {
    const Words masks = Words{} + 0x0101010101010101u * mask;
    int64_t j = 0;
    for (; j + int64_t(sizeof(Words)) <= size; j += sizeof(Words)) {
        Words bytes, sum = {};  // what a shift brings in from the next byte is masked off
        std::memcpy(&bytes, from + j, sizeof bytes);
        if (add) std::memcpy(&sum, to + j, sizeof sum);
        sum |= (bytes >> shift & masks) << low;
        std::memcpy(to + j, &sum, sizeof sum);
    }
    for (; j < size; j++) to[j] = (add ? to[j] : 0) | (from[j] >> shift & mask) << low;
}

// The codes of a row, one a byte: planes of 8, 4, 2 and 1 bits as in bits.py
void unpack(const uint8_t *row, int bits, int64_t n, uint8_t *codes) {
    int low = 0;
    for (int width : {8, 4, 2, 1}) {
        if (!(bits & width)) continue;
        const int64_t size = (n * width + 7) / 8;
        const uint8_t mask = (1 << width) - 1;
        for (int held = 0; held < 8 / width; held++)
            (low ? extract<true> : extract<false>)(row, codes + held * size, size, held * width,
                                                   mask, low);
        row += size;
        low += width;
    }
}

float dot(const uint8_t *codes, const float *x, int64_t n) {
    float sums[SUMS] = {};  // a loop over them becomes a few vector operations
    int64_t k = 0;
    for (; k + SUMS <= n; k += SUMS)
        for (int i = 0; i < SUMS; i++) sums[i] += int32_t(codes[k + i]) * x[k + i];
    for (; k < n; k++) sums[k % SUMS] += int32_t(codes[k]) * x[k];
    for (int half = SUMS / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

}  // namespace

extern "C" void multiply(const Matvec *given) {
    const Matvec &a = *given;
    const int64_t groups = (a.n + a.group - 1) / a.group;
    std::vector<uint8_t> codes(a.n + 64);  // a plane may end up to 7 codes after the row
    for (int64_t r = 0; r < a.m; r++) {
        unpack(a.words + r * a.row_bytes, a.bits, a.n, codes.data());
        const float *step = a.step + r * a.step_row, *zero = a.zero + r * a.zero_row;
        for (int64_t t = 0; t < a.tokens; t++) {
            const float *x = a.x + t * a.n, *sums = a.sums + t * groups;
            float total = 0;
            for (int64_t g = 0; g < groups; g++) {
                const int64_t lo = g * a.group, width = std::min(a.group, a.n - lo);
                total += step[g] * (dot(codes.data() + lo, x + lo, width) - zero[g] * sums[g]);
            }
            a.y[t * a.m + r] = total;
        }
    }
}
