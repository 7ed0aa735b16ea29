"""torch.jit.trace: graphs for any steps and rows, with gradients. What torch.jit.script is told.

A trace is checked by torch itself (`check_trace`), and its warnings are errors here.
"""

import copy
import io
import warnings

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import ostinato
from ostinato import nn
from support.cells import CELL_MODULES, LAYERS, MODULES, SIX, has_c, record_of
from support.devices import on_cpu
from support.pairs import TORCH_WARNS, flat, shapes, state

pytestmark = [
    pytest.mark.filterwarnings(TORCH_WARNS),
    # What torch has come to say of this tool of its own.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated. Please switch:DeprecationWarning"),
]

KINDS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no biases": {"bias": False},
    "both directions": {"bidirectional": True},
    "a stack": {"num_layers": 2, "bidirectional": True},
    "recompute": {"memory": "recompute"},
}


def layer(name, kind):
    return getattr(nn, name)(4, 8, **KINDS[kind])


def arguments(module, steps, batch, with_state=True, **options):
    """An input and perhaps a state that suit a layer or a cell."""
    if isinstance(module, torch.nn.modules.rnn.RNNCellBase):
        x, hx = torch.randn(batch, 4, **options), state(module._kind, batch, 8, **options)
    else:
        rows = module.num_layers * (1 + module.bidirectional)
        sizes = (batch, steps) if module.batch_first else (steps, batch)
        x = torch.randn(*sizes, 4, **options)
        hx = state(module._kind, rows, batch, 8, **options)
    return (x, hx) if with_state else (x,)


def assert_equal(found, expected):
    found, expected = flat(found), flat(expected)
    assert len(found) == len(expected)
    if on_cpu():
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    else:  # There a module runs a stack at once, and a trace layer by layer.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def assert_same_gradients(traced, module, given):
    """Compare results and every gradient bit by bit."""
    leaves = [*flat(given), *module.parameters()]
    results = [flat(call(*given)) for call in (traced, module)]
    assert_equal(*results)
    grads = [
        torch.autograd.grad(sum((k + 1) * r.cos().sum() for k, r in enumerate(each)), leaves)
        for each in results
    ]
    assert_equal(*grads)


def check_other_sizes(traced, module, with_state=True):
    """Run for other steps and rows, with and without gradients."""
    for steps, batch in (7, 3), (2, 5), (1, 1), (9, 0):
        given = arguments(module, steps, batch, with_state, requires_grad=True)
        if batch:
            assert_same_gradients(traced, module, given)
        with torch.no_grad():
            assert_equal(traced(*given), module(*given))
        with torch.inference_mode():
            assert_equal(traced(*given), module(*given))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, kind, with_state, grad):
    module = layer(name, kind)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, arguments(module, 5, 4, with_state))
    check_other_sizes(traced, module, with_state)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("name", CELL_MODULES)
def test_cells(name, with_state, grad):
    module = getattr(nn, name)(4, 8)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, arguments(module, 0, 5, with_state))
    check_other_sizes(traced, module, with_state)


@pytest.mark.parametrize("name", MODULES)
def test_one_sequence(name):
    module = getattr(nn, name)(4, 8)
    given = [tuple(t.squeeze(-2) for t in flat(arguments(module, steps, 1))) for steps in (5, 8)]
    if has_c(name):
        given = [(x, (h, c)) for x, h, c in given]
    traced = torch.jit.trace(module, given[0])
    assert_equal(traced(*given[1]), module(*given[1]))


def test_a_stack_of_states_is_a_pair():
    module = nn.LSTM(4, 8)
    given = torch.randn(5, 4), torch.randn(2, 1, 8)
    assert_equal(torch.jit.trace(module, given)(*given), module(*given))


def test_an_lstm_with_projection():
    module = nn.LSTM(4, 8, 2, proj_size=3)
    traced = torch.jit.trace(module, torch.randn(5, 4, 4))
    check_other_sizes(traced, module, with_state=False)


class Packed(torch.nn.Module):
    """Packs a padded batch in front of a layer and pads it again."""

    def __init__(self, inner, enforce_sorted):
        super().__init__()
        self.inner, self.enforce_sorted = inner, enforce_sorted

    def forward(self, x, lengths, hx=None):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=self.enforce_sorted)
        output, h_n = self.inner(packed, hx)
        return pad_packed_sequence(output, total_length=x.size(0))[0], h_n


