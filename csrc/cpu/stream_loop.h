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

// Where the parts of a packed layer lie. Without a base it only counts.
template <class T, class C>
struct PackedLayer {
    static constexpr int64_t L = Vec<T>::kLanes, G = C::kGates;
    T *ih, *hh;  // [blocks][I][G][L], [blocks][O][G][L]
    T* hr;  // [blocks of O][H][L]
    T *start, *apart;  // [blocks][G][L] biases of the input product, [blocks][L] of a gate that takes its products apart
    T *bias_ih, *bias_hh;  // [G*H] as they were given, to be given back
    int64_t bytes;

    PackedLayer(const StreamSizes& z, int64_t layer, void* base) {
        Arena arena(base);
        const int64_t blocks = ceil_div(z.hidden, L);
        ih = arena.take<T>(blocks * z.input_of(layer) * G * L);
        hh = arena.take<T>(blocks * z.output() * G * L);
        hr = arena.take<T>(z.projection ? ceil_div(z.projection, L) * z.hidden * L : 0);
        start = arena.take<T>(blocks * G * L);
        apart = arena.take<T>(blocks * L);
        bias_ih = arena.take<T>(G * z.hidden);
        bias_hh = arena.take<T>(G * z.hidden);
        bytes = arena.used();
    }
};

template <class T, class C>
class StreamLoop {
    static constexpr int L = Vec<T>::kLanes, G = C::kGates;
    using Packed = PackedLayer<T, C>;

public:
    static int64_t packed_bytes(const StreamSizes& z, int64_t layer) { return Packed(z, layer, nullptr).bytes; }

    static void pack(const StreamSizes& z, int64_t layer, const Weights<const void*>& w, void* memory) {
        const Packed p(z, layer, memory);
        const int64_t H = z.hidden, I = z.input_of(layer), O = z.output();
        pack_gates(static_cast<const T*>(w.ih), H, I, p.ih);
        pack_gates(static_cast<const T*>(w.hh), H, O, p.hh);
        if (z.projection)
            for (int64_t u = 0; u < O; u += L)
                pack_transposed(static_cast<const T*>(w.hr) + u * H, H, min(L, O - u), H, p.hr + u * H, L);
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

    static void unpack(const StreamSizes& z, int64_t layer, void* memory, const Weights<void*>& w) {
        const Packed p(z, layer, memory);
        const int64_t H = z.hidden, O = z.output();
        if (w.ih) unpack_gates(p.ih, H, z.input_of(layer), static_cast<T*>(w.ih));
        if (w.hh) unpack_gates(p.hh, H, O, static_cast<T*>(w.hh));
        for (int64_t i = 0; w.hr && i < O * H; i++) {
            const int64_t unit = i / H, k = i % H;
            static_cast<T*>(w.hr)[i] = p.hr[(unit / L * H + k) * L + unit % L];
        }
        for (int64_t i = 0; i < G * H; i++) {
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
        sources_ = arena_.take<const T*>(members * rows);
        previous_ = arena_.take<const T*>(members * tile_rows_);
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
                    layer.project_input(0, blocks_);
                    for (int64_t s = 0; s < piece.steps(); s++) {
                        layer.units(s, 0, blocks_);
                        if (z_.projection) layer.project(s, 0, ceil_div(z_.output(), L));
                    }
                    layer.keep_state();
                }
            }
        });
    }

