// States of sequences, kept in host memory.
#pragma once

#include "internal.hpp"

#include <map>

namespace mtpbatch {

// Each has a number, from save() to drop(). It holds all that the contexts have of a sequence, and the
// session if there is one.
class Snapshots {
  public:
    Snapshots(std::shared_ptr<Context> target, std::shared_ptr<Session> session);

    // Returns how many bytes it takes. If it throws there is none, and the sequence can go on.
    size_t save(int64_t number, llama_seq_id seq_id);
    // Fills an empty sequence with a snapshot, or with its first tokens. If it throws, the sequence is
    // empty still.
    void restore(int64_t number, llama_seq_id seq_id);
    void restore(int64_t number, llama_seq_id seq_id, int32_t n_tokens);
    // Harmless if there is none.
    void drop(int64_t number);

  private:
    struct Snapshot {
        std::unique_ptr<uint8_t[]> bytes;  // not a vector, which would write them twice
        size_t                     n_bytes;
        int32_t                    length;  // tokens
    };

    const Snapshot & find(int64_t number) const;
    void             load(const Snapshot & snapshot, llama_seq_id seq_id, int32_t n_tokens);

    const std::shared_ptr<Context> target_;
    const std::shared_ptr<Session> session_;
    std::map<int64_t, Snapshot>    kept_;
};

}  // namespace mtpbatch
