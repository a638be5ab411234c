#include "pool.hpp"

#include <algorithm>
#include <utility>

namespace mtpbatch {

namespace {

// Waking a sleeping thread pays from about so many values on (measured with arg-max, on virtual CPUs).
constexpr int64_t WORTH_WAKING = 1 << 19;

}  // namespace

Pool::Pool(int32_t n_threads) {
    threads_.reserve(std::max(0, n_threads - 1));
    try {
        for (int32_t i = 1; i < n_threads; ++i) {
            threads_.emplace_back([this] { help(); });
        }
    } catch (...) {  // no thread or no memory to be had: the work takes longer
    }
}

Pool::~Pool() {
    {
        const std::lock_guard lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (auto & thread : threads_) {
        thread.join();
    }
}

void Pool::run(int32_t n, const std::function<void(int32_t)> & body, int64_t n_values) {
    if (n <= 1 || threads_.empty() || n_values < WORTH_WAKING) {
        for (int32_t i = 0; i < n; ++i) {
            body(i);
        }
        return;
    }
    {
        const std::lock_guard lock(mutex_);
        body_ = &body;
        n_    = n;
        next_ = 0;
        n_runs_ += 1;
        open_ = true;
    }
    const int32_t n_wanted = std::min(n - 1, static_cast<int32_t>(threads_.size()));
    for (int32_t i = 0; i < n_wanted; ++i) {
        wake_.notify_one();
    }
    work();
    // Nobody is waited for who has not come yet.
    std::unique_lock lock(mutex_);
    open_ = false;
    idle_.wait(lock, [this] { return n_inside_ == 0; });
    if (error_) {
        std::rethrow_exception(std::exchange(error_, nullptr));
    }
}

// What a thread of the pool does all its life.
void Pool::help() {
    int64_t          last_run = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
        wake_.wait(lock, [&] { return stop_ || (open_ && n_runs_ != last_run); });
        if (stop_) {
            return;
        }
        last_run = n_runs_;
        n_inside_ += 1;
        lock.unlock();
        work();
        lock.lock();
        n_inside_ -= 1;
        if (n_inside_ == 0) {
            idle_.notify_one();
        }
    }
}

void Pool::work() noexcept {
    for (int32_t i; (i = next_.fetch_add(1)) < n_;) {
        try {
            (*body_)(i);
        } catch (...) {
            next_ = n_;
            const std::lock_guard lock(mutex_);
            if (!error_) {
                error_ = std::current_exception();
            }
        }
    }
}

}  // namespace mtpbatch
