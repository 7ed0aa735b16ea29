#include "segments.h"

#include <algorithm>
#include <cstring>

#include "arena.h"
#include "storage.h"
#include "threads.h"

namespace ostinato {
namespace {

// Calls body(first, last) on parts of [0, count), in several threads where that many bytes are worth it.
template <class Body>
void in_parts(int64_t count, int64_t bytes_each, int threads, const Body& body) {
    constexpr int64_t kWorthATeam = 1 << 18;
    Team team(count * bytes_each < kWorthATeam ? 1 : threads);
    const int64_t parts = team.members() == 1 ? 1 : 4 * team.members();
    team.run(parts, [&](int64_t part, int) { body(part * count / parts, (part + 1) * count / parts); });
}

template <class S>
void add_narrow(const void* from, int64_t count, double* sums) {
    for (int64_t i = 0; i < count; i += kWide) {
        const int64_t n = std::min(kWide, count - i);
        Halves h = {};
        std::memcpy(&h, static_cast<const uint16_t*>(from) + i, static_cast<size_t>(2 * n));
        const Floats f = S::widen(h);
        for (int64_t j = 0; j < n; j++) sums[i + j] += static_cast<double>(f[j]);
    }
}

template <class S>
void store_narrow(const double* sums, int64_t count, void* to) {
    for (int64_t i = 0; i < count; i += kWide) {
        const int64_t n = std::min(kWide, count - i);
        Floats f = {};
        for (int64_t j = 0; j < n; j++) f[j] = static_cast<float>(sums[i + j]);
        const Halves h = S::narrow(f);
        std::memcpy(static_cast<uint16_t*>(to) + i, &h, static_cast<size_t>(2 * n));
    }
}

// sums += a row of numbers, and a row of numbers = sums.
void add(Dtype dtype, const void* from, int64_t count, double* sums) {
    if (dtype == Dtype::kBFloat16) return add_narrow<BFloat16>(from, count, sums);
    if (dtype == Dtype::kFloat16) return add_narrow<Float16>(from, count, sums);
    for (int64_t i = 0; i < count; i++)
        sums[i] += dtype == Dtype::kFloat64 ? static_cast<const double*>(from)[i]
                                            : static_cast<double>(static_cast<const float*>(from)[i]);
}

void store(Dtype dtype, const double* sums, int64_t count, void* to) {
    if (dtype == Dtype::kBFloat16) return store_narrow<BFloat16>(sums, count, to);
    if (dtype == Dtype::kFloat16) return store_narrow<Float16>(sums, count, to);
    for (int64_t i = 0; i < count; i++)
        if (dtype == Dtype::kFloat64)
            static_cast<double*>(to)[i] = sums[i];
        else
            static_cast<float*>(to)[i] = static_cast<float>(sums[i]);
}

// Row `row` of an array whose rows have so many bytes. What the arena has handed out is written through const pointers, because
// a call names what the walk reads.
const char* at(const void* array, int64_t row, size_t bytes) {
    return static_cast<const char*>(array) + row * static_cast<int64_t>(bytes);
}
char* at(void* array, int64_t row, size_t bytes) { return static_cast<char*>(array) + row * static_cast<int64_t>(bytes); }

void copy_or_clear(char* to, const char* from, size_t bytes) {
    if (from)
        std::memcpy(to, from, bytes);
    else
        std::memset(to, 0, bytes);
}

// Takes arrays for those of a call that are there.
struct Taker {
    Arena& arena;
    int64_t bytes;

