// Multiply a few vectors by a packed matrix: the fast form of the product with decoded weights.
//
// A row is unpacked to bytes, which stay in the cache, and multiplied with every vector. Steps and
// zeros are applied to sums: sum_k step (q_k - zero) x_k = step (sum_k q_k x_k - zero sum_k x_k).

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../unpack.h"

namespace {

constexpr int SUMS = 64;  // independent ones, so that products need not wait for each other

struct Matvec {  // as in cpu.py
    int64_t m, n, tokens, row_bytes, group;  // group: columns that share a step and a zero
    const uint8_t *words;                    // [m, row_bytes]
    const float *x, *sums;                   // [tokens, n], [tokens, groups]
    const float *step, *zero;                // [m, groups], or [1, groups] by a stride of 0
    int64_t step_row, zero_row;
    float *y;  // [tokens, m], out
    int32_t bits;
};

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
