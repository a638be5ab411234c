// Who holds which sequence id, and one step for all of them: draft, decode, verify, take back.
#include "stepper.hpp"

#include "logprobs.hpp"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

namespace mtpbatch {

Stepper::Stepper(std::shared_ptr<Context> target, std::shared_ptr<Session> session)
    : target_(std::move(target)),
      session_(std::move(session)),
      pool_(target_->params().n_threads),
      requests_(static_cast<size_t>(target_->params().n_seq)),
      snapshots_(target_, session_) {}

void Stepper::open(Plan & plan) {
    for (const auto & entry : plan.save) {
        save(entry.seq_id, entry.snapshot);
    }
    for (const auto & entry : plan.park) {
        park(entry);
    }
    for (const llama_seq_id seq_id : plan.release) {
        release(seq_id);
    }
    for (const int64_t snapshot : plan.drop) {
        snapshots_.drop(snapshot);
    }
    for (const int64_t ticket : plan.forget) {
        parked_.erase(ticket);
    }
    for (Admission & admission : plan.admit) {
        admit(admission);
    }
    for (const auto & entry : plan.resume) {
        resume(entry);
    }
}

void Stepper::report_memory(Step & out) {
    out.saved          = std::exchange(saved_, {});
    out.lost           = std::exchange(lost_, {});
    out.report.save_us = std::exchange(save_us_, 0);
}

void Stepper::release(llama_seq_id seq_id) {
    target_->truncate(seq_id, 0);
    if (session_) {
        session_->reset(seq_id);
    }
    requests_[static_cast<size_t>(seq_id)].reset();
}

void Stepper::admit(Admission & admission) {
    const llama_seq_id seq_id = admission.seq_id;
    release(seq_id);  // whatever was decoded on it before
    Request & request = requests_[static_cast<size_t>(seq_id)].emplace(Request{
        std::move(admission.sampler),
        std::move(admission.stop_tokens),
        std::move(admission.stop_texts),
        std::move(admission.matcher),
        admission.min_tokens,
        admission.max_tokens,
        admission.ticket,
        admission.drafts,
        admission.n_logprobs,
        admission.n_prompt_logprobs,
    });
    request.over      = admission.cancelled;
    if (admission.snapshot != 0 && !admission.cancelled) {
        start_from_snapshot(seq_id, [&] { snapshots_.restore(admission.snapshot, seq_id, admission.n_reused); });
    } else {
        request.unclean = target_->length(seq_id) > 0;
    }
    ignore_undrafted(seq_id);
}

// One that cannot be taken costs nobody anything but itself.
void Stepper::save(llama_seq_id seq_id, int64_t snapshot) {
    Stopwatch      watch;
    mtpbatch_error error{};
    size_t         n_bytes = 0;
    guard(&error, [&] {
        if (requests_[static_cast<size_t>(seq_id)]->lost) {
            throw Error(MTPBATCH_SESSION_STATE, sequence_name(seq_id) + " has lost its state");
        }
        n_bytes = snapshots_.save(snapshot, seq_id);
    });
    saved_.push_back({ snapshot, static_cast<int64_t>(n_bytes) });
    save_us_ += watch.lap();
}

void Stepper::park(const mtpbatch_park & park) {
    if (park.snapshot != 0) {
        save(park.seq_id, park.snapshot);
    }
    Request & request = *requests_[static_cast<size_t>(park.seq_id)];
    parked_.emplace(request.ticket, std::move(request));
    release(park.seq_id);
}

void Stepper::resume(const mtpbatch_resume & resume) {
    release(resume.seq_id);  // whatever was decoded on it before
    Request & request =
        requests_[static_cast<size_t>(resume.seq_id)].emplace(std::move(parked_.extract(resume.ticket).mapped()));
    if (resume.snapshot != 0) {
        start_from_snapshot(resume.seq_id, [&] { snapshots_.restore(resume.snapshot, resume.seq_id); });
    } else {
        request.last_token = -1;  // it comes again, with all before it
        request.unclean    = target_->length(resume.seq_id) > 0;
        if (request.lost) {
            request.over = request.lost = false;
        }
    }
    ignore_undrafted(resume.seq_id);
}

// Nothing is kept for the MTP head of who never drafts.
void Stepper::ignore_undrafted(llama_seq_id seq_id) {
    if (session_ && !requests_[static_cast<size_t>(seq_id)]->drafts) {
        session_->ignore(seq_id);
    }
}

template <typename Restore>
void Stepper::start_from_snapshot(llama_seq_id seq_id, Restore && restore) {
    Stopwatch      watch;
    mtpbatch_error error{};
    if (guard(&error, restore) != MTPBATCH_OK) {
        lose(seq_id);
        lost_.push_back(seq_id);
    }
    save_us_ += watch.lap();
}

void Stepper::cancel(int64_t ticket) {
    for (auto & request : requests_) {
        if (request && request->ticket == ticket) {
            request->over = true;
        }
    }
    const auto parked = parked_.find(ticket);
    if (parked != parked_.end()) {
        parked->second.over = true;
    }
}

bool Stepper::takes_part(const Entry & entry, bool repeated) const {
    const auto & request = requests_[static_cast<size_t>(entry.seq_id)];
    return request && !request->over && (!repeated || request->last_token >= 0);
}

bool Stepper::can_repeat(const Plan & plan) const {
    return n_cells(plan, /*repeated*/ true) <= target_->params().n_cells &&
           std::any_of(plan.entries.begin(), plan.entries.end(),
                       [&](const Entry & entry) { return takes_part(entry, /*repeated*/ true); });
}

// Tokens that all sequences hold at the most in the plan's next step.
int64_t Stepper::n_cells(const Plan & plan, bool repeated) const {
    int64_t n = target_->n_held();
    for (const Entry & entry : plan.entries) {
        if (!takes_part(entry, repeated)) {
            continue;
        }
        const Request & request = *requests_[static_cast<size_t>(entry.seq_id)];
        const bool      prompts = !repeated && !entry.tokens.empty();
        n += prompts ? static_cast<int64_t>(entry.tokens.size())
                     : 1 + std::min(entry.n_draft, request.max_tokens - request.n_generated - 1);
    }
    return n;
}

bool Stepper::any_left() const {
    return std::any_of(requests_.begin(), requests_.end(),
                       [](const auto & request) { return request && !request->over; });
}

void Stepper::step(const Plan & plan, bool repeated, Step & out) try {
    Stopwatch     watch;
    const auto    drafting = [&] { return session_ ? session_->statistics() : mtpbatch_session_statistics{}; };
    const auto    before   = drafting();
    const int64_t n_needed = n_cells(plan, repeated);
    if (n_needed > target_->params().n_cells) {
        throw Error(MTPBATCH_NO_KV_SLOT, "the step needs " + std::to_string(n_needed) +
                                             " KV cells, of n_cells=" + std::to_string(target_->params().n_cells));
    }
    begin(plan, repeated);
    draft(plan);
    out.report.draft_us = watch.lap();
    keep_to_grammars(out);
    out.report.sample_us = watch.lap();
    even_out(plan);
    form_groups();
    for (size_t g = 0; g < n_groups_; ++g) {
        const Group & group = groups_[g];
        const bool    keep  = drafts_from(group) && !leaves_out_prompts(group, plan);
        target_->keep_hidden(keep);
        target_->decode(group.rows);
        out.report.n_target_tokens += static_cast<int32_t>(group.rows.size());
        out.report.target_us += watch.lap();
        if (session_) {
            session_->process(/*left_out*/ !keep);
        }
        out.report.draft_us += watch.lap();
        sample(group, out);
        score(group);
        for (const size_t p : group.parts) {
            count_trials(parts_[p]);
            take_back(parts_[p]);
        }
        out.report.sample_us += watch.lap();
    }
    const auto after            = drafting();
    out.report.n_target_decodes = static_cast<int32_t>(n_groups_);
    out.report.n_draft_tokens   = static_cast<int32_t>(after.n_rows - before.n_rows);
    out.report.n_draft_decodes  = static_cast<int32_t>(after.n_decodes - before.n_decodes);
    write(out);
} catch (...) {
    const bool all = target_->model().keeps_recurrent_state();  // a pass may have moved anybody's
    for (const Entry & entry : plan.entries) {
        lose(entry.seq_id);
    }
    for (llama_seq_id seq_id = 0; all && seq_id < target_->params().n_seq; ++seq_id) {
        lose(seq_id);
    }
    throw;
}

void Stepper::lose(llama_seq_id seq_id) {
    if (auto & request = requests_[static_cast<size_t>(seq_id)]) {
        request->over = request->lost = true;
    }
}

// Whether a sequence of the group may ever draft from its hidden rows.
bool Stepper::drafts_from(const Group & group) const {
    return session_ && std::any_of(group.parts.begin(), group.parts.end(),
                                   [&](size_t p) { return session_->keeps(parts_[p].seq_id); });
}

// Whether the plan does not care for the hidden rows of a group that has prompts. A draft that is to be
// verified needs them.
bool Stepper::leaves_out_prompts(const Group & group, const Plan & plan) const {
    const auto any = [&](auto && of) {
        return std::any_of(group.parts.begin(), group.parts.end(), [&](size_t p) { return of(parts_[p]); });
    };
    return !plan.keep_prompts && any([](const Part & part) { return part.prompt != nullptr; }) &&
           !any([](const Part & part) { return part.drafted; });
}

void Stepper::begin(const Plan & plan, bool repeated) {
    scored_.clear();
    tried_.fill(0);
    accepted_.fill(0);
    parts_.resize(plan.entries.size());
    for (size_t i = 0; i < parts_.size(); ++i) {
        const Entry & entry = plan.entries[i];
        Part &        part  = parts_[i];
        part.seq_id         = entry.seq_id;
        part.request        = takes_part(entry, repeated) ? &*requests_[static_cast<size_t>(entry.seq_id)] : nullptr;
        part.prompt         = repeated || entry.tokens.empty() ? nullptr : &entry;
        part.sample         = entry.sample;
        part.drafted        = false;
        part.draft.resize(0);
        part.tokens.clear();
        part.n_accepted = 0;
        part.finish     = MTPBATCH_GOES_ON;
        part.stuck      = false;
        if (part.request && part.request->unclean) {
            throw Error(MTPBATCH_DECODE_FAILED,
                        sequence_name(part.seq_id) + " could not be emptied of what was decoded on it before");
        }
    }
}

void Stepper::draft(const Plan & plan) {
    draft_requests_.clear();
    drafting_.clear();
    for (size_t i = 0; i < parts_.size(); ++i) {
        const Part & part = parts_[i];
        if (!part.request || part.prompt) {
            continue;
        }
        // A step gives one token more than were drafted.
        const int32_t depth =
            std::min(plan.entries[i].n_draft, part.request->max_tokens - part.request->n_generated - 1);
        if (depth > 0) {
            draft_requests_.push_back({
                part.seq_id,
                target_->length(part.seq_id),
                part.request->last_token,
                depth,
                part.request->sampler.temperature(),
                plan.entries[i].selective,
                plan.entries[i].expected,
            });
            drafting_.push_back(i);
        }
    }
    if (drafting_.empty()) {
        return;
    }
    session_->draft(draft_requests_, plan.terms ? &*plan.terms : nullptr, &pool_, drafts_);
    for (size_t i = 0; i < drafting_.size(); ++i) {
        Part & part = parts_[drafting_[i]];
        std::swap(part.draft, drafts_[i]);
        part.drafted = !part.draft.tokens.empty();
    }
}

// Finds out what grammars allow after the last token and after each drafted one. No row is spent on
// drafts from the first one on that cannot be accepted.
void Stepper::keep_to_grammars(Step & out) {
    std::vector<Part *> bound;
    for (Part & part : parts_) {
        if (part.request && part.request->matcher && part.sample) {
            bound.push_back(&part);
        }
    }
    if (bound.empty()) {
        return;
    }
    std::vector<char> failed(bound.size());  // not of bool, whose elements share bytes
    pool_.run(static_cast<int32_t>(bound.size()), [&](int32_t i) {
        Part & part                    = *bound[static_cast<size_t>(i)];
        size_t n_possible              = 0;
        failed[static_cast<size_t>(i)] = !part.request->matcher->look_ahead(part.draft.tokens, n_possible);
        part.draft.resize(n_possible);
    });
    for (size_t i = 0; i < bound.size(); ++i) {
        if (failed[i]) {
            out.failures.emplace_back(bound[i]->seq_id, bound[i]->request->matcher->error());
            lose(bound[i]->seq_id);  // its draft is not settled
            bound[i]->request = nullptr;
            bound[i]->drafted = false;
        }
    }
}

// On models that keep recurrent state each length of drafts is a pass of its own. So selective ones
// are cut to one or two lengths, those that give most for the rows and passes that they take.
void Stepper::even_out(const Plan & plan) {
    if (drafting_.empty() || !plan.terms || !target_->model().keeps_recurrent_state()) {
        return;
    }
    const mtpbatch_terms & terms = *plan.terms;
    std::vector<size_t>    selective;
    std::vector<bool>      passes(1);  // by length of drafts: those that there are anyway
    for (size_t i = 0; i < parts_.size(); ++i) {
        const size_t length = parts_[i].draft.tokens.size();
        if (parts_[i].request) {
            passes.resize(std::max(passes.size(), length + 1));
            if (length > 0 && plan.entries[i].selective) {
                selective.push_back(i);
            } else {
                passes[length] = true;
            }
        }
    }
    // What it is worth to verify the first tokens of a draft.
    const auto worth = [&](size_t i, size_t length) {
        const auto & chances = parts_[i].draft.chances;
        float        sum     = 0;
        for (size_t k = 0; k < std::min(length, chances.size()); ++k) {
            sum += chances[k] - terms.target_row;
        }
        return sum;
    };
    float  most = -INFINITY;
    size_t one = 0, other = 0;
    for (size_t low = 0; low < passes.size(); ++low) {
        for (size_t high = low; high < passes.size(); ++high) {
            std::vector<bool> taken = passes;
            float             gain  = 0;
            for (const size_t i : selective) {
                const size_t better = worth(i, high) > worth(i, low) ? high : low;
                gain += worth(i, better);
                taken[std::min(better, parts_[i].draft.tokens.size())] = true;
            }
            gain -= terms.target_pass * static_cast<float>(std::count(taken.begin(), taken.end(), true));
            if (gain > most) {
                most = gain, one = low, other = high;
            }
        }
    }
    for (const size_t i : selective) {
        const size_t better = worth(i, other) > worth(i, one) ? other : one;
        parts_[i].draft.resize(std::min(better, parts_[i].draft.tokens.size()));
    }
}

// Adds the next tokens of the prompt, or the last token and its draft.
void Stepper::append_rows(Part & part, std::vector<Row> & rows) const {
    llama_pos position = target_->length(part.seq_id);
    if (part.prompt) {
        const auto & tokens = part.prompt->tokens;
        for (size_t i = 0; i < tokens.size(); ++i) {
            rows.push_back({ tokens[i], position++, part.seq_id, i < part.prompt->scored.size() });
        }
        rows.back().output |= part.sample;
        part.first_row = static_cast<int32_t>(rows.size()) - 1;
        return;
    }
    part.first_row = static_cast<int32_t>(rows.size());
    rows.push_back({ part.request->last_token, position++, part.seq_id, true });
    for (const llama_token token : part.draft.tokens) {
        rows.push_back({ token, position++, part.seq_id, true });
    }
}

// One decode is enough, unless the model keeps recurrent state: there a draft can only be taken
// back if its decode was one pass. That costs no pass, as drafts of different lengths are
// different passes anyway.
void Stepper::form_groups() {
    const bool          recurrent = target_->model().keeps_recurrent_state();
    std::vector<size_t> order;
    for (size_t i = 0; i < parts_.size(); ++i) {
        if (parts_[i].request) {
            order.push_back(i);
        }
    }
    if (recurrent) {
        // Undrafted ones first, with ascending lengths, which need the fewest passes.
        const auto key = [&](size_t i) {
            const Part & part = parts_[i];
            return std::make_tuple(part.draft.tokens.size(), part.prompt ? part.prompt->tokens.size() : 1, part.seq_id);
        };
        std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return key(a) < key(b); });
    }

    n_groups_             = 0;
    const auto open_group = [&]() -> Group & {
        if (n_groups_ == groups_.size()) {
            groups_.emplace_back();
        }
        Group & group = groups_[n_groups_++];
        group.parts.clear();
        group.rows.clear();
        return group;
    };
    for (const size_t i : order) {
        Part &       part     = parts_[i];
        Group *      group    = n_groups_ > 0 ? &groups_[n_groups_ - 1] : &open_group();
        const size_t n_before = group->rows.size();
        append_rows(part, group->rows);
        if (recurrent && !part.draft.tokens.empty() && n_before > 0 &&
            (parts_[group->parts.back()].draft.tokens.empty() || !target_->is_one_pass(group->rows))) {
            group->rows.resize(n_before);
            group = &open_group();
            append_rows(part, group->rows);
        }
        group->parts.push_back(i);
    }
}

