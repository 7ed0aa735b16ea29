#include "lengths.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "arena.h"
#include "threads.h"

namespace ostinato {
namespace {

// Calls body(first, last) on parts of [0, count), in several threads where that many bytes are worth it.
template <class Body>
void in_parts(int64_t count, int64_t bytes_each, int threads, const Body& body) {
    constexpr int64_t kWorthATeam = 1 << 18;
    Team team(count * bytes_each < kWorthATeam ? 1 : threads);
    const int64_t parts = team.members() == 1 ? 1 : 4 * team.members();
    team.run(parts, [&](int64_t part, int) { body(part * count / parts, (part + 1) * count / parts); });
}

char* row_of(const void* array, int64_t row, int64_t bytes) {
    return const_cast<char*>(static_cast<const char*>(array)) + row * bytes;
}

}  // namespace

ByLength::ByLength(Dtype dtype, const Sizes& sizes, const int64_t* lengths) : dtype_(dtype), sizes_(sizes) {
    const int64_t B = sizes.batch;
    std::vector<int64_t> order(static_cast<size_t>(B));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    int64_t active = B;
    for (int64_t t = 0; t < sizes.steps; t++) {
        while (active && lengths[order[active - 1]] <= t) active--;
        if (active) batch_sizes_.push_back(active);
        for (int64_t i = 0; i < B; i++) (i < active ? positions_ : unused_).push_back(t * B + order[i]);
    }
    for (int64_t d = 0; d < sizes.directions; d++)
        for (int64_t i = 0; i < B; i++) states_.push_back(d * B + order[i]);
    sizes_.steps = static_cast<int64_t>(batch_sizes_.size()), sizes_.rows = static_cast<int64_t>(positions_.size());
    sizes_.batch_sizes = batch_sizes_.data();
}

template <class Call>
ByLength::Packed<Call> ByLength::packed(const Call& call, void* scratch) const {
    Arena arena(scratch);
    Call packed = call;
    packed.sizes = sizes_;
    packed.lengths = nullptr;
    call.visit(packed, [&](const Array& array, auto here, auto& in_packed) {
        if (here && array.has_rows_of_batch())
            point(in_packed, arena.take<char>(array.height(sizes_) * array.row_bytes(sizes_, dtype_)));
    });
    return {packed, arena.used()};
}

template <bool kIsBack, class Call>
void ByLength::copy(const Call& call, Call& packed, int threads) const {
    call.visit(packed, [&](const Array& array, auto there, auto& here) {
        constexpr bool kIsRead = std::is_const_v<std::remove_pointer_t<decltype(there)>>;
        if (!there || kIsRead == kIsBack || !array.has_rows_of_batch()) return;
        const std::vector<int64_t>& places = array.rows == Rows::kSteps ? positions_ : states_;
        const int64_t bytes = array.row_bytes(sizes_, dtype_);
        in_parts(static_cast<int64_t>(places.size()), bytes, threads, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
                char *outside = row_of(there, places[i], bytes), *inside = row_of(here, i, bytes);
                std::memcpy(kIsBack ? outside : inside, kIsBack ? inside : outside, static_cast<size_t>(bytes));
            }
        });
        if (kIsBack && array.rows == Rows::kSteps)
            for (int64_t place : unused_) std::memset(row_of(there, place, bytes), 0, static_cast<size_t>(bytes));
    });
}

template <class Call>
void ByLength::gather(const Call& call, Call& packed, int threads) const {
    copy<false>(call, packed, threads);
}

template <class Call>
void ByLength::scatter(const Call& call, Call& packed, int threads) const {
    copy<true>(call, packed, threads);
}

template ByLength::Packed<Forward> ByLength::packed(const Forward&, void*) const;
template ByLength::Packed<Backward> ByLength::packed(const Backward&, void*) const;
template void ByLength::gather(const Forward&, Forward&, int) const;
template void ByLength::gather(const Backward&, Backward&, int) const;
template void ByLength::scatter(const Forward&, Forward&, int) const;
template void ByLength::scatter(const Backward&, Backward&, int) const;

}  // namespace ostinato
