"""What the NumPy face refuses, by name and before the first layer runs."""

import numpy as np
import pytest

import ostinato
from ostinato.numpy import gru, layer, rnn
from support.cells import FIRST_CELLS
from support.faces import call, draw_parameters

X, F = np.zeros((6, 3, 5)), np.zeros((6, 3, 5), np.float32)


@pytest.mark.parametrize(
    ("gone", "more", "message"),
    [
        (["weight_hh_l0"], [], "to hold 'weight_hh_l0', which is missing"),
        (["bias_hh_l1_reverse"], [], "to hold 'bias_hh_l1_reverse', which is missing"),
        (["bias_ih_l0"], [], "got 'bias_hh_l0' as well"),
        (["weight_ih_l1"], [], "got 'weight_hh_l1' as well"),
        (["weight_ih_l0_reverse"], [], "got 'weight_hh_l0_reverse' as well"),
        ([], ["weight_ih_l3"], "got 'weight_ih_l3' as well"),
        ([], ["weight_hr_l0"], "got 'weight_hr_l0' as well"),
    ],
)
def test_a_parameter_too_few_or_too_many(rng, gone, more, message):
    parameters = draw_parameters(rng, "gru", 5, 9, layers=2, ways=2)
    for name in gone:
        del parameters[name]
    parameters |= dict.fromkeys(more, np.zeros((27, 9)))
    with pytest.raises(ValueError, match=message):
        gru(np.zeros((6, 3, 5)), parameters)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        ("gru", (X[0, 0],), ValueError, "GRU: Expected input to be 2D or 3D, got 1D instead"),
        ("lstm", (X[None],), ValueError, "LSTM: Expected input to be 2D or 3D, got 4D instead"),
        ("rnn_tanh", (X[0, 0],), ValueError, "Expected input to be 2D or 3D, got 1D tensor"),
        ("gru", (X[0], X), RuntimeError, "unbatched 2-D input, hx should also be 2-D but got 3-D"),
        ("gru", (X, X[0]), RuntimeError, "For batched 3-D input, hx should also be 3-D but got 2"),
        (
            "lstm",
            (X, (X, X[0])),
            RuntimeError,
            r"For batched 3-D input, hx and cx should also be 3-D but got \(3-D, 2-D\) tensors",
        ),
        ("gru", (F,), ValueError, r"dtype \(float32\) does not match weight dtype \(float64\)"),
        ("gru", (X.astype("i8"),), ValueError, "input must have a floating .* dtype, got int64"),
        ("gru", (X.astype(bool),), ValueError, "input must have a floating .* dtype, got bool"),
        (
            "gru",
            (X, F[:1, :, :4]),
            RuntimeError,
            r"Expected hidden size \(1, 3, 9\), got \[1, 3, 4",
        ),
        (
            "gru",
            (X, np.zeros((1, 3, 9), "f4")),
            ValueError,
            r"GRU hx dtype \(float32\) does not match weight dtype \(float64\)",
        ),
        ("gru", (X[..., :4],), RuntimeError, r"equal to input_size. Expected 5, got 4"),
        (
            "gru",
            (X[:, 0], X[0]),
            RuntimeError,
            r"Expected hidden size \(1, 1, 9\), got \[3, 1, 5\]",
        ),
        (
            "lstm",
            (X, (X, X)),
            RuntimeError,
            r"Expected hidden\[0\] size \(1, 3, 9\), got \[6, 3, 5",
        ),
        (
            "lstm",
            (X, (np.zeros((1, 3, 9)), X)),
            RuntimeError,
            r"Expected hidden\[1\] size \(1, 3, 9\), got \[6, 3, 5\]",
        ),
        ("lstm", (X, X), TypeError, r"hx must be a tuple or list of two arrays .*, got ndarray"),
        ("lstm", (X, (X,)), RuntimeError, r"hx to hold two states \(h_0, c_0\), got 1"),
        ("lstm", (X, (X, None)), TypeError, r"LSTM: hx\[1\] must be a NumPy array, got NoneType"),
        ("gru", (X, (X, X)), TypeError, r"GRU: hx must be a NumPy array, got tuple"),
        ("gru", (X.tolist(),), TypeError, r"GRU: input must be a NumPy array, got list"),
        ("gru", (None,), TypeError, r"GRU: input must be a NumPy array, got NoneType"),
        ("gru", (np.ma.masked_array(X),), TypeError, "a NumPy array, got MaskedArray"),
    ],
)
def test_wrong_arguments(rng, kind, arguments, error, message):
    input, *rest = arguments
    with pytest.raises(error, match=message):
        call(kind, input, draw_parameters(rng, kind, 5, 9), *rest)


def test_wrong_options(rng):
    parameters = draw_parameters(rng, "gru", 5, 9)
    with pytest.raises(TypeError, match="batch_first must be a bool, got int"):
        gru(X, parameters, batch_first=1)
    with pytest.raises(TypeError, match="prefix must be a str, got NoneType"):
        gru(X, parameters, prefix=None)
    with pytest.raises(TypeError, match=r"parameters must be a mapping .*, got list"):
        gru(X, list(parameters))
    with pytest.raises(ValueError, match="Unknown nonlinearity 'elu'"):
        rnn(X, parameters, nonlinearity="elu")
    parameters = draw_parameters(rng, "rnn_relu", 5, 9, dtype="complex64")
    with pytest.raises(TypeError, match="relu: expected a real dtype"):
        rnn(X.astype("complex64"), parameters, nonlinearity="relu")


