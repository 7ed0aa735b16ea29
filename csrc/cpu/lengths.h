// Rows that end early (`lengths`): a padded batch becomes a packed one, its longest row first. The time loop knows nothing
// of it.
//
// So no step costs more than its rows. The price is a copy of x and y, and of their gradients. Compiled for the baseline.
#pragma once

#include <vector>

#include "engine.h"

namespace ostinato {

class ByLength {
public:
    ByLength(Dtype dtype, const Sizes& sizes, const int64_t* lengths);

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
    template <class Call>
    void gather(const Call& call, Call& packed, int threads) const;
    template <class Call>
    void scatter(const Call& call, Call& packed, int threads) const;

private:
    template <bool kIsBack, class Call>
    void copy(const Call& call, Call& packed, int threads) const;

    const Dtype dtype_;
    Sizes sizes_;  // of the packed batch
    std::vector<int64_t> batch_sizes_;  // of it
    std::vector<int64_t> positions_;  // of its rows of all steps, among the caller's
    std::vector<int64_t> unused_;  // the caller's rows past an end
    std::vector<int64_t> states_;  // of its rows in all directions, among the caller's
};

}  // namespace ostinato
