"""Runs the tests that need a GPU, in parts of two minutes at most, and sums them up in one line.

    python tools/gpu_tests.py [--site DIR] [--kernels DIR] [--only NAME ...] [-- ARGS]

What a part is called is printed; `--only` takes beginnings of these names. A part that is still
running at the limit is ended, and counts as one that failed. `--site` is where the package is,
`--kernels` where compiled kernels are (tools/gpu_bundle.py); ARGS go to pytest.

Exit status 1 if a test failed or a part did not end.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
OWN = ("gpu", "cudnn", "cuda_launch", "cuda_decisions", "bench_gpu")
SHARES = 4
# A warning that another version of torch gives is no failure here.
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o")
PYTEST += ("filterwarnings=default",)
COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected|xfailed|xpassed)")


def parts(sanitizer: str | None) -> dict[str, list[str]]:
    """Name the commands."""
    found = {
        "own": [*PYTEST, *(str(TESTS / f"test_{name}.py") for name in OWN), "-k", "not sanitized"]
    }
    for share in range(1, SHARES + 1):
        name = f"suite {share}/{SHARES}"
        found[name] = [*PYTEST, str(TESTS), "--device", "cuda", "--part", f"{share}/{SHARES}"]
    for tool in ("memcheck", "racecheck"):
        for exchange in ("block", "cluster", "grid"):
            # Our kernels alone: cuBLAS has hazards of its own. What the bindings ask of a driver
            # that lacks it is no error of ours.
            options = ("--tool", tool, "--kernel-name", "kns=ostinato", "--error-exitcode", "3")
            options += ("--report-api-errors", "no")
            tests = [str(TESTS / "test_gpu.py"), "-k", f"sanitized and {exchange}"]
            found[f"{tool} {exchange}"] = [
                sanitizer or "compute-sanitizer",
                *options,
                *PYTEST,
                *tests,
            ]
    return found


def run(command: list[str], limit: float) -> tuple[collections.Counter[str], str]:
    """Run a part; return what pytest counted, and how it ended."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        printed, _ = process.communicate(timeout=limit)
        ended = "" if process.returncode in (0, 5) else f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        ended = f"ended after {limit:.0f} s"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    print(printed, end="", flush=True)
    counts: collections.Counter[str] = collections.Counter()
    for line in printed.splitlines()[-40:]:
        if " in " in line and COUNT.search(line):
            counts = collections.Counter(
                {word.rstrip("s"): int(n) for n, word in COUNT.findall(line)}
            )
    return counts, ended


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer")


def find_workers() -> list[str]:
    """Return what makes pytest run in several processes, if it can."""
    return ["-n", "8"] if importlib.util.find_spec("xdist") else []


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--site", type=Path, help="the folder that holds the package")
    parser.add_argument("--kernels", type=Path, help="the folder that holds compiled kernels")
    parser.add_argument("--only", nargs="+", default=[""], help="parts, by how their names begin")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that a part may take")
    parser.add_argument("arguments", nargs="*", help="for pytest")
    options = parser.parse_args(given)
    if options.site:
        os.environ["PYTHONPATH"] = str(options.site.resolve())
    if options.kernels:
        os.environ["XDG_CACHE_HOME"] = str(options.kernels.resolve())
    workers, sanitizer = find_workers(), find_sanitizer()
    total: collections.Counter[str] = collections.Counter()
    bad = []
    chosen = {n: c for n, c in parts(sanitizer).items() if n.startswith(tuple(options.only))}
    for name, command in chosen.items():
        is_sanitized = name.startswith(("memcheck", "racecheck"))
        if is_sanitized and sanitizer is None:
            bad.append(f"{name}: there is no compute-sanitizer")
            continue
        begin = time.monotonic()
        command = [*command, *(() if is_sanitized else workers), *options.arguments]
        counts, ended = run(command, options.limit)
        total += counts
        if ended:
            bad.append(f"{name}: {ended}")
        print(f"-- {name}: {time.monotonic() - begin:.0f} s {ended}\n", flush=True)
    words = ", ".join(f"{total[word]} {word}" for word in ("passed", "failed", "error", "skipped"))
    print(f"tests on a GPU: {words}; {len(chosen) - len(bad)} of {len(chosen)} parts well")
    for line in bad:
        print(f"  {line}")
    return bool(bad or total["failed"] or total["error"])


if __name__ == "__main__":
    sys.exit(main())
