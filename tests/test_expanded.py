"""Gradients of each sample by torch.nn.utils' expanded weights, beside a loop over the samples."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from ostinato import nn
from support.cells import CELL_MODULES, LAYERS
from support.pairs import flat, state

per_sample = pytest.importorskip("torch.nn.utils._per_sample_grad").call_for_per_sample_grads

# torch makes its wrapped weights by a way of its own.
pytestmark = pytest.mark.cpu("what torch decomposes there is CPU code")

DOUBLE = {"dtype": torch.float64}
CASES = [{}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}, {"bias": False}]


def loss(results):
    """A number that tells every result from the others."""
    return sum(((k + 1) * tensor.cos()).sum() for k, tensor in enumerate(flat(results)))


def expanded(module, batch, *arguments, reduction="sum"):
    """Gradients of each sample, (B, ...), as torch's function leaves them."""
    for weight in module.parameters():
        weight.grad_sample = None
    call = per_sample(module, batch_size=batch, loss_reduction=reduction, batch_first=False)
    loss(call(*arguments)).backward()
    return [weight.grad_sample for weight in module.parameters()]


def looped(module, samples):
    """The same by a loop over the arguments of each sample."""
    weights = list(module.parameters())
    found = [torch.autograd.grad(loss(module(*each)), weights) for each in samples]
    return [torch.stack(gradients) for gradients in zip(*found, strict=True)]


def sample(value, b, dim=1):
    if isinstance(value, tuple):
        return tuple(sample(each, b, dim) for each in value)
    return value.narrow(dim, b, 1)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_padded_batch(name, case):
    module, x = getattr(nn, name)(4, 5, **case, **DOUBLE), torch.randn(6, 3, 4, **DOUBLE)
    expected = looped(module, [(sample(x, b),) for b in range(3)])
    assert_close(expanded(module, None, x), expected)
    # Where the loss is a mean, torch gives what the samples would have had without it.
    assert_close(expanded(module, None, x, reduction="mean"), [3 * each for each in expected])


@pytest.mark.parametrize("name", LAYERS)
def test_initial_states_and_their_gradients(name):
    module, x = getattr(nn, name)(4, 5, **DOUBLE), torch.randn(6, 3, 4, **DOUBLE)
    x.requires_grad_()
    hx = state(name, 1, 3, 5, requires_grad=True, **DOUBLE)
    expected = looped(module, [(sample(x, b), sample(hx, b)) for b in range(3)])
    inputs = [x, *flat(hx)]
    of_inputs = torch.autograd.grad(loss(module(x, hx)), inputs)
    assert_close(expanded(module, 3, x, hx), expected)
    assert_close([tensor.grad for tensor in inputs], list(of_inputs))


@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_batch(name):
    module, x = (
        getattr(nn, name)(4, 5, bidirectional=True, **DOUBLE),
        torch.randn(6, 3, 4, **DOUBLE),
    )
    lengths = torch.tensor([6, 4, 1], device="cpu")
    x.requires_grad_()
    packed = pack_padded_sequence(x, lengths)
    expected = looped(
        module, [(pack_padded_sequence(sample(x, b), lengths[b : b + 1]),) for b in range(3)]
    )
    (of_x,) = torch.autograd.grad(loss(module(packed)), x, retain_graph=True)
    # A packed batch may begin with fewer rows than there are samples: torch fills with zeros.
    found = expanded(module, 4, packed)
    assert_close([each[:3] for each in found], expected)
    assert all(each.shape[0] == 4 and not each[3].any() for each in found)
    assert_close(x.grad, of_x)


@pytest.mark.parametrize("name", CELL_MODULES)
def test_a_cell(name):
    module, x = getattr(nn, name)(4, 5, **DOUBLE), torch.randn(3, 4, **DOUBLE)
    expected = looped(module, [(sample(x, b, 0),) for b in range(3)])
    assert_close(expanded(module, 3, x), expected)


def test_torchs_gru_gets_the_same():
    x, results = torch.randn(6, 3, 4, **DOUBLE), []
    theirs, ours = torch.nn.GRU(4, 5, 2, **DOUBLE), nn.GRU(4, 5, 2, **DOUBLE)
    ours.load_state_dict(theirs.state_dict())
    results = [expanded(module, None, x) for module in (ours, theirs)]
    assert_close(*results)


def test_another_number_of_samples():
    module, x = nn.GRU(4, 5), torch.randn(6, 3, 4)
    with pytest.raises(RuntimeError, match="input batch size of 3 with ExpandedWeight of batch"):
        expanded(module, 2, x)
