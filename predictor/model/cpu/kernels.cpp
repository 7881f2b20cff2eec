// The step, compiled once per instruction set under the name KERNELS (see build.py).
//
// One parallel region per step: every thread walks through the layers, does its share of each phase, and meets the
// others at a barrier. Source of the model: Radford et al. 2019.
#include <algorithm>
#include <utility>

#include "attention.h"
#include "linear.h"
#include "model.h"
#include "sampling.h"
#include "simd.h"

namespace {

// With this few rows each thread normalizes and encodes all of them for itself: cheaper than meeting the others.
constexpr int OWN_ROWS = 2;
// Rows of a prefill that one thread attends for at a time.
constexpr int UNIT_ROWS = 4 * QUERIES;

inline size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// What a thread has for itself.
struct Own {
    float* normed;     // [OWN_ROWS][width]
    uint8_t* encoded;  // [OWN_ROWS][max(width, inner)]
    float* scales;     // [OWN_ROWS]
    int32_t* sums;     // [OWN_ROWS]
    AttentionBuffers attention;

    Own(const Model& model, int thread) {
        const Shape& shape = model.shape;
        uint8_t* next = model.workspace.own + thread * model.workspace.own_bytes;
        const auto take = [&](size_t bytes) { return std::exchange(next, next + aligned(bytes)); };
        normed = (float*)take((size_t)OWN_ROWS * shape.width * 4);
        encoded = take((size_t)OWN_ROWS * std::max(shape.width, shape.inner) * 4);
        scales = (float*)take(OWN_ROWS * 4);
        sums = (int32_t*)take(OWN_ROWS * 4);
        attention.queries = take((size_t)QUERIES * shape.head_width() * 4);
        attention.stride = (shape.context + TOKENS - 1) / TOKENS * TOKENS;
        attention.scores = (float*)take((size_t)QUERIES * attention.stride * 4);
    }
};

size_t own_bytes(const Shape& shape) {
    const size_t padded_context = (shape.context + TOKENS - 1) / TOKENS * TOKENS;
    return aligned((size_t)OWN_ROWS * shape.width * 4) +
           aligned((size_t)OWN_ROWS * std::max(shape.width, shape.inner) * 4) + 2 * aligned(OWN_ROWS * 4) +
           aligned((size_t)QUERIES * shape.head_width() * 4) + aligned(QUERIES * padded_context * 4);
}

void normalize(const Norm& norm, const float* x, int width, float epsilon, float* y) {
    Floats sums = {};
    for (int k = 0; k < width; k += LANES) sums += load(x + k);
    const Floats mean = splat(sum(sums) / width);
    Floats squares = {};
    for (int k = 0; k < width; k += LANES) {
        const Floats d = load(x + k) - mean;
        squares = fma(d, d, squares);
    }
    const Floats inverse = splat(1 / sqrtf(sum(squares) / width + epsilon));
    for (int k = 0; k < width; k += LANES)
        store(y + k, fma((load(x + k) - mean) * inverse, load(norm.weight + k), load(norm.bias + k)));
}

// What threads attend: rows of a span in groups, of one head each. In the last layer only the wanted rows, where there
// are others (`narrows`).
struct Plan {
    int units, last_units;
    bool narrows;
};

// One thread's walk through a step. NARROW: keys and values are bf16.
template <bool NARROW>
class Walk {
  public:
    Walk(Model& model, uint8_t* keys_values, const Step& step, const Plan& plan, int thread, int threads)
        : model_(model), shape_(model.shape), width_(model.shape.number_width), work_(model.workspace), keys_values_(keys_values),
          step_(step), plan_(plan), thread_(thread), threads_(threads), own_(model, thread), rows_(step.rows) {}

    void run() {
        embed();
        for (int layer = 0; layer < shape_.layers; layer++) {
            const Layer& weights = model_.layers[layer];
            const int E = shape_.width, N = shape_.inner;
            multiply(weights.qkv, normalized(weights.norm_attention), rows_,
                     {work_.qkv, padded(3 * E), Activation::none, false, padded(3 * E)});
            barrier();
            if (layer + 1 == shape_.layers && plan_.narrows) {
                narrow(layer);
                attend(layer, weights.attention_scale, work_.last_units, plan_.last_units);
            } else {
                remember_spans(layer);
                attend(layer, weights.attention_scale, work_.units, plan_.units);
            }
            barrier();
            multiply(weights.project, encode(work_.normed, E), rows_,
                     {work_.residual, E, Activation::none, true, E});
            barrier();
            multiply(weights.expand, normalized(weights.norm_mlp), rows_,
                     {work_.inner, padded(N), shape_.activation, false, padded(N)});
            barrier();
            multiply(weights.contract, encode(work_.inner, N, padded(N)), rows_,
                     {work_.residual, E, Activation::none, true, E});
            barrier();
        }
        const int32_t* wanted = plan_.narrows ? nullptr : step_.wanted_rows;
        multiply(model_.head, normalized(model_.norm_final, wanted, step_.wanted), step_.wanted,
                 {step_.logits, step_.logits_stride, Activation::none, false, padded(shape_.vocabulary)});
    }

