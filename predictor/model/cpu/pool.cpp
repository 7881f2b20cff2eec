#include "pool.h"

namespace {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// About 50 us: longer than the host's work between two steps mostly is, and short enough that a thread whose
// partner lost its core to another process gives up its own, to which the kernel then moves the partner.
constexpr int SPINS = 4000;

void wait_while(const std::atomic<uint32_t>& value, uint32_t old) {
    for (int i = 0; i < SPINS; i++) {
        if (value.load(std::memory_order_acquire) != old) return;
        pause();
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

Pool::Pool(int threads) : threads_(threads < 1 ? 1 : threads) {
    try {
        for (int thread = 1; thread < threads_; thread++) workers_.emplace_back([this, thread] { work(thread); });
    } catch (...) {  // the system has no more threads: let those go that began
        end();
        throw;
    }
}

Pool::~Pool() { end(); }

void Pool::end() {
    ending_ = true;
    started_.fetch_add(1, std::memory_order_release);
    started_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::run(Job job, void* argument) {
    job_ = job;
    argument_ = argument;
    if (threads_ > 1) {
        started_.fetch_add(1, std::memory_order_release);
        started_.notify_all();
    }
    job(argument, 0, threads_);
    barrier();
}

void Pool::barrier() {
    if (threads_ == 1) return;
    const uint32_t round = passed_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
        arrived_.store(0, std::memory_order_relaxed);
        passed_.store(round + 1, std::memory_order_release);
        passed_.notify_all();
    } else {
        wait_while(passed_, round);
    }
}

void Pool::work(int thread) {
    for (uint32_t seen = 0;; seen++) {
        wait_while(started_, seen);
        if (ending_) return;
        job_(argument_, thread, threads_);
        barrier();
    }
}
