// What both time loops share: the rows of a tile, which time a step is, where a row begins anew.
//
// A direction visits its steps as s = 0..S-1; step s is time s, or S-1-s in the reverse direction, where S is the length
// of the tile's longest row. A row is active at times t < length; outside of these its state stays what it is. That one rule
// covers padded and packed batches in both directions: forward, rows only ever end; reverse, they only ever begin.
#pragma once

#include "../cells.h"
#include "exchange.cuh"

namespace ostinato {
namespace {

// Legend: T steps, N rows of x (packed, or T * B), B batch, H hidden, D directions, G gates. A null pointer stands for what is
// absent. Everything belongs to the caller; nothing that is written overlaps anything.
struct Batch {
    i64 steps, rows, batch, directions;
    const i64* offsets;  // [T] row of x where a step begins; null: t * B
    const int* lengths;  // [B] steps of each row; null: T
    const int* order;  // [B] which row of the batch is where in a tile; null: as they come
    const u8* flags;  // [N] whether a row begins anew before this step
};

// The loop that a block belongs to: a tile of rows in one direction. All tiles of one direction come before those of the other.
// Where a device cannot run all loops at once, a launch begins at loop `first`; `launched` is a loop's place in its launch.
struct Task {
    int tile, direction, launched;
};
OSTINATO_DEVICE Task task_of(i64 first, i64 batch) {
    const int tiles = static_cast<int>((batch + kRows - 1) / kRows), launched = block_index() / kBlocks;
    const int loop = static_cast<int>(first) + launched;
    return {loop % tiles, loop / tiles, launched};
}

// Whether 0 <= i < end, of an end that is not negative.
OSTINATO_DEVICE bool is_within(int i, int end) { return static_cast<u32>(i) < static_cast<u32>(end); }

struct Row {
    int index, length;  // of the batch; no steps where there is no such row
};

// How a piece of a row begins, if one does: from h_0 and c_0, or from the states of resets.
enum class Start { kNot, kFirst, kReset };

struct Loop {
    Batch batch;
    int direction, steps;

    // Fills the rows of the tile; a barrier must follow.
    OSTINATO_DEVICE void fill(Row* rows, int tile) {
        for (int i = thread_index(); i < kRows; i += kThreads) {
            const i64 place = static_cast<i64>(tile) * kRows + i;
            Row row{-1, 0};
            if (place < batch.batch) {
                row.index = batch.order ? batch.order[place] : static_cast<int>(place);
                row.length = batch.lengths ? batch.lengths[row.index] : static_cast<int>(batch.steps);
            }
            rows[i] = row;
        }
    }
    OSTINATO_DEVICE void count_steps(const Row* rows) {
        steps = 0;
        for (int i = 0; i < kRows; i++) steps = largest(steps, rows[i].length);
    }

    OSTINATO_DEVICE int time(int s) const { return direction ? steps - 1 - s : s; }
    // The row of x, y and all that has a row per step. The row must be active.
    OSTINATO_DEVICE i64 place(const Row& row, int t) const { return first_row(t) + row.index; }
    OSTINATO_DEVICE i64 first_row(int t) const { return batch.offsets ? batch.offsets[t] : t * batch.batch; }
    // How many rows of x lie from time t to time t + turn, which is beside it: at most B, so 32 bits. Nothing is read by the
    // result where that time is no step.
    OSTINATO_DEVICE int rows_between(int t, int turn) const {
        if (!batch.offsets) return turn * static_cast<int>(batch.batch);
        const i64* const here = batch.offsets + opaque(t);
        return is_within(t + turn, steps) ? static_cast<int>(here[turn] - here[0]) : 0;
    }
    OSTINATO_DEVICE bool is_active(const Row& row, int t) const { return is_within(t, row.length); }

    // How in this direction an active row begins at time t.
    OSTINATO_DEVICE Start start(const Row& row, int t) const {
        const bool is_end = direction ? t == row.length - 1 : t == 0;
        // Forward a row is cut before this step, in reverse before the one it comes from; where it ends, it comes from nowhere.
        const bool is_cut = batch.flags && !(direction && is_end) && load(batch.flags + place(row, opaque(t) + direction));
        return is_cut ? Start::kReset : is_end ? Start::kFirst : Start::kNot;
    }
    // How the row begins altogether.
    OSTINATO_DEVICE Start first_start(const Row& row) const {
        return !direction && row.length > 0 ? start(row, 0) : Start::kFirst;
    }
};

// Whether all pairs of a thread are of the same units, and of the same row.
constexpr bool kIsOneUnit = kThreads % (kUnits / 2) == 0, kIsOneRow = kGroups == 1 && kPairs == 1;

// A thread's own units in an array that has a row for each row of x. The time loop moves `first` from step to step; from there to a
// row of the batch, as to the next step, it is one instruction: 32 bits times 32, added to 64. Where the thread has one row, `first`
// is already there. So steps of plain and of packed rows differ in how far a step lies from the next, and share the rest.
template <class T>
struct Walk {
    T* first;
    int bytes;  // of a row

