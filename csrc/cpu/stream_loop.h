// The time loop of a stream: what ForwardLoop computes, over weights that were packed when the stream was made.
//
// Traffic of one step: W_ih and W_hh once, from wherever the caches hold them, and a few rows. So both lie as the products read
// them, front to back: for each block of L units [k][gate][lane], W_ih of all blocks and then W_hh. A tile of one row takes
// four blocks side by side, which are chains enough to hide the latency of a multiply-add. Many steps at once project the input
// of as many as fit the second-level cache, layer by layer, so that W_ih is read once for all of them.
//
// The bits are ForwardLoop's: the input product in chains of kDepth with the biases added to the first, the hidden product one
// chain, the cell's arithmetic the same.
//
// The state h of a row is read where it lies and replaced when all steps of a piece are done; c is replaced at each step, by
// who reads it.
#pragma once

#include "sequence.h"
#include "streams.h"

namespace ostinato {
namespace {

// Weights as the layers have them, and rows as they lie. A form of weights has
//   Value, kChain       the type of all else, and how long a chain of the input product is;
//   Rows                what a product reads of rows: each is read once, by read(), before the products of it;
//   Matrix<NV>          NV * units rows of weights, and their product with columns [k0, k0 + depth) of rows.
template <class T>
struct Dense {
    using Value = T;
    static constexpr int64_t kChain = Product<T>::kDepth;

    struct Rows {
        const T** at = nullptr;

        Rows() = default;
        Rows(Arena& arena, int64_t count, int64_t, int64_t) : at(arena.take<const T*>(count)) {}
        void read(int64_t b, const T* row, int64_t) const { at[b] = row; }
        Rows from(int64_t b) const {
            Rows rest = *this;
            rest.at += b;
            return rest;
        }
    };

    template <int NV>
    struct Matrix {
        static constexpr int64_t L = Vec<T>::kLanes;
        int64_t units, depth;
        T* panels;  // [blocks][k][NV][L]

        Matrix(Arena& arena, int64_t units_of, int64_t depth_of)
            : units(units_of), depth(depth_of), panels(arena.take<T>(ceil_div(units_of, L) * depth_of * NV * L)) {}

        void pack(const void* weights, const void*) const {
            const T* w = static_cast<const T*>(weights);
            T* panel = panels;
            for (int64_t unit = 0; unit < units; unit += L, panel += depth * NV * L)
                for (int64_t g = 0; g < NV; g++)
                    pack_rows(w + (g * units + unit) * depth, depth, min(L, units - unit), depth, panel + g * L, NV * L);
        }
        void unpack(void* weights, void*) const {
            T* w = static_cast<T*>(weights);
            for (int64_t g = 0; g < NV; g++)
                for (int64_t j = 0; j < units; j++)
                    for (int64_t k = 0; k < depth; k++) *w++ = panels[((j / L * depth + k) * NV + g) * L + j % L];
        }
        void multiply(const Rows& rows, int64_t k0, int64_t k_count, int64_t count, int64_t u0, int64_t u1,
                      typename RowPanels<T>::Take take, const void* taker) const {
            RowPanels<T> p{rows.at, k_count, panels + k0 * NV * L, depth * NV * L, NV * L, take, taker};
            p.first = k0;
            multiply_tiles<NV>(p, 0, count, u0, u1);
        }
    };
};

// Where the parts of a packed layer lie. Without a base it only counts.
template <class Form, class C>
struct PackedLayer {
    using T = typename Form::Value;
    static constexpr int64_t L = Vec<T>::kLanes, G = C::kGates;
    Arena arena;
    typename Form::template Matrix<G> ih, hh;
    typename Form::template Matrix<1> hr;
    T *start, *apart;  // [blocks][G][L] biases of the input product, [blocks][L] of a gate that takes its products apart
    T *bias_ih, *bias_hh;  // [G*H] as they were given, to be given back

