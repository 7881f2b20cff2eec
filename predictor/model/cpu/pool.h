// Threads that stay warm: they spin for some microseconds after their last work, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

class Pool {
  public:
    using Job = void (*)(void* argument, int thread, int threads);

    // `threads` counts the caller of `run`, which works too.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;

    int threads() const { return threads_; }

    // Run `job` on every thread; returns when all have finished. One caller at a time.
    void run(Job job, void* argument);

    // Inside a job: wait until every thread is here.
    void barrier();

  private:
    void work(int thread);
    void end();

    const int threads_;
    Job job_ = nullptr;
    void* argument_ = nullptr;
    std::atomic<bool> ending_{false};
    // A cache line each: one is spun upon while the other is written.
    alignas(64) std::atomic<uint32_t> started_{0};
    alignas(64) std::atomic<uint32_t> passed_{0};
    alignas(64) std::atomic<int32_t> arrived_{0};
    std::vector<std::thread> workers_;
};
