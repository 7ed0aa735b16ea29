#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
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

// How a thread computes with floating-point numbers: rounding, denormals as zero, traps.
#if defined(__x86_64__)
using FloatMode = unsigned;
constexpr FloatMode kRaised = 0x3f;  // what exceptions have left: no part of the mode
inline FloatMode float_mode() { return _mm_getcsr() & ~kRaised; }
inline void set_float_mode(FloatMode mode) { _mm_setcsr((_mm_getcsr() & kRaised) | mode); }
#elif defined(__aarch64__)
using FloatMode = uint64_t;
inline FloatMode float_mode() {
    FloatMode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
inline void set_float_mode(FloatMode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
using FloatMode = int;
inline FloatMode float_mode() { return 0; }
inline void set_float_mode(FloatMode) {}
#endif

// Brings a worker's own mode back when what it did for a caller is over: the worker may be torch's.
class KeptMode {
public:
    KeptMode() : own_(float_mode()) {}
    ~KeptMode() { adopt(own_); }
    KeptMode(const KeptMode&) = delete;
    KeptMode& operator=(const KeptMode&) = delete;

    static void adopt(FloatMode mode) {
        if (float_mode() != mode) set_float_mode(mode);
    }

private:
    const FloatMode own_;
};

// How long a worker looks for the next phase before it sleeps.
constexpr std::chrono::microseconds kSpin(60);
constexpr int kMaxWorkers = 255;
// A delay that only a lost time slice explains, and how long the caller then works alone before it tries again:
// shortly after a single disturbance, twice as long each time that another follows soon.
constexpr std::chrono::microseconds kSlice(500);
constexpr std::chrono::milliseconds kAloneFirst(4), kAloneMost(200), kSoon(50);

using Clock = std::chrono::steady_clock;
using Call = void (*)(const void*, int64_t, int);

// Processor time of the calling thread.
Clock::duration cpu_time() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return std::chrono::duration_cast<Clock::duration>(std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec));
}

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

    // Opens a phase for `workers` of our own, already started, and whoever else follows.
    void open(int64_t tasks, int workers, Call call, const void* body) {
        call_ = call, body_ = body, tasks_ = tasks, mode_ = float_mode(), opened_ = Clock::now();
        pending_.store(tasks, std::memory_order_relaxed);
        ticket_.store(ticket_of(++phase_, workers, static_cast<uint64_t>(tasks)), std::memory_order_seq_cst);
        if (workers > 0 && sleepers_.load(std::memory_order_seq_cst) > 0) {
            { std::lock_guard<std::mutex> lock(sleep_); }
            wake_.notify_all();
        }
    }

    // The caller's part: works on the open phase until nothing is left to claim.
    void lead() {
        const auto start = Clock::now();
        const auto start_cpu = cpu_time();
        longest_ = {};
        for (auto before = start_cpu; claim_and_run(phase_, 0);) {
            const auto now = cpu_time();
            longest_ = now - before > longest_ ? now - before : longest_;
            before = now;
        }
        out_of_work_ = Clock::now();
        // What the kernel took from the caller, and what OpenMP took before it let the caller begin: it first waits for
        // every worker to have left the region before.
        lost_ = (out_of_work_ - start) - (cpu_time() - start_cpu) + (start - opened_);
    }

    // Another's part.
    void follow(int member) {
        const KeptMode kept;
        while (claim_and_run(phase_, member)) {}
    }

    // Waits for the tasks that others have claimed.
    void wait() {
        Backoff backoff;
        while (pending_.load(std::memory_order_acquire) != 0) backoff.wait();
    }

    // Whether somebody else held the cores lately.
    bool crowded() const {
        const auto since = crowded_.load(std::memory_order_relaxed);
        return since != 0 && Clock::now().time_since_epoch().count() - since < alone_.load(std::memory_order_relaxed);
    }

    // Looks back on a phase. When the kernel puts a thread aside for another process, it is gone for a time slice, several
    // milliseconds: then the caller lost processor time itself, or it waited longer than any task takes. With every
    // phase at that risk, one thread is faster than two until the cores are free again.
    void judge() {
        const auto waited = Clock::now() - out_of_work_;
        if (lost_ > kSlice || (longest_ != Clock::duration{} && waited > kSlice && waited > longest_ + longest_ / 2))
            declare_crowded();
    }

    void declare_crowded() {
        const auto now = Clock::now().time_since_epoch();
        const Clock::duration alone(alone_.load(std::memory_order_relaxed));
        const bool again = now - Clock::duration(crowded_.load(std::memory_order_relaxed)) < 4 * alone + kSoon;
        const Clock::duration next = again ? std::min<Clock::duration>(2 * alone, kAloneMost) : kAloneFirst;
        alone_.store(std::max<Clock::duration>(next, kAloneFirst).count(), std::memory_order_relaxed);
        crowded_.store(now.count(), std::memory_order_relaxed);
    }

