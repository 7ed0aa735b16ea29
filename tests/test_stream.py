"""Streams against the layers, bit by bit, without torch.

Streams of torch's layers are in test_stream_torch.py.

Legend: T steps, B rows of the stream, n rows of a call, I input, H hidden, O output, L layers.
"""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from ostinato import Stream, _core
from ostinato.numpy import gru
from support.cells import cell_of, has_c
from support.faces import KINDS, call, draw_parameters
from support.tolerances import assert_same_bits

BOTH = (False, True)


def stream_of(kind, parameters, **options):
    return Stream(cell_of(kind), parameters, dtype=str(parameters["weight_ih_l0"].dtype), **options)


def states_of(stream):
    state = stream.state
    return state if isinstance(state, tuple) else (state,)


def assert_states(stream, expected):
    for found, state in zip(states_of(stream), (s for s in expected if s is not None), strict=True):
        assert_same_bits(found, state)


def draw(rng, *shape, dtype="float32"):
    return rng.standard_normal(shape).astype(dtype)


# ---- the bits of the layers ----


# I of one chain of the input product, of two and of three.
@pytest.mark.parametrize(("size", "hidden"), [(3, 5), (130, 33), (260, 70)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_chunking_has_the_bits_of_the_layer(rng, isa, kind, dtype, size, hidden):
    for layers, bias, batch in ((1, True, 1), (1, False, 3), (3, True, 2), (2, False, 9)):
        parameters = draw_parameters(rng, kind, size, hidden, layers=layers, bias=bias, dtype=dtype)
        x = draw(rng, 7, batch, size, dtype=dtype)
        output, *states = call(kind, x, parameters)
        stream = stream_of(kind, parameters, batch=batch)
        assert_same_bits(stream(x), output)
        assert_states(stream, states)
        stream.reset()
        cut = [
            stream(x[:2]),
            stream(x[2])[None],
            stream(x[3:3]),
            stream(x[3:6]),
            stream.step(x[6])[None],
        ]
        assert_same_bits(np.concatenate(cut), output)
        assert_states(stream, states)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "hidden", "batch"),
    [
        ("gru", 300, 1),
        ("gru", 300, 3),
        ("gru", 120, 70),
        ("lstm_projected", 260, 2),
        ("lstm", 260, 1),
        ("rnn_relu", 600, 2),
    ],
)
def test_threads_do_not_change_the_bits(rng, monkeypatch, kind, hidden, batch, threads):
    parameters = draw_parameters(rng, kind, 140, hidden, layers=2, dtype="float32")
    x = draw(rng, 5, batch, 140)
    output, *states = call(kind, x, parameters)
    monkeypatch.setattr(_core, "forced_threads", threads)
    stream = stream_of(kind, parameters, batch=batch)
    assert_same_bits(stream(x), output)
    assert_states(stream, states)
    stream.reset()
    assert_same_bits(np.stack([stream(frame) for frame in x]), output)
    assert_states(stream, states)


def test_one_sequence_has_no_dimension_for_rows(rng):
    parameters = draw_parameters(rng, "lstm", 4, 6, layers=2, dtype="float32")
    x = draw(rng, 9, 4)
    output, h_n, c_n = call("lstm", x, parameters)
    stream = Stream("lstm", parameters)
    assert_same_bits(stream(x), output)
    assert_states(stream, (h_n, c_n))
    stream.reset()
    assert_same_bits(np.stack([stream(frame) for frame in x]), output)


@pytest.mark.parametrize("kind", KINDS)
def test_any_rows_may_take_a_step(rng, kind):
    parameters = draw_parameters(rng, kind, 5, 20, layers=2, dtype="float32")
    frames = draw(rng, 30, 11, 5)
    together = stream_of(kind, parameters, batch=11)
    alone = [stream_of(kind, parameters) for _ in range(11)]
    for frame in frames:
        rows = rng.permutation(11)[: rng.integers(0, 12)]
        found = together.step(frame[: len(rows)], rows=rows if len(rows) % 2 else rows.tolist())
        for row, x, y in zip(rows, frame, found, strict=False):
            assert_same_bits(y, alone[row](x))
    for found, *states in zip(states_of(together), *map(states_of, alone), strict=True):
        assert_same_bits(found, np.stack(states, axis=1))


