// For a wheel alone (OSTINATO_MANYLINUX, make wheel): what newer headers ask of libstdc++, by what that of manylinux_2_28
// (GCC 8) has. Only nanobind handles such pointers, when it translates exceptions.
//
// Since GCC 12 <exception> copies an exception_ptr inline, by two functions that are in no earlier libstdc++; before, copy
// constructor and destructor were functions there, and they still are. Both definitions are hidden, so they serve this
// module alone.

#define OSTINATO_EXCEPTION_PTR "_ZNSt15__exception_ptr13exception_ptr"

void construct_copy(void** self, void* const* other) __asm__(OSTINATO_EXCEPTION_PTR "C1ERKS0_");
void destroy(void** self) __asm__(OSTINATO_EXCEPTION_PTR "D1Ev");
void add_reference(void** self) __asm__(OSTINATO_EXCEPTION_PTR "9_M_addrefEv");
void release(void** self) __asm__(OSTINATO_EXCEPTION_PTR "10_M_releaseEv");

// A copy that is never destroyed is one reference more.
__attribute__((visibility("hidden"))) void add_reference(void** self) {
    void* copy;
    construct_copy(&copy, self);
}

__attribute__((visibility("hidden"))) void release(void** self) {
    destroy(self);
    *self = nullptr;
}
