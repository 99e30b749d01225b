// Stands in for quip/kernels/device.cuh on the host: each thread of a block is a fiber, which runs
// until it waits for the others of its warp or block. Blocks run one after the other.
#pragma once
#define QUIP_DEVICE

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __launch_bounds__(...)
#define DEVICE inline

struct uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { unsigned x, y; };
typedef void *cudaStream_t;
constexpr int cudaErrorInvalidValue = 1;

namespace {

constexpr int PROCESSORS = 3, STACK = 1 << 17, LARGEST = 227 << 10;
Index threadIdx, blockIdx, blockDim, gridDim;
alignas(1024) uint8_t shared_bytes[LARGEST + 1024];

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool done = false;
};
std::vector<Fiber> fibers;
ucontext_t scheduler;
std::function<void()> body;
struct Barrier { int arrived = 0, generation = 0; } of_block, of_warp[32];
uint32_t given[32][32][6];  // by each lane of each warp

void wait(Barrier &barrier, int count) {
    const int generation = barrier.generation;
    if (++barrier.arrived == count) {
        barrier.arrived = 0, barrier.generation++;
        return;
    }
    const unsigned thread = threadIdx.x;
    while (barrier.generation == generation) {
        swapcontext(&fibers[thread].context, &scheduler);
        threadIdx.x = thread;
    }
}

inline void __syncthreads() { wait(of_block, int(blockDim.x)); }
inline void __syncwarp() { wait(of_warp[threadIdx.x / 32], 32); }

void enter() {
    body();
    fibers[threadIdx.x].done = true;
    swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

void run_block() {
    fibers.clear();
    fibers.resize(blockDim.x);
    of_block = {};
    for (Barrier &barrier : of_warp) barrier = {};
    for (Fiber &fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    for (bool left = true; left;) {
        left = false;
        for (unsigned i = 0; i < blockDim.x; i++)
            if (!fibers[i].done) {
                left = true, threadIdx.x = i;
                swapcontext(&scheduler, &fibers[i].context);
            }
    }
}

// The memory is filled with NaN before each block: nothing may rely on what another one left. What
// lies behind what was asked for must stay as it is, or the launch fails.
template <class... Args>
int launch(void (*kernel)(Args...), int64_t blocks, int layers, int threads, int bytes,
           cudaStream_t, Args... args) {
    if (bytes > LARGEST) return cudaErrorInvalidValue;
    body = [=] { kernel(args...); };
    blockDim = {unsigned(threads), 1}, gridDim = {unsigned(std::min<int64_t>(blocks, PROCESSORS)), unsigned(layers)};
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
            std::memset(shared_bytes, 0xff, sizeof shared_bytes);
            run_block();
            for (size_t i = bytes; i < sizeof shared_bytes; i++)
                if (shared_bytes[i] != 0xff) return cudaErrorInvalidValue;
        }
    return 0;
}

inline uint8_t *shared_memory() { return shared_bytes; }
inline uint4 read_once(const uint4 *from) { return *from; }
inline void prefetch(const void *) {}
inline void let_next_begin() {}
inline void await_previous() {}
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline uint32_t __float_as_uint(float of) { uint32_t to; std::memcpy(&to, &of, 4); return to; }
inline float __uint_as_float(uint32_t of) { float to; std::memcpy(&to, &of, 4); return to; }
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
    auto &lanes = exchange({number});
    for (auto &lane : lanes) number = std::max(number, lane[0]);
    __syncwarp();
    return number;
}

inline float __shfl_xor_sync(unsigned, float number, int other) {
    const uint32_t found = exchange({__float_as_uint(number)})[threadIdx.x % 32 ^ other][0];
    __syncwarp();
    return __uint_as_float(found);
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

}  // namespace
