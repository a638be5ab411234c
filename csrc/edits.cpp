// Biases, bans and penalties: each touches few tokens of a row.
#include "edits.hpp"

#include "internal.hpp"

#include <algorithm>
#include <limits>

struct mtpbatch_dry {
    mtpbatch::SamplerPointer impl;
};

namespace mtpbatch {

namespace {

constexpr float IMPOSSIBLE = -std::numeric_limits<float>::infinity();

std::vector<llama_token> copy(const mtpbatch_tokens & tokens) {
    return { tokens.ids, tokens.ids + tokens.n };
}

bool holds(int32_t n_vocab, llama_token token) {
    return token >= 0 && token < n_vocab;
}

}  // namespace

Edits::Edits(const mtpbatch_sampling & params)
    : biases_(params.bias, params.bias + params.n_bias),
      withheld_(copy(params.withheld)),
      min_tokens_(static_cast<size_t>(params.min_tokens)),
      repetition_(params.repetition_penalty),
      frequency_(params.frequency_penalty),
      presence_(params.presence_penalty),
      dry_(params.dry ? llama_sampler_clone(params.dry->impl.get()) : nullptr) {
    std::transform(params.banned, params.banned + params.n_banned, std::back_inserter(banned_), copy);
    for (int32_t i = 0; i < params.history.n; ++i) {
        const llama_token token = params.history.ids[i];
        if (repetition_ != 1 || dry_) {
            seen_.emplace(token, 0);
        }
        if (dry_) {
            llama_sampler_accept(dry_.get(), token);
        }
    }
}

bool Edits::any() const {
    return !biases_.empty() || !banned_.empty() || (answer_.size() < min_tokens_ && !withheld_.empty()) ||
           penalizes() || dry_;
}

// In the order of llama.cpp's own tools, which ban by a bias of -inf.
void Edits::apply(float * logits, int32_t n_vocab) {
    const auto ban = [&](llama_token token) {
        if (holds(n_vocab, token)) {
            logits[token] = IMPOSSIBLE;
        }
    };
    for (const auto & [token, bias] : biases_) {
        if (holds(n_vocab, token)) {
            logits[token] += bias;
        }
    }
    for (const auto & banned : banned_) {
        if (ends_with_all_but_last_of(banned)) {
            ban(banned.back());
        }
    }
    if (answer_.size() < min_tokens_) {
        std::for_each(withheld_.begin(), withheld_.end(), ban);
    }
    if (penalizes()) {
        penalize(logits, n_vocab);
    }
    if (dry_) {
        discourage_repetition(logits, n_vocab);
    }
}

void Edits::accept(llama_token token) {
    if (!any()) {
        return;
    }
    answer_.push_back(token);
    if (penalizes() || dry_) {
        seen_[token] += 1;
    }
    if (dry_) {
        llama_sampler_accept(dry_.get(), token);
    }
}

bool Edits::ends_with_all_but_last_of(const std::vector<llama_token> & banned) const {
    const size_t n = banned.size() - 1;
    return n <= answer_.size() && std::equal(banned.begin(), banned.end() - 1, answer_.end() - static_cast<long>(n));
}

// As llama.cpp's penalties do: the first one over history and answer, the others over the answer.
void Edits::penalize(float * logits, int32_t n_vocab) const {
    for (const auto & [token, count] : seen_) {
        if (!holds(n_vocab, token)) {
            continue;
        }
        float & logit = logits[token];
        logit         = logit <= 0 ? logit * repetition_ : logit / repetition_;
        if (count > 0) {
            logit -= static_cast<float>(count) * frequency_ + presence_;
        }
    }
}

// Only a token that was seen can continue a repetition.
void Edits::discourage_repetition(float * logits, int32_t n_vocab) {
    thread_local std::vector<llama_token_data> candidates;
    candidates.clear();
    for (const auto & [token, count] : seen_) {
        if (holds(n_vocab, token)) {
            candidates.push_back({ token, logits[token], 0 });
        }
    }
    llama_token_data_array array{ candidates.data(), candidates.size(), -1, false };
    llama_sampler_apply(dry_.get(), &array);
    for (const llama_token_data & candidate : candidates) {
        logits[candidate.id] = candidate.logit;
    }
}

}  // namespace mtpbatch

using namespace mtpbatch;

mtpbatch_status mtpbatch_dry_create(const mtpbatch_model * model, float multiplier, float base, int32_t allowed_length,
                                    int32_t n_last, int32_t n_breakers, const char ** breakers, mtpbatch_dry ** dry,
                                    mtpbatch_error * error) {
    return guard(error, [&] {
        *dry = new mtpbatch_dry{ SamplerPointer(llama_sampler_init_dry(
            model->impl->vocab, multiplier, base, allowed_length, n_last, breakers, static_cast<size_t>(n_breakers))) };
    });
}

void mtpbatch_dry_free(mtpbatch_dry * dry) {
    delete dry;
}
