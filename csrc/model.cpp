// Loading a model, and everything that can be asked of it without a context.
#include "internal.hpp"

#include "gguf.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <mutex>
#include <string_view>
#include <unordered_set>

namespace mtpbatch {

namespace {

thread_local std::string log_text;
thread_local bool        forwards  = true;
constexpr size_t         LOG_LIMIT = 800;  // bytes kept of one call's errors

ggml_log_callback previous_callback  = nullptr;
void *            previous_user_data = nullptr;

void collect_log(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR && log_text.size() < LOG_LIMIT) {
        log_text.append(text, std::min(std::strlen(text), LOG_LIMIT - log_text.size()));
    }
    if (previous_callback && forwards) {
        previous_callback(level, text, previous_user_data);
    }
}

std::string trimmed(const std::string & text) {
    const auto end = text.find_last_not_of(" \n");
    return end == std::string::npos ? "" : text.substr(0, end + 1);
}

using Header = std::unique_ptr<gguf_context, decltype(&gguf_free)>;

// Null: the file cannot be read, or is no GGUF.
Header read_header(const std::string & path) {
    return { gguf_init_from_file(path.c_str(), { /*no_alloc*/ true, /*ctx*/ nullptr }), gguf_free };
}

int64_t find_array(const gguf_context * header, const std::string & key, gguf_type type) {
    const int64_t id = gguf_find_key(header, key.c_str());
    const bool    is_one =
        id >= 0 && gguf_get_kv_type(header, id) == GGUF_TYPE_ARRAY && gguf_get_arr_type(header, id) == type;
    return is_one ? id : -1;
}

// How many channels of a head each kind of position turns: no more than there are. Some architectures
// may have none, where a position is of one kind only.
void check_sections(const gguf_context * header, const std::string & arch, int64_t key_length) {
    const std::string key = arch + ".rope.dimension_sections";
    const int64_t     id  = find_array(header, key, GGUF_TYPE_INT32);
    if (id < 0) {
        return;
    }
    const auto * sections = static_cast<const int32_t *>(gguf_get_arr_data(header, id));
    int64_t      sum      = 0;
    for (size_t i = 0; i < gguf_get_arr_n(header, id); ++i) {
        if (sections[i] < 0) {
            sum = -1;
            break;
        }
        sum += sections[i];
    }
    const int64_t least = arch.rfind("qwen", 0) == 0 ? 1 : 0;
    if (sum < least || sum > key_length) {
        throw Error(MTPBATCH_LOAD_FAILED, "the file is damaged: " + key + " does not divide a head's channels");
    }
}

// No two tokens are spelt alike, but for empty ones, which llama.cpp gives names.
void check_tokens(const gguf_context * header) {
    const int64_t id = find_array(header, "tokenizer.ggml.tokens", GGUF_TYPE_STRING);
    if (id < 0) {
        return;
    }
    std::unordered_set<std::string_view> spellings;
    for (size_t i = 0; i < gguf_get_arr_n(header, id); ++i) {
        const std::string_view spelling = gguf_get_arr_str(header, id, i);
        if (!spelling.empty() && !spellings.insert(spelling).second) {
            throw Error(MTPBATCH_LOAD_FAILED,
                        "the file is damaged: token " + std::to_string(i) + " is spelt like one before it");
        }
    }
}

// Refuses a file whose header holds numbers that libllama asserts on or divides by. A file that
// cannot be read at all is left to the loader, which says why. Returns whether the file has MTP
// heads that it announces but not their weights, as where these were split off: such heads load,
// and abort when they run.
bool lacks_heads(const Header & header) {
    if (!header) {
        return false;
    }
    const int64_t arch_key = gguf_find_key(header.get(), "general.architecture");
    if (arch_key < 0 || gguf_get_kv_type(header.get(), arch_key) != GGUF_TYPE_STRING) {
        return false;
    }
    const std::string arch = gguf_get_val_str(header.get(), arch_key);

    const auto check = [&](const char * name, int64_t least, int64_t most, int64_t multiple = 1) -> int64_t {
        const std::string key = arch + "." + name;
        const int64_t     id  = gguf_find_key(header.get(), key.c_str());
        if (id < 0 || gguf_get_kv_type(header.get(), id) != GGUF_TYPE_UINT32) {
            return most;
        }
        const int64_t value = gguf_get_val_u32(header.get(), id);
        if (value < least || value > most || value % multiple != 0) {
            throw Error(MTPBATCH_LOAD_FAILED, "the file is damaged: " + key + " is " + std::to_string(value));
        }
        return value;
    };
    constexpr int64_t MAX_LAYERS = 512;  // LLAMA_MAX_LAYERS
    const int64_t     n_layer    = check("block_count", 1, MAX_LAYERS);
    const bool        assistant  = arch == "gemma4-assistant";  // has no layers but heads
    const int64_t n_heads = check("nextn_predict_layers", assistant ? n_layer : 0, assistant ? n_layer : n_layer - 1);
    check("full_attention_interval", 1, MAX_LAYERS);
    const int64_t key_length = check("attention.key_length", 1, INT32_MAX);
    check("rope.dimension_count", 2, key_length, 2);
    check("ssm.state_size", 1, INT32_MAX);
    check("ssm.group_count", 1, INT32_MAX);
    check("ssm.time_step_rank", 1, INT32_MAX);
    check("ssm.inner_size", 1, INT32_MAX);

    check_sections(header.get(), arch, key_length);
    check_tokens(header.get());

    const std::string heads_key = arch + ".nextn_predict_layers";
    if (assistant || gguf_find_key(header.get(), heads_key.c_str()) < 0 ||
        gguf_find_key(header.get(), "split.count") >= 0) {
        return false;
    }
    const std::string weight = "blk." + std::to_string(n_layer - n_heads) + ".nextn.eh_proj.weight";
    return gguf_find_tensor(header.get(), weight.c_str()) < 0;
}

// Whether libllama has a graph of an architecture's MTP heads. It loads those of others as well, and
// with an MTP context would run their trunk on hidden rows, or abort.
bool has_mtp_graph(const std::string & arch) {
    const char * const drafting[] = { "bailingmoe3",      "cohere2moe", "deepseek2", "deepseek32", "deepseek4",
                                      "gemma4-assistant", "glm-dsa",    "glm4moe",   "hy_v3",      "mimo2",
                                      "nemotron_h_moe",   "qwen35",     "qwen35moe", "qwen3next",  "step35" };
    return std::find(std::begin(drafting), std::end(drafting), arch) != std::end(drafting);
}

// Adds some bytes from the middle of every tensor of a file.
void add_sample(Checksum & sum, const std::string & path, const gguf_context * header) {
    std::ifstream file(path, std::ios::binary);
    for (int64_t i = 0; header && i < gguf_get_n_tensors(header); ++i) {
        char         bytes[64] = {};
        const size_t size      = gguf_get_tensor_size(header, i);
        const size_t n         = std::min(size, sizeof bytes);
        const size_t offset    = gguf_get_data_offset(header) + gguf_get_tensor_offset(header, i);
        file.seekg(static_cast<std::streamoff>(offset + (size - n) / 2));
        file.read(bytes, static_cast<std::streamsize>(n));
        sum.add(bytes, n);
    }
    if (!header || !file) {
        throw Error(MTPBATCH_LOAD_FAILED, path + " cannot be read again");
    }
}

}  // namespace

