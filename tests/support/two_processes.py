"""What test_distributed.py trains: in its own process, and in the two that torchrun starts.

    torchrun --standalone --nproc-per-node 2 -m support.two_processes start|resume FOLDER

Each process writes what it found to FOLDER.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from ostinato import nn
from support.cells import LAYERS

# Seconds after which what takes ten hangs, on a machine that others load too.
TIMEOUT = 120
TIME, BATCH, INPUT, HIDDEN = 9, 6, 5, 7
# Of rows in no order; each process gets three.
LENGTHS = torch.tensor([4, 9, 1, 6, 9, 2])
UPDATES = 4
# The one whose checkpoint is saved and resumed, and after how many updates.
SAVED, SAVED_AFTER = "LSTM, projected, both directions, two layers", 2


class Case(NamedTuple):
    kind: str
    options: dict
    packed: bool = False


BOTH = {"num_layers": 2, "bidirectional": True}
CASES = {
    **{layer: Case(layer, {}) for layer in LAYERS},
    "RNN, relu, both directions, two layers": Case("RNN", {"nonlinearity": "relu", **BOTH}),
    "GRU, both directions, two layers": Case("GRU", BOTH),
    SAVED: Case("LSTM", {"proj_size": 3, **BOTH}),
    "GRU, packed": Case("GRU", BOTH, packed=True),
    "LSTM, packed": Case("LSTM", {}, packed=True),
    "GRU, recompute": Case("GRU", {"memory": "recompute", **BOTH}),
    "LSTM, recompute": Case("LSTM", {"memory": "recompute"}),
    "LSTM, packed, recompute": Case("LSTM", {"memory": "recompute"}, packed=True),
    "GRUCell": Case("GRUCell", {}),
    "LSTMCell": Case("LSTMCell", {}),
}
# float64, so that what is not rounding shows.
DTYPE = torch.float64


class Model(torch.nn.Module):
    """A recurrent layer, or a cell called once for each step, and a product after it."""

    def __init__(self, case, seed=0, dtype=DTYPE):
        super().__init__()
        torch.manual_seed(seed)
        self.rnn = getattr(nn, case.kind)(INPUT, HIDDEN, dtype=dtype, **case.options)
        directions = 2 if case.options.get("bidirectional") else 1
        size = directions * (case.options.get("proj_size") or HIDDEN)
        self.head = torch.nn.Linear(size, 2, dtype=dtype)

    def forward(self, input):
        """Return the layer's own output, and two numbers per step or packed row."""
        if isinstance(self.rnn, torch.nn.RNNCellBase):
            output, state = [], None
            for x in input:
                state = self.rnn(x, state)
                output.append(state[0] if isinstance(state, tuple) else state)
            output = torch.stack(output)
        else:
            output, _ = self.rnn(input)
            output = output.data if isinstance(output, PackedSequence) else output
        return output, self.head(output)


def share(case, update, rank=0, world=1, dtype=DTYPE):
    """Draw the batch of an update and return the rows of one process: input and target."""
    generator = torch.Generator().manual_seed(update)
    input = torch.randn(TIME, BATCH, INPUT, generator=generator, dtype=DTYPE)
    target = torch.randn(TIME, BATCH, 2, generator=generator, dtype=DTYPE)
    rows = rows_of(rank, world)
    input, target = input[:, rows].to(dtype), target[:, rows].to(dtype)
    if not case.packed:
        return input, target
    lengths = LENGTHS[rows]
    target = pack_padded_sequence(target, lengths, enforce_sorted=False).data
    return pack_padded_sequence(input, lengths, enforce_sorted=False), target


def rows_of(rank, world):
    """Return which rows of a batch a process has: those in a row."""
    count = BATCH // world
    return slice(rank * count, (rank + 1) * count)


def whole(tensor):
    """Return a copy of a tensor, of the pieces of all processes where it has been cut."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def train(case, model, optimizer, updates, rank=0, world=1):
    """Train; return the outputs and gradients of each update and the parameters after the last."""
    outputs, gradients = [], []
    for update in updates:
        input, target = share(case, update, rank, world)
        output, found = model(input)
        # DDP and FSDP2 average over the processes, of which each has a part of this sum.
        loss = world / BATCH * (found - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        outputs.append(output.detach())
        gradients.append([whole(p.grad) for p in model.parameters()])
        optimizer.step()
    parameters = [whole(p) for p in model.parameters()]
    return {"outputs": outputs, "gradients": gradients, "parameters": parameters}


def optimizer_of(model):
    """Return one whose state counts, and which does not forgive a factor on the gradients."""
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def sharded(model, **options):
    """Cut a model into pieces: those of the layer, freed after its forward, and the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.rnn, mesh=mesh, reshard_after_forward=True, **options)
    fully_shard(model, mesh=mesh, **options)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


WAYS = {"DDP": DistributedDataParallel, "FSDP2": sharded}


def state_of(model, optimizer):
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def load(model, optimizer, folder):
    """Bring a model and its optimizer to where a checkpoint was saved."""
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def start(folder, rank, world):
    """Train every case in every way, and save one checkpoint in each."""
    found = {}
    for way, wrap in WAYS.items():
        for name, case in CASES.items():
            model = wrap(Model(case))
            found[way, name] = train(case, model, optimizer_of(model), range(UPDATES), rank, world)
        case = CASES[SAVED]
        model = wrap(Model(case))
        optimizer = optimizer_of(model)
        train(case, model, optimizer, range(SAVED_AFTER), rank, world)
        dcp.save(state_of(model, optimizer), checkpoint_id=folder / way)
        found[way, "saved"] = [whole(p) for p in model.parameters()]
    for name in LAYERS:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        model = sharded(Model(CASES[name], dtype=torch.float32), mp_policy=policy)
        input, _ = share(CASES[name], 0, rank, world, torch.float32)
        output, _ = model(input)
        output.float().sum().backward()
        gradients = [whole(p.grad) for p in model.parameters() if p.grad is not None]
        found["bfloat16", name] = {"outputs": [output.detach()], "gradients": [gradients]}
    return found


def resume(folder, rank, world):
    """Go on from each checkpoint, in the way it was saved and in the other."""
    found, case = {}, CASES[SAVED]
    for saved in WAYS:
        for way, wrap in WAYS.items():
            # Other weights than those that were saved.
            model = wrap(Model(case, seed=1))
            optimizer = optimizer_of(model)
            load(model, optimizer, folder / saved)
            rest = range(SAVED_AFTER, UPDATES)
            found[saved, way] = train(case, model, optimizer, rest, rank, world)
    return found


def main():
    what, folder = sys.argv[1], Path(sys.argv[2])
    signal.alarm(TIMEOUT)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {"start": start, "resume": resume}[what](folder, rank, world)
    torch.save(found, folder / f"{what}_{rank}.pt")
    dist.destroy_process_group()
    sys.stdout.flush()
    # All is written. A thread of gloo's may still run: at exit C++ would end in abort.
    os._exit(0)


if __name__ == "__main__":
    main()
