"""`memory="recompute"`: the same bits as without, and next to nothing kept between the passes.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step, D directions.
"""

import copy
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from ostinato import _core, nn
from support.cells import FIRST_CELLS, KINDS, LAYERS
from support.devices import assert_equal
from support.pairs import layer_of
from support.tolerances import tolerance


def twins(name, *args, **options):
    """Return a layer that keeps its gates, and the same one that computes them again."""
    keeping = layer_of(name, *args, **options)
    again = layer_of(name, *args, **options, memory="recompute")
    again.load_state_dict(keeping.state_dict())
    return keeping, again


def tensors(result):
    """Flatten what a layer returned."""
    output, states = result
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(states if isinstance(states, tuple) else (states,))]


def passes(module, x, cotangents=None):
    """Run forward and backward; return all outputs and gradients, and random cotangents."""
    leaf = x.data if isinstance(x, PackedSequence) else x
    leaf = leaf.detach().clone().requires_grad_()
    results = tensors(module(x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf))
    if cotangents is None:
        cotangents = [torch.randn_like(result) for result in results]
    gradients = torch.autograd.grad(results, [leaf, *module.parameters()], cotangents)
    return [*(result.detach() for result in results), *gradients], cotangents


def kept_bytes(module, x):
    """Bytes that autograd saves beside input, output and parameters."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = tensors(module(x))[0]
    for known in (x, output, *module.parameters()):
        storages.pop(known.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def assert_same_bits(keeping, again, x):
    """Hold all outputs and gradients of the two with torch.equal."""
    expected, cotangents = passes(keeping, x)
    actual, _ = passes(again, x, cotangents)
    for one, other in zip(actual, expected, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 9), (23, 1), (17, 6), (300, 5)])
@pytest.mark.parametrize("name", KINDS)
def test_same_bits(name, steps, batch, bidirectional, threads):
    # The 1500 rows of 300 steps take two of backward's chunks at H 150.
    options = {"bidirectional": bidirectional, "num_layers": 2 if steps == 17 else 1}
    keeping, again = twins(name, 7, 150 if steps == 300 else 19, **options)
    x = torch.randn(steps, batch, 7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same_bits(keeping, again, x)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", KINDS)
def test_same_bits_where_rows_end_early(name):
    keeping, again = twins(name, 5, 33, bidirectional=True)
    x = pack_padded_sequence(torch.randn(40, 6, 5), [40, 31, 31, 8, 2, 1])
    assert_same_bits(keeping, again, x)


@pytest.mark.cpu("the compiled engine")
@pytest.mark.parametrize("isa", _core.instruction_sets())
def test_same_bits_on_every_instruction_set(isa):
    before = _core.isa()
    keeping, again = twins("lstm", 6, 21)
    x = torch.randn(9, 4, 6)
    try:
        _core.set_isa(isa)
        assert_same_bits(keeping, again, x)
    finally:
        _core.set_isa(before)


@pytest.mark.cpu("the compiled engine")
def test_what_is_kept():
    x = torch.randn(50, 8, 16)
    for name, kept, recomputed in (("rnn_tanh", 0, 0), ("gru", 4, 0), ("lstm", 5, 1)):
        keeping, again = twins(name, 16, 32)
        assert kept_bytes(again, x) == recomputed * 50 * 8 * 32 * 4
        assert kept_bytes(keeping, x) == kept * 50 * 8 * 32 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_any_dtype(name, dtype):
    # Complex numbers have no engine: the reference runs under torch's checkpointing.
    keeping, again = twins(name, 3, 5, dtype=dtype)
    x = torch.randn(4, 2, 3, dtype=dtype)
    assert_same_bits(keeping, again, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FIRST_CELLS)
def test_16_bits_start_from_rounded_states(name, dtype):
    keeping, again = twins(name, 5, 20, dtype=dtype)
    x = torch.randn(9, 4, 5, dtype=dtype)
    expected, cotangents = passes(keeping, x)
    actual, _ = passes(again, x, cotangents)
    assert_equal(actual[0], expected[0])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance(dtype, 9))


def test_the_reference_keeps_little_too():
    keeping, again = twins("gru", 16, 32, dtype=torch.complex64)
    x = torch.randn(50, 8, 16, dtype=torch.complex64)
    assert kept_bytes(again, x) == 0 < kept_bytes(keeping, x)


def test_it_compiles():
    _, again = twins("gru", 3, 4)
    x = torch.randn(5, 2, 3, requires_grad=True)
    output, _ = torch.compile(again, fullgraph=True, backend="aot_eager")(x)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    expected, _ = again(x)
    assert_equal(output, expected)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(gradient, expected_gradient)


def test_second_derivatives():
    _, again = twins("gru", 3, 4)
    again.double()
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: again(x)[0], x)


def test_functorch_sees_through():
    keeping, again = twins("gru", 3, 4)
    x = torch.randn(3, 2, 3)
    for module in (keeping, again):
        assert torch.func.grad(lambda x, m=module: m(x)[0].sum())(x).shape == x.shape


def test_torch_func_differentiates_what_the_reference_computes_again():
    """As on a GPU: torch.func knows no hooks of saved tensors, which a checkpoint sets."""
    gru = nn.GRU(3, 4, memory="recompute", dtype=torch.complex64)
    weights, x = dict(gru.named_parameters()), torch.randn(3, 5, 2, 3, dtype=torch.complex64)

    def loss(weights, x):
        return torch.func.functional_call(gru, weights, (x,))[0].abs().square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for k, sample in enumerate(x):
        expected = torch.autograd.grad(loss(weights, sample), [*weights.values()])
        for mine, other in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(mine[k], other)


def test_it_is_told_and_carried_along():
    layer = nn.GRU(3, 4, memory="recompute")
    assert repr(layer) == "GRU(3, 4, memory=recompute)"
    assert repr(nn.GRU(3, 4)) == repr(torch.nn.GRU(3, 4))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.memory == "recompute"
    torch.nn.GRU(3, 4).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("name", LAYERS)
def test_refusals(name):
    with pytest.raises(ValueError, match="memory: expected 'keep' or 'recompute', got 'less'"):
        getattr(nn, name)(3, 4, memory="less")


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_refused_after_construction_too(name):
    layer = getattr(nn, name)(3, 4)
    with pytest.raises(ValueError, match="memory: expected 'keep' or 'recompute', got 'foo'"):
        layer.memory = "foo"
    assert layer.memory == "keep"
    layer.memory = "recompute"
    assert layer.memory == "recompute"
