"""Higher derivatives, forward mode and batches of gradients: from the engine's states, not a graph.

Legend: T steps, B batch, V elements of a batch of gradients.
"""

import functools

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from ostinato import nn, reference, reference_backend
from support.cells import FIRST_CELLS
from support.devices import on_cpu
from support.samples import SAMPLES, close, draw, forward_mode, gradients

pytestmark = pytest.mark.cpu("the compiled engine")

close = functools.partial(close, steps=64)
samples = pytest.mark.parametrize("kind", SAMPLES)
CELLS = {
    "RNNCell": lambda: nn.RNNCell(3, 4),
    "relu": lambda: nn.RNNCell(3, 4, nonlinearity="relu"),
    "GRUCell": lambda: nn.GRUCell(3, 4),
    "LSTMCell": lambda: nn.LSTMCell(3, 4),
    "GRUCell without bias": lambda: nn.GRUCell(3, 4, bias=False),
}
each_cell = pytest.mark.parametrize("kind", CELLS)


@pytest.fixture
def no_loop(monkeypatch):
    """Return a function after which the reference's loop over steps refuses to run."""

    def refuse(*_, **__):
        raise AssertionError("the reference's loop runs")

    def close_it():
        assert on_cpu()
        monkeypatch.setattr(reference, "states", refuse)

    return close_it


def double(kind):
    return draw(**SAMPLES[kind], dtype=torch.float64).training()


def orders(results, leaves):
    """First, second and third derivatives, each of a sum of what was found before."""
    found = [r.square() + r for r in results]
    derivatives = []
    for _ in range(3):
        total = sum((f * torch.linspace(-1, 2, f.numel()).view_as(f)).sum() for f in found)
        found = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
        derivatives.extend(found)
    return derivatives


@samples
def test_three_orders_without_a_loop(kind, no_loop):
    sample = double(kind)
    expected = orders(sample.reference(), sample.leaves())
    no_loop()
    close(orders(sample.run(), sample.leaves()), expected)


@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0), (1, 1), (1, 3)])
@pytest.mark.parametrize("cell", ["rnn_relu", "gru", "lstm"])
def test_three_orders_of_empty_and_single(cell, steps, batch, no_loop):
    sample = draw(cell, steps, batch, bidirectional=True, dtype=torch.float64).training()
    expected = orders(sample.reference(), sample.leaves())
    no_loop()
    close(orders(sample.run(), sample.leaves()), expected)


@pytest.mark.parametrize("which", [(0,), (-1,), (1, 2), (0, -2)])
@pytest.mark.parametrize("cell", FIRST_CELLS)
def test_second_order_by_some_alone(cell, which, no_loop):
    """What is not asked, and what needs no gradient, changes nothing."""
    sample = draw(cell, dtype=torch.float64)
    leaves = [sample.leaves()[k].requires_grad_() for k in which]
    expected = orders(sample.reference(), leaves)
    no_loop()
    close(orders(sample.run(), leaves), expected)


def test_second_order_by_the_last_state_alone(no_loop):
    sample = double("packed both ways")
    _, *states = sample.reference()
    expected = orders(states, sample.leaves())
    no_loop()
    _, *states = sample.run()
    close(orders(states, sample.leaves()), expected)


def along(run, leaves, moves):
    """What moves, by dual numbers; a result that does not move at all is zero."""
    with forward_ad.dual_level():
        duals = [
            leaf if move is None else forward_ad.make_dual(leaf, move)
            for leaf, move in zip(leaves, moves, strict=True)
        ]
        pairs = [forward_ad.unpack_dual(result) for result in run(*duals)]
        return [torch.zeros_like(p) if t is None else t for p, t in pairs]


@forward_mode
@pytest.mark.parametrize("which", ["all", "first", "last"])
@samples
def test_forward_mode_without_a_loop(kind, which, no_loop):
    sample = draw(**SAMPLES[kind], dtype=torch.float64)
    leaves = sample.leaves()
    moves = [torch.randn_like(leaf) for leaf in leaves]
    if which != "all":
        kept = 0 if which == "first" else len(leaves) - 1
        moves = [move if k == kept else None for k, move in enumerate(moves)]

    def theirs(*leaves):
        return tuple(sample.replaced(leaves).reference())

    def ours(*leaves):
        return tuple(sample.replaced(leaves).run())

    expected = along(theirs, leaves, moves)
    no_loop()
    close(along(ours, leaves, moves), expected)
    filled = [torch.zeros_like(p) if m is None else m for p, m in zip(leaves, moves, strict=True)]
    close(jvp(ours, tuple(leaves), tuple(filled))[1], expected)


@forward_mode
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "projected", "packed both ways"])
def test_dual_numbers_through_a_gradient(kind, no_loop):
    """A Hessian times a vector: forward mode over autograd, without torch.func."""
    sample = double(kind)
    moves = [torch.randn_like(leaf) for leaf in sample.leaves()]

    def slopes(run):
        def found(*leaves):
            results = run(sample.replaced(leaves))
            loss = sum(r.square().sum() for r in results)
            return torch.autograd.grad(loss, leaves, create_graph=True)

        return found

    expected = along(slopes(lambda s: s.reference()), sample.leaves(), moves)
    no_loop()
    close(along(slopes(lambda s: s.run()), sample.leaves(), moves), expected)


