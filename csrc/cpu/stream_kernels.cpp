// The engine of streams for one instruction set and one form of weights, compiled and held to the same rules as kernels.cpp.
#ifdef OSTINATO_COMPUTED
#include "stream_loop.h"
#define OSTINATO_FORM Dense<OSTINATO_COMPUTED>
#define OSTINATO_FORM_NAME OSTINATO_COMPUTED
#else
#include "int8.h"
#include "stream_loop.h"
#define OSTINATO_FORM Int8
#define OSTINATO_FORM_NAME int8
#endif

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

template <class Form, class... C>
constexpr StreamKernels stream_kernels(List<C...>) {
    return {{kStreamKernel<StreamLoop<Form, C>>...}};
}

}  // namespace

#define OSTINATO_JOIN2(a, b, c) a##_##b##_##c
#define OSTINATO_JOIN(a, b, c) OSTINATO_JOIN2(a, b, c)

extern const StreamKernels OSTINATO_JOIN(streams, OSTINATO_ISA_NAME,
                                         OSTINATO_FORM_NAME) = stream_kernels<OSTINATO_FORM>(EveryCell());

}  // namespace ostinato
