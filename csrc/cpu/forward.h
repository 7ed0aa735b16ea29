// The forward walk.
//
// Traffic per chunk of steps: the input projection gx = x * W_ih^T + biases is one product over all rows of the chunk
// and lands in scratch small enough to stay cached; each step then reads its gx once, streams the packed W_hh panels (from
// the first or second cache level, shared by the rows of a tile) and writes y, and in training what backward needs.
#pragma once

#include "sequence.h"

namespace ostinato {
namespace {

template <class T, class C>
class ForwardWalk {
    static constexpr int L = Vec<T>::kLanes, G = C::kGates;
    using Projection = Product<T, TransposedWeight<T>>;

public:
    ForwardWalk(const Forward& call, int members, void* scratch)
        : f_(call),
          size_(call.sizes),
          arena_(scratch),
          steps_(call.sizes, arena_),
          shares_(call.sizes, members, work(), work() * sizeof(T), max_tile_rows<G>()),
          relay_(ceil_div(ceil_div(call.sizes.hidden, L), kGroup), arena_) {
        const int64_t D = size_.directions, B = size_.batch, O = size_.output(), H = size_.hidden;
        hp_ = padded(H);
        blocks_ = ceil_div(H, L);
        panel_ = O * G * L;
        chunk_rows_ = chunk_rows(size_, G * hp_ * sizeof(T));
        panels_ = arena_.take<T>(size_.steps == 1 ? members * kGroup * panel_ : D * blocks_ * panel_);
        start_ = arena_.take<T>(D * G * hp_);
        apart_ = arena_.take<T>(D * hp_);
        gx_ = arena_.take<T>(D * chunk_rows_ * G * hp_);
        zeros_ = arena_.take<T>(padded(O));
        previous_ = arena_.take<const T*>(members * B);
        if (C::kHasCell) c_ = arena_.take<T>(D * B * hp_);
        if (size_.projection) {
            panels_hr_ = arena_.take<T>(D * ceil_div(O, L) * H * L);
            unprojected_ = arena_.take<T>(D * B * hp_);
        }
        product_scratch_ = arena_.take<T>(members * Projection::scratch());
    }

    int64_t scratch_bytes() const { return arena_.used(); }

    void run(Team& team) {
        steps_.fill();
        for (int64_t i = 0; i < padded(size_.output()); i++) zeros_[i] = 0;
        for (int64_t d = 0; d < size_.directions; d++) prepare(d, team);
        // The directions advance together, each through chunks of its own.
        int64_t s0[2] = {0, 0};
        while (s0[0] < size_.steps || (size_.directions == 2 && s0[1] < size_.steps)) {
            int64_t s1[2];
            for (int64_t d = 0; d < size_.directions; d++) {
                s1[d] = s0[d];
                while (s1[d] < size_.steps && steps_.rows_between(d, s0[d], s1[d] + 1) <= chunk_rows_) s1[d]++;
                if (!is_few_rows()) project_input(d, s0[d], s1[d], team);
            }
            walk(s0, s1, team);
            for (int64_t d = 0; d < size_.directions; d++) s0[d] = s1[d];
        }
        for (int64_t d = 0; d < size_.directions; d++) finish(d);
    }

private:
    static constexpr int64_t kGroup = 4;  // unit blocks that a member claims at once when all walk together

    // One step of a few rows: the weights are used where they lie, all in one phase.
    bool is_few_rows() const { return size_.steps == 1 && size_.batch <= Projection::kFewRows; }

    // Multiply-adds of one row and step, and so also elements of W_hh.
    int64_t work() const { return G * size_.hidden * size_.output(); }

    const T* weight(const void* p) const { return static_cast<const T*>(p); }

    // Packs one block of W_hh as [k < O][gate][lane].
    void pack(int64_t d, int64_t block, T* panel) const {
        const int64_t H = size_.hidden, O = size_.output();
        for (int64_t g = 0; g < G; g++)
            pack_transposed(weight(f_.weights[d].hh) + (g * H + block * L) * O, O, min(L, H - block * L), O, panel + g * L,
                            G * L);
    }

