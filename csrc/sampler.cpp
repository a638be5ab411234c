// From logits to tokens.
//
// Whatever is done here before llama.cpp's samplers must not change what they pick. They depend on
// the order of candidates (ties, random picks) and on rounding, so that the comments below say, for
// each way to leave candidates out, why those that stay behave as among all.
#include "internal.hpp"
#include "pool.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace mtpbatch {

namespace {

constexpr float   IMPOSSIBLE      = -std::numeric_limits<float>::infinity();
constexpr float   MIN_TEMPERATURE = 1e-6f;  // below it the best token has all the probability, and logits overflow
constexpr int32_t BLOCK           = 64;     // values looked at together
constexpr int32_t SMALL           = 1024;   // vocabularies that are not worth a preselection
constexpr size_t  MOST            = 8;      // candidates are few if they are at most one in so many

using Lanes = float __attribute__((vector_size(16)));  // what every CPU at hand takes in one register

// The greatest of n values that are numbers, -inf if none is.
float greatest(const float * values, int32_t n) {
    constexpr int32_t WIDTH = sizeof(Lanes) / sizeof(float), N_CHAINS = 4;
    const Lanes       none = Lanes{} + IMPOSSIBLE;
    Lanes             best[N_CHAINS]{ none, none, none, none };  // independent, so that no operation waits for another
    int32_t           i = 0;
    for (; i + N_CHAINS * WIDTH <= n; i += N_CHAINS * WIDTH) {
        for (int32_t chain = 0; chain < N_CHAINS; ++chain) {
            Lanes next;
            std::memcpy(&next, values + i + chain * WIDTH, sizeof next);
            best[chain] = next > best[chain] ? next : best[chain];
        }
    }
    float       result = IMPOSSIBLE;
    const Lanes low = best[0] > best[1] ? best[0] : best[1], high = best[2] > best[3] ? best[2] : best[3];
    const Lanes all = low > high ? low : high;
    for (int32_t lane = 0; lane < WIDTH; ++lane) {
        result = all[lane] > result ? all[lane] : result;
    }
    for (; i < n; ++i) {
        result = values[i] > result ? values[i] : result;
    }
    return result;
}

float number_or_impossible(float logit) {
    return logit == logit ? logit : IMPOSSIBLE;
}

}  // namespace

int32_t argmax(const float * values, int32_t n) {
    float   best  = IMPOSSIBLE;
    int32_t begin = 0;
    for (int32_t i = 0; i < n; i += BLOCK) {
        const float here = greatest(values + i, std::min(BLOCK, n - i));
        if (here > best) {
            best  = here;
            begin = i;
        }
    }
    const int32_t end   = std::min(begin + BLOCK, n);
    const auto    found = std::find(values + begin, values + end, best);
    return found == values + end ? 0 : static_cast<int32_t>(found - values);  // 0: not one number
}

// Not std::exp, which takes one value at a time. Off by less than 2e-4.
float probability_of(int32_t best, const float * logits, int32_t n, float temperature) {
    using Whole             = int32_t __attribute__((vector_size(16)));
    constexpr int32_t WIDTH = sizeof(Lanes) / sizeof(float);
    constexpr float   LEAST = -100;  // powers of 2 that are smaller count as this one, which is nothing
    const float       scale = 1.442695f / std::max(temperature, MIN_TEMPERATURE);  // e^x = 2^(1.44 x)
    const auto        power = [&](Lanes x) {
        x                 = (x - logits[best]) * scale;
        x                 = x > LEAST ? x : Lanes{} + LEAST;  // also what is not a number
        const Whole whole = __builtin_convertvector(x, Whole);
        const Lanes f     = x - __builtin_convertvector(whole, Lanes);  // of (-1, 0]
        const Lanes mantissa =
            1 + f * (0.6931472f + f * (0.2402265f + f * (0.0555041f + f * (0.0096181f + f * 0.0013334f))));
        Lanes       exponent;
        const Whole bits = (whole + 127) << 23;
        std::memcpy(&exponent, &bits, sizeof bits);
        return mantissa * exponent;
    };
    Lanes   sums{};
    int32_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        Lanes next;
        std::memcpy(&next, logits + i, sizeof next);
        sums += power(next);
    }
    float sum = 0;
    for (int32_t lane = 0; lane < WIDTH; ++lane) {
        sum += sums[lane];
    }
    for (; i < n; ++i) {
        sum += power(Lanes{} + logits[i])[0];
    }
    return std::min(1.0f, 1 / sum);
}

