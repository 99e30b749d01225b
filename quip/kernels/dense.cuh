// W~ of packed rows of codes as a matrix of float32, bfloat16 or float16, for products of many vectors.
//
// A warp decodes a row. Its lanes stand side by side in the planes of the row, so that what they
// write of one slice of columns lies side by side too. W~ is computed in float32, and rounded once.

#ifndef QUIP_DENSE
#define QUIP_DENSE

#include "few_tokens.cuh"

struct Dense {  // as in dense.py
    int64_t m, n, row_bytes, plane_bytes;
    const uint8_t *words;    // [m, row_bytes], as in few_tokens.cuh
    const void *step;        // [m, groups] by strides
    const uint8_t *zero;     // [m, groups] by strides, or null: `middle`
    int64_t step_row, zero_row, group;  // from one row to the next; columns that share a step, or 0: all
    const uint32_t *tables;  // [TABLES, 256] or null
    void *W;                 // [m, n], out
    float middle, second;    // what a second stage is multiplied by
    int32_t step_kind, kind;
};

namespace {

constexpr int DECODERS = 256;  // threads of a block

DEVICE uint32_t inverse_of(const Dense &a) { return a.group ? ~0u / uint32_t(a.group) : 0; }

// Steps and zeros of four neighbours, the first one at a multiple of four: the loads of all at once
struct Levels {
    float step[4], zero[4];
    DEVICE Levels(const Dense &a, uint32_t inverse, int64_t row, int column) {
        const int64_t steps = row * a.step_row, zeros = row * a.zero_row;
        if (a.group % 4 == 0) {
            const uint32_t group = a.group ? divided(column, inverse) : 0;
            step[0] = number(a.step, steps + group, a.step_kind);
            zero[0] = a.zero ? float(a.zero[zeros + group]) : a.middle;
#pragma unroll
            for (int e = 1; e < 4; e++) step[e] = step[0], zero[e] = zero[0];
            return;
        }
        uint32_t groups[4];
#pragma unroll
        for (int e = 0; e < 4; e++) groups[e] = divided(column + e, inverse), zero[e] = a.middle;
        if (a.step_kind == FLOAT) {
#pragma unroll
            for (int e = 0; e < 4; e++) step[e] = number(a.step, steps + groups[e], FLOAT);
        } else {
            uint16_t bits[4];
#pragma unroll
            for (int e = 0; e < 4; e++) bits[e] = ((const uint16_t *)a.step)[steps + groups[e]];
#pragma unroll
            for (int e = 0; e < 4; e++) step[e] = from_bits(bits[e], a.step_kind);
        }
        if (a.zero)
#pragma unroll
            for (int e = 0; e < 4; e++) zero[e] = float(a.zero[zeros + groups[e]]);
    }
};

// Four neighbours of a row, the first one at a multiple of four
DEVICE void write_four(const Dense &a, int64_t at, const float (&w)[4]) {
    if (a.kind == FLOAT) {
        *(float4 *)((float *)a.W + at) = float4{w[0], w[1], w[2], w[3]};
    } else {
        const bool brain = a.kind == BFLOAT;
        *(uint2 *)((uint16_t *)a.W + at) = uint2{pair_of(w[0], w[1], brain), pair_of(w[2], w[3], brain)};
    }
}

// SLICES words of four codes, a byte each, of byte `at` of the planes: Codes::read gives them
template <class Codes> __global__ void __launch_bounds__(DECODERS, 3) decode_grids(const Dense a) {
    const int lane = threadIdx.x % 32, warps = DECODERS / 32, plane_bytes = int(a.plane_bytes);
    const uint32_t inverse = inverse_of(a);
    let_next_begin();
    await_previous();
    for (int64_t row = int64_t(blockIdx.x) * warps + threadIdx.x / 32; row < a.m;
         row += int64_t(gridDim.x) * warps) {
        const uint8_t *words = a.words + row * a.row_bytes;
#pragma unroll 1
        for (int byte = 4 * lane; byte < plane_bytes; byte += 4 * 32) {
            uint32_t codes[Codes::SLICES];
            Codes::read(codes, words + byte, plane_bytes);
#pragma unroll
            for (int slice = 0; slice < Codes::SLICES; slice++) {
                const int column = slice * plane_bytes + byte;
                const Levels levels(a, inverse, row, column);
                float w[4];
#pragma unroll
                for (int e = 0; e < 4; e++)
                    w[e] = (float(codes[slice] >> 8 * e & 255) - levels.zero[e]) * levels.step[e];
                write_four(a, row * a.n + column, w);
            }
        }
    }
}

// Points::read gives the words of a code's points, by tables of TABLES times 256 words.
template <class Points> __global__ void __launch_bounds__(DECODERS) decode_points(const Dense a) {
    uint32_t *tables = (uint32_t *)shared_memory();
    const int lane = threadIdx.x % 32, warps = DECODERS / 32, plane_bytes = int(a.plane_bytes);
    const uint32_t inverse = inverse_of(a);
    let_next_begin();
    for (int i = threadIdx.x; i < Points::TABLES * ENTRIES; i += DECODERS) tables[i] = a.tables[i];
    await_previous();
    __syncthreads();
    for (int64_t row = int64_t(blockIdx.x) * warps + threadIdx.x / 32; row < a.m;
         row += int64_t(gridDim.x) * warps) {
        const uint8_t *words = a.words + row * a.row_bytes;
#pragma unroll 1
        for (int code = lane; code < plane_bytes; code += 32) {
            uint32_t points[Points::STAGES];
            Points::read(points, words + code, plane_bytes, tables);
            const float scale = number(a.step, a.group ? divided(8 * code, inverse) : 0, a.step_kind);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float w[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int nibble = 8 * e + 4 * half;  // of coordinate 4 half + e
                    float point = Points::value(points[0] >> nibble & 15, 0);
                    if (Points::STAGES == 2)
                        point += a.second * Points::value(points[Points::STAGES - 1] >> nibble & 15, 1);
                    w[e] = scale * point;
                }
                write_four(a, row * a.n + 8 * code + 4 * half, w);
            }
        }
    }
}

int start_decoding(void (*kernel)(Dense), const Dense &a, int shared_bytes, cudaStream_t stream) {
    return launch(kernel, (a.m + DECODERS / 32 - 1) / (DECODERS / 32), 1, DECODERS, shared_bytes, stream, a);
}

}  // namespace

#endif
