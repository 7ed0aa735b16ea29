// The time loop backward.
//
// Steps are visited from forward's last to its first. A step first gathers dL/dh_t: the gradient of y_t plus what step t+1
// sends back through weight_hh (a product with the gate gradients of t+1), then turns it into its own gate gradients. The steps
// of a chunk are followed by the products that need no order: dx, the weight gradients (one product over all rows of the
// chunk, continuing one chain in memory) and the bias sums. Gate gradients live in two alternating chunk buffers, because the first
// step of a chunk still reads the last one of the chunk before.
//
// Where forward kept no gates (Sizes::recompute), a chunk begins with them: all its rows as one step of forward, since the state
// before each is in y (and in reserve, an LSTM's c). No row waits for another, and the bits are those of forward.
#pragma once

#include "forward.h"

namespace ostinato {
namespace {

template <class T, class C>
class BackwardLoop {
    static constexpr int L = Vec<T>::kLanes;
    static constexpr bool kIsProgram = is_program<C>();
    using RowProduct = Product<T>;

public:
    BackwardLoop(const Backward& call, int members, void* scratch)
        : f_(call),
          size_(call.sizes),
          arena_(scratch),
          steps_(call, arena_),
          shares_(call.sizes, members, work(), work() * sizeof(T), max_tile_rows<1>()),
          relay_(ceil_div(ceil_div(call.sizes.output(), L), kGroup), arena_) {
        const int64_t D = size_.directions, B = size_.batch, O = size_.output(), H = size_.hidden;
        hp_ = padded(H), op_ = padded(O), row_ = grads() * hp_ + kSkew;
        blocks_ = ceil_div(O, L);
        panel_ = gates() * H * L;
        in_place_ = size_.steps == 1 && size_.batch <= max_tile_rows<1>();
        chunk_rows_ = max(chunk_rows(size_, row_ * sizeof(T)), min(size_.rows, kFewestRows));
        panels_ = arena_.take<T>(D * blocks_ * panel_);
        for (int i = 0; i < 2; i++) grads_[i] = arena_.take<T>(D * chunk_rows_ * row_);
        zeros_ = arena_.take<T>(op_);
        pointers_ = arena_.take<const T*>(members * B);
        table_ = arena_.take<const T*>(chunk_rows_);
        if (C::kUsesPrevious) direct_ = arena_.take<T>(D * B * op_);
        if (C::kHasC) dc_ = arena_.take<T>(D * B * behind() * hp_);
        if constexpr (kIsProgram) {
            dh_ = arena_.take<T>(D * B * op_);
            parameters_ = arena_.take<T>(D * size_.cell.parameters * hp_);
            registers_ = arena_.take<T>(members * Interpreter<T>::scratch(f_.program->backward));
        }
        if (size_.projection) {
            panels_hr_ = arena_.take<T>(D * ceil_div(H, L) * O * L);
            dh_ = arena_.take<T>(D * chunk_rows_ * op_);
            unprojected_ = arena_.take<T>(D * chunk_rows_ * hp_);
        }
        if (f_.dx && D == 2) dx_ = arena_.take<T>(chunk_rows_ * size_.input);
        if (recomputes()) {
            again_.gates = arena_.take<T>(D * chunk_rows_ * saved() * hp_);
            again_.h_0 = arena_.take<T>(chunk_rows_ * O), again_.y = arena_.take<T>(chunk_rows_ * O);
            const int64_t E = behind();
            if (C::kHasC) again_.c_0 = arena_.take<T>(chunk_rows_ * E * H), again_.c_n = arena_.take<T>(chunk_rows_ * E * H);
            const Forward forward = forward_again(0, chunk_rows_);
            again_.scratch = arena_.take<char>(ForwardLoop<T, C>(forward, members, nullptr).scratch_bytes());
        }
        product_scratch_ = arena_.take<T>(members * RowProduct::scratch());
    }

    int64_t scratch_bytes() const { return arena_.used(); }

