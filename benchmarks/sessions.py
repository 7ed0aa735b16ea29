"""Many sessions in one stream: random subsets take steps, then each is held against its own run.

Usage: python benchmarks/sessions.py [--sessions 10000] [--seconds 60] [--dtype float32]

Each session has frames that come round again, so what it was given is known afterwards. Raises
unless every state has the bits of a stream that ran that session alone, and memory stayed flat.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import ostinato

INPUT, HIDDEN = 40, 64
# Frames of a session until the first comes again.
RING = 16
# Rounds after which memory has settled.
WARM = 20
# Bytes that memory may grow by after that.
MOST_GROWTH = 4 << 20


def memory() -> int:
    """Return the resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--sessions", type=int, default=10000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--dtype", default="float32", choices=["float32", "int8"])
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    sessions = given.sessions
    shapes = {"weight_ih_l0": (3 * HIDDEN, INPUT), "weight_hh_l0": (3 * HIDDEN, HIDDEN)}
    weights = {name: rng.uniform(-0.1, 0.1, shape).astype("f4") for name, shape in shapes.items()}
    stream = ostinato.Stream("gru", weights, batch=sessions, dtype=given.dtype)
    taken = np.zeros(sessions, np.int64)
    ring = rng.standard_normal((sessions, RING, INPUT)).astype("f4")
    settled, rounds, steps = 0, 0, 0
    with tqdm(total=given.seconds, unit="s") as bar:
        start = last = time.perf_counter()
        while (now := time.perf_counter()) - start < given.seconds:
            bar.update(now - last)
            last = now
            rows = rng.permutation(sessions)[: rng.integers(1, sessions + 1)]
            stream.step(ring[rows, taken[rows] % RING], rows=rows)
            taken[rows] += 1
            steps += len(rows)
            rounds += 1
            if rounds == WARM:
                settled = memory()
    if rounds < WARM:
        parser.error(f"--seconds: {rounds} rounds, of which {WARM} settle memory")
    growth = memory() - settled
    found = stream.state
    alone = ostinato.Stream("gru", weights, dtype=given.dtype)
    for session in tqdm(range(sessions), unit="session"):
        alone.reset()
        alone(ring[session, np.arange(taken[session]) % RING])
        if found[0, session].tobytes() != alone.state[0].tobytes():
            raise AssertionError(f"session {session}: other bits than a run of its own")
    if growth > MOST_GROWTH:
        raise AssertionError(f"memory grew by {growth} bytes in {rounds} rounds")
    print(
        f"{sessions} sessions of a GRU of {HIDDEN} units in {given.dtype}, {given.seconds:g} s: "
        f"{rounds} rounds, {steps} steps; every state has the bits of a run of its own; "
        f"memory grew by {growth} bytes"
    )


if __name__ == "__main__":
    main()
