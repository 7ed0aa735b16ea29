// The 16-bit number types: exact to float32, and back to the nearest, half way to even.
#pragma once

#include "vec.h"

namespace ostinato {
namespace {

constexpr int64_t kWide = Vec<float>::kLanes;
using Floats = Native<float>::Raw;
using Words = Native<float>::Bits;
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

template <class To, class From>
OSTINATO_INLINE To bits_of(From from) {
    To to;
    static_assert(sizeof to == sizeof from);
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// 8 bits of exponent, 7 of fraction: the upper half of a float32.
struct BFloat16 {
    static constexpr bool kIsUpperHalf = true;

    static OSTINATO_INLINE Floats widen(Halves h) { return bits_of<Floats>(__builtin_convertvector(h, Words) << 16); }
    static OSTINATO_INLINE Halves narrow(Floats f) {
        const Words bits = bits_of<Words>(f), even = bits + 0x7fff + (bits >> 16 & 1);
        // Rounding could carry a NaN into infinity: it keeps its sign and becomes quiet.
        const Words nan = bits_of<Words>((bits & 0x7fffffff) > 0x7f800000);
        return __builtin_convertvector(((even & ~nan) | ((bits | 0x400000) & nan)) >> 16, Halves);
    }
};

// 5 bits of exponent, 10 of fraction (IEEE 754 binary16).
struct Float16 {
    static constexpr bool kIsUpperHalf = false;

    static OSTINATO_INLINE Floats widen(Halves h) {
        const Words bits = __builtin_convertvector(h, Words), magnitude = (bits & 0x7fff) << 13;
        // The exponents' zeros are 112 apart; a product is right for subnormal numbers too.
        const Words finite = bits_of<Words>(bits_of<Floats>(magnitude) * 0x1p112f);
        const Words beyond = bits_of<Words>(magnitude >= 0xf800000u) & 0x7f800000;  // infinity and NaN
        return bits_of<Floats>(finite | beyond | (bits & 0x8000) << 16);
    }
    static OSTINATO_INLINE Halves narrow(Floats f) {
        const Words bits = bits_of<Words>(f), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
        const Words normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
        // Adding 1/2 leaves the multiples of 2^-24 that a subnormal number has, rounded, in the last bits.
        const Words small = bits_of<Words>(bits_of<Floats>(magnitude) + 0.5f) - 0x3f000000;
        const Words infinite = bits_of<Words>(magnitude >= 0x477ff000u);  // 65520 and beyond
        const Words nan = bits_of<Words>(magnitude > 0x7f800000u), subnormal = bits_of<Words>(magnitude < 0x38800000u);
        const Words found = (normal & ~subnormal) | (small & subnormal);
        const Words special = 0x7c00 | (nan & (0x200 | (magnitude >> 13 & 0x3ff)));
        return __builtin_convertvector((found & ~infinite) | (special & infinite) | sign, Halves);
    }
};

}  // namespace
}  // namespace ostinato