    PackedLayer(const StreamSizes& z, int64_t layer, void* base)
        : arena(base),
          ih(arena, z.hidden, z.input_of(layer)),
          hh(arena, z.hidden, z.output()),
          hr(arena, z.projection, z.hidden),
          start(arena.take<T>(ceil_div(z.hidden, L) * G * L)),
          apart(arena.take<T>(ceil_div(z.hidden, L) * L)),
          bias_ih(arena.take<T>(G * z.hidden)),
          bias_hh(arena.take<T>(G * z.hidden)) {}
};

template <class Form, class C>
class StreamLoop {
    using T = typename Form::Value;
    using Rows = typename Form::Rows;
    static constexpr int L = Vec<T>::kLanes, G = C::kGates;
    using Packed = PackedLayer<Form, C>;

public:
    static int64_t packed_bytes(const StreamSizes& z, int64_t layer) { return Packed(z, layer, nullptr).arena.used(); }

    static void pack(const StreamSizes& z, int64_t layer, const StreamWeights<const void*>& w, void* memory) {
        const Packed p(z, layer, memory);
        const int64_t H = z.hidden;
        p.ih.pack(w.ih, w.ih_scale);
        p.hh.pack(w.hh, w.hh_scale);
        if (z.projection) p.hr.pack(w.hr, w.hr_scale);
        for (int64_t i = 0; i < G * H; i++) {
            p.bias_ih[i] = w.bias_ih ? static_cast<const T*>(w.bias_ih)[i] : T(0);
            p.bias_hh[i] = w.bias_hh ? static_cast<const T*>(w.bias_hh)[i] : T(0);
        }
        for (int64_t j = 0; j < round_up(H, L); j++) {
            for (int64_t g = 0; g < G; g++) {
                const T in = j < H ? p.bias_ih[g * H + j] : T(0);
                p.start[(j / L * G + g) * L + j % L] = g < C::kJoint && j < H ? in + p.bias_hh[g * H + j] : in;
            }
            p.apart[j] = C::kJoint < G && j < H ? p.bias_hh[min(C::kJoint, G - 1) * H + j] : T(0);
        }
    }

    static void unpack(const StreamSizes& z, int64_t layer, void* memory, const StreamWeights<void*>& w) {
        const Packed p(z, layer, memory);
        if (w.ih) p.ih.unpack(w.ih, w.ih_scale);
        if (w.hh) p.hh.unpack(w.hh, w.hh_scale);
        if (w.hr) p.hr.unpack(w.hr, w.hr_scale);
        for (int64_t i = 0; i < G * z.hidden; i++) {
            if (w.bias_ih) static_cast<T*>(w.bias_ih)[i] = p.bias_ih[i];
            if (w.bias_hh) static_cast<T*>(w.bias_hh)[i] = p.bias_hh[i];
        }
    }

    StreamLoop(const StreamCall& call, int members, void* scratch)
        : call_(call), z_(call.sizes), arena_(scratch), relay_(ceil_div(ceil_div(call.sizes.hidden, L), kGroup), arena_) {
        const int64_t O = z_.output(), n = call.rows, last = z_.layers - 1;
        blocks_ = ceil_div(z_.hidden, L);
        hp_ = blocks_ * L;
        const bool is_shared = n < 2 * members && max(z_.work(0), z_.work(last)) * n >= kWorthRelay;
        together_ = members > 1 && is_shared && (call.steps == 1 || !z_.projection);
        share_rows(members);
        const int64_t rooms = together_ ? 1 : members, rows = tile_rows_ * tile_steps_;
        for (int i = 0; i < 2; i++) between_[i] = arena_.take<T>(last > i ? rooms * rows * O : 0);
        gx_ = arena_.take<T>(rooms * rows * G * hp_);
        unprojected_ = arena_.take<T>(z_.projection ? rooms * tile_rows_ * hp_ : 0);
        sources_ = Rows(arena_, rooms * rows, max(z_.input, last > 0 ? O : 0), z_.planes);
        previous_ = Rows(arena_, members * tile_rows_, O, z_.planes);
        if (z_.projection) unprojected_rows_ = Rows(arena_, rooms * tile_rows_, z_.hidden, z_.planes);
    }

    int64_t scratch_bytes() const { return arena_.used(); }

