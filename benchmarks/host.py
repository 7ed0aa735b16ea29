"""What a call on a GPU does on the host, counted on a machine without one.

    python benchmarks/host.py [--json FILE]

CPU tensors take the way of CUDA tensors, with a driver that writes down what it is asked and runs
nothing, so numbers are meaningless and counts are true: Python functions that are entered, torch's
operators (each that is called, not what it calls itself), blocks of memory that are allocated,
kernels of ours that are launched, and calls of the driver by us. Beside them the wall time of a
call, in us: how long a host of this kind is busy, with products of tiny size in place of launches.

The same for torch.nn's layer would need a GPU: make bench-gpu has the times of both.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

from ostinato import nn
from support import stand_in

STEPS, BATCH, INPUT, HIDDEN = 5, 4, 16, 64
COUNTED = ("functions", "operators", "allocations", "launches", "driver")


def cases():
    """Yield a name, whether gradients follow, and a call."""
    x = torch.randn(STEPS, BATCH, INPUT, dtype=torch.bfloat16)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [5, 4, 4, 2])
    for name, layer, given, cuts in (
        ("GRU", nn.GRU(INPUT, HIDDEN), x, {}),
        ("LSTM", nn.LSTM(INPUT, HIDDEN), x, {}),
        ("LSTM both directions", nn.LSTM(INPUT, HIDDEN, bidirectional=True), x, {}),
        ("GRU packed", nn.GRU(INPUT, HIDDEN), packed, {}),
        ("GRU lengths", nn.GRU(INPUT, HIDDEN), x, {"lengths": [5, 4, 4, 2]}),
    ):
        layer = layer.bfloat16()
        yield name, False, lambda layer=layer, given=given, cuts=cuts: layer(given, **cuts)
        yield name, True, training(layer, given, cuts)


def training(layer, given, cuts):
    """Return what runs forward and backward, beside which torch does next to nothing."""
    leaves, kept = [*layer.parameters()], []

    def run():
        output, *_ = layer(given, **cuts)
        data = output.data if isinstance(output, torch.nn.utils.rnn.PackedSequence) else output
        if not kept:
            kept.append(torch.ones_like(data))
        torch.autograd.grad(data, leaves, kept)

    return run


def count(run, driver, times=200):
    """Count what one call does, after others have filled what is kept; time so many."""
    for _ in range(3):
        run()
    functions = collections.Counter()

    def entered(frame, event, _):
        if event == "call":
            functions[frame.f_code.co_name] += 1

    driver.clear()
    sys.setprofile(entered)
    try:
        run()
    finally:
        sys.setprofile(None)
    launches, asked = driver["launch"], sum(driver.values())
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    operators = outermost([e for e in events if e.name().startswith("aten::")])
    blocks = [e for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    durations = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        durations.append(time.perf_counter() - begin)
    counts = (sum(functions.values()), len(operators), len(blocks), launches, asked)
    return dict(zip(COUNTED, counts, strict=True)) | {"us": statistics.median(durations) * 1e6}


def outermost(events):
    """Leave out the events that lie within another one."""
    found, end = [], 0
    for event in sorted(events, key=lambda e: (e.start_ns(), -e.duration_ns())):
        if event.start_ns() >= end:
            found.append(event)
            end = event.start_ns() + event.duration_ns()
    return found


def main():
    """Count, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path, help="where to write the counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with stand_in.recording() as driver:
        for name, is_training, run in cases():
            with torch.set_grad_enabled(is_training):
                rows.append({"case": name, "training": is_training, **count(run, driver)})
    print(f"{'call':32}" + "".join(f"{name:>12}" for name in (*COUNTED, "us")))
    for row in rows:
        name = f"{row['case']}, {'training' if row['training'] else 'forward'}"
        print(f"{name:32}" + "".join(f"{row[key]:12.0f}" for key in (*COUNTED, "us")))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
