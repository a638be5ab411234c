// What native calls alone allow in a closed loop: prompts prefilled one at a time, then all
// sequences in lockstep, with fused drafts and greedy verification. No scheduler, no queue, no
// text, no Python. benchmarks/native_ideal.py compiles and runs it; one line of JSON comes out.
//
//     native_ideal MODEL N_SEQ DEPTH unified|split THREADS N_CTX TOKENS WAVES PROMPT...
//
// A wave is one request on each sequence. Request r has prompt r modulo the number of prompts.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "llama_private.h"

namespace {

constexpr int32_t N_WARM_UP = 8;  // tokens of the wave that is not timed

[[noreturn]] void fail(const std::string & what) {
    std::fprintf(stderr, "native_ideal: %s\n", what.c_str());
    std::exit(1);
}

void print_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) {
        std::fputs(text, stderr);
    }
}

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// In two passes, of which the compiler makes vector code.
llama_token argmax(const float * logits, int32_t n) {
    float best = logits[0];
    for (int32_t i = 1; i < n; ++i) {
        best = logits[i] > best ? logits[i] : best;
    }
    return static_cast<llama_token>(std::find(logits, logits + n, best) - logits);
}

struct Options {
    const char *              model;
    int32_t                   n_seq;
    int32_t                   depth;
    bool                      unified;
    int32_t                   threads;
    int32_t                   n_ctx;  // of each sequence
    int32_t                   tokens;
    int32_t                   waves;
    std::vector<const char *> prompts;
};

struct Totals {
    int64_t tokens = 0, drafted = 0, accepted = 0;
    double  prefill_s = 0, draft_s = 0, target_s = 0, total_s = 0;
};

struct Sequence {
    llama_seq_id id;
    int32_t      n_past;  // positions the target has decoded
    int32_t      n_generated;
    // What the draft context has not seen: tokens up to the one sampled last, which stands at
    // position n_past, and for each the target's hidden row of the position before it.
    std::vector<llama_token> fresh;
    std::vector<float>       hidden;
    std::vector<llama_token> draft;
    int32_t                  row;         // of the batch being decoded: its first, or its only output
    std::vector<float>       own_hidden;  // the MTP head's, from which it drafts deeper
};

class Decoder {
  public:
    Decoder(llama_model * model, const llama_context_params & params, bool keep_hidden)
        : context_(llama_init_from_model(model, params)), n_embd_(static_cast<size_t>(llama_model_n_embd_out(model))) {
        if (!context_) {
            fail("a context could not be created");
        }
        batch_ = llama_batch_ext_init(context_);
        llama_set_embeddings_nextn(context_, keep_hidden, /*masked*/ false);
    }

    ~Decoder() {
        llama_batch_ext_free(batch_);
        llama_free(context_);
    }

    Decoder(const Decoder &)             = delete;
    Decoder & operator=(const Decoder &) = delete;

    llama_context * context() const { return context_; }

    int32_t add(llama_seq_id seq_id, llama_pos position, llama_token token, bool output,
                const float * hidden = nullptr) {
        const int32_t row = llama_batch_ext_add_token(batch_, seq_id, token);
        bool          ok  = row >= 0 && llama_batch_ext_set_pos(batch_, row, &position) &&
                            llama_batch_ext_set_output_logits(batch_, row, output);
        if (ok && hidden) {
            ok = llama_batch_ext_set_embd_token(batch_, row, { hidden, 1, n_embd_ });
        }
        if (!ok) {
            fail("a batch row was refused");
        }
        return row;
    }

    // Decodes what was added and starts the next batch; returns the seconds it took.
    double decode() {
        const double  begin = seconds();
        const int32_t rc    = llama_process(context_, LLAMA_PROCESS_TYPE_DECODE, batch_);
        if (rc != 0) {
            fail("decode failed with code " + std::to_string(rc));
        }
        llama_synchronize(context_);
        llama_batch_ext_clear(batch_);
        return seconds() - begin;
    }

    const float * logits(int32_t row) const { return llama_get_logits_ith(context_, row); }

    // Appends the hidden row to `rows`.
    void copy_hidden(int32_t row, std::vector<float> & rows) const {
        const float * values = llama_get_embeddings_nextn_ith(context_, row);
        if (!values) {
            fail("no hidden row");
        }
        rows.insert(rows.end(), values, values + n_embd_);
    }

    void truncate(llama_seq_id seq_id, llama_pos length) {
        if (!llama_memory_seq_rm(llama_get_memory(context_), seq_id, length, -1)) {
            fail("positions could not be taken back");
        }
    }

    size_t n_embd() const { return n_embd_; }

  private:
    llama_context *   context_;
    llama_batch_ext * batch_ = nullptr;
    size_t            n_embd_;
};

