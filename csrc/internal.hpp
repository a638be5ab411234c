// What the parts of the native layer share: errors, timing, and the handles' insides.
#pragma once

#include "cuts.hpp"
#include "edits.hpp"
#include "llama_private.h"
#include "mtpbatch.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

struct gguf_context;

namespace mtpbatch {

// Carries a status across C++ frames to the C border, where guard() takes it apart.
class Error : public std::runtime_error {
  public:
    Error(mtpbatch_status status, const std::string & message) : std::runtime_error(message), status(status) {}
    const mtpbatch_status status;
};

// What llama.cpp has logged as an error on this thread since the current call began.
std::string captured_log();
void        clear_captured_log();
// From here on, whoever else listens to llama.cpp hears nothing of this thread: Python would have to
// wait for the GIL.
void quiet_listeners();
// `message`, with llama.cpp's own words behind it if it said anything.
std::string with_reason(const std::string & message);
// The index of the device that holds such buffers, as mtpbatch_device_get() counts them.
int32_t device_of(ggml_backend_buffer_type_t type);
// A checksum over some bytes of every tensor of a GGUF file, and of those that continue it.
uint64_t sample_weights(const std::string & path, const gguf_context * header);

void set_message(mtpbatch_error * error, const char * message) noexcept;

// Runs the body of a C function: exceptions become a status and a message.
template <typename Body>
mtpbatch_status guard(mtpbatch_error * error, Body && body) noexcept {
    try {
        clear_captured_log();
        body();
        return MTPBATCH_OK;
    } catch (const Error & e) {
        set_message(error, e.what());
        return e.status;
    } catch (const std::bad_alloc &) {
        set_message(error, "out of memory");
        return MTPBATCH_OUT_OF_MEMORY;
    } catch (const std::exception & e) {
        set_message(error, e.what());
        return MTPBATCH_INTERNAL;
    } catch (...) {
        set_message(error, "unknown C++ exception");
        return MTPBATCH_INTERNAL;
    }
}

inline std::string sequence_name(llama_seq_id seq_id) {
    return "sequence " + std::to_string(seq_id);
}

// Microseconds since it was made or last read.
class Stopwatch {
  public:
    int64_t lap() {
        const auto now     = Clock::now();
        const auto elapsed = std::chrono::duration_cast<std::chrono::microseconds>(now - since_).count();
        since_             = now;
        return elapsed;
    }

  private:
    using Clock              = std::chrono::steady_clock;
    Clock::time_point since_ = Clock::now();
};

// Notices damage, not malice: FNV-1a over words, then over the bytes that remain.
class Checksum {
  public:
    void add(const void * data, size_t size) {
        const auto * bytes = static_cast<const uint8_t *>(data);
        for (; size >= sizeof(uint64_t); size -= sizeof(uint64_t), bytes += sizeof(uint64_t)) {
            uint64_t word;
            std::memcpy(&word, bytes, sizeof word);
            mix(word);
        }
        for (; size > 0; --size, ++bytes) {
            mix(*bytes);
        }
    }
    uint64_t value() const { return value_; }

  private:
    void mix(uint64_t word) {
        value_ = (value_ ^ word) * 0x100000001b3;
        value_ ^= value_ >> 29;  // a product carries upwards only
    }

    uint64_t value_ = 0xcbf29ce484222325;
};

class Pool;

struct Model {
    Model(llama_model * raw, int32_t n_mtp_heads, bool has_weights)
        : raw(raw),
          vocab(llama_model_get_vocab(raw)),
          n_mtp_heads(n_mtp_heads),
          has_weights(has_weights),
          markup(vocab, /*parse_special*/ true),
          user_defined(vocab, /*parse_special*/ false) {}
    ~Model() { llama_model_free(raw); }
    Model(const Model &)             = delete;
    Model & operator=(const Model &) = delete;

    int32_t n_vocab() const { return llama_vocab_n_tokens(vocab); }
    bool    has_token(int32_t token) const { return token >= 0 && token < n_vocab(); }
    // A scalar of the model file as text; empty: there is none.
    std::string metadata(const std::string & key) const;
    bool        keeps_recurrent_state() const { return llama_model_is_hybrid(raw) || llama_model_is_recurrent(raw); }
    // Adds a LoRA adapter, for all contexts that are made from then on.
    void add_adapter(const std::string & path, float scale);