  private:
    static int padded(int outputs) { return (outputs + BLOCK - 1) / BLOCK * BLOCK; }

    void barrier() { model_.pool->barrier(); }

    void multiply(const Linear& linear, const Encoded& x, int rows, const Target& target) {
        ::multiply(width_, linear, x, rows, target, thread_, threads_);
    }

    void embed() {
        const int E = shape_.width;
        for (int s = 0; s < step_.spans; s++)
            for (int i = 0; i < step_.span[s].rows; i++) {
                const int row = step_.span[s].first_row + i;
                if (row % threads_ != thread_) continue;
                float* x = work_.residual + (size_t)row * E;
                const float* position = model_.positions + (size_t)(step_.span[s].first_position + i) * E;
                read_output(width_, model_.tokens, step_.token_ids[row], x);
                for (int k = 0; k < E; k += LANES) store(x + k, load(x + k) + load(position + k));
            }
        if (thread_ == 0)
            for (int layer = 0; layer < shape_.layers; layer++) work_.claimed[layer].store(0, std::memory_order_relaxed);
        barrier();
    }

    // Calls prepare(row, buffers) for the rows this thread prepares; returns where all of them are, when all are.
    template <class Prepare>
    Encoded each_row(int rows, int count, const Prepare& prepare) {
        const bool all_own = rows <= OWN_ROWS;
        const size_t stride = (size_t)count * bytes_of(width_);
        float* normed = all_own ? own_.normed : work_.normed;
        uint8_t* encoded = all_own ? own_.encoded : work_.encoded;
        float* scales = all_own ? own_.scales : work_.scales;
        int32_t* sums = all_own ? own_.sums : work_.sums;
        for (int row = all_own ? 0 : thread_; row < rows; row += all_own ? 1 : threads_) {
            const float* x = prepare(row, normed + (size_t)row * shape_.width);
            if (width_ != Width::float32) encode_row(width_, x, count, encoded + row * stride, scales[row], sums[row]);
        }
        if (!all_own) barrier();
        return {width_ == Width::float32 ? (const uint8_t*)normed : encoded, stride, scales, sums};
    }

    // The residual's rows (those of `chosen`, where given), normalized and encoded.
    Encoded normalized(const Norm& norm, const int32_t* chosen = nullptr, int rows = -1) {
        return each_row(rows < 0 ? rows_ : rows, shape_.width, [&](int row, float* normed) {
            const float* x = work_.residual + (size_t)(chosen ? chosen[row] : row) * shape_.width;
            normalize(norm, x, shape_.width, shape_.epsilon, normed);
            return normed;
        });
    }

    // x[rows][count] encoded.
    Encoded encode(const float* x, int count, int stride = 0) {
        stride = stride ? stride : count;
        if (width_ == Width::float32) return {(const uint8_t*)x, (size_t)stride * 4, nullptr, nullptr};
        return each_row(rows_, count, [&](int row, float*) { return x + (size_t)row * stride; });
    }

    // Keys and values of the rows into memory; those of lone rows too where they are not attended next.
    void remember_spans(int layer, bool lone = false) {
        bool any = false;
        for (int s = 0; s < step_.spans; s++) {
            const Span& span = step_.span[s];
            if (span.rows == 1 && !lone) continue;
            any = true;
            for (int item = thread_; item < span.rows * shape_.heads; item += threads_)
                remember(layer, span, item / shape_.heads, item % shape_.heads);
        }
        if (any) barrier();
    }

    // From here on only the wanted rows are computed, in the order they are wanted: of the others nothing but keys and
    // values will be read.
    void narrow(int layer) {
        const int E = shape_.width;
        const size_t bytes = E * sizeof(float);
        for (int row = thread_; row < step_.wanted; row += threads_)
            memcpy(work_.normed + (size_t)row * E, work_.residual + (size_t)step_.wanted_rows[row] * E, bytes);
        remember_spans(layer, true);  // ends with a barrier
        for (int row = thread_; row < step_.wanted; row += threads_)
            memcpy(work_.residual + (size_t)row * E, work_.normed + (size_t)row * E, bytes);
        barrier();  // what is attended goes to work.normed
        rows_ = step_.wanted;
    }

    // Attended values into work.normed.
    void attend(int layer, float scale, const Unit* units, int count) {
        const int share = std::max(1, count / (threads_ * 8));
        for (;;) {
            const int first = work_.claimed[layer].fetch_add(share, std::memory_order_relaxed);
            if (first >= count) return;
            const int last = std::min(first + share, count);
            // A lone row's key and value are read by nobody else in this step. All of them are written before the first
            // is read: a load of what was just stored in smaller pieces waits for the store.
            if (units == work_.units)
                for (int i = first; i < last; i++)
                    if (step_.span[units[i].span].rows == 1)
                        remember(layer, step_.span[units[i].span], 0, units[i].head);
            for (int i = first; i < last; i++) {
                if (i + 1 < last) fetch(layer, units[i + 1]);
                attend(layer, scale, units[i]);
            }
        }
    }

