// Drafting with a model's MTP heads.
#include "internal.hpp"
#include "pool.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace mtpbatch {

namespace {

// Hidden rows that may wait in a session, shared equally by its sequences. When more of a sequence
// wait, all of them are decoded, which takes time that is lost if it never drafts again: only long
// sequences should come to it.
constexpr size_t MAX_WAITING_BYTES = 64 << 20;
constexpr size_t MIN_WAITING       = 256;  // pairs of each sequence, whatever they take

// How many pairs may wait of each sequence.
size_t max_waiting(int32_t n_seq, size_t n_embd) {
    return std::max(MIN_WAITING, MAX_WAITING_BYTES / (n_seq * n_embd * sizeof(float)));
}

// What a saved sequence begins with. Behind it stand the hidden row, the pairs that wait (hidden rows,
// then tokens) and the states of both contexts.
struct StateHeader {
    char     magic[8];
    uint64_t version;
    uint64_t fingerprint;  // of the model and the contexts
    uint64_t checksum;     // of all that follows
    uint64_t n_target;     // bytes
    uint64_t n_draft;      // 0: the draft context holds nothing of it
    uint64_t n_waiting;    // pairs
    int32_t  n_past;
    int32_t  ignored;
};
static_assert(sizeof(StateHeader) == 64);

constexpr char     STATE_MAGIC[8] = { 'm', 't', 'p', 'b', 'a', 't', 'c', 'h' };
constexpr uint64_t STATE_VERSION  = 1000 * 2 + LLAMA_STATE_SEQ_VERSION;
constexpr size_t   CHECKED_FROM   = offsetof(StateHeader, n_target);

// An index of mtpbatch_terms::acceptance.
int32_t confidence_of(float probability, float temperature) {
    const float   doubt = std::max(1 - probability, 1e-6f);
    const int32_t of    = static_cast<int32_t>(-2 * std::log2(doubt));
    return std::clamp(of, 0, MTPBATCH_CONFIDENCES - 1) + (temperature > 0 ? MTPBATCH_CONFIDENCES : 0);
}

void add_model(Checksum & sum, const Model & loaded) {
    const llama_model * model = loaded.raw;
    std::vector<char>   text(1 << 16);
    const auto          add = [&](auto read, int32_t i) {
        const int32_t n = read(model, i, text.data(), text.size());
        sum.add(text.data(), std::min<size_t>(std::max(n, 0), text.size() - 1));
    };
    for (int32_t i = 0; i < llama_model_meta_count(model); ++i) {
        add(llama_model_meta_key_by_index, i);
        add(llama_model_meta_val_str_by_index, i);
    }
    const uint64_t weights[] = { llama_model_n_params(model), llama_model_size(model), loaded.weights_sample };
    sum.add(weights, sizeof weights);
}

const mtpbatch_session_config & checked(const mtpbatch_session_config & config, const Context & target,
                                        const Context & draft) {
    const auto config_error   = [](const std::string & text) { throw Error(MTPBATCH_SESSION_CONFIG, text); };
    const auto contexts_error = [](const std::string & text) { throw Error(MTPBATCH_SESSION_CONTEXTS, text); };
    target.require_weights();
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
    if (draft.n_heads() > 1 && config.n_draft_max > draft.n_heads()) {
        config_error("n_draft_max must be at most " + std::to_string(draft.n_heads()) +
                     ", the MTP heads that the model chains, one for each depth; got " +
                     std::to_string(config.n_draft_max));
    }
    if (draft.n_heads() > 1 && target.params().kv_unified) {
        // Each head decodes the same positions again, and must be given the same cells for them.
        contexts_error("the model chains its MTP heads, so that drafting needs kv_unified false");
    }
    if (llama_model_n_swa(target.model().raw) > 0 && target.params().kv_unified) {
        // Cells that have left a sequence's window go to others. They are missed when the window
        // moves back with a rejected draft.
        contexts_error("the model has sliding-window attention, so that drafting needs kv_unified false");
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
      n_heads_(std::min(draft_->n_heads(), config_.n_draft_max)),
      fingerprint_(make_fingerprint()),
      max_waiting_(max_waiting(config.n_seq, n_embd_)),
      sequences_(config.n_seq),
      n_seen_(target_->n_decodes()) {
    for (llama_seq_id s = 0; s < config_.n_seq; ++s) {
        if (target_->length(s) > 0) {
            throw Error(MTPBATCH_SESSION_SEQUENCE, sequence_name(s) +
                                                       " of the target has decoded tokens that this session " +
                                                       "did not see: make the session first, or truncate it to 0");
        }
        reset(s);
    }
    target_->keep_hidden(true);
    draft_->claimed = true;
}

uint64_t Session::max_waiting_bytes(const Context & draft) {
    const uint64_t n_seq  = draft.params().n_seq;
    const uint64_t n_embd = llama_model_n_embd_out(draft.model().raw);
    return n_seq * (max_waiting(draft.params().n_seq, n_embd) + 1) * (n_embd * sizeof(float) + sizeof(llama_token));
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
    SequenceState fresh;
    fresh.decoded.assign(n_heads_, 0);
    fresh.hidden.assign(n_embd_, 0);
    s = std::move(fresh);  // buffers too: each id would keep those of its longest sequence, megabytes
}

void Session::ignore(llama_seq_id seq_id) {
    auto &        s      = sequence(seq_id);
    const int32_t n_past = s.n_past;
    reset(seq_id);
    s.n_past  = n_past;
    s.ignored = true;
}

bool Session::cut(llama_seq_id seq_id, int32_t length) {
    auto & s = settled(seq_id);
    if (length >= s.n_past) {
        return true;
    }
    if (!target_->truncate(seq_id, length)) {
        return false;
    }
    draft_->truncate(seq_id, length);
    if (length >= s.first_waiting()) {
        take_back_waiting(s, s.n_past - length);
    } else {
        s.waiting.clear();
        s.waiting_hidden.clear();
        s.n_past = length;
        // The row that the next token pairs with was not kept. Like the first token it goes without: its
        // one entry misleads no draft for long.
        s.hidden.assign(s.hidden.size(), 0);
    }
    s.decoded.assign(s.decoded.size(), s.first_waiting());
    return true;
}

// A sequence that has no draft under way and is where the target is. All heads have entries up to the
// pairs that wait: what those ahead of the others have decoded of these is not worth keeping, and with
// it the draft context would lose what a sliding window shows the others.
Session::SequenceState & Session::settled(llama_seq_id seq_id) {
    auto & s = sequence(seq_id);
    if (s.n_drafted > 0) {
        throw Error(MTPBATCH_SESSION_STATE, sequence_name(seq_id) + " has a draft that waits for " +
                                                (s.n_verified > 0 ? "accept()" : "process() and accept()"));
    }
    if (n_seen_ != target_->n_decodes()) {
        throw Error(MTPBATCH_SESSION_STATE, "the target's last decode was not processed yet");
    }
    if (s.n_past != target_->length(seq_id)) {
        throw Error(MTPBATCH_SESSION_STATE, sequence_name(seq_id) + " has " + std::to_string(target_->length(seq_id)) +
                                                " positions in the target, but the session has taken in " +
                                                std::to_string(s.n_past) + ": truncate the target to them");
    }
    start_over(seq_id);
    return s;
}

uint64_t Session::make_fingerprint() const {
    Checksum sum;
    add_model(sum, target_->model());
    add_model(sum, draft_->model());
    const auto &  p        = target_->params();
    const bool    unified  = p.kv_unified && draft_->params().kv_unified;
    const int32_t values[] = { p.kv_type, p.kv_unified, unified ? 0 : p.n_seq, n_heads_ };
    sum.add(values, sizeof values);
    return sum.value();
}

size_t Session::save(llama_seq_id seq_id, uint8_t * state, size_t size) {
    const auto & s         = settled(seq_id);
    const bool   drafts    = !s.ignored && !draft_->shares_memory();
    const size_t n_hidden  = n_embd_ * sizeof(float);
    const size_t n_waiting = s.waiting.size();
    const size_t n_target  = target_->state_size(seq_id);
    const size_t n_draft   = drafts && s.first_waiting() > 0 ? draft_->state_size(seq_id) : 0;
    const size_t n_total =
        sizeof(StateHeader) + n_hidden + n_waiting * (n_hidden + sizeof(llama_token)) + n_target + n_draft;
    if (n_total > size) {
        return n_total;
    }
    StateHeader header{ {}, STATE_VERSION, fingerprint_, 0, n_target, n_draft, n_waiting, s.n_past, s.ignored };
    std::memcpy(header.magic, STATE_MAGIC, sizeof STATE_MAGIC);
    uint8_t *  next = state + sizeof header;
    const auto put  = [&](const void * data, size_t n) {
        std::memcpy(next, data, n);
        next += n;
    };
    put(s.hidden.data(), n_hidden);
    if (n_waiting > 0) {
        put(s.waiting_hidden.data(), n_waiting * n_hidden);
        put(s.waiting.data(), n_waiting * sizeof(llama_token));
    }
    target_->save(seq_id, next, n_target);
    if (n_draft > 0) {
        draft_->save(seq_id, next + n_target, n_draft);
    }
    std::memcpy(state, &header, sizeof header);
    Checksum sum;
    sum.add(state + CHECKED_FROM, n_total - CHECKED_FROM);
    header.checksum = sum.value();
    std::memcpy(state, &header, sizeof header);
    return n_total;
}

void Session::restore(llama_seq_id seq_id, const uint8_t * state, size_t size) {
    const auto refuse = [](const std::string & message) { throw Error(MTPBATCH_SESSION_STATE, message); };
    auto &     s      = sequence(seq_id);
    if (n_seen_ != target_->n_decodes()) {
        refuse("the target's last decode was not processed yet");
    }
    StateHeader header;
    if (size < sizeof header || std::memcmp(state, STATE_MAGIC, sizeof STATE_MAGIC) != 0) {
        refuse("these bytes are not a saved sequence");
    }
    std::memcpy(&header, state, sizeof header);
    if (header.version != STATE_VERSION) {
        refuse("the sequence was saved by another version of mtpbatch");
    }
    if (header.fingerprint != fingerprint_) {
        refuse("the sequence was saved with another model or other context settings");
    }
    Checksum sum;
    sum.add(state + CHECKED_FROM, size - CHECKED_FROM);
    const size_t n_hidden = n_embd_ * sizeof(float);
    const size_t n_pair   = n_hidden + sizeof(llama_token);
    const size_t n_body   = size - sizeof header;
    if (header.checksum != sum.value() || header.n_past < 0 ||
        header.n_waiting > static_cast<uint64_t>(header.n_past) || header.n_waiting > n_body / n_pair ||
        header.n_target > n_body || header.n_draft > n_body ||
        n_hidden + header.n_waiting * n_pair + header.n_target + header.n_draft != n_body) {
        refuse("the saved sequence is damaged");
    }
    const bool    drafts    = header.ignored == 0 && !draft_->shares_memory();
    const int32_t n_decoded = drafts ? header.n_past - static_cast<int32_t>(header.n_waiting) : 0;
    const auto *  next      = state + sizeof header;
    const auto    take      = [&](void * data, size_t n) {
        std::memcpy(data, next, n);
        next += n;
    };
    std::vector<float>       hidden(n_embd_), waiting_hidden(header.n_waiting * n_embd_);
    std::vector<llama_token> waiting(header.n_waiting);
    take(hidden.data(), n_hidden);
    if (header.n_waiting > 0) {
        take(waiting_hidden.data(), waiting.size() * n_hidden);
        take(waiting.data(), waiting.size() * sizeof(llama_token));
    }
    if ((header.n_draft > 0) != (n_decoded > 0) || (header.n_waiting > 0 && !drafts) ||
        !std::all_of(waiting.begin(), waiting.end(),
                     [&](llama_token token) { return target_->model().has_token(token); })) {
        refuse("the saved sequence is damaged");
    }
    if (header.n_past > target_->params().n_ctx) {
        refuse("the saved sequence has " + std::to_string(header.n_past) +
               " positions, more than n_ctx=" + std::to_string(target_->params().n_ctx));
    }
    if (!target_->has_room(seq_id, header.n_past)) {
        refuse("the saved sequence has " + std::to_string(header.n_past) +
               " positions, and the others leave fewer of n_cells=" + std::to_string(target_->params().n_cells));
    }
    reset(seq_id);
    if (!target_->load(seq_id, next, header.n_target, header.n_past) ||
        (n_decoded > 0 && !draft_->load(seq_id, next + header.n_target, header.n_draft, n_decoded))) {
        target_->truncate(seq_id, 0);
        refuse(with_reason("llama.cpp could not restore " + sequence_name(seq_id) + ", which is empty now"));
    }
    s.n_past         = header.n_past;
    s.ignored        = header.ignored != 0;
    s.hidden         = std::move(hidden);
    s.waiting        = std::move(waiting);
    s.waiting_hidden = std::move(waiting_hidden);
    s.decoded.assign(s.decoded.size(), s.first_waiting());
}

void Session::fork(llama_seq_id source, llama_seq_id target) {
    auto & to = sequence(target);
    if (source == target) {
        throw Error(MTPBATCH_SESSION_STATE, sequence_name(source) + " cannot be forked onto itself");
    }
    SequenceState copy = settled(source);
    reset(target);
    if (!target_->copy(source, target) || !(copy.ignored || draft_->shares_memory() || draft_->copy(source, target))) {
        target_->truncate(target, 0);
        throw Error(MTPBATCH_SESSION_STATE, with_reason("llama.cpp could not fork " + sequence_name(source) + "; " +
                                                        sequence_name(target) + " is empty now"));
    }
    to = std::move(copy);
}

void Session::begin(llama_seq_id seq_id, int32_t n_prompt) {
    const auto & s = sequence(seq_id);
    if (s.n_past != n_prompt) {
        throw Error(MTPBATCH_SESSION_SEQUENCE, sequence_name(seq_id) + ": the prompt has " + std::to_string(n_prompt) +
                                                   " tokens, but the session has " + "taken in " +
                                                   std::to_string(s.n_past) +
                                                   "; call process() after every decode of the target");
    }
}

void Session::process(bool left_out) {
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
                        sequence_name(rows[i].seq_id) + " goes on at position " + std::to_string(rows[i].position) +
                            ", but the session has taken in " + std::to_string(s.n_past) +
                            ": every decode of the target must be processed, once, and what was rejected " +
                            "truncated to what was accepted");
        }
        const bool begins_anew = rows[i].position == 0 && s.n_past > 0;
        if (!left_out && !target_->kept_hidden() && (!s.ignored || begins_anew)) {
            throw Error(MTPBATCH_SESSION_PROCESS, "an executor without this session decoded the batch: its hidden " +
                                                      std::string("rows were not kept"));
        }
        if (s.n_drafted > 0 && s.n_verified > 0 && rows[i].position != 0) {
            throw Error(MTPBATCH_SESSION_PROCESS,
                        sequence_name(rows[i].seq_id) +
                            " waits for accept() of its last draft; call it before the next decode");
        }
    }

