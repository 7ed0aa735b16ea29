"""ONNX: one RNN, GRU or LSTM node for each of our layers.

torch.onnx.export turns a program of torch.export into an ONNX model, operator by operator. It does
not know ours. `translations` tells it, and `export` is torch.onnx.export with that, whose weights
are then brought into ONNX's order once and for all.

Needs onnxscript, which is imported when a function is called.

Legend: T steps, B batch, I input, H hidden, D directions, G gates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ostinato import ops  # noqa: F401  registers the operators

# Our gates in ONNX's order: z r n, and i o f c. An RNN has no gates to order.
_ORDER = {"rnn_tanh": [0], "rnn_relu": [0], "gru": [1, 0, 2], "lstm": [0, 3, 1, 2]}
_NODES = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "gru": "GRU", "lstm": "LSTM"}
# TensorProto's numbers.
_INT32, _BFLOAT16 = 6, 16
# What a node says, or need not say since only backward asks.
_TAKEN = {
    *("input", "batch", "lengths", "h_0", "c_0", "weights", "cell", "has_biases", "bidirectional"),
    *("recompute", "keep"),
}
# Why no node takes the other arguments of the operator.
_REFUSED = {
    "batch_sizes": "ONNX has no packed sequences; give the layer a padded batch and lengths=",
    "resets": "ONNX has no resets within a sequence",
    "all_c": "ONNX's LSTM returns the last c alone",
}


class _NoCounterpartError(NotImplementedError):
    """ONNX has no operator for this."""


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what torch.onnx.export needs to know of our operators.

    Each layer, in one direction or both, becomes one node: RNN, GRU (with linear_before_reset=1) or
    LSTM. T and B may be dynamic. `lengths` become sequence_lens, h_0 and c_0 initial_h and
    initial_c. Around the node the weights are brought into ONNX's order (gates z r n and i o f c,
    directions stacked, biases joined), and the output from (T, D, B, H) to (T, B, D * H).

    Returns:
        A table for the argument `custom_translation_table`.

    Raises:
        ImportError: onnxscript is not installed.

    Example:
        >>> import pytest, torch
        >>> _ = pytest.importorskip("onnxscript")
        >>> from ostinato import nn
        >>> program = torch.onnx.export(
        ...     nn.GRU(3, 4).eval(), (torch.randn(5, 2, 3),), verbose=False,
        ...     custom_translation_table=translations(),
        ... )
        >>> [node.op_type for node in program.model.graph].count("GRU")
        1

    Source: ONNX operators RNN, GRU and LSTM, version 14.
    """
    opset = _opset()

    def layer(*arguments: Any, **named: Any) -> tuple[Any, ...]:
        return _translate(opset, _bind(arguments, named))

    return {torch.ops.ostinato.layer.default: layer}


def export(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    path: str | os.PathLike[str] | None = None,
    *,
    external_data: bool | None = None,
    **options: Any,
) -> Any:
    """Export a model to ONNX: torch.onnx.export with `translations`, and weights in ONNX's order.

    What the weights of a recurrent node are computed from is computed here, so that the file holds
    them ready to use, and nothing around the node but its output's transposition.

    Args:
        model: a module in eval mode, or a program of torch.export.
        args: what the module is called with, to trace it.
        path: where to save the model; None means not to.
        external_data: whether weights go into a file of their own beside it, which they do in any
            case where there are more than 2 GB of them.
        options: further arguments of torch.onnx.export, such as `dynamic_shapes`, `input_names`,
            `output_names`, `kwargs` and `opset_version`. A `custom_translation_table` is used
            beside ours. `verbose` is False if not given.

    Returns:
        The torch.onnx.ONNXProgram. It can be called, saved and looked at (`program.model`).

    Raises:
        ImportError: onnxscript is not installed.
        ValueError: `dynamo` is False.
        NotImplementedError: ONNX has no counterpart: an LSTM with proj_size, a PackedSequence,
            resets, bfloat16.
        torch.onnx.OnnxExporterError: anything else that cannot be exported.

    Example:
        >>> import pytest, torch
        >>> _ = pytest.importorskip("onnxscript")
        >>> from ostinato import nn
        >>> steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
        >>> program = export(
        ...     nn.GRU(3, 4).eval(), (torch.randn(5, 2, 3),),
        ...     dynamic_shapes=({0: steps, 1: batch},),
        ... )
        >>> [node.op_type for node in program.model.graph]
        ['GRU', 'Squeeze']

    Source: ONNX operators RNN, GRU and LSTM, version 14.
    """
    if not options.pop("dynamo", True):
        raise ValueError(
            "dynamo: expected True, got False: this function works on a program of torch.export; "
            "for the exporter by TorchScript call torch.onnx.export itself"
        )
    table = {**translations(), **(options.pop("custom_translation_table", None) or {})}
    options.setdefault("verbose", False)
    try:
        program = torch.onnx.export(
            model, args, dynamo=True, custom_translation_table=table, **options
        )
    except torch.onnx.OnnxExporterError as error:
        # The exporter wraps what a translation raises, twice, in pages of advice.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, _NoCounterpartError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise NotImplementedError(str(cause)) from error
    assert program is not None
    _fold_weights(program.model)
    if path is not None:
        program.save(path, external_data=external_data)
    return program


