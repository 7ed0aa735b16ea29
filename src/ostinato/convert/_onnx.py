"""ONNX: the weights of RNN, GRU and LSTM nodes.

Legend: I input, H hidden, D directions, G gates (1 RNN, 3 GRU, 4 LSTM).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ostinato.cells import CELLS, Cell, Onnx
from ostinato.convert._layers import (
    Array,
    Direction,
    array_of,
    check_prefix,
    check_shape,
    in_order,
    of_names,
    of_other_order,
    with_names,
)

# Those that ONNX has an operator for.
_CELLS = [cell for cell in CELLS.values() if cell.onnx]
# Inputs of a node, by their places. The others are no weights.
_WEIGHTS = {1: "W", 2: "R", 3: "B", 7: "P"}
# Fields of an AttributeProto, by the number of its type.
_FIELDS = {1: "f", 2: "i", 3: "s", 6: "floats", 7: "ints", 8: "strings"}
_DIRECTIONS = {"forward": 1, "bidirectional": 2}
# Attributes that change what a node computes, and what they are where they change nothing.
_NEUTRAL = {"input_forget": 0, "clip": 0.0}
# All others that are known, which are read by themselves or say nothing of the weights.
_KNOWN = {
    *("direction", "hidden_size", "layout", "output_sequence"),
    *("activations", "activation_alpha", "activation_beta"),
    *_NEUTRAL,
}
_WHY = {
    "linear_before_reset": "torch's GRU multiplies r with (W_hn h + b_hn), and no weights make one "
    "that multiplies r with h compute this",
    "input_forget": "torch's LSTM has a forget gate of its own",
    "clip": "torch clips nothing",
}


class Node(NamedTuple):
    """One node of ONNX's as arrays: an RNN, GRU or LSTM.

    Example:
        >>> import numpy as np
        >>> Node("RNN", {"W": np.ones((1, 1, 2)), "R": np.ones((1, 1, 1))}).attributes
        {}
    """

    op_type: str
    # W (D, G * H, I), R (D, G * H, H) and perhaps B (D, 2 * G * H)
    weights: Mapping[str, Any]
    attributes: Mapping[str, Any] = {}


def from_onnx(node: Any, initializers: Any = None, *, prefix: str = "") -> dict[str, Array]:
    """Bring the weights of an ONNX node to torch's names and order.

    W (D, G * H, I) becomes a weight_ih for each direction, R weight_hh, the halves of B bias_ih and
    bias_hh; gates z, r, h become r, z, n, and i, o, f, c become i, f, g, o.

    An RNN with relu has the same names as one with tanh: it runs with `nonlinearity="relu"`.
    An attribute `layout` concerns the node's other inputs and its outputs, and not the weights.

    Args:
        node: a NodeProto, or a `Node`, which is the same as arrays. A list of these is a stack,
            whose layers have one size.
        initializers: the model's arrays by their names, or its TensorProtos, which onnx then reads:
            `model.graph.initializer`. Not for a `Node`, which has its own.
        prefix: what to put before the names, such as "encoder.".

    Returns:
        New arrays for `load_state_dict` (by `torch.from_numpy`) and `ostinato.numpy`: weight_ih_l0
        (G * H, I), weight_hh_l0 (G * H, H), bias_ih_l0 and bias_hh_l0 (G * H,), `_l1`, ... for more
        layers, `_reverse` after each name for a second direction.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: another operator, weights that are missing, another shape, no floating dtype, or
            layers that are no stack of torch's.
        NotImplementedError: torch has no such layer: a GRU without linear_before_reset=1, which
            ONNX has as the default; other activations than the operator's own (an RNN's may be
            relu); peepholes (P); input_forget; clip; the reverse direction alone.
        ImportError: TensorProtos, where onnx is not installed.

    Example:
        >>> import numpy as np
        >>> arrays = {"W": np.zeros((2, 60, 10)), "R": np.zeros((2, 60, 20))}
        >>> attributes = {"linear_before_reset": 1, "direction": "bidirectional"}
        >>> for name, array in from_onnx(Node("GRU", arrays, attributes)).items():
        ...     print(name, array.shape)
        weight_ih_l0 (60, 10)
        weight_hh_l0 (60, 20)
        weight_ih_l0_reverse (60, 10)
        weight_hh_l0_reverse (60, 20)

    Source: ONNX operators RNN, GRU and LSTM, version 14.
    """
    check_prefix("from_onnx", prefix)
    is_stack = isinstance(node, (list, tuple)) and not isinstance(node, Node)
    nodes = node if is_stack else [node]
    if not nodes:
        raise ValueError("from_onnx: node: expected a node, got an empty list")
    find = _finder(initializers)
    layers, functions = [], set()
    for k, each in enumerate(nodes):
        name = f"from_onnx: node[{k}]" if is_stack else "from_onnx: node"
        found = each if isinstance(each, Node) else _of_proto(name, each, find)
        cell = _checked(name, found)
        functions.add(cell.name)
        layers.append(_layer(name, found, cell))
    if len(functions) > 1:
        raise ValueError(f"from_onnx: node: expected one kind of layer, got {sorted(functions)}")
    return with_names("from_onnx", layers, prefix)


def to_onnx(
    parameters: Mapping[str, Any], *, nonlinearity: str = "tanh", prefix: str = ""
) -> list[Node]:
    """Bring a module's weights from torch's names and order to nodes of ONNX's.

    As `from_onnx`, backwards. `ostinato.onnx.export` writes whole models.

    Args:
        parameters: arrays under torch's names, such as a `state_dict`: those of `ostinato.numpy`.
            Other names are ignored.
        nonlinearity: "tanh" or "relu", which the weights of an RNN do not say.
        prefix: what stands before the names in `parameters`, such as "encoder.".

    Returns:
        A `Node` for each layer: op_type, weights (W, R and, with biases, B) and attributes, for
        `onnx.helper.make_node(node.op_type, inputs, outputs, **node.attributes)`. Its output is (T,
        D, B, H); between layers it is to become (T, B, D * H).

    Raises:
        TypeError: an argument of another Python type.
        ValueError: parameters that are missing or too many, no weights of an RNN, GRU or LSTM, or a
            nonlinearity that the layer does not have.
        RuntimeError: sizes that do not fit.
        NotImplementedError: an LSTM with a projection.

    Example:
        >>> import numpy as np
        >>> gru = {"weight_ih_l0": np.zeros((60, 10)), "weight_hh_l0": np.zeros((60, 20))}
        >>> (node,) = to_onnx(gru)
        >>> node.op_type, node.weights["W"].shape, node.attributes
        ('GRU', (1, 60, 10), {'hidden_size': 20, 'linear_before_reset': 1})

    Source: ONNX operators RNN, GRU and LSTM, version 14.
    """
    cell, layers = of_names("to_onnx", "ONNX", parameters, prefix)
    functions = {
        _told(each).functions[-1].lower(): each for each in _CELLS if each.layer == cell.layer
    }
    if nonlinearity not in list(functions):
        raise ValueError(
            f"to_onnx: nonlinearity: expected {' or '.join(map(repr, functions))} of "
            f"{cell.layer}, got {nonlinearity!r}"
        )
    return [_node(functions[nonlinearity], layer) for layer in layers]


def _node(cell: Cell, layer: Sequence[Direction]) -> Node:
    told = _told(cell)
    attributes: dict[str, Any] = {"hidden_size": layer[0].hidden, **told.attributes}
    if told.activation:
        attributes["activations"] = [told.activation] * len(layer)
    if len(layer) == 2:
        attributes["direction"] = "bidirectional"
    weights = {
        "W": np.stack([in_order(each.weight_ih, told.gates) for each in layer]),
        "R": np.stack([in_order(each.weight_hh, told.gates) for each in layer]),
    }
    pairs = [
        [in_order(bias, told.gates) for bias in (each.bias_ih, each.bias_hh) if bias is not None]
        for each in layer
    ]
    if all(pairs):
        weights["B"] = np.stack([np.concatenate(pair) for pair in pairs])
    return Node(cell.layer, weights, attributes)


# ---- reading ----


def _finder(given: Any) -> Callable[[str], Any]:
    """Return what finds an initializer by its name, or None."""
    if given is None:
        given = {}
    if isinstance(given, Mapping):
        return given.get
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise TypeError(
            "from_onnx: initializers must be a mapping of names to arrays, or TensorProtos, "
            f"got {type(given).__name__}"
        )
    try:
        from onnx import TensorProto, numpy_helper
    except ModuleNotFoundError as error:
        raise ImportError(
            "from_onnx reads TensorProtos by onnx: pip install onnx", name="onnx"
        ) from error
    tensors = {}
    for k, tensor in enumerate(given):
        if not isinstance(tensor, TensorProto):
            kind = type(tensor).__name__
            raise TypeError(f"from_onnx: initializers[{k}]: expected a TensorProto, got {kind}")
        tensors[tensor.name] = tensor
    # Those alone that are asked for: a model has others.
    return lambda name: numpy_helper.to_array(tensors[name]) if name in tensors else None


def _of_proto(name: str, proto: Any, find: Callable[[str], Any]) -> Node:
    """Read a NodeProto by its fields, without onnx."""
    if not all(hasattr(proto, field) for field in ("op_type", "input", "attribute")):
        kind = type(proto).__name__
        raise TypeError(f"{name}: expected a NodeProto or an ostinato.convert.Node, got {kind}")
    weights = {}
    for place, word in _WEIGHTS.items():
        value = proto.input[place] if place < len(proto.input) else ""
        if not value:
            continue
        weights[word] = find(value)
        if weights[word] is None:
            raise ValueError(
                f"{name}: {word}: expected initializers to hold {value!r}, which is missing; what "
                "the model computes, constant folding makes an initializer"
            )
    attributes = {each.name: _value(each) for each in proto.attribute}
    return Node(proto.op_type, weights, attributes)


def _value(attribute: Any) -> Any:
    """Return an AttributeProto's value; a tensor's or graph's, which no such node has, is None."""
    found = getattr(attribute, _FIELDS.get(attribute.type, ""), None)
    if isinstance(found, bytes):
        return found.decode()
    if found is None or isinstance(found, (int, float, str)):
        return found
    return [each.decode() if isinstance(each, bytes) else each for each in found]


