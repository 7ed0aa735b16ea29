"""The compiled engine alone: every result and gradient, on every instruction set, without torch.

Every call goes through `engine.Layer`, whose arrays lie between poisoned guard zones, so every
test here also shows reads and writes out of bounds and outputs that were never written.
"""

import contextlib
import ctypes
import itertools
import os
import platform
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostinato import _core
from support.calls import STATES, ragged
from support.cells import KINDS, RECORDS
from support.engine import (
    COTANGENTS,
    DTYPES,
    INSTRUCTION_SETS,
    Layer,
    every_kind_of_number,
    first_step,
    instruction_set,
)
from support.poison import SANITIZED
from support.tolerances import assert_close, assert_same_bits

LANES = (1, 7, 8, 9, 15, 16, 17, 31, 33, 48, 49)
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 37)


def check(layer, cotangents, *, threads=1, wanted=None):
    """Hold results and gradients to the equations."""
    layer.soil()
    expected = layer.equations(cotangents)
    actual = layer.run(cotangents, threads=threads, wanted=wanted)
    assert set(actual) >= {"y", "h_n"}
    for name, array in actual.items():
        assert_close(array, expected[name], layer.steps, name)


def assert_same(actual, expected, names=None):
    """Compare two sets of results bit by bit."""
    assert names or actual.keys() == expected.keys()
    for name in names or expected:
        assert_same_bits(actual[name], expected[name], name)


# ---- against the reference and the equations ----


