// The time loop forward.
//
// Traffic per row tile and chunk of steps: the input projection gx = x * W_ih^T + biases is one product over all rows of the
// chunk and lands in scratch small enough for the second cache level; each step then reads its gx once, streams the packed
// W_hh panels (from the first or second level, shared by the rows of a tile) and writes y, and in training what backward
// needs. A tile does both by itself, so nobody waits for anybody until all steps are done. Only where the members
// share each step, or where there is one step, is the projection a phase of its own (project_input).
#pragma once

#include "own_steps.h"
#include "sequence.h"

namespace ostinato {
namespace {

template <class T, class C>
class ForwardLoop {
    static constexpr int L = Vec<T>::kLanes, G = C::kGates;
    static constexpr bool kIsProgram = is_program<C>();
    using Projection = Product<T>;

public:
    ForwardLoop(const Forward& call, int members, void* scratch)
        : f_(call),
          size_(call.sizes),
          arena_(scratch),
          steps_(call, arena_),
          shares_(call.sizes, members, work(), work() * sizeof(T), tile_height()),
          relay_(ceil_div(ceil_div(call.sizes.hidden, L), kGroup), arena_) {
        const int64_t D = size_.directions, B = size_.batch, O = size_.output(), H = size_.hidden;
        hp_ = padded(H);
        blocks_ = ceil_div(H, L);
        const int64_t most_rows = shares_.together ? B : ceil_div(B, shares_.tiles);
        is_paired_ = !kIsProgram && f_.has_bfloat16_weights && size_.steps > 1 && most_rows <= kPairedRows;
        panel_ = (is_paired_ ? ceil_div(O, 2) : O) * gates() * L;
        is_tiled_ = size_.steps > 1 && !shares_.together;
        if (is_tiled_) {
            tile_rows_ = ceil_div(B, shares_.tiles);
            const int64_t step_bytes = max(1, tile_rows_) * input_gates() * hp_ * static_cast<int64_t>(sizeof(T));
            const bool is_far = input_gates() * H * size_.input * static_cast<int64_t>(sizeof(T)) > kNear;
            tile_steps_ = min(size_.steps, max(kTileBytes / step_bytes, is_far ? ceil_div(kFarRows, max(1, tile_rows_)) : 1));
            chunk_rows_ = members * tile_rows_ * tile_steps_;
            panels_ih_ = arena_.take<T>(D * input_blocks() * kBlock * size_.input);
            sources_ = arena_.take<const T*>(chunk_rows_);
            targets_ = arena_.take<T*>(chunk_rows_);
        } else {
            chunk_rows_ = D * chunk_rows(size_, input_gates() * hp_ * sizeof(T));
        }
        panels_ = arena_.take<T>(size_.steps == 1 ? members * kGroup * panel_ : D * blocks_ * panel_);
        start_ = arena_.take<T>(D * input_gates() * hp_);
        apart_ = arena_.take<T>(D * (kIsProgram ? gates() : 1) * hp_);
        gx_ = arena_.take<T>(chunk_rows_ * input_gates() * hp_);
        zeros_ = arena_.take<T>(padded(O));
        previous_ = arena_.take<const T*>(members * B);
        if (C::kHasC) c_ = arena_.take<T>(D * B * behind() * hp_);
        if constexpr (kIsProgram) {
            parameters_ = arena_.take<T>(D * size_.cell.parameters * hp_);
            sums_ = arena_.take<T>(members * Strip<T>::kRows * gates() * Strip<T>::kBlocks * L);
            registers_ = arena_.take<T>(members * register_values());
        }
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
        if constexpr (kIsProgram)
            for (int member = 0; member < team.members(); member++) interpreter(member).load_numbers();
        for (int64_t d = 0; d < size_.directions; d++) prepare(d, team);
        if (is_tiled_)
            run_apart(team);
        else if (size_.steps == 1)
            run_one_step(team);
        else
            run_together(team);
        for (int64_t d = 0; d < size_.directions; d++) finish(d);
    }

private:
    template <class, class>
    friend struct OwnForward;

