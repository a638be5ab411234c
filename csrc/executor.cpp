// The thread that runs plans.
#include "stepper.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

namespace mtpbatch {

namespace {

// Has a plan that is not begun admit a request only for it to be released.
void cancel_in(Plan & plan, int64_t ticket) {
    for (Admission & admission : plan.admit) {
        admission.cancelled = admission.cancelled || admission.ticket == ticket;
    }
}

}  // namespace

// Results that nobody waits for are reported after so much time of steps: figures are not older.
constexpr int64_t REPORT_EVERY_US = 50'000;

class Executor {
  public:
    Executor(std::shared_ptr<Context> target, std::shared_ptr<Session> session);
    ~Executor();
    Executor(const Executor &)             = delete;
    Executor & operator=(const Executor &) = delete;

    const std::vector<mtpbatch_step> & exchange(const mtpbatch_plan * plan, int64_t wait_us);
    void                               wake();
    void                               cancel(int64_t ticket);
    void                               stop();

  private:
    // Takes the target for as long as the thread may use it, and leaves it as it was set.
    class Drive {
      public:
        explicit Drive(std::shared_ptr<Context> target) : target_(std::move(target)) {
            target_->require_weights();
            target_->require_free();
            target_->set_driven(true);
        }
        ~Drive() {
            target_->keep_hidden(keeps_hidden_);
            target_->set_driven(false);
        }
        Drive(const Drive &)             = delete;
        Drive & operator=(const Drive &) = delete;

      private:
        const std::shared_ptr<Context> target_;
        const bool                     keeps_hidden_ = target_->keeps_hidden();
    };

    void                      run();
    void                      serve();
    bool                      begins() const;
    void                      leave_early(std::unique_lock<std::mutex> & lock);
    std::vector<llama_seq_id> take_early_releases();
    void                      open_plan(std::unique_lock<std::mutex> & lock);
    void                      step(Step & out);

    const Drive drive_;
    PlanRules   rules_;  // of the thread that makes plans

    std::mutex              mutex_;                 // guards what follows, down to the stepper
    std::condition_variable changed_;               // for the thread: plans came, steps were taken in, or it is to stop
    std::condition_variable ended_;                 // for who waits: a step has ended, or wake()
    std::deque<Plan>        plans_;                 // handed over, not begun
    std::vector<int64_t>    cancelled_;             // tickets that the thread has not seen
    std::vector<int64_t>    cancelled_before_;      // tickets cancelled since the last exchange
    std::vector<Step>       steps_;                 // ended, not yet given out
    int32_t                 n_unseen_     = 0;      // steps begun that have not been taken in
    bool                    worth_a_look_ = false;  // for who waits
    bool                    stopping_     = false;
    std::optional<Error>    death_;  // why the thread has ended, if nobody stopped it

    // Given out, until the next exchange.
    std::vector<Step>          shown_;
    std::vector<mtpbatch_step> reports_;

    // From here on, of the thread alone.
    Stepper             stepper_;
    std::optional<Plan> standing_;
    bool                stepped_   = false;  // whether the standing plan has had its first step
    bool                under_way_ = false;  // whether sequences were left to go on when the last step ended
    Stopwatch           since_step_;
    int64_t             since_report_us_ = 0;  // time of the steps that nobody was woken for

