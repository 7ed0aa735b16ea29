"""Cells, whoever looks on: their outputs may be changed in place, and any weights are served well.

Legend: B batch, I input, H hidden.
"""

import contextlib
import functools
import shutil

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ostinato import cpu, nn
from support.cells import CELL_MODULES, LAYERS, TORCH_CELL_MODULES, has_c
from support.devices import device_type

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler"),
    ),
]
B, I, H = 3, 4, 5
# What torch.nn's cells let be changed before backward: not the output of RNNCell, which it reads.
CHANGED = ("GRUCell", "LSTMCell")


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


# Who looks on, or closes the fast path in another way.
LOOKERS = {
    "nobody": contextlib.nullcontext,
    "the profiler": lambda: profile(activities=[ProfilerActivity.CPU]),
    "the flop counter": lambda: FlopCounterMode(display=False),
    "a dispatch mode": Mode,
    "autocast": lambda: torch.autocast(device_type(), torch.bfloat16),
    "forward mode": forward_ad.dual_level,
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.complex64: {"rtol": 1e-5, "atol": 1e-6},
}


def make(name, dtype=torch.float32, seed=0):
    """A cell of ours, and input and states that require gradients."""
    torch.manual_seed(seed)
    cell = getattr(nn, name)(I, H, dtype=dtype)
    states = 1 + has_c(name)
    tensors = [torch.randn(B, size, dtype=dtype) for size in (I, *[H] * states)]
    return cell, [t.requires_grad_() for t in tensors]


def results(cell, x, *states):
    """The results of a call, as a tuple."""
    found = cell(x, states if len(states) == 2 else states[0])
    return found if isinstance(found, tuple) else (found,)


def zeroed(states, done, *, in_place):
    """Begin some rows anew, as users of cells write it, or as it can always be written."""
    if not in_place:
        return tuple(torch.where(done[:, None], torch.zeros_like(s), s) for s in states)
    for state in states:
        state[done] = 0
    return states


def gradients(call, cell, inputs, *, in_place):
    """Take two steps with an end between them; return their results and every gradient."""
    done = torch.tensor([False, True, False])
    states = zeroed(call(*inputs), done, in_place=in_place)
    states = call(inputs[0], *states)
    if in_place:
        for state in states:
            state.mul_(2)
    else:
        states = tuple(2 * state for state in states)
    loss = sum((s * s.conj()).real.sum() for s in states)
    wanted = [*inputs, *cell.parameters()]
    for leaf in wanted:
        leaf.grad = None
    # The flop counter's hooks do not know torch.autograd.grad.
    loss.backward()
    return [*(s.detach() for s in states), *(leaf.grad for leaf in wanted)]


def check(call, cell, inputs, dtype=torch.float32):
    """Compare changes in place with what does not change anything, without a looker."""
    actual = gradients(call, cell, inputs, in_place=True)
    expected = gradients(lambda *a: results(cell, *a), cell, inputs, in_place=False)
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("looker", LOOKERS)
@pytest.mark.parametrize("name", CHANGED)
def test_outputs_may_be_changed_in_place(name, looker):
    cell, inputs = make(name)
    with LOOKERS[looker]():
        actual = gradients(lambda *a: results(cell, *a), cell, inputs, in_place=True)
    expected = gradients(lambda *a: results(cell, *a), cell, inputs, in_place=False)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CHANGED)
def test_outputs_of_any_dtype_may_be_changed_in_place(name, dtype):
    cell, inputs = make(name, dtype)
    check(lambda *a: results(cell, *a), cell, inputs, dtype)


@pytest.mark.parametrize("name", CHANGED)
def test_outputs_may_be_changed_in_place_without_the_fast_path(name, monkeypatch):
    monkeypatch.setattr(cpu, "IS_OPEN", False)
    cell, inputs = make(name)
    check(lambda *a: results(cell, *a), cell, inputs)


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHANGED)
def test_outputs_may_be_changed_in_place_in_a_compiled_graph(name, backend):
    cell, inputs = make(name)

    def steps(*arguments, in_place=True):
        done = torch.tensor([False, True, False])
        states = zeroed(results(cell, *arguments), done, in_place=in_place)
        return zeroed(results(cell, arguments[0], *states), ~done, in_place=in_place)

    torch._dynamo.reset()
    compiled = torch.compile(steps, fullgraph=True, backend=backend)
    actual = gradients(compiled, cell, inputs, in_place=True)
    plain = functools.partial(steps, in_place=False)
    expected = gradients(plain, cell, inputs, in_place=False)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])
    # What a graph gives is the caller's to change, too.
    step = torch.compile(lambda *a: results(cell, *a), fullgraph=True, backend=backend)
    check(step, cell, inputs)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CELL_MODULES)
def test_outputs_may_be_changed_in_place_under_transforms(name):
    cell, inputs = make(name)

    def changed(*arguments):
        return tuple(state.mul_(2) for state in results(cell, *arguments))

    expected = [2 * state for state in results(cell, *inputs)]
    mapped = torch.func.vmap(changed)(*inputs)
    torch.testing.assert_close(list(mapped), expected)

    def loss(x):
        return sum(state.square().sum() for state in changed(x, *inputs[1:]))

    if name in CHANGED:
        whole = sum(state.square().sum() for state in expected)
        (of_x,) = torch.autograd.grad(whole, inputs[0])
        torch.testing.assert_close(torch.func.grad(loss)(inputs[0]), of_x)
        rows = torch.func.vmap(
            torch.func.grad(lambda x, *s: sum(state.square().sum() for state in changed(x, *s)))
        )
        torch.testing.assert_close(rows(*inputs), of_x)