    n_seen_                          = target_->n_decodes();
    const float *             hidden = left_out ? nullptr : target_->hidden();
    std::vector<llama_seq_id> full;
    for (size_t begin = 0, end; begin < rows.size(); begin = end) {
        const llama_seq_id seq_id = rows[begin].seq_id;
        for (end = begin + 1; end < rows.size() && rows[end].seq_id == seq_id; ++end) {
        }
        take_in(rows, begin, end, hidden);
        const auto & s = sequences_[seq_id];
        if (s.n_verified == 0 && s.waiting.size() > max_waiting_) {
            full.push_back(seq_id);
        }
    }
    catch_up(full);
    const std::lock_guard lock(statistics_mutex_);
    statistics_.process_us += watch.lap();
}

// Takes in one sequence's rows of a batch, given the hidden rows of all of it, or nullptr for zeros.
void Session::take_in(const std::vector<Row> & rows, size_t begin, size_t end, const float * hidden) {
    const llama_seq_id seq_id = rows[begin].seq_id;
    auto &             s      = sequences_[seq_id];
    if (rows[begin].position == 0 && s.n_past > 0) {
        reset(seq_id);  // a new generation on a used sequence
    }
    if (s.ignored) {
        s.n_past = rows[end - 1].position + 1;
        return;
    }
    if (s.drafted_from >= 0 && s.drafted_from != rows[begin].token) {
        take_back_last(seq_id);  // drafted from one token, decoded another
    }
    s.drafted_from = -1;
    // An assistant needs no pairs; but accept() looks up the last accepted token's hidden row there.
    if (!draft_->shares_memory() || s.n_drafted > 0) {
        // A draft may have decoded the first token already.
        const int32_t lowest = *std::min_element(s.decoded.begin(), s.decoded.end());
        size_t        i      = begin + (rows[begin].position < lowest);
        for (size_t j = i; j < end; ++j) {
            s.waiting.push_back(rows[j].token);
        }
        if (i == begin) {
            s.waiting_hidden.insert(s.waiting_hidden.end(), s.hidden.begin(), s.hidden.end());
            i += 1;
        }
        if (hidden) {
            s.waiting_hidden.insert(s.waiting_hidden.end(), hidden + (i - 1) * n_embd_, hidden + (end - 1) * n_embd_);
        }
        s.waiting_hidden.resize(s.waiting.size() * n_embd_);
    }
    if (hidden) {
        s.hidden.assign(hidden + (end - 1) * n_embd_, hidden + end * n_embd_);
    } else {
        s.hidden.assign(n_embd_, 0);
    }
    s.n_past     = rows[end - 1].position + 1;
    s.n_verified = s.n_drafted > 0 ? static_cast<int32_t>(end - begin) : 0;
}

