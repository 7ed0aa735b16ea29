// The time loop backward, from the last step that forward took to the first. Each step of a group of rows:
//
//   await dL/dh  ->  cell: gate gradients of the own units, kept in memory  ->  barrier  ->  their product with weight_hh  ->
//   send every block the part of dL/dh that its units get from here
//
// A block keeps the rows of weight_hh that belong to its own units, as forward does, and sums of floats cross the exchange instead
// of gate gradients: 4 bytes per unit and row against 6 (GRU) or 8 (LSTM) in 16 bits. The receiver adds them in a fixed order.
// Gradients of weights, biases and x are products over all steps and not computed here.
//
// Registers: kResident fragments of four words; shared memory: BackwardShared, which config.py computes too (checked below).
#pragma once

#include "sequence.cuh"

namespace ostinato {
namespace {

struct Backward {
    Batch batch;
    const void* weight_hh;  // [G * H, H], of this block's direction
    const void *h_0, *c_0, *reset_h, *reset_c;  // [D, B, H], [D, B, E * H]
    const void *y, *reserve;  // of forward
    const void *dy, *dcells;  // [N, D * H], [N, D, E * H]
    const void *dh_n, *dc_n;  // [D, B, H], [D, B, E * H]
    void* dgates;  // [D, N, (kSlots + kDrives) * H], slots as position_of has them
    void *dh_0, *dc_0;  // as h_0, c_0; where rows begin anew, a row may have no part in them: zeros beforehand
    float *dreset_h, *dreset_c;  // likewise, zeros beforehand; what belongs to the states of resets is added
    void* exchange;  // with Exchange::kGrid words [loops of a launch, groups, 2, kBlocks, sources, kGroupRows, kUnits], zeros
    const void* parameters;  // as forward has them
    const void* drives;
};

// ---- gate gradients times weight_hh ----

// On tensor cores: a warp computes tiles of 16 units of the previous state over a slice of k, the own units of all gates. Few tiles
// at once leave registers to the weights, and what is done with goes to others meanwhile.
template <class Cell, class Math, bool kOnTensorCores = (Math::kDepth > 0)>
struct BackwardProduct {
    static constexpr int kDepth = Cell::kGates * kUnits, kTiles = kPadded / 16, kSlices = largest(kWarps / kTiles, 1);
    static constexpr int kTilesEach = kTiles * kSlices / kWarps, kSteps = kDepth / largest(Math::kDepth, 1) / kSlices;
    static constexpr int kCount = kTilesEach * kSteps;
    static constexpr int kAtOnce = divisor_within(largest(4 / kEights, 1), kTilesEach);
    static constexpr int kChains = chains_of(kAtOnce * kEights, kSteps);
    static_assert(kTilesEach * kWarps == kTiles * kSlices && kSteps * kSlices * Math::kDepth == kDepth, "warps share evenly");
    using Held = Fragments<kCount>;
    using Operand = typename Math::Operand;
    Held fragments;
    int first_tile, slice;

    OSTINATO_DEVICE void load(Fragment* shared, const typename Math::Element* weight, int rank) {
        const int warp = thread_index() / 32;
        slice = warp % kSlices, first_tile = warp / kSlices * kTilesEach;
        const auto word = [&](int row, int k) {
            const auto read = [&](int unit) {
                const bool is_there = rank * kUnits + unit % kUnits < kHidden && row < kHidden;
                const int at = (unit / kUnits * kHidden + rank * kUnits + unit % kUnits) * kHidden + row;
                return to_operand<Math>(is_there ? widen(weight[at]) : 0.0f);
            };
            if constexpr (Math::kDepth == 8)
                return word_of(read(k));
            else
                return join(word_of(read(k)), word_of(read(k + 1)));
        };
        fragments.load(shared, [&](int i, u32(&words)[4]) {
            const int tile = first_tile + i / (kAtOnce * kSteps) * kAtOnce + i % kAtOnce;
            read_tile<Math>(words, tile * 16, (slice * kSteps + i / kAtOnce % kSteps) * Math::kDepth, word);
        });
    }