// Every row that can be sampled is looked at in parallel; then every sequence picks its tokens, in
// order, from what is left of its rows.
void Stepper::sample(const Group & group, Step & out) {
    struct Sampled {
        Part * part;
        size_t first;  // of its candidates
    };
    std::vector<Sampled>                          sampled;
    std::vector<std::pair<const Part *, int32_t>> rows;
    for (const size_t p : group.parts) {
        Part & part = parts_[p];
        if (part.sample) {
            sampled.push_back({ &part, rows.size() });
            for (int32_t k = 0; k <= static_cast<int32_t>(part.draft.tokens.size()); ++k) {
                rows.emplace_back(&part, part.first_row + k);
            }
        }
    }
    if (candidates_.size() < rows.size()) {
        candidates_.resize(rows.size());
    }
    const int32_t n_vocab = target_->model().n_vocab();
    // llama.cpp looks rows up in tables that it may rearrange, so that this is no work for a pool.
    std::vector<const float *> logits;
    for (const auto & [part, row] : rows) {
        logits.push_back(target_->logits(row));
    }
    masked_.resize(std::max(masked_.size(), rows.size()));
    const auto n_rows = static_cast<int64_t>(rows.size());
    pool_.run(
        static_cast<int32_t>(n_rows),
        [&](int32_t i) {
            const auto r             = static_cast<size_t>(i);
            const auto & [part, row] = rows[r];
            const Request & request  = *part->request;
            if (request.matcher) {
                request.matcher->apply(static_cast<size_t>(row - part->first_row), logits[r], masked_[r]);
                logits[r] = masked_[r].data();
            }
            request.sampler.preselect(logits[r], n_vocab, candidates_[r]);
        },
        n_rows * n_vocab);
    int64_t n_left = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
        const Candidates & c = candidates_[r];
        n_left += c.waits || c.few.empty() ? n_vocab : static_cast<int64_t>(c.few.size());
    }
    pool_.run(
        static_cast<int32_t>(sampled.size()),
        [&](int32_t i) {
            const auto & s = sampled[static_cast<size_t>(i)];
            verify(*s.part, s.first);
        },
        n_left);
    for (const auto & s : sampled) {
        if (s.part->stuck) {
            out.failures.emplace_back(s.part->seq_id, "all that may come next is forbidden by bad_words");
            lose(s.part->seq_id);
        }
    }
}