    // Ask for the memory that `unit` begins with; it asks for the rest as it goes.
    void fetch(int layer, const Unit& unit) const {
        const Span& span = step_.span[unit.span];
        const Head<NARROW> head = head_of<NARROW>(model_, keys_values_, span, layer, unit.head);
        const int blocks = (span.first_position + unit.first_row) / TOKENS + 1;
        for (int block = 0; block < std::min(blocks, BLOCKS_AHEAD); block++)
            for (int byte = 0; byte < head.block_bytes(); byte += 64) {
                __builtin_prefetch(head.keys + head.offset(block) + byte);
                __builtin_prefetch(head.values + head.offset(block) + byte);
            }
    }

    const float* qkv(int row, int which, int head) const {
        return work_.qkv + (size_t)row * padded(3 * shape_.width) + which * shape_.width + head * shape_.head_width();
    }

    void remember(int layer, const Span& span, int row, int head) {
        ::remember(head_of<NARROW>(model_, keys_values_, span, layer, head), span.first_position + row, qkv(span.first_row + row, 1, head),
                   qkv(span.first_row + row, 2, head));
    }

    void attend(int layer, float scale, const Unit& unit) {
        const Span& span = step_.span[unit.span];
        const Head<NARROW> head = head_of<NARROW>(model_, keys_values_, span, layer, unit.head);
        const int64_t row_stride = padded(3 * shape_.width);
        for (int done = 0; done < unit.rows;) {
            const int row = unit.first_row + done, position = span.first_position + row;
            const float* queries = qkv(span.first_row + row, 0, unit.head);
            float* attended =
                work_.normed + (size_t)(unit.to + done) * shape_.width + unit.head * shape_.head_width();
            if (unit.rows - done >= QUERIES) {
                ::attend<QUERIES>(
                    head, queries, row_stride, scale, position, own_.attention, attended, shape_.width);
                done += QUERIES;
            } else {
                ::attend<1>(head, queries, row_stride, scale, position, own_.attention, attended, shape_.width);
                done += 1;
            }
        }
    }

    Model& model_;
    const Shape& shape_;
    const Width width_;
    Workspace& work_;
    uint8_t* const keys_values_;
    const Step& step_;
    const Plan& plan_;
    const int thread_, threads_;
    const Own own_;
    int rows_;  // that are computed: all of the step's, or in its last layer those that are wanted
};

Plan plan_step(const Model& model, const Step& step) {
    Plan plan{0, 0, step.wanted < step.rows};
    for (int s = 0; s < step.spans; s++) {
        const Span& span = step.span[s];
        for (int head = 0; head < model.shape.heads; head++)
            for (int row = 0; row < span.rows; row += UNIT_ROWS)
                model.workspace.units[plan.units++] = {s, row, std::min(UNIT_ROWS, span.rows - row), head, span.first_row + row};
    }
    if (!plan.narrows) return plan;
    for (int i = 0, s = 0; i < step.wanted; i++) {
        const int row = step.wanted_rows[i];
        if (row < step.span[s].first_row) s = 0;
        while (row >= step.span[s].first_row + step.span[s].rows) s++;
        for (int head = 0; head < model.shape.heads; head++)
            model.workspace.last_units[plan.last_units++] = {s, row - step.span[s].first_row, 1, head, i};
    }
    return plan;
}

// `body(thread, threads)` on every thread of the model's pool.
template <class Body>
void in_parallel(Model& model, Body body) {
    model.pool->run([](void* argument, int thread, int threads) { (*(Body*)argument)(thread, threads); }, &body);
}

void run_step(Model& model, uint8_t* keys_values, const Step& step) {
    const Plan plan = plan_step(model, step);
    const bool narrow = model.shape.number_width != Width::float32;
    in_parallel(model, [&](int thread, int threads) {
        if (narrow)
            Walk<true>(model, keys_values, step, plan, thread, threads).run();
        else
            Walk<false>(model, keys_values, step, plan, thread, threads).run();
    });
}

void pack(Model& model, Linear& linear, const void* data, Format format, bool by_output) {
    in_parallel(model, [&](int thread, int threads) {
        const int first = (int64_t)linear.blocks * thread / threads;
        const int last = (int64_t)linear.blocks * (thread + 1) / threads;
        if (by_output)
            pack_by_output(model.shape.number_width, linear, data, format, first, last);
        else
            pack_by_input(model.shape.number_width, linear, data, format, first, last);
    });
}

void sample(Model& model, const float* logits, int64_t stride, const Draw* draws, int32_t count, int32_t* tokens) {
    const auto some = [&](int first, int step) {
        for (int i = first; i < count; i += step)
            tokens[i] = choose(logits + draws[i].row * stride, model.shape.vocabulary, draws[i]);
    };
    if (count == 1)
        some(0, 1);
    else
        in_parallel(model, some);
}

}  // namespace

#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
#define JOIN_OF(a, b) a##b
#define JOIN(a, b) JOIN_OF(a, b)

extern const Kernels JOIN(kernels_, KERNELS) = {TEXT(KERNELS), pack, run_step, sample, own_bytes};
