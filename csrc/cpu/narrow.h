// Layers stored in 16 bits: bfloat16 and float16 arrays, computed in float32.
//
// Storage alone is narrow. All arrays of a call are widened (exactly), the float32 walk runs on them, and what it wrote is
// rounded once, to nearest even. So the state between two steps, the sums and the activations are float32, and so is what
// forward keeps for backward. An output has the bits of the float32 engine's, rounded: what decision 7 promises holds here
// too, but for a sequence that the caller cuts into pieces, since the state that goes from one to the next is rounded.
//
// Traffic: a pass over x, y and the weights before and after.
#pragma once

#include "arena.h"
#include "engine.h"
#include "gemm.h"
#include "storage.h"

namespace ostinato {
namespace {

// The wide copies of a call's arrays.
template <class S>
class Copies {
public:
    explicit Copies(Arena& arena) : arena_(arena) {}

    // Both return the wide array, or null for an array that is absent. Without a base the arena counts all arrays as present.
    const void* in(const void* narrow, int64_t count) { return add(ins_, in_count_, const_cast<void*>(narrow), count); }
    void* out(void* narrow, int64_t count) { return add(outs_, out_count_, narrow, count); }

    void widen(Team& team) const {
        run(team, ins_, in_count_, [](const Copy& copy, int64_t i, int64_t n) {
            Halves h = {};
            std::memcpy(&h, static_cast<const uint16_t*>(copy.narrow) + i, static_cast<size_t>(2 * n));
            const Floats f = S::widen(h);
            std::memcpy(copy.wide + i, &f, static_cast<size_t>(4 * n));
        });
    }
    void narrow(Team& team) const {
        run(team, outs_, out_count_, [](const Copy& copy, int64_t i, int64_t n) {
            Floats f = {};
            std::memcpy(&f, copy.wide + i, static_cast<size_t>(4 * n));
            const Halves h = S::narrow(f);
            std::memcpy(static_cast<uint16_t*>(copy.narrow) + i, &h, static_cast<size_t>(2 * n));
        });
    }

private:
    struct Copy {
        void* narrow;
        float* wide;
        int64_t count;
    };
    static constexpr int kMost = 20;  // x, y, h_0, c_0, h and c of cuts, four gradients and two directions of five weights
    static constexpr int64_t kTask = 1 << 14;

    float* add(Copy (&copies)[kMost], int& used, void* narrow, int64_t count) {
        if (!narrow && !arena_.is_counting()) return nullptr;
        copies[used] = {narrow, arena_.take<float>(count), count};
        return copies[used++].wide;
    }

    template <class Convert>
    static void run(Team& team, const Copy* copies, int count, const Convert& convert) {
        for (int c = 0; c < count; c++)
            team.run(ceil_div(copies[c].count, kTask), [&](int64_t task, int) {
                const int64_t end = min(copies[c].count, (task + 1) * kTask);
                int64_t i = task * kTask;
                for (; i + kWide <= end; i += kWide) convert(copies[c], i, kWide);
                if (i < end) convert(copies[c], i, end - i);
            });
    }

    Arena& arena_;
    Copy ins_[kMost], outs_[kMost];
    int in_count_ = 0, out_count_ = 0;
};

template <class P, class Add>
void copy_weights(const Sizes& z, int64_t gates, const Weights<P> (&narrow)[2], Weights<P> (&wide)[2], const Add& add) {
    for (int64_t d = 0; d < z.directions; d++) {
        wide[d].ih = add(narrow[d].ih, gates * z.hidden * z.input);
        wide[d].hh = add(narrow[d].hh, gates * z.hidden * z.output());
        wide[d].bias_ih = add(narrow[d].bias_ih, gates * z.hidden);
        wide[d].bias_hh = add(narrow[d].bias_hh, gates * z.hidden);
        if (z.projection) wide[d].hr = add(narrow[d].hr, z.output() * z.hidden);
    }
}

// A call on wide copies: widen, walk by the float32 kernel of the cell, narrow. Who derives says which arrays there are.
template <class S, class Call>
class Narrow {
public:
    int64_t scratch_bytes() const { return arena_.used(); }

protected:
    Narrow(const Call& call, void* scratch) : wide_(call), arena_(scratch), copies_(arena_) {}

