// One step of an own cell in the time loops: products, then the program on their sums. `Step` is that of ForwardLoop or
// BackwardLoop, which say what its members are.
#pragma once

#include "own.h"

namespace ostinato {
namespace {

template <class T, class Step>
struct OwnForward {
    static constexpr int64_t L = Vec<T>::kLanes, G = Own::kGates, kRows = Strip<T>::kRows, kBlocks = Strip<T>::kBlocks;
    using Projection = Product<T>;

    const Step& s;

    // Rows [b0, b1) of the unit blocks [u0, u1), in strips.
    void units(int64_t b0, int64_t b1, int64_t u0, int64_t u1) const {
        for (int64_t b = b0; b < b1; b += kRows)
            for (int64_t u = u0; u < u1; u += kBlocks) strip(b, min(b1, b + kRows), u, min(u1, u + kBlocks));
    }

    // One step of a few rows, the weights where they lie.
    void few_rows(int n, int64_t u0, int64_t u1) const {
        const int64_t I = s.w.size_.input, O = s.w.size_.output(), hp = s.w.hp_, row = s.w.input_gates() * hp;
        const T* rows[Projection::kFewRows];
        for (int64_t u = u0; u < u1; u += kBlocks) {
            const int64_t end = min(u1, u + kBlocks);
            const Strip<T> strip = strip_of(0, u);
            for (int64_t block = u; block < end; block++) {
                for (int64_t k0 = 0; k0 < I; k0 += Projection::kDepth) {
                    for (int r = 0; r < n; r++) rows[r] = s.w.weight(s.w.f_.x) + r * s.w.size_.input_row() + k0;
                    const T* weight = s.w.weight(s.w.f_.weights[s.d].ih) + k0;
                    const int64_t depth = min(I - k0, Projection::kDepth);
                    in_place(s.w.input_gates(), n, rows, weight, I, depth, block, [&](int64_t g, int r, Vec<T> sum) {
                        const int64_t column = g * hp + block * L;
                        const T* before = k0 ? s.gx + r * row + column : s.w.start_ + s.d * row + column;
                        (sum + Vec<T>::load(before)).store(s.gx + r * row + column);
                    });
                }
                const T* weight = s.w.weight(s.w.f_.weights[s.d].hh);
                in_place(s.w.gates(), n, s.previous, weight, O, O, block, [&](int64_t g, int r, Vec<T> sum) {
                    sum.store(strip.sums + r * strip.row_stride + g * strip.gate_stride + (block - u) * L);
                });
            }
            run(strip, 0, n, u, end);
        }
    }

private:
    Strip<T> strip_of(int64_t b, int64_t u) const {
        constexpr int64_t kWidth = kBlocks * L;
        T* sums = s.w.sums_ + s.member * kRows * s.w.gates() * kWidth;
        return {sums, s.w.gates() * kWidth, kWidth, b, u * L, 0};
    }

    void strip(int64_t b0, int64_t b1, int64_t u0, int64_t u1) const {
        Strip<T> strip = strip_of(b0, u0);
        const T* panel = s.panels - s.first_block * s.w.panel_;
        const int64_t O = s.w.size_.output();
        for (int64_t first = 0; first < s.w.gates(); first += G) {
            strip.gates = static_cast<int>(min(G, s.w.gates() - first));
            const RowPanels<T> p{s.previous, O, panel, s.w.panel_, strip.gates * L, Strip<T>::take, &strip};
            multiply_gates(strip.gates, p, b0, b1, u0, u1);
            strip.sums += strip.gates * strip.gate_stride;
            panel += O * strip.gates * L;
        }
        run(strip_of(b0, u0), b0, b1, u0, u1);
    }

    // The program on the sums of a strip.
    __attribute__((noinline)) void run(const Strip<T>& strip, int64_t b0, int64_t b1, int64_t u0, int64_t u1) const {
        const Sizes& z = s.w.size_;
        const int64_t hp = s.w.hp_, H = z.hidden, E = s.w.behind();
        const Interpreter<T> interpreter = s.w.interpreter(s.member);
        Frame<T> f;
        f.hp = hp, f.sums_stride = strip.gate_stride, f.first = strip.first_unit;
        f.apart = s.w.apart_ + s.d * s.w.gates() * hp;
        f.parameters = s.w.parameters_ + s.d * z.cell.parameters * hp;
        f.drive_stride = H, f.cells_stride = H;
        for (int64_t b = b0; b < b1; b++) {
            f.sums = strip.sums + (b - b0) * strip.row_stride;
            f.gx = s.gx + (b - s.gx_first) * s.w.input_gates() * hp;
            f.h = s.previous[b];
            T* c_row = s.c + b * E * hp;
            f.behind = c_row, f.behind_stride = hp;
            if (s.cut.has(b)) {
                const T* anew = s.w.weight(s.w.f_.reset_c);
                f.behind = anew ? anew + (s.d * z.batch + b) * E * H : s.w.zeros_;
                f.behind_stride = anew ? H : 0;
            }
            f.drives = s.w.weight(s.w.f_.x) + (s.row0 + b) * z.input_row() + z.input;
            f.next_h = s.y + b * s.ld_y, f.next_behind = c_row;
            if (s.w.f_.cells) f.cells = static_cast<T*>(s.w.f_.cells) + ((s.row0 + b) * z.directions + s.d) * E * H;
            f.save = s.reserve ? s.reserve + b * s.values * hp : nullptr;
            interpreter.run(f, u0 * L, u1 * L, H);
            if (f.save) end_of_row(f.save, c_row, u0, u1);
        }
    }

