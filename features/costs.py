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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per row and participant")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print("| what | shape | time, of the other's | quartiles |\n| --- | --- | ---: | --- |")
    for pair in (lengths_beside_packing, resets_beside_none):
        for shape in SHAPES:
            title, calls = pair(shape)
            (mine, call), (other, reference) = calls.items()
            if pair is lengths_beside_packing:
                torch.testing.assert_close(call(), reference())
            samples = compare(calls, arguments.seconds)
            low, median, high = ratio(samples[mine], samples[other])
            sizes = "T{} B{} I{} H{}".format(*shape)
            print(f"| {title} | {sizes} | {median:.2f} | {low:.2f} to {high:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
