"""The constants of one kernel of the GPU engine, and what follows from them.

csrc/cuda/plan.cuh has the same numbers; where the two differ, the kernel does not compile.

Legend: H hidden, G gates, k the index that a product sums over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ostinato.cells import Cell, cell_of
from ostinato.own import cuda as own


class Math(NamedTuple):
    """In which precision products are computed."""

    type: str  # in csrc/cuda/math.cuh
    depth: int  # k of one instruction; 0 for fused multiply-adds
    bytes: int  # of an operand


MATHS = {
    "bf16": Math("Bf16", 16, 2),
    "fp16": Math("Fp16", 16, 2),
    "tf32": Math("Tf32", 8, 4),
    "fp32": Math("Fp32", 0, 4),
}
_EXCHANGES = {"block": "kBlock", "cluster": "kCluster", "grid": "kGrid"}


class Config(NamedTuple):
    """The constants of one kernel. See csrc/cuda/plan.cuh for what they mean."""

    cell: str
    math: str
    hidden: int
    blocks: int  # that run a batch tile together
    units: int  # of one block
    warps: int
    groups: int  # of so many rows, to a tile
    resident: int  # fragments in registers, at most
    exchange: str  # "block", "cluster" or "grid"
    is_backward: bool
    group_rows: int = 8  # one or more eights: those of a tensor instruction

    @property
    def kind(self) -> Cell:
        """What cell this is."""
        return cell_of(self.cell)

    @property
    def source(self) -> str:
        """The main file's name, in csrc/cuda."""
        return "sequence.cu"

    @property
    def head(self) -> str:
        """The struct of an own cell; csrc/cells.h has the others."""
        return own.head_of(self.cell) if self.kind.is_own else ""

    @property
    def entry(self) -> str:
        """The kernel's name."""
        return "ostinato_backward" if self.is_backward else "ostinato_forward"

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * 32

    @property
    def rows(self) -> int:
        """Rows of a batch tile."""
        return self.groups * self.group_rows

    @property
    def padded(self) -> int:
        """H, padded so that blocks have equal parts."""
        return self.blocks * self.units

    @property
    def needs(self) -> str:
        """The oldest architecture that can run it."""
        return "sm_90" if self.exchange == "cluster" else "sm_80"

    @property
    def defines(self) -> dict[str, str | int]:
        """The macros that csrc/cuda/plan.cuh asks for."""
        return {
            "OSTINATO_CELL_TYPE": own.STRUCT if self.kind.is_own else self.kind.kernel,
            "OSTINATO_MATH": MATHS[self.math].type,
            "OSTINATO_HIDDEN": self.hidden,
            "OSTINATO_BLOCKS": self.blocks,
            "OSTINATO_UNITS": self.units,
            "OSTINATO_WARPS": self.warps,
            "OSTINATO_GROUPS": self.groups,
            "OSTINATO_GROUP_ROWS": self.group_rows,
            "OSTINATO_RESIDENT": self.resident,
            "OSTINATO_EXCHANGE": _EXCHANGES[self.exchange],
            "OSTINATO_BACKWARD": int(self.is_backward),
            "OSTINATO_EXTRAS": int(self.has_extras),
            "OSTINATO_SHARED_BYTES": self.shared_bytes,
        }

    @property
    def has_extras(self) -> bool:
        """Whether the kernel takes numbers per unit, or what drives a step."""
        return bool(self.kind.parameters or self.kind.drives)

    @property
    def slices(self) -> int:
        """How many warps, or threads, share the sum over k."""
        tensor = MATHS[self.math].depth > 0
        units = self.padded if self.is_backward else self.units
        width = units // 16 if tensor else units
        return max((self.warps if tensor else self.threads) // width, 1)

    @property
    def width(self) -> int:
        """How many fragments are used together, one for each of so many sums."""
        gates = self.kind.gates
        if not self.is_backward or not gates:
            return gates
        if not MATHS[self.math].depth:
            return self.padded * self.slices // self.threads
        tiles = self.padded // 16 * self.slices // self.warps
        most = max(4 * 8 // self.group_rows, 1)
        return next(count for count in range(most, 0, -1) if tiles % count == 0)

    @property
    def fragments(self) -> int:
        """How many 16-byte fragments of weight_hh a thread holds."""
        depth, gates = MATHS[self.math].depth or 4, self.kind.gates
        if not self.is_backward:
            return self.padded // depth // self.slices * gates
        if MATHS[self.math].depth:
            outputs = self.padded // 16 * self.slices // self.warps
        else:
            outputs = self.padded * self.slices // self.threads
        return outputs * (gates * self.units // depth // self.slices)

    @property
    def is_even(self) -> bool:
        """Whether warps, or threads, share the product evenly, as the kernel asks."""
        depth, gates = MATHS[self.math].depth, self.kind.gates
        if not gates:
            return True
        workers = self.warps if depth else self.threads
        size = 16 if depth else 1
        depth = depth or 4
        k = gates * self.units if self.is_backward else self.padded
        tiles = (self.padded if self.is_backward else self.units) // size
        if self.is_backward:
            shares = tiles * self.slices % workers == 0 and workers % self.slices == 0
            shares = shares and (self.exchange != "grid" or self.threads >= self._reads)
        else:
            shares = self.slices * tiles == workers
        return shares and k % (depth * self.slices) == 0

    @property
    def _reads(self) -> int:
        """Reads of 16 bytes that one source's words of a group take in backward."""
        return self.group_rows * self.units * self._word_bytes // 16

    @property
    def _word_bytes(self) -> int:
        """Bytes of a word in global memory: a value and its mark."""
        return 4 if MATHS[self.math].depth else 8

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: ForwardShared, BackwardShared."""
        kind, unit = self.kind, self.units * 4
        size = kind.parameters * unit
        # A Fragment, which only a product has, is aligned to 16 bytes.
        size, alignment = (size + self._parts_bytes, 16) if kind.gates else (size, 8)
        if not self.is_backward:
            apart = kind.grads - kind.gates - kind.parameters - kind.drives
            size += (kind.gates + max(apart, 1)) * unit
        size += self.rows * unit + (kind.behind * self.rows or 1) * unit
        size += self.rows * 8
        buffers = 2 if self.exchange == "cluster" else 1
        return _align(_align(size, 8) + buffers * self.groups * 8, alignment)

    @property
    def _parts_bytes(self) -> int:
        """Shared memory of a product: ForwardParts, BackwardParts."""
        item, gates = MATHS[self.math].bytes, self.kind.gates
        pad = 16 // item
        halves = 2 if self.groups > 1 else 1
        buffers = 2 if self.exchange == "cluster" else 1
        is_grid = self.exchange == "grid"
        sums = self.group_rows * (self.units + 4) * 4
        weights = (max(self.fragments - self.resident, 0) * self.threads + 1) * 16
        size = 0
        if self.is_backward:
            size += halves * self.group_rows * (gates * self.units + pad) * item
            size += (1 if is_grid else buffers * self.groups) * self.sources * sums
        else:
            size += (
                (1 if is_grid else buffers * self.groups)
                * self.group_rows
                * (self.padded + pad)
                * item
            )
            size += (1 if is_grid else halves) * self.slices * gates * sums
        return _align(size, 16) + weights

    @property
    def sources(self) -> int:
        """Parts that a sum of backward is received in."""
        if self.exchange != "grid":
            return self.blocks * self.slices
        return min(max(self.threads // self._reads, 1), self.blocks)

    def tiles(self, batch: int) -> int:
        """Batch tiles of so many rows."""
        return -(-batch // self.rows)

    def loops(self, batch: int, directions: int) -> int:
        """Batch tiles of both directions."""
        return self.tiles(batch) * directions

    def exchange_bytes(self, loops: int) -> int:
        """Bytes of global memory by which the loops of a launch exchange, zeros at first."""
        if self.exchange != "grid":
            return 0
        units = self.padded * (self.blocks * self.slices if self.is_backward else 1)
        return loops * self.groups * 2 * self.group_rows * units * self._word_bytes


@dataclass(frozen=True)
class Previous:
    """The constants of the kernel that gathers the state before each step: one block for each."""

    bytes: int  # of a number

    @property
    def defines(self) -> dict[str, str | int]:
        """The macros that csrc/cuda/previous.cu asks for."""
        return {"OSTINATO_ITEM_BYTES": self.bytes, "OSTINATO_THREADS": self.threads}

    # As Config has them.
    head: ClassVar[str] = ""
    source: ClassVar[str] = "previous.cu"
    entry: ClassVar[str] = "ostinato_previous"
    threads: ClassVar[int] = 256
    shared_bytes: ClassVar[int] = 0
    blocks: ClassVar[int] = 1
    exchange: ClassVar[str] = "block"
    needs: ClassVar[str] = "sm_80"


def _align(size: int, to: int) -> int:
    return -(-size // to) * to