def _opset() -> Any:
    """Return onnxscript's functions for the operators of ONNX."""
    try:
        from onnxscript import opset18
    except ModuleNotFoundError as error:
        raise ImportError(
            "ostinato.onnx needs onnxscript: pip install onnxscript", name="onnxscript"
        ) from error
    return opset18


def _bind(arguments: Sequence[Any], named: dict[str, Any]) -> dict[str, Any]:
    """Name the arguments of a call of `ostinato::layer`, by its schema."""
    names = [argument.name for argument in torch.ops.ostinato.layer.default._schema.arguments]
    return {**dict(zip(names, arguments, strict=False)), **named}


def _translate(op: Any, call: dict[str, Any]) -> tuple[Any, ...]:
    """Write one node, and what brings weights and output from one order to the other."""
    for name, given in call.items():
        if name not in _TAKEN and given is not None and given is not False:
            raise _NoCounterpartError(f"{name}: {_REFUSED.get(name, 'ONNX has nothing like it')}")
    cell, weights, lengths = call["cell"], call["weights"], call.get("lengths")
    if weights[0].dtype == _BFLOAT16:
        raise _NoCounterpartError(f"dtype: ONNX has no {_NODES[cell]} in bfloat16 before opset 22")
    directions = 2 if call["bidirectional"] else 1
    count = len(weights) // directions
    if count > (4 if call["has_biases"] else 2):
        raise _NoCounterpartError("proj_size: ONNX has no LSTM with a projection")
    rows, hidden = weights[1].shape

    def joined(names: slice, *shape: int) -> Any:
        """Return these weights of every direction as one, (D, *shape)."""
        parts = [
            _ordered(op, weight, cell, hidden)
            for first in range(0, len(weights), count)
            for weight in weights[first : first + count][names]
        ]
        whole = op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]
        return op.Reshape(whole, op.Constant(value_ints=[directions, *shape]))

    output, *states = getattr(op, _NODES[cell])(
        call["input"],
        joined(slice(0, 1), rows, -1),
        joined(slice(1, 2), rows, hidden),
        joined(slice(2, 4), 2 * rows) if call["has_biases"] else None,
        None if lengths is None else op.Cast(lengths, to=_INT32),
        call["h_0"],
        *([call["c_0"]] if cell == "lstm" else []),
        hidden_size=hidden,
        direction="bidirectional" if directions == 2 else "forward",
        **_attributes(cell, directions),
    )
    if lengths is not None:
        # A row of no steps keeps its state. ONNX does not say so, and ONNX Runtime gives zeros.
        column = op.Reshape(lengths, op.Constant(value_ints=[-1, 1]))
        empty = op.Equal(column, op.Constant(value_int=0))
        states = [
            last if first is None else op.Where(empty, first, last)
            for first, last in zip((call["h_0"], call["c_0"]), states, strict=False)
        ]
    # What follows in the schema backward alone reads.
    return _flat(op, output, directions, hidden), *states


def _attributes(cell: str, directions: int) -> dict[str, Any]:
    """Return what makes the node compute our equations."""
    if cell == "gru":
        return {"linear_before_reset": 1}
    if cell == "lstm":
        return {}
    return {"activations": [cell.removeprefix("rnn_").capitalize()] * directions}


def _ordered(op: Any, weight: Any, cell: str, hidden: int) -> Any:
    """Take the gates of one weight, (G * H, ...), in ONNX's order."""
    order = _ORDER[cell]
    if len(order) == 1:
        return weight
    rows = [gate * hidden + unit for gate in order for unit in range(hidden)]
    return op.Gather(weight, op.Constant(value_ints=rows), axis=0)


def _flat(op: Any, output: Any, directions: int, hidden: int) -> Any:
    """Bring (T, D, B, H) to (T, B, D * H)."""
    if directions == 1:
        return op.Squeeze(output, op.Constant(value_ints=[1]))
    output = op.Transpose(output, perm=[0, 2, 1, 3])
    # 0 stands for the size that the dimension has.
    return op.Reshape(output, op.Constant(value_ints=[0, 0, 2 * hidden]))


def _fold_weights(model: Any) -> None:
    """Compute what the weights of recurrent nodes are computed from, whatever its size."""
    from onnxscript import optimizer

    pending = [
        value.producer()
        for node in model.graph
        if node.op_type in _NODES.values()
        for value in node.inputs[1:4]
        if value is not None
    ]
    found = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found.add(node)
            pending += [value.producer() for value in node.inputs if value is not None]
    # All else was left to the exporter, which folds what is small.
    optimizer.fold_constants(model, should_fold=lambda node: node in found)
    optimizer.remove_unused_nodes(model)