    static constexpr int64_t kGroup = 4;  // unit blocks that a member claims at once when all share a step
    static constexpr int64_t kTileBytes = 512 << 10;  // of gx, for the steps that a tile projects at once
    // Where W_ih is so large that it comes from memory, it is worth more rows at once, though gx then leaves the second level.
    static constexpr int64_t kNear = 4 << 20, kFarRows = 128;
    static constexpr int NR = G == 3 ? 3 : 4;  // vectors of a panel of W_ih: G * Hp columns are whole panels, often
    static constexpr int64_t kBlock = NR * L;

    // What of a built-in cell is known when this is compiled, and of an own cell when it runs: rows of weight_hh and weight_ih
    // for each unit, states behind h, values that are kept.
    int64_t gates() const { return kIsProgram ? size_.cell.gates : G; }
    int64_t input_gates() const { return kIsProgram ? size_.cell.input_gates : G; }
    int64_t behind() const { return kIsProgram ? size_.cell.behind : C::kHasC; }
    int64_t saved() const {
        if constexpr (kIsProgram)
            return size_.cell.saved;
        else
            return C::kSaved;
    }
    bool is_joint(int64_t input_gate) const {
        if constexpr (kIsProgram)
            return f_.program->is_joint(input_gate);
        else
            return input_gate < C::kJoint;
    }
    int64_t tile_height() const { return kIsProgram ? rows_of_gates(gates()) : max_tile_rows<G>(); }

    int64_t input_blocks() const { return ceil_div(input_gates() * hp_, kBlock); }

    // One step of a few rows: the weights are used where they lie, all in one phase.
    bool is_few_rows() const { return size_.steps == 1 && size_.batch <= Projection::kFewRows; }

    // Multiply-adds of one row and step, and so also elements of W_hh.
    int64_t work() const { return gates() * size_.hidden * size_.output(); }

    const T* weight(const void* p) const { return static_cast<const T*>(p); }
    // A weight that is multiplied.
    WeightPointer<T> matrix(const void* p) const { return {p, f_.has_bfloat16_weights}; }

    // Packs one block of W_hh as [k < O][gate][lane], or as pairs of bfloat16.
    void pack(int64_t d, int64_t block, T* panel) const {
        if (!is_paired_) return pack(d, block, 0, size_.output(), panel);
        if constexpr (sizeof(T) == 4) {
            constexpr int64_t kPiece = 16;
            T piece[(kPiece + 1) * G * L];
            for (int64_t k0 = 0; k0 < size_.output(); k0 += kPiece) {
                const int64_t n = min(kPiece, size_.output() - k0);
                pack(d, block, k0, n, piece);
                for (int64_t v = 0; v < G * L; v += L) Vec<T>(0).store(piece + n * G * L + v);
                for (int64_t k = 0; k < n; k += 2, panel += G * L) pair_up<G>(piece + k * G * L, panel);
            }
        }
    }

    // The part [k0, k0 + depth) of it. Of an own cell so many gates lie together as a product takes at once.
    void pack(int64_t d, int64_t block, int64_t k0, int64_t depth, T* panel) const {
        const int64_t H = size_.hidden, O = size_.output();
        for (int64_t first = 0; first < gates(); first += G) {
            const int64_t count = kIsProgram ? min(G, gates() - first) : G;
            for (int64_t g = 0; g < count; g++)
                pack_transposed(matrix(f_.weights[d].hh) + ((first + g) * H + block * L) * O + k0, O, min(L, H - block * L),
                                depth, panel + g * L, count * L);
            panel += depth * count * L;
        }
    }

