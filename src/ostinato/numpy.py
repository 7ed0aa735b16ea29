"""Inference on NumPy arrays, without torch: `rnn`, `gru` and `lstm` over a mapping of parameters.

The parameters are those of torch.nn by name, shape and gate order, so what
`safetensors.numpy.load_file` returns of a trained model runs as it is. float32, float64 and float16
run on the engine; other dtypes run the reference, and the log says so once.

`_check` stands in front of both, and the engine can be reached from here through nothing else.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step (proj_size, or H),
L layers, D directions, G gates (1 RNN, 3 GRU, 4 LSTM).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from ostinato import _core, reference
from ostinato.cells import CELLS, Cell
from ostinato.engine import Sizes, check_batch_sizes, five_per_direction

__all__ = ["gru", "layer", "lstm", "rnn"]

Array: TypeAlias = npt.NDArray[Any]

_log = logging.getLogger("ostinato")

# The engine's number of each dtype (csrc/cpu/engine.h). float16 is computed in float32.
_DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float64): 1, np.dtype(np.float16): 3}

# In torch's order; a projected LSTM ends in weight_hr.
_PLAIN = ("weight_ih", "weight_hh")
_BIASES = ("bias_ih", "bias_hh")
_NAME = re.compile(r"(?:weight_(?:ih|hh|hr)|bias_(?:ih|hh))_l\d+(?:_reverse)?")


def rnn(
    input: Array,
    parameters: Mapping[str, Array],
    hx: Array | None = None,
    *,
    nonlinearity: str = "tanh",
    batch_first: bool = False,
    prefix: str = "",
) -> tuple[Array, Array]:
    """Run an Elman network over a sequence or a batch of sequences.

    h_t = phi(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), phi being tanh or relu
    (docs/math.md, equation 2).

    Args:
        input: (T, B, I), (B, T, I) with batch_first, or (T, I) for one sequence.
        parameters: arrays under torch's names: weight_ih_l0 (H, I), weight_hh_l0 (H, H), bias_ih_l0
            and bias_hh_l0 (H,) or neither; `_l1`, ... for more layers, which read D * H features,
            and `_reverse` after each name for a second direction. Other names are ignored.
        hx: h_0, (L * D, B, H), or (L * D, H) for one sequence; None means zeros.
        nonlinearity: "tanh" or "relu".
        batch_first: whether batched input and output are (B, T, features); states never are.
        prefix: what stands before the names in `parameters`, such as "encoder.rnn.".

    Returns:
        output, (T, B, D * H) in the layout of `input`, and h_n, shaped as h_0, in the order
        layer 0, layer 0 reverse, layer 1, ... No steps: an empty output and h_n = h_0.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: an unknown nonlinearity, parameters that are missing or too many, input of
            another number of dimensions or another dtype than the parameters.
        RuntimeError: sizes that do not fit.

    Example:
        >>> import numpy as np
        >>> parameters = {"weight_ih_l0": np.ones((1, 1)), "weight_hh_l0": np.full((1, 1), 2.0)}
        >>> output, h_n = rnn(np.ones((4, 1)), parameters, nonlinearity="relu")
        >>> output.tolist(), h_n.tolist()
        ([[1.0], [3.0], [7.0], [15.0]], [[15.0]])

    Source: torch.nn.RNN; Elman 1990, doi:10.1207/s15516709cog1402_1, with torch's two biases.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    call = _named("RNN", f"rnn_{nonlinearity}", input, parameters, hx, None, batch_first, prefix)
    output, h_n, _ = _run(call)
    return output, h_n


