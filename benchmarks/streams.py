"""Streams beside the layers, torch's int8 and ONNX Runtime: one step at a time, and many.

Usage: python benchmarks/streams.py [--threads 1] [--seconds 0.5] [--only GRU] [--out FILE.json]

Everyone is timed in turns by `ostinato.bench.compare`, after outputs were compared: float32 streams
bit by bit with the layer, 8 bits by their distance. A figure is theirs / ours, the median over
rounds; times are microseconds for each step. ONNX Runtime keeps no state between two runs of its
model, so one step of it is told without what it would cost to hand the state on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from cases import Case
from peers import OnnxRuntime
from tqdm import tqdm

import ostinato
from ostinato import _core, nn
from ostinato.bench import compare

# Steps, rows and units; the input has as many features as there are units.
ONE = [Case(layer, 1, 1, size, size) for layer in ("GRU", "LSTM") for size in (64, 128, 256)]
MANY = [
    Case(layer, 100, batch, size, size)
    for batch in (1, 32)
    for layer in ("GRU", "LSTM")
    for size in (128, 256, 512, 1024)
]
STREAMS = {
    "float32": {},
    "int8": {"dtype": "int8"},
    "int8, int16": {"dtype": "int8", "activations": "int16"},
}
# Largest error of 8 bits, of the largest number.
MOST_ERROR = 0.08
# Threads of ONNX Runtime and OpenMP keep spinning for some milliseconds after a call.
PAUSE = 0.03


def calls_of(case: Case, onnx: OnnxRuntime) -> dict[str, Any]:
    """Return what is timed, by name, after a comparison of numbers."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, case.layer)(case.input, case.hidden)
    ours = getattr(nn, case.layer)(case.input, case.hidden)
    ours.load_state_dict(theirs.state_dict())
    model = torch.nn.Sequential(theirs)
    kinds = {torch.nn.GRU, torch.nn.LSTM}
    small = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
    x = torch.randn(case.steps, case.batch, case.input)
    given = x if case.steps > 1 else x[0]
    made: dict[str, Any] = {
        "torch.nn": lambda: theirs(x),
        "torch.nn int8": lambda: small(x),
        "ONNX Runtime": onnx.prepare(case, theirs, x),
        "layer": lambda: ours(x),
    }
    expected = ours(x)[0].reshape(case.steps, case.batch, -1)
    for name, options in STREAMS.items():
        stream = ostinato.Stream.of(ours, batch=case.batch, **options)
        found = stream(given).reshape(expected.shape)
        if name == "float32":
            assert torch.equal(found, expected)
        else:
            error = (found - expected).abs().max() / expected.abs().max()
            assert error < MOST_ERROR, f"{case.name} {case.shape}: error {float(error)}"
        made[name] = lambda stream=stream: stream(given)
    return made


def measure(case: Case, seconds: float, onnx: OnnxRuntime) -> dict[str, Any]:
    """Time one case; ratios are those of the same round."""
    with torch.no_grad():
        samples = compare(calls_of(case, onnx), seconds, pause=PAUSE)
    row: dict[str, Any] = {"layer": case.layer, "shape": case.shape}
    row["us"] = {name: statistics.median(s) * 1e6 / case.steps for name, s in samples.items()}
    row["ratio"] = {
        own: {
            name: statistics.median(a / b for a, b in zip(times, samples[own], strict=True))
            for name, times in samples.items()
            if name != own
        }
        for own in STREAMS
    }
    return row


def mean(rows: list[dict[str, Any]], own: str, name: str) -> str:
    """Return the geometric mean and the lowest of a ratio."""
    ratios = [row["ratio"][own][name] for row in rows]
    return f"{math.exp(statistics.fmean(map(math.log, ratios))):.2f} (lowest {min(ratios):.2f})"


def main() -> int:
    """Measure, print tables and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--only", default="", help="rows whose name or shape contains this")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    onnx = OnnxRuntime(given.threads)
    found: dict[str, Any] = {
        "threads": given.threads,
        "isa": _core.isa(),
        "torch": torch.__version__,
        "onnxruntime": onnx.version,
    }
    cases = [case for case in ONE + MANY if given.only in f"{case.name} {case.shape}"]
    if not cases:
        parser.error(f"--only: no row has {given.only!r} in its name or shape")
    rows = [measure(case, given.seconds, onnx) for case in tqdm(cases, file=sys.stderr)]
    found["rows"] = rows
    names = list(rows[-1]["us"])
    print("us a step |", " | ".join(names))
    for row in rows:
        times = " | ".join(f"{row['us'][name]:.2f}" for name in names)
        print(f"{row['layer']} {row['shape']} | {times}")
    for title, group in (
        ("one step", [row for row in rows if row["shape"].startswith("T1 ")]),
        ("T100 B1", [row for row in rows if row["shape"].startswith("T100 B1 ")]),
        ("T100 B32", [row for row in rows if row["shape"].startswith("T100 B32 ")]),
    ):
        for own in STREAMS if group else ():
            others = ("layer", "float32", "torch.nn int8", "ONNX Runtime")
            means = [f"{name} {mean(group, own, name)}" for name in others if name != own]
            print(f"{title}, {own}:", ", ".join(means))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
