// Where a long text may be cut, so that the tokens of the pieces are those of the whole.
#include "cuts.hpp"

#include <algorithm>

namespace mtpbatch {

namespace {

constexpr int32_t PER_PIECE = 64;  // special tokens

}  // namespace

SpecialTexts::SpecialTexts(const llama_vocab * vocab, bool parse_special) {
    const auto type = llama_vocab_type(vocab);
    if (type != LLAMA_VOCAB_TYPE_BPE && type != LLAMA_VOCAB_TYPE_SPM) {
        return;  // these two tokenize what lies between special tokens each by itself
    }
    const int32_t special =
        LLAMA_TOKEN_ATTR_USER_DEFINED | (parse_special ? LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN : 0);
    for (llama_token token = 0; token < llama_vocab_n_tokens(vocab); ++token) {
        const int32_t attr = llama_vocab_get_attr(vocab, token);
        // As llama.cpp has it: a user-defined token that is a control token too is passed over with these.
        const bool passed_over = !parse_special && (attr & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN));
        if (!(attr & special) || passed_over) {
            continue;
        }
        if (attr & (LLAMA_TOKEN_ATTR_LSTRIP | LLAMA_TOKEN_ATTR_RSTRIP)) {
            texts_.clear();  // it takes spaces beside it, which may lie behind a cut
            return;
        }
        texts_.emplace_back(llama_vocab_get_text(vocab, token));
        if (texts_.back().empty()) {
            texts_.pop_back();
        }
    }
    std::sort(texts_.begin(), texts_.end());
    texts_.erase(std::unique(texts_.begin(), texts_.end()), texts_.end());
}

// llama.cpp takes out the longest token's occurrences first, then those of the next in what is left.
// Where an occurrence begins that no other one overlaps, be it before it or from within, it is taken out
// in any case (or a longer one that begins there too, which is the one looked at here), and what lies
// before it and behind it does not meet.
std::vector<int32_t> SpecialTexts::cuts(std::string_view text) const {
    std::vector<int32_t> cuts;
    if (texts_.empty()) {
        return cuts;
    }
    size_t  reach     = 0;      // where the occurrences so far end
    size_t  candidate = 0;      // the last one's beginning,
    bool    free      = false;  // if none reaches into it from before
    int32_t n         = 0;      // occurrences since the last cut
    for (size_t i = 0; i < text.size(); ++i) {
        const size_t length = longest_at_start(text.substr(i));
        if (length == 0) {
            continue;
        }
        if (free && reach <= i && n > PER_PIECE) {
            cuts.push_back(static_cast<int32_t>(candidate));
            n = 1;  // the candidate
        }
        free      = reach <= i;
        candidate = i;
        reach     = std::max(reach, i + length);
        ++n;
    }
    return cuts;
}

// How long the longest of the special tokens is with which a text starts; 0: with none.
size_t SpecialTexts::longest_at_start(std::string_view text) const {
    size_t longest = 0;
    auto   first   = texts_.begin();
    auto   last    = texts_.end();  // of those that start as the text does and go on
    for (size_t k = 0; k < text.size() && first != last; ++k) {
        const auto byte = [k](std::string_view any) { return static_cast<uint8_t>(any[k]); };
        const auto next = byte(text);
        first           = std::partition_point(first, last, [&](const auto & known) { return byte(known) < next; });
        last            = std::partition_point(first, last, [&](const auto & known) { return byte(known) == next; });
        if (first != last && first->size() == k + 1) {
            longest = k + 1;
            ++first;  // the shortest comes first
        }
    }
    return longest;
}

}  // namespace mtpbatch