    // Packs the weights of the recurrence, adds up the biases and loads c_0.
    void prepare(int64_t d, Team& team) {
        const int64_t H = size_.hidden, O = size_.output(), B = size_.batch;
        const auto& w = f_.weights[d];
        if (size_.steps != 1)
            team.run(blocks_, [&](int64_t block, int) { pack(d, block, panels_ + (d * blocks_ + block) * panel_); });
        if (size_.projection) {
            T* panels_hr = panels_hr_ + d * ceil_div(O, L) * H * L;
            team.run(ceil_div(O, L), [&](int64_t block, int) {
                pack_transposed(weight(w.hr) + block * L * H, H, min(L, O - block * L), H, panels_hr + block * H * L, L);
            });
        }
        const T *bias_ih = weight(w.bias_ih), *bias_hh = weight(w.bias_hh);
        for (int64_t g = 0; g < G; g++)
            for (int64_t j = 0; j < hp_; j++) {
                const T in = bias_ih && j < H ? bias_ih[g * H + j] : T(0), hid = bias_hh && j < H ? bias_hh[g * H + j] : T(0);
                start_[(d * G + g) * hp_ + j] = g < C::kJoint ? in + hid : in;
                if (g >= C::kJoint) apart_[d * hp_ + j] = hid;
            }
        if constexpr (C::kHasCell)
            for (int64_t b = 0; b < B; b++)
                for (int64_t j = 0; j < hp_; j++)
                    c_[(d * B + b) * hp_ + j] = f_.c_0 && j < H ? weight(f_.c_0)[(d * B + b) * H + j] : T(0);
    }

    void project_input(int64_t d, int64_t s0, int64_t s1, Team& team) {
        Projection product;
        product.rows = steps_.rows_between(d, s0, s1);
        product.columns = G * hp_;
        product.depth = size_.input;
        product.a[0] = weight(f_.x) + steps_.first_row(d, s0, s1) * size_.input;
        product.a_row = size_.input;
        product.c[0] = gx_ + d * chunk_rows_ * G * hp_;
        product.ldc = G * hp_;
        product.start = start_ + d * G * hp_;
        product.b = {weight(f_.weights[d].ih), size_.input, size_.hidden, hp_, G};
        product.run(team, product_scratch_);
    }

    void walk(const int64_t* s0, const int64_t* s1, Team& team) {
        if (size_.steps == 1) return single_step(team);
        if (shares_.together) {
            relay_.reset();
            const auto share = [&](int64_t, int member) {
                relay_.run(s1[0] - s0[0], member, team.members(), [&](int64_t s, int64_t group) {
                    const int64_t n = steps_.rows(0, s0[0] + s);
                    Step step(*this, 0, s0[0] + s, s0[0], s1[0], member);
                    step.begin(0, n);
                    step.units(0, n, group * kGroup, min(blocks_, (group + 1) * kGroup));
                });
            };
            team.run(team.members(), share);
            share(0, 0);  // a closed relay is completed by the caller, who may have claimed no task
            return;
        }
        // Tile by tile, the directions alternating: the longest tiles are claimed first.
        team.run(shares_.tiles * size_.directions, [&](int64_t task, int member) {
            const int64_t d = task % size_.directions, tile = task / size_.directions, b0 = shares_.begin(tile);
            for (int64_t s = s0[d]; s < s1[d]; s++) {
                const int64_t b1 = min(shares_.begin(tile + 1), steps_.rows(d, s));
                if (b0 >= b1) continue;
                Step step(*this, d, s, s0[d], s1[d], member);
                step.begin(b0, b1);
                step.units(b0, b1, 0, blocks_);
                if constexpr (C::kProjects)
                    if (size_.projection) step.project(b0, b1);
            }
        });
    }

