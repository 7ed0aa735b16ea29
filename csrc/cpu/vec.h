// The lane type: a native vector of T, written once over GCC/Clang vector extensions and compiled per instruction set.
//
// Only what the extensions cannot say is spelled in intrinsics: the fused multiply-add and partial loads and stores.
// Every operation is exactly rounded or made of exactly rounded ones in a fixed order, and the compiler may not contract
// (-ffp-contract=off), so each lane holds the same bits on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Where accumulators or constants must stay in registers across a call, the call must go.
#define OSTINATO_INLINE inline __attribute__((always_inline))

namespace ostinato {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRegisters = 32;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kVectorBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kRegisters = 32;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
#endif

// Loads and stores take any address: GCC's vector types may alias, `aligned(1)` says that nothing is assumed.
template <class T>
struct Native;
template <>
struct Native<float> {
    typedef float Raw __attribute__((vector_size(kVectorBytes)));
    typedef float Loose __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Native<double> {
    typedef double Raw __attribute__((vector_size(kVectorBytes)));
    typedef double Loose __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
    typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
    typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
};

template <class T>
struct Vec {
    using Raw = typename Native<T>::Raw;
    using Bits = typename Native<T>::Bits;
    using Mask = typename Native<T>::Mask;
    static constexpr int kLanes = kVectorBytes / sizeof(T);

    Raw v;

    Vec() = default;
    explicit Vec(Raw raw) : v(raw) {}
    explicit Vec(T scalar) : v(scalar - Raw{}) {}
    explicit Vec(int scalar) : Vec(static_cast<T>(scalar)) {}

    static Vec load(const T* p) { return Vec(Raw(*reinterpret_cast<const typename Native<T>::Loose*>(p))); }
    void store(T* p) const { *reinterpret_cast<typename Native<T>::Loose*>(p) = v; }

    friend Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
    friend Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
    friend Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
    friend Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
    friend Vec operator-(Vec a) { return Vec(-a.v); }
};

#if !(defined(__AVX2__) && defined(__FMA__)) && !defined(__AVX512F__) && !defined(__aarch64__)
// No fused instruction in the baseline: libm's is exact (and slow), and the bits are the same. Out of line, because these
// calls would be most of the code.
template <class T>
__attribute__((noinline)) Vec<T> fma_by_lanes(Vec<T> a, Vec<T> b, Vec<T> c) {
    for (int i = 0; i < Vec<T>::kLanes; i++) {
        if constexpr (sizeof(T) == 4)
            c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
        else
            c.v[i] = __builtin_fma(a.v[i], b.v[i], c.v[i]);
    }
    return c;
}
#endif

template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        return Vec<T>(_mm512_fmadd_ps(a.v, b.v, c.v));
    else
        return Vec<T>(_mm512_fmadd_pd(a.v, b.v, c.v));
#elif defined(__AVX2__) && defined(__FMA__)
    if constexpr (sizeof(T) == 4)
        return Vec<T>(_mm256_fmadd_ps(a.v, b.v, c.v));
    else
        return Vec<T>(_mm256_fmadd_pd(a.v, b.v, c.v));
#elif defined(__aarch64__)
    if constexpr (sizeof(T) == 4)
        return Vec<T>(vfmaq_f32(c.v, a.v, b.v));
    else
        return Vec<T>(vfmaq_f64(c.v, a.v, b.v));
#else
    return fma_by_lanes(a, b, c);
#endif
}

// The larger of x and low, the smaller of x and high; NaN stays NaN.
template <class T>
inline Vec<T> at_least(Vec<T> x, T low) {
    const Vec<T> bound(low);
#if defined(__AVX512F__)
    // Where an operand is NaN, these give the second. (Without a mask GCC 12 warns of its own header.)
    if constexpr (sizeof(T) == 4)
        return Vec<T>(_mm512_maskz_max_ps(0xffff, bound.v, x.v));
    else
        return Vec<T>(_mm512_maskz_max_pd(0xff, bound.v, x.v));
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
        return Vec<T>(_mm256_max_ps(bound.v, x.v));
    else
        return Vec<T>(_mm256_max_pd(bound.v, x.v));
#else
    return Vec<T>(x.v < low ? bound.v : x.v);
#endif
}

template <class T>
inline Vec<T> at_most(Vec<T> x, T high) {
    const Vec<T> bound(high);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        return Vec<T>(_mm512_maskz_min_ps(0xffff, bound.v, x.v));
    else
        return Vec<T>(_mm512_maskz_min_pd(0xff, bound.v, x.v));
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
        return Vec<T>(_mm256_min_ps(bound.v, x.v));
    else
        return Vec<T>(_mm256_min_pd(bound.v, x.v));
#else
    return Vec<T>(x.v > high ? bound.v : x.v);
#endif
}

// The first n lanes (0 <= n <= kLanes); the others are zero, and nothing past p[n-1] is touched.
template <class T>
inline Vec<T> load_n(const T* p, int64_t n) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        return Vec<T>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
    else
        return Vec<T>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p));
#else
    if (n == Vec<T>::kLanes) return Vec<T>::load(p);
    T lanes[Vec<T>::kLanes] = {};
    for (int64_t i = 0; i < n; i++) lanes[i] = p[i];
    return Vec<T>::load(lanes);
#endif
}

template <class T>
inline void store_n(Vec<T> x, T* p, int64_t n) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x.v);
    else
        _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), x.v);
#else
    if (n == Vec<T>::kLanes) return x.store(p);
    T lanes[Vec<T>::kLanes];
    x.store(lanes);
    for (int64_t i = 0; i < n; i++) p[i] = lanes[i];
#endif
}

// ---- reading rows by columns ----

