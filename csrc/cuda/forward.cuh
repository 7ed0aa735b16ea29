// The time loop forward. Each step of a group of rows:
//
//   await the state of all units  ->  weight_hh times state, each warp a part  ->  barrier  ->  cell  ->  send the own units on
//
// Traffic per step and eight rows: the operands of 8 * H units come in over the exchange, 8 * G * kUnits of the input product are read
// from memory, a turn ahead. Weights are read once.
//
// A step of one block alone has few instructions beside addresses, so these are not computed anew: pointers move along (Walk).
//
// Registers: kResident fragments of four words; shared memory: ForwardShared, which config.py computes too (checked below).
#pragma once

#include "sequence.cuh"

namespace ostinato {
namespace {

struct Forward {
    Batch batch;
    const void* gates_x;  // [D, N, G * H], x times weight_ih, without biases
    const void *weight_hh, *bias_ih, *bias_hh;  // [G * H, H], [G * H], of this block's direction
    const void *h_0, *c_0, *reset_h, *reset_c;  // [D, B, H]
    void* y;  // [N, D * H]; what lies past a row's end stays as it is
    void *h_n, *c_n;  // [D, B, H]
    void* reserve;  // [N, D, kSaved, H] for backward, or null
    void* cells;  // [N, D * H], c after every step, or null
    void* exchange;  // with Exchange::kGrid words [loops of a launch, groups, 2, kGroupRows, kPadded], zeros
};

// ---- weight_hh times state ----

// On tensor cores: a warp computes 16 units of every gate over a slice of k.
template <class Cell, class Math, bool kOnTensorCores = (Math::kDepth > 0)>
struct ForwardProduct {
    static constexpr int kTiles = kUnits / 16, kSlices = kWarps / kTiles, kSteps = kPadded / largest(Math::kDepth, 1) / kSlices;
    static constexpr int kCount = kSteps * Cell::kGates;
    static_assert(kTiles * kSlices == kWarps && kSteps * kSlices * Math::kDepth == kPadded, "warps share the product evenly");
    static constexpr int kChains = chains_of(Cell::kGates * kEights, kSteps);
    using Held = Fragments<kCount>;
    using Operand = typename Math::Operand;
    Held fragments;
    int tile, slice;

    OSTINATO_DEVICE void load(Fragment* shared, const typename Math::Element* weight, int rank) {
        tile = thread_index() / 32 % kTiles, slice = thread_index() / 32 / kTiles;
        const int first = tile * 16, first_k = slice * kSteps * Math::kDepth;
        const auto word = [&](int row, int k) {
            const int unit = rank * kUnits + row % kUnits;
            if (unit >= kHidden) return 0u;
            const auto* const from = weight + (row / kUnits * kHidden + unit) * kHidden;
            if constexpr (Math::kDepth == 8)
                return k < kHidden ? bits_of(to_tf32(from[k])) : 0u;
            else
                return two_words(load_units(from, k));
        };
        fragments.load(shared, [&](int i, u32(&words)[4]) {
            read_tile<Math>(words, i % Cell::kGates * kUnits + first, first_k + i / Cell::kGates * Math::kDepth, word);
        });
    }

    OSTINATO_DEVICE void multiply(const Fragment* shared, const Operand (&state)[kGroupRows][kPadded + kRowPad<Math>],
                                  float (&sums)[kSlices][Cell::kGates][kGroupRows][kUnits + 4]) const {
        float sum[Cell::kGates][kChains][kEights][4] = {};
        OSTINATO_UNROLL
        for (int k = 0; k < kSteps; k++) {
            u32 b[kEights][2];
            if (k % steps_ahead(Cell::kGates) == 0) schedule_barrier();
            read_rows<Math>(state[0], kPadded + kRowPad<Math>, (slice * kSteps + k) * Math::kDepth, b);
            OSTINATO_UNROLL
            for (int g = 0; g < Cell::kGates; g++)
                ostinato::multiply<Math>(fragments, shared, k * Cell::kGates + g, sum[g][k % kChains], b);
        }
        const int lane = thread_index() % 32, unit = tile * 16 + lane / 4, row = lane % 4 * 2;
        OSTINATO_UNROLL
        for (int g = 0; g < Cell::kGates; g++) OSTINATO_UNROLL
        for (int e = 0; e < kEights; e++) OSTINATO_UNROLL
        for (int i = 0; i < 4; i++) sums[slice][g][e * 8 + row + i % 2][unit + i / 2 * 8] = total(sum[g], e, i);
    }
};

// By fused multiply-adds: a thread computes every gate of one unit over a slice of k, in ascending k. A fragment has four k of a
// gate. Neighbouring threads read the same state, so a read serves a warp.
template <class Cell, class Math>
struct ForwardProduct<Cell, Math, false> {
    static constexpr int kGates = Cell::kGates;
    static constexpr int kSlices = kThreads / kUnits, kSteps = kPadded / kSlices;
    static_assert(kSlices * kUnits == kThreads && kSteps * kSlices == kPadded && kSteps % 4 == 0,
                  "threads share the product evenly");
    using Product = RowProduct<kGates, kSteps / 4>;
    using Held = typename Product::Held;
    Product product;
    int unit, slice;

