// Saving and restoring by number.
#include "snapshots.hpp"

namespace mtpbatch {

Snapshots::Snapshots(std::shared_ptr<Context> target, std::shared_ptr<Session> session)
    : target_(std::move(target)), session_(std::move(session)) {}

size_t Snapshots::save(int64_t number, llama_seq_id seq_id) {
    const size_t               n_bytes = session_ ? session_->save(seq_id, nullptr, 0) : target_->state_size(seq_id);
    std::unique_ptr<uint8_t[]> bytes(new uint8_t[n_bytes]);
    if (session_) {
        session_->save(seq_id, bytes.get(), n_bytes);
    } else {
        target_->save(seq_id, bytes.get(), n_bytes);
    }
    kept_.insert_or_assign(number, Snapshot{ std::move(bytes), n_bytes, target_->length(seq_id) });
    return n_bytes;
}

void Snapshots::restore(int64_t number, llama_seq_id seq_id, int32_t n_tokens) {
    load(find(number), seq_id, n_tokens);
}

void Snapshots::restore(int64_t number, llama_seq_id seq_id) {
    const Snapshot & snapshot = find(number);
    load(snapshot, seq_id, snapshot.length);
}

void Snapshots::drop(int64_t number) {
    kept_.erase(number);
}

const Snapshots::Snapshot & Snapshots::find(int64_t number) const {
    const auto found = kept_.find(number);
    if (found == kept_.end()) {
        throw Error(MTPBATCH_SESSION_STATE, "there is no snapshot " + std::to_string(number));
    }
    return found->second;
}

void Snapshots::load(const Snapshot & snapshot, llama_seq_id seq_id, int32_t n_tokens) {
    const auto refuse = [](const std::string & message) { throw Error(MTPBATCH_SESSION_STATE, message); };
    if (n_tokens > snapshot.length) {
        refuse("the snapshot has " + std::to_string(snapshot.length) + " tokens, fewer than " +
               std::to_string(n_tokens));
    }
    if (session_) {
        session_->restore(seq_id, snapshot.bytes.get(), snapshot.n_bytes);
    } else if (!target_->load(seq_id, snapshot.bytes.get(), snapshot.n_bytes, snapshot.length)) {
        refuse(with_reason("llama.cpp could not restore " + sequence_name(seq_id)));
    }
    if (session_ ? session_->cut(seq_id, n_tokens) : target_->truncate(seq_id, n_tokens)) {
        return;
    }
    target_->truncate(seq_id, 0);
    if (session_) {
        session_->reset(seq_id);
    }
    refuse(sequence_name(seq_id) + " cannot be cut to " + std::to_string(n_tokens) + " tokens");
}

}  // namespace mtpbatch
