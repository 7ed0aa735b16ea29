"""The CUDA path: torch's own operator, a layer or a stack at a time.

The operator takes CPU tensors as well, so what `ostinato.cuda.cudnn` makes of the arguments is
tested everywhere.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from ostinato import fallback, nn, ops
from ostinato.call import Call, check
from ostinato.cuda import cudnn, layer
from ostinato.gradients import differentiable_again, reference_results
from support.cells import TORCH_CELLS, TORCH_LAYERS, has_c, record_of
from support.pairs import flat
from support.samples import SAMPLES, draw, gradients


def arguments(cell, packed, biases, directions, states):
    """Return ops.layer's arguments for a small float64 layer."""
    lengths, given = (4, 3, 2) if packed else None, "hc" if states else ""
    options = {"bias": biases, "bidirectional": directions == 2, "lengths": lengths}
    return draw(cell, 4, 3, 3, 4, states=given, dtype=torch.float64, **options)[1:6]


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_torch_s_operator_gets_the_arguments_of_the_layer(cell, packed, biases, directions, states):
    input, sizes, h_0, c_0, weights = arguments(cell, packed, biases, directions, states)
    options = {"has_biases": biases, "bidirectional": directions == 2}
    expected = ops.layer(cell, input, sizes, h_0, c_0, weights, **options)
    layout = check(Call(input, sizes, 3, h_0, c_0, weights, cell, biases, directions == 2))
    actual = cudnn.layer(cell, input, sizes, layout, h_0, c_0, weights, biases)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# torch says so of its CPU operator, not of the one for CUDA.
no_projection = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
# It knows no rows without steps, which no PackedSequence has either.
kinds = pytest.mark.parametrize("kind", [kind for kind in SAMPLES if kind != "row of no steps"])


@no_projection
@kinds
def test_gradients_go_through_torch_s_operator(kind):
    sample = draw(**SAMPLES[kind], dtype=torch.float64).training()
    call = Call(*sample.operator_arguments()[:-2])
    found = []
    for run in (
        lambda *arguments, **options: ops.layer(*arguments, **options),
        lambda cell, input, sizes, h_0, c_0, weights, **_: cudnn.layer(
            cell, input, sizes, check(call), h_0, c_0, weights, call.has_biases
        ),
    ):
        results = sample.run(run)
        seeds = [torch.ones_like(result) for result in results]
        found.append([*results, *gradients(results, sample.leaves(), seeds)])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


