// Chooses the instruction set, the number of threads and the scratch memory of a call. Compiled for the baseline.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include <sys/mman.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "engine.h"
#include "lengths.h"
#include "streams.h"
#include "threads.h"

namespace ostinato {

namespace {

// What the baseline of the architecture makes of GCC's vectors: NEON wherever there is aarch64.
#if defined(__aarch64__)
constexpr char kBaseline[] = "neon";
#else
constexpr char kBaseline[] = "portable";
#endif

struct Isa {
    const char* name;
    const Kernels* tables[kDtypes];  // [Dtype]
    const StreamKernels* streams[kDtypes];  // [Dtype], null where there is none
    const StreamKernels* int8_streams;      // those of int8 weights, which Isas chooses
};

}  // namespace

// What kernels.cpp and stream_kernels.cpp define for one instruction set, under the name that users see.
#define OSTINATO_ISA(isa, name)                                                                                 \
    extern const Kernels kernels_##isa##_float, kernels_##isa##_double;                                         \
    extern const Kernels kernels_##isa##_bfloat16, kernels_##isa##_float16;                                     \
    extern const StreamKernels streams_##isa##_float, streams_##isa##_double;                                   \
    namespace {                                                                                                 \
    constexpr Isa k_##isa = {                                                                                   \
        name,                                                                                                   \
        {&kernels_##isa##_float, &kernels_##isa##_double, &kernels_##isa##_bfloat16, &kernels_##isa##_float16}, \
        {&streams_##isa##_float, &streams_##isa##_double},                                                      \
        nullptr};                                                                                               \
    }

OSTINATO_ISA(portable, kBaseline)
#ifdef OSTINATO_HAVE_AVX2
OSTINATO_ISA(avx2, "avx2")
#endif
#ifdef OSTINATO_HAVE_AVX512
OSTINATO_ISA(avx512, "avx512")
#endif
// Streams with int8 weights, which have instructions that not every processor of a set has.
extern const StreamKernels streams_portable_int8;
#ifdef OSTINATO_HAVE_AVX2
extern const StreamKernels streams_avx2_int8;
#endif
#ifdef OSTINATO_HAVE_AVXVNNI
extern const StreamKernels streams_avxvnni_int8;
#endif
#ifdef OSTINATO_HAVE_DOTPROD
extern const StreamKernels streams_dotprod_int8;
#endif
#ifdef OSTINATO_HAVE_AVX512
extern const StreamKernels streams_avx512vnni_int8;
#endif

namespace {

struct Isas {
    Isa found[3];
    int count = 0;

