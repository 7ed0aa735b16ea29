// Rows cut into segments (engine.h, Cuts): each becomes a row of a packed batch, and the walk knows nothing of it.
//
// So what a segment computes has the bits that it has alone, and its gradient ends where it begins. The price is a copy of
// x and y, and of their gradients. Compiled for the baseline.
#pragma once

#include <vector>

#include "engine.h"

namespace ostinato {

class Segments {
public:
    Segments(Dtype dtype, const Sizes& sizes, const Cuts& cuts);

    // The call on the packed batch, its arrays laid out in scratch; without scratch only the bytes are right. The call refers to
    // this object.
    template <class Call>
    struct Packed {
        Call call;
        int64_t bytes;
    };
    template <class Call>
    Packed<Call> packed(const Call& call, void* scratch) const;

    // Copies what a call reads to its packed counterpart, and what that wrote back.
    void gather(const Forward& call, const Forward& packed, int threads) const;
    void scatter(const Forward& call, const Forward& packed, int threads) const;
    void gather(const Backward& call, const Backward& packed, int threads) const;
    void scatter(const Backward& call, const Backward& packed, int threads) const;

private:
    struct Segment {
        int64_t row, start, steps;
        bool is_first, is_last;  // of its row
        bool is_reset;  // whether the row begins anew before its first step
        // Walked in a direction, does it start where the row was cut, and does the row's walk end with it?
        bool starts_at_cut(int64_t direction) const { return direction ? !is_last : is_reset; }
        bool ends_row(int64_t direction) const { return direction ? is_first : is_last; }
    };

    void gather_states(const void* first, const void* cut, int64_t width, const void* packed) const;
    void scatter_ends(const void* packed, const void* before, int64_t width, void* out) const;
    void scatter_starts(const void* packed, const void* passed, int64_t width, void* first, void* cut) const;
    void gather_rows(const void* from, int64_t width, const void* packed, int threads) const;
    void scatter_rows(const void* packed, int64_t width, void* to, int threads) const;

    const Dtype dtype_;
    const Sizes& original_;
    const Cuts& cuts_;
    Sizes sizes_;  // of the packed batch
    std::vector<int64_t> batch_sizes_;  // of it
    std::vector<Segment> segments_;  // longest first: its rows
    std::vector<int64_t> positions_;  // of its rows of all steps, among the caller's
    std::vector<int64_t> unused_;  // the caller's rows that are in no segment
    std::vector<bool> is_empty_;  // [B] whether a row has no segment
};

}  // namespace ostinato