    void run(Team& team) {
        if (together_) return run_together(team);
        team.run(tiles_, [&](int64_t tile, int member) {
            const int64_t height = call_.rows / tiles_, taller = call_.rows % tiles_;
            const int64_t b0 = tile * height + min(tile, taller), b1 = b0 + height + (tile < taller);
            for (int64_t s0 = 0; s0 < call_.steps; s0 += tile_steps_) {
                Piece piece{*this, s0, min(call_.steps, s0 + tile_steps_), b0, b1, member, member};
                for (int64_t k = 0; k < z_.layers; k++) {
                    const OfLayer layer(piece, k);
                    layer.read_input();
                    layer.project_input(0, blocks_);
                    for (int64_t s = 0; s < piece.steps(); s++) {
                        layer.read_state(s);
                        layer.units(s, 0, blocks_);
                        if (!z_.projection) continue;
                        layer.read_unprojected();
                        layer.project(s, 0, ceil_div(z_.output(), L));
                    }
                    layer.keep_state();
                }
            }
        });
    }

private:
    static constexpr int64_t kGroup = 4;  // unit blocks that a member claims at once when all share a step
    static constexpr int64_t kTileBytes = 512 << 10, kNear = 4 << 20, kFarRows = 128;  // as in ForwardLoop

    // Tiles of rows, and how many steps of a tile are projected at once.
    void share_rows(int members) {
        const int64_t n = call_.rows, step_bytes = G * hp_ * static_cast<int64_t>(sizeof(T));
        const int64_t weight_bytes = z_.work(0) * static_cast<int64_t>(sizeof(T));
        if (!together_) {
            const int64_t height = max_tile_rows<G>(), whole = ceil_div(n, members);
            const int64_t spare = members == 1 ? 1 : weight_bytes <= Shares::kSecondLevel ? 4 : 2;
            const int64_t wanted = members * max(1, min(spare, (whole + height / 2) / height));
            tiles_ = max(1, min(n, max(wanted, ceil_div(n, max(height, kTileBytes / step_bytes)))));
        }
        tile_rows_ = ceil_div(n, tiles_);
        const bool is_far = G * z_.hidden * z_.input * static_cast<int64_t>(sizeof(T)) > kNear;
        tile_steps_ = max(kTileBytes / (max(1, tile_rows_) * step_bytes), is_far ? ceil_div(kFarRows, max(1, tile_rows_)) : 1);
        tile_steps_ = min(call_.steps, tile_steps_);
    }

    // All members share the unit blocks of each step.
    void run_together(Team& team) {
        const auto last_block = [&](int64_t group) { return min(blocks_, (group + 1) * kGroup); };
        for (int64_t s0 = 0; s0 < call_.steps; s0 += tile_steps_) {
            const int64_t s1 = min(call_.steps, s0 + tile_steps_);
            const bool is_one = s1 - s0 == 1;
            for (int64_t k = 0; k < z_.layers; k++) {
                const auto piece = [&](int member) { return Piece{*this, s0, s1, 0, call_.rows, 0, member}; };
                const OfLayer layer(piece(0), k);
                layer.read_input();
                if (!is_one)
                    team.run(relay_.groups, [&](int64_t group, int member) {
                        OfLayer(piece(member), k).project_input(group * kGroup, last_block(group));
                    });
                relay_.reset();
                const auto share = [&](int64_t, int member) {
                    const OfLayer mine(piece(member), k);
                    int64_t read = -1;  // the last step whose states this member has read
                    relay_.run(s1 - s0, member, team.members(), [&](int64_t s, int64_t group) {
                        if (is_one) mine.project_input(group * kGroup, last_block(group));
                        if (read != s) mine.read_state(s);
                        read = s;
                        mine.units(s, group * kGroup, last_block(group));
                    });
                };
                team.run(team.members(), share);
                share(0, 0);  // a closed relay is completed by the caller, who may have claimed no task
                if (z_.projection) {
                    layer.read_unprojected();
                    const int64_t blocks = ceil_div(z_.output(), L);
                    team.run(ceil_div(blocks, kGroup),
                             [&](int64_t group, int) { layer.project(0, group * kGroup, min(blocks, (group + 1) * kGroup)); });
                }
                layer.keep_state();
            }
        }
    }