// Tells models apart that differ in their weights alone. llama.cpp gives no weights out, but it has
// just read the file, so that these bytes cost nearly nothing.
uint64_t sample_weights(const std::string & path, const gguf_context * header) {
    Checksum sum;
    add_sample(sum, path, header);
    const int64_t key = gguf_find_key(header, "split.count");
    if (key >= 0 && gguf_get_kv_type(header, key) == GGUF_TYPE_UINT16) {
        const int32_t     n_parts = gguf_get_val_u16(header, key);
        std::vector<char> prefix(path.size() + 1), part(path.size() + 64);
        llama_split_prefix(prefix.data(), prefix.size(), path.c_str(), 0, n_parts);
        for (int32_t i = 1; i < n_parts; ++i) {
            llama_split_path(part.data(), part.size(), prefix.data(), i, n_parts);
            add_sample(sum, part.data(), read_header(part.data()).get());
        }
    }
    return sum.value();
}

std::string captured_log() {
    return trimmed(log_text);
}

void clear_captured_log() {
    log_text.clear();
}

void quiet_listeners() {
    forwards = false;
}

std::string with_reason(const std::string & message) {
    const std::string reason = captured_log();
    return reason.empty() ? message : message + ": " + reason;
}

void set_message(mtpbatch_error * error, const char * message) noexcept {
    if (error) {
        std::snprintf(error->message, sizeof error->message, "%s", message);
    }
}