def _checked(name: str, node: Node) -> Cell:
    """Check what a node says beside its weights; return the cell that computes the same."""
    cells = [each for each in _CELLS if each.layer == node.op_type]
    if not cells:
        layers = ", ".join(dict.fromkeys(each.layer for each in _CELLS))
        raise ValueError(f"{name}: expected one of {layers}, got {node.op_type!r}")
    for word in ("weights", "attributes"):
        given = getattr(node, word)
        if not isinstance(given, Mapping):
            raise TypeError(f"{name}: {word} must be a mapping, got {type(given).__name__}")
    attributes = node.attributes
    neutral = {**_NEUTRAL, **_told(cells[0]).attributes}
    for word in attributes:
        if word not in _KNOWN and word not in neutral:
            raise ValueError(f"{name}: expected attributes of {node.op_type}, got {word!r}")
    for word, expected in neutral.items():
        got = attributes.get(word, 0)
        if got != expected:
            raise NotImplementedError(
                f"{name}: {word}: expected {expected}, got {got!r}: {_WHY[word]}"
            )
    direction = attributes.get("direction", "forward")
    if direction == "reverse":
        raise NotImplementedError(
            f"{name}: direction: expected forward or bidirectional, got 'reverse': torch has no "
            "reverse direction alone; call it forward, and turn input and output around"
        )
    if direction not in list(_DIRECTIONS):
        words = " or ".join(_DIRECTIONS)
        raise ValueError(f"{name}: direction: expected {words}, got {direction!r}")
    count = _DIRECTIONS[direction]
    given = attributes.get("activations") or _told(cells[0]).functions * count
    if not isinstance(given, (list, tuple)):
        kind = type(given).__name__
        raise TypeError(f"{name}: activations must be a list of names, got {kind}")
    for each in cells:
        if [str(word).lower() for word in given] == [
            word.lower() for word in _told(each).functions * count
        ]:
            return each
    words = " or ".join(str(list(_told(each).functions)) for each in cells)
    raise NotImplementedError(
        f"{name}: activations: expected {words} for each direction, got {list(given)}"
    )