@pytest.mark.filterwarnings("default::torch.jit.TracerWarning")  # of torch's packing
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_packed(name, enforce_sorted, with_state):
    module = Packed(layer(name, "a stack"), enforce_sorted)

    def draw(steps, lengths):
        lengths = sorted(lengths, reverse=True) if enforce_sorted else lengths
        x, hx = arguments(module.inner, steps, len(lengths), requires_grad=True)
        return x, torch.tensor(lengths, device="cpu"), *([hx] if with_state else [])

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, draw(5, [3, 5, 2, 4]))
    assert not [w for w in seen if "ostinato" in w.filename]
    for given in draw(5, [2, 5, 5, 1]), draw(5, [1, 5]), draw(5, [5]):
        leaves = [t for t in flat(given) if t.requires_grad] + list(module.parameters())
        results = [call(*given) for call in (traced, module)]
        assert_equal(*results)
        grads = [
            torch.autograd.grad(sum(r.cos().sum() for r in flat(each)), leaves) for each in results
        ]
        assert_equal(*grads)


class Cut(torch.nn.Module):
    """A layer with lengths, resets and the state that these bring, by position."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, lengths, resets, first):
        reset_to = (first, first) if has_c(self.inner._kind) else first
        return self.inner(
            x, lengths=lengths, resets=resets, reset_to=reset_to, return_all_states=True
        )


@pytest.mark.parametrize("kind", ["plain", "batch_first", "a stack"])
@pytest.mark.parametrize("name", LAYERS)
def test_lengths_and_resets(name, kind):
    module = Cut(layer(name, kind))
    rows = module.inner.num_layers * (1 + module.inner.bidirectional)

    def draw(steps, batch):
        (x,) = arguments(module.inner, steps, batch, with_state=False, requires_grad=True)
        lengths = torch.arange(batch, device="cpu") % (steps + 1)
        return x, lengths, torch.rand(x.shape[:2]) > 0.5, torch.randn(rows, 8, requires_grad=True)

    traced = torch.jit.trace(module, draw(5, 3))
    for sizes in (7, 4), (1, 2), (3, 6):
        x, lengths, resets, first = draw(*sizes)
        results = [call(x, lengths, resets, first) for call in (traced, module)]
        assert_equal(*results)
        grads = [
            torch.autograd.grad(sum(r.cos().sum() for r in flat(each)), (x, first))
            for each in results
        ]
        assert_equal(*grads)
    # Values are checked as the graph runs; torch wraps what an operator raises.
    wrong = torch.full((5,), 6, device="cpu")
    with pytest.raises(RuntimeError, match="lengths: expected numbers from 0 to 5"):
        traced(torch.randn(5, 5, 4), wrong, torch.zeros(5, 5, dtype=torch.bool), first)


def test_resets_of_a_packed_batch():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.GRU(4, 8)

        def forward(self, data, batch_sizes, resets, first):
            make = torch.nn.utils.rnn.PackedSequence
            packed = make(data, batch_sizes)
            output, h_n = self.inner(packed, resets=make(resets, batch_sizes), reset_to=first)
            return output.data, h_n

    def draw(*sizes):
        rows = sum(sizes)
        sizes = torch.tensor(sizes, device="cpu")
        return torch.randn(rows, 4), sizes, torch.rand(rows) > 0.5, torch.randn(1, 8)

    module = Model()
    traced = torch.jit.trace(module, draw(3, 2, 1))
    for given in draw(5, 5, 1, 1), draw(2), draw(3, 2, 1):
        assert_equal(traced(*given), module(*given))


class Tagger(torch.nn.Module):
    """Recurrent layers and what stands around them."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 8)
        self.gru = nn.GRU(8, 8, num_layers=2, dropout=0.5, bidirectional=True)
        self.cell = nn.LSTMCell(16, 4)
        self.last = torch.nn.Linear(4, 2)

    def forward(self, x):
        y, _ = self.gru(self.first(x).relu())
        h, _ = self.cell(y[-1])
        return self.last(h)