    void run(Team& team) {
        steps_.fill();
        for (int64_t i = 0; i < op_; i++) zeros_[i] = 0;
        if constexpr (kIsProgram)
            for (int member = 0; member < team.members(); member++) interpreter(member).load_numbers();
        for (int64_t d = 0; d < size_.directions; d++) prepare(d, team);
        const int64_t states = size_.directions * size_.batch;
        if (f_.dreset_h) fill_zero(static_cast<T*>(f_.dreset_h), states * size_.output());
        if (f_.dreset_c) fill_zero(static_cast<T*>(f_.dreset_c), states * behind() * size_.hidden);
        if (f_.dx && size_.directions == 2) fill_zero(static_cast<T*>(f_.dx), size_.rows * size_.input_row());
        int64_t s1[2] = {size_.steps, size_.steps};
        bool first = !f_.resume;
        // s0 == -1 is the step before the first: it computes nothing but the gradient of h_0.
        while (s1[0] > -1 || (size_.directions == 2 && s1[1] > -1)) {
            for (int64_t d = 0; d < size_.directions; d++) {
                int64_t s0 = s1[d];
                while (s0 > 0 && steps_.rows_between(d, s0 - 1, s1[d]) <= chunk_rows_) s0--;
                if (s0 == 0) s0 = -1;
                chunk_[d].next_first_row = chunk_[d].first_row;
                chunk_[d].s0 = max(s0, -1), chunk_[d].s1 = s1[d];
                chunk_[d].first_row = s1[d] > max(s0, 0) ? steps_.first_row(d, max(s0, 0), s1[d]) : 0;
                chunk_[d].parity ^= 1;
            }
            if (recomputes())
                for (int64_t d = 0; d < size_.directions; d++) recompute(d, team);
            run_chunk(team);
            for (int64_t d = 0; d < size_.directions; d++) {
                reduce(d, first, team);
                s1[d] = chunk_[d].s0;
            }
            first = false;
        }
        for (int64_t d = 0; d < size_.directions; d++) finish(d);
    }

private:
    template <class, class>
    friend struct OwnBackward;

    static constexpr int64_t kGroup = 4;
    // Rows of gate gradients are read by columns too: a stride that is no power of two spreads them over the cache.
    static constexpr int64_t kSkew = 16;
    // Each chunk reads and writes the weight gradients once: worth this many rows, though their gate gradients leave the caches.
    static constexpr int64_t kFewestRows = 512;

    struct Chunk {
        int64_t s0 = 0, s1 = 0;  // steps [s0, s1)
        int64_t first_row = 0, next_first_row = 0;  // first packed row of this chunk and of the one run before it
        int parity = 0;
    };

    // Multiply-adds of one row and step, and so also elements of W_hh.
    int64_t work() const { return gates() * size_.hidden * size_.output(); }

    // What of a built-in cell is known when this is compiled, and of an own cell when it runs, as in ForwardLoop.
    int64_t gates() const { return kIsProgram ? size_.cell.gates : C::kGates; }
    int64_t input_gates() const { return kIsProgram ? size_.cell.input_gates : C::kGates; }
    int64_t behind() const { return kIsProgram ? size_.cell.behind : C::kHasC; }
    int64_t grads() const {
        if constexpr (kIsProgram)
            return size_.cell.grads;
        else
            return C::kGrads;
    }
    int64_t saved() const {
        if constexpr (kIsProgram)
            return size_.cell.saved;
        else
            return C::kSaved;
    }
    int64_t input_slot(int64_t gate) const {
        if constexpr (kIsProgram)
            return f_.program->input_slots[gate];
        else
            return C::input_slot(static_cast<int>(gate));
    }
    Interpreter<T> interpreter(int member) const {
        const Code& code = f_.program->backward;
        return {&code, reinterpret_cast<Vec<T>*>(registers_ + member * Interpreter<T>::scratch(code))};
    }

    static const T* in(const void* p) { return static_cast<const T*>(p); }
    static void copy(const T* from, int64_t n, T* to) { std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T)); }
    static void fill_zero(T* p, int64_t n) {
        for (int64_t i = 0; i < n; i++) p[i] = 0;
    }

