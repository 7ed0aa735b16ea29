// What the engine computes: one recurrent layer, one or two directions, forward and backward. Addresses and sizes only.
//
// Legend: T steps, B batch rows, N rows of the packed layout (the sum of batch_sizes; T * B where there are none),
// I input, H hidden, O output (the projection's size, or H), G gates, D directions, E states behind h (an LSTM's c; own cells
// may have more, beside each other in one array), P numbers per unit. All arrays are dense and row-major.
#pragma once

#include <cstdint>

#include "../cells.h"

namespace ostinato {

enum class Cell : int {};  // a place in EveryCell, or the number of an own cell (program.h)
constexpr int kCells = EveryCell::kSize;

template <class Value>
struct OfEachCell {
    Value values[kCells];

    constexpr const Value& operator[](Cell cell) const { return values[static_cast<int>(cell)]; }
};

// How the arrays of a call are stored. The 16-bit types are computed in float32 (narrow.h).
enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kDtypes = 4;

// Bytes of a value where it is stored, and where it is computed with or kept for backward.
constexpr int64_t stored_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }
constexpr int64_t computed_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

template <class... C>
constexpr OfEachCell<Traits> traits_of_each(List<C...>) {
    return {{traits<C>()...}};
}
inline constexpr OfEachCell<Traits> kTraits = traits_of_each(EveryCell());

constexpr int kMostGates = 8;  // of the input or of the state
constexpr int kFirstOwn = 1000;  // the first number of an own cell

struct Program;
// An own cell's: what `define_cell` was given. Null for a number that no cell has.
const Program* program_of(Cell cell);
const Traits& traits_of_program(Cell cell);

inline const Traits& traits_of(Cell cell) { return static_cast<int>(cell) < kCells ? kTraits[cell] : traits_of_program(cell); }
inline bool is_cell(int cell) { return cell >= 0 && (cell < kCells || program_of(static_cast<Cell>(cell))); }

struct Sizes {
    int64_t steps, rows, batch, input, hidden, projection, directions;
    const int64_t* batch_sizes;  // [T] non-increasing, active rows per step; null: B at every step
    Traits cell{};
    bool recompute = false;  // forward keeps no gates, only the states behind h; backward computes them again

    constexpr int64_t output() const { return projection ? projection : hidden; }
    constexpr int64_t behind() const { return cell.behind * hidden; }
    // Of a row of x: the input's numbers, and what drives the step behind them.
    constexpr int64_t input_row() const { return input + cell.drives * hidden; }
};

// ---- the arrays of a call ----

namespace {

// N, D * B, B, rows of weight_ih, of weight_hh, O, P, not in rows
enum class Rows { kSteps, kStates, kBatch, kInputGates, kGates, kOutput, kParameters, kNone };
// 1, I, I and what drives a step, O, H, E * H, D * O, D * E * H
enum class Width { kOne, kInput, kInputRow, kOutput, kHidden, kBehind, kOutputs, kBehinds };
enum class Type { kValue, kFlag, kInt64, kOpaque };  // of the call's dtype, a byte that is 0 or 1, int64_t, `reserve`

// What is known of an array without its address. A pointer to const says that it is read, another that it is written.
struct Array {
    const char* name;  // as Python knows it
    Rows rows;
    Width width;
    Type type = Type::kValue;

    constexpr bool has_rows_of_batch() const { return rows == Rows::kSteps || rows == Rows::kStates; }
    // A weight of two dimensions.
    constexpr bool is_matrix() const {
        return width != Width::kOne && (rows == Rows::kInputGates || rows == Rows::kGates || rows == Rows::kOutput);
    }

    constexpr int64_t height(const Sizes& z) const {
        switch (rows) {
            case Rows::kSteps:
                return z.rows;
            case Rows::kStates:
                return z.directions * z.batch;
            case Rows::kInputGates:
                return z.cell.input_gates * z.hidden;
            case Rows::kGates:
                return z.cell.gates * z.hidden;
            case Rows::kOutput:
                return z.output();
            case Rows::kParameters:
                return z.cell.parameters;
            default:
                return z.batch;
        }
    }
    constexpr int64_t row_values(const Sizes& z) const {
        switch (width) {
            case Width::kInput:
                return z.input;
            case Width::kInputRow:
                return z.input_row();
            case Width::kOutput:
                return z.output();
            case Width::kHidden:
                return z.hidden;
            case Width::kBehind:
                return z.behind();
            case Width::kOutputs:
                return z.directions * z.output();
            case Width::kBehinds:
                return z.directions * z.behind();
            default:
                return 1;
        }
    }
    constexpr int64_t row_bytes(const Sizes& z, Dtype dtype) const {
        return row_values(z) * (type == Type::kValue ? stored_bytes(dtype) : type == Type::kFlag ? 1 : 8);
    }
};

template <class Pointer>
void point(Pointer& p, void* to) {
    p = static_cast<Pointer>(to);
}
// Null stays null.
template <class Pointer>
Pointer moved(Pointer p, int64_t bytes) {
    return p ? reinterpret_cast<Pointer>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) : nullptr;
}

}  // namespace

