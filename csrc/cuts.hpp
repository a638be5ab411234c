// Where a long text may be cut, so that the tokens of the pieces are those of the whole.
#pragma once

#include "llama.h"

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mtpbatch {

// The special tokens that llama.cpp takes out of a text before it tokenizes what lies between them. For
// each that it finds it walks past all found before, so that a text with many takes time by their
// square; pieces with few of them each do not.
class SpecialTexts {
  public:
    // `parse_special`: as for llama_tokenize.
    SpecialTexts(const llama_vocab * vocab, bool parse_special);

    // Ascending offsets, at each of which a special token begins.
    std::vector<int32_t> cuts(std::string_view text) const;

  private:
    size_t longest_at_start(std::string_view text) const;

    std::vector<std::string> texts_;  // sorted; none if it is not known that cuts change nothing
};

}  // namespace mtpbatch