@pytest.mark.parametrize("layout", ["padded", "ragged", "rows of no steps", "steps of no rows"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients(isa, rng, kind, dtype, directions, layout):
    sizes = {"padded": None, "ragged": ragged(rng, 6, 5)}
    sizes["rows of no steps"] = ragged(rng, 6, 5, empty=2)
    sizes["steps of no rows"] = [3, 2, 2, 1, 0, 0]
    options = {"directions": directions, "dtype": dtype, "sizes": sizes[layout]}
    layer = Layer.draw(rng, kind, 6, 5, 3, 19, **options)
    check(layer, layer.cotangents(rng))
    # A second oracle for the forward pass, which shares no line with the first.
    actual = layer.forward(keep=False)
    for name, expected in layer.reference().items():
        assert_close(actual[name], expected, layer.steps, name)


@pytest.mark.parametrize("index", range(len(LANES)))
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_around_the_lanes(isa, rng, kind, index):
    # Walks of different stride through the same list, so that every size meets several others.
    hidden, size = LANES[index], LANES[(3 * index + KINDS.index(kind)) % len(LANES)]
    batch = BATCHES[(5 * index + 2) % len(BATCHES)]
    for dtype, sizes in (("float32", None), ("float64", ragged(rng, 3, batch))):
        options = {"dtype": dtype, "sizes": sizes, "directions": 1 + index % 2}
        layer = Layer.draw(rng, kind, 3, batch, size, hidden, **options)
        check(layer, layer.cotangents(rng))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_a_single_step(isa, rng, kind, batch):
    for steps, dtype in ((1, "float64"), (1, "float32"), (4, "float32")):
        layer = Layer.draw(rng, kind, steps, batch, 5, 17, dtype=dtype, directions=2)
        check(layer, layer.cotangents(rng))


@pytest.mark.parametrize("kind", KINDS)
def test_absent_biases_states_and_gradients(isa, rng, kind):
    for states, bias in itertools.product(((), ("h_0",), ("c_0",), STATES), (True, False)):
        options = {"states": states, "bias": bias, "directions": 2, "sizes": [4, 4, 2, 1]}
        layer = Layer.draw(rng, kind, 4, 5, 3, 9, **options)
        check(layer, layer.cotangents(rng))
    for given_ones in ((), *((name,) for name in COTANGENTS)):
        check(layer, layer.cotangents(rng, given_ones))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_are_not_wanted(isa, rng, kind):
    layer = Layer.draw(rng, kind, 4, 5, 3, 9, directions=2, sizes=[4, 4, 2, 1])
    cotangents = layer.cotangents(rng)
    expected = layer.run(cotangents)
    names = layer.gradients()
    for wanted in (*((n,) for n in names), *(tuple(set(names) - {n}) for n in names), ()):
        actual = layer.run(cotangents, wanted=wanted)
        assert set(actual) == set(wanted) | {"y", "h_n", "c_n"} & set(expected)
        assert_same(actual, expected, names=actual)


# Steps are taken in chunks whose scratch fits 2 MiB. Rows per chunk, forward and backward:
# 128 for an LSTM of 512 in float64, 1024 for a relu network of 512 in float32.
CHUNKED = [
    ("lstm", "float64", 300, 1, 5, 512, 1, None),
    ("lstm_projected", "float64", 5, 70, 3, 512, 2, None),
    ("gru", "float64", 3, 140, 3, 512, 1, "ragged"),
    ("gru", "float32", 400, 7, 9, 129, 2, "ragged"),
    ("rnn_relu", "float32", 260, 9, 4, 512, 1, "ragged"),
    ("rnn_tanh", "float64", 500, 40, 1, 3, 2, "ragged"),
]


@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_many_chunks(isa, rng, case):
    kind, dtype, steps, batch, size, hidden, directions, layout = case
    if SANITIZED and isa == "portable":
        pytest.skip("minutes under a sanitizer; the chunks are those of the other instruction sets")
    sizes = None if layout is None else ragged(rng, steps, batch)
    options = {"dtype": dtype, "directions": directions, "sizes": sizes}
    layer = Layer.draw(rng, kind, steps, batch, size, hidden, **options)
    check(layer, layer.cotangents(rng), threads=2)


def test_whole_numbers_are_exact(isa, rng):
    # Nothing saturates or rounds, so one row, step or unit out of place is another whole number.
    for dtype, directions, sizes in itertools.product(DTYPES, (1, 2), (None, [7, 7, 4, 2])):
        options = {"dtype": dtype, "directions": directions, "sizes": sizes, "whole": True}
        layer = Layer.draw(rng, "rnn_relu", 4, 7, 5, 21, **options)
        cotangents = layer.cotangents(rng)
        for name, array in cotangents.items():
            cotangents[name] = None if array is None else np.round(array)
        expected = layer.equations(cotangents)
        assert max(np.abs(a).max() for a in expected.values()) < 2**24
        for name, array in layer.run(cotangents).items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_and_no_rows(isa, rng, kind):
    cases = [(0, 3, None), (0, 3, []), (4, 0, None), (4, 0, [0] * 4), (2, 3, [0, 0])]
    # One step has a way of its own, few rows another.
    cases += [(1, 3, [0]), (1, 0, None), (1, 40, [0])]
    for (steps, batch, sizes), states in itertools.product(cases, (STATES, ())):
        options = {"directions": 2, "sizes": sizes, "states": states}
        layer = Layer.draw(rng, kind, steps, batch, 3, 9, **options)
        cotangents = layer.cotangents(rng)
        actual = layer.run(cotangents)
        for name, expected in layer.equations(cotangents).items():
            np.testing.assert_array_equal(actual[name], expected, err_msg=name)


@st.composite
def layers(draw):
    """Any layer of modest size, what is absent in it, and which gradients are wanted."""
    kind = draw(st.sampled_from(KINDS))
    steps, batch = draw(st.integers(0, 9)), draw(st.integers(0, 14))
    size, hidden = draw(st.integers(1, 35)), draw(st.integers(1, 50))
    lengths = draw(st.none() | st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
    sizes = None if lengths is None else [sum(n > t for n in lengths) for t in range(steps)]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    layer = Layer.draw(
        rng,
        kind,
        steps,
        batch,
        size,
        hidden,
        sizes=sizes,
        dtype=draw(st.sampled_from(DTYPES)),
        directions=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        states=draw(st.sets(st.sampled_from(STATES))),
    )
    cotangents = layer.cotangents(rng, draw(st.sets(st.sampled_from(COTANGENTS))))
    return layer, cotangents, draw(st.sets(st.sampled_from(layer.gradients())))


@settings(max_examples=60 if SANITIZED else 150)
@given(layers(), st.sampled_from(_core.instruction_sets()), st.integers(1, 3))
def test_any_layer(drawn, name, threads):
    layer, cotangents, wanted = drawn
    with instruction_set(name):
        check(layer, cotangents, threads=threads, wanted=wanted)


# ---- the same bits, whatever runs them (design, decision 7) ----

# T, B, I, H, D, ragged. Large enough for a team: row tiles, tiles of two directions, and the few
# rows of a wide layer whose units are shared step by step.
SHARED = [
    (20, 13, 9, 48, 1, True),
    (20, 13, 9, 48, 2, True),
    (9, 37, 17, 33, 2, False),
    (40, 1, 9, 193, 1, False),
    (40, 3, 9, 129, 1, False),
    (21, 5, 16, 129, 1, True),
    (1, 37, 130, 67, 2, False),
]


@pytest.mark.parametrize("shape", SHARED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_threads_or_instruction_set(rng, kind, dtype, shape):
    steps, batch, size, hidden, directions, is_ragged = shape
    sizes = ragged(rng, steps, batch, empty=batch // 6) if is_ragged else None
    options = {"dtype": dtype, "directions": directions, "sizes": sizes}
    layer = Layer.draw(rng, kind, steps, batch, size, hidden, **options)
    cotangents = layer.cotangents(rng)
    expected = layer.run(cotangents)
    for name in _core.instruction_sets():
        with instruction_set(name):
            for threads in (1, 2, 3):
                assert_same(layer.run(cotangents, threads=threads), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_reads_what_another_instruction_set_kept(rng, kind):
    if len(_core.instruction_sets()) == 1:
        pytest.skip(f"{_core.isa()} is the only instruction set here")
    layer = Layer.draw(rng, kind, 5, 4, 3, 19, directions=2, dtype="float32")
    cotangents = layer.cotangents(rng)
    expected = layer.backward(layer.forward(), cotangents)
    for first, second in itertools.permutations(_core.instruction_sets(), 2):
        with instruction_set(first):
            results = layer.forward()
        with instruction_set(second):
            assert_same(layer.backward(results, cotangents), expected)


def part(layer, cotangents, rows, sizes, states, steps, batch):
    """Cut rows of the packed input and rows of the states out of a layer of one direction."""
    one = {n: None if getattr(layer, n) is None else getattr(layer, n)[:, states] for n in STATES}
    cut = {n: None if a is None else a[:, states] for n, a in cotangents.items() if n != "dy"}
    cut["dy"] = cotangents["dy"][rows]
    return layer.replace(x=layer.x[rows], sizes=sizes, steps=steps, batch=batch, **one), cut


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_row_do_not_depend_on_the_batch(isa, rng, kind, dtype):
    steps, batch = 9, 37
    sizes = ragged(rng, steps, batch, empty=3)
    starts = np.cumsum([0, *sizes])
    layer = Layer.draw(rng, kind, steps, batch, 5, 33, dtype=dtype, sizes=sizes)
    cotangents = layer.cotangents(rng)
    whole = layer.run(cotangents, threads=2)
    for b in (0, 1, 5, 18, 33, 36):
        length = sum(n > b for n in sizes)
        rows = [starts[t] + b for t in range(length)]
        alone, cut = part(layer, cotangents, rows, None, slice(b, b + 1), length, 1)
        alone = alone.run(cut)
        for name in ("y", "dx"):
            assert_same_bits(alone[name], whole[name][rows], name)
        for name in {"h_n", "c_n", "dh_0", "dc_0"} & set(whole):
            assert_same_bits(alone[name], whole[name][:, b : b + 1], name)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_padded_batch_are_those_of_a_packed_one(isa, rng, kind):
    layer = Layer.draw(rng, kind, 8, 6, 5, 33, dtype="float32", directions=2)
    cotangents = layer.cotangents(rng)
    packed = layer.replace(sizes=[6] * 8).run(cotangents, threads=2)
    assert_same(packed, layer.run(cotangents, threads=2))


@pytest.mark.parametrize("piece", [1, 7, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_where_a_sequence_is_cut(isa, rng, kind, piece):
    steps, batch = 100, 3
    layer = Layer.draw(rng, kind, steps, batch, 5, 33, dtype="float32")
    cotangents = layer.cotangents(rng)
    whole = layer.run(cotangents)
    runs, states = [], {n: getattr(layer, n) for n in STATES}
    for first in range(0, steps, piece):
        last = min(steps, first + piece)
        rows = slice(first * batch, last * batch)
        cut = layer.replace(x=layer.x[rows], steps=last - first, **states)
        results = cut.forward()
        runs.append((cut, rows, results))
        states = {"h_0": results["h_n"], "c_0": results.get("c_n")}
    assert_same_bits(np.concatenate([r["y"] for *_, r in runs]), whole["y"])
    for name in {"h_n", "c_n"} & set(whole):
        assert_same_bits(results[name], whole[name], name)
    # And back: the gradient of a piece's first state is that of the last state before it.
    ends = {n: cotangents[n] for n in ("dh_n", "dc_n")}
    for cut, rows, results in reversed(runs):
        found = cut.backward(results, {"dy": cotangents["dy"][rows], **ends})
        ends = {"dh_n": found["dh_0"], "dc_n": found.get("dc_0")}
        assert_same_bits(found["dx"], whole["dx"][rows], "dx")
    for name in {"dh_0", "dc_0"} & set(whole):
        assert_same_bits(found[name], whole[name], name)


# ---- numbers that are not ordinary ----


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_stay_in_their_row(isa, rng, kind, bad):
    steps, batch, row = 6, 11, 4
    layer = Layer.draw(rng, kind, steps, batch, 5, 19, dtype="float32", directions=2)
    cotangents = layer.cotangents(rng)
    clean = layer.run(cotangents)
    layer.x.reshape(steps, batch, 5)[3, row, 2] = bad
    spoilt = layer.run(cotangents)
    others = np.arange(batch) != row
    for name, array in spoilt.items():
        if name in ("y", "dx"):
            shape = (steps, batch, -1)
            assert_same_bits(
                array.reshape(shape)[:, others], clean[name].reshape(shape)[:, others], name
            )
        elif name in ("h_n", "c_n", "dh_0", "dc_0"):
            assert_same_bits(array[:, others], clean[name][:, others], name)
    with np.errstate(invalid="ignore"):
        expected = layer.reference()
    for name, array in expected.items():
        assert_close(spoilt[name], array, steps, name)
    assert np.isnan(spoilt["y"]).any() == np.isnan(expected["y"]).any()
    if np.isnan(bad):
        # Of this row, what comes before the bad step in each direction is clean.
        y, before = (a["y"].reshape(steps, batch, 2, -1)[:, row] for a in (spoilt, clean))
        assert np.isnan(y[3:, 0]).all()
        assert np.isnan(y[:4, 1]).all()
        assert_same_bits(y[:3, 0], before[:3, 0])
        assert_same_bits(y[4:, 1], before[4:, 1])


def ulps(actual, exact):
    """Return the distance in units in the last place of the exact value, both finite."""
    spacing = np.spacing(np.abs(exact).astype(actual.dtype)).astype(exact.dtype)
    return np.abs(actual.astype(exact.dtype) - exact) / spacing


WIDE = {"float32": np.float64, "float64": np.longdouble}


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_is_accurate_everywhere(isa, dtype):
    x = every_kind_of_number(dtype)
    actual = first_step("rnn_tanh", 0, x)["y"]
    exact = np.tanh(x.astype(WIDE[dtype]))
    assert (np.isnan(actual) == np.isnan(x)).all()
    fine = ~np.isnan(x)
    assert ulps(actual[fine], exact[fine]).max() <= 4
    # -0 is lost before: a sum that starts at zero ends at +0, in torch too.
    assert (np.signbit(actual) == np.signbit(x))[fine & (x != 0)].all()
    assert (np.abs(actual[fine]) <= 1).all()
    # Odd, and exactly one where it saturates.
    assert_same_bits(actual[fine], 0 - np.roll(actual, len(x) // 2)[fine])
    assert (np.abs(actual[np.isinf(x)]) == 1).all()


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_is_accurate_everywhere(isa, dtype, cell):
    x = every_kind_of_number(dtype)
    if cell == "gru":
        # h' = z * 1 + (1 - z) * tanh(0)
        actual = first_step("gru", 1, x, h_0=1.0)["y"]
    else:
        # c' = i * tanh(100) + f * 0
        actual = first_step("lstm", 0, x, others=100.0)["c_n"]
    wide = x.astype(WIDE[dtype])
    with np.errstate(over="ignore"):
        exact = 1 / (1 + np.exp(-wide))
    assert (np.isnan(actual) == np.isnan(x)).all()
    # Below it the results are denormal, and the engine may give zero.
    normal = x >= np.log(np.finfo(dtype).tiny)
    assert ulps(actual[normal], exact[normal]).max() <= 4
    rest = ~normal & ~np.isnan(x)
    assert (actual[rest] >= 0).all()
    assert np.abs(actual[rest] - exact[rest]).max() <= np.finfo(dtype).tiny
    assert (actual[np.isposinf(x)] == 1).all()
    assert (actual[np.isneginf(x)] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_of_every_kind_of_number(isa, dtype):
    x = every_kind_of_number(dtype)
    np.testing.assert_array_equal(first_step("rnn_relu", 0, x)["y"], np.where(x <= 0, 0, x))


# ---- sizes that 32 bits cannot count ----


def needs_memory(gigabytes):
    if SANITIZED:
        pytest.skip("AddressSanitizer shadows every page of it")
    with open("/proc/meminfo", encoding="ascii") as lines:
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if free < gigabytes * 2**20:
        pytest.skip(f"needs {gigabytes} GB of free memory, there are {free / 2**20:.0f}")


# Pages of zeros that nobody writes cost no memory, but their addresses are real.
@pytest.mark.parametrize(
    ("steps", "size", "hidden"), [(2100, 2**20 + 3, 1), (80000, 2**15 + 3, 33)]
)
def test_more_input_elements_than_32_bits_count(steps, size, hidden):
    # The first case is one chunk of long rows. In the second, chunks begin past 2**31.
    needs_memory(16)
    x, weight = np.zeros((steps, size), np.float32), np.zeros((hidden, size), np.float32)
    assert x.size > 2**31
    x[0, 5], x[-1, -1], x[-2, 0] = 3, 2, 4
    weight[0, [5, -1, 0]] = 0.5, 0.25, 1
    recurrent, h_0 = np.zeros((2, hidden, hidden), np.float32)
    recurrent[0, 0] = h_0[0, 0] = 0.5
    y, dy = np.empty((steps, hidden), np.float32), np.zeros((steps, hidden), np.float32)
    h_n, dw = np.empty(hidden, np.float32), np.empty((hidden, size), np.float32)
    dy[-1, 0] = 1
    at = [a.ctypes.data for a in (x, h_0, weight, recurrent, y, h_n, dy, dw)]
    head = (RECORDS["rnn_relu"].number, 0, (steps, steps, 1, size, hidden, 0, 1), 0, 1)
    read = [*at[:2], *[0] * 5, *at[2:4], 0, 0, 0, 0]
    _core.forward(*head, [*read, *at[4:6], 0, 0, 0], [], 2)
    np.testing.assert_array_equal(y[[0, 1, -2, -1], 0], np.float32([1.75, 0.875, 4, 2.5]))
    assert (h_n[0], np.abs(y[:, 1:]).sum()) == (2.5, 0)
    _core.backward(*head, [*read, at[4], 0, at[6], *[0] * 8, at[7], 0, 0, 0, 0, 0], [], 2)
    assert (dw[0, 0], dw[0, -1], np.abs(dw).sum()) == (2, 2, 4)


def test_more_weight_elements_than_32_bits_count():
    needs_memory(16)
    hidden, size = 2060, 2**20 + 3
    x, weight = np.zeros((1, size), np.float32), np.zeros((hidden, size), np.float32)
    assert weight.size > 2**31
    weight[0, 7], weight[-1, -1], weight[-2, 0] = 2, 3, 5
    x[0, [0, 7, -1]] = 1, 10, 100
    recurrent = np.zeros((hidden, hidden), np.float32)
    y, h_n = np.empty(hidden, np.float32), np.empty(hidden, np.float32)
    at = [a.ctypes.data for a in (x, weight, recurrent, y, h_n)]
    head = (RECORDS["rnn_relu"].number, 0, (1, 1, 1, size, hidden, 0, 1), 0, 1)
    _core.forward(*head, [at[0], *[0] * 6, *at[1:3], 0, 0, 0, 0, *at[3:], 0, 0, 0], [], 2)
    assert (y[0], y[-1], y[-2], np.abs(y).sum()) == (20, 300, 5, 325)


# ---- what the bindings refuse, and what they read from the environment ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell": len(RECORDS)}, rf"cell must be 0\.\.{len(RECORDS) - 1}"),
        ({"cell": -1}, rf"cell must be 0\.\.{len(RECORDS) - 1}"),
        ({"sizes": (-1, 0, 1, 1, 1, 0, 1)}, "sizes must not be negative"),
        ({"sizes": (1, 1, 1, 1, 0, 0, 1)}, "hidden must be positive"),
        ({"sizes": (1, 1, 1, 1, 1, 0, 3)}, "directions must be 1 or 2"),
        ({"sizes": (1, 1, 1, 1, 1, 0, 0)}, "directions must be 1 or 2"),
        ({"first": [0] * 4}, "expected .* addresses, and a stride for each"),
        ({"strides": [0]}, "expected .* addresses, and a stride for each"),
        ({"models": 2}, "expected .* addresses, and a stride for each"),
        ({"models": -1}, "models must not be negative"),
        ({"dtype": 4}, "dtype must be 0..3"),
        ({"dtype": -1}, "dtype must be 0..3"),
    ],
)
def test_wrong_values_raise(changes, message):
    for run, count in ((_core.forward, 18), (_core.backward, 30)):
        arguments = {"cell": 0, "dtype": 0, "sizes": (0, 0, 0, 1, 1, 0, 1), "batch_sizes": 0}
        arguments |= {"models": 1, "first": [0] * count, "strides": [], "threads": 1}
        with pytest.raises(ValueError, match=message):
            run(**arguments | changes)


def test_wrong_types_raise():
    for sizes in ((1, 1, 1, 1, 1, 0), (1, 1, 1, 1, 1.5, 0, 1), None):
        with pytest.raises(TypeError):
            _core.reserve_bytes(2, False, sizes)
    with pytest.raises(TypeError):
        _core.forward(0)
    with pytest.raises(ValueError, match=rf"must be one of .*{INSTRUCTION_SETS[-1]}.*, got sse9"):
        _core.set_isa("sse9")


def python(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )


def test_environment_chooses_instruction_set_and_threads():
    program = "from ostinato import _core; print(_core.isa(), _core.forced_threads)"
    for name in _core.instruction_sets():
        done = python(program, OSTINATO_ISA=name, OSTINATO_NUM_THREADS="3")
        assert done.stdout.split() == [name, "3"], done.stderr
    done = python(program, OSTINATO_ISA="", OSTINATO_NUM_THREADS="")
    assert done.stdout.split() == [_core.instruction_sets()[0], "0"], done.stderr
    for wrong in ({"OSTINATO_ISA": "mmx"}, {"OSTINATO_NUM_THREADS": "many"}):
        done = python(program, **wrong)
        assert done.returncode != 0
        assert next(iter(wrong.values())) in done.stderr


# ---- the pool: what the sanitizers should see of it; tests/test_threads.py has the rest ----


def large(rng):
    """Return a layer that is worth a team, its cotangents and what comes out."""
    layer = Layer.draw(rng, "gru", 30, 16, 9, 64, dtype="float32", sizes=ragged(rng, 30, 16))
    cotangents = layer.cotangents(rng)
    return layer, cotangents, layer.run(cotangents)


def test_python_threads_at_once(rng):
    layer, cotangents, expected = large(rng)
    wrong = []

    def work():
        for _ in range(20):
            try:
                assert_same(layer.run(cotangents, threads=2), expected)
            except AssertionError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@contextlib.contextmanager
def rounding_up():
    """Round this thread's floating-point numbers towards infinity."""
    upward = {"x86_64": 0x800, "aarch64": 0x400000}[platform.machine()]
    libm = ctypes.CDLL("libm.so.6")
    before = libm.fegetround()
    assert libm.fesetround(upward) == 0
    try:
        yield
    finally:
        libm.fesetround(before)


def test_workers_round_as_their_caller_does(isa, rng):
    layer, cotangents, nearest = large(rng)
    # A worker is born with the mode of whoever starts it.
    layer.run(cotangents, threads=2)
    with rounding_up():
        alone = layer.run(cotangents)
        assert (alone["y"] != nearest["y"]).any()
    # Again and again, because a worker that comes late finds nothing to do.
    for _ in range(20):
        with rounding_up():
            assert_same(layer.run(cotangents, threads=2), alone)
        assert_same(layer.run(cotangents, threads=2), nearest)


def test_a_forked_child_computes_the_same():
    program = """
        import os, warnings
        import numpy as np
        from support.engine import Layer
        from support.tolerances import assert_same_bits

        warnings.simplefilter("ignore")  # newer Pythons warn of a fork beside the pool's threads
        rng = np.random.default_rng(0)
        layer = Layer.draw(rng, "lstm", 30, 16, 9, 64, directions=2, dtype="float32")
        cotangents = layer.cotangents(rng)
        expected = layer.run(cotangents, threads=2)
        for _ in range(3):
            child = os.fork()
            if child == 0:
                for name, array in layer.run(cotangents, threads=3).items():
                    assert_same_bits(array, expected[name], name)
                os._exit(7)
            for name, array in layer.run(cotangents, threads=2).items():
                assert_same_bits(array, expected[name], name)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        print("done")
    """
    done = python(program)
    assert done.stdout == "done\n", done.stderr
