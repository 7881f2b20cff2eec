// What the C interface (api.cpp) and the kernels (kernels.cpp, compiled once per instruction set) share: plain data.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "pool.h"

// How numbers are stored and multiplied.
enum class Width : int32_t {
    float32 = 0,
    bfloat16 = 1,  // bf16 weights and activations, fp32 sums
    int8 = 2,      // int8 weights with a scale per output, int8 activations with a scale per row, int32 sums
};

enum class Activation : int32_t { none = 0, gelu_tanh = 1, gelu = 2, relu = 3 };

// The format of a tensor handed to `load`.
enum class Format : int32_t { float32 = 0, float16 = 1, bfloat16 = 2 };

struct Shape {
    int32_t layers, width, heads, inner, vocabulary, context;
    Width number_width;
    Activation activation;
    int32_t tied;  // whether the token table is the output matrix
    float epsilon;

    int head_width() const { return width / heads; }
};

// y[outputs] = W x[inputs] + bias. Outputs stand in blocks of 32; a block holds, for each group of inputs (1 in fp32,
// 2 in bf16, 4 in int8), the group's weights of its 32 outputs side by side. int8 weights are stored plus 128.
constexpr int BLOCK = 32;

struct Linear {
    int32_t inputs, outputs, blocks;
    uint8_t* weights;
    float* scales;  // [blocks * 32], int8 only
    float* bias;    // [blocks * 32]
};

struct Norm {
    float *weight, *bias;  // [width]
};

struct Layer {
    Norm norm_attention, norm_mlp;
    Linear qkv, project, expand, contract;
    float attention_scale;
};

// Keys and values, in fp32, or in bf16 for both narrow widths: [groups of 8 blocks][layers][2][heads][8 blocks][16 tokens *
// head_width]. What a head reads of a sequence lies in runs of 128 tokens, and a sequence lies in few large pages. Within a
// block keys stand as [head_width][16 tokens], so that one vector holds the same coordinate of 16 tokens, and
// values as [16 tokens][head_width]; in bf16 two neighbours (coordinates of keys, tokens of values) share a word.
constexpr int TOKENS = 16;
constexpr int GROUP_BLOCKS = 8;

// Consecutive rows of one sequence at consecutive positions.
struct Span {
    int32_t first_row, rows, first_block, first_position;
};

// One step's work, all of it the caller's memory.
struct Step {
    int32_t rows, spans, wanted;
    const int32_t* token_ids;    // [rows]
    const Span* span;            // [spans], in the order of rows
    const int32_t* wanted_rows;  // [wanted]
    float* logits;               // [wanted][logits_stride]
    int64_t logits_stride;       // at least the vocabulary rounded up to 32
};

// A part of the attention one thread does in one go: rows of a span, one head. What they attend goes to rows from `to` on.
struct Unit {
    int32_t span, first_row, rows, head, to;
};

// Buffers of a step, grown to the largest step seen.
struct Workspace {
    int32_t rows;     // capacity
    float* residual;  // [rows][width]
    float* normed;    // [rows][width], normalized or attended
    float* qkv;       // [rows][3 * width rounded up to 32]
    float* inner;     // [rows][inner rounded up to 32]
    uint8_t* encoded; // [rows][max(width, inner)] in the number width
    float* scales;    // [rows]
    int32_t* sums;    // [rows]
    uint8_t* own;     // [threads][own_bytes]: see Own in kernels.cpp
    size_t own_bytes;
    Unit* units;       // [rows * heads] at most, as the next
    Unit* last_units;  // of the last layer, where only the wanted rows are computed
    std::atomic<int32_t>* claimed;  // [layers], how many units of a layer's attention are taken
    void* memory;
    size_t bytes;
};

// How the next token of a row is chosen; mirrors `Draw` in library.py.
struct Draw {
    int32_t row;
    int32_t greedy;
    int32_t top_k;  // 0: all
    int32_t unused;
    double temperature, top_p;
    uint64_t seed, position;  // of the output, counted from 0
};

struct Kernels;

struct Model {
    Shape shape;
    Layer* layers;
    Norm norm_final;
    Linear head, tokens;  // the same matrix where tied
    float* positions;     // [context][width]
    Workspace workspace;
    Pool* pool;
    const Kernels* kernels;
    void* memory;
    size_t bytes;
};

struct Kernels {
    const char* name;
    // Pack `data` into `linear`: [inputs][outputs] as GPT-2's files have it, or [outputs][inputs] where `by_output`.
    void (*pack)(Model&, Linear&, const void* data, Format, bool by_output);
    void (*step)(Model&, uint8_t* keys_values, const Step&);
    // Choose a token for each draw from logits[row]: -1 where the row's largest logit is not finite.
    void (*sample)(Model&, const float* logits, int64_t stride, const Draw*, int32_t count, int32_t* tokens);
    size_t (*own_bytes)(const Shape&);  // of the workspace, per thread
};

extern const Kernels kernels_generic;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#endif