namespace {

using Few = std::vector<llama_token_data>;

// A row's logits, with the greatest of each block. One row at a time on each thread.
class Blocks {
  public:
    Blocks(const float * logits, int32_t n_vocab) : logits_(logits), n_vocab_(n_vocab) {
        maxima_.clear();
        for (int32_t i = 0; i < n_vocab; i += BLOCK) {
            maxima_.push_back(greatest(logits + i, std::min(BLOCK, n_vocab - i)));
        }
        max_ = *std::max_element(maxima_.begin(), maxima_.end());
    }

    float max() const { return max_; }

    // Some value that at least k logits reach, and few more than k; -inf: not found.
    float reached_by(size_t k) const {
        // The greatest of several times k groups of blocks are enough to tell.
        const size_t n_blocks = std::max<size_t>(maxima_.size() / (4 * k), 1);  // per group
        if (maxima_.size() / n_blocks < 2 * k) {
            return IMPOSSIBLE;
        }
        thread_local std::vector<float> groups;
        groups.clear();
        for (size_t b = 0; b + n_blocks <= maxima_.size(); b += n_blocks) {
            groups.push_back(greatest(maxima_.data() + b, static_cast<int32_t>(n_blocks)));
        }
        const auto kth = groups.begin() + static_cast<std::ptrdiff_t>(k - 1);
        std::nth_element(groups.begin(), kth, groups.end(), std::greater<>());
        return *kth;
    }

    // All logits from `least` on, in order; none if they are too many.
    void collect(float least, Few & few) const {
        few.clear();
        if (least == IMPOSSIBLE) {
            return;
        }
        for (size_t b = 0; b < maxima_.size(); ++b) {
            if (maxima_[b] >= least) {
                each_in(b, [&](llama_token token, float logit) {
                    if (logit >= least) {
                        few.push_back({ token, logit, 0 });
                    }
                });
                if (few.size() > static_cast<size_t>(n_vocab_) / MOST) {
                    few.clear();
                    return;
                }
            }
        }
    }

    // The first k, and each after them that is greater than the k-th greatest before it, in order;
    // none if they are too many.
    void collect_successive_top(size_t k, Few & few) const {
        thread_local std::vector<float> top;  // a heap with the least of them in front
        top.clear();
        few.clear();
        for (size_t b = 0; b < maxima_.size(); ++b) {
            if (top.size() == k && maxima_[b] <= top.front()) {
                continue;
            }
            each_in(b, [&](llama_token token, float logit) {
                if (top.size() < k) {
                    logit = number_or_impossible(logit);
                } else if (logit > top.front()) {
                    std::pop_heap(top.begin(), top.end(), std::greater<>());
                    top.pop_back();
                } else {
                    return;
                }
                top.push_back(logit);
                std::push_heap(top.begin(), top.end(), std::greater<>());
                few.push_back({ token, logit, 0 });
            });
            if (few.size() > static_cast<size_t>(n_vocab_) / MOST) {
                few.clear();
                return;
            }
        }
    }

    struct Softmax {
        static constexpr float STEP = 0.25f;
        float                  sum  = 0;
        std::array<float, 256> mass{};  // what each step below the greatest logit has of the sum, nearly
    };

    // The sum of exp(logit - max) as llama.cpp adds it up: in order, in single precision. What is
    // less than half a unit in the last place of the sum so far does not change it.
    Softmax softmax() const {
        Softmax result;
        float   relevant = least_relevant(result.sum);
        for (size_t b = 0; b < maxima_.size(); ++b) {
            if (maxima_[b] - max_ < relevant) {
                continue;
            }
            float   distances[BLOCK], shares[BLOCK];
            int32_t n = 0;
            each_in(b, [&](llama_token, float logit) {
                distances[n] = logit - max_;
                n += distances[n] >= relevant;
            });
            for (int32_t i = 0; i < n; ++i) {
                shares[i] = std::exp(distances[i]);
            }
            for (int32_t i = 0; i < n; ++i) {
                const auto step = static_cast<size_t>(-distances[i] / Softmax::STEP);
                result.mass[std::min(step, result.mass.size() - 1)] += shares[i];
                result.sum += shares[i];
            }
            relevant = least_relevant(result.sum);
        }
        return result;
    }