    // Packs the weights of the recurrence, adds up the biases and loads c_0.
    void prepare(int64_t d, Team& team) {
        const int64_t H = size_.hidden, O = size_.output(), B = size_.batch;
        const auto& w = f_.weights[d];
        if (size_.steps != 1)
            team.run(blocks_, [&](int64_t block, int) { pack(d, block, panels_ + (d * blocks_ + block) * panel_); });
        if (is_tiled_)
            team.run(input_blocks(), [&](int64_t block, int) {
                const TransposedWeight<T> source = input_weight(d);
                T* panel = panels_ih_ + (d * input_blocks() + block) * kBlock * size_.input;
                for (int64_t v = 0; v < kBlock; v += L)
                    if (block * kBlock + v < source.columns())
                        source.pack(panel + v, kBlock, 0, size_.input, block * kBlock + v);
                    else
                        for (int64_t k = 0; k < size_.input; k++) Vec<T>(0).store(panel + k * kBlock + v);
            });
        if (size_.projection) {
            T* panels_hr = panels_hr_ + d * ceil_div(O, L) * H * L;
            team.run(ceil_div(O, L), [&](int64_t block, int) {
                pack_transposed(matrix(w.hr) + block * L * H, H, min(L, O - block * L), H, panels_hr + block * H * L, L);
            });
        }
        const T *bias_ih = weight(w.bias_ih), *bias_hh = weight(w.bias_hh);
        const auto bias = [&](const T* of, int64_t g, int64_t j) { return of && j < H ? of[g * H + j] : T(0); };
        for (int64_t g = 0; g < input_gates(); g++)
            for (int64_t j = 0; j < hp_; j++) {
                const T in = bias(bias_ih, g, j);
                start_[(d * input_gates() + g) * hp_ + j] = is_joint(g) ? in + bias(bias_hh, g, j) : in;
            }
        if constexpr (kIsProgram) {
            for (int64_t i = 0; i < gates() * hp_; i++) apart_[d * gates() * hp_ + i] = bias(bias_hh, i / hp_, i % hp_);
            copy_parameters(weight(w.per_unit), size_, hp_, parameters_ + d * size_.cell.parameters * hp_);
        } else if constexpr (C::kJoint < G) {
            for (int64_t j = 0; j < hp_; j++) apart_[d * hp_ + j] = bias(bias_hh, C::kJoint, j);
        }
        if constexpr (C::kHasC)
            for (int64_t b = 0; b < B; b++)
                for (int64_t k = 0; k < behind(); k++)
                    for (int64_t j = 0; j < hp_; j++) {
                        const T* c_0 = f_.c_0 ? weight(f_.c_0) + ((d * B + b) * behind() + k) * H : nullptr;
                        c_[((d * B + b) * behind() + k) * hp_ + j] = c_0 && j < H ? c_0[j] : T(0);
                    }
    }

    const Code& code() const { return f_.reserve && saves() ? f_.program->forward_keep : f_.program->forward; }
    bool saves() const { return !size_.recompute; }
    // Enough for both programs, since where scratch is only counted nobody knows which it will be.
    int64_t register_values() const {
        return max(Interpreter<T>::scratch(f_.program->forward), Interpreter<T>::scratch(f_.program->forward_keep));
    }
    Interpreter<T> interpreter(int member) const {
        return {&code(), reinterpret_cast<Vec<T>*>(registers_ + member * register_values())};
    }

    TransposedWeight<T> input_weight(int64_t d) const {
        return {matrix(f_.weights[d].ih), size_.input, size_.hidden, hp_, input_gates()};
    }

    // gx of all rows of the steps [s0, s1).
    void project_input(int64_t d, int64_t s0, int64_t s1, T* gx, Team& team) {
        Projection product;
        product.rows = steps_.rows_between(d, s0, s1);
        product.columns = input_gates() * hp_;
        product.depth = size_.input;
        product.a[0] = weight(f_.x) + steps_.first_row(d, s0, s1) * size_.input_row();
        product.a_row = size_.input_row();
        product.c[0] = gx;
        product.ldc = input_gates() * hp_;
        product.start = start_ + d * input_gates() * hp_;
        product.weight = input_weight(d);
        product.run(team, product_scratch_);
    }

