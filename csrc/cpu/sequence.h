// What the time loops forward and backward share: the order of steps, row tiles, relay, scratch. Nothing here knows a gate.
//
// A direction visits its steps as s = 0..T-1; step s is time t(s), T-1-s for the reverse direction. At time t
// the first rows_at(t) rows of the batch are active. Of these, the rows that were active at step s-1 continue from there;
// the others begin at h_0. That one rule covers both directions of a packed batch: forward, rows only ever end; reverse,
// rows only ever begin, each at its own last step. A row that is cut before step s (`resets`) begins there at reset_h and
// reset_c, whether it was active or not.
//
// Who computes what. Rows are independent, so a batch is cut into row tiles and each member takes its tile through all
// steps without a barrier. Where rows are too few for that, the members take each step together: they share
// its unit blocks through a Relay. Either way an element is the same chain of operations.
#pragma once

#include "../cells.h"
#include "arena.h"
#include "engine.h"
#include "functions.h"
#include "gemm.h"

namespace ostinato {
namespace {

// Rows that one chunk of steps may hold, so that what a time loop keeps per row (bytes_per_row) stays near the processor.
inline int64_t chunk_rows(const Sizes& sizes, int64_t bytes_per_row) {
    constexpr int64_t kChunkBytes = 2 << 20;
    return max(sizes.batch, min(sizes.rows, kChunkBytes / bytes_per_row));
}

// Rows of a step that begin anew, of those that are active.
struct CutRows {
    const uint8_t* flags = nullptr;  // [rows]
    int64_t rows = 0;

    bool has(int64_t b) const { return b < rows && flags[b]; }
};

// The order of steps, where their rows lie and where these are cut. offsets: [T + 1], filled by fill().
struct Steps {
    const Sizes& sizes;
    const uint8_t* resets;
    int64_t* offsets;

    Steps(const Arguments& call, Arena& arena)
        : sizes(call.sizes), resets(call.resets), offsets(arena.take<int64_t>(sizes.steps + 1)) {}

    void fill() const {
        offsets[0] = 0;
        for (int64_t t = 0; t < sizes.steps; t++) offsets[t + 1] = offsets[t] + at(t);
    }
    int64_t at(int64_t t) const { return sizes.batch_sizes ? sizes.batch_sizes[t] : sizes.batch; }
    int64_t time(int64_t direction, int64_t s) const { return direction ? sizes.steps - 1 - s : s; }
    // Active rows at step s; none before the first step or after the last.
    int64_t rows(int64_t direction, int64_t s) const { return s < 0 || s >= sizes.steps ? 0 : at(time(direction, s)); }
    // First packed row of step s, and of the steps [s0, s1), which are contiguous in either direction.
    int64_t first_row(int64_t direction, int64_t s) const { return offsets[time(direction, s)]; }
    int64_t first_row(int64_t direction, int64_t s0, int64_t s1) const { return offsets[direction ? sizes.steps - s1 : s0]; }
    int64_t rows_between(int64_t direction, int64_t s0, int64_t s1) const {
        return direction ? offsets[sizes.steps - s0] - offsets[sizes.steps - s1] : offsets[s1] - offsets[s0];
    }
    // Which rows are cut before step s: between times t - 1 and t, where t is that of s or, in reverse, of s - 1.
    CutRows cut(int64_t direction, int64_t s) const {
        const int64_t t = s < 0 || s >= sizes.steps ? sizes.steps : time(direction, s) + direction;
        return resets && t < sizes.steps ? CutRows{resets + offsets[t], at(t)} : CutRows{};
    }
};

// Rows of a register tile with NV vectors per unit block, and blocks side by side so that few rows still give enough
// independent chains to hide the latency of a multiply-add.
template <int NV>
constexpr int max_tile_rows() {
    return kAccumulators / (NV == 1 ? 3 : NV);
}
template <int NV, int MR>
constexpr int blocks_side_by_side() {
    constexpr int fit = kAccumulators / (MR * NV);
    return fit >= 4 ? 4 : fit >= 3 ? 3 : fit >= 2 ? 2 : 1;
}

// Products of rows with packed panels, tile by tile, each tile's sums handed to who asked for them. Cells, both time loops and
// the projection ask alike, so this is compiled once for each number of vectors, not once for each cell.
template <class T>
struct RowPanels {
    // sums: [n_rows][NV] of rows b, b + 1, ... and the unit block that begins at `unit`; they may be overwritten.
    using Take = void (*)(const void* taker, Vec<T>* sums, int n_rows, int64_t b, int64_t unit);

