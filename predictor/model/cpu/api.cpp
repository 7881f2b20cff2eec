// The C interface that predictor/model/cpu/library.py calls: memory, and the choice of the instruction set.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "model.h"

namespace {

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

int padded(int outputs) { return (outputs + BLOCK - 1) / BLOCK * BLOCK; }

int bytes_of(Width width) { return width == Width::float32 ? 4 : width == Width::bfloat16 ? 2 : 1; }

// Zeroed pages, large ones where the system has them. Null where there is no memory.
void* map_pages(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

// Hands out parts of one piece of memory; with none, only counts them.
class Arena {
  public:
    explicit Arena(void* memory) : next_((uint8_t*)memory) {}

    template <class T>
    T* take(size_t count) {
        bytes += aligned(count * sizeof(T));
        if (!next_) return nullptr;
        uint8_t* part = next_;
        next_ += aligned(count * sizeof(T));
        return (T*)part;
    }

    size_t bytes = 0;

  private:
    uint8_t* next_;
};

Linear make_linear(Arena& arena, Width width, int inputs, int outputs) {
    Linear linear{inputs, outputs, padded(outputs) / BLOCK, nullptr, nullptr, nullptr};
    linear.weights = arena.take<uint8_t>((size_t)padded(outputs) * inputs * bytes_of(width));
    if (width == Width::int8) linear.scales = arena.take<float>(padded(outputs));
    linear.bias = arena.take<float>(padded(outputs));
    return linear;
}

Norm make_norm(Arena& arena, int width) { return {arena.take<float>(width), arena.take<float>(width)}; }

// Lay the weights out; `arena` without memory only measures.
void lay_out(Model& model, Arena& arena) {
    const Shape& shape = model.shape;
    const int E = shape.width, N = shape.inner;
    const Width width = shape.number_width;
    model.layers = arena.take<Layer>(shape.layers);
    for (int i = 0; i < shape.layers; i++) {
        Layer layer{};
        layer.norm_attention = make_norm(arena, E);
        layer.qkv = make_linear(arena, width, E, 3 * E);
        layer.project = make_linear(arena, width, E, E);
        layer.norm_mlp = make_norm(arena, E);
        layer.expand = make_linear(arena, width, E, N);
        layer.contract = make_linear(arena, width, N, E);
        if (model.layers) model.layers[i] = layer;
    }
    model.norm_final = make_norm(arena, E);
    model.positions = arena.take<float>((size_t)shape.context * E);
    model.tokens = make_linear(arena, width, E, shape.vocabulary);
    model.head = shape.tied ? model.tokens : make_linear(arena, width, E, shape.vocabulary);
}

void lay_out(Model& model, Workspace& work, Arena& arena) {
    const Shape& shape = model.shape;
    const size_t rows = work.rows, widest = std::max(shape.width, shape.inner);
    work.residual = arena.take<float>(rows * shape.width);
    work.normed = arena.take<float>(rows * shape.width);
    work.qkv = arena.take<float>(rows * padded(3 * shape.width));
    work.inner = arena.take<float>(rows * padded(shape.inner));
    work.encoded = arena.take<uint8_t>(rows * widest * bytes_of(shape.number_width));
    work.scales = arena.take<float>(rows);
    work.sums = arena.take<int32_t>(rows);
    work.own_bytes = model.kernels->own_bytes(shape);
    work.own = arena.take<uint8_t>(model.pool->threads() * work.own_bytes);
    work.units = arena.take<Unit>(rows * shape.heads);
    work.last_units = arena.take<Unit>(rows * shape.heads);
    work.claimed = arena.take<std::atomic<int32_t>>(shape.layers);
}

void release(Workspace& work) {
    if (work.memory) munmap(work.memory, work.bytes);
    work = Workspace{};
}

// Make room for `rows` rows; false where there is no memory.
bool reserve(Model& model, int rows) {
    if (rows <= model.workspace.rows) return true;
    Workspace work{};
    work.rows = rows;
    Arena measure(nullptr);
    lay_out(model, work, measure);
    work.bytes = measure.bytes;
    work.memory = map_pages(work.bytes);
    if (!work.memory) return false;
    Arena arena(work.memory);
    lay_out(model, work, arena);
    release(model.workspace);
    model.workspace = work;
    return true;
}

const Kernels* find_kernels(const char* name) {
    // Best first; what this CPU cannot run is never returned.
    struct Choice {
        bool runs;
        const Kernels* kernels;
    };
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    const Choice choices[] = {
        {avx512 && __builtin_cpu_supports("avx512bf16"), &kernels_avx512_bf16},
        {avx512, &kernels_avx512},
        {avx2, &kernels_avx2},
        {true, &kernels_generic},
    };
#else
    const Choice choices[] = {{true, &kernels_generic}};
#endif
    for (const Choice& choice : choices)
        if (choice.runs && (!*name || !strcmp(name, choice.kernels->name))) return choice.kernels;
    return nullptr;
}

}  // namespace

extern "C" {

// Ask for large pages in memory that is not touched yet: a sequence's keys and values are read in pieces all over it.
void gpt2_use_large_pages(void* memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, first = ((uintptr_t)memory + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)memory + bytes) / page * page;
    if (end > first) madvise((void*)first, end - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// The instruction set `name`, or the best one where it is empty; null where this CPU lacks it.
const char* gpt2_instruction_set(const char* name) {
    const Kernels* kernels = find_kernels(name);
    return kernels ? kernels->name : nullptr;
}

size_t gpt2_weight_bytes(const Shape* shape) {
    Model model{};
    model.shape = *shape;
    Arena measure(nullptr);
    lay_out(model, measure);
    return measure.bytes;
}

// Null where there is no memory or no thread to be had, or this CPU lacks the instruction set.
Model* gpt2_new(const Shape* shape, const float* attention_scales, const char* instruction_set, int32_t threads) {
    Model* model = new (std::nothrow) Model{};
    if (!model) return nullptr;
    model->shape = *shape;
    model->kernels = find_kernels(instruction_set);
    model->bytes = gpt2_weight_bytes(shape);
    model->memory = map_pages(model->bytes);
    if (model->kernels && model->memory) {
        try {
            model->pool = new Pool(threads);
        } catch (...) {
            model->pool = nullptr;
        }
    }
    if (!model->pool) {
        if (model->memory) munmap(model->memory, model->bytes);
        delete model;
        return nullptr;
    }
    Arena arena(model->memory);
    lay_out(*model, arena);
    for (int i = 0; i < shape->layers; i++) model->layers[i].attention_scale = attention_scales[i];
    return model;
}

void gpt2_free(Model* model) {
    delete model->pool;
    release(model->workspace);
    munmap(model->memory, model->bytes);
    delete model;
}

// The linear of that number: 0 token table, 1 output matrix, 2 + 4 * layer: qkv, project, expand, contract.
static Linear& linear_of(Model* model, int32_t number) {
    if (number < 2) return number ? model->head : model->tokens;
    Layer& layer = model->layers[(number - 2) / 4];
    Linear* linears[] = {&layer.qkv, &layer.project, &layer.expand, &layer.contract};
    return *linears[(number - 2) % 4];
}

void gpt2_load_matrix(Model* model, int32_t number, const void* data, int32_t format, int32_t by_output) {
    model->kernels->pack(*model, linear_of(model, number), data, (Format)format, by_output != 0);
}

float* gpt2_bias(Model* model, int32_t number) { return linear_of(model, number).bias; }

float* gpt2_positions(Model* model) { return model->positions; }

// The norm of that number: 0 the final one, 1 + 2 * layer: before the attention, before the MLP.
static Norm& norm_of(Model* model, int32_t number) {
    if (!number) return model->norm_final;
    Layer& layer = model->layers[(number - 1) / 2];
    return (number - 1) % 2 ? layer.norm_mlp : layer.norm_attention;
}

float* gpt2_norm(Model* model, int32_t number, int32_t bias) {
    Norm& norm = norm_of(model, number);
    return bias ? norm.bias : norm.weight;
}

// 0, or 1 where there was no memory for the step's buffers.
int32_t gpt2_step(Model* model, void* keys_values, const Step* step) {
    if (!reserve(*model, std::max(step->rows, step->wanted))) return 1;
    model->kernels->step(*model, (uint8_t*)keys_values, *step);
    return 0;
}

void gpt2_sample(Model* model, const float* logits, int64_t stride, const Draw* draws, int32_t count, int32_t* tokens) {
    model->kernels->sample(*model, logits, stride, draws, count, tokens);
}
}