    OSTINATO_DEVICE void load(Fragment* shared, const float* weight, int rank) {
        unit = thread_index() % kUnits, slice = thread_index() / kUnits;
        const int row = rank * kUnits + unit;
        product.fragments.load(shared, [&](int i, u32(&words)[4]) {
            const auto* const from = weight + static_cast<i64>(i % kGates * kHidden + row) * kHidden;
            OSTINATO_UNROLL
            for (int j = 0; j < 4; j++) {
                const int k = slice * kSteps + i / kGates * 4 + j;
                words[j] = row < kHidden && k < kHidden ? bits_of(from[k]) : 0u;
            }
        });
    }

    OSTINATO_DEVICE void multiply(const Fragment* shared, const float (&state)[kGroupRows][kPadded + kRowPad<Math>],
                                  float (&sums)[kSlices][kGates][kGroupRows][kUnits + 4]) const {
        product.multiply(
            shared, [&](int row, int k) { return &state[row][slice * kSteps + k]; },
            [&](int first, const auto& sum) {
                OSTINATO_UNROLL
                for (int row = 0; row < Product::kAtOnce; row++) OSTINATO_UNROLL
                for (int g = 0; g < kGates; g++) sums[slice][g][first + row][unit] = sum[row][g];
            });
    }
};

// ---- shared memory ----

template <class Cell, class Math>
struct ForwardShared {
    using Product = ForwardProduct<Cell, Math>;
    static constexpr int kStates = kExchange == Exchange::kGrid ? 1 : kBuffers * kGroups;
    typename Math::Operand state[kStates][kGroupRows][kPadded + kRowPad<Math>];
    // What gathers has a barrier between two groups.
    static constexpr int kSums = kExchange == Exchange::kGrid ? 1 : kHalves;
    float sums[kSums][Product::kSlices][Cell::kGates][kGroupRows][kUnits + 4];
    Fragment weights[largest(Product::Held::kShared, 0) * kThreads + 1];
    float bias[Cell::kGates + 1][kUnits];  // of the joint gates their sum; last that of the input product that stays apart
    float h[kRows][kUnits], c[Cell::kHasC ? kRows : 1][kUnits];
    Row rows[kRows];
    u64 arrived[kBuffers][kGroups];
};

// ---- the time loop ----

template <class Cell, class Math>
struct ForwardLoop {
    using Element = typename Math::Element;
    using Operand = typename Math::Operand;
    using Value = Real<Math::kIsFast>;
    using Shared = ForwardShared<Cell, Math>;
    using Words = Marked<Operand, Math::kDepth == 0>;
    using Word = typename Words::Word;
    static constexpr int kGates = Cell::kGates;

    const Forward& call;
    Shared& shared;
    Loop loop;
    int rank;
    Task task;

    // What a pair of units needs of the input product at one step.
    using Gates = Raw<Element>[kGates];

    OSTINATO_DEVICE Operand (&state_of(int s, int group)) [kGroupRows][kPadded + kRowPad<Math>] {
        if constexpr (kExchange == Exchange::kGrid) return shared.state[0];
        return shared.state[s % kBuffers * kGroups + group];
    } OSTINATO_DEVICE Word* words_of(int s, int group) const {
        const i64 at = (static_cast<i64>(task.launched) * kGroups + group) * 2 + s % 2;
        return static_cast<Word*>(call.exchange) + at * kGroupRows * kPadded;
    }

    // Hands two units of the own part of the state before step s to every block.
    OSTINATO_DEVICE void send(int s, int group, int row, int unit, Pair h) {
        const int global = rank * kUnits + unit;
        const Operand a = to_operand<Math>(h.a), b = to_operand<Math>(h.b);
        if constexpr (kExchange == Exchange::kGrid) {
            const u32 mark = mark_of(s);
            store_shared_words(words_of(s, group) + row * kPadded + global, Words::join(a, mark), Words::join(b, mark));
        } else {
            using Two = typename WordsOf<Operand>::Two;
            auto* const place = reinterpret_cast<Two*>(&state_of(s, group)[row][global]);
            const Two both = join(word_of(a), word_of(b));
            if constexpr (kExchange == Exchange::kBlock) {
                *place = both;
            } else {
                OSTINATO_UNROLL
                for (int to = 0; to < kBlocks; to++) push(place, both, &shared.arrived[s % 2][group], to);
            }
        }
    }