    // The logits from here on have this share of the sum, and little more.
    float least_of(float share, const Softmax & softmax) const {
        const float wanted = (share + 0.1f * (1 - share)) * softmax.sum;
        float       mass   = 0;
        for (size_t step = 0; step < softmax.mass.size(); ++step) {
            mass += softmax.mass[step];
            if (mass >= wanted) {
                return max_ - static_cast<float>(step + 1) * Softmax::STEP;
            }
        }
        return IMPOSSIBLE;
    }

  private:
    template <typename Visit>
    void each_in(size_t block, Visit && visit) const {
        const auto begin = static_cast<int32_t>(block) * BLOCK;
        const auto end   = std::min(begin + BLOCK, n_vocab_);
        for (int32_t i = begin; i < end; ++i) {
            visit(i, logits_[i]);
        }
    }

    // The least x for which sum + exp(x) can be another float than sum.
    static float least_relevant(float sum) {
        constexpr float LN_2      = 0.69314718f;
        constexpr float TOLERANCE = 0.01f;  // far more than exp's error
        const int       exponent  = sum > 0 ? std::max(std::ilogb(sum), -126) : -126;
        return static_cast<float>(exponent - 24) * LN_2 - TOLERANCE;
    }

    static thread_local std::vector<float> maxima_;
    const float *                          logits_;
    int32_t                                n_vocab_;
    float                                  max_;
};

thread_local std::vector<float> Blocks::maxima_;

// llama.cpp sorts more than 128 candidates in 128 buckets, of equal width from -10 to 10 and what
// lies beyond in the outermost. The buckets it does not need do not matter to the others. To keep
// all that is in `value`'s bucket or above, keep all from here on; one bucket more is for rounding.
float bucket_floor(float value) {
    constexpr float WIDTH = 20.0f / 128;
    const float     floor = (std::floor((std::min(value, 10 - WIDTH) + 10) / WIDTH) - 1) * WIDTH - 10;
    return floor > -10 ? floor : IMPOSSIBLE;
}

constexpr size_t MOST_UNBUCKETED = 128;
constexpr float  MOST_IN_BUCKETS = 1e8;  // greater logits overflow as a bucket's index

// The k greatest in descending order, equal ones in the order that llama.cpp gives them.
void sort_as_llama_cpp(Few & few, size_t k) {
    const SamplerPointer   top_k(llama_sampler_init_top_k(static_cast<int32_t>(k)));
    llama_token_data_array array{ few.data(), few.size(), -1, false };
    llama_sampler_apply(top_k.get(), &array);
    few.resize(array.size);
}

// In descending order; false if equal ones among the first k or next to them leave a choice.
bool sort_distinct(Few & few, size_t k) {
    std::sort(few.begin(), few.end(), [](const auto & a, const auto & b) { return a.logit > b.logit; });
    for (size_t i = 1; i < few.size() && i <= k; ++i) {
        if (few[i].logit == few[i - 1].logit) {
            return false;
        }
    }
    return true;
}

// The nucleus as llama.cpp cuts it, in descending order; none where that takes all candidates.
//
// llama.cpp divides by a sum over the whole vocabulary, sorts the first 256 candidates, and all of
// them if those do not suffice.
void collect_nucleus(const Blocks & blocks, float top_p, Few & few) {
    constexpr size_t SORTED_AT_FIRST = 256;
    const auto       softmax         = blocks.softmax();

    // Cuts after `top_p`, if that is where all candidates from `least` on are at hand.
    const auto cut = [&](float least) {
        float share = 0;
        for (size_t i = 0; i < few.size(); ++i) {
            share += std::exp(few[i].logit - blocks.max()) / softmax.sum;
            if (share >= top_p) {
                few.resize(i + 1);
                return bucket_floor(few.back().logit) >= least;
            }
        }
        return false;
    };
    const float enough = bucket_floor(blocks.least_of(top_p, softmax));
    const float first  = std::max(enough, bucket_floor(blocks.reached_by(SORTED_AT_FIRST)));

    blocks.collect(first, few);
    if (few.size() >= SORTED_AT_FIRST) {
        sort_as_llama_cpp(few, SORTED_AT_FIRST);
        if (bucket_floor(few.back().logit) >= first && cut(first)) {
            return;
        }
        blocks.collect(enough, few);
    }
    if (!few.empty()) {
        // What is left out lies in lower buckets: something there, or the lowest of these would be
        // sorted in another way.
        few.resize(std::max(few.size(), MOST_UNBUCKETED) + 1, { -1, IMPOSSIBLE, 0 });
        sort_as_llama_cpp(few, few.size());
        if (cut(enough)) {
            return;
        }
    }
    few.clear();
}

constexpr uint32_t XTC_SEED = 0x9E3779B9;

// To llama.cpp the last seed means a random one; here every seed is as good as another.
uint32_t fixed(uint32_t seed) {
    return seed == LLAMA_DEFAULT_SEED ? 0 : seed;
}

// llama.cpp's XTC leaves the least probable candidate of all, where the threshold is 0, and that may be
// one that cannot come. It only moves the beginning: more probable ones still stand before it.
void leave_one_that_is_possible(llama_token_data_array & array, const llama_token_data * begin) {
    while (array.data > begin && array.data->logit == IMPOSSIBLE) {
        --array.data;
        ++array.size;
    }
}

// To llama.cpp nothing is typical where a candidate's probability is 0: it computes with its logarithm.
void leave_out_impossible(llama_token_data_array & array) {
    constexpr float LEAST = -87;  // about the logarithm of the smallest normal number
    const auto      begin = array.data, end = begin + array.size;
    const auto      best =
        std::max_element(begin, end, [](const auto & a, const auto & b) { return a.logit < b.logit; })->logit;
    array.size = std::remove_if(begin, end, [&](const auto & c) { return c.logit - best < LEAST; }) - begin;
}

}  // namespace