// Parameters of one direction, or in backward their gradients; null where absent or not wanted.
template <class Pointer>
struct Weights {
    Pointer ih = nullptr, hh = nullptr;  // [G*H, I], [G*H, O]; an own cell's G of the input and of the state may differ
    Pointer bias_ih = nullptr, bias_hh = nullptr;  // [G*H]
    Pointer hr = nullptr;  // [O, H]
    Pointer per_unit = nullptr;  // [P, H]

    template <class Visit>
    constexpr void visit(const char* name, Weights& other, const Visit& visit) const {
        visit(Array{name, Rows::kInputGates, Width::kInput}, ih, other.ih);
        visit(Array{name, Rows::kGates, Width::kOutput}, hh, other.hh);
        visit(Array{name, Rows::kInputGates, Width::kOne}, bias_ih, other.bias_ih);
        visit(Array{name, Rows::kGates, Width::kOne}, bias_hh, other.bias_hh);
        visit(Array{name, Rows::kOutput, Width::kHidden}, hr, other.hr);
        visit(Array{name, Rows::kParameters, Width::kHidden}, per_unit, other.per_unit);
    }
};

// Each struct below declares its arrays as members and lists them in `visit` with their rows, width and type, in the order in
// which Python passes them. The bindings, 16-bit storage, lengths and pieces of a batch all go through `visit`. It calls
// visit(array, the pointer in this call, the pointer in `other`) for each.
//
// Arrays belong to the caller; null where absent: a state is zero then, a row has T steps and is never cut. Nothing may overlap
// what is written.

// What forward and backward both read. lengths and resets cut rows into pieces, each a sequence of its own in both
// directions. Where a direction's time loop enters a piece over a cut, it starts from reset_h and reset_c, otherwise from h_0
// and c_0; h_n and c_n are the states at the end of its last piece. A row of no steps passes its states on.
struct Arguments {
    Sizes sizes;
    const Program* program = nullptr;  // an own cell's
    const void *x = nullptr, *h_0 = nullptr, *c_0 = nullptr;
    const int64_t* lengths = nullptr;  // steps of each row of a padded batch
    const uint8_t* resets = nullptr;  // whether a row begins anew before this step
    const void *reset_h = nullptr, *reset_c = nullptr;
    Weights<const void*> weights[2] = {};

    template <class Visit>
    constexpr void visit(Arguments& other, const Visit& visit) const {
        visit(Array{"input", Rows::kSteps, Width::kInputRow}, x, other.x);
        visit(Array{"h_0", Rows::kStates, Width::kOutput}, h_0, other.h_0);
        visit(Array{"c_0", Rows::kStates, Width::kBehind}, c_0, other.c_0);
        visit(Array{"lengths", Rows::kBatch, Width::kOne, Type::kInt64}, lengths, other.lengths);
        visit(Array{"resets", Rows::kSteps, Width::kOne, Type::kFlag}, resets, other.resets);
        visit(Array{"reset_h", Rows::kStates, Width::kOutput}, reset_h, other.reset_h);
        visit(Array{"reset_c", Rows::kStates, Width::kBehind}, reset_c, other.reset_c);
        for (int64_t d = 0; d < sizes.directions; d++) weights[d].visit("weights", other.weights[d], visit);
    }
};

struct Forward : Arguments {
    void *y = nullptr, *h_n = nullptr, *c_n = nullptr;  // y: zero past a row's end; an LSTM must have c_n
    void* cells = nullptr;  // c after every step of an LSTM
    void* reserve = nullptr;  // reserve_bytes() for backward
    bool has_bfloat16_weights = false;  // weight_ih, weight_hh and weight_hr are bfloat16, all else float32

    template <class Visit>
    constexpr void visit(Forward& other, const Visit& visit) const {
        Arguments::visit(other, visit);
        visit(Array{"output", Rows::kSteps, Width::kOutputs}, y, other.y);
        visit(Array{"h_n", Rows::kStates, Width::kOutput}, h_n, other.h_n);
        visit(Array{"c_n", Rows::kStates, Width::kBehind}, c_n, other.c_n);
        visit(Array{"cells", Rows::kSteps, Width::kBehinds}, cells, other.cells);
        visit(Array{"reserve", Rows::kNone, Width::kOne, Type::kOpaque}, reserve, other.reserve);
    }
};