    // The steps [s0, s1) of the rows [b0, b1) of the call; below, steps and rows count from there.
    struct Piece {
        const StreamLoop& w;
        int64_t s0, s1, b0, b1;
        int room;  // whose scratch
        int member;  // whose lists of rows

        int64_t steps() const { return s1 - s0; }
        int64_t rows() const { return b1 - b0; }
        int64_t id(int64_t b) const { return w.call_.ids ? w.call_.ids[b0 + b] : b0 + b; }
        T* between(int64_t layer) const { return w.between_[layer % 2] + room * w.tile_rows_ * w.tile_steps_ * w.z_.output(); }
    };

    // Rows of all steps of a piece.
    template <class U>
    struct Plane {
        U* p;
        int64_t step, row;
        U* at(int64_t s, int64_t b) const { return p + s * step + b * row; }
    };

    // One layer of a piece.
    struct OfLayer {
        const StreamLoop& w;
        const Piece piece;
        const Packed packed;
        const int64_t input;
        T *h, *c;
        Plane<const T> x;
        Plane<T> y;
        T *gx, *unprojected;  // [steps, rows, G * Hp], [rows, Hp]
        Rows sources, previous, unprojected_rows;

        OfLayer(const Piece& of, int64_t k)
            : w(of.w), piece(of), packed(w.z_, k, w.call_.layers[k].packed), input(w.z_.input_of(k)) {
            const StreamCall& call = w.call_;
            const int64_t O = w.z_.output(), rows = w.tile_rows_ * w.tile_steps_, n = call.rows,
                          first = piece.s0 * n + piece.b0;
            h = static_cast<T*>(call.layers[k].h), c = static_cast<T*>(call.layers[k].c);
            if (k == 0)
                x = {static_cast<const T*>(call.x) + first * input, n * input, input};
            else
                x = {piece.between(k - 1), piece.rows() * O, O};
            if (k == w.z_.layers - 1)
                y = {static_cast<T*>(call.y) + first * O, n * O, O};
            else
                y = {piece.between(k), piece.rows() * O, O};
            gx = w.gx_ + piece.room * rows * G * w.hp_;
            unprojected = w.z_.projection ? w.unprojected_ + piece.room * w.tile_rows_ * w.hp_ : nullptr;
            sources = w.sources_.from(piece.room * rows);
            previous = w.previous_.from(piece.member * w.tile_rows_);
            if (unprojected) unprojected_rows = w.unprojected_rows_.from(piece.room * w.tile_rows_);
        }

        // The input of all rows and steps, for project_input.
        void read_input() const {
            for (int64_t s = 0, i = 0; s < piece.steps(); s++)
                for (int64_t b = 0; b < piece.rows(); b++) sources.read(i++, x.at(s, b), input);
        }

        // gx of the unit blocks [u0, u1), row b of step s at gx + (s * rows + b) * G * Hp and there [block][G][L].
        void project_input(int64_t u0, int64_t u1) const {
            const int64_t count = piece.steps() * piece.rows();
            for (int64_t k0 = 0; k0 < input; k0 += Form::kChain) {
                const Input taker{gx, k0 ? nullptr : packed.start, G * w.hp_};
                packed.ih.multiply(sources, k0, min(Form::kChain, input - k0), count, u0, u1, take_input, &taker);
            }
        }

        // The states before a step, for units.
        void read_state(int64_t s) const {
            const int64_t O = w.z_.output();
            for (int64_t b = 0; b < piece.rows(); b++) previous.read(b, s ? y.at(s - 1, b) : h + piece.id(b) * padded(O), O);
        }

        // The unit blocks [u0, u1) of one step.
        void units(int64_t s, int64_t u0, int64_t u1) const {
            const Step step{*this, gx + s * piece.rows() * G * w.hp_, y.at(s, 0)};
            packed.hh.multiply(previous, 0, w.z_.output(), piece.rows(), u0, u1, take_cells, &step);
        }

