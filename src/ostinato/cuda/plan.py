"""Which kernel runs a layer: of those that fit, the one whose modelled step is shortest.

The model counts what a step consists of (`Terms`): products, reads of weights from shared memory,
the cell, the exchange. What each costs was fitted to 1,592 kernels on an H100 by
benchmarks/plans.py; tests/test_cuda_plan.py holds how far plans are from the best measured ones.
Measured were GRU and LSTM in bf16 and tf32, one direction, H 64 to 1024, B 1 to 256. For all else
(RNN, fp16, strict fp32, other devices) the same constants are a guess. The model ranks our kernels
against each other; whether ours or cuDNN runs is measured (`ostinato.cuda.choice`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ostinato.cells import Cell, cell_of
from ostinato.cuda.config import MATHS, Config
from ostinato.own.cuda import MOST_SAVED


class Device(NamedTuple):
    """What a plan needs to know of a device."""

    processors: int
    shared_bytes: int  # that one block may have
    cluster: int  # blocks of the largest cluster, 0 where there are none


H200 = Device(132, 232_448, 16)
A100 = Device(108, 166_912, 0)

_REGISTERS = 65_536  # of a multiprocessor
_WARPS = range(1, 17)
# Sums of a unit and row that a thread can have, of eight rows.
_MOST_SUMS = 8
# Tiles of 16 units that a warp can work on, one after the other.
_MOST_TILES = 20
_GROUPS = (1, 2, 4, 8)
# Rows of a group: more than eight where tensor instructions multiply, and the batch is large. No
# device has run those, so they must be modelled to take less than this share of the time.
_GROUP_ROWS = (8, 16, 32)
_FEW_ROWS, _UNTRIED = 64, 0.6
# Clusters that a device of 132 multiprocessors runs at once, if none has two blocks. They do not
# cross its eight parts: on the H100, 32 clusters of 4 took two turns, 32 of 8 three.
_CLUSTERS = {2: 66, 4: 31, 8: 15, 16: 7}
# Registers of a thread beside the weights it holds, as compiled for sm_90; more where exact.
_WORKING, _WORKING_EXACT = 72, 84
# What each further block on a multiprocessor adds to the work of a step, for every four warps.
_SHARING = 0.3
# Half of an H100's second cache level: what does not fit is read from the far half.
_NEAR_BYTES = 25_000_000
# H of the kernels that were measured, and the most rows of both directions that measured.json has.
_SWEPT = (64, 128, 256, 512, 1024)
_MOST_ROWS = 512


class Terms(NamedTuple):
    """What a step consists of: how often, or what one costs in nanoseconds on an H100.

    "For every four warps" means: a multiprocessor has four schedulers, so eight warps take twice.
    """

    group: float  # eight rows: addresses, loads, two barriers
    cell: float  # a thread's pair of units, for every four warps
    exact: float  # a pair whose activations are exact, forward
    forward_product: float  # a fragment of weight_hh, for every four warps
    backward_product: float
    plain_product: float  # the same by fused multiply-adds
    shared_fragment: float  # a fragment that a warp reads from shared memory
    block: float  # waiting for the exchange, once a step
    cluster: float
    grid: float
    push: float  # a thread's pair of units or sums, sent to a block of the cluster
    grid_group: float  # eight rows, handed on through global memory
    gathered: float  # KiB that a block gathers
    far: float  # KiB of these that come from the far half of the second level


# By benchmarks/plans.py from benchmarks/results/plans-nvidia-h100-80gb-hbm3.json. `plain_product`
# was not measured: 4 * 1,024 multiply-adds, 128 a cycle of 1.755 GHz.
H100_COSTS = Terms(
    group=352,
    cell=120,
    exact=368,
    forward_product=3.56,
    backward_product=9.92,
    plain_product=18.2,
    shared_fragment=2.13,
    block=400,
    cluster=519,
    grid=490,
    push=14.1,
    grid_group=450,
    gathered=35.4,
    far=132,
)


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

    For the words that `cell` and `math` may be, see `ostinato.cuda.choice.Question`. No own cell
    was measured: for these the costs are a guess.

    Example:
        >>> found = plan("gru", "bf16", 64, 16, 1, False, H200)
        >>> found.exchange, found.rows
        ('block', 8)
    """
    if cell_of(cell).saved > MOST_SAVED:
        return None
    rows = batch * directions
    sizes = _GROUP_ROWS if rows > _FEW_ROWS else _GROUP_ROWS[:1]
    found = _with_enough_warps(configs(cell, math, hidden, is_backward, device, sizes))
    eights = [config for config in found if config.group_rows == 8]
    if device.cluster and hidden in _SWEPT and rows <= _MOST_ROWS:
        eights = [config for config in eights if _is_of_a_measured_kind(config)] or eights

    def time(config: Config) -> float:
        return nanoseconds(config, batch, directions, device)

    best = min(eights, key=time, default=None)
    wide = min((config for config in found if config.group_rows > 8), key=time, default=None)
    if best is None or (wide is not None and time(wide) < _UNTRIED * time(best)):
        return wide
    return best


