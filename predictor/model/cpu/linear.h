// Packed matrices: packing, and products with rows of activations.
//
// A tile is 32 outputs of up to ROWS_MAX rows. Each row has accumulators of its own and runs through the inputs in the
// same order whatever the tile's height, so its result does not depend on which rows share the tile.
#pragma once

#include <algorithm>
#include <type_traits>

#include "model.h"
#include "simd.h"

namespace {

constexpr int VECTORS = BLOCK / LANES;
// Accumulators are VECTORS x ROWS_MAX registers, of 32 (AVX-512) or 16; weights and a broadcast activation need three.
constexpr int ROWS_MAX = LANES == 16 ? 12 : LANES == 8 ? 3 : 1;
// A group is what the inputs of one word of activations (4 bytes) take of a block's weights.
constexpr int GROUP_BYTES = BLOCK * 4;
// One tile alone asks for weights this far ahead of their use (measured: 49 GB/s a core from memory at 3 KB, 64 at 12).
constexpr int AHEAD_BYTES = 12288;
// Several tiles take turns on a panel of this many groups: 16 KB stay in L1 beside the panel that comes next.
constexpr int PANEL_GROUPS = 128;
// Rows that go through the weights together; their activations stay in L2.
constexpr int TURN_ROWS = 60;

inline int bytes_of(Width width) { return width == Width::float32 ? 4 : width == Width::bfloat16 ? 2 : 1; }

inline uint8_t* block_of(const Linear& linear, Width width, int block) {
    return linear.weights + (size_t)block * BLOCK * linear.inputs * bytes_of(width);
}

// Rows ready to be multiplied: encoded in the number width, and for int8 each row's scale and sum.
struct Encoded {
    const uint8_t* data;
    size_t stride;  // bytes between rows
    const float* scales;
    const int32_t* sums;

    Encoded from_row(int row) const { return {data + row * stride, stride, scales + row, sums + row}; }
};

// Encode x[count] into `encoded`. fp32 needs none.
inline void encode_row(Width width, const float* x, int count, uint8_t* encoded, float& scale, int32_t& total) {
    if (width == Width::bfloat16) {
        to_bf16(x, (uint16_t*)encoded, count);
        return;
    }
    const uint32_t bits = largest_magnitude(x, count);
    float magnitude;
    memcpy(&magnitude, &bits, 4);
    scale = magnitude / 127;  // of NaN or infinity too: the row's results are then NaN
    const Floats inverse = splat(magnitude > 0 ? 127 / magnitude : 0);
    Ints sums = {};
    for (int k = 0; k < count; k += LANES) {
        Ints q = round_to_int(load(x + k) * inverse);
        sums += q;
#if defined(__AVX512F__)
        __m128i bytes = _mm512_cvtepi32_epi8((__m512i)q);
        memcpy(encoded + k, &bytes, sizeof bytes);
#else
        for (int i = 0; i < LANES; i++) encoded[k + i] = (uint8_t)q[i];
#endif
    }
    total = 0;
    for (int i = 0; i < LANES; i++) total += sums[i];
}

// sums + the products of four unsigned weights with four signed activations per lane.
inline Ints dot_four(Ints sums, Words weights, Words four) {
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)four);
#elif defined(__AVX2__)
    // The one instruction for this saturates at 16 bits, so bytes are widened: inputs 0 and 2, then 1 and 3.
    const __m256i w = (__m256i)weights, x = (__m256i)four;
    const __m256i even_w = _mm256_and_si256(w, _mm256_set1_epi16(0xff)), odd_w = _mm256_srli_epi16(w, 8);
    const __m256i even_x = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), odd_x = _mm256_srai_epi16(x, 8);
    const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(even_w, even_x), _mm256_madd_epi16(odd_w, odd_x));
    return sums + (Ints)products;
#else
    for (int byte = 0; byte < 4; byte++) {
        const Ints w = (Ints)((weights >> (8 * byte)) & 0xffu);
        const Ints x = (Ints)(four << (24 - 8 * byte)) >> 24;
        sums += w * x;
    }
    return sums;
#endif
}

template <Width WIDTH>
using Sums = std::conditional_t<WIDTH == Width::int8, Ints, Floats>;

// sums + one word of weights times one word of activations per lane.
template <Width WIDTH>
Sums<WIDTH> multiply_add(Sums<WIDTH> sums, Words weights, Words word) {
    if constexpr (WIDTH == Width::int8) {
        return dot_four(sums, weights, word);
    } else if constexpr (WIDTH == Width::float32) {
        return fma(as_floats(weights), as_floats(word), sums);
    } else {
#if defined(__AVX512BF16__)
        return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)word);
