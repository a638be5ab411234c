// Plans as the executor keeps them, and the rules they live by.
#pragma once

#include "grammar.hpp"
#include "internal.hpp"
#include "stop_texts.hpp"

#include <map>
#include <optional>

namespace mtpbatch {

struct Admission {
    llama_seq_id             seq_id;
    Sampler                  sampler;
    std::vector<llama_token> stop_tokens;
    StopTexts                stop_texts;
    int32_t                  min_tokens;
    int32_t                  max_tokens;
    bool                     drafts;
    int64_t                  ticket;
    int64_t                  snapshot;
    int32_t                  n_reused;
    int32_t                  n_logprobs;
    int32_t                  n_prompt_logprobs;
    std::unique_ptr<Matcher> matcher;  // null: no grammar
    bool                     cancelled = false;
};

struct Entry {
    llama_seq_id             seq_id;
    std::vector<llama_token> tokens;
    bool                     sample;
    int32_t                  n_draft;
    bool                     selective;
    float                    expected;
    std::vector<llama_token> scored;
};

struct Plan {
    explicit Plan(const mtpbatch_plan & given);
    // Whether the step of the plan before it must have ended when this one opens.
    bool follows_a_step() const { return !entries.empty() || !save.empty() || !park.empty(); }

    int64_t                       number;
    std::vector<llama_seq_id>     release;
    std::vector<Admission>        admit;
    std::vector<Entry>            entries;
    std::optional<mtpbatch_terms> terms;
    int32_t                       run_ahead;
    bool                          followed;
    bool                          keep_prompts;

    std::vector<mtpbatch_save>   save;
    std::vector<mtpbatch_park>   park;
    std::vector<int64_t>         drop;
    std::vector<int64_t>         forget;
    std::vector<mtpbatch_resume> resume;
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
        bool    scores     = false;  // it may have tokens of its prompt scored
        bool    complete   = false;  // its whole prompt has been planned
        int32_t n_prompt   = 0;      // tokens of it that have been planned
        int32_t max_tokens = 0;
        int32_t n_most     = 0;  // tokens that it may ever decode, known since it was first complete
        int64_t ticket     = 0;
    };
    struct KnownSnapshot {
        bool    drafts;
        int32_t least, most;  // tokens: how many were generated is not known
    };
    struct KnownParked {
        Known   request;
        int64_t snapshot;  // 0: none
    };
    // What is kept in host memory.
    struct Kept {
        std::map<int64_t, KnownSnapshot> snapshots;  // by number
        std::map<int64_t, KnownParked>   parked;     // by ticket
    };

    Known & find(std::vector<Known> & known, llama_seq_id seq_id) const;
    void    take_out(const mtpbatch_plan & plan, std::vector<Known> & known, Kept & kept) const;
    void    put_in(const mtpbatch_plan & plan, std::vector<Known> & known, Kept & kept) const;
    void    check_entries(const mtpbatch_plan & plan, std::vector<Known> & known) const;
    void    check_terms(const mtpbatch_terms & terms) const;

    const mtpbatch_context_params params_;
    const Model * const           model_;
    const int32_t                 n_vocab_;
    const int32_t                 n_draft_max_;
    const bool                    truncates_;  // whether a restored sequence can be cut
    std::vector<Known>            known_;      // by seq_id
    Kept                          kept_;
};

}  // namespace mtpbatch