        // The states of a step before their projection, for project.
        void read_unprojected() const {
            for (int64_t b = 0; b < piece.rows(); b++) unprojected_rows.read(b, unprojected + b * w.hp_, w.z_.hidden);
        }

        // The blocks [u0, u1) of the projected state.
        void project(int64_t s, int64_t u0, int64_t u1) const {
            if constexpr (C::kProjects) {
                const Projected taker{y.at(s, 0), y.row, w.z_.output()};
                packed.hr.multiply(unprojected_rows, 0, w.z_.hidden, piece.rows(), u0, u1, take_projected, &taker);
            }
        }

        void keep_state() const {
            const int64_t O = w.z_.output();
            for (int64_t b = 0; b < piece.rows(); b++)
                std::memcpy(h + piece.id(b) * padded(O), y.at(piece.steps() - 1, b), static_cast<size_t>(O) * sizeof(T));
        }
    };

    struct Input {
        T* gx;
        const T* start;  // null where gx has earlier chains
        int64_t row;
    };

    static void take_input(const void* taker, Vec<T>* sums, int rows, int64_t b, int64_t unit) {
        const Input& in = *static_cast<const Input*>(taker);
        for (int r = 0; r < rows; r++) {
            T* to = in.gx + (b + r) * in.row + unit * G;
            const T* before = in.start ? in.start + unit * G : to;
            for (int g = 0; g < G; g++) (*sums++ + Vec<T>::load(before + g * L)).store(to + g * L);
        }
    }

    struct Step {
        const OfLayer& layer;
        const T* gx;  // [rows, G * Hp]
        T* y;  // [rows, O]
    };

    // The cell on `rows` rows of one block of units, whose hidden products are sums[rows][G].
    static void take_cells(const void* taker, Vec<T>* sums, int rows, int64_t b, int64_t unit) {
        const Step& step = *static_cast<const Step*>(taker);
        const OfLayer& layer = step.layer;
        const int64_t hp = layer.w.hp_, n = min(L, layer.w.z_.hidden - unit);
        const T* in = step.gx + b * G * hp + unit * G;
        for (int r = 0; r < rows; r++, sums += G, in += G * hp) {
            Vec<T> gates[G], x(0), h(0), cell(0);
            for (int g = 0; g < G; g++)
                gates[g] = sums[g] + Vec<T>::load(g < C::kJoint ? in + g * L : layer.packed.apart + unit);
            if constexpr (C::kJoint < G) x = Vec<T>::load(in + C::kJoint * L);
            if constexpr (C::kUsesPrevious) h = load_n(layer.previous.at[b + r] + unit, n);
            T* c = C::kHasC ? layer.c + layer.piece.id(b + r) * padded(layer.w.z_.hidden) + unit : nullptr;
            if constexpr (C::kHasC) cell = Vec<T>::load(c);
            h = C::forward(gates, x, h, cell, static_cast<Vec<T>*>(nullptr));
            if constexpr (C::kHasC) cell.store(c);
            if (layer.unprojected)
                h.store(layer.unprojected + (b + r) * hp + unit);
            else
                store_n(h, step.y + (b + r) * layer.y.row + unit, n);
        }
    }

    struct Projected {
        T* y;
        int64_t row, output;
    };

    static void take_projected(const void* taker, Vec<T>* sums, int rows, int64_t b, int64_t unit) {
        const Projected& to = *static_cast<const Projected*>(taker);
        const int64_t n = min(L, to.output - unit);
        for (int r = 0; r < rows; r++) store_n(sums[r], to.y + (b + r) * to.row + unit, n);
    }

    const StreamCall& call_;
    const StreamSizes& z_;
    Arena arena_;
    Relay relay_;
    bool together_;
    int64_t blocks_, hp_;
    int64_t tiles_ = 1, tile_rows_ = 0, tile_steps_ = 0;
    T* between_[2];  // outputs of a layer that the next one reads
    T *gx_, *unprojected_;
    Rows sources_, previous_, unprojected_rows_;
};

}  // namespace
}  // namespace ostinato
