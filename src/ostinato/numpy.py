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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from ostinato import _core, arrays, check, reference
from ostinato.call import Call, States, padded
from ostinato.cells import CELLS
from ostinato.sizes import Sizes, six_per_direction

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
            check_array("LSTM", f"hx[{i}]", state)
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
    rows keep their state (docs/math.md, equations 31-34). The reverse direction takes t downwards.

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
    options = cell, has_biases, bidirectional
    call = Call(input, batch_sizes, 0, (h_0, c_0), list(weights), *options)
    return _run(_Given("layer", names, call))


def read(
    kind: str, cell: str, parameters: Mapping[str, Array], prefix: str
) -> tuple[list[Array], bool, int]:
    """Return a layer's weights by their names, checked, without an input.

    Raises what `gru` raises for such parameters, with `kind` for the layer.

    Returns:
        The weights, layer by layer and direction by direction; whether there are biases; D.
    """
    _, call, sizes = read_parameters(kind, cell, parameters, prefix)
    return list(call.weights), call.has_biases, sizes.directions


def is_of_layer(name: str, prefix: str) -> bool:
    """Whether this is the name of a layer's weight behind the prefix."""
    return name.startswith(prefix) and bool(_NAME.fullmatch(name, len(prefix)))


class _Given(NamedTuple):
    """Arguments as they came, one name per weight; `_check` has not seen them yet."""

    kind: str
    names: list[str]
    call: Call
    batch_first: bool = False


def _named(
    kind: str,
    cell: str,
    input: Array,
    parameters: Mapping[str, Array],
    h_0: Array | None,
    c_0: Array | None,
    batch_first: bool,
    prefix: str,
) -> _Given:
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
        if name not in expected and is_of_layer(name, prefix):
            raise ValueError(f"{kind}: expected parameters {names}, got {name!r} as well")
    weights = [parameters[name] for name in names]
    options = cell, has_biases, len(ways) > 1
    call = Call(input, None, 0, (h_0, c_0), weights, *options, layers=layers)
    return _Given(kind, names, call, batch_first)


def read_parameters(
    kind: str,
    cell: str,
    parameters: Mapping[str, Any],
    prefix: str,
    convert: Callable[[str, Any], Array] | None = None,
) -> tuple[list[str], Call, Sizes]:
    """Check the parameters of a stack by name, each after `convert(name, parameter)` if given.

    Returns:
        Their names, a call of one step that holds them in this order, and the first layer's sizes.
    """
    given = _named(kind, cell, np.zeros((1, 1, 1)), parameters, None, None, False, prefix)
    weights = given.call.weights
    if convert is not None:
        weights = list(map(convert, given.names, weights))
    weight_ih, *_ = weights
    check_array(kind, next(iter(given.names)), weight_ih)
    size = weight_ih.shape[-1] if weight_ih.ndim else 1
    input = np.zeros((1, 1, size), weight_ih.dtype)
    call, sizes = _check(given._replace(call=given.call._replace(input=input, weights=weights)))
    return given.names, call, sizes


def _reject_prefix(kind: str, first: str, parameters: Mapping[str, Array]) -> NoReturn:
    ends = [name for name in map(str, parameters) if name.endswith("weight_ih_l0")]
    found = [name.removesuffix("weight_ih_l0") for name in ends]
    hint = f"; prefixes that would fit: {', '.join(map(repr, found))}" if found else ""
    raise ValueError(f"{kind}: expected parameters to hold {first!r}, which is missing{hint}")


def _reject_type(kind: str, argument: str, expected: str, got: object) -> NoReturn:
    raise TypeError(f"{kind}: {argument} must be {expected}, got {type(got).__name__}")


# ---- checks ----