    // Says how much is to come of the state before step s. One thread's business.
    OSTINATO_DEVICE void expect(int s, int group) {
        transaction_expect(&shared.arrived[s % 2][group], kGroupRows * kPadded * sizeof(Operand));
    }

    // Waits until the whole state before step s is in shared memory.
    OSTINATO_DEVICE void await(int s, int group) {
        if constexpr (kExchange == Exchange::kBlock) {
            // With several groups the barrier between product and cell of another one has ordered this.
            if (kGroups == 1) block_barrier();
        } else if constexpr (kExchange == Exchange::kCluster) {
            // With one group, orders the last cell's reads of the sums before the product that writes them again. That its pushes
            // have come says so too, since they were computed from these reads; but by PTX's memory model the arrival of a push
            // releases the pushed bytes, and nothing says that it releases what its thread did before. The other blocks are
            // awaited far longer than this.
            if (kGroups == 1) block_barrier();
            transaction_wait(&shared.arrived[s % 2][group], s / 2 % 2);
            if (thread_index() == 0 && s + 1 < loop.steps) expect(s + 1, group);
        } else {
            gather(words_of(s, group), mark_of(s));
            block_barrier();  // orders the state that all threads gathered
        }
    }

    // Copies a group's state out of the words in global memory, each as soon as it has its mark.
    OSTINATO_DEVICE void gather(const Word* words, u32 mark) {
        constexpr int kPer = kPerRead<Word>, kReads = kGroupRows * kPadded / kPer;
        Operand* const state = shared.state[0][0];
        for (int first = thread_index(); first < kReads; first += kReadsAtOnce * kThreads) {
            Word found[kReadsAtOnce][kPer];
            await_words(words, mark, first, kThreads, kReads, found);
            OSTINATO_UNROLL
            for (int i = 0; i < kReadsAtOnce; i++) {
                const int at = (first + i * kThreads) * kPer;
                if (at >= kReads * kPer) continue;
                Operand* const to = state + at / kPadded * (kPadded + kRowPad<Math>)+at % kPadded;
                OSTINATO_UNROLL
                for (int j = 0; j < kPer; j++) Words::split(found[i][j], to[j]);
            }
        }
    }

    OSTINATO_DEVICE Pair initial(const void* states, const void* resets, const Row& row, Start start, int unit) const {
        if (row.index < 0) return {0, 0};
        const auto* from = static_cast<const Element*>(start == Start::kReset ? resets : states);
        return load_pair(state_row(from, loop, row.index), rank * kUnits + unit);
    }

    // States and biases; the own part of the first state goes to every block.
    OSTINATO_DEVICE void begin() {
        OSTINATO_ROLLED
        for (int i = thread_index(); i < (kGates + 1) * kUnits; i += kThreads) {
            const int gate = i / kUnits, unit = rank * kUnits + i % kUnits;
            const auto bias = [&](const void* from, int g) {
                return from && unit < kHidden ? widen(static_cast<const Element*>(from)[g * kHidden + unit]) : 0.0f;
            };
            const bool is_apart = gate == kGates, is_joint = gate < Cell::kJoint;
            float sum = 0;
            if (!is_apart) sum = bias(call.bias_hh, gate) + (is_joint ? bias(call.bias_ih, gate) : 0.0f);
            if (is_apart) sum = kHasApart<Cell> ? bias(call.bias_ih, kGates - 1) : 0.0f;
            shared.bias[gate][i % kUnits] = sum;
        }
        OSTINATO_ROLLED
        for (int group = 0; group < kGroups; group++) OSTINATO_ROLLED
        for (int pair = thread_index(); pair < kGroupPairs; pair += kThreads) {
            const int place = pair / (kUnits / 2), unit = pair % (kUnits / 2) * 2, r = group * kGroupRows + place;
            const Row row = shared.rows[r];
            const Start start = loop.first_start(row);
            const Pair h = initial(call.h_0, call.reset_h, row, start, unit);
            keep(shared.h[r], unit, h);
            if constexpr (Cell::kHasC) keep(shared.c[r], unit, initial(call.c_0, call.reset_c, row, start, unit));
            if (loop.steps) send(0, group, place, unit, h);
        }
    }

