// Products of int8 weights with rows of float that are quantised as they are read: exact sums in int32, then float.
//
// Legend: u unit, k depth, L lanes.
//
// Of a weight's row, w = scale * q with q from -127 to 127 (src/ostinato/quantized.py chooses both). Of a row that is multiplied,
// x = scale * q with scale = max |x| / 127, or q = 256 * high + low in 16 bits, scale = max |x| / 32639: two rows of bytes over one
// read of the weights, whose two sums are joined in float, rounded once. The sum over k is exact, so its order is free, and each instruction set takes what instruction it has:
//   AVX-512 VNNI, AVX-VNNI  four products and three additions in one instruction, of unsigned with signed bytes. So 128 is added
//                           to a row's bytes, and 128 times the sum of its weights taken from the result.
//   AVX2                    |x| with sign(x) * w: two products of at most 127 * 128 fit 16 bits.
//   NEON                    the dot product where the processor has it, else products of 16 bits, added in pairs.
//   SSE2                    products of 16 bits, added in pairs.
// Weights lie as they are read: for each block of L units [k / 4][gate][lane][4], padded with zeros.
//
// Then sum * (scale of the weight's row) * (scale of the row), each product rounded: the same bits everywhere.
#pragma once

#include "sequence.h"

namespace ostinato {
namespace {

typedef int8_t Bytes __attribute__((vector_size(kVectorBytes)));
typedef int32_t Sums __attribute__((vector_size(kVectorBytes)));
typedef int8_t LooseBytes __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));

// Four neighbouring bytes of a row in each lane, and sums += their products with the weights at w, [lane][4].
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kRowsAreUnsigned = true;
#else
constexpr bool kRowsAreUnsigned = false;
#endif

OSTINATO_INLINE int32_t word_at(const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return word;
}

