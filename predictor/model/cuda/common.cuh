// What the kernels share: number formats, sums over a warp, and the launch.
//
// Everything here is in the subset of sm_70 (V100): no bfloat16 instructions, no cp.async, no clusters.
#pragma once

#include <cuda_fp16.h>

using int64 = long long;  // torch's int64

// bfloat16 is the upper half of a float, so V100 can convert it too; it has no instructions for it.
struct Bfloat16 {
    unsigned short bits;
};

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(Bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <typename T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}

template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}

template <>
__device__ __forceinline__ Bfloat16 from_float<Bfloat16>(float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return {0x7fc0};  // rounding could turn a NaN into an infinity
    return {static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
}

// The sum over a warp, the same bits in every lane: each step adds the same two numbers on both sides.
__device__ __forceinline__ float warp_sum(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

#ifndef __CUDACC_RTC__  // NVRTC compiles device code alone

#include <cuda_runtime.h>

// The number formats as library.py counts them.
enum Format { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

template <typename T>
struct Same {
    using type = T;
};

// Start `kernel`; the status is cudaSuccess or why it did not start.
template <typename... P>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, typename Same<P>::type... arguments) {
    void* pointers[] = {&arguments...};
    // The type is named because CUDA 12 declares `const T*`, which nvcc 12 deduces from no pointer to a function.
    const cudaError_t status = cudaLaunchKernel<void(P...)>(kernel, grid, block, pointers, 0, stream);
    if (status != cudaSuccess) cudaGetLastError();  // forgets it, or torch would find it after a launch of its own
    return status;
}

#endif
