// What a request changes in a row of logits before it is looked at.
#pragma once

#include "llama.h"
#include "mtpbatch.h"

#include <memory>
#include <unordered_map>
#include <vector>

namespace mtpbatch {

struct FreeSampler {
    void operator()(llama_sampler * sampler) const { llama_sampler_free(sampler); }
};
using SamplerPointer = std::unique_ptr<llama_sampler, FreeSampler>;

// Biases, bans and penalties of one request, and the tokens that they depend on.
class Edits {
  public:
    explicit Edits(const mtpbatch_sampling & params);

    // Whether there is anything to change in the next row; if not, then in no later one.
    bool any() const;
    // Changes the row after the tokens accepted so far, in place. A few tokens of it: what that
    // takes does not depend on the size of the vocabulary.
    void apply(float * logits, int32_t n_vocab);
    // The answer goes on with this token.
    void accept(llama_token token);

  private:
    bool penalizes() const { return repetition_ != 1 || frequency_ != 0 || presence_ != 0; }
    bool ends_with_all_but_last_of(const std::vector<llama_token> & banned) const;
    void penalize(float * logits, int32_t n_vocab) const;
    void discourage_repetition(float * logits, int32_t n_vocab);

    std::vector<mtpbatch_bias>            biases_;
    std::vector<std::vector<llama_token>> banned_;
    std::vector<llama_token>              withheld_;
    size_t                                min_tokens_;
    float                                 repetition_;
    float                                 frequency_;
    float                                 presence_;
    SamplerPointer                        dry_;  // null: none
    std::vector<llama_token>              answer_;
    // How often the answer has each token that was seen, in the history or there. Empty if nothing
    // depends on it.
    std::unordered_map<llama_token, int32_t> seen_;
};

}  // namespace mtpbatch