@pytest.mark.parametrize(
    ("name", "weight", "error", "message"),
    [
        (
            "weight_hh_l0",
            np.zeros((27, 8)),
            RuntimeError,
            r"\(3 \* hidden_size, hidden_size\), got \(27, 8\)",
        ),
        (
            "weight_hh_l0",
            np.zeros((26, 9)),
            RuntimeError,
            r"\(3 \* hidden_size, hidden_size\), got \(26, 9\)",
        ),
        ("weight_hh_l0", np.zeros(27), RuntimeError, r"expected 2D, got 1D"),
        (
            "weight_ih_l0",
            np.zeros((27, 0)),
            RuntimeError,
            r"expected shape \(27, 0\), got \(27, 5\)",
        ),
        ("weight_ih_l0", np.zeros((26, 5)), RuntimeError, r"l0: expected shape \(27, 5\)"),
        ("weight_ih_l1", np.zeros((27, 5)), RuntimeError, r"l1: expected shape \(27, 18\)"),
        ("bias_hh_l1_reverse", np.zeros((27, 1)), RuntimeError, r"reverse: expected shape \(27,\)"),
        (
            "bias_ih_l1",
            np.zeros(27, "f4"),
            ValueError,
            "expected the dtype of input, float64, got f",
        ),
        ("bias_ih_l1", [0.0] * 27, TypeError, "bias_ih_l1 must be a NumPy array, got list"),
        ("bias_ih_l1", np.zeros(27, "i8"), ValueError, "bias_ih_l1 must have a floating .*int64"),
    ],
)
def test_wrong_parameters_are_found_before_the_first_layer_runs(
    rng, monkeypatch, name, weight, error, message
):
    monkeypatch.setattr(ostinato.numpy, "_layer", None)
    parameters = draw_parameters(rng, "gru", 5, 9, layers=2, ways=2) | {name: weight}
    with pytest.raises(error, match=message):
        gru(X, parameters)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cell": "elman"}, ValueError, "cell: expected one of rnn_tanh, .*, got 'elman'"),
        ({"input": X[0]}, ValueError, "layer: Expected input to be 3D, got 2D instead"),
        ({"batch_sizes": [3]}, ValueError, r"input to be 2D \(packed\), got 3D instead"),
        ({"c_0": X}, RuntimeError, "c_0: expected None for gru"),
        ({"h_0": X[0]}, RuntimeError, r"h_0 and c_0 should also be 3-D but got \(2-D\) tensors"),
        ({"count": 5}, RuntimeError, "weights: expected 4 per direction for gru, got 5 in all"),
        ({"count": 0}, RuntimeError, "weights: expected 4 per direction for gru, got 0 in all"),
        ({"bidirectional": True}, RuntimeError, "weights: .*, got 4 in all for 2"),
        ({"has_biases": False}, RuntimeError, "weights: expected 2 per direction for gru, got 4"),
    ],
)
def test_wrong_arguments_of_a_layer(rng, changes, error, message):
    weights = (list(draw_parameters(rng, "gru", 5, 9).values()) * 2)[: changes.pop("count", 4)]
    arguments = {"cell": "gru", "input": X, "batch_sizes": None, "h_0": None, "c_0": None}
    arguments |= {"weights": weights, "has_biases": True, "bidirectional": False} | changes
    with pytest.raises(error, match=message):
        layer(**arguments)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ([1, 2], ValueError, r"from at most 1 to at least 0, got \[1, 2\]"),
        ([4, -1], ValueError, r"from at most 4 to at least 0, got \[4, -1\]"),
        ([-3], ValueError, r"from at most 0 to at least 0, got \[-3\]"),
        ([2, 2], ValueError, "expected a sum of 3, the rows of input, got 4"),
        ([], ValueError, "expected a sum of 3, the rows of input, got 0"),
        # These would add up to 3 in 64 bits.
        ([2**62] * 4 + [3], ValueError, "expected a sum of 3, .*, got 18446744073709551619"),
        ([2.0, 1.0], TypeError, "a 1D sequence of whole numbers, got 1D of float64"),
        ([[2, 1]], TypeError, "a 1D sequence of whole numbers, got 2D of int64"),
        ([True, True, True], TypeError, "whole numbers, got 1D of bool"),
        ([2**70], TypeError, "whole numbers, got 1D of object"),
        (3, TypeError, "a 1D sequence of whole numbers, got 0D of int64"),
    ],
)
def test_wrong_batch_sizes(rng, sizes, error, message):
    weights = list(draw_parameters(rng, "gru", 5, 9).values())
    options = {"has_biases": True, "bidirectional": False}
    with pytest.raises(error, match=message):
        layer("gru", np.zeros((3, 5)), sizes, None, None, weights, **options)


def test_batch_sizes_of_more_rows_than_the_states_have(rng):
    options = {"has_biases": True, "bidirectional": False}
    for states in ((np.zeros((1, 1, 9)), None), (None, np.zeros((1, 1, 9)))):
        cell = "gru" if states[1] is None else "lstm"
        weights = list(draw_parameters(rng, cell, 5, 9).values())
        with pytest.raises(ValueError, match=r"from at most 1 to at least 0, got \[2, 2\]"):
            layer(cell, np.zeros((4, 5)), [2, 2], *states, weights, **options)


@pytest.mark.parametrize("kind", FIRST_CELLS)
def test_a_transposed_weight_is_told_by_the_sizes_of_the_others(rng, kind):
    parameters = draw_parameters(rng, kind, 4, 6)
    rows = parameters["weight_ih_l0"].shape[0]
    parameters["weight_ih_l0"] = parameters["weight_ih_l0"].T
    message = rf"weight_ih_l0: expected shape \({rows}, 4\), got \(4, {rows}\)"
    with pytest.raises(RuntimeError, match=message):
        call(kind, np.zeros((7, 3, 4)), parameters)