def _layer(name: str, node: Node, cell: Cell) -> list[Direction]:
    """Read the directions of one node."""
    gates = _told(cell).gates
    for word in node.weights:
        if word == "P":
            raise NotImplementedError(f"{name}: P: torch's LSTM has no peepholes")
        if word not in _WEIGHTS.values():
            raise ValueError(f"{name}: expected the weights W, R and B, got {word!r} as well")
    given = {
        word: array_of(f"{name}: {word}", array)
        for word, array in node.weights.items()
        if array is not None
    }
    for word in ("W", "R"):
        if word not in given:
            raise ValueError(f"{name}: expected weights to hold {word!r}, which is missing")
    w, r = given["W"], given["R"]
    count = _DIRECTIONS[node.attributes.get("direction", "forward")]
    hidden, size = (int(each.shape[-1]) if each.ndim else 0 for each in (r, w))
    rows = cell.gates * hidden
    words = f"(D, {cell.gates} * H, H)"
    check_shape(f"{name}: R", r, (count, rows, hidden), words)
    check_shape(f"{name}: W", w, (count, rows, size), words.replace("H)", "I)"))
    if 0 in (hidden, size):
        raise ValueError(f"{name}: expected weights that are not empty, got W of {w.shape}")
    told = node.attributes.get("hidden_size", hidden)
    if told != hidden:
        raise ValueError(f"{name}: hidden_size: expected {hidden}, as in R, got {told!r}")
    if "B" in given:
        check_shape(f"{name}: B", given["B"], (count, 2 * rows), f"(D, {2 * cell.gates} * H)")
    found = []
    for way in range(count):
        biases = given["B"][way].reshape(2, rows) if "B" in given else (None, None)
        found.append(of_other_order(gates, w[way], r[way], *biases))
    return found


def _told(cell: Cell) -> Onnx:
    assert cell.onnx
    return cell.onnx
