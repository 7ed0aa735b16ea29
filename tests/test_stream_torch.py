"""Streams of torch's layers, ours and torch.nn's, and of its tensors."""

import copy

import numpy as np
import pytest
import torch

from ostinato import Stream, nn
from support.cells import LAYERS, TORCH_LAYERS


def layers_of(name):
    """Return modules of this name, and what each is made from."""
    yield getattr(nn, name)(5, 17, 2)
    yield getattr(nn, name)(5, 17, bias=False, dtype=torch.float64)
    if name in TORCH_LAYERS:
        yield getattr(torch.nn, name)(140, 33, 3, batch_first=True, dropout=0.5).eval()


@pytest.mark.parametrize("name", LAYERS)
def test_a_stream_has_the_bits_of_our_layer(name):
    for module in layers_of(name):
        ours = getattr(nn, name)(
            module.input_size, module.hidden_size, module.num_layers, bias=module.bias
        ).to(module.weight_ih_l0.dtype)
        ours.load_state_dict(module.state_dict())
        x = torch.randn(9, 4, module.input_size, dtype=module.weight_ih_l0.dtype)
        with torch.no_grad():
            output, hx = ours(x)
        stream = Stream.of(module, batch=4)
        parts = stream(x[:3]), stream(x[3])[None], stream(x[4:])
        assert torch.equal(torch.cat(parts), output)
        states = stream.state if isinstance(hx, tuple) else (stream.state,)
        for found, state in zip(states, hx if isinstance(hx, tuple) else (hx,), strict=True):
            assert torch.equal(torch.from_numpy(found), state)
        one = Stream.of(module)
        assert torch.equal(torch.stack([one(frame) for frame in x[:, 1]]), output[:, 1])
        stream.state = hx
        again = Stream.of(module, batch=4)
        again.state = stream.state
        assert torch.equal(stream(x), again(x))


@pytest.mark.parametrize("name", [f"{name}Cell" for name in LAYERS])
@pytest.mark.parametrize("library", [nn, torch.nn], ids=["ours", "torch's"])
def test_a_stream_has_the_bits_of_our_cell(name, library):
    if not hasattr(library, name):
        pytest.skip(f"torch.nn has no {name}")
    every = [{}, {"bias": False}]
    every += [{"nonlinearity": "relu"}] if name.startswith("RNN") else []
    for options in every:
        module = getattr(library, name)(5, 17, **options)
        ours = getattr(nn, name)(5, 17, **options)
        ours.load_state_dict(module.state_dict())
        stream, hx = Stream.of(module, batch=3), None
        for frame in torch.randn(4, 3, 5):
            with torch.no_grad():
                hx = ours(frame, hx)
            h = hx[0] if isinstance(hx, tuple) else hx
            assert torch.equal(stream(frame), h)


def test_tensors_come_back_as_tensors_and_arrays_as_arrays():
    module = nn.GRU(5, 7)
    stream, other = Stream.of(module, batch=3), Stream("gru", module.state_dict(), batch=3)
    x = torch.randn(6, 3, 5)
    rows = torch.tensor([2, 0])
    for given in (
        x,
        x[0],
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x[:0],
        torch.nn.Parameter(x[:2], False),
    ):
        output = stream(given)
        assert type(output) is torch.Tensor
        assert not output.requires_grad
        assert torch.equal(output, torch.from_numpy(other(given.numpy())))
    assert torch.equal(
        stream.step(x[0, :2], rows=rows),
        torch.from_numpy(other.step(x[0, :2].numpy(), rows=[2, 0])),
    )
    kept = stream(x[1])
    before = kept.clone()
    stream(x[2])
    assert torch.equal(kept, before)  # each output has memory of its own


def test_torchs_layers_and_tensors_take_the_fast_path():
    x = torch.randn(3, 5)
    for stream in (Stream.of(torch.nn.GRU(5, 7), batch=3), Stream.of(nn.LSTM(5, 7), batch=3)):
        assert stream._call(x) is not None
        assert stream._step(x[:1].numpy(), np.array([2])) is not None


def test_computed_weights_are_read():
    module = nn.GRU(4, 6)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(Stream.of(module)(x), module(x)[0])


def test_later_training_does_not_reach_a_stream():
    module = nn.GRU(4, 6)
    x = torch.randn(5, 4)
    stream = Stream.of(module)
    before = stream(x)
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
        output, _ = module(x)
    stream.reset()
    assert torch.equal(stream(x), before)
    stream.load(module.state_dict())
    stream.reset()
    assert torch.equal(stream(x), output)
    assert torch.equal(copy.deepcopy(stream)(x), stream(x))


def test_what_is_refused():
    module, x = nn.GRU(4, 6), torch.randn(5, 4)
    stream = Stream.of(module)
    for wrong, error, message in (
        (
            lambda: Stream.of(torch.nn.Linear(3, 3)),
            TypeError,
            r"module must be an RNN, GRU or LSTM .* got Linear",
        ),
        (lambda: Stream.of(torch.nn.Linear(3, 3)), TypeError, r"or a cell of these, got Linear"),
        (
            lambda: Stream.of(nn.LSTM(3, 3, bidirectional=True)),
            ValueError,
            r"expected one direction",
        ),
        (
            lambda: Stream.of(nn.GRU(3, 3, dtype=torch.bfloat16)),
            ValueError,
            r"one of float32, float64, int8, got 'bfloat16'",
        ),
        (lambda: stream(x.requires_grad_()), RuntimeError, r"needs no gradient"),
        (
            lambda: stream(torch.empty(5, 4, device="meta")),
            RuntimeError,
            r"a tensor on the CPU, got one on meta",
        ),
        (
            lambda: stream(x.detach().double()),
            ValueError,
            r"x: expected the dtype of the stream, float32",
        ),
        (lambda: stream(x.detach()[:, :3]), RuntimeError, r"rows of 4 numbers, got 3"),
    ):
        with pytest.raises(error, match=message):
            wrong()
    with torch.no_grad():
        output = stream(x)
    assert output.isfinite().all()
    assert not output.requires_grad
