// A context: its cells, one decode at a time, and the checks that keep libllama from aborting.
#include "internal.hpp"

#include <algorithm>

#include <unistd.h>

namespace mtpbatch {

namespace {

constexpr int32_t MAX_THREADS = GGML_MAX_N_THREADS;

// libllama aborts, or the system ends the process, where memory for these runs out: what each cell
// takes at least besides the tensors (whose allocation may fail), and each row of a pass on models
// with recurrent layers, whose graphs grow with the rows.
constexpr int64_t BYTES_PER_CELL       = 48;
constexpr int64_t BYTES_PER_UBATCH_ROW = 40 * 24 * 1024;  // graph nodes per row, and bytes per node

// 0: unknown.
int64_t physical_memory() {
    const int64_t pages = sysconf(_SC_PHYS_PAGES), page_size = sysconf(_SC_PAGESIZE);
    return pages > 0 && page_size > 0 ? pages * page_size : 0;
}

std::string row_text(int32_t i, const char * what, int32_t value) {
    return "row " + std::to_string(i) + ": " + what + " " + std::to_string(value);
}

[[noreturn]] void refuse(const std::string & message) {
    throw Error(MTPBATCH_INVALID_ARGUMENT, message);
}

void check_params(const Model & model, const mtpbatch_context_params & p) {
    if (p.n_seq < 1 || p.n_seq > static_cast<int32_t>(llama_max_parallel_sequences())) {
        refuse("n_seq must be from 1 to " + std::to_string(llama_max_parallel_sequences()) + ", got " +
               std::to_string(p.n_seq));
    }
    if (p.n_ctx < 1 || static_cast<int64_t>(p.n_ctx) * p.n_seq > INT32_MAX) {
        refuse("n_ctx must be at least 1, and n_ctx * n_seq below 2^31, got " + std::to_string(p.n_ctx) + " * " +
               std::to_string(p.n_seq));
    }
    const int32_t n_full = p.n_ctx * p.n_seq;
    if (p.n_cells < p.n_ctx || p.n_cells > n_full) {
        refuse("n_cells must be from n_ctx=" + std::to_string(p.n_ctx) + " to n_ctx * n_seq=" + std::to_string(n_full) +
               ", got " + std::to_string(p.n_cells));
    }
    if (p.n_cells < n_full && !p.kv_unified) {
        refuse("n_cells=" + std::to_string(p.n_cells) + " below n_ctx * n_seq=" + std::to_string(n_full) +
               " needs kv_unified: otherwise each sequence has n_ctx cells of its own");
    }
    if (p.n_batch < 1 || p.n_ubatch < 1 || p.n_rs_seq < 0) {
        refuse("n_batch and n_ubatch must be at least 1, n_rs_seq at least 0, got " + std::to_string(p.n_batch) + ", " +
               std::to_string(p.n_ubatch) + " and " + std::to_string(p.n_rs_seq));
    }
    if (p.n_threads < 1 || p.n_threads > MAX_THREADS) {
        refuse("n_threads must be from 1 to " + std::to_string(MAX_THREADS) + ", got " + std::to_string(p.n_threads));
    }
    if (p.n_outputs_max < p.n_seq) {
        refuse((p.embeddings ? "n_batch must be at least n_seq=" : "n_outputs_max must be at least n_seq=") +
               std::to_string(p.n_seq) + ", got " + std::to_string(p.n_outputs_max));
    }
    if (p.embeddings && p.n_rs_seq > 0) {
        refuse("a context for embeddings takes no tokens back: n_rs_seq must be 0");
    }
    if (p.kv_type < 0 || p.kv_type >= GGML_TYPE_COUNT) {
        refuse("kv_type is not a ggml type");
    }
    // llama.cpp cuts n_batch to all cells, and n_ubatch to n_batch.
    const int64_t n_cells  = p.n_cells;
    const int64_t n_ubatch = std::min<int64_t>({ p.n_ubatch, p.n_batch, n_cells });
    if (model.keeps_recurrent_state() && p.n_rs_seq > 0 && n_ubatch <= static_cast<int64_t>(p.n_rs_seq) + 1) {
        refuse("n_ubatch, n_batch and n_cells must exceed n_rs_seq + 1 = " +
               std::to_string(static_cast<int64_t>(p.n_rs_seq) + 1) + " on a model with recurrent layers");
    }
    const int64_t memory = physical_memory();
    const int64_t n_wanted =
        n_cells * BYTES_PER_CELL + (model.keeps_recurrent_state() ? n_ubatch : 0) * BYTES_PER_UBATCH_ROW;
    if (memory > 0 && n_wanted > memory) {
        refuse("n_cells=" + std::to_string(n_cells) + " with n_ubatch=" + std::to_string(n_ubatch) +
               " needs more memory than this machine has");
    }
}

constexpr const char * ARCHITECTURE = "general.architecture";

// Whether the MTP graph of the model's architecture keeps hidden rows of outputs alone; the others
// keep those of all rows. llama.cpp must be told, or it reads wrong rows, or aborts.
bool drops_hidden_rows(const Model & model) {
    const char * const dropping[] = { "deepseek4", "gemma4-assistant", "mimo2", "qwen3next", "step35" };
    return std::find(std::begin(dropping), std::end(dropping), model.metadata(ARCHITECTURE)) != std::end(dropping);
}

// Whether the hidden rows kept for a head are the very rows that llama.cpp gives as embeddings. It
// embeds with recurrent layers one sequence in each pass, and computes the logits of all rows as
// well; hidden rows come without either.
bool embeds_by_hidden_rows(const Model & model) {
    const std::string architecture = model.metadata(ARCHITECTURE);
    return architecture == "qwen35" || architecture == "qwen35moe";
}

void check_no_assistant(const Model & model) {
    if (model.metadata(ARCHITECTURE) == "gemma4-assistant") {
        throw Error(
            MTPBATCH_CONTEXT_FAILED,
            "the model is an assistant, which drafts for another model only: give it as that one's draft_model");
    }
}

// How many heads the model chains: 1 if it reuses a single one. llama.cpp aborts where an
// architecture's graph knows no second head.
int32_t checked_heads(const Model & model) {
    const int32_t n_heads = model.n_mtp_heads;
    if (n_heads == 0) {
        throw Error(MTPBATCH_CONTEXT_FAILED, "the model has no MTP heads");
    }
    const std::string  architecture = model.metadata(ARCHITECTURE);
    const char * const chaining[]   = { "step35", "glm4moe", "glm-dsa", "mimo2", "hy_v3", "deepseek32" };
    if (n_heads > 1 && std::find(std::begin(chaining), std::end(chaining), architecture) == std::end(chaining)) {
        throw Error(MTPBATCH_SESSION_INIT, "the model has " + std::to_string(n_heads) +
                                               " MTP heads; llama.cpp cannot chain those of " + architecture);
    }
    return n_heads;
}

}  // namespace

Context::Context(std::shared_ptr<const Model> model, const mtpbatch_context_params & params)
    : model_(std::move(model)), params_(params) {
    if (params_.n_cells == 0) {
        params_.n_cells = static_cast<int32_t>(std::min<int64_t>(int64_t{ params_.n_ctx } * params_.n_seq, INT32_MAX));
    }
    if (params_.embeddings) {
        params_.n_outputs_max = params_.n_batch;
        by_hidden_rows_       = embeds_by_hidden_rows(*model_);
    }
    check_params(*model_, params_);
    check_no_assistant(*model_);
    create();
}

Context::Context(std::shared_ptr<Context> target, std::shared_ptr<const Model> model)
    : model_(std::move(model)),
      target_(std::move(target)),
      params_(target_->params_),
      shares_memory_(model_ != target_->model_) {
    if (target_->is_mtp() || target_->params_.embeddings) {
        refuse("the target must be a default context, not an MTP one, nor one for embeddings");
    }
    if (shares_memory_) {
        check_assistant(*target_);
    } else {
        n_heads_ = checked_heads(*model_);
        // Chained heads take turns on the same cells, where each must find its own entries again:
        // position p of a sequence is cell p of its own share.
        params_.kv_unified = params_.kv_unified && n_heads_ == 1;
    }
    if (!params_.kv_unified) {
        params_.n_cells = params_.n_ctx * params_.n_seq;
    }
    params_.n_rs_seq      = 0;
    params_.n_outputs_max = params_.n_seq;
    create();
}

// Refuses an assistant that does not fit the target: llama.cpp would abort on tensors that do not multiply.
void Context::check_assistant(const Context & target) const {
    const auto          fail = [](const std::string & message) { throw Error(MTPBATCH_CONTEXT_FAILED, message); };
    const llama_model * main = target.model_->raw;
    if (target.model_->metadata(ARCHITECTURE) != "gemma4" || model_->metadata(ARCHITECTURE) != "gemma4-assistant") {
        fail("a draft model must be a gemma4-assistant, and its target a gemma4 model; these are " +
             model_->metadata(ARCHITECTURE) + " and " + target.model_->metadata(ARCHITECTURE));
    }
    const auto attention = [](const Model & model, const char * key) {
        return model.metadata(model.metadata(ARCHITECTURE) + ".attention." + key);
    };
    bool fits = model_->n_vocab() == target.model_->n_vocab() &&
                llama_model_n_embd_out(model_->raw) == llama_model_n_embd_out(main) &&
                llama_model_n_embd_inp(model_->raw) == llama_model_n_embd(main) && llama_model_n_layer(main) >= 2 &&
                llama_model_n_head(model_->raw) % llama_model_n_head_kv(main) == 0;
    for (const char * key : { "key_length", "value_length", "key_length_swa", "value_length_swa" }) {
        fits = fits && attention(*model_, key) == attention(*target.model_, key);
    }
    if (!fits) {
        fail("the draft model was made for another target: vocabulary, hidden rows or attention heads differ in size");
    }
    for (llama_seq_id s = 0; s < target.params_.n_seq; ++s) {
        if (target.length(s) > 0) {
            // Its memory is set up anew when it is shared.
            fail("the target has decoded tokens already: make the MTP context first");
        }
    }
}

void Context::create() {
    auto p            = llama_context_default_params();
    p.n_ctx           = static_cast<uint32_t>(params_.n_cells);
    p.n_batch         = params_.n_batch;
    p.n_ubatch        = params_.n_ubatch;
    p.n_seq_max       = params_.n_seq;
    p.n_rs_seq        = params_.n_rs_seq;
    p.n_outputs_max   = by_hidden_rows_ ? params_.n_seq : params_.n_outputs_max;
    p.n_threads       = params_.n_threads;
    p.n_threads_batch = params_.n_threads;
    p.type_k          = static_cast<ggml_type>(params_.kv_type);
    p.type_v          = static_cast<ggml_type>(params_.kv_type);
    p.kv_unified      = params_.kv_unified;
    if (params_.embeddings && !by_hidden_rows_) {
        p.embeddings   = true;
        p.pooling_type = LLAMA_POOLING_TYPE_NONE;  // llama.cpp's own pooling forgets all passes but the last
    }
    if (params_.kv_type == GGML_TYPE_F32) {
        // Who asks for f32 wants the same text in any company. Flash attention's error is a hundred
        // times larger, and depends on how many rows share the pass.
        p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }
    if (target_) {
        p.ctx_type  = LLAMA_CONTEXT_TYPE_MTP;
        p.ctx_other = target_->raw_;
    }
    raw_ = llama_init_from_model(model_->raw, p);
    if (!raw_) {
        throw Error(MTPBATCH_CONTEXT_FAILED, with_reason("llama.cpp could not create the context"));
    }
    const auto fail = [&](const std::string & message) {
        llama_free(raw_);
        throw Error(MTPBATCH_CONTEXT_FAILED, message);
    };
    if (!target_ && !llama_get_memory(raw_)) {
        fail(
            "the model is an encoder, which keeps nothing of what it has read; only models that generate are "
            "supported");
    }
    if (!model_->adapters.empty()) {
        auto adapters = model_->adapters;
        auto scales   = model_->adapter_scales;
        if (llama_set_adapters_lora(raw_, adapters.data(), adapters.size(), scales.data()) != 0) {
            fail(with_reason("llama.cpp could not apply the model's adapters"));
        }
    }
    // A model whose architecture cannot take states back says so by clamping n_rs_seq.
    params_.n_rs_seq = static_cast<int32_t>(llama_n_rs_seq(raw_));
    params_.n_batch  = static_cast<int32_t>(llama_n_batch(raw_));
    params_.n_ubatch = static_cast<int32_t>(llama_n_ubatch(raw_));
    batch_           = llama_batch_ext_init(raw_);
    sequences_       = std::vector<SequenceState>(params_.n_seq);
    if (target_) {
        llama_set_embeddings_nextn(raw_, true, drops_hidden_rows(*model_));
    } else {
        keep_hidden(by_hidden_rows_);
    }
}

Context::~Context() {
    llama_batch_ext_free(batch_);
    llama_free(raw_);
}

void Context::keep_hidden(bool keep) {
    llama_set_embeddings_nextn(raw_, keep, /*masked*/ !keep);
    keeps_hidden_ = keep;
}

void Context::select_head(int32_t head) {
    llama_set_nextn_layer_offset(raw_, head);
}

void Context::check(const std::vector<Row> & rows) const {
    const int32_t n_rows = static_cast<int32_t>(rows.size());
    if (n_rows < 1 || n_rows > params_.n_batch) {
        refuse("a batch has 1 to n_batch=" + std::to_string(params_.n_batch) + " rows, got " + std::to_string(n_rows));
    }
    int32_t              n_outputs = 0;
    std::vector<int32_t> next(params_.n_seq, -1);  // position that a sequence met before must go on with
    for (int32_t i = 0; i < n_rows; ++i) {
        const Row & row = rows[i];
        if (!model_->has_token(row.token)) {
            refuse(row_text(i, "no such token:", row.token));
        }
        if (!has_sequence(row.seq_id)) {
            refuse(row_text(i, "no such sequence:", row.seq_id));
        }
        const bool continues = i > 0 && rows[i - 1].seq_id == row.seq_id;
        if (!continues && next[row.seq_id] >= 0) {
            refuse(row_text(i, "rows of one sequence must stand together; again sequence", row.seq_id));
        }
        int32_t expected = length(row.seq_id);  // with shared memory always: only the target adds to it
        if (continues && !shares_memory()) {
            expected = next[row.seq_id];
        }
        if (row.position != expected) {
            refuse(row_text(i, "sequence", row.seq_id) + " goes on at position " + std::to_string(expected) + ", not " +
                   std::to_string(row.position));
        }
        if (row.position >= params_.n_ctx) {
            refuse(row_text(i, "sequence", row.seq_id) + " is full: n_ctx=" + std::to_string(params_.n_ctx));
        }
        if (params_.embeddings && !row.output) {
            refuse("row " + std::to_string(i) + ": every row of a context for embeddings is an output");
        }
        next[row.seq_id] = row.position + 1;
        n_outputs += row.output;
    }
    if (n_outputs > params_.n_outputs_max) {
        refuse("a batch has at most n_outputs_max=" + std::to_string(params_.n_outputs_max) +
               " rows with outputs, got " + std::to_string(n_outputs));
    }
}

int64_t Context::n_held() const {
    int64_t n = 0;
    for (llama_seq_id s = 0; s < params_.n_seq; ++s) {
        n += length(s);
    }
    return n;
}

bool Context::has_room(llama_seq_id seq_id, int32_t n_tokens) const {
    return n_held() - length(seq_id) + n_tokens <= params_.n_cells;
}

void Context::decode(const std::vector<Row> & rows) {
    require_weights();
    check(rows);
    const int64_t n_taken = n_held();
    if (!shares_memory() && n_taken + static_cast<int64_t>(rows.size()) > params_.n_cells) {
        throw Error(MTPBATCH_NO_KV_SLOT, "no free KV cells for a batch of " + std::to_string(rows.size()) +
                                             " rows: " + std::to_string(n_taken) +
                                             " of n_cells=" + std::to_string(params_.n_cells) + " are taken");
    }
    llama_batch_ext_clear(batch_);
    for (const Row & row : rows) {
        const int32_t i  = llama_batch_ext_add_token(batch_, row.seq_id, row.token);
        bool          ok = i >= 0 && llama_batch_ext_set_pos(batch_, i, &row.position) &&
                           llama_batch_ext_set_output_logits(batch_, i, row.output && !by_hidden_rows_);
        if (ok && row.hidden) {
            ok = llama_batch_ext_set_embd_token(
                batch_, i, { row.hidden, 1, static_cast<size_t>(llama_model_n_embd_out(model_->raw)) });
        }
        if (!ok) {
            throw Error(MTPBATCH_INTERNAL, with_reason("llama.cpp refused a batch row"));
        }
    }
    last_batch_.clear();
    int32_t rc = 0;
    try {
        rc = llama_process(raw_, LLAMA_PROCESS_TYPE_DECODE, batch_);
    } catch (...) {
        resynchronize(rows);
        throw;
    }
    if (rc != 0) {
        resynchronize(rows);
    }
    if (rc == 1) {
        throw Error(MTPBATCH_NO_KV_SLOT, "no free KV cells for a batch of " + std::to_string(rows.size()) + " rows");
    }
    if (rc != 0) {
        throw Error(MTPBATCH_DECODE_FAILED, with_reason("decode failed with code " + std::to_string(rc)));
    }
    llama_synchronize(raw_);
    // A pass may move the recurrent state of sequences that are not in it, and leaves behind the
    // states kept for taking back: only sequences of the last pass have theirs.
    for (auto & s : sequences_) {
        s.retractable = 0;
    }
    const int32_t n_kept = is_one_pass(rows) ? params_.n_rs_seq : 0;
    for (size_t i = 0; i < rows.size(); ++i) {
        auto &     s     = sequences_[rows[i].seq_id];
        const bool first = i == 0 || rows[i - 1].seq_id != rows[i].seq_id;
        s.length         = rows[i].position + 1;  // unused if memory is shared
        // Taking back the whole decode would "succeed" with a stale recurrent state.
        s.retractable = first ? 0 : std::min(s.retractable + 1, n_kept);
    }
    last_batch_  = rows;
    kept_hidden_ = keeps_hidden_;
    n_decodes_ += 1;
}

bool Context::is_one_pass(const std::vector<Row> & rows) const {
    if (rows.front().seq_id == rows.back().seq_id) {
        return true;  // more passes of a single sequence move nothing
    }
    const bool any_ids = params_.kv_unified && !llama_model_is_recurrent(model_->raw);
    size_t     n_own   = 0;  // rows of each sequence
    for (size_t begin = 0, end; begin < rows.size(); begin = end) {
        for (end = begin + 1; end < rows.size() && rows[end].seq_id == rows[begin].seq_id; ++end) {
        }
        const bool consecutive = begin == 0 || rows[begin].seq_id == rows[begin - 1].seq_id + 1;
        if ((begin > 0 && end - begin != n_own) || !(any_ids || consecutive)) {
            return false;
        }
        n_own = end - begin;
    }
    return rows.size() <= static_cast<size_t>(params_.n_ubatch);
}

void Context::require_free() const {
    if (driven()) {
        throw Error(MTPBATCH_CONTEXT_FAILED, "an executor drives this context; close it first");
    }
}

// libllama would read and write where nothing is.
void Context::require_weights() const {
    if (!model_->has_weights) {
        throw Error(MTPBATCH_CONTEXT_FAILED, "the model was loaded without weights, to see what memory it takes");
    }
}

mtpbatch_memory Context::memory_on(int32_t device) const {
    mtpbatch_memory memory{};
    for (const auto & [type, bytes] : llama_get_memory_breakdown(raw_)) {
        if (device_of(type) == device) {
            memory.weights += bytes.model;
            memory.states += bytes.context;
            memory.compute += bytes.compute;
        }
    }
    if (device == 0) {
        const auto n_vocab = static_cast<uint64_t>(model_->n_vocab());
        const auto n_hidden =
            static_cast<uint64_t>(is_mtp() && drops_hidden_rows(*model_) ? params_.n_outputs_max : params_.n_batch);
        memory.logits      = n_vocab * params_.n_outputs_max * sizeof(float);
        memory.hidden_rows = n_hidden * llama_model_n_embd_out(model_->raw) * sizeof(float);
        if (is_mtp() && !shares_memory()) {
            memory.hidden_rows += Session::max_waiting_bytes(*this);
        }
    }
    return memory;
}

// After a failed decode some of its passes may have left their positions behind, and moved any state.
void Context::resynchronize(const std::vector<Row> & rows) {
    for (auto & s : sequences_) {
        s.retractable = 0;
    }
    for (const Row & row : rows) {
        auto & s = sequences_[row.seq_id];
        s.length = llama_memory_seq_pos_max(llama_get_memory(raw_), row.seq_id) + 1;
    }
}

const float * Context::logits(int32_t row) const {
    if (row < 0 || row >= static_cast<int32_t>(last_batch_.size()) || !last_batch_[row].output) {
        return nullptr;
    }
    return llama_get_logits_ith(raw_, row);
}

const float * Context::embeddings() const {
    if (!params_.embeddings || last_batch_.empty()) {
        return nullptr;
    }
    return by_hidden_rows_ ? hidden() : llama_get_embeddings(raw_);
}

const float * Context::hidden() const {
    return llama_get_embeddings_nextn(raw_);
}

const float * Context::hidden(int32_t row) const {
    const float * values = llama_get_embeddings_nextn_ith(raw_, row);
    if (!values) {
        throw Error(MTPBATCH_INTERNAL, with_reason("no hidden row " + std::to_string(row)));
    }
    return values;
}

bool Context::truncate(llama_seq_id seq_id, int32_t length) {
    auto & s = sequences_[seq_id];
    if (length >= s.length || shares_memory()) {
        return true;
    }
    if (length > 0 && model_->keeps_recurrent_state() && !is_mtp() && s.length - length > s.retractable) {
        return false;
    }
    llama_memory_t memory   = llama_get_memory(raw_);
    const int32_t  n_window = llama_model_n_swa(model_->raw);
    if (length > 0 && n_window > 0 && llama_memory_seq_pos_min(memory, seq_id) > std::max(0, length - n_window)) {
        return false;  // a restored sequence has only its last window
    }
    if (!llama_memory_seq_rm(memory, seq_id, length, -1)) {
        return false;
    }
    s.length      = length;
    s.retractable = 0;
    return true;
}

size_t Context::state_size(llama_seq_id seq_id) const {
    return llama_state_seq_get_size_ext(raw_, seq_id, 0);
}

void Context::save(llama_seq_id seq_id, uint8_t * state, size_t size) const {
    if (llama_state_seq_get_data_ext(raw_, state, size, seq_id, 0) != size) {
        throw Error(MTPBATCH_INTERNAL, with_reason("llama.cpp could not read a sequence's state"));
    }
}

bool Context::load(llama_seq_id seq_id, const uint8_t * state, size_t size, int32_t length) {
    llama_memory_t memory = llama_get_memory(raw_);
    if (!has_room(seq_id, length)) {
        truncate(seq_id, 0);
        return false;
    }
    truncate(seq_id, 0);
    if (llama_state_seq_set_data_ext(raw_, state, size, seq_id, 0) != size ||
        llama_memory_seq_pos_max(memory, seq_id) != length - 1) {
        llama_memory_seq_rm(memory, seq_id, -1, -1);
        return false;
    }
    sequences_[seq_id].length      = length;
    sequences_[seq_id].retractable = 0;
    return true;
}

bool Context::copy(llama_seq_id source, llama_seq_id target) {
    const int32_t length = this->length(source);
    if (!params_.kv_unified || model_->keeps_recurrent_state()) {
        // There llama.cpp copies whole caches, at the next decode, or shares a state that may wait
        // to be rolled back for one of the two.
        std::vector<uint8_t> bytes(state_size(source));
        save(source, bytes.data(), bytes.size());
        return load(target, bytes.data(), bytes.size(), length);
    }
    truncate(target, 0);
    llama_memory_seq_cp(llama_get_memory(raw_), source, target, -1, -1);
    sequences_[target].length      = length;
    sequences_[target].retractable = 0;
    return true;
}

}  // namespace mtpbatch