    // Packs W_hh by its rows, [block][gate][j < H][lane], and loads the gradient of c_n. Where one step of few rows is all
    // that reads it, only the last block is packed, if it is not whole.
    void prepare(int64_t d, Team& team) {
        const int64_t H = size_.hidden, O = size_.output(), B = size_.batch;
        const auto& w = f_.weights[d];
        T* panels = panels_ + d * blocks_ * panel_;
        const int64_t unpacked = in_place_ ? O / L : 0;
        team.run(blocks_ - unpacked, [&](int64_t task, int) {
            const int64_t block = unpacked + task;
            RowMatrix<T>{in(w.hh), O, O, nullptr}.pack(panels + block * panel_, L, 0, gates() * H, block * L);
        });
        if (size_.projection) {
            T* panels_hr = panels_hr_ + d * ceil_div(H, L) * O * L;
            team.run(ceil_div(H, L), [&](int64_t block, int) {
                RowMatrix<T>{in(w.hr), H, H, nullptr}.pack(panels_hr + block * O * L, L, 0, O, block * L);
            });
        }
        if constexpr (C::kUsesPrevious) fill_zero(direct_ + d * B * op_, B * op_);
        if constexpr (kIsProgram) copy_parameters(in(w.per_unit), size_, hp_, parameters_ + d * size_.cell.parameters * hp_);
        if constexpr (C::kHasC)
            for (int64_t i = d * B * behind(); i < (d + 1) * B * behind(); i++)
                for (int64_t j = 0; j < hp_; j++) dc_[i * hp_ + j] = f_.dc_n && j < H ? in(f_.dc_n)[i * H + j] : T(0);
    }

    bool recomputes() const { return size_.recompute && saved(); }

    // Row `row` of all that forward saved, [kSaved, Hp], and of the states behind h alone.
    const T* saved_row(int64_t d, int64_t row) const {
        return recomputes() ? again_.gates + (d * chunk_rows_ + row - chunk_[d].first_row) * saved() * hp_
                            : in(f_.reserve) + (d * size_.rows + row) * saved() * hp_;
    }
    const T* cell_row(int64_t d, int64_t row) const {
        return recomputes() ? in(f_.reserve) + (d * size_.rows + row) * behind() * hp_
                            : saved_row(d, row) + (saved() - behind()) * hp_;
    }

    // One step of forward for n rows that know the state before them.
    Forward forward_again(int64_t d, int64_t n) const {
        Forward call{};
        call.sizes = {1, n, n, size_.input, size_.hidden, size_.projection, 1, nullptr, size_.cell};
        call.program = f_.program;
        call.weights[0] = f_.weights[d];
        call.h_0 = again_.h_0, call.c_0 = again_.c_0, call.y = again_.y, call.c_n = again_.c_n;
        call.reserve = again_.gates + d * chunk_rows_ * saved() * hp_;
        return call;
    }

    // The gates of a chunk's steps.
    void recompute(int64_t d, Team& team) {
        const int64_t s0 = max(chunk_[d].s0, 0), s1 = chunk_[d].s1, row0 = chunk_[d].first_row;
        const int64_t n = s1 > s0 ? steps_.rows_between(d, s0, s1) : 0, O = size_.output(), H = size_.hidden;
        if (!n) return;
        team.run(s1 - s0, [&](int64_t i, int) {
            const int64_t s = s0 + i, first = steps_.first_row(d, s);
            const CutRows cut = steps_.cut(d, s);
            for (int64_t b = 0; b < steps_.rows(d, s); b++) {
                copy(previous_row(d, s, b, cut.has(b)), O, again_.h_0 + (first - row0 + b) * O);
                if constexpr (C::kHasC) {
                    T* c_0 = again_.c_0 + (first - row0 + b) * behind() * H;
                    const Behind c = previous_cells(d, s, b, cut.has(b));
                    for (int64_t k = 0; k < behind(); k++)
                        if (c.row)
                            copy(c.row + k * c.stride, H, c_0 + k * H);
                        else
                            fill_zero(c_0 + k * H, H);
                }
            }
        });
        Forward call = forward_again(d, n);
        call.x = in(f_.x) + row0 * size_.input_row();
        ForwardLoop<T, C>(call, team.members(), again_.scratch).run(team);
    }