    // With one step nothing is gained by packing ahead: a group of blocks is packed, used for all rows while it is in
    // the cache, and forgotten; for a few rows it is not even packed. A cell is this.
    void single_step(Team& team) {
        const int64_t groups = ceil_div(blocks_, kGroup);
        team.run(groups * size_.directions, [&](int64_t task, int member) {
            const int64_t d = task % size_.directions, u0 = task / size_.directions * kGroup, u1 = min(blocks_, u0 + kGroup);
            const int64_t n = steps_.rows(d, 0);
            T* panels = panels_ + member * kGroup * panel_;
            Step step(*this, d, 0, 0, 1, member);
            step.begin(0, n);
            if (is_few_rows()) return step.few_rows(n, u0, u1);
            for (int64_t u = u0; u < u1; u++) pack(d, u, panels + (u - u0) * panel_);
            step.panels = panels, step.first_block = u0;
            step.units(0, n, u0, u1);
        });
        if constexpr (C::kProjects) {
            if (!size_.projection) return;
            team.run(size_.directions,
                     [&](int64_t d, int member) { Step(*this, d, 0, 0, 1, member).project(0, steps_.rows(d, 0)); });
        }
    }

    // One time step of one direction.
    struct Step {
        const ForwardWalk& w;
        int64_t d, s, row0;
        T* gx;               // [rows, G * Hp] of this step
        T *y, *c, *reserve;  // y: [rows, ld_y]; c: [B, Hp]; reserve: [rows, kSaved * Hp] or null
        T* unprojected;      // [B, Hp]
        int64_t ld_y;
        const T** previous;  // [B] rows of h_{t-1}
        const T* panels;     // packed W_hh from first_block on
        int64_t first_block = 0;

        Step(const ForwardWalk& walk, int64_t direction, int64_t step, int64_t s0, int64_t s1, int member)
            : w(walk), d(direction), s(step), row0(walk.steps_.first_row(d, s)) {
            const Sizes& z = w.size_;
            ld_y = z.directions * z.output();
            gx = w.gx_ + (d * w.chunk_rows_ + row0 - w.steps_.first_row(d, s0, s1)) * G * w.hp_;
            y = static_cast<T*>(w.f_.y) + row0 * ld_y + d * z.output();
            c = C::kHasCell ? w.c_ + d * z.batch * w.hp_ : nullptr;
            reserve =
                w.f_.reserve && C::kSaved ? static_cast<T*>(w.f_.reserve) + (d * z.rows + row0) * C::kSaved * w.hp_ : nullptr;
            unprojected = z.projection ? w.unprojected_ + d * z.batch * w.hp_ : nullptr;
            previous = w.previous_ + member * z.batch;
            panels = w.panels_ + d * w.blocks_ * w.panel_;
        }

        // Finds the previous state of the rows [b0, b1): a row of y, of h_0, or zeros.
        void begin(int64_t b0, int64_t b1) const {
            const Sizes& z = w.size_;
            const int64_t continuing = w.steps_.rows(d, s - 1);
            const T* y_before =
                continuing ? static_cast<const T*>(w.f_.y) + w.steps_.first_row(d, s - 1) * ld_y + d * z.output() : nullptr;
            const T* h_0 = static_cast<const T*>(w.f_.h_0);
            for (int64_t b = b0; b < b1; b++)
                previous[b] = b < continuing ? y_before + b * ld_y : h_0 ? h_0 + (d * z.batch + b) * z.output() : w.zeros_;
        }

        void units(int64_t b0, int64_t b1, int64_t u0, int64_t u1) const { walk_tiles<G>(*this, b0, b1, u0, u1); }

        template <int MR, int NJ>
        void tile(int64_t b, int64_t u) const {
            Vec<T> acc[NJ][MR][G] = {};
            RowPointers<T, MR> h;
            for (int r = 0; r < MR; r++) h.row[r] = previous[b + r];
            accumulate<MR, NJ, G>(acc, h, panels + (u - first_block) * w.panel_, w.panel_, w.size_.output());
            finish_tile<MR, NJ>(acc, b, u);
        }