    void* operator()(const void* wanted, int64_t count) const { return wanted ? arena.take<char>(count * bytes) : nullptr; }
};

void name_arrays(const Taker& take, const Sizes& z, const Forward& call, Forward& packed) {
    const int64_t D = z.directions, states = D * z.batch;
    packed.y = take(call.y, z.rows * D * z.output());
    packed.h_n = take(call.h_n, states * z.output());
    packed.c_n = take(call.c_n, states * z.hidden);
    packed.cells = take(call.cells, z.rows * D * z.hidden);
}

void name_arrays(const Taker& take, const Sizes& z, const Backward& call, Backward& packed) {
    const int64_t D = z.directions, states = D * z.batch, O = z.output(), H = z.hidden;
    packed.y = take(call.y, z.rows * D * O), packed.dy = take(call.dy, z.rows * D * O);
    packed.dcells = take(call.dcells, z.rows * D * H);
    packed.dh_n = take(call.dh_n, states * O), packed.dc_n = take(call.dc_n, states * H);
    packed.dx = take(call.dx, z.rows * z.input);
    packed.dh_0 = take(call.dh_0 ? call.dh_0 : call.dcut_h, states * O);
    packed.dc_0 = take(call.dc_0 ? call.dc_0 : call.dcut_c, states * H);
    packed.dcut_h = packed.dcut_c = nullptr;
}

}  // namespace

Segments::Segments(Dtype dtype, const Sizes& sizes, const Cuts& cuts)
    : dtype_(dtype), original_(sizes), cuts_(cuts), is_empty_(static_cast<size_t>(sizes.batch), true) {
    const int64_t T = sizes.steps, B = sizes.batch;
    std::vector<int64_t> offsets(static_cast<size_t>(T) + 1, 0), lengths(static_cast<size_t>(B), 0);
    for (int64_t t = 0; t < T; t++) {
        const int64_t rows = sizes.batch_sizes ? sizes.batch_sizes[t] : B;
        offsets[t + 1] = offsets[t] + rows;
        for (int64_t b = 0; b < rows; b++) lengths[b]++;
    }
    if (cuts.lengths) lengths.assign(cuts.lengths, cuts.lengths + B);
    for (int64_t b = 0; b < B; b++) {
        is_empty_[b] = lengths[b] == 0;
        for (int64_t t = 0; t < lengths[b]; t++) {
            const bool is_reset = cuts.resets && cuts.resets[offsets[t] + b];
            if (t && is_reset) segments_.back().is_last = false;
            if (t == 0 || is_reset) segments_.push_back({b, t, 0, t == 0, true, is_reset});
            segments_.back().steps++;
        }
        if (cuts.lengths)
            for (int64_t t = lengths[b]; t < T; t++) unused_.push_back(offsets[t] + b);
    }
    std::stable_sort(segments_.begin(), segments_.end(), [](const Segment& a, const Segment& b) { return a.steps > b.steps; });
    const int64_t steps = segments_.empty() ? 0 : segments_.front().steps;
    auto active = static_cast<int64_t>(segments_.size());
    for (int64_t t = 0; t < steps; t++) {
        while (segments_[active - 1].steps <= t) active--;
        batch_sizes_.push_back(active);
        for (int64_t i = 0; i < active; i++) positions_.push_back(offsets[segments_[i].start + t] + segments_[i].row);
    }
    sizes_ = sizes;
    sizes_.steps = steps, sizes_.rows = static_cast<int64_t>(positions_.size());
    sizes_.batch = static_cast<int64_t>(segments_.size()), sizes_.batch_sizes = batch_sizes_.data();
}

template <class Call>
Segments::Packed<Call> Segments::packed(const Call& call, void* scratch) const {
    Arena arena(scratch);
    Call packed = call;
    packed.sizes = sizes_;
    packed.cuts = {};
    const int64_t states = sizes_.directions * sizes_.batch;
    const Taker take{arena, stored_bytes(dtype_)};
    packed.x = take(call.x, sizes_.rows * sizes_.input);
    packed.h_0 = take(call.h_0 ? call.h_0 : cuts_.h, states * sizes_.output());
    packed.c_0 = take(call.c_0 ? call.c_0 : cuts_.c, states * sizes_.hidden);
    name_arrays(take, sizes_, call, packed);
    return {packed, arena.used()};
}

template Segments::Packed<Forward> Segments::packed(const Forward&, void*) const;
template Segments::Packed<Backward> Segments::packed(const Backward&, void*) const;

void Segments::gather(const Forward& call, const Forward& packed, int threads) const {
    gather_rows(call.x, sizes_.input, packed.x, threads);
    gather_states(call.h_0, cuts_.h, sizes_.output(), packed.h_0);
    gather_states(call.c_0, cuts_.c, sizes_.hidden, packed.c_0);
}

void Segments::scatter(const Forward& call, const Forward& packed, int threads) const {
    scatter_rows(packed.y, sizes_.directions * sizes_.output(), call.y, threads);
    scatter_rows(packed.cells, sizes_.directions * sizes_.hidden, call.cells, threads);
    scatter_ends(packed.h_n, call.h_0, sizes_.output(), call.h_n);
    scatter_ends(packed.c_n, call.c_0, sizes_.hidden, call.c_n);
}

void Segments::gather(const Backward& call, const Backward& packed, int threads) const {
    const int64_t D = sizes_.directions, O = sizes_.output(), H = sizes_.hidden;
    gather_rows(call.x, sizes_.input, packed.x, threads);
    gather_rows(call.y, D * O, packed.y, threads), gather_rows(call.dy, D * O, packed.dy, threads);
    gather_rows(call.dcells, D * H, packed.dcells, threads);
    gather_states(call.h_0, cuts_.h, O, packed.h_0), gather_states(call.c_0, cuts_.c, H, packed.c_0);
    // The gradient of h_n comes in where a row's walk ends.
    for (int64_t d = 0; d < D; d++)
        for (int64_t i = 0; i < sizes_.batch; i++) {
            const auto end = [&](const void* from, int64_t width, const void* to) {
                const auto bytes = static_cast<size_t>(width * stored_bytes(dtype_));
                const bool is_end = segments_[i].ends_row(d);
                if (to)
                    copy_or_clear(const_cast<char*>(at(to, d * sizes_.batch + i, bytes)),
                                  is_end ? at(from, d * original_.batch + segments_[i].row, bytes) : nullptr, bytes);
            };
            end(call.dh_n, O, packed.dh_n), end(call.dc_n, H, packed.dc_n);
        }
}

void Segments::scatter(const Backward& call, const Backward& packed, int threads) const {
    scatter_rows(packed.dx, sizes_.input, call.dx, threads);
    scatter_starts(packed.dh_0, call.dh_n, sizes_.output(), call.dh_0, call.dcut_h);
    scatter_starts(packed.dc_0, call.dc_n, sizes_.hidden, call.dc_0, call.dcut_c);
}

void Segments::gather_rows(const void* from, int64_t width, const void* packed, int threads) const {
    if (!packed) return;
    const auto bytes = static_cast<size_t>(width * stored_bytes(dtype_));
    in_parts(sizes_.rows, static_cast<int64_t>(bytes), threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
            std::memcpy(const_cast<char*>(at(packed, i, bytes)), at(from, positions_[i], bytes), bytes);
    });
}

