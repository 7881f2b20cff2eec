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
// A query alone takes this many blocks at a time: enough sums to keep the multiplier busy, few enough streams from memory.
constexpr int MOST_BLOCKS = 4;
constexpr int SUM_QUERIES = LANES == 16 ? 4 : 2;
constexpr int SUM_VECTORS = 4;
// How many tokens ahead values are asked for.
constexpr int VALUES_AHEAD = 32;

// One head of one layer, its keys and values in bf16 where NARROW.
template <bool NARROW>
struct Head {
    uint8_t *keys, *values;  // of the sequence's first block
    int width;

    int block_bytes() const { return TOKENS * width * (NARROW ? 2 : 4); }
};

template <bool NARROW>
Head<NARROW> head_of(const Model& model, const KeysValues& kv, const Span& span, int layer, int head) {
    const Shape& shape = model.shape;
    Head<NARROW> result{nullptr, nullptr, shape.head_width()};
    const int64_t bytes = result.block_bytes();
    const auto start = [&](int which) {
        return kv.data + ((((int64_t)layer * 2 + which) * shape.heads + head) * kv.blocks + span.first_block) * bytes;
    };
    result.keys = start(0);
    result.values = start(1);
    return result;
}

// Put one position's key and value [width] in their place.
template <bool NARROW>
void remember(const Head<NARROW>& head, int position, const float* key, const float* value) {
    const int64_t block = (int64_t)(position / TOKENS) * head.block_bytes();
    const int token = position % TOKENS;
    if constexpr (NARROW) {
        uint32_t* keys = (uint32_t*)(head.keys + block) + token;
        uint16_t* values = (uint16_t*)(head.values + block) + (token / 2) * head.width * 2 + token % 2;
        for (int d = 0; d < head.width; d += LANES) {
            uint16_t halves[LANES];
            to_bf16(key + d, halves, LANES);
            for (int i = 0; i < LANES; i += 2) memcpy(keys + (d + i) / 2 * TOKENS, halves + i, 4);
            to_bf16(value + d, halves, LANES);
            for (int i = 0; i < LANES; i++) values[(d + i) * 2] = halves[i];
        }
    } else {
        float* keys = (float*)(head.keys + block) + token;
        for (int d = 0; d < head.width; d++) keys[d * TOKENS] = key[d];
        memcpy((float*)(head.values + block) + token * head.width, value, head.width * 4);
    }
}