    // gx of a tile's rows [b0, b1) of the steps [s0, s1): row b of step s at gx + ((s - s0) * tile_rows_ + b - b0) * G * Hp.
    // The same chains as project_input's, over panels that were packed for the whole call.
    void project_tile(int64_t d, int64_t s0, int64_t s1, int64_t b0, int64_t b1, T* gx, int member) const {
        const T** sources = sources_ + member * tile_rows_ * tile_steps_;
        T** targets = targets_ + member * tile_rows_ * tile_steps_;
        int64_t count = 0;
        for (int64_t s = s0; s < s1; s++)
            for (int64_t b = b0; b < min(b1, steps_.rows(d, s)); b++, count++) {
                sources[count] = weight(f_.x) + (steps_.first_row(d, s) + b) * size_.input_row();
                targets[count] = gx + ((s - s0) * tile_rows_ + b - b0) * input_gates() * hp_;
            }
        constexpr int MR = kAccumulators / NR;
        for (int64_t block = 0; block < input_blocks(); block++)
            for (int64_t i = 0; i < count;) {
                const int64_t left = count - i;
                if (left > MR / 2)
                    project_rows<MR>(d, block, sources + i, targets + i, min(MR, left)), i += MR;
                else if (left > 1)
                    project_rows<MR / 2>(d, block, sources + i, targets + i, left), i += MR / 2;
                else
                    project_rows<1>(d, block, sources + i, targets + i, 1), i++;
            }
    }

    template <int R>
    void project_rows(int64_t d, int64_t block, const T* const* sources, T* const* targets, int64_t count) const {
        const T* panel = panels_ih_ + (d * input_blocks() + block) * kBlock * size_.input;
        for (int64_t k0 = 0; k0 < size_.input; k0 += Projection::kDepth) {
            // Rows past the end read the last one again; what they compute is not stored.
            RowPointers<T, R> x;
            for (int r = 0; r < R; r++) x.row[r] = sources[min(r, count - 1)] + k0;
            Vec<T> acc[1][R][NR] = {};
            accumulate<R, 1, NR>(acc, x, panel + k0 * kBlock, 0, min(Projection::kDepth, size_.input - k0));
        _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {
                if (r >= count) break;
                _Pragma("GCC unroll 8") for (int v = 0; v < NR; v++) {
                    const int64_t column = block * kBlock + v * L;
                    if (column >= input_gates() * hp_) break;
                    const T* before = k0 ? targets[r] + column : start_ + d * input_gates() * hp_ + column;
                    (acc[0][r][v] + Vec<T>::load(before)).store(targets[r] + column);
                }
            }
        }
    }

    // Each member takes tiles of rows through all steps, the directions alternating: the longest tiles are claimed first.
    void run_apart(Team& team) {
        team.run(shares_.tiles * size_.directions, [&](int64_t task, int member) {
            const int64_t d = task % size_.directions, tile = task / size_.directions;
            const int64_t b0 = shares_.begin(tile), end = shares_.begin(tile + 1);
            T* gx = gx_ + member * tile_rows_ * tile_steps_ * input_gates() * hp_;
            for (int64_t s0 = 0; s0 < size_.steps; s0 += tile_steps_) {
                const int64_t s1 = min(size_.steps, s0 + tile_steps_);
                project_tile(d, s0, s1, b0, end, gx, member);
                for (int64_t s = s0; s < s1; s++) {
                    const int64_t b1 = min(end, steps_.rows(d, s));
                    if (b0 >= b1) continue;
                    Step step(*this, d, s, gx + (s - s0) * tile_rows_ * input_gates() * hp_, b0, member);
                    step.begin(b0, b1);
                    step.units(b0, b1, 0, blocks_);
                    if constexpr (C::kProjects)
                        if (size_.projection) step.project(b0, b1);
                }
            }
        });
    }

    // All members share the unit blocks of each step. One direction.
    void run_together(Team& team) {
        for (int64_t s0 = 0, s1; s0 < size_.steps; s0 = s1) {
            for (s1 = s0; s1 < size_.steps && steps_.rows_between(0, s0, s1 + 1) <= chunk_rows_;) s1++;
            project_input(0, s0, s1, gx_, team);
            relay_.reset();
            const auto share = [&](int64_t, int member) {
                relay_.run(s1 - s0, member, team.members(), [&](int64_t i, int64_t group) {
                    const int64_t s = s0 + i, n = steps_.rows(0, s);
                    T* gx = gx_ + (steps_.first_row(0, s) - steps_.first_row(0, s0, s1)) * input_gates() * hp_;
                    Step step(*this, 0, s, gx, 0, member);
                    step.begin(0, n);
                    step.units(0, n, group * kGroup, min(blocks_, (group + 1) * kGroup));
                });
            };
            team.run(team.members(), share);
            share(0, 0);  // a closed relay is completed by the caller, who may have claimed no task
        }
    }

