// Drafting with a model's MTP head.
#include "internal.hpp"

#include <algorithm>
#include <numeric>

namespace mtpbatch {

namespace {

// Pairs a sequence may keep waiting. More are decoded in one go, so that memory stays bounded and
// a sequence that starts to draft never has far to catch up.
constexpr int32_t MAX_WAITING = 256;

std::string name(llama_seq_id seq_id) {
    return "sequence " + std::to_string(seq_id);
}

const mtpbatch_session_config & checked(const mtpbatch_session_config & config, const Context & target,
                                        const Context & draft) {
    const auto config_error   = [](const std::string & text) { throw Error(MTPBATCH_SESSION_CONFIG, text); };
    const auto contexts_error = [](const std::string & text) { throw Error(MTPBATCH_SESSION_CONTEXTS, text); };
    if (config.n_draft_max < 1 || config.n_draft_max > MTPBATCH_MAX_DRAFT) {
        config_error("n_draft_max must be from 1 to " + std::to_string(MTPBATCH_MAX_DRAFT) + ", got " +
                     std::to_string(config.n_draft_max));
    }
    if (config.n_min < 0 || config.n_min > config.n_draft_max) {
        config_error("n_min must be from 0 to n_draft_max=" + std::to_string(config.n_draft_max) + ", got " +
                     std::to_string(config.n_min));
    }
    if (!(config.p_min >= 0 && config.p_min <= 1)) {
        config_error("p_min must be from 0 to 1, got " + std::to_string(config.p_min));
    }
    if (config.n_seq < 1) {
        config_error("n_seq must be at least 1, got " + std::to_string(config.n_seq));
    }
    if (target.is_mtp()) {
        contexts_error("the target is an MTP context; it must be a default one");
    }
    if (!draft.is_mtp()) {
        contexts_error("the draft context is a default one; it must be an MTP context made for the target");
    }
    if (draft.target() != &target) {
        contexts_error("the draft context was made for another target context");
    }
    if (draft.claimed) {
        contexts_error("the draft context belongs to another session; close that one, or make another context");
    }
    if (config.n_seq != target.params().n_seq) {
        contexts_error("n_seq=" + std::to_string(config.n_seq) +
                       " differs from the contexts' n_seq=" + std::to_string(target.params().n_seq));
    }
    if (target.model().keeps_recurrent_state() && target.params().n_rs_seq < config.n_draft_max) {
        contexts_error("the model keeps recurrent state, so that the target needs n_rs_seq of at least n_draft_max=" +
                       std::to_string(config.n_draft_max) + "; it has " + std::to_string(target.params().n_rs_seq));
    }
    const int32_t n_heads = llama_model_n_layer_nextn(target.model().raw);
    if (n_heads > 1) {
        throw Error(MTPBATCH_SESSION_INIT, "the model chains " + std::to_string(n_heads) +
                                               " MTP heads; only models that reuse one head are supported");
    }
    return config;
}

}  // namespace

Session::Session(std::shared_ptr<Context> target, std::shared_ptr<Context> draft,
                 const mtpbatch_session_config & config)
    : target_(std::move(target)),
      draft_(std::move(draft)),
      config_(checked(config, *target_, *draft_)),
      n_embd_(llama_model_n_embd_out(target_->model().raw)),
      sequences_(config.n_seq),
      n_seen_(target_->n_decodes()) {
    for (llama_seq_id s = 0; s < config_.n_seq; ++s) {
        if (target_->length(s) > 0) {
            throw Error(MTPBATCH_SESSION_SEQUENCE, name(s) + " of the target has decoded tokens that this session " +
                                                       "did not see: make the session first, or truncate it to 0");
        }
        sequences_[s].hidden.assign(n_embd_, 0);
    }
    target_->keep_hidden();
    draft_->claimed = true;
}

Session::SequenceState & Session::sequence(llama_seq_id seq_id) {
    if (seq_id < 0 || seq_id >= config_.n_seq) {
        throw Error(MTPBATCH_SESSION_SEQUENCE,
                    "no such sequence: " + std::to_string(seq_id) + " of n_seq=" + std::to_string(config_.n_seq));
    }
    return sequences_[seq_id];
}

void Session::reset(llama_seq_id seq_id) {
    auto & s = sequence(seq_id);
    draft_->truncate(seq_id, 0);
    s = {};
    s.hidden.assign(n_embd_, 0);
}

void Session::begin(llama_seq_id seq_id, int32_t n_prompt) {
    const auto & s = sequence(seq_id);
    if (s.n_past != n_prompt) {
        throw Error(MTPBATCH_SESSION_SEQUENCE,
                    name(seq_id) + ": the prompt has " + std::to_string(n_prompt) + " tokens, but the session has " +
                        "taken in " + std::to_string(s.n_past) + "; call process() after every decode of the target");
    }
}

void Session::process() {
    Stopwatch    watch;
    const auto & rows = target_->last_batch();
    if (rows.empty()) {
        throw Error(MTPBATCH_SESSION_PROCESS, "the target has decoded nothing since its last failure");
    }
    if (n_seen_ == target_->n_decodes()) {
        throw Error(MTPBATCH_SESSION_PROCESS,
                    "the batch was processed already, or decoded before this session was made");
    }
    // Check every sequence before any of them changes.
    for (size_t i = 0; i < rows.size(); ++i) {
        if (i > 0 && rows[i - 1].seq_id == rows[i].seq_id) {
            continue;
        }
        const auto & s = sequences_[rows[i].seq_id];
        if (rows[i].position != 0 && rows[i].position != s.n_past) {
            throw Error(MTPBATCH_SESSION_PROCESS,
                        name(rows[i].seq_id) + " goes on at position " + std::to_string(rows[i].position) +
                            ", but the session has taken in " + std::to_string(s.n_past) +
                            ": every decode of the target must be processed, once, and what was rejected " +
                            "truncated to what was accepted");
        }
        if (s.n_drafted > 0 && s.n_verified > 0 && rows[i].position != 0) {
            throw Error(MTPBATCH_SESSION_PROCESS,
                        name(rows[i].seq_id) + " waits for accept() of its last draft; call it before the next decode");
        }
    }

    n_seen_ = target_->n_decodes();
    std::vector<llama_seq_id> full;
    for (size_t begin = 0, end; begin < rows.size(); begin = end) {
        const llama_seq_id seq_id = rows[begin].seq_id;
        for (end = begin + 1; end < rows.size() && rows[end].seq_id == seq_id; ++end) {
        }
        if (rows[begin].position == 0) {
            reset(seq_id);  // a new generation on a used sequence
        }
        auto & s = sequences_[seq_id];
        if (s.drafted_from >= 0 && s.drafted_from != rows[begin].token) {
            // Drafted from one token, decoded another: that position must be decoded again.
            draft_->truncate(seq_id, s.n_past);
        }
        s.drafted_from = -1;
        for (size_t i = begin; i < end; ++i) {
            // A draft has decoded its first token already.
            if (rows[i].position >= draft_->length(seq_id)) {
                const float * hidden = i == begin ? s.hidden.data() : target_->hidden(static_cast<int32_t>(i) - 1);
                s.waiting.push_back(rows[i].token);
                s.waiting_hidden.insert(s.waiting_hidden.end(), hidden, hidden + n_embd_);
            }
        }
        const float * last = target_->hidden(static_cast<int32_t>(end) - 1);
        s.hidden.assign(last, last + n_embd_);
        s.n_past     = rows[end - 1].position + 1;
        s.n_verified = s.n_drafted > 0 ? static_cast<int32_t>(end - begin) : 0;
        if (s.n_verified == 0 && s.waiting.size() > MAX_WAITING) {
            full.push_back(seq_id);
        }
    }
    catch_up(full);
    statistics.process_us += watch.lap();
}

// Decodes what waits in these sequences. If that fails it waits on.
void Session::catch_up(const std::vector<llama_seq_id> & seq_ids) try {
    std::vector<Row> rows;
    for (const llama_seq_id seq_id : seq_ids) {
        const auto &  s     = sequences_[seq_id];
        const int32_t first = s.n_past - static_cast<int32_t>(s.waiting.size());
        for (size_t i = 0; i < s.waiting.size(); ++i) {
            if (static_cast<int32_t>(rows.size()) == draft_->params().n_batch) {
                decode(rows);
                rows.clear();
            }
            rows.push_back({ s.waiting[i], first + static_cast<llama_pos>(i), seq_id, false,
                             s.waiting_hidden.data() + i * n_embd_ });
        }
    }
    if (!rows.empty()) {
        decode(rows);
    }
    for (const llama_seq_id seq_id : seq_ids) {
        auto & s = sequences_[seq_id];
        s.waiting.clear();
        s.waiting_hidden.clear();
    }
} catch (...) {
    for (const llama_seq_id seq_id : seq_ids) {
        const auto & s = sequences_[seq_id];
        draft_->truncate(seq_id, s.n_past - static_cast<int32_t>(s.waiting.size()));
    }
    throw;
}

void Session::decode(const std::vector<Row> & rows) {
    draft_->decode(rows);
    statistics.n_decodes += 1;
    statistics.n_rows += static_cast<int64_t>(rows.size());
}

void Session::draft(std::vector<Request> requests, std::vector<std::vector<llama_token>> & drafts) {
    Stopwatch         watch;
    std::vector<bool> seen(sequences_.size());
    for (auto & request : requests) {
        const auto & s = sequence(request.seq_id);
        if (seen[request.seq_id]) {
            throw Error(MTPBATCH_SESSION_DRAFT, name(request.seq_id) + " is asked for twice");
        }
        seen[request.seq_id] = true;
        if (s.n_drafted > 0) {
            throw Error(MTPBATCH_SESSION_DRAFT, name(request.seq_id) + " has a draft that waits for " +
                                                    (s.n_verified > 0 ? "accept()" : "process() and accept()"));
        }
        if (request.n_past != s.n_past || s.n_past == 0) {
            throw Error(MTPBATCH_SESSION_SEQUENCE, name(request.seq_id) + " has taken in " + std::to_string(s.n_past) +
                                                       " positions, but n_past is " + std::to_string(request.n_past));
        }
        if (!target_->model().has_token(request.last_token)) {
            throw Error(MTPBATCH_SESSION_DRAFT, "no such token: " + std::to_string(request.last_token));
        }
        if (request.depth < 0 || request.depth > config_.n_draft_max) {
            throw Error(MTPBATCH_SESSION_DRAFT,
                        "depth must be from 0 to n_draft_max=" + std::to_string(config_.n_draft_max) + ", got " +
                            std::to_string(request.depth));
        }
        // The target has to decode the last token and the draft.
        request.depth = std::max(0, std::min(request.depth, target_->params().n_ctx - request.n_past - 1));
    }

    const int32_t n_vocab = target_->model().n_vocab();
    drafts.assign(requests.size(), {});
    std::vector<Row>                        rows;
    std::vector<size_t>                     drafting;                // requests that go one token deeper
    std::vector<std::vector<float>>         chain(requests.size());  // the hidden row each of them goes on from
    std::vector<std::pair<size_t, int32_t>> outputs;                 // request, row of the batch being filled

    // Decodes `rows` and picks one token for each of its outputs.
    const auto flush = [&] {
        decode(rows);
        for (const auto & [r, row] : outputs) {
            const float *     logits = draft_->logits(row);
            const llama_token token  = argmax(logits, n_vocab);
            if (config_.p_min > 0 && probability_of(token, logits, n_vocab) < config_.p_min) {
                continue;
            }
            drafts[r].push_back(token);
            if (static_cast<int32_t>(drafts[r].size()) < requests[r].depth) {
                const float * hidden = draft_->hidden(row);
                chain[r].assign(hidden, hidden + n_embd_);
                drafting.push_back(r);
            }
        }
        rows.clear();
        outputs.clear();
    };
    const auto add = [&](size_t r, llama_token token, llama_pos position, const float * hidden, bool output) {
        if (static_cast<int32_t>(rows.size()) == draft_->params().n_batch) {
            flush();
        }
        if (output) {
            outputs.emplace_back(r, static_cast<int32_t>(rows.size()));
        }
        rows.push_back({ token, position, requests[r].seq_id, output, hidden });
    };

    try {
        // The first batch: all that waits, then the newly sampled token.
        for (size_t r = 0; r < requests.size(); ++r) {
            if (requests[r].depth == 0) {
                continue;
            }
            const auto & s = sequences_[requests[r].seq_id];
            if (s.drafted_from >= 0) {
                // It was drafted from before, and nothing came of it.
                draft_->truncate(requests[r].seq_id, s.n_past);
            }
            const int32_t first = s.n_past - static_cast<int32_t>(s.waiting.size());
            for (size_t i = 0; i < s.waiting.size(); ++i) {
                add(r, s.waiting[i], first + static_cast<llama_pos>(i), s.waiting_hidden.data() + i * n_embd_, false);
            }
            add(r, requests[r].last_token, s.n_past, s.hidden.data(), true);
        }
        for (int32_t depth = 1; !rows.empty(); ++depth) {
            flush();
            std::vector<size_t> deeper;
            deeper.swap(drafting);
            for (const size_t r : deeper) {
                add(r, drafts[r].back(), requests[r].n_past + depth, chain[r].data(), true);
            }
        }
    } catch (...) {
        for (const auto & request : requests) {
            auto & s = sequences_[request.seq_id];
            draft_->truncate(request.seq_id, s.n_past - static_cast<int32_t>(s.waiting.size()));
            s.drafted_from = -1;
        }
        drafts.assign(requests.size(), {});
        throw;
    }

    for (size_t r = 0; r < requests.size(); ++r) {
        if (requests[r].depth == 0) {
            continue;
        }
        auto & s = sequences_[requests[r].seq_id];
        s.waiting.clear();
        s.waiting_hidden.clear();
        // Positions beyond the first token hold the head's own hidden rows, not the target's.
        draft_->truncate(requests[r].seq_id, s.n_past + 1);
        s.drafted_from = requests[r].last_token;
        if (static_cast<int32_t>(drafts[r].size()) < config_.n_min) {
            drafts[r].clear();
        }
        s.n_drafted  = static_cast<int32_t>(drafts[r].size());
        s.n_verified = 0;
        statistics.n_drafts += s.n_drafted > 0;
        statistics.n_drafted += s.n_drafted;
        for (int32_t d = 0; d < s.n_drafted; ++d) {
            statistics.drafted_by_depth[d] += 1;
        }
    }
    statistics.draft_us += watch.lap();
}

void Session::accept(llama_seq_id seq_id, int32_t n_accepted) {
    Stopwatch watch;
    auto &    s = sequence(seq_id);
    if (s.n_drafted == 0) {
        throw Error(MTPBATCH_SESSION_ACCEPT, name(seq_id) + " has no draft to accept from");
    }
    if (s.n_verified == 0) {
        throw Error(MTPBATCH_SESSION_ACCEPT, name(seq_id) + ": the draft was not verified; decode it with the target " +
                                                 "and call process() first");
    }
    const int32_t most = std::min(s.n_drafted, s.n_verified - 1);
    if (n_accepted < 0 || n_accepted > most) {
        throw Error(MTPBATCH_SESSION_ACCEPT, name(seq_id) + ": n_accepted must be from 0 to " + std::to_string(most) +
                                                 ", the drafted tokens that were verified; got " +
                                                 std::to_string(n_accepted));
    }
    const int32_t n_rejected = s.n_verified - 1 - n_accepted;
    if (n_rejected > 0) {
        // The first rejected token was to pair with the hidden row that now meets the sampled one.
        const size_t kept  = s.waiting.size() - n_rejected;
        const auto   first = s.waiting_hidden.begin() + static_cast<std::ptrdiff_t>(kept * n_embd_);
        s.hidden.assign(first, first + n_embd_);
        s.waiting.resize(kept);
        s.waiting_hidden.resize(kept * n_embd_);
        s.n_past -= n_rejected;
    }
    s.n_drafted  = 0;
    s.n_verified = 0;
    statistics.n_accepted += n_accepted;
    for (int32_t d = 0; d < n_accepted; ++d) {
        statistics.accepted_by_depth[d] += 1;
    }
    statistics.accept_us += watch.lap();
}

}  // namespace mtpbatch