def test_many_rows_are_taken_in_pieces(rng):
    parameters = draw_parameters(rng, "gru", 6, 40, dtype="float32")
    x = draw(rng, 3, 5000, 6)
    stream = Stream("gru", parameters, batch=5000)
    assert_same_bits(stream(x), gru(x, parameters)[0])
    ids = rng.permutation(5000)[:2000]
    h = stream.state[:, ids]
    assert_same_bits(stream.step(x[0, ids], rows=ids), gru(x[:1, ids], parameters, h)[0][0])


def test_input_that_lies_otherwise(rng):
    parameters = draw_parameters(rng, "gru", 6, 8, dtype="float32")
    x = draw(rng, 6, 3, 4).transpose(1, 2, 0)  # (T, B, I), not dense
    unaligned = np.frombuffer(b"x" + np.ascontiguousarray(x).tobytes(), "f4", offset=1).reshape(
        x.shape
    )
    output = gru(x, parameters)[0]
    for given in (x, unaligned, np.asfortranarray(x)):
        assert_same_bits(Stream("gru", parameters, batch=4)(given), output)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_beside_the_arrays_is_touched(rng, isa, poison, monkeypatch, kind, dtype):
    for hidden, threads in ((7, 1), (37, 1), (200, 2)):
        parameters = draw_parameters(rng, kind, 131, hidden, layers=2, dtype=dtype)
        guarded = {name: poison.copy(weight, name) for name, weight in parameters.items()}
        stream = stream_of(kind, guarded, batch=3)
        x = draw(rng, 4, 3, 131, dtype=dtype)
        output, *states = call(kind, x, parameters)
        width = output.shape[-1]
        monkeypatch.setattr(_core, "forced_threads", threads)
        for rows, part in ((None, x[:2]), (np.arange(3), x[2:3]), (np.arange(3), x[3:])):
            given = poison.copy(part)
            ids = None if rows is None else poison.copy(rows, "rows")
            found = poison.empty((len(part), 3, width), dtype)
            at = 0 if ids is None else ids.ctypes.data
            stream._core.run(given.ctypes.data, found.ctypes.data, len(part), 3, at, threads)
        assert_same_bits(found[0], output[3])
        assert_states(stream, states)
        stream.load(guarded)
        h, c = poison.empty((2, 3, width), dtype), poison.empty((2, 3, hidden), dtype)
        stream._core.read_state(h.ctypes.data, c.ctypes.data)
        stream._core.write_state(h.ctypes.data, c.ctypes.data)
        if not has_c(kind):
            c[:] = 0  # nobody writes it
        assert_states(stream, states)


# ---- the states ----


@pytest.mark.parametrize("kind", ["gru", "lstm", "lstm_projected"])
def test_states_are_read_and_written(rng, kind):
    parameters = draw_parameters(rng, kind, 3, 7, layers=2, dtype="float32")
    stream = stream_of(kind, parameters, batch=4)
    first, second = draw(rng, 2, 5, 4, 3)
    stream(first)
    kept = stream.state
    y = stream(second)
    stream.state = kept
    assert_same_bits(stream(second), y)
    for state in states_of(stream):
        state[:] = 7  # a copy
    stream.state = kept
    stream.reset(rows=[2, 0])
    for found, before in zip(states_of(stream), kept if has_c(kind) else (kept,), strict=True):
        assert not found[:, [0, 2]].any()
        assert_same_bits(found[:, [1, 3]], before[:, [1, 3]])
    stream.state = None
    assert not any(state.any() for state in states_of(stream))


