// Sampling as llama.cpp's own loops do it (common_sampler::set_logits, then the chain): for each
// row an array of all candidates, on one thread.
#include "llama.h"

#include <cstddef>
#include <vector>

extern "C" void plain_sample(llama_sampler * chain, const float * logits, int n_rows, int n_vocab, int * tokens) {
    std::vector<llama_token_data> candidates(n_vocab);
    for (int row = 0; row < n_rows; ++row, logits += n_vocab) {
        for (llama_token token = 0; token < n_vocab; ++token) {
            candidates[token] = { token, logits[token], 0.0f };
        }
        llama_token_data_array array{ candidates.data(), candidates.size(), -1, false };
        llama_sampler_apply(chain, &array);
        tokens[row] = array.data[array.selected].id;
    }
}
