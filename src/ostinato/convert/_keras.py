"""Keras: the arrays of get_weights() and set_weights.

Legend: I input, H hidden, D directions, G gates (1 SimpleRNN, 3 GRU, 4 LSTM).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ostinato.cells import Cell
from ostinato.convert._layers import (
    Array,
    Direction,
    array_of,
    cell_of_columns,
    check_prefix,
    check_shape,
    in_order,
    of_names,
    of_other_order,
    with_names,
)

# With one bias, a GRU of Keras's has reset_after=False.
_RESET_BEFORE = (
    "a GRU with reset_after=False, which multiplies r with h before the product with W_hn; torch's "
    "multiplies r with (W_hn h + b_hn), and no weights make one compute the other"
)


def from_keras(
    weights: Sequence[Any], *, bidirectional: bool = False, prefix: str = ""
) -> dict[str, Array]:
    """Bring weights of Keras's SimpleRNN, GRU and LSTM to torch's names and order.

    kernel (I, G * H) becomes weight_ih (G * H, I), recurrent_kernel weight_hh; a GRU's gates
    z, r, h become r, z, n. The one bias of a SimpleRNN or LSTM becomes bias_ih, and bias_hh is
    zeros; a GRU has both, (2, 3 * H).

    The arrays do not say which activations a layer has: these must be Keras's defaults, or relu of
    a SimpleRNN, which runs with `nonlinearity="relu"`. Nor, for a GRU with use_bias=False, whether
    reset_after is True, as it must be.

    Args:
        weights: what `layer.get_weights()` returns, or that of a cell: kernel, recurrent_kernel
            and, with biases, bias. A list of such lists is a stack, whose layers have one size.
        bidirectional: whether they are those of `Bidirectional`: the same once more, for the
            reverse direction. Its merge_mode must be "concat".
        prefix: what to put before the names, such as "encoder.".

    Returns:
        New arrays for `load_state_dict` (by `torch.from_numpy`) and `ostinato.numpy`: weight_ih_l0
        (G * H, I), weight_hh_l0 (G * H, H), bias_ih_l0 and bias_hh_l0 (G * H,), `_l1`, ... for more
        layers, `_reverse` after each name for a second direction.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: more or fewer arrays, another shape, no floating dtype, or layers that are no
            stack of torch's.
        NotImplementedError: a GRU with reset_after=False.

    Example:
        >>> import numpy as np
        >>> gru = [np.zeros((10, 60)), np.zeros((20, 60)), np.zeros((2, 60))]
        >>> for name, array in from_keras(gru).items():
        ...     print(name, array.shape)
        weight_ih_l0 (60, 10)
        weight_hh_l0 (60, 20)
        bias_ih_l0 (60,)
        bias_hh_l0 (60,)

    Source: keras.layers.SimpleRNN, GRU, LSTM and Bidirectional of Keras 3.
    """
    check_prefix("from_keras", prefix)
    if not isinstance(bidirectional, bool):
        kind = type(bidirectional).__name__
        raise TypeError(f"from_keras: bidirectional must be a bool, got {kind}")
    _check_list("weights", weights)
    is_stack = all(isinstance(each, (list, tuple)) for each in weights) and len(weights) > 0
    layers = [
        _layer(f"weights[{k}]" if is_stack else "weights", each, 2 if bidirectional else 1)
        for k, each in enumerate(weights if is_stack else [weights])
    ]
    return with_names("from_keras", layers, prefix)


def to_keras(parameters: Mapping[str, Any], *, prefix: str = "") -> list[list[Array]]:
    """Bring a module's weights from torch's names and order to Keras's.

    As `from_keras`, backwards. The two biases of an RNN or LSTM become their sum.

    Args:
        parameters: arrays under torch's names, such as a `state_dict`: those of `ostinato.numpy`.
            Other names are ignored.
        prefix: what stands before the names in `parameters`, such as "encoder.".

    Returns:
        For each layer the arrays that `set_weights` takes: kernel (I, G * H), recurrent_kernel
        (H, G * H) and, with biases, bias, (2, 3 * H) for a GRU, (G * H,) otherwise; with two
        directions then those of the reverse one, as `Bidirectional` has them. Without biases the
        layers want use_bias=False.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: parameters that are missing or too many, or no weights of an RNN, GRU or LSTM.
        RuntimeError: sizes that do not fit.
        NotImplementedError: an LSTM with a projection.

    Example:
        >>> import numpy as np
        >>> lstm = {"weight_ih_l0": np.zeros((80, 10)), "weight_hh_l0": np.zeros((80, 20))}
        >>> [[array.shape for array in layer] for layer in to_keras(lstm)]
        [[(10, 80), (20, 80)]]

    Source: keras.layers.SimpleRNN, GRU, LSTM and Bidirectional of Keras 3.
    """
    cell, layers = of_names("to_keras", "Keras", parameters, prefix)
    return [[array for each in layer for array in _arrays(each, cell)] for layer in layers]


def _has_two_biases(cell: Cell) -> bool:
    """Whether a gate takes the products with input and h apart, each with its bias."""
    return cell.grads > cell.gates


def _arrays(each: Direction, cell: Cell) -> list[Array]:
    """Return what Keras has of one direction, as arrays of their own."""
    found = [
        weight.T for weight in (in_order(w, cell.keras) for w in (each.weight_ih, each.weight_hh))
    ]
    if each.bias_ih is not None and each.bias_hh is not None:
        pair = [in_order(bias, cell.keras) for bias in (each.bias_ih, each.bias_hh)]
        found.append(np.stack(pair) if _has_two_biases(cell) else pair[0] + pair[1])
    return [np.array(array, order="C") for array in found]


def _check_list(name: str, given: object) -> None:
    if not isinstance(given, (list, tuple)):
        raise TypeError(
            f"from_keras: {name} must be a list of arrays, as get_weights() returns, "
            f"got {type(given).__name__}"
        )


def _layer(name: str, arrays: Sequence[Any], directions: int) -> list[Direction]:
    count, rest = divmod(len(arrays), directions)
    if rest or count not in (2, 3):
        layer, other = ("a layer in one direction", "True for Bidirectional")
        if directions == 2:
            layer, other = ("Bidirectional", "False for a layer in one direction")
        raise ValueError(
            f"from_keras: {name}: expected {2 * directions} or {3 * directions} arrays of {layer}, "
            f"got {len(arrays)}; bidirectional is {other}, and a stack is a list of lists"
        )
    starts = range(0, len(arrays), count)
    return [_direction(name, start, arrays[start : start + count]) for start in starts]


def _direction(name: str, start: int, given: Sequence[Any]) -> Direction:
    words = ("kernel", "recurrent_kernel", "bias")
    names = [f"from_keras: {name}[{start + i}] ({word})" for i, word in enumerate(words)]
    kernel, recurrent, *biases = map(array_of, names, given)
    cell = cell_of_columns(names[1], recurrent)
    columns = recurrent.shape[1]
    if kernel.ndim != 2 or kernel.shape[1] != columns:
        raise ValueError(f"{names[0]}: expected (I, G * H) = (I, {columns}), got {kernel.shape}")
    pair: list[Array | None] = [None, None]
    for bias in biases:
        if not _has_two_biases(cell):
            check_shape(names[2], bias, (columns,), "(G * H,)")
            pair = [bias, np.zeros_like(bias)]
        elif bias.shape == (columns,):
            raise NotImplementedError(
                f"{names[2]}: expected (2, 3 * H), got (3 * H,): {_RESET_BEFORE}"
            )
        else:
            check_shape(names[2], bias, (2, columns), "(2, 3 * H)")
            pair = list(bias)
    return of_other_order(cell.keras, kernel.T, recurrent.T, *pair)
