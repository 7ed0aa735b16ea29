"""Two builds of Ostinato in turns: what a change costs or gains, row by row.

Usage: python benchmarks/turns.py BEFORE [AFTER] [--threads 2] [--rounds 60] [--only GRU]

BEFORE and AFTER are folders that hold a package `ostinato` (`pip install --target FOLDER .` makes
one); without AFTER the installed one is meant. Each build has a process of its own, and they take
turns on the same cores: one runs while the other waits, for 5 ms of warming and 3 ms that count. A
row is told as the median over the turns of before / after, and that as the median over several
pairs of processes. Above 1 AFTER is faster. The rows are those of `make bench-quick`, and small
calls, where the way from the module to the kernel is what costs. With --threads 1 all processes
keep to one core, as the cores of a shared machine are not equally fast. The same folder twice shows
the noise.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cases import CASES
from peers import module_call

_WARM, _SAMPLE = 5e-3, 3e-3


def small_calls(nn: Any) -> Iterator[tuple[str, bool, Callable[[], Any]]]:
    """(what, whether it trains, the call) of calls that are over in some ten microseconds."""
    x, one = torch.randn(4, 2, 8), torch.randn(1, 1, 8)
    resets = torch.zeros(4, 2, dtype=torch.bool)
    for kind in ("GRU", "LSTM", "RNN"):
        layer, stack = getattr(nn, kind)(8, 8), getattr(nn, kind)(8, 8, num_layers=2)
        cell, row = getattr(nn, f"{kind}Cell")(8, 8), torch.randn(1, 8)
        both = getattr(nn, kind)(8, 8, bidirectional=True)
        yield f"{kind} T1", False, module_call(layer, one, False)
        yield f"{kind} T4", False, module_call(layer, x, False)
        yield f"{kind} T4", True, module_call(layer, x, True)
        yield f"{kind} T1, two layers", False, module_call(stack, one, False)
        yield f"{kind} T4, two layers", True, module_call(stack, x, True)
        yield f"{kind} T4, two directions", True, module_call(both, x, True)
        for name, more in (("lengths", {"lengths": [4, 2]}), ("resets", {"resets": resets})):
            known = _With(layer, more)
            yield f"{kind} T4, {name}=", False, module_call(known, x, False)
            yield f"{kind} T4, {name}=", True, module_call(known, x, True)
        yield f"{kind}Cell", False, module_call(cell, row, False)
        yield f"{kind}Cell", True, module_call(cell, row, True)


class _With(torch.nn.Module):
    """A layer that is always called with the same keywords."""

    def __init__(self, layer: torch.nn.Module, more: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.more = layer, more

    def __call__(self, x: Any) -> Any:
        return self.layer(x, **self.more)


def rows(quick: bool) -> list[tuple[str, bool, Callable[[], Any]]]:
    """All rows: what, whether it trains, the call."""
    from ostinato import nn

    torch.manual_seed(0)
    found = [(what + " I8 H8", train, call) for what, train, call in small_calls(nn)]
    if quick:
        from run import build

        for case in (case for case in CASES if case.quick):
            _, ours, x = build(case)
            call = module_call(ours, x, case.train)
            found.append((f"{case.name.split(',')[0]} {case.shape}", case.train, call))
    return found


def seconds(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def worker(threads: int, quick: bool) -> None:
    """Time the row whose number is read, until there is no more to read."""
    torch.set_num_threads(threads)
    if threads == 1:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    known = rows(quick)
    print(*(f"{what}{', training' * train}" for what, train, _ in known), sep="\t", flush=True)
    repeats: dict[int, tuple[int, int]] = {}
    for line in sys.stdin:
        number = int(line)
        _, train, call = known[number]
        with torch.set_grad_enabled(train):
            if number not in repeats:
                one = min(seconds(call, 1) for _ in range(5))
                repeats[number] = math.ceil(_WARM / one), math.ceil(_SAMPLE / one)
            warm, sample = repeats[number]
            seconds(call, warm)
            print(seconds(call, sample), flush=True)


def started(build: Path | None, threads: int, quick: bool) -> subprocess.Popen[str]:
    """A process that has the package of `build`."""
    command = [sys.executable, os.path.abspath(sys.argv[0]), "--worker", "--threads", str(threads)]
    command += ["--small"] * (not quick)
    paths = [str(build.resolve())] if build else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def turns(
    pair: list[subprocess.Popen[str]], rounds: int, only: str
) -> dict[str, tuple[float, float]]:
    """Microseconds of the second build, and before / after, by row."""
    names = [[*process.stdout.readline().rstrip("\n").split("\t")] for process in pair]  # type: ignore[union-attr]
    if names[0] != names[1] or len(names[0]) < 2:
        raise SystemExit("the two builds do not have the same rows")
    found = {}
    for number, name in enumerate(names[0]):
        if only not in name:
            continue
        samples: list[list[float]] = [[], []]
        for round_ in range(rounds):
            for who in (0, 1) if round_ % 2 else (1, 0):
                print(number, file=pair[who].stdin, flush=True)
                samples[who].append(float(pair[who].stdout.readline()))  # type: ignore[union-attr]
        ratios = [before / after for before, after in zip(*samples, strict=True)]
        found[name] = statistics.median(samples[1]) * 1e6, statistics.median(ratios)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("builds", type=Path, nargs="*", help="folders of BEFORE and AFTER")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60, help="turns of each row and processes")
    parser.add_argument("--processes", type=int, default=3, help="pairs of processes")
    parser.add_argument("--small", action="store_true", help="small calls alone")
    parser.add_argument("--only", default="", help="rows that have this in their name")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.threads, not arguments.small)
        return 0
    if not 1 <= len(arguments.builds) <= 2:
        parser.error(f"expected one or two folders, got {len(arguments.builds)}")
    builds = [*arguments.builds, None][:2]
    every: list[dict[str, tuple[float, float]]] = []
    for _ in range(arguments.processes):
        pair = [started(build, arguments.threads, not arguments.small) for build in builds]
        try:
            every.append(turns(pair, arguments.rounds, arguments.only))
        finally:
            for process in pair:
                process.kill()
                process.wait()
    print("| row | after, us | before / after | of each pair |\n| --- | ---: | ---: | --- |")
    for name in every[0]:
        ratios = [found[name][1] for found in every]
        micros = statistics.median(found[name][0] for found in every)
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {micros:.1f} | {statistics.median(ratios):.3f} | {each} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