// Takes back the entries of the token at n_past, which a draft made.
void Session::take_back_last(llama_seq_id seq_id) {
    auto & s = sequences_[seq_id];
    for (int32_t & decoded : s.decoded) {
        decoded = std::min(decoded, s.n_past);
    }
    draft_->truncate(seq_id, s.n_past);
    s.drafted_from = -1;
}

// Takes back the last n tokens, 1 or more, of those that wait. The first of them was to pair with the
// hidden row that now meets whatever comes in its place.
void Session::take_back_waiting(SequenceState & s, int32_t n) const {
    const size_t kept  = s.waiting.size() - n;
    const auto   first = s.waiting_hidden.begin() + static_cast<std::ptrdiff_t>(kept * n_embd_);
    s.hidden.assign(first, first + n_embd_);
    s.waiting.resize(kept);
    s.waiting_hidden.resize(kept * n_embd_);
    s.n_past -= n;
}

// Drops the pairs that every head has entries for.
void Session::drop_waiting(SequenceState & s) const {
    const int32_t lowest = *std::min_element(s.decoded.begin(), s.decoded.end());
    const int32_t n      = std::min(lowest, s.n_past) - s.first_waiting();
    s.waiting.erase(s.waiting.begin(), s.waiting.begin() + n);
    s.waiting_hidden.erase(s.waiting_hidden.begin(), s.waiting_hidden.begin() + n * n_embd_);
}