def gru(
    input: Array,
    parameters: Mapping[str, Array],
    hx: Array | None = None,
    *,
    batch_first: bool = False,
    prefix: str = "",
) -> tuple[Array, Array]:
    """Run a gated recurrent unit over a sequence or a batch of sequences.

    r = sigmoid(W_ir x_t + b_ir + W_hr h + b_hr), z likewise,
    n = tanh(W_in x_t + b_in + r * (W_hn h + b_hn)), h_t = (1 - z) * n + z * h with h = h_(t-1)
    (docs/math.md, equations 7-10).

    Args:
        input: (T, B, I), (B, T, I) with batch_first, or (T, I) for one sequence.
        parameters: arrays under torch's names: weight_ih_l0 (3 * H, I), weight_hh_l0 (3 * H, H),
            bias_ih_l0 and bias_hh_l0 (3 * H,) or neither, gates in the order r, z, n; `_l1`, ...
            for more layers, which read D * H features, and `_reverse` after each name for a second
            direction. Other names are ignored.
        hx: h_0, (L * D, B, H), or (L * D, H) for one sequence; None means zeros.
        batch_first: whether batched input and output are (B, T, features); states never are.
        prefix: what stands before the names in `parameters`, such as "encoder.gru.".

    Returns:
        output, (T, B, D * H) in the layout of `input`, and h_n, shaped as h_0, in the order
        layer 0, layer 0 reverse, layer 1, ... No steps: an empty output and h_n = h_0.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: parameters that are missing or too many, input of another number of dimensions
            or another dtype than the parameters.
        RuntimeError: sizes that do not fit.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> shapes = {"weight_ih_l0": (60, 10), "weight_hh_l0": (60, 20)}
        >>> parameters = {name: rng.standard_normal(shape) / 4 for name, shape in shapes.items()}
        >>> input = rng.standard_normal((5, 3, 10))
        >>> output, h_n = gru(input, parameters)
        >>> output.shape, h_n.shape
        ((5, 3, 20), (1, 3, 20))

        A stream may be cut anywhere, and the bits are the same:

        >>> first, h = gru(input[:2], parameters)
        >>> second, h = gru(input[2:], parameters, h)
        >>> bool((np.concatenate([first, second]) == output).all() and (h == h_n).all())
        True

    Source: torch.nn.GRU; Cho et al. 2014, arXiv:1406.1078v1, reset after the matrix product as in
    cuDNN.
    """
    output, h_n, _ = _run(_named("GRU", "gru", input, parameters, hx, None, batch_first, prefix))
    return output, h_n


def lstm(
    input: Array,
    parameters: Mapping[str, Array],
    hx: Sequence[Array] | None = None,
    *,
    batch_first: bool = False,
    prefix: str = "",
) -> tuple[Array, tuple[Array, Array]]:
    """Run long short-term memory over a sequence or a batch of sequences.

    i, f, o = sigmoid(W_i x_t + b_i + W_h h + b_h), g = tanh(likewise), c_t = f * c + i * g,
    h_t = o * tanh(c_t), then W_hr h_t with a projection, where h = h_(t-1) and c = c_(t-1)
    (docs/math.md, equations 16-22).

    Args:
        input: (T, B, I), (B, T, I) with batch_first, or (T, I) for one sequence.
        parameters: arrays under torch's names: weight_ih_l0 (4 * H, I), weight_hh_l0 (4 * H, O),
            bias_ih_l0 and bias_hh_l0 (4 * H,) or neither, weight_hr_l0 (O, H) for a projection,
            gates in the order i, f, g, o; `_l1`, ... for more layers, which read D * O features,
            and `_reverse` after each name for a second direction. Other names are ignored.
        hx: h_0, (L * D, B, O), and c_0, (L * D, B, H), as a tuple or a list, without B for one
            sequence; None means zeros.
        batch_first: whether batched input and output are (B, T, features); states never are.
        prefix: what stands before the names in `parameters`, such as "encoder.lstm.".

    Returns:
        output, (T, B, D * O) in the layout of `input`, and (h_n, c_n), shaped as h_0 and c_0, in
        the order layer 0, layer 0 reverse, layer 1, ... No steps: an empty output and the initial
        states.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: parameters that are missing or too many, input of another number of dimensions
            or another dtype than the parameters.
        RuntimeError: sizes that do not fit.

    Example:
        >>> import numpy as np
        >>> parameters = {"encoder.weight_ih_l0": np.zeros((80, 10)),
        ...               "encoder.weight_hh_l0": np.zeros((80, 7)),
        ...               "encoder.weight_hr_l0": np.zeros((7, 20))}
        >>> output, (h_n, c_n) = lstm(np.ones((5, 3, 10)), parameters, prefix="encoder.")
        >>> output.shape, h_n.shape, c_n.shape
        ((5, 3, 7), (1, 3, 7), (1, 3, 20))

    Source: torch.nn.LSTM; Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735, with the
    forget gate of Gers et al. 2000 and without peepholes; projection: Sak et al. 2014,
    arXiv:1402.1128.
    """
    h_0, c_0 = None, None
    if hx is not None:
        if not isinstance(hx, (tuple, list)):
            _reject_type("LSTM", "hx", "a tuple or list of two arrays (h_0, c_0), or None", hx)
        if len(hx) != 2:
            raise RuntimeError(f"LSTM: expected hx to hold two states (h_0, c_0), got {len(hx)}")
        for i, state in enumerate(hx):
            _check_array("LSTM", f"hx[{i}]", state)
        h_0, c_0 = hx
    call = _named("LSTM", "lstm", input, parameters, h_0, c_0, batch_first, prefix)
    output, h_n, c_n = _run(call)
    assert c_n is not None
    return output, (h_n, c_n)


