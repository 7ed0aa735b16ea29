"""The arrays of a call as C++ takes them (csrc/plain.h): torch's tensors, in one tuple.

C++ reads and checks them in a tenth of the time that Python takes, for the CPU engine and for the
GPU engine, and declines what it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ostinato import _core
from ostinato.arrays import STATES
from ostinato.call import Parts, Shape, padded
from ostinato.cells import CELLS, find
from ostinato.own import records  # noqa: F401 - makes the records of own cells


def _connect() -> bool:
    """Let C++ read tensors if this torch has DLPack's table of C functions (2.10 and later)."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return table is not None and _core.connect(table, Tensor, torch.nn.Parameter, torch.empty_like)


IS_OPEN = _connect()

# cell, is_step, shape, has_biases, recompute, and the layers of the stack that a layer is one of.
# With is_step input and states have no dimensions for steps and directions.
Config = tuple[str, bool, Shape, bool, bool, int]


class _Numbers(dict[str, int]):
    """The engine's number of each cell, -1 for a name that none has."""

    def __missing__(self, name: str) -> int:
        kind = find(name)
        number = -1 if kind is None else kind.number
        if kind is not None:
            self[name] = number
        return number


# Looked up once: a cell's whole call takes a few microseconds.
NUMBERS = _Numbers((name, cell.number) for name, cell in CELLS.items())

# What cuts rows, at the end of a tuple: lengths, resets, and the states of these.
_NO_CUTS = (None, None, *[None] * len(STATES))


def to_tuple(masks: Sequence[Any], parts: Parts, is_cut: bool, absent: Any = None) -> Any:
    """Return the arrays of a call as C++ takes them (csrc/plain.h), or one entry for each.

    `masks` are batch_sizes, lengths and resets; what cuts rows comes last, and only if `is_cut`.
    """
    batch_sizes, *cuts = masks
    states = padded(parts.initial, absent=absent)
    cuts = [*cuts, *padded(parts.reset_to, absent=absent)] if is_cut else []
    return batch_sizes, parts.input, *states, *parts.weights, *cuts


def has_cuts(values: Sequence[Any], weights: int) -> bool:
    """Whether what `to_tuple` made of a call with so many weights has places for what cuts rows."""
    return len(values) > 2 + len(STATES) + weights


def of_tuple(values: Sequence[Any], weights: int) -> tuple[Sequence[Any], Parts]:
    """Return masks and parts of what `to_tuple` made; an entry for each state that any cell has."""
    most = len(STATES)
    batch_sizes, input, *rest = values
    initial, own, cuts = rest[:most], rest[most : most + weights], rest[most + weights :]
    lengths, resets, *reset_to = cuts or _NO_CUTS
    return (batch_sizes, lengths, resets), Parts(input, tuple(initial), tuple(reset_to), own)
