"""torch.export and ONNX: one program, one file, for any number of steps and rows."""

from __future__ import annotations

import inspect
import io
from typing import Any

import torch
from row import Row
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

_NAMES = ("RNN", "GRU", "LSTM")
_SHAPES = ((9, 4), (1, 1), (30, 3))


def _any_shape() -> tuple[dict[int, Any]]:
    return ({0: Dim("steps"), 1: Dim("batch")},)


def _compare(actual: Any, expected: Any) -> None:
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def _program(library: Any, name: str, **options: Any) -> None:
    layer = getattr(library, name)(3, 4, **options).eval()
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(5, 2, 3),), dynamic_shapes=_any_shape())
        for steps, batch in _SHAPES:
            x = torch.randn(steps, batch, 3)
            _compare(program.module()(x), layer(x))


def _export(library: Any) -> None:
    for name in _NAMES:
        _program(library, name)


def _export_options(library: Any) -> None:
    _program(library, "GRU", num_layers=2, bidirectional=True)
    _program(library, "LSTM", num_layers=2, bidirectional=True, proj_size=2)


def _save(library: Any) -> None:
    layer = library.GRU(3, 4).eval()
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(5, 2, 3),), dynamic_shapes=_any_shape())
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        x = torch.randn(9, 4, 3)
        _compare(torch.export.load(file).module()(x), layer(x))


class _Ragged(torch.nn.Module):
    """Rows of given lengths: by `lengths=` where there is one, else packed and padded again."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.gru = library.GRU(3, 4, bidirectional=True)
        self.takes_lengths = "lengths" in inspect.signature(self.gru.forward).parameters

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        if self.takes_lengths:
            return self.gru(x, lengths=lengths)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, h_n = self.gru(packed)
        return pad_packed_sequence(output, total_length=x.shape[0])[0], h_n


_RAGGED = (torch.randn(5, 2, 3), torch.tensor([3, 5]))


def _ragged_shapes() -> tuple[dict[int, Any], dict[int, Any]]:
    batch = Dim("batch")
    return {0: Dim("steps"), 1: batch}, {0: batch}


def _export_lengths(library: Any) -> None:
    model = _Ragged(library).eval()
    with torch.no_grad():
        program = torch.export.export(model, _RAGGED, dynamic_shapes=_ragged_shapes())
        x, lengths = torch.randn(8, 3, 3), torch.tensor([2, 8, 4])
        _compare(program.module()(x, lengths), model(x, lengths))


def _onnx(model: torch.nn.Module, args: Any, shapes: Any) -> Any:
    try:
        return torch.onnx.export(model, args, dynamic_shapes=shapes, dynamo=True, verbose=False)
    except torch.onnx.OnnxExporterError as error:
        # Its own words are advice; what went wrong is beneath.
        raise RuntimeError(str(error.__cause__)) from error


def _run(program: Any, *args: torch.Tensor) -> list[torch.Tensor]:
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument

    try:
        model = program.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        arrays = [value.numpy() for value in args]
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
    except (Fail, InvalidArgument) as error:
        # Their own classes are no RuntimeErrors, and their words change with names and versions.
        sizes = ", ".join(str(tuple(value.shape)) for value in args)
        raise RuntimeError(f"the model does not run with input of {sizes}") from error
    return [torch.from_numpy(output) for output in outputs]


def _onnx_node(library: Any, name: str, **options: Any) -> Any:
    layer = getattr(library, name)(3, 4, **options).eval()
    program = _onnx(layer, (torch.randn(5, 2, 3),), _any_shape())
    for steps, batch in _SHAPES:
        x = torch.randn(steps, batch, 3)
        with torch.no_grad():
            _compare(_run(program, x), tree_leaves(layer(x)))
    kinds = [node.op_type for node in program.model.graph]
    if kinds.count(name) != layer.num_layers:
        raise AssertionError(f"{kinds.count(name)} {name} nodes among {len(kinds)}")


def _onnx_gru(library: Any) -> None:
    _onnx_node(library, "GRU")


def _onnx_lstm(library: Any) -> None:
    _onnx_node(library, "LSTM", num_layers=2, bidirectional=True)


def _onnx_rnn(library: Any) -> None:
    _onnx_node(library, "RNN")


def _onnx_lengths(library: Any) -> None:
    model = _Ragged(library).eval()
    program = _onnx(model, _RAGGED, _ragged_shapes())
    x, lengths = torch.randn(8, 3, 3), torch.tensor([2, 8, 4])
    with torch.no_grad():
        _compare(_run(program, x, lengths), tree_leaves(model(x, lengths)))


ROWS = [
    Row("`torch.export` for any number of steps and rows: RNN, GRU, LSTM", _export),
    Row("... stacked, in both directions, projected", _export_options),
    Row("... saved and loaded", _save),
    Row("... with lengths of rows", _export_lengths),
    Row("ONNX (`dynamo=True`): one GRU node, any number of steps and rows", _onnx_gru),
    Row("... one LSTM node for each of two bidirectional layers", _onnx_lstm),
    Row("... one RNN node", _onnx_rnn),
    Row("... with lengths of rows", _onnx_lengths),
]