    llama_model * const       raw;
    const llama_vocab * const vocab;
    const int32_t             n_mtp_heads;         // those that the file has weights for
    const bool                has_weights;         // otherwise nothing of it or its contexts is in memory
    const SpecialTexts        markup;              // all special tokens,
    const SpecialTexts        user_defined;        // and those that are text
    uint64_t                  weights_sample = 0;  // of the file and its adapters, set by whoever loads them
    // Which llama.cpp frees with the model, and how much of each is added to the weights.
    std::vector<llama_adapter_lora *> adapters;
    std::vector<float>                adapter_scales;

  private:
    int64_t n_adapted_ = 0;  // weights that adapters change, each adapter's counted
};

// One row of a decode. `hidden` is set on every row of an MTP context and on none of a default one.
struct Row {
    llama_token   token;
    llama_pos     position;
    llama_seq_id  seq_id;
    bool          output;
    const float * hidden = nullptr;
};

// A llama_context that knows what it has decoded, and refuses what libllama would abort on.
class Context {
  public:
    // A default context.
    Context(std::shared_ptr<const Model> model, const mtpbatch_context_params & params);
    // An MTP context that drafts for `target`, with the heads of the target's own model or with an
    // assistant, a model of its own that reads the target's memory.
    Context(std::shared_ptr<Context> target, std::shared_ptr<const Model> model);
    ~Context();
    Context(const Context &)             = delete;
    Context & operator=(const Context &) = delete;

    void          decode(const std::vector<Row> & rows);
    const float * logits(int32_t row) const;  // nullptr: the row has none
    const float * embeddings() const;         // of all rows in turn; nullptr: there are none
    // Hidden rows of the last decode, if they were kept: of a default context those of all rows in
    // turn, of an MTP context that of an output.
    const float * hidden() const;
    const float * hidden(int32_t row) const;
    // Of a default context, from the next decode on. Without them llama.cpp computes the end of the
    // last layer for outputs alone.
    void keep_hidden(bool keep);
    bool keeps_hidden() const { return keeps_hidden_; }
    bool kept_hidden() const { return kept_hidden_; }  // in the last decode
    // Of several chained heads, the one that decodes from now on.
    void select_head(int32_t head);
    // Whether a model that keeps recurrent state takes these rows in one forward pass: equally many
    // of each sequence, at most n_ubatch, and consecutive ids unless cells are shared.
    bool is_one_pass(const std::vector<Row> & rows) const;
    // Takes back positions from `length` on; false if recurrent state or a sliding window does not allow it.
    bool truncate(llama_seq_id seq_id, int32_t length);
    // Tokens that all sequences hold: as many cells, except where forks share them.
    int64_t n_held() const;
    // Whether there are cells for so many tokens in place of a sequence's.
    bool has_room(llama_seq_id seq_id, int32_t n_tokens) const;

    // The bytes it takes on a device, one of mtpbatch_device_get().
    mtpbatch_memory memory_on(int32_t device) const;

    // What the memory holds of one sequence, which replaces another by load() or copy(): these
    // leave it empty and return false if that does not fit.
    size_t state_size(llama_seq_id seq_id) const;
    void   save(llama_seq_id seq_id, uint8_t * state, size_t size) const;
    bool   load(llama_seq_id seq_id, const uint8_t * state, size_t size, int32_t length);
    bool   copy(llama_seq_id source, llama_seq_id target);

    bool    has_sequence(llama_seq_id seq_id) const { return seq_id >= 0 && seq_id < params_.n_seq; }
    int32_t length(llama_seq_id seq_id) const {
        return shares_memory() ? target_->length(seq_id) : sequences_[seq_id].length.load();
    }
    bool                            is_mtp() const { return target_ != nullptr; }
    bool                            shares_memory() const { return shares_memory_; }  // with the target it drafts for
    int32_t                         n_heads() const { return n_heads_; }  // chained ones; 1: reused for each depth
    const Context *                 target() const { return target_.get(); }
    const Model &                   model() const { return *model_; }
    const mtpbatch_context_params & params() const { return params_; }
    const std::vector<Row> &        last_batch() const { return last_batch_; }
    int64_t                         n_decodes() const { return n_decodes_; }  // those that succeeded

    // A draft context serves one session at a time, which keeps track of what it holds.
    bool claimed = false;
    // A target that an executor drives is decoded by its thread, and by nobody else; so is the
    // context that drafts for it. Only lengths may be read meanwhile.
    void set_driven(bool driven) { driven_ = driven; }
    bool driven() const { return target_ ? target_->driven() : driven_.load(); }
    void require_free() const;
    void require_weights() const;

