"""The CUDA path: torch's own operator, a layer or a stack at a time.

The operator takes CPU tensors as well, so what `ostinato.cudnn` makes of the arguments is tested
everywhere.
"""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from ostinato import cudnn, nn, ops, reference_backend
from ostinato.call import Call, Results
from ostinato.cuda import layer
from ostinato.cudnn import differentiable_again
from ostinato.tensors import check_call
from support.cells import TORCH_CELLS, TORCH_LAYERS, has_c, record_of
from support.devices import OnGpu
from support.pairs import flat
from support.samples import SAMPLES, call_of, draw, gradients


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
    call = Call.of(input, sizes, 3, h_0, c_0, weights, cell, biases, directions == 2)
    actual = cudnn.run(call, check_call(call)).flat()
    expected = [t for t in expected if t is not None]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# torch says so of its CPU operator, not of the one for CUDA.
no_projection = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
# It knows no rows without steps, which no PackedSequence has either.
KINDS = [kind for kind, options in SAMPLES.items() if options["cell"] in TORCH_CELLS]
kinds = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "row of no steps"])


@no_projection
@kinds
def test_gradients_go_through_torch_s_operator(kind):
    sample = draw(**SAMPLES[kind], dtype=torch.float64).training()
    call, found = call_of(sample), []
    for run in (sample.run, lambda: cudnn.run(call, check_call(call)).flat()):
        results = run()
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


def once(results):
    """The same results, which can be differentiated once."""
    output, *last = map(Once.apply, results.flat())
    return Results(output, tuple(last))


@no_projection
@kinds
def test_the_reference_differentiates_again_what_torch_s_operator_cannot(kind):
    sample = draw(**SAMPLES[kind], dtype=torch.float64).training()

    def function(*leaves, again=differentiable_again):
        mine = sample.replaced(leaves)
        call = call_of(mine)
        return tuple(again(call, once(cudnn.run(call, check_call(call)))).flat())

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


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_torch_s_operator_is_given_dense_weights_and_states(cell, monkeypatch):
    # cuDNN's raises where a weight is a slice of others, as each model's is under vmap.
    sample = draw(cell)
    views = sample.each(lambda t: torch.stack([t, t], -1)[..., 0])
    operator, seen = cudnn.TORCH_OPERATORS[cell], []

    def watched(input, hx, weights, *options):
        seen.extend([*(hx if cell == "lstm" else [hx]), *weights])
        return operator(input, hx, weights, *options)

    monkeypatch.setitem(cudnn.TORCH_OPERATORS, cell, watched)
    found, expected = (
        cudnn.run(call, check_call(call)).flat() for call in map(call_of, (views, sample))
    )
    assert not any(leaf.is_contiguous() for leaf in views.leaves())
    assert all(tensor.is_contiguous() for tensor in seen)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


# ---- stacks ----


@pytest.mark.cpu("cuDNN draws dropout's numbers itself")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_a_stack_is_one_call_of_torch_s_operator(name, packed, training, monkeypatch):
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
    weights = list(theirs.parameters())
    call = Call.of(input, counts, 3, *states, weights, cell, True, True, layers=3)
    found = cudnn.layer(call._replace(dropout=0.5 * training)).flat()
    expected = flat(expected)
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
        call = Call.of(x, None, 2, h, c, list(weights), cell, True, False, layers=2)
        found = once(cudnn.run(call, check_call(call.of_layer(0, x))))
        return tuple(differentiable_again(call, found).flat())

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def on_gpu(call):
    return call._replace(input=OnGpu(call.input))


def test_rows_that_torch_s_operator_does_not_know():
    call = on_gpu(call_of(draw("gru", lengths=(4, 2, 1))))
    assert cudnn.why_not(call) is None
    for counts in (call.batch_sizes[:0], call.batch_sizes - 1):
        assert "rows without steps" in cudnn.why_not(call._replace(batch_sizes=counts))