    Isas() {
        // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
#ifdef OSTINATO_HAVE_AVX512
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl"))
            add(k_avx512, int8_for_avx512());
#endif
#ifdef OSTINATO_HAVE_AVX2
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add(k_avx2, int8_for_avx2(count == 0));
#endif
        add(k_portable, int8_for_baseline());
    }

private:
    void add(const Isa& isa, const StreamKernels* int8_streams) {
        found[count] = isa;
        found[count++].int8_streams = int8_streams;
    }
#ifdef OSTINATO_HAVE_AVX512
    static const StreamKernels* int8_for_avx512() {
        return __builtin_cpu_supports("avx512vnni") ? &streams_avx512vnni_int8 : int8_for_avx2(true);
    }
#endif
#ifdef OSTINATO_HAVE_AVX2
    // Beside AVX-512 it is AVX2's own, so that a test may compare them.
    static const StreamKernels* int8_for_avx2([[maybe_unused]] bool is_best) {
#ifdef OSTINATO_HAVE_AVXVNNI
        if (is_best && has_avx_vnni()) return &streams_avxvnni_int8;
#endif
        return &streams_avx2_int8;
    }
#endif
#ifdef OSTINATO_HAVE_AVXVNNI
    // __builtin_cpu_supports of GCC 11 does not know it: CPUID 7.1, EAX, bit 4.
    static bool has_avx_vnni() {
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
    }
#endif
    static const StreamKernels* int8_for_baseline() {
#ifdef OSTINATO_HAVE_DOTPROD
        if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) return &streams_dotprod_int8;
#endif
        return &streams_portable_int8;
    }
};

const Isas& isas() {
    static const Isas all;
    return all;
}

std::atomic<const Isa*> g_active{nullptr};

const Isa& active() {
    const Isa* isa = g_active.load(std::memory_order_acquire);
    return isa ? *isa : isas().found[0];
}

}  // namespace

void* allocate(int64_t bytes) {
    // Fresh pages of 4 KiB cost more than a layer of a few hundred units computes; pages of 2 MiB a tenth of that.
    constexpr int64_t kHugePage = 2 << 20, kFromHere = 4 << 20;
    const int64_t page = bytes >= kFromHere ? kHugePage : 64, pages = std::max<int64_t>(1, (bytes + page - 1) / page);
    const auto size = static_cast<size_t>(pages * page);
    void* p = std::aligned_alloc(static_cast<size_t>(page), size);
    if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (page == kHugePage) madvise(p, size, MADV_HUGEPAGE);
#endif
    return p;
}

namespace {

// Scratch of the calling thread, kept between calls up to kKept bytes: fresh pages cost more than a small layer does.
// It holds no state: every call writes before it reads. One that is used inside another has another number.
template <int kNumber>
class Scratch {
public:
    explicit Scratch(int64_t bytes) : bytes_(bytes) {
        if (bytes > t_kept.bytes) {
            p_ = allocate(bytes);
            if (bytes <= kKept) t_kept.adopt(p_, bytes);
        } else {
            p_ = t_kept.p;
        }
    }
    ~Scratch() {
        if (bytes_ > kKept) std::free(p_);
    }
    void* get() const { return p_; }

private:
    static constexpr int64_t kKept = 64 << 20;

    struct Kept {
        void* p = nullptr;
        int64_t bytes = 0;
        void adopt(void* fresh, int64_t size) {
            std::free(p);
            p = fresh, bytes = size;
        }
        ~Kept() { std::free(p); }
    };

