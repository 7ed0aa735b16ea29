// Matrix products: register tiles over packed panels, and a blocked product over all steps built from them.
//
// Legend: A is [M, K], B is [K, N], C is [M, N]. L lanes per vector, a panel holds B for some columns, k-major.
//
// Every element of C is a sum of chains of fused multiply-adds in ascending k (design, decision 7). A chain is kDepth long and
// the chains are added in order: the rounding error then grows with sqrt(kDepth) + sqrt(K / kDepth) instead of sqrt(K). The cuts
// depend on k alone, so blocking over M and N only chooses who computes an element.
//
// Arithmetic: a tile holds MR x NJ x NV accumulators, 24 of 32 registers (AVX-512, NEON) or 12 of 16 (AVX2). Per k it
// loads NJ * NV panel vectors and broadcasts MR scalars for MR * NJ * NV multiply-adds: 11 loads for 24 at 8 x 3, 10 at 6 x 4.
// Memory: a panel of kDepth x (3 vectors) fits the first-level cache (24 KiB at AVX-512) and is reused for every row
// of the task; the A block of a task (kTaskRows x kDepth) stays in the second level and is reused for every panel. A^T is read
// where it lies: packed, the weight gradients of T100 B32 H256 took 5% longer.
#pragma once

#include "engine.h"
#include "threads.h"
#include "vec.h"

namespace ostinato {
namespace {

constexpr int kAccumulators = kRegisters == 32 ? 24 : 12;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t greatest_common_divisor(int64_t a, int64_t b) { return b ? greatest_common_divisor(b, a % b) : a; }

// A as MR row pointers, each row contiguous in k.
template <class T, int MR>
struct RowPointers {
    const T* row[MR];
    T at(int r, int64_t k) const { return row[r][k]; }
};

// A as MR neighbouring columns of rows that are `ld` elements apart.
template <class T>
struct Columns {
    const T* p;
    int64_t ld;
    T at(int r, int64_t k) const { return p[k * ld + r]; }
};

// acc[j][r][v] += sum over k of A(r, k) * panel_j[k][v], in ascending k.
// panel: NJ panels, panel_stride elements apart, each [depth][NV][L], k_stride elements from one k to the next.
template <int MR, int NJ, int NV, class T, class A>
OSTINATO_INLINE void accumulate(Vec<T> (&acc)[NJ][MR][NV], const A& a, const T* panel, int64_t panel_stride, int64_t depth,
                                int64_t k_stride = NV * Vec<T>::kLanes) {
    constexpr int L = Vec<T>::kLanes;
    for (int64_t k = 0; k < depth; k++) {
        Vec<T> b[NJ][NV];
    _Pragma("GCC unroll 8") for (int j = 0; j < NJ; j++)
            _Pragma("GCC unroll 8") for (int v = 0; v < NV; v++)
                b[j][v] = Vec<T>::load(panel + j * panel_stride + k * k_stride + v * L);
        _Pragma("GCC unroll 8") for (int r = 0; r < MR; r++) {
            const Vec<T> s(a.at(r, k));
            _Pragma("GCC unroll 8") for (int j = 0; j < NJ; j++)
                _Pragma("GCC unroll 8") for (int v = 0; v < NV; v++) acc[j][r][v] = fma(s, b[j][v], acc[j][r][v]);
        }
    }
}

// One k of the panels below, and their product with A(., k).
template <bool kOdd, int MR, int NJ, int NV, class A>
OSTINATO_INLINE void accumulate_half(Vec<float> (&acc)[NJ][MR][NV], const A& a, const float* words, int64_t panel_stride,
                                     int64_t k) {
    using Bits = Vec<float>::Bits;
    Vec<float> s[MR];
    _Pragma("GCC unroll 8") for (int r = 0; r < MR; r++) s[r] = Vec<float>(a.at(r, k));
    _Pragma("GCC unroll 8") for (int j = 0; j < NJ; j++)
        _Pragma("GCC unroll 8") for (int v = 0; v < NV; v++) {
            const Bits both = Bits(Vec<float>::load(words + j * panel_stride + v * Vec<float>::kLanes).v);
            const Vec<float> b(Vec<float>::Raw(kOdd ? both & 0xffff0000 : both << 16));
            _Pragma("GCC unroll 8") for (int r = 0; r < MR; r++) acc[j][r][v] = fma(s[r], b, acc[j][r][v]);
        }
}

// The same for panels of bfloat16, two k to a word: [ceil(depth / 2)][NV][L] words, the even k in the lower half. Half the
// bytes, for time loops that wait for their weights; widening is exact, so the bits are those of a float32 panel.
template <int MR, int NJ, int NV, class A>
OSTINATO_INLINE void accumulate_pairs(Vec<float> (&acc)[NJ][MR][NV], const A& a, const float* panel, int64_t panel_stride,
                                      int64_t depth) {
    int64_t k = 0;
    for (; k + 1 < depth; k += 2, panel += NV * Vec<float>::kLanes) {
        accumulate_half<false>(acc, a, panel, panel_stride, k);
        accumulate_half<true>(acc, a, panel, panel_stride, k + 1);
    }
    if (k < depth) accumulate_half<false>(acc, a, panel, panel_stride, k);
}

// Makes such words of two rows of NV vectors, one after the other.
template <int NV>
OSTINATO_INLINE void pair_up(const float* rows, float* words) {
    constexpr int L = Vec<float>::kLanes;
    using Bits = Vec<float>::Bits;
    for (int v = 0; v < NV; v++) {
        const Bits even = Bits(Vec<float>::load(rows + v * L).v), odd = Bits(Vec<float>::load(rows + (NV + v) * L).v);
        Vec<float>(Vec<float>::Raw(even >> 16 | (odd & 0xffff0000))).store(words + v * L);
    }
}

// Where a weight lies: as T, or in bfloat16, of which the float32 engine reads half the bytes and computes the same numbers.
template <class T>
struct WeightPointer {
    const void* p = nullptr;
    bool is_bfloat16 = false;