    // With one step nothing is gained by packing ahead: a group of blocks is packed, used for all rows while it is in
    // the cache, and forgotten; for a few rows it is not even packed. A cell is this.
    void run_one_step(Team& team) {
        const auto gx = [&](int64_t d) { return gx_ + d * (chunk_rows_ / size_.directions) * input_gates() * hp_; };
        if (!is_few_rows())
            for (int64_t d = 0; d < size_.directions; d++) project_input(d, 0, 1, gx(d), team);
        const int64_t groups = ceil_div(blocks_, kGroup);
        team.run(groups * size_.directions, [&](int64_t task, int member) {
            const int64_t d = task % size_.directions, u0 = task / size_.directions * kGroup, u1 = min(blocks_, u0 + kGroup);
            const int64_t n = steps_.rows(d, 0);
            T* panels = panels_ + member * kGroup * panel_;
            Step step(*this, d, 0, gx(d), 0, member);
            step.begin(0, n);
            if (n == 0) return;  // no row has a first step
            if (is_few_rows()) return step.few_rows(static_cast<int>(n), u0, u1);
            for (int64_t u = u0; u < u1; u++) pack(d, u, panels + (u - u0) * panel_);
            step.panels = panels, step.first_block = u0;
            step.units(0, n, u0, u1);
        });
        if constexpr (C::kProjects) {
            if (!size_.projection) return;
            team.run(size_.directions,
                     [&](int64_t d, int member) { Step(*this, d, 0, gx(d), 0, member).project(0, steps_.rows(d, 0)); });
        }
    }

    // One time step of one direction.
    struct Step {
        const ForwardLoop& w;  // the whole time loop
        int64_t d, s, row0;
        int member;
        CutRows cut;
        T* gx;               // [rows, G * Hp] of this step, from row gx_first on
        int64_t gx_first;
        T *y, *c, *reserve;  // y: [rows, ld_y]; c: [B, E * Hp]; reserve: [rows, values * Hp] or null
        int64_t values;      // of what the cell saves, the last ones: all of them, or the states behind h alone
        T* unprojected;      // [B, Hp]
        int64_t ld_y;
        const T** previous;  // [B] rows of h_{t-1}
        const T* panels;     // packed W_hh from first_block on
        int64_t first_block = 0;

        Step(const ForwardLoop& loop, int64_t direction, int64_t step, T* gates_x, int64_t first, int of_member)
            : w(loop),
              d(direction),
              s(step),
              row0(loop.steps_.first_row(d, s)),
              member(of_member),
              cut(loop.steps_.cut(d, s)),
              gx(gates_x),
              gx_first(first) {
            const Sizes& z = w.size_;
            ld_y = z.directions * z.output();
            y = static_cast<T*>(w.f_.y) + row0 * ld_y + d * z.output();
            c = C::kHasC ? w.c_ + d * z.batch * w.behind() * w.hp_ : nullptr;
            values = w.size_.recompute ? w.behind() : w.saved();
            reserve = w.f_.reserve && values ? static_cast<T*>(w.f_.reserve) + (d * z.rows + row0) * values * w.hp_ : nullptr;
            unprojected = z.projection ? w.unprojected_ + d * z.batch * w.hp_ : nullptr;
            previous = w.previous_ + member * z.batch;
            panels = w.panels_ + d * w.blocks_ * w.panel_;
        }

        // Finds the previous state of the rows [b0, b1): a row of y, of h_0, of reset_h, or zeros.
        void begin(int64_t b0, int64_t b1) const {
            const Sizes& z = w.size_;
            const int64_t continuing = w.steps_.rows(d, s - 1);
            const T* y_before =
                continuing ? static_cast<const T*>(w.f_.y) + w.steps_.first_row(d, s - 1) * ld_y + d * z.output() : nullptr;
            for (int64_t b = b0; b < b1; b++) {
                const bool is_cut = cut.has(b);
                const T* start = w.weight(is_cut ? w.f_.reset_h : w.f_.h_0);
                if (b < continuing && !is_cut)
                    previous[b] = y_before + b * ld_y;
                else
                    previous[b] = start ? start + (d * z.batch + b) * z.output() : w.zeros_;
            }
        }

