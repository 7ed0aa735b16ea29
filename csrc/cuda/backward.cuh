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
    const void *h_0, *c_0, *reset_h, *reset_c;  // [D, B, H]
    const void *y, *reserve;  // of forward
    const void *dy, *dcells;  // [N, D * H]
    const void *dh_n, *dc_n;  // [D, B, H]
    void* dgates;  // [D, N, kGrads * H], slots as position_of has them
    void *dh_0, *dc_0;  // [D, B, H]; where rows begin anew, a row may have no part in them: zeros beforehand
    float *dreset_h, *dreset_c;  // [D, B, H], zeros beforehand; what belongs to the states of resets is added
    void* exchange;  // with Exchange::kGrid words [loops of a launch, groups, 2, kBlocks, sources, kGroupRows, kUnits], zeros
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
    static constexpr int kUnitsEach = kPadded * kSlices / kThreads, kStride = kThreads / kSlices, kSteps = kDepth / kSlices;
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

template <class Cell, class Math>
struct BackwardShared {
    using Product = BackwardProduct<Cell, Math>;
    // Of dL/dh: from every block's slices, or what a thread of the gathering has added up.
    using Words = Marked<float, Math::kDepth == 0>;
    static constexpr int kReads = kGroupRows * kUnits / kPerRead<typename Words::Word>;
    static constexpr int kParts = kThreads / kReads < kBlocks ? largest(kThreads / kReads, 1) : kBlocks;
    static_assert(kExchange != Exchange::kGrid || kThreads >= kReads, "a thread for each read of a source");
    static constexpr int kSources = kExchange == Exchange::kGrid ? kParts : kBlocks * Product::kSlices;
    static constexpr int kSums = kExchange == Exchange::kGrid ? 1 : kBuffers * kGroups;
    typename Math::Operand grads[kHalves][kGroupRows][Product::kDepth + kRowPad<Math>];
    float sums[kSums][kSources][kGroupRows][kUnits + 4];
    Fragment weights[largest(Product::Held::kShared, 0) * kThreads + 1];
    // What goes to the step before without weight_hh.
    float dh[kRows][kUnits], dc[Cell::kHasC ? kRows : 1][kUnits];
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
    using Product = typename Shared::Product;
    using Words = typename Shared::Words;
    using Word = typename Words::Word;
    static constexpr int kGates = Cell::kGates;

    const Backward& call;
    Shared& shared;
    Loop loop;
    int rank;
    Task task;

    // What a pair of units needs of memory at one step, and how its row began in the step that comes after it.
    struct Inputs {
        Raw<Element> dy, dcells, saved[largest(Cell::kSaved, 1)], previous_h, previous_c, h;
        Start next;
    };
    // One block alone waits for nobody, so a turn's inputs are read a turn ahead, before a product that hides the latency. Where
    // blocks wait for each other, that wait hides it, and the registers are left to the weights.
    static constexpr bool kReadsAhead = kExchange == Exchange::kBlock;

    // This thread's units in all that has a row for each row of x and is read, from forward's last step on.
    struct Arrays {
        Walk<const Element> dy, dcells, y, reserve;
    };

    OSTINATO_DEVICE auto& sums_of(int n, int group) {
        if constexpr (kExchange == Exchange::kGrid) return shared.sums[0];
        return shared.sums[n % kBuffers * kGroups + group];
    }
    // The words for a block of what arrives before step n.
    OSTINATO_DEVICE Word* words_of(int n, int group, int block) const {
        const i64 at = ((static_cast<i64>(task.launched) * kGroups + group) * 2 + n % 2) * kBlocks + block;
        return static_cast<Word*>(call.exchange) + at * kBlocks * Product::kSlices * kGroupRows * kUnits;
    }

    // Hands a pair of sums to the block that owns these units of a tile, for step n.
    OSTINATO_DEVICE void send(int n, int group, int slice, int tile, int unit, int row, Pair pair) {
        const int to = tile / (kUnits / 16), own = tile % (kUnits / 16) * 16 + unit, source = rank * Product::kSlices + slice;
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
        constexpr int kPer = kPerRead<Word>, kReads = Shared::kReads, kAll = kBlocks * Product::kSlices * kReads;
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
        if (n) {
            auto& sums = sums_of(n, group);
            OSTINATO_UNROLL
            for (int source = 0; source < Shared::kSources; source++)
                sum.a += sums[source][place][unit], sum.b += sums[source][place][unit + 1];
        }
        return sum;
    }

    // The state that begins a piece of a row gets its gradient.
    OSTINATO_DEVICE void leave(const Row& row, Start start, int unit, Pair grad, void* to_first, float* to_reset) {
        const int global = rank * kUnits + unit;
        if (start == Start::kFirst) {
            if (to_first) store_units(state_row(static_cast<Element*>(to_first), loop, row.index), global, grad);
        } else if (to_reset) {
            float* const sums = state_row(to_reset, loop, row.index) + global;
            if (global < kHidden) sums[0] += grad.a;
            if (global + 1 < kHidden) sums[1] += grad.b;
        }
    }