void Segments::scatter_rows(const void* packed, int64_t width, void* to, int threads) const {
    if (!to) return;
    const auto bytes = static_cast<size_t>(width * stored_bytes(dtype_));
    in_parts(sizes_.rows, static_cast<int64_t>(bytes), threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) std::memcpy(at(to, positions_[i], bytes), at(packed, i, bytes), bytes);
    });
    for (int64_t position : unused_) std::memset(at(to, position, bytes), 0, bytes);
}

// Each segment's state at its start: that of its row, or that of a cut.
void Segments::gather_states(const void* first, const void* cut, int64_t width, const void* packed) const {
    if (!packed) return;
    const auto bytes = static_cast<size_t>(width * stored_bytes(dtype_));
    for (int64_t d = 0; d < sizes_.directions; d++)
        for (int64_t i = 0; i < sizes_.batch; i++) {
            const void* from = segments_[i].starts_at_cut(d) ? cut : first;
            copy_or_clear(const_cast<char*>(at(packed, d * sizes_.batch + i, bytes)),
                          from ? at(from, d * original_.batch + segments_[i].row, bytes) : nullptr, bytes);
        }
}

// h_n: where each row's walk ends; a row without segments has the state before.
void Segments::scatter_ends(const void* packed, const void* before, int64_t width, void* out) const {
    if (!out) return;
    const auto bytes = static_cast<size_t>(width * stored_bytes(dtype_));
    const int64_t B = original_.batch;
    for (int64_t d = 0; d < sizes_.directions; d++) {
        for (int64_t i = 0; i < sizes_.batch; i++)
            if (segments_[i].ends_row(d))
                std::memcpy(at(out, d * B + segments_[i].row, bytes), at(packed, d * sizes_.batch + i, bytes), bytes);
        for (int64_t b = 0; b < B; b++)
            if (is_empty_[b]) copy_or_clear(at(out, d * B + b, bytes), before ? at(before, d * B + b, bytes) : nullptr, bytes);
    }
}

// The gradients of h_0, and of the state at cuts, summed over a row's segments.
void Segments::scatter_starts(const void* packed, const void* passed, int64_t width, void* first, void* cut) const {
    const auto bytes = static_cast<size_t>(width * stored_bytes(dtype_));
    const int64_t B = original_.batch;
    if (first) std::memset(first, 0, static_cast<size_t>(sizes_.directions * B) * bytes);
    std::vector<double> sums(cut ? static_cast<size_t>(sizes_.directions * B * width) : 0, 0.0);
    for (int64_t d = 0; d < sizes_.directions; d++) {
        for (int64_t i = 0; i < sizes_.batch; i++) {
            const int64_t row = d * B + segments_[i].row;
            if (!segments_[i].starts_at_cut(d)) {
                if (first) std::memcpy(at(first, row, bytes), at(packed, d * sizes_.batch + i, bytes), bytes);
            } else if (cut) {
                add(dtype_, at(packed, d * sizes_.batch + i, bytes), width, sums.data() + row * width);
            }
        }
        for (int64_t b = 0; b < B; b++)
            if (is_empty_[b] && first && passed) std::memcpy(at(first, d * B + b, bytes), at(passed, d * B + b, bytes), bytes);
    }
    if (cut) store(dtype_, sums.data(), sizes_.directions * B * width, cut);
}

}  // namespace ostinato