  private:
    struct SequenceState {
        std::atomic<int32_t> length{ 0 };  // positions decoded
        int32_t retractable = 0;           // of the last decode, how many can still be taken back (recurrent models)
    };

    void check_assistant(const Context & target) const;
    void create();
    void check(const std::vector<Row> & rows) const;
    void resynchronize(const std::vector<Row> & rows);

    const std::shared_ptr<const Model> model_;
    const std::shared_ptr<Context>     target_;
    mtpbatch_context_params            params_;
    bool                               shares_memory_  = false;
    int32_t                            n_heads_        = 1;
    bool                               by_hidden_rows_ = false;  // embeddings are
    llama_context *                    raw_            = nullptr;
    llama_batch_ext *                  batch_          = nullptr;
    std::vector<SequenceState>         sequences_;
    std::vector<Row>                   last_batch_;
    bool                               keeps_hidden_ = false;
    bool                               kept_hidden_  = false;
    int64_t                            n_decodes_    = 0;
    std::atomic<bool>                  driven_{ false };
};

// Drafts with a model's MTP heads for all sequences of a target context at once.
//
// The draft context's entry at position q pairs token x_q with the target's hidden row h_{q-1}.
// It is caught up lazily: pairs of accepted tokens wait here until the sequence drafts (then they
// go in one batch with the newly sampled token) or until too many wait. Rejected tokens are never
// decoded there.
//
// Heads come in three modes:
// - One head, reused for each depth: it adds the tokens it drafts to its own entries.
// - Several, chained, one for each depth: each has entries of its own in the same cells. At its
//   turn it decodes what waits for it and all the tokens that the heads before it drafted.
// - An assistant that reads the target's memory has no entries, so that nothing waits for it. It
//   decodes every token of a draft at the same position.
class Session {
  public:
    struct Request {
        llama_seq_id seq_id;
        int32_t      n_past;
        llama_token  last_token;
        int32_t      depth;                // it goes no deeper
        float        temperature = 0;      // of who verifies the draft; 0: greedy
        bool         selective   = false;  // it goes only as deep as pays, on the terms given
        float        expected    = 0;      // selective: see mtpbatch_entry
    };

    struct Draft {
        std::vector<llama_token> tokens;
        // Of each token, if there are terms:
        std::vector<int32_t> confidences;  // an index of their acceptance
        std::vector<float>   chances;      // that it and all before it are accepted

        void resize(size_t n);
    };

    Session(std::shared_ptr<Context> target, std::shared_ptr<Context> draft, const mtpbatch_session_config & config);
    ~Session() { draft_->claimed = false; }
    Session(const Session &)             = delete;
    Session & operator=(const Session &) = delete;

    void begin(llama_seq_id seq_id, int32_t n_prompt);
    // Whether anything is kept of a sequence to draft from.
    bool keeps(llama_seq_id seq_id) const { return !sequences_[seq_id].ignored; }
    // Takes in the batch that the target decoded last. Its hidden rows may be `left_out`: the MTP head
    // then pairs these tokens with zeros, as it does the first one of a sequence.
    void process(bool left_out = false);
    // `terms` and `pool`, which looks through the logits, may be null if no request is selective.
    void draft(std::vector<Request> requests, const mtpbatch_terms * terms, Pool * pool, std::vector<Draft> & drafts);
    void accept(llama_seq_id seq_id, int32_t n_accepted);
    // Forgets a sequence, also in the draft context.
    void reset(llama_seq_id seq_id);
    // The sequence will not draft until it is reset: nothing is kept for it, nor of it.
    void ignore(llama_seq_id seq_id);
    // Takes back a sequence's positions from `length` on, in both contexts; it must have no draft under
    // way. False if the target cannot: then nothing has changed.
    bool cut(llama_seq_id seq_id, int32_t length);

    // All of a sequence, in both contexts, which restore() puts into any other. save() returns how
    // many bytes that takes, and writes them if they fit into `size`. What waits for the heads is part of
    // it, and goes on waiting: none of these decodes anything.
    size_t save(llama_seq_id seq_id, uint8_t * state, size_t size);
    void   restore(llama_seq_id seq_id, const uint8_t * state, size_t size);
    void   fork(llama_seq_id source, llama_seq_id target);

