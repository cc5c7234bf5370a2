// Threads that share items of work, watched by the thread that called; for topk_cpu.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "topk.hpp"

namespace pymcip {

constexpr int kMostThreads = 1024;                  // more would but take memory

class Team {
  public:
    // `inline_work`: too little of it for threads. Otherwise even a single worker is a thread of its
    // own, so that this one can report progress and be told to stop.
    Team(int threads, bool inline_work, const Progress& progress, std::int64_t total)
        : threads_(inline_work ? 1 : std::min(std::max(threads, 1), kMostThreads)),
          inline_(inline_work),
          progress_(progress),
          total_(total) {}

    int threads() const { return threads_; }
    const bool* stop_flag() const { return &stop_; }
    bool stopped() const { return __atomic_load_n(&stop_, __ATOMIC_RELAXED); }
    void stop() { __atomic_store_n(&stop_, true, __ATOMIC_RELAXED); }
    void advance(std::int64_t work) { done_ += work; }

    // Calls work(worker, item) for every item on up to threads() threads, while this one reports
    // progress ten times a second; rethrows what one of them threw.
    template <class Work>
    void each(std::int64_t items, const Work& work) {
        std::atomic<std::int64_t> next{0};
        const int count = static_cast<int>(std::min<std::int64_t>(threads_, items));
        in_parallel(count, [&](int worker) {
            for (std::int64_t item; (item = next++) < items && !stopped();) work(worker, item);
        });
    }

  private:
    template <class Work>
    void in_parallel(int count, const Work& work) {
        if (count <= 0) return;
        if (inline_) return work(0);
        std::mutex mutex;
        std::condition_variable finished;
        int running = 0;
        std::exception_ptr failure;
        const auto body = [&](int worker) {
            std::exception_ptr thrown;
            try {
                work(worker);
            } catch (...) {
                thrown = std::current_exception();
                stop();
            }
            const std::lock_guard<std::mutex> lock(mutex);
            if (thrown) failure = thrown;
            --running;
            finished.notify_one();
        };
        std::vector<std::thread> team;
        team.reserve(static_cast<std::size_t>(count));
        for (int worker = 0; worker < count; ++worker) {
            {
                const std::lock_guard<std::mutex> lock(mutex);
                ++running;
            }
            try {
                team.emplace_back(body, worker);
            } catch (const std::system_error&) {  // no more threads to be had: go on with these
                const std::lock_guard<std::mutex> lock(mutex);
                --running;
                break;
            }
        }
        if (team.empty()) return work(0);
        {
            std::unique_lock<std::mutex> lock(mutex);
            while (running > 0) {
                const bool due = !finished.wait_until(lock, due_, [&] { return running == 0; });
                if (!due) break;
                due_ = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
                lock.unlock();
                if (!stopped() && !progress_(done_, total_)) stop();
                lock.lock();
            }
        }
        for (std::thread& member : team) member.join();
        if (failure) std::rethrow_exception(failure);
    }

    const int threads_;
    const bool inline_;
    const Progress& progress_;
    const std::int64_t total_;
    bool stop_ = false;
    std::atomic<std::int64_t> done_{0};
    std::chrono::steady_clock::time_point due_ =
        std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
};

}  // namespace pymcip
