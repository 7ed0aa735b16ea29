// Scratch memory of one call, handed out in parts.
#pragma once

#include <cstdint>

namespace ostinato {
namespace {

// Hands out scratch in 64-byte multiples. Without a base it only counts: the same plan then measures and allocates.
class Arena {
public:
    explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

    template <class T>
    T* take(int64_t elements) {
        char* p = base_ + used_;
        used_ += (elements * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return base_ ? reinterpret_cast<T*>(p) : nullptr;
    }
    int64_t used() const { return used_; }
    bool is_counting() const { return !base_; }

private:
    char* base_;
    int64_t used_ = 0;
};

}  // namespace
}  // namespace ostinato
