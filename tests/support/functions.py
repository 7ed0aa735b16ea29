"""The elementary functions of csrc by themselves: on each instruction set, and as on a GPU."""

import atexit
import ctypes
import functools
import pathlib
import subprocess
import tempfile

import numpy as np

SOURCES = pathlib.Path(__file__).parents[2] / "csrc"
# What CMakeLists.txt compiles the engine with.
OPTIONS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS = {
    "portable": [],
    "neon": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
        *("-mavx2", "-mfma", "-mprefer-vector-width=512"),
    ],
}
TYPES = {"float32": "float", "float64": "double"}

# How each is written in a step. `a`, `b` and `c` are values or, where its name says so, masks.
FUNCTIONS = {
    "exp": "exp(a)",
    "log": "log(a)",
    "sqrt": "sqrt(a)",
    "rsqrt": "rsqrt(a)",
    "softplus": "softplus(a)",
    "erf": "erf(a)",
    "sigmoid": "sigmoid(a)",
    "tanh": "tanh(a)",
    "sigmoid_times_tanh": "sigmoid_times_tanh(a, b)",
    "relu": "relu(a)",
    "abs": "abs(a)",
    "div": "a / b",
    "fnma": "fnma(a, b, c)",
    "minimum": "minimum(a, b)",
    "maximum": "maximum(a, b)",
    "lt": "lt(a, b)",
    "le": "le(a, b)",
    "gt": "gt(a, b)",
    "ge": "ge(a, b)",
    "eq": "eq(a, b)",
    "ne": "ne(a, b)",
    "logical_and": "logical_and(a, b)",
    "logical_or": "logical_or(a, b)",
    "logical_not": "logical_not(a)",
    "select": "select(a, b, c)",
    "sigmoid_slope": "sigmoid_slope(a, b)",
    "tanh_slope": "tanh_slope(a, b)",
    "relu_slope": "relu_slope(a, b)",
}

# A last vector with lanes to spare, too.
CPU_TEXT = """
#include "cells.h"
#include "cpu/functions.h"
namespace ostinato {
template <class T, class F>
void each(const T* const* from, T* to, int64_t n, F f) {
    for (int64_t i = 0; i < n; i += Vec<T>::kLanes) {
        const int64_t m = n - i < Vec<T>::kLanes ? n - i : Vec<T>::kLanes;
        const auto get = [&](int k) { return load_n(from[k] + i, m); };
        store_n(f(get(0), get(1), get(2)), to + i, m);
    }
}
"""
GPU_TEXT = """
#include "cells.h"
#include "cuda/device.h"
namespace ostinato {
template <class T>
using Vec = Real<false>;
template <class T, class F>
void each(const T* const* from, T* to, i64 n, F f) {
    const auto get = [&](int k, i64 i) { return Vec<T>(from[k][i]); };
    for (i64 i = 0; i < n; i++) to[i] = f(get(0, i), get(1, i), get(2, i)).value;
}
"""
ENTRY = """
extern "C" void {name}_{type}(const {type}* const* from, {type}* to, long long n) {{
    each(from, to, n, [](auto a, auto b, auto c) {{
        (void)b, (void)c;
        return {value};
    }});
}}
"""


@functools.cache
def _folder():
    folder = tempfile.TemporaryDirectory(prefix="ostinato-functions-")
    atexit.register(folder.cleanup)
    return pathlib.Path(folder.name)


@functools.cache
def library(target):
    """Compile all functions for an instruction set, or as emulated for a "gpu"."""
    is_gpu = target == "gpu"
    types = ["float"] if is_gpu else TYPES.values()
    entries = [
        ENTRY.format(name=name, type=type, value=value)
        for type in types
        for name, value in FUNCTIONS.items()
    ]
    source = _folder() / f"{target}.cpp"
    source.write_text("\n".join([GPU_TEXT if is_gpu else CPU_TEXT, *entries, "}"]))
    to = source.with_suffix(".so")
    flags = [*OPTIONS, "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{SOURCES}"]
    flags += [] if is_gpu else FLAGS[target]
    subprocess.run(["g++", *flags, str(source), "-o", str(to)], check=True)
    return ctypes.CDLL(str(to))


def apply(target, name, *arrays):
    """Apply a function to arrays of one shape and dtype."""
    a = np.ascontiguousarray(arrays[0])
    arrays = [a, *map(np.ascontiguousarray, arrays[1:])]
    assert all(array.shape == a.shape and array.dtype == a.dtype for array in arrays)
    to = np.empty_like(a)
    addresses = [arrays[min(i, len(arrays) - 1)].ctypes.data for i in range(3)]
    entry = getattr(library(target), f"{name}_{TYPES[a.dtype.name]}")
    entry(
        (ctypes.c_void_p * 3)(*addresses), ctypes.c_void_p(to.ctypes.data), ctypes.c_int64(a.size)
    )
    return to
