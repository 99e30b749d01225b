// Unpack a row of codes of 1 to 8 bits to bytes, from planes of 8, 4, 2 and 1 bits as in bits.py.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

typedef uint64_t Words __attribute__((vector_size(64)));

// to = (from >> shift & mask) << low, or that added to it, for `size` bytes
template <bool add>
void extract(const uint8_t *__restrict from, uint8_t *__restrict to, int64_t size, int shift,
             uint8_t mask, int low) {
    const Words masks = Words{} + 0x0101010101010101u * mask;
    const auto some = [&](int64_t j) {
        Words bytes, sum = {};  // what a shift brings in from the next byte is masked off
        std::memcpy(&bytes, from + j, sizeof bytes);
        if (add) std::memcpy(&sum, to + j, sizeof sum);
        sum |= (bytes >> shift & masks) << low;
        std::memcpy(to + j, &sum, sizeof sum);
    };
    constexpr int64_t WIDTH = sizeof(Words);
    int64_t j = 0;
    for (; j + WIDTH <= size; j += WIDTH) some(j);
    if (j < size && size >= WIDTH) some(size - WIDTH), j = size;  // some bytes once more
    for (; j < size; j++) to[j] = (add ? to[j] : 0) | (from[j] >> shift & mask) << low;
}

// What a plane of `width` bits has of n codes, from the bit `low` on; its size in bytes
int64_t unpack_plane(const uint8_t *plane, int width, int low, int64_t n, uint8_t *codes) {
    const int64_t size = (n * width + 7) / 8;
    const uint8_t mask = (1 << width) - 1;
    for (int held = 0; held < 8 / width; held++)
        (low ? extract<true> : extract<false>)(plane, codes + held * size, size, held * width, mask,
                                               low);
    return size;
}

// The n codes of a row, one a byte; up to 7 bytes after them are written as well
void unpack(const uint8_t *row, int bits, int64_t n, uint8_t *codes) {
    int low = 0;
    for (int width : {8, 4, 2, 1}) {
        if (!(bits & width)) continue;
        row += unpack_plane(row, width, low, n, codes);
        low += width;
    }
}

}  // namespace
