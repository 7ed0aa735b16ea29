#include "lengths.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "arena.h"
#include "threads.h"

namespace ostinato {
namespace {

// What the rows of an array are: those of all steps, or those of all directions.
enum class Rows { kSteps, kStates };

// Calls visit(array, its packed counterpart, rows, bytes of a row) for every array of a call that has such rows. What is read is
// const, what is written is not.
template <class Visit>
void visit_cuts(const Sizes& z, int64_t bytes, const Cuts& call, Cuts& packed, const Visit& visit) {
    const void* resets = packed.resets;
    visit(static_cast<const void*>(call.resets), resets, Rows::kSteps, 1);
    packed.resets = static_cast<const uint8_t*>(resets);
    visit(call.h, packed.h, Rows::kStates, bytes * z.output());
    visit(call.c, packed.c, Rows::kStates, bytes * z.hidden);
}

template <class Visit>
void visit_arrays(const Sizes& z, int64_t bytes, const Forward& call, Forward& packed, const Visit& visit) {
    const int64_t I = bytes * z.input, O = bytes * z.output(), H = bytes * z.hidden, D = z.directions;
    visit_cuts(z, bytes, call.cuts, packed.cuts, visit);
    visit(call.x, packed.x, Rows::kSteps, I);
    visit(call.h_0, packed.h_0, Rows::kStates, O), visit(call.c_0, packed.c_0, Rows::kStates, H);
    visit(call.y, packed.y, Rows::kSteps, D * O), visit(call.cells, packed.cells, Rows::kSteps, D * H);
    visit(call.h_n, packed.h_n, Rows::kStates, O), visit(call.c_n, packed.c_n, Rows::kStates, H);
}

template <class Visit>
void visit_arrays(const Sizes& z, int64_t bytes, const Backward& call, Backward& packed, const Visit& visit) {
    const int64_t I = bytes * z.input, O = bytes * z.output(), H = bytes * z.hidden, D = z.directions;
    visit_cuts(z, bytes, call.cuts, packed.cuts, visit);
    visit(call.x, packed.x, Rows::kSteps, I), visit(call.dx, packed.dx, Rows::kSteps, I);
    visit(call.h_0, packed.h_0, Rows::kStates, O), visit(call.c_0, packed.c_0, Rows::kStates, H);
    visit(call.y, packed.y, Rows::kSteps, D * O), visit(call.dy, packed.dy, Rows::kSteps, D * O);
    visit(call.dcells, packed.dcells, Rows::kSteps, D * H);
    visit(call.dh_n, packed.dh_n, Rows::kStates, O), visit(call.dc_n, packed.dc_n, Rows::kStates, H);
    visit(call.dh_0, packed.dh_0, Rows::kStates, O), visit(call.dc_0, packed.dc_0, Rows::kStates, H);
    visit(call.dcut_h, packed.dcut_h, Rows::kStates, O), visit(call.dcut_c, packed.dcut_c, Rows::kStates, H);
}

// Gives every array that is there a packed counterpart.
struct Take {
    Arena& arena;
    const Sizes& sizes;

    template <class Pointer>
    void operator()(Pointer array, Pointer& packed, Rows rows, int64_t bytes) const {
        const int64_t count = rows == Rows::kSteps ? sizes.rows : sizes.directions * sizes.batch;
        packed = array ? arena.take<char>(count * bytes) : nullptr;
    }
};

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
    packed.cuts.lengths = nullptr;
    visit_arrays(sizes_, stored_bytes(dtype_), call, packed, Take{arena, sizes_});
    return {packed, arena.used()};
}

template <bool kIsBack, class Call>
void ByLength::copy(const Call& call, Call& packed, int threads) const {
    visit_arrays(sizes_, stored_bytes(dtype_), call, packed, [&](auto array, auto& in_packed, Rows rows, int64_t bytes) {
        constexpr bool kIsRead = std::is_const_v<std::remove_pointer_t<decltype(array)>>;
        if (!array || kIsRead == kIsBack) return;
        const std::vector<int64_t>& places = rows == Rows::kSteps ? positions_ : states_;
        in_parts(static_cast<int64_t>(places.size()), bytes, threads, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
                char *there = row_of(array, places[i], bytes), *here = row_of(in_packed, i, bytes);
                std::memcpy(kIsBack ? there : here, kIsBack ? here : there, static_cast<size_t>(bytes));
            }
        });
        if (kIsBack && rows == Rows::kSteps)
            for (int64_t place : unused_) std::memset(row_of(array, place, bytes), 0, static_cast<size_t>(bytes));
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
