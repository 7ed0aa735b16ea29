// The entry of one kernel. Its arguments are addresses and 64-bit numbers, in the order of src/ostinato/cuda/sequence.py.
#if OSTINATO_BACKWARD
#include "backward.cuh"
#else
#include "forward.cuh"
#endif

using namespace ostinato;

using Cell = Wide<OSTINATO_CELL_TYPE>;
// A cell with numbers of its own takes more arguments, the last.
#if OSTINATO_EXTRAS
#define OSTINATO_MORE , const void *parameters, const void *parameters_reverse, const void *drives
#else
#define OSTINATO_MORE
constexpr const void *parameters = nullptr, *parameters_reverse = nullptr, *drives = nullptr;
#endif

#if OSTINATO_BACKWARD
#define OSTINATO_ENTRY ostinato_backward
OSTINATO_KERNEL OSTINATO_BOUNDS(kThreads)
    ostinato_backward(i64 first, i64 steps, i64 rows, i64 batch, i64 directions, const i64* offsets, const int* lengths,
                      const int* order, const u8* flags, const void* weight_hh, const void* weight_hh_reverse, const void* h_0,
                      const void* c_0, const void* reset_h, const void* reset_c, const void* y, const void* reserve,
                      const void* dy, const void* dcells, const void* dh_n, const void* dc_n, void* dgates, void* dh_0,
                      void* dc_0, float* dreset_h, float* dreset_c, void* exchange OSTINATO_MORE) {
    const Batch all{steps, rows, batch, directions, offsets, lengths, order, flags};
    const Task task = task_of(first, batch);
    backward<Cell, OSTINATO_MATH>(Backward{all,
                                           task.direction ? weight_hh_reverse : weight_hh,
                                           h_0,
                                           c_0,
                                           reset_h,
                                           reset_c,
                                           y,
                                           reserve,
                                           dy,
                                           dcells,
                                           dh_n,
                                           dc_n,
                                           dgates,
                                           dh_0,
                                           dc_0,
                                           dreset_h,
                                           dreset_c,
                                           exchange,
                                           task.direction ? parameters_reverse : parameters,
                                           drives},
                                  task);
}
#else
#define OSTINATO_ENTRY ostinato_forward
OSTINATO_KERNEL OSTINATO_BOUNDS(kThreads)
    ostinato_forward(i64 first, i64 steps, i64 rows, i64 batch, i64 directions, const i64* offsets, const int* lengths,
                     const int* order, const u8* flags, const void* gates_x, const void* weight_hh,
                     const void* weight_hh_reverse, const void* bias_ih, const void* bias_ih_reverse, const void* bias_hh,
                     const void* bias_hh_reverse, const void* h_0, const void* c_0, const void* reset_h, const void* reset_c,
                     void* y, void* h_n, void* c_n, void* reserve, void* cells, void* exchange OSTINATO_MORE) {
    const Batch all{steps, rows, batch, directions, offsets, lengths, order, flags};
    const Task task = task_of(first, batch);
    const bool is_reverse = task.direction;
    forward<Cell, OSTINATO_MATH>(
        Forward{all, gates_x, is_reverse ? weight_hh_reverse : weight_hh, is_reverse ? bias_ih_reverse : bias_ih,
                is_reverse ? bias_hh_reverse : bias_hh, h_0, c_0, reset_h, reset_c, y, h_n, c_n, reserve, cells, exchange,
                is_reverse ? parameters_reverse : parameters, drives},
        task);
}
#endif

#ifndef __CUDACC__
extern "C" int ostinato_emulate(const i64* arguments, int loops, int schedule) {
    return emulate(OSTINATO_ENTRY, arguments, loops, kThreads, kBlocks, schedule);
}
#endif