// scores[q][16 * block ..] for ROWS queries and BLOCKS blocks of tokens. Queries are scaled and, where keys are
// bf16 and the CPU multiplies those, bf16 themselves. `more`: as many blocks follow.
template <int ROWS, int BLOCKS, bool NARROW>
void score_blocks(const Head<NARROW>& head, const uint8_t* queries, size_t query_bytes, int block, bool more, float* scores,
                  int stride) {
    Floats sums[ROWS][BLOCKS][TOKEN_VECTORS] = {};
    const uint8_t* keys = head.keys + (int64_t)block * head.block_bytes();
    const int words = NARROW ? head.width / 2 : head.width;  // of a token's key
    for (int word = 0; word < words; word++, keys += TOKENS * 4)
        for (int b = 0; b < BLOCKS; b++) {
            const uint8_t* part = keys + (int64_t)b * head.block_bytes();
            if (more) __builtin_prefetch(part + (int64_t)BLOCKS * head.block_bytes());
            for (int v = 0; v < TOKEN_VECTORS; v++) {
                const Words key = load_words(part + v * LANES * 4);
                for (int q = 0; q < ROWS; q++) {
                    const uint8_t* query = queries + q * query_bytes;
                    Floats& sum = sums[q][b][v];
                    if constexpr (!NARROW) {
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
        }
    for (int q = 0; q < ROWS; q++)
        for (int b = 0; b < BLOCKS; b++)
            for (int v = 0; v < TOKEN_VECTORS; v++)
                store(scores + q * stride + (block + b) * TOKENS + v * LANES, sums[q][b][v]);
}

// Scores of blocks [block, blocks): BLOCKS at a time while there are as many, then half of it.
template <int ROWS, int BLOCKS, bool NARROW>
void score_all(const Head<NARROW>& head, const uint8_t* queries, size_t query_bytes, int block, int blocks, float* scores,
               int stride) {
    for (; block + BLOCKS <= blocks; block += BLOCKS)
        score_blocks<ROWS, BLOCKS>(head, queries, query_bytes, block, block + 2 * BLOCKS <= blocks, scores, stride);
    if constexpr (BLOCKS > 1) score_all<ROWS, BLOCKS / 2>(head, queries, query_bytes, block, blocks, scores, stride);
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
template <int ROWS, int VECTORS_, bool NARROW>
void weigh_values(const Head<NARROW>& head, const float* weights, int stride, const float* inverses, int tokens, int first,
                  float* attended, int64_t attended_stride) {
    Floats sums[ROWS][VECTORS_] = {};
    if constexpr (NARROW) {
        for (int t = 0; t < tokens; t += 2) {
            const uint8_t* pair = head.values + (int64_t)(t / 2) * head.width * 4 + first * 4;
            for (int v = 0; t + VALUES_AHEAD < tokens && v < VECTORS_; v++)
                __builtin_prefetch(pair + VALUES_AHEAD / 2 * head.width * 4 + v * LANES * 4);
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
            for (int v = 0; t + VALUES_AHEAD < tokens && v < VECTORS_; v++)
                __builtin_prefetch(value + VALUES_AHEAD * head.width + v * LANES);
            for (int v = 0; v < VECTORS_; v++)
                for (int q = 0; q < ROWS; q++)
                    sums[q][v] = fma(splat(weights[q * stride + t]), load(value + v * LANES), sums[q][v]);
        }
    }
    for (int q = 0; q < ROWS; q++)
        for (int v = 0; v < VECTORS_; v++)
            store(attended + q * attended_stride + first + v * LANES, sums[q][v] * splat(inverses[q]));
}

template <int ROWS, bool NARROW>
void weigh_all_values(const Head<NARROW>& head, const float* weights, int stride, const float* inverses, int tokens,
                      float* attended, int64_t attended_stride) {
    int first = 0;
    for (; first + SUM_VECTORS * LANES <= head.width; first += SUM_VECTORS * LANES)
        weigh_values<ROWS, SUM_VECTORS>(head, weights, stride, inverses, tokens, first, attended, attended_stride);
    for (; first < head.width; first += LANES)
        weigh_values<ROWS, 1>(head, weights, stride, inverses, tokens, first, attended, attended_stride);
}

template <bool NARROW>
size_t query_bytes(const Head<NARROW>& head) {
#if defined(__AVX512BF16__)
    return head.width * (NARROW ? 2 : 4);
#else
    return head.width * 4;
#endif
}

template <bool NARROW>
void scale_query(const Head<NARROW>& head, const float* query, float scale, uint8_t* out) {
    float scaled[LANES];
    for (int d = 0; d < head.width; d += LANES) {
        store(scaled, load(query + d) * splat(scale));
#if defined(__AVX512BF16__)
        if constexpr (NARROW) {
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
template <int ROWS, bool NARROW>
void attend(const Head<NARROW>& head, const float* queries, int64_t row_stride, float scale, int position,
            const AttentionBuffers& own, float* attended, int64_t attended_stride) {
    const size_t bytes = query_bytes(head);
    for (int q = 0; q < ROWS; q++) scale_query(head, queries + q * row_stride, scale, own.queries + q * bytes);
    const int tokens = position + ROWS, blocks = (tokens + TOKENS - 1) / TOKENS, padded = blocks * TOKENS;
    score_all<ROWS, std::clamp(SCORE_VECTORS / (ROWS * TOKEN_VECTORS), 1, MOST_BLOCKS)>(head, own.queries, bytes, 0, blocks, own.scores, own.stride);
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
