"""Which instantiation runs a layer: every one that fits, ordered by a model of a step's time.

The model counts what docs/performance.md lists for a step: matrix instructions, reads of weights
from shared memory, the cell, the exchange. Its constants are of Hopper and rough. It ranks plans of
our own kernels against each other; whether ours or cuDNN runs is measured (`ostinato.cuda.choice`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from ostinato.cuda.config import GROUP_ROWS, MATHS, Config
from ostinato.engine import GATES


class Device(NamedTuple):
    """What a plan needs to know of a device."""

    processors: int
    shared_bytes: int  # that one block may have
    has_clusters: bool


H200 = Device(132, 232_448, True)
A100 = Device(108, 166_912, False)

_REGISTERS = 65_536  # of a multiprocessor
# Registers for weights that are on their way from shared memory.
_READ_AHEAD = 32
_WARPS = (1, 2, 3, 4, 6, 8, 12, 16)
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
    """Return the best configuration, or None where no kernel fits the device.

    Args:
        cell: "rnn_tanh", "rnn_relu", "gru" or "lstm".
        math: "bf16", "fp16", "tf32" or "fp32".
        hidden: H.
        batch: B.
        directions: 1 or 2.
        is_backward: whether the kernel walks backward.
        device: that is to run it.

    Returns:
        The configuration whose modelled time is shortest.

    Example:
        >>> found = plan("gru", "bf16", 64, 16, 1, False, H200)
        >>> found.exchange, found.rows
        ('block', 8)
    """
    best: tuple[float, Config] | None = None
    for config in configs(cell, math, hidden, is_backward, device):
        cost = cycles(config, batch, directions, device)
        if cost is not None and (best is None or cost < best[0]):
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
                if not config.is_even:
                    continue
                room = _limit(config) - overhead(config)
                if not config.fragments:
                    if _held(config) > room:
                        continue
                elif config.fragments * 4 > room:
                    room -= _READ_AHEAD
                resident = min(max(room // 4, 0), config.fragments)
                if resident < config.fragments:
                    # Whole steps in k, which the compiler allocates better.
                    resident -= resident % _width(config)
                config = config._replace(resident=resident)
                if room >= 0 and config.shared_bytes <= device.shared_bytes:
                    yield config


def _shapes(math: str, hidden: int, device: Device) -> Iterator[tuple[str, int, int]]:
    sixteens = -(-hidden // 16)
    yield "block", 1, sixteens * 16
    if device.has_clusters:
        for blocks in _CLUSTERS:
            units = -(-sixteens // blocks)
            if (blocks - 1) * units < sixteens:
                yield "cluster", blocks, units * 16
    if MATHS[math].depth:
        for units in (1, 2):
            blocks = -(-sixteens // units)
            if 1 < blocks <= device.processors:
                yield "grid", blocks, units * 16


def _limit(config: Config) -> int:
    """Registers that a thread can have."""
    return min(_REGISTERS // config.threads // 8 * 8, 255)


def _pairs(config: Config) -> int:
    return -(-GROUP_ROWS * config.units // 2 // config.threads)


def _width(config: Config) -> int:
    """Fragments of a warp for one step in k."""
    if config.is_backward:
        return config.padded // 16 * config.slices // config.warps
    return GATES[config.cell]


def _held(config: Config) -> int:
    """Weights that a thread keeps in registers, without tensor cores."""
    gates = GATES[config.cell]
    if config.is_backward:
        return gates * config.units // config.slices
    return gates * config.padded // config.slices


def overhead(config: Config) -> int:
    """Registers beside the weights; tests/test_cuda_report.py holds that nothing spills."""
    gates, pairs, words = GATES[config.cell], _pairs(config), MATHS[config.math].bytes // 2
    if not MATHS[config.math].depth:
        return 130
    # Gathering; exact activations; a lone gate, for which the compiler reads far ahead.
    more = (20 if config.is_backward else 10) * (config.exchange == "grid")
    more += 16 * (config.math != "bf16") + 64 * (gates == 1 and not config.is_backward)
    if config.is_backward:
        return 80 + more + 4 * _width(config) + 8 * gates + 8 * words + 20 * words * (pairs - 1)
    return 72 + more + 8 * words + 6 * gates * words + 8 * words * (pairs - 1)


def cycles(config: Config, batch: int, directions: int, device: Device) -> float | None:
    """Model the time of one step of the whole batch, or return None where it cannot run."""
    gates, item, pairs = GATES[config.cell], MATHS[config.math].bytes, _pairs(config)
    if config.fragments:
        products = config.fragments * -(-config.warps // 4) * 12.0
        products += max(config.fragments - config.resident, 0) * config.warps * 4
    else:
        products = GROUP_ROWS * _held(config) * config.threads / 128
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
    tiles = config.tiles(batch) * directions
    if config.exchange == "grid":
        return step if tiles * config.blocks <= device.processors else None
    at_once = device.processors
    if config.exchange == "cluster":
        at_once = max(_CLUSTERS[config.blocks] * device.processors // 132, 1)
    return step * -(-tiles // at_once)