@pytest.mark.parametrize("shape", ["rows", "one row"])
@pytest.mark.parametrize("looker", LOOKERS)
@pytest.mark.parametrize("name", CELL_MODULES)
def test_outputs_may_be_detached_in_place(name, looker, shape):
    cell, inputs = make(name)
    if shape == "one row":
        inputs = [t[0] for t in inputs]
    with LOOKERS[looker]():
        for state in results(cell, *inputs):
            assert not state._is_view()
            assert state.requires_grad
            assert state.detach_() is state
            assert state.is_leaf
            assert not state.requires_grad


@pytest.mark.parametrize("name", CELL_MODULES)
def test_outputs_on_meta_may_be_changed_and_detached(name):
    cell, inputs = make(name)
    cell, inputs = cell.to("meta"), [t.to("meta") for t in inputs]
    for state in results(cell, *inputs):
        assert state.is_meta
        assert not state._is_view()
        state.mul_(2)
        state.detach_()


# Where the result of RNNCell is what its backward reads, as it always is in torch.nn.
READ = ("nobody", "the profiler", "forward mode")


@pytest.mark.cpu("the fast path")
@pytest.mark.skipif(not cpu.IS_OPEN, reason="this torch has no table of C functions")
@pytest.mark.parametrize("looker", READ)
def test_what_backward_reads_may_not_be_changed(looker):
    """As with torch.nn.RNNCell: it raises, rather than giving wrong gradients."""
    for library in (torch.nn, nn):
        with LOOKERS[looker]():
            h = library.RNNCell(I, H)(torch.randn(B, I))
            h.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                h.sum().backward()


@pytest.mark.parametrize("looker", [looker for looker in LOOKERS if looker not in READ])
def test_gradients_of_a_changed_rnn_cell_are_right(looker):
    """Where a change does not raise, the result is not what backward reads."""
    cell, inputs = make("RNNCell")
    with LOOKERS[looker]():
        actual = gradients(lambda *a: results(cell, *a), cell, inputs, in_place=True)
    expected = gradients(lambda *a: results(cell, *a), cell, inputs, in_place=False)
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("looker", LOOKERS)
@pytest.mark.parametrize("name", CHANGED)
def test_one_row_may_be_changed_in_place(name, looker):
    cell, inputs = make(name)
    inputs = [t.detach()[0].requires_grad_() for t in inputs]
    wanted = [*inputs, *cell.parameters()]

    def found(double):
        for leaf in wanted:
            leaf.grad = None
        sum(double(state).square().sum() for state in results(cell, *inputs)).backward()
        return [leaf.grad for leaf in wanted]

    expected = found(lambda state: 2 * state)
    with LOOKERS[looker]():
        actual = found(lambda state: state.mul_(2))
    torch.testing.assert_close(actual, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", TORCH_CELL_MODULES)
def test_a_cell_without_units(name):
    cell = getattr(nn, name)(I, 0)
    expected = getattr(torch.nn, name)(I, 0)(torch.zeros(B, I))
    found = cell(torch.zeros(B, I))
    torch.testing.assert_close(found, expected)


# ---- weights that are no parameters ----


def as_buffers(cell):
    """Make a reservoir of a cell: weights that nobody trains."""
    for name, weight in list(cell.named_parameters()):
        delattr(cell, name)
        cell.register_buffer(name, weight.detach().clone())
    return cell


def as_attributes(cell):
    """Keep weights as plain tensors, as hypernetworks do."""
    for name, weight in list(cell.named_parameters()):
        delattr(cell, name)
        setattr(cell, name, 1 * weight)
    return cell


def with_weight_norm(cell):
    return parametrizations.weight_norm(cell, "weight_hh")


def counted_calls(monkeypatch):
    """Say of each call whether the fast path serves it, and as a cell's."""
    served = []
    forward = cpu._core.tensors_forward

    def tensors_forward(*arguments):
        found = forward(*arguments)
        served.append((found is not None, arguments[1]))
        return found

    monkeypatch.setattr(cpu._core, "tensors_forward", tensors_forward)
    return served


@pytest.mark.cpu("the fast path")
@pytest.mark.skipif(not cpu.IS_OPEN, reason="this torch has no table of C functions")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", [as_buffers, as_attributes, with_weight_norm])
@pytest.mark.parametrize("name", CELL_MODULES)
def test_any_weights_take_the_fast_path(name, change, training, monkeypatch):
    cell, inputs = make(name)
    with torch.no_grad():
        expected = results(cell, *inputs)
    changed = change(cell)
    served = counted_calls(monkeypatch)
    with torch.set_grad_enabled(training):
        found = results(changed, *inputs)
    assert served == [(True, True)]
    torch.testing.assert_close(found, expected)
    if training:
        assert all(state.requires_grad for state in found)


@pytest.mark.cpu("the fast path")
@pytest.mark.skipif(not cpu.IS_OPEN, reason="this torch has no table of C functions")
@pytest.mark.parametrize("name", LAYERS)
def test_any_weights_of_a_layer_take_the_fast_path(name, monkeypatch):
    layer, x = as_buffers(getattr(nn, name)(I, H)), torch.randn(2, B, I, requires_grad=True)
    served = counted_calls(monkeypatch)
    output, _ = layer(x)
    assert served == [(True, False)]
    assert output.requires_grad


@pytest.mark.parametrize("name", CELL_MODULES)
def test_a_parametrization_runs_once(name):
    """Spectral norm changes its vectors whenever it is asked in training."""

    class Counted(torch.nn.Module):
        calls = 0

        def forward(self, weight):
            Counted.calls += 1
            return 2 * weight

    cell, inputs = make(name)
    torch.nn.utils.parametrize.register_parametrization(cell, "weight_hh", Counted())
    for looker in LOOKERS.values():
        Counted.calls = 0
        with looker():
            results(cell, *inputs)
        assert Counted.calls == 1