def layer(
    cell: str,
    input: Array,
    batch_sizes: Sequence[int] | Array | None,
    h_0: Array | None,
    c_0: Array | None,
    weights: Sequence[Array],
    *,
    has_biases: bool,
    bidirectional: bool,
) -> tuple[Array, Array, Array | None]:
    """Run one recurrent layer over a padded or packed batch.

    state_t[:n_t] = step(input_t, state_(t-1)[:n_t]), n_t rows being active at step t; the other
    rows keep their state (docs/math.md, equations 31-34). The reverse direction walks t downwards.

    Args:
        cell: "rnn_tanh", "rnn_relu", "gru" or "lstm".
        input: (T, B, I), or packed (N, I) if `batch_sizes` is given.
        batch_sizes: None, or active rows at each of the T steps, whole numbers that never increase.
        h_0: (D, B, O), or None for zeros.
        c_0: (D, B, H), or None for zeros; LSTM only.
        weights: per direction weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr].
        has_biases: whether `weights` holds biases.
        bidirectional: whether `weights` holds a second, reverse direction.

    Returns:
        output, (T, B, D * O) or (N, D * O); h_n, (D, B, O); c_n, (D, B, H), or None where the cell
        is no LSTM.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: an unknown cell, another dtype than the weights', wrong batch_sizes.
        RuntimeError: a wrong shape, or more or fewer weights than the cell has.

    Example:
        >>> import numpy as np
        >>> weights = [np.ones((1, 1)), np.ones((1, 1))]
        >>> rows = np.array([[1.0], [10.0], [2.0]])
        >>> output, h_n, c_n = layer("rnn_relu", rows, [2, 1], None, None, weights,
        ...                          has_biases=False, bidirectional=False)
        >>> output.tolist(), h_n.tolist(), c_n
        ([[1.0], [10.0], [3.0]], [[[3.0], [10.0]]], None)

    Source: torch.nn.RNN, GRU and LSTM; packed rows as in torch.nn.utils.rnn.PackedSequence.
    """
    names = [f"weights[{i}]" for i in range(len(weights))]
    directions = 2 if bidirectional else 1
    call = _Call("layer", cell, input, h_0, c_0, names, list(weights), 1, directions, has_biases)
    return _run(call._replace(batch_sizes=batch_sizes))


class _Call(NamedTuple):
    """Arguments as they came, one name per weight; `_check` has not seen them yet."""

    kind: str
    cell: str
    input: Array
    h_0: Array | None
    c_0: Array | None
    names: list[str]
    weights: list[Array]
    layers: int
    directions: int
    has_biases: bool
    batch_first: bool = False
    batch_sizes: Sequence[int] | Array | None = None

    @property
    def record(self) -> Cell:
        return CELLS[self.cell]


