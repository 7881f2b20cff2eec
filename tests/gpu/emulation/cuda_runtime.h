// CUDA's words on a CPU, enough to run our kernels unchanged: the kernels' arithmetic and synchronization can then be
// tested where no GPU is. Blocks run one after another. The threads of a block are coroutines; each warp runs as far as
// it gets before the next one does. Both run forwards or backwards, so that a missing barrier shows in one of the two.
//
// Not modelled: memory ordering between blocks, warps that are not whole, dynamic shared memory, time.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another, so one instance serves

using std::min;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint4 {
    unsigned x, y, z, w;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error is known on a CPU"; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned WARP_THREADS = 32;

enum class Wait { NOTHING, WARP, BLOCK, END };

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Wait wait;
    float shared_value;
};

inline bool backwards = false;
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> body;

inline void pause(Wait wait) {
    threads[current].wait = wait;
    swapcontext(&threads[current].context, &scheduler);
}

inline void enter() {
    body();
    pause(Wait::END);
}

// Let threads of [first, last) go on once every one of them that has not ended waits for the same thing.
inline bool release(unsigned first, unsigned last, Wait wait) {
    bool some = false;
    for (unsigned t = first; t < last; ++t) {
        if (threads[t].wait == wait) {
            some = true;
        } else if (threads[t].wait != Wait::END || wait == Wait::WARP) {
            return false;
        }
    }
    for (unsigned t = first; t < last; ++t) {
        if (threads[t].wait == wait) threads[t].wait = Wait::NOTHING;
    }
    return some;
}

// Run the threads of [first, last), a warp, until no shuffle lets them go on.
inline void run_warp(unsigned first, unsigned last) {
    do {
        for (unsigned i = first; i < last; ++i) {
            current = backwards ? first + last - 1 - i : i;
            if (threads[current].wait != Wait::NOTHING) continue;
            threadIdx = dim3(current);
            swapcontext(&scheduler, &threads[current].context);
        }
    } while (release(first, last, Wait::WARP));
}

inline void run_block(unsigned count) {
    threads.resize(count);
    for (Thread& thread : threads) {
        constexpr size_t STACK_BYTES = 64 * 1024;
        if (!thread.stack) thread.stack.reset(new char[STACK_BYTES]);
        thread.wait = Wait::NOTHING;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = STACK_BYTES;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, enter, 0);
    }
    do {
        for (unsigned i = 0; i < count; i += WARP_THREADS) {
            const unsigned first = backwards ? (count - 1) / WARP_THREADS * WARP_THREADS - i : i;
            run_warp(first, std::min(first + WARP_THREADS, count));
        }
    } while (release(0, count, Wait::BLOCK));
    for (const Thread& thread : threads) {
        if (thread.wait == Wait::END) continue;
        std::fprintf(stderr, "threads of a block wait for each other in different places\n");
        std::abort();
    }
}

template <typename... P, size_t... I>
void run(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, std::index_sequence<I...>) {
    gridDim = grid, blockDim = block;
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned i = 0; i < blocks; ++i) {
        const unsigned b = backwards ? blocks - 1 - i : i;
        blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
        body = [&] { kernel(*static_cast<P*>(arguments[I])...); };
        run_block(block.x);
    }
}

template <typename... P>
void run(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments) {
    run(kernel, grid, block, arguments, std::index_sequence_for<P...>());
}

}  // namespace emulation

extern "C" __attribute__((used)) inline void emulate_backwards(int yes) { emulation::backwards = yes; }

template <typename Kernel>
cudaError_t cudaLaunchKernel(Kernel* kernel, dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
    emulation::run(kernel, grid, block, arguments);
    return cudaSuccess;
}

inline void __syncthreads() { emulation::pause(emulation::Wait::BLOCK); }
inline void __threadfence() {}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
    const unsigned here = emulation::current;
    emulation::threads[here].shared_value = value;
    emulation::pause(emulation::Wait::WARP);
    const float there = emulation::threads[here ^ mask].shared_value;
    emulation::pause(emulation::Wait::WARP);  // nobody overwrites its value before all have read
    return there;
}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
    const unsigned old = *address;
    *address = old >= limit ? 0 : old + 1;
    return old;
}

inline float __ldcg(const float* address) { return *address; }

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
