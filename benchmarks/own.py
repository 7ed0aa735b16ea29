"""Own cells beside the built-in layers, a Python loop over the same step, and torch.compile of it.

Usage: python benchmarks/own.py [--threads 2] [--seconds 1] [--loops] [--out FILE.json]

A GRU and an LSTM are written as steps, and given the weights of nn.GRU and nn.LSTM. Outputs and
gradients are compared first, then all are timed in turns by `ostinato.bench.compare`. Figures are
times as many times the built-in layer's: 1.1 is a tenth longer. With --loops the loop over the step
and what torch.compile makes of it are timed too, with the seconds that it takes to compile.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from tqdm import tqdm

from ostinato import nn
from ostinato.bench import compare

# Steps, batch and units of a layer; the input has as many features as there are units.
SHAPES = ((100, 1, 64), (100, 1, 128), (100, 1, 512), (100, 32, 256), (100, 64, 512))
LOOP = (100, 1, 128)


class Gru(nn.Cell):
    """The cell of nn.GRU."""

    x_gates = h_gates = 3

    def step(self, x: Any, h: Any, state: Any) -> Any:
        """Compute one step."""
        r, z = torch.sigmoid(x[0] + h[0]), torch.sigmoid(x[1] + h[1])
        n = torch.tanh(x[2] + r * h[2])
        return (1 - z) * n + z * state


class Lstm(nn.Cell):
    """The cell of nn.LSTM."""

    x_gates = h_gates = 4
    states = 2

    def step(self, x: Any, h: Any, state: Any) -> Any:
        """Compute one step."""
        _, c = state
        i, f, g, o = (a + b for a, b in zip(x, h, strict=True))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


CELLS: tuple[tuple[type[nn.Cell], Any], ...] = ((Gru, nn.GRU), (Lstm, nn.LSTM))


def looped(layer: nn.Recurrent) -> Callable[[Tensor], tuple[Tensor]]:
    """Return a loop over the layer's step, on torch's operators."""
    cell: nn.Cell = layer.cell_l0  # type: ignore[assignment]

    def run(x: Tensor) -> tuple[Tensor]:
        states = [x.new_zeros(x.shape[1], layer.hidden_size) for _ in range(cell.states)]
        gates_x = linear(x, layer.weight_ih_l0, layer.bias_ih_l0).unbind(0)  # type: ignore[arg-type]
        outputs = []
        for gates in gates_x:
            product = linear(states[0], layer.weight_hh_l0, layer.bias_hh_l0)  # type: ignore[arg-type]
            given = tuple(states) if cell.states > 1 else states[0]
            new = cell.step(gates.chunk(cell.x_gates, -1), product.chunk(cell.h_gates, -1), given)
            states = list(new) if cell.states > 1 else [new]
            outputs.append(states[0])
        return (torch.stack(outputs),)

    return run


def trained(run: Callable[[Tensor], Any], x: Tensor, layer: torch.nn.Module) -> Callable[[], Any]:
    """Return a call that runs and differentiates by the weights."""
    weights = list(layer.parameters())
    seed = torch.ones_like(run(x)[0])
    return lambda: torch.autograd.grad(run(x)[0], weights, seed)


def inferred(run: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    """Return a call that runs without gradients."""

    def call() -> Any:
        with torch.no_grad():
            return run(x)[0]

    return call


def require_close(found: Any, expected: Any) -> None:
    """Compare numbers, each beside the largest of its tensor."""
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    for a, b in pairs:
        error = (a - b).abs().max() / b.abs().max()
        assert error < 1e-4, f"numbers differ by {float(error)}"


def measure(seconds: float, shape: tuple[int, int, int], cell: Any, built: Any) -> dict[str, Any]:
    """Time one shape: the own cell's layer beside the built-in one."""
    steps, batch, size = shape
    torch.manual_seed(0)
    layer, other = nn.Recurrent(cell, size, size), built(size, size)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(steps, batch, size)
    row: dict[str, Any] = {"cell": cell.__name__, "shape": shape}
    for way in ("inference", "training"):
        pairs = {"own": layer, "built_in": other}
        calls = {
            name: inferred(module, x) if way == "inference" else trained(module, x, module)
            for name, module in pairs.items()
        }
        require_close(calls["own"](), calls["built_in"]())
        samples = compare(calls, seconds)
        each = [a / b for a, b in zip(samples["own"], samples["built_in"], strict=True)]
        row[way] = statistics.median(each)
        row[f"{way}_us"] = statistics.median(samples["own"]) * 1e6
    return row


def measure_loops(seconds: float, cell: Any) -> dict[str, Any]:
    """Time training of one shape beside the loop and what torch.compile makes of it."""
    steps, batch, size = LOOP
    torch.manual_seed(0)
    layer = nn.Recurrent(cell, size, size)
    x = torch.randn(steps, batch, size)
    loop = looped(layer)
    compiled = torch.compile(loop)
    start = time.perf_counter()
    calls = {"own": trained(layer, x, layer), "loop": trained(loop, x, layer)}
    calls["compiled"] = trained(compiled, x, layer)
    calls["compiled"]()
    compiling = time.perf_counter() - start
    for name in ("loop", "compiled"):
        require_close(calls["own"](), calls[name]())
    samples = compare(calls, seconds)
    row: dict[str, Any] = {"cell": cell.__name__, "shape": LOOP, "compile_seconds": compiling}
    for name in ("loop", "compiled"):
        row[name] = statistics.median(
            a / b for a, b in zip(samples[name], samples["own"], strict=True)
        )
    return row


def main() -> int:
    """Measure, print a table and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--loops", action="store_true", help="beside loops over the step as well")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found: dict[str, Any] = {"threads": given.threads, "torch": torch.__version__}
    cases = [(shape, *pair) for pair in CELLS for shape in SHAPES]
    found["rows"] = [measure(given.seconds, *case) for case in tqdm(cases, file=sys.stderr)]
    print("cell  T    B   H    inference  training  (times the built-in layer's)")
    for row in found["rows"]:
        steps, batch, size = row["shape"]
        figures = f"{row['inference']:9.2f} {row['training']:9.2f}"
        print(f"{row['cell']:5} {steps:<4} {batch:<3} {size:<4} {figures}")
    ratios = [row[way] for row in found["rows"] for way in ("inference", "training")]
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    print(f"geometric mean {mean:.3f}, largest {max(ratios):.3f}")
    if given.loops:
        found["loops"] = [measure_loops(given.seconds, cell) for cell, _ in CELLS]
        for row in found["loops"]:
            print(
                f"{row['cell']}: training T{LOOP[0]} B{LOOP[1]} H{LOOP[2]}: a loop over the step "
                f"takes {row['loop']:.1f} times as long, compiled {row['compiled']:.1f} after "
                f"{row['compile_seconds']:.0f} s of compiling"
            )
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