using namespace mtpbatch;

mtpbatch_status mtpbatch_session_create(const mtpbatch_context * target, const mtpbatch_context * draft,
                                        const mtpbatch_session_config * config, mtpbatch_session ** session,
                                        mtpbatch_error * error) {
    return guard(error, [&] {
        *session = new mtpbatch_session{ std::make_shared<Session>(target->impl, draft->impl, *config) };
    });
}

void mtpbatch_session_free(mtpbatch_session * session) {
    delete session;
}

mtpbatch_status mtpbatch_session_begin(mtpbatch_session * session, int32_t seq_id, int32_t n_prompt,
                                       mtpbatch_error * error) {
    return guard(error, [&] { session->impl->begin(seq_id, n_prompt); });
}

mtpbatch_status mtpbatch_session_process(mtpbatch_session * session, const mtpbatch_batch * batch,
                                         mtpbatch_error * error) {
    return guard(error, [&] {
        const auto & decoded = session->impl->target().last_batch();
        bool         same    = batch->n_tokens == static_cast<int32_t>(decoded.size());
        for (int32_t i = 0; same && i < batch->n_tokens; ++i) {
            same = batch->tokens[i] == decoded[i].token && batch->positions[i] == decoded[i].position &&
                   batch->seq_ids[i] == decoded[i].seq_id;
        }
        if (!same) {
            throw Error(MTPBATCH_SESSION_PROCESS, "this is not the batch that the target decoded last");
        }
        session->impl->process();
    });
}

mtpbatch_status mtpbatch_session_draft(mtpbatch_session * session, int32_t n, const int32_t * seq_ids,
                                       const int32_t * n_past, const int32_t * last_tokens, const int32_t * depths,
                                       int32_t * drafts, int32_t * lengths, mtpbatch_error * error) {
    return guard(error, [&] {
        std::vector<Session::Request> requests;
        for (int32_t i = 0; i < n; ++i) {
            requests.push_back({ seq_ids[i], n_past[i], last_tokens[i], depths[i] });
        }
        std::vector<std::vector<llama_token>> results;
        session->impl->draft(requests, results);
        for (int32_t i = 0; i < n; ++i) {
            std::copy(results[i].begin(), results[i].end(), drafts + i * session->impl->config().n_draft_max);
            lengths[i] = static_cast<int32_t>(results[i].size());
        }
    });
}

mtpbatch_status mtpbatch_session_accept(mtpbatch_session * session, int32_t seq_id, int32_t n_accepted,
                                        mtpbatch_error * error) {
    return guard(error, [&] { session->impl->accept(seq_id, n_accepted); });
}

void mtpbatch_session_get_statistics(const mtpbatch_session * session, mtpbatch_session_statistics * statistics) {
    *statistics = session->impl->statistics;
}