Sampler::Sampler(const mtpbatch_sampling & params)
    : edits_(params), top_k_(params.top_k), typical_p_(params.typical_p), top_p_(params.top_p), min_p_(params.min_p) {
    if (params.temperature < MIN_TEMPERATURE || params.top_k == 1) {
        return;
    }
    // Owned before there is room for it in the chain, which there may not be.
    const auto add = [&](llama_sampler * sampler) { chain_.push_back(SamplerPointer(sampler)); };
    // The order of llama.cpp's own tools: cut the tail on the model's distribution, then heat it.
    if (top_k_ > 0) {
        add(llama_sampler_init_top_k(top_k_));
    }
    if (typical_p_ < 1) {
        add(llama_sampler_init_typical(typical_p_, 1));
    }
    if (top_p_ < 1) {
        add(llama_sampler_init_top_p(top_p_, 1));
    }
    if (min_p_ > 0) {
        add(llama_sampler_init_min_p(min_p_, 1));
    }
    if (params.xtc_probability > 0) {
        // Not the seed of the draws, which would depend on what XTC did before.
        const uint32_t seed = fixed(params.seed ^ XTC_SEED);
        add(llama_sampler_init_xtc(params.xtc_probability, params.xtc_threshold, 1, seed));
    }
    // An infinite one would make impossible tokens possible.
    temperature_ = std::min(params.temperature, std::numeric_limits<float>::max());
    add(llama_sampler_init_temp(temperature_));
    add(llama_sampler_init_dist(fixed(params.seed)));
}

void Sampler::preselect(const float * logits, int32_t n_vocab, Candidates & candidates) const {
    candidates.logits  = logits;
    candidates.n_vocab = n_vocab;
    candidates.waits   = edits_.any();
    if (!candidates.waits) {
        select(candidates);
    }
}

