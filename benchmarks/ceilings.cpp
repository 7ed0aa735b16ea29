// The machine's own ceilings, measured beside the layers: fused multiply-adds per second, and bytes read per second by
// footprint. Compiled for the processor at hand (ceilings.py).
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Lanes __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 4;

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Runs body() in every thread until `seconds` have passed; returns the sum of what it counts, per second.
template <class Body>
double rate(int threads, double seconds, const Body& body) {
    std::vector<double> rates(threads);
    std::vector<std::thread> team;
    for (int i = 0; i < threads; i++)
        team.emplace_back([&, i] {
            auto work = body();
            work();  // faults pages in, fills caches
            double best = 0;
            const auto start = std::chrono::steady_clock::now();
            while (seconds_since(start) < seconds) {
                const auto before = std::chrono::steady_clock::now();
                const double count = work();
                best = std::max(best, count / seconds_since(before));
            }
            rates[i] = best;
        });
    for (auto& thread : team) thread.join();
    double sum = 0;
    for (double r : rates) sum += r;
    return sum;
}

volatile float g_sink;
// Known to the compiler, they made one chain its own fixed point: it was folded away, and the peak 12/11 of what it is.
volatile float g_factor = 0.999f, g_summand = 1e-3f;

}  // namespace

// Floating point operations per second: 12 independent chains per thread, more than the latency of an FMA asks for.
extern "C" double peak_operations(int threads, double seconds) {
    return rate(threads, seconds, [] {
        return [] {
            constexpr int kChains = 12, kTurns = 200000;
            Lanes acc[kChains], a = Lanes{} + g_factor, b = Lanes{} + g_summand;
            for (int i = 0; i < kChains; i++) acc[i] = Lanes{} + static_cast<float>(i);
            for (int turn = 0; turn < kTurns; turn++)
                for (int i = 0; i < kChains; i++) acc[i] = acc[i] * a + b;
            Lanes sum{};
            for (int i = 0; i < kChains; i++) sum += acc[i];
            g_sink = sum[0];
            return 2.0 * kLanes * kChains * kTurns;
        };
    });
}

// Bytes per second, each thread reading an array of its own over and over.
extern "C" double read_bytes(int threads, int64_t footprint, double seconds) {
    return rate(threads, seconds, [footprint] {
        const int64_t vectors = std::max<int64_t>(8, footprint / kBytes / 8 * 8);
        auto* p = static_cast<Lanes*>(std::aligned_alloc(64, static_cast<size_t>(vectors) * kBytes));
        for (int64_t i = 0; i < vectors; i++) p[i] = Lanes{} + 1.0f;
        const int64_t turns = std::max<int64_t>(1, (16 << 20) / (vectors * kBytes));
        return [p, vectors, turns] {
            Lanes sum[8] = {};
            for (int64_t turn = 0; turn < turns; turn++)
                for (int64_t i = 0; i < vectors; i += 8)
                    for (int j = 0; j < 8; j++) sum[j] += p[i + j];
            Lanes all{};
            for (const Lanes& s : sum) all += s;
            g_sink = all[0];
            return static_cast<double>(turns * vectors * kBytes);
        };
    });
}