def _check(given: _Given) -> tuple[Call, Sizes]:
    """Check everything; return the call on (T, B, I) or (N, I), and the first layer's sizes."""
    kind, names, call, batch_first = given
    if call.cell not in CELLS:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {call.cell!r}")
    input = call.input
    check_array(kind, "input", input)
    _check_dims(given)
    for name, weight in zip(names, call.weights, strict=True):
        check_array(kind, name, weight)
    if call.batch_sizes is None and input.ndim == 2:
        input = input[:, None]  # one sequence is a batch of one
        call = call.each_state(lambda state: state[:, None])
    elif batch_first:
        input = input.swapaxes(0, 1)
    batch_sizes, batch = None, input.shape[1]
    if call.batch_sizes is not None:
        batch_sizes, batch = _check_batch_sizes(call)
    call = call._replace(input=input, batch_sizes=batch_sizes, batch=batch)
    states = tuple(state for state, _ in zip(call.initial, call.kind.states, strict=False))
    # An input as the weights would have it: what is wrong with these is said of them. If the first
    # is transposed, for example, its columns say nothing.
    weight_ih, weight_hh, *_ = (*call.weights, input, input)
    columns = weight_ih if weight_ih.shape[:1] == weight_hh.shape[:1] else input
    size = columns.shape[-1]
    is_one = all(weight.dtype == weight_ih.dtype for weight in call.weights)
    dtype = weight_ih.dtype if is_one else input.dtype
    like = np.broadcast_to(np.zeros((), dtype), (*input.shape[:-1], size))
    sizes = check.check(call._replace(input=like, initial=()), _shared, names)
    _check_words(given, call, states, weight_ih.dtype, size, sizes)
    if 0 in (sizes.hidden, sizes.input, sizes.output):
        raise RuntimeError(f"{kind}: expected weights that are not empty, got {sizes}")
    return call._replace(initial=states), sizes


def _shared(array: Array) -> tuple[np.dtype[Any]]:
    return (array.dtype,)


def _check_words(
    given: _Given, call: Call, states: States, dtype: np.dtype[Any], size: int, sizes: Sizes
) -> None:
    """Check input and states against the weights, in torch's words."""
    kind, input = given.kind, call.input
    _check_dtype(kind, "input", input, dtype)
    if input.shape[-1] != size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {size}, got {input.shape[-1]}"
        )
    rows = call.layers * sizes.directions
    for name, state, array in zip(_state_names(given), states, arrays.INITIAL, strict=False):
        if state is None:
            continue
        expected = (rows, sizes.batch, sizes.widths(call.kind)[array.width])
        if state.shape != expected:
            word = name.replace("hx[", "hidden[").replace("hx", "hidden")
            raise RuntimeError(f"Expected {word} size {expected}, got {list(state.shape)}")
        _check_dtype(kind, name, state, dtype)


def _state_names(given: _Given) -> list[str]:
    """Return what the caller knows the states as."""
    if given.kind == "layer":
        return [array.name for array in arrays.INITIAL]
    count = len(given.call.kind.states)
    return ["hx"] if count == 1 else [f"hx[{k}]" for k in range(count)]


def check_array(kind: str, name: str, array: object) -> None:
    """Refuse what is no plain array of floating or complex numbers."""
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


def _check_dims(given: _Given) -> None:
    kind, call = given.kind, given.call
    dim = call.input.ndim
    if kind == "layer":
        expected, what = (3, "3D") if call.batch_sizes is None else (2, "2D (packed)")
        if dim != expected:
            raise ValueError(f"layer: Expected input to be {what}, got {dim}D instead")
        dim = 3
    elif dim not in (2, 3):
        word = call.kind.dim_word
        raise ValueError(f"{kind}: Expected input to be 2D or 3D, got {dim}D{word} instead")
    count = len(call.kind.states)
    for array, state in zip(arrays.INITIAL[count:], call.initial[count:], strict=True):
        if state is not None:
            raise RuntimeError(f"{array.name}: expected None for {call.cell}")
    pairs = zip(_state_names(given), call.initial, strict=False)
    states = [(name, state) for name, state in pairs if state is not None]
    for name, state in states:
        check_array(kind, name, state)
    if all(state.ndim == dim for _, state in states):
        return
    batched = "unbatched 2-D" if dim == 2 else "batched 3-D"
    what = "h_0 and c_0" if kind == "layer" else "hx and cx" if count > 1 else "hx"
    got = ", ".join(f"{state.ndim}-D" for _, state in states)
    got = f"{got} tensor" if what == "hx" else f"({got}) tensors"
    raise RuntimeError(f"For {batched} input, {what} should also be {dim}-D but got {got}")


