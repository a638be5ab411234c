// What a plan may say.
#include "plan.hpp"

#include <algorithm>
#include <cmath>

namespace mtpbatch {

namespace {

// `otherwise` says in words what is wrong; it is asked for only then.
template <typename Words>
void require(bool rule, Words && otherwise) {
    if (!rule) {
        throw Error(MTPBATCH_INVALID_ARGUMENT, "plan: " + std::string(otherwise()));
    }
}

bool is_chance(float value) {
    return value >= 0 && value <= 1;
}

}  // namespace

Plan::Plan(const mtpbatch_plan & given)
    : number(given.number),
      release(given.release, given.release + given.n_release),
      terms(given.terms ? std::optional(*given.terms) : std::nullopt),
      run_ahead(given.run_ahead),
      followed(given.followed),
      keep_prompts(given.keep_prompts),
      save(given.save, given.save + given.n_save),
      park(given.park, given.park + given.n_park),
      drop(given.drop, given.drop + given.n_drop),
      forget(given.forget, given.forget + given.n_forget),
      resume(given.resume, given.resume + given.n_resume) {
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
            a.sampling.min_tokens,
            a.max_tokens,
            a.drafts,
            a.ticket,
            a.snapshot,
            a.n_reused,
            a.n_logprobs,
            a.n_prompt_logprobs,
            a.grammar ? a.grammar->start->clone() : nullptr,
        });
    }
    entries.reserve(static_cast<size_t>(given.n_entries));
    for (int32_t i = 0; i < given.n_entries; ++i) {
        const auto & e = given.entries[i];
        entries.push_back({
            e.seq_id,
            { e.tokens, e.tokens + e.n_tokens },
            e.sample,
            e.n_draft,
            e.selective,
            e.expected,
            { e.scored, e.scored + e.n_scored },
        });
    }
}

PlanRules::PlanRules(const Context & target, const Session * session)
    : params_(target.params()),
      model_(&target.model()),
      n_vocab_(target.model().n_vocab()),
      n_draft_max_(session ? session->config().n_draft_max : 0),
      truncates_(!target.model().keeps_recurrent_state() && llama_model_n_swa(target.model().raw) == 0),
      known_(static_cast<size_t>(params_.n_seq)) {}

void PlanRules::accept(const mtpbatch_plan & plan) {
    require(plan.run_ahead >= 0, [&] { return "run_ahead is negative"; });
    std::vector<Known> known   = known_;
    const bool         changes = plan.n_save + plan.n_park + plan.n_drop + plan.n_forget + plan.n_resume > 0;
    Kept               changed;
    if (changes) {
        changed = kept_;
    }
    Kept & kept = changes ? changed : kept_;
    take_out(plan, known, kept);
    put_in(plan, known, kept);
    check_entries(plan, known);
    if (plan.terms) {
        check_terms(*plan.terms);
    }
    known_.swap(known);
    if (changes) {
        std::swap(kept_, changed);
    }
}

PlanRules::Known & PlanRules::find(std::vector<Known> & known, llama_seq_id seq_id) const {
    require(seq_id >= 0 && seq_id < params_.n_seq, [&] { return "there is no " + sequence_name(seq_id); });
    return known[static_cast<size_t>(seq_id)];
}

// Saves, parks, releases, drops and forgets.
void PlanRules::take_out(const mtpbatch_plan & plan, std::vector<Known> & known, Kept & kept) const {
    const auto add_snapshot = [&](int64_t number, const Known & s) {
        require(number != 0, [&] { return "0 is no snapshot's number"; });
        const bool added =
            kept.snapshots.emplace(number, KnownSnapshot{ s.drafts, s.n_prompt, s.complete ? s.n_most : s.n_prompt })
                .second;
        require(added, [&] { return "there is a snapshot " + std::to_string(number) + " already"; });
    };
    for (int32_t i = 0; i < plan.n_save; ++i) {
        const auto &  save = plan.save[i];
        const Known & s    = find(known, save.seq_id);
        require(s.active, [&] { return sequence_name(save.seq_id) + " is saved but not active"; });
        add_snapshot(save.snapshot, s);
    }
    for (int32_t i = 0; i < plan.n_park; ++i) {
        const auto & park = plan.park[i];
        Known &      s    = find(known, park.seq_id);
        require(s.active, [&] { return sequence_name(park.seq_id) + " is parked but not active"; });
        if (park.snapshot != 0) {
            add_snapshot(park.snapshot, s);
        }
        const bool added = kept.parked.emplace(s.ticket, KnownParked{ s, park.snapshot }).second;
        require(added, [&] { return "a request of ticket " + std::to_string(s.ticket) + " is parked already"; });
        s = {};
    }
    for (int32_t i = 0; i < plan.n_release; ++i) {
        Known & s = find(known, plan.release[i]);
        require(s.active, [&] { return sequence_name(plan.release[i]) + " is released but not active"; });
        s = {};
    }
    for (int32_t i = 0; i < plan.n_drop; ++i) {
        require(kept.snapshots.erase(plan.drop[i]) == 1,
                [&] { return "snapshot " + std::to_string(plan.drop[i]) + " is dropped, but there is none"; });
    }
    for (int32_t i = 0; i < plan.n_forget; ++i) {
        require(kept.parked.erase(plan.forget[i]) == 1, [&] {
            return "no request of ticket " + std::to_string(plan.forget[i]) + " is parked to be forgotten";
        });
    }
}

