// From logits to tokens.
#include "internal.hpp"

#include <algorithm>
#include <cmath>

namespace mtpbatch {

int32_t argmax(const float * values, int32_t n) {
    // Two passes that vectorise beat one that carries an index along.
    float best = values[0];
    for (int32_t i = 1; i < n; ++i) {
        best = values[i] > best ? values[i] : best;
    }
    return static_cast<int32_t>(std::find(values, values + n, best) - values) % n;
}

float probability_of(int32_t best, const float * logits, int32_t n) {
    float sum = 0;
    for (int32_t i = 0; i < n; ++i) {
        sum += std::exp(logits[i] - logits[best]);
    }
    return 1 / sum;
}

namespace {

constexpr float MIN_TEMPERATURE = 1e-6f;  // below it the best token has all the probability, and logits overflow

}  // namespace

Sampler::Sampler(const mtpbatch_admission & params) {
    if (params.temperature < MIN_TEMPERATURE || params.top_k == 1) {
        return;
    }
    chain_.reset(llama_sampler_chain_init(llama_sampler_chain_default_params()));
    const auto add = [this](llama_sampler * sampler) { llama_sampler_chain_add(chain_.get(), sampler); };
    // The order of llama.cpp's own tools: cut the tail on the model's distribution, then heat it.
    if (params.top_k > 0) {
        add(llama_sampler_init_top_k(params.top_k));
    }
    if (params.top_p < 1) {
        add(llama_sampler_init_top_p(params.top_p, 1));
    }
    if (params.min_p > 0) {
        add(llama_sampler_init_min_p(params.min_p, 1));
    }
    add(llama_sampler_init_temp(params.temperature));
    // To llama.cpp the last seed means a random one; here every seed is as good as another.
    add(llama_sampler_init_dist(params.seed == LLAMA_DEFAULT_SEED ? 0 : params.seed));
}

llama_token Sampler::sample(const float * logits, int32_t n_vocab) {
    if (!chain_) {
        return argmax(logits, n_vocab);
    }
    candidates_.resize(n_vocab);
    for (int32_t i = 0; i < n_vocab; ++i) {
        candidates_[i] = { i, logits[i], 0 };
    }
    llama_token_data_array array{ candidates_.data(), candidates_.size(), -1, false };
    llama_sampler_apply(chain_.get(), &array);
    if (array.selected < 0 || array.selected >= static_cast<int64_t>(array.size)) {
        throw Error(MTPBATCH_DECODE_FAILED, "the sampler chain picked no token");
    }
    const llama_token token = array.data[array.selected].id;
    llama_sampler_accept(chain_.get(), token);
    return token;
}

}  // namespace mtpbatch