def test_a_refused_call_leaves_the_state(rng):
    parameters = draw_parameters(rng, "lstm", 3, 7, dtype="float32")
    stream = Stream("lstm", parameters, batch=4)
    stream(draw(rng, 4, 3))
    before = stream.state
    x = draw(rng, 2, 3)
    h_n, c_n = before
    for wrong in (
        lambda: stream(x),
        lambda: stream.step(x, rows=[1, 1]),
        lambda: stream.step(x, rows=[0, 4]),
        lambda: stream.reset([0, 4]),
        lambda: setattr(stream, "state", (h_n + 1, c_n[:, :2])),
        lambda: stream.load({}),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            wrong()
    assert_states(stream, before)


# ---- weights ----


def test_weights_are_copied_and_exchanged(rng):
    one, other = (
        draw_parameters(rng, "lstm_projected", 5, 9, layers=2, dtype="float32") for _ in "ab"
    )
    x = draw(rng, 6, 5)
    kept = {name: weight.copy() for name, weight in one.items()}
    stream = Stream("lstm", one)
    for weight in one.values():
        weight[:] = 0
    assert_same_bits(stream(x), call("lstm_projected", x, kept)[0])
    state = stream.state
    stream.load({f"a.{name}": weight for name, weight in other.items()}, prefix="a.")
    assert_states(stream, state)
    stream.reset()
    assert_same_bits(stream(x), call("lstm_projected", x, other)[0])
    for name, weight in stream.parameters.items():
        assert_same_bits(weight, other[name])
    assert stream.parameters.keys() == other.keys()


def test_a_prefix_finds_a_layer_in_a_whole_model(rng):
    own = draw_parameters(rng, "gru", 5, 9, dtype="float32")
    model = {f"encoder.{name}": weight for name, weight in own.items()}
    model |= {"steps": np.zeros(1, "i8"), "encoder.norm": np.ones(3), 7: np.ones(1)}
    x = draw(rng, 6, 5)
    assert_same_bits(Stream("gru", model, prefix="encoder.")(x), Stream("gru", own)(x))
    with pytest.raises(ValueError, match=r"fit: 'encoder.'"):
        Stream("gru", model)


@pytest.mark.parametrize("isa_of_reader", _core.instruction_sets())
@pytest.mark.parametrize(
    ("kind", "bias", "batch"), [("gru", True, None), ("lstm_projected", False, 3)]
)
def test_pickles_and_copies(rng, kind, bias, batch, isa_of_reader):
    parameters = draw_parameters(rng, kind, 5, 21, layers=2, bias=bias, dtype="float64")
    stream = stream_of(kind, parameters, batch=batch)
    rows = () if batch is None else (batch,)
    stream(draw(rng, 4, *rows, 5, dtype="float64"))
    x = draw(rng, 4, *rows, 5, dtype="float64")
    text = pickle.dumps(stream)
    before = _core.isa()
    try:
        _core.set_isa(isa_of_reader)
        others = [pickle.loads(text), copy.deepcopy(stream), copy.copy(stream)]
    finally:
        _core.set_isa(before)
    y = stream(x)
    for other in others:
        assert repr(other) == repr(stream)
        assert_same_bits(other(x), y)
        assert_states(other, states_of(stream))


# ---- threads ----


def test_a_second_thread_is_refused_by_name(rng):
    parameters = draw_parameters(rng, "gru", 64, 256, dtype="float32")
    stream = Stream("gru", parameters)
    x = draw(rng, 2000, 64)
    output = Stream("gru", parameters)(x)
    refused, found = [], []
    is_over = threading.Event()

    def disturb():
        while not is_over.is_set():
            try:
                stream.reset()
            except RuntimeError as error:
                refused.append(str(error))

    other = threading.Thread(target=disturb)
    other.start()
    while not refused:
        try:
            stream.reset()
            found = stream(x)
        except RuntimeError:
            continue
    is_over.set()
    other.join()
    assert "expected one thread at a time" in refused.pop()
    assert_same_bits(found, output)


def test_streams_of_their_own_run_side_by_side(rng):
    parameters = draw_parameters(rng, "lstm", 20, 130, layers=2, dtype="float32")
    x = draw(rng, 40, 20)
    output = Stream("lstm", parameters)(x)
    found = {}

    def run(i):
        stream = Stream("lstm", parameters)
        found[i] = np.stack([stream(frame) for frame in x])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for each in found.values():
        assert_same_bits(each, output)


# ---- wrong arguments ----


def without(parameters, name):
    return {other: weight for other, weight in parameters.items() if other != name}


BAD = {
    "kind": (("foo", {}), ValueError, r"kind must be one of rnn, gru, lstm, got 'foo'"),
    "kind's type": ((3, {}), TypeError, r"kind must be a str, got int"),
    "own cell": (("own:1", {}), ValueError, r"a cell of one's own has no stream"),
    "nonlinearity": (("rnn", {"nonlinearity": "no"}), ValueError, r"one of tanh, relu, got 'no'"),
    "dtype": (("gru", {"dtype": "int4"}), ValueError, r"one of float32, float64, int8, got 'int4'"),
    "dtype's type": (("gru", {"dtype": np.float32}), TypeError, r"dtype must be a str, got type"),
    "parameters' dtype": (
        ("gru", {"dtype": "float64"}),
        ValueError,
        r"weight_ih_l0: expected dtype float64, got float32",
    ),
    "batch": (("gru", {"batch": -1}), ValueError, r"batch must not be negative, got -1"),
    "batch's type": (
        ("gru", {"batch": True}),
        TypeError,
        r"batch must be an int or None, got bool",
    ),
    "prefix": (("gru", {"prefix": 3}), TypeError, r"prefix must be a str, got int"),
    "cell": (("lstm", {}), RuntimeError, r"weight_hh_l0: expected shape \(4 \* hidden_size"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_wrong_streams_are_refused_by_name(rng, arguments, error, message):
    kind, options = arguments
    parameters = draw_parameters(rng, "gru", 3, 5, dtype="float32")
    with pytest.raises(error, match=message):
        Stream(kind, parameters, **options)


def test_wrong_parameters_are_refused_by_name(rng):
    parameters = draw_parameters(rng, "gru", 3, 5, layers=2, dtype="float32")
    both = draw_parameters(rng, "gru", 3, 5, layers=2, ways=2, dtype="float32")
    weight = parameters["weight_hh_l1"]
    for wrong, error, message in (
        (5, TypeError, r"parameters must be a mapping"),
        (both, ValueError, r"expected one direction, got 'weight_ih_l0_reverse': the reverse"),
        (without(parameters, "bias_hh_l1"), ValueError, r"to hold 'bias_hh_l1'"),
        (parameters | {"weight_hh_l5": weight}, ValueError, r"got 'weight_hh_l5' as well"),
        (parameters | {"weight_hh_l1": weight.T}, RuntimeError, r"weight_hh_l1: expected shape"),
        (
            parameters | {"weight_hh_l1": weight.tolist()},
            TypeError,
            r"weight_hh_l1 must be a NumPy",
        ),
        (parameters | {"weight_hh_l1": weight.astype("f8")}, ValueError, r"weight_hh_l1: expected"),
        (
            parameters | {"weight_hh_l1": weight.astype("i4")},
            ValueError,
            r"weight_hh_l1 must have a floating",
        ),
    ):
        with pytest.raises(error, match=message):
            Stream("gru", wrong)
    stream = Stream("gru", parameters)
    for hidden, layers, bias in ((6, 2, True), (5, 1, True), (5, 2, False)):
        other = draw_parameters(rng, "gru", 3, hidden, layers=layers, bias=bias, dtype="float32")
        with pytest.raises(
            RuntimeError, match=r"own sizes, 'gru', input 3, hidden 5, 2 layers, got 'gru'"
        ):
            stream.load(other)


def test_wrong_calls_are_refused_by_name(rng):
    parameters = draw_parameters(rng, "gru", 3, 5, dtype="float32")
    one, stream = Stream("gru", parameters), Stream("gru", parameters, batch=4)
    x = draw(rng, 4, 3)
    two = x[:2]
    for wrong, error, message in (
        (lambda: stream(x.tolist()), TypeError, r"x must be a NumPy array, got list"),
        (lambda: stream(np.ma.masked_array(x)), TypeError, r"x must be a NumPy array, got Masked"),
        (
            lambda: stream(x.astype("f8")),
            ValueError,
            r"x: expected the dtype of the stream, float32",
        ),
        (lambda: stream(x.astype("i4")), ValueError, r"x must have a floating"),
        (lambda: stream(x[0]), RuntimeError, r"x: expected \(B, I\) or \(T, B, I\), got 1D"),
        (lambda: stream(x[None, None]), RuntimeError, r"got 4D"),
        (lambda: one(x[None]), RuntimeError, r"x: expected \(I,\) or \(T, I\), got 3D"),
        (lambda: one.step(x), RuntimeError, r"x: expected \(I,\), got 2D"),
        (lambda: one(np.float32(1)), TypeError, r"x must be a NumPy array"),
        (lambda: stream.step(x[None]), RuntimeError, r"x: expected \(B, I\), got 3D"),
        (lambda: stream(x[:, :2]), RuntimeError, r"x: expected rows of 3 numbers, got 2"),
        (lambda: stream(two), RuntimeError, r"x: expected 4 rows, the batch, got 2"),
        (
            lambda: stream.step(two, rows=[1]),
            RuntimeError,
            r"expected 1 rows, the number of rows, got 2",
        ),
        (
            lambda: stream.step(two, rows=[1, 4]),
            ValueError,
            r"rows: expected numbers from 0 to 3, got 4",
        ),
        (lambda: stream.step(two, rows=np.array([1, -1])), ValueError, r"from 0 to 3, got -1"),
        (
            lambda: stream.step(two, rows=[1, 1]),
            ValueError,
            r"rows: expected each row once, got 1 twice",
        ),
        (
            lambda: stream.step(two, rows=[1.0, 2.0]),
            TypeError,
            r"rows: expected a 1D sequence of whole",
        ),
        (lambda: stream.step(two, rows=[[1, 2]]), TypeError, r"got 2D"),
        (lambda: stream.step(two, rows=[True, False]), TypeError, r"got 1D of bool"),
        (lambda: one.step(x[0], rows=[0]), ValueError, r"rows: expected None"),
        (lambda: one.reset([0]), ValueError, r"rows: expected None"),
        (
            lambda: setattr(stream, "state", (x, x)),
            TypeError,
            r"h_n must be a NumPy array, got tuple",
        ),
        (
            lambda: setattr(stream, "state", x),
            RuntimeError,
            r"h_n: expected shape \(1, 4, 5\), got \(4, 3\)",
        ),
        (
            lambda: setattr(one, "state", np.zeros((1, 1, 5), "f4")),
            RuntimeError,
            r"h_n: expected shape \(1, 5\)",
        ),
    ):
        with pytest.raises(error, match=message):
            wrong()


# ---- without torch ----


def test_importing_and_running_without_torch():
    program = """
        import sys
        import ostinato
        ostinato.Stream
        assert "torch" not in sys.modules, "imported torch"

        sys.modules["torch"] = None  # an import of torch would now raise
        import numpy
        zeros = {"weight_ih_l0": numpy.zeros((6, 3)), "weight_hh_l0": numpy.zeros((6, 2))}
        stream = ostinato.Stream("gru", zeros, dtype="float64")
        stream.state = numpy.ones((1, 2))
        print([stream(numpy.zeros(3))[0].item() for _ in range(4)])
        stream.reset()
        print(stream(numpy.zeros((700, 3))).any(), stream.state.tolist())
        try:
            ostinato.Stream.of(stream)
        except TypeError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    # Each step: r = z = 1/2, n = 0, h' = h / 2.
    assert done.stdout.split("\n")[:2] == ["[0.5, 0.25, 0.125, 0.0625]", "False [[0.0, 0.0]]"]
    assert "module must be an RNN, GRU or LSTM" in done.stdout


def test_memory_is_one_copy_of_the_weights_and_the_states(rng):
    parameters = draw_parameters(rng, "gru", 64, 128, dtype="float32")
    weights = sum(weight.nbytes for weight in parameters.values())
    sizes = [Stream("gru", parameters, batch=batch).nbytes for batch in (1, 1001)]
    assert weights < min(sizes) < 1.1 * weights
    assert max(sizes) - min(sizes) == 1000 * 128 * 4