    OSTINATO_DEVICE Arrays arrays() const {
        const int directions = static_cast<int>(loop.batch.directions);
        const i64 row = loop.steps ? loop.first_row(loop.time(loop.steps - 1)) : 0;
        const auto walk = [&](const void* array, int values) {
            const Element* const first = static_cast<const Element*>(array) + loop.direction * values * kHidden + rank * kUnits;
            return Walk<const Element>(first, directions * values * kHidden, shared.rows, row);
        };
        return {walk(call.dy, 1), walk(call.dcells, 1), walk(call.y, 1), walk(call.reserve, Cell::kSaved)};
    }
    OSTINATO_DEVICE Walk<Element> gradients() const {
        constexpr int kValues = Cell::kGrads * kHidden;
        const i64 row = loop.steps ? loop.first_row(loop.time(loop.steps - 1)) : 0;
        Element* const first = static_cast<Element*>(call.dgates) + loop.direction * loop.batch.rows * kValues + rank * kUnits;
        return {first, kValues, shared.rows, row};
    }

    OSTINATO_DEVICE Raw<Element> load_initial(const void* states, const void* resets, const Row& row, Start start,
                                              int unit) const {
        const auto* from = static_cast<const Element*>(start == Start::kReset ? resets : states);
        return from ? load_units(state_row(from, loop, row.index), rank * kUnits + unit) : Raw<Element>{};
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
            in.dcells = Cell::kHasC && call.dcells ? load_at(from.dcells.at(row, unit), global) : none;
            const Element* const saved = from.reserve.at(row, unit);
            OSTINATO_UNROLL
            for (int k = 0; k < Cell::kSaved; k++) in.saved[k] = load_at(saved + k * kHidden, global);
            in.previous_h = in.previous_c = in.h = none;
            const Element* const y = from.y.at(row, unit);
            if constexpr (Cell::kUsesOutput) in.h = load_at(y, global);
            if (here != Start::kNot) {
                if constexpr (Cell::kUsesPrevious) in.previous_h = load_initial(call.h_0, call.reset_h, row, here, unit);
                if constexpr (Cell::kHasC) in.previous_c = load_initial(call.c_0, call.reset_c, row, here, unit);
                continue;
            }
            if constexpr (Cell::kUsesPrevious) in.previous_h = load_at(from.y.shifted(y, away), global);
            // forward saves c last.
            const Element* const before = from.reserve.shifted(saved, away);
            if constexpr (Cell::kHasC) in.previous_c = load_at(before + (Cell::kSaved - 1) * kHidden, global);
            if (kReadsAhead && kGroups == 1) continue;
            // Where less than a step lies between a read and its use, the step after goes into the second cache level, once for
            // every 32 bytes.
            if (!is_unit(global) || global % (32 / static_cast<int>(sizeof(Element)))) continue;
            if (call.dy) prefetch(from.dy.shifted(from.dy.at(row, unit), away));
            OSTINATO_UNROLL
            for (int k = 0; k < Cell::kSaved; k++) prefetch(before + k * kHidden);
        }
    }

    OSTINATO_DEVICE void step(int n, int t, int group, const Walk<Element>& dgates, const Inputs& in, int pair,
                              Operand (&grads)[kGroupRows][Product::kDepth + kRowPad<Math>]) {
        const int place = pair / (kUnits / 2), unit = pair % (kUnits / 2) * 2, r = group * kGroupRows + place;
        const Row row = shared.rows[r];
        Pair dh = arrived(n, group, place, unit);
        Value da[2][Cell::kGrads];
        OSTINATO_UNROLL
        for (int k = 0; k < Cell::kGrads; k++) da[0][k] = da[1][k] = 0.0f;
        if (loop.is_active(row, t)) {
            const int c_row = Cell::kHasC ? r : 0;
            if (in.next != Start::kNot) {
                leave(row, in.next, unit, dh, call.dh_0, call.dreset_h);
                dh = {0, 0};
                if constexpr (Cell::kHasC) {
                    leave(row, in.next, unit, {shared.dc[r][unit], shared.dc[r][unit + 1]}, call.dc_0, call.dreset_c);
                    keep(shared.dc[r], unit, {0, 0});
                }
            }
            const Pair dy = widen(in.dy), dcells = widen(in.dcells), previous_h = widen(in.previous_h);
            const Pair previous_c = widen(in.previous_c), h = widen(in.h);
            float direct[2];
            OSTINATO_UNROLL
            for (int i = 0; i < 2; i++) {
                Value saved[largest(Cell::kSaved, 1)];
                OSTINATO_UNROLL
                for (int k = 0; k < Cell::kSaved; k++) {
                    const Pair both = widen(in.saved[k]);
                    saved[k] = i ? both.b : both.a;
                }
                Value dc = Cell::kHasC ? shared.dc[c_row][unit + i] + (i ? dcells.b : dcells.a) : 0.0f;
                direct[i] =
                    Cell::backward(Value(i ? dh.b + dy.b : dh.a + dy.a), dc, saved, Value(i ? previous_h.b : previous_h.a),
                                   Value(i ? previous_c.b : previous_c.a), Value(i ? h.b : h.a), da[i])
                        .value;
                if constexpr (Cell::kHasC) shared.dc[r][unit + i] = dc.value;
            }
            dh = {direct[0], direct[1]};
            Element* const to = dgates.at(row, unit);
            OSTINATO_UNROLL
            for (int k = 0; k < Cell::kGrads; k++)
                store_at(to + position_of<Cell>(k) * kHidden, rank * kUnits + unit, Pair{da[0][k].value, da[1][k].value});
        }
        keep(shared.dh[r], unit, dh);
        OSTINATO_UNROLL
        for (int g = 0; g < kGates; g++) {
            using Two = typename WordsOf<Operand>::Two;
            const Two both = join(word_of(to_operand<Math>(da[0][g].value)), word_of(to_operand<Math>(da[1][g].value)));
            *reinterpret_cast<Two*>(&grads[place][g * kUnits + unit]) = both;
        }
    }

    OSTINATO_DEVICE void begin() {
        OSTINATO_ROLLED
        for (int pair = thread_index(); pair < kGroups * kGroupPairs; pair += kThreads) {
            const int unit = pair % (kUnits / 2) * 2, r = pair / (kUnits / 2);
            const Row row = shared.rows[r];
            const auto read = [&](const void* states) {
                const auto* from = static_cast<const Element*>(row.index < 0 ? nullptr : states);
                return load_pair(state_row(from, loop, row.index), rank * kUnits + unit);
            };
            keep(shared.dh[r], unit, read(call.dh_n));
            if constexpr (Cell::kHasC) keep(shared.dc[r], unit, read(call.dc_n));
        }
    }

    OSTINATO_DEVICE void end() {
        for (int group = 0; group < kGroups; group++) {
            await(loop.steps, group);
            OSTINATO_ROLLED
            for (int pair = thread_index(); pair < kGroupPairs; pair += kThreads) {
                const int place = pair / (kUnits / 2), unit = pair % (kUnits / 2) * 2, r = group * kGroupRows + place;
                const Row row = shared.rows[r];
                if (row.index < 0) continue;
                const Start start = loop.first_start(row);
                leave(row, start, unit, arrived(loop.steps, group, place, unit), call.dh_0, call.dreset_h);
                if constexpr (Cell::kHasC)
                    leave(row, start, unit, {shared.dc[r][unit], shared.dc[r][unit + 1]}, call.dc_0, call.dreset_c);
            }
            if constexpr (kExchange == Exchange::kGrid) block_barrier();  // before the next group's sums overwrite these
        }
    }

    OSTINATO_DEVICE void run() {
        open(shared, loop, task.tile);
        Product product;
        begin();
        product.load(shared.weights, static_cast<const Element*>(call.weight_hh), rank);
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
            await(n, group);
            auto& grads = shared.grads[group % kHalves];
            OSTINATO_UNROLL
            for (int e = 0; e < kPairs; e++)
                if (is_mine(pair_of(e))) step(n, t, group, dgates, inputs[e], pair_of(e), grads);
            const bool is_last = group + 1 == kGroups;
            if (is_last) {
                at.dy.move(away), at.dcells.move(away), at.y.move(away), at.reserve.move(away), dgates.move(away);
                t += turn, away = loop.rows_between(t, turn);
            }
            if (kReadsAhead) load_inputs(at, away, t, is_last ? 0 : group + 1, inputs);
            block_barrier();  // orders the gate gradients
            product.multiply(shared.weights, grads, [&](int slice, int tile, int unit, int row, Pair pair) {
                send(n + 1, group, slice, tile, unit, row, pair);
            });
        }
        if constexpr (kExchange == Exchange::kBlock) block_barrier();  // orders the last group's sums
        end();
        // Nobody leaves while its shared memory may still be written.
        if constexpr (kExchange == Exchange::kCluster) cluster_barrier();
    }
};

template <class Cell, class Math>
OSTINATO_DEVICE void backward(const Backward& call, Task task) {
    auto& shared = shared_memory<BackwardShared<Cell, Math>>();
    static_assert(sizeof(shared) == OSTINATO_SHARED_BYTES, "shared memory as config.py has it");
    BackwardLoop<Cell, Math>{call, shared, Loop{call.batch, task.direction, 0}, block_index() % kBlocks, task}.run();
}

}  // namespace
}  // namespace ostinato
