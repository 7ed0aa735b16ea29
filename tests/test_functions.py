"""The elementary functions that a cell's step may use: errors, special numbers, and bits.

docs/math.md states how far they may be from exact.
"""

import itertools
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from ostinato import _core
from support import functions
from support.engine import DTYPES, INSTRUCTION_SETS, every_kind_of_number
from support.tolerances import assert_same_bits

ROOT = Path(__file__).resolve().parent.parent
WIDE = {"float32": np.float64, "float64": np.longdouble}
NAN, INF = np.nan, np.inf
BINARY = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    """Names each instruction set in turn; the engine's own choice plays no part here."""
    if request.param not in _core.instruction_sets():
        pytest.skip(f"{request.param}: neither this processor nor this build has it")
    return request.param


def erf(x):
    """2 / sqrt(pi) * e^(-x^2) * x * (1 + 2x^2 / 3 + (2x^2)^2 / (3 * 5) + ...): nothing cancels."""
    a = np.minimum(np.abs(x), 7)
    term = total = np.ones_like(a)
    for n in range(1, 250):
        term = term * (2 * a * a / (2 * n + 1))
        total = total + term
    pi = x.dtype.type(np.pi) + x.dtype.type("1.2246467991473531772e-16")
    near = 2 / np.sqrt(pi) * np.exp(-a * a) * a * total
    return np.copysign(np.where(a == 7, 1, near), x)


def softplus(x):
    near = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    return np.where(x > 20, x, near)


EXACT = {
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "softplus": softplus,
    "erf": erf,
}
# Units in the last place, float32 and float64. Those of float32 were found over all numbers.
BOUNDS = {
    "exp": (1.1, 1.2),
    "log": (0.9, 1.0),
    "sqrt": (0.5, 0.5),
    "rsqrt": (1.5, 1.5),
    "softplus": (2.0, 2.0),
    "erf": (1.9, 2.0),
}


def numbers(dtype, rng):
    """Every kind of number, and many where functions bend."""
    size = 40_000
    drawn = [
        rng.uniform(-1, 1, size),
        rng.uniform(-25, 25, size),
        1 + rng.uniform(-0.5, 0.5, size),
        rng.uniform(-750, 750, size) if dtype == "float64" else rng.uniform(-105, 105, size),
        1 + np.arange(-50, 50) * np.finfo(dtype).eps,
        20 + np.arange(-50, 50) * 20 * np.finfo(dtype).eps,
    ]
    return np.concatenate([every_kind_of_number(dtype, size), *(a.astype(dtype) for a in drawn)])


def ulps(actual, exact):
    """Distances in units in the last place of the exact value: a half where that rounds to it."""
    rounded = exact.astype(actual.dtype)
    is_right = (actual == rounded) | (np.isnan(actual) & np.isnan(rounded))
    spacing = np.spacing(np.abs(rounded)).astype(exact.dtype)
    distance = np.abs(actual.astype(exact.dtype) - exact) / spacing
    # A wrong infinity or NaN is infinitely far.
    return np.where(is_right, 0.5, np.nan_to_num(distance, nan=INF))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT)
def test_errors_are_within_their_bounds(isa, dtype, name, rng):
    x = numbers(dtype, rng)
    actual = functions.apply(isa, name, x)
    with np.errstate(all="ignore"):
        exact = EXACT[name](x.astype(WIDE[dtype]))
        found = ulps(actual, exact)
    worst = np.argmax(found)
    bound = BOUNDS[name][DTYPES.index(dtype)]
    assert found[worst] <= bound, f"{name}({x[worst]!r}) = {actual[worst]!r}, not {exact[worst]!r}"


