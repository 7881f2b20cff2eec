// Attention of a decode step: one new token per sequence against all keys and values of that sequence.
//
// Each block reads SPLIT consecutive tokens of one head of one sequence, keys and values once, 16 bytes a lane.
// The softmax is taken on the way, with a running maximum (Milakov and Gimelshein 2018), in fp32. A sequence longer than
// SPLIT is read by several blocks (Dao et al. 2023, "Flash-Decoding"); the last of them to finish joins their results.
//
// The bits of a row depend on that sequence alone: how it is split follows from its length, and results are joined
// in the order of the splits, whichever block came last.
//
// The new token's key and value are taken from `qkv`, and the block that reads the last tokens stores them.

#include "common.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int SPLIT = 128;    // tokens per block: what THREADS lanes of 16 bytes fetch at once in half precision, D = 64
constexpr int UNROLL = 4;     // tokens whose loads a thread has in flight
constexpr int WIDEST = 256;   // head width
constexpr float LOG2_E = 1.44269504f;
constexpr float LOWEST = -1e30f;  // below every score, and finite, so that LOWEST - LOWEST is not NaN

// A lane's share of one head of one token: 16 bytes side by side.
template <typename T, int WIDTH>
struct Share {
    static constexpr int NUMBERS = 16 / sizeof(T);
    static constexpr int LANES = WIDTH / NUMBERS;
    uint4 bits;

    __device__ void load(const T* head, int lane, int) { bits = reinterpret_cast<const uint4*>(head)[lane]; }
    __device__ void store(T* head, int lane, int) const { reinterpret_cast<uint4*>(head)[lane] = bits; }
    __device__ void clear() { bits = uint4{0, 0, 0, 0}; }
    __device__ float operator[](int i) const { return to_float(reinterpret_cast<const T*>(&bits)[i]); }
    static __device__ int place(int lane, int i) { return lane * NUMBERS + i; }
};

// Any width up to WIDEST: a whole warp per token, every 32nd number to a lane.
template <typename T>
struct Share<T, 0> {
    static constexpr int NUMBERS = WIDEST / WARP;
    static constexpr int LANES = WARP;
    float values[NUMBERS];

    __device__ void load(const T* head, int lane, int width) {
#pragma unroll
        for (int i = 0; i < NUMBERS; ++i) values[i] = place(lane, i) < width ? to_float(head[place(lane, i)]) : 0.f;
    }
    __device__ void store(T* head, int lane, int width) const {
#pragma unroll
        for (int i = 0; i < NUMBERS; ++i) {
            if (place(lane, i) < width) head[place(lane, i)] = from_float<T>(values[i]);
        }
    }
    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < NUMBERS; ++i) values[i] = 0.f;
    }
    __device__ float operator[](int i) const { return values[i]; }
    static __device__ int place(int lane, int i) { return lane + WARP * i; }
};

// WIDTH is the head width D, or 0 for one that is known at run time only.
//
// qkv [B, 3, H, D]; keys, values [slots, H, D]; first_slots, positions [B]: the slot of each sequence's first token,
// and the position of its new one; out [B, H, D]; partials [B, H, gridDim.x, D + 2]; arrived [B, H], zero before and after.
// The grid is (splits of the longest sequence or more, H, B).
template <typename T, int WIDTH>
__global__ void __launch_bounds__(THREADS, WIDTH ? 4 : 2)  // as many blocks at once as their registers allow
    decode_attention_kernel(const T* qkv, T* keys, T* values, const int64* first_slots, const int64* positions, T* out,
                            float* partials, unsigned* arrived, int run_time_width, float scale) {
    using Mine = Share<T, WIDTH>;
    constexpr int N = Mine::NUMBERS, LANES = Mine::LANES;
    constexpr int GROUPS = THREADS / LANES;  // tokens that are read side by side

    const int split = blockIdx.x, head = blockIdx.y, row = blockIdx.z, heads = gridDim.y;
    const int width = WIDTH ? WIDTH : run_time_width;
    const int position = static_cast<int>(positions[row]), context = position + 1;
    const int64 first_slot = first_slots[row];
    const int begin = split * SPLIT, end = min(begin + SPLIT, context);
    if (begin >= context) return;

    const int64 stride = static_cast<int64>(heads) * width;  // from token to token
    const T* query = qkv + row * 3 * stride + head * width;
    const T* new_key = query + stride;
    const T* new_value = new_key + stride;
    keys += first_slot * stride + head * width;
    values += first_slot * stride + head * width;

    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    float sum[N] = {}, highest = LOWEST, total = 0.f;
    Mine q;
    q.load(query, lane, width);

    for (int first = begin; first < end; first += GROUPS * UNROLL) {
        Mine k[UNROLL], v[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int token = first + u * GROUPS + group;
            if (token < end) {
                k[u].load(token == position ? new_key : keys + token * stride, lane, width);
                v[u].load(token == position ? new_value : values + token * stride, lane, width);
            } else {
                k[u].clear();
                v[u].clear();
            }
        }
        float scores[UNROLL], highest_now = highest;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float score = 0.f;
#pragma unroll
            for (int i = 0; i < N; ++i) score += q[i] * k[u][i];
#pragma unroll
            for (int offset = LANES / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(ALL_LANES, score, offset);
            scores[u] = score * (scale * LOG2_E);  // so that exp(x) is exp2(x)
            if (first + u * GROUPS + group < end) highest_now = fmaxf(highest_now, scores[u]);
        }
        const float shrink = exp2f(highest - highest_now);
        highest = highest_now;
        total *= shrink;
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] *= shrink;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const float weight = first + u * GROUPS + group < end ? exp2f(scores[u] - highest) : 0.f;
            total += weight;
#pragma unroll
            for (int i = 0; i < N; ++i) sum[i] += weight * v[u][i];
        }
    }

    // The new token's slot is read by nobody in this launch. These loads return while the results are joined.
    const bool stores = end == context && threadIdx.x < LANES;
    Mine k, v;
    if (stores) {
        k.load(new_key, lane, width);
        v.load(new_value, lane, width);
    }

    // Join the groups of a warp, then the warps.