private:
    bool claim_and_run(uint32_t phase, int member, bool own = false) {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        do {
            if (static_cast<uint32_t>(ticket >> 32) != phase || (ticket & kTaskMask) == 0) return false;
            // Own workers past the limit, and all of them where the limit is 0, look on.
            if (own && member > static_cast<int>(ticket >> kTaskBits & 0xff)) return false;
        } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire));
        if (member != 0) KeptMode::adopt(mode_);
        call_(body_, tasks_ - static_cast<int64_t>(ticket & kTaskMask), member);
        pending_.fetch_sub(1, std::memory_order_acq_rel);
        return true;
    }

    // `seen` is the last phase that was over when this worker was created.
    void work(int index, uint32_t seen) {
        for (;;) {
            seen = next_phase(seen);
            const KeptMode kept;
            while (claim_and_run(seen, index + 1, true)) {}
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
    Call call_ = nullptr;
    FloatMode mode_{};  // the caller's
    Clock::duration longest_{}, lost_{};  // of the caller's tasks in the last phase, in processor time; taken from it
    Clock::time_point opened_{}, out_of_work_{};  // when the phase began, and when the caller found nothing left to claim
    std::atomic<Clock::rep> crowded_{0};  // when the cores were last found taken
    std::atomic<Clock::rep> alone_{0};    // for how long one thread works alone after that
    const void* body_ = nullptr;
    int64_t tasks_ = 0;
    uint32_t phase_ = 0;
    int workers_ = 0;
    std::mutex sleep_;
    std::condition_variable wake_;
};

// The OpenMP workers that torch brings into the process. After each of torch's parallel loops they spin for some 20 ms, and
// workers of our own would share the cores with them: on two cores a layer between torch's operators was seen to take
// 1.3 times as long. So where there are such workers, they are the ones that carry our phases too.
//
// Only in the main thread (each thread that opens a parallel region makes OpenMP start workers for itself), and never in a
// forked child (where OpenMP waits for workers that do not exist).
class OpenMp {
public:
    bool at_hand() {
        if (forked_ || !is_main_thread()) return false;
        if (!parallel_) parallel_ = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
        return parallel_ != nullptr;
    }

    // Runs the phase that `pool` has open. The region ends when every worker has come and gone.
    void run(Pool& pool, int members) {
        Region region{&pool, {0}};
        parallel_(&Region::enter, &region, static_cast<unsigned>(members), 0);
        pool.judge();
    }

    void forget() { forked_ = true; }

private:
    using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

    struct Region {
        Pool* pool;
        std::atomic<int> others;

        static void enter(void* data) {
            Region& region = *static_cast<Region*>(data);
            if (is_main_thread()) {
                region.pool->lead();
                region.pool->wait();
            } else {
                region.pool->follow(region.others.fetch_add(1) + 1);
            }
        }
    };

    static bool is_main_thread() { return syscall(SYS_gettid) == getpid(); }

    Parallel parallel_ = nullptr;
    bool forked_ = false;
};

OpenMp g_openmp;

// Never destroyed: detached workers may outlive static destructors. Replaced in a forked child, which has no workers and
// may have inherited locked mutexes.
Pool* g_pool = nullptr;

// Registered when the library is loaded: the parent may fork before it has used the pool, but not before torch used OpenMP.
const bool g_fork_watched = [] {
    g_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] {
        g_pool = new Pool;
        g_openmp.forget();
    });
    return true;
}();

Pool& pool() { return *g_pool; }

}  // namespace

bool Backoff::wait() {
    if (turns_ < kPolite) {
        turns_++;
        pause();
        return true;
    }
    sched_yield();
    return false;
}

void declare_crowded() { pool().declare_crowded(); }

Team::Team(int threads, bool long_tasks) : long_tasks_(long_tasks) {
    if (threads <= 1 || !pool().in_use.try_lock()) return;
    borrowed_ = true;
    if (pool().crowded() && !long_tasks_) return;
    openmp_ = g_openmp.at_hand();
    members_ = openmp_ ? (threads <= kMaxWorkers ? threads : kMaxWorkers) : 1 + pool().start(threads - 1);
}

Team::~Team() {
    if (borrowed_) pool().in_use.unlock();
}

void Team::run_tasks(int64_t tasks, Call call, const void* body) {
    if (tasks <= 0) return;
    // One task, one member, cores that are taken, or more tasks than a ticket can count: in the caller, in order.
    if (members_ == 1 || tasks == 1 || tasks > static_cast<int64_t>(kTaskMask) || (pool().crowded() && !long_tasks_)) {
        for (int64_t task = 0; task < tasks; task++) call(body, task, 0);
        return;
    }
    Pool& workers = pool();
    workers.open(tasks, openmp_ ? 0 : members_ - 1, call, body);
    if (openmp_) return g_openmp.run(workers, members_);
    workers.lead();
    workers.wait();
    workers.judge();
}

}  // namespace ostinato
