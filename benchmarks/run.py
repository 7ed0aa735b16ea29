"""Ours beside torch.nn and other peers, interleaved in one process, after a check of the numbers.

Usage: python benchmarks/run.py [--quick] [--threads 2] [--seconds 1.0] [--only GRU] [--out DIR]

A row is measured in rounds by `ostinato.bench.compare`, everyone in turn. The ratio of a row is the
median over rounds of a peer's time / ours. Raises if the numbers differ. Rows below 1 stay in the
table. The machine's ceilings are measured in the same run, before and after.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ceilings
import report
import torch
from cases import CASES, Case
from peers import all_peers, as_sequence, module_call, result
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import ostinato
from ostinato import _core, nn
from ostinato.bench import compare, ratio

# OpenMP, ONNX Runtime and OpenVINO keep their threads spinning for some milliseconds after a call.
PAUSE = 0.03


def build(case: Case) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    """Return torch's module, ours with the same parameters, and an input."""
    options: dict[str, Any] = {}
    if case.bfloat16:
        options["dtype"] = torch.bfloat16
    if not case.is_cell:
        options |= {"num_layers": case.layers, "bidirectional": case.bidirectional}
    torch.manual_seed(0)
    theirs = getattr(torch.nn, case.layer)(case.input, case.hidden, **options)
    ours = getattr(nn, case.layer)(case.input, case.hidden, **options)
    ours.load_state_dict(theirs.state_dict())
    x: Any = torch.randn(*([case.steps] if case.steps else []), case.batch, case.input)
    x = x.bfloat16() if case.bfloat16 else x
    if case.ragged < 1:
        x = pack_padded_sequence(x, torch.tensor(case.lengths()))
    return theirs, ours, x


def check(theirs: torch.nn.Module, ours: torch.nn.Module, x: Any, train: bool) -> torch.Tensor:
    """Compare outputs, and gradients in training, before anything is timed; return the output."""
    expected, actual = result(theirs(x)), result(ours(x))
    # In 16 bits torch rounds at each step what ours rounds once.
    tolerance = (1e-4, 1e-5) if actual.dtype == torch.float32 else (3e-2, 3e-2)
    torch.testing.assert_close(actual, expected, rtol=tolerance[0], atol=tolerance[1])
    if train:
        expected.sum().backward()
        actual.sum().backward()
        for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            # A gradient is a sum over all tokens: its rounding grows with the largest element.
            scale = float(p.grad.abs().max())
            torch.testing.assert_close(
                q.grad, p.grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )
    return expected.detach()


def kept_bytes(module: torch.nn.Module, x: Any) -> int:
    """Bytes that forward keeps for backward, beside input, output and parameters."""
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        # A layout without storage of its own (oneDNN's) is counted by its elements.
        try:
            storage = t.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
        except (NotImplementedError, RuntimeError):
            key, size = id(t), t.numel() * t.element_size()
        kept[key] = size
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = module(x)
    for known in (data_of(x), data_of(output[0]), *module.parameters()):
        kept.pop(known.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def data_of(x: Any) -> torch.Tensor:
    """The numbers of a padded or packed batch."""
    return x.data if isinstance(x, PackedSequence) else x


def measure(case: Case, peers: list[Any], budget: float) -> dict[str, Any]:
    """Time one case for about `budget` seconds for each participant."""
    theirs, ours, x = build(case)
    expected = check(theirs, ours, x, case.train)
    calls = {
        "torch.nn": module_call(theirs, x, case.train),
        "ostinato": module_call(ours, x, case.train),
    }
    with nullcontext() if case.train else torch.no_grad():
        for peer in peers:
            if (call := peer.prepare(case, theirs, x)) is not None:
                output = as_sequence(call(), case).detach()
                torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
                calls[peer.name] = call
        samples = compare(calls, budget, pause=PAUSE)
    ours_samples = samples.pop("ostinato")
    row: dict[str, Any] = {
        "name": case.name,
        "shape": case.shape,
        "layer": case.layer,
        "kind": case.kind,
        "sizes": [case.steps, case.batch, case.input, case.hidden],
        "packed": case.ragged < 1,
        "odd": case.odd,
        "operations": case.operations,
        "weight_bytes": case.weight_bytes,
        "microseconds": {
            "ostinato": statistics.median(ours_samples) * 1e6,
            **{name: statistics.median(times) * 1e6 for name, times in samples.items()},
        },
        "ratios": {name: ratio(times, ours_samples) for name, times in samples.items()},
        "rounds": len(ours_samples),
    }
    if case.train and not case.is_cell:
        row["kept_bytes"] = {"torch.nn": kept_bytes(theirs, x), "ostinato": kept_bytes(ours, x)}
        ours.memory = "recompute"
        row["kept_bytes"]["recompute"] = kept_bytes(ours, x)
    return row


def processor() -> str:
    """The processor's name, as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def busy() -> list[subprocess.Popen[bytes]]:
    """Start a process that spins on every core."""
    code = "while True: pass"
    cores = sorted(os.sched_getaffinity(0))
    return [subprocess.Popen(["taskset", "-c", str(c), sys.executable, "-c", code]) for c in cores]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per row and participant")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, torch.nn alone")
    parser.add_argument("--crowded", action="store_true", help="beside a busy process on each core")
    parser.add_argument("--only", default="", help="rows whose name or shape contains this")
    parser.add_argument("--out", type=Path, help="write JSON, Markdown and PNG into this folder")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    peers = [] if arguments.quick or arguments.crowded else all_peers(arguments.threads)
    before = ceilings.measure(arguments.threads)
    found: dict[str, Any] = {
        "processor": processor(),
        "isa": _core.isa(),
        "threads": arguments.threads,
        "crowded": arguments.crowded,
        "python": platform.python_version(),
        "versions": {
            "ostinato": ostinato.__version__,
            "torch.nn": torch.__version__,
            **{peer.name: peer.version for peer in peers},
        },
        "rows": [],
    }
    neighbours = busy() if arguments.crowded else []
    try:
        for case in CASES:
            label = f"{case.name} {case.shape}"
            if arguments.only not in label or (arguments.quick and not case.quick):
                continue
            row = measure(case, peers, arguments.seconds)
            found["rows"].append(row)
            print(report.line(row), flush=True)
    finally:
        for process in neighbours:
            process.kill()
    # A machine that was slowed down in between shows here.
    found["ceilings"] = {"before": before, "after": ceilings.measure(arguments.threads)}
    report.finish(found)
    print("\n" + report.summary(found))
    if arguments.out:
        report.write(found, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
