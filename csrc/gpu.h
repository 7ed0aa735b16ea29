// The GPU engine's host side in C++: whether a call's tensors are plain, and the launch of a kernel.
//
// The driver is called through addresses that it gave itself (ostinato.cuda.launch), so that one build serves every version of it
// and needs none of its headers.
#pragma once

#include <nanobind/nanobind.h>

namespace ostinato {

void define_gpu(nanobind::module_& m);

}  // namespace ostinato
