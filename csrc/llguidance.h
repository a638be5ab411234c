// The part of llguidance's C interface that is used here. Its Python package brings the library, but
// not the header.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {

struct LlgMatcher;
struct LlgTokenizer;

struct LlgParserLimits {
    size_t   max_items_in_row;
    uint64_t initial_lexer_fuel;
    uint64_t step_lexer_fuel;
    size_t   step_max_items;
    size_t   max_lexer_states;
    size_t   max_grammar_size;
    bool     precompute_large_lexemes;
    bool     verbose_errors;
};

struct LlgConstraintInit {
    const LlgTokenizer * tokenizer;
    uint32_t             log_buffer_level;
    uint32_t             log_stderr_level;
    bool                 ff_tokens_ok;
    bool                 backtrack_ok;
    LlgParserLimits      limits;
};

typedef size_t (*LlgTokenizeFn)(const void * user_data, const uint8_t * bytes, size_t bytes_len,
                                uint32_t * output_tokens, size_t output_tokens_len);

struct LlgTokenizerInitV2 {
    size_t               struct_size;
    uint32_t             vocab_size;
    uint32_t             tok_eos;
    const uint32_t *     token_lens;
    const uint8_t *      token_bytes;
    const char *         tokenizer_json;
    bool                 tokenize_assumes_string;
    LlgTokenizeFn        tokenize_fn;
    bool                 use_approximate_greedy_tokenize_fn;
    const void *         tokenize_user_data;
    const char * const * slices;
    const uint32_t *     tok_eos_extra;
    uint32_t             tok_eos_extra_count;
};

}  // extern "C"