    const T* const* rows;  // row b of A at rows[b]
    int64_t depth;         // k of one segment; A has `segments` of them, segment_stride apart, which follow each other in B
    const T* panels;       // that of unit block u at panels + u * panel_stride, its row k at k * k_stride
    int64_t panel_stride, k_stride;
    Take take;
    const void* taker;
    int segments = 1;
    int64_t segment_stride = 0;
    bool is_paired = false;  // panels of bfloat16 pairs; rows of at most kPairedRows
    int64_t first = 0;  // where k begins in each row
};

// Up to this many rows, a tile waits for its panels more than it computes: bfloat16 weights stay narrow in them.
constexpr int64_t kPairedRows = 2;

// Covers every (row, unit block) of [b0, b1) x [u0, u1) once, by calls of Product's tile<MR, NJ>(b, u); the rows innermost: a
// panel is read for all of them while it is near. NV: vectors that a row of a tile accumulates for a block.
template <class Product, int NV>
struct Tiles {
    template <int MR>
    void blocks(int64_t b, int64_t u, int64_t u1) const {
        constexpr int NJ = blocks_side_by_side<NV, MR>();
        const auto& product = static_cast<const Product&>(*this);
        for (; u + NJ <= u1; u += NJ) product.template tile<MR, NJ>(b, u);
        if constexpr (NJ > 1)
            for (; u < u1; u++) product.template tile<MR, 1>(b, u);
    }

    template <int MR>
    void rows(int64_t mr, int64_t b, int64_t u, int64_t u1) const {
        if constexpr (MR > 1) {
            if (mr < MR) return rows<MR - 1>(mr, b, u, u1);
        }
        blocks<MR>(b, u, u1);
    }

    void run(int64_t b0, int64_t b1, int64_t u0, int64_t u1) const {
        constexpr int MR = max_tile_rows<NV>();
        // Tiles of equal height, give or take one row.
        const int64_t tiles = ceil_div(b1 - b0, MR), height = (b1 - b0) / tiles, taller = (b1 - b0) % tiles;
        if (tiles == 1) return rows<MR>(height, b0, u0, u1);
        constexpr int64_t kGroup = 2 * blocks_side_by_side<NV, MR>();
        for (int64_t u = u0; u < u1; u += kGroup)
            for (int64_t tile = 0, b = b0; tile < tiles; b += height + (tile < taller), tile++)
                rows<MR>(height + (tile < taller), b, u, min(u1, u + kGroup));
    }
};

// NV: vectors of a panel's row.
template <class T, int NV>
struct TileProduct : Tiles<TileProduct<T, NV>, NV> {
    static constexpr int L = Vec<T>::kLanes;
    const RowPanels<T>& p;

    explicit TileProduct(const RowPanels<T>& panels) : p(panels) {}

    template <int MR, int NJ>
    void tile(int64_t b, int64_t u) const {
        Vec<T> acc[NJ][MR][NV] = {};
        const T* panel = p.panels + u * p.panel_stride;
        const int64_t k_stride = NV == 1 ? p.k_stride : NV * L;
        for (int segment = 0; segment < p.segments; segment++, panel += p.depth * k_stride) {
            RowPointers<T, MR> a;
            for (int r = 0; r < MR; r++) a.row[r] = p.rows[b + r] + p.first + segment * p.segment_stride;
            if constexpr (sizeof(T) == 4 && MR <= kPairedRows) {
                if (p.is_paired) {
                    accumulate_pairs<MR, NJ, NV>(acc, a, panel, p.panel_stride, p.depth);
                    continue;
                }
            }
            accumulate<MR, NJ, NV>(acc, a, panel, p.panel_stride, p.depth, k_stride);
        }
        // A copy is handed on: accumulators whose address leaves this function would not stay in registers above.
        _Pragma("GCC unroll 4") for (int j = 0; j < NJ; j++) {
            Vec<T> sums[MR][NV];
            _Pragma("GCC unroll 8") for (int r = 0; r < MR; r++)
                _Pragma("GCC unroll 4") for (int v = 0; v < NV; v++) sums[r][v] = acc[j][r][v];
            p.take(p.taker, sums[0], MR, b, (u + j) * L);
        }
    }
};

template <int NV, class T>
__attribute__((noinline)) void multiply_tiles(const RowPanels<T>& panels, int64_t b0, int64_t b1, int64_t u0, int64_t u1) {
    if (b0 < b1) TileProduct<T, NV>(panels).run(b0, b1, u0, u1);
}

// Members that take each step together. A step is cut into groups; a group is claimed by one compare-and-swap, a
// member's own groups first and then any that is left, and a step is over when all its groups are done. So a member that
// never came costs nothing, and one that the kernel has put to sleep costs the group it holds, once: whoever has waited too
// long closes the relay, and the caller (member 0) goes on alone.
struct Relay {
    static constexpr int64_t kLine = 8;  // one claim per cache line
    int64_t groups;
    int64_t* claimed;  // [groups][kLine], the next step to be claimed
    int64_t* done;     // groups finished since the start
    int64_t* closed;   // whether only the caller is left