    // What the program does not keep: states behind h where these are all that is kept; and lanes past the last block, which are
    // nobody's, but reserve is to be a function of the inputs.
    void end_of_row(T* kept, const T* c_row, int64_t u0, int64_t u1) const {
        const int64_t hp = s.w.hp_;
        if (s.w.size_.recompute)
            for (int64_t k = 0; k < s.values; k++)
                for (int64_t j = u0 * L; j < u1 * L; j += L) Vec<T>::load(c_row + k * hp + j).store(kept + k * hp + j);
        if (u1 < s.w.blocks_) return;
        for (int64_t k = 0; k < s.values; k++)
            for (int64_t j = u1 * L; j < hp; j += L) Vec<T>(0).store(kept + k * hp + j);
    }

    // Hands take(gate, row, sum) the products of rows [n] with one block of each gate of a weight [gates*H, ld].
    template <class Take>
    void in_place(int64_t gates, int n, const T* const* rows, const T* weight, int64_t ld, int64_t depth, int64_t u,
                  const Take& take) const {
        const int64_t H = s.w.size_.hidden;
        for (int64_t first = 0; first < gates; first += G) {
            const int count = static_cast<int>(min(G, gates - first));
            Vec<T> acc[Projection::kFewRows * G];
            WeightRows<T> blocks[G];
            for (int g = 0; g < count; g++) blocks[g] = {weight + ((first + g) * H + u * L) * ld, min(L, H - u * L)};
            multiply_weight_rows(acc, 1, n, count, rows, blocks, ld, depth);
            for (int r = 0; r < n; r++)
                for (int g = 0; g < count; g++) take(first + g, r, acc[r * count + g]);
        }
    }
};

template <class T, class Step>
struct OwnBackward {
    static constexpr int64_t L = Vec<T>::kLanes;

    const Step& s;

    // The program on what has arrived for rows [b0, b1) of the unit blocks [u0, u1).
    void run(int64_t b0, int64_t b1, int64_t u0, int64_t u1) const {
        const Sizes& z = s.z;
        const int64_t hp = s.w.hp_, H = z.hidden, E = s.w.behind();
        const Interpreter<T> interpreter = s.w.interpreter(s.member);
        Frame<T> f;
        f.hp = hp, f.drive_stride = H, f.drive_slot = s.w.f_.program->drive_slot();
        f.parameters = s.w.parameters_ + s.d * z.cell.parameters * hp;
        for (int64_t b = b0; b < b1; b++) {
            const bool is_cut = s.cut.has(b);
            const auto before = s.w.previous_cells(s.d, s.s, b, is_cut);
            T* dc = s.w.dc_ + (s.d * z.batch + b) * E * hp;
            if (s.w.f_.dcells) add_cells(dc, b, u0, u1);
            f.h = s.w.previous_row(s.d, s.s, b, is_cut);
            f.behind = before.row ? before.row : s.w.zeros_, f.behind_stride = before.row ? before.stride : 0;
            f.drives = s.w.in(s.w.f_.x) + (s.row0 + b) * z.input_row() + z.input;
            if (z.cell.saved) f.saved = s.w.saved_row(s.d, s.row0 + b);
            if (s.w.f_.y) f.output = s.w.in(s.w.f_.y) + (s.row0 + b) * z.directions * H + s.d * H;
            f.grad_h = s.dh + b * s.w.op_, f.grad_behind = dc;
            f.slots = s.grads + b * s.w.row_;
            f.to_h = s.w.direct_ + (s.d * z.batch + b) * s.w.op_, f.to_behind = dc;
            interpreter.run(f, u0 * L, u1 * L, H);
            if (is_cut) end_at_cut(dc, b, u0, u1);
        }
    }

private:
    // The gradients of the states behind h after this step.
    void add_cells(T* dc, int64_t b, int64_t u0, int64_t u1) const {
        const int64_t H = s.z.hidden, E = s.w.behind();
        const T* dcells = s.w.in(s.w.f_.dcells) + ((s.row0 + b) * s.z.directions + s.d) * E * H;
        for (int64_t k = 0; k < E; k++)
            for (int64_t unit = u0 * L; unit < u1 * L; unit += L) {
                T* to = dc + k * s.w.hp_ + unit;
                (Vec<T>::load(to) + load_n(dcells + k * H + unit, min(L, H - unit))).store(to);
            }
    }

    void end_at_cut(T* dc, int64_t b, int64_t u0, int64_t u1) const {
        const int64_t E = s.w.behind();
        for (int64_t k = 0; k < E; k++)
            for (int64_t unit = u0 * L; unit < u1 * L; unit += L) {
                T* of_state = dc + k * s.w.hp_ + unit;
                s.end_at_cut(Vec<T>::load(of_state), s.w.f_.dreset_c, b * E + k, unit, s.z.hidden, E).store(of_state);
            }
    }
};

}  // namespace
}  // namespace ostinato
