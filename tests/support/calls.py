"""The one way to draw a call: its numbers, in NumPy, without torch.

samples.py, engine.py and emulation.py are thin faces over this: each says what it calls large and
small, and brings the numbers into the form in which its callee takes them.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step, D directions.
"""

import dataclasses
import zlib

import numpy as np

from support.cells import RECORDS

# A direction's weights in the engine's order, and the initial states.
WEIGHTS = ("ih", "hh", "b_ih", "b_hh", "hr")
STATES = ("h_0", "c_0")


def seed_of(name):
    """Return a seed for a test of this name, the same in every process and in any order."""
    return zlib.crc32(name.encode())


def batch_sizes_of(lengths, steps=None):
    """Return how many rows have each step; after the longest row's last one, 0."""
    steps = max(lengths, default=0) if steps is None else steps
    return [sum(int(length > t) for length in lengths) for t in range(steps)]


def ragged(rng, steps, batch, *, empty=0):
    """Draw batch_sizes of rows with 1 to `steps` steps, and `empty` rows of no step at all."""
    lengths = rng.integers(1, steps + 1, batch - empty)
    lengths[:1] = steps
    return batch_sizes_of(lengths, steps)


def steady(cell, scale):
    # Where nothing saturates, a state must not grow from step to step.
    return scale / 2 if cell == "rnn_relu" else scale


@dataclasses.dataclass(frozen=True)
class Scales:
    """The deviation of each array's numbers, and whether all are -1, 0 or 1 instead."""

    ih: float
    hh: float
    bias: float = 1.0
    hr: float = 1.0
    state: float = 1.0
    whole: bool = False


@dataclasses.dataclass
class Call:
    """The arguments of one layer. Absent arrays are None."""

    cell: str
    x: np.ndarray  # (N, I)
    sizes: list | None  # batch_sizes
    steps: int
    batch: int
    h_0: np.ndarray | None  # (D, B, O)
    c_0: np.ndarray | None  # (D, B, H)
    weights: list  # per direction, an array or None under each of WEIGHTS
    # Where rows end and begin anew, and at which states.
    lengths: np.ndarray | None = None  # (B)
    resets: np.ndarray | None = None  # (N)
    reset_h: np.ndarray | None = None
    reset_c: np.ndarray | None = None


def draw(
    rng,
    cell,
    steps,
    batch,
    size,
    hidden,
    scales,
    *,
    projection=0,
    bias=True,
    directions=1,
    sizes=None,
    states=STATES,
    dtype="float64",
    lengths=None,
    resets=None,
    anew=False,
):
    """Draw a call; `sizes` packs its rows, `states` says which of STATES there are.

    `lengths` are given, or drawn where they are "some"; `resets` is how probable it is that a row
    begins anew at a step: at states of its own (`anew`), or at zero.
    """
    record, out, dtype = RECORDS[cell], projection or hidden, np.dtype(dtype)

    def array(scale, *shape):
        if scales.whole:
            return rng.integers(-1, 2, shape).astype(dtype)
        numbers = rng.standard_normal(shape)
        if dtype.kind == "c":
            numbers = (numbers + 1j * rng.standard_normal(shape)) / np.sqrt(2)
        return (scale * numbers).astype(dtype)

    def state(name, there):
        if not there or (name == "c" and not record.has_c):
            return None
        return array(scales.state, directions, batch, out if name == "h" else hidden)

    rows = record.gates * hidden
    weights = [
        {
            "ih": array(scales.ih, rows, size),
            "hh": array(scales.hh, rows, out),
            "b_ih": array(scales.bias, rows) if bias else None,
            "b_hh": array(scales.bias, rows) if bias else None,
            "hr": array(scales.hr, out, hidden) if projection else None,
        }
        for _ in range(directions)
    ]
    packed = steps * batch if sizes is None else sum(sizes)
    if isinstance(lengths, str):
        lengths = rng.integers(0, steps + 1, batch)
    anew = anew and resets is not None
    return Call(
        cell,
        array(1.0, packed, size),
        sizes,
        steps,
        batch,
        *(state(name[0], name in states) for name in STATES),
        weights,
        None if lengths is None else np.asarray(lengths, np.int64),
        None if resets is None else rng.random(packed) < resets,
        *(state(name[0], anew) for name in STATES),
    )