    WeightPointer() = default;
    WeightPointer(const T* w) : p(w) {}
    WeightPointer(const void* w, bool narrow) : p(w), is_bfloat16(narrow) {}
    explicit operator bool() const { return p; }
    WeightPointer operator+(int64_t elements) const {
        const int64_t size = is_bfloat16 ? 2 : static_cast<int64_t>(sizeof(T));
        return {static_cast<const char*>(p) + elements * size, is_bfloat16};
    }
};

// The same with the columns of W^T, i.e. rows of W, instead of a panel: NV * NJ times L rows, each contiguous in k. For
// products of so few rows of A that packing W would cost as much as using it.
template <class T>
struct WeightRows {
    WeightPointer<T> w;
    int64_t rows;  // how many of the L rows exist; the others count as zero
};

// sums[n_j][MR][n_v], one of n_j * n_v = NB blocks of weight rows each, which lie as S.
template <int MR, int NB, class S, class T>
__attribute__((noinline)) void multiply_blocks(Vec<T>* sums, int n_v, const T* const* rows, const WeightRows<T>* w, int64_t ld,
                                               int64_t depth) {
    constexpr int64_t E = Piece<T>::kElements, kLine = 64 / static_cast<int64_t>(sizeof(S));
    RowPointers<T, MR> a;
    for (int r = 0; r < MR; r++) a.row[r] = rows[r];
    constexpr int64_t kAtOnce = kColumns<T, S>;
    Vec<T> acc[NB][MR] = {}, columns[kAtOnce];
    // One cache line of each row at a time: the rows of several gates together would evict each other's lines.
    for (int64_t k0 = 0; k0 < depth; k0 += kLine)
        _Pragma("GCC unroll 8") for (int i = 0; i < NB; i++) {
            const S* rows_of_w = static_cast<const S*>(w[i].w.p);
            const int64_t end = min(k0 + kLine, depth);
            const auto whole = [&](int64_t k) {
                load_columns<T>(rows_of_w + k, ld, columns);
                _Pragma("GCC unroll 8") for (int64_t e = 0; e < kAtOnce; e++)
                    _Pragma("GCC unroll 8") for (int r = 0; r < MR; r++)
                        acc[i][r] = fma(Vec<T>(a.at(r, k + e)), columns[e], acc[i][r]);
            };
            int64_t k = k0;
            if (w[i].rows == Vec<T>::kLanes && end == k0 + kLine)
                _Pragma("GCC unroll 8") for (; k < k0 + kLine; k += kAtOnce) whole(k);
            else if (w[i].rows == Vec<T>::kLanes)
                for (; k + kAtOnce <= end; k += kAtOnce) whole(k);
            else if (!w[i].rows)
                continue;
            for (; k < end; k += E) {
                const int64_t n = min(E, end - k);
                Vec<T> parts[E];
                load_partial_columns(rows_of_w + k, ld, w[i].rows, n, parts);
                for (int64_t e = 0; e < n; e++)
                    _Pragma("GCC unroll 8") for (int r = 0; r < MR; r++)
                        acc[i][r] = fma(Vec<T>(a.at(r, k + e)), parts[e], acc[i][r]);
            }
        }
    _Pragma("GCC unroll 8") for (int i = 0; i < NB; i++)
        _Pragma("GCC unroll 8") for (int r = 0; r < MR; r++) sums[(i / n_v * MR + r) * n_v + i % n_v] = acc[i][r];
}

template <class T, class S>
struct MultiplyBlocks {
    template <int MR, int NB>
    static constexpr auto kFor = multiply_blocks<MR, NB, S, T>;

