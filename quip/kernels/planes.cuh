// Planes of packed codes as the lanes of a warp read them, and tables of what codes stand for.

#ifndef QUIP_PLANES
#define QUIP_PLANES

#include "device.cuh"

namespace {

constexpr int COPIES = 32;    // of each entry of a table: a lane has its own, in its own bank
constexpr int ENTRIES = 256;  // of a table

// Each entry COPIES times; neighbours begin at different ones, which are in different banks
DEVICE void copy_tables(uint32_t *to, const uint32_t *from, int entries) {
    constexpr int PARTS = COPIES / 4;
#pragma unroll 2
    for (int i = threadIdx.x; i < entries; i += blockDim.x) {
        const uint32_t word = from[i];
#pragma unroll
        for (int part = 0; part < PARTS; part++)
            ((uint4 *)to)[i * PARTS + (part + i) % PARTS] = uint4{word, word, word, word};
    }
}

template <class Code> struct Unit {  // what a lane reads of one chunk
    uint4 low[Code::PLANES], high[Code::PLANES];  // of rows g and g + 8
};

// A unit of a row's planes, 16 bytes each; 0 beyond their ends
template <class Code>
DEVICE void read_unit(uint4 (&to)[Code::PLANES], const uint8_t *row, int offset, int plane_bytes,
                      bool wide) {
#pragma unroll
    for (int plane = 0; plane < Code::PLANES; plane++, row += plane_bytes) {
        to[plane] = uint4{0, 0, 0, 0};
        if (wide) {
            if (offset < plane_bytes) to[plane] = read_once((const uint4 *)(row + offset));
        } else {
            const uint32_t *from = (const uint32_t *)(row + offset);
            if (offset < plane_bytes) to[plane].x = from[0];
            if (offset + 4 < plane_bytes) to[plane].y = from[1];
            if (offset + 8 < plane_bytes) to[plane].z = from[2];
            if (offset + 12 < plane_bytes) to[plane].w = from[3];
        }
    }
}

}  // namespace

#endif