private:
    static constexpr int64_t kGroup = 4;  // unit blocks that a member claims at once when all share a step
    static constexpr int64_t kTileBytes = 512 << 10, kNear = 4 << 20, kFarRows = 128;  // as in ForwardLoop

    static void pack_gates(const T* w, int64_t hidden, int64_t depth, T* panels) {
        for (int64_t unit = 0; unit < hidden; unit += L, panels += depth * G * L)
            for (int64_t g = 0; g < G; g++)
                pack_transposed(w + (g * hidden + unit) * depth, depth, min(L, hidden - unit), depth, panels + g * L, G * L);
    }

    static void unpack_gates(const T* panels, int64_t hidden, int64_t depth, T* w) {
        for (int64_t g = 0; g < G; g++)
            for (int64_t j = 0; j < hidden; j++)
                for (int64_t k = 0; k < depth; k++) *w++ = panels[((j / L * depth + k) * G + g) * L + j % L];
    }

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
                if (!is_one)
                    team.run(relay_.groups, [&](int64_t group, int member) {
                        OfLayer(piece(member), k).project_input(group * kGroup, last_block(group));
                    });
                relay_.reset();
                const auto share = [&](int64_t, int member) {
                    relay_.run(s1 - s0, member, team.members(), [&](int64_t s, int64_t group) {
                        const OfLayer layer(piece(member), k);
                        if (is_one) layer.project_input(group * kGroup, last_block(group));
                        layer.units(s, group * kGroup, last_block(group));
                    });
                };
                team.run(team.members(), share);
                share(0, 0);  // a closed relay is completed by the caller, who may have claimed no task
                const OfLayer layer(piece(0), k);
                if (z_.projection) {
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
        const T **sources, **previous;

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
            sources = w.sources_ + piece.member * rows;
            previous = w.previous_ + piece.member * w.tile_rows_;
        }

        // gx of the unit blocks [u0, u1), row b of step s at gx + (s * rows + b) * G * Hp and there [block][G][L].
        void project_input(int64_t u0, int64_t u1) const {
            constexpr int64_t kDepth = Product<T>::kDepth;
            const int64_t count = piece.steps() * piece.rows();
            for (int64_t k0 = 0; k0 < input; k0 += kDepth) {
                for (int64_t s = 0, i = 0; s < piece.steps(); s++)
                    for (int64_t b = 0; b < piece.rows(); b++) sources[i++] = x.at(s, b) + k0;
                const Input taker{gx, k0 ? nullptr : packed.start, G * w.hp_};
                const RowPanels<T> panels{
                    sources, min(kDepth, input - k0), packed.ih + k0 * G * L, input * G * L, G * L, take_input, &taker};
                multiply_tiles<G>(panels, 0, count, u0, u1);
            }
        }

        // The unit blocks [u0, u1) of one step.
        void units(int64_t s, int64_t u0, int64_t u1) const {
            const int64_t O = w.z_.output();
            for (int64_t b = 0; b < piece.rows(); b++) previous[b] = s ? y.at(s - 1, b) : h + piece.id(b) * padded(O);
            const Step step{*this, gx + s * piece.rows() * G * w.hp_, y.at(s, 0)};
            multiply_tiles<G>(RowPanels<T>{previous, O, packed.hh, O * G * L, G * L, take_cells, &step}, 0, piece.rows(), u0,
                              u1);
        }

        // The blocks [u0, u1) of the projected state.
        void project(int64_t s, int64_t u0, int64_t u1) const {
            if constexpr (C::kProjects) {
                const int64_t H = w.z_.hidden;
                const T* rows[kProjected];
                for (int64_t b0 = 0; b0 < piece.rows(); b0 += kProjected) {
                    const int64_t count = min(kProjected, piece.rows() - b0);
                    for (int64_t b = 0; b < count; b++) rows[b] = unprojected + (b0 + b) * w.hp_;
                    const Projected taker{y.at(s, b0), y.row, w.z_.output()};
                    multiply_tiles<1>(RowPanels<T>{rows, H, packed.hr, H * L, L, take_projected, &taker}, 0, count, u0, u1);
                }
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
            if constexpr (C::kUsesPrevious) h = load_n(layer.previous[b + r] + unit, n);
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

    static constexpr int64_t kProjected = 64;  // rows that are projected at once

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
    const T **sources_, **previous_;
};

}  // namespace
}  // namespace ostinato