    void run_chunk(Team& team) {
        if (shares_.together) {
            relay_.reset();
            const auto share = [&](int64_t, int member) {
                relay_.run(chunk_[0].s1 - chunk_[0].s0, member, team.members(), [&](int64_t i, int64_t group) {
                    const Step step(*this, 0, chunk_[0].s1 - 1 - i, member);
                    step.run(0, size_.batch, group * kGroup, min(blocks_, (group + 1) * kGroup));
                });
            };
            team.run(team.members(), share);
            share(0, 0);  // a closed relay is completed by the caller, who may have claimed no task
            return;
        }
        team.run(shares_.tiles * size_.directions, [&](int64_t task, int member) {
            const int64_t d = task % size_.directions, tile = task / size_.directions;
            const int64_t b0 = shares_.begin(tile), b1 = shares_.begin(tile + 1);
            for (int64_t s = chunk_[d].s1 - 1; s >= chunk_[d].s0; s--) Step(*this, d, s, member).run(b0, b1, 0, blocks_);
        });
    }

    // Gate gradients of step s, [rows, row_].
    T* grads_of(int64_t d, int64_t s) const {
        const Chunk& chunk = chunk_[d];
        const bool here = s < chunk.s1;
        return grads_[here ? chunk.parity : chunk.parity ^ 1] +
               (d * chunk_rows_ + steps_.first_row(d, s) - (here ? chunk.first_row : chunk.next_first_row)) * row_;
    }

    // Row b of h_{t-1} at step s.
    const T* previous_row(int64_t d, int64_t s, int64_t b, bool is_cut) const {
        const int64_t O = size_.output();
        if (b < steps_.rows(d, s - 1) && !is_cut)
            return in(f_.y) + (steps_.first_row(d, s - 1) + b) * size_.directions * O + d * O;
        const T* start = in(is_cut ? f_.reset_h : f_.h_0);
        return start ? start + (d * size_.batch + b) * O : zeros_;
    }

    // Row b of the states behind h before step s, each of H values at least; null for zeros.
    struct Behind {
        const T* row;
        int64_t stride;
    };
    Behind previous_cells(int64_t d, int64_t s, int64_t b, bool is_cut) const {
        if (b < steps_.rows(d, s - 1) && !is_cut) return {cell_row(d, steps_.first_row(d, s - 1) + b), hp_};
        const T* start = in(is_cut ? f_.reset_c : f_.c_0);
        return {start ? start + (d * size_.batch + b) * behind() * size_.hidden : nullptr, size_.hidden};
    }

    // One step of one direction; s == -1 stands before the first.
    struct Step {
        const BackwardLoop& w;  // the whole time loop
        const Sizes& z;
        int64_t d, s, n, n_next;  // rows active at this step and at the next
        int64_t row0;  // first packed row
        int member;
        CutRows cut, cut_next;  // before this step and before the next
        T *grads, *grads_next, *dh, *unprojected;
        const T** rows;

        Step(const BackwardLoop& loop, int64_t direction, int64_t step, int of_member)
            : w(loop),
              z(loop.size_),
              d(direction),
              s(step),
              n(w.steps_.rows(d, s)),
              n_next(w.steps_.rows(d, s + 1)),
              member(of_member) {
            row0 = n ? w.steps_.first_row(d, s) : 0;
            cut = w.steps_.cut(d, s), cut_next = w.steps_.cut(d, s + 1);
            grads = n ? w.grads_of(d, s) : nullptr;
            grads_next = n_next ? w.grads_of(d, s + 1) : nullptr;
            const int64_t in_chunk = d * w.chunk_rows_ + row0 - w.chunk_[d].first_row;
            dh = z.projection && n ? w.dh_ + in_chunk * w.op_ : nullptr;
            unprojected = z.projection && n ? w.unprojected_ + in_chunk * w.hp_ : nullptr;
            if (kIsProgram) dh = w.dh_ + d * z.batch * w.op_;  // of this step alone
            rows = w.pointers_ + member * z.batch;
        }