std::string Model::metadata(const std::string & key) const {
    char text[256];
    return llama_model_meta_val_str(raw, key.c_str(), text, sizeof text) < 0 ? "" : text;
}

}  // namespace mtpbatch

using namespace mtpbatch;

void mtpbatch_capture_logs(bool forward) {
    static std::once_flag once;
    std::call_once(once, llama_backend_init);
    ggml_log_callback callback;
    void *            user_data;
    llama_log_get(&callback, &user_data);
    if (callback != collect_log) {  // not yet, or another library has taken it since
        previous_callback  = forward ? callback : nullptr;
        previous_user_data = user_data;
        llama_log_set(collect_log, nullptr);
    }
}

mtpbatch_status mtpbatch_model_load(const char * path, int32_t n_gpu_layers, bool weights, mtpbatch_progress progress,
                                    void * user, mtpbatch_model ** model, mtpbatch_error * error) {
    return guard(error, [&] {
        struct Progress {
            mtpbatch_progress report;
            void *            user;
            bool              stopped;
        } state{ progress, user, false };

        const auto header   = read_header(path);
        const bool headless = lacks_heads(header);
        auto       params   = llama_model_default_params();
        params.n_gpu_layers = n_gpu_layers;
        params.load_mtp     = true;  // without the heads an MTP context aborts on its first decode
        if (!weights) {
            params.no_alloc  = true;
            params.load_mode = LLAMA_LOAD_MODE_NONE;  // libllama asserts that nothing is mapped
        }
        if (progress) {
            params.progress_callback_user_data = &state;
            params.progress_callback           = [](float fraction, void * data) {
                auto * s   = static_cast<Progress *>(data);
                s->stopped = !s->report(fraction, s->user);
                return !s->stopped;
            };
        }
        llama_model * raw = llama_model_load_from_file(path, params);
        if (!raw) {
            throw state.stopped ? Error(MTPBATCH_LOAD_CANCELLED, "loading was stopped by the progress callback")
                                : Error(MTPBATCH_LOAD_FAILED, with_reason("llama.cpp could not load the model"));
        }
        char arch[64] = {};
        llama_model_meta_val_str(raw, "general.architecture", arch, sizeof(arch));
        const int32_t n_heads = headless || !has_mtp_graph(arch) ? 0 : llama_model_n_layer_nextn(raw);
        auto          impl    = std::make_shared<Model>(raw, n_heads, weights);
        if (weights) {
            impl->weights_sample = sample_weights(path, header.get());
        }
        if (llama_vocab_type(impl->vocab) == LLAMA_VOCAB_TYPE_NONE) {
            throw Error(MTPBATCH_LOAD_FAILED, "the model has no vocabulary");
        }
        if (llama_model_has_encoder(raw) || !llama_model_has_decoder(raw) || llama_model_is_diffusion(raw)) {
            throw Error(MTPBATCH_LOAD_FAILED, "only decoder models that generate token by token are supported");
        }
        *model = new mtpbatch_model{ std::move(impl) };
    });
}

void mtpbatch_model_free(mtpbatch_model * model) {
    delete model;
}