    // emit(slice, tile, unit, row, pair) gets the sums of units `unit` and `unit` + 1, of 16, of a tile and a row.
    template <class Emit>
    OSTINATO_DEVICE void multiply(const Fragment* shared, const Operand (&grads)[kGroupRows][kDepth + kRowPad<Math>],
                                  Emit emit) const {
        // A thread has one unit of two rows, and changes one of them for its neighbour's unit of the other.
        const int lane = thread_index() % 32, is_odd = lane / 4 % 2;
        OSTINATO_UNROLL
        for (int first = 0; first < kTilesEach; first += kAtOnce) {
            float sum[kAtOnce][kChains][kEights][4] = {};
            OSTINATO_UNROLL
            for (int k = 0; k < kSteps; k++) {
                u32 b[kEights][2];
                if (k % steps_ahead(kAtOnce) == 0) schedule_barrier();
                read_rows<Math>(grads[0], kDepth + kRowPad<Math>, (slice * kSteps + k) * Math::kDepth, b);
                OSTINATO_UNROLL
                for (int i = 0; i < kAtOnce; i++)
                    ostinato::multiply<Math>(fragments, shared, first * kSteps + k * kAtOnce + i, sum[i][k % kChains], b);
            }
            OSTINATO_UNROLL
            for (int i = 0; i < kAtOnce; i++) OSTINATO_UNROLL
            for (int e = 0; e < kEights; e++) OSTINATO_UNROLL
            for (int half = 0; half < 2; half++) {
                const float a = total(sum[i], e, 2 * half), b = total(sum[i], e, 2 * half + 1);
                const float other = shuffle_xor(is_odd ? a : b, 4);
                const int unit = half * 8 + lane / 4 - is_odd, row = e * 8 + lane % 4 * 2 + is_odd;
                emit(slice, first_tile + first + i, unit, row, is_odd ? Pair{other, b} : Pair{a, other});
            }
        }
    }
};

// By fused multiply-adds: a thread computes every kStride-th unit of the previous state over a slice of k, in ascending k. A fragment
// has four k of a unit.
template <class Cell, class Math>
struct BackwardProduct<Cell, Math, false> {
    static constexpr int kDepth = Cell::kGates * kUnits, kSlices = largest(kThreads / kPadded, 1);
    static constexpr int kUnitsEach = largest(kPadded * kSlices / kThreads, 1), kStride = kThreads / kSlices,
                         kSteps = kDepth / kSlices;
    static_assert(kSteps * kSlices == kDepth && kSteps % 4 == 0 && kUnitsEach * kThreads == kPadded * kSlices &&
                      kStride * kSlices == kThreads && kStride % 16 == 0,
                  "threads share the product evenly");
    using Product = RowProduct<kUnitsEach, kSteps / 4>;
    using Held = typename Product::Held;
    Product product;
    int unit, slice;

    OSTINATO_DEVICE void load(Fragment* shared, const float* weight, int rank) {
        unit = thread_index() % kStride, slice = thread_index() / kStride;
        product.fragments.load(shared, [&](int i, u32(&words)[4]) {
            const int to = unit + i % kUnitsEach * kStride;
            OSTINATO_UNROLL
            for (int j = 0; j < 4; j++) {
                const int k = slice * kSteps + i / kUnitsEach * 4 + j, from = rank * kUnits + k % kUnits;
                const i64 at = static_cast<i64>(k / kUnits * kHidden + from) * kHidden + to;
                words[j] = from < kHidden && to < kHidden ? bits_of(weight[at]) : 0u;
            }
        });
    }