        // All rows, W_hh where it lies. Two blocks at once give a cell of one gate chains enough to hide their latency.
        void few_rows(int64_t n, int64_t u0, int64_t u1) const {
            constexpr int NJ = G == 1 ? 2 : 1;
            int64_t u = u0;
            for (; u + NJ <= u1; u += NJ) few_rows_tiles<NJ>(n, u);
            for (; u < u1; u++) few_rows_tiles<1>(n, u);
        }

        template <int NJ>
        void few_rows_tiles(int64_t n, int64_t u) const {
            if (n == 4) return few_rows_tile<4, NJ>(u);
            if (n == 3) return few_rows_tile<3, NJ>(u);
            if (n == 2) return few_rows_tile<2, NJ>(u);
            if (n == 1) return few_rows_tile<1, NJ>(u);
        }

        template <int MR, int NJ>
        void few_rows_tile(int64_t u) const {
            const int64_t I = w.size_.input, O = w.size_.output();
            // As project_input does it: chains of kDepth, added up, the biases to the first.
            for (int64_t k0 = 0; k0 < I; k0 += Projection::kDepth) {
                RowPointers<T, MR> x;
                for (int r = 0; r < MR; r++) x.row[r] = w.weight(w.f_.x) + r * I + k0;
                Vec<T> acc[NJ][MR][G] = {};
                accumulate_in_place(acc, x, w.weight(w.f_.weights[d].ih) + k0, I, min(I - k0, Projection::kDepth), u);
                for (int j = 0; j < NJ; j++)
                    for (int r = 0; r < MR; r++)
                        for (int g = 0; g < G; g++) {
                            const int64_t column = g * w.hp_ + (u + j) * L;
                            T* sum = gx + r * G * w.hp_ + column;
                            const T* before = k0 ? sum : w.start_ + d * G * w.hp_ + column;
                            (acc[j][r][g] + Vec<T>::load(before)).store(sum);
                        }
            }
            Vec<T> acc[NJ][MR][G] = {};
            RowPointers<T, MR> h;
            for (int r = 0; r < MR; r++) h.row[r] = previous[r];
            accumulate_in_place(acc, h, w.weight(w.f_.weights[d].hh), O, O, u);
            finish_tile<MR, NJ>(acc, 0, u);
        }

        // The blocks from u on of a weight [G*H, ld].
        template <int MR, int NJ>
        OSTINATO_INLINE void accumulate_in_place(Vec<T> (&acc)[NJ][MR][G], const RowPointers<T, MR>& a, const T* weight,
                                                 int64_t ld, int64_t depth, int64_t u) const {
            const int64_t H = w.size_.hidden;
            WeightRows<T> rows[NJ][G];
            for (int j = 0; j < NJ; j++)
                for (int g = 0; g < G; g++) rows[j][g] = {weight + (g * H + (u + j) * L) * ld, min(L, H - (u + j) * L)};
            accumulate_rows<MR, NJ, G>(acc, a, rows, ld, depth);
        }

        template <int MR, int NJ>
        OSTINATO_INLINE void finish_tile(Vec<T> (&acc)[NJ][MR][G], int64_t b, int64_t u) const {
            const int64_t hp = w.hp_;
            // The input's part is often the larger one: added last, it does not coarsen the rounding of the chain.
            _Pragma("GCC unroll 8") for (int j = 0; j < NJ; j++)
                _Pragma("GCC unroll 8") for (int r = 0; r < MR; r++)
                    _Pragma("GCC unroll 8") for (int g = 0; g < G; g++)
                        acc[j][r][g] = acc[j][r][g] + Vec<T>::load(g < C::kJoint ? gx + ((b + r) * G + g) * hp + (u + j) * L
                                                                                 : w.apart_ + d * hp + (u + j) * L);
            _Pragma("GCC unroll 8") for (int j = 0; j < NJ; j++)
                _Pragma("GCC unroll 8") for (int r = 0; r < MR; r++) cell(b + r, (u + j) * L, acc[j][r]);
        }