    std::mutex  joining_;  // the thread
    std::thread thread_;   // last: it uses everything above
};

Executor::Executor(std::shared_ptr<Context> target, std::shared_ptr<Session> session)
    : drive_(target),
      rules_(*target, session.get()),
      stepper_(std::move(target), std::move(session)),
      thread_([this] { run(); }) {}

Executor::~Executor() {
    stop();
}

void Executor::stop() {
    {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
    }
    changed_.notify_one();
    ended_.notify_one();
    const std::lock_guard lock(joining_);
    if (thread_.joinable()) {
        thread_.join();
    }
}

const std::vector<mtpbatch_step> & Executor::exchange(const mtpbatch_plan * plan, int64_t wait_us) {
    std::optional<Plan> taken;
    if (plan) {
        rules_.accept(*plan);
        taken.emplace(*plan);
    }
    std::unique_lock lock(mutex_);
    if (death_) {
        throw Error(*death_);
    }
    if (stopping_) {
        throw Error(MTPBATCH_CONTEXT_FAILED, "the executor was stopped");
    }
    if (taken) {
        for (const int64_t ticket : cancelled_before_) {
            cancel_in(*taken, ticket);
        }
        plans_.push_back(std::move(*taken));
    }
    cancelled_before_.clear();
    n_unseen_ -= static_cast<int32_t>(shown_.size());
    changed_.notify_one();
    const auto over = [&] { return worth_a_look_ || stopping_; };
    if (wait_us < 0) {
        ended_.wait(lock, over);
    } else if (wait_us > 0) {
        ended_.wait_for(lock, std::chrono::microseconds(wait_us), over);
    }
    worth_a_look_ = false;
    shown_.clear();
    shown_.swap(steps_);
    reports_.clear();
    for (Step & step : shown_) {
        step.report.message  = step.message.c_str();
        step.report.n_words  = static_cast<int32_t>(step.words.size());
        step.report.words    = step.words.data();
        step.report.n_trials = static_cast<int32_t>(step.trials.size() / 3);
        step.report.trials   = step.trials.data();
        step.report.n_scored = static_cast<int32_t>(step.scored.size());
        step.report.scored   = step.scored.data();
        step.report.n_saved  = static_cast<int32_t>(step.saved.size());
        step.report.saved    = step.saved.data();
        step.report.n_lost   = static_cast<int32_t>(step.lost.size());
        step.report.lost     = step.lost.data();
        for (const auto & [seq_id, reason] : step.failures) {
            step.stuck.push_back({ seq_id, reason.c_str() });
        }
        step.report.n_stuck = static_cast<int32_t>(step.stuck.size());
        step.report.stuck   = step.stuck.data();
        reports_.push_back(step.report);
    }
    return reports_;
}

void Executor::wake() {
    {
        const std::lock_guard lock(mutex_);
        worth_a_look_ = true;
    }
    ended_.notify_one();
}

void Executor::cancel(int64_t ticket) {
    {
        const std::lock_guard lock(mutex_);
        cancelled_.push_back(ticket);
        cancelled_before_.push_back(ticket);
        for (Plan & plan : plans_) {
            cancel_in(plan, ticket);
        }
        worth_a_look_ = true;
    }
    changed_.notify_one();
    ended_.notify_one();
}

// Steps that fail are results. What fails between steps would end the process if it left the thread.
void Executor::run() {
    quiet_listeners();
    mtpbatch_error        error{};
    const mtpbatch_status status = guard(&error, [&] { serve(); });
    if (status != MTPBATCH_OK) {
        const std::lock_guard lock(mutex_);
        death_.emplace(status, error.message);
        worth_a_look_ = true;
        ended_.notify_one();
    }
}

void Executor::serve() {
    std::unique_lock lock(mutex_);
    while (true) {
        changed_.wait(lock, [&] { return stopping_ || !plans_.empty() || !cancelled_.empty() || begins(); });
        if (stopping_) {
            return;
        }
        leave_early(lock);
        // Every plan gets its step before the next one's entries take its place, or it saves what came
        // of that step.
        while (!plans_.empty() && (!standing_ || stepped_ || !plans_.front().follows_a_step())) {
            open_plan(lock);
        }
        if (!begins()) {
            continue;
        }
        const bool first = !stepped_;
        n_unseen_ += 1;
        lock.unlock();
        Step out;
        step(out);
        const int64_t out_us = out.report.gap_us + out.report.draft_us + out.report.target_us + out.report.sample_us;
        lock.lock();
        steps_.push_back(std::move(out));
        // To wake somebody takes a processor away from the model: not for each of many steps that
        // nobody waits for. The first one of a plan may be what the next plan waits for.
        since_report_us_ += out_us;
        if (first || steps_.back().ends_any || standing_->followed || !begins() ||
            since_report_us_ >= REPORT_EVERY_US) {
            since_report_us_ = 0;
            worth_a_look_    = true;
            lock.unlock();  // else who wakes up would have to wait for it
            ended_.notify_one();
            lock.lock();
        }
    }
}

// Whether the standing plan's next step may begin.
bool Executor::begins() const {
    if (!standing_) {
        return false;
    }
    if (!stepped_) {
        return true;
    }
    return standing_->run_ahead > 0 && n_unseen_ <= standing_->run_ahead && stepper_.can_repeat(*standing_);
}

// Who is cancelled or to be released does not wait for plans to be begun.
void Executor::leave_early(std::unique_lock<std::mutex> & lock) {
    const auto cancelled = std::exchange(cancelled_, {});
    const auto released  = take_early_releases();
    lock.unlock();
    for (const int64_t ticket : cancelled) {
        stepper_.cancel(ticket);
    }
    for (const llama_seq_id seq_id : released) {
        stepper_.release(seq_id);
    }
    under_way_ = under_way_ && stepper_.any_left();
    lock.lock();
}

// What waiting plans release, unless they or one before them save, admit or resume it first: entries
// for it are skipped.
std::vector<llama_seq_id> Executor::take_early_releases() {
    std::vector<llama_seq_id> awaited, early;
    const auto                to_come = [&](llama_seq_id seq_id) {
        return std::find(awaited.begin(), awaited.end(), seq_id) != awaited.end();
    };
    for (Plan & plan : plans_) {
        for (const auto & save : plan.save) {
            awaited.push_back(save.seq_id);
        }
        const auto now = std::stable_partition(plan.release.begin(), plan.release.end(), to_come);
        early.insert(early.end(), now, plan.release.end());
        plan.release.erase(now, plan.release.end());
        for (const Admission & admission : plan.admit) {
            awaited.push_back(admission.seq_id);
        }
        for (const auto & resume : plan.resume) {
            awaited.push_back(resume.seq_id);
        }
    }
    return early;
}

// Begins with the next plan: carries out what it says beside its steps.
void Executor::open_plan(std::unique_lock<std::mutex> & lock) {
    Plan plan = std::move(plans_.front());
    plans_.pop_front();
    lock.unlock();
    stepper_.open(plan);
    if (!plan.entries.empty()) {
        standing_ = std::move(plan);
        stepped_  = false;
        lock.lock();
        return;
    }
    Step out;
    out.report.plan = plan.number;
    if (plan.follows_a_step()) {  // else what there is to report is of a plan that has not had its step
        stepper_.report_memory(out);
    }
    under_way_ = under_way_ && stepper_.any_left();
    lock.lock();
    if (!out.saved.empty()) {
        n_unseen_ += 1;
        steps_.push_back(std::move(out));
        worth_a_look_ = true;
        ended_.notify_one();
    }
}

void Executor::step(Step & out) {
    out.report.plan   = standing_->number;
    out.report.gap_us = under_way_ ? since_step_.lap() : 0;
    stepper_.report_memory(out);
    mtpbatch_error error{};
    out.report.status                = guard(&error, [&] { stepper_.step(*standing_, stepped_, out); });
    const mtpbatch_status failures[] = { MTPBATCH_OK, MTPBATCH_OUT_OF_MEMORY, MTPBATCH_NO_KV_SLOT,
                                         MTPBATCH_DECODE_FAILED };
    if (std::find(std::begin(failures), std::end(failures), out.report.status) == std::end(failures)) {
        out.report.status = MTPBATCH_DECODE_FAILED;  // a rule was broken in here; who took part is lost all the same
    }
    out.message = error.message;
    stepped_    = true;
    under_way_  = stepper_.any_left();
    since_step_.lap();
}

}  // namespace mtpbatch

