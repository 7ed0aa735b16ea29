// The engine of streams for one instruction set and one computed type, compiled and held to the same rules as kernels.cpp.
#include "stream_loop.h"

namespace ostinato {
namespace {

template <class Loop>
constexpr StreamKernel kStreamKernel = {
    &Loop::packed_bytes,
    &Loop::pack,
    &Loop::unpack,
    [](const StreamCall& call, int members) { return Loop(call, members, nullptr).scratch_bytes(); },
    [](const StreamCall& call, Team& team, void* scratch) { Loop(call, team.members(), scratch).run(team); },
};

template <class T, class... C>
constexpr StreamKernels stream_kernels(List<C...>) {
    return {{kStreamKernel<StreamLoop<T, C>>...}};
}

}  // namespace

#define OSTINATO_JOIN2(a, b, c) a##_##b##_##c
#define OSTINATO_JOIN(a, b, c) OSTINATO_JOIN2(a, b, c)

extern const StreamKernels OSTINATO_JOIN(streams, OSTINATO_ISA_NAME,
                                         OSTINATO_COMPUTED) = stream_kernels<OSTINATO_COMPUTED>(EveryCell());

}  // namespace ostinato
