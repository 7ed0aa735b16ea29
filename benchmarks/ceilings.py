"""The machine's ceilings: multiply-adds per second, and read bandwidth by footprint."""

from __future__ import annotations

import bisect
import ctypes
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("ceilings.cpp")
OPTIONS = ["-std=c++17", "-O3", "-march=native", "-funroll-loops", "-shared", "-fPIC", "-pthread"]
FOOTPRINTS = [16 << 10, 64 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 16 << 20]


def measure(threads: int, seconds: float = 0.15) -> dict[str, Any]:
    """Measure the ceilings on one thread and on all of them.

    Args:
        threads: how many.
        seconds: for each figure.

    Returns:
        By number of threads ("1" and the given one): "operations" per second, and "bytes" per
        second for each footprint (in bytes, all threads together).
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ceilings.so"
        subprocess.run(
            [os.environ.get("CXX", "g++"), *OPTIONS, str(SOURCE), "-o", str(library)],
            check=True,
        )
        probe = ctypes.CDLL(str(library))
        probe.peak_operations.restype = probe.read_bytes.restype = ctypes.c_double
        probe.peak_operations.argtypes = [ctypes.c_int, ctypes.c_double]
        probe.read_bytes.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_double]
        return {
            str(count): {
                "operations": probe.peak_operations(count, seconds),
                "bytes": {
                    str(size): probe.read_bytes(count, size // count, seconds)
                    for size in FOOTPRINTS
                },
            }
            for count in sorted({1, threads})
        }


def bandwidth(ceiling: dict[str, Any], footprint: int) -> float:
    """Bytes per second that can be read from an array of this size."""
    sizes = sorted(map(int, ceiling["bytes"]))
    index = min(bisect.bisect_left(sizes, footprint), len(sizes) - 1)
    return float(ceiling["bytes"][str(sizes[index])])
