// One step for all active sequences: draft, decode, verify, roll back.
#include "internal.hpp"

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>

namespace mtpbatch {

class Executor {
  public:
    Executor(std::shared_ptr<Context> target, std::shared_ptr<Session> session)
        : target_(std::move(target)), session_(std::move(session)), requests_(target_->params().n_seq) {}

    void step(const mtpbatch_plan & plan, mtpbatch_outcome * outcomes, mtpbatch_step_report & report);

  private:
    struct Request {
        Sampler                  sampler;
        std::vector<llama_token> stop_tokens;
        int32_t                  max_tokens;
        int32_t                  n_generated = 0;
        llama_token              last_token  = -1;  // sampled, not yet decoded; -1: the prompt is not complete
        bool                     finished    = false;
    };

    void             check(const mtpbatch_plan & plan) const;
    void             run(const mtpbatch_plan & plan, mtpbatch_outcome * outcomes, mtpbatch_step_report & report);
    void             release(llama_seq_id seq_id);
    void             draft(const mtpbatch_plan & plan);
    std::vector<Row> rows_of(const mtpbatch_plan & plan, int32_t i) const;
    std::vector<std::vector<int32_t>> decodes(const mtpbatch_plan & plan) const;
    void                              decode(const mtpbatch_plan & plan, const std::vector<int32_t> & group);
    void verify(llama_seq_id seq_id, int32_t first_row, const std::vector<llama_token> & draft, mtpbatch_outcome & out);
    void settle(const mtpbatch_entry & entry, int32_t i, mtpbatch_outcome & out);