std::vector<llama_token> tokenize(const llama_vocab * vocab, const char * text) {
    const auto               length = static_cast<int32_t>(std::strlen(text));
    std::vector<llama_token> tokens(static_cast<size_t>(length) + 2);
    const int32_t            n = llama_tokenize(vocab, text, length, tokens.data(), length + 2,
                                                /*add_special*/ true, /*parse_special*/ true);
    if (n < 1) {
        fail("a prompt could not be tokenised");
    }
    tokens.resize(static_cast<size_t>(n));
    return tokens;
}

class ClosedLoop {
  public:
    ClosedLoop(Decoder & target, Decoder * draft, const Options & options)
        : target_(target),
          draft_(draft),
          depth_(draft ? options.depth : 0),
          n_vocab_(llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(target.context())))),
          sequences_(static_cast<size_t>(options.n_seq)) {}

    void wave(const std::vector<std::vector<llama_token>> & prompts, size_t first_request, int32_t tokens) {
        const double            begin = seconds();
        std::vector<Sequence *> active;
        for (size_t i = 0; i < sequences_.size(); ++i) {
            Sequence & s = sequences_[i];
            s            = {};
            s.id         = static_cast<llama_seq_id>(i);
            prefill(s, prompts[(first_request + i) % prompts.size()]);
            active.push_back(&s);
        }
        totals.prefill_s += seconds() - begin;
        while (true) {
            active.erase(std::remove_if(active.begin(), active.end(),
                                        [&](const Sequence * s) { return s->n_generated == tokens; }),
                         active.end());
            if (active.empty()) {
                break;
            }
            if (depth_ > 0) {
                draft(active, tokens);
            }
            verify(active);
        }
        totals.tokens += static_cast<int64_t>(sequences_.size()) * tokens;
        totals.total_s += seconds() - begin;
    }

    Totals totals;

  private:
    void prefill(Sequence & s, const std::vector<llama_token> & prompt) {
        target_.truncate(s.id, 0);
        if (draft_) {
            draft_->truncate(s.id, 0);
        }
        const auto n_prompt = static_cast<int32_t>(prompt.size());
        for (int32_t i = 0; i < n_prompt; ++i) {
            target_.add(s.id, i, prompt[static_cast<size_t>(i)], i == n_prompt - 1);
        }
        target_.decode();
        // The first draft decode takes the prompt in: before its first token there is no hidden row.
        if (draft_) {
            s.fresh = prompt;
            s.hidden.assign(target_.n_embd(), 0);
            for (int32_t i = 0; i < n_prompt; ++i) {
                target_.copy_hidden(i, s.hidden);
            }
        }
        s.n_past = n_prompt;
        s.fresh.push_back(argmax(target_.logits(n_prompt - 1), n_vocab_));
        s.n_generated = 1;
    }

    // One decode of the draft context per depth; the first takes in all that is fresh.
    void draft(const std::vector<Sequence *> & active, int32_t tokens) {
        // A step gives one token more than were drafted.
        const auto limit = [&](const Sequence & s) { return std::min(depth_, tokens - s.n_generated - 1); };
        std::vector<Sequence *> drafting;
        for (Sequence * s : active) {
            s->draft.clear();
            if (limit(*s) > 0) {
                const size_t    n     = s->fresh.size();
                const llama_pos first = s->n_past + 1 - static_cast<int32_t>(n);
                for (size_t i = 0; i < n; ++i) {
                    s->row = draft_->add(s->id, first + static_cast<int32_t>(i), s->fresh[i], i == n - 1,
                                         s->hidden.data() + i * draft_->n_embd());
                }
                drafting.push_back(s);
            }
        }
        const std::vector<Sequence *> all = drafting;
        while (!drafting.empty()) {
            totals.draft_s += draft_->decode();
            std::vector<Sequence *> deeper;
            for (Sequence * s : drafting) {
                s->draft.push_back(argmax(draft_->logits(s->row), n_vocab_));
                if (static_cast<int32_t>(s->draft.size()) < limit(*s)) {
                    s->own_hidden.clear();
                    draft_->copy_hidden(s->row, s->own_hidden);
                    deeper.push_back(s);
                }
            }
            for (Sequence * s : deeper) {
                s->row = draft_->add(s->id, s->n_past + static_cast<int32_t>(s->draft.size()), s->draft.back(), true,
                                     s->own_hidden.data());
            }
            drafting.swap(deeper);
        }
        for (Sequence * s : all) {
            // Beyond the sampled token stand the head's own hidden rows, not the target's.
            draft_->truncate(s->id, s->n_past + 1);
        }
    }

    void verify(std::vector<Sequence *> & active) {
        // Models that keep recurrent state decode equally long sequences together: ascending
        // lengths need the fewest passes.
        std::stable_sort(active.begin(), active.end(),
                         [](const Sequence * a, const Sequence * b) { return a->draft.size() < b->draft.size(); });
        for (Sequence * s : active) {
            s->row = target_.add(s->id, s->n_past, s->fresh.back(), true);
            for (size_t k = 0; k < s->draft.size(); ++k) {
                target_.add(s->id, s->n_past + 1 + static_cast<int32_t>(k), s->draft[k], true);
            }
        }
        totals.target_s += target_.decode();
        for (Sequence * s : active) {
            const auto n_drafted = static_cast<int32_t>(s->draft.size());
            int32_t    n         = 0;  // tokens gained
            s->fresh.clear();
            s->hidden.clear();
            for (bool hit = true; hit; ++n) {
                const llama_token token = argmax(target_.logits(s->row + n), n_vocab_);
                hit                     = n < n_drafted && s->draft[static_cast<size_t>(n)] == token;
                s->fresh.push_back(token);
                if (draft_) {
                    target_.copy_hidden(s->row + n, s->hidden);
                }
            }
            s->n_past += n;
            s->n_generated += n;
            totals.drafted += n_drafted;
            totals.accepted += n - 1;
            if (n <= n_drafted) {
                target_.truncate(s->id, s->n_past);
            }
        }
    }

    Decoder &             target_;
    Decoder *             draft_;
    const int32_t         depth_;
    const int32_t         n_vocab_;
    std::vector<Sequence> sequences_;
};