def _named(
    kind: str,
    cell: str,
    input: Array,
    parameters: Mapping[str, Array],
    h_0: Array | None,
    c_0: Array | None,
    batch_first: bool,
    prefix: str,
) -> _Call:
    """Read layers, directions, biases and projection from the names of the parameters."""
    if not isinstance(parameters, Mapping):
        _reject_type(kind, "parameters", "a mapping of names to NumPy arrays", parameters)
    if not isinstance(prefix, str):
        _reject_type(kind, "prefix", "a str", prefix)
    if not isinstance(batch_first, bool):
        _reject_type(kind, "batch_first", "a bool", batch_first)
    first = f"{prefix}weight_ih_l0"
    if first not in parameters:
        _reject_prefix(kind, first, parameters)
    layers = 1
    while f"{prefix}weight_ih_l{layers}" in parameters:
        layers += 1
    ways = ("", "_reverse") if f"{first}_reverse" in parameters else ("",)
    has_biases = f"{prefix}bias_ih_l0" in parameters
    parts = _PLAIN + _BIASES if has_biases else _PLAIN
    if CELLS[cell].projects and f"{prefix}weight_hr_l0" in parameters:
        parts = (*parts, "weight_hr")
    names = [f"{prefix}{part}_l{k}{way}" for k in range(layers) for way in ways for part in parts]
    for name in names:
        if name not in parameters:
            raise ValueError(f"{kind}: expected parameters to hold {name!r}, which is missing")
    expected = set(names)
    for name in map(str, parameters):
        # Ignored, it would be a layer, direction or bias that silently does nothing.
        if name not in expected and name.startswith(prefix) and _NAME.fullmatch(name, len(prefix)):
            raise ValueError(f"{kind}: expected parameters {names}, got {name!r} as well")
    weights = [parameters[name] for name in names]
    ends = (layers, len(ways), has_biases, batch_first)
    return _Call(kind, cell, input, h_0, c_0, names, weights, *ends)


def _reject_prefix(kind: str, first: str, parameters: Mapping[str, Array]) -> NoReturn:
    ends = [name for name in map(str, parameters) if name.endswith("weight_ih_l0")]
    found = [name.removesuffix("weight_ih_l0") for name in ends]
    hint = f"; prefixes that would fit: {', '.join(map(repr, found))}" if found else ""
    raise ValueError(f"{kind}: expected parameters to hold {first!r}, which is missing{hint}")


def _reject_type(kind: str, argument: str, expected: str, got: object) -> NoReturn:
    raise TypeError(f"{kind}: {argument} must be {expected}, got {type(got).__name__}")


# ---- checks ----


def _check(call: _Call) -> tuple[Sizes, Array | None]:
    """Check everything; return the sizes of the first layer, and batch_sizes as dense int64."""
    if call.cell not in CELLS:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {call.cell!r}")
    input = call.input
    _check_array(call.kind, "input", input)
    _check_dims(call)
    for name, weight in zip(call.names, call.weights, strict=True):
        _check_array(call.kind, name, weight)
    size, hidden, output = _check_weights(call)
    dtype = call.weights[0].dtype
    _check_dtype(call.kind, "input", input, dtype)
    if input.shape[-1] != size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {size}, got {input.shape[-1]}"
        )
    batch_sizes = None
    if call.batch_sizes is not None:
        batch_sizes, batch = _check_batch_sizes(call)
        steps, rows = len(batch_sizes), input.shape[0]
    else:
        steps, batch = input.shape[:2] if input.ndim == 3 else (input.shape[0], 1)
        if call.batch_first and input.ndim == 3:
            steps, batch = batch, steps
        rows = steps * batch
    for name, state, width in zip(_states(call), call[3:5], (output, hidden), strict=True):
        if state is None:
            continue
        # One sequence is a batch of one, and torch's message counts it so.
        shape = state.shape if state.ndim == 3 else (state.shape[0], 1, state.shape[1])
        expected = (call.layers * call.directions, batch, width)
        if shape != expected:
            word = name.replace("hx[", "hidden[").replace("hx", "hidden")
            raise RuntimeError(f"Expected {word} size {expected}, got {list(shape)}")
        _check_dtype(call.kind, name, state, dtype)
    projection = output if _projected(call) else 0
    return Sizes(steps, rows, batch, size, hidden, projection, call.directions), batch_sizes


def _states(call: _Call) -> tuple[str, str]:
    """Return what the caller knows the two states as."""
    if call.kind == "layer":
        return "h_0", "c_0"
    return ("hx[0]", "hx[1]") if call.record.has_c else ("hx", "hx")


def _projected(call: _Call) -> bool:
    per_direction = len(call.weights) // (call.layers * call.directions)
    return call.record.projects and per_direction == (5 if call.has_biases else 3)


