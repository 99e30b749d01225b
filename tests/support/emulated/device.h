// Stands in for quip/kernels/device.cuh on the CPU. Blocks run one after the other.
#pragma once
#define QUIP_DEVICE

#include <algorithm>
#include <initializer_list>

#include "cuda_runtime.h"

#define DEVICE inline

struct uint4 {
    uint32_t x, y, z, w;
};
constexpr int cudaErrorInvalidValue = 1;

namespace {

constexpr unsigned PROCESSORS = 3;
uint32_t given[32][32][6];  // by each lane of each warp

// What lies behind the memory that was asked for must stay as it is, or the launch fails.
template <class... Args>
int launch(void (*kernel)(Args...), int64_t blocks, int layers, int threads, int bytes,
           cudaStream_t, Args... args) {
    if (bytes > int(SHARED)) return cudaErrorInvalidValue;
    const dim3 grid(std::min<int64_t>(blocks, PROCESSORS), layers);
    for (unsigned layer = 0; layer < grid.y; layer++)
        for (unsigned block = 0; block < grid.x; block++) {
            emulated::run_block(dim3(block, layer), grid, threads, [=] { kernel(args...); });
            const auto *shared = reinterpret_cast<const uint8_t *>(memory);
            for (size_t i = bytes; i < sizeof memory; i++)
                if (shared[i] != 0xff) return cudaErrorInvalidValue;
        }
    return 0;
}

inline uint8_t *shared_memory() { return reinterpret_cast<uint8_t *>(memory); }
inline uint4 read_once(const uint4 *from) { return *from; }
inline void prefetch(const void *) {}
inline void let_next_begin() {}
inline void await_previous() {}
inline uint16_t __ushort_as_half(uint16_t of) { return of; }
inline float __half2float(uint16_t of) { _Float16 to; std::memcpy(&to, &of, 2); return to; }
inline int __float2int_rn(float of) { return std::isnan(of) ? 0 : int(std::nearbyint(of)); }

// What each lane gave, once all have
inline uint32_t (&exchange(std::initializer_list<uint32_t> words))[32][6] {
    auto &lanes = given[threadIdx.x / 32];
    std::copy(words.begin(), words.end(), lanes[threadIdx.x % 32]);
    __syncwarp();
    return lanes;
}

inline uint32_t largest_of_warp(uint32_t number) {
    for (auto &lane : exchange({number})) number = std::max(number, lane[0]);
    __syncwarp();
    return number;
}

inline void multiply_add(int (&to)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    auto &lanes = exchange({a[0], a[1], a[2], a[3], b0, b1});
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 32; k++) {  // row g + 8 (i / 2), column 2 t + i % 2
            const auto byte = [&](int lane, int word) { return lanes[lane][word] >> 8 * (k % 4); };
            const int half = k / 16, quad = k % 16 / 4;
            to[i] += int(uint8_t(byte(4 * g + quad, 2 * half + i / 2))) *
                     int(int8_t(byte(4 * (2 * t + i % 2) + quad, 4 + half)));
        }
    __syncwarp();
}

template <class Value> Value read_fresh(const Value *from) { return *from; }
inline void copy_fresh(uint8_t *to, const uint8_t *from) { std::memcpy(to, from, 16); }
inline void await_copies() {}
struct float2 {
    float x, y;
};

inline uint16_t half_of(float of, bool brain) {
    uint16_t bits;
    if (!brain) {
        const _Float16 half(of);
        std::memcpy(&bits, &half, 2);
        return bits;
    }
    const uint32_t all = __float_as_uint(of);
    return std::isnan(of) ? 0x7fff : uint16_t((all + 0x7fff + (all >> 16 & 1)) >> 16);
}
inline uint32_t pair_of(float low, float high, bool brain) {
    return half_of(low, brain) | uint32_t(half_of(high, brain)) << 16;
}
inline int processors() { return PROCESSORS; }

inline int sum_of_warp(int number) {
    int sum = 0;
    for (auto &lane : exchange({uint32_t(number)})) sum += int(lane[0]);
    __syncwarp();
    return sum;
}

struct uint2 {
    uint32_t x, y;
};

}  // namespace

#define __constant__
#define __popc __builtin_popcount

namespace {

inline int __float_as_int(float of) { return int(__float_as_uint(of)); }
inline float __int_as_float(int of) { return __uint_as_float(unsigned(of)); }

}  // namespace

// Each is rounded by itself on the host too, whose instructions multiply and add one after the other
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t which) {
    const uint64_t bytes = low | uint64_t(high) << 32;
    uint32_t to = 0;
    for (int i = 0; i < 4; i++) to |= uint32_t(bytes >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
    return to;
}