#pragma unroll
    for (int offset = LANES; offset < WARP; offset *= 2) {
        const float highest_there = __shfl_xor_sync(ALL_LANES, highest, offset);
        const float total_there = __shfl_xor_sync(ALL_LANES, total, offset);
        const float highest_both = fmaxf(highest, highest_there);
        const float here = exp2f(highest - highest_both), there = exp2f(highest_there - highest_both);
        highest = highest_both;
        total = total * here + total_there * there;
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] = sum[i] * here + __shfl_xor_sync(ALL_LANES, sum[i], offset) * there;
    }
    __shared__ float sums[WARPS][WIDTH ? WIDTH : WIDEST];
    __shared__ float highests[WARPS], totals[WARPS];
    const int warp = threadIdx.x / WARP;
    if (threadIdx.x % WARP < LANES) {
#pragma unroll
        for (int i = 0; i < N; ++i) sums[warp][Mine::place(lane, i)] = sum[i];
        if (lane == 0) {
            highests[warp] = highest;
            totals[warp] = total;
        }
    }
    if (stores) {
        k.store(keys + position * stride, lane, width);
        v.store(values + position * stride, lane, width);
    }
    __syncthreads();
    highest = LOWEST;
    total = 0.f;
    for (int w = 0; w < WARPS; ++w) highest = fmaxf(highest, highests[w]);
    for (int w = 0; w < WARPS; ++w) total += totals[w] * exp2f(highests[w] - highest);

    const int splits = (context + SPLIT - 1) / SPLIT;
    out += (static_cast<int64>(row) * heads + head) * width;
    partials += (static_cast<int64>(row) * heads + head) * gridDim.x * (width + 2);
    float* mine = partials + split * (width + 2);
    for (int d = threadIdx.x; d < width; d += THREADS) {
        float x = 0.f;
        for (int w = 0; w < WARPS; ++w) x += sums[w][d] * exp2f(highests[w] - highest);
        if (splits == 1) {
            out[d] = from_float<T>(x / total);
        } else {
            mine[d] = x;
        }
    }
    if (splits == 1) return;

    // Join the splits: as in NVIDIA's sample threadFenceReduction, the block that finds all others done.
    __shared__ bool last;
    if (threadIdx.x == 0) {
        mine[width] = highest;
        mine[width + 1] = total;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        // It counts to splits - 1 and then starts at zero again, ready for the next launch.
        const unsigned others = splits - 1;
        last = atomicInc(&arrived[row * heads + head], others) == others;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    highest = LOWEST;
    total = 0.f;
    // __ldcg: the other blocks' stores are in L2; this multiprocessor's L1 may hold what was there before.
    for (int s = 0; s < splits; ++s) highest = fmaxf(highest, __ldcg(&partials[s * (width + 2) + width]));
    for (int s = 0; s < splits; ++s) {
        const float* there = partials + s * (width + 2);
        total += __ldcg(&there[width + 1]) * exp2f(__ldcg(&there[width]) - highest);
    }
    for (int d = threadIdx.x; d < width; d += THREADS) {
        float x = 0.f;
        for (int s = 0; s < splits; ++s) {
            const float* there = partials + s * (width + 2);
            x += __ldcg(&there[d]) * exp2f(__ldcg(&there[width]) - highest);
        }
        out[d] = from_float<T>(x / total);
    }
}

#ifndef __CUDACC_RTC__

template <typename T>
static int start(const void* qkv, void* keys, void* values, const int64* first_slots, const int64* positions, void* out,
                 float* partials, unsigned* arrived, int rows, int heads, int width, int splits, float scale,
                 cudaStream_t stream) {
    const auto kernel = width == 64 ? decode_attention_kernel<T, 64> : decode_attention_kernel<T, 0>;
    return launch(kernel, dim3(splits, heads, rows), dim3(THREADS), stream, static_cast<const T*>(qkv),
                  static_cast<T*>(keys), static_cast<T*>(values), first_slots, positions, static_cast<T*>(out), partials,
                  arrived, width, scale);
}

extern "C" {

// So that the numbers stand in one place.
int decode_attention_split_tokens() { return SPLIT; }
int decode_attention_widest_head() { return WIDEST; }

int decode_attention(int format, const void* qkv, void* keys, void* values, const int64* first_slots,
                     const int64* positions, void* out, float* partials, unsigned* arrived, int rows, int heads, int width,
                     int splits, float scale, cudaStream_t stream) {
    const auto chosen = format == FLOAT32 ? start<float> : format == FLOAT16 ? start<__half> : start<Bfloat16>;
    return chosen(qkv, keys, values, first_slots, positions, out, partials, arrived, rows, heads, width, splits, scale,
                  stream);
}

}  // extern "C"

#endif
