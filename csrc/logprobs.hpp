// How probable tokens are.
#pragma once

#include "mtpbatch.h"

namespace mtpbatch {

// Looks through a row of logits once. If the greatest is infinite, no token has any probability.
mtpbatch_token_logprobs token_logprobs(const float * logits, int32_t n_vocab, int32_t token, int32_t n_top);

}  // namespace mtpbatch