#else
        return fma(high_bf16(weights), high_bf16(word), fma(low_bf16(weights), low_bf16(word), sums));
#endif
    }
}

// What to fetch from memory meanwhile: `step` bytes further with every group.
struct Ahead {
    const uint8_t* data;
    int step;
};

// Adds `groups` groups to sums[ROWS][32], which count from zero where `fresh`. The accumulators are locals that only
// whole vectors move in and out of: GCC 12 keeps them in memory otherwise.
template <Width WIDTH, int ROWS>
void accumulate(const uint8_t* weights, int groups, const Encoded& x, Ahead ahead, bool fresh, void* sums) {
    Sums<WIDTH>* kept = (Sums<WIDTH>*)sums;
    Sums<WIDTH> local[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) local[r][v] = fresh ? Sums<WIDTH>{} : kept[r * VECTORS + v];
    for (int group = 0; group < groups; group++, weights += GROUP_BYTES, ahead.data += ahead.step) {
        __builtin_prefetch(ahead.data);
        __builtin_prefetch(ahead.data + 64);
        for (int r = 0; r < ROWS; r++) {
            const Words word = splat_word(x.data + r * x.stride + group * 4);
            for (int v = 0; v < VECTORS; v++)
                local[r][v] = multiply_add<WIDTH>(local[r][v], load_words(weights + v * LANES * 4), word);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) kept[r * VECTORS + v] = local[r][v];
}

inline Floats activate(Activation activation, Floats x) {
    switch (activation) {
        case Activation::gelu_tanh: {
            // x * (1 + tanh(u)) / 2 = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3)
            const Floats minus_2u = x * fma(x * x, splat(-1.5957691216f * 0.044715f), splat(-1.5957691216f));
            return x / (splat(1.0f) + exp(minus_2u));
        }
        case Activation::gelu:
            for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
            return x;
        case Activation::relu:
            return max(splat(0.0f), x);
        case Activation::none:
            break;
    }
    return x;
}

// What becomes of a product: stored (after the activation), or added to what is there.
struct Target {
    float* data;
    int64_t stride;
    Activation activation;
    bool accumulate;
    int32_t columns;  // how many outputs the target has room for
};

// sums[rows][32] of a block as they leave: scaled, with bias, activated, stored.
template <Width WIDTH>
void finish(const Linear& linear, int block, const Encoded& x, int rows, const void* sums, const Target& target) {
    const Sums<WIDTH>* kept = (const Sums<WIDTH>*)sums;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) {
            const int column = block * BLOCK + v * LANES;
            if (column >= target.columns) continue;
            Floats value;
            if constexpr (WIDTH == Width::int8) {
                // Weights carry an offset of 128, which adds 128 times the activations' sum.
                const Floats exact = to_floats(kept[r * VECTORS + v] - 128 * x.sums[r]);
                value = exact * (splat(x.scales[r]) * load(linear.scales + column));
            } else {
                value = kept[r * VECTORS + v];
            }
            value = activate(target.activation, value + load(linear.bias + column));
            float* y = target.data + r * target.stride + column;
            store(y, target.accumulate ? load(y) + value : value);
        }
}

template <Width WIDTH, int ROWS>
void accumulate_rows(
    int rows, const uint8_t* weights, int groups, const Encoded& x, Ahead ahead, bool fresh, void* sums) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS)
            accumulate<WIDTH, ROWS>(weights, groups, x, ahead, fresh, sums);
        else
            accumulate_rows<WIDTH, ROWS - 1>(rows, weights, groups, x, ahead, fresh, sums);
    }
}

