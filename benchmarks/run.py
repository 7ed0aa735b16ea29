"""Ours beside torch.nn, interleaved in one process, after a check of the numbers.

Usage: python benchmarks/run.py [--threads 2] [--seconds 1.0] [--only GRU] [--json FILE]
       [--markdown FILE]

A row is measured in rounds; each round times torch.nn and ours once, one right after the other, so
that a disturbance of the machine falls on both. The ratio of a row is the median over rounds of
torch.nn's time / ours. Raises if the numbers differ. Rows below 1 stay in the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import ostinato
from ostinato import _core, nn


def build(case: Case) -> tuple[torch.nn.Module, torch.nn.Module, Any]:
    """Return torch's module, ours with the same parameters, and an input."""
    options: dict[str, Any] = {}
    if case.steps:
        options = {"num_layers": case.layers, "bidirectional": case.bidirectional}
    torch.manual_seed(0)
    theirs = getattr(torch.nn, case.layer)(case.input, case.hidden, **options)
    ours = getattr(nn, case.layer)(case.input, case.hidden, **options)
    ours.load_state_dict(theirs.state_dict())
    shape = (case.steps, case.batch, case.input) if case.steps else (case.batch, case.input)
    x: Any = torch.randn(shape)
    if case.ragged < 1:
        lengths = torch.linspace(case.steps, case.steps * case.ragged, case.batch).long()
        x = pack_padded_sequence(x, lengths)
    return theirs, ours, x


def result(output: Any) -> torch.Tensor:
    """The tensor that stands for a module's output: the sequence, or a cell's next h."""
    if isinstance(output, tuple) and not isinstance(output, PackedSequence):
        output = output[0]
    return output.data if isinstance(output, PackedSequence) else output


def call(module: torch.nn.Module, x: Any, train: bool) -> Callable[[], None]:
    """One timed call."""

    def infer() -> None:
        with torch.no_grad():
            module(x)

    def step() -> None:
        module.zero_grad(set_to_none=True)
        result(module(x)).sum().backward()

    return step if train else infer


def check(theirs: torch.nn.Module, ours: torch.nn.Module, x: Any, train: bool) -> None:
    """Compare outputs, and gradients in training, before anything is timed."""
    expected, actual = result(theirs(x)), result(ours(x))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    if not train:
        return
    expected.sum().backward()
    actual.sum().backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        # A gradient is a sum over all tokens: its rounding grows with the largest element.
        scale = float(p.grad.abs().max())
        torch.testing.assert_close(
            q.grad, p.grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def seconds(function: Callable[[], None], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def measure(case: Case, budget: float) -> dict[str, Any]:
    """Time one case for about `budget` seconds."""
    theirs, ours, x = build(case)
    check(theirs, ours, x, case.train)
    them, us = call(theirs, x, case.train), call(ours, x, case.train)
    seconds(them, 2), seconds(us, 2)
    one = seconds(them, 1) + seconds(us, 1)
    # Short calls are grouped, so that a sample is much longer than the clock's resolution.
    calls = max(1, int(2e-3 / one))
    rounds = min(201, max(7, int(budget / (one * calls))))
    samples = [(seconds(them, calls), seconds(us, calls)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in samples)
    return {
        "name": case.name,
        "shape": case.shape,
        "goal": case.goal,
        "torch_us": statistics.median(a for a, _ in samples) * 1e6,
        "ostinato_us": statistics.median(b for _, b in samples) * 1e6,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[rounds // 4], ratios[-1 - rounds // 4]],
        "rounds": rounds,
    }


def processor() -> str:
    """The processor's name, as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def table(report: dict[str, Any]) -> str:
    """Render the report in Markdown."""
    lines = [
        f"{report['processor']}, {report['isa']}, {report['threads']} threads, float32; "
        f"ostinato {report['ostinato']}, torch {report['torch']}, Python {report['python']}.",
        "",
        "| layer | shape | torch.nn, us | ostinato, us | ratio | quartiles |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['name']} | {row['shape']} | {row['torch_us']:.0f} | {row['ostinato_us']:.0f} "
            f"| {row['ratio']:.2f} | {low:.2f}-{high:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="time per row")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {
        "processor": processor(),
        "isa": _core.isa(),
        "threads": arguments.threads,
        "ostinato": ostinato.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rows": [],
    }
    for case in CASES:
        if arguments.only not in f"{case.name} {case.shape}":
            continue
        row = measure(case, arguments.seconds)
        report["rows"].append(row)
        verdict = "" if row["ratio"] >= case.goal else f"  (below {case.goal:g})"
        print(
            f"{row['name']:42} {row['shape']:20} {row['torch_us']:9.0f} us "
            f"{row['ostinato_us']:9.0f} us  x {row['ratio']:.2f}{verdict}",
            flush=True,
        )
    text = table(report)
    print("\n" + text)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(text)
    missed = [row for row in report["rows"] if row["ratio"] < row["goal"]]
    print(f"{len(report['rows'])} rows, {len(missed)} below their goal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
