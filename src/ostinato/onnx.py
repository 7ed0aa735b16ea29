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

from ostinato import operators  # noqa: F401  registers them
from ostinato.cells import CELLS
from ostinato.onnx_node import NoCounterpartError, Values, node


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
        # What follows in the schema backward alone reads.
        return node(Values(opset), _bind(arguments, named))

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
        while cause is not None and not isinstance(cause, NoCounterpartError):
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


def _fold_weights(model: Any) -> None:
    """Compute what the weights of recurrent nodes are computed from, whatever its size."""
    from onnxscript import optimizer

    pending = [
        value.producer()
        for each in model.graph
        if each.op_type in {cell.layer for cell in CELLS.values()}
        for name, value in zip(("X", "W", "R", "B"), each.inputs, strict=False)
        if name != "X" and value is not None
    ]
    found = set()
    while pending:
        each = pending.pop()
        if each is not None and each not in found:
            found.add(each)
            pending += [value.producer() for value in each.inputs if value is not None]
    # All else was left to the exporter, which folds what is small.
    optimizer.fold_constants(model, should_fold=lambda each: each in found)
    optimizer.remove_unused_nodes(model)
