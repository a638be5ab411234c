// Requests on their sequence ids or parked, and one step after another.
#pragma once

#include "plan.hpp"
#include "pool.hpp"
#include "snapshots.hpp"

#include <array>
#include <optional>

namespace mtpbatch {

// What a step gave: the fields of mtpbatch_step, with the memory behind them.
struct Step {
    mtpbatch_step        report{};
    std::vector<int32_t> words;
    std::vector<int32_t> trials;
    std::string          message;
    bool                 ends_any = true;  // sequences, also by failing

    std::vector<mtpbatch_saved> saved;
    std::vector<llama_seq_id>   lost;

    std::vector<mtpbatch_scored> scored;

    // Requests whose grammar failed, and why.
    std::vector<std::pair<llama_seq_id, std::string>> failures;
    std::vector<mtpbatch_stuck>                       stuck;  // the same, for who reads the report
};

// Carries out the steps of plans that PlanRules has accepted.
class Stepper {
  public:
    Stepper(std::shared_ptr<Context> target, std::shared_ptr<Session> session);

    // Carries out what a plan says beside its steps. report_memory() tells what came of it.
    void open(Plan & plan);
    void report_memory(Step & out);
    void release(llama_seq_id seq_id);
    void cancel(int64_t ticket);
    // Whether repeating a plan would do anything.
    bool can_repeat(const Plan & plan) const;
    // Whether any sequence is left to go on.
    bool any_left() const;
    // `repeated`: without the prompts that the plan has fed. If it throws, the sequences of the
    // plan's entries are lost, and all others too on models that keep recurrent state.
    void step(const Plan & plan, bool repeated, Step & out);

  private:
    struct Request {
        Sampler                  sampler;
        std::vector<llama_token> stop_tokens;
        StopTexts                stop_texts;
        std::unique_ptr<Matcher> matcher;  // null: no grammar
        int32_t                  min_tokens;
        int32_t                  max_tokens;
        int64_t                  ticket;
        bool                     drafts;
        int32_t                  n_logprobs;
        int32_t                  n_prompt_logprobs;
        bool                     lost    = false;  // its state is not to be relied on
        bool                     unclean = false;  // its id still holds what was decoded on it before
        bool        over = false;  // finished, cancelled, lost or at a stop text: nothing goes on until it is released
        int32_t     n_generated = 0;
        llama_token last_token  = -1;  // sampled, not yet decoded; -1: the prompt is not complete
    };

    // A sequence's part in the step under way.
    struct Part {
        llama_seq_id   seq_id;
        Request *      request;  // null: it takes no part
        const Entry *  prompt;   // null: it goes on from the token sampled last
        bool           sample;
        bool           drafted;  // the session waits to hear what was accepted
        Session::Draft draft;
        int32_t        first_row;  // of those it samples, in the decode
        // What comes of it:
        std::vector<llama_token> tokens;
        int32_t                  n_accepted;
        mtpbatch_finish          finish;
        bool                     stuck;  // of what its grammar allows nothing is left
    };

    // Parts that share a decode of the target.
    struct Group {
        std::vector<size_t> parts;
        std::vector<Row>    rows;
    };

    void admit(Admission & admission);
    void save(llama_seq_id seq_id, int64_t snapshot);
    void park(const mtpbatch_park & park);
    void resume(const mtpbatch_resume & resume);
    void ignore_undrafted(llama_seq_id seq_id);
    template <typename Restore>
    void    start_from_snapshot(llama_seq_id seq_id, Restore && restore);
    void    lose(llama_seq_id seq_id);
    int64_t n_cells(const Plan & plan, bool repeated) const;
    bool    takes_part(const Entry & entry, bool repeated) const;
    void    begin(const Plan & plan, bool repeated);
    void    draft(const Plan & plan);
    void    keep_to_grammars(Step & out);
    void    even_out(const Plan & plan);
    void    form_groups();
    bool    drafts_from(const Group & group) const;
    bool    leaves_out_prompts(const Group & group, const Plan & plan) const;
    void    append_rows(Part & part, std::vector<Row> & rows) const;
    void    sample(const Group & group, Step & out);
    void    score(const Group & group);
    bool    completes_stop_text(Request & request, llama_token token) const;
    void    verify(Part & part, size_t first_candidates);
    void    take_back(Part & part);
    void    count_trials(const Part & part);
    void    write(Step & out) const;

    const std::shared_ptr<Context>      target_;
    const std::shared_ptr<Session>      session_;
    Pool                                pool_;
    std::vector<std::optional<Request>> requests_;  // by seq_id
    std::map<int64_t, Request>          parked_;    // by ticket
    Snapshots                           snapshots_;
    // What came of saving and restoring since it was reported.
    std::vector<mtpbatch_saved> saved_;
    std::vector<llama_seq_id>   lost_;
    int64_t                     save_us_ = 0;
    // Of the step under way; kept for their memory.
    std::vector<Part>               parts_;  // parallel to the plan's entries
    std::vector<Session::Request>   draft_requests_;
    std::vector<size_t>             drafting_;  // the parts they are for
    std::vector<Session::Draft>     drafts_;
    std::vector<Group>              groups_;
    size_t                          n_groups_ = 0;
    std::vector<Candidates>         candidates_;  // by sampled row
    std::vector<mtpbatch_scored>    scored_;
    std::vector<std::vector<float>> masked_;  // logits of rows that a grammar looks at, by sampled row
    // Drafts that were verified, and those accepted, by index of mtpbatch_terms::acceptance.
    std::array<int32_t, 2 * MTPBATCH_CONFIDENCES> tried_, accepted_;
};

}  // namespace mtpbatch
