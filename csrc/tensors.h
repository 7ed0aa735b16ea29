// The fast path in C++: one call with torch's tensors, read without torch's headers.
//
// DLPack's table of C functions (torch.Tensor.__dlpack_c_exchange_api__, torch 2.10 and later) fills a plain struct from a
// tensor in some 40 ns, so that checking, allocating and running a cell costs about 2 us instead of 25. The table is a
// stable binary interface: one build still serves every version of torch, and those without it never take the fast path.
//
// Every function here accepts or declines. It accepts only what ostinato.check would have accepted, checked again in full:
// exact type, device, dtype, shape, dense memory. It never says what is wrong: it returns None, and the caller goes the
// rest of the route, whose check does.
#pragma once

#include <nanobind/nanobind.h>

namespace ostinato {

void define_tensors(nanobind::module_& m);

}  // namespace ostinato
