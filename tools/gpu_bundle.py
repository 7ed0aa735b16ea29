"""Compiles kernels beforehand, for a machine with a GPU that is at hand for minutes.

    python tools/gpu_bundle.py FOLDER [--arch sm_90a] [--minutes 15]

It writes into FOLDER what the cache of a user's home holds, until the minutes are over, for the
kernels that `make bench-gpu` and the tests of the GPU engine ask for, the first ones of the
benchmark first. There XDG_CACHE_HOME=FOLDER finds them, if NVRTC is of the same version. No GPU
takes part.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from ostinato.cells import CELLS
from ostinato.cuda import compiler
from ostinato.cuda.config import Config, Previous
from ostinato.cuda.plan import A100, H200, plan

DEVICES = {"sm_90a": H200, "sm_80": A100}
# What the tests draw, in sizes and rows (tests/test_gpu.py, tests/support/plain_calls.py).
SIZES = (4, 8, 16, 61, 64, 128, 192, 256, 512, 768, 1024, 2048)
ROWS = (5, 16, 24, 64, 200)
MATHS = ("bf16", "fp16", "tf32", "fp32")


def wanted(arch: str) -> Iterator[Config | Previous]:
    """Yield kernels, those that matter most first; some of them more than once."""
    import gpu_cases

    device = DEVICES[arch]
    yield from map(Previous, (2, 4))
    rest = gpu_cases.ordered()
    for case in [*gpu_cases.chosen(True, ()), *rest[: len(rest) // 8]]:
        cell = next(c for c in CELLS.values() if c.layer == case.cell).name
        directions = 2 if case.form == "bidirectional" else 1
        for is_backward in (False, True)[: 1 + case.train]:
            options = case.hidden, case.batch, directions, is_backward, device
            yield from filter(None, [plan(cell, case.precision, *options)])
    for hidden, math, cell, rows in itertools.product(SIZES, MATHS, CELLS, ROWS):
        for directions, is_backward in itertools.product((1, 2), (False, True)):
            options = hidden, rows, directions, is_backward, device
            yield from filter(None, [plan(cell, math, *options)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", choices=DEVICES, default="sm_90a")
    parser.add_argument("--minutes", type=float, default=15.0, help="when to begin no more")
    options = parser.parse_args()
    os.environ["XDG_CACHE_HOME"] = str(options.folder.resolve())
    configs = list(dict.fromkeys(wanted(options.arch)))
    end = time.monotonic() + 60 * options.minutes

    def build(config: Config | Previous) -> bool:
        if time.monotonic() > end:
            return False
        compiler.compile(config, options.arch)
        return True

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        made = sum(pool.map(build, configs))
    major, minor = compiler.nvrtc_version()
    made_of = f"{made} of {len(configs)} kernels for {options.arch}"
    print(f"{options.folder}: {made_of}, NVRTC {major}.{minor}")
    return made == 0


if __name__ == "__main__":
    sys.exit(main())