    Relay(int64_t n, Arena& arena)
        : groups(n),
          claimed(arena.take<int64_t>(n * kLine)),
          done(arena.take<int64_t>(kLine)),
          closed(arena.take<int64_t>(kLine)) {}

    void reset() const {
        for (int64_t g = 0; g < groups; g++) __atomic_store_n(claimed + g * kLine, 0, __ATOMIC_RELAXED);
        __atomic_store_n(closed, 0, __ATOMIC_RELAXED);
        __atomic_store_n(done, 0, __ATOMIC_RELEASE);
    }

    // body(step, group) for steps [0, steps) in order; what a step wrote is visible to the next.
    template <class Body>
    void run(int64_t steps, int member, int members, const Body& body) const {
        const int64_t home = member * groups / members;
        for (int64_t s = 0; s < steps; s++) {
            if (member != 0 && __atomic_load_n(closed, __ATOMIC_RELAXED)) return;
            for (int64_t i = 0; i < groups; i++) {
                const int64_t g = home + i < groups ? home + i : home + i - groups;
                int64_t expected = s;
                if (__atomic_load_n(claimed + g * kLine, __ATOMIC_RELAXED) != s ||
                    !__atomic_compare_exchange_n(claimed + g * kLine, &expected, s + 1, false, __ATOMIC_RELAXED,
                                                 __ATOMIC_RELAXED))
                    continue;
                body(s, g);
                __atomic_fetch_add(done, 1, __ATOMIC_RELEASE);
            }
            Backoff backoff;
            while (__atomic_load_n(done, __ATOMIC_ACQUIRE) < (s + 1) * groups)
                if (!backoff.wait() && !__atomic_exchange_n(closed, 1, __ATOMIC_RELAXED)) declare_crowded();
        }
    }
};

// How a time loop is shared: row tiles, or all rows together by unit blocks.
struct Shares {
    static constexpr int64_t kSecondLevel = 1 << 20;
    int64_t batch, tiles;
    bool together;

    // work: multiply-adds of one step for one row. weight_bytes: what a tile streams per step. tile_height: rows of a register tile.
    Shares(const Sizes& sizes, int members, int64_t work, int64_t weight_bytes, int64_t tile_height) : batch(sizes.batch) {
        const int64_t per_direction = max(1, members / sizes.directions), whole = ceil_div(sizes.batch, per_direction);
        // More tiles than members even out ragged rows (the longest are claimed first) and cores that others hold for a
        // while. They cost another read of the weights per step, so few where these do not fit the second-level cache.
        const int64_t spare = members == 1 ? 1 : weight_bytes <= kSecondLevel ? 4 : 2;
        // A tile has about as many rows as a register tile or more, and all have the same, give or take one.
        tiles = max(1, min(batch, per_direction * max(1, min(spare, (whole + tile_height / 2) / tile_height))));
        together = members > 1 && sizes.directions == 1 && !sizes.projection && sizes.batch < 2 * members &&
                   work * sizes.batch >= kWorthRelay;
    }

    // First row of a tile; that of tile `tiles` is the end. Tiles are of equal height, give or take one row, the taller ones
    // first: they are claimed first.
    int64_t begin(int64_t tile) const { return tile * (batch / tiles) + min(tile, batch % tiles); }
};

}  // namespace
}  // namespace ostinato
