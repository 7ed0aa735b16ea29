"""One script from one process to several: DDP or FSDP2, and checkpoints that any number resumes.

    python examples/train.py [--steps 600] [--checkpoint build/train]
    torchrun --standalone --nproc-per-node 2 examples/train.py [--fsdp] [--checkpoint build/train]

A GRU learns to add two numbers that stand far apart in a sequence. Every process draws the batch of
a step from the same seed and takes its own rows, so that the model does not depend on how many
processes there are, but for the rounding of sums.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from ostinato import nn as onn

STEPS, BATCH, HIDDEN, LEARNING_RATE = 40, 64, 48, 5e-3
# Training begins with step 1.
EVALUATION = 0


class Adder(torch.nn.Module):
    """Sequences in, one sum for each out."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = onn.GRU(2, HIDDEN)
        self.sum = torch.nn.Linear(HIDDEN, 1)

    def forward(self, input: Tensor) -> Tensor:
        _, h_n = self.gru(input)
        return self.sum(h_n[-1])


def adding_problem(seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Draws the batch of a step and takes this process's rows.

    Returns:
        Input (STEPS, rows, 2): numbers from 0 to 1, and 1 beside the two that count, one in each
        half of the sequence. Target (rows, 1): the sum of the two.
    """
    generator = torch.Generator().manual_seed((seed << 32) + step)
    numbers = torch.rand(STEPS, BATCH, generator=generator)
    half = STEPS // 2
    where = torch.randint(half, (2, BATCH), generator=generator) + torch.tensor([[0], [half]])
    marks = torch.zeros(STEPS, BATCH).scatter_(0, where, 1.0)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    input = torch.stack([numbers, marks], dim=2)[:, mine]
    return input, (numbers * marks).sum(0)[mine].unsqueeze(1)


@contextmanager
def processes() -> Iterator[None]:
    """Joins those that torchrun started; alone, is a group of one, which opens no port."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def distribute(model: Adder, fsdp: bool) -> torch.nn.Module:
    """Lets processes share a model: DDP has it whole in each, FSDP2 a piece of each weight."""
    if not fsdp:
        return DistributedDataParallel(model)
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def mean(loss: Tensor) -> float:
    """Averages over the processes, which have equal numbers of rows."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def save(folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    # Names without DDP's prefix and shards with their places: what one process would save, too.
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.save(state, checkpoint_id=folder / f"step_{step:06d}")


def resume(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Loads the last checkpoint there is; returns the steps behind it."""
    # Written last: without it, saving was interrupted.
    done = sorted(file.parent for file in folder.glob("step_*/.metadata"))
    if not done:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=done[-1])
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return int(done[-1].name.removeprefix("step_"))


def train(options: argparse.Namespace) -> None:
    def say(text: str) -> None:
        if dist.get_rank() == 0:
            print(text, flush=True)

    count = dist.get_world_size()
    if BATCH % count:
        raise ValueError(f"--nproc-per-node: expected a divisor of the batch, {BATCH}, got {count}")
    torch.manual_seed(options.seed)
    model = distribute(Adder(), options.fsdp)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    folder = options.checkpoint
    first = resume(folder, model, optimizer) if folder else 0
    say(f"{'FSDP2' if options.fsdp else 'DDP'}, processes: {count}, steps behind: {first}")

    for step in range(first + 1, options.steps + 1):
        input, target = adding_problem(options.seed, step)
        loss = mse_loss(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % options.log_every == 0:
            say(f"step {step:6}  loss {mean(loss):.6f}")
        if folder and (step % options.save_every == 0 or step == options.steps):
            save(folder, step, model, optimizer)

    with torch.no_grad():
        input, target = adding_problem(options.seed, EVALUATION)
        say(f"final loss {mean(mse_loss(model(input), target)):.9f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="A GRU learns to add, on one process or several.")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 in the place of DDP")
    parser.add_argument("--checkpoint", type=Path, help="save here, and resume what is here")
    parser.add_argument("--save-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    options = parser.parse_args()
    for name in ("steps", "save_every", "log_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    with processes():
        train(options)


if __name__ == "__main__":
    main()
    if dist.is_torchelastic_launched():
        # All is written. A thread of gloo's may still run: at exit C++ would end in abort.
        sys.stdout.flush()
        os._exit(0)
