"""Flax: parameters of the cells of linen and nnx.

Legend: I input, H hidden, D directions, G gates (1 SimpleCell, 3 GRUCell, 4 LSTMCell).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ostinato.cells import CELLS
from ostinato.convert._layers import (
    Array,
    Direction,
    array_of,
    cell_of_columns,
    check_prefix,
    check_shape,
    with_names,
)

# What holds a cell, or all parameters, and nothing else.
_HOLDERS = ({"params"}, {"cell"})
_DIRECTIONS = ("forward_rnn", "backward_rnn")
# One kernel for all gates.
_JOINED = ("dense_i", "dense_h")
# What a cell's mapping holds, in our order: a dense for each gate, or these.
_DENSES = [
    _JOINED,
    *dict.fromkeys(
        tuple(side + letter for side in "ih" for letter in cell.letters or ("",))
        for cell in CELLS.values()
    ),
]


def from_flax(params: Any, *, prefix: str = "") -> dict[str, Array]:
    """Bring parameters of Flax's cells to torch's names and order.

    Both libraries of Flax: linen's SimpleCell, GRUCell, LSTMCell and OptimizedLSTMCell, nnx's of
    the same names. A kernel (I, H) of a gate becomes rows of weight_ih, gates in the order r, z, n
    and i, f, g, o; where nnx has all gates in one kernel, they already stand in this order.

    Flax has one bias where two would add up. Its place is kept, and the other bias is zeros:
    bias_hh in a SimpleCell and in the gates r and z of a GRU, bias_ih in an LSTM. Of gate n,
    linen's GRUCell has both, and nnx's has no bias_hh, which is then zeros, too.

    The arrays do not say which activations a cell has, which must be Flax's defaults (or relu of a
    SimpleCell, which runs with `nonlinearity="relu"`), nor whether a SimpleCell has residual=True,
    as it must not.

    Args:
        params: what `init` returns in linen, `nnx.state(cell, nnx.Param)` in nnx, or the part of it
            that is one cell, one RNN or one Bidirectional. Nested mappings; their arrays are what
            np.asarray takes. A list of these is a stack, whose layers have one size.
        prefix: what to put before the names, such as "encoder.".

    Returns:
        New arrays for `load_state_dict` (by `torch.from_numpy`) and `ostinato.numpy`: weight_ih_l0
        (G * H, I), weight_hh_l0 (G * H, H), bias_ih_l0 and bias_hh_l0 (G * H,), `_l1`, ... for more
        layers, `_reverse` after each name for a second direction.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: other names than those of these cells, another shape, no floating dtype, or
            layers that are no stack of torch's.

    Example:
        >>> import numpy as np
        >>> simple = {"i": {"kernel": np.zeros((3, 4)), "bias": np.ones(4)},
        ...           "h": {"kernel": np.zeros((4, 4))}}
        >>> weights = from_flax({"params": simple})
        >>> weights["bias_ih_l0"].tolist(), weights["bias_hh_l0"].tolist()
        ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0])

    Source: flax.linen and flax.nnx, their recurrent.py: SimpleCell, GRUCell, LSTMCell,
    OptimizedLSTMCell, RNN and Bidirectional.
    """
    check_prefix("from_flax", prefix)
    stack = params if isinstance(params, (list, tuple)) else [params]
    if not stack:
        raise ValueError("from_flax: params: expected a cell's parameters, got an empty list")
    names = [f"params[{k}]" if stack is params else "params" for k in range(len(stack))]
    layers = [_layer(f"from_flax: {name}", each) for name, each in zip(names, stack, strict=True)]
    return with_names("from_flax", layers, prefix)


def _layer(name: str, params: Any) -> list[Direction]:
    name, params = _held(name, params)
    if set(params) == set(_DIRECTIONS):
        return [_direction(*_held(f"{name}[{way!r}]", params[way])) for way in _DIRECTIONS]
    return [_direction(name, params)]


def _held(name: str, params: Any) -> tuple[str, Mapping[str, Any]]:
    """Return a mapping without what merely holds it."""
    _check_mapping(name, params)
    while set(params) in _HOLDERS:
        ((holder, params),) = params.items()
        name = f"{name}[{holder!r}]"
        _check_mapping(name, params)
    return name, params


def _check_mapping(name: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{name}: expected a mapping, got {type(given).__name__}")


def _direction(name: str, params: Mapping[str, Any]) -> Direction:
    """Read one cell, whose denses are named after gates, or joined."""
    # A word of Python's is no attribute in nnx.
    named = {str(key).removesuffix("_"): key for key in params}
    denses = next((each for each in _DENSES if set(each) == set(named)), None)
    if denses is None or len(named) != len(params):
        cells = "; ".join(map(" ".join, _DENSES))
        raise ValueError(f"{name}: expected the names of one cell ({cells}), got {list(params)}")
    read = [_dense(f"{name}[{named[dense]!r}]", params[named[dense]]) for dense in denses]
    half = len(read) // 2
    if denses is not _JOINED:
        hidden = read[-1][0].shape[1]
        for dense, (weight, _) in zip(denses, read, strict=True):
            if len(weight) != hidden:
                raise ValueError(
                    f"{name}[{named[dense]!r}]['kernel']: expected (inputs, H) = "
                    f"({weight.shape[1]}, {hidden}), got {weight.T.shape}"
                )
    weight_ih, bias_ih = _stacked(name, read[:half])
    weight_hh, bias_hh = _stacked(name, read[half:])
    cell_of_columns(f"{name}: kernels of h", weight_hh.T)
    if weight_ih.shape[0] != weight_hh.shape[0]:
        raise ValueError(
            f"{name}: kernels of the input: expected (I, G * H) = (I, {len(weight_hh)}), "
            f"got {weight_ih.T.shape}"
        )
    if bias_ih is None and bias_hh is None:
        return Direction(weight_ih, weight_hh, None, None)
    zeros = np.zeros(len(weight_hh), weight_hh.dtype)
    return Direction(
        weight_ih,
        weight_hh,
        zeros if bias_ih is None else bias_ih,
        zeros if bias_hh is None else bias_hh,
    )


def _dense(name: str, params: Any) -> tuple[Array, Array | None]:
    """Return a dense's kernel, transposed, and its bias."""
    _check_mapping(name, params)
    if not {"kernel"} <= set(params) <= {"kernel", "bias"}:
        raise ValueError(f"{name}: expected kernel and perhaps bias, got {list(params)}")
    kernel = array_of(f"{name}['kernel']", params["kernel"])
    if kernel.ndim != 2:
        raise ValueError(f"{name}['kernel']: expected (inputs, outputs), got {kernel.shape}")
    # Flax has None under a name that is not used.
    if params.get("bias") is None:
        return kernel.T, None
    bias = array_of(f"{name}['bias']", params["bias"])
    check_shape(f"{name}['bias']", bias, kernel.shape[1:], "(outputs,)")
    return kernel.T, bias


def _stacked(name: str, denses: Sequence[tuple[Array, Array | None]]) -> tuple[Array, Array | None]:
    """Return the weights of gates as one, and their biases, with zeros where a gate has none."""
    weights = [weight for weight, _ in denses]
    if len({weight.shape for weight in weights}) > 1:
        shapes = ", ".join(str(weight.T.shape) for weight in weights)
        raise ValueError(f"{name}: expected kernels of one shape, got {shapes}")
    if all(bias is None for _, bias in denses):
        return np.concatenate(weights), None
    biases = [
        np.zeros(len(weight), weight.dtype) if bias is None else bias for weight, bias in denses
    ]
    return np.concatenate(weights), np.concatenate(biases)