    using Multiply = void (*)(Vec<T>*, int, const T* const*, const WeightRows<T>*, int64_t, int64_t);
    static constexpr Multiply kOf[4][4] = {{kFor<1, 1>, kFor<1, 2>, kFor<1, 3>, kFor<1, 4>},  // [rows - 1][blocks - 1]
                                           {kFor<2, 1>, kFor<2, 2>, kFor<2, 3>, kFor<2, 4>},
                                           {kFor<3, 1>, kFor<3, 2>, kFor<3, 3>, kFor<3, 4>},
                                           {kFor<4, 1>, kFor<4, 2>, kFor<4, 3>, kFor<4, 4>}};
};

// sums[n_j][n_rows][n_v] = 1 to 4 rows of A times n_j * n_v <= 4 blocks w[n_j][n_v]. The cell and what is done with the sums
// are not known here, so that this is compiled once for each number of rows and blocks.
template <class T>
inline void multiply_weight_rows(Vec<T>* sums, int n_j, int n_rows, int n_v, const T* const* rows, const WeightRows<T>* w,
                                 int64_t ld, int64_t depth) {
    if constexpr (sizeof(T) == 4) {
        if (w->w.is_bfloat16) return MultiplyBlocks<T, uint16_t>::kOf[n_rows - 1][n_j * n_v - 1](sums, n_v, rows, w, ld, depth);
    }
    MultiplyBlocks<T, T>::kOf[n_rows - 1][n_j * n_v - 1](sums, n_v, rows, w, ld, depth);
}

// Writes L columns of B = W^T, i.e. L rows of a row-major W, as [depth][stride] lanes: dst[k * stride + lane].
// rows: how many of the L rows exist; the others become zero.
template <class T, class S>
inline void pack_rows(const S* w, int64_t ld, int64_t rows, int64_t depth, T* dst, int64_t stride) {
    constexpr int64_t E = Piece<T>::kElements, kAtOnce = kColumns<T, S>;
    Vec<T> columns[kAtOnce];
    int64_t k = 0;
    if (rows == Vec<T>::kLanes)
        for (; k + kAtOnce <= depth; k += kAtOnce) {
            load_columns<T>(w + k, ld, columns);
            for (int64_t i = 0; i < kAtOnce; i++) columns[i].store(dst + (k + i) * stride);
        }
    for (; k < depth; k += E) {
        const int64_t n = min(E, depth - k);
        load_partial_columns(w + k, ld, rows, n, columns);
        for (int64_t i = 0; i < n; i++) columns[i].store(dst + (k + i) * stride);
    }
}
template <class T>
inline void pack_transposed(WeightPointer<T> w, int64_t ld, int64_t rows, int64_t depth, T* dst, int64_t stride) {
    if constexpr (sizeof(T) == 4) {
        if (w.is_bfloat16) return pack_rows(static_cast<const uint16_t*>(w.p), ld, rows, depth, dst, stride);
    }
    pack_rows(static_cast<const T*>(w.p), ld, rows, depth, dst, stride);
}

// ---- sources of B: pack(dst, stride, k0, depth, column) writes L columns from `column` on, dst[k * stride + lane];
// multiply(acc, a, k0, depth, column) makes acc, which is zero, A * (as many columns, from `column` on) without a packed copy ----

// B = W^T for a weight of shape [gates * hidden, K]; column c is row (c / padded) * hidden + c % padded of W.
// With padded a multiple of the lanes, a vector never crosses a gate, and columns past `hidden` are zero.
template <class T>
struct TransposedWeight {
    WeightPointer<T> w;
    int64_t ld, hidden, padded, gates;
    int64_t columns() const { return gates * padded; }
    void pack(T* dst, int64_t stride, int64_t k0, int64_t depth, int64_t column) const {
        const WeightRows<T> source = rows_of(k0, column);
        pack_transposed(source.w, ld, source.rows, depth, dst, stride);
    }
    WeightRows<T> rows_of(int64_t k0, int64_t column) const {
        const int64_t gate = column / padded, unit = column % padded;
        return {w + (gate * hidden + unit) * ld + k0, max(0, min(Vec<T>::kLanes, hidden - unit))};
    }
    template <int MR, int NV>
    void multiply(Vec<T> (&acc)[1][MR][NV], const RowPointers<T, MR>& a, int64_t k0, int64_t depth, int64_t column) const {
        WeightRows<T> source[NV];
        for (int v = 0; v < NV; v++) {
            const int64_t first = column + v * Vec<T>::kLanes;
            source[v] = first < columns() ? rows_of(k0, first) : WeightRows<T>{w, 0};
        }
        multiply_weight_rows(acc[0][0], 1, MR, NV, a.row, source, ld, depth);
    }
};

// B given by its rows, each contiguous: row k at base + k * ld, or at table[k] where there is a table.
template <class T>
struct RowMatrix {
    const T* base;
    int64_t ld, columns;
    const T* const* table;
    void pack(T* dst, int64_t stride, int64_t k0, int64_t depth, int64_t column) const {
        const int64_t n = max(0, min(Vec<T>::kLanes, columns - column));
        for (int64_t k = 0; k < depth; k++) {
            const T* row = table ? table[k0 + k] : base + (k0 + k) * ld;
            load_n(row + (n ? column : 0), n).store(dst + k * stride);
        }
    }
    // Where there is no table. NV vectors of adjacent columns.
    template <int MR, int NV>
    void multiply(Vec<T> (&acc)[1][MR][NV], const RowPointers<T, MR>& a, int64_t k0, int64_t depth, int64_t column) const {
        constexpr int64_t L = Vec<T>::kLanes;
        const T* rows = base + k0 * ld + column;
        if (column + NV * L <= columns) return ostinato::accumulate<MR, 1, NV>(acc, a, rows, 0, depth, ld);
        for (int64_t k = 0; k < depth; k++)
            _Pragma("GCC unroll 4") for (int v = 0; v < NV; v++) {
                const int64_t at = v * L, n = max(0, min(L, columns - column - at));
                const Vec<T> b = load_n(rows + k * ld + (n ? at : 0), n);
                _Pragma("GCC unroll 8") for (int r = 0; r < MR; r++)
                    acc[0][r][v] = fma(Vec<T>(a.at(r, k)), b, acc[0][r][v]);
            }
    }
};

// C[b] = start + A[b] * B for `batches` pairs that share B; or, with segments > 1, one C whose k runs through
// A[0], A[1], ... one after another, `depth` each.
// One type for both sources of B: its tiles are most of the engine's code, and do not depend on where a panel comes from.
template <class T>
struct Product {
    int64_t rows = 0, columns = 0, depth = 0;  // M, N (of C; B may be packed wider), K of one segment
    int batches = 1, segments = 1;
    const T* a[kMostGates] = {};
    // Element (m, k) at a + m * a_row + k * a_column; one of them is 1. Where it is a_row, 7 elements past a row may be read.
    int64_t a_row = 0, a_column = 1;
    T* c[kMostGates] = {};
    int64_t ldc = 0;
    const T* start = nullptr;  // [N] added to the first chain (readable up to a multiple of the lanes), or none
    bool resume = false;       // the sum goes on from what C holds
    // B is one of these; the other is empty.
    TransposedWeight<T> weight{};
    RowMatrix<T> matrix{};

