// The engine for one instruction set: this file is compiled once per set with OSTINATO_ISA_NAME and the flags of that
// set. Everything but the table's name has internal linkage (tools/check_symbols.py holds that).
#include "backward.h"
#include "forward.h"

namespace ostinato {
namespace {

template <class T, class C>
constexpr Kernel kernel() {
    return {
        [](const Sizes& sizes, int members) {
            Forward call{};
            call.sizes = sizes;
            return ForwardWalk<T, C>(call, members, nullptr).scratch_bytes();
        },
        [](const Forward& call, Team& team, void* scratch) { ForwardWalk<T, C>(call, team.members(), scratch).run(team); },
        [](const Sizes& sizes, int members) {
            Backward call{};
            call.sizes = sizes;
            char wanted;
            call.dx = &wanted;  // measured with all that may be asked for
            return BackwardWalk<T, C>(call, members, nullptr).scratch_bytes();
        },
        [](const Backward& call, Team& team, void* scratch) { BackwardWalk<T, C>(call, team.members(), scratch).run(team); },
    };
}

}  // namespace

#define OSTINATO_JOIN2(a, b) a##b
#define OSTINATO_JOIN(a, b) OSTINATO_JOIN2(a, b)

extern const KernelTable OSTINATO_JOIN(kernels_, OSTINATO_ISA_NAME);
const KernelTable OSTINATO_JOIN(kernels_, OSTINATO_ISA_NAME) = {{
    {kernel<float, Rnn<false>>(), kernel<double, Rnn<false>>()},
    {kernel<float, Rnn<true>>(), kernel<double, Rnn<true>>()},
    {kernel<float, Gru>(), kernel<double, Gru>()},
    {kernel<float, Lstm>(), kernel<double, Lstm>()},
}};

}  // namespace ostinato