// How probable tokens are, for those who asked. By the logits as the model gave them: what sampling
// does to a row it does to a copy.
void Stepper::score(const Group & group) {
    std::vector<std::pair<const float *, int32_t>> rows;  // logits, and how many of the most probable are wanted
    const size_t                                   first = scored_.size();
    const auto add = [&](size_t p, bool prompt, int32_t row, llama_token token, int32_t n_top) {
        rows.emplace_back(target_->logits(row), n_top);
        scored_.push_back({ static_cast<int32_t>(p), prompt, {} });
        scored_.back().logprobs.token = token;
    };
    for (const size_t p : group.parts) {
        const Part & part = parts_[p];
        if (part.prompt) {
            int32_t row = part.first_row + 1 - static_cast<int32_t>(part.prompt->tokens.size());
            for (const llama_token token : part.prompt->scored) {
                add(p, true, row++, token, part.request->n_prompt_logprobs);
            }
        }
        if (part.request->n_logprobs >= 0) {
            int32_t row = part.first_row;
            for (const llama_token token : part.tokens) {
                add(p, false, row++, token, part.request->n_logprobs);
            }
        }
    }
    const int32_t n_vocab = target_->model().n_vocab();
    const auto    n_rows  = static_cast<int64_t>(rows.size());
    pool_.run(
        static_cast<int32_t>(n_rows),
        [&](int32_t i) {
            const auto r    = static_cast<size_t>(i);
            auto &     into = scored_[first + r].logprobs;
            into            = token_logprobs(rows[r].first, n_vocab, into.token, rows[r].second);
        },
        n_rows * n_vocab);
}