        void run(int64_t b0, int64_t b1, int64_t u0, int64_t u1) const {
            for (int64_t b = b0; b < min(b1, n_next); b++) rows[b] = grads_next + b * w.row_;
            // Rows that were active at step s + 1 too, and rows that began there: their gradient is that of h_0.
            carry(take_carried, b0, min(min(b1, n), n_next), u0, u1);
            if (w.f_.dh_0 || w.f_.dreset_h) carry(take_begun, max(b0, n), min(b1, n_next), u0, u1);
            // Rows that end here start from the gradient of h_n.
            const T* dh_n = w.f_.dh_n ? in(w.f_.dh_n) + d * z.batch * z.output() : nullptr;
            for (int64_t b = max(b0, min(n, n_next)); b < min(b1, n); b++)
                for (int64_t u = u0; u < u1; u++) {
                    Vec<T> begin = dh_n ? load_n(dh_n + b * z.output() + u * L, min(L, z.output() - u * L)) : Vec<T>(0);
                    arrive(&begin, 1, b, u * L);
                }
            if constexpr (kIsProgram) OwnBackward<T, Step>{*this}.run(b0, min(b1, n), u0, u1);
            if constexpr (C::kProjects) {
                if (!z.projection) return;
                for (int64_t b = b0; b < min(b1, n); b++) rows[b] = dh + b * w.op_;
                const int64_t O = z.output(), panel = O * L;
                const T* panels_hr = w.panels_hr_ + d * ceil_div(z.hidden, L) * panel;
                multiply_tiles<1>(RowPanels<T>{rows, O, panels_hr, panel, L, take_unprojected, this}, b0, min(b1, n), 0,
                                  ceil_div(z.hidden, L));
            }
        }

        // What step s + 1 sends back: one chain over its gate gradients, and its direct part, which is large and comes last.
        void carry(typename RowPanels<T>::Take take, int64_t b0, int64_t b1, int64_t u0, int64_t u1) const {
            const int64_t O = z.output();
            RowPanels<T> p{rows, z.hidden, w.panels_ + d * w.blocks_ * w.panel_, w.panel_, L,
                           take, this,     static_cast<int>(w.gates()),          w.hp_};
            const int64_t unpacked = w.in_place_ ? max(u0, min(u1, O / L)) : u0;
            if (unpacked > u0) {
                RowPanels<T> in_place = p;
                in_place.panels = in(w.f_.weights[d].hh), in_place.panel_stride = L, in_place.k_stride = O;
                multiply_tiles<1>(in_place, b0, b1, u0, unpacked);
            }
            if (unpacked < u1) multiply_tiles<1>(p, b0, b1, unpacked, u1);
        }

        // Adds the direct part, and ends it in the rows that were cut before step s + 1.
        OSTINATO_INLINE Vec<T> complete(Vec<T> sent, int64_t b, int64_t unit) const {
            if constexpr (C::kUsesPrevious) sent = sent + Vec<T>::load(w.direct_ + (d * z.batch + b) * w.op_ + unit);
            return cut_next.has(b) ? end_at_cut(sent, w.f_.dreset_h, b, unit, z.output()) : sent;
        }

        static void take_carried(const void* taker, Vec<T>* sums, int n_rows, int64_t b, int64_t unit) {
            const Step& step = *static_cast<const Step*>(taker);
            for (int r = 0; r < n_rows; r++) sums[r] = step.complete(sums[r], b + r, unit);
            step.arrive(sums, n_rows, b, unit);
        }

        static void take_begun(const void* taker, Vec<T>* sums, int n_rows, int64_t b, int64_t unit) {
            const Step& step = *static_cast<const Step*>(taker);
            const int64_t O = step.z.output();
            for (int r = 0; r < n_rows; r++) {
                const Vec<T> sent = step.complete(sums[r], b + r, unit);
                if (!step.w.f_.dh_0) continue;
                T* dh_0 = static_cast<T*>(step.w.f_.dh_0) + (step.d * step.z.batch + b + r) * O + unit;
                store_n(sent, dh_0, min(L, O - unit));
            }
        }

