// The engine for one instruction set and one type that is computed with: this file is compiled once for each of both, with
// OSTINATO_ISA_NAME, OSTINATO_COMPUTED (float or double) and the flags of the set. Everything but the tables' names, which
// tell both, has internal linkage (tools/check_symbols.py holds that).
//
// What it costs to compile: register tiles, which are unrolled, depend on the type and the number of gates (sequence.h, gemm.h).
// Only what is compiled once for each cell may name a cell.
#include "backward.h"
#include "forward.h"
#include "narrow.h"

namespace ostinato {
namespace {

template <class T, class C>
constexpr Kernel kernel() {
    return {
        [](const Forward& call, int members) { return ForwardWalk<T, C>(call, members, nullptr).scratch_bytes(); },
        [](const Forward& call, Team& team, void* scratch) { ForwardWalk<T, C>(call, team.members(), scratch).run(team); },
        [](const Backward& call, int members) { return BackwardWalk<T, C>(call, members, nullptr).scratch_bytes(); },
        [](const Backward& call, Team& team, void* scratch) { BackwardWalk<T, C>(call, team.members(), scratch).run(team); },
    };
}

template <class T>
constexpr Kernels kernels() {
    return {{kernel<T, Rnn<false>>(), kernel<T, Rnn<true>>(), kernel<T, Gru>(), kernel<T, Lstm>()}};
}

constexpr Kernels kComputed = kernels<OSTINATO_COMPUTED>();

template <class S, Cell cell>
constexpr Kernel narrow_kernel() {
    constexpr const Kernel& walk = kComputed.of[static_cast<int>(cell)];
    return {
        [](const Forward& call, int members) { return NarrowForward<S>(cell, walk, call, members, nullptr).scratch_bytes(); },
        [](const Forward& call, Team& team, void* scratch) {
            NarrowForward<S>(cell, walk, call, team.members(), scratch).run(team);
        },
        [](const Backward& call, int members) { return NarrowBackward<S>(cell, walk, call, members, nullptr).scratch_bytes(); },
        [](const Backward& call, Team& team, void* scratch) {
            NarrowBackward<S>(cell, walk, call, team.members(), scratch).run(team);
        },
    };
}

template <class S>
constexpr Kernels narrow_kernels() {
    return {{narrow_kernel<S, Cell::kRnnTanh>(), narrow_kernel<S, Cell::kRnnRelu>(), narrow_kernel<S, Cell::kGru>(),
             narrow_kernel<S, Cell::kLstm>()}};
}

}  // namespace

#define OSTINATO_JOIN2(a, b, c) a##_##b##_##c
#define OSTINATO_JOIN(a, b, c) OSTINATO_JOIN2(a, b, c)
#define OSTINATO_TABLE(type) OSTINATO_JOIN(kernels, OSTINATO_ISA_NAME, type)

extern const Kernels OSTINATO_TABLE(OSTINATO_COMPUTED) = kComputed;
#ifdef OSTINATO_NARROW
extern const Kernels OSTINATO_TABLE(bfloat16) = narrow_kernels<BFloat16>();
extern const Kernels OSTINATO_TABLE(float16) = narrow_kernels<Float16>();
#endif

}  // namespace ostinato