// Admits and resumes.
void PlanRules::put_in(const mtpbatch_plan & plan, std::vector<Known> & known, Kept & kept) const {
    const auto find_snapshot = [&](int64_t number) {
        const auto found = kept.snapshots.find(number);
        require(found != kept.snapshots.end(), [&] { return "there is no snapshot " + std::to_string(number); });
        return found->second;
    };
    for (int32_t i = 0; i < plan.n_admit; ++i) {
        const auto & a   = plan.admit[i];
        Known &      s   = find(known, a.seq_id);
        const auto   who = [&] { return sequence_name(a.seq_id); };
        require(!s.active, [&] { return who() + " is admitted but active"; });
        require(a.max_tokens >= 1, [&] { return who() + " may generate no token"; });
        require(a.sampling.min_tokens >= 0, [&] { return who() + " must generate a negative number of tokens"; });
        for (int32_t j = 0; j < a.sampling.n_banned; ++j) {
            require(a.sampling.banned[j].n > 0, [&] { return who() + " bans no token"; });
        }
        for (int32_t j = 0; j < a.n_stop_texts; ++j) {
            require(a.stop_texts[j].n_bytes > 0, [&] { return who() + " has an empty stop text"; });
        }
        for (const int32_t n : { a.n_logprobs, a.n_prompt_logprobs }) {
            require(n >= -1 && n <= MTPBATCH_MAX_LOGPROBS,
                    [&] { return who() + " asks for " + std::to_string(n) + " most probable tokens"; });
        }
        require(!a.grammar || &a.grammar->start->model() == model_,
                [&] { return who() + " has a grammar that was compiled for another model"; });
        if (a.snapshot == 0) {
            require(a.n_reused == 0, [&] { return who() + " reuses tokens of no snapshot"; });
        } else {
            const KnownSnapshot snapshot = find_snapshot(a.snapshot);
            require(a.n_reused >= 1 && a.n_reused <= snapshot.most, [&] {
                return who() + " reuses " + std::to_string(a.n_reused) + " tokens of a snapshot that has at most " +
                       std::to_string(snapshot.most);
            });
            require(truncates_ || a.n_reused >= snapshot.least, [&] {
                return who() + " reuses " + std::to_string(a.n_reused) + " tokens of a snapshot that has " +
                       std::to_string(snapshot.least) + " or more, and the model cannot cut it";
            });
            require(!a.drafts || snapshot.drafts || n_draft_max_ == 0,
                    [&] { return who() + " drafts, but starts from a snapshot of a request that never did"; });
        }
        s            = {};
        s.active     = true;
        s.drafts     = a.drafts;
        s.scores     = a.n_prompt_logprobs >= 0;
        s.max_tokens = a.max_tokens;
        s.n_prompt   = a.n_reused;
        s.ticket     = a.ticket;
    }
    for (int32_t i = 0; i < plan.n_resume; ++i) {
        const auto & r   = plan.resume[i];
        Known &      s   = find(known, r.seq_id);
        const auto   who = [&] { return sequence_name(r.seq_id); };
        require(!s.active, [&] { return who() + " is resumed but active"; });
        const auto parked = kept.parked.find(r.ticket);
        require(parked != kept.parked.end(),
                [&] { return who() + " resumes ticket " + std::to_string(r.ticket) + ", which is not parked"; });
        s = parked->second.request;
        if (r.snapshot == 0) {
            s.complete = false;
            s.n_prompt = 0;
        } else {
            require(r.snapshot == parked->second.snapshot,
                    [&] { return who() + " was not parked with snapshot " + std::to_string(r.snapshot); });
            find_snapshot(r.snapshot);
        }
        kept.parked.erase(parked);
    }
}

