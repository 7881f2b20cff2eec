// Attention over the live keys and values of a sequence, in place.
//
// Up to QUERIES rows of one head share each load of keys and values. A row's scores, its softmax and its sums run in
// the same order whatever rows it shares them with: positions past its own are weighted with an exact zero.
#pragma once

#include <algorithm>

#include "model.h"
#include "simd.h"

namespace {

// Registers bound both: scores take rows x TOKEN_VECTORS x (blocks at a time), sums rows x (vectors of coordinates).
constexpr int TOKEN_VECTORS = TOKENS / LANES;
constexpr int QUERIES = LANES == 16 ? 8 : LANES == 8 ? 4 : 2;
constexpr int SCORE_VECTORS = LANES == 16 ? 16 : 8;
constexpr int SUM_QUERIES = LANES == 16 ? 4 : 2;
constexpr int SUM_VECTORS = 4;

// One head of one layer.
struct Head {
    uint8_t *keys, *values;  // of the sequence's first block
    int width;
    bool narrow;  // bf16

    int block_bytes() const { return TOKENS * width * (narrow ? 2 : 4); }
};

inline Head head_of(const Model& model, const KeysValues& kv, const Span& span, int layer, int head) {
    const Shape& shape = model.shape;
    Head result{nullptr, nullptr, shape.head_width(), shape.number_width != Width::float32};
    const int64_t bytes = result.block_bytes();
    const auto start = [&](int which) {
        return kv.data + ((((int64_t)layer * 2 + which) * shape.heads + head) * kv.blocks + span.first_block) * bytes;
    };
    result.keys = start(0);
    result.values = start(1);
    return result;
}

// Put one position's key and value [width] in their place.
inline void remember(const Head& head, int position, const float* key, const float* value) {
    const int64_t block = (int64_t)(position / TOKENS) * head.block_bytes();
    const int token = position % TOKENS;
    if (head.narrow) {
        uint16_t* keys = (uint16_t*)(head.keys + block);
        uint16_t* values = (uint16_t*)(head.values + block) + (token / 2) * head.width * 2 + token % 2;
        for (int d = 0; d < head.width; d += 2)
            for (int i = 0; i < 2; i++) keys[d * TOKENS + token * 2 + i] = to_bf16(key[d + i]);
        for (int d = 0; d < head.width; d++) values[d * 2] = to_bf16(value[d]);
    } else {
        float* keys = (float*)(head.keys + block) + token;
        for (int d = 0; d < head.width; d++) keys[d * TOKENS] = key[d];
        memcpy((float*)(head.values + block) + token * head.width, value, head.width * 4);
    }
}

// scores[q][16 * block ..] for ROWS queries and BLOCKS blocks of tokens. Queries are scaled and, where keys are
// bf16 and the CPU multiplies those, bf16 themselves.
template <int ROWS, int BLOCKS>
void score_blocks(const Head& head, const uint8_t* queries, size_t query_bytes, int block, float* scores, int stride) {
    Floats sums[ROWS][BLOCKS][TOKEN_VECTORS] = {};
    const uint8_t* keys = head.keys + (int64_t)block * head.block_bytes();
    const int words = head.narrow ? head.width / 2 : head.width;  // of a token's key
    for (int word = 0; word < words; word++, keys += TOKENS * 4)
        for (int b = 0; b < BLOCKS; b++)
            for (int v = 0; v < TOKEN_VECTORS; v++) {
                const Words key = load_words(keys + (int64_t)b * head.block_bytes() + v * LANES * 4);
                for (int q = 0; q < ROWS; q++) {
                    const uint8_t* query = queries + q * query_bytes;
                    Floats& sum = sums[q][b][v];
                    if (!head.narrow) {
                        sum = fma(as_floats(key), as_floats(splat_word(query + word * 4)), sum);
                    } else {
#if defined(__AVX512BF16__)
                        sum = _mm512_dpbf16_ps(sum, (__m512bh)key, (__m512bh)splat_word(query + word * 4));
#else
                        sum = fma(low_bf16(key), as_floats(splat_word(query + word * 8)), sum);
                        sum = fma(high_bf16(key), as_floats(splat_word(query + word * 8 + 4)), sum);
#endif
                    }
                }
            }
    for (int q = 0; q < ROWS; q++)
        for (int b = 0; b < BLOCKS; b++)
            for (int v = 0; v < TOKEN_VECTORS; v++)
                store(scores + q * stride + (block + b) * TOKENS + v * LANES, sums[q][b][v]);
}

// Softmax of one row over its first `context` scores; the rest of `padded` becomes zero. Returns the sum's inverse.
inline float soften(float* scores, int context, int padded) {
    for (int t = context; t < padded; t++) scores[t] = -INFINITY;
    Floats best = splat(-INFINITY);
    for (int t = 0; t < padded; t += LANES) best = max(load(scores + t), best);
    const Floats largest_score = splat(largest(best));
    Floats total = {};
    for (int t = 0; t < padded; t += LANES) {
        const Floats weight = exp(load(scores + t) - largest_score);
        store(scores + t, weight);
        total += weight;
    }
    return 1 / sum(total);
}

// attended[q][first .. first + VECTORS_ * LANES] = weights[q] over the values of the first `tokens` positions.
template <int ROWS, int VECTORS_>
void weigh_values(const Head& head, const float* weights, int stride, const float* inverses, int tokens, int first,
                  float* attended, int64_t attended_stride) {
    Floats sums[ROWS][VECTORS_] = {};
    if (head.narrow) {
        for (int t = 0; t < tokens; t += 2) {
            const uint8_t* pair = head.values + (int64_t)(t / 2) * head.width * 4 + first * 4;
            // What lies in the place of a token yet to come is not ours to read.
            const Words mask = Words{} + (t + 1 < tokens ? 0xffffffffu : 0x0000ffffu);
            for (int v = 0; v < VECTORS_; v++) {
                const Words both = load_words(pair + v * LANES * 4) & mask;
                for (int q = 0; q < ROWS; q++) {
                    sums[q][v] = fma(splat(weights[q * stride + t]), low_bf16(both), sums[q][v]);
                    sums[q][v] = fma(splat(weights[q * stride + t + 1]), high_bf16(both), sums[q][v]);
                }
            }
        }
    } else {
        for (int t = 0; t < tokens; t++) {
            const float* value = (const float*)head.values + (int64_t)t * head.width + first;
            for (int v = 0; v < VECTORS_; v++)
                for (int q = 0; q < ROWS; q++)
                    sums[q][v] = fma(splat(weights[q * stride + t]), load(value + v * LANES), sums[q][v]);
        }
    }
    for (int q = 0; q < ROWS; q++)
        for (int v = 0; v < VECTORS_; v++)
            store(attended + q * attended_stride + first + v * LANES, sums[q][v] * splat(inverses[q]));
}

template <int ROWS>
void weigh_all_values(const Head& head, const float* weights, int stride, const float* inverses, int tokens,
                      float* attended, int64_t attended_stride) {
    int first = 0;
    for (; first + SUM_VECTORS * LANES <= head.width; first += SUM_VECTORS * LANES)
        weigh_values<ROWS, SUM_VECTORS>(head, weights, stride, inverses, tokens, first, attended, attended_stride);
    for (; first < head.width; first += LANES)
        weigh_values<ROWS, 1>(head, weights, stride, inverses, tokens, first, attended, attended_stride);
}

inline size_t query_bytes(const Head& head) {
#if defined(__AVX512BF16__)
    return head.width * (head.narrow ? 2 : 4);
#else
    return head.width * 4;
#endif
}

inline void scale_query(const Head& head, const float* query, float scale, uint8_t* out) {
    float scaled[LANES];
    for (int d = 0; d < head.width; d += LANES) {
        store(scaled, load(query + d) * splat(scale));
#if defined(__AVX512BF16__)
        if (head.narrow) {
            to_bf16(scaled, (uint16_t*)out + d, LANES);
            continue;
        }
#endif
        memcpy((float*)out + d, scaled, sizeof scaled);
    }
}

// Buffers of one thread: queries [QUERIES][head width] and scores [QUERIES][context rounded up to 16].
struct AttentionBuffers {
    uint8_t* queries;
    float* scores;
    int stride;
};

// Attend with ROWS consecutive positions, the first of which is `position`. Query q stands at queries + q * row_stride.
template <int ROWS>
void attend(const Head& head, const float* queries, int64_t row_stride, float scale, int position,
            const AttentionBuffers& own, float* attended, int64_t attended_stride) {
    const size_t bytes = query_bytes(head);
    for (int q = 0; q < ROWS; q++) scale_query(head, queries + q * row_stride, scale, own.queries + q * bytes);
    const int tokens = position + ROWS, blocks = (tokens + TOKENS - 1) / TOKENS, padded = blocks * TOKENS;
    constexpr int AT_ONCE = SCORE_VECTORS / (ROWS * TOKEN_VECTORS) > 1 ? SCORE_VECTORS / (ROWS * TOKEN_VECTORS) : 1;
    int block = 0;
    for (; block + AT_ONCE <= blocks; block += AT_ONCE)
        score_blocks<ROWS, AT_ONCE>(head, own.queries, bytes, block, own.scores, own.stride);
    for (; block < blocks; block++) score_blocks<ROWS, 1>(head, own.queries, bytes, block, own.scores, own.stride);
    float inverses[ROWS];
    for (int q = 0; q < ROWS; q++) inverses[q] = soften(own.scores + q * own.stride, position + q + 1, padded);
    for (int q = 0; q < ROWS;) {
        const float* weights = own.scores + q * own.stride;
        float* out = attended + q * attended_stride;
        if (ROWS - q >= SUM_QUERIES) {
            weigh_all_values<SUM_QUERIES>(head, weights, own.stride, inverses + q, tokens, out, attended_stride);
            q += SUM_QUERIES;
        } else {
            weigh_all_values<1>(head, weights, own.stride, inverses + q, tokens, out, attended_stride);
            q += 1;
        }
    }
}

}  // namespace