    static constexpr int L = Vec<T>::kLanes;
    // kDepth is also part of the result: it says where the sum over k is cut, whatever the instruction set.
    static constexpr int64_t kDepth = 128, kTaskRows = 480, kTaskColumns = 384;
    // Up to this many rows, B is used where it lies: packing it would cost as much as the product.
    static constexpr int64_t kFewRows = 4;

    // Elements of scratch that one member of the team needs: what is packed of B.
    static constexpr int64_t scratch() { return kDepth * kTaskColumns; }

    // Runs on the whole team; scratch_base is [members][scratch()].
    void run(Team& team, T* scratch_elements) {
        if (rows == 0 || columns == 0) return;
        scratch_base = scratch_elements;
        // Panels of 3 or of 4 vectors, whichever leaves fewer of them empty: 16 vectors are four panels of 4.
        const int64_t vectors = ceil_div(columns, L);
        if (round_up(vectors, 4) < round_up(vectors, 3))
            run_panels<4>(team);
        else
            run_panels<3>(team);
    }

private:
    template <int NR>
    void run_panels(Team& team) {
        constexpr int64_t MR = kAccumulators / NR, kWidth = NR * L;
        const int64_t panels = ceil_div(columns, kWidth), members = team.members();
        const bool few = rows <= kFewRows && a_column == 1;
        // Members share the columns where these can be shared evenly, since then nobody packs what another packs too; else rows.
        const int64_t across = few ? members : greatest_common_divisor(panels, members);
        task_columns = min(ceil_div(panels, across), kTaskColumns / kWidth) * kWidth;
        column_tasks = ceil_div(columns, task_columns);
        tiles = ceil_div(rows, MR);
        row_tasks = few ? batches : ceil_div(batches * tiles * MR, kTaskRows);
        while (!few && column_tasks * row_tasks % members && row_tasks < batches * tiles) row_tasks++;
        team.run(column_tasks * row_tasks, [&](int64_t task, int member) {
            const int64_t n0 = task % column_tasks * task_columns, n1 = min(columns, n0 + task_columns), part = task / column_tasks;
            if (few) return few_rows<NR>(static_cast<int>(part), n0, n1);
            const int64_t all = batches * tiles;
            block<NR>(part * all / row_tasks, (part + 1) * all / row_tasks, n0, n1, scratch_base + member * scratch());
        });
    }