        void units(int64_t b0, int64_t b1, int64_t u0, int64_t u1) const {
            if constexpr (kIsProgram) return OwnForward<T, Step>{*this}.units(b0, b1, u0, u1);
            RowPanels<T> p{previous, w.size_.output(), panels - first_block * w.panel_, w.panel_, G * L, take_cells, this};
            p.is_paired = w.is_paired_;
            multiply_tiles<G>(p, b0, b1, u0, u1);
        }

        static void take_cells(const void* step, Vec<T>* sums, int rows, int64_t b, int64_t unit) {
            if constexpr (!kIsProgram) static_cast<const Step*>(step)->cells(sums, rows, b, unit);
        }

        // All rows, W_hh where it lies. Two blocks at once give a cell of one gate chains enough to hide their latency.
        void few_rows(int n, int64_t u0, int64_t u1) const {
            if constexpr (kIsProgram) return OwnForward<T, Step>{*this}.few_rows(n, u0, u1);
            constexpr int NJ = G == 1 ? 2 : 1;
            for (int64_t u = u0; u < u1; u += NJ) few_rows_tile(n, u, static_cast<int>(min(NJ, u1 - u)));
        }

        void few_rows_tile(int n, int64_t u, int n_j) const {
            const int64_t I = w.size_.input, O = w.size_.output();
            Vec<T> acc[2 * Projection::kFewRows * G];  // [n_j][n][G]
            const T* rows[Projection::kFewRows];
            // As project_input does it: chains of kDepth, added up, the biases to the first.
            for (int64_t k0 = 0; k0 < I; k0 += Projection::kDepth) {
                for (int r = 0; r < n; r++) rows[r] = w.weight(w.f_.x) + r * I + k0;
                multiply_in_place(acc, n_j, n, rows, w.matrix(w.f_.weights[d].ih) + k0, I, min(I - k0, Projection::kDepth), u);
                const Vec<T>* product = acc;
                for (int j = 0; j < n_j; j++)
                    for (int r = 0; r < n; r++)
                        for (int g = 0; g < G; g++) {
                            const int64_t column = g * w.hp_ + (u + j) * L;
                            T* sum = gx + r * G * w.hp_ + column;
                            const T* before = k0 ? sum : w.start_ + d * G * w.hp_ + column;
                            (*product++ + Vec<T>::load(before)).store(sum);
                        }
            }
            multiply_in_place(acc, n_j, n, previous, w.matrix(w.f_.weights[d].hh), O, O, u);
            for (int j = 0; j < n_j; j++)
                if constexpr (!kIsProgram) cells(acc + j * n * G, n, 0, (u + j) * L);
        }

        // acc [n_j][n][G]: rows [n] times the blocks from u on of a weight [G*H, ld].
        void multiply_in_place(Vec<T>* acc, int n_j, int n, const T* const* rows, WeightPointer<T> weight, int64_t ld, int64_t depth,
                                 int64_t u) const {
            const int64_t H = w.size_.hidden;
            WeightRows<T> blocks[2 * G];
            for (int j = 0; j < n_j; j++)
                for (int g = 0; g < G; g++)
                    blocks[j * G + g] = {weight + (g * H + (u + j) * L) * ld, min(L, H - (u + j) * L)};
            multiply_weight_rows(acc, n_j, n, G, rows, blocks, ld, depth);
        }

