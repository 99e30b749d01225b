// What kernels need of a CUDA device beyond C++: its instructions by name, and a launch.
//
// tests/support/emulated/device.h stands in for this file, and defines QUIP_DEVICE, where a source is
// compiled for the host.

#ifndef QUIP_DEVICE
#define QUIP_DEVICE

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__

namespace {

// The memory that the threads of a block share, as much as the launch asked for.
DEVICE uint8_t *shared_memory() {
    extern __shared__ __align__(128) uint8_t shared_bytes[];
    return shared_bytes;
}

// 16 bytes that are read once: they need not stay in the caches.
DEVICE uint4 read_once(const uint4 *from) {
    uint4 to;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
                 : "l"(from));
    return to;
}

DEVICE void prefetch(const void *from) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

// to += A B for the 16 x 32 unsigned bytes of A and the 32 x 8 signed ones of B, by a warp.
// Lane 4 g + t gives rows g and g + 8 of A (a[0], a[2] and a[1], a[3]; columns 4 t ... and
// 16 + 4 t ...), column g of B, and gets columns 2 t and 2 t + 1 of rows g and g + 8.
DEVICE void multiply_add(int (&to)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(to[0]), "+r"(to[1]), "+r"(to[2]), "+r"(to[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The largest number of a warp, in all of its lanes.
DEVICE uint32_t largest_of_warp(uint32_t number) { return __reduce_max_sync(~0u, number); }

// Kernels that are launched by `launch` one after the other overlap (from sm_90 on): the next one
// begins when all blocks of this one have called let_next_begin, and what precedes its own
// await_previous may touch nothing that this one writes, and write nothing that this one reads.
DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE void await_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Start a kernel on as many persistent blocks as the device holds at once, at most `blocks`, times
// `layers`. What comes back is a cudaError_t.
template <class... Args>
int launch(void (*kernel)(Args...), int64_t blocks, int layers, int threads, int shared_bytes,
           cudaStream_t stream, Args... args) {
    int device = 0, processors = 0, held = 0, major = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (!status) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (!status)
        status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (!status)
        status = cudaFuncSetAttribute((const void *)kernel,
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (!status)
        status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&held, kernel, threads, shared_bytes);
    if (status) return status;
    const int64_t most = int64_t(processors) * held / layers;
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks < most ? blocks : most < 1 ? 1 : most), layers);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = major >= 9;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

// What a kernel before this one may still have been writing when this one began: not from L1.
template <class Value> DEVICE Value read_fresh(const Value *from) { return __ldcg(from); }

// 16 bytes to shared memory, from L2 and past the registers; there when await_copies returns.
DEVICE void copy_fresh(uint8_t *to, const uint8_t *from) {
    const uint32_t shared = uint32_t(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}

DEVICE void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The sum of the numbers of a warp, in all of its lanes.
DEVICE int sum_of_warp(int number) { return __reduce_add_sync(~0u, number); }

// Two numbers as bfloat16, else float16: the first one in the lower half.
DEVICE uint32_t pair_of(float low, float high, bool brain) {
    uint32_t pair;
    if (brain)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Multiprocessors of the current device; 0 where the driver does not say.
inline int processors() {
    int device = 0, count = 0;
    if (cudaGetDevice(&device)) return 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

}  // namespace

#endif
