// Runs an own cell's program over vectors of units.
//
// An instruction works on several vectors at once, so that finding out what to do costs little beside doing it, and chains of
// several vectors hide each other's latency. Registers lie in memory, in the first-level cache.
#pragma once

#include "../cells.h"
#include "functions.h"
#include "gemm.h"
#include "program.h"
#include "vec.h"

namespace ostinato {
namespace {

// Where a program finds what it loads, and puts what it stores, of one row: arrays begin at the first unit of the layer. What is
// counted (gates, states behind h, ...) lies `hp` apart where nothing else is said.
template <class T>
struct Frame {
    int64_t hp = 0;
    // Loads of forward. Sums of one strip of units: from `first` on.
    const T *sums = nullptr, *gx = nullptr, *apart = nullptr;
    int64_t sums_stride = 0, first = 0;
    // Loads of both. These have as many numbers as there are units, and no more.
    const T *h = nullptr, *behind = nullptr, *drives = nullptr;
    int64_t behind_stride = 0, drive_stride = 0;
    const T* parameters = nullptr;
    // Loads of backward. The output has no more numbers than there are units.
    const T *saved = nullptr, *output = nullptr, *grad_h = nullptr, *grad_behind = nullptr;
    // Stores of forward. h and the caller's `cells` have no more numbers than there are units.
    T *next_h = nullptr, *next_behind = nullptr, *cells = nullptr, *save = nullptr;
    int64_t cells_stride = 0;
    // Stores of backward; drives have slots too, behind the others.
    T *slots = nullptr, *to_h = nullptr, *to_behind = nullptr;
    int64_t drive_slot = 0;
};

template <class T>
OSTINATO_INLINE Vec<T> add(Vec<T> a, Vec<T> b) {
    return a + b;
}
template <class T>
OSTINATO_INLINE Vec<T> sub(Vec<T> a, Vec<T> b) {
    return a - b;
}
template <class T>
OSTINATO_INLINE Vec<T> mul(Vec<T> a, Vec<T> b) {
    return a * b;
}
template <class T>
OSTINATO_INLINE Vec<T> div(Vec<T> a, Vec<T> b) {
    return a / b;
}
template <class T>
OSTINATO_INLINE Vec<T> neg(Vec<T> a) {
    return -a;
}

template <class T>
struct Interpreter {
    static constexpr int L = Vec<T>::kLanes;
    // Vectors of a register: 64 units of float32 on every instruction set.
    static constexpr int kWide = 256 / kVectorBytes;

    const Code* code;
    Vec<T>* registers;  // [code->registers][kWide]

    static int64_t scratch(const Code& code) { return code.registers * kWide * L; }

    void load_numbers() const {
        for (int64_t i = 0; i < code->number_count; i++)
            for (int v = 0; v < kWide; v++) registers[i * kWide + v] = Vec<T>(static_cast<T>(code->numbers[i]));
    }

