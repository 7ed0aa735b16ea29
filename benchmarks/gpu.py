"""Ours beside torch.nn (cuDNN) on a GPU, interleaved in one process, after a check of the numbers.

Usage: python benchmarks/gpu.py [--quick] [--peer-only] [--only "GRU bf16 H256,H512"]
           [--default] [--budget-seconds 540] [--continue FILE.json] [--out DIR] [--list]

Both run the same parameters and input. Outputs, and in training every gradient, are compared with
torch.nn in float64 first; the error of both stands in the row, and who is wrong is not timed. A row
is then measured in rounds, both in turn, between CUDA events: a call is what a user calls, with
its launches. Rows come in the order of gpu_cases.py until the budget is spent. What runs out of
memory or is not served is a row with its error.

Exit status: 0, or 2 without a GPU, or 1 if the GPU was lost on the way.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_report as report
import micro
import torch
from gpu_cases import GpuCase, chosen, within
from gpu_row import allow_tf32, measure

ROOT = Path(__file__).resolve().parent.parent


def query(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the GPU that torch uses; nothing where it is missing or refuses."""
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    command = ["nvidia-smi", "-i", uuid, "--format=csv,noheader", f"--query-gpu={','.join(fields)}"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = ended.stdout.strip().split(", ")
    matched = ended.returncode == 0 and len(values) == len(fields)
    return dict(zip(fields, values, strict=True)) if matched else {}


CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")


def facts() -> dict[str, Any]:
    """The device and the versions."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": query("driver_version").get("driver_version", "not known"),
        "versions": {
            "torch": torch.__version__,
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "Python": platform.python_version(),
        },
        "tf32_setting": allow_tf32(True),
        "clocks": {"before": query(*CLOCKS)},
    }


def healthy() -> bool:
    """Whether the GPU still answers: after some errors every later call fails too."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def sweep(
    cases: list[GpuCase],
    rows: list[dict[str, Any]],
    budget: float,
    started: float,
    run: Callable[[GpuCase], dict[str, Any]],
    *,
    clock: Callable[[], float] = time.perf_counter,
    alive: Callable[[], bool] = healthy,
    save: Callable[[], None] = lambda: None,
) -> str:
    """Measure cases into `rows` until they end, the budget is spent or the GPU is lost.

    Args:
        cases: what is to be measured, in order.
        rows: grows by a row for each.
        budget: seconds from `started`.
        started: seconds of the start.
        run: measures one.
        clock: seconds of now.
        alive: whether the GPU still answers; asked after a failure.
        save: is called now and then, so that a run that is ended from outside leaves its rows.

    Returns:
        "" if all was measured, otherwise why not.
    """
    before = len(rows)
    for case in within(cases, budget, clock, started):
        # First the name: if the row never ends, this is the last line.
        print(f"{case.name:48} ", end="", flush=True)
        row = run(case)
        rows.append(row)
        print(report.line(row), flush=True)
        if row["failed"] and not alive():
            save()
            return f"the GPU was lost at {case.name}; {left(cases, rows, before)}"
        if len(rows) % 20 == 0:
            save()
    if len(rows) - before < len(cases):
        return f"the budget of {budget:g} s is spent; {left(cases, rows, before)}"
    return ""


def left(cases: list[GpuCase], rows: list[dict[str, Any]], before: int) -> str:
    return f"{len(cases) - (len(rows) - before)} of {len(cases)} rows remain"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget-seconds", type=float, default=540)
    parser.add_argument("--seconds", type=float, default=0.15, help="for a row and participant")
    parser.add_argument("--quick", action="store_true", help="a few dozen rows")
    parser.add_argument("--peer-only", action="store_true", help="torch.nn alone")
    parser.add_argument(
        "--default", action="store_true", help="ours as a user gets it: nothing is forced"
    )
    parser.add_argument(
        "--only", action="append", default=[], help='rows with these words: "GRU bf16 H256,H512"'
    )
    parser.add_argument("--continue", dest="earlier", type=Path, help="keep the rows of this JSON")
    parser.add_argument("--kernels", action="store_true", help="record the names of kernels")
    parser.add_argument("--no-micro", action="store_true", help="without handoffs and launches")
    parser.add_argument("--list", action="store_true", help="print the rows and measure nothing")
    parser.add_argument("--out", type=Path, help="folder of JSON, Markdown and PNG")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    started = time.perf_counter()
    options = parse(arguments)
    earlier = json.loads(options.earlier.read_text()) if options.earlier else {}
    kept = [row for row in earlier.get("rows", []) if not row["failed"]]
    cases = chosen(options.quick, options.only, [row["name"] for row in kept])
    if options.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    if not torch.cuda.is_available():
        print(
            f"no GPU: torch {torch.__version__} sees no CUDA device; nothing was measured",
            file=sys.stderr,
        )
        return 2
    found = facts() | {
        "budget": options.budget_seconds,
        "part": {
            name: getattr(options, name) for name in ("quick", "only", "peer_only", "default")
        },
        "micro": earlier.get("micro", {}) if options.no_micro else micro.in_a_process(),
        "rows": kept,
    }
    if not options.peer_only:
        import ostinato

        found["versions"]["ostinato"] = ostinato.__version__
    # What was not forced is nothing to choose by.
    partial = options.quick or options.only or options.peer_only or options.default
    folder = options.out or ROOT / ("build/bench" if partial else "benchmarks/results")

    def run(case: GpuCase) -> dict[str, Any]:
        return measure(
            case,
            seconds=options.seconds,
            peer_only=options.peer_only,
            kernels=options.kernels,
            default=options.default,
        )

    print(report.heading(found), flush=True)
    stopped = sweep(
        cases,
        found["rows"],
        options.budget_seconds,
        started,
        run,
        save=lambda: report.write_json(found, folder),
    )
    found["clocks"]["after"] = query(*CLOCKS)
    found["stopped"] = stopped
    found["seconds"] = round(time.perf_counter() - started + earlier.get("seconds", 0), 1)
    report.write(found, folder)
    print(f"\n{report.summary(found)}\n{stopped or 'every row was measured'}")
    print(f"written to {folder}")
    return 1 if stopped.startswith("the GPU was lost") else 0


if __name__ == "__main__":
    sys.exit(main())
