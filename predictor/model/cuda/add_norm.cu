// x += y, then layer norm of x: what stands between any two matrix products of GPT-2, in one kernel.
//
// The residual x, the statistics and the result before its last rounding are fp32. A block per row.

#include "common.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int WIDEST = 8192;  // numbers in a row; 32 KiB of shared memory

// The sum over the block, the same bits in every thread.
static __device__ float block_sum(float x) {
    __shared__ float of_warps[WARPS];
    x = warp_sum(x);
    __syncthreads();  // the sum before this one has been read
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0.f;
    for (int w = 0; w < WARPS; ++w) x += of_warps[w];
    return x;
}

// x [R, width] fp32, changed in place; y [R, width] or null; weight, bias [width] fp32; out [R, width]. The grid is R.
template <typename T>
__global__ void __launch_bounds__(THREADS) add_norm_kernel(float* x, const T* y, const float* weight, const float* bias,
                                                           T* out, int width, float epsilon) {
    __shared__ float row[WIDEST];  // each thread reads only what it has written itself
    const int64 first = static_cast<int64>(blockIdx.x) * width;
    float sum = 0.f;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        float here = x[first + i];
        if (y != nullptr) {
            here += to_float(y[first + i]);
            x[first + i] = here;
        }
        row[i] = here;
        sum += here;
    }
    const float mean = block_sum(sum) / width;
    float squares = 0.f;
    for (int i = threadIdx.x; i < width; i += THREADS) squares += (row[i] - mean) * (row[i] - mean);
    const float variance = block_sum(squares) / width;
    const float scale = 1.f / sqrtf(variance + epsilon);
    for (int i = threadIdx.x; i < width; i += THREADS) {
        out[first + i] = from_float<T>((row[i] - mean) * scale * weight[i] + bias[i]);
    }
}

#ifndef __CUDACC_RTC__

template <typename T>
static int start(float* x, const void* y, const float* weight, const float* bias, void* out, int rows, int width,
                 float epsilon, cudaStream_t stream) {
    return launch(add_norm_kernel<T>, dim3(rows), dim3(THREADS), stream, x, static_cast<const T*>(y), weight, bias,
                  static_cast<T*>(out), width, epsilon);
}

extern "C" {

int add_norm_widest_row() { return WIDEST; }

int add_norm(int format, float* x, const void* y, const float* weight, const float* bias, void* out, int rows, int width,
             float epsilon, cudaStream_t stream) {
    const auto chosen = format == FLOAT32 ? start<float> : format == FLOAT16 ? start<__half> : start<Bfloat16>;
    return chosen(x, y, weight, bias, out, rows, width, epsilon, stream);
}

}  // extern "C"

#endif