    template <class Emit>
    OSTINATO_DEVICE void multiply(const Fragment* shared, const float (&grads)[kGroupRows][kDepth + kRowPad<Math>],
                                  Emit emit) const {
        const int is_odd = unit % 2;
        product.multiply(
            shared, [&](int row, int k) { return &grads[row][slice * kSteps + k]; },
            [&](int first, const auto& sum) {
                OSTINATO_UNROLL
                for (int row = 0; row < Product::kAtOnce; row += 2) OSTINATO_UNROLL
                for (int i = 0; i < kUnitsEach; i++) {
                    const float a = sum[row][i], b = sum[row + 1][i], other = shuffle_xor(is_odd ? a : b, 1);
                    const int tile = unit / 16 + i * (kStride / 16);
                    emit(slice, tile, unit % 16 - is_odd, first + row + is_odd, is_odd ? Pair{other, b} : Pair{a, other});
                }
            });
    }
};

// ---- shared memory ----

// What a product asks of it; nothing where there is none.
template <class Cell, class Math, bool kMultiplies = kHasProduct<Cell>>
struct BackwardParts {
    using Product = BackwardProduct<Cell, Math>;
    // Of dL/dh: from every block's slices, or what a thread of the gathering has added up.
    using Words = Marked<float, Math::kDepth == 0>;
    static constexpr int kReads = kGroupRows * kUnits / kPerRead<typename Words::Word>;
    static constexpr int kParts = kThreads / kReads < kBlocks ? largest(kThreads / kReads, 1) : kBlocks;
    static_assert(kExchange != Exchange::kGrid || kThreads >= kReads, "a thread for each read of a source");
    static constexpr int kSources = kExchange == Exchange::kGrid ? kParts : kBlocks * Product::kSlices;
    static constexpr int kSums = kExchange == Exchange::kGrid ? 1 : kBuffers * kGroups;
    using Grads = typename Math::Operand[kGroupRows][Product::kDepth + kRowPad<Math>];
    Grads grads[kHalves];
    float sums[kSums][kSources][kGroupRows][kUnits + 4];
    Fragment weights[largest(Product::Held::kShared, 0) * kThreads + 1];
};
template <class Cell, class Math>
struct BackwardParts<Cell, Math, false> {
    struct Product {};
    struct Grads {};
    using Words = Marked<float, Math::kDepth == 0>;
};

template <class Cell, class Math>
struct BackwardShared : Parameters<Cell>, BackwardParts<Cell, Math> {
    // What goes to the step before without weight_hh.
    float dh[kRows][kUnits], dc[places(Cell::kBehind)][Cell::kBehind ? kRows : 1][kUnits];
    Row rows[kRows];
    u64 arrived[kBuffers][kGroups];
};

// ---- the time loop. n counts its steps from 0: the n-th is forward's step s = steps - 1 - n ----

template <class Cell, class Math>
struct BackwardLoop {
    using Element = typename Math::Element;
    using Operand = typename Math::Operand;
    using Value = Real<Math::kIsFast>;
    using Shared = BackwardShared<Cell, Math>;
    using Words = typename Shared::Words;
    using Word = typename Words::Word;
    static constexpr int kGates = Cell::kGates, kBehind = Cell::kBehind;

    const Backward& call;
    Shared& shared;
    Loop loop;
    int rank;
    Task task;

    // What a pair of units needs of memory at one step, and how its row began in the step that comes after it.
    struct Inputs {
        Raw<Element> dy, dcells[places(kBehind)], saved[places(Cell::kSaved)], previous[1 + kBehind], h;
        Raw<Element> drives[places(Cell::kDrives)];
        Start next;
    };
    // One block alone waits for nobody, so a turn's inputs are read a turn ahead, before a product that hides the latency. Where
    // blocks wait for each other, that wait hides it, and the registers are left to the weights.
    static constexpr bool kReadsAhead = kExchange == Exchange::kBlock;

    // This thread's units in all that has a row for each row of x and is read, from forward's last step on.
    struct Arrays {
        Walk<const Element> dy, dcells, y, reserve, drives;
    };

    OSTINATO_DEVICE auto& sums_of(int n, int group) {
        if constexpr (kExchange == Exchange::kGrid) return shared.sums[0];
        return shared.sums[n % kBuffers * kGroups + group];
    }
    // The words for a block of what arrives before step n.
    OSTINATO_DEVICE Word* words_of(int n, int group, int block) const {
        const i64 at = ((static_cast<i64>(task.launched) * kGroups + group) * 2 + n % 2) * kBlocks + block;
        return static_cast<Word*>(call.exchange) + at * kBlocks * Shared::Product::kSlices * kGroupRows * kUnits;
    }

    // Hands a pair of sums to the block that owns these units of a tile, for step n.
    OSTINATO_DEVICE void send(int n, int group, int slice, int tile, int unit, int row, Pair pair) {
        constexpr int kSlices = Shared::Product::kSlices;
        const int to = tile / (kUnits / 16), own = tile % (kUnits / 16) * 16 + unit, source = rank * kSlices + slice;
        if constexpr (kExchange == Exchange::kGrid) {
            const u32 mark = mark_of(n);
            Word* const words = words_of(n, group, to) + (source * kGroupRows + row) * kUnits + own;
            store_shared_words(words, Words::join(pair.a, mark), Words::join(pair.b, mark));
        } else {
            auto* const place = reinterpret_cast<u64*>(&sums_of(n, group)[source][row][own]);
            const u64 both = join(bits_of(pair.a), bits_of(pair.b));
            if constexpr (kExchange == Exchange::kBlock)
                *place = both;
            else
                push(place, both, &shared.arrived[n % 2][group], to);
        }
    }