    // Tiles [t0, t1) of MR rows, counted through the batches, by columns [n0, n1). The batches share what is packed of B.
    template <int NR>
    void block(int64_t t0, int64_t t1, int64_t n0, int64_t n1, T* panels) const {
        constexpr int64_t MR = kAccumulators / NR, kWidth = NR * L;
        bool first = !resume;
        for (int segment = 0; segment < segments; segment++)
            for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
                const int64_t kn = min(kDepth, depth - k0);
                for (int64_t n = n0; n < n1; n += kWidth)
                    for (int v = 0; v < NR; v++)
                        pack_column(panels + (n - n0) * kn + v * L, kWidth, segment * depth + k0, kn, n + v * L);
                for (int64_t n = n0; n < n1; n += kWidth)
                    for (int64_t t = t0; t < t1; t++) {
                        const int64_t batch = t / tiles, m = t % tiles * MR;
                        tile_rows<NR>(min(MR, rows - m), a[batch + segment], panels + (n - n0) * kn, c[batch], m, n, k0, kn, first);
                    }
                first = false;
            }
    }

    template <int NR>
    void few_rows(int batch, int64_t n0, int64_t n1) const {
        if (rows == 1) return few_rows_tile<1, NR>(batch, n0, n1);
        if (rows == 2) return few_rows_tile<2, NR>(batch, n0, n1);
        few_rows_tile<kFewRows, NR>(batch, n0, n1);
    }