class Once(torch.autograd.Function):
    """Ends all derivatives but the first, as cuDNN's operator does."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad


@no_projection
@kinds
def test_the_reference_differentiates_again_what_torch_s_operator_cannot(kind):
    sample = draw(**SAMPLES[kind], dtype=torch.float64).training()

    def function(*leaves, again=differentiable_again):
        mine = sample.replaced(leaves)
        call = Call(*mine.operator_arguments()[:-2])
        states = mine.h_0, mine.c_0, mine.weights, mine.has_biases
        found = cudnn.layer(mine.cell, mine.input, mine.batch_sizes, check(call), *states)
        results = [None if result is None else Once.apply(result) for result in found]
        return tuple(r for r in again(call, (*results, None)) if r is not None)

    assert torch.autograd.gradgradcheck(function, sample.leaves(), fast_mode=True)
    output = function(*sample.leaves())[0]
    seeds = torch.randn(2, *output.shape, dtype=torch.float64)
    options = {"retain_graph": True, "materialize_grads": True}
    batched = torch.autograd.grad(output, sample.leaves(), seeds, is_grads_batched=True, **options)
    for index, seed in enumerate(seeds):
        one = torch.autograd.grad(output, sample.leaves(), seed, **options)
        torch.testing.assert_close([grad[index] for grad in batched], list(one))

    def as_it_is(*leaves):
        return function(*leaves, again=lambda _, results: results)

    options = {"fast_mode": True, "raise_exception": False}
    assert not torch.autograd.gradgradcheck(as_it_is, sample.leaves(), **options)


# ---- stacks ----


@pytest.mark.cpu("cuDNN draws dropout's numbers itself")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_a_stack_is_one_call_of_torch_s_operator(name, packed, training, monkeypatch):
    monkeypatch.setattr(fallback, "serves", lambda call: True)
    decision = layer.Decision(False, "cuDNN was faster")
    monkeypatch.setattr(layer, "decide", lambda call, is_training: decision)
    options = {"num_layers": 3, "bidirectional": True, "dropout": 0.5}
    theirs = getattr(torch.nn, name)(4, 6, **options).train(training)
    x = torch.randn(5, 3, 4, requires_grad=True)
    h = torch.randn(6, 3, 6, requires_grad=True)
    hx = (h, h * 2) if has_c(name) else h
    given = pack_padded_sequence(x, [5, 4, 2]) if packed else x
    torch.manual_seed(1)
    expected = theirs(given, hx)
    torch.manual_seed(1)
    cell = record_of(name).name
    input, counts = (given.data, given.batch_sizes) if packed else (x, None)
    states = hx if has_c(name) else (hx, None)
    flags = {"layers": 3, "has_biases": True, "bidirectional": True}
    weights = list(theirs.parameters())
    found = fallback.stack(
        *(cell, input, counts, *states, weights), **flags, dropout=0.5 * training
    )
    found, expected = [t for t in found if t is not None], flat(expected)
    seeds = [torch.randn_like(t) for t in found]
    leaves = [x, h, *weights]
    mine, other = (gradients(t, leaves, seeds, retain_graph=True) for t in (found, expected))
    for one, two in zip([*found, *mine], [*expected, *other], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_stack_is_differentiated_again(cell):
    module = (torch.nn.LSTM if cell == "lstm" else torch.nn.GRU)(2, 3, 2, dtype=torch.float64)
    leaves = [torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(2, 2, 3, dtype=torch.float64)]
    leaves = [t.requires_grad_() for t in leaves] + list(module.parameters())

    def function(x, h, *weights):
        c = h * 2 if cell == "lstm" else None
        call = Call(x, None, 2, h, c, list(weights), cell, True, False)
        sizes = check(call._replace(h_0=None, c_0=None, weights=list(weights[:4])))
        found = cudnn.layer(cell, x, None, sizes, h, c, list(weights), True, 2)
        results = [None if result is None else Once.apply(result) for result in found]
        found = differentiable_again(call, (*results, None), 2)
        return tuple(r for r in found if r is not None)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_rows_that_torch_s_operator_does_not_know(monkeypatch):
    sample = draw("gru", lengths=(4, 2, 1))
    call = Call(*sample.operator_arguments()[:-2])
    on_gpu = call._replace(input=SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(cudnn, "serves", lambda input: True)
    assert fallback.serves(on_gpu)
    for counts in (call.batch_sizes[:0], call.batch_sizes - 1):
        assert not fallback.serves(on_gpu._replace(batch_sizes=counts))


def test_layers_that_an_engine_runs_are_no_stack(monkeypatch):
    sample = draw("gru")
    flags = {"layers": 1, "has_biases": True, "bidirectional": False, "dropout": 0.0}
    arguments = sample.cell, sample.input, None, sample.h_0, None, sample.weights
    assert fallback.stack(*arguments, **flags) is None  # on the CPU
    monkeypatch.setattr(fallback, "serves", lambda call: True)
    monkeypatch.setattr(layer, "decide", lambda call, is_training: layer.Decision(True, "asked"))
    assert fallback.stack(*arguments, **flags) is None


def test_results_that_change_before_backward_are_seen():
    sample = draw("gru").training()
    call = Call(*sample.operator_arguments()[:-2])
    states = sample.h_0, None, sample.weights, True
    found = cudnn.layer("gru", sample.input, None, check(call), *states)
    output, h_n, *_ = differentiable_again(call, (*found, None))
    h_n.mul_(2)
    (output.sum() + h_n.sum()).backward(retain_graph=True)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_batch_sizes_with_gaps_and_states_of_any_strides():
    sample = draw("lstm", lengths=(4, 2, 1))
    gaps = torch.stack([sample.batch_sizes, torch.full_like(sample.batch_sizes, 99)], -1)[:, 0]
    h_0 = sample.h_0.transpose(1, 2).contiguous().transpose(1, 2)
    sizes = check(Call(*sample.operator_arguments()[:-2]))
    rest = sample.c_0, sample.weights, True
    expected = cudnn.layer("lstm", sample.input, sample.batch_sizes, sizes, sample.h_0, *rest)
    actual = cudnn.layer("lstm", sample.input, gaps, sizes, h_0, *rest)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0)])
@pytest.mark.parametrize("states", ["", "h", "hc"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_no_kernel_is_launched_for_no_rows(cell, states, steps, batch):
    sample = draw(cell, steps, batch, states=states, bidirectional=True).training()
    call = Call(*sample.operator_arguments()[:-2])
    with torch.no_grad():
        results = layer._of_no_rows(call, check(call), True)[: 2 + 2 * has_c(cell)]
    expected = [r for r in reference_results(call, True) if r is not None]
    torch.testing.assert_close(list(results), expected, rtol=0, atol=0)
    seeds = [torch.randn_like(r) for r in expected]
    wanted = [t is not None for t in call.tensors()]
    found = layer._gradients_of_no_rows(call, (*seeds, None, None)[:4], wanted)
    # Without steps and states, no result depends on anything.
    pairs = [pair for pair in zip(expected, seeds, strict=True) if pair[0].requires_grad]
    grads = map(torch.zeros_like, sample.leaves())
    if pairs:
        grads = gradients([r for r, _ in pairs], sample.leaves(), [seed for _, seed in pairs])
    mine = [grad for grad, want in zip(found, wanted, strict=True) if want]
    torch.testing.assert_close(mine, list(grads), rtol=0, atol=0)


def test_wrong_arguments_are_left_to_the_checks():
    sample = draw("gru")
    for wrong in ({"cell": "elman"}, {"input": sample.input[0, 0, 0]}, {"weights": []}):
        call = Call(*sample.operator_arguments()[:-2])._replace(**wrong)
        assert not layer.decide(call, is_training=False).is_ours


def test_lengths_reach_the_reference_where_the_input_is():
    gru = nn.GRU(2, 3, dtype=torch.complex64, device="meta")
    x = torch.zeros(4, 2, 2, dtype=torch.complex64, device="meta")
    output, _ = gru(x, lengths=[4, 1])
    assert output.is_meta


def test_what_torch_s_operator_does_not_serve():
    assert cudnn.serves(torch.zeros(2, 3, 4))
    assert not cudnn.serves(torch.zeros(0, 3, 4))
    assert not cudnn.serves(torch.zeros(2, 3, 4, dtype=torch.complex64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("kind", TORCH_LAYERS)
def test_a_layer_on_a_gpu_is_torch_s(kind):
    theirs = getattr(torch.nn, kind)(8, 16, 2, bidirectional=True, device="cuda")
    ours = getattr(nn, kind)(8, 16, 2, bidirectional=True, device="cuda")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 3, 8, device="cuda")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)
