// In which precision a product with weight_hh is computed, and the two shapes of that product.
//
// Weights stay on the chip for the whole walk: kResident fragments of each warp in registers, the others in shared memory, in
// the order in which a thread reads them (16 bytes to a thread, no conflicts). Only the state is read anew in each step.
#pragma once

#include "plan.cuh"

namespace ostinato {
namespace {

// kDepth: k of one instruction, 0 where there is none. An operand is what the product reads of the state.
struct Bf16 {
    using Element = BFloat16;
    using Operand = BFloat16;
    static constexpr int kDepth = 16;
    static constexpr bool kIsFast = true;
};
struct Fp16 {
    using Element = Float16;
    using Operand = Float16;
    static constexpr int kDepth = 16;
    static constexpr bool kIsFast = false;
};
// float32 whose products have 11 bits.
struct Tf32 {
    using Element = float;
    using Operand = float;
    static constexpr int kDepth = 8;
    static constexpr bool kIsFast = false;
};
// float32 by fused multiply-adds.
struct Fp32 {
    using Element = float;
    using Operand = float;
    static constexpr int kDepth = 0;
    static constexpr bool kIsFast = false;
};

template <class T>
struct WordsOf;
template <>
struct WordsOf<BFloat16> {
    using One = u16;
    using Two = u32;
};
template <>
struct WordsOf<Float16> {
    using One = u16;
    using Two = u32;
};
template <>
struct WordsOf<float> {
    using One = u32;
    using Two = u64;
};

OSTINATO_DEVICE u16 word_of(BFloat16 x) { return x.bits; }
OSTINATO_DEVICE u16 word_of(Float16 x) { return x.bits; }
OSTINATO_DEVICE u32 word_of(float x) { return bits_of(x); }
OSTINATO_DEVICE void from_word(u16 word, BFloat16& x) { x.bits = word; }
OSTINATO_DEVICE void from_word(u16 word, Float16& x) { x.bits = word; }
OSTINATO_DEVICE void from_word(u32 word, float& x) { x = float_of(word); }

OSTINATO_DEVICE u32 join(u16 a, u16 b) { return static_cast<u32>(b) << 16 | a; }
OSTINATO_DEVICE u64 join(u32 a, u32 b) { return static_cast<u64>(b) << 32 | a; }

template <class T>
OSTINATO_DEVICE float widen_word(typename WordsOf<T>::One word) {
    T x;
    from_word(word, x);
    return widen(x);
}

template <class Math>
OSTINATO_DEVICE typename Math::Operand to_operand(float value) {
    typename Math::Operand operand;
    narrow(Math::kDepth == 8 ? to_tf32(value) : value, operand);
    return operand;
}

// ---- pairs of units in global memory ----

// Two units as they were loaded, in one word where they are aligned. They are widened where they are used, so that nobody waits
// for them before.
template <class T, bool kIsOneWord = kIsEven>
struct Raw {
    typename WordsOf<T>::Two both;
};
template <class T>
struct Raw<T, false> {
    typename WordsOf<T>::One a, b;
};

// Units u and u + 1 of a row of kHidden; zero past its end.
template <class T>
OSTINATO_DEVICE Raw<T> load_units(const T* row, int u) {
    using One = typename WordsOf<T>::One;
    Raw<T> raw{};
    if constexpr (kIsEven) {
        if (u < kHidden) raw.both = load(reinterpret_cast<const typename WordsOf<T>::Two*>(row + u));
    } else {
        if (u < kHidden) raw.a = load(reinterpret_cast<const One*>(row + u));
        if (u + 1 < kHidden) raw.b = load(reinterpret_cast<const One*>(row + u + 1));
    }
    return raw;
}
template <class T>
OSTINATO_DEVICE Pair widen(Raw<T> raw) {
    using One = typename WordsOf<T>::One;
    if constexpr (kIsEven)
        return {widen_word<T>(static_cast<One>(raw.both)), widen_word<T>(static_cast<One>(raw.both >> 8 * sizeof(One)))};
    else
        return {widen_word<T>(raw.a), widen_word<T>(raw.b)};
}
// As operands of 16 bits.
template <class T>
OSTINATO_DEVICE u32 two_words(Raw<T> raw) {
    if constexpr (kIsEven)
        return raw.both;
    else
        return join(raw.a, raw.b);
}
template <class T>
OSTINATO_DEVICE Pair load_pair(const T* row, int u) {
    return row ? widen(load_units(row, u)) : Pair{0, 0};
}

template <class T>
OSTINATO_DEVICE void store_units(T* row, int u, Pair pair) {
    T a, b;
    narrow(pair.a, a), narrow(pair.b, b);
    if constexpr (kIsEven) {
        if (u < kHidden) *reinterpret_cast<typename WordsOf<T>::Two*>(row + u) = join(word_of(a), word_of(b));
    } else {
        if (u < kHidden) row[u] = a;
        if (u + 1 < kHidden) row[u + 1] = b;
    }
}

// ---- weights on tensor cores ----

struct alignas(16) Fragment {
    u32 words[4];
};

// A thread's fragments of the left operand, rows of 16 by columns of kDepth. word(row, k) returns the operands of a word: that at
// k or, of 16 bits, those at k and k + 1.
template <class Math, int kCount>
struct Fragments {
    static constexpr int kHeld = kCount < kResident ? kCount : kResident, kShared = kCount - kHeld;
    u32 held[largest(kHeld, 1)][4];