        static void take_unprojected(const void* taker, Vec<T>* sums, int n_rows, int64_t b, int64_t unit) {
            for (int r = 0; r < n_rows; r++) static_cast<const Step*>(taker)->cell(b + r, unit, sums[r]);
        }

        // dL/dh_t of one block of outputs is complete for some rows: what was carried plus the gradient of y_t.
        __attribute__((noinline)) void arrive(const Vec<T>* carried, int n_rows, int64_t b, int64_t unit) const {
            const int64_t O = z.output();
            for (int r = 0; r < n_rows; r++) {
                Vec<T> carry = carried[r];
                if (w.f_.dy)
                    carry = carry + load_n(in(w.f_.dy) + (row0 + b + r) * z.directions * O + d * O + unit, min(L, O - unit));
                if (dh)
                    carry.store(dh + (b + r) * w.op_ + unit);
                else if constexpr (!kIsProgram)
                    cell(b + r, unit, carry);
            }
        }

        OSTINATO_INLINE void cell(int64_t b, int64_t unit, Vec<T> dh_t) const {
            constexpr int R = C::kGrads;
            const int64_t hp = w.hp_, lanes = min(L, z.hidden - unit);
            Vec<T> saved[C::kSaved + 1], h_previous(0), c_previous(0), h(0), dc(0), da[R];
            if constexpr (C::kSaved > 0) {
                const T* row = w.saved_row(d, row0 + b) + unit;
                for (int i = 0; i < C::kSaved; i++) saved[i] = Vec<T>::load(row + i * hp);
            }
            const bool is_cut = cut.has(b);
            if constexpr (C::kUsesPrevious) h_previous = load_n(w.previous_row(d, s, b, is_cut) + unit, lanes);
            if constexpr (C::kUsesOutput)
                h = load_n(in(w.f_.y) + (row0 + b) * z.directions * z.hidden + d * z.hidden + unit, lanes);
            T* dc_row = nullptr;
            if constexpr (C::kHasC) {
                dc_row = w.dc_ + (d * z.batch + b) * hp + unit;
                dc = Vec<T>::load(dc_row);
                if (w.f_.dcells) dc = dc + load_n(in(w.f_.dcells) + ((row0 + b) * z.directions + d) * z.hidden + unit, lanes);
                if (const T* c = w.previous_cells(d, s, b, is_cut).row) c_previous = load_n(c + unit, lanes);
            }
            if constexpr (C::kProjects) {
                if (unprojected) C::output(saved).store(unprojected + b * hp + unit);
            }
            const Vec<T> direct = C::backward(dh_t, dc, saved, h_previous, c_previous, h, da);
            for (int i = 0; i < R; i++) da[i].store(grads + b * w.row_ + i * hp + unit);
            if constexpr (C::kUsesPrevious) direct.store(w.direct_ + (d * z.batch + b) * w.op_ + unit);
            if constexpr (C::kHasC) {
                if (is_cut) dc = end_at_cut(dc, w.f_.dreset_c, b, unit, z.hidden);
                dc.store(dc_row);
            }
        }

        // What a row sends back where it was cut is added to the gradient of the state there, dreset [D, B, width] or null, and
        // goes no further: returns the zero that does. With more than one state in a row, b counts these.
        Vec<T> end_at_cut(Vec<T> sent, void* dreset, int64_t b, int64_t unit, int64_t width, int64_t per_row = 1) const {
            if (dreset) {
                T* sum = static_cast<T*>(dreset) + (d * z.batch * per_row + b) * width + unit;
                const int64_t lanes = min(L, width - unit);
                store_n(load_n(sum, lanes) + sent, sum, lanes);
            }
            return Vec<T>(0);
        }
    };