    // Says how much is to come before step n. One thread's business.
    OSTINATO_DEVICE void expect(int n, int group) {
        transaction_expect(&shared.arrived[n % 2][group], Shared::kSources * kGroupRows * kUnits * sizeof(float));
    }

    // Waits until all parts of dL/dh before step n are in shared memory.
    OSTINATO_DEVICE void await(int n, int group) {
        if constexpr (kExchange == Exchange::kBlock) {
            // With several groups the barrier between cell and product of another one has ordered this.
            if (kGroups == 1 && n) block_barrier();
        } else if constexpr (kExchange == Exchange::kCluster) {
            // What arrives here says nothing of the own warps that compute for other blocks: with one group, these may still
            // read the gate gradients that come next.
            if (kGroups == 1 && n) block_barrier();
            if (n) transaction_wait(&shared.arrived[n % 2][group], (n - 1) / 2 % 2);
            if (thread_index() == 0 && n < loop.steps) expect(n + 1, group);
        } else if (n) {
            gather(words_of(n, group, rank), mark_of(n));
            block_barrier();  // orders the sums of all threads
        }
    }

    // Adds up what all blocks have sent, each word as soon as it has its mark. A thread takes the same units of every kParts-th
    // source.
    OSTINATO_DEVICE void gather(const Word* words, u32 mark) {
        constexpr int kPer = kPerRead<Word>, kReads = Shared::kReads, kAll = kBlocks * Shared::Product::kSlices * kReads;
        const int read = thread_index() % kReads, part = thread_index() / kReads, stride = Shared::kParts * kReads;
        if (part >= Shared::kParts) return;
        float sum[kPer] = {};
        for (int first = part * kReads + read; first < kAll; first += kReadsAtOnce * stride) {
            Word found[kReadsAtOnce][kPer];
            await_words(words, mark, first, stride, kAll, found);
            OSTINATO_UNROLL
            for (int i = 0; i < kReadsAtOnce; i++) {
                if (first + i * stride >= kAll) continue;
                OSTINATO_UNROLL
                for (int j = 0; j < kPer; j++) {
                    float value;
                    Words::split(found[i][j], value);
                    sum[j] += value;
                }
            }
        }
        OSTINATO_UNROLL
        for (int j = 0; j < kPer; j++) shared.sums[0][part][read * kPer / kUnits][read * kPer % kUnits + j] = sum[j];
    }

    // dL/dh of a pair of units after step s, of what comes after it.
    OSTINATO_DEVICE Pair arrived(int n, int group, int place, int unit) {
        const int r = group * kGroupRows + place;
        Pair sum{shared.dh[r][unit], shared.dh[r][unit + 1]};
        if constexpr (kHasProduct<Cell>) {
            if (n) {
                auto& sums = sums_of(n, group);
                OSTINATO_UNROLL
                for (int source = 0; source < Shared::kSources; source++)
                    sum.a += sums[source][place][unit], sum.b += sums[source][place][unit + 1];
            }
        }
        return sum;
    }

    // The state that begins a piece of a row gets its gradient: h, or `k` of the kAll behind it.
    template <int kAll = 1>
    OSTINATO_DEVICE void leave(const Row& row, Start start, int unit, Pair grad, void* to_first, float* to_reset, int k = 0) {
        const int global = rank * kUnits + unit;
        if (start == Start::kFirst) {
            if (to_first) store_units(state_row<kAll>(static_cast<Element*>(to_first), loop, row.index, k), global, grad);
        } else if (to_reset) {
            float* const sums = state_row<kAll>(to_reset, loop, row.index, k) + global;
            if (global < kHidden) sums[0] += grad.a;
            if (global + 1 < kHidden) sums[1] += grad.b;
        }
    }
    OSTINATO_DEVICE void leave_behind(const Row& row, Start start, int unit, int r, int k) {
        const Pair grad{shared.dc[k][r][unit], shared.dc[k][r][unit + 1]};
        leave<kBehind>(row, start, unit, grad, call.dc_0, call.dreset_c, k);
    }

