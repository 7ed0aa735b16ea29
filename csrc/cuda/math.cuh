// In which precision a product with weight_hh is computed, and the two shapes of that product.
//
// Weights stay on the chip for the whole time loop: kResident fragments of each warp in registers, the others in shared memory,
// in the order in which a thread reads them (16 bytes to a thread, no conflicts). Only the state is read anew in each step.
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

// Units u and u + 1 of a row of kHidden, which lie at `from`; zero where they do not exist, as is_there(u) says.
template <class T, class IsThere>
OSTINATO_DEVICE Raw<T> load_two(const T* from, int u, IsThere is_there) {
    using One = typename WordsOf<T>::One;
    Raw<T> raw{};
    if constexpr (kIsEven) {
        if (is_there(u)) raw.both = load(reinterpret_cast<const typename WordsOf<T>::Two*>(from));
    } else {
        if (is_there(u)) raw.a = load(reinterpret_cast<const One*>(from));
        if (is_there(u + 1)) raw.b = load(reinterpret_cast<const One*>(from + 1));
    }
    return raw;
}
// Units of a block's part.
template <class T>
OSTINATO_DEVICE Raw<T> load_at(const T* from, int u) {
    return load_two(from, u, [](int unit) { return is_unit(unit); });
}
// Any of a row. Weights are read so: with the question left out where it needs no answer, the compiler has the addresses of all of
// them at once, which takes more registers than there are.
template <class T>
OSTINATO_DEVICE Raw<T> load_units(const T* row, int u) {
    return load_two(row + u, u, [](int unit) { return unit < kHidden; });
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
OSTINATO_DEVICE void store_at(T* to, int u, Pair pair) {
    T a, b;
    narrow(pair.a, a), narrow(pair.b, b);
    if constexpr (kIsEven) {
        if (is_unit(u)) *reinterpret_cast<typename WordsOf<T>::Two*>(to) = join(word_of(a), word_of(b));
    } else {
        if (is_unit(u)) to[0] = a;
        if (is_unit(u + 1)) to[1] = b;
    }
}
template <class T>
OSTINATO_DEVICE void store_units(T* row, int u, Pair pair) {
    store_at(row + u, u, pair);
}

// ---- weights on the chip ----

struct alignas(16) Fragment {
    u32 words[4];
};

// A thread's share of the weights.
template <int kCount>
struct Fragments {
    static constexpr int kHeld = kCount < kResident ? kCount : kResident, kShared = kCount - kHeld;
    u32 held[largest(kHeld, 1)][4];

    // fill(i, words) reads fragment i from memory.
    template <class Fill>
    OSTINATO_DEVICE void load(Fragment* shared, Fill fill) {
        OSTINATO_UNROLL
        for (int i = 0; i < kHeld; i++) {
            fill(i, held[i]);
            // All loads at once would take more registers than the whole time loop.
            if (i % 4 == 3) schedule_barrier();
        }
        OSTINATO_ROLLED
        for (int i = kHeld; i < kCount; i++) fill(i, shared[(i - kHeld) * kThreads + thread_index()].words);
    }

    static OSTINATO_DEVICE Fragment shared_at(const Fragment* shared, int i) {
        return shared[(i - kHeld) * kThreads + thread_index()];
    }
    // Of those in registers; i is a constant after unrolling.
    OSTINATO_DEVICE Fragment held_at(int i) const {
        const u32(&words)[4] = held[i < kHeld ? i : 0];
        return {{words[0], words[1], words[2], words[3]}};
    }
};

// ---- products on tensor cores ----

// Fills a fragment of the left operand, rows of 16 by columns of kDepth from (row, k) on. word(row, k) returns the operands of a
// word: that at k or, of 16 bits, those at k and k + 1.
template <class Math, class Word>
OSTINATO_DEVICE void read_tile(u32 (&words)[4], int row, int k, Word word) {
    const int lane = thread_index() % 32, width = Math::kDepth / 8;
    OSTINATO_UNROLL
    for (int i = 0; i < 4; i++) words[i] = word(row + lane / 4 + i % 2 * 8, k + lane % 4 * width + i / 2 * 4 * width);
}

// sums += fragment i times the right operand of each eight; i is a constant after unrolling.
template <class Math, int kCount>
OSTINATO_DEVICE void multiply(const Fragments<kCount>& fragments, const Fragment* shared, int i, float (&sums)[kEights][4],
                              const u32 (&b)[kEights][2]) {
    using Operand = typename Math::Operand;
    constexpr int kHeld = Fragments<kCount>::kHeld;
    if (i < kHeld) {
        OSTINATO_UNROLL
        for (int e = 0; e < kEights; e++) multiply(Operand(), sums[e], fragments.held[i < kHeld ? i : 0], b[e][0], b[e][1]);
    } else {
        if ((i - kHeld) % 4 == 0) schedule_barrier();  // four on their way, or they would take all registers
        const Fragment fragment = Fragments<kCount>::shared_at(shared, i);
        OSTINATO_UNROLL
        for (int e = 0; e < kEights; e++) multiply(Operand(), sums[e], fragment.words, b[e][0], b[e][1]);
    }
}

// An instruction waits for the one before that adds to the same sums, so a warp that has few sums splits each over k.
constexpr int chains_of(int sums, int steps) { return divisor_within(sums < 4 ? 4 / sums : 1, steps); }

// The sums of all chains, in one order.
template <int kChains>
OSTINATO_DEVICE float total(const float (&sums)[kChains][kEights][4], int eight, int i) {
    float sum = sums[0][eight][i];
    OSTINATO_UNROLL
    for (int chain = 1; chain < kChains; chain++) sum += sums[chain][eight][i];
    return sum;
}

// The words of the right operand, kGroupRows rows of operands with this many to a row, that a thread holds of columns k to
// k + kDepth.
template <class Math>
OSTINATO_DEVICE void read_rows(const typename Math::Operand* rows, int stride, int k, u32 (&b)[kEights][2]) {
    const int lane = thread_index() % 32, width = Math::kDepth / 8;
    OSTINATO_UNROLL
    for (int e = 0; e < kEights; e++) {
        const auto* from = rows + (e * 8 + lane / 4) * stride + k + lane % 4 * width;
        b[e][0] = *reinterpret_cast<const u32*>(from);
        b[e][1] = *reinterpret_cast<const u32*>(from + 4 * width);
    }
}

// For how many steps in k the right operand is on its way at once: for all of them it would take all registers.
constexpr int steps_ahead(int sums) { return kEights > 1 ? largest(4 / kEights, 1) : sums < 3 ? 8 : 4; }

// ---- products by fused multiply-adds ----

// A thread's sums for each of eight rows, each over kFours times four k. A fragment has the weights of four k of a sum; those of the
// same k lie beside each other.
template <int kSums, int kFours>
struct RowProduct {
    using Held = Fragments<kSums * kFours>;
    // A weight that is read from shared memory serves all rows; with all of them in registers, few sums leave the most.
    static constexpr int kAtOnce = Held::kShared ? 8 : 2, kFoursHeld = Held::kHeld / kSums;
    static_assert(!Held::kShared || Held::kHeld % kSums == 0, "whole steps in registers");
    Held fragments;

    // place(row, k) is where four values of a row lie; done(first, sum) gets the sums of kAtOnce rows.
    template <class Place, class Done>
    OSTINATO_DEVICE void multiply(const Fragment* shared, Place place, Done done) const {
        OSTINATO_UNROLL
        for (int first = 0; first < kGroupRows; first += kAtOnce) {
            schedule_barrier();  // all at once would take more registers than there are
            float sum[kAtOnce][kSums] = {};
            const auto add = [&](int four, const Fragment(&weights)[kSums]) {
                OSTINATO_UNROLL
                for (int row = 0; row < kAtOnce; row++) {
                    const Fragment values = *reinterpret_cast<const Fragment*>(place(first + row, four * 4));
                    OSTINATO_UNROLL
                    for (int j = 0; j < 4; j++) OSTINATO_UNROLL
                    for (int i = 0; i < kSums; i++)
                        sum[row][i] = fused(float_of(weights[i].words[j]), float_of(values.words[j]), sum[row][i]);
                }
            };
            Fragment weights[kSums];
            OSTINATO_UNROLL
            for (int four = 0; four < kFoursHeld; four++) {
                OSTINATO_UNROLL
                for (int i = 0; i < kSums; i++) weights[i] = fragments.held_at(four * kSums + i);
                add(four, weights);
            }
            OSTINATO_ROLLED
            for (int four = kFoursHeld; four < kFours; four++) {
                OSTINATO_UNROLL
                for (int i = 0; i < kSums; i++) weights[i] = Held::shared_at(shared, four * kSums + i);
                add(four, weights);
            }
            done(first, sum);
        }
    }
};

// Operands after a row that keep the reads above free of bank conflicts.
template <class Math>
constexpr int kRowPad = 16 / static_cast<int>(sizeof(typename Math::Operand));

}  // namespace
}  // namespace ostinato
