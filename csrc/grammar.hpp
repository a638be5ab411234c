// Grammars that answers keep to: which tokens may come next, as the library llguidance says.
#pragma once

#include "internal.hpp"

struct LlgMatcher;
struct LlgTokenizer;

namespace mtpbatch {

struct Llguidance;

// Compiles grammars for the vocabulary of one model.
class GrammarCompiler {
  public:
    // `library` is the path of llguidance's compiled module, which exports its C interface.
    GrammarCompiler(std::shared_ptr<const Model> model, const char * library);
    ~GrammarCompiler();
    GrammarCompiler(const GrammarCompiler &)             = delete;
    GrammarCompiler & operator=(const GrammarCompiler &) = delete;

    // Any number of threads may call it at once.
    LlgMatcher *       compile(const char * text) const;
    const Llguidance & functions() const { return *functions_; }
    const Model &      model() const { return *model_; }

  private:
    const std::shared_ptr<const Model>      model_;
    const std::unique_ptr<const Llguidance> functions_;
    LlgTokenizer *                          tokenizer_ = nullptr;
};

// Where one answer is in its grammar.
class Matcher {
  public:
    Matcher(std::shared_ptr<const GrammarCompiler> compiler, LlgMatcher * raw);
    ~Matcher();
    Matcher(const Matcher &)             = delete;
    Matcher & operator=(const Matcher &) = delete;

    std::unique_ptr<Matcher> clone() const;
    // The answer has got one more token.
    void take(llama_token token) { taken_.push_back(token); }
    // Finds out which tokens may come next, and which after the first, second, … token of a draft. That
    // ends at a token that may not come or that ends the answer; returns how many come before it.
    // False: llguidance has given up, and error() says why.
    bool          look_ahead(const std::vector<llama_token> & draft, size_t & n_possible);
    std::string   error() const;
    const Model & model() const { return compiler_->model(); }
    // The logits of row k, which comes after k tokens of the draft, with -inf where a token may not come.
    void apply(size_t k, const float * logits, std::vector<float> & masked) const;

  private:
    bool allows(size_t k, llama_token token) const;
    bool compute_mask(size_t k);

    const std::shared_ptr<const GrammarCompiler> compiler_;
    LlgMatcher * const                           raw_;
    const size_t                                 n_words_;  // of a mask
    std::vector<llama_token>                     taken_;    // that llguidance has not been told of
    std::vector<uint32_t>                        masks_;    // a bit for each token, row after row
};

}  // namespace mtpbatch

struct mtpbatch_grammar_compiler {
    std::shared_ptr<mtpbatch::GrammarCompiler> impl;
};
struct mtpbatch_grammar {
    std::shared_ptr<const mtpbatch::Matcher> start;  // of every answer
};