using namespace mtpbatch;

mtpbatch_status mtpbatch_context_create(const mtpbatch_model * model, const mtpbatch_context_params * params,
                                        const mtpbatch_context * target, mtpbatch_context ** context,
                                        mtpbatch_error * error) {
    return guard(error, [&] {
        if (target) {
            target->impl->require_free();
        }
        auto impl = target ? std::make_shared<Context>(target->impl, model->impl)
                           : std::make_shared<Context>(model->impl, *params);
        *context  = new mtpbatch_context{ std::move(impl) };
    });
}

void mtpbatch_context_free(mtpbatch_context * context) {
    delete context;
}

void mtpbatch_context_get_params(const mtpbatch_context * context, mtpbatch_context_params * params) {
    *params = context->impl->params();
}

bool mtpbatch_context_is_mtp(const mtpbatch_context * context) {
    return context->impl->is_mtp();
}

void mtpbatch_context_get_memory(const mtpbatch_context * context, int32_t device, mtpbatch_memory * memory) {
    *memory = context->impl->memory_on(device);
}

mtpbatch_status mtpbatch_context_decode(mtpbatch_context * context, const mtpbatch_batch * batch,
                                        mtpbatch_error * error) {
    return guard(error, [&] {
        context->impl->require_free();
        if (context->impl->is_mtp()) {
            refuse("an MTP context is decoded by its session, which knows the hidden rows");
        }
        std::vector<Row> rows;
        rows.reserve(std::max(batch->n_tokens, 0));
        for (int32_t i = 0; i < batch->n_tokens; ++i) {
            rows.push_back({ batch->tokens[i], batch->positions[i], batch->seq_ids[i], batch->outputs[i] });
        }
        context->impl->decode(rows);
    });
}

