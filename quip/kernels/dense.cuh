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

// The places of columns 4 i ... 4 i + 3 among the groups of a row
struct Places {
    uint32_t at[4];
    DEVICE Places(const Dense &a, uint32_t inverse, int column) {
        const bool shared = a.group % 4 == 0;
        at[0] = a.group ? divided(column, inverse) : 0;
#pragma unroll
        for (int e = 1; e < 4; e++) at[e] = shared ? at[0] : divided(column + e, inverse);
    }
};

DEVICE uint32_t inverse_of(const Dense &a) { return a.group ? ~0u / uint32_t(a.group) : 0; }

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
                const Places place(a, inverse, column);
                float w[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float step = number(a.step, row * a.step_row + place.at[e], a.step_kind);
                    const float zero = a.zero ? float(a.zero[row * a.zero_row + place.at[e]]) : a.middle;
                    w[e] = (float(codes[slice] >> 8 * e & 255) - zero) * step;
                }
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
