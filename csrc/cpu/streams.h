// What the engine computes for a stream: a stack of layers whose weights do not change, one call after another.
//
// A layer's call packs its weights and forgets them (design, decision 6). A stream's are packed once, in the layout that a step
// reads, and its states stay between two calls. Who owns that memory is csrc/stream.cpp.
//
// Legend: T steps, B rows of the stream, n rows of a call, I input, H hidden, O output (the projection's size, or H), G gates.
#pragma once

#include "engine.h"

namespace ostinato {

struct StreamSizes {
    int64_t layers, batch, input, hidden, projection;
    Traits cell{};
    int64_t planes = 1;  // of 8 bits in what int8 weights are multiplied with: 1, or 2 for 16 bits

    constexpr int64_t output() const { return projection ? projection : hidden; }
    constexpr int64_t input_of(int64_t layer) const { return layer ? output() : input; }
    // Multiply-adds of a layer for one row and step.
    constexpr int64_t work(int64_t layer) const { return cell.gates * hidden * (input_of(layer) + output()); }
};

// A layer's weights as they are given: [G*H, I], [G*H, O], [O, H] with a scale for each row where they are int8, and biases [G*H].
template <class Pointer>
struct StreamWeights {
    Pointer ih = nullptr, hh = nullptr, bias_ih = nullptr, bias_hh = nullptr, hr = nullptr;
    Pointer ih_scale = nullptr, hh_scale = nullptr, hr_scale = nullptr;
};

// The memory of a layer, aligned to 64 bytes.
struct StreamLayer {
    void* packed = nullptr;  // StreamKernel::packed_bytes
    void *h = nullptr, *c = nullptr;  // [B, padded(O)] and [B, padded(H)]; c is null where the cell has none
};

// The same steps for n rows. x and y may not overlap.
struct StreamCall {
    StreamSizes sizes;
    const StreamLayer* layers;
    int64_t steps, rows;
    const int64_t* ids;  // [n] which rows of the stream, none twice; null: row i is the stream's row i
    const void* x;  // [T, n, I]
    void* y;  // [T, n, O]
};

// Entry points for one instruction set, cell and type. scratch as in Loop.
struct StreamKernel {
    int64_t (*packed_bytes)(const StreamSizes&, int64_t layer);
    void (*pack)(const StreamSizes&, int64_t layer, const StreamWeights<const void*>&, void* packed);
    // Writes the weights back, those whose address is not null.
    void (*unpack)(const StreamSizes&, int64_t layer, void* packed, const StreamWeights<void*>&);
    int64_t (*scratch_bytes)(const StreamCall&, int members);
    void (*run)(const StreamCall&, Team&, void* scratch);
};
using StreamKernels = OfEachCell<StreamKernel>;

// ---- dispatch.cpp ----

// That of the instruction set in use: a stream keeps it, since its weights are packed for it. Null for a dtype without one.
// With int8 weights, dtype is that of all else.
const StreamKernel* stream_kernel(Cell cell, Dtype dtype, bool has_int8_weights);

// Multiply-adds of a call, and whether so many are worth more than one thread.
int64_t work_of(const StreamCall& call);
bool is_worth_a_team(const StreamCall& call);

void run(const StreamKernel& kernel, const StreamCall& call, int threads);

}  // namespace ostinato