bool Stepper::completes_stop_text(Request & request, llama_token token) const {
    if (request.stop_texts.empty()) {
        return false;
    }
    std::string piece(32, 0);
    const auto  read = [&] {
        return llama_token_to_piece(target_->model().vocab, token, piece.data(), static_cast<int32_t>(piece.size()),
                                    /*lstrip*/ 0, /*special*/ false);
    };
    int32_t n = read();
    if (n < 0) {
        piece.resize(static_cast<size_t>(-n));
        n = read();
    }
    return request.stop_texts.feed(piece.data(), static_cast<size_t>(std::max(n, 0)),
                                   request.n_generated > request.min_tokens);
}

// Samples row by row for as long as the sampled token is the drafted one: what comes out is what
// sampling without drafts gives, with as many random draws.
void Stepper::verify(Part & part, size_t first_candidates) {
    Request & request = *part.request;
    for (size_t k = 0;; ++k) {
        Candidates &      candidates = candidates_[first_candidates + k];
        const llama_token token      = request.sampler.pick(candidates);
        if (request.matcher && !(candidates.logits[token] > -INFINITY)) {
            part.stuck = true;
            part.n_accepted -= k > 0;  // its last draft counts as sampled: each step gives one token more
            return;
        }
        const bool hit = k < part.draft.tokens.size() && part.draft.tokens[k] == token;
        part.tokens.push_back(token);
        if (request.matcher) {
            request.matcher->take(token);
        }
        part.n_accepted += hit;
        request.n_generated += 1;
        request.last_token = token;
        request.over       = completes_stop_text(request, token);
        if (std::find(request.stop_tokens.begin(), request.stop_tokens.end(), token) != request.stop_tokens.end()) {
            part.finish = MTPBATCH_STOP_TOKEN;
        } else if (request.n_generated >= request.max_tokens) {
            part.finish = MTPBATCH_TOKEN_LIMIT;
        }
        if (!hit || part.finish != MTPBATCH_GOES_ON) {
            request.over = request.over || part.finish != MTPBATCH_GOES_ON;
            return;
        }
    }
}

