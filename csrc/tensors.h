// The fast path in C++: one call with torch's tensors, read without torch's headers.
//
// Reading tensors as plain.h does, checking, allocating and running a cell costs about 2 us instead of 25. A torch without
// DLPack's table never takes the fast path.
//
// Every function here accepts or declines. It accepts only what ostinato.check would have accepted, checked again in full:
// exact type, device, dtype, shape, dense memory. It never says what is wrong: it returns None, and the caller goes the
// rest of the route, whose check does.
#pragma once

#include <nanobind/nanobind.h>

namespace ostinato {

void define_tensors(nanobind::module_& m);

}  // namespace ostinato