Options parse(int argc, char ** argv) {
    if (argc < 10) {
        fail("usage: native_ideal MODEL N_SEQ DEPTH unified|split THREADS N_CTX TOKENS WAVES PROMPT...");
    }
    return { argv[1],
             std::atoi(argv[2]),
             std::atoi(argv[3]),
             std::strcmp(argv[4], "unified") == 0,
             std::atoi(argv[5]),
             std::atoi(argv[6]),
             std::atoi(argv[7]),
             std::atoi(argv[8]),
             { argv + 9, argv + argc } };
}

void run(llama_model * model, const Options & options) {
    std::vector<std::vector<llama_token>> prompts;
    size_t                                longest = 0;
    for (const char * text : options.prompts) {
        prompts.push_back(tokenize(llama_model_get_vocab(model), text));
        longest = std::max(longest, prompts.back().size());
    }
    if (static_cast<int32_t>(longest) + options.tokens > options.n_ctx) {
        fail("prompt and tokens exceed n_ctx");
    }

    auto params            = llama_context_default_params();
    params.n_ctx           = static_cast<uint32_t>(options.n_seq * options.n_ctx);
    params.n_seq_max       = static_cast<uint32_t>(options.n_seq);
    params.n_rs_seq        = static_cast<uint32_t>(options.depth);
    params.n_outputs_max   = static_cast<uint32_t>(options.n_seq * (1 + options.depth));
    params.n_threads       = options.threads;
    params.n_threads_batch = options.threads;
    params.kv_unified      = options.unified;
    // The first draft decode takes in all prompts at once.
    params.n_batch = std::max<uint32_t>(params.n_batch, params.n_seq_max * (static_cast<uint32_t>(longest) + 1));
    Decoder target(model, params, /*keep_hidden*/ options.depth > 0);

    std::optional<Decoder> draft;
    if (options.depth > 0) {
        params.ctx_type      = LLAMA_CONTEXT_TYPE_MTP;
        params.ctx_other     = target.context();
        params.n_rs_seq      = 0;
        params.n_outputs_max = params.n_seq_max;
        draft.emplace(model, params, /*keep_hidden*/ true);
    }

    ClosedLoop loop(target, draft ? &*draft : nullptr, options);
    loop.wave(prompts, 0, std::min(options.tokens, N_WARM_UP));
    loop.totals = {};
    for (int32_t wave = 0; wave < options.waves; ++wave) {
        loop.wave(prompts, static_cast<size_t>(wave) * static_cast<size_t>(options.n_seq), options.tokens);
    }
    const Totals & t = loop.totals;
    std::printf(
        "{\"tokens\": %lld, \"drafted\": %lld, \"accepted\": %lld, \"seconds\": %.6f, \"prefill_seconds\": %.6f, "
        "\"draft_seconds\": %.6f, \"target_seconds\": %.6f}\n",
        static_cast<long long>(t.tokens), static_cast<long long>(t.drafted), static_cast<long long>(t.accepted),
        t.total_s, t.prefill_s, t.draft_s, t.target_s);
}

}  // namespace

int main(int argc, char ** argv) {
    const Options options = parse(argc, argv);
    llama_log_set(print_errors, nullptr);
    llama_backend_init();
    auto params     = llama_model_default_params();
    params.load_mtp = options.depth > 0;

    llama_model * model = llama_model_load_from_file(options.model, params);
    if (!model) {
        fail("the model could not be loaded");
    }
    run(model, options);
    llama_model_free(model);
    return 0;
}