    OSTINATO_DEVICE Arrays arrays() const {
        const int directions = static_cast<int>(loop.batch.directions);
        const i64 row = loop.steps ? loop.first_row(loop.time(loop.steps - 1)) : 0;
        const auto walk = [&](const void* array, int values) {
            const Element* const first = static_cast<const Element*>(array) + loop.direction * values * kHidden + rank * kUnits;
            return Walk<const Element>(first, directions * values * kHidden, shared.rows, row);
        };
        const auto* const drives = static_cast<const Element*>(call.drives) + rank * kUnits;
        return {walk(call.dy, 1), walk(call.dcells, kBehind), walk(call.y, 1), walk(call.reserve, Cell::kSaved),
                Walk<const Element>(drives, Cell::kDrives * kHidden, shared.rows, row)};
    }
    OSTINATO_DEVICE Walk<Element> gradients() const {
        constexpr int kValues = (Cell::kSlots + Cell::kDrives) * kHidden;
        const i64 row = loop.steps ? loop.first_row(loop.time(loop.steps - 1)) : 0;
        Element* const first = static_cast<Element*>(call.dgates) + loop.direction * loop.batch.rows * kValues + rank * kUnits;
        return {first, kValues, shared.rows, row};
    }

    template <int kAll = 1>
    OSTINATO_DEVICE Raw<Element> load_initial(const void* states, const void* resets, const Row& row, Start start, int unit,
                                              int k = 0) const {
        const auto* from = static_cast<const Element*>(start == Start::kReset ? resets : states);
        return from ? load_units(state_row<kAll>(from, loop, row.index, k), rank * kUnits + unit) : Raw<Element>{};
    }

    // At time t, which is where `from` is; `away` is from there to the step that the time loop takes next.
    OSTINATO_DEVICE void load_inputs(const Arrays& from, int away, int t, int group, Inputs (&inputs)[kPairs]) const {
        // Time passes the other way.
        const int next = loop.direction ? t - 1 : t + 1;
        OSTINATO_UNROLL
        for (int e = 0; e < kPairs; e++) {
            const int pair = pair_of(e), unit = pair % (kUnits / 2) * 2, global = rank * kUnits + unit;
            if (!is_mine(pair)) continue;
            const Row row = shared.rows[group * kGroupRows + pair / (kUnits / 2)];
            Inputs& in = inputs[e];
            in.next = Start::kNot;
            if (!loop.is_active(row, t)) continue;
            const Start here = loop.start(row, t);
            if (loop.batch.flags && loop.is_active(row, next)) in.next = loop.start(row, next);
            const Raw<Element> none{};
            in.dy = call.dy ? load_at(from.dy.at(row, unit), global) : none;
            OSTINATO_UNROLL
            for (int k = 0; k < kBehind; k++)
                in.dcells[k] = call.dcells ? load_at(from.dcells.at(row, unit) + k * kHidden, global) : none;
            const Element* const saved = from.reserve.at(row, unit);
            OSTINATO_UNROLL
            for (int k = 0; k < Cell::kSaved; k++)
                in.saved[k] = Cell::reads_saved(k) ? load_at(saved + k * kHidden, global) : none;
            OSTINATO_UNROLL
            for (int k = 0; k <= kBehind; k++) in.previous[k] = none;
            in.h = none;
            const Element* const y = from.y.at(row, unit);
            if constexpr (Cell::kUsesOutput) in.h = load_at(y, global);
            OSTINATO_UNROLL
            for (int k = 0; k < Cell::kDrives; k++) in.drives[k] = load_at(from.drives.at(row, unit) + k * kHidden, global);
            if (here != Start::kNot) {
                if (Cell::reads_state(0)) in.previous[0] = load_initial(call.h_0, call.reset_h, row, here, unit);
                OSTINATO_UNROLL
                for (int k = 0; k < kBehind; k++)
                    if (Cell::reads_state(1 + k))
                        in.previous[1 + k] = load_initial<kBehind>(call.c_0, call.reset_c, row, here, unit, k);
                continue;
            }
            if (Cell::reads_state(0)) in.previous[0] = load_at(from.y.shifted(y, away), global);
            // forward saves the states behind h last.
            const Element* const before = from.reserve.shifted(saved, away);
            OSTINATO_UNROLL
            for (int k = 0; k < kBehind; k++)
                if (Cell::reads_state(1 + k))
                    in.previous[1 + k] = load_at(before + (Cell::kSaved - kBehind + k) * kHidden, global);
            if (kReadsAhead && kGroups == 1) continue;
            // Where less than a step lies between a read and its use, the step after goes into the second cache level, once for
            // every 32 bytes.
            if (!is_unit(global) || global % (32 / static_cast<int>(sizeof(Element)))) continue;
            if (call.dy) prefetch(from.dy.shifted(from.dy.at(row, unit), away));
            OSTINATO_UNROLL
            for (int k = 0; k < Cell::kSaved; k++)
                if (Cell::reads_saved(k)) prefetch(before + k * kHidden);
        }
    }

