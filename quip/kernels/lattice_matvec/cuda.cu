// Multiply a few vectors by a packed matrix of lattice codes, on a CUDA device: few_tokens.cuh; and
// decode all of the matrix, for many: dense.cuh.
//
// A point is a word of eight unsigned nibbles, q_i / 2 - 15/4 (E8P) or q_i / 2 - 4 (E81B):
//
//     nibble     7 6 5 4 3 2 1 0        the lower ones of its bytes are coordinates 0 to 3,
//     coordinate 7 3 6 2 5 1 4 0        the higher ones 4 to 7
//
// Magnitudes of E8P are 2 v + 8, always odd. XOR with 14 is what a sign does, and XOR with 1 takes
// 1/2 off, as the shift by -1/4 does: cuda.py has both in the table of sign bytes.

#include "../dense.cuh"

namespace {

enum Table { SIGNS, MAGNITUDES, POINTS };  // of [TABLES, 256]; the points of E81B

// Byte `at` of a lane's 16
DEVICE uint32_t word_with(const uint4 &unit, int at) {
    return at < 4 ? unit.x : at < 8 ? unit.y : at < 12 ? unit.z : unit.w;
}

DEVICE uint32_t look_up(const uint8_t *tables, Table table, const uint4 &unit, int at) {
    const uint32_t word = word_with(unit, at), entry = 4 * COPIES;
    const int down = at % 4 * 8 - 7;  // entries are 128 bytes: the byte moves to bit 7
    const uint32_t offset = (down < 0 ? word << -down : word >> down) & 255 * entry;
    const uint32_t mine = threadIdx.x % 32 * 4;
    return *(const uint32_t *)(tables + table * ENTRIES * entry + (offset | mine));
}

// Planes of bytes: signs and |v| of the first stage, then the byte of E81B, or both of E8P
template <int STAGE_PLANES> struct Lattice {
    static constexpr int PLANES = STAGE_PLANES, SLICES = 8, SUMS = PLANES == 2 ? 2 : 4, AHEAD = 1;
    static constexpr int TABLES = PLANES == 3 ? 3 : 2, UNITS = 8, WARPS = PLANES == 2 ? 24 : 16, HELD = PLANES == 4 ? 2 : 3;

    // Of a lane's 16 codes a slice has two.
    template <int TILES>
    DEVICE static void multiply(int slice, const Unit<Lattice> &unit, const uint4 (&x)[TILES],
                                int (&sums)[SUMS][TILES][4], const uint8_t *tables) {
#pragma unroll
        for (int stage = 0; stage < SUMS / 2; stage++) {
            uint32_t low[4], high[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const auto &planes = i % 2 ? unit.high : unit.low;
                const uint32_t point = read_point(tables, planes, stage, 2 * slice + i / 2);
                low[i] = point & 0x0f0f0f0f, high[i] = point & 0xf0f0f0f0;
            }
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                multiply_add(sums[2 * stage][tile], low, x[tile].x, x[tile].z);
                multiply_add(sums[2 * stage + 1][tile], high, x[tile].y, x[tile].w);
            }
        }
    }

    DEVICE static uint32_t read_point(const uint8_t *tables, const uint4 (&planes)[PLANES], int stage,
                                      int at) {
        if (stage == 1 && PLANES == 3) return look_up(tables, POINTS, planes[2], at);
        const int first = stage == 0 ? 0 : PLANES - 2;
        return look_up(tables, SIGNS, planes[first], at) ^
               look_up(tables, MAGNITUDES, planes[first + 1], at);
    }

    template <int TILES>
    DEVICE static float join(const Product &a, const int (&sums)[SUMS][TILES][4], int tile, int i) {
        float joined = float(sums[0][tile][i]) + float(sums[1][tile][i]) / 16;
        if (SUMS == 4)
            joined += a.second * (float(sums[SUMS - 2][tile][i]) + float(sums[SUMS - 1][tile][i]) / 16);
        return joined;
    }
};

// The points of a code, from its bytes in the planes
template <int PLANES> struct Points {
    static constexpr int STAGES = PLANES == 2 ? 1 : 2, TABLES = PLANES == 3 ? 3 : 2;

    DEVICE static void read(uint32_t (&points)[STAGES], const uint8_t *from, int plane_bytes,
                            const uint32_t *tables) {
        points[0] = e8p(from, plane_bytes, tables);
        from += 2 * plane_bytes;
        if (PLANES == 3) points[STAGES - 1] = tables[POINTS * ENTRIES + *from];
        if (PLANES == 4) points[STAGES - 1] = e8p(from, plane_bytes, tables);
    }
    DEVICE static uint32_t e8p(const uint8_t *from, int plane_bytes, const uint32_t *tables) {
        return tables[SIGNS * ENTRIES + *from] ^ tables[MAGNITUDES * ENTRIES + from[plane_bytes]];
    }
    DEVICE static float value(uint32_t nibble, int stage) {
        return float(nibble) / 2 - (stage == 1 && PLANES == 3 ? 4.f : 3.75f);
    }
};

template <int PLANES> int start_points(const Dense &a, cudaStream_t stream) {
    using Of = Points<PLANES>;
    return start_decoding(decode_points<Of>, a, Of::TABLES * ENTRIES * 4, stream);
}

}  // namespace

// planes: of 8 bits, that a code has. What comes back is a cudaError_t.
extern "C" int multiply_lattice(const Product *given, int planes, cudaStream_t stream) {
    switch (planes) {
        case 2: return start<Lattice<2>, false>(*given, stream);
        case 3: return start<Lattice<3>, false>(*given, stream);
        case 4: return start<Lattice<4>, false>(*given, stream);
    }
    return cudaErrorInvalidValue;
}

extern "C" int decode_lattice(const Dense *given, int planes, cudaStream_t stream) {
    switch (planes) {
        case 2: return start_points<2>(*given, stream);
        case 3: return start_points<3>(*given, stream);
        case 4: return start_points<4>(*given, stream);
    }
    return cudaErrorInvalidValue;
}
