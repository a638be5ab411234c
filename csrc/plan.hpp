// Plans as the executor keeps them, and the rules they live by.
#pragma once

#include "internal.hpp"
#include "stop_texts.hpp"

#include <optional>

namespace mtpbatch {

struct Admission {
    llama_seq_id             seq_id;
    Sampler                  sampler;
    std::vector<llama_token> stop_tokens;
    StopTexts                stop_texts;
    int32_t                  max_tokens;
    bool                     drafts;
    int64_t                  ticket;
    bool                     cancelled = false;
};

struct Entry {
    llama_seq_id             seq_id;
    std::vector<llama_token> tokens;
    bool                     sample;
    int32_t                  n_draft;
    bool                     selective;
    float                    expected;
};

struct Plan {
    explicit Plan(const mtpbatch_plan & given);

    int64_t                       number;
    std::vector<llama_seq_id>     release;
    std::vector<Admission>        admit;
    std::vector<Entry>            entries;
    std::optional<mtpbatch_terms> terms;
    int32_t                       run_ahead;
    bool                          followed;
};

// Refuses plans that break a rule. It knows what the plans before have said, not what came of
// them: its answer does not depend on how far the executor is.
class PlanRules {
  public:
    PlanRules(const Context & target, const Session * session);
    // Throws, or takes note of the plan.
    void accept(const mtpbatch_plan & plan);

  private:
    struct Known {
        bool    active     = false;
        bool    drafts     = false;
        bool    complete   = false;  // its whole prompt has been planned
        int32_t n_prompt   = 0;      // tokens of it that have been planned
        int32_t max_tokens = 0;
    };

    const mtpbatch_context_params params_;
    const int32_t                 n_vocab_;
    const int32_t                 n_draft_max_;
    std::vector<Known>            known_;  // by seq_id
};

}  // namespace mtpbatch