// Whatever waits is to be decoded by all heads, whether they have entries for it or not.
void Session::start_over(llama_seq_id seq_id) {
    auto & s = sequences_[seq_id];
    draft_->truncate(seq_id, s.first_waiting());
    s.decoded.assign(s.decoded.size(), s.first_waiting());
    s.drafted_from = -1;
}

// Decodes what waits in these sequences. If that fails it waits on.
void Session::catch_up(const std::vector<llama_seq_id> & seq_ids) try {
    for (int32_t head = 0; head < n_heads_; ++head) {
        std::vector<Row> rows;
        for (const llama_seq_id seq_id : seq_ids) {
            const auto &  s     = sequences_[seq_id];
            const int32_t begin = std::max(s.decoded[head], s.first_waiting());
            draft_->truncate(seq_id, begin);  // the entries of heads before this one
            for (int32_t position = begin; position < s.n_past; ++position) {
                if (static_cast<int32_t>(rows.size()) == draft_->params().n_batch) {
                    decode(head, rows);
                    rows.clear();
                }
                const int32_t i = position - s.first_waiting();
                rows.push_back({ s.waiting[i], position, seq_id, false, s.waiting_hidden.data() + i * n_embd_ });
            }
        }
        if (!rows.empty()) {
            decode(head, rows);
        }
    }
    for (const llama_seq_id seq_id : seq_ids) {
        auto & s = sequences_[seq_id];
        s.decoded.assign(s.decoded.size(), s.n_past);
        drop_waiting(s);
    }
} catch (...) {
    for (const llama_seq_id seq_id : seq_ids) {
        start_over(seq_id);
    }
    throw;
}

