"""Which kernel runs a layer: every one that fits, ordered by a model of a step's time.

The model counts what docs/performance.md lists for a step: matrix instructions, reads of weights
from shared memory, the cell, the exchange. Its constants are of Hopper and rough. It ranks plans of
our own kernels against each other; whether ours or cuDNN runs is measured (`ostinato.cuda.choice`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from ostinato.cuda.config import GROUP_ROWS, MATHS, Config


class Device(NamedTuple):
    """What a plan needs to know of a device."""

    processors: int
    shared_bytes: int  # that one block may have
    has_clusters: bool


H200 = Device(132, 232_448, True)
A100 = Device(108, 166_912, False)

_REGISTERS = 65_536  # of a multiprocessor
_WARPS = range(1, 17)
# Sums of a unit and row that a thread can have, of eight rows.
_MOST_SUMS = 8
# Tiles of 16 units that a warp can work on, one after the other.
_MOST_TILES = 20
_GROUPS = (1, 2, 4, 8)
# Clusters that a device of 132 multiprocessors runs at once: they do not cross its eight parts.
_CLUSTERS = {2: 64, 4: 32, 8: 16, 16: 7}


@functools.lru_cache(maxsize=4096)
def plan(
    cell: str,
    math: str,
    hidden: int,
    batch: int,
    directions: int,
    is_backward: bool,
    device: Device,
) -> Config | None:
    """Return the configuration whose modelled time is shortest, or None where none fits the device.

    For the words that `cell` and `math` may be, see `ostinato.cuda.choice.Question`.

    Example:
        >>> found = plan("gru", "bf16", 64, 16, 1, False, H200)
        >>> found.exchange, found.rows
        ('block', 8)
    """
    best: tuple[float, Config] | None = None
    for config in configs(cell, math, hidden, is_backward, device):
        cost = cycles(config, batch, directions, device)
        if best is None or cost < best[0]:
            best = cost, config
    return None if best is None else best[1]


def configs(
    cell: str, math: str, hidden: int, is_backward: bool, device: Device
) -> Iterator[Config]:
    """Yield every configuration that fits registers and shared memory."""
    for exchange, blocks, units in _shapes(math, hidden, device):
        for warps in _WARPS:
            for groups in _GROUPS:
                config = Config(
                    cell, math, hidden, blocks, units, warps, groups, 0, exchange, is_backward
                )
                if not config.is_even or config.width > _MOST_SUMS or _tiles(config) > _MOST_TILES:
                    continue
                room = _limit(config) - overhead(config)
                if room < 0:
                    continue
                config = config._replace(resident=_resident(config, room))
                if config.shared_bytes <= device.shared_bytes:
                    yield config


def _shapes(math: str, hidden: int, device: Device) -> Iterator[tuple[str, int, int]]:
    sixteens = -(-hidden // 16)
    yield "block", 1, sixteens * 16
    if device.has_clusters:
        for blocks in _CLUSTERS:
            units = -(-sixteens // blocks)
            if (blocks - 1) * units < sixteens:
                yield "cluster", blocks, units * 16
    for units in (1, 2):
        least = -(-sixteens // units)
        # Some more, with units that do not exist, where warps cannot share so many evenly.
        for blocks in range(max(least, 2), min(least + 7, device.processors) + 1):
            yield "grid", blocks, units * 16


def _limit(config: Config) -> int:
    """Registers that a thread can have; warps get them by fours."""
    return min(_REGISTERS // (-(-config.warps // 4) * 128) // 8 * 8, 255)


def _pairs(config: Config) -> int:
    return -(-GROUP_ROWS * config.units // 2 // config.threads)


def _tiles(config: Config) -> int:
    if not config.is_backward or not MATHS[config.math].depth:
        return 1
    return config.padded // 16 * config.slices // config.warps


def _resident(config: Config, room: int) -> int:
    """Fragments that this many registers hold."""
    # Where none is read from shared memory, nothing keeps the compiler from reading far ahead.
    ahead = 24 if MATHS[config.math].depth else 36
    if 4 * config.fragments + ahead <= room:
        return config.fragments
    if not MATHS[config.math].depth:
        # The sums of all rows that a weight serves, and the weights on their way.
        room -= (GROUP_ROWS + 4) * config.width
    resident = max(min(room // 4, config.fragments - 4), 0)
    # Whole steps in k, which the compiler allocates better, and four left for a read of them.
    return resident - resident % config.width


def overhead(config: Config) -> int:
    """Registers beside the weights; tests/test_cuda_report.py holds that nothing spills."""
    gates, pairs, words = config.kind.gates, _pairs(config), MATHS[config.math].bytes // 2
    if not MATHS[config.math].depth:
        return 104 + 56 * (pairs - 1) if config.is_backward else 94 + 16 * (pairs - 1)
    # Gathering; a lone gate, whose product the compiler reads far ahead; exact activations.
    more = 10 * (config.exchange == "grid") + 64 * (gates == 1 and not config.is_backward)
    more += (8 if config.is_backward else 20) * (config.math != "bf16")
    if config.is_backward:
        if config.exchange == "grid":
            # Where a warp's many tiles go; of 16 units, in steps that the compiler knows.
            tiles = _tiles(config)
            more += 24 + 2 * tiles if config.units > 16 else 16 * (tiles > 8)
        return 92 + more + 8 * gates + 8 * words + 28 * words * (pairs - 1)
    return 72 + more + 8 * words + 5 * gates * words + 8 * words * (pairs - 1)


def cycles(config: Config, batch: int, directions: int, device: Device) -> float:
    """Model the time of one step of the whole batch."""
    gates, item, pairs = config.kind.gates, MATHS[config.math].bytes, _pairs(config)
    products = max(config.fragments - config.resident, 0) * config.warps * 4.0
    if MATHS[config.math].depth:
        products += config.fragments * -(-config.warps // 4) * 12
    else:
        products += GROUP_ROWS * 4 * config.fragments * config.threads / 128
    parts = config.sources if config.is_backward else config.slices * gates
    work = products + 150 + pairs * (40 + 4 * parts)
    if config.is_backward:
        received, sent = GROUP_ROWS * config.padded * 4 * config.slices, config.fragments // 4
    else:
        received, sent = GROUP_ROWS * config.padded * item, pairs * config.blocks
    exchange = {
        "block": 40.0,
        "cluster": 320 + received / 21 + 8 * sent,
        "grid": 1300 + 2 * received / 48,
    }[config.exchange]
    step = max(work + exchange, config.groups * work)
    return step * -(-config.loops(batch, directions) // at_once(config, device))


def at_once(config: Config, device: Device) -> int:
    """Return how many loops a device runs at the same time."""
    if config.exchange == "cluster":
        return max(_CLUSTERS[config.blocks] * device.processors // 132, 1)
    return device.processors // config.blocks