def test_layers_that_an_engine_runs_are_no_stack(monkeypatch):
    call = call_of(draw("gru"))
    call = call._replace(weights=call.weights * 2, layers=2, initial=(None,))
    assert "not on a GPU" in cudnn.why_not(call)
    decision = layer.Decision(False, "cuDNN was faster")
    monkeypatch.setattr(layer, "decide", lambda call, is_training: decision)
    assert cudnn.why_not(on_gpu(call)) is None
    assert "by itself" in cudnn.why_not(on_gpu(call._replace(recompute=True)))
    decision = layer.Decision(True, "asked")
    assert "our kernels" in cudnn.why_not(on_gpu(call))


def test_results_that_change_before_backward_are_seen():
    sample = draw("gru").training()
    call = call_of(sample)
    output, (h_n,), _ = differentiable_again(call, cudnn.run(call, check_call(call)))
    h_n.mul_(2)
    (output.sum() + h_n.sum()).backward(retain_graph=True)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_batch_sizes_with_gaps_and_states_of_any_strides():
    sample = draw("lstm", lengths=(4, 2, 1))
    gaps = torch.stack([sample.batch_sizes, torch.full_like(sample.batch_sizes, 99)], -1)[:, 0]
    h_0 = sample.h_0.transpose(1, 2).contiguous().transpose(1, 2)
    call = call_of(sample)
    sizes = check_call(call)
    other = call._replace(batch_sizes=gaps, initial=(h_0, sample.c_0))
    actual, expected = (cudnn.run(each, sizes).flat() for each in (other, call))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0)])
@pytest.mark.parametrize("states", ["", "h", "hc"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_no_kernel_is_launched_for_no_rows(cell, states, steps, batch):
    sample = draw(cell, steps, batch, states=states, bidirectional=True).training()
    call = call_of(sample)._replace(all_states=True)
    with torch.no_grad():
        results, _ = layer._of_no_rows(call, check_call(call))
    expected = reference_backend.results(call).flat()
    torch.testing.assert_close(results.flat(), expected, rtol=0, atol=0)
    seeds = [torch.randn_like(r) for r in expected]
    wanted = [t is not None for t in call.tensors()]
    found = layer._gradients_of_no_rows(call, Results.of(seeds, len(call.initial)), wanted)
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
        call = call_of(sample)._replace(**wrong)
        assert not layer.decide(call, is_training=False).is_ours


def test_lengths_reach_the_reference_where_the_input_is():
    gru = nn.GRU(2, 3, dtype=torch.complex64, device="meta")
    x = torch.zeros(4, 2, 2, dtype=torch.complex64, device="meta")
    output, _ = gru(x, lengths=[4, 1])
    assert output.is_meta


def test_what_torch_s_operator_does_not_serve():
    call = call_of(draw("gru"))
    assert cudnn.why_not(on_gpu(call)) is None
    for input in (call.input[:0], call.input.to(torch.complex64)):
        assert "real numbers" in cudnn.why_not(on_gpu(call._replace(input=input)))
    assert "no resets" in cudnn.why_not(on_gpu(call._replace(lengths=torch.ones(3))))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("kind", TORCH_LAYERS)
def test_a_layer_on_a_gpu_is_torch_s(kind):
    theirs = getattr(torch.nn, kind)(8, 16, 2, bidirectional=True, device="cuda")
    ours = getattr(nn, kind)(8, 16, 2, bidirectional=True, device="cuda")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 3, 8, device="cuda")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_one_layer_has_no_dropout_and_is_differentiated_again(monkeypatch):
    module = nn.GRU(2, 3, dropout=0.5, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    run = cudnn.run
    monkeypatch.setattr(cudnn, "run", lambda *given: once(run(*given)))
    found = []
    for output in (cudnn.layer(module.call_of(x, None, None, None)).output, module(x)[0]):
        (slope,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), x))
    torch.testing.assert_close(*found)
    # What dropout drew between two layers is cuDNN's own.
    stack = nn.GRU(2, 3, 2, dropout=0.5, dtype=torch.float64)
    assert stack.call_of(x, None, None, None).dropout == 0.5