void Session::decode(int32_t head, const std::vector<Row> & rows) {
    if (draft_->n_heads() > 1) {
        draft_->select_head(head);
    }
    draft_->decode(rows);
    const std::lock_guard lock(statistics_mutex_);
    statistics_.n_decodes += 1;
    statistics_.n_rows += static_cast<int64_t>(rows.size());
}

void Session::Draft::resize(size_t n) {
    tokens.resize(n);
    confidences.resize(std::min(n, confidences.size()));
    chances.resize(std::min(n, chances.size()));
}

void Session::draft(std::vector<Request> requests, const mtpbatch_terms * terms, Pool * pool,
                    std::vector<Draft> & drafts) {
    Stopwatch         watch;
    std::vector<bool> seen(sequences_.size());
    for (auto & request : requests) {
        const auto & s = sequence(request.seq_id);
        if (seen[request.seq_id]) {
            throw Error(MTPBATCH_SESSION_DRAFT, sequence_name(request.seq_id) + " is asked for twice");
        }
        seen[request.seq_id] = true;
        if (s.ignored) {
            throw Error(MTPBATCH_SESSION_DRAFT,
                        sequence_name(request.seq_id) + " is ignored: nothing was kept to draft from");
        }
        if (s.n_drafted > 0) {
            throw Error(MTPBATCH_SESSION_DRAFT, sequence_name(request.seq_id) + " has a draft that waits for " +
                                                    (s.n_verified > 0 ? "accept()" : "process() and accept()"));
        }
        if (request.n_past != s.n_past || s.n_past == 0) {
            throw Error(MTPBATCH_SESSION_SEQUENCE, sequence_name(request.seq_id) + " has taken in " +
                                                       std::to_string(s.n_past) + " positions, but n_past is " +
                                                       std::to_string(request.n_past));
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
    const bool    chained = draft_->n_heads() > 1;
    // Where each length is a pass of its own, drafts that pay go as deep as the others: who verifies
    // them cuts them to the lengths that pay.
    const bool level = target_->model().keeps_recurrent_state();
    drafts.assign(requests.size(), {});
    int32_t                                 depth = 0;               // tokens drafted so far
    std::vector<int32_t>                    turns(requests.size());  // decodes that each request took part in
    std::vector<size_t>                     drafting;                // requests that go one token deeper
    std::vector<Row>                        rows;
    std::vector<std::pair<size_t, int32_t>> outputs;  // request, row of the batch being filled

    // Looks through the logits of `outputs`.
    struct Pick {
        const float * logits;
        llama_token   token;
        float         probability;  // 1 if nobody asks for it
    };
    std::vector<Pick> picks;
    const auto        look = [&] {
        picks.clear();
        for (const auto & [r, row] : outputs) {
            picks.push_back({ draft_->logits(row), -1, 1 });
        }
        const auto pick = [&](int32_t i) {
            Pick &          p       = picks[static_cast<size_t>(i)];
            const Request & request = requests[outputs[static_cast<size_t>(i)].first];
            p.token                 = argmax(p.logits, n_vocab);
            if (terms || config_.p_min > 0) {
                const float temperature = request.temperature > 0 ? request.temperature : 1;
                p.probability           = probability_of(p.token, p.logits, n_vocab, temperature);
            }
        };
        const auto n = static_cast<int32_t>(picks.size());
        if (pool) {
            pool->run(n, pick, int64_t{ n } * n_vocab);
        } else {
            for (int32_t i = 0; i < n; ++i) {
                pick(i);
            }
        }
    };
    // Whether a token that was picked is worth verifying.
    const auto keeps = [&](size_t r, const Pick & pick) {
        const Request & request = requests[r];
        Draft &         draft   = drafts[r];
        if (config_.p_min > 0 && pick.probability < config_.p_min) {
            return false;
        }
        if (terms) {
            const int32_t confidence = confidence_of(pick.probability, request.temperature);
            const float   before     = draft.chances.empty() ? 1 : draft.chances.back();
            const float   chance     = before * terms->acceptance[confidence];
            if (request.selective && chance < terms->target_row && !level) {
                return false;
            }
            draft.confidences.push_back(confidence);
            draft.chances.push_back(chance);
        }
        draft.tokens.push_back(pick.token);
        return true;
    };
    // Decodes `rows` and picks one token for each of its outputs.
    const auto flush = [&] {
        decode(chained ? depth : 0, rows);
        look();
        for (size_t i = 0; i < outputs.size(); ++i) {
            const auto [r, row] = outputs[i];
            turns[r] += 1;
            if (keeps(r, picks[i]) && turns[r] < requests[r].depth) {
                auto &        chain  = sequences_[requests[r].seq_id].chain;
                const float * hidden = draft_->hidden(row);
                chain.insert(chain.end(), hidden, hidden + n_embd_);
                drafting.push_back(r);
            }
        }
        rows.clear();
        outputs.clear();
    };
    // Drops the selective requests whose next draft is not expected to pay: with all others, or by
    // itself, unless drafts are to be level.
    const auto drop_unpromising = [&] {
        float      gain  = 0;
        bool       bound = false;  // to decode once more anyway
        const auto stays = [&](size_t r) {
            const Request & request = requests[r];
            if (!request.selective) {
                bound = true;
                return true;
            }
            const float next = drafts[r].chances.back() * request.expected - terms->target_row;
            gain += level ? std::max(next, 0.0f) - terms->draft_row : std::max(next - terms->draft_row, 0.0f);
            return level || next > terms->draft_row;
        };
        drafting.erase(std::remove_if(drafting.begin(), drafting.end(), [&](size_t r) { return !stays(r); }),
                       drafting.end());
        if (gain < (terms ? terms->draft_decode : 0) && !(bound && !level)) {
            drafting.erase(
                std::remove_if(drafting.begin(), drafting.end(), [&](size_t r) { return requests[r].selective; }),
                drafting.end());
        }
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
    // A request's rows of the current depth: what waits for the head, then the newly sampled token
    // (t = 0) and those drafted after it, of which only a chained head lacks more than the last.
    const auto add_turn = [&](size_t r) {
        const auto & s = sequences_[requests[r].seq_id];
        if (chained || depth == 0) {
            const int32_t decoded = s.decoded[chained ? depth : 0];
            draft_->truncate(requests[r].seq_id, decoded);
            for (int32_t i = std::max(0, decoded - s.first_waiting()); i < static_cast<int32_t>(s.waiting.size());
                 ++i) {
                add(r, s.waiting[i], s.first_waiting() + i, s.waiting_hidden.data() + i * n_embd_, false);
            }
        }
        for (int32_t t = chained ? 0 : depth; t <= depth; ++t) {
            add(r, t == 0 ? requests[r].last_token : drafts[r].tokens[t - 1],
                s.n_past + (draft_->shares_memory() ? 0 : t),
                t == 0 ? s.hidden.data() : s.chain.data() + (t - 1) * n_embd_, t == depth);
        }
    };

    try {
        for (size_t r = 0; r < requests.size(); ++r) {
            if (requests[r].depth > 0) {
                auto & s = sequences_[requests[r].seq_id];
                if (s.drafted_from >= 0) {
                    take_back_last(requests[r].seq_id);  // it was drafted from before, and nothing came of it
                }
                s.chain.clear();
                drafting.push_back(r);
            }
        }
        for (; !drafting.empty(); ++depth) {
            std::vector<size_t> now;
            now.swap(drafting);
            for (const size_t r : now) {
                add_turn(r);
            }
            flush();
            drop_unpromising();
        }
    } catch (...) {
        for (const auto & request : requests) {
            start_over(request.seq_id);
        }
        drafts.clear();
        throw;
    }

    const std::lock_guard lock(statistics_mutex_);
    for (size_t r = 0; r < requests.size(); ++r) {
        if (requests[r].depth == 0) {
            continue;
        }
        auto & s = sequences_[requests[r].seq_id];
        if (!draft_->shares_memory()) {
            std::fill_n(s.decoded.begin(), chained ? turns[r] : 1, s.n_past + 1);
            drop_waiting(s);
            // Entries beyond the first token's pair with the heads' own hidden rows, not the target's.
            draft_->truncate(requests[r].seq_id, s.n_past + 1);
            s.drafted_from = requests[r].last_token;
        }
        if (static_cast<int32_t>(drafts[r].tokens.size()) < config_.n_min) {
            drafts[r] = {};
        }
        s.n_drafted  = static_cast<int32_t>(drafts[r].tokens.size());
        s.n_verified = 0;
        statistics_.n_drafts += s.n_drafted > 0;
        statistics_.n_drafted += s.n_drafted;
        for (int32_t d = 0; d < s.n_drafted; ++d) {
            statistics_.drafted_by_depth[d] += 1;
        }
    }
    statistics_.draft_us += watch.lap();
}

void Session::accept(llama_seq_id seq_id, int32_t n_accepted) {
    Stopwatch watch;
    auto &    s = sequence(seq_id);
    if (s.n_drafted == 0) {
        throw Error(MTPBATCH_SESSION_ACCEPT, sequence_name(seq_id) + " has no draft to accept from");
    }
    if (s.n_verified == 0) {
        throw Error(MTPBATCH_SESSION_ACCEPT, sequence_name(seq_id) +
                                                 ": the draft was not verified; decode it with the target " +
                                                 "and call process() first");
    }
    const int32_t most = std::min(s.n_drafted, s.n_verified - 1);
    if (n_accepted < 0 || n_accepted > most) {
        throw Error(MTPBATCH_SESSION_ACCEPT,
                    sequence_name(seq_id) + ": n_accepted must be from 0 to " + std::to_string(most) +
                        ", the drafted tokens that were verified; got " + std::to_string(n_accepted));
    }
    const int32_t n_rejected = s.n_verified - 1 - n_accepted;
    if (n_rejected > 0) {
        take_back_waiting(s, n_rejected);
    }
    if (draft_->shares_memory()) {
        s.waiting.clear();
        s.waiting_hidden.clear();
    }
    s.n_drafted  = 0;
    s.n_verified = 0;
    {
        const std::lock_guard lock(statistics_mutex_);
        statistics_.n_accepted += n_accepted;
        for (int32_t d = 0; d < n_accepted; ++d) {
            statistics_.accepted_by_depth[d] += 1;
        }
        statistics_.accept_us += watch.lap();
    }
    // Of a chain that is not drafted from to its end, the last heads fall behind.
    if (s.waiting.size() > max_waiting_) {
        catch_up({ seq_id });
    }
}

mtpbatch_session_statistics Session::statistics() const {
    const std::lock_guard lock(statistics_mutex_);
    return statistics_;
}

}  // namespace mtpbatch

using namespace mtpbatch;

mtpbatch_status mtpbatch_session_create(const mtpbatch_context * target, const mtpbatch_context * draft,
                                        const mtpbatch_session_config * config, mtpbatch_session ** session,
                                        mtpbatch_error * error) {
    return guard(error, [&] {
        target->impl->require_free();
        *session = new mtpbatch_session{ std::make_shared<Session>(target->impl, draft->impl, *config) };
    });
}

void mtpbatch_session_free(mtpbatch_session * session) {
    delete session;
}

mtpbatch_status mtpbatch_session_begin(mtpbatch_session * session, int32_t seq_id, int32_t n_prompt,
                                       mtpbatch_error * error) {
    return guard(error, [&] {
        session->impl->target().require_free();
        session->impl->begin(seq_id, n_prompt);
    });
}

mtpbatch_status mtpbatch_session_process(mtpbatch_session * session, const mtpbatch_batch * batch,
                                         mtpbatch_error * error) {
    return guard(error, [&] {
        session->impl->target().require_free();
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

mtpbatch_status mtpbatch_session_save(mtpbatch_session * session, int32_t seq_id, uint8_t * state, size_t size,
                                      size_t * n, mtpbatch_error * error) {
    return guard(error, [&] {
        session->impl->target().require_free();
        *n = session->impl->save(seq_id, state, size);
    });
}

mtpbatch_status mtpbatch_session_restore(mtpbatch_session * session, int32_t seq_id, const uint8_t * state, size_t size,
                                         mtpbatch_error * error) {
    return guard(error, [&] {
        session->impl->target().require_free();
        session->impl->restore(seq_id, state, size);
    });
}

mtpbatch_status mtpbatch_session_fork(mtpbatch_session * session, int32_t source, int32_t target,
                                      mtpbatch_error * error) {
    return guard(error, [&] {
        session->impl->target().require_free();
        session->impl->fork(source, target);
    });
}

mtpbatch_status mtpbatch_session_draft(mtpbatch_session * session, int32_t n, const int32_t * seq_ids,
                                       const int32_t * n_past, const int32_t * last_tokens, const int32_t * depths,
                                       int32_t * drafts, int32_t * lengths, mtpbatch_error * error) {
    return guard(error, [&] {
        session->impl->target().require_free();
        std::vector<Session::Request> requests;
        for (int32_t i = 0; i < n; ++i) {
            requests.push_back({ seq_ids[i], n_past[i], last_tokens[i], depths[i] });
        }
        std::vector<Session::Draft> results;
        session->impl->draft(requests, /*terms*/ nullptr, /*pool*/ nullptr, results);
        for (int32_t i = 0; i < n; ++i) {
            const auto & tokens = results[i].tokens;
            std::copy(tokens.begin(), tokens.end(), drafts + i * session->impl->config().n_draft_max);
            lengths[i] = static_cast<int32_t>(tokens.size());
        }
    });
}

mtpbatch_status mtpbatch_session_accept(mtpbatch_session * session, int32_t seq_id, int32_t n_accepted,
                                        mtpbatch_error * error) {
    return guard(error, [&] {
        session->impl->target().require_free();
        session->impl->accept(seq_id, n_accepted);
    });
}

void mtpbatch_session_get_statistics(const mtpbatch_session * session, mtpbatch_session_statistics * statistics) {
    *statistics = session->impl->statistics();
}