    // This thread's units in all that has a row for each row of x, from the first step on.
    struct Arrays {
        Walk<const Element> gates;
        Walk<Element> y, reserve, cells;
    };
    OSTINATO_DEVICE Arrays arrays() const {
        const int directions = static_cast<int>(loop.batch.directions);
        const i64 row = loop.steps ? loop.first_row(loop.time(0)) : 0;
        const auto* const gates = static_cast<const Element*>(call.gates_x);
        const auto output = [&](void* array, int values) {
            Element* const first = static_cast<Element*>(array) + loop.direction * values * kHidden + rank * kUnits;
            return Walk<Element>(first, directions * values * kHidden, shared.rows, row);
        };
        return {
            {gates + loop.direction * loop.batch.rows * kGates * kHidden + rank * kUnits, kGates * kHidden, shared.rows, row},
            output(call.y, 1),
            output(call.reserve, Cell::kSaved),
            output(call.cells, 1)};
    }

    // Of a pair at time t, which is where `from` is.
    OSTINATO_DEVICE void load_gates(const Walk<const Element>& from, int t, int group, int pair, Gates& gates) const {
        const int unit = pair % (kUnits / 2) * 2;
        const Row row = shared.rows[group * kGroupRows + pair / (kUnits / 2)];
        if (!loop.is_active(row, t)) return;
        const Element* const at = from.at(row, unit);
        OSTINATO_UNROLL
        for (int g = 0; g < kGates; g++) gates[g] = load_at(at + g * kHidden, rank * kUnits + unit);
    }

    // How the rows of a group begin at time `next`. With several groups less than a step lies between a read of the input product
    // and its use, so that of `next` goes into the second cache level.
    OSTINATO_DEVICE void look_ahead(const Walk<const Element>& from, int away, int t, int next, int group,
                                    Start (&starts)[kPairs]) const {
        OSTINATO_UNROLL
        for (int e = 0; e < kPairs; e++) {
            const int pair = pair_of(e), unit = pair % (kUnits / 2) * 2, global = rank * kUnits + unit;
            starts[e] = Start::kNot;
            if (!is_mine(pair) || !(kGroups > 1 || loop.batch.flags)) continue;
            const Row row = shared.rows[group * kGroupRows + pair / (kUnits / 2)];
            if (!loop.is_active(row, t) || !loop.is_active(row, next)) continue;
            if (loop.batch.flags) starts[e] = loop.start(row, next);
            // Once for every 32 bytes.
            if (kGroups > 1 && global < kHidden && global % (32 / static_cast<int>(sizeof(Element))) == 0) {
                const Element* const at = from.shifted(from.at(row, unit), away);
                OSTINATO_UNROLL
                for (int g = 0; g < kGates; g++) prefetch(at + g * kHidden);
            }
        }
    }

    // `next` is how the row begins after this step. load() reads what the next turn needs of the input product as soon as this one has
    // used its own: it is on its way for a whole turn, and takes no other registers.
    template <class Load>
    OSTINATO_DEVICE void step(int s, int t, int group, const Arrays& arrays, const Gates& gates, Start next, int pair,
                              const float (&sums)[Shared::Product::kSlices][kGates][kGroupRows][kUnits + 4], Load load) {
        const int place = pair / (kUnits / 2), unit = pair % (kUnits / 2) * 2, r = group * kGroupRows + place;
        const Row row = shared.rows[r];
        Pair h{shared.h[r][unit], shared.h[r][unit + 1]};
        if (!loop.is_active(row, t)) {
            load();
        } else {
            Value a[2][kGates], x[2] = {0.0f, 0.0f};
            OSTINATO_UNROLL
            for (int i = 0; i < 2; i++) OSTINATO_UNROLL
            for (int g = 0; g < kGates; g++) {
                float sum = shared.bias[g][unit + i];
                OSTINATO_UNROLL
                for (int slice = 0; slice < Shared::Product::kSlices; slice++) sum += sums[slice][g][place][unit + i];
                const Pair input = widen(gates[g]);
                const float from_x = i ? input.b : input.a;
                if (g < Cell::kJoint)
                    sum += from_x;
                else
                    x[i] = from_x + shared.bias[kGates][unit + i];
                a[i][g] = sum;
            }
            load();
            float next_h[2], next_c[2] = {0, 0};
            Value saved[2][largest(Cell::kSaved, 1)];
            OSTINATO_UNROLL
            for (int i = 0; i < 2; i++) {
                Value c = Cell::kHasC ? shared.c[Cell::kHasC ? r : 0][unit + i] : 0.0f;
                next_h[i] = Cell::forward(a[i], x[i], Value(i ? h.b : h.a), c, saved[i]).value;
                next_c[i] = c.value;
            }
            h = {next_h[0], next_h[1]};
            Pair c{next_c[0], next_c[1]};
            const int global = rank * kUnits + unit;
            store_at(arrays.y.at(row, unit), global, h);
            if (call.reserve) {
                Element* const to = arrays.reserve.at(row, unit);
                OSTINATO_UNROLL
                for (int k = 0; k < Cell::kSaved; k++)
                    store_at(to + k * kHidden, global, Pair{saved[0][k].value, saved[1][k].value});
            }
            if (next != Start::kNot) h = initial(call.h_0, call.reset_h, row, next, unit);
            keep(shared.h[r], unit, h);
            if constexpr (Cell::kHasC) {
                if (call.cells) store_at(arrays.cells.at(row, unit), global, c);
                if (next != Start::kNot) c = initial(call.c_0, call.reset_c, row, next, unit);
                keep(shared.c[r], unit, c);
            }
        }
        if (s + 1 < loop.steps) send(s + 1, group, place, unit, h);
    }