struct mtpbatch_executor {
    mtpbatch::Executor impl;
};

using namespace mtpbatch;

mtpbatch_status mtpbatch_executor_create(const mtpbatch_context * target, const mtpbatch_session * session,
                                         mtpbatch_executor ** executor, mtpbatch_error * error) {
    return guard(error, [&] {
        if (target->impl->is_mtp() || target->impl->params().embeddings) {
            throw Error(MTPBATCH_INVALID_ARGUMENT,
                        "the target must be a default context, not an MTP one, nor one for embeddings");
        }
        if (session && &session->impl->target() != target->impl.get()) {
            throw Error(MTPBATCH_INVALID_ARGUMENT, "the session drafts for another context than this one");
        }
        *executor = new mtpbatch_executor{ { target->impl, session ? session->impl : nullptr } };
    });
}

void mtpbatch_executor_stop(mtpbatch_executor * executor) {
    executor->impl.stop();
}

void mtpbatch_executor_free(mtpbatch_executor * executor) {
    delete executor;
}

mtpbatch_status mtpbatch_executor_exchange(mtpbatch_executor * executor, const mtpbatch_plan * plan, int64_t wait_us,
                                           int32_t * n_steps, const mtpbatch_step ** steps, mtpbatch_error * error) {
    return guard(error, [&] {
        const auto & ended = executor->impl.exchange(plan, wait_us);
        *n_steps           = static_cast<int32_t>(ended.size());
        *steps             = ended.data();
    });
}

void mtpbatch_executor_wake(mtpbatch_executor * executor) {
    executor->impl.wake();
}

void mtpbatch_executor_cancel(mtpbatch_executor * executor, int64_t ticket) {
    executor->impl.cancel(ticket);
}