    template <class Word>
    static OSTINATO_DEVICE void read(u32 (&words)[4], int row, int k, Word word) {
        const int lane = thread_index() % 32, width = Math::kDepth / 8;
        OSTINATO_UNROLL
        for (int i = 0; i < 4; i++) words[i] = word(row + lane / 4 + i % 2 * 8, k + lane % 4 * width + i / 2 * 4 * width);
    }

    // place(i, row, k) says where fragment i begins.
    template <class Place, class Word>
    OSTINATO_DEVICE void load(Fragment* shared, Place place, Word word) {
        int row, k;
        OSTINATO_UNROLL
        for (int i = 0; i < kHeld; i++) {
            place(i, row, k);
            read(held[i], row, k, word);
            // All loads at once would take more registers than the whole walk.
            if (i % 4 == 3) schedule_barrier();
        }
        OSTINATO_ROLLED
        for (int i = kHeld; i < kCount; i++) {
            place(i, row, k);
            read(shared[(i - kHeld) * kThreads + thread_index()].words, row, k, word);
        }
    }

    // i is a constant after unrolling.
    OSTINATO_DEVICE void multiply(const Fragment* shared, int i, float (&sums)[4], u32 b0, u32 b1) const {
        if (i < kHeld) {
            ostinato::multiply(typename Math::Operand(), sums, held[i < kHeld ? i : 0], b0, b1);
        } else {
            if ((i - kHeld) % 4 == 0) schedule_barrier();  // four on their way, or they would take all registers
            const Fragment fragment = shared[(i - kHeld) * kThreads + thread_index()];
            ostinato::multiply(typename Math::Operand(), sums, fragment.words, b0, b1);
        }
    }
};

// The words of the right operand, eight rows of operands with this many to a row, that a thread holds of columns k to k + kDepth.
template <class Math>
OSTINATO_DEVICE void read_rows(const typename Math::Operand* rows, int stride, int k, u32& b0, u32& b1) {
    const int lane = thread_index() % 32, width = Math::kDepth / 8;
    const auto* from = rows + lane / 4 * stride + k + lane % 4 * width;
    b0 = *reinterpret_cast<const u32*>(from);
    b1 = *reinterpret_cast<const u32*>(from + 4 * width);
}

// For how many steps in k the right operand is on its way at once: for all of them it would take all registers.
constexpr int kStepsAhead = 8;

// Operands after a row that keep the reads above free of bank conflicts.
template <class Math>
constexpr int kRowPad = 16 / static_cast<int>(sizeof(typename Math::Operand));

}  // namespace
}  // namespace ostinato