def _check_batch_sizes(call: Call) -> tuple[Array, int]:
    """Return a dense copy, and B. A wrong entry would make the engine leave its arrays."""
    given = np.asarray(call.batch_sizes)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise TypeError(
            "batch_sizes: expected a 1D sequence of whole numbers, "
            f"got {given.ndim}D of {given.dtype}"
        )
    # As Python's numbers, which do not wrap.
    sizes, rows = given.tolist(), call.input.shape[0]
    state = next((state for state in call.initial if state is not None), None)
    batch = max(0, *sizes[:1], 0) if state is None else state.shape[1]
    check.check_batch_sizes(sizes, batch, rows)
    return np.array(sizes, np.int64), batch


# ---- the layers, one after the other ----

_told: set[np.dtype[Any]] = set()


def _run(given: _Given) -> tuple[Array, Array, Array | None]:
    """Check, and run layer after layer."""
    call, sizes = _check(given)
    dtype = call.input.dtype
    if dtype not in _DTYPES and dtype not in _told:
        _told.add(dtype)
        _log.warning("no engine for %s: the reference runs, correctly and slowly", dtype)
    output, last = call.input, []
    for k in range(call.layers):
        output, states = _layer(call.of_layer(k, output), sizes)
        last.append(states)
        sizes = sizes._replace(input=sizes.directions * sizes.output)
    found = [np.concatenate(each) for each in zip(*last, strict=True)]
    if given.call.batch_sizes is None and given.call.input.ndim == 2:
        output, found = output[:, 0], [state[:, 0] for state in found]
    elif given.batch_first:
        output = output.swapaxes(0, 1)
    h_n, c_n = padded(found)
    return output, h_n, c_n


def _layer(call: Call, sizes: Sizes) -> tuple[Array, States]:
    """Run one layer, on the engine where there is one for the dtype."""
    input = call.input
    if input.dtype not in _DTYPES:
        output, states, _ = reference.states(
            *(call.cell, input, call.batch_sizes, call.initial, call.weights),
            has_biases=call.has_biases,
            bidirectional=call.bidirectional,
        )
        return output, states
    shapes = check.shapes_of(call, sizes)
    # By name, so that dense copies outlive the run that reads their addresses.
    last = arrays.LAST[: len(call.initial)]
    results = {a.name: np.empty(shapes[a.name], input.dtype) for a in (arrays.OUTPUT, *last)}
    given = {"input": _dense(input), **results}
    pairs = zip(arrays.INITIAL, call.initial, strict=False)
    given.update((array.name, _dense(state)) for array, state in pairs)
    dense = [_dense(weight) for weight in call.weights]
    per_unit = call.kind.parameters > 0
    weights = six_per_direction(dense, sizes, call.has_biases, None, per_unit)
    found = [a for n in _NAMES for a in (weights if n == "weights" else [given.get(n)])]
    _core.forward(
        call.kind.number,
        _DTYPES[input.dtype],
        sizes,
        _address(call.batch_sizes),
        1,
        list(map(_address, found)),
        [],
        _core.forced_threads or len(os.sched_getaffinity(0)),
    )
    return results["output"], tuple(results[array.name] for array in last)


# What the engine is given, in its order.
_NAMES = [name for name, *_ in _core.arrays(False)]


def _dense(array: Array | None) -> Array | None:
    """Return the array itself if the engine can read it as it lies, else a copy."""
    if array is None or (array.flags.c_contiguous and array.flags.aligned):
        return array
    return np.array(array, order="C")


def _address(array: Array | None) -> int:
    return 0 if array is None else array.ctypes.data