    // Units [unit, end), of which those from `hidden` on do not exist.
    void run(const Frame<T>& f, int64_t unit, int64_t end, int64_t hidden) const {
        for (; unit < end; unit += kWide * L) {
            const int64_t left = min((end - unit) / L, kWide);
            const int n = static_cast<int>(left);
            const int64_t lanes = min(L, hidden - (unit + (n - 1) * L));
            if (n == kWide)
                vectors<kWide>(f, unit, n, lanes);
            else
                vectors<0>(f, unit, n, lanes);
        }
    }

private:
    // N vectors, or n where N is 0; the last has so many lanes that exist.
    template <int N>
    __attribute__((noinline)) void vectors(const Frame<T>& f, int64_t unit, int n, int64_t lanes) const {
        const int count = N ? N : n;
        const auto load = [&](Vec<T>* to, const T* from) {
        _Pragma("GCC unroll 4") for (int v = 0; v < count; v++) to[v] = Vec<T>::load(from + unit + v * L);
        };
        const auto load_rest = [&](Vec<T>* to, const T* from) {
            _Pragma("GCC unroll 4") for (int v = 0; v < count - 1; v++) to[v] = Vec<T>::load(from + unit + v * L);
            to[count - 1] = load_n(from + unit + (count - 1) * L, lanes);
        };
        const auto store = [&](const Vec<T>* from, T* to) {
            _Pragma("GCC unroll 4") for (int v = 0; v < count; v++) from[v].store(to + unit + v * L);
        };
        const auto store_rest = [&](const Vec<T>* from, T* to) {
            _Pragma("GCC unroll 4") for (int v = 0; v < count - 1; v++) from[v].store(to + unit + v * L);
            store_n(from[count - 1], to + unit + (count - 1) * L, lanes);
        };
        const Instruction* const end = code->first + code->count;
        for (const Instruction* at = code->first; at != end; at++) {
            Vec<T>* const to = registers + at->to * kWide;
            const Vec<T>* const a = registers + at->a * kWide;
            const Vec<T>* const b = registers + at->b * kWide;
            const Vec<T>* const c = registers + at->c * kWide;
            const int64_t from = at->a, place = at->to;  // the index of a load, and of a store
            switch (at->operation) {
                case Operation::k_gate: {
                    const T *sums = f.sums + from * f.sums_stride + unit - f.first, *in = f.gx + from * f.hp + unit;
                    _Pragma("GCC unroll 4") for (int v = 0; v < count; v++) to[v] =
                        Vec<T>::load(sums + v * L) + Vec<T>::load(in + v * L);
                    break;
                }
                case Operation::k_h: {
                    const T *sums = f.sums + from * f.sums_stride + unit - f.first, *bias = f.apart + from * f.hp + unit;
                    _Pragma("GCC unroll 4") for (int v = 0; v < count; v++) to[v] =
                        Vec<T>::load(sums + v * L) + Vec<T>::load(bias + v * L);
                    break;
                }
                case Operation::k_x: load(to, f.gx + from * f.hp); break;
                case Operation::k_state: load_rest(to, from ? f.behind + (from - 1) * f.behind_stride : f.h); break;
                case Operation::k_parameter: load(to, f.parameters + from * f.hp); break;
                case Operation::k_drive: load_rest(to, f.drives + from * f.drive_stride); break;
                case Operation::k_saved: load(to, f.saved + from * f.hp); break;
                case Operation::k_output: load_rest(to, f.output); break;
                case Operation::k_grad: load(to, from ? f.grad_behind + (from - 1) * f.hp : f.grad_h); break;
                case Operation::k_next:
                    if (place == 0) {
                        store_rest(a, f.next_h);
                    } else {
                        store(a, f.next_behind + (place - 1) * f.hp);
                        if (f.cells) store_rest(a, f.cells + (place - 1) * f.cells_stride);
                    }
                    break;
                case Operation::k_save: store(a, f.save + place * f.hp); break;
                case Operation::k_slot: store(a, f.slots + place * f.hp); break;
                case Operation::k_to_drive: store(a, f.slots + (f.drive_slot + place) * f.hp); break;
                case Operation::k_to_state:
                    if (place)
                        store(a, f.to_behind + (place - 1) * f.hp);
                    else if (f.to_h)
                        store(a, f.to_h);
                    break;
#define OSTINATO_CASE1(name)                                                                             \
    case Operation::k_##name:                                                                            \
        _Pragma("GCC unroll 4") for (int v = 0; v < count; v++) to[v] = ostinato::name(a[v]);             \
        break;
#define OSTINATO_CASE2(name)                                                                             \
    case Operation::k_##name:                                                                            \
        _Pragma("GCC unroll 4") for (int v = 0; v < count; v++) to[v] = ostinato::name(a[v], b[v]);       \
        break;
#define OSTINATO_CASE3(name)                                                                             \
    case Operation::k_##name:                                                                            \
        _Pragma("GCC unroll 4") for (int v = 0; v < count; v++) to[v] = ostinato::name(a[v], b[v], c[v]); \
        break;
                    OSTINATO_UNARY(OSTINATO_CASE1)
                    OSTINATO_BINARY(OSTINATO_CASE2)
                    OSTINATO_TERNARY(OSTINATO_CASE3)
#undef OSTINATO_CASE1
#undef OSTINATO_CASE2
#undef OSTINATO_CASE3
            }
        }
    }
};

}  // namespace
}  // namespace ostinato