        void cell(int64_t b, int64_t unit, const Vec<T>* gates) const {
            const int64_t hp = w.hp_, n = min(L, w.size_.hidden - unit);
            Vec<T> x(0), h(0), cell(0), saved[C::kSaved + 1];
            if constexpr (C::kJoint < G) x = Vec<T>::load(gx + (b * G + C::kJoint) * hp + unit);
            if constexpr (C::kUsesPrevious) h = load_n(previous[b] + unit, n);
            if constexpr (C::kHasCell) cell = Vec<T>::load(c + b * hp + unit);
            h = C::forward(gates, x, h, cell, saved);
            if constexpr (C::kHasCell) cell.store(c + b * hp + unit);
            if (C::kSaved && reserve)
                for (int i = 0; i < C::kSaved; i++) {
                    T* row = reserve + (b * C::kSaved + i) * hp;
                    saved[i].store(row + unit);
                    // Lanes past the last block are nobody's, but reserve is to be a function of the inputs.
                    if (unit + L >= w.size_.hidden)
                        for (int64_t j = unit + L; j < hp; j += L) Vec<T>(0).store(row + j);
                }
            if (unprojected)
                h.store(unprojected + b * hp + unit);
            else
                store_n(h, y + b * ld_y + unit, n);
        }

        void project(int64_t b0, int64_t b1) const {
            walk_tiles<1>(Projected{*this}, b0, b1, 0, ceil_div(w.size_.output(), L));
        }

        struct Projected {
            const Step& step;

            template <int MR, int NJ>
            void tile(int64_t b, int64_t u) const {
                const auto& w = step.w;
                const int64_t O = w.size_.output(), H = w.size_.hidden, panel = H * L;
                Vec<T> acc[NJ][MR][1] = {};
                RowPointers<T, MR> h;
                for (int r = 0; r < MR; r++) h.row[r] = step.unprojected + (b + r) * w.hp_;
                accumulate<MR, NJ, 1>(acc, h, w.panels_hr_ + (step.d * ceil_div(O, L) + u) * panel, panel, H);
                for (int j = 0; j < NJ; j++)
                    for (int r = 0; r < MR; r++)
                        store_n(acc[j][r][0], step.y + (b + r) * step.ld_y + (u + j) * L, min(L, O - (u + j) * L));
            }
        };
    };

    // h_n is the state of each row after its own last step, or h_0 where it has none.
    void finish(int64_t d) {
        const int64_t B = size_.batch, H = size_.hidden;
        if (f_.h_n) last_states(d);
        if constexpr (C::kHasCell) {
            T* c_n = static_cast<T*>(f_.c_n) + d * B * H;
            for (int64_t b = 0; b < B; b++)
                for (int64_t j = 0; j < H; j++) c_n[b * H + j] = c_[(d * B + b) * hp_ + j];
        }
    }

    void last_states(int64_t d) {
        const int64_t O = size_.output(), B = size_.batch, ld_y = size_.directions * O;
        T* h_n = static_cast<T*>(f_.h_n) + d * B * O;
        const T* h_0 = f_.h_0 ? weight(f_.h_0) + d * B * O : nullptr;
        for (int64_t b = steps_.rows(0, 0); b < B; b++)
            for (int64_t j = 0; j < O; j++) h_n[b * O + j] = h_0 ? h_0[b * O + j] : T(0);
        for (int64_t s = 0; s < size_.steps; s++) {
            const T* y = weight(f_.y) + steps_.first_row(d, s) * ld_y + d * O;
            for (int64_t b = steps_.rows(d, s + 1); b < steps_.rows(d, s); b++)
                for (int64_t j = 0; j < O; j++) h_n[b * O + j] = y[b * ld_y + j];
        }
    }

    const Forward& f_;
    const Sizes& size_;
    Arena arena_;
    Steps steps_;
    Shares shares_;
    Relay relay_;
    int64_t hp_, blocks_, panel_, chunk_rows_;
    T *panels_, *start_, *apart_, *gx_, *zeros_, *c_ = nullptr;
    T *panels_hr_ = nullptr, *unprojected_ = nullptr, *product_scratch_;
    const T** previous_;
};

}  // namespace
}  // namespace ostinato
