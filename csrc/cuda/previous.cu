// The state before each step, for the gradient of weight_hh.
//
// A block has one step, a warp one row of it. Past a row's end there are zeros, as there are in the gate gradients.
#include "device.h"

using namespace ostinato;

namespace {

// Numbers are copied as they are.
template <int kBytes>
struct Sized;
template <>
struct Sized<2> {
    using Item = u16;
};
template <>
struct Sized<4> {
    using Item = u32;
};
using Item = Sized<OSTINATO_ITEM_BYTES>::Item;

constexpr int kThreads = OSTINATO_THREADS, kWarps = kThreads / 32;

}  // namespace

// [D, N, H] of y [N, D, H], h_0 and reset_h [D, B, H]; null: zeros. For the others see sequence.cuh, Batch.
OSTINATO_KERNEL OSTINATO_BOUNDS(kThreads)
    ostinato_previous(i64 steps, i64 rows, i64 batch, i64 directions, i64 hidden, const i64* offsets, const int* lengths,
                      const u8* flags, const Item* y, const Item* h_0, const Item* reset_h, Item* previous) {
    const i64 t = block_index();
    const auto begin = [&](i64 time) { return offsets ? offsets[time] : time * batch; };
    const i64 active = offsets ? (t + 1 < steps ? offsets[t + 1] : rows) - offsets[t] : batch;
    for (i64 i = thread_index() / 32; i < active * directions; i += kWarps) {
        const i64 d = i / active, row = i % active, place = begin(t) + row, near = d ? t + 1 : t - 1;
        const i64 length = lengths ? lengths[row] : steps;
        const bool is_end = d ? near >= length : near < 0;
        // As in sequence.cuh, Loop::start.
        const bool is_cut = flags && t < length && !(d && is_end) && flags[d ? begin(near) + row : place];
        const Item* from = nullptr;
        if (is_cut)
            from = reset_h ? reset_h + (d * batch + row) * hidden : nullptr;
        else if (is_end)
            from = h_0 ? h_0 + (d * batch + row) * hidden : nullptr;
        else
            from = y + ((begin(near) + row) * directions + d) * hidden;
        if (t >= length) from = nullptr;
        Item* const to = previous + (d * rows + place) * hidden;
        for (i64 unit = thread_index() % 32; unit < hidden; unit += 32) to[unit] = from ? from[unit] : Item(0);
    }
}

#ifndef __CUDACC__
extern "C" int ostinato_emulate(const i64* arguments, int loops, int schedule) {
    return emulate(ostinato_previous, arguments, loops, kThreads, 1, schedule);
}
#endif
