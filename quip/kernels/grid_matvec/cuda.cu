// Multiply a few vectors by a packed matrix of integer grids, on a CUDA device: few_tokens.cuh; and
// decode all of the matrix, for many: dense.cuh.
//
// Codes stay unsigned bytes, with some zero bits below them: those of a slice are masked where they
// lie in their plane, and sums of slices at different bits are weighed at the end.

#include "../dense.cuh"

namespace {

template <int WORD> DEVICE uint32_t word(const uint4 &of) {
    return WORD == 0 ? of.x : WORD == 1 ? of.y : WORD == 2 ? of.z : of.w;
}

// 2, 4 or 8 bits: one plane, whose byte j has code k bytes + j at bit BITS k
template <int BITS> struct Grid {
    static constexpr int PLANES = 1, SLICES = 8 / BITS, SUMS = SLICES, AHEAD = 2;
    static constexpr int TABLES = 0, UNITS = 1, WARPS = 8, HELD = 3;

    DEVICE static constexpr float weight(int slice) {
        return 1.f / (1 << BITS * slice);
    }
    template <int WORD> DEVICE static uint32_t bytes(int slice, const uint4 (&planes)[PLANES]) {
        return word<WORD>(planes[0]) & (0x01010101u * ((1 << BITS) - 1) << BITS * slice);
    }
    DEVICE static constexpr int sum(int slice) { return slice; }
};

// 3 bits: a plane of 2, of which byte j has code 2 k bytes + j at bit 2 k, and a plane of 1, of which
// byte j has code k bytes + j at bit k. Slice k takes bit k of the second; the last two have no room
// for a bit above theirs, and move down.
template <> struct Grid<3> {
    static constexpr int PLANES = 3, SLICES = 8, SUMS = 3, AHEAD = 1;
    static constexpr int TABLES = 0, UNITS = 1, WARPS = 8, HELD = 2;

    DEVICE static constexpr int sum(int slice) { return slice < 4 ? slice / 2 : 2; }
    DEVICE static constexpr float weight(int slice) {
        return 1.f / (1 << 2 * sum(slice));
    }
    template <int WORD> DEVICE static uint32_t bytes(int slice, const uint4 (&planes)[PLANES]) {
        const uint32_t two = word<WORD>(slice % 2 ? planes[1] : planes[0]), one = word<WORD>(planes[2]);
        const int to = 2 * sum(slice), up = to + 2 - slice;
        const uint32_t low = slice < 6 ? two : two >> 2, high = up >= 0 ? one << up : one >> -up;
        return (low & 0x03030303u << to) | (high & 0x04040404u << to);
    }
};

template <int BITS> struct Decoded : Grid<BITS> {
    using Base = Grid<BITS>;

    // One slice, added to its sum, or to the only one
    template <int TILES, int SUMS>
    DEVICE static void multiply(int slice, const Unit<Decoded> &unit, const uint4 (&x)[TILES],
                                int (&sums)[SUMS][TILES][4], const uint8_t *) {
        const auto &low = unit.low, &high = unit.high;
        const uint32_t first[4] = {
            Base::template bytes<0>(slice, low), Base::template bytes<0>(slice, high),
            Base::template bytes<1>(slice, low), Base::template bytes<1>(slice, high)};
        const uint32_t second[4] = {
            Base::template bytes<2>(slice, low), Base::template bytes<2>(slice, high),
            Base::template bytes<3>(slice, low), Base::template bytes<3>(slice, high)};
        const int sum = SUMS == 1 ? 0 : Base::sum(slice);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            multiply_add(sums[sum][tile], first, x[tile].x, x[tile].y);
            multiply_add(sums[sum][tile], second, x[tile].z, x[tile].w);
        }
    }

    template <int TILES>
    DEVICE static float join(const Product &, const int (&sums)[Base::SUMS][TILES][4], int tile, int i) {
        float joined = 0;
#pragma unroll
        for (int sum = 0; sum < Base::SUMS; sum++)
            joined += float(sums[sum][tile][i]) / (1 << (BITS == 3 ? 2 : BITS) * sum);
        return joined;
    }
};

// Codes of all slices at a place in the planes, as bytes
template <int BITS> struct Codes {
    static constexpr int SLICES = 8 / BITS;

    DEVICE static void read(uint32_t (&codes)[SLICES], const uint8_t *from, int) {
        const uint32_t word = *(const uint32_t *)from;
#pragma unroll
        for (int k = 0; k < SLICES; k++) codes[k] = word >> BITS * k & 0x01010101u * ((1 << BITS) - 1);
    }
};

template <> struct Codes<3> {
    static constexpr int SLICES = 8;

    DEVICE static void read(uint32_t (&codes)[SLICES], const uint8_t *from, int plane_bytes) {
        const uint32_t one = *(const uint32_t *)(from + 2 * plane_bytes);
        const uint32_t two[2] = {*(const uint32_t *)from, *(const uint32_t *)(from + plane_bytes)};
#pragma unroll
        for (int k = 0; k < SLICES; k++)
            codes[k] = (two[k % 2] >> k / 2 * 2 & 0x03030303u) | (one >> k & 0x01010101u) << 2;
    }
};

template <int BITS> int start_grid(const Product &a, cudaStream_t stream) {
    return a.group ? start<Decoded<BITS>, true>(a, stream) : start<Decoded<BITS>, false>(a, stream);
}

}  // namespace

// What comes back is a cudaError_t.
extern "C" int multiply_grid(const Product *given, int bits, cudaStream_t stream) {
    switch (bits) {
        case 2: return start_grid<2>(*given, stream);
        case 3: return start_grid<3>(*given, stream);
        case 4: return start_grid<4>(*given, stream);
        case 8: return start_grid<8>(*given, stream);
    }
    return cudaErrorInvalidValue;
}

extern "C" int decode_grid(const Dense *given, int bits, cudaStream_t stream) {
    switch (bits) {
        case 2: return start_decoding(decode_grids<Codes<2>>, *given, 0, stream);
        case 3: return start_decoding(decode_grids<Codes<3>>, *given, 0, stream);
        case 4: return start_decoding(decode_grids<Codes<4>>, *given, 0, stream);
        case 8: return start_decoding(decode_grids<Codes<8>>, *given, 0, stream);
    }
    return cudaErrorInvalidValue;
}
