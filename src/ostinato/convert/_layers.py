"""Layers between two libraries: one direction's weights in torch's order, named and read.

Legend: I input, H hidden, D directions, G gates (1 RNN, 3 GRU, 4 LSTM).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ostinato.cells import LAYERS, Cell
from ostinato.numpy import is_of_layer, read

Array: TypeAlias = npt.NDArray[Any]

# By the number of gates.
_BY_GATES = {cell.gates: cell for cell in LAYERS.values()}


class Direction(NamedTuple):
    """The weights of one direction of one layer, in torch's order of gates."""

    weight_ih: Array  # (G * H, I)
    weight_hh: Array  # (G * H, H)
    bias_ih: Array | None  # (G * H,), or None as bias_hh
    bias_hh: Array | None

    @property
    def hidden(self) -> int:
        """H."""
        return int(self.weight_hh.shape[1])

    @property
    def cell(self) -> Cell:
        """The record of the cell that has so many gates."""
        return _BY_GATES[len(self.weight_hh) // self.hidden]


def array_of(name: str, given: object) -> Array:
    """Return what was given as a NumPy array of floating-point numbers.

    Raises:
        TypeError: NumPy makes no array of it.
        ValueError: an array of another kind of numbers.
    """
    # NumPy would drop a mask.
    if given is None or isinstance(given, (str, bytes, Mapping, np.ma.MaskedArray)):
        raise TypeError(f"{name}: expected an array, got {type(given).__name__}")
    try:
        array = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected an array, got {type(given).__name__}: {error}") from None
    # NumPy has bfloat16 from elsewhere, and counts it among no kind of numbers.
    if array.dtype.kind not in "fc" and array.dtype.name != "bfloat16":
        raise ValueError(f"{name}: expected a floating dtype, got {array.dtype}")
    return array


def check_prefix(function: str, prefix: object) -> None:
    """Refuse a prefix that is no str."""
    if not isinstance(prefix, str):
        raise TypeError(f"{function}: prefix must be a str, got {type(prefix).__name__}")


def check_shape(name: str, array: Array, expected: tuple[int, ...], words: str) -> None:
    """Refuse an array of another shape; `words` spell the expected one in sizes."""
    if array.shape != expected:
        raise ValueError(f"{name}: expected {words} = {expected}, got {array.shape}")


def cell_of_columns(name: str, recurrent: Array) -> Cell:
    """Return the record of the cell whose recurrent kernel (H, G * H) this is."""
    shape = recurrent.shape
    hidden = shape[0] if recurrent.ndim == 2 else 0
    gates, rest = divmod(shape[1], hidden) if hidden else (0, 0)
    if rest or gates not in _BY_GATES:
        known = ", ".join(f"{gates} * H for {cell.layer}" for gates, cell in _BY_GATES.items())
        raise ValueError(f"{name}: expected (H, G * H), that is {known}, got {shape}")
    return _BY_GATES[gates]


def in_order(weight: Array, gates: Sequence[int]) -> Array:
    """Take the gates of a weight or bias, (G * H, ...), in this order."""
    parts = weight.reshape(len(gates), -1, *weight.shape[1:])
    return parts[list(gates)].reshape(weight.shape)


def of_other_order(
    gates: Sequence[int],
    weight_ih: Array,
    weight_hh: Array,
    bias_ih: Array | None = None,
    bias_hh: Array | None = None,
) -> Direction:
    """Undo `in_order`: `gates` are our gates, in the order in which these weights have them."""
    ours = [gates.index(gate) for gate in range(len(gates))]
    return Direction(
        in_order(weight_ih, ours),
        in_order(weight_hh, ours),
        None if bias_ih is None else in_order(bias_ih, ours),
        None if bias_hh is None else in_order(bias_hh, ours),
    )


def with_names(
    function: str, layers: Sequence[Sequence[Direction]], prefix: str
) -> dict[str, Array]:
    """Return a stack's weights under torch's names, as arrays of their own.

    Raises:
        ValueError: the layers are not those of one module of torch's.
    """
    first = layers[0][0]
    count = len(layers[0])
    size = int(first.weight_ih.shape[1])
    found: dict[str, Array] = {}
    for (k, layer), way in itertools.product(enumerate(layers), range(count)):
        if len(layer) != count:
            raise ValueError(f"{function}: layer {k}: expected D = {count}, got {len(layer)}")
        each = layer[way]
        where = f"{function}: layer {k}" + (", reverse" if way else "")
        for what, expected, got in (
            ("cell", first.cell.layer, each.cell.layer),
            ("hidden size", first.hidden, each.hidden),
            ("biases", first.bias_ih is not None, each.bias_ih is not None),
            ("input size", size if k == 0 else count * first.hidden, each.weight_ih.shape[1]),
        ):
            if got != expected:
                raise ValueError(
                    f"{where}: expected the {what} {expected}, as one module of torch's has it, "
                    f"got {got}; convert layers that are no stack one by one"
                )
        for name, weight in each._asdict().items():
            if weight is None:
                continue
            if weight.dtype != first.weight_ih.dtype:
                raise ValueError(
                    f"{where}: {name}: expected {first.weight_ih.dtype}, got {weight.dtype}"
                )
            # A copy: torch.from_numpy wants memory that may be written.
            found[f"{prefix}{name}_l{k}{'_reverse' if way else ''}"] = np.array(weight, order="C")
    return found


def of_names(
    function: str, library: str, parameters: Mapping[str, Any], prefix: str
) -> tuple[Cell, list[list[Direction]]]:
    """Read the weights of a module of torch's: its cell, and the directions of each layer.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: names that are missing or too many, other dtypes.
        RuntimeError: sizes that do not fit.
        NotImplementedError: a projection.
    """
    if not isinstance(parameters, Mapping):
        kind = type(parameters).__name__
        raise TypeError(f"{function}: parameters must be a mapping of names to arrays, got {kind}")
    check_prefix(function, prefix)
    arrays = {
        str(name): array_of(f"{function}: {name}", given)
        for name, given in parameters.items()
        if is_of_layer(str(name), prefix)
    }
    for name in arrays:
        if name.startswith(f"{prefix}weight_hr"):
            raise NotImplementedError(
                f"{function}: {name}: {library} has no projection (proj_size)"
            )
    dtypes = {array.dtype: name for name, array in arrays.items()}
    if len(dtypes) > 1:
        (dtype, name), (other, another), *_ = dtypes.items()
        raise ValueError(f"{function}: {another}: expected {dtype} as {name}, got {other}")
    name = f"{prefix}weight_hh_l0"
    # Without it, any record: what is missing is said below.
    cell = cell_of_columns(f"{function}: {name}.T", arrays[name].T) if name in arrays else None
    any_cell = cell or LAYERS["gru"]
    weights, has_biases, ways = read(function, any_cell.name, {**parameters, **arrays}, prefix)
    assert cell is not None
    size = 4 if has_biases else 2
    each = [
        Direction(*weights[first : first + size], *([None] * (4 - size)))
        for first in range(0, len(weights), size)
    ]
    return cell, [each[first : first + ways] for first in range(0, len(each), ways)]