def _check_array(kind: str, name: str, array: object) -> None:
    # The engine would not see a mask, and a matrix means something else by the same operators.
    if not isinstance(array, np.ndarray) or isinstance(array, (np.ma.MaskedArray, np.matrix)):
        _reject_type(kind, name, "a NumPy array", array)
    # This leaves out bfloat16, which is not NumPy's own and turns into float32 on the way.
    if array.dtype.kind not in "fc":
        raise ValueError(f"{kind}: {name} must have a floating or complex dtype, got {array.dtype}")


def _check_dtype(kind: str, name: str, array: Array, dtype: np.dtype[Any]) -> None:
    if array.dtype != dtype:
        raise ValueError(
            f"{kind} {name} dtype ({array.dtype}) does not match weight dtype ({dtype}). "
            f"Convert {name}: {name}.astype({dtype.name!r})"
        )


def _check_dims(call: _Call) -> None:
    kind, dim = call.kind, call.input.ndim
    if kind == "layer":
        expected, what = (3, "3D") if call.batch_sizes is None else (2, "2D (packed)")
        if dim != expected:
            raise ValueError(f"layer: Expected input to be {what}, got {dim}D instead")
        dim = 3
    elif dim not in (2, 3):
        word = call.record.dim_word
        raise ValueError(f"{kind}: Expected input to be 2D or 3D, got {dim}D{word} instead")
    given = [(n, s) for n, s in zip(_states(call), call[3:5], strict=True) if s is not None]
    for name, state in given:
        _check_array(kind, name, state)
    if call.c_0 is not None and not call.record.has_c:
        raise RuntimeError(f"c_0: expected None for {call.cell}")
    if all(state.ndim == dim for _, state in given):
        return
    batched = "unbatched 2-D" if dim == 2 else "batched 3-D"
    what = "h_0 and c_0" if kind == "layer" else "hx and cx" if call.record.has_c else "hx"
    got = ", ".join(f"{state.ndim}-D" for _, state in given)
    got = f"{got} tensor" if what == "hx" else f"({got}) tensors"
    raise RuntimeError(f"For {batched} input, {what} should also be {dim}-D but got {got}")


def _check_weights(call: _Call) -> tuple[int, int, int]:
    """Check all layers against the first two weights; return I, H and O."""
    names, weights, gates = call.names, call.weights, call.record.gates
    ways = call.layers * call.directions
    plain = 4 if call.has_biases else 2
    projected = _projected(call)
    count = plain + projected
    if len(weights) != ways * count:
        extra = f" or {plain + 1}" if call.record.projects else ""
        raise RuntimeError(
            f"weights: expected {plain}{extra} per direction for {call.cell}, "
            f"got {len(weights)} in all for {ways}"
        )
    for name, weight in zip(names[:2], weights[:2], strict=True):
        if weight.ndim != 2 or not weight.size:
            raise RuntimeError(f"{name}: expected 2D and not empty, got {weight.shape}")
    size, output = weights[0].shape[1], weights[1].shape[1]
    hidden, rest = divmod(weights[1].shape[0], gates)
    if rest or (not projected and output != hidden):
        width = "projection" if projected else "hidden"
        raise RuntimeError(
            f"{names[1]}: expected shape ({gates} * hidden, {width}), got {weights[1].shape}"
        )
    rows, dtype = gates * hidden, weights[0].dtype
    per_direction: list[tuple[int, ...]] = [(rows, size), (rows, output)]
    per_direction += [(rows,), (rows,)] * call.has_biases + [(output, hidden)] * projected
    for index, (name, weight) in enumerate(zip(names, weights, strict=True)):
        shape = per_direction[index % count]
        if index % count == 0 and index >= call.directions * count:
            shape = (rows, call.directions * output)
        elif index == 0 and weight.shape[0] != rows:
            # Its columns say nothing then, if it is transposed for example.
            shape = (rows, call.input.shape[-1])
        if weight.shape != shape:
            raise RuntimeError(f"{name}: expected shape {shape}, got {weight.shape}")
        if weight.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype} as in {names[0]}, got {weight.dtype}")
    return size, hidden, output