// The gradients of y, h_n, c_n and cells come in (null: zero); the wanted ones go out, those of reset_h and reset_c as sums over
// all pieces of a row.
struct Backward : Arguments {
    const void *y = nullptr, *reserve = nullptr;  // y may be null where one step of a GRU or an LSTM was run
    const void *dy = nullptr, *dh_n = nullptr, *dc_n = nullptr, *dcells = nullptr;
    void *dx = nullptr, *dh_0 = nullptr, *dc_0 = nullptr, *dreset_h = nullptr, *dreset_c = nullptr;
    Weights<void*> grads[2] = {};
    bool resume = false;  // the sums in the gradients of the weights go on from what these hold; never in 16 bits

    template <class Visit>
    constexpr void visit(Backward& other, const Visit& visit) const {
        Arguments::visit(other, visit);
        visit(Array{"output", Rows::kSteps, Width::kOutputs}, y, other.y);
        visit(Array{"reserve", Rows::kNone, Width::kOne, Type::kOpaque}, reserve, other.reserve);
        visit(Array{"grad_output", Rows::kSteps, Width::kOutputs}, dy, other.dy);
        visit(Array{"grad_h_n", Rows::kStates, Width::kOutput}, dh_n, other.dh_n);
        visit(Array{"grad_c_n", Rows::kStates, Width::kBehind}, dc_n, other.dc_n);
        visit(Array{"grad_cells", Rows::kSteps, Width::kBehinds}, dcells, other.dcells);
        visit(Array{"grad_input", Rows::kSteps, Width::kInputRow}, dx, other.dx);
        visit(Array{"grad_h_0", Rows::kStates, Width::kOutput}, dh_0, other.dh_0);
        visit(Array{"grad_c_0", Rows::kStates, Width::kBehind}, dc_0, other.dc_0);
        visit(Array{"grad_reset_h", Rows::kStates, Width::kOutput}, dreset_h, other.dreset_h);
        visit(Array{"grad_reset_c", Rows::kStates, Width::kBehind}, dreset_c, other.dreset_c);
        for (int64_t d = 0; d < sizes.directions; d++) grads[d].visit("grad_weights", other.grads[d], visit);
    }
};

namespace {

template <class Call>
constexpr int count_arrays(int64_t directions) {
    Call call{};
    call.sizes.directions = directions;
    int count = 0;
    call.visit(call, [&](const Array&, auto, auto&) { count++; });
    return count;
}

}  // namespace

class Team;

// Entry points of a time loop for one instruction set, cell and type. scratch holds at least as many bytes as were asked for,
// aligned to 64, its contents arbitrary.
template <class Call>
struct Loop {
    int64_t (*scratch_bytes)(const Call&, int members);
    void (*run)(const Call&, Team&, void* scratch);
};
struct Kernel : Loop<Forward>, Loop<Backward> {};
struct Kernels {
    OfEachCell<Kernel> built_in;
    Kernel own;

    constexpr const Kernel& operator[](Cell cell) const { return static_cast<int>(cell) < kCells ? built_in[cell] : own; }
};

// Units are stored in multiples of this many in reserve and scratch, so that both are the same on every instruction set.
constexpr int64_t padded(int64_t units) { return (units + 15) / 16 * 16; }

// Multiply-adds of a step that are worth sharing: a relay's barrier costs some hundred nanoseconds.
constexpr int64_t kWorthRelay = 1 << 15;

// ---- dispatch.cpp ----

// Memory aligned to 64 bytes, for std::free; large memory in large pages, where there are such. Throws std::bad_alloc.
void* allocate(int64_t bytes);

// Of `reserve`, for sizes as they are given to run.
int64_t reserve_bytes(Cell cell, Dtype dtype, const Sizes& sizes);

// Call: Forward or Backward.
template <class Call>
void run(Cell cell, Dtype dtype, const Call& call, int threads);

// Calls of one size that know nothing of each other, with the bits that each has alone. Where there are at least as many as
// threads, or where one is not worth sharing, each runs in one thread.
template <class Call>
void run_all(Cell cell, Dtype dtype, const Call* calls, int64_t count, int threads);

// Names of the instruction sets that this processor can run, best first; null at `index` past the end.
const char* isa_name(int index);
const char* active_isa();
bool select_isa(const char* name);

}  // namespace ostinato
