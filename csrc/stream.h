// A stream: a stack of layers with frozen weights, packed once, and the states of its sequences (csrc/cpu/streams.h).
//
// Its fast path reads a NumPy array through the buffer protocol and torch's tensors as plain.h does, and returns an output of the
// same kind. It accepts or declines, as tensors.h says; ostinato/stream.py says what is wrong.
#pragma once

#include <nanobind/nanobind.h>

namespace ostinato {

void define_stream(nanobind::module_& m);

}  // namespace ostinato
