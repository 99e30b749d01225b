// x as signed bytes, which tensor cores of int8 multiply:
//
//     x[token, c] factor(c) ~ scales[token] sum_part 256^part bytes[parts token + part, c]
//
// Rows of bytes are in the order of the columns, n apart, the lowest part first. Two parts keep 16
// bits of the largest number of a token, three 24. Beside them stand the sums of each row of bytes,
// exactly. Whatever kernel makes x may write these three arrays itself.
//
// Some blocks work on a token: each looks for the largest number of all, and splits its share.

#ifndef QUIP_SPLIT
#define QUIP_SPLIT

#include "numbers.cuh"

// Not in the namespace below: nvcc makes what takes it invisible outside the library then.
struct Split {  // as in few_tokens.py
    int64_t n, tokens;        // n: a multiple of 32, 2^16 at most
    const void *x;            // [tokens, n], or null: the arrays below are there already
    const void *factors;      // [groups] or null: x is multiplied by those of its columns
    int64_t factor_columns;   // that share a factor
    uint8_t *bytes;           // [tokens parts, n], out
    float *scales;            // [tokens], out
    int32_t *sums;            // [tokens parts, pieces], out: what the pieces of a row add up to
    int32_t x_kind, factor_kind, parts, pieces;
};

namespace {

constexpr int SPLITTERS = 384;      // threads of a block, at most
constexpr int BATCH = 4;            // of four numbers, that a thread reads at once

// number / by, for both of 2^16 at most, with inverse = (2^32 - 1) / by
DEVICE uint32_t divided(uint32_t number, uint32_t inverse) {
    return uint32_t((uint64_t(number) * inverse + inverse) >> 32);
}

// Which quads of numbers a thread reads at once: their latency is what this kernel takes
struct Quads {
    int at[BATCH];
    DEVICE Quads(int first, int end) {  // those beyond the end stand for the first one
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int quad = first + i * int(blockDim.x);
            at[i] = quad < end ? quad : first;
        }
    }
};

// Quads of numbers, which an earlier kernel may just have written
DEVICE void read_quads(float4 (&to)[BATCH], const void *from, int kind, const Quads &quads) {
    if (kind == FLOAT) {
#pragma unroll
        for (int i = 0; i < BATCH; i++) to[i] = read_fresh((const float4 *)from + quads.at[i]);
        return;
    }
    uint2 bits[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++) bits[i] = read_fresh((const uint2 *)from + quads.at[i]);
#pragma unroll
    for (int i = 0; i < BATCH; i++)
        to[i] = float4{from_bits(bits[i].x, kind), from_bits(bits[i].x >> 16, kind),
                       from_bits(bits[i].y, kind), from_bits(bits[i].y >> 16, kind)};
}

// Quads of x times their factors
DEVICE void read_inputs(float4 (&to)[BATCH], const Split &a, int64_t token, uint32_t inverse,
                        const Quads &quads) {
    const int size = a.x_kind == FLOAT ? 4 : 2;
    read_quads(to, (const uint8_t *)a.x + token * a.n * size, a.x_kind, quads);
    if (!a.factors) return;
    if (a.factor_columns == 1) {
        float4 by[BATCH];
        read_quads(by, a.factors, a.factor_kind, quads);
#pragma unroll
        for (int i = 0; i < BATCH; i++)
            to[i] = float4{to[i].x * by[i].x, to[i].y * by[i].y, to[i].z * by[i].z, to[i].w * by[i].w};
        return;
    }
    const auto factor = [&](int column) {
        return number(a.factors, divided(column, inverse), a.factor_kind);
    };
    const bool shared = a.factor_columns % 4 == 0;
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
        const int first = 4 * quads.at[i];
        const float by = factor(first);
        to[i].x *= by;
        to[i].y *= shared ? by : factor(first + 1);
        to[i].z *= shared ? by : factor(first + 2);
        to[i].w *= shared ? by : factor(first + 3);
    }
}

// The lowest byte of each number, signed, as one word; what is left of the numbers is a 256th.
DEVICE uint32_t split_bytes(int (&v)[4], int &sum) {
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int byte = int8_t(v[e]);
        sum += byte;
        word |= uint32_t(byte & 255) << 8 * e;
        v[e] = (v[e] - byte) >> 8;
    }
    return word;
}