SPECIAL = {
    "exp": [(-INF, 0), (INF, INF), (NAN, NAN), (0.0, 1), (-0.0, 1), (1e30, INF), (-1e30, 0)],
    "log": [
        (0.0, -INF),
        (-0.0, -INF),
        (INF, INF),
        (1, 0.0),
        (-1e-40, NAN),
        (-INF, NAN),
        (NAN, NAN),
    ],
    "sqrt": [(0.0, 0.0), (-0.0, -0.0), (INF, INF), (-1, NAN), (-INF, NAN), (NAN, NAN)],
    "rsqrt": [(0.0, INF), (-0.0, -INF), (INF, 0.0), (-1, NAN), (NAN, NAN)],
    "softplus": [(-INF, 0.0), (INF, INF), (NAN, NAN), (20.5, 20.5), (1e30, 1e30), (-1e30, 0.0)],
    "erf": [(0.0, 0.0), (-0.0, -0.0), (INF, 1), (-INF, -1), (NAN, NAN), (7, 1), (-1e30, -1)],
    "abs": [(-0.0, 0.0), (-INF, INF), (-3, 3), (2, 2), (NAN, NAN)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_numbers(isa, dtype, name):
    x, expected = np.array(SPECIAL[name], dtype).T
    assert_numbers(functions.apply(isa, name, x), expected)


def assert_numbers(actual, expected):
    """Equal, and zeros of equal signs; a NaN's sign and payload are the processor's own."""
    np.testing.assert_array_equal(actual, expected)
    fine = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(actual[fine]), np.signbit(expected[fine]))


def pairs(dtype):
    """Every pair of some numbers of every kind."""
    tiny = float(np.finfo(dtype).smallest_subnormal)
    kinds = [0.0, -0.0, tiny, -tiny, 1.0, 1.5, -1.5, INF, -INF, NAN]
    return np.array(list(itertools.product(kinds, kinds)), dtype).T


@pytest.fixture(
    params=[*((isa, dtype) for isa in INSTRUCTION_SETS for dtype in DTYPES), ("gpu", "float32")]
)
def target(request):
    """An instruction set or the emulated GPU, and a dtype that it has."""
    isa, dtype = request.param
    if isa != "gpu" and isa not in _core.instruction_sets():
        pytest.skip(f"{isa}: neither this processor nor this build has it")
    return isa, dtype


@pytest.mark.parametrize("name", BINARY)
def test_comparisons_give_one_or_zero(target, name):
    isa, dtype = target
    a, b = pairs(dtype)
    assert_numbers(functions.apply(isa, name, a, b), BINARY[name](a, b).astype(dtype))


def test_masks_combine_and_choose(target):
    isa, dtype = target
    a, b = np.array(list(itertools.product([0, 1], [0, 1])), dtype).T
    for name in ("logical_and", "logical_or"):
        expected = getattr(np, name)(a, b).astype(dtype)
        assert_numbers(functions.apply(isa, name, a, b), expected)
    assert_numbers(functions.apply(isa, "logical_not", a), np.logical_not(a).astype(dtype))
    x, y = pairs(dtype)
    mask = (np.arange(x.size) % 3 == 0).astype(dtype)
    chosen = functions.apply(isa, "select", mask, x, y)
    assert_same_bits(chosen, np.where(mask == 1, x, y))


@pytest.mark.parametrize("name", ["minimum", "maximum"])
def test_nan_of_either_side_wins(target, name):
    isa, dtype = target
    a, b = pairs(dtype)
    expected = getattr(np, name)(a, b)
    # Which of two zeros it is, NumPy leaves open: here the first.
    expected = np.where(a == b, a, expected)
    assert_numbers(functions.apply(isa, name, a, b), expected)


def test_slopes_are_the_derivatives(target):
    isa, dtype = target
    y = np.linspace(-1, 1, 101).astype(dtype)
    g = np.full_like(y, 3)
    wide = y.astype(WIDE[dtype])
    expected = {
        "sigmoid_slope": 3 * wide * (1 - wide),
        "tanh_slope": 3 * (1 - wide * wide),
        "relu_slope": np.where(wide > 0, 3, 0),
    }
    for name, exact in expected.items():
        actual = functions.apply(isa, name, g, y)
        np.testing.assert_allclose(actual, exact, rtol=0, atol=4 * np.finfo(dtype).eps)
    nan = np.full_like(y, NAN)
    assert_same_bits(functions.apply(isa, "relu_slope", g, nan), g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", functions.FUNCTIONS)
def test_bits_do_not_depend_on_the_instruction_set(name, dtype, rng):
    sets = [isa for isa in INSTRUCTION_SETS if isa in _core.instruction_sets()]
    if len(sets) < 2:
        pytest.skip("there is one instruction set")
    a = numbers(dtype, rng)
    b, c = rng.permutation(a), rng.permutation(a)
    if name.startswith("logical"):
        a, b = (a > 0).astype(dtype), (b > 0).astype(dtype)
    results = [functions.apply(isa, name, a, b, c) for isa in sets]
    # A NaN's sign and payload are the processor's own.
    first, *others = (np.where(np.isnan(y), y.dtype.type(NAN), y) for y in results)
    for other in others:
        assert_same_bits(first, other, name)


@pytest.mark.parametrize("name", EXACT)
def test_the_emulated_gpu_computes_the_same_functions(name, rng):
    x = numbers("float32", rng)
    with np.errstate(all="ignore"):
        found = ulps(functions.apply("gpu", name, x), EXACT[name](x.astype(np.float64)))
    # The C library's.
    assert found.max() <= 4


class Probe(NamedTuple):
    """What the compiler asks of a kernel's configuration."""

    source: str
    entry: str
    defines: dict
    head: str = ""


def test_a_gpu_has_every_function(tmp_path, monkeypatch):
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    from ostinato.cuda import compiler

    shutil.copytree(functions.SOURCES / "cuda", tmp_path / "cuda")
    shutil.copy(functions.SOURCES / "cells.h", tmp_path)
    calls = [
        f"{{ to[{i}] = ({value}).value; }}" for i, value in enumerate(functions.FUNCTIONS.values())
    ]
    text = """#include "../cells.h"
#include "device.h"
namespace ostinato {
extern "C" __global__ void walk(const float* from, float* to) {
    const Real<FAST> a = from[0], b = from[1], c = from[2];
    CALLS
}
}
"""
    (tmp_path / "cuda/walk.cu").write_text(text.replace("CALLS", "\n    ".join(calls)))
    monkeypatch.setattr(compiler, "text_folder", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for is_fast in (0, 1):
        assert compiler.compile(Probe("walk.cu", "walk", {"FAST": is_fast}), "sm_80").cubin


def test_the_document_states_the_bounds():
    text = (ROOT / "docs/math.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    assert {name: (float(a), float(b)) for name, a, b in rows} == BOUNDS
