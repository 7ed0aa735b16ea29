#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace ostinato {
namespace {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// How long a worker looks for the next phase before it sleeps.
constexpr auto kSpin = std::chrono::microseconds(60);
constexpr int kMaxWorkers = 255;

// The open phase in one word, so that a claim is one compare-and-swap: which phase (upper 32 bits), how many workers may
// join (8 bits), how many tasks are left (24 bits). A worker that slept through phases cannot claim from a later one by
// mistake, and what a phase points to is read only after a claim, while the caller must still wait for that task.
constexpr uint64_t kTaskBits = 24, kTaskMask = (uint64_t{1} << kTaskBits) - 1;

uint64_t ticket_of(uint32_t phase, int workers, uint64_t tasks) {
    return uint64_t{phase} << 32 | uint64_t(workers) << kTaskBits | tasks;
}

class Pool {
public:
    std::mutex in_use;

    // Starts missing workers; returns how many of `wanted` there are.
    int start(int wanted) {
        wanted = wanted < kMaxWorkers ? wanted : kMaxWorkers;
        while (workers_ < wanted) {
            try {
                std::thread(&Pool::work, this, workers_, phase_).detach();
            } catch (const std::system_error&) {
                break;  // no more threads to be had: the team is smaller
            }
            workers_++;
        }
        return workers_ < wanted ? workers_ : wanted;
    }

    void run(int64_t tasks, int workers, void (*call)(const void*, int64_t, int), const void* body) {
        call_ = call, body_ = body, tasks_ = tasks;
        pending_.store(tasks, std::memory_order_relaxed);
        ticket_.store(ticket_of(++phase_, workers, static_cast<uint64_t>(tasks)), std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) {
            { std::lock_guard<std::mutex> lock(sleep_); }
            wake_.notify_all();
        }
        while (claim_and_run(phase_, 0)) {
        }
        Backoff backoff;
        while (pending_.load(std::memory_order_acquire) != 0) backoff.wait();
    }

private:
    bool claim_and_run(uint32_t phase, int member) {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        do {
            if (static_cast<uint32_t>(ticket >> 32) != phase || (ticket & kTaskMask) == 0) return false;
            if (member > static_cast<int>(ticket >> kTaskBits & 0xff)) return false;
        } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire));
        call_(body_, tasks_ - static_cast<int64_t>(ticket & kTaskMask), member);
        pending_.fetch_sub(1, std::memory_order_acq_rel);
        return true;
    }

    // `seen` is the last phase that was over when this worker was created.
    void work(int index, uint32_t seen) {
        for (;;) {
            seen = next_phase(seen);
            while (claim_and_run(seen, index + 1)) {
            }
        }
    }

    uint32_t current_phase() const { return static_cast<uint32_t>(ticket_.load(std::memory_order_seq_cst) >> 32); }

    uint32_t next_phase(uint32_t seen) {
        const auto until = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int i = 0; i < 64; i++) {
                if (current_phase() != seen) return current_phase();
                pause();
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return current_phase() != seen; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        return current_phase();
    }

    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> pending_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    void (*call_)(const void*, int64_t, int) = nullptr;
    const void* body_ = nullptr;
    int64_t tasks_ = 0;
    uint32_t phase_ = 0;
    int workers_ = 0;
    std::mutex sleep_;
    std::condition_variable wake_;
};

// Never destroyed: detached workers may outlive static destructors. Replaced in a forked child, which has no workers and
// may have inherited locked mutexes.
Pool* g_pool = nullptr;

Pool& pool() {
    static const bool once = [] {
        g_pool = new Pool;
        pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });
        return true;
    }();
    (void)once;
    return *g_pool;
}

}  // namespace

void Backoff::wait() {
    if (turns_ < 4096) {
        turns_++;
        pause();
    } else {
        sched_yield();
    }
}

Team::Team(int threads) {
    if (threads <= 1 || !pool().in_use.try_lock()) return;
    borrowed_ = true;
    members_ = 1 + pool().start(threads - 1);
}

Team::~Team() {
    if (borrowed_) pool().in_use.unlock();
}

void Team::run_tasks(int64_t tasks, Call call, const void* body) {
    if (tasks <= 0) return;
    // One task, one member, or more tasks than a ticket can count: in the caller, in order.
    if (members_ == 1 || tasks == 1 || tasks > static_cast<int64_t>(kTaskMask)) {
        for (int64_t task = 0; task < tasks; task++) call(body, task, 0);
        return;
    }
    pool().run(tasks, members_ - 1, call, body);
}

}  // namespace ostinato