    // To be called when all arrays are named: the rest of the scratch is the walk's.
    void finish(int64_t walk_bytes) { inner_ = arena_.take<char>(walk_bytes); }

    void run(void (*walk)(const Call&, Team&, void*), Team& team) {
        copies_.widen(team);
        walk(wide_, team, inner_);
        copies_.narrow(team);
    }

    const void* in(const void* p, int64_t count) { return copies_.in(p, count); }
    void* out(void* p, int64_t count) { return copies_.out(p, count); }
    bool is_counting() const { return arena_.is_counting(); }

    Call wide_;

private:
    Arena arena_;
    Copies<S> copies_;
    void* inner_ = nullptr;
};

template <class S>
class NarrowForward : public Narrow<S, Forward> {
public:
    NarrowForward(Cell cell, const Kernel& walk, const Forward& call, int members, void* scratch)
        : Narrow<S, Forward>(call, scratch), walk_(walk) {
        const Sizes& z = call.sizes;
        const int64_t states = z.directions * z.batch;
        Forward& wide = this->wide_;
        wide.has_bfloat16_weights = S::kIsUpperHalf;
        wide.x = this->in(call.x, z.rows * z.input), wide.y = this->out(call.y, z.rows * z.directions * z.output());
        wide.h_0 = this->in(call.h_0, states * z.output()), wide.h_n = this->out(call.h_n, states * z.output());
        wide.cuts.h = this->in(call.cuts.h, states * z.output());
        if (traits_of(cell).has_cell) {
            wide.c_0 = this->in(call.c_0, states * z.hidden), wide.c_n = this->out(call.c_n, states * z.hidden);
            wide.cuts.c = this->in(call.cuts.c, states * z.hidden);
            wide.cells = this->out(call.cells, z.rows * z.directions * z.hidden);
        }
        copy_weights(z, gates_of(cell), call.weights, wide.weights, [&](const void* p, int64_t n) { return this->in(p, n); });
        this->finish(walk.forward_scratch(wide, members));
    }

    void run(Team& team) { Narrow<S, Forward>::run(walk_.forward, team); }

private:
    const Kernel& walk_;
};

template <class S>
class NarrowBackward : public Narrow<S, Backward> {
public:
    NarrowBackward(Cell cell, const Kernel& walk, const Backward& call, int members, void* scratch)
        : Narrow<S, Backward>(call, scratch), walk_(walk) {
        const Sizes& z = call.sizes;
        const int64_t states = z.directions * z.batch, width = z.directions * z.output();
        Backward& wide = this->wide_;
        wide.x = this->in(call.x, z.rows * z.input), wide.dx = this->out(call.dx, z.rows * z.input);
        wide.y = this->in(call.y, z.rows * width), wide.dy = this->in(call.dy, z.rows * width);
        wide.h_0 = this->in(call.h_0, states * z.output()), wide.dh_0 = this->out(call.dh_0, states * z.output());
        wide.dh_n = this->in(call.dh_n, states * z.output());
        wide.cuts.h = this->in(call.cuts.h, states * z.output()), wide.dcut_h = this->out(call.dcut_h, states * z.output());
        if (traits_of(cell).has_cell) {
            wide.c_0 = this->in(call.c_0, states * z.hidden), wide.dc_0 = this->out(call.dc_0, states * z.hidden);
            wide.dc_n = this->in(call.dc_n, states * z.hidden);
            wide.cuts.c = this->in(call.cuts.c, states * z.hidden), wide.dcut_c = this->out(call.dcut_c, states * z.hidden);
            wide.dcells = this->in(call.dcells, z.rows * z.directions * z.hidden);
        }
        copy_weights(z, gates_of(cell), call.weights, wide.weights, [&](const void* p, int64_t n) { return this->in(p, n); });
        copy_weights(z, gates_of(cell), call.grads, wide.grads, [&](void* p, int64_t n) { return this->out(p, n); });
        if (this->is_counting()) wide.dx = this;  // counted with all that may be asked for
        this->finish(walk.backward_scratch(wide, members));
    }

    void run(Team& team) { Narrow<S, Backward>::run(walk_.backward, team); }

private:
    const Kernel& walk_;
};

}  // namespace
}  // namespace ostinato
