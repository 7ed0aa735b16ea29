// An own cell as the time loops take it: what a built-in cell says when it is compiled, this says when it runs.
#pragma once

#include "interpreter.h"
#include "sequence.h"

namespace ostinato {
namespace {

struct Own {
    static constexpr bool kIsProgram = true;
    // Gates whose products a register tile takes at once.
    static constexpr int kGates = 4;
    static constexpr bool kHasC = true, kProjects = false, kUsesPrevious = true, kUsesOutput = true;
};

template <class C>
constexpr bool is_program() {
    return false;
}
template <>
constexpr bool is_program<Own>() {
    return true;
}

// The sums of one strip of rows and units, for the program that reads them: of gate g at sums + g * gate_stride.
template <class T>
struct Strip {
    // Rows and unit blocks whose products are followed by the program.
    static constexpr int64_t kRows = 32, kBlocks = max(8, Interpreter<T>::kWide);

    T* sums;
    int64_t row_stride, gate_stride, first_row, first_unit;
    int gates;  // of this product

    static void take(const void* strip, Vec<T>* sums, int rows, int64_t b, int64_t unit) {
        const Strip& s = *static_cast<const Strip*>(strip);
        for (int r = 0; r < rows; r++) {
            T* to = s.sums + (b + r - s.first_row) * s.row_stride + unit - s.first_unit;
            for (int g = 0; g < s.gates; g++, to += s.gate_stride) (sums++)->store(to);
        }
    }
};

// multiply_tiles for a number of vectors that is known when it runs.
template <class T>
void multiply_gates(int gates, const RowPanels<T>& panels, int64_t b0, int64_t b1, int64_t u0, int64_t u1) {
    switch (gates) {
        case 1:
            return multiply_tiles<1>(panels, b0, b1, u0, u1);
        case 2:
            return multiply_tiles<2>(panels, b0, b1, u0, u1);
        case 3:
            return multiply_tiles<3>(panels, b0, b1, u0, u1);
        case 4:
            return multiply_tiles<4>(panels, b0, b1, u0, u1);
        default:
            return;
    }
}

// Numbers per unit, [P, H], as programs read them: [P, Hp], zero past the last unit.
template <class T>
void copy_parameters(const T* from, const Sizes& sizes, int64_t hp, T* to) {
    for (int64_t k = 0; k < sizes.cell.parameters; k++)
        for (int64_t j = 0; j < hp; j++) to[k * hp + j] = j < sizes.hidden ? from[k * sizes.hidden + j] : T(0);
}

constexpr int64_t rows_of_gates(int64_t gates) {
    return gates <= 1   ? max_tile_rows<1>()
           : gates == 2 ? max_tile_rows<2>()
           : gates == 3 ? max_tile_rows<3>()
                        : max_tile_rows<4>();
}

}  // namespace
}  // namespace ostinato
