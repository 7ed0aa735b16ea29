"""torch.compile: one graph, one compilation, one node for each layer."""

from __future__ import annotations

from typing import Any

import torch
from row import Row
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence

_NAMES = ("RNN", "GRU", "LSTM")


def _same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def _compare(compiled: Any, layer: torch.nn.Module, x: torch.Tensor) -> None:
    """Compare output and gradients of one training step."""
    actual, expected = compiled(x)[0], layer(x)[0]
    _same(actual, expected)
    weights = list(layer.parameters())
    found, wanted = (torch.autograd.grad(y.square().sum(), weights) for y in (actual, expected))
    for a, e in zip(found, wanted, strict=True):
        _same(a, e)


def _one_graph(library: Any) -> None:
    for name in _NAMES:
        layer = getattr(library, name)(4, 5, num_layers=2, bidirectional=True)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        _compare(compiled, layer, torch.randn(6, 3, 4))


def _inductor(library: Any) -> None:
    layer = library.GRU(4, 5)
    _compare(torch.compile(layer, fullgraph=True), layer, torch.randn(6, 3, 4))


def _shapes(library: Any) -> None:
    for name in _NAMES:
        layer = getattr(library, name)(4, 5)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for steps, batch in ((6, 3), (9, 4), (2, 7), (30, 9)):
            x = torch.randn(steps, batch, 4)
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
            _compare(compiled, layer, x)
        if counter.frame_count != 1:
            raise AssertionError(f"{name}: {counter.frame_count} compilations")


def _nodes(library: Any) -> None:
    graphs = []

    def look(graph: Any, _: Any) -> Any:
        graphs.append([node for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    layer = library.GRU(4, 4, num_layers=6)
    for steps in (5, 500):
        torch._dynamo.reset()
        torch.compile(layer, fullgraph=True, backend=look)(torch.randn(steps, 2, 4))
    few, many = map(len, graphs)
    if few != many or many > 6 * 3 + 1:
        raise AssertionError(f"{few} operations for 5 steps, {many} for 500")


def _packed(library: Any) -> None:
    layer = library.GRU(4, 5, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(6, 3, 4), torch.tensor([6, 4, 1]))

    def run(packed: Any) -> torch.Tensor:
        return layer(packed)[0].data * 2

    _same(torch.compile(run, fullgraph=True, backend="aot_eager")(packed), run(packed))


ROWS = [
    Row("`torch.compile(fullgraph=True)`, forward and backward: RNN, GRU, LSTM", _one_graph),
    Row("... with inductor", _inductor),
    Row("... other lengths and batches without compiling again", _shapes),
    Row("... a graph of the same size for 5 steps and for 500", _nodes),
    Row("... of a PackedSequence", _packed),
]