    OSTINATO_DEVICE void step(int n, int t, int group, const Walk<Element>& dgates, const Inputs& in, int pair,
                              typename Shared::Grads* grads) {
        const int place = pair / (kUnits / 2), unit = pair % (kUnits / 2) * 2, r = group * kGroupRows + place;
        const Row row = shared.rows[r];
        Pair dh = arrived(n, group, place, unit);
        constexpr int kValues = Cell::kSlots + Cell::kDrives;
        Value da[2][kValues];
        OSTINATO_UNROLL
        for (int k = 0; k < kValues; k++) da[0][k] = da[1][k] = 0.0f;
        if (loop.is_active(row, t)) {
            if (in.next != Start::kNot) {
                leave(row, in.next, unit, dh, call.dh_0, call.dreset_h);
                dh = {0, 0};
                OSTINATO_UNROLL
                for (int k = 0; k < kBehind; k++) {
                    leave_behind(row, in.next, unit, r, k);
                    keep(shared.dc[k][r], unit, {0, 0});
                }
            }
            const Pair dy = widen(in.dy);
            float direct[2];
            OSTINATO_UNROLL
            for (int i = 0; i < 2; i++) {
                const auto one = [&](const Raw<Element>& raw) {
                    const Pair both = widen(raw);
                    return Value(i ? both.b : both.a);
                };
                Value saved[places(Cell::kSaved)], parameters[places(Cell::kParameters)], drives[places(Cell::kDrives)];
                OSTINATO_UNROLL
                for (int k = 0; k < Cell::kSaved; k++) saved[k] = one(in.saved[k]);
                OSTINATO_UNROLL
                for (int k = 0; k < Cell::kDrives; k++) drives[k] = one(in.drives[k]);
                shared.read_parameters(unit + i, parameters);
                Value from[1 + kBehind], before[1 + kBehind], to[1 + kBehind];
                from[0] = i ? dh.b + dy.b : dh.a + dy.a;
                before[0] = one(in.previous[0]);
                OSTINATO_UNROLL
                for (int k = 0; k < kBehind; k++) {
                    from[1 + k] = shared.dc[k][r][unit + i] + one(in.dcells[k]).value;
                    before[1 + k] = one(in.previous[1 + k]);
                }
                Cell::backward(from, saved, before, one(in.h), parameters, drives, da[i], to, da[i] + Cell::kSlots);
                direct[i] = to[0].value;
                OSTINATO_UNROLL
                for (int k = 0; k < kBehind; k++) shared.dc[k][r][unit + i] = to[1 + k].value;
            }
            dh = {direct[0], direct[1]};
            Element* const to = dgates.at(row, unit);
            OSTINATO_UNROLL
            for (int k = 0; k < kValues; k++)
                store_at(to + position_of<Cell>(k) * kHidden, rank * kUnits + unit, Pair{da[0][k].value, da[1][k].value});
        }
        keep(shared.dh[r], unit, dh);
        if constexpr (kHasProduct<Cell>) {
            OSTINATO_UNROLL
            for (int g = 0; g < kGates; g++) {
                using Two = typename WordsOf<Operand>::Two;
                const Pair da_g = of_units<Cell>({da[0][g].value, da[1][g].value}, rank * kUnits + unit);
                const Two both = join(word_of(to_operand<Math>(da_g.a)), word_of(to_operand<Math>(da_g.b)));
                *reinterpret_cast<Two*>(&(*grads)[place][g * kUnits + unit]) = both;
            }
        }
    }

