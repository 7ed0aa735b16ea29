"""Training: of copies, and of parts of a batch. Two processes: tests/test_distributed.py."""

from __future__ import annotations

import copy
from typing import Any

import torch
from row import Row
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

_KINDS = ("RNN", "GRU", "LSTM")
_BATCH = 6


def _layer(library: Any, kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(library, kind)(5, 7, 2, bidirectional=True)


def _step(
    model: torch.nn.Module, parameters: list[torch.nn.Parameter], step: int, rank: int, world: int
) -> None:
    """Do one step of gradient descent on one process's rows of a batch."""
    batch = torch.randn(9, _BATCH, 5, generator=torch.Generator().manual_seed(step))
    rows = batch.chunk(world, 1)[rank]
    (model(rows)[0].square().sum() * world / _BATCH).backward()
    torch.optim.SGD(parameters, 0.05).step()
    for parameter in parameters:
        parameter.grad = None


def _trained(library: Any, kind: str, steps: int = 3) -> torch.nn.Module:
    layer = _layer(library, kind)
    for step in range(steps):
        _step(layer, list(layer.parameters()), step, 0, 1)
    return layer


def _copies(library: Any) -> None:
    input = torch.randn(9, _BATCH, 5)
    for kind in _KINDS:
        layer = _layer(library, kind)
        target = copy.deepcopy(layer)
        average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        parameters = list(layer.parameters())
        for step in range(3):
            _step(layer, parameters, step, 0, 1)
            average.update_parameters(layer)
            for p, q in zip(target.parameters(), layer.parameters(), strict=True):
                p.data.lerp_(q.data, 0.5)
            for module in (average.module, target):
                fresh = _layer(library, kind)
                fresh.load_state_dict(module.state_dict())
                assert torch.equal(module(input)[0], fresh(input)[0]), "older weights counted"


def _same_bits(library: Any) -> None:
    for kind in _KINDS:
        # Where torch.nn's bits differ depends on the processor: one row beside two differs on most.
        for size, hidden, batch in (
            (5, 7, 6),
            (12, 32, 16),
            (40, 100, 10),
            (64, 128, 24),
            (64, 64, 2),
        ):
            layer = getattr(library, kind)(size, hidden)
            input = torch.randn(20, batch, size)
            shares = [layer(share)[0] for share in input.chunk(2, 1)]
            same = torch.equal(torch.cat(shares, 1), layer(input)[0])
            assert same, "a sequence gets other bits in another batch"


ROWS = [
    Row("An EMA copy, and one written through `.data`, counts at the next call", _copies),
    Row("Half of a batch, as on two processes, gets the same bits", _same_bits),
]