def _check_batch_sizes(call: _Call) -> tuple[Array, int]:
    """Return a dense copy, and B. A wrong entry would make the engine leave its arrays."""
    given = np.asarray(call.batch_sizes)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise TypeError(
            "batch_sizes: expected a 1D sequence of whole numbers, "
            f"got {given.ndim}D of {given.dtype}"
        )
    # As Python's numbers, which do not wrap.
    sizes, rows = given.tolist(), call.input.shape[0]
    state = call.h_0 if call.h_0 is not None else call.c_0
    batch = max(0, *sizes[:1], 0) if state is None else state.shape[1]
    check_batch_sizes(sizes, batch, rows)
    return np.array(sizes, np.int64), batch


# ---- the walk through layers ----

_told: set[np.dtype[Any]] = set()


def _run(call: _Call) -> tuple[Array, Array, Array | None]:
    """Check, bring the arguments to (T, B, I) or packed, and run layer after layer."""
    sizes, batch_sizes = _check(call)
    rows, h_0, c_0 = call.input, call.h_0, call.c_0
    unbatched = call.batch_sizes is None and rows.ndim == 2
    if unbatched:
        rows = rows[:, None]
        h_0 = None if h_0 is None else h_0[:, None]
        c_0 = None if c_0 is None else c_0[:, None]
    elif call.batch_first:
        rows = rows.swapaxes(0, 1)
    if rows.dtype not in _DTYPES and rows.dtype not in _told:
        _told.add(rows.dtype)
        _log.warning("no engine for %s: the reference runs, correctly and slowly", rows.dtype)
    per_layer = len(call.weights) // call.layers
    h_out, c_out = [], []
    for k in range(call.layers):
        own = slice(k * call.directions, (k + 1) * call.directions)
        states = (None if h_0 is None else h_0[own], None if c_0 is None else c_0[own])
        weights = call.weights[k * per_layer : (k + 1) * per_layer]
        rows, h_n, c_n = _layer(call, sizes, rows, batch_sizes, states, weights)
        h_out.append(h_n)
        if c_n is not None:
            c_out.append(c_n)
        sizes = sizes._replace(input=call.directions * sizes.output)
    h_n = np.concatenate(h_out)
    c_n = np.concatenate(c_out) if c_out else None
    if unbatched:
        return rows[:, 0], h_n[:, 0], None if c_n is None else c_n[:, 0]
    return rows.swapaxes(0, 1) if call.batch_first else rows, h_n, c_n


def _layer(
    call: _Call,
    sizes: Sizes,
    input: Array,
    batch_sizes: Array | None,
    states: tuple[Array | None, Array | None],
    weights: list[Array],
) -> tuple[Array, Array, Array | None]:
    """Run one layer, on the engine where there is one for the dtype."""
    if input.dtype not in _DTYPES:
        cell, has_biases, both = call.cell, call.has_biases, call.directions == 2
        return reference.layer(
            cell, input, batch_sizes, *states, weights, has_biases=has_biases, bidirectional=both
        )
    # Named, so that dense copies outlive the call that reads their addresses.
    x, h, c = map(_dense, (input, *states))
    dense = [_dense(weight) for weight in weights]
    output = np.empty((*input.shape[:-1], sizes.directions * sizes.output), input.dtype)
    h_n = np.empty((sizes.directions, sizes.batch, sizes.output), input.dtype)
    c_n = None
    if call.record.has_c:
        c_n = np.empty((sizes.directions, sizes.batch, sizes.hidden), input.dtype)
    # In the order of `_core.arrays(False)`; neither rows that are cut, nor cells and reserve.
    first = [*map(_address, (x, h, c)), 0, 0, 0, 0]
    first += five_per_direction(list(map(_address, dense)), sizes, call.has_biases, 0)
    first += [_address(output), _address(h_n), _address(c_n), 0, 0]
    _core.forward(
        call.record.number,
        _DTYPES[input.dtype],
        sizes,
        _address(batch_sizes),
        1,
        first,
        [],
        _core.forced_threads or len(os.sched_getaffinity(0)),
    )
    return output, h_n, c_n


def _dense(array: Array | None) -> Array | None:
    """Return the array itself if the engine can read it as it lies, else a copy."""
    if array is None or (array.flags.c_contiguous and array.flags.aligned):
        return array
    return np.array(array, order="C")


def _address(array: Array | None) -> int:
    return 0 if array is None else array.ctypes.data