def test_saved_loaded_and_frozen():
    model = Tagger().eval()
    traced = torch.jit.trace(model, torch.randn(5, 3, 4))
    written = io.BytesIO()
    torch.jit.save(traced, written)
    written.seek(0)
    loaded = torch.jit.load(written)
    frozen = torch.jit.freeze(traced)
    assert not list(frozen.parameters())
    fast = torch.jit.optimize_for_inference(torch.jit.trace(model, torch.randn(5, 3, 4)))
    for steps, batch in (9, 2), (1, 7):
        x = torch.randn(steps, batch, 4)
        for each in (loaded, frozen, copy.deepcopy(traced)):
            for _ in range(3):  # torch optimises a graph after it has seen it run
                torch.testing.assert_close(each(x), model(x))
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))
    # What was loaded can be trained.
    loaded(x).sum().backward()
    model(x).sum().backward()
    for mine, other in zip(loaded.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_a_layer_is_one_node_of_its_cell():
    traced = torch.jit.trace(Tagger().eval(), torch.randn(5, 3, 4))
    graph = traced.inlined_graph
    kinds = [node.kind() for node in graph.nodes() if node.kind().startswith("ostinato")]
    assert kinds == ["ostinato::gru", "ostinato::gru", "ostinato::lstm"]


class Outer(torch.nn.Module):
    """A module around what was traced."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def test_a_trace_within_a_trace_and_within_a_script():
    model = Tagger().eval()
    outer = Outer(torch.jit.trace(model, torch.randn(5, 3, 4)))
    x = torch.randn(8, 2, 4)
    for found in torch.jit.trace(outer, torch.randn(5, 3, 4)), torch.jit.script(outer):
        assert "ostinato::gru" in str(found.inlined_graph)
        assert torch.equal(found(x), 2 * model(x))


def test_weights_count_when_the_graph_runs():
    module = nn.GRU(4, 8)
    traced = torch.jit.trace(module, torch.randn(5, 3, 4))
    x = torch.randn(5, 3, 4)
    before = traced(x)[0]
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    assert_equal(traced(x), module(x))
    assert not torch.equal(traced(x)[0], before)


def test_other_dtypes_when_the_graph_runs():
    module = nn.LSTM(4, 8)
    traced = torch.jit.trace(module, torch.randn(5, 3, 4)).double()
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    assert_equal(traced(x), copy.deepcopy(module).double()(x))


@pytest.mark.cpu("a region of autocast on the CPU")
def test_a_region_of_autocast_that_the_trace_did_not_see():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), nn.GRU(4, 8))
    traced = torch.jit.trace(model, torch.randn(5, 3, 4))
    x = torch.randn(6, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = traced(x)[0], model(x)[0]
    assert output.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(output, expected)


def test_wrong_arguments_are_refused_while_tracing_and_running():
    module = nn.GRU(4, 8)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        torch.jit.trace(module, torch.randn(5, 3, 6))
    # A refusal leaves the tracer as it was.
    traced = torch.jit.trace(module, torch.randn(5, 3, 4))
    with pytest.raises(RuntimeError, match="weight_ih: expected shape"):
        traced(torch.randn(5, 3, 6))


@pytest.mark.parametrize("name", MODULES)
def test_the_operators_pass_torchs_checks(name):
    """Schema, fake tensors, autograd and compilation of what a trace calls."""
    module = getattr(nn, name)(4, 8)
    x, hx = shapes(name)
    states = [t if t.dim() == 3 else t[None] for t in flat(hx)]
    x = x if x.dim() == 3 else x[None]
    cell = record_of(name).name
    options = True, False, False, None, None, None, None, False
    given = x, None, *(*states, None)[:2], list(module.parameters()), *options
    operator = getattr(torch.ops.ostinato, cell).default
    torch.library.opcheck(operator, given)
    output, _, c_n, cells = operator(*given)
    expected = flat(module(x if name in LAYERS else x[0], hx))[0]
    assert torch.equal(output if name in LAYERS else output[0], expected)
    assert cells.numel() == 0
    assert (c_n.numel() > 0) == has_c(name)


# ---- what stands on a trace ----


def test_as_tensorboard_traces_a_graph():
    """What torch.utils.tensorboard's add_graph does before it writes."""
    model, x = Tagger(), torch.randn(5, 3, 4)
    with torch.onnx.select_model_mode_for_export(model, torch.onnx.TrainingMode.EVAL):
        graph = torch.jit.trace(model, x, strict=True).graph
        torch._C._jit_pass_inline(graph)
    assert [n.kind() for n in graph.nodes()].count("ostinato::gru") == 2


@pytest.mark.parametrize("name", SIX)
def test_torch_jit_script_is_refused_with_the_way_out(name):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), getattr(nn, name)(4, 8))
    for scripted in (model, model[1]):
        with pytest.raises(RuntimeError, match=rf"ostinato.nn.{name}.*torch.jit.trace.*restore"):
            torch.jit.script(scripted)
    # The model is as it was, and the way out is one.
    x, _ = shapes(name)
    expected = flat(model(x))
    ostinato.restore(model)
    torch.testing.assert_close(flat(torch.jit.script(model)(x)), expected)
