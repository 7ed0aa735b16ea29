"""What the features cost, beside what a user would do without them.

Usage: python features/costs.py [--threads 2] [--seconds 1.0]

Every pair is timed by `ostinato.bench.compare`, in turns, after its numbers were compared. Prints
the table of docs/features.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ostinato import nn
from ostinato.bench import compare, ratio

SHAPES = [(1000, 32, 64, 64), (200, 64, 128, 128), (100, 32, 256, 256)]


def step(module: torch.nn.Module, call: Callable[[], torch.Tensor]) -> Callable[[], Any]:
    """A training step of what `call` returns."""

    def run() -> torch.Tensor:
        module.zero_grad()
        output = call()
        output.sum().backward()
        return output

    return run


def lengths_beside_packing(shape: tuple[int, ...]) -> tuple[str, dict[str, Callable[[], Any]]]:
    steps, batch, size, hidden = shape
    gru, x = nn.GRU(size, hidden), torch.randn(steps, batch, size)
    lengths = torch.randint(steps // 4, steps + 1, (batch,))
    lengths[0] = steps

    def packed() -> torch.Tensor:
        rows = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(gru(rows)[0])[0]

    calls = {
        "lengths=": step(gru, lambda: gru(x, lengths=lengths)[0]),
        "pack, GRU, pad": step(gru, packed),
    }
    return "a training step with lengths=, of packing and padding", calls


def resets_beside_none(shape: tuple[int, ...]) -> tuple[str, dict[str, Callable[[], Any]]]:
    steps, batch, size, hidden = shape
    gru, x = nn.GRU(size, hidden), torch.randn(steps, batch, size)
    resets = torch.rand(steps, batch) < 0.01
    calls = {
        "resets=": step(gru, lambda: gru(x, resets=resets)[0]),
        "none": step(gru, lambda: gru(x)[0]),
    }
    return "a training step with resets= at 1% of the steps, of none", calls


def stacked_models(shape: tuple[int, ...]) -> tuple[str, dict[str, Callable[[], Any]]]:
    steps, batch, size, hidden = shape
    ours = [nn.GRU(size, hidden) for _ in range(16)]
    theirs = [torch.nn.GRU(size, hidden) for _ in ours]
    for mine, other in zip(ours, theirs, strict=True):
        other.load_state_dict(mine.state_dict())
    parameters, _ = torch.func.stack_module_state(ours)
    parameters = {name: p.detach() for name, p in parameters.items()}
    x = torch.randn(16, steps, batch, size)

    def one(parameters: Any, x: torch.Tensor) -> Any:
        return torch.func.functional_call(ours[0], parameters, (x,))[0]

    def loop() -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([module(rows)[0] for module, rows in zip(theirs, x, strict=True)])

    calls = {"vmap": lambda: torch.func.vmap(one)(parameters, x), "loop": loop}
    return "vmap over 16 stacked models, of a loop over torch.nn.GRU", calls


def gradients_of_samples(shape: tuple[int, ...]) -> tuple[str, dict[str, Callable[[], Any]]]:
    from opacus import GradSampleModule
    from opacus.layers import DPGRU

    steps, batch, size, hidden = shape
    gru = nn.GRU(size, hidden, batch_first=True)
    theirs = DPGRU(size, hidden, batch_first=True)
    theirs.load_state_dict(gru.state_dict())
    dp, x = GradSampleModule(theirs, loss_reduction="sum"), torch.randn(batch, steps, size)
    parameters = {name: p.detach() for name, p in gru.named_parameters()}

    def loss(parameters: Any, x: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(gru, parameters, (x.unsqueeze(0),))[0]
        return output.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))

    def dpgru() -> torch.Tensor:
        dp.zero_grad()
        dp(x)[0].square().sum().backward()
        found = [
            p.grad_sample for name, p in dp.named_parameters() if "ih" in name and "weight" in name
        ]
        return found[0]

    calls = {"ours": lambda: each(parameters, x)["weight_ih_l0"], "DPGRU": dpgru}
    return "a gradient for each sample, of Opacus's DPGRU", calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per row and participant")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print("| what | shape | time, of the other's | quartiles |\n| --- | --- | ---: | --- |")
    pairs = {
        lengths_beside_packing: SHAPES,
        resets_beside_none: SHAPES,
        stacked_models: [(50, 8, 64, 64), (100, 4, 128, 128)],
        gradients_of_samples: [(50, 32, 64, 64), (100, 32, 128, 128)],
    }
    for pair, shapes in pairs.items():
        for shape in shapes:
            title, calls = pair(shape)
            (mine, call), (other, reference) = calls.items()
            if pair is not resets_beside_none:
                torch.testing.assert_close(call(), reference(), rtol=1e-3, atol=1e-4)
            samples = compare(calls, arguments.seconds)
            low, median, high = ratio(samples[mine], samples[other])
            sizes = "T{} B{} I{} H{}".format(*shape)
            print(f"| {title} | {sizes} | {median:.2f} | {low:.2f} to {high:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