    OSTINATO_DEVICE void end() const {
        OSTINATO_ROLLED
        for (int group = 0; group < kGroups; group++) OSTINATO_ROLLED
        for (int pair = thread_index(); pair < kGroupPairs; pair += kThreads) {
            const int unit = pair % (kUnits / 2) * 2, r = group * kGroupRows + pair / (kUnits / 2);
            const Row row = shared.rows[r];
            if (row.index < 0) continue;
            const auto write = [&](void* states, const float (&values)[kUnits]) {
                store_units(state_row(static_cast<Element*>(states), loop, row.index), rank * kUnits + unit,
                            Pair{values[unit], values[unit + 1]});
            };
            write(call.h_n, shared.h[r]);
            if constexpr (Cell::kHasC) write(call.c_n, shared.c[r]);
        }
    }

    OSTINATO_DEVICE void run() {
        open(shared, loop, task.tile);
        if constexpr (kExchange == Exchange::kCluster) {
            if (thread_index() == 0)
                for (int group = 0; group < kGroups; group++) expect(0, group);
            cluster_barrier();  // every block's barriers stand before anybody pushes
        }
        typename Shared::Product product;
        begin();
        product.load(shared.weights, static_cast<const Element*>(call.weight_hh), rank);
        block_barrier();  // orders biases, states and, of one block alone, what it sent itself
        Arrays at = arrays();
        Gates gates[kPairs] = {};
        OSTINATO_UNROLL
        for (int e = 0; e < kPairs; e++)
            if (is_mine(pair_of(e))) load_gates(at.gates, loop.time(0), 0, pair_of(e), gates[e]);
        OSTINATO_ROLLED
        for (int s = 0, t = loop.time(0), turn = loop.direction ? -1 : 1; s < loop.steps; s++, t += turn) {
            const int next = t + turn, away = loop.rows_between(t, turn);
            OSTINATO_ROLLED
            for (int group = 0; group < kGroups; group++) {
                Start starts[kPairs];
                look_ahead(at.gates, away, t, next, group, starts);
                await(s, group);
                auto& sums = shared.sums[group % Shared::kSums];
                product.multiply(shared.weights, state_of(s, group), sums);
                block_barrier();  // orders the sums
                const bool is_last = group + 1 == kGroups;
                if (is_last) at.gates.move(away);
                OSTINATO_UNROLL
                for (int e = 0; e < kPairs; e++) {
                    const int pair = pair_of(e);
                    const auto load = [&] {
                        load_gates(at.gates, is_last ? next : t, is_last ? 0 : group + 1, pair, gates[e]);
                    };
                    if (is_mine(pair)) step(s, t, group, at, gates[e], starts[e], pair, sums, load);
                }
            }
            at.y.move(away), at.reserve.move(away), at.cells.move(away);
        }
        end();
        // Nobody leaves while its shared memory may still be written.
        if constexpr (kExchange == Exchange::kCluster) cluster_barrier();
    }
};

template <class Cell, class Math>
OSTINATO_DEVICE void forward(const Forward& call, Task task) {
    auto& shared = shared_memory<ForwardShared<Cell, Math>>();
    static_assert(sizeof(shared) == OSTINATO_SHARED_BYTES, "shared memory as config.py has it");
    ForwardLoop<Cell, Math>{call, shared, Loop{call.batch, task.direction, 0}, block_index() % kBlocks, task}.run();
}

}  // namespace
}  // namespace ostinato
