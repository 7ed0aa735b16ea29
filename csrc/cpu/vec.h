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

// Element k of kLanes rows, for kElements consecutive k: columns[k] holds one lane per row. Rows past `rows` and elements
// past `n` are zero and not read.
template <class T, bool kWhole>
inline void load_columns(const T* w, int64_t ld, int64_t rows, int64_t n, Vec<T>* columns) {
    constexpr int L = Vec<T>::kLanes, E = Piece<T>::kElements;
    using P = typename Piece<T>::Raw;
    _Pragma("GCC unroll 8") for (int i = 0; i < E; i++) {
        const auto piece = [&](int q) -> P {
            const int64_t row = E * q + i;
            if constexpr (kWhole) return *reinterpret_cast<const typename Piece<T>::Loose*>(w + row * ld);
            if (row < rows && n >= E) return *reinterpret_cast<const typename Piece<T>::Loose*>(w + row * ld);
            P part = {};
            for (int64_t k = 0; row < rows && k < n; k++) part[k] = w[row * ld + k];
            return part;
        };
        columns[i].v = join_pieces<T, L / E>(piece);
    }
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

// The same where rows or elements are missing: rare, and long.
template <class T>
__attribute__((noinline)) void load_partial_columns(const T* w, int64_t ld, int64_t rows, int64_t n, Vec<T>* columns) {
    load_columns<T, false>(w, ld, rows, n, columns);
}

// ---- activations ----

// 2^x = 2^n + 2^n * p with n = round(x), r = x - n and p = 2^r - 1 = r * (c_0 + c_1 r + ...), |r| <= 1/2. The polynomial
// interpolates (2^r - 1) / r at Chebyshev nodes: relative error 1.2e-8 (float) and 2.7e-19 (double).
template <class T>
struct Exp2;
template <>
struct Exp2<float> {
    static constexpr float kMost = 88.0f;  // 2 * e^kMost is finite, and 2^n a normal number down to e^-(kMost - 1)
    static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    static constexpr float kLog2e = 1.44269502f, kLog2eRest = 1.92596299e-8f;
    static constexpr int kMantissa = 23;
    static constexpr uint32_t kOne = 0x3f800000u, kSign = 0x80000000u;
    static constexpr float kTerms[] = {0.6931472f, 0.2402265f, 0.05550357f, 0.009618083f, 0.0013390863f, 0.00015453163f};
};
template <>
struct Exp2<double> {
    static constexpr double kMost = 709.0;
    static constexpr double kMagic = 6755399441055744.0;
    static constexpr double kLog2e = 1.4426950408889634, kLog2eRest = 2.0355273740931033e-17;
    static constexpr int kMantissa = 52;
    static constexpr uint64_t kOne = 0x3ff0000000000000u, kSign = 0x8000000000000000u;
    static constexpr double kTerms[] = {0.6931471805599453,     0.24022650695910072,    0.055504108664821625,
                                        0.00961812910762848,    0.001333355814640647,   0.00015403530393370734,
                                        1.5252733841556773e-05, 1.3215486808705563e-06, 1.0178057087733941e-07,
                                        7.0548973041554995e-09, 4.4558179083360645e-10, 2.5729324177362305e-11};
};

// e^(factor * x) as scale and p, e^(factor * x) = scale * p + scale, where scale is a power of two; factor is -1 or -2. The
// product with log2(e) is not rounded, but its constant is: without kFar, which adds the rest of it, the relative error grows
// by 1.3e-8 * |factor * x| in float. NaN passes through p.
template <bool kFar, class T>
OSTINATO_INLINE void exp_parts(Vec<T> x, int factor, Vec<T>& scale, Vec<T>& p) {
    using E = Exp2<T>;
    using Raw = typename Vec<T>::Raw;
    using Bits = typename Vec<T>::Bits;
    const Vec<T> log2e(factor * E::kLog2e);
    const Vec<T> shifted = fma(x, log2e, Vec<T>(E::kMagic));
    Vec<T> r = fma(x, log2e, Vec<T>(E::kMagic) - shifted);
    if (kFar) r = fma(x, Vec<T>(factor * E::kLog2eRest), r);
    constexpr int kCount = sizeof(E::kTerms) / sizeof(T);
    Vec<T> q(E::kTerms[kCount - 1]);
    _Pragma("GCC unroll 16") for (int k = kCount - 2; k >= 0; k--) q = fma(q, r, Vec<T>(E::kTerms[k]));
    p = r * q;
    scale = Vec<T>((Raw)(((Bits)shifted.v << E::kMantissa) + E::kOne));
}

// sigmoid(x) = 1 / denominator, but for x below -kMost, where it is zero.
template <class T>
OSTINATO_INLINE Vec<T> sigmoid_denominator(Vec<T> x) {
    Vec<T> scale, p;
    exp_parts<true>(at_least(at_most(x, Exp2<T>::kMost - 1), -Exp2<T>::kMost), -1, scale, p);
    return fma(scale, p, scale) + Vec<T>(1);
}

// Zero where x is below -kMost: the clamp would leave a denormal.
template <class T>
OSTINATO_INLINE Vec<T> zero_below(Vec<T> x, Vec<T> y) {
    return Vec<T>(x.v < -Exp2<T>::kMost ? typename Vec<T>::Raw{} : y.v);
}

// tanh(x) = numerator / denominator = sign(x) * |m| / (m + 2) with m = e^(-2|x|) - 1: no cancellation near zero.
template <class T>
OSTINATO_INLINE void tanh_parts(Vec<T> x, Vec<T>& numerator, Vec<T>& denominator) {
    using Raw = typename Vec<T>::Raw;
    using Bits = typename Vec<T>::Bits;
    const Bits sign = (Bits)x.v & Exp2<T>::kSign;
    Vec<T> scale, p;
    exp_parts<false>(at_most(Vec<T>((Raw)((Bits)x.v ^ sign)), Exp2<T>::kMost / 2 - 1), -2, scale, p);
    const Vec<T> m = fma(scale, p, scale - Vec<T>(1));
    numerator = Vec<T>((Raw)(((Bits)m.v & ~Exp2<T>::kSign) | sign));
    denominator = m + Vec<T>(2);
}

// 1 / (1 + e^-x)
template <class T>
OSTINATO_INLINE Vec<T> sigmoid(Vec<T> x) {
    return zero_below(x, Vec<T>(1) / sigmoid_denominator(x));
}

template <class T>
OSTINATO_INLINE Vec<T> tanh(Vec<T> x) {
    Vec<T> numerator, denominator;
    tanh_parts(x, numerator, denominator);
    return numerator / denominator;
}

// sigmoid(a) * tanh(b) with one division.
template <class T>
OSTINATO_INLINE Vec<T> sigmoid_times_tanh(Vec<T> a, Vec<T> b) {
    Vec<T> numerator, denominator;
    tanh_parts(b, numerator, denominator);
    return zero_below(a, numerator / (sigmoid_denominator(a) * denominator));
}

template <class T>
OSTINATO_INLINE Vec<T> relu(Vec<T> x) {
    return Vec<T>(x.v < T(0) ? typename Vec<T>::Raw{} : x.v);
}

// x where y is positive or NaN, zero elsewhere: the gradient of relu in terms of its output y.
template <class T>
OSTINATO_INLINE Vec<T> where_positive(Vec<T> y, Vec<T> x) {
    return Vec<T>(y.v <= T(0) ? typename Vec<T>::Raw{} : x.v);
}

}  // namespace
}  // namespace ostinato