def configs(
    cell: str,
    math: str,
    hidden: int,
    is_backward: bool,
    device: Device,
    group_rows: Sequence[int] = _GROUP_ROWS,
) -> Iterator[Config]:
    """Yield every configuration that fits registers and shared memory; of groups of such sizes."""
    rows = group_rows if MATHS[math].depth else _GROUP_ROWS[:1]
    for exchange, blocks, units in _shapes(cell, hidden, device):
        for warps in _WARPS:
            for groups, size in itertools.product(_GROUPS, rows):
                front = cell, math, hidden, blocks, units, warps, groups
                config = Config(*front, 0, exchange, is_backward, size)
                if not config.is_even or config.width > _MOST_SUMS or _tiles(config) > _MOST_TILES:
                    continue
                room = _limit(config) - overhead(config)
                if room < 0:
                    continue
                config = config._replace(resident=_resident(config, room))
                if config.shared_bytes <= device.shared_bytes:
                    yield config


def _shapes(cell: str, hidden: int, device: Device) -> Iterator[tuple[str, int, int]]:
    sixteens = -(-hidden // 16)
    yield "block", 1, sixteens * 16
    if not cell_of(cell).gates:
        # Nothing is exchanged, so that any blocks may share the units.
        for units in (8, 4, 2, 1):
            blocks = -(-sixteens // units)
            if 1 < blocks <= device.processors:
                yield "block", blocks, units * 16
        return
    for blocks in _CLUSTERS:
        if blocks <= device.cluster:
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
    return -(-config.group_rows * config.units // 2 // config.threads)


def _tiles(config: Config) -> int:
    if not config.is_backward or not MATHS[config.math].depth or not config.kind.gates:
        return 1
    return config.padded // 16 * config.slices // config.warps


def _resident(config: Config, room: int) -> int:
    """Fragments that this many registers hold."""
    if not config.fragments:
        return 0
    # Where none is read from shared memory, nothing keeps the compiler from reading far ahead.
    ahead = 24 if MATHS[config.math].depth else 36
    if 4 * config.fragments + ahead <= room:
        return config.fragments
    if not MATHS[config.math].depth:
        # The sums of all rows that a weight serves, and the weights on their way.
        room -= (8 + 4) * config.width
    resident = max(min(room // 4, config.fragments - 4), 0)
    # Whole steps in k, which the compiler allocates better, and four left for a read of them.
    step = config.width
    if config.kind.is_own and not MATHS[config.math].depth:
        # By the report, pairs of strict float32 are allocated better two at a time.
        step = {2: 4}.get(step, step)
    return resident - resident % step


def overhead(config: Config) -> int:
    """Registers beside the weights; tests/test_cuda_report.py holds that nothing spills."""
    gates, pairs, words = config.kind.gates, _pairs(config), MATHS[config.math].bytes // 2
    own = _of_own_cells(config.kind, pairs * words)
    if not MATHS[config.math].depth:
        if config.is_backward:
            return 104 + own + 56 * (pairs - 1)
        return 94 + own + 16 * (pairs - 1) + 12 * (gates == 1 and config.exchange == "grid")
    eights = config.group_rows // 8
    # Gathering; few gates, whose product the compiler reads far ahead; exact activations.
    more = 10 * (config.exchange == "grid") + 64 * (gates < 3 and not config.is_backward)
    more += (8 if config.is_backward else 20) * (config.math != "bf16")
    # Sums of further eights, and what they are multiplied with.
    more += (4 * (config.width if config.is_backward else gates) + 6) * (eights - 1)
    if config.is_backward:
        tiles = _tiles(config)
        if config.exchange != "grid":
            # What a warp's tiles share, which it keeps beside their sums.
            more += (4 * (tiles > 3) + 8 * (tiles > 4)) * (words == 1)
        else:
            # Where a warp's many tiles go; of 16 units, in steps that the compiler knows.
            more += 24 + 2 * tiles if config.units > 16 else 16 * (tiles > 8)
        return 92 + own + more + 8 * gates + 8 * words + 28 * words * (pairs - 1)
    return 72 + own + more + 8 * words + 5 * gates * words + 8 * words * (pairs - 1)


def _of_own_cells(kind: Cell, words: int) -> int:
    """Registers for what the built-in cells have not: numbers per unit, drives, further states.

    `words` are those of a number of all pairs of units of a thread. What is read ahead of a product
    stays in registers meanwhile.
    """
    ahead = max(kind.input_gates + kind.drives - kind.gates, 0)
    more = kind.parameters + kind.drives + max(kind.behind - 1, 0)
    return (8 * more + ahead) * words


def _with_enough_warps(found: Iterable[Config]) -> list[Config]:
    """Return one configuration of each shape: the model does not tell numbers of warps apart.

    It has the fewest warps, of 4 to 8, that are enough. Where none are, the most of these; where
    only other numbers share the product evenly, the one that is nearest to these.

    Args:
        found: in the order of `configs`.
    """
    kept: dict[tuple[str | int, ...], Config] = {}
    for config in found:
        shape = config.exchange, config.blocks, config.units, config.groups, config.group_rows
        held = kept.get(shape)
        if held is None or held.warps < 4 or (config.warps <= 8 and not _has_enough_warps(held)):
            kept[shape] = config
    return list(kept.values())


def _has_enough_warps(config: Config) -> bool:
    """Whether a thread has one pair of units, and a warp one tile or all weights in registers."""
    if config.is_backward and MATHS[config.math].depth:
        return _pairs(config) == 1 and _tiles(config) == 1
    return _pairs(config) == 1 and config.resident == config.fragments


def _is_of_a_measured_kind(config: Config) -> bool:
    """Whether the sweep had such kernels; at its sizes no guess runs instead of them."""
    is_small_grid = config.exchange == "grid" and config.units == 16
    if config.groups > 1 or (config.exchange == "grid" and config.hidden > 512):
        return is_small_grid
    return config.exchange != "cluster" or config.blocks > 2


def nanoseconds(
    config: Config, batch: int, directions: int, device: Device, costs: Terms = H100_COSTS
) -> float:
    """Model the time of one step of the whole batch, as it would be at an H100's pace."""
    found = counts(config, batch, directions, device)
    return sum(count * cost for count, cost in zip(found, costs, strict=True))


def counts(config: Config, batch: int, directions: int, device: Device) -> Terms:
    """Count what one step of the whole batch consists of, one turn of the device after another."""
    exchange, groups, depth = config.exchange, config.groups, MATHS[config.math].depth
    pairs, fours, is_backward = _pairs(config), -(-config.warps // 4), config.is_backward
    turns, guests = _turns(config, config.loops(batch, directions), device)
    # A block beside others waits for the exchange as it would alone, but shares the schedulers.
    work = turns + _SHARING * fours * guests
    cell = pairs * min(batch, config.rows) / config.group_rows * work
    products = config.fragments * fours * groups * (config.group_rows // 8) * work
    sent = config.padded * config.slices * config.group_rows // 2 / config.threads
    sent = sent if is_backward else pairs * config.blocks
    gathered = config.exchange_bytes(1) / (config.blocks if is_backward else 1) / 2 / 1024 * turns
    running = min(config.loops(batch, directions), at_once(config, device))
    far = max(1 - _NEAR_BYTES / max(config.exchange_bytes(running), 1), 0)
    return Terms(
        group=groups * work,
        cell=cell * fours,
        exact=cell * (config.math != "bf16" and not is_backward),
        forward_product=products * (depth > 0 and not is_backward),
        backward_product=products * (depth > 0 and is_backward),
        plain_product=products * (depth == 0),
        shared_fragment=max(config.fragments - config.resident, 0) * config.warps * groups * work,
        block=turns * (exchange == "block"),
        cluster=turns * (exchange == "cluster"),
        grid=turns * (exchange == "grid"),
        push=sent * groups * turns * (exchange == "cluster"),
        grid_group=groups * turns * (exchange == "grid"),
        gathered=gathered,
        far=gathered * far,
    )


def _turns(config: Config, loops: int, device: Device) -> tuple[int, int]:
    """Return how many turns a device needs, and the further blocks on a multiprocessor, summed."""
    once, together = at_once(config, device), _blocks_together(config, device)
    full, rest = divmod(loops, once * together)
    last = -(-rest // once)
    return full + (last > 0), full * (together - 1) + max(last - 1, 0)


def _blocks_together(config: Config, device: Device) -> int:
    """Return how many blocks run on a multiprocessor at the same time."""
    if config.exchange == "grid":  # so that all of a launch are on the device for sure
        return 1
    working = _WORKING if config.math == "bf16" else _WORKING_EXACT
    registers = -(-min(working + 4 * config.resident, _limit(config)) // 8) * 8
    by_memory = device.shared_bytes // config.shared_bytes
    return max(min(_REGISTERS // (registers * config.threads), by_memory), 1)


def at_once(config: Config, device: Device) -> int:
    """Return how many loops a device runs at once, each multiprocessor for one block."""
    if config.exchange == "cluster":
        return max(_CLUSTERS[config.blocks] * device.processors // 132, 1)
    return device.processors // config.blocks
