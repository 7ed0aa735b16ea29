// The names of device.h on the host, for tests without a GPU. Each CUDA thread is a fiber, and the fibers of a gang (the blocks
// that share a batch tile) take turns in a chosen order. Gangs run one after another.
//
// It finds wrong indices, wrong phases of barriers, deadlocks, and values that are read before they must have come: at random, what
// goes to another block arrives late and in any order, and two values on their way to one place end the run. It does not know the
// rest of the device's memory model, or how instructions approximate: activations and TF32 are exact or correctly rounded here.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define OSTINATO_DEVICE inline
#define OSTINATO_KERNEL static void
#define OSTINATO_BOUNDS(threads)
#define OSTINATO_UNROLL
#define OSTINATO_ROLLED

namespace ostinato {
namespace {

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    int thread, block;
    bool is_done = false;
};

// A meeting of `count` fibers. Nobody leaves before all have come.
struct Meeting {
    int come = 0;
    u64 held = 0;
};

struct Warp {
    Meeting meeting;
    float d[32][4];
    u32 a[32][4], b[32][2];
    float values[32], results[32][4];
};

// A word on its way to another block, and the barrier that counts its bytes, if one does.
struct Flight {
    char* to;
    u64 word;
    u32 bytes;
    u64* barrier;
};

// In which order the fibers of a gang take turns; at random, words are late too. Starving, the last warp of the first block goes on
// only where nobody else can.
enum class Schedule { kAscending, kDescending, kRandom, kStarving };

struct Gang {
    int threads, blocks, index;
    std::vector<Fiber> fibers;
    std::vector<std::vector<char>> shared;  // of each block
    std::vector<Meeting> block_meetings;
    Meeting meeting;
    std::vector<Warp> warps;
    ucontext_t scheduler;
    Fiber* current = nullptr;
    std::function<void()> kernel;
    u64 progress = 0;  // what has happened that can end a wait
    Schedule schedule;
    std::vector<Flight> flights;
    u32 random = 12345;
};

static Gang gang;

// Draws a number below `end`.
inline size_t draw(size_t end) {
    gang.random = gang.random * 1664525u + 1013904223u;
    return (gang.random >> 8) % end;
}

inline void yield() { swapcontext(&gang.current->context, &gang.scheduler); }

template <class Last>
inline void meet(Meeting& meeting, int count, Last last) {
    const u64 held = meeting.held;
    gang.progress++;
    if (++meeting.come == count) {
        meeting.come = 0;
        last();
        meeting.held++;
    } else {
        while (meeting.held == held) yield();
    }
}

inline int thread_index() { return gang.current->thread; }
inline int block_index() { return gang.index * gang.blocks + gang.current->block; }

template <class Shared>
inline Shared& shared_memory() {
    auto& memory = gang.shared[static_cast<size_t>(gang.current->block)];
    // What nobody has written is NaN.
    if (memory.empty()) memory.assign(sizeof(Shared), static_cast<char>(0xff));
    return *reinterpret_cast<Shared*>(memory.data());
}

inline void block_barrier() {
    meet(gang.block_meetings[static_cast<size_t>(gang.current->block)], gang.threads, [] {});
}
inline void cluster_barrier() {
    meet(gang.meeting, gang.threads * gang.blocks, [] {});
}

// In the 64 bits of the barrier: bytes still expected, arrivals still expected, parity of the current phase.
struct Transaction {
    std::int32_t bytes;
    std::int16_t arrivals;
    u16 parity;
};
static_assert(sizeof(Transaction) == sizeof(u64));

inline void transaction_change(u64* barrier, int bytes, int arrivals) {
    Transaction t;
    std::memcpy(&t, barrier, sizeof t);
    t.bytes += bytes;
    t.arrivals = static_cast<std::int16_t>(t.arrivals - arrivals);
    // More than one phase ahead: the device's barrier would count these bytes to the wrong phase.
    if (t.arrivals < 0) std::abort();
    if (t.arrivals == 0 && t.bytes == 0) t.arrivals = 1, t.parity ^= 1;
    std::memcpy(barrier, &t, sizeof t);
    gang.progress++;
}
inline void transaction_init(u64* barrier) {
    const Transaction t{0, 1, 0};
    std::memcpy(barrier, &t, sizeof t);
}
inline void transaction_publish() {}
inline void transaction_expect(u64* barrier, u32 bytes) { transaction_change(barrier, static_cast<int>(bytes), 1); }
inline void transaction_wait(u64* barrier, u32 parity) {
    for (;;) {
        Transaction t;
        std::memcpy(&t, barrier, sizeof t);
        if (t.parity != parity) return;
        yield();
    }
}

inline char* remote_address(void* own, u32 rank) {
    char* const mine = gang.shared[static_cast<size_t>(gang.current->block)].data();
    return gang.shared[rank].data() + (static_cast<char*>(own) - mine);
}

inline void land(const Flight& flight) {
    std::memcpy(flight.to, &flight.word, flight.bytes);
    if (flight.barrier) transaction_change(flight.barrier, -static_cast<int>(flight.bytes), 0);
    gang.progress++;
}
template <class Word>
inline void send(char* to, Word word, u64* barrier) {
    const Flight flight{to, word, sizeof word, barrier};
    if (gang.schedule != Schedule::kRandom) return land(flight);
    for (const Flight& other : gang.flights)
        if (other.to == to) std::abort();
    gang.flights.push_back(flight);
}
inline void land_one() {
    const size_t i = draw(gang.flights.size());
    const Flight flight = gang.flights[i];
    gang.flights[i] = gang.flights.back();
    gang.flights.pop_back();
    land(flight);
}

template <class Word>
inline void push(void* own, Word value, u64* barrier, u32 rank) {
    if (reinterpret_cast<std::uintptr_t>(own) % sizeof value) std::abort();
    send(remote_address(own, rank), value, reinterpret_cast<u64*>(remote_address(barrier, rank)));
}

inline Warp& warp() {
    return gang.warps[static_cast<size_t>(gang.current->block * (gang.threads / 32) + gang.current->thread / 32)];
}

inline void schedule_barrier() {}

inline float shuffle_xor(float value, int mask) {
    Warp& w = warp();
    const int lane = thread_index() % 32;
    w.values[lane] = value;
    meet(w.meeting, 32, [&] {
        for (int i = 0; i < 32; i++) w.results[i][0] = w.values[i];
    });
    return w.results[lane ^ mask][0];
}

inline u32 bits_of(float value) {
    u32 bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float float_of(u32 bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float widen(BFloat16 value) { return float_of(static_cast<u32>(value.bits) << 16); }
inline float widen(Float16 value) {
    const u32 sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
    const float magnitude = exponent ? std::ldexp(static_cast<float>(1024 + fraction), static_cast<int>(exponent) - 25)
                                     : std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -magnitude : magnitude;
}
inline float widen(float value) { return value; }

inline void narrow(float value, BFloat16& to) {
    const u32 bits = bits_of(value);
    to.bits = static_cast<u16>(value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float value, Float16& to) {
    const u16 sign = static_cast<u16>(bits_of(value) >> 16 & 0x8000);
    const float magnitude = std::fabs(value);
    if (value != value) {
        to.bits = 0x7fff;
    } else if (magnitude >= 65520.0f) {
        to.bits = sign | 0x7c00;
    } else {
        int exponent = -14;
        if (magnitude > 0) std::frexp(magnitude, &exponent);
        const int unit = std::max(exponent - 11, -24);  // of the last place
        const auto units = static_cast<u32>(std::nearbyint(std::ldexp(magnitude, -unit)));
        // A carry out of the fraction raises the exponent by itself.
        to.bits = static_cast<u16>(sign | (unit == -24 ? units : (static_cast<u32>(unit + 24) << 10) + units));
    }
}
inline void narrow(float value, float& to) { to = value; }
// To nearest, ties away from zero.
inline float to_tf32(float value) {
    return value != value || std::isinf(value) ? value : float_of((bits_of(value) + 0x1000u) & ~0x1fffu);
}

inline Pair unpack(BFloat16, u32 word) {
    return {widen(BFloat16{static_cast<u16>(word)}), widen(BFloat16{static_cast<u16>(word >> 16)})};
}
inline Pair unpack(Float16, u32 word) {
    return {widen(Float16{static_cast<u16>(word)}), widen(Float16{static_cast<u16>(word >> 16)})};
}

// d (16 x 8) += a (16 x k) b (k x 8). A word holds kWidth neighbours in k.
template <int kWidth, class Kind>
inline void multiply_fragments(Kind kind, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    constexpr int kK = 8 * kWidth;
    Warp& w = warp();
    const int lane = thread_index() % 32;
    for (int i = 0; i < 4; i++) w.d[lane][i] = d[i], w.a[lane][i] = a[i];
    w.b[lane][0] = b0, w.b[lane][1] = b1;
    meet(w.meeting, 32, [&] {
        float A[16][kK], B[kK][8];
        const auto get = [&](u32 word, int i) {
            if constexpr (kWidth == 1) {
                if (word & 0x1fffu) std::abort();  // no TF32: the device would cut it off
                return float_of(word);
            } else {
                const Pair pair = unpack(kind, word);
                return i ? pair.b : pair.a;
            }
        };
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < kWidth; j++) {
                    A[l / 4 + i % 2 * 8][(l % 4 + i / 2 * 4) * kWidth + j] = get(w.a[l][i], j);
                    if (i < 2) B[(l % 4 + i * 4) * kWidth + j][l / 4] = get(w.b[l][i], j);
                }
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++) {
                float sum = w.d[l][i];
                for (int k = 0; k < kK; k++) sum += A[l / 4 + i / 2 * 8][k] * B[k][l % 4 * 2 + i % 2];
                w.results[l][i] = sum;
            }
    });
    for (int i = 0; i < 4; i++) d[i] = w.results[lane][i];
}
inline void multiply(BFloat16 kind, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    multiply_fragments<2>(kind, d, a, b0, b1);
}
inline void multiply(Float16 kind, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    multiply_fragments<2>(kind, d, a, b0, b1);
}
inline void multiply(float kind, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    multiply_fragments<1>(kind, d, a, b0, b1);
}

inline int opaque(int i) { return i; }
inline i64 multiply_wide(int a, int b) { return static_cast<i64>(a) * b; }

// Aligned, or the device would fault.
template <class Word>
inline Word load(const Word* p) {
    if (reinterpret_cast<std::uintptr_t>(p) % sizeof(Word)) std::abort();
    return *p;
}
inline void prefetch(const void*) {}
template <class Word, size_t kCount>
inline void load_shared_words(const Word* p, Word (&words)[kCount]) {
    static_assert(sizeof words == 16);
    if (reinterpret_cast<std::uintptr_t>(p) % sizeof words) std::abort();
    yield();  // so that somebody else may write
    for (size_t i = 0; i < kCount; i++) words[i] = p[i];
}
template <class Word>
inline void store_shared_words(Word* p, Word a, Word b) {
    if (reinterpret_cast<std::uintptr_t>(p) % (2 * sizeof(Word))) std::abort();
    send(reinterpret_cast<char*>(p), a, nullptr);
    send(reinterpret_cast<char*>(p + 1), b, nullptr);
}

inline float reciprocal(float x) { return 1.0f / x; }
inline float fast_hyperbolic_tangent(float x) { return std::tanh(x); }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float quotient(float a, float b) { return a / b; }
inline float square_root(float x) { return std::sqrt(x); }
inline float reciprocal_square_root(float x) { return 1.0f / std::sqrt(x); }

inline void run_fiber() {
    gang.kernel();
    gang.current->is_done = true;
    swapcontext(&gang.current->context, &gang.scheduler);
}

// Runs the kernel on one gang. False if nobody can go on.
inline bool run_gang(const std::function<void()>& kernel, int threads, int blocks, int index, Schedule schedule) {
    gang = Gang();
    gang.threads = threads, gang.blocks = blocks, gang.index = index, gang.kernel = kernel, gang.schedule = schedule;
    gang.shared.resize(static_cast<size_t>(blocks));
    gang.block_meetings.resize(static_cast<size_t>(blocks));
    gang.warps.resize(static_cast<size_t>(blocks * threads / 32));
    gang.fibers.resize(static_cast<size_t>(blocks * threads));
    const int count = blocks * threads;
    for (int i = 0; i < count; i++) {
        Fiber& fiber = gang.fibers[static_cast<size_t>(i)];
        fiber.thread = i % threads, fiber.block = i / threads;
        fiber.stack.resize(1 << 16);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &gang.scheduler;
        makecontext(&fiber.context, run_fiber, 0);
    }
    u64 progress = ~0ull;
    for (int left = count, idle = 0; left;) {
        for (int j = 0; j < count; j++) {
            size_t i = static_cast<size_t>(schedule == Schedule::kDescending ? count - 1 - j : j);
            if (schedule == Schedule::kRandom) {
                i = draw(static_cast<size_t>(count));
                for (size_t n = draw(8); n && !gang.flights.empty(); n--) land_one();
            }
            Fiber& fiber = gang.fibers[i];
            const bool is_last = fiber.block == 0 && fiber.thread >= threads - 32;
            if (fiber.is_done || (schedule == Schedule::kStarving && is_last && !idle)) continue;
            gang.current = &fiber;
            swapcontext(&gang.scheduler, &fiber.context);
            if (fiber.is_done) left--, gang.progress++;
        }
        idle = progress == gang.progress ? idle + 1 : 0;
        progress = gang.progress;
        if (idle > 100) return false;
    }
    // What arrives when nobody waits any more would be written into memory that is somebody else's by then.
    return gang.flights.empty();
}

template <class... Parameters, size_t... kIndices>
void call_entry(void (*entry)(Parameters...), const i64* arguments, std::index_sequence<kIndices...>) {
    entry(((Parameters)(arguments[kIndices]))...);
}

// Runs a kernel for so many loops; 0, or 1 where it cannot go on. Its arguments are numbers and addresses.
template <class... Parameters>
int emulate(void (*entry)(Parameters...), const i64* arguments, int loops, int threads, int blocks, int schedule) {
    const auto kernel = [&] { call_entry(entry, arguments, std::index_sequence_for<Parameters...>()); };
    for (int loop = 0; loop < loops; loop++)
        if (!run_gang(kernel, threads, blocks, loop, static_cast<Schedule>(schedule))) return 1;
    return 0;
}

}  // namespace
}  // namespace ostinato