template <int PARTS>
DEVICE void split_token(const Split &a, int64_t token, uint32_t inverse, uint32_t *tops, int *partial) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int quads = int(a.n / 4), piece = blockIdx.y;
    uint32_t top = 0;  // the bits of |x| are ordered as it is, and NaN is above all
    float4 four[BATCH];
    for (int first = threadIdx.x; first < quads; first += BATCH * blockDim.x) {
        read_inputs(four, a, token, inverse, Quads(first, quads));
#pragma unroll
        for (int i = 0; i < BATCH; i++)
            for (float each : {four[i].x, four[i].y, four[i].z, four[i].w}) {
                const uint32_t size = __float_as_uint(each) & 0x7fffffff;
                top = size > top ? size : top;
            }
    }
    top = largest_of_warp(top);
    if (lane == 0) tops[warp] = top;
    __syncthreads();
    const float most = __uint_as_float(largest_of_warp(lane < warps ? tops[lane] : 0));
    // The highest byte is 127 at most, also where the product below is rounded upwards.
    const float levels = PARTS == 2 ? 127 * 256 : 127 * 65536;
    const float inverse_scale = most > 1e-30f ? levels / most : 0;
    float scale = most > 1e-30f ? most / levels : 0;
    if (!(most < INFINITY)) scale = NAN;

    int sums[PARTS] = {};
    uint8_t *to = a.bytes + token * PARTS * a.n;
    const int end = quads * (piece + 1) / a.pieces;
    for (int first = quads * piece / a.pieces + threadIdx.x; first < end; first += BATCH * blockDim.x) {
        read_inputs(four, a, token, inverse, Quads(first, end));
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int quad = first + i * int(blockDim.x);
            if (quad >= end) break;
            int v[4] = {__float2int_rn(four[i].x * inverse_scale), __float2int_rn(four[i].y * inverse_scale),
                        __float2int_rn(four[i].z * inverse_scale), __float2int_rn(four[i].w * inverse_scale)};
#pragma unroll
            for (int part = 0; part < PARTS; part++)
                ((uint32_t *)(to + part * a.n))[quad] = split_bytes(v, sums[part]);
        }
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const int sum = sum_of_warp(sums[part]);
        if (lane == 0) partial[warps * part + warp] = sum;
    }
    __syncthreads();
    if (warp == 0)
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const int sum = sum_of_warp(lane < warps ? partial[warps * part + lane] : 0);
            if (lane == 0) a.sums[(token * PARTS + part) * a.pieces + piece] = sum;
        }
    if (piece == 0 && threadIdx.x == 0) a.scales[token] = scale;
}

// As many registers as two blocks of a product leave to SPLITTERS threads: it begins beside them.
__global__ void __launch_bounds__(SPLITTERS * 4 / 3, 2) split_inputs(const Split a) {
    uint32_t *tops = (uint32_t *)shared_memory();
    int *partial = (int *)(tops + SPLITTERS / 32);
    let_next_begin();
    const uint32_t inverse = a.factors ? ~0u / uint32_t(a.factor_columns) : 0;
    await_previous();
    for (int64_t token = blockIdx.x; token < a.tokens; token += gridDim.x)
        a.parts == 2 ? split_token<2>(a, token, inverse, tops, partial)
                     : split_token<3>(a, token, inverse, tops, partial);
}

int start_split(const Split &a, cudaStream_t stream) {
    const int64_t threads = (a.n + 255) / 256 * 32;  // eight numbers each, or more
    const int shared_bytes = 4 * (1 + a.parts) * (SPLITTERS / 32);
    return launch(split_inputs, a.tokens, a.pieces, int(threads < SPLITTERS ? threads : SPLITTERS),
                  shared_bytes, stream, a);
}

// scales[token], and behind them what the numbers of a token add up to
DEVICE void copy_scales(const Split &a, float *scales) {
    for (int token = threadIdx.x; token < a.tokens; token += blockDim.x) {
        float total = 0;
        for (int part = a.parts - 1; part >= 0; part--) {
            int sum = 0;
            for (int piece = 0; piece < a.pieces; piece++)
                sum += read_fresh(a.sums + (token * a.parts + part) * a.pieces + piece);
            total = 256 * total + float(sum);
        }
        scales[token] = read_fresh(a.scales + token);
        scales[a.tokens + token] = scales[token] * total;
    }
}

}  // namespace

#endif