    // The products of a chunk: dx, and the gradients of the weights and biases.
    void reduce(int64_t d, bool first, Team& team) {
        const int64_t s0 = max(chunk_[d].s0, 0), s1 = chunk_[d].s1, I = size_.input, O = size_.output(), H = size_.hidden;
        const int64_t n = s1 > s0 ? steps_.rows_between(d, s0, s1) : 0, row0 = chunk_[d].first_row;
        const T* grads = grads_[chunk_[d].parity] + d * chunk_rows_ * row_;
        const auto& dw = f_.grads[d];
        if (f_.dx && n) {
            const int64_t row = size_.input_row();
            T* dx = static_cast<T*>(f_.dx) + row0 * row;
            RowProduct product;
            product.rows = n, product.columns = I, product.depth = H, product.segments = static_cast<int>(input_gates());
            for (int64_t g = 0; g < input_gates(); g++) product.a[g] = grads + input_slot(g) * hp_;
            product.a_row = row_;
            product.c[0] = size_.directions == 2 ? dx_ : dx;
            product.ldc = size_.directions == 2 ? I : row;
            product.matrix = {in(f_.weights[d].ih), I, I, nullptr};
            product.run(team, product_scratch_);
            // Two directions are two chains and one addition, in whatever order the chunks meet.
            if (size_.directions == 2)
                for (int64_t i = 0; i < n; i++)
                    for (int64_t j = 0; j < I; j++) dx[i * row + j] += dx_[i * I + j];
            for (int64_t k = 0; k < size_.cell.drives; k++) drive_gradient(grads, n, k, dx + I + k * H);
        }
        if (dw.ih) {
            const int64_t row = size_.input_row();
            weight_gradient(grads, true, {in(f_.x) + row0 * row, row, I, nullptr}, n, dw.ih, first, team);
        }
        if (dw.hh) {
            for (int64_t s = s0; s < s1; s++) {
                const CutRows cut = steps_.cut(d, s);
                for (int64_t b = 0; b < steps_.rows(d, s); b++)
                    table_[steps_.first_row(d, s) - row0 + b] = previous_row(d, s, b, cut.has(b));
            }
            weight_gradient(grads, false, {nullptr, 0, O, table_}, n, dw.hh, first, team);
        }
        bias_gradients(grads, n, dw, first, team);
        if (dw.hr && (n || first)) {
            RowProduct product;
            product.rows = O, product.columns = H, product.depth = n;
            product.a[0] = dh_ + d * chunk_rows_ * op_, product.a_row = 1, product.a_column = op_;
            product.c[0] = static_cast<T*>(dw.hr), product.ldc = H;
            product.resume = !first;
            product.matrix = {unprojected_ + d * chunk_rows_ * hp_, hp_, H, nullptr};
            run_or_clear(product, team);
        }
    }

    // The gradient of drive k, beside that of the input; two directions add up.
    void drive_gradient(const T* grads, int64_t n, int64_t k, T* to) const {
        if constexpr (kIsProgram) {
            const T* from = grads + (f_.program->drive_slot() + k) * hp_;
            for (int64_t i = 0; i < n; i++, from += row_, to += size_.input_row())
                for (int64_t j = 0; j < size_.hidden; j++) to[j] = size_.directions == 2 ? to[j] + from[j] : from[j];
        }
    }

    // dW[gate] = grads[gate]^T * rows, summed over the rows of the chunk.
    void weight_gradient(const T* grads, bool input_side, RowMatrix<T> rows, int64_t n, void* dw, bool first, Team& team) {
        const int64_t G = input_side ? input_gates() : gates();
        RowProduct product;
        product.rows = size_.hidden, product.columns = rows.columns, product.depth = n, product.batches = static_cast<int>(G);
        for (int64_t g = 0; g < G; g++) {
            product.a[g] = grads + (input_side ? input_slot(g) : g) * hp_;
            product.c[g] = static_cast<T*>(dw) + g * size_.hidden * rows.columns;
        }
        product.a_row = 1, product.a_column = row_;
        product.ldc = rows.columns;
        product.resume = !first;
        product.matrix = rows;
        run_or_clear(product, team);
    }

