// As much of CUDA as the kernels use, on the CPU, so that their source can be tested where no GPU
// is. A thread block is a thread of the system; its CUDA threads are contexts that take turns in
// it, from one barrier to the next. Dynamic shared memory has to be called `memory`.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

typedef void *cudaStream_t;
typedef int cudaError_t;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct __align__(16) float4 {
    float x, y, z, w;
};

namespace {

thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr size_t SHARED = 227 << 10, BEHIND = 1 << 10;  // bytes
__shared__ __align__(1024) float memory[(SHARED + BEHIND) / sizeof(float)];

namespace emulated {

struct Barrier {
    unsigned arrived = 0, passed = 0;
};
struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
};

constexpr size_t STACK = 128 << 10;
thread_local std::vector<Thread> threads;
thread_local std::vector<Barrier> barriers;  // of the block, and of each warp
thread_local std::vector<uint32_t> sent;     // two of each thread
thread_local std::vector<unsigned> shuffles;
thread_local ucontext_t scheduler;
thread_local std::function<void()> body;

void yield() {
    const unsigned me = threadIdx.x;
    swapcontext(&threads[me].context, &scheduler);
}

void wait(Barrier &barrier, unsigned count) {
    const unsigned passed = barrier.passed;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        barrier.passed++;
    }
    while (barrier.passed == passed) yield();
}

void enter() {
    body();
    threads[threadIdx.x].done = true;
    yield();
}

void run_block(dim3 block, dim3 grid, dim3 size, const std::function<void()> &kernel) {
    blockIdx = block, gridDim = grid, blockDim = size, body = kernel;
    std::memset(memory, 0xff, sizeof memory);  // NaN: what was not written shows
    threads.clear();
    threads.resize(size.x);
    barriers.assign(1 + size.x / 32, {});
    sent.assign(2 * size.x, 0);
    shuffles.assign(size.x, 0);
    for (Thread &thread : threads) {
        thread.stack.reset(new char[STACK]);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = STACK;
        makecontext(&thread.context, enter, 0);
    }
    for (unsigned left = size.x; left;) {
        left = 0;
        for (unsigned i = 0; i < size.x; i++) {
            if (threads[i].done) continue;
            left++;
            threadIdx = dim3(i);
            swapcontext(&scheduler, &threads[i].context);
        }
    }
}

template <class Argument>
cudaError_t launch(
    void (*kernel)(Argument), dim3 grid, dim3 size, void **arguments, size_t shared, bool together) {
    if (shared > SHARED) return 1;  // cudaErrorInvalidValue
    const Argument argument = *static_cast<Argument *>(arguments[0]);
    std::vector<std::thread> blocks;
    for (unsigned block = 0; block < grid.x; block++) {
        blocks.emplace_back(run_block, block, grid, size, [=] { kernel(argument); });
        if (!together) blocks.back().join();
    }
    for (std::thread &block : blocks)
        if (block.joinable()) block.join();
    return 0;
}

}  // namespace emulated

void __syncthreads() { emulated::wait(emulated::barriers[0], blockDim.x); }

void __syncwarp() { emulated::wait(emulated::barriers[1 + threadIdx.x / 32], 32); }

// Two places for each thread: nobody writes to one again before all have read it
template <class Value> Value __shfl_sync(unsigned, Value value, int lane) {
    static_assert(sizeof value == 4);
    const unsigned me = threadIdx.x, other = me / 32 * 32 + (lane & 31);
    const unsigned turn = emulated::shuffles[me]++ % 2;
    std::memcpy(&emulated::sent[2 * me + turn], &value, 4);
    __syncwarp();
    std::memcpy(&value, &emulated::sent[2 * other + turn], 4);
    return value;
}

template <class Value> Value __shfl_xor_sync(unsigned all, Value value, int across) {
    return __shfl_sync(all, value, static_cast<int>(threadIdx.x % 32) ^ across);
}

unsigned __ballot_sync(unsigned all, bool vote) {
    unsigned votes = vote ? 1u << threadIdx.x % 32 : 0;
    for (int across = 16; across; across /= 2) votes |= __shfl_xor_sync(all, votes, across);
    return votes;
}

int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

template <class Value> Value __ldg(const Value *from) { return *from; }

// Who sleeps waits for others: let them go on meanwhile
void __nanosleep(unsigned) {
    std::this_thread::yield();
    emulated::yield();
}

int min(int a, int b) { return a < b ? a : b; }
int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel *, int, int) { return 0; }

template <class Argument>
cudaError_t cudaLaunchKernel(
    void (*kernel)(Argument), dim3 grid, dim3 size, void **arguments, size_t shared, cudaStream_t) {
    return emulated::launch(kernel, grid, size, arguments, shared, false);
}

template <class Argument>
cudaError_t cudaLaunchCooperativeKernel(
    void (*kernel)(Argument), dim3 grid, dim3 size, void **arguments, size_t shared, cudaStream_t) {
    return emulated::launch(kernel, grid, size, arguments, shared, true);
}

}  // namespace
