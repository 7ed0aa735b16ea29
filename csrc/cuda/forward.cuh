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
    const void* gates_x;  // [D, N, G * H], x times weight_ih, without biases; G of the input
    const void *weight_hh, *bias_ih, *bias_hh;  // [G * H, H], [G * H], of this block's direction; G of the state and the input
    const void *h_0, *c_0, *reset_h, *reset_c;  // [D, B, H], [D, B, E * H]
    void* y;  // [N, D * H]; what lies past a row's end stays as it is
    void *h_n, *c_n;  // [D, B, H], [D, B, E * H]
    void* reserve;  // [N, D, kSaved, H] for backward, or null
    void* cells;  // [N, D, E * H], the states behind h after every step, or null
    void* exchange;  // with Exchange::kGrid words [loops of a launch, groups, 2, kGroupRows, kPadded], zeros
    const void* parameters;  // [P, H], of this block's direction; null where the cell has none
    const void* drives;  // [N, n * H]; null where the cell has none
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
    using Sums = float[kSlices][Cell::kGates][kGroupRows][kUnits + 4];
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
                                  Sums& sums) const {
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
    // Where a cell has no product, a compiler looks here all the same: nothing of it depends on the cell.
    static_assert(!kHasProduct<Cell> || (kSlices * kUnits == kThreads && kSteps * kSlices == kPadded && kSteps % 4 == 0),
                  "threads share the product evenly");
    using Product = RowProduct<kGates, kSteps / 4>;
    using Held = typename Product::Held;
    using Sums = float[kSlices][kGates][kGroupRows][kUnits + 4];
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
                                  Sums& sums) const {
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

// What a product asks of it; nothing where there is none.
template <class Cell, class Math, bool kMultiplies = kHasProduct<Cell>>
struct ForwardParts {
    using Product = ForwardProduct<Cell, Math>;
    using Sums = typename Product::Sums;
    static constexpr int kStates = kExchange == Exchange::kGrid ? 1 : kBuffers * kGroups;
    typename Math::Operand state[kStates][kGroupRows][kPadded + kRowPad<Math>];
    // What gathers has a barrier between two groups.
    static constexpr int kSums = kExchange == Exchange::kGrid ? 1 : kHalves;
    Sums sums[kSums];
    Fragment weights[largest(Product::Held::kShared, 0) * kThreads + 1];
};
template <class Cell, class Math>
struct ForwardParts<Cell, Math, false> {
    struct Product {};
    struct Sums {};
};

template <class Cell, class Math>
struct ForwardShared : Parameters<Cell>, ForwardParts<Cell, Math> {
    // Of the sums, then of the input products apart.
    static constexpr int kBiases = Cell::kGates + places(kApart<Cell>);
    float bias[kBiases][kUnits];
    float h[kRows][kUnits], c[places(Cell::kBehind)][Cell::kBehind ? kRows : 1][kUnits];
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
    static constexpr int kGates = Cell::kGates, kInputs = Cell::kInputGates, kBehind = Cell::kBehind;

    const Forward& call;
    Shared& shared;
    Loop loop;
    int rank;
    Task task;

    // What a pair of units needs of the input product at one step, and what drives it.
    struct Gates {
        Raw<Element> x[kInputs], drives[places(Cell::kDrives)];
    };

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

    template <int kAll = 1>
    OSTINATO_DEVICE Pair initial(const void* states, const void* resets, const Row& row, Start start, int unit,
                                 int k = 0) const {
        if (row.index < 0) return {0, 0};
        const auto* from = static_cast<const Element*>(start == Start::kReset ? resets : states);
        return load_pair(state_row<kAll>(from, loop, row.index, k), rank * kUnits + unit);
    }

    // States and biases; the own part of the first state goes to every block.
    OSTINATO_DEVICE void begin() {
        OSTINATO_ROLLED
        for (int i = thread_index(); i < Shared::kBiases * kUnits; i += kThreads) {
            const int place = i / kUnits, unit = rank * kUnits + i % kUnits;
            const auto bias = [&](const void* from, int g) {
                return from && unit < kHidden ? widen(static_cast<const Element*>(from)[g * kHidden + unit]) : 0.0f;
            };
            // Which gate's input product this place has too.
            int input = place < kGates && !(kHiddenAlone<Cell> >> place & 1) ? place : -1;
            OSTINATO_UNROLL
            for (int g = 0; g < kInputs; g++)
                if (!Cell::is_joint(g) && place == kGates + count_below(kInputsApart<Cell>, g)) input = g;
            const float sum = place < kGates ? bias(call.bias_hh, place) : 0.0f;
            shared.bias[place][i % kUnits] = input < 0 ? sum : sum + bias(call.bias_ih, input);
        }
        shared.template load_parameters<Element>(call.parameters, rank);
        OSTINATO_ROLLED
        for (int group = 0; group < kGroups; group++) OSTINATO_ROLLED
        for (int pair = thread_index(); pair < kGroupPairs; pair += kThreads) {
            const int place = pair / (kUnits / 2), unit = pair % (kUnits / 2) * 2, r = group * kGroupRows + place;
            const Row row = shared.rows[r];
            const Start start = loop.first_start(row);
            const Pair h = initial(call.h_0, call.reset_h, row, start, unit);
            keep(shared.h[r], unit, h);
            OSTINATO_UNROLL
            for (int k = 0; k < kBehind; k++)
                keep(shared.c[k][r], unit, initial<kBehind>(call.c_0, call.reset_c, row, start, unit, k));
            if constexpr (kHasProduct<Cell>)
                if (loop.steps) send(0, group, place, unit, h);
        }
    }

    // This thread's units in all that has a row for each row of x, from the first step on.
    struct Arrays {
        Walk<const Element> gates, drives;
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
        const auto* const drives = static_cast<const Element*>(call.drives) + rank * kUnits;
        return {
            {gates + loop.direction * loop.batch.rows * kInputs * kHidden + rank * kUnits, kInputs * kHidden, shared.rows, row},
            {drives, Cell::kDrives * kHidden, shared.rows, row},
            output(call.y, 1),
            output(call.reserve, Cell::kSaved),
            output(call.cells, kBehind)};
    }

    // Of a pair at time t, which is where `from` is.
    OSTINATO_DEVICE void load_gates(const Arrays& from, int t, int group, int pair, Gates& gates) const {
        const int unit = pair % (kUnits / 2) * 2;
        const Row row = shared.rows[group * kGroupRows + pair / (kUnits / 2)];
        if (!loop.is_active(row, t)) return;
        const Element* const at = from.gates.at(row, unit);
        OSTINATO_UNROLL
        for (int g = 0; g < kInputs; g++) gates.x[g] = load_at(at + g * kHidden, rank * kUnits + unit);
        OSTINATO_UNROLL
        for (int k = 0; k < Cell::kDrives; k++)
            gates.drives[k] = load_at(from.drives.at(row, unit) + k * kHidden, rank * kUnits + unit);
    }

    // How the rows of a group begin at time `next`. With several groups less than a step lies between a read of the input product
    // and its use, so that of `next` goes into the second cache level.
    OSTINATO_DEVICE void look_ahead(const Arrays& from, int away, int t, int next, int group, Start (&starts)[kPairs]) const {
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
                const Element* const at = from.gates.shifted(from.gates.at(row, unit), away);
                OSTINATO_UNROLL
                for (int g = 0; g < kInputs; g++) prefetch(at + g * kHidden);
                OSTINATO_UNROLL
                for (int k = 0; k < Cell::kDrives; k++)
                    prefetch(from.drives.shifted(from.drives.at(row, unit), away) + k * kHidden);
            }
        }
    }

    // `next` is how the row begins after this step. load() reads what the next turn needs of the input product as soon as this one has
    // used its own: it is on its way for a whole turn, and takes no other registers.
    template <class Load>
    OSTINATO_DEVICE void step(int s, int t, int group, const Arrays& arrays, const Gates& gates, Start next, int pair,
                              const typename Shared::Sums* sums, Load load) {
        const int place = pair / (kUnits / 2), unit = pair % (kUnits / 2) * 2, r = group * kGroupRows + place;
        const Row row = shared.rows[r];
        Pair h{shared.h[r][unit], shared.h[r][unit + 1]};
        if (!loop.is_active(row, t)) {
            load();
        } else {
            Value a[2][places(kGates)], x[2][places(kApart<Cell>)], drives[2][places(Cell::kDrives)];
            x[0][0] = x[1][0] = 0.0f;
            OSTINATO_UNROLL
            for (int i = 0; i < 2; i++) {
                OSTINATO_UNROLL
                for (int g = 0; g < kGates; g++) {
                    float sum = shared.bias[g][unit + i];
                    if constexpr (kHasProduct<Cell>) {
                        OSTINATO_UNROLL
                        for (int slice = 0; slice < Shared::Product::kSlices; slice++)
                            sum += (*sums)[slice][g][place][unit + i];
                    }
                    if (Cell::is_joint(g)) {
                        const Pair input = widen(gates.x[g < kInputs ? g : 0]);
                        sum += i ? input.b : input.a;
                    }
                    a[i][g] = sum;
                }
                OSTINATO_UNROLL
                for (int g = 0; g < kInputs; g++) {
                    if (Cell::is_joint(g)) continue;
                    const Pair input = widen(gates.x[g]);
                    const int apart = count_below(kInputsApart<Cell>, g);
                    x[i][apart] = (i ? input.b : input.a) + shared.bias[kGates + apart][unit + i];
                }
                OSTINATO_UNROLL
                for (int k = 0; k < Cell::kDrives; k++) {
                    const Pair both = widen(gates.drives[k]);
                    drives[i][k] = i ? both.b : both.a;
                }
            }
            load();
            Value after[2][1 + kBehind], saved[2][places(Cell::kSaved)];
            OSTINATO_UNROLL
            for (int i = 0; i < 2; i++) {
                Value before[1 + kBehind], parameters[places(Cell::kParameters)];
                before[0] = i ? h.b : h.a;
                OSTINATO_UNROLL
                for (int k = 0; k < kBehind; k++) before[1 + k] = shared.c[k][r][unit + i];
                shared.read_parameters(unit + i, parameters);
                Cell::forward(a[i], x[i], before, parameters, drives[i], after[i], saved[i]);
            }
            const int global = rank * kUnits + unit;
            h = of_units<Cell>({after[0][0].value, after[1][0].value}, global);
            store_at(arrays.y.at(row, unit), global, h);
            if (call.reserve) {
                Element* const to = arrays.reserve.at(row, unit);
                OSTINATO_UNROLL
                for (int k = 0; k < Cell::kSaved; k++)
                    store_at(to + k * kHidden, global, Pair{saved[0][k].value, saved[1][k].value});
            }
            if (next != Start::kNot) h = initial(call.h_0, call.reset_h, row, next, unit);
            keep(shared.h[r], unit, h);
            OSTINATO_UNROLL
            for (int k = 0; k < kBehind; k++) {
                Pair c{after[0][1 + k].value, after[1][1 + k].value};
                if (call.cells) store_at(arrays.cells.at(row, unit) + k * kHidden, global, c);
                if (next != Start::kNot) c = initial<kBehind>(call.c_0, call.reset_c, row, next, unit, k);
                keep(shared.c[k][r], unit, c);
            }
        }
        if constexpr (kHasProduct<Cell>)
            if (s + 1 < loop.steps) send(s + 1, group, place, unit, h);
    }

    OSTINATO_DEVICE void end() const {
        OSTINATO_ROLLED
        for (int group = 0; group < kGroups; group++) OSTINATO_ROLLED
        for (int pair = thread_index(); pair < kGroupPairs; pair += kThreads) {
            const int unit = pair % (kUnits / 2) * 2, r = group * kGroupRows + pair / (kUnits / 2);
            const Row row = shared.rows[r];
            if (row.index < 0) continue;
            const auto write = [&](Element* to, const float (&values)[kUnits]) {
                store_units(to, rank * kUnits + unit, Pair{values[unit], values[unit + 1]});
            };
            write(state_row(static_cast<Element*>(call.h_n), loop, row.index), shared.h[r]);
            OSTINATO_UNROLL
            for (int k = 0; k < kBehind; k++)
                write(state_row<kBehind>(static_cast<Element*>(call.c_n), loop, row.index, k), shared.c[k][r]);
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
        if constexpr (kHasProduct<Cell>) product.load(shared.weights, static_cast<const Element*>(call.weight_hh), rank);
        block_barrier();  // orders biases, states and, of one block alone, what it sent itself
        Arrays at = arrays();
        Gates gates[kPairs] = {};
        OSTINATO_UNROLL
        for (int e = 0; e < kPairs; e++)
            if (is_mine(pair_of(e))) load_gates(at, loop.time(0), 0, pair_of(e), gates[e]);
        OSTINATO_ROLLED
        for (int s = 0, t = loop.time(0), turn = loop.direction ? -1 : 1; s < loop.steps; s++, t += turn) {
            const int next = t + turn, away = loop.rows_between(t, turn);
            OSTINATO_ROLLED
            for (int group = 0; group < kGroups; group++) {
                Start starts[kPairs];
                look_ahead(at, away, t, next, group, starts);
                const typename Shared::Sums* sums = nullptr;
                if constexpr (kHasProduct<Cell>) {
                    await(s, group);
                    sums = &shared.sums[group % Shared::kSums];
                    product.multiply(shared.weights, state_of(s, group), shared.sums[group % Shared::kSums]);
                    block_barrier();  // orders the sums
                }
                const bool is_last = group + 1 == kGroups;
                if (is_last) at.gates.move(away), at.drives.move(away);
                OSTINATO_UNROLL
                for (int e = 0; e < kPairs; e++) {
                    const int pair = pair_of(e);
                    const auto load = [&] { load_gates(at, is_last ? next : t, is_last ? 0 : group + 1, pair, gates[e]); };
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
    static_assert(kFits<Cell>, "one block alone, or blocks that exchange what a product reads");
    ForwardLoop<Cell, Math>{call, shared, Loop{call.batch, task.direction, 0}, block_index() % kBlocks, task}.run();
}

}  // namespace
}  // namespace ostinato