    const std::shared_ptr<Context>        target_;
    const std::shared_ptr<Session>        session_;
    std::vector<std::optional<Request>>   requests_;     // by seq_id
    std::vector<std::vector<llama_token>> drafts_;       // by entry, of the current step
    std::vector<int32_t>                  sample_rows_;  // by entry, its first row that is sampled
};

namespace {

[[noreturn]] void refuse(const std::string & message) {
    throw Error(MTPBATCH_INVALID_ARGUMENT, "plan: " + message);
}

}  // namespace

// Refuses a plan that breaks a rule, before anything of it is carried out.
void Executor::check(const mtpbatch_plan & plan) const {
    const auto & params = target_->params();
    const auto   name   = [](llama_seq_id seq_id) { return "sequence " + std::to_string(seq_id); };

    std::vector<bool> active(requests_.size());
    for (size_t s = 0; s < requests_.size(); ++s) {
        active[s] = requests_[s].has_value();
    }
    for (int32_t i = 0; i < plan.n_release; ++i) {
        if (!target_->has_sequence(plan.release[i]) || !active[plan.release[i]]) {
            refuse(name(plan.release[i]) + " is released but not active");
        }
        active[plan.release[i]] = false;
    }
    std::vector<bool> fresh(requests_.size());
    for (int32_t i = 0; i < plan.n_admit; ++i) {
        const auto & admission = plan.admit[i];
        if (!target_->has_sequence(admission.seq_id) || active[admission.seq_id]) {
            refuse(name(admission.seq_id) + " is admitted but does not exist or is active");
        }
        if (admission.max_tokens < 1) {
            refuse(name(admission.seq_id) + " may generate no token");
        }
        active[admission.seq_id] = fresh[admission.seq_id] = true;
    }
    int64_t           n_rows = 0, n_outputs = 0;
    std::vector<bool> planned(requests_.size());
    for (int32_t i = 0; i < plan.n_entries; ++i) {
        const auto & entry = plan.entries[i];
        if (!target_->has_sequence(entry.seq_id) || !active[entry.seq_id] || planned[entry.seq_id]) {
            refuse(name(entry.seq_id) + " is not active, or planned twice");
        }
        planned[entry.seq_id] = true;
        if (!fresh[entry.seq_id] && requests_[entry.seq_id]->finished) {
            refuse(name(entry.seq_id) + " has finished");
        }
        const bool decodes = !fresh[entry.seq_id] && requests_[entry.seq_id]->last_token >= 0;
        if (entry.n_tokens < 0 || decodes != (entry.n_tokens == 0)) {
            refuse(name(entry.seq_id) + (decodes ? " has its whole prompt already" : " needs tokens of its prompt"));
        }
        if (decodes && !entry.sample) {
            refuse(name(entry.seq_id) + " must sample");
        }
        for (int32_t j = 0; j < entry.n_tokens; ++j) {
            if (!target_->model().has_token(entry.tokens[j])) {
                refuse("no such token: " + std::to_string(entry.tokens[j]));
            }
        }
        const int32_t n_draft_max = session_ ? session_->config().n_draft_max : 0;
        if (entry.n_draft < 0 || entry.n_draft > (decodes ? n_draft_max : 0)) {
            refuse(name(entry.seq_id) + " cannot draft " + std::to_string(entry.n_draft) + " tokens here");
        }
        const int64_t n_past = fresh[entry.seq_id] ? 0 : target_->length(entry.seq_id);
        const int64_t n_own  = decodes ? 1 + entry.n_draft : entry.n_tokens;
        if (n_past + n_own > params.n_ctx) {
            refuse(name(entry.seq_id) + " would outgrow n_ctx=" + std::to_string(params.n_ctx));
        }
        n_rows += n_own;
        n_outputs += decodes ? n_own : entry.sample;
    }
    if (n_rows > params.n_batch || n_outputs > params.n_outputs_max) {
        refuse(std::to_string(n_rows) + " rows, " + std::to_string(n_outputs) + " of them outputs, exceed n_batch=" +
               std::to_string(params.n_batch) + " or n_outputs_max=" + std::to_string(params.n_outputs_max));
    }
}

void Executor::release(llama_seq_id seq_id) {
    target_->truncate(seq_id, 0);
    if (session_) {
        session_->reset(seq_id);
    }
    requests_[seq_id].reset();
}

void Executor::draft(const mtpbatch_plan & plan) {
    drafts_.assign(plan.n_entries, {});
    std::vector<Session::Request> wanted;
    std::vector<int32_t>          owners;
    for (int32_t i = 0; i < plan.n_entries; ++i) {
        const auto & entry = plan.entries[i];
        if (entry.n_draft > 0) {
            wanted.push_back(
                { entry.seq_id, target_->length(entry.seq_id), requests_[entry.seq_id]->last_token, entry.n_draft });
            owners.push_back(i);
        }
    }
    if (wanted.empty()) {
        return;
    }
    std::vector<std::vector<llama_token>> results;
    session_->draft(wanted, results);
    for (size_t i = 0; i < owners.size(); ++i) {
        drafts_[owners[i]] = std::move(results[i]);
    }
}

// The rows of an entry: the next tokens of its prompt, or the last token and its draft.
std::vector<Row> Executor::rows_of(const mtpbatch_plan & plan, int32_t i) const {
    const auto &     entry    = plan.entries[i];
    llama_pos        position = target_->length(entry.seq_id);
    std::vector<Row> rows;
    for (int32_t j = 0; j < entry.n_tokens; ++j) {
        rows.push_back({ entry.tokens[j], position++, entry.seq_id, entry.sample && j + 1 == entry.n_tokens });
    }
    if (entry.n_tokens == 0) {
        rows.push_back({ requests_[entry.seq_id]->last_token, position++, entry.seq_id, true });
        for (const llama_token token : drafts_[i]) {
            rows.push_back({ token, position++, entry.seq_id, true });
        }
    }
    return rows;
}

// Groups entries by the decode they go into. One is enough, unless the model keeps recurrent state:
// there a draft can only be taken back if its decode was one pass. That costs no pass, as drafts of
// different lengths are different passes anyway.
std::vector<std::vector<int32_t>> Executor::decodes(const mtpbatch_plan & plan) const {
    std::vector<int32_t> order(plan.n_entries);
    std::iota(order.begin(), order.end(), 0);
    if (!target_->model().keeps_recurrent_state()) {
        return { order };
    }
    // Undrafted ones first, with ascending lengths, which need the fewest passes.
    const auto key = [&](int32_t i) {
        return std::make_tuple(drafts_[i].size(), std::max(plan.entries[i].n_tokens, 1), plan.entries[i].seq_id);
    };
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return key(a) < key(b); });
    std::vector<std::vector<int32_t>> groups;
    std::vector<Row>                  group_rows;
    for (const int32_t i : order) {
        const auto rows = rows_of(plan, i);
        group_rows.insert(group_rows.end(), rows.begin(), rows.end());
        const bool drafted = !drafts_[i].empty();
        if (groups.empty() ||
            (drafted && (drafts_[groups.back().back()].empty() || !target_->is_one_pass(group_rows)))) {
            groups.emplace_back();
            group_rows = rows;
        }
        groups.back().push_back(i);
    }
    return groups;
}

void Executor::decode(const mtpbatch_plan & plan, const std::vector<int32_t> & group) {
    std::vector<Row> rows;
    for (const int32_t i : group) {
        const auto own  = rows_of(plan, i);
        sample_rows_[i] = static_cast<int32_t>(rows.size());
        if (plan.entries[i].n_tokens > 0) {
            sample_rows_[i] += static_cast<int32_t>(own.size()) - 1;
        }
        rows.insert(rows.end(), own.begin(), own.end());
    }
    target_->decode(rows);
}

