"""Streams with weights of 8 bits, without torch.

Against their arithmetic in NumPy, and bit by bit among themselves.

Legend: T steps, B rows of the stream, I input, H hidden, O output, G gates, L layers.
"""

import copy
import pickle

import numpy as np
import pytest

from ostinato import Stream, _core, quantized, reference
from support.cells import cell_of, is_projected, record_of
from support.engine import instruction_set
from support.faces import KINDS, draw_parameters, output_size
from support.tolerances import assert_same_bits

ENDS = {"int8": 127, "int16": 32639}


def stream_of(kind, parameters, **options):
    return Stream(cell_of(kind), parameters, dtype="int8", **options)


def states_of(stream):
    state = stream.state
    return state if isinstance(state, tuple) else (state,)


def draw(rng, *shape):
    return rng.standard_normal(shape).astype("f4")


# ---- what is computed ----


def rounded(rows, activations):
    """Rows as they are multiplied: whole numbers, in float64, and their scale in float32."""
    end = np.float32(ENDS[activations])
    most = np.abs(rows).max(axis=1, keepdims=True)
    factor = np.where(most > 1e-30, end / np.maximum(most, np.float32(1e-30)), np.float32(0))
    return np.rint(rows * factor.astype("f4")).astype("f8"), (most / end).astype("f8")


def product(rows, name, parameters, activations):
    values, scales = rounded(rows, activations)
    weight = parameters[name].astype("f8")
    return values @ weight.T * scales * parameters[f"{name}_scale"].astype("f8")


def step(kind, layer, x, states, parameters, activations):
    """One step of a layer in float64 but for what is rounded to 8 or 16 bits."""
    record, end = record_of(kind), f"_l{layer}"

    def part(name, rows):
        found = product(rows, f"weight_{name}{end}", parameters, activations)
        return found + parameters.get(f"bias_{name}{end}", 0)

    wide = tuple(state.astype("f8") for state in states)
    h, *others = reference.step_of(record)(part("ih", x), part("hh", states[0]), wide, None)
    if f"weight_hr{end}" in parameters:
        h = product(h.astype("f4"), f"weight_hr{end}", parameters, activations)
    return (h, *others)


