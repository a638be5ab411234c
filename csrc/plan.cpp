// What a plan may say.
#include "plan.hpp"

#include <algorithm>

namespace mtpbatch {

namespace {

// `otherwise` says in words what is wrong; it is asked for only then.
template <typename Words>
void require(bool rule, Words && otherwise) {
    if (!rule) {
        throw Error(MTPBATCH_INVALID_ARGUMENT, "plan: " + std::string(otherwise()));
    }
}

}  // namespace

Plan::Plan(const mtpbatch_plan & given)
    : number(given.number),
      release(given.release, given.release + given.n_release),
      terms(given.terms ? std::optional(*given.terms) : std::nullopt),
      run_ahead(given.run_ahead),
      followed(given.followed) {
    admit.reserve(static_cast<size_t>(given.n_admit));
    for (int32_t i = 0; i < given.n_admit; ++i) {
        const auto & a = given.admit[i];
        StopTexts    texts;
        for (int32_t j = 0; j < a.n_stop_texts; ++j) {
            texts.add({ a.stop_texts[j].bytes, static_cast<size_t>(a.stop_texts[j].n_bytes) });
        }
        admit.push_back({
            a.seq_id,
            Sampler(a.sampling),
            { a.stop_tokens, a.stop_tokens + a.n_stop },
            std::move(texts),
            a.max_tokens,
            a.drafts,
            a.ticket,
        });
    }
    entries.reserve(static_cast<size_t>(given.n_entries));
    for (int32_t i = 0; i < given.n_entries; ++i) {
        const auto & e = given.entries[i];
        entries.push_back(
            { e.seq_id, { e.tokens, e.tokens + e.n_tokens }, e.sample, e.n_draft, e.selective, e.expected });
    }
}

PlanRules::PlanRules(const Context & target, const Session * session)
    : params_(target.params()),
      n_vocab_(target.model().n_vocab()),
      n_draft_max_(session ? session->config().n_draft_max : 0),
      known_(static_cast<size_t>(params_.n_seq)) {}

void PlanRules::accept(const mtpbatch_plan & plan) {
    std::vector<Known> known = known_;
    const auto         find  = [&](llama_seq_id seq_id) -> Known & {
        require(seq_id >= 0 && seq_id < params_.n_seq, [&] { return "there is no " + sequence_name(seq_id); });
        return known[static_cast<size_t>(seq_id)];
    };

    require(plan.run_ahead >= 0, [&] { return "run_ahead is negative"; });
    for (int32_t i = 0; i < plan.n_release; ++i) {
        Known & s = find(plan.release[i]);
        require(s.active, [&] { return sequence_name(plan.release[i]) + " is released but not active"; });
        s = {};
    }
    for (int32_t i = 0; i < plan.n_admit; ++i) {
        const auto & a = plan.admit[i];
        Known &      s = find(a.seq_id);
        require(!s.active, [&] { return sequence_name(a.seq_id) + " is admitted but active"; });
        require(a.max_tokens >= 1, [&] { return sequence_name(a.seq_id) + " may generate no token"; });
        for (int32_t j = 0; j < a.n_stop_texts; ++j) {
            require(a.stop_texts[j].n_bytes > 0, [&] { return sequence_name(a.seq_id) + " has an empty stop text"; });
        }
        s.active     = true;
        s.drafts     = a.drafts;
        s.max_tokens = a.max_tokens;
    }

    std::vector<bool> planned(known.size());
    int64_t           n_rows = 0, n_outputs = 0;  // of the plan's first step
    int64_t           n_repeated = 0;             // rows of its further steps, all of them outputs
    for (int32_t i = 0; i < plan.n_entries; ++i) {
        const auto & e   = plan.entries[i];
        Known &      s   = find(e.seq_id);
        const auto   who = [&] { return sequence_name(e.seq_id); };
        require(s.active, [&] { return who() + " is not active"; });
        require(!planned[static_cast<size_t>(e.seq_id)], [&] { return who() + " is planned twice"; });
        planned[static_cast<size_t>(e.seq_id)] = true;
        const bool decodes                     = s.complete;
        require(e.n_tokens >= 0 && decodes == (e.n_tokens == 0),
                [&] { return who() + (decodes ? " has its whole prompt already" : " needs tokens of its prompt"); });
        require(e.sample || !decodes, [&] { return who() + " must sample"; });
        for (int32_t j = 0; j < e.n_tokens; ++j) {
            require(e.tokens[j] >= 0 && e.tokens[j] < n_vocab_,
                    [&] { return "no such token: " + std::to_string(e.tokens[j]); });
        }
        require(e.n_draft >= 0 && e.n_draft <= (s.drafts ? n_draft_max_ : 0),
                [&] { return who() + " cannot draft " + std::to_string(e.n_draft) + " tokens"; });
        require(!e.selective || plan.terms, [&] { return who() + " is selective, but there are no terms"; });
        // The token sampled last is never decoded.
        const int64_t n_needed = int64_t{ s.n_prompt } + e.n_tokens + (e.sample && !decodes ? s.max_tokens - 1 : 0);
        require(n_needed <= params_.n_ctx,
                [&] { return who() + " would outgrow n_ctx=" + std::to_string(params_.n_ctx); });
        s.n_prompt += e.n_tokens;
        s.complete = e.sample;
        n_rows += decodes ? 1 + e.n_draft : e.n_tokens;
        n_outputs += decodes ? 1 + e.n_draft : e.sample;
        n_repeated += e.sample && plan.run_ahead > 0 ? 1 + e.n_draft : 0;
    }
    for (int32_t i = 0; i < plan.n_admit; ++i) {
        // Else an entry of the plan before, not begun yet, would be taken for the new request's.
        const llama_seq_id seq_id = plan.admit[i].seq_id;
        require(planned[static_cast<size_t>(seq_id)],
                [&] { return sequence_name(seq_id) + " is admitted without an entry"; });
    }
    n_rows    = std::max(n_rows, n_repeated);
    n_outputs = std::max(n_outputs, n_repeated);
    require(n_rows <= params_.n_batch && n_outputs <= params_.n_outputs_max, [&] {
        return std::to_string(n_rows) + " rows, " + std::to_string(n_outputs) +
               " of them outputs, exceed n_batch=" + std::to_string(params_.n_batch) +
               " or n_outputs_max=" + std::to_string(params_.n_outputs_max);
    });
    known_.swap(known);
}

}  // namespace mtpbatch
