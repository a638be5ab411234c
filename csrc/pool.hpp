// Threads for what one step has to do beside the model.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace mtpbatch {

// Runs bodies on a few threads that sleep when there is nothing to do; the caller works too.
//
// Not OpenMP: GNU's slows all of its teams down once two threads of a process start some.
class Pool {
  public:
    // Threads beyond the caller's own that the system refuses are done without.
    explicit Pool(int32_t n_threads);
    ~Pool();
    Pool(const Pool &)             = delete;
    Pool & operator=(const Pool &) = delete;

    // body(i) for i in [0, n), in any order; returns when all are done. One thread calls at a time.
    // `n_values` says how much memory they read in all, in floats: too little is not worth waking
    // anybody. The first exception of a body is rethrown, and bodies not yet begun are dropped.
    void run(int32_t n, const std::function<void(int32_t)> & body, int64_t n_values = INT64_MAX);

  private:
    void help();
    void work() noexcept;

    std::vector<std::thread> threads_;
    std::mutex               mutex_;  // for all below but next_
    std::condition_variable  wake_, idle_;
    bool                     stop_     = false;
    int64_t                  n_runs_   = 0;
    bool                     open_     = false;  // more threads may join the current run
    int32_t                  n_inside_ = 0;      // threads that have
    std::exception_ptr       error_;

    // Of the current run; fixed while a thread is inside.
    const std::function<void(int32_t)> * body_ = nullptr;
    int32_t                              n_    = 0;
    std::atomic<int32_t>                 next_{ 0 };
};

}  // namespace mtpbatch
