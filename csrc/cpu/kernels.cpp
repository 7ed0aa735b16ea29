// The engine for one instruction set and one computed type. This file is compiled once for each pair, with
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

// The entry points of a class that runs the time loop of one call.
template <class Call, class TimeLoop>
constexpr Loop<Call> kLoop = {
    [](const Call& call, int members) { return TimeLoop(call, members, nullptr).scratch_bytes(); },
    [](const Call& call, Team& team, void* scratch) { TimeLoop(call, team.members(), scratch).run(team); },
};

template <class T, class C>
constexpr Kernel kernel() {
    return {kLoop<Forward, ForwardLoop<T, C>>, kLoop<Backward, BackwardLoop<T, C>>};
}

template <class T, class... C>
constexpr Kernels kernels(List<C...>) {
    return {{{kernel<T, C>()...}}, kernel<T, Own>()};
}

// S: how the arrays are stored. TimeLoop: the time loop in float32.
template <class S, class C, class Call, class TimeLoop>
struct NarrowLoop : Narrow<S, Call> {
    NarrowLoop(const Call& call, int members, void* scratch) : Narrow<S, Call>(kLoop<Call, TimeLoop>, call, members, scratch) {}
};

template <class S, class C>
constexpr Kernel narrow_kernel() {
    return {kLoop<Forward, NarrowLoop<S, C, Forward, ForwardLoop<float, C>>>,
            kLoop<Backward, NarrowLoop<S, C, Backward, BackwardLoop<float, C>>>};
}

template <class S, class... C>
constexpr Kernels narrow_kernels(List<C...>) {
    return {{{narrow_kernel<S, C>()...}}, narrow_kernel<S, Own>()};
}

}  // namespace

#define OSTINATO_JOIN2(a, b, c) a##_##b##_##c
#define OSTINATO_JOIN(a, b, c) OSTINATO_JOIN2(a, b, c)
#define OSTINATO_TABLE(type) OSTINATO_JOIN(kernels, OSTINATO_ISA_NAME, type)

extern const Kernels OSTINATO_TABLE(OSTINATO_COMPUTED) = kernels<OSTINATO_COMPUTED>(EveryCell());
#ifdef OSTINATO_NARROW
extern const Kernels OSTINATO_TABLE(bfloat16) = narrow_kernels<BFloat16>(EveryCell());
extern const Kernels OSTINATO_TABLE(float16) = narrow_kernels<Float16>(EveryCell());
#endif

}  // namespace ostinato
