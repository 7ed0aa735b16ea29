// The worker pool: a call borrows it as a Team, runs phases of independent tasks, and gives it back.
//
// Promises (design, decision 8):
//   - Tasks are claimed one at a time, the caller claims too, and it waits only for tasks that a worker has claimed. Where
//     another process holds the cores, workers arrive late or never and the caller does the work alone; a caller that was
//     kept waiting works alone for some milliseconds, and up to a fifth of a second where that goes on.
//   - A second Python thread finds the pool busy and runs alone. Nothing blocks.
//   - Workers compute in the caller's floating-point mode. After a phase they spin for some tens of microseconds, then sleep.
//   - Beside torch, its OpenMP workers are used instead of ours (threads.cpp, OpenMp).
//   - After fork, the child starts with a new, empty pool.
#pragma once

#include <cstdint>

namespace ostinato {

class Team {
public:
    // Borrows the pool for up to `threads` members, the caller included; one member if the pool is busy. With `long_tasks` a
    // time slice that is lost matters little beside them: then members are asked for although others hold the cores.
    explicit Team(int threads, bool long_tasks = false);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int members() const { return members_; }

    // Calls body(task, member) once for each task in [0, tasks) and returns when all are done. member < members().
    template <class Body>
    void run(int64_t tasks, const Body& body) {
        run_tasks(tasks, &call<Body>, &body);
    }

private:
    using Call = void (*)(const void* body, int64_t task, int member);

    template <class Body>
    static void call(const void* body, int64_t task, int member) {
        (*static_cast<const Body*>(body))(task, member);
    }

    void run_tasks(int64_t tasks, Call call, const void* body);

    int members_ = 1;
    bool borrowed_ = false;
    bool openmp_ = false;
    bool long_tasks_ = false;
};

// The turns of a spin loop: pauses at first, some hundred microseconds in all, then the processor is offered to others.
class Backoff {
public:
    // False once the wait has become a long one.
    bool wait();

private:
    static constexpr int kPolite = 4096;
    int turns_ = 0;
};

// Says that a member was waited for too long: the next calls run in one thread.
void declare_crowded();

}  // namespace ostinato