#if defined(__AVX512VNNI__)
struct Four {
    __m512i bytes;
    explicit Four(const int8_t* p) : bytes(_mm512_set1_epi32(word_at(p))) {}
};
OSTINATO_INLINE Sums add_products(Sums sums, Four row, const int8_t* w) {
    return (Sums)_mm512_dpbusd_epi32((__m512i)sums, row.bytes, _mm512_loadu_si512(w));
}
#elif defined(__AVXVNNI__)
struct Four {
    __m256i bytes;
    explicit Four(const int8_t* p) : bytes(_mm256_set1_epi32(word_at(p))) {}
};
OSTINATO_INLINE Sums add_products(Sums sums, Four row, const int8_t* w) {
    return (Sums)_mm256_dpbusd_avx_epi32((__m256i)sums, row.bytes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
}
#elif defined(__AVX2__)
struct Four {
    __m256i bytes, magnitudes;
    explicit Four(const int8_t* p) : bytes(_mm256_set1_epi32(word_at(p))), magnitudes(_mm256_abs_epi8(bytes)) {}
};
OSTINATO_INLINE Sums add_products(Sums sums, Four row, const int8_t* w) {
    const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i pairs = _mm256_maddubs_epi16(row.magnitudes, _mm256_sign_epi8(weights, row.bytes));
    return sums + (Sums)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#elif defined(__x86_64__)
struct Four {
    __m128i words;  // as 16 bits, twice
    explicit Four(const int8_t* p) {
        const __m128i bytes = _mm_set1_epi32(word_at(p));
        words = _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
    }
};
OSTINATO_INLINE Sums add_products(Sums sums, Four row, const int8_t* w) {
    const __m128i weights = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
    const auto products = [&](__m128i twice) { return _mm_castsi128_ps(_mm_madd_epi16(_mm_srai_epi16(twice, 8), row.words)); };
    const __m128 first = products(_mm_unpacklo_epi8(weights, weights)), second = products(_mm_unpackhi_epi8(weights, weights));
    return sums + (Sums)_mm_shuffle_ps(first, second, 0x88) + (Sums)_mm_shuffle_ps(first, second, 0xdd);
}
#elif defined(__aarch64__)
struct Four {
    int8x16_t bytes;
    explicit Four(const int8_t* p) : bytes(vreinterpretq_s8_s32(vdupq_n_s32(word_at(p)))) {}
};
OSTINATO_INLINE Sums add_products(Sums sums, Four row, const int8_t* w) {
    const int8x16_t weights = vld1q_s8(w);
#if defined(__ARM_FEATURE_DOTPROD)
    return (Sums)vdotq_s32((int32x4_t)sums, weights, row.bytes);
#else
    const int32x4_t first = vpaddlq_s16(vmull_s8(vget_low_s8(weights), vget_low_s8(row.bytes)));
    const int32x4_t second = vpaddlq_s16(vmull_high_s8(weights, row.bytes));
    return sums + (Sums)vpaddq_s32(first, second);
#endif
}
#else
struct Four {
    const int8_t* p;
    explicit Four(const int8_t* bytes) : p(bytes) {}
};
OSTINATO_INLINE Sums add_products(Sums sums, Four row, const int8_t* w) {
    for (int i = 0; i < Vec<float>::kLanes; i++)
        for (int k = 0; k < 4; k++) sums[i] += w[4 * i + k] * row.p[k];
    return sums;
}
#endif

// ---- rows ----

// Bytes of a row, readable and written up to a multiple of this.
constexpr int64_t kRowBytes = 64;

// Quantises n numbers to `planes` rows of bytes, `stride` apart, and returns the scale: zero where all are too small for one,
// NaN where a number is none or infinite.
inline float quantise(const float* x, int64_t n, int8_t* bytes, int64_t stride, int64_t planes) {
    using V = Vec<float>;
    constexpr int64_t L = V::kLanes;
    constexpr int32_t kInfinity = 0x7f800000;
    constexpr float kLeast = 1e-30f, kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const auto at = [&](int64_t k) { return k + L <= n ? V::load(x + k) : load_n(x + k, n - k); };
    // Of numbers without a sign, the bits are ordered as the numbers are, and NaN is the largest.
    Sums most = {};
    for (int64_t k = 0; k < n; k += L) {
        const Sums magnitude = (Sums)at(k).v & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    int32_t largest = 0;
    for (int i = 0; i < L; i++) largest = most[i] > largest ? most[i] : largest;
    float bound;
    std::memcpy(&bound, &largest, sizeof bound);
    const bool is_finite = largest < kInfinity;
    const float end = planes == 1 ? 127.0f : 32639.0f;
    const V factor(is_finite && bound > kLeast ? end / bound : 0.0f), magic(kMagic);
    const auto put = [&](Sums q, int8_t* to) {
        typedef int8_t Few __attribute__((vector_size(L)));
        const Few few = __builtin_convertvector(q, Few) ^ static_cast<int8_t>(kRowsAreUnsigned ? -128 : 0);
        std::memcpy(to, &few, sizeof few);
    };
    const int64_t end_k = is_finite ? n : 0;
    for (int64_t k = 0; k < end_k; k += L) {
        const Sums q = (Sums)(at(k) * factor + magic).v - (Sums)magic.v;
        if (planes == 1) {
            put(q, bytes + k);
        } else {
            const Sums high = (q + 128) >> 8;
            put(high, bytes + k);
            put(q - (high << 8), bytes + stride + k);
        }
    }
    if (!is_finite) return __builtin_nanf("");
    return bound > kLeast ? bound / end : 0.0f;
}

// ---- the form of int8 weights, as StreamLoop asks for it ----

struct Int8 {
    using Value = float;
    static constexpr int64_t kChain = int64_t{1} << 40;  // the whole depth at once

    // Rows of float, and as they were read last.
    struct Rows {
        const float** at = nullptr;
        int8_t* bytes = nullptr;
        float* scales = nullptr;
        int64_t stride = 0, planes = 1;

        Rows() = default;
        Rows(Arena& arena, int64_t count, int64_t depth, int64_t planes_of)
            : at(arena.take<const float*>(count)),
              bytes(arena.take<int8_t>(count * planes_of * round_up(depth, kRowBytes))),
              scales(arena.take<float>(count)),
              stride(round_up(depth, kRowBytes)),
              planes(planes_of) {}
        void read(int64_t b, const float* row, int64_t depth) const {
            at[b] = row;
            scales[b] = quantise(row, depth, bytes + b * planes * stride, stride, planes);
        }
        Rows from(int64_t b) const {
            Rows rest = *this;
            rest.at += b, rest.bytes += b * planes * stride, rest.scales += b;
            return rest;
        }
    };

    // NV * units rows of weights; the NV of a unit lie side by side.
    template <int NV>
    struct Matrix {
        static constexpr int64_t L = Vec<float>::kLanes;
        int64_t units, depth, fours;
        int8_t* panels;
        float* scales;  // [blocks][NV][L]
        Sums* offsets;  // likewise: what the sums begin with

        Matrix(Arena& arena, int64_t units_of, int64_t depth_of)
            : units(units_of),
              depth(depth_of),
              fours(ceil_div(depth_of, 4)),
              panels(arena.take<int8_t>(ceil_div(units_of, L) * fours * NV * L * 4)),
              scales(arena.take<float>(ceil_div(units_of, L) * NV * L)),
              offsets(arena.take<Sums>(ceil_div(units_of, L) * NV)) {}

        // The memory has been zeroed.
        void pack(const void* w, const void* scale) const {
            const auto* bytes = static_cast<const int8_t*>(w);
            for (int64_t g = 0; g < NV; g++)
                for (int64_t j = 0; j < units; j++) {
                    int32_t sum = 0;
                    for (int64_t k = 0; k < depth; k++) sum += *byte_at(g, j, k) = *bytes++;
                    offsets[j / L * NV + g][j % L] = kRowsAreUnsigned ? -128 * sum : 0;
                    *scale_at(g, j) = static_cast<const float*>(scale)[g * units + j];
                }
        }
        void unpack(void* w, void* scale) const {
            auto* bytes = static_cast<int8_t*>(w);
            for (int64_t g = 0; g < NV; g++)
                for (int64_t j = 0; j < units; j++) {
                    for (int64_t k = 0; k < depth; k++) *bytes++ = *byte_at(g, j, k);
                    static_cast<float*>(scale)[g * units + j] = *scale_at(g, j);
                }
        }

        void multiply(const Rows& rows, int64_t, int64_t, int64_t count, int64_t u0, int64_t u1, RowPanels<float>::Take take,
                      const void* taker) const;

    private:
        int8_t* byte_at(int64_t g, int64_t j, int64_t k) const {
            return panels + (((j / L * fours + k / 4) * NV + g) * L + j % L) * 4 + k % 4;
        }
        float* scale_at(int64_t g, int64_t j) const { return scales + (j / L * NV + g) * L + j % L; }
    };
};

// P: planes of a row.
template <int NV, int P>
struct Int8Product : Tiles<Int8Product<NV, P>, NV * P> {
    static constexpr int L = Vec<float>::kLanes;
    const Int8::Rows& rows_;
    const Int8::Matrix<NV>& m;
    const RowPanels<float>::Take take;
    const void* const taker;

    Int8Product(const Int8::Rows& rows, const Int8::Matrix<NV>& matrix, RowPanels<float>::Take taking, const void* with)
        : rows_(rows), m(matrix), take(taking), taker(with) {}

    template <int MR, int NJ>
    void tile(int64_t b, int64_t u) const {
        constexpr int kBlock = NV * L * 4;
        Sums acc[NJ][MR * P][NV];
        _Pragma("GCC unroll 4") for (int j = 0; j < NJ; j++)
            _Pragma("GCC unroll 24") for (int r = 0; r < MR * P; r++)
                _Pragma("GCC unroll 4") for (int v = 0; v < NV; v++)
                    acc[j][r][v] = kRowsAreUnsigned ? m.offsets[(u + j) * NV + v] : Sums{};
        const int8_t* panel = m.panels + u * m.fours * kBlock;
        const int8_t* row = rows_.bytes + b * P * rows_.stride;
        for (int64_t k = 0; k < m.fours; k++, panel += kBlock, row += 4)
            _Pragma("GCC unroll 24") for (int r = 0; r < MR * P; r++) {
                const Four four(row + r * rows_.stride);
                _Pragma("GCC unroll 4") for (int j = 0; j < NJ; j++)
                    _Pragma("GCC unroll 4") for (int v = 0; v < NV; v++)
                        acc[j][r][v] = add_products(acc[j][r][v], four, panel + j * m.fours * kBlock + v * L * 4);
            }
        _Pragma("GCC unroll 4") for (int j = 0; j < NJ; j++) {
            Vec<float> sums[MR][NV];
            _Pragma("GCC unroll 24") for (int r = 0; r < MR; r++)
                _Pragma("GCC unroll 4") for (int v = 0; v < NV; v++) {
                    using V = Vec<float>;
                    V sum(__builtin_convertvector(acc[j][r * P][v], V::Raw));
                    if constexpr (P == 2) sum = sum * V(256) + V(__builtin_convertvector(acc[j][r * P + 1][v], V::Raw));
                    sums[r][v] = sum * V::load(m.scales + ((u + j) * NV + v) * L) * V(rows_.scales[b + r]);
                }
            take(taker, sums[0], MR, b, (u + j) * L);
        }
    }
};

template <int NV>
__attribute__((noinline)) void Int8::Matrix<NV>::multiply(const Rows& rows, int64_t, int64_t, int64_t count, int64_t u0,
                                                          int64_t u1, RowPanels<float>::Take take, const void* taker) const {
    if (count == 0) return;
    if (rows.planes == 1)
        Int8Product<NV, 1>(rows, *this, take, taker).run(0, count, u0, u1);
    else
        Int8Product<NV, 2>(rows, *this, take, taker).run(0, count, u0, u1);
}

}  // namespace
}  // namespace ostinato
