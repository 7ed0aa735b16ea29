// What an own cell computes: a program for each direction of the time loop, which interpreter.h runs. An instruction names an
// operation, a register for its result, and registers or an index.
//
// Python makes programs (src/ostinato/own/encoding.py); `define_cell` checks that none leaves its arrays.
#pragma once

#include <cstdint>

#include "engine.h"
#include "functions.h"

namespace ostinato {

// clang-format off
// Index: of a gate, a state, a parameter, a drive, a value that forward kept.
#define OSTINATO_LOADS(X) X(gate) X(x) X(h) X(state) X(parameter) X(drive) X(saved) X(output) X(grad)
#define OSTINATO_STORES(X) X(next) X(save) X(slot) X(to_state) X(to_drive)
// By functions of these names over the lane type (functions.h, interpreter.h).
#define OSTINATO_UNARY(X) X(neg) X(logical_not) OSTINATO_FUNCTIONS(X)
#define OSTINATO_BINARY(X) \
    X(add) X(sub) X(mul) X(div) X(minimum) X(maximum) X(lt) X(le) X(gt) X(ge) X(eq) X(ne) X(logical_and) X(logical_or) \
    X(sigmoid_times_tanh) X(sigmoid_slope) X(tanh_slope) X(relu_slope)
#define OSTINATO_TERNARY(X) X(fma) X(fnma) X(select)
#define OSTINATO_OPERATIONS(X) \
    OSTINATO_LOADS(X) OSTINATO_STORES(X) OSTINATO_UNARY(X) OSTINATO_BINARY(X) OSTINATO_TERNARY(X)
// clang-format on

#define OSTINATO_ENUMERATOR(name) k_##name,
enum class Operation : uint8_t { OSTINATO_OPERATIONS(OSTINATO_ENUMERATOR) };
#undef OSTINATO_ENUMERATOR

// A load writes register `to` from what index `a` says, a store's index is `to` and its register `a`; else registers all.
struct Instruction {
    Operation operation;
    uint8_t to, a, b, c;
};

// Numbers stand in the first registers, and nothing overwrites them. All loads of states come before all stores.
struct Code {
    const Instruction* first;
    int64_t count;
    const double* numbers;
    int64_t number_count, registers;
};

struct Program {
    Traits traits;
    // The slot of a gate's gradient among those of backward. Hidden products come first, in order; then those of the input that
    // have a slot of their own; then parameters, then drives. A gate that takes both products in one sum has one slot.
    uint8_t input_slots[kMostGates];
    Code forward, forward_keep, backward;

    bool is_joint(int64_t input_gate) const { return input_slots[input_gate] < traits.gates; }
    int64_t parameter_slot() const { return traits.grads - traits.drives - traits.parameters; }
    int64_t drive_slot() const { return traits.grads - traits.drives; }
};

}  // namespace ostinato
