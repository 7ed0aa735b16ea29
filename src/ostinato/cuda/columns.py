"""Where the gradients of a step lie: the columns of what a backward kernel writes for a row.

First the hidden products that are in no sum, then the sums, then the input products apart, the
parameters and the drives (csrc/cuda/sequence.cuh, position_of). So the first columns are a matrix
for the products with weight_hh, and those behind the ones that are alone for weight_ih; a GRU has
[n of the hidden product, r, z, n of the input product].
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ostinato.cells import cell_of
from ostinato.own.graph import Graph
from ostinato.own.lowering import lower


class Columns(NamedTuple):
    """Columns by their meaning, each as wide as the layer."""

    hidden: tuple[int, ...]  # which gate of the state the first are of
    alone: int  # how many of these are in no sum: behind them the columns of the input begin
    input: tuple[int, ...]  # which gate of the input those are of
    slots: int  # how many columns are gradients of gates and parameters
    drives: int  # how many of drives come behind

    @property
    def parameters(self) -> int:
        """Where the parameters' columns begin."""
        return self.alone + len(self.input)


@functools.cache
def columns_of(cell: str) -> Columns:
    """Return the columns of a cell.

    Example:
        >>> columns_of("gru").hidden, columns_of("gru").input
        ((2, 0, 1), (0, 1, 2))
    """
    kind = cell_of(cell)
    if kind.is_own:
        joint = sorted(lower(Graph.parse(cell)).joint)
    else:
        # csrc/cells.h, kJoint: all gates but as many as have further gradients.
        joint = list(range(2 * kind.gates - kind.grads))
    alone = [gate for gate in range(kind.gates) if gate not in joint]
    apart = [gate for gate in range(kind.input_gates) if gate not in joint]
    slots = kind.grads - kind.drives
    return Columns((*alone, *joint), len(alone), (*joint, *apart), slots, kind.drives)


def ordered(tensor: Tensor, gates: tuple[int, ...], hidden: int) -> Tensor:
    """Return a tensor whose rows are of gates 0, 1, ..: with those of `gates`, in this order."""
    count, first = len(gates), next(iter(gates), 0)
    if gates == tuple((first + k) % count for k in range(count)):
        return tensor.roll(-first * hidden, 0) if first else tensor
    return torch.cat([tensor[gate * hidden : (gate + 1) * hidden] for gate in gates])


def part(tensor: Tensor, begin: int, end: int, hidden: int) -> Tensor:
    """Return columns of a tensor, or the tensor where these are all."""
    if begin == 0 and end * hidden == tensor.shape[-1]:
        return tensor
    return tensor[..., begin * hidden : end * hidden]


def restored(tensor: Tensor, gates: tuple[int, ...], hidden: int) -> Tensor:
    """Return a tensor whose rows are of `gates`, in this order: with those of gates 0, 1, .."""
    return ordered(tensor, tuple(map(gates.index, range(len(gates)))), hidden)