void mtpbatch_model_get_facts(const mtpbatch_model * model, mtpbatch_model_facts * facts) {
    const auto & m     = *model->impl;
    facts->n_vocab     = m.n_vocab();
    facts->n_embd      = llama_model_n_embd_out(m.raw);
    facts->n_layer     = llama_model_n_layer(m.raw);
    facts->n_mtp_heads = m.n_mtp_heads;
    facts->n_ctx_train = llama_model_n_ctx_train(m.raw);
    facts->n_swa       = llama_model_n_swa(m.raw);
    facts->bos         = llama_vocab_bos(m.vocab);
    facts->eos         = llama_vocab_eos(m.vocab);
    facts->eot         = llama_vocab_eot(m.vocab);
    facts->add_bos     = llama_vocab_get_add_bos(m.vocab);
    facts->hybrid      = llama_model_is_hybrid(m.raw);
    facts->recurrent   = llama_model_is_recurrent(m.raw);
    facts->n_params    = llama_model_n_params(m.raw);
    facts->n_bytes     = llama_model_size(m.raw);
}

const char * mtpbatch_model_chat_template(const mtpbatch_model * model) {
    return llama_model_chat_template(model->impl->raw, nullptr);
}

int32_t mtpbatch_model_describe(const mtpbatch_model * model, char * text, size_t size) {
    return llama_model_desc(model->impl->raw, text, size);
}

int32_t mtpbatch_model_metadata(const mtpbatch_model * model, const char * key, char * text, size_t size) {
    return llama_model_meta_val_str(model->impl->raw, key, text, size);
}

bool mtpbatch_model_is_eog(const mtpbatch_model * model, int32_t token) {
    return model->impl->has_token(token) && llama_vocab_is_eog(model->impl->vocab, token);
}

bool mtpbatch_model_is_control(const mtpbatch_model * model, int32_t token) {
    return model->impl->has_token(token) && llama_vocab_is_control(model->impl->vocab, token);
}

int32_t mtpbatch_model_token_bytes(const mtpbatch_model * model, int32_t token, bool special, char * bytes,
                                   int32_t size) {
    if (!model->impl->has_token(token)) {
        return 0;
    }
    return llama_token_to_piece(model->impl->vocab, token, bytes, size, 0, special);
}

mtpbatch_status mtpbatch_model_cuts(const mtpbatch_model * model, const char * text, int32_t n_text, bool parse_special,
                                    int32_t * cuts, int32_t * n, mtpbatch_error * error) {
    return guard(error, [&] {
        const auto & special = parse_special ? model->impl->markup : model->impl->user_defined;
        const auto   found   = special.cuts({ text, static_cast<size_t>(n_text) });
        std::copy(found.begin(), found.end(), cuts);
        *n = static_cast<int32_t>(found.size());
    });
}

mtpbatch_status mtpbatch_model_tokenize(const mtpbatch_model * model, const char * text, int32_t n_text,
                                        bool add_special, bool parse_special, int32_t * tokens, int32_t size,
                                        int32_t * n, mtpbatch_error * error) {
    return guard(error, [&] {
        const int32_t written =
            llama_tokenize(model->impl->vocab, text, n_text, tokens, size, add_special, parse_special);
        if (written == INT32_MIN) {
            throw Error(MTPBATCH_INVALID_ARGUMENT, "the text has more tokens than can be counted");
        }
        *n = written < 0 ? -written : written;
    });
}

mtpbatch_status mtpbatch_model_detokenize(const mtpbatch_model * model, const int32_t * tokens, int32_t n_tokens,
                                          bool special, char * text, int32_t size, int32_t * n,
                                          mtpbatch_error * error) {
    return guard(error, [&] {
        for (int32_t i = 0; i < n_tokens; ++i) {
            if (!model->impl->has_token(tokens[i])) {
                throw Error(MTPBATCH_INVALID_ARGUMENT, "token " + std::to_string(tokens[i]) + " at index " +
                                                           std::to_string(i) + " is not in the vocabulary");
            }
        }
        const int32_t written =
            llama_detokenize(model->impl->vocab, tokens, n_tokens, text, size, /*remove_special*/ false, special);
        *n = written < 0 ? -written : written;
    });
}
