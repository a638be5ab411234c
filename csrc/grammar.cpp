// llguidance, reached through the compiled module of its Python package: no call needs the GIL.
#include "grammar.hpp"

#include "llguidance.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>

namespace mtpbatch {

// Its functions. It turns panics into errors of its own, so that no call ends the process by one.
struct Llguidance {
    explicit Llguidance(const char * path) : library(dlopen(path, RTLD_NOW | RTLD_LOCAL)) {
        if (!library) {
            throw Error(MTPBATCH_LOAD_FAILED, std::string("llguidance cannot be loaded: ") + dlerror());
        }
        find(new_tokenizer, "llg_new_tokenizer_v2");
        find(free_tokenizer, "llg_free_tokenizer");
        find(set_defaults, "llg_constraint_init_set_defaults");
        find(new_matcher, "llg_new_matcher");
        find(clone_matcher, "llg_clone_matcher");
        find(free_matcher, "llg_free_matcher");
        find(compute_mask, "llg_matcher_compute_mask_into");
        find(consume, "llg_matcher_consume_tokens");
        find(rollback, "llg_matcher_rollback");
        find(error, "llg_matcher_get_error");
    }
    // Never closed: it may have threads and thread-local data.
    Llguidance(const Llguidance &)             = delete;
    Llguidance & operator=(const Llguidance &) = delete;

    void * const library;
    LlgTokenizer * (*new_tokenizer)(const LlgTokenizerInitV2 *, char *, size_t);
    void (*free_tokenizer)(LlgTokenizer *);
    void (*set_defaults)(LlgConstraintInit *, const LlgTokenizer *);
    LlgMatcher * (*new_matcher)(const LlgConstraintInit *, const char *, const char *);
    LlgMatcher * (*clone_matcher)(const LlgMatcher *);
    void (*free_matcher)(LlgMatcher *);
    int32_t (*compute_mask)(LlgMatcher *, uint32_t *, size_t);
    int32_t (*consume)(LlgMatcher *, const uint32_t *, size_t);
    int32_t (*rollback)(LlgMatcher *, size_t);
    const char * (*error)(LlgMatcher *);