    // `array`: the units of this block in the first of all rows; `row`: that of x where the step begins.
    OSTINATO_DEVICE Walk(T* array, int elements, const Row* rows, i64 row)
        : first(array), bytes(elements * static_cast<int>(sizeof(T))) {
        if (kIsOneRow && thread_index() < kGroupPairs) row += rows[thread_index() / (kUnits / 2)].index;
        first += row * elements + (kIsOneUnit ? thread_index() % (kUnits / 2) * 2 : 0);
    }
    OSTINATO_DEVICE T* shifted(T* from, int rows) const {
        char* const to = const_cast<char*>(reinterpret_cast<const char*>(from)) + multiply_wide(rows, bytes);
        return reinterpret_cast<T*>(to);
    }
    OSTINATO_DEVICE void move(int rows) { first = shifted(first, rows); }
    OSTINATO_DEVICE T* at(const Row& row, int unit) const {
        return (kIsOneRow ? first : shifted(first, row.index)) + (kIsOneUnit ? 0 : unit);
    }
};

// Opens a loop: the rows of the tile, its steps, and barriers that nobody has used.
template <class Shared>
OSTINATO_DEVICE void open(Shared& shared, Loop& loop, int tile) {
    loop.fill(shared.rows, tile);
    if constexpr (kExchange == Exchange::kCluster) {
        if (thread_index() == 0) {
            for (int i = 0; i < kBuffers * kGroups; i++) transaction_init(&shared.arrived[i / kGroups][i % kGroups]);
            transaction_publish();
        }
    }
    block_barrier();  // orders the rows
    loop.count_steps(shared.rows);
}

// Which pairs of units of a group a thread's epilogue works on.
OSTINATO_DEVICE int pair_of(int e) { return thread_index() + e * kThreads; }
OSTINATO_DEVICE bool is_mine(int pair) { return kGroupPairs % kThreads == 0 || pair < kGroupPairs; }

OSTINATO_DEVICE void keep(float (&values)[kUnits], int unit, Pair pair) { values[unit] = pair.a, values[unit + 1] = pair.b; }

// What of a pair goes into a product: zeros of units that do not exist, whose weights are zeros, but NaN times zero is NaN.
template <class Cell>
OSTINATO_DEVICE Pair of_units(Pair pair, int unit) {
    if (Cell::kIsFinite) return pair;
    return {is_unit(unit) ? pair.a : 0.0f, is_unit(unit + 1) ? pair.b : 0.0f};
}

// Row `index` of [D, B, H], or null; state `k` of `kAll` beside each other, [D, B, kAll * H].
template <int kAll = 1, class T>
OSTINATO_DEVICE T* state_row(T* states, const Loop& loop, int index, int k = 0) {
    return states ? states + (loop.direction * loop.batch.batch + index) * (kAll * kHidden) + k * kHidden : nullptr;
}

// What each unit of a block has of a cell's numbers per unit, [kParameters, H], in shared memory; nothing where there are none.
template <class Cell, bool kHasSome = (Cell::kParameters > 0)>
struct Parameters {
    float parameters[Cell::kParameters][kUnits];

    template <class Element>
    OSTINATO_DEVICE void load_parameters(const void* from, int rank) {
        OSTINATO_ROLLED
        for (int i = thread_index(); i < Cell::kParameters * kUnits; i += kThreads) {
            const int unit = rank * kUnits + i % kUnits;
            const auto* const row = static_cast<const Element*>(from) + i / kUnits * kHidden;
            parameters[i / kUnits][i % kUnits] = unit < kHidden ? widen(row[unit]) : 0.0f;
        }
    }
    template <class Value>
    OSTINATO_DEVICE void read_parameters(int unit, Value* values) const {
        OSTINATO_UNROLL
        for (int k = 0; k < Cell::kParameters; k++) values[k] = parameters[k][unit];
    }
};
template <class Cell>
struct Parameters<Cell, false> {
    template <class Element>
    OSTINATO_DEVICE void load_parameters(const void*, int) {}
    template <class Value>
    OSTINATO_DEVICE void read_parameters(int, Value*) const {}
};

// A place for each of so many; C++ has no arrays of none.
constexpr int places(int count) { return largest(count, 1); }

// How many input products stay apart.
template <class Cell>
constexpr int kApart = count_below(kInputsApart<Cell>, Cell::kInputGates);

// What a cell asks of a kernel's shape.
template <class Cell>
constexpr bool kHasProduct = Cell::kGates > 0;
template <class Cell>
constexpr bool kFits = kHasProduct<Cell> ? kExchange != Exchange::kBlock || kBlocks == 1 : kExchange == Exchange::kBlock;

// A slot of backward's gradients in memory. First come the hidden products that are alone, then the sums, then the input products
// apart, the parameters and the drives. So the first kGates belong to the hidden product, and the kInputGates behind those that
// are alone to the input product: each is a matrix for one product with x, h or weight_ih. A GRU has [n of the hidden product, r,
// z, n of the input product].
template <class Cell>
constexpr int position_of(int slot) {
    if (slot >= Cell::kGates) return slot;
    const int before = count_below(kHiddenAlone<Cell>, slot);
    return Cell::is_joint(slot) ? count_below(kHiddenAlone<Cell>, Cell::kGates) + slot - before : before;
}

}  // namespace
}  // namespace ostinato