void PlanRules::check_entries(const mtpbatch_plan & plan, std::vector<Known> & known) const {
    std::vector<bool> planned(known.size());
    int64_t           n_rows = 0, n_outputs = 0;  // of the plan's first step
    int64_t           n_repeated = 0;             // rows of its further steps, all of them outputs
    for (int32_t i = 0; i < plan.n_entries; ++i) {
        const auto & e   = plan.entries[i];
        Known &      s   = find(known, e.seq_id);
        const auto   who = [&] { return sequence_name(e.seq_id); };
        require(s.active, [&] { return who() + " is not active"; });
        require(!planned[static_cast<size_t>(e.seq_id)], [&] { return who() + " is planned twice"; });
        planned[static_cast<size_t>(e.seq_id)] = true;
        const bool decodes                     = s.complete;
        require(e.n_tokens >= 0 && decodes == (e.n_tokens == 0),
                [&] { return who() + (decodes ? " has its whole prompt already" : " needs tokens of its prompt"); });
        require(e.sample || !decodes, [&] { return who() + " must sample"; });
        const auto require_tokens = [&](const int32_t * tokens, int32_t n) {
            for (int32_t j = 0; j < n; ++j) {
                require(tokens[j] >= 0 && tokens[j] < n_vocab_,
                        [&] { return "no such token: " + std::to_string(tokens[j]); });
            }
        };
        require_tokens(e.tokens, e.n_tokens);
        require(e.n_scored == 0 || s.scores, [&] { return who() + " scores tokens, but its request asks for none"; });
        require(e.n_scored >= 0 && e.n_scored <= std::max(0, e.n_tokens - e.sample),
                [&] { return who() + " has no rows to score " + std::to_string(e.n_scored) + " tokens after"; });
        require_tokens(e.scored, e.n_scored);
        require(e.n_draft >= 0 && e.n_draft <= (s.drafts ? n_draft_max_ : 0),
                [&] { return who() + " cannot draft " + std::to_string(e.n_draft) + " tokens"; });
        require(!e.selective || plan.terms, [&] { return who() + " is selective, but there are no terms"; });
        require(is_chance(e.expected),
                [&] { return who() + ": expected must be from 0 to 1, got " + std::to_string(e.expected); });
        const int64_t n_prompt = int64_t{ s.n_prompt } + e.n_tokens;
        const bool    again    = s.n_most > 0 && !decodes;  // its generated tokens come with its prompt
        require(!again || n_prompt <= s.n_most, [&] { return who() + " resumes with more tokens than it can have"; });
        // The token sampled last is never decoded.
        const int64_t n_needed = n_prompt + (e.sample && !decodes && !again ? s.max_tokens - 1 : 0);
        require(n_needed <= params_.n_ctx,
                [&] { return who() + " would outgrow n_ctx=" + std::to_string(params_.n_ctx); });
        if (e.sample && s.n_most == 0) {
            s.n_most = static_cast<int32_t>(n_needed);
        }
        s.n_prompt += e.n_tokens;
        s.complete = e.sample;
        n_rows += decodes ? 1 + e.n_draft : e.n_tokens;
        n_outputs += decodes ? 1 + e.n_draft : e.n_scored + e.sample;
        n_repeated += e.sample && plan.run_ahead > 0 ? 1 + e.n_draft : 0;
    }
    // Else an entry of the plan before, not begun yet, would be taken for the new request's.
    const auto require_entry = [&](llama_seq_id seq_id, const char * how) {
        require(planned[static_cast<size_t>(seq_id)],
                [&] { return sequence_name(seq_id) + " is " + how + " without an entry"; });
    };
    for (int32_t i = 0; i < plan.n_admit; ++i) {
        require_entry(plan.admit[i].seq_id, "admitted");
    }
    for (int32_t i = 0; i < plan.n_resume; ++i) {
        require_entry(plan.resume[i].seq_id, "resumed");
    }
    n_rows    = std::max(n_rows, n_repeated);
    n_outputs = std::max(n_outputs, n_repeated);
    require(n_rows <= params_.n_batch && n_outputs <= params_.n_outputs_max, [&] {
        return std::to_string(n_rows) + " rows, " + std::to_string(n_outputs) +
               " of them outputs, exceed n_batch=" + std::to_string(params_.n_batch) +
               " or n_outputs_max=" + std::to_string(params_.n_outputs_max);
    });
}

void PlanRules::check_terms(const mtpbatch_terms & terms) const {
    const auto require_price = [](float price, const char * name) {
        require(std::isfinite(price) && price >= 0, [&] {
            return std::string(name) + " must be a finite price of at least 0, got " + std::to_string(price);
        });
    };
    require_price(terms.target_row, "target_row");
    require_price(terms.target_pass, "target_pass");
    require_price(terms.draft_row, "draft_row");
    require_price(terms.draft_decode, "draft_decode");
    for (int32_t i = 0; i < 2 * MTPBATCH_CONFIDENCES; ++i) {
        require(is_chance(terms.acceptance[i]), [&] {
            return "the acceptance of class " + std::to_string(i) + " must be from 0 to 1, got " +
                   std::to_string(terms.acceptance[i]);
        });
    }
}

}  // namespace mtpbatch