// Rows [0, rows), at most TURN_ROWS, through blocks [first, last).
template <Width WIDTH>
void take_turn(const Linear& linear, const Encoded& x, int rows, int first, int last, const Target& target) {
    alignas(64) float sums[TURN_ROWS * BLOCK];
    const int groups = linear.inputs * bytes_of(WIDTH) / 4;
    const int tiles = (rows + ROWS_MAX - 1) / ROWS_MAX;
    const int panels = tiles == 1 ? 1 : (groups + PANEL_GROUPS - 1) / PANEL_GROUPS;
    for (int block = first; block < last; block++) {
        // The other threads have read these lines since we wrote them last: ask for them before they are needed.
        for (int row = 0; row < rows; row++)
            for (int line = 0; line < BLOCK * 4; line += 64)
                __builtin_prefetch((uint8_t*)(target.data + row * target.stride + block * BLOCK) + line, 1);
        for (int panel = 0; panel < panels; panel++) {
            const int start = groups * panel / panels, count = groups * (panel + 1) / panels - start;
            const uint8_t* weights = block_of(linear, WIDTH, block) + (size_t)start * GROUP_BYTES;
            for (int i = 0; i < tiles; i++) {
                const int row = rows * i / tiles, height = rows * (i + 1) / tiles - row;
                Encoded tile = x.from_row(row);
                tile.data += start * 4;
                Ahead ahead{weights + AHEAD_BYTES, GROUP_BYTES};
                // Each of several tiles asks for its share of the next panel, which lies behind this one.
                if (tiles > 1) ahead = {weights + (size_t)count * (tiles + i) / tiles * GROUP_BYTES, GROUP_BYTES / tiles};
                accumulate_rows<WIDTH, ROWS_MAX>(
                    height, weights, count, tile, ahead, panel == 0, sums + row * BLOCK);
            }
        }
        finish<WIDTH>(linear, block, x, rows, sums, target);
    }
}

// This thread's share of target = x W^T + bias: whole blocks, each read from memory once for up to TURN_ROWS rows.
inline void multiply(
    Width width, const Linear& linear, const Encoded& x, int rows, const Target& target, int thread, int threads) {
    const int first = (int64_t)linear.blocks * thread / threads, last = (int64_t)linear.blocks * (thread + 1) / threads;
    const int turns = (rows + TURN_ROWS - 1) / TURN_ROWS;
    for (int turn = 0; turn < turns; turn++) {
        const int row = rows * turn / turns, height = rows * (turn + 1) / turns - row;
        const Target here{target.data + row * target.stride, target.stride, target.activation, target.accumulate,
                          target.columns};
        const Encoded part = x.from_row(row);
        if (width == Width::float32) take_turn<Width::float32>(linear, part, height, first, last, here);
        if (width == Width::bfloat16) take_turn<Width::bfloat16>(linear, part, height, first, last, here);
        if (width == Width::int8) take_turn<Width::int8>(linear, part, height, first, last, here);
    }
}

// ------------------------------------------------------------------------------------------------------- packing

inline float widen(uint16_t half, Format format) {
    if (format == Format::bfloat16) return from_bf16(half);
    _Float16 number;
    memcpy(&number, &half, 2);
    return (float)number;
}

// Numbers [first, first + count) of a tensor as floats, read in place where they are.
inline const float* read(const void* data, Format format, int64_t first, int count, float* buffer) {
    if (format == Format::float32) return (const float*)data + first;
    const uint16_t* halves = (const uint16_t*)data + first;
    for (int i = 0; i < count; i++) buffer[i] = widen(halves[i], format);
    return buffer;
}

// Write inputs k..k+3 of one block. rows[i][j] is the weight of input k + i for the block's output j.
inline void pack_four(const Linear& linear, Width width, int block, int k, const float* const (&rows)[4], int outputs) {
    uint8_t* base = block_of(linear, width, block);
    if (width == Width::float32) {
        for (int i = 0; i < 4; i++) memcpy((float*)base + (size_t)(k + i) * BLOCK, rows[i], outputs * 4);
    } else if (width == Width::bfloat16) {
        for (int i = 0; i < 4; i += 2) {
            uint16_t* pairs = (uint16_t*)base + (size_t)(k + i) * BLOCK;
            for (int j = 0; j < outputs; j++) {
                pairs[j * 2] = to_bf16(rows[i][j]);
                pairs[j * 2 + 1] = to_bf16(rows[i + 1][j]);
            }
        }
    } else {
        uint8_t* fours = base + (size_t)k * BLOCK;
        for (int j = 0; j < outputs; j++) {
            const float scale = linear.scales[block * BLOCK + j];
            const float inverse = scale > 0 ? 1 / scale : 0;
            for (int i = 0; i < 4; i++) fours[j * 4 + i] = (uint8_t)(128 + (int)lrintf(rows[i][j] * inverse));
        }
    }
}

// Scales of outputs first.. from their largest magnitudes, given as bits.
inline void set_scales(const Linear& linear, int first, const uint32_t* magnitudes, int count) {
    for (int j = 0; j < count; j++) {
        float magnitude;
        memcpy(&magnitude, magnitudes + j, 4);
        linear.scales[first + j] = magnitude / 127;
    }
}

