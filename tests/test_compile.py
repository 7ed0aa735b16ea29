"""torch.compile, torch.export and friends of a model that holds every one of the six layers."""

import functools
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import metrics
from torch.nn.utils.rnn import pack_padded_sequence

from ostinato import nn
from ostinato.tensors import without_autocast
from support.cells import LAYERS
from support.devices import engine_dtype, on_cpu
from support.samples import close
from support.tolerances import tolerance

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
        # No kernel for GPUs projects.
        projection = {"proj_size": 5} if on_cpu() else {}
        self.lstm = nn.LSTM(14, 8 if on_cpu() else 5, **projection, **options)
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


compare = functools.partial(close, steps=16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_and_inference_in_one_graph(backend):
    dtype = engine_dtype() if backend == "aot_eager" else torch.float32
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


STACKS = {
    "RNN": lambda: nn.RNN(5, 6, nonlinearity="relu"),
    "GRU": lambda: nn.GRU(5, 6, num_layers=2, bidirectional=True),
    "LSTM": lambda: nn.LSTM(5, 6),
    "LSTM projected": lambda: nn.LSTM(5, 6, proj_size=3),
}
# torch's operator is compiled for one number of steps.
projects = pytest.mark.cpu("no kernel for GPUs projects")
per_layer = [pytest.param(k, marks=[projects] * ("projected" in k)) for k in STACKS]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", per_layer)
def test_compilations(name, marked):
    """One where T and B are marked, and one more where torch finds out that they change."""
    layer = STACKS[name]()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for steps, batch in ((6, 3), (4, 7), (11, 2), (30, 9)):
        x = torch.randn(steps, batch, 5)
        if marked:
            # They raise where a size is made a constant.
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
        actual, expected = compiled(x)[0], layer(x)[0]
        compare([actual], [expected])
        found, wanted = (
            torch.autograd.grad(y.square().sum(), list(layer.parameters()))
            for y in (actual, expected)
        )
        compare(found, wanted)
    assert counter.frame_count == (1 if marked else 2)


def graph_of(layers, steps):
    """The targets of the graph that a backend is given."""
    seen = []

    def look(graph, example):
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op.startswith("call"))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(nn.GRU(5, 5, layers), fullgraph=True, backend=look)(torch.randn(steps, 2, 5))
    return seen


def test_the_graph_has_one_node_for_each_layer_and_any_number_of_steps():
    graphs = {layers: graph_of(layers, 4) for layers in (1, 2, 6)}
    assert graphs[6] == graph_of(6, 400)
    for layers, graph in graphs.items():
        assert graph.count("ostinato.layer") == layers
        # And what takes its results apart, the last state put together from those of all layers.
        others = [
            target for target in graph if target != "ostinato.layer" and "getitem" not in target
        ]
        assert len(others) == (layers > 1)


class Between(torch.nn.Module):
    """A layer with three elementary operations on each side."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(5, 6)

    def forward(self, x):
        y, _ = self.gru(torch.nn.functional.gelu(x) * 2 + 1)
        return torch.tanh(y) * 3 - 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_what_stands_around_a_layer_is_fused(mode):
    """One kernel in front of the operator and one behind it, and as many in backward."""
    model = Between()
    metrics.reset()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    x = torch.randn(4, 2, 5)
    # Three calls: where there are CUDA graphs, they are recorded at the second.
    for _ in range(3):
        with torch.no_grad():
            compare([compiled(x)], [model(x)])
    assert metrics.generated_kernel_count == 2
    metrics.reset()
    x.requires_grad_()
    (actual,), (expected,) = (
        torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, model)
    )
    compare([actual], [expected])
    assert metrics.generated_kernel_count == 4


COLD = """
import sys, time
import torch
from ostinato import nn

layers, steps = map(int, sys.argv[1:])
gru, x = nn.GRU(8, 8, layers), torch.randn(steps, 2, 8)
start = time.process_time()
torch.compile(gru, fullgraph=True, backend="aot_eager")(x)[0].sum().backward()
print(time.process_time() - start)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor_without_implicit_fallbacks():
    layer = nn.LSTM(5, 6, 2, bidirectional=True)
    # What comes in lies in no order of its own.
    x = torch.randn(3, 5, 7).permute(2, 0, 1).requires_grad_()

    def loss(layer, x):
        output, (h_n, c_n) = layer(x.tanh().transpose(1, 2).contiguous().transpose(1, 2))
        return (output.relu() * 2).sum() + h_n.sum() + c_n.sin().sum()

    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad(loss(layer, x), leaves)
    with torch._inductor.config.patch(implicit_fallbacks=False, fx_graph_cache=False):
        compiled = torch.compile(loss, fullgraph=True)
        found = torch.autograd.grad(compiled(layer, x), leaves)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, **tolerance(torch.float32, 7))


@pytest.mark.cpu("processes on this machine")
def test_compiling_hardly_takes_longer_with_layers_and_steps():
    """Compile a training step in a fresh process, in processor time, since others may be busy."""

    def seconds(layers, steps):
        arguments = [sys.executable, "-c", COLD, str(layers), str(steps)]
        return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)

    one = seconds(1, 4)
    assert seconds(6, 4) < 2 * one
    assert seconds(1, 400) < 1.5 * one


@pytest.mark.parametrize("backend", ["aot_eager"])
@pytest.mark.parametrize("name", LAYERS)
def test_options_of_a_layer(name, backend):
    """Unbatched input, batch_first, no bias, and a state of its own."""
    for options, x in (
        ({"batch_first": True}, torch.randn(3, 6, 4)),
        ({"bias": False, "num_layers": 2}, torch.randn(6, 3, 4)),
        ({"bidirectional": True}, torch.randn(6, 4)),
    ):
        layer = getattr(nn, name)(4, 5, **options)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        with torch.no_grad():
            _, states = layer(x)
        (actual, _), (expected, _) = compiled(x, states), layer(x, states)
        compare([actual], [expected])


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_packed_sequence_made_outside(backend):
    layer = nn.GRU(4, 5, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(6, 3, 4), [6, 4, 1])

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


def test_no_question_is_asked_that_an_older_torch_cannot_compile(monkeypatch):
    """The compiler of torch 2.10 to 2.12 cannot trace whether a device has autocast."""

    def refuse(kind):
        raise AssertionError(kind)

    monkeypatch.setattr(torch.amp, "is_autocast_available", refuse)
    for kind in ("cpu", "cuda"):
        region = without_autocast(SimpleNamespace(device=torch.device(kind)))
        assert region.device == kind