    static thread_local Kept t_kept;
    void* p_;
    int64_t bytes_;
};

template <int kNumber>
thread_local typename Scratch<kNumber>::Kept Scratch<kNumber>::t_kept;

// Below this many multiply-adds, waking a worker costs more than it brings.
constexpr int64_t kWorthATeam = 1 << 18;

// Multiply-adds of forward.
int64_t work_of(Cell cell, const Sizes& sizes) {
    const Traits& t = traits_of(cell);
    return sizes.rows * sizes.hidden * (t.input_gates * sizes.input + t.gates * sizes.output());
}

int members_for(Cell cell, const Sizes& sizes, int threads) {
    const int64_t step = traits_of(cell).gates * sizes.hidden * sizes.output();
    // A single row whose steps are not worth sharing leaves the others nothing but the packing of small weights.
    if (sizes.steps > 1 && sizes.batch * sizes.directions == 1 && step < kWorthRelay) return 1;
    return work_of(cell, sizes) < kWorthATeam ? 1 : threads;
}

// Multiply-adds that are the work of several time slices.
constexpr int64_t kLong = int64_t{1} << 29;

// Whether a task of forward is: rows in tiles, which nothing holds up until all steps are done.
bool has_long_tasks(Cell cell, const Sizes& sizes, int threads) {
    return sizes.batch >= 2 * threads && work_of(cell, sizes) / threads >= kLong;
}

}  // namespace

int64_t reserve_bytes(Cell cell, Dtype dtype, const Sizes& sizes) {
    const int64_t values = sizes.recompute ? traits_of(cell).recomputed : traits_of(cell).saved;
    return sizes.directions * sizes.rows * values * padded(sizes.hidden) * computed_bytes(dtype);
}

namespace {

// Runs a call that has no lengths.
template <class Call>
void run_whole(Cell cell, Dtype dtype, const Call& call, int threads) {
    const Loop<Call>& loop = (*active().tables[static_cast<int>(dtype)])[cell];
    const bool is_long = std::is_same_v<Call, Forward> && has_long_tasks(cell, call.sizes, threads);
    Team team(members_for(cell, call.sizes, threads), is_long);
    Scratch<0> scratch(loop.scratch_bytes(call, team.members()));
    loop.run(call, team, scratch.get());
}

// ---- one step of many rows with small weights, in parts ----
//
// In one step rows know nothing of each other, so a part of them is a call of its own, with the same bits. As one call, a
// hundred thousand rows would take scratch that no cache holds and whose pages are fresh in each call; and a forward of few
// units has no more than one task.

// Weights that are cheap to pack for each part, in bytes.
constexpr int64_t kSmallWeights = 256 << 10;
// Scratch of a part: forward's is of the second-level cache of the thread that runs it; backward's is shared by all threads.
constexpr int64_t kForwardPart = 512 << 10, kBackwardPart = 2 << 20;
// Backward's sums over rows are cut into chains of 128 rows: so are its parts, for the same bits.
constexpr int64_t kChain = 128;

// Rows of a part that takes so much scratch; 0 where a call is not to be cut.
int64_t part_rows(Cell cell, Dtype dtype, const Arguments& call, int64_t scratch) {
    const Sizes& z = call.sizes;
    const int64_t G = std::max(traits_of(cell).input_gates, traits_of(cell).gates), bytes = computed_bytes(dtype);
    if (z.steps != 1 || z.directions != 1 || z.batch_sizes || call.resets) return 0;
    if (G * z.hidden * (z.input + z.output()) * bytes > kSmallWeights) return 0;
    return std::max<int64_t>(1, scratch / ((G + 1) * padded(z.hidden) * bytes) / kChain) * kChain;
}

// The call on `rows` rows from `first` on.
template <class Call>
Call part_of(Cell cell, Dtype dtype, const Call& call, int64_t first, int64_t rows) {
    Sizes before = call.sizes;
    before.rows = before.batch = first;
    const int64_t kept = reserve_bytes(cell, dtype, before);
    Call part = call;
    part.sizes.rows = part.sizes.batch = rows;
    call.visit(part, [&](const Array& array, auto, auto& p) {
        if (array.type == Type::kOpaque)
            p = moved(p, kept);
        else if (array.has_rows_of_batch())
            p = moved(p, first * array.row_bytes(call.sizes, dtype));
    });
    if constexpr (std::is_same_v<Call, Backward>) part.resume = call.resume || first > 0;
    return part;
}

// Parts side by side, at least one for each thread.
void run_rows(Cell cell, Dtype dtype, const Forward& call, int threads) {
    const int64_t batch = call.sizes.batch, most = part_rows(cell, dtype, call, kForwardPart);
    const int64_t members = std::min<int64_t>(members_for(cell, call.sizes, threads), batch / kChain);
    if (most == 0 || (batch <= most && members <= 1)) return run_whole(cell, dtype, call, threads);
    int64_t count = (batch + most - 1) / most;
    if (members > 1) count = (count + members - 1) / members * members;
    std::vector<Forward> parts;
    for (int64_t i = 0, first = 0; i < count; i++) {
        const int64_t rows = batch / count + (i < batch % count);
        parts.push_back(part_of(cell, dtype, call, first, rows));
        first += rows;
    }
    run_all(cell, dtype, parts.data(), count, static_cast<int>(std::max<int64_t>(1, members)));
}

// Parts one after another: each goes on with the sums of the one before it.
void run_rows(Cell cell, Dtype dtype, const Backward& call, int threads) {
    const int64_t batch = call.sizes.batch, most = part_rows(cell, dtype, call, kBackwardPart);
    if (most == 0 || batch <= most || stored_bytes(dtype) != computed_bytes(dtype))
        return run_whole(cell, dtype, call, threads);
    for (int64_t first = 0; first < batch; first += most)
        run_whole(cell, dtype, part_of(cell, dtype, call, first, std::min(most, batch - first)), threads);
}

}  // namespace

template <class Call>
void run(Cell cell, Dtype dtype, const Call& call, int threads) {
    if (!call.lengths) return run_rows(cell, dtype, call, threads);
    const ByLength rows(dtype, call.sizes, call.lengths);
    const Scratch<1> scratch(rows.packed(call, nullptr).bytes);
    Call packed = rows.packed(call, scratch.get()).call;
    rows.gather(call, packed, threads);
    run_whole(cell, dtype, packed, threads);
    rows.scatter(call, packed, threads);
    if constexpr (std::is_same_v<Call, Forward>) {
        // What is kept of steps that are not taken: nothing, and not what the memory held before.
        const int64_t kept = reserve_bytes(cell, dtype, packed.sizes), all = reserve_bytes(cell, dtype, call.sizes);
        if (call.reserve) std::memset(static_cast<char*>(call.reserve) + kept, 0, static_cast<size_t>(all - kept));
    }
}

template <class Call>
void run_all(Cell cell, Dtype dtype, const Call* calls, int64_t count, int threads) {
    if (count == 0) return;
    const int64_t work = work_of(cell, calls[0].sizes);
    if (count < threads && work >= kWorthATeam) {
        for (int64_t i = 0; i < count; i++) run(cell, dtype, calls[i], threads);
        return;
    }
    Team team(count * work < kWorthATeam ? 1 : threads, work >= kLong);
    std::atomic<bool> is_out_of_memory{false};
    // One thread each borrows no team, so none stands inside another. Scratch is that of the thread that runs the call.
    team.run(count, [&](int64_t i, int) {
        // What leaves a worker's thread ends the process.
        try {
            run(cell, dtype, calls[i], 1);
        } catch (const std::bad_alloc&) { is_out_of_memory = true; }
    });
    if (is_out_of_memory) throw std::bad_alloc();
}

template void run(Cell, Dtype, const Forward&, int);
template void run(Cell, Dtype, const Backward&, int);
template void run_all(Cell, Dtype, const Forward*, int64_t, int);
template void run_all(Cell, Dtype, const Backward*, int64_t, int);

// ---- streams ----

const StreamKernel* stream_kernel(Cell cell, Dtype dtype, bool has_int8_weights) {
    const StreamKernels* table = has_int8_weights ? active().int8_streams : active().streams[static_cast<int>(dtype)];
    return table && static_cast<int>(cell) < kCells ? &(*table)[cell] : nullptr;
}

int64_t work_of(const StreamCall& call) {
    const StreamSizes& z = call.sizes;
    return call.steps * call.rows * (z.work(0) + (z.layers - 1) * z.work(z.layers - 1));
}

bool is_worth_a_team(const StreamCall& call) {
    const StreamSizes& z = call.sizes;
    // As in members_for.
    if (call.steps > 1 && call.rows == 1 && z.cell.gates * z.hidden * z.output() < kWorthRelay) return false;
    return work_of(call) >= kWorthATeam;
}

void run(const StreamKernel& kernel, const StreamCall& call, int threads) {
    Team team(is_worth_a_team(call) ? threads : 1);
    Scratch<1> scratch(kernel.scratch_bytes(call, team.members()));
    kernel.run(call, team, scratch.get());
}

const char* isa_name(int index) { return index < isas().count ? isas().found[index].name : nullptr; }

const char* active_isa() { return active().name; }

bool select_isa(const char* name) {
    for (int i = 0; i < isas().count; i++)
        if (std::strcmp(isas().found[i].name, name) == 0) {
            g_active.store(&isas().found[i], std::memory_order_release);
            return true;
        }
    return false;
}

}  // namespace ostinato
