// Layers stored in 16 bits: bfloat16 and float16 arrays, computed in float32.
//
// Storage alone is narrow. The arrays of a call are widened (exactly), the float32 time loop runs on them, and what it wrote is
// rounded once, to nearest even. So the state between two steps, the sums and the activations are float32, and so is what
// forward keeps for backward. Matrices of bfloat16 are most of a short call, so forward reads them as they are (WeightPointer).
// An output has the bits of the float32 engine's, rounded: what decision 7 promises holds here
// too, but for a sequence that the caller cuts into pieces, since the state that goes from one to the next is rounded.
//
// Traffic: a pass over x and y, before and after, and over the weights where they are float16 or an own cell's, or in backward.
#pragma once

#include <type_traits>

#include "arena.h"
#include "engine.h"
#include "gemm.h"
#include "storage.h"

namespace ostinato {
namespace {

// A call on wide copies of its arrays: widen, run the float32 kernel of the cell, narrow.
template <class S, class Call>
class Narrow {
public:
    Narrow(const Loop<Call>& loop, const Call& call, int members, void* scratch)
        : loop_(loop),
          wide_(call),
          arena_(scratch),
          reads_narrow_(std::is_same_v<Call, Forward> && S::kIsUpperHalf && !call.program) {
        call.visit(wide_, [&](const Array& array, auto narrow, auto& wide) {
            if (!narrow || array.type != Type::kValue || (reads_narrow_ && array.is_matrix())) return;
            constexpr bool is_read = std::is_same_v<decltype(narrow), const void*>;
            const int64_t count = array.height(call.sizes) * array.row_values(call.sizes);
            Copy& copy = copies_[count_++] = {const_cast<void*>(static_cast<const void*>(narrow)), arena_.take<float>(count),
                                              count, is_read};
            // Where scratch is only counted, the narrow array says that there is one.
            if (copy.wide) point(wide, copy.wide);
        });
        if constexpr (std::is_same_v<Call, Forward>) wide_.has_bfloat16_weights = reads_narrow_;
        inner_ = arena_.take<char>(loop.scratch_bytes(wide_, members));
    }

    int64_t scratch_bytes() const { return arena_.used(); }

    void run(Team& team) {
        convert(team, true, [](const Copy& copy, int64_t i, int64_t n) {
            Halves h = {};
            std::memcpy(&h, static_cast<const uint16_t*>(copy.narrow) + i, static_cast<size_t>(2 * n));
            const Floats f = S::widen(h);
            std::memcpy(copy.wide + i, &f, static_cast<size_t>(4 * n));
        });
        loop_.run(wide_, team, inner_);
        convert(team, false, [](const Copy& copy, int64_t i, int64_t n) {
            Floats f = {};
            std::memcpy(&f, copy.wide + i, static_cast<size_t>(4 * n));
            const Halves h = S::narrow(f);
            std::memcpy(static_cast<uint16_t*>(copy.narrow) + i, &h, static_cast<size_t>(2 * n));
        });
    }

private:
    struct Copy {
        void* narrow;
        float* wide;
        int64_t count;
        bool is_read;
    };
    static constexpr int64_t kTask = 1 << 14;

    template <class Convert>
    void convert(Team& team, bool is_read, const Convert& convert) const {
        for (int c = 0; c < count_; c++) {
            const Copy& copy = copies_[c];
            if (copy.is_read != is_read) continue;
            team.run(ceil_div(copy.count, kTask), [&](int64_t task, int) {
                const int64_t end = min(copy.count, (task + 1) * kTask);
                int64_t i = task * kTask;
                for (; i + kWide <= end; i += kWide) convert(copy, i, kWide);
                if (i < end) convert(copy, i, end - i);
            });
        }
    }

    const Loop<Call>& loop_;
    Call wide_;
    Arena arena_;
    const bool reads_narrow_;  // whether the loop reads its matrices as they are
    Copy copies_[count_arrays<Call>(2)];
    int count_ = 0;
    void* inner_;
};

}  // namespace
}  // namespace ostinato
