// Numbers as tensors hold them, of 32 or 16 bits, read as float and written back.

#ifndef QUIP_NUMBERS
#define QUIP_NUMBERS

#include "device.cuh"

namespace {

enum Kind { FLOAT, BFLOAT, HALF };  // what a number is stored as, in the order of numbers.py

DEVICE float from_bits(uint32_t bits, int kind) {  // the lower 16 of them
    return kind == BFLOAT ? __uint_as_float(bits << 16)
                          : __half2float(__ushort_as_half(uint16_t(bits)));
}

DEVICE float number(const void *from, int64_t at, int kind) {
    return kind == FLOAT ? ((const float *)from)[at] : from_bits(((const uint16_t *)from)[at], kind);
}

// A number that an earlier kernel may just have written

DEVICE float read_number(const void *from, int64_t at, int kind) {
    if (kind == FLOAT) return read_fresh((const float *)from + at);
    return from_bits(read_fresh((const uint16_t *)from + at), kind);
}

// COUNT times four numbers side by side, `stride` numbers from each other; all are asked for at once.
template <int COUNT>
DEVICE void read_fours(float4 (&to)[COUNT], const void *from, int64_t at, int64_t stride, int kind) {
    if (kind == FLOAT) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            to[i] = read_fresh((const float4 *)((const float *)from + at + i * stride));
        return;
    }
    unsigned long long four[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        four[i] = read_fresh((const unsigned long long *)((const uint16_t *)from + at + i * stride));
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const uint32_t low = uint32_t(four[i]), high = uint32_t(four[i] >> 32);
        to[i] = float4{from_bits(low, kind), from_bits(low >> 16, kind),
                       from_bits(high, kind), from_bits(high >> 16, kind)};
    }
}

DEVICE void write_number(void *to, int64_t at, int kind, float number) {
    if (kind == FLOAT)
        ((float *)to)[at] = number;
    else
        ((uint16_t *)to)[at] = uint16_t(pair_of(number, 0, kind == BFLOAT));
}

DEVICE void write_four(void *to, int64_t at, int kind, float4 four) {
    if (kind == FLOAT) {
        *(float4 *)((float *)to + at) = four;
        return;
    }
    const bool brain = kind == BFLOAT;
    const uint32_t low = pair_of(four.x, four.y, brain), high = pair_of(four.z, four.w, brain);
    *(unsigned long long *)((uint16_t *)to + at) = low | (unsigned long long)high << 32;
}

}  // namespace

#endif