const float * mtpbatch_context_logits(mtpbatch_context * context, int32_t row) {
    return context->impl->driven() ? nullptr : context->impl->logits(row);
}

const float * mtpbatch_context_embeddings(mtpbatch_context * context) {
    return context->impl->embeddings();
}

int32_t mtpbatch_context_length(const mtpbatch_context * context, int32_t seq_id) {
    return context->impl->has_sequence(seq_id) ? context->impl->length(seq_id) : -1;
}

mtpbatch_status mtpbatch_context_truncate(mtpbatch_context * context, int32_t seq_id, int32_t length,
                                          mtpbatch_error * error) {
    return guard(error, [&] {
        context->impl->require_free();
        if (context->impl->is_mtp()) {
            refuse("an MTP context is truncated by its session");
        }
        if (!context->impl->has_sequence(seq_id)) {
            refuse("no such sequence: " + std::to_string(seq_id));
        }
        if (length < 0) {
            refuse("length must be at least 0, got " + std::to_string(length));
        }
        if (!context->impl->truncate(seq_id, length)) {
            throw Error(MTPBATCH_CONTEXT_FAILED,
                        "sequence " + std::to_string(seq_id) + " cannot go back from " +
                            std::to_string(context->impl->length(seq_id)) + " to " + std::to_string(length) +
                            " positions: its recurrent state is kept for the last decode only, if that was one pass, " +
                            "for at most n_rs_seq=" + std::to_string(context->impl->params().n_rs_seq) +
                            " tokens, once, and not for the whole of it");
        }
    });
}