# A depth that is no multiple of four, of a vector's lanes, of a row's padding.
@pytest.mark.parametrize(("size", "hidden"), [(1, 1), (3, 5), (70, 33), (129, 66)])
@pytest.mark.parametrize("activations", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_arithmetic_of_8_bits(rng, isa, kind, activations, size, hidden):
    # What is projected is rounded within the step: its last bit in float32 may decide a rounding.
    bound = 1e-3 if is_projected(kind) else 2e-5
    for bias, batch in ((True, 1), (False, 3), (True, 11)):
        if output_size(kind, hidden) == 0:
            continue
        given = draw_parameters(rng, kind, size, hidden, layers=2, bias=bias, dtype="float32")
        stream = stream_of(kind, given, batch=batch, activations=activations)
        parameters = stream.parameters
        for frame in draw(rng, 4, batch, size):
            before, x = states_of(stream), frame
            y = stream(frame)
            for layer in range(2):
                states = tuple(state[layer] for state in before)
                found = [state[layer] for state in states_of(stream)]
                expected = step(kind, layer, x, states, parameters, activations)
                for one, other in zip(found, expected, strict=True):
                    np.testing.assert_allclose(one, other, rtol=bound, atol=bound)
                x = found[0]
            assert_same_bits(y, x)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_rounding(rng, kind):
    parameters = draw_parameters(rng, kind, 40, 96, layers=2, dtype="float32")
    x = draw(rng, 50, 4, 40)
    exact = Stream(cell_of(kind), parameters, batch=4)(x)
    errors = {}
    for activations in ENDS:
        found = stream_of(kind, parameters, batch=4, activations=activations)(x)
        errors[activations] = np.sqrt(((found - exact) ** 2).mean() / (exact**2).mean())
    assert errors["int16"] < errors["int8"] < 0.03
    # What is left is the weights' own rounding.
    weights = {
        name: quantized.quantise(name, w).dequantised() if name.startswith("weight") else w
        for name, w in parameters.items()
    }
    coarse = Stream(cell_of(kind), weights, batch=4)(x)
    found = stream_of(kind, parameters, batch=4, activations="int16")(x)
    assert np.abs(found - coarse).max() < 2e-3 * np.abs(coarse).max()


# ---- bits ----


@pytest.mark.parametrize("activations", ENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_any_instruction_set(rng, kind, activations):
    parameters = draw_parameters(rng, kind, 67, 45, layers=2, dtype="float32")
    x = draw(rng, 9, 13, 67) * 3
    found = []
    for isa in _core.instruction_sets():
        with instruction_set(isa):
            stream = stream_of(kind, parameters, batch=13, activations=activations)
        found.append((stream(x), *states_of(stream)))
    first, *others = found
    for other in others:
        for one, same in zip(first, other, strict=True):
            assert_same_bits(one, same)


@pytest.mark.parametrize("activations", ENDS)
@pytest.mark.parametrize(
    ("kind", "hidden", "batch"),
    [("gru", 300, 1), ("gru", 120, 40), ("lstm_projected", 260, 2), ("lstm", 260, 3)],
)
def test_bits_are_those_of_any_threads_batch_and_chunks(
    rng, monkeypatch, kind, hidden, batch, activations
):
    parameters = draw_parameters(rng, kind, 140, hidden, layers=2, dtype="float32")
    x = draw(rng, 12, batch, 140)
    rows = [stream_of(kind, parameters, activations=activations)(x[:, b]) for b in range(batch)]
    expected = np.stack(rows, axis=1)
    for threads in (1, 2, 3):
        monkeypatch.setattr(_core, "forced_threads", threads)
        stream = stream_of(kind, parameters, batch=batch, activations=activations)
        assert_same_bits(stream(x), expected)
        stream.reset()
        cut = [stream(x[:5]), stream(x[5])[None], stream(x[6:])]
        assert_same_bits(np.concatenate(cut), expected)
    stream = stream_of(kind, parameters, batch=batch, activations=activations)
    for t, frame in enumerate(x):
        for part in np.array_split(rng.permutation(batch), 3):
            assert_same_bits(stream.step(frame[part], rows=part), expected[t, part])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_beside_the_arrays_is_touched(rng, isa, poison, kind):
    for hidden, threads in ((7, 1), (37, 1), (200, 2)):
        parameters = stream_of(
            kind, draw_parameters(rng, kind, 131, hidden, layers=2, dtype="float32")
        ).parameters
        guarded = {name: poison.copy(array, name) for name, array in parameters.items()}
        stream = stream_of(kind, guarded, batch=3)
        x = draw(rng, 4, 3, 131)
        expected = stream(x)
        stream.reset()
        given, found = poison.copy(x), poison.empty(expected.shape, "float32")
        stream._core.run(given.ctypes.data, found.ctypes.data, 4, 3, 0, threads)
        assert_same_bits(found, expected)


# ---- weights ----


@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_round_without_a_change(rng, kind):
    given = draw_parameters(rng, kind, 21, 34, layers=2, dtype="float32")
    stream = stream_of(kind, given, batch=2, activations="int16")
    parameters = stream.parameters
    for name, array in parameters.items():
        if name.startswith("bias"):
            assert_same_bits(array, given[name])
        elif not name.endswith("_scale"):
            made = quantized.quantise(name, given[name])
            assert_same_bits(array, made.values)
            assert_same_bits(parameters[f"{name}_scale"], made.scales)
    x = draw(rng, 8, 2, 21)
    again = stream_of(kind, parameters, batch=2, activations="int16")
    stream(x[:3])
    others = [pickle.loads(pickle.dumps(stream)), copy.deepcopy(stream)]
    again(x[:3])
    y = stream(x[3:])
    for other in (again, *others):
        assert repr(other) == repr(stream)
        assert_same_bits(other(x[3:]), y)
    again.load(given)
    again.reset()
    again(x[:3])
    assert_same_bits(again(x[3:]), y)


def test_it_takes_a_quarter_of_the_memory(rng):
    parameters = draw_parameters(rng, "lstm", 512, 512, dtype="float32")
    wide, narrow = Stream("lstm", parameters), stream_of("lstm", parameters)
    assert narrow.nbytes < 0.26 * wide.nbytes
    assert "dtype='int8', activations='int8'" in repr(narrow)


def test_quantising_is_to_the_nearest():
    weight = np.array([[1, -1, 0.5 / 127, 1.5 / 127], [0, 0, 0, 0], [1e-40, 0, 0, 1e-40]], "f4")
    made = quantized.quantise("w", weight)
    assert made.values.tolist() == [[127, -127, 0, 2], [0] * 4, [0] * 4]
    assert made.scales.tolist() == [np.float32(1 / 127), 0, 0]
    assert np.abs(made.dequantised() - weight).max() <= 0.5 / 127


# ---- rows that no scale fits ----


@pytest.mark.parametrize("activations", ENDS)
def test_rows_of_all_sizes(rng, activations):
    parameters = draw_parameters(rng, "rnn_relu", 10, 12, dtype="float32")
    x = draw(rng, 6, 10) * np.float32([[1], [1e30], [1e-35], [0], [1e5], [-1]])
    stream = stream_of("rnn_relu", parameters, batch=6, activations=activations)
    y = stream(x)
    assert np.isfinite(y).all()
    exact = Stream("rnn", parameters, nonlinearity="relu", batch=6)(x)
    scale = np.abs(exact).max(axis=1, keepdims=True)
    assert (np.abs(y - exact) <= 0.05 * scale).all()
    # The state grows without a bound, and so does its scale.
    exact_stream = Stream("rnn", parameters, nonlinearity="relu", batch=6)
    stream.state = exact_stream.state = np.full((1, 6, 12), 1e4, "f4")
    y, exact = stream(x[[0] * 6]), exact_stream(x[[0] * 6])
    assert np.abs(y - exact).max() <= 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_row_with_no_number_is_nan_and_no_other(rng, kind, number):
    parameters = draw_parameters(rng, kind, 10, 12, dtype="float32")
    x = draw(rng, 3, 10)
    expected = stream_of(kind, parameters, batch=3)(x)
    x[1, 4] = number
    y = stream_of(kind, parameters, batch=3)(x)
    assert np.isnan(y[1]).all()
    assert_same_bits(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("activations", ENDS)
def test_the_longest_sum_fits(isa, activations):
    size = quantized.MOST_COLUMNS
    parameters = {"weight_ih_l0": np.ones((1, size), "f4"), "weight_hh_l0": np.zeros((1, 1), "f4")}
    stream = stream_of("rnn_relu", parameters, batch=2, activations=activations)
    x = np.ones((2, size), "f4")
    x[1, ::2] = -1
    np.testing.assert_allclose(stream(x), [[size], [0]], rtol=1e-5)


# ---- wrong arguments ----


def hostile():
    """Return by name what is wrong, the kind of error, and what it says."""

    def with_(**changes):
        return lambda p: stream_of("gru", {**p, **changes})

    def numbers(value):
        return lambda p: stream_of("gru", {**p, "weight_hh_l0": filled(p["weight_hh_l0"], value)})

    def filled(weight, value):
        weight = weight.copy()
        weight[3, 2] = value
        return weight

    def quantised(change):
        def make(p):
            parameters = stream_of("gru", p).parameters
            return stream_of("gru", change(parameters))

        return make

    def wide(p):
        return {
            "weight_ih_l0": np.ones((1, 131073), "f4"),
            "weight_hh_l0": p["weight_hh_l0"][:1, :1],
        }

    def without(name):
        return lambda p: {other: array for other, array in p.items() if other != name}

    scale = "weight_hh_l0_scale"
    return {
        "dtype": (
            lambda p: Stream("gru", p, dtype="int4"),
            ValueError,
            "dtype must be one of float32, float64, int8, got 'int4'",
        ),
        "activations": (
            lambda p: stream_of("gru", p, activations="int4"),
            ValueError,
            "activations must be one of int8, int16, got 'int4'",
        ),
        "activations of no text": (
            lambda p: stream_of("gru", p, activations=8),
            TypeError,
            "activations must be a str or None, got int",
        ),
        "prefix of no text": (
            lambda p: stream_of("gru", p, prefix=None),
            TypeError,
            "prefix must be a str, got NoneType",
        ),
        "NaN": (numbers(np.nan), ValueError, r"weight_hh_l0: .*finite.*got nan at \[3, 2\]"),
        "infinity": (numbers(-np.inf), ValueError, r"got -inf at \[3, 2\]"),
        "float64": (
            lambda p: stream_of("gru", {n: a.astype("f8") for n, a in p.items()}),
            ValueError,
            "weight_ih_l0: expected dtype float32, got float64",
        ),
        "int8 where float is meant": (
            lambda p: Stream("gru", stream_of("gru", p).parameters),
            ValueError,
            "weight_ih_l0: expected floats, got int8; pass dtype='int8'",
        ),
        "no scales": (
            quantised(without(scale)),
            ValueError,
            "Stream: expected 'weight_hh_l0_scale' beside 'weight_hh_l0' of int8, which is missing",
        ),
        "scales beside float": (
            with_(**{scale: np.ones(21, "f4")}),
            ValueError,
            "weight_hh_l0: expected int8 beside its scales, got float32",
        ),
        "scales of float64": (
            quantised(lambda p: {**p, scale: p[scale].astype("f8")}),
            ValueError,
            f"{scale}: expected dtype float32, got float64",
        ),
        "scales of another shape": (
            quantised(lambda p: {**p, scale: p[scale][:3]}),
            RuntimeError,
            rf"{scale}: expected shape \(21,\), got \(3,\)",
        ),
        "scales of no array": (
            quantised(lambda p: {**p, scale: list(p[scale])}),
            TypeError,
            f"{scale} must be a NumPy array, got list",
        ),
        "negative scales": (
            quantised(lambda p: {**p, scale: -p[scale]}),
            ValueError,
            rf"{scale}: expected finite numbers from 0 on, got -.* at \[0\]",
        ),
        "activations beside floats": (
            lambda p: Stream("gru", p, activations="int16"),
            ValueError,
            "activations: expected None beside dtype='float32', got 'int16'",
        ),
        "a bias of int8": (
            quantised(lambda p: {**p, "bias_ih_l0": np.zeros(21, "i1")}),
            ValueError,
            "bias_ih_l0 must have a floating or complex dtype, got int8",
        ),
        "no mapping": (
            lambda p: stream_of("gru", [1, 2]),
            TypeError,
            "parameters",
        ),
        "NaN scales": (
            quantised(lambda p: {**p, scale: p[scale] * np.float32(np.nan)}),
            ValueError,
            f"{scale}: expected finite numbers from 0 on",
        ),
        "-128": (
            quantised(lambda p: {**p, "weight_hh_l0": filled(p["weight_hh_l0"], -128)}),
            ValueError,
            "weight_hh_l0: expected values from -127 to 127, got -128",
        ),
        "int8 of another shape": (
            quantised(lambda p: {**p, "weight_hh_l0": p["weight_hh_l0"][:, :3]}),
            RuntimeError,
            "weight_hh_l0",
        ),
        "more columns than a sum holds": (
            lambda p: stream_of("rnn_tanh", wide(p)),
            ValueError,
            "weight_ih_l0: expected at most 131072 columns, got 131073",
        ),
        "int16": (
            quantised(lambda p: {**p, "weight_hh_l0": p["weight_hh_l0"].astype("i2")}),
            ValueError,
            "weight_hh_l0 must have a floating or complex dtype, got int16",
        ),
        "input of float64": (
            lambda p: stream_of("gru", p)(np.zeros(5)),
            ValueError,
            "x: expected the dtype of the stream, float32, got float64",
        ),
        "input of int8": (
            lambda p: stream_of("gru", p)(np.zeros(5, "i1")),
            ValueError,
            "x: expected the dtype of the stream, float32, got int8",
        ),
        "input of another size": (
            lambda p: stream_of("gru", p)(np.zeros(6, "f4")),
            RuntimeError,
            "expected rows of 5 numbers, got 6",
        ),
        "other weights": (
            lambda p: stream_of("gru", p).load({}),
            ValueError,
            "weight_ih_l0",
        ),
    }


@pytest.mark.parametrize("name", hostile())
def test_what_is_wrong_is_named(rng, name):
    make, kind, message = hostile()[name]
    parameters = draw_parameters(rng, "gru", 5, 7, dtype="float32")
    with pytest.raises(kind, match=message):
        make(parameters)


def test_a_refused_load_leaves_the_stream(rng):
    parameters = draw_parameters(rng, "lstm", 5, 7, dtype="float32")
    stream = stream_of("lstm", parameters)
    x = draw(rng, 4, 5)
    stream(x)
    before, weights = states_of(stream), stream.parameters
    wrong = {name: array * np.float32(np.nan) for name, array in parameters.items()}
    with pytest.raises(ValueError, match="finite"):
        stream.load(wrong)
    for one, other in zip(states_of(stream), before, strict=True):
        assert_same_bits(one, other)
    for name, array in stream.parameters.items():
        assert_same_bits(array, weights[name])