@samples
def test_a_batch_of_gradients_has_the_bits_of_a_loop(kind, no_loop, monkeypatch):
    """is_grads_batched runs the engine, once."""
    sample = draw(**SAMPLES[kind]).training()
    results = sample.run()
    seeds = [torch.randn(5, *r.shape) for r in results]
    no_loop()
    monkeypatch.setattr(reference, "STEPS", {})
    options = {"retain_graph": True}
    actual = gradients(results, sample.leaves(), seeds, is_grads_batched=True, **options)
    each = [
        gradients(results, sample.leaves(), seed, **options) for seed in zip(*seeds, strict=True)
    ]
    for a, e in zip(actual, zip(*each, strict=True), strict=True):
        assert torch.equal(a, torch.stack(e))


def test_a_batch_of_second_derivatives(no_loop):
    """A vectorized Hessian: a batch arrives at the gradient of a gradient."""
    sample = draw("lstm", bidirectional=True, dtype=torch.float64)

    def loss(run):
        return lambda x: sum(r.square().sum() for r in run(sample._replace(input=x)))

    hessian = torch.autograd.functional.hessian
    expected = hessian(loss(lambda s: s.reference()), sample.input)
    no_loop()
    ours = loss(lambda s: s.run())
    for options in ({}, {"vectorize": True}):
        close([hessian(ours, sample.input, **options)], [expected])


@forward_mode
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "projected", "packed both ways"])
def test_gradcheck_of_every_kind(kind):
    sample = double(kind)

    def run(*leaves):
        return tuple(sample.replaced(leaves).run())

    assert gradcheck(run, sample.leaves(), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, sample.leaves(), check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(run, sample.leaves(), check_fwd_over_rev=True, fast_mode=True)


# ---- cells ----


def of_cell(kind, lead=(2,)):
    """A cell by the engine, the same by the reference, and what both take."""
    module = CELLS[kind]().double()
    is_lstm = kind.startswith("LSTM")
    x, h = torch.randn(*lead, 3).double(), torch.randn(*lead, 4).double()
    states = (h, torch.randn(*lead, 4).double()) if is_lstm else (h,)

    def ours(x, *states):
        found = module(x, states if is_lstm else states[0])
        return found if is_lstm else (found,)

    def theirs(x, *states):
        name = "lstm" if is_lstm else "gru" if "GRU" in kind else f"rnn_{module.nonlinearity}"
        h_0, c_0 = (*(s.reshape(1, -1, 4) for s in states), None)[:2]
        weights = list(module.parameters())
        found = reference.layer(
            name, x.reshape(1, -1, 3), None, h_0, c_0, weights,
            has_biases=len(weights) == 4, bidirectional=False,
        )  # fmt: skip
        return tuple(s.reshape(*lead, 4) for s in found[1:] if s is not None)

    return ours, theirs, (x, *states)


@forward_mode
@pytest.mark.parametrize("lead", [(2,), ()])
@each_cell
def test_jacobians_of_a_cell(kind, lead):
    ours, theirs, primals = of_cell(kind, lead)
    which = tuple(range(len(primals)))
    expected = [j for row in jacrev(theirs, which)(*primals) for j in row]
    for jacobian in (jacrev, jacfwd):
        close([j for row in jacobian(ours, which)(*primals) for j in row], expected)
    vectorized = torch.autograd.functional.jacobian(ours, primals, vectorize=True)
    rows = vectorized if isinstance(vectorized[0], tuple) else (vectorized,)
    close([j for row in rows for j in row], expected)


@pytest.mark.parametrize("lead", [(2,), ()])
@each_cell
def test_three_orders_of_a_cell(kind, lead):
    ours, theirs, primals = of_cell(kind, lead)
    leaves = [primal.requires_grad_() for primal in primals]
    close(orders(ours(*leaves), leaves), orders(theirs(*leaves), leaves))


@each_cell
def test_a_batch_of_gradients_of_a_cell_has_the_bits_of_a_loop(kind, monkeypatch):
    ours, _, primals = of_cell(kind)
    leaves = [primal.requires_grad_() for primal in primals]
    results = ours(*leaves)
    seeds = [torch.randn(5, *r.shape).double() for r in results]
    monkeypatch.setattr(reference, "STEPS", {})
    actual = gradients(results, leaves, seeds, is_grads_batched=True, retain_graph=True)
    each = [
        gradients(results, leaves, seed, retain_graph=True) for seed in zip(*seeds, strict=True)
    ]
    for a, e in zip(actual, zip(*each, strict=True), strict=True):
        assert torch.equal(a, torch.stack(e))


@each_cell
def test_a_gradient_for_each_row_of_a_cell_has_the_bits_of_a_loop(kind, monkeypatch):
    """Mapped over rows, grad stays on the engine, though grad alone does not."""
    ours, _, primals = of_cell(kind, (5, 2))
    loss = grad(lambda *primals: sum(r.square().sum() for r in ours(*primals)))
    monkeypatch.setattr(reference, "STEPS", {})
    actual = vmap(loss)(*primals)
    for v in range(5):
        leaves = [primal[v].clone().requires_grad_() for primal in primals]
        total = sum(r.square().sum() for r in ours(*leaves))
        assert torch.equal(actual[v], torch.autograd.grad(total, leaves[0])[0])


def test_only_what_is_asked_is_computed(monkeypatch):
    """A gradient by one argument computes no others, where torch's operators compute none."""
    asked, found = [], nn.GRUCell(3, 4)
    original = reference_backend.gradients

    def watch(call, arrived, wanted, is_step=False):
        asked.append(list(wanted))
        return original(call, arrived, wanted, is_step)

    monkeypatch.setattr(reference_backend, "gradients", watch)
    x, h = torch.randn(2, 3), torch.randn(2, 4, requires_grad=True)
    torch.autograd.grad(found(x, h).sum(), h, create_graph=True)
    leaves = [h, *found.parameters()]
    torch.autograd.grad(found(x, h).sum(), leaves, create_graph=True)
    assert [sum(each) for each in asked] == [1, 5]
