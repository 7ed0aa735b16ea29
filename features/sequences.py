"""Ragged rows, episodes, states and dtypes."""

from __future__ import annotations

from typing import Any

import torch
from row import Row
from torch.nn.utils.rnn import pack_padded_sequence

LENGTHS = [2, 0, 5, 3]


def lengths_in_one_call(library: Any) -> None:
    gru = library.GRU(3, 4, num_layers=2, bidirectional=True)
    x = torch.randn(5, 4, 3)
    output, _ = gru(x, lengths=torch.tensor(LENGTHS))
    for row, length in enumerate(LENGTHS):
        assert not output[length:, row].any()
        if length:
            torch.testing.assert_close(output[:length, row], gru(x[:length, row])[0])


def a_row_without_steps(library: Any) -> None:
    x = torch.randn(5, 4, 3)
    try:
        packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    except RuntimeError:
        _, h_n = library.GRU(3, 4)(x, lengths=LENGTHS)
        assert not h_n[0, 1].any()
    else:
        library.GRU(3, 4)(packed)


def no_steps(library: Any) -> None:
    h_0 = torch.randn(1, 2, 4)
    output, h_n = library.GRU(3, 4)(torch.randn(0, 2, 3), h_0)
    assert output.shape == (0, 2, 4)
    assert torch.equal(h_n, h_0)


def episode_resets(library: Any) -> None:
    lstm = library.LSTM(3, 4)
    x = torch.randn(6, 2, 3, requires_grad=True)
    resets = torch.zeros(6, 2, dtype=torch.bool)
    resets[3, 1] = True
    output, _ = lstm(x, resets=resets)
    torch.testing.assert_close(output[3:, 1], lstm(x[3:, 1])[0])
    (grad,) = torch.autograd.grad(output[5, 1].sum(), x)
    assert not grad[:3].any()


def learned_resets(library: Any) -> None:
    gru = library.GRU(3, 4)
    start = torch.randn(1, 4, requires_grad=True)
    resets = torch.ones(6, 2, dtype=torch.bool)
    gru(torch.randn(6, 2, 3), resets=resets, reset_to=start)[0].sum().backward()
    assert start.grad.any()


def every_state(library: Any) -> None:
    lstm = library.LSTM(3, 4, num_layers=2)
    _, (h_n, c_n), (h, c) = lstm(torch.randn(5, 2, 3), return_all_states=True)
    assert h.shape == c.shape == (2, 5, 2, 4)
    assert torch.equal(c[:, -1], c_n)
    assert torch.equal(h[:, -1], h_n)
    c.sum().backward()


def one_dtype_under_autocast(library: Any) -> None:
    found = set()
    for name in ("RNN", "GRU", "LSTM"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.add(getattr(library, name)(3, 4)(torch.randn(5, 2, 3))[0].dtype)
    for name in ("RNNCell", "GRUCell", "LSTMCell"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = getattr(library, name)(3, 4)(torch.randn(2, 3))
        found.add((result[0] if isinstance(result, tuple) else result).dtype)
    assert len(found) == 1, f"six layers, {len(found)} dtypes"


def narrow_is_rounded_once(library: Any) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        gru = library.GRU(8, 16, dtype=dtype)
        x = torch.randn(50, 3, 8, dtype=dtype)
        wide = library.GRU(8, 16)
        wide.load_state_dict({n: p.float() for n, p in gru.state_dict().items()})
        assert torch.equal(gru(x)[0], wide(x.float())[0].to(dtype)), "rounded at every step"


def bits_of_a_row(library: Any) -> None:
    gru = library.GRU(64, 96)
    x = torch.randn(30, 16, 64)
    with torch.no_grad():
        assert torch.equal(gru(x)[0][:, 3], gru(x[:, 3])[0]), "other bits in another batch"


ROWS = [
    Row("Lengths in one call: unsorted, zeros allowed, any device", lengths_in_one_call),
    Row("A row without steps in a batch", a_row_without_steps),
    Row("A sequence of no steps", no_steps),
    Row("Episode resets inside a batch, the gradient cut there", episode_resets),
    Row("Resets to a learned state", learned_resets),
    Row("h and c of every layer at every step", every_state),
    Row("One dtype for all six under autocast", one_dtype_under_autocast),
    Row("16-bit layers rounded once, not at each step", narrow_is_rounded_once),
    Row("The same bits for a row in any batch", bits_of_a_row),
]
