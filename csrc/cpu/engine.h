// What the engine computes: one recurrent layer, one or two directions, forward and backward. Addresses and sizes only.
//
// Legend: T steps, B batch rows, N rows of the packed layout (the sum of batch_sizes; T * B where there are none),
// I input, H hidden, O output (the projection's size, or H), G gates, D directions. All arrays are dense and row-major.
#pragma once

#include <cstdint>

#include "../cells.h"

namespace ostinato {

enum class Cell : int { kRnnTanh, kRnnRelu, kGru, kLstm };
constexpr int kCells = 4;

// How the arrays of a call are stored. The 16-bit types are computed in float32 (narrow.h).
enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kDtypes = 4;

// Bytes of a value where it is stored, and where it is computed with or kept for backward.
constexpr int64_t stored_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }
constexpr int64_t computed_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

inline constexpr Traits kTraits[kCells] = {traits<Rnn<false>>(), traits<Rnn<true>>(), traits<Gru>(), traits<Lstm>()};

constexpr const Traits& traits_of(Cell cell) { return kTraits[static_cast<int>(cell)]; }

// Gates per unit: rows of weight_ih = gates * H.
constexpr int64_t gates_of(Cell cell) { return traits_of(cell).gates; }

struct Sizes {
    int64_t steps, rows, batch, input, hidden, projection, directions;
    const int64_t* batch_sizes;  // [T] non-increasing, active rows per step; null: B at every step
    bool recompute = false;      // forward keeps no gates, only an LSTM's c; backward computes them again

    int64_t output() const { return projection ? projection : hidden; }
};

// Parameters of one direction, or in backward their gradients; null where absent or not wanted.
template <class Pointer>
struct Weights {
    Pointer ih = nullptr, hh = nullptr;  // [G*H, I], [G*H, O]
    Pointer bias_ih = nullptr, bias_hh = nullptr;  // [G*H]
    Pointer hr = nullptr;  // [O, H]
};

// What cuts rows into segments, each a sequence of its own in both directions: a row's end, and steps before which it begins
// anew. Where a direction's walk enters a segment over such a cut, it starts from h and c (zeros where null), otherwise from h_0
// and c_0; h_n and c_n are the states at the end of its last segment. A row of no steps passes its states on.
struct Cuts {
    const int64_t* lengths = nullptr;  // [B] steps of each row of a padded batch; null: T
    const uint8_t* resets = nullptr;  // [N], as x: whether a row begins anew before this step; null: never
    const void *h = nullptr, *c = nullptr;  // [D, B, O], [D, B, H]
};

// Arrays belong to the caller and are of one type. `reserve` is opaque: forward fills reserve_bytes() of it if it
// is not null, backward reads it. Nothing may overlap what is written.
struct Forward {
    Sizes sizes;
    Weights<const void*> weights[2];
    const void *x, *h_0, *c_0;  // [N, I], [D, B, O] or null (zeros), [D, B, H] or null
    void *y, *h_n, *c_n, *reserve;  // [N, D*O] (zeros past a row's end), [D, B, O] or null, [D, B, H] (LSTM), reserve or null
    Cuts cuts{};
    void* cells = nullptr;  // [N, D*H], c after every step of an LSTM, or null
    bool has_bfloat16_weights = false;  // float32 weights whose lower halves are zero
};

// The gradients of y, h_n and c_n come in (null: zero); the wanted ones of x, h_0, c_0 and the weights go out.
struct Backward {
    Sizes sizes;
    Weights<const void*> weights[2];
    const void *x, *h_0, *c_0, *y, *reserve;  // y may be null where one step of a GRU or an LSTM was run
    const void *dy, *dh_n, *dc_n;
    void *dx, *dh_0, *dc_0;
    Weights<void*> grads[2];
    Cuts cuts{};
    void *dcut_h = nullptr, *dcut_c = nullptr;  // of cuts.h and cuts.c, sums over all segments of a row
    const void* dcells = nullptr;  // [N, D*H]
    bool resume = false;  // the sums in the gradients of the weights go on from what these hold; never in 16 bits
};

class Team;

// Entry points of one instruction set for one cell and type. scratch holds at least as many bytes as were asked for, aligned
// to 64, its contents arbitrary.
struct Kernel {
    int64_t (*forward_scratch)(const Forward&, int members);
    void (*forward)(const Forward&, Team&, void* scratch);
    int64_t (*backward_scratch)(const Backward&, int members);
    void (*backward)(const Backward&, Team&, void* scratch);
};

struct Kernels {
    Kernel of[kCells];  // [Cell]
};

// Units are stored in multiples of this many in reserve and scratch, so that both are the same on every instruction set.
constexpr int64_t padded(int64_t units) { return (units + 15) / 16 * 16; }

// Multiply-adds of a step that are worth sharing: a relay's barrier costs some hundred nanoseconds.
constexpr int64_t kWorthRelay = 1 << 15;

// ---- dispatch.cpp ----

// Of `reserve`, for sizes as they are given to forward and backward.
int64_t reserve_bytes(Cell cell, Dtype dtype, const Sizes& sizes);
void forward(Cell cell, Dtype dtype, const Forward& call, int threads);
void backward(Cell cell, Dtype dtype, const Backward& call, int threads);

// Calls of one size that know nothing of each other, with the bits that each has alone. Where there are at least as many as
// threads, or where one is not worth sharing, each runs in one thread.
void forward(Cell cell, Dtype dtype, const Forward* calls, int64_t count, int threads);
void backward(Cell cell, Dtype dtype, const Backward* calls, int64_t count, int threads);

// Names of the instruction sets that this processor can run, best first; null at `index` past the end.
const char* isa_name(int index);
const char* active_isa();
bool select_isa(const char* name);

}  // namespace ostinato