// Rows are read in pieces of 16 bytes, the width in which every instruction set shuffles cheaply.
template <class T>
struct Piece {
    static constexpr int kElements = 16 / sizeof(T);
    typedef T Raw __attribute__((vector_size(16)));
    typedef T Loose __attribute__((vector_size(16), aligned(1), may_alias));
};

template <class V, size_t... I>
inline auto join(V a, V b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, I...);
}

template <class T>
OSTINATO_INLINE typename Piece<T>::Raw load_piece(const T* p) {
    return *reinterpret_cast<const typename Piece<T>::Loose*>(p);
}

// A piece, and an element, of what lies as T, or in bfloat16 as the upper half of a T.
template <class T>
OSTINATO_INLINE typename Piece<T>::Raw widened_piece(const T* p) {
    return load_piece(p);
}
template <class T>
OSTINATO_INLINE typename Piece<T>::Raw widened_piece(const uint16_t* p) {
    typedef uint16_t Halves __attribute__((vector_size(8)));
    typedef uint32_t Words __attribute__((vector_size(16)));
    Halves halves;
    std::memcpy(&halves, p, sizeof halves);
    return (typename Piece<T>::Raw)(__builtin_convertvector(halves, Words) << 16);
}
template <class T>
inline T load_one(const T* p) {
    return *p;
}
template <class T>
inline T load_one(const uint16_t* p) {
    const uint32_t word = static_cast<uint32_t>(*p) << 16;
    T number;
    std::memcpy(&number, &word, sizeof number);
    return number;
}

// One vector out of kLanes / kElements pieces: piece(q) for q = 0, 1, ...
template <class T, int kCount, class F>
inline auto join_pieces(const F& piece, int first = 0) {
    if constexpr (kCount == 1)
        return piece(first);
    else
        return join(join_pieces<T, kCount / 2>(piece, first), join_pieces<T, kCount / 2>(piece, first + kCount / 2),
                    std::make_index_sequence<kCount * Piece<T>::kElements>{});
}

// Interleaves the lower (or upper) halves of each 16 bytes of a and b.
template <bool kUpper, class T, size_t... I>
inline Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
    constexpr size_t E = Piece<T>::kElements;
    return Vec<T>(__builtin_shufflevector(a.v, b.v, (I % 2 * sizeof...(I) + I / E * E + I % E / 2 + (kUpper ? E / 2 : 0))...));
}

// Transposes kElements times kLanes elements: piece(row) is the 16 bytes of a row, columns[i] gets element i of each row.
template <class T, class Load>
OSTINATO_INLINE void transpose_pieces(const Load& piece, Vec<T>* columns) {
    constexpr int L = Vec<T>::kLanes, E = Piece<T>::kElements;
    _Pragma("GCC unroll 8") for (int i = 0; i < E; i++)
        columns[i].v = join_pieces<T, L / E>([&](int q) { return piece(E * q + i); });
    // Now the 16 bytes q of columns[i] are of row E * q + i: transposed in place by log2(E) perfect shuffles.
    constexpr auto lanes = std::make_index_sequence<L>{};
    _Pragma("GCC unroll 2") for (int round = 1; round < E; round *= 2) {
        Vec<T> next[E];
        _Pragma("GCC unroll 2") for (int i = 0; i < E / 2; i++) {
            next[2 * i] = interleave<false>(columns[i], columns[i + E / 2], lanes);
            next[2 * i + 1] = interleave<true>(columns[i], columns[i + E / 2], lanes);
        }
        _Pragma("GCC unroll 4") for (int i = 0; i < E; i++) columns[i] = next[i];
    }
}

// How many consecutive elements of rows that lie as S are read at once: T, or uint16_t for bfloat16.
template <class T, class S>
constexpr int kColumns = 16 / sizeof(S);

// Element k of kLanes whole rows, for kColumns consecutive k: columns[k] holds one lane per row.
template <class T>
OSTINATO_INLINE void load_columns(const T* w, int64_t ld, Vec<T>* columns) {
    transpose_pieces<T>([&](int64_t row) { return load_piece<T>(w + row * ld); }, columns);
}
// Two neighbours in bfloat16 are transposed as one word, whose halves are widened then.
template <class T>
OSTINATO_INLINE void load_columns(const uint16_t* w, int64_t ld, Vec<T>* columns) {
    using Raw = typename Vec<T>::Raw;
    using Bits = typename Vec<T>::Bits;
    constexpr int E = Piece<T>::kElements;
    Vec<T> words[E];
    transpose_pieces<T>([&](int64_t row) { return load_piece<T>(reinterpret_cast<const T*>(w + row * ld)); }, words);
    _Pragma("GCC unroll 4") for (int i = 0; i < E; i++) {
        columns[2 * i] = Vec<T>((Raw)((Bits)words[i].v << 16));
        columns[2 * i + 1] = Vec<T>((Raw)((Bits)words[i].v & 0xffff0000));
    }
}

// The same where rows or elements are missing, which are zero and not read, for kElements consecutive k: rare, and long.
template <class T, class S>
__attribute__((noinline)) void load_partial_columns(const S* w, int64_t ld, int64_t rows, int64_t n, Vec<T>* columns) {
    constexpr int64_t E = Piece<T>::kElements;
    const auto piece = [&](int64_t row) {
        if (row < rows && n >= E) return widened_piece<T>(w + row * ld);
        typename Piece<T>::Raw part = {};
        for (int64_t k = 0; row < rows && k < n; k++) part[k] = load_one<T>(w + row * ld + k);
        return part;
    };
    transpose_pieces<T>(piece, columns);
}

}  // namespace
}  // namespace ostinato
