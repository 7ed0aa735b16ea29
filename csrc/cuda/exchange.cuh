// Words in global memory, by which blocks that share no memory hand each other a step (Exchange::kGrid). Each carries the mark of
// the step it belongs to, so that whoever finds the mark has the value, and nothing else needs to be in order.
#pragma once

#include "math.cuh"

namespace ostinato {
namespace {

// The mark of a word that belongs to step s: never 0, which the memory holds first, and never that of step s - 2, whose word
// lay in the same place.
OSTINATO_DEVICE u32 mark_of(int s) { return 1 + static_cast<u32>(s / 2 % 3); }

// A value and the mark of the step it belongs to. Where the value needs all its bits, a word has two halves; a float whose products
// have 11 bits, or that is one of several such terms, leaves two bits to the mark.
template <class T, bool kIsWhole>
struct Marked {
    using Word = u32;
    static OSTINATO_DEVICE Word join(T value, u32 mark) { return static_cast<u32>(word_of(value)) << 16 | mark; }
    static OSTINATO_DEVICE void split(Word word, T& value) { from_word(static_cast<u16>(word >> 16), value); }
};
template <>
struct Marked<float, false> {
    using Word = u32;
    static OSTINATO_DEVICE Word join(float value, u32 mark) { return (bits_of(value) & ~3u) | mark; }
    static OSTINATO_DEVICE void split(Word word, float& value) { value = float_of(word & ~3u); }
};
template <>
struct Marked<float, true> {
    using Word = u64;
    static OSTINATO_DEVICE Word join(float value, u32 mark) { return static_cast<u64>(bits_of(value)) << 32 | mark; }
    static OSTINATO_DEVICE void split(Word word, float& value) { value = float_of(static_cast<u32>(word >> 32)); }
};

// Words of one read, and how many reads of a thread are under way at once.
template <class Word>
constexpr int kPerRead = 16 / static_cast<int>(sizeof(Word));
constexpr int kReadsAtOnce = 4;

// Reads what lies at reads first, first + stride .. below `end`, until every word has its mark.
template <class Word>
OSTINATO_DEVICE void await_words(const Word* words, u32 mark, int first, int stride, int end,
                                 Word (&found)[kReadsAtOnce][kPerRead<Word>]) {
    bool is_complete;
    do {
        is_complete = true;
        OSTINATO_UNROLL
        for (int i = 0; i < kReadsAtOnce; i++) {
            const int read = first + i * stride;
            if (read >= end) continue;
            load_shared_words(words + read * kPerRead<Word>, found[i]);
            OSTINATO_UNROLL
            for (int j = 0; j < kPerRead<Word>; j++) is_complete &= (found[i][j] & 3) == mark;
        }
    } while (!is_complete);
}

}  // namespace
}  // namespace ostinato
