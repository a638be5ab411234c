// From a row of logits to log probabilities.
#include "logprobs.hpp"

#include "internal.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace mtpbatch {

namespace {

constexpr float   IMPOSSIBLE = -std::numeric_limits<float>::infinity();
constexpr int32_t WIDTH      = 4;
constexpr int32_t BLOCK      = 64;  // values looked at together: they stay in the nearest cache

using Lanes = float __attribute__((vector_size(16)));  // what every CPU at hand takes in one register
using Whole = int32_t __attribute__((vector_size(16)));

// e^x for x <= 0, off by less than 1e-6 of it; what is not a number counts as -inf.
Lanes power(Lanes x) {
    constexpr float LEAST = -87;  // the power of a smaller one is as good as nothing
    x                     = x > LEAST ? x : Lanes{} + LEAST;
    x *= 1.44269504f;                                               // e^x = 2^(1.44 x)
    const Whole whole = __builtin_convertvector(x - 0.5f, Whole);   // the nearest one
    const Lanes f     = x - __builtin_convertvector(whole, Lanes);  // of [-0.5, 0.5]
    const Lanes mantissa =
        1 + f * (0.69314718f +
                 f * (0.24022651f + f * (0.05550411f + f * (0.00961813f + f * (0.00133336f + f * 0.00015404f)))));
    const Whole bits = (whole + 127) << 23;
    Lanes       exponent;
    std::memcpy(&exponent, &bits, sizeof bits);
    return mantissa * exponent;
}

// Some of a row's values, padded with -inf.
struct Block {
    Lanes lanes[BLOCK / WIDTH];

    Block(const float * values, int32_t n) {
        std::fill(std::begin(lanes), std::end(lanes), Lanes{} + IMPOSSIBLE);
        std::memcpy(lanes, values, static_cast<size_t>(n) * sizeof(float));
    }
    float greatest() const {
        Lanes best = Lanes{} + IMPOSSIBLE;
        for (const Lanes & l : lanes) {
            best = l > best ? l : best;
        }
        return std::max(std::max(best[0], best[1]), std::max(best[2], best[3]));
    }
    int32_t n_above(float value) const {
        Whole n{};
        for (const Lanes & l : lanes) {
            n -= l > value;  // -1 where it is
        }
        return n[0] + n[1] + n[2] + n[3];
    }
    // The sum of e^(value - greatest).
    float mass(float greatest) const {
        Lanes sum{};
        for (const Lanes & l : lanes) {
            sum += power(l - greatest);
        }
        return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
};

// Puts a token among the n_most most probable ones so far. Of equal ones the first stays ahead.
void insert(mtpbatch_token_logprobs & into, int32_t n_most, int32_t token, float logit) {
    int32_t i = into.n_top < n_most ? into.n_top++ : n_most - 1;
    for (; i > 0 && into.top_logprobs[i - 1] < logit; --i) {
        into.top[i]          = into.top[i - 1];
        into.top_logprobs[i] = into.top_logprobs[i - 1];
    }
    into.top[i]          = token;
    into.top_logprobs[i] = logit;
}

float number_or_impossible(float logit) {
    return logit == logit ? logit : IMPOSSIBLE;
}

}  // namespace

mtpbatch_token_logprobs token_logprobs(const float * logits, int32_t n_vocab, int32_t token, int32_t n_top) {
    mtpbatch_token_logprobs result{};  // with logits, until their sum is known
    result.token           = token;
    result.logprob         = number_or_impossible(logits[token]);
    result.rank            = 1;
    const int32_t n_most   = std::min(n_top, n_vocab);
    const auto    is_among = [&](float logit) {
        return result.n_top < n_most || (n_most > 0 && logit > result.top_logprobs[n_most - 1]);
    };
    float  best = IMPOSSIBLE;
    double sum  = 0;  // of e^(logit - best)
    for (int32_t begin = 0; begin < n_vocab; begin += BLOCK) {
        const int32_t n = std::min(BLOCK, n_vocab - begin);
        const Block   block(logits + begin, n);
        const float   here = block.greatest();
        if (here > best) {
            sum *= std::exp(double{ best } - double{ here });
            best = here;
        }
        sum += block.mass(best);
        result.rank += block.n_above(result.logprob);
        for (int32_t i = begin; i < begin + n && is_among(here); ++i) {
            const float logit = number_or_impossible(logits[i]);
            if (is_among(logit)) {
                insert(result, n_most, i, logit);
            }
        }
    }
    const double log_sum = std::log(sum);
    const auto   settle  = [&](float logit) {
        const bool possible = std::isfinite(best) && logit > IMPOSSIBLE;
        return possible ? static_cast<float>(double{ logit } - double{ best } - log_sum) : IMPOSSIBLE;
    };
    result.logprob = settle(result.logprob);
    std::transform(result.top_logprobs, result.top_logprobs + result.n_top, result.top_logprobs, settle);
    return result;
}

}  // namespace mtpbatch

using namespace mtpbatch;

mtpbatch_status mtpbatch_score(const float * logits, int32_t n_rows, int32_t n_vocab, const int32_t * tokens,
                               int32_t n_top, mtpbatch_token_logprobs * logprobs, mtpbatch_error * error) {
    return guard(error, [&] {
        if (n_rows < 0 || n_top < 0 || n_top > MTPBATCH_MAX_LOGPROBS) {
            throw Error(MTPBATCH_INVALID_ARGUMENT,
                        "n_rows must be at least 0, n_top from 0 to " + std::to_string(MTPBATCH_MAX_LOGPROBS));
        }
        for (int32_t row = 0; row < n_rows; ++row) {
            if (tokens[row] < 0 || tokens[row] >= n_vocab) {
                throw Error(MTPBATCH_INVALID_ARGUMENT,
                            "no such token: " + std::to_string(tokens[row]) + " of n_vocab=" + std::to_string(n_vocab));
            }
            logprobs[row] = token_logprobs(logits + static_cast<size_t>(row) * n_vocab, n_vocab, tokens[row], n_top);
        }
    });
}