void Sampler::select(Candidates & candidates) const {
    const float * logits  = candidates.logits;
    const int32_t n_vocab = candidates.n_vocab;
    candidates.sorted     = false;
    candidates.n_applied  = 0;
    auto & few            = candidates.few;
    few.clear();
    if (chain_.empty()) {
        few.push_back({ argmax(logits, n_vocab), 0, 0 });
        return;
    }
    // What is typical depends on all probabilities.
    if (n_vocab <= SMALL || (top_k_ <= 0 && (typical_p_ < 1 || (top_p_ >= 1 && min_p_ <= 0)))) {
        return;
    }
    const Blocks blocks(logits, n_vocab);
    if (!(std::fabs(blocks.max()) < MOST_IN_BUCKETS)) {
        return;
    }
    if (top_k_ > static_cast<int32_t>(MOST_UNBUCKETED)) {
        blocks.collect(bucket_floor(blocks.reached_by(top_k_)), few);
    } else if (top_k_ > 0) {
        blocks.collect(blocks.reached_by(top_k_), few);
        candidates.sorted = !few.empty() && sort_distinct(few, top_k_);
        if (!candidates.sorted) {
            // Which of equal ones stay, and in which order, comes from llama.cpp's heap of the k
            // greatest so far. Those left out here do not get into it.
            blocks.collect_successive_top(top_k_, few);
        }
    } else if (top_p_ < 1) {
        collect_nucleus(blocks, top_p_, few);
        candidates.sorted    = !few.empty();
        candidates.n_applied = !few.empty();
    } else {
        // As llama.cpp's min_p itself does where candidates are not sorted.
        blocks.collect(blocks.max() + std::log(min_p_), few);
    }
}

llama_token Sampler::pick(Candidates & candidates) {
    if (candidates.waits) {
        thread_local std::vector<float> row;
        row.assign(candidates.logits, candidates.logits + candidates.n_vocab);
        edits_.apply(row.data(), candidates.n_vocab);
        candidates.logits = row.data();
        select(candidates);
    }
    const llama_token token = draw(candidates);
    edits_.accept(token);
    return token;
}

llama_token Sampler::draw(Candidates & candidates) {
    if (chain_.empty()) {
        return candidates.few[0].id;
    }
    thread_local Few all;
    if (candidates.few.empty()) {
        all.resize(candidates.n_vocab);
        for (int32_t i = 0; i < candidates.n_vocab; ++i) {
            all[i] = { i, number_or_impossible(candidates.logits[i]), 0 };
        }
    }
    Few &                  from = candidates.few.empty() ? all : candidates.few;
    llama_token_data_array array{ from.data(), from.size(), -1, candidates.sorted };
    for (size_t i = candidates.n_applied; i < chain_.size(); ++i) {
        if (typical_p_ < 1 && i == (top_k_ > 0)) {
            leave_out_impossible(array);
        }
        llama_sampler_apply(chain_[i].get(), &array);
        leave_one_that_is_possible(array, from.data());
    }
    if (array.selected < 0 || array.selected >= static_cast<int64_t>(array.size)) {
        throw Error(MTPBATCH_DECODE_FAILED, "the sampler chain picked no token");
    }
    return array.data[array.selected].id;
}

}  // namespace mtpbatch

struct mtpbatch_sampler {
    mtpbatch::Sampler                 impl;
    mtpbatch::Pool                    pool;
    std::vector<mtpbatch::Candidates> rows;
};

using namespace mtpbatch;

mtpbatch_status mtpbatch_sampler_create(const mtpbatch_sampling * params, int32_t n_threads,
                                        mtpbatch_sampler ** sampler, mtpbatch_error * error) {
    return guard(error, [&] { *sampler = new mtpbatch_sampler{ Sampler(*params), Pool(n_threads), {} }; });
}

void mtpbatch_sampler_free(mtpbatch_sampler * sampler) {
    delete sampler;
}

mtpbatch_status mtpbatch_sampler_sample(mtpbatch_sampler * sampler, const float * logits, int32_t n_rows,
                                        int32_t n_vocab, int32_t * tokens, mtpbatch_error * error) {
    return guard(error, [&] {
        if (n_rows < 0 || n_vocab < 1) {
            throw Error(MTPBATCH_INVALID_ARGUMENT, "logits must be of any number of rows and at least one token");
        }
        sampler->rows.resize(n_rows);
        const auto preselect = [&](int32_t row) {
            sampler->impl.preselect(logits + static_cast<size_t>(row) * n_vocab, n_vocab, sampler->rows[row]);
        };
        sampler->pool.run(n_rows, preselect, static_cast<int64_t>(n_rows) * n_vocab);
        for (int32_t row = 0; row < n_rows; ++row) {
            tokens[row] = sampler->impl.pick(sampler->rows[row]);
        }
    });
}
