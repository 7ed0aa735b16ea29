// The engine for one instruction set: this file is compiled once per set with OSTINATO_ISA_NAME and the flags of that
// set. Everything but the table's name has internal linkage (tools/check_symbols.py holds that).
#include "backward.h"
#include "forward.h"
#include "narrow.h"

namespace ostinato {
namespace {

template <class ForwardOf, class BackwardOf>
constexpr Kernel kernel_of() {
    return {
        [](const Sizes& sizes, int members) {
            Forward call{};
            call.sizes = sizes;
            return ForwardOf(call, members, nullptr).scratch_bytes();
        },
        [](const Forward& call, Team& team, void* scratch) { ForwardOf(call, team.members(), scratch).run(team); },
        [](const Sizes& sizes, int members) {
            Backward call{};
            call.sizes = sizes;
            char wanted;
            call.dx = &wanted;  // measured with all that may be asked for
            return BackwardOf(call, members, nullptr).scratch_bytes();
        },
        [](const Backward& call, Team& team, void* scratch) { BackwardOf(call, team.members(), scratch).run(team); },
    };
}

template <class T, class C>
constexpr Kernel kernel() {
    return kernel_of<ForwardWalk<T, C>, BackwardWalk<T, C>>();
}

template <class S, class C>
constexpr Kernel narrow_kernel() {
    return kernel_of<NarrowForward<S, C>, NarrowBackward<S, C>>();
}

}  // namespace

#define OSTINATO_JOIN2(a, b) a##b
#define OSTINATO_JOIN(a, b) OSTINATO_JOIN2(a, b)

extern const KernelTable OSTINATO_JOIN(kernels_, OSTINATO_ISA_NAME) = {{
#define OSTINATO_ROW(C) {kernel<float, C>(), kernel<double, C>(), narrow_kernel<BFloat16, C>(), narrow_kernel<Float16, C>()}
    OSTINATO_ROW(Rnn<false>),
    OSTINATO_ROW(Rnn<true>),
    OSTINATO_ROW(Gru),
    OSTINATO_ROW(Lstm),
#undef OSTINATO_ROW
}};

}  // namespace ostinato