        // The cell on `rows` rows of one block of units, whose hidden products are sums[rows][G].
        __attribute__((noinline)) void cells(const Vec<T>* sums, int rows, int64_t b, int64_t unit) const {
            const int64_t hp = w.hp_, n = min(L, w.size_.hidden - unit);
            const T* in = gx + (b - gx_first) * G * hp + unit;
            const T* apart = w.apart_ + d * hp + unit;
            T* kept = reserve ? reserve + b * values * hp + unit : nullptr;
            T* cells_out = w.f_.cells ? static_cast<T*>(w.f_.cells) + (row0 * w.size_.directions + d) * w.size_.hidden : nullptr;
            const bool gates_too = kept && values == C::kSaved;
            for (int r = 0; r < rows; r++, sums += G, in += G * hp) {
                Vec<T> gates[G], x(0), h(0), cell(0), saved[C::kSaved + 1];
                // The input's part is often the larger one: added last, it does not coarsen the rounding of the chain.
                for (int g = 0; g < G; g++) gates[g] = sums[g] + Vec<T>::load(g < C::kJoint ? in + g * hp : apart);
                if constexpr (C::kJoint < G) x = Vec<T>::load(in + C::kJoint * hp);
                if constexpr (C::kUsesPrevious) h = load_n(previous[b + r] + unit, n);
                if constexpr (C::kHasC) cell = previous_cell(b + r, unit, n);
                h = C::forward(gates, x, h, cell, gates_too ? saved : nullptr);
                if constexpr (C::kHasC) {
                    cell.store(c + (b + r) * hp + unit);
                    if (cells_out) store_n(cell, cells_out + (b + r) * w.size_.directions * w.size_.hidden + unit, n);
                }
                if (gates_too)
                    for (int i = 0; i < C::kSaved; i++, kept += hp) saved[i].store(kept);
                else if (kept)
                    cell.store(kept), kept += hp;
                if (unprojected)
                    h.store(unprojected + (b + r) * hp + unit);
                else
                    store_n(h, y + (b + r) * ld_y + unit, n);
            }
            // Lanes past the last block are nobody's, but reserve is to be a function of the inputs.
            if (kept && unit + L >= w.size_.hidden)
                for (int64_t i = 0; i < rows * values; i++)
                    for (int64_t j = unit + L; j < hp; j += L) Vec<T>(0).store(reserve + (b * values + i) * hp + j);
        }

        OSTINATO_INLINE Vec<T> previous_cell(int64_t b, int64_t unit, int64_t lanes) const {
            if (!cut.has(b)) return Vec<T>::load(c + b * w.hp_ + unit);
            const int64_t H = w.size_.hidden;
            return w.f_.reset_c ? load_n(w.weight(w.f_.reset_c) + (d * w.size_.batch + b) * H + unit, lanes) : Vec<T>(0);
        }

        void project(int64_t b0, int64_t b1) const {
            const int64_t O = w.size_.output(), H = w.size_.hidden;
            for (int64_t b = b0; b < b1; b++) previous[b] = unprojected + b * w.hp_;
            const T* panels_hr = w.panels_hr_ + d * ceil_div(O, L) * H * L;
            multiply_tiles<1>(RowPanels<T>{previous, H, panels_hr, H * L, L, take_projected, this}, b0, b1, 0, ceil_div(O, L));
        }

        static void take_projected(const void* taker, Vec<T>* sums, int rows, int64_t b, int64_t unit) {
            const Step& step = *static_cast<const Step*>(taker);
            const int64_t n = min(L, step.w.size_.output() - unit);
            for (int r = 0; r < rows; r++) store_n(sums[r], step.y + (b + r) * step.ld_y + unit, n);
        }
    };

    // h_n is the state of each row after its own last step, or h_0 where it has none.
    void finish(int64_t d) {
        const int64_t rows = size_.batch * behind(), H = size_.hidden;
        if (f_.h_n) last_states(d);
        if constexpr (C::kHasC) {
            T* c_n = static_cast<T*>(f_.c_n) + d * rows * H;
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < H; j++) c_n[i * H + j] = c_[(d * rows + i) * hp_ + j];
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
    bool is_tiled_, is_paired_;
    int64_t hp_, blocks_, panel_, chunk_rows_;     // rows of gx_
    int64_t tile_rows_ = 0, tile_steps_ = 0;  // of gx_ for one member
    T *panels_, *panels_ih_ = nullptr, *start_, *apart_, *gx_, *zeros_, *c_ = nullptr;
    const T** sources_ = nullptr;
    T** targets_ = nullptr;
    T *panels_hr_ = nullptr, *unprojected_ = nullptr, *product_scratch_;
    T *parameters_ = nullptr, *sums_ = nullptr, *registers_ = nullptr;
    const T** previous_;
};

}  // namespace
}  // namespace ostinato
