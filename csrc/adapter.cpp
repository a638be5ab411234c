// LoRA adapters: checked against the model, which keeps them for all of its contexts.
#include "internal.hpp"

#include "gguf.h"

#include <algorithm>
#include <cmath>

namespace mtpbatch {

namespace {

using Header   = std::unique_ptr<gguf_context, decltype(&gguf_free)>;
using Tensors  = std::unique_ptr<ggml_context, decltype(&ggml_free)>;
using ModelMap = std::vector<std::pair<std::string, ggml_tensor *>>;

constexpr const char * TOKEN_EMBEDDINGS = "token_embd.weight";

[[noreturn]] void refuse(const std::string & message) {
    throw Error(MTPBATCH_LOAD_FAILED, message);
}

bool ends_with(const std::string & text, const std::string & end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

const ggml_tensor * find(const ModelMap & tensors, const std::string & name) {
    const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const auto & t) { return t.first == name; });
    return found == tensors.end() ? nullptr : found->second;
}

// llama.cpp asserts on values of other types than it expects.
void check_metadata(const gguf_context * header) {
    const auto check = [&](const char * key, gguf_type type) -> int64_t {
        const int64_t id = gguf_find_key(header, key);
        if (id >= 0 && gguf_get_kv_type(header, id) != type) {
            refuse(std::string("the file is damaged: ") + key + " is of type " +
                   gguf_type_name(gguf_get_kv_type(header, id)));
        }
        return id;
    };
    check("general.type", GGUF_TYPE_STRING);
    check("general.architecture", GGUF_TYPE_STRING);
    check("adapter.type", GGUF_TYPE_STRING);
    const int64_t alpha = check("adapter.lora.alpha", GGUF_TYPE_FLOAT32);
    if (alpha >= 0 && !std::isfinite(gguf_get_val_f32(header, alpha))) {
        refuse("the file is damaged: adapter.lora.alpha is not a number");
    }
    if (gguf_find_key(header, "adapter.alora.invocation_tokens") >= 0) {
        refuse(
            "it is an activated LoRA, which starts in the middle of a sequence: llama.cpp applies adapters to all "
            "tokens of all sequences");
    }
}

// Refuses a matrix that llama.cpp would abort on when it is multiplied; it checks the others itself.
void check_matrix(const ggml_tensor & matrix, const ModelMap & model) {
    const std::string name   = matrix.name;
    const bool        first  = ends_with(name, ".lora_a");
    const std::string weight = name.substr(0, name.size() - 7);
    const auto *      of     = find(model, weight);
    if (!of) {
        refuse("the model has no tensor " + weight + ", which the adapter changes: it was made for another model");
    }
    if (of->type == GGML_TYPE_NVFP4) {
        refuse("llama.cpp cannot adapt weights of type nvfp4, such as " + weight);
    }
    if (ends_with(weight, TOKEN_EMBEDDINGS) && (weight != TOKEN_EMBEDDINGS || !find(model, "output.weight"))) {
        refuse("llama.cpp cannot adapt " + weight + " of this model, which is not for looking up tokens alone");
    }
    const auto types = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0 };
    if (std::find(types.begin(), types.end(), matrix.type) == types.end()) {
        refuse(name + " is of type " + ggml_type_name(matrix.type) + "; an adapter's are f32, f16, bf16 or q8_0");
    }
    const int64_t rank = first && weight != TOKEN_EMBEDDINGS ? matrix.ne[1] : matrix.ne[0];
    if (rank < 1 || matrix.ne[2] != of->ne[2] || matrix.ne[3] != of->ne[3]) {
        refuse(name + " does not fit the model's tensor: it was made for another model");
    }
}

// How many weights the file adapts.
int32_t check_tensors(ggml_context * tensors, const ModelMap & model) {
    int32_t n_pairs = 0;
    for (auto * t = ggml_get_first_tensor(tensors); t; t = ggml_get_next_tensor(tensors, t)) {
        const std::string name = t->name;
        if (ends_with(name, ".lora_a") || ends_with(name, ".lora_b")) {
            check_matrix(*t, model);
            n_pairs += ends_with(name, ".lora_a");
        }
    }
    const auto * a = ggml_get_tensor(tensors, "token_embd.weight.lora_a");
    const auto * b = ggml_get_tensor(tensors, "token_embd.weight.lora_b");
    if (a && b && a->ne[0] != b->ne[0]) {
        refuse("the two matrices of token_embd.weight have different ranks");
    }
    if (n_pairs == 0) {
        refuse("it adapts nothing: no tensor's name ends with .lora_a");
    }
    return n_pairs;
}

}  // namespace

void Model::add_adapter(const std::string & path, float scale) {
    if (!std::isfinite(scale)) {
        throw Error(MTPBATCH_INVALID_ARGUMENT,
                    "an adapter's scale must be a finite number, got " + std::to_string(scale));
    }
    ggml_context * raw_tensors = nullptr;
    const Header   header{ gguf_init_from_file(path.c_str(), { /*no_alloc*/ true, &raw_tensors }), gguf_free };
    const Tensors  tensors{ raw_tensors, ggml_free };
    if (!header) {
        refuse(with_reason("llama.cpp could not read the file"));
    }
    check_metadata(header.get());
    const auto &  of_model = llama_internal_get_tensor_map(raw);
    const int32_t n_pairs  = check_tensors(tensors.get(), of_model);
    // Some architectures' graphs have 32 nodes for each tensor and none for adapters, whose every pair
    // takes 4; where they run out, llama.cpp aborts.
    if (n_adapted_ + n_pairs > 4 * static_cast<int64_t>(of_model.size())) {
        refuse("too many adapters: all together would add " + std::to_string(n_adapted_ + n_pairs) +
               " products, and llama.cpp has room for 4 with each of the model's " + std::to_string(of_model.size()) +
               " tensors; merge some of them into the model");
    }
    llama_adapter_lora * adapter = llama_adapter_lora_init(raw, path.c_str());
    if (!adapter) {
        refuse(with_reason("llama.cpp could not load the adapter"));
    }
    adapters.push_back(adapter);
    adapter_scales.push_back(scale);
    n_adapted_ += n_pairs;
    Checksum sum;
    sum.add(&weights_sample, sizeof weights_sample);
    sum.add(&scale, sizeof scale);
    const uint64_t sample = sample_weights(path, header.get());
    sum.add(&sample, sizeof sample);
    weights_sample = sum.value();
}

}  // namespace mtpbatch

using namespace mtpbatch;

mtpbatch_status mtpbatch_model_add_adapter(mtpbatch_model * model, const char * path, float scale,
                                           mtpbatch_error * error) {
    return guard(error, [&] {
        if (model->impl.use_count() > 1) {
            throw Error(MTPBATCH_INVALID_ARGUMENT, "adapters come before the model's contexts");
        }
        model->impl->add_adapter(path, scale);
    });
}