// Samples row by row for as long as the sampled token is the drafted one: what comes out is what
// sampling without drafts gives, with as many random draws.
void Executor::verify(llama_seq_id seq_id, int32_t first_row, const std::vector<llama_token> & draft,
                      mtpbatch_outcome & out) {
    Request &     request = *requests_[seq_id];
    const int32_t n_vocab = target_->model().n_vocab();
    for (int32_t k = 0;; ++k) {
        const llama_token token    = request.sampler.sample(target_->logits(first_row + k), n_vocab);
        const bool        hit      = k < static_cast<int32_t>(draft.size()) && draft[k] == token;
        out.tokens[out.n_tokens++] = token;
        out.n_accepted += hit;
        request.n_generated += 1;
        request.last_token = token;
        if (std::find(request.stop_tokens.begin(), request.stop_tokens.end(), token) != request.stop_tokens.end()) {
            out.finish = MTPBATCH_STOP_TOKEN;
        } else if (request.n_generated >= request.max_tokens) {
            out.finish = MTPBATCH_TOKEN_LIMIT;
        }
        if (!hit || out.finish != MTPBATCH_GOES_ON) {
            request.finished = out.finish != MTPBATCH_GOES_ON;
            return;
        }
    }
}

// Samples an entry, and takes back the part of its draft that was rejected.
void Executor::settle(const mtpbatch_entry & entry, int32_t i, mtpbatch_outcome & out) {
    if (!entry.sample) {
        return;
    }
    out.n_drafted = static_cast<int32_t>(drafts_[i].size());
    verify(entry.seq_id, sample_rows_[i], drafts_[i], out);
    if (out.n_drafted == 0) {
        return;
    }
    session_->accept(entry.seq_id, out.n_accepted);
    const int32_t n_rejected = out.n_drafted - out.n_accepted;
    if (!target_->truncate(entry.seq_id, target_->length(entry.seq_id) - n_rejected)) {
        throw Error(MTPBATCH_INTERNAL, with_reason("rejected drafts could not be taken back"));
    }
}

void Executor::step(const mtpbatch_plan & plan, mtpbatch_outcome * outcomes, mtpbatch_step_report & report) {
    check(plan);
    try {
        run(plan, outcomes, report);
    } catch (const Error & e) {
        // The plan was right, so that this is not the caller's argument.
        throw Error(e.status == MTPBATCH_INVALID_ARGUMENT ? MTPBATCH_INTERNAL : e.status, e.what());
    }
}

void Executor::run(const mtpbatch_plan & plan, mtpbatch_outcome * outcomes, mtpbatch_step_report & report) {
    for (int32_t i = 0; i < plan.n_release; ++i) {
        release(plan.release[i]);
    }
    for (int32_t i = 0; i < plan.n_admit; ++i) {
        const auto & admission = plan.admit[i];
        release(admission.seq_id);  // whatever was decoded on it before
        requests_[admission.seq_id].emplace(
            Request{ Sampler(admission),
                     { admission.stop_tokens, admission.stop_tokens + admission.n_stop },
                     admission.max_tokens });
    }
    report = {};
    std::fill(outcomes, outcomes + plan.n_entries, mtpbatch_outcome{});
    if (plan.n_entries == 0) {
        return;
    }

    Stopwatch     watch;
    const int64_t n_draft_decodes = session_ ? session_->statistics.n_decodes : 0;
    draft(plan);
    report.draft_us = watch.lap();

    sample_rows_.assign(plan.n_entries, -1);
    for (const auto & group : decodes(plan)) {
        decode(plan, group);
        report.n_target_tokens += static_cast<int32_t>(target_->last_batch().size());
        report.target_us += watch.lap();
        if (session_) {
            session_->process();
        }
        report.draft_us += watch.lap();
        for (const int32_t i : group) {
            settle(plan.entries[i], i, outcomes[i]);
        }
        report.sample_us += watch.lap();
    }
    report.n_draft_decodes = static_cast<int32_t>((session_ ? session_->statistics.n_decodes : 0) - n_draft_decodes);
}

}  // namespace mtpbatch

struct mtpbatch_executor {
    mtpbatch::Executor impl;
};

using namespace mtpbatch;

mtpbatch_status mtpbatch_executor_create(const mtpbatch_context * target, const mtpbatch_session * session,
                                         mtpbatch_executor ** executor, mtpbatch_error * error) {
    return guard(error, [&] {
        if (target->impl->is_mtp() || (session && &session->impl->target() != target->impl.get())) {
            throw Error(MTPBATCH_INVALID_ARGUMENT, "the session drafts for another context than this one");
        }
        *executor = new mtpbatch_executor{ Executor(target->impl, session ? session->impl : nullptr) };
    });
}

void mtpbatch_executor_free(mtpbatch_executor * executor) {
    delete executor;
}

mtpbatch_status mtpbatch_executor_step(mtpbatch_executor * executor, const mtpbatch_plan * plan,
                                       mtpbatch_outcome * outcomes, mtpbatch_step_report * report,
                                       mtpbatch_error * error) {
    return guard(error, [&] { executor->impl.step(*plan, outcomes, *report); });
}