    OSTINATO_DEVICE void begin() {
        OSTINATO_ROLLED
        for (int pair = thread_index(); pair < kGroups * kGroupPairs; pair += kThreads) {
            const int unit = pair % (kUnits / 2) * 2, r = pair / (kUnits / 2);
            const Row row = shared.rows[r];
            const auto* const dh_n = static_cast<const Element*>(row.index < 0 ? nullptr : call.dh_n);
            keep(shared.dh[r], unit, load_pair(state_row(dh_n, loop, row.index), rank * kUnits + unit));
            const auto* const dc_n = static_cast<const Element*>(row.index < 0 ? nullptr : call.dc_n);
            OSTINATO_UNROLL
            for (int k = 0; k < kBehind; k++)
                keep(shared.dc[k][r], unit, load_pair(state_row<kBehind>(dc_n, loop, row.index, k), rank * kUnits + unit));
        }
        shared.template load_parameters<Element>(call.parameters, rank);
    }

    OSTINATO_DEVICE void end() {
        for (int group = 0; group < kGroups; group++) {
            if constexpr (kHasProduct<Cell>) await(loop.steps, group);
            OSTINATO_ROLLED
            for (int pair = thread_index(); pair < kGroupPairs; pair += kThreads) {
                const int place = pair / (kUnits / 2), unit = pair % (kUnits / 2) * 2, r = group * kGroupRows + place;
                const Row row = shared.rows[r];
                if (row.index < 0) continue;
                const Start start = loop.first_start(row);
                leave(row, start, unit, arrived(loop.steps, group, place, unit), call.dh_0, call.dreset_h);
                OSTINATO_UNROLL
                for (int k = 0; k < kBehind; k++) leave_behind(row, start, unit, r, k);
            }
            if constexpr (kExchange == Exchange::kGrid) block_barrier();  // before the next group's sums overwrite these
        }
    }

    OSTINATO_DEVICE void run() {
        open(shared, loop, task.tile);
        typename Shared::Product product;
        begin();
        if constexpr (kHasProduct<Cell>) product.load(shared.weights, static_cast<const Element*>(call.weight_hh), rank);
        block_barrier();  // orders the gradients of the last states
        // Every block's barriers stand before anybody pushes.
        if constexpr (kExchange == Exchange::kCluster) cluster_barrier();
        Arrays at = arrays();
        Walk<Element> dgates = gradients();
        const int turn = loop.direction ? 1 : -1;
        Inputs inputs[kPairs];
        int t = loop.time(loop.steps - 1), away = loop.rows_between(t, turn);
        if (kReadsAhead) load_inputs(at, away, t, 0, inputs);
        OSTINATO_ROLLED
        for (int n = 0; n < loop.steps; n++) OSTINATO_ROLLED
        for (int group = 0; group < kGroups; group++) {
            if (!kReadsAhead) load_inputs(at, away, t, group, inputs);
            typename Shared::Grads* grads = nullptr;
            if constexpr (kHasProduct<Cell>) {
                await(n, group);
                grads = &shared.grads[group % kHalves];
            }
            OSTINATO_UNROLL
            for (int e = 0; e < kPairs; e++)
                if (is_mine(pair_of(e))) step(n, t, group, dgates, inputs[e], pair_of(e), grads);
            const bool is_last = group + 1 == kGroups;
            if (is_last) {
                at.dy.move(away), at.dcells.move(away), at.y.move(away), at.reserve.move(away), at.drives.move(away);
                dgates.move(away);
                t += turn, away = loop.rows_between(t, turn);
            }
            if (kReadsAhead) load_inputs(at, away, t, is_last ? 0 : group + 1, inputs);
            if constexpr (kHasProduct<Cell>) {
                block_barrier();  // orders the gate gradients
                product.multiply(shared.weights, *grads, [&](int slice, int tile, int unit, int row, Pair pair) {
                    send(n + 1, group, slice, tile, unit, row, pair);
                });
            }
        }
        if constexpr (kHasProduct<Cell> && kExchange == Exchange::kBlock) block_barrier();  // orders the last group's sums
        end();
        // Nobody leaves while its shared memory may still be written.
        if constexpr (kExchange == Exchange::kCluster) cluster_barrier();
    }
};

template <class Cell, class Math>
OSTINATO_DEVICE void backward(const Backward& call, Task task) {
    auto& shared = shared_memory<BackwardShared<Cell, Math>>();
    static_assert(sizeof(shared) == OSTINATO_SHARED_BYTES, "shared memory as config.py has it");
    static_assert(kFits<Cell>, "one block alone, or blocks that exchange what a product reads");
    BackwardLoop<Cell, Math>{call, shared, Loop{call.batch, task.direction, 0}, block_index() % kBlocks, task}.run();
}

}  // namespace
}  // namespace ostinato