    // A sum over no rows is zero, or what it was.
    void run_or_clear(RowProduct& product, Team& team) {
        if (product.depth) return product.run(team, product_scratch_);
        if (!product.resume)
            for (int b = 0; b < product.batches; b++) fill_zero(product.c[b], product.rows * product.columns);
    }

    // Column sums of the gate gradients, by parts so that rounding does not grow with the number of rows. Most slots serve
    // both biases and are summed once.
    void bias_gradients(const T* grads, int64_t n, const Weights<void*>& dw, bool first, Team& team) {
        if (!dw.bias_ih && !dw.bias_hh && !dw.per_unit) return;
        constexpr int64_t kPart = 64;
        const int64_t H = size_.hidden, blocks = ceil_div(H, 4 * L);
        team.run(this->grads() * blocks, [&](int64_t task, int) {
            const int64_t slot = task / blocks, j0 = task % blocks * 4 * L;
            T* outs[2] = {nullptr, nullptr};
            for (int64_t g = 0; g < input_gates(); g++)
                if (input_slot(g) == slot && dw.bias_ih) outs[0] = static_cast<T*>(dw.bias_ih) + g * H + j0;
            if (slot < gates() && dw.bias_hh) outs[1] = static_cast<T*>(dw.bias_hh) + slot * H + j0;
            if constexpr (kIsProgram) {
                const int64_t parameter = slot - f_.program->parameter_slot();
                if (parameter >= 0 && parameter < size_.cell.parameters && dw.per_unit)
                    outs[0] = static_cast<T*>(dw.per_unit) + parameter * H + j0;
            }
            const T* before = outs[0] ? outs[0] : outs[1];
            if (!before) return;
            for (int v = 0; v < 4; v++) {
                const int64_t lanes = min(L, H - j0 - v * L);
                if (lanes <= 0) break;
                const T* column = grads + slot * hp_ + j0 + v * L;
                Vec<T> sum = first ? Vec<T>(0) : load_n(before + v * L, lanes);
                for (int64_t i0 = 0; i0 < n; i0 += kPart) {
                    Vec<T> part(0);
                    for (int64_t i = i0; i < min(n, i0 + kPart); i++) part = part + Vec<T>::load(column + i * row_);
                    sum = sum + part;
                }
                for (T* out : outs)
                    if (out) store_n(sum, out + v * L, lanes);
            }
        });
    }

    // Rows that were never active pass the gradients of h_n and c_n through.
    void finish(int64_t d) {
        const int64_t O = size_.output(), B = size_.batch, H = size_.hidden, states = B * behind();
        if (f_.dh_0)
            for (int64_t b = steps_.rows(0, 0); b < B; b++)
                for (int64_t j = 0; j < O; j++) {
                    const int64_t i = (d * B + b) * O + j;
                    static_cast<T*>(f_.dh_0)[i] = f_.dh_n ? in(f_.dh_n)[i] : T(0);
                }
        if (C::kHasC && f_.dc_0)
            for (int64_t i = d * states; i < (d + 1) * states; i++)
                for (int64_t j = 0; j < H; j++) static_cast<T*>(f_.dc_0)[i * H + j] = dc_[i * hp_ + j];
    }

    const Backward& f_;
    const Sizes& size_;
    Arena arena_;
    Steps steps_;
    Shares shares_;
    Relay relay_;
    Chunk chunk_[2];
    bool in_place_;
    int64_t hp_, op_, row_, blocks_, panel_, chunk_rows_;
    // Of the chunk, where its gates are computed again: gates [D, chunk_rows_, kSaved * Hp], the other arrays as in Forward.
    struct {
        T *gates = nullptr, *h_0 = nullptr, *c_0 = nullptr, *y = nullptr, *c_n = nullptr;
        char* scratch = nullptr;
    } again_;
    T *panels_, *grads_[2], *zeros_, *direct_ = nullptr, *dc_ = nullptr, *dx_ = nullptr;
    T *panels_hr_ = nullptr, *dh_ = nullptr, *unprojected_ = nullptr, *product_scratch_;
    T *parameters_ = nullptr, *registers_ = nullptr;
    const T **pointers_, **table_;
};

}  // namespace
}  // namespace ostinato
