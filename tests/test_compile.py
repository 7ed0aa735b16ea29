"""torch.compile, torch.export and friends of a model that holds every one of the six layers."""

import shutil

import pytest
import torch
from conftest import tolerance
from torch.nn.utils.rnn import pack_padded_sequence

from ostinato import nn

# Inductor's own modules use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning"
)

BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler"),
    ),
]


class Six(torch.nn.Module):
    """All layers and cells in a row, with ordinary operations between them."""

    def __init__(self, **options):
        super().__init__()
        self.rnn = nn.RNN(5, 6, nonlinearity="relu", **options)
        self.gru = nn.GRU(6, 7, num_layers=2, bidirectional=True, **options)
        self.lstm = nn.LSTM(14, 8, proj_size=5, **options)
        self.rnn_cell, self.gru_cell = nn.RNNCell(5, 6, **options), nn.GRUCell(6, 7, **options)
        self.lstm_cell = nn.LSTMCell(7, 4, **options)

    def forward(self, x, h_0):
        y, _ = self.rnn(x)
        y, h_n = self.gru(torch.nn.functional.gelu(y), h_0)
        y, (h, c) = self.lstm(y * 2)
        cell = self.lstm_cell(self.gru_cell(self.rnn_cell(y[-1].tanh())))
        return y, h_n, h, c, *cell


@pytest.fixture(autouse=True)
def fresh():
    """Start and end without compiled code; recompiling without end is an error, not a fallback."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments(steps=6, batch=3, dtype=torch.float32):
    return torch.randn(steps, batch, 5, dtype=dtype), torch.randn(4, batch, 7, dtype=dtype)


def results_and_gradients(function, model, x, h_0):
    x, h_0 = (t.clone().requires_grad_() for t in (x, h_0))
    results = function(x, h_0)
    loss = sum((result * (i + 1)).square().sum() for i, result in enumerate(results))
    return [*results, *torch.autograd.grad(loss, [x, h_0, *model.parameters()])]


def compare(actual, expected, steps=16):
    for a, e in zip(actual, expected, strict=True):
        bound = tolerance(e.dtype, steps)
        bound["atol"] *= max(1.0, e.detach().abs().max().item())
        torch.testing.assert_close(a, e, **bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_and_inference_in_one_graph(backend):
    dtype = torch.float64 if backend == "aot_eager" else torch.float32
    model = Six(dtype=dtype)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x, h_0 = arguments(dtype=dtype)
    expected = results_and_gradients(model, model, x, h_0)
    compare(results_and_gradients(compiled, model, x, h_0), expected)
    with torch.no_grad():
        compare(compiled(x, h_0), expected[:6])
    # Other numbers through the same graph, and weights changed behind its back.
    x, h_0 = arguments(dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
    compare(
        results_and_gradients(compiled, model, x, h_0),
        results_and_gradients(model, model, x, h_0),
    )


def test_the_graph_holds_the_operator_and_nothing_of_torchs():
    seen = []

    def look(graph, example):
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op.startswith("call"))
        return graph.forward

    model = Six()
    x, h_0 = arguments()
    torch.compile(model, fullgraph=True, backend=look)(x, h_0)
    # One for each layer and direction pair: rnn, two of gru, lstm, three cells.
    assert sum("ostinato" in target for target in seen) == 7
    assert not [target for target in seen if "rnn" in target.lower() and "ostinato" not in target]


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_other_steps_and_batches_do_not_compile_again(backend):
    model = Six()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps, batch in ((6, 3), (4, 7), (11, 2)):
            x, h_0 = arguments(steps, batch)
            compare(
                results_and_gradients(compiled, model, x, h_0),
                results_and_gradients(model, model, x, h_0),
            )


@pytest.mark.parametrize("backend", ["aot_eager"])
@pytest.mark.parametrize("cls", [nn.RNN, nn.GRU, nn.LSTM])
def test_options_of_a_layer(cls, backend):
    """Unbatched input, batch_first, no bias, and a state of its own."""
    for options, x in (
        ({"batch_first": True}, torch.randn(3, 6, 4)),
        ({"bias": False, "num_layers": 2}, torch.randn(6, 3, 4)),
        ({"bidirectional": True}, torch.randn(6, 4)),
    ):
        layer = cls(4, 5, **options)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        with torch.no_grad():
            _, states = layer(x)
        (actual, _), (expected, _) = compiled(x, states), layer(x, states)
        compare([actual], [expected])


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_packed_sequence_made_outside(backend):
    layer = nn.GRU(4, 5, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(6, 3, 4), torch.tensor([6, 4, 1]))

    def function(packed):
        output, h_n = layer(packed)
        return output.data * 2, h_n

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    compare(compiled(packed), function(packed))


def test_what_is_wrong_is_refused_under_compile_too():
    layer = nn.GRU(4, 5)
    compiled = torch.compile(layer, backend="eager")
    with pytest.raises(RuntimeError, match=r"input\.size\(-1\) must be equal to input_size"):
        compiled(torch.randn(6, 3, 7))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model = Six().eval()
    x, h_0 = arguments()
    exported = torch.export.export(model, (x, h_0), strict=strict)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert sum("ostinato" in target for target in targets) == 7
    compare(exported.module()(x, h_0), model(x, h_0))