    // Bytes of the hidden rows that may wait for the heads of a draft context.
    static uint64_t max_waiting_bytes(const Context & draft);

    Context &                       target() const { return *target_; }
    const mtpbatch_session_config & config() const { return config_; }
    // Any thread.
    mtpbatch_session_statistics statistics() const;

  private:
    struct SequenceState {
        int32_t                  n_past  = 0;        // target positions taken in
        bool                     ignored = false;    // nothing below is kept
        std::vector<int32_t>     decoded;            // positions that each head has entries for, by head
        std::vector<llama_token> waiting;            // tokens that some head has no entry for, up to n_past
        std::vector<float>       waiting_hidden;     // the hidden row each of them pairs with
        std::vector<float>       hidden;             // the row that the token at n_past pairs with
        llama_token              drafted_from = -1;  // the token at n_past if a head has an entry for it already
        int32_t                  n_drafted    = 0;   // of a draft that waits for accept
        int32_t                  n_verified   = 0;   // its rows in the processed batch; 0: not processed yet
        std::vector<float>       chain;              // while drafting: the heads' hidden rows of the drafted tokens

        int32_t first_waiting() const { return n_past - static_cast<int32_t>(waiting.size()); }
    };

    SequenceState & sequence(llama_seq_id seq_id);
    SequenceState & settled(llama_seq_id seq_id);
    void            take_in(const std::vector<Row> & rows, size_t begin, size_t end, const float * hidden);
    void            take_back_last(llama_seq_id seq_id);
    void            take_back_waiting(SequenceState & s, int32_t n) const;
    void            drop_waiting(SequenceState & s) const;
    void            start_over(llama_seq_id seq_id);
    void            catch_up(const std::vector<llama_seq_id> & seq_ids);
    void            decode(int32_t head, const std::vector<Row> & rows);
    uint64_t        make_fingerprint() const;

    const std::shared_ptr<Context> target_;
    const std::shared_ptr<Context> draft_;
    const mtpbatch_session_config  config_;
    const int32_t                  n_embd_;
    const int32_t                  n_heads_;      // that have entries: no draft needs more
    const uint64_t                 fingerprint_;  // of all that a saved sequence depends on
    const size_t                   max_waiting_;
    std::vector<SequenceState>     sequences_;
    int64_t                        n_seen_;  // decodes of the target when it was last processed
    mutable std::mutex             statistics_mutex_;
    mtpbatch_session_statistics    statistics_{};
};

// What of one row's logits can be picked; reused from row to row. Refers to the logits.
struct Candidates {
    const float *                 logits;
    int32_t                       n_vocab;
    bool                          waits;      // for the tokens before it to be picked; nothing below is known
    std::vector<llama_token_data> few;        // empty: the whole vocabulary
    bool                          sorted;     // by descending logit
    size_t                        n_applied;  // filters of the sampler that are done with
};

// How one request picks tokens from logits: always the very tokens that llama.cpp's chain of
// logit_bias, penalties, dry, top_k, typical, top_p, min_p, xtc, temp and dist picks from the whole
// vocabulary. A logit that is not a number counts as -inf, and typical does not see what has no
// probability at all.
class Sampler {
  public:
    explicit Sampler(const mtpbatch_sampling & params);
    float temperature() const { return temperature_; }  // 0: greedy
    // What of a row's logits can be picked at all. Any number of threads may call it at once. A row
    // that depends on the tokens picked before is left to pick().
    void preselect(const float * logits, int32_t n_vocab, Candidates & candidates) const;
    // Picks the next token of the answer, and advances the random state.
    llama_token pick(Candidates & candidates);

  private:
    void        select(Candidates & candidates) const;
    llama_token draw(Candidates & candidates);

    Edits                       edits_;
    int32_t                     top_k_;
    float                       typical_p_;
    float                       top_p_;
    float                       min_p_;
    float                       temperature_ = 0;
    std::vector<SamplerPointer> chain_;  // empty: greedy
};

// The first of the greatest values.
int32_t argmax(const float * values, int32_t n);
// Probability of the best of n logits under their softmax at a temperature.
float probability_of(int32_t best, const float * logits, int32_t n, float temperature = 1);

}  // namespace mtpbatch

struct mtpbatch_model {
    std::shared_ptr<mtpbatch::Model> impl;
};
struct mtpbatch_context {
    std::shared_ptr<mtpbatch::Context> impl;
};
struct mtpbatch_session {
    std::shared_ptr<mtpbatch::Session> impl;
};