    template <int R, int NR>
    void few_rows_tile(int batch, int64_t n0, int64_t n1) const {
        bool first = !resume;
        for (int segment = 0; segment < segments; segment++)
            for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
                const int64_t kn = min(kDepth, depth - k0);
                RowPointers<T, R> a_rows;
                for (int r = 0; r < R; r++) a_rows.row[r] = a[batch + segment] + min(r, rows - 1) * a_row + k0;
                for (int64_t n = n0; n < n1; n += NR * L) {
                    Vec<T> acc[1][R][NR] = {};
                    if (weight.w)
                        weight.multiply(acc, a_rows, segment * depth + k0, kn, n);
                    else
                        matrix.multiply(acc, a_rows, segment * depth + k0, kn, n);
                    finish<R, NR>(acc, rows, c[batch], 0, n, first);
                }
                first = false;
            }
    }

    void pack_column(T* dst, int64_t stride, int64_t k0, int64_t kn, int64_t column) const {
        if (column >= columns)
            for (int64_t k = 0; k < kn; k++) Vec<T>(0).store(dst + k * stride);
        else if (weight.w)
            weight.pack(dst, stride, k0, kn, column);
        else
            matrix.pack(dst, stride, k0, kn, column);
    }

    template <int NR>
    void tile_rows(int64_t n_rows, const T* as, const T* panel, T* cs, int64_t m, int64_t n, int64_t k0, int64_t kn,
                   bool first) const {
        constexpr int MR = kAccumulators / NR;
        // A^T: MR neighbours of a row at a time, up to MR - 1 past the end. The next tiles find its cache lines near.
        if (a_column != 1) return tile<MR, NR>(Columns<T>{as + m + k0 * a_column, a_column}, n_rows, panel, cs, m, n, kn, first);
        // Rows past the end read the last one again; what they compute is not stored.
        RowPointers<T, MR> a_rows;
        for (int r = 0; r < MR; r++) a_rows.row[r] = as + (m + min(r, n_rows - 1)) * a_row + k0;
        if (n_rows > MR / 2) return tile<MR, NR>(a_rows, n_rows, panel, cs, m, n, kn, first);
        RowPointers<T, MR / 2> half;
        for (int r = 0; r < MR / 2; r++) half.row[r] = a_rows.row[r];
        if (n_rows > 1) return tile<MR / 2, NR>(half, n_rows, panel, cs, m, n, kn, first);
        tile<1, NR>(RowPointers<T, 1>{{half.row[0]}}, 1, panel, cs, m, n, kn, first);
    }

    template <int R, int NR, class A>
    void tile(const A& a_rows, int64_t n_rows, const T* panel, T* cs, int64_t m, int64_t n, int64_t kn, bool first) const {
        Vec<T> acc[1][R][NR] = {};
        accumulate<R, 1, NR>(acc, a_rows, panel, 0, kn);
        finish<R, NR>(acc, n_rows, cs, m, n, first);
    }

    // Adds a chain to what is there, and stores.
    template <int R, int NR>
    OSTINATO_INLINE void finish(Vec<T> (&acc)[1][R][NR], int64_t n_rows, T* cs, int64_t m, int64_t n, bool first) const {
        const bool whole = n + NR * L <= columns;
        _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {
            const T* row = cs + (m + min(r, n_rows - 1)) * ldc + n;
            _Pragma("GCC unroll 8") for (int v = 0; v < NR; v++) {
                const int64_t valid = max(0, min(L, columns - n - v * L));
                if (!first)
                    acc[0][r][v] = acc[0][r][v] + (whole ? Vec<T>::load(row + v * L) : load_n(row + (valid ? v * L : 0), valid));
                else if (start && valid)
                    acc[0][r][v] = acc[0][r][v] + Vec<T>::load(start + n + v * L);
            }
        }
        _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {
            if (r >= n_rows) break;
            T* row = cs + (m + r) * ldc + n;
            _Pragma("GCC unroll 8") for (int v = 0; v < NR; v++) {
                const int64_t valid = max(0, min(L, columns - n - v * L));
                if (whole)
                    acc[0][r][v].store(row + v * L);
                else if (valid)
                    store_n(acc[0][r][v], row + v * L, valid);
            }
        }
    }

    int64_t task_columns = 0, column_tasks = 0, row_tasks = 0, tiles = 0;  // tiles: of MR rows, in a batch
    T* scratch_base = nullptr;
};

}  // namespace
}  // namespace ostinato