constexpr int STRIP = 16;  // blocks packed together: 4 rows of 512 numbers stay in L1

// [inputs][outputs], as GPT-2's files have it: rows are read in order, four at a time.
inline void pack_by_input(
    Width width, const Linear& linear, const void* data, Format format, int first, int last) {
    float buffer[4][STRIP * BLOCK];
    const int64_t pitch = linear.outputs;
    for (int strip = first; strip < last; strip += STRIP) {
        const int end = std::min(strip + STRIP, last), column = strip * BLOCK;
        const int count = std::min(end * BLOCK, linear.outputs) - column;
        if (width == Width::int8) {
            uint32_t magnitudes[STRIP * BLOCK] = {};
            for (int k = 0; k < linear.inputs; k++) {
                const float* row = read(data, format, k * pitch + column, count, buffer[0]);
                for (int j = 0; j < count; j++) {
                    uint32_t bits;
                    memcpy(&bits, row + j, 4);
                    bits &= 0x7fffffffu;
                    magnitudes[j] = bits > magnitudes[j] ? bits : magnitudes[j];
                }
            }
            set_scales(linear, column, magnitudes, count);
        }
        for (int k = 0; k < linear.inputs; k += 4) {
            const float* rows[4];
            for (int i = 0; i < 4; i++) rows[i] = read(data, format, (k + i) * pitch + column, count, buffer[i]);
            for (int block = strip; block < end; block++) {
                const int skip = block * BLOCK - column;
                const float* const part[4] = {rows[0] + skip, rows[1] + skip, rows[2] + skip, rows[3] + skip};
                pack_four(linear, width, block, k, part, std::min(BLOCK, count - skip));
            }
        }
    }
}

// [outputs][inputs], as the token table has it.
inline void pack_by_output(
    Width width, const Linear& linear, const void* data, Format format, int first, int last) {
    constexpr int DEPTH = 64;  // inputs read of one output at a time
    for (int block = first; block < last; block++) {
        const int outputs = std::min(BLOCK, linear.outputs - block * BLOCK);
        float transposed[DEPTH][BLOCK] = {}, buffer[DEPTH];
        uint32_t magnitudes[BLOCK] = {};
        // use(j, numbers, depth): inputs k.. of the block's output j, `depth` of them.
        const auto each_part = [&](int k, auto use) {
            const int depth = std::min(DEPTH, linear.inputs - k);
            for (int j = 0; j < outputs; j++)
                use(j, read(data, format, (int64_t)(block * BLOCK + j) * linear.inputs + k, depth, buffer), depth);
        };
        if (width == Width::int8) {
            for (int k = 0; k < linear.inputs; k += DEPTH)
                each_part(k, [&](int j, const float* part, int depth) {
                    magnitudes[j] = std::max(magnitudes[j], largest_magnitude(part, depth));
                });
            set_scales(linear, block * BLOCK, magnitudes, outputs);
        }
        for (int k = 0; k < linear.inputs; k += DEPTH) {
            each_part(k, [&](int j, const float* part, int depth) {
                for (int i = 0; i < depth; i++) transposed[i][j] = part[i];
            });
            for (int i = 0; i < std::min(DEPTH, linear.inputs - k); i += 4) {
                const float* const rows[4] = {transposed[i], transposed[i + 1], transposed[i + 2], transposed[i + 3]};
                pack_four(linear, width, block, k + i, rows, outputs);
            }
        }
    }
}

// The weights of one output, as floats: a token's embedding out of the packed table.
inline void read_output(Width width, const Linear& linear, int output, float* row) {
    const uint8_t* base = block_of(linear, width, output / BLOCK);
    const int j = output % BLOCK;
    if (width == Width::float32) {
        for (int k = 0; k < linear.inputs; k++) row[k] = ((const float*)base)[(size_t)k * BLOCK + j];
    } else if (width == Width::bfloat16) {
        for (int k = 0; k < linear.inputs; k += 2)
            for (int i = 0; i < 2; i++) row[k + i] = from_bf16(((const uint16_t*)base)[(size_t)k * BLOCK + j * 2 + i]);
    } else {
        const float scale = linear.scales[output];
        for (int k = 0; k < linear.inputs; k += 4)
            for (int i = 0; i < 4; i++) row[k + i] = scale * (float)((int)base[(size_t)k * BLOCK + j * 4 + i] - 128);
    }
}

}  // namespace
