"""Training: on two processes, from a checkpoint, of copies."""

from __future__ import annotations

import copy
import importlib
import itertools
import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from row import Row
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

_KINDS = ("RNN", "GRU", "LSTM")
_WAYS = ("DDP", "FSDP2")
_BATCH = 6
# Numbers of the two sides that went through sums in another order.
_CLOSE = {"rtol": 1e-4, "atol": 1e-6}


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


def _shared(layer: torch.nn.Module, way: str) -> torch.nn.Module:
    if way == "DDP":
        return DistributedDataParallel(layer)
    return fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def _process(rank: int, name: str, folder: str) -> None:
    """Train each layer as one of two processes, compare it with one, and save it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    library = importlib.import_module(name)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for way, kind in itertools.product(_WAYS, _KINDS):
        model = _shared(_layer(library, kind), way)
        parameters = list(model.parameters())
        for step in range(3):
            _step(model, parameters, step, rank, 2)
        found = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
        expected = list(_trained(library, kind).parameters())
        torch.testing.assert_close(found, expected, **_CLOSE)
        dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/{way} {kind}")
    dist.destroy_process_group()


def _two_processes(library: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(_process, (library.__name__, folder), nprocs=2)
        except torch.multiprocessing.ProcessRaisedException as error:
            # It holds the traceback of the process as text, whose last line says what it was.
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
        for way, kind in itertools.product(_WAYS, _KINDS):
            layer = _layer(library, kind)
            state = layer.state_dict()
            dcp.load(state, checkpoint_id=f"{folder}/{way} {kind}", no_dist=True)
            layer.load_state_dict(state)
            _step(layer, list(layer.parameters()), 3, 0, 1)
            expected = _trained(library, kind, steps=4)
            torch.testing.assert_close(layer.state_dict(), expected.state_dict(), **_CLOSE)


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
        for size, hidden, batch in ((5, 7, 6), (12, 32, 16), (40, 100, 10), (64, 128, 24)):
            layer = getattr(library, kind)(size, hidden)
            input = torch.randn(20, batch, size)
            shares = [layer(share)[0] for share in input.chunk(2, 1)]
            same = torch.equal(torch.cat(shares, 1), layer(input)[0])
            assert same, "a sequence gets other bits in another batch"


ROWS = [
    Row("DDP and FSDP2 on two processes train what one does, and one resumes it", _two_processes),
    Row("An EMA copy, and one written through `.data`, counts at the next call", _copies),
    Row("Half of a batch, as on two processes, gets the same bits", _same_bits),
]