  private:
    template <typename Function>
    void find(Function & function, const char * name) {
        function = reinterpret_cast<Function>(dlsym(library, name));
        if (!function) {
            throw Error(MTPBATCH_LOAD_FAILED, std::string("this llguidance has no ") + name);
        }
    }
};

namespace {

size_t tokenize(const void * vocab, const uint8_t * bytes, size_t n_bytes, uint32_t * tokens, size_t size) noexcept {
    try {
        const int32_t n = llama_tokenize(static_cast<const llama_vocab *>(vocab), reinterpret_cast<const char *>(bytes),
                                         static_cast<int32_t>(n_bytes), reinterpret_cast<llama_token *>(tokens),
                                         static_cast<int32_t>(size), /*add_special*/ false, /*parse_special*/ false);
        return static_cast<size_t>(std::abs(n));
    } catch (...) {
        return 0;  // exceptions must not enter llguidance; it goes on token by token then
    }
}

// The bytes of a token as llguidance wants them: 0xff marks what is no text. So are tokens that end an
// answer, also where the model calls them text: a grammar allows them at its end alone.
std::string marked_bytes(const llama_vocab * vocab, llama_token token) {
    std::string piece(32, 0);
    const auto  read = [&] {
        return llama_token_to_piece(vocab, token, piece.data(), static_cast<int32_t>(piece.size()), /*lstrip*/ 0,
                                    /*special*/ true);
    };
    int32_t n = read();
    if (n < 0) {
        piece.resize(static_cast<size_t>(-n));
        n = read();
    }
    piece.resize(static_cast<size_t>(std::max(n, 0)));
    const bool text = !llama_vocab_is_control(vocab, token) && !llama_vocab_is_eog(vocab, token);
    return text ? piece : "\xff" + piece;
}

}  // namespace

GrammarCompiler::GrammarCompiler(std::shared_ptr<const Model> model, const char * library)
    : model_(std::move(model)), functions_(std::make_unique<Llguidance>(library)) {
    const llama_vocab *   vocab = model_->vocab;
    std::vector<uint32_t> lengths, ends;
    std::string           bytes;
    for (llama_token token = 0; token < model_->n_vocab(); ++token) {
        const std::string piece = marked_bytes(vocab, token);
        lengths.push_back(static_cast<uint32_t>(piece.size()));
        bytes += piece;
        if (llama_vocab_is_eog(vocab, token)) {
            ends.push_back(static_cast<uint32_t>(token));
        }
    }
    if (ends.empty()) {
        throw Error(MTPBATCH_INVALID_ARGUMENT,
                    "the model has no token that ends an answer, which every form needs; use another model");
    }
    LlgTokenizerInitV2 init{};
    init.struct_size             = sizeof init;
    init.vocab_size              = static_cast<uint32_t>(lengths.size());
    init.tok_eos                 = ends[0];
    init.token_lens              = lengths.data();
    init.token_bytes             = reinterpret_cast<const uint8_t *>(bytes.data());
    init.tokenize_assumes_string = true;
    init.tokenize_fn             = tokenize;
    init.tokenize_user_data      = vocab;
    init.tok_eos_extra           = ends.data() + 1;
    init.tok_eos_extra_count     = static_cast<uint32_t>(ends.size() - 1);
    char reason[512]             = "";
    tokenizer_                   = functions_->new_tokenizer(&init, reason, sizeof reason);
    if (!tokenizer_) {
        throw Error(MTPBATCH_LOAD_FAILED, std::string("llguidance cannot take the model's vocabulary: ") + reason);
    }
}

GrammarCompiler::~GrammarCompiler() {
    functions_->free_tokenizer(tokenizer_);
}

LlgMatcher * GrammarCompiler::compile(const char * text) const {
    LlgConstraintInit init{};
    functions_->set_defaults(&init, tokenizer_);
    init.log_stderr_level      = 0;
    init.limits.verbose_errors = false;
    return functions_->new_matcher(&init, "llguidance", text);
}

Matcher::Matcher(std::shared_ptr<const GrammarCompiler> compiler, LlgMatcher * raw)
    : compiler_(std::move(compiler)),
      raw_(raw),
      n_words_((static_cast<size_t>(compiler_->model().n_vocab()) + 31) / 32) {}

Matcher::~Matcher() {
    compiler_->functions().free_matcher(raw_);
}

std::unique_ptr<Matcher> Matcher::clone() const {
    return std::make_unique<Matcher>(compiler_, compiler_->functions().clone_matcher(raw_));
}

std::string Matcher::error() const {
    const char * message = compiler_->functions().error(raw_);
    return message ? message : "";
}

bool Matcher::compute_mask(size_t k) {
    masks_.resize((k + 1) * n_words_);
    return compiler_->functions().compute_mask(raw_, &masks_[k * n_words_], n_words_ * sizeof(uint32_t)) == 0;
}

bool Matcher::allows(size_t k, llama_token token) const {
    const auto bit = static_cast<size_t>(token);
    return masks_[k * n_words_ + bit / 32] >> bit % 32 & 1;
}

bool Matcher::look_ahead(const std::vector<llama_token> & draft, size_t & n_possible) {
    const Llguidance & llg     = compiler_->functions();
    const auto         consume = [&](const llama_token * tokens, size_t n) {
        return llg.consume(raw_, reinterpret_cast<const uint32_t *>(tokens), n) == 0;
    };
    n_possible = 0;
    if (!consume(taken_.data(), taken_.size()) || !compute_mask(0)) {
        return false;
    }
    taken_.clear();
    while (n_possible < draft.size()) {
        const llama_token token = draft[n_possible];
        if (!allows(n_possible, token) || llama_vocab_is_eog(compiler_->model().vocab, token)) {
            break;
        }
        if (!consume(&token, 1) || !compute_mask(n_possible + 1)) {
            return false;
        }
        n_possible += 1;
    }
    return n_possible == 0 || llg.rollback(raw_, n_possible) == 0;
}

void Matcher::apply(size_t k, const float * logits, std::vector<float> & masked) const {
    const size_t     n_vocab = static_cast<size_t>(compiler_->model().n_vocab());
    const uint32_t * mask    = &masks_[k * n_words_];
    masked.resize(n_vocab);
    for (size_t i = 0; i < n_vocab; ++i) {
        masked[i] = mask[i / 32] >> i % 32 & 1 ? logits[i] : -INFINITY;
    }
}

}  // namespace mtpbatch

using namespace mtpbatch;

mtpbatch_status mtpbatch_grammar_compiler_create(const mtpbatch_model * model, const char * library,
                                                 mtpbatch_grammar_compiler ** compiler, mtpbatch_error * error) {
    return guard(error, [&] {
        *compiler = new mtpbatch_grammar_compiler{ std::make_shared<GrammarCompiler>(model->impl, library) };
    });
}

void mtpbatch_grammar_compiler_free(mtpbatch_grammar_compiler * compiler) {
    delete compiler;
}

mtpbatch_status mtpbatch_grammar_create(const mtpbatch_grammar_compiler * compiler, const char * text,
                                        mtpbatch_grammar ** grammar, mtpbatch_error * error) {
    return guard(error, [&] {
        const auto start  = std::make_shared<Matcher>(compiler->impl, compiler->impl->compile(text));
        size_t     n_none = 0;
        // Whatever may come first is found out now, once for all answers; some grammars fail only there.
        if (!start->look_ahead({}, n_none)) {
            throw Error(MTPBATCH_INVALID_ARGUMENT, start->error());
        }
        *grammar = new mtpbatch_grammar{ start };
    });
}

void mtpbatch_grammar_free(mtpbatch_grammar * grammar) {
    delete grammar;
}
