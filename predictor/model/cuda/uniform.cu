// Counter-based random numbers, the same bits as engine/philox.py: Philox4x32-10 (Salmon et al. 2011).

#include "common.cuh"

constexpr int THREADS = 128;

// numbers [B] in [0, 1), each a function of seeds [B] (64 bits, in a signed integer) and counts [B] alone.
__global__ void uniform_kernel(const int64* seeds, const int64* counts, double* numbers, int rows) {
    const int row = blockIdx.x * THREADS + threadIdx.x;
    if (row >= rows) return;
    const auto seed = static_cast<unsigned long long>(seeds[row]), count = static_cast<unsigned long long>(counts[row]);
    unsigned c0 = static_cast<unsigned>(count), c1 = static_cast<unsigned>(count >> 32), c2 = 0, c3 = 0;
    unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const unsigned long long product0 = 0xD2511F53ull * c0, product1 = 0xCD9E8D57ull * c2;
        c0 = static_cast<unsigned>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<unsigned>(product1);
        c2 = static_cast<unsigned>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<unsigned>(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    const unsigned long long bits = (static_cast<unsigned long long>(c0 >> 5) << 26) + (c1 >> 6);  // 53 of them
    numbers[row] = static_cast<double>(bits) * (1.0 / 9007199254740992.0);
}

#ifndef __CUDACC_RTC__

extern "C" {

int uniform(const int64* seeds, const int64* counts, double* numbers, int rows, cudaStream_t stream) {
    return launch(uniform_kernel, dim3((rows + THREADS - 1) / THREADS), dim3(THREADS), stream, seeds, counts, numbers, rows);
}

const char* error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // extern "C"

#endif
