"""A stream: a stack of layers with frozen weights and the states of its sequences, step by step.

Weights are packed once, in the layout that a step reads, and the states stay inside. It needs no
torch. The bits are those of the layers (`ostinato.nn`, `ostinato.numpy`), however the sequence is
cut and whichever rows take a step together.

Who is called here is the C++ class `ostinato._core.Stream`: it takes what is as it should be and
declines the rest, which `_checked` brings into shape or refuses by name.

Legend: T steps, B rows of the stream, n rows of a call, I input, H hidden, O output of a step
(proj_size, or H), L layers.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from ostinato import _core, quantized
from ostinato.cells import CELLS, Cell
from ostinato.numpy import check_array, read_parameters
from ostinato.sizes import Sizes

__all__ = ["Stream"]

Array: TypeAlias = npt.NDArray[Any]
State: TypeAlias = "Array | tuple[Array, ...]"

# What the arrays of a stream are by its dtype, and the engine's number of that (csrc/cpu/engine.h).
_ARRAYS = {"float32": "float32", "float64": "float64", "int8": "float32"}
_NUMBERS = {"float32": 0, "float64": 1}
# Of a layer, in the order of `_core.Stream.load`, where the scales of the weights come last.
_PARTS = "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"
_WEIGHTS = tuple(part for part in _PARTS if part.startswith("weight"))


# Weights, biases and scales by torch's names, without a prefix.
_Arrays: TypeAlias = "dict[str, Array]"


class _Plan(NamedTuple):
    """What a stream is, beside its weights and states."""

    cell: Cell
    layers: int
    sizes: Sizes
    has_biases: bool
    is_int8: bool
    dtype: np.dtype[Any]  # of all but int8 weights

    def parts(self) -> tuple[str, ...]:
        """Return what a layer has of `_PARTS`."""
        plain, biases, projection = _PARTS[:2], _PARTS[2:4], _PARTS[4:]
        return (
            plain
            + (biases if self.has_biases else ())
            + (projection if self.sizes.projection else ())
        )

    def shape(self, part: str, layer: int) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        rows, output = self.cell.gates * self.sizes.hidden, self.sizes.output
        if part == "weight_hr":
            return output, self.sizes.hidden
        if part.startswith("bias"):
            return (rows,)
        is_first = part == "weight_ih" and layer == 0
        return rows, self.sizes.input if is_first else output

    def empty(self) -> _Arrays:
        """Return arrays for all parameters, in the order in which torch has them."""
        found: _Arrays = {}
        for k in range(self.layers):
            for part in self.parts():
                shape, name = self.shape(part, k), f"{part}_l{k}"
                if not (self.is_int8 and part in _WEIGHTS):
                    found[name] = np.empty(shape, self.dtype)
                    continue
                found[name] = np.empty(shape, np.int8)
                found[name + quantized.SUFFIX] = np.empty(shape[:1], np.float32)
        return found


class Stream:
    """Run a stack of recurrent layers step by step, with frozen weights and the states inside.

    h_t = step(x_t, h_(t-1)) in each layer (docs/math.md, equations 2, 7-10, 16-22), x_t of a later
    layer being h_t of the one before it.

    Args:
        kind: "rnn", "gru" or "lstm".
        parameters: arrays or CPU tensors under torch's names, as `ostinato.numpy` takes them:
            weight_ih_l0 (G * H, I), weight_hh_l0 (G * H, O), bias_ih_l0 and bias_hh_l0 (G * H,) or
            neither, weight_hr_l0 (O, H) for a projection, `_l1`, ... for more layers. They are
            copied: what is written to them afterwards does not reach the stream.
        nonlinearity: "tanh" or "relu", for "rnn".
        batch: how many sequences are under way, B; None for one without a dimension of its own.
        dtype: "float32" or "float64", the parameters' own; or "int8": float32 in and out, and
            weights of 8 bits with one scale for each row, made of float32 parameters or given as
            such (int8 under torch's name, their scales (rows,) under `weight_ih_l0_scale`, ...).
        activations: what int8 weights are multiplied with, "int8" (None) or "int16": input and
            state, quantised at each step by the largest number of their row (docs/deploying.md).
            Products are summed exactly; gates and states are float32.
        prefix: what stands before the names in `parameters`, such as "encoder.gru.".

    Calls, with B left out everywhere where batch is None:
        stream(x): one step of (B, I), which returns (B, O), or T steps of (T, B, I), which return
            (T, B, O). x is a NumPy array or a CPU tensor of torch; the output is of the same kind.
        stream.step(x, rows=ids): one step of (n, I) for n of the B sequences. The others stay.
        stream.state: h_n (L, B, O), or (h_n, c_n) with c_n (L, B, H). Read, it is a copy.
        stream.reset(rows=None): zeros for some sequences, or for all.
        stream.load(parameters): other weights of the same sizes. The states stay.

    A stream is for one thread at a time. It can be pickled and copied, with weights and states.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: an unknown kind or dtype, parameters that are missing or too many or of another
            dtype, a second direction.
        RuntimeError: sizes that do not fit; a call while another thread is in one.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> shapes = {"weight_ih_l0": (60, 10), "weight_hh_l0": (60, 20)}
        >>> parameters = {n: rng.standard_normal(s).astype("f4") / 4 for n, s in shapes.items()}
        >>> stream = Stream("gru", parameters)
        >>> x = rng.standard_normal((100, 10)).astype("f4")
        >>> steps = np.stack([stream(frame) for frame in x])
        >>> stream.reset()
        >>> bool((stream(x) == steps).all()), stream.state.shape
        (True, (1, 20))

    Source: torch.nn.RNN, GRU and LSTM.
    """

    __slots__ = (
        *("__weakref__", "_activations", "_batch", "_call", "_core", "_dtype", "_plan", "_prefix"),
        "_step",
    )

    def __init__(
        self,
        kind: str,
        parameters: Mapping[str, Any],
        *,
        nonlinearity: str = "tanh",
        batch: int | None = None,
        dtype: str = "float32",
        activations: str | None = None,
        prefix: str = "",
    ) -> None:
        words = {"kind": kind, "nonlinearity": nonlinearity, "dtype": dtype, "prefix": prefix}
        for name, value in words.items():
            if not isinstance(value, str):
                _reject_type(name, "a str", value)
        cell = _cell_of(kind, nonlinearity)
        if dtype not in _ARRAYS:
            raise ValueError(f"Stream: dtype must be one of {', '.join(_ARRAYS)}, got {dtype!r}")
        activations = quantized.activations_for("Stream", dtype, activations)
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int)):
            _reject_type("batch", "an int or None", batch)
        if batch is not None and batch < 0:
            raise ValueError(f"Stream: batch must not be negative, got {batch}")
        is_int8 = dtype == "int8"
        self._batch, self._dtype, self._prefix = batch, np.dtype(_ARRAYS[dtype]), prefix
        self._activations = activations
        self._plan, weights = _read(cell, parameters, prefix, self._dtype, is_int8)
        sizes = self._plan.sizes
        self._core = _core.Stream(
            cell.number,
            _NUMBERS[_ARRAYS[dtype]],
            quantized.PLANES[activations] if is_int8 else 0,
            (self._plan.layers, self._rows, sizes.input, sizes.hidden, sizes.projection),
            batch is not None,
            np.ndarray,
            np.empty,
            self._dtype,
            _threads,
        )
        self._core.load(_addresses(self._plan, weights))
        self._call, self._step = self._core.call, self._core.step

    @classmethod
    def of(
        cls,
        module: Any,
        *,
        batch: int | None = None,
        dtype: str | None = None,
        activations: str | None = None,
    ) -> Stream:
        """Make a stream of a module, ours, torch.nn's or frozen, with its weights as they are now.

        Args:
            module: an RNN, GRU or LSTM of one direction, or a cell of these, on any device.
                `batch_first` and `dropout` say nothing here: a stream takes steps first, and
                infers. A cell's parameters get the names of a layer's: `weight_ih_l0`.
            batch: how many sequences are under way, or None for one without a dimension of its own.
            dtype: None for the module's own, or "int8" for weights of 8 bits.
            activations: as for a new stream; None for those of a frozen module of 8 bits.

        Raises:
            TypeError: no such module.
            ValueError: a second direction, or a dtype that streams do not have.
        """
        torch = sys.modules.get("torch")
        kind = None if torch is None else _kind_of(module, torch.nn)
        if kind is None:
            expected = "an RNN, GRU or LSTM of ostinato.nn or torch.nn, or a cell of these"
            _reject_type("module", expected, module)
        _let_read_tensors()
        parameters = _parameters_of(module)
        if dtype is None:
            dtype = str(parameters["weight_ih_l0"].dtype).removeprefix("torch.")
        if activations is None and f"weight_ih_l0{quantized.SUFFIX}" in parameters:
            activations = module.setting.activations
        return cls(kind, parameters, batch=batch, dtype=dtype, activations=activations)

    def __call__(self, x: Any) -> Any:
        """Take one step, or many, of all sequences."""
        y = self._call(x)
        return self._checked(x, None, False) if y is None else y

    def step(self, x: Any, *, rows: Any = None) -> Any:
        """Take one step of all sequences, or of some.

        Args:
            x: (n, I) for n rows, or (B, I), or (I,) where batch is None.
            rows: which sequences, whole numbers from 0 to B - 1, each once; None for all.

        Returns:
            (n, O), in the order of `rows`.
        """
        y = self._step(x, rows)
        return self._checked(x, rows, True) if y is None else y

    @property
    def state(self) -> State:
        """Return h_n, (L, B, O), or (h_n, c_n) with c_n (L, B, H); to be set as well.

        Without a batch B is left out. None sets zeros.
        """
        arrays = [np.empty(shape, self._dtype) for shape in self._state_shapes()]
        self._core.read_state(*_two_addresses(arrays))
        h_n, *others = (a if self._batch is not None else a[:, 0] for a in arrays)
        return (h_n, *others) if others else h_n

    @state.setter
    def state(self, state: Any) -> None:
        if state is None:
            self.reset()
            return
        names = tuple(f"{name}_n" for name in self._plan.cell.states)
        if not self._plan.cell.has_c:
            state = (state,)
        elif not isinstance(state, (tuple, list)) or len(state) != len(names):
            got = f"{len(state)} of them" if isinstance(state, (tuple, list)) else type(state)
            raise TypeError(f"Stream: state must be a tuple of {' and '.join(names)}, got {got}")
        arrays = []
        for name, value, shape in zip(names, state, self._state_shapes(), strict=True):
            array = self._array(name, value)
            expected = shape if self._batch is not None else (shape[0], *shape[2:])
            if array.shape != expected:
                raise RuntimeError(f"Stream: {name}: expected shape {expected}, got {array.shape}")
            arrays.append(_dense(array))
        self._core.write_state(*_two_addresses(arrays))

    def reset(self, rows: Any = None) -> None:
        """Let some sequences begin anew, from zeros; None for all of them."""
        if rows is None:
            self._core.reset(0, 0)
            return
        ids = self._ids(rows)
        self._core.reset(ids.ctypes.data, len(ids))

    def load(self, parameters: Mapping[str, Any], *, prefix: str | None = None) -> None:
        """Exchange the weights for others of the same names, sizes and dtype; the states stay.

        Args:
            parameters: as for a new stream. What is wrong with them leaves the stream as it is.
            prefix: what stands before the names; None for the prefix of the stream.
        """
        prefix = self._prefix if prefix is None else prefix
        plan, weights = _read(self._plan.cell, parameters, prefix, self._dtype, self._plan.is_int8)
        if plan != self._plan:
            raise RuntimeError(
                f"Stream: expected parameters of the stream's own sizes, {_described(self._plan)}, "
                f"got {_described(plan)}"
            )
        self._core.load(_addresses(plan, weights))

    @property
    def parameters(self) -> dict[str, Array]:
        """Return copies of the weights, under the names that they came with.

        Those of 8 bits are int8, with their scales beside them: `weight_ih_l0_scale`.
        """
        found = self._plan.empty()
        self._core.save(_addresses(self._plan, found))
        return {self._prefix + name: array for name, array in found.items()}

    @property
    def nbytes(self) -> int:
        """Return the memory of weights and states, in bytes."""
        return int(self._core.bytes)

    def __repr__(self) -> str:
        batch = f", batch={self._batch}" if self._batch is not None else ""
        options = f", dtype={self._dtype_name!r}"
        options += f", activations={self._activations!r}" * self._plan.is_int8
        return f"Stream({_described(self._plan)}{batch}{options})"

    def __reduce__(self) -> tuple[Any, ...]:
        options = {"batch": self._batch, "dtype": self._dtype_name, "prefix": self._prefix}
        if self._plan.is_int8:
            options["activations"] = self._activations
        return _restored, (type(self), self._plan.cell.name, self.parameters, options, self.state)

    # ---- what the fast path declined ----

    def _checked(self, x: Any, rows: Any, is_step: bool) -> Any:
        """Run a call after every check, on dense copies where need be."""
        ids = None if rows is None else self._ids(rows)
        is_tensor = _is_tensor(x)
        if is_tensor:
            _let_read_tensors()
            _check_tensor(x)
        array = self._array("x", x)
        least = 1 if self._batch is None else 2
        dims = (least,) if is_step else (least, least + 1)
        if array.ndim not in dims:
            what = "(I,)" if self._batch is None else "(B, I)"
            many = "" if is_step else " or (T, I)" if self._batch is None else " or (T, B, I)"
            raise RuntimeError(f"Stream: x: expected {what}{many}, got {array.ndim}D")
        if array.shape[-1] != self._plan.sizes.input:
            raise RuntimeError(
                f"Stream: x: expected rows of {self._plan.sizes.input} numbers, "
                f"got {array.shape[-1]}"
            )
        count = self._rows if ids is None else len(ids)
        if self._batch is not None and array.shape[-2] != count:
            what = "the batch" if ids is None else "the number of rows"
            raise RuntimeError(f"Stream: x: expected {count} rows, {what}, got {array.shape[-2]}")
        steps = array.shape[0] if array.ndim > least else 1
        dense = _dense(array)
        output = np.empty((*array.shape[:-1], self._plan.sizes.output), self._dtype)
        at = 0 if ids is None else ids.ctypes.data
        self._core.run(dense.ctypes.data, output.ctypes.data, steps, count, at, _threads())
        return sys.modules["torch"].from_numpy(output) if is_tensor else output

    @property
    def _dtype_name(self) -> str:
        return "int8" if self._plan.is_int8 else self._dtype.name

    @property
    def _rows(self) -> int:
        return 1 if self._batch is None else self._batch

    def _state_shapes(self) -> list[tuple[int, ...]]:
        sizes = self._plan.sizes
        widths = (sizes.output, sizes.hidden)[: len(self._plan.cell.states)]
        return [(self._plan.layers, self._rows, width) for width in widths]

    def _array(self, name: str, value: Any) -> Array:
        array = _to_array(name, value)
        if array.dtype != self._dtype:
            raise ValueError(
                f"Stream: {name}: expected the dtype of the stream, {self._dtype}, "
                f"got {array.dtype}"
            )
        return array

    def _ids(self, rows: Any) -> Array:
        if self._batch is None:
            raise ValueError("Stream: rows: expected None, since the stream has no batch")
        if _is_tensor(rows):
            rows = rows.detach().cpu().numpy()
        given = np.asarray(rows)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise TypeError(
                f"Stream: rows: expected a 1D sequence of whole numbers, "
                f"got {given.ndim}D of {given.dtype}"
            )
        return _dense(given.astype(np.int64))


def _restored(
    cls: type[Stream], kind: str, parameters: Mapping[str, Array], options: Any, state: State
) -> Stream:
    """Make what was pickled or copied."""
    stream = cls(kind, parameters, **options)
    stream.state = state
    return stream


def _cell_of(kind: str, nonlinearity: str) -> Cell:
    """Return the cell of a kind: its own name, or the name of its layer."""
    if kind in CELLS:
        return CELLS[kind]
    kinds: dict[Any, list[Cell]] = {}
    for cell in CELLS.values():
        kinds.setdefault(cell.layer.lower(), []).append(cell)
    if kind not in kinds:
        raise ValueError(
            f"Stream: kind must be one of {', '.join(kinds)}, got {kind!r}; a cell of one's "
            "own has no stream"
        )
    found = {cell.name.partition("_")[2]: cell for cell in kinds[kind]}
    if len(found) == 1:
        return next(iter(found.values()))
    if nonlinearity not in found:
        raise ValueError(
            f"Stream: nonlinearity must be one of {', '.join(found)}, got {nonlinearity!r}"
        )
    return found[nonlinearity]


def _kind_of(module: Any, torch_nn: Any) -> str | None:
    """Return the kind of a module of torch's or of one derived from it, if it has one."""
    if isinstance(module, torch_nn.RNNBase):
        return str(module.mode.lower())
    # By the names of its classes: the cells of ostinato.nn are no subclasses of torch.nn's.
    names = {base.__name__ for base in type(module).__mro__}
    for cell in CELLS.values():
        if isinstance(module, torch_nn.RNNCellBase) and f"{cell.layer}Cell" in names:
            nonlinearity = getattr(module, "nonlinearity", "")
            return _cell_of(cell.layer.lower(), nonlinearity).name
    return None


def _parameters_of(module: Any) -> dict[str, Any]:
    """Return a module's parameters under a layer's names."""
    names = {f"{part}_l0": part for part in _PARTS}
    if hasattr(module, "_flat_weights_names"):
        names = {name: name for name in module._flat_weights_names}
    # Not named_parameters(): a weight may be computed from others (torch.nn.utils.parametrize).
    found = {name: getattr(module, own, None) for name, own in names.items()}
    # What ostinato.freeze made has scales beside weights of 8 bits.
    for name, own in names.items():
        found[name + quantized.SUFFIX] = module._buffers.get(own + quantized.SUFFIX)
    return {name: array for name, array in found.items() if array is not None}


def _read(
    cell: Cell,
    parameters: Mapping[str, Any],
    prefix: str,
    dtype: np.dtype[Any],
    is_int8: bool,
) -> tuple[_Plan, _Arrays]:
    """Check the parameters by name; return what they make, and them."""
    if not is_int8:
        _reject_int8(parameters, prefix)
    given, scales = quantized.split(parameters) if is_int8 else (parameters, {})
    found: _Arrays = {}

    def convert(name: str, value: Any) -> Array:
        array = found[name] = _to_array(name, value)
        # What is wrong with its shape is said of int8 as of float.
        is_weight = name.removeprefix(prefix).startswith("weight")
        return array.astype(dtype) if is_int8 and is_weight and array.dtype == np.int8 else array

    names, call, sizes = read_parameters("Stream", cell.name, given, prefix, convert)
    if sizes.directions > 1:
        raise ValueError(
            f"Stream: expected one direction, got {names[len(names) // call.layers // 2]!r}: the "
            "reverse direction begins at the last step, which a stream never knows"
        )
    for name, weight in zip(names, call.weights, strict=True):
        if weight.dtype != dtype:
            raise ValueError(
                f"Stream: {name}: expected dtype {dtype}, got {weight.dtype}; "
                f"pass dtype={weight.dtype.name!r} or convert the parameters"
            )
    sizes = sizes._replace(steps=0, rows=0, batch=0)
    plan = _Plan(cell, call.layers, sizes, call.has_biases, is_int8, dtype)
    arrays: _Arrays = {}
    for name, weight in found.items():
        plain = name.removeprefix(prefix)
        if not (is_int8 and plain.startswith("weight")):
            arrays[plain] = _dense(weight)
            continue
        made = _quantised(name, weight, scales.get(name))
        arrays[plain], arrays[plain + quantized.SUFFIX] = map(_dense, made)
    return plan, arrays


def _reject_int8(parameters: Any, prefix: str) -> None:
    """Say how weights of 8 bits are given; all else is said of them as of any array."""
    name = f"{prefix}weight_ih_l0"
    weight = parameters.get(name) if isinstance(parameters, Mapping) else None
    if str(getattr(weight, "dtype", "")).removeprefix("torch.") == "int8":
        raise ValueError(f"Stream: {name}: expected floats, got int8; pass dtype='int8'")


def _quantised(name: str, weight: Array, scales: Any) -> quantized.Quantized:
    if weight.dtype == np.int8:
        return quantized.checked("Stream", name, weight, _to_plain(scales))
    if scales is not None:
        raise ValueError(f"Stream: {name}: expected int8 beside its scales, got {weight.dtype}")
    return quantized.quantise(f"Stream: {name}", weight)


def _described(plan: _Plan) -> str:
    """Write what a stream is."""
    sizes = plan.sizes
    words = [repr(plan.cell.name), f"input {sizes.input}", f"hidden {sizes.hidden}"]
    words += [f"projection {sizes.projection}"] * (sizes.projection > 0)
    words += [f"{plan.layers} layers"] * (plan.layers > 1)
    return ", ".join(words + ["no biases"] * (not plan.has_biases))


def _addresses(plan: _Plan, arrays: _Arrays) -> list[int]:
    """Return the addresses of the arrays, 0 for what a layer does not have."""
    ends = [f"{part}_l{{}}" for part in _PARTS]
    ends += [f"{part}_l{{}}{quantized.SUFFIX}" for part in _WEIGHTS]
    found = [arrays.get(end.format(k)) for k in range(plan.layers) for end in ends]
    return [0 if array is None else array.ctypes.data for array in found]


def _two_addresses(arrays: Sequence[Array]) -> tuple[int, int]:
    h, c = (*(array.ctypes.data for array in arrays), 0)[:2]
    return h, c


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _let_read_tensors() -> None:
    """Open the fast path for tensors, which takes an import of torch: whoever has one has that."""
    importlib.import_module("ostinato.plain")


def _check_tensor(x: Any) -> None:
    """Refuse a tensor whose output would not be what torch's users expect."""
    if x.requires_grad and sys.modules["torch"].is_grad_enabled():
        raise RuntimeError(
            "Stream: x: expected a tensor that needs no gradient, since a stream only infers; "
            "call it under torch.no_grad() or pass x.detach()"
        )
    if x.device.type != "cpu":
        raise RuntimeError(f"Stream: x: expected a tensor on the CPU, got one on {x.device}")


def _to_array(name: str, value: Any) -> Array:
    """Return a NumPy array for an array or a tensor."""
    if _is_tensor(value):
        torch = sys.modules["torch"]
        if value.dtype not in (torch.float32, torch.float64, torch.int8):
            expected = "float32, float64 or, with dtype='int8', int8"
            raise ValueError(f"Stream: {name}: expected {expected}, got {value.dtype}")
        value = _to_plain(value)
    if not (isinstance(value, np.ndarray) and value.dtype == np.int8):
        check_array("Stream", name, value)
    array: Array = value
    return array


def _to_plain(value: Any) -> Any:
    """Return a tensor as an array, and anything else as it is."""
    return value.detach().cpu().numpy() if _is_tensor(value) else value


def _reject_type(argument: str, expected: str, got: object) -> NoReturn:
    raise TypeError(f"Stream: {argument} must be {expected}, got {type(got).__name__}")


def _dense(array: Array) -> Array:
    if array.flags.c_contiguous and array.flags.aligned:
        return array
    return np.array(array, order="C")


def _threads() -> int:
    """Return how many threads a long call may take: torch's number where torch is in use."""
    torch = sys.modules.get("torch")
    if _core.forced_threads:
        return _core.forced_threads
    return torch.get_num_threads() if torch is not None else len(os.sched_getaffinity(0))