// Which of its drafts were right, as far as the model was asked.
void Stepper::count_trials(const Part & part) {
    const auto & confidences = part.draft.confidences;
    for (size_t k = 0; k < std::min(confidences.size(), part.tokens.size()); ++k) {
        tried_[confidences[k]] += 1;
        accepted_[confidences[k]] += part.tokens[k] == part.draft.tokens[k];
    }
}

// Takes back the part of a draft that was rejected.
void Stepper::take_back(Part & part) {
    if (!part.drafted) {
        return;
    }
    session_->accept(part.seq_id, part.n_accepted);
    const int32_t n_rejected = static_cast<int32_t>(part.draft.tokens.size()) - part.n_accepted;
    if (!target_->truncate(part.seq_id, target_->length(part.seq_id) - n_rejected)) {
        throw Error(MTPBATCH_INTERNAL, with_reason("rejected drafts could not be taken back"));
    }
}

void Stepper::write(Step & out) const {
    out.words.clear();
    out.trials.clear();
    out.scored = scored_;
    for (int32_t i = 0; i < static_cast<int32_t>(tried_.size()); ++i) {
        if (tried_[i] > 0) {
            out.trials.insert(out.trials.end(), { i, tried_[i], accepted_[i] });
        }
    }
    out.ends_any = !out.failures.empty() || std::any_of(parts_.begin(), parts_.end(), [](const Part & part) {
        return part.request && part.request->over;
    });

    const size_t n = parts_.size();
    out.words.resize(4 * n);
    for (size_t i = 0; i < n; ++i) {
        const Part & part    = parts_[i];
        out.words[i]         = static_cast<int32_t>(part.tokens.size());
        out.words[n + i]     = part.n_accepted;
        out.words[2 * n + i] = static_cast<int32_t>(part.draft.tokens.size());
        out.words[3 * n + i] = static_cast<int32_t>(part.finish);
        out.words.insert(out.words.end(), part.tokens.begin(), part.tokens.end());
    }
    out.report.n_entries = static_cast<int32_t>(n);
}

}  // namespace mtpbatch
