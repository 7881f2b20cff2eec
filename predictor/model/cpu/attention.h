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
// How far ahead keys and values are asked for: 16 KB of bf16.
constexpr int BLOCKS_AHEAD = 8;

// One head of one layer of a sequence, its keys and values in bf16 where NARROW.
template <bool NARROW>
struct Head {
    uint8_t *keys, *values;  // of block 0 of all
    int64_t group_bytes;     // from a group of blocks to the next
    int first_block;         // the sequence's, of all
    int width;

    int block_bytes() const { return TOKENS * width * (NARROW ? 2 : 4); }

    // Where block number `block` of the sequence is, from where block 0 of all is.
    int64_t offset(int block) const {
        const int place = first_block + block;
        return place / GROUP_BLOCKS * group_bytes + (int64_t)(place % GROUP_BLOCKS) * block_bytes();
    }
};

template <bool NARROW>
Head<NARROW> head_of(const Model& model, uint8_t* keys_values, const Span& span, int layer, int head) {
    const Shape& shape = model.shape;
    Head<NARROW> result{nullptr, nullptr, 0, span.first_block, shape.head_width()};
    const int64_t run = (int64_t)GROUP_BLOCKS * result.block_bytes();
    result.group_bytes = (int64_t)shape.layers * 2 * shape.heads * run;
    result.keys = keys_values + ((int64_t)layer * 2 * shape.heads + head) * run;
    result.values = result.keys + shape.heads * run;
    return result;
}

// Put one position's key and value [width] in their place.
template <bool NARROW>
void remember(const Head<NARROW>& head, int position, const float* key, const float* value) {
    const int64_t block = head.offset(position / TOKENS);
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

// scores[q][16 * block ..] for ROWS queries and BLOCKS blocks of tokens, of `blocks` in all. Queries are scaled and, where
// keys are bf16 and the CPU multiplies those, bf16 themselves.
template <int ROWS, int BLOCKS, bool NARROW>
void score_blocks(const Head<NARROW>& head, const uint8_t* queries, size_t query_bytes, int block, int blocks,
                  float* scores, int stride) {
    Floats sums[ROWS][BLOCKS][TOKEN_VECTORS] = {};
    const uint8_t *keys[BLOCKS], *later[BLOCKS];
    for (int b = 0; b < BLOCKS; b++) {
        keys[b] = head.keys + head.offset(block + b);
        later[b] = head.keys + head.offset(std::min(block + b + BLOCKS_AHEAD, blocks - 1));
    }
    const int words = NARROW ? head.width / 2 : head.width;  // of a token's key
    for (int word = 0; word < words; word++)
        for (int b = 0; b < BLOCKS; b++) {
            __builtin_prefetch(later[b] + word * TOKENS * 4);
            for (int v = 0; v < TOKEN_VECTORS; v++) {
                const Words key = load_words(keys[b] + (word * TOKENS + v * LANES) * 4);
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
        score_blocks<ROWS, BLOCKS>(head, queries, query_bytes, block, blocks, scores, stride);
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

// Weights as they are multiplied: pairs of bf16 where values are bf16 and the CPU multiplies those.
template <bool NARROW>
constexpr bool PAIRED_WEIGHTS =
#if defined(__AVX512BF16__)
    NARROW;
#else
    false;
#endif

// attended[q][first .. first + VECTORS_ * LANES] = weights[q] over the values of the first `tokens` positions.
template <int ROWS, int VECTORS_, bool NARROW>
void weigh_values(const Head<NARROW>& head, const float* weights, int stride, const float* inverses, int tokens, int first,
                  float* attended, int64_t attended_stride) {
    Floats sums[ROWS][VECTORS_] = {};
    const int blocks = (tokens + TOKENS - 1) / TOKENS;
    constexpr int STEP = NARROW ? 2 : 1;  // tokens that share a word
    for (int block = 0; block < blocks; block++) {
        const uint8_t* values = head.values + head.offset(block) + first * 4;
        const uint8_t* later = head.values + head.offset(std::min(block + BLOCKS_AHEAD, blocks - 1)) + first * 4;
        const int here = std::min(TOKENS, tokens - block * TOKENS);
        for (int t = 0; t < here; t += STEP, values += head.width * 4, later += head.width * 4) {
            const float* weight = weights + block * TOKENS + t;
            // What lies in the place of a token yet to come is not ours to read.
            const Words mask = Words{} + (NARROW && t + 1 == here ? 0x0000ffffu : 0xffffffffu);
            for (int v = 0; v < VECTORS_; v++) {
                __builtin_prefetch(later + v * LANES * 4);
                const Words words = load_words(values + v * LANES * 4) & mask;
                for (int q = 0; q < ROWS; q++) {
                    if constexpr (!NARROW) {
                        sums[q][v] = fma(splat(weight[q * stride]), as_floats(words), sums[q][v]);
                    } else if constexpr (PAIRED_WEIGHTS<NARROW>) {
#if defined(__AVX512BF16__)
                        const uint8_t* pair = (const uint8_t*)(weights + q * stride) + (block * TOKENS + t) * 2;
                        sums[q][v] = _mm512_dpbf16_ps(sums[q][v], (__m512bh)words, (__m512bh)splat_word(pair));
#endif
                    } else {
                        sums[q][v] = fma(splat(weight[q * stride]), low_bf16(words), sums[q][v]);
                        sums[q][v] = fma(splat(weight[q * stride + 1]), high_bf16(words), sums[q][v]);
                    }
                }
            }
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
    for (int q = 0; q < ROWS; q++) {
        float* scores = own.scores + q * own.stride;
        inverses[q] = soften(scores, position + q + 1, padded);
        if constexpr (PAIRED_WEIGHTS<NARROW>) to_bf16(scores, (uint16_t*)scores, padded);
    }
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
