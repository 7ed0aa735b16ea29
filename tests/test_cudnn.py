"""The CUDA path: torch's own operator, one layer at a time.

The operator takes CPU tensors as well, so what `ostinato.cuda.cudnn` makes of the arguments is
tested everywhere.
"""

import pytest
import torch
from samples import SAMPLES, draw, gradients

from ostinato import nn, ops
from ostinato.call import Call, check
from ostinato.cuda import cudnn


def arguments(cell, packed, biases, directions, states):
    """Return ops.layer's arguments for a small float64 layer."""
    gates = {"gru": 3, "lstm": 4}.get(cell, 1)
    weights = []
    for _ in range(directions):
        weights += [torch.randn(gates * 4, 3), torch.randn(gates * 4, 4)]
        weights += [torch.randn(gates * 4), torch.randn(gates * 4)] if biases else []
    sizes = torch.tensor([3, 3, 2, 1]) if packed else None
    input = torch.randn(9, 3) if packed else torch.randn(4, 3, 3)
    h_0 = torch.randn(directions, 3, 4) if states else None
    c_0 = torch.randn(directions, 3, 4) if states and cell == "lstm" else None
    to_double = [None if t is None else t.double() for t in (input, h_0, c_0)]
    return to_double[0], sizes, to_double[1], to_double[2], [w.double() for w in weights]


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_torch_s_operator_gets_the_arguments_of_the_layer(cell, packed, biases, directions, states):
    input, sizes, h_0, c_0, weights = arguments(cell, packed, biases, directions, states)
    options = {"has_biases": biases, "bidirectional": directions == 2}
    expected = ops.layer(cell, input, sizes, h_0, c_0, weights, **options)
    layout = check(Call(input, sizes, 3, h_0, c_0, weights, cell, biases, directions == 2))
    actual = cudnn.layer(cell, input, sizes, layout, h_0, c_0, weights, biases)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# torch says so of its CPU operator, not of the one for CUDA.
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
# It knows no rows without steps, which no PackedSequence has either.
@pytest.mark.parametrize("kind", [kind for kind in SAMPLES if kind != "row of no steps"])
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


def test_what_torch_s_operator_does_not_serve():
    assert cudnn.serves(torch.zeros(2, 3, 4))
    assert not cudnn.serves(torch.zeros(0, 3, 4))
    assert not cudnn.serves(torch.zeros(2, 3, 4, dtype=torch.complex64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_layer_on_a_gpu_is_torch_s(kind):
    theirs = getattr(torch.nn, kind)(8, 16, 2, bidirectional=True, device="cuda")
    ours = getattr(nn, kind)(8, 16, 2, bidirectional=True, device="cuda")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 3, 8, device="cuda")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)
