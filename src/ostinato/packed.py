"""Weights that are packed once, and their calls on states from outside: what a frozen module runs.

The arithmetic is a stream's (csrc/cpu/stream_loop.h), and so the bits are those of the layers.
Every direction of a layer has an engine of its own, `ostinato._core.Stream`; where there is one
direction, one engine has all layers. The reverse direction is a run over the reversed sequence.

Legend: T steps, B rows, I input, H hidden, O output of a step (proj_size, or H), L layers,
D directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ostinato import _core, plain, quantized
from ostinato.call import States
from ostinato.cells import Cell
from ostinato.tensors import DTYPES, address, thread_count

# What a stream computes in.
FLOATS = {torch.float32: np.dtype("f4"), torch.float64: np.dtype("f8")}
# What scales are called.
SUFFIX = quantized.SUFFIX
# Of a layer, in the order of `_core.Stream.load`, where the scales of the weights come last.
_PARTS = "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"
_SCALES = tuple(f"{part}{{}}{SUFFIX}" for part in _PARTS if part.startswith("weight"))
_ENDS = (*(f"{part}{{}}" for part in _PARTS), *_SCALES)

_Tensors = Mapping[str, Tensor]


class Sizes(NamedTuple):
    """What a module is, beside its weights."""

    kind: str  # the module's, for messages
    cell: Cell
    input: int
    hidden: int
    projection: int
    layers: int
    directions: int
    is_cell: bool  # whether names have no `_l0` behind them

    @property
    def output(self) -> int:
        """O, the size of a step's output in one direction."""
        return self.projection or self.hidden

    def suffixes(self) -> list[str]:
        """Return what stands behind names, in the order of h_n."""
        if self.is_cell:
            return [""]
        ends = "", "_reverse"
        return [f"_l{k}{end}" for k in range(self.layers) for end in ends[: self.directions]]

    def shape(self, part: str, layer: int) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        rows = self.cell.gates * self.hidden
        if part == "weight_hr":
            return self.output, self.hidden
        if part.startswith("bias"):
            return (rows,)
        width = self.output if part == "weight_hh" else self.directions * self.output
        is_first = part == "weight_ih" and layer == 0
        return rows, self.input if is_first else width

    def check(self, tensors: _Tensors) -> None:
        """Refuse weights of other sizes than the module's."""
        for k, end in enumerate(self.suffixes()):
            for part in _PARTS:
                weight, shape = tensors.get(part + end), self.shape(part, k // self.directions)
                if weight is not None and weight.shape != shape:
                    raise RuntimeError(
                        f"{self.kind}: {part}{end}: expected shape {shape}, "
                        f"got {tuple(weight.shape)}"
                    )


def quantise(kind: str, tensors: _Tensors) -> dict[str, Tensor]:
    """Return float32 parameters as a module of 8 bits has them, scales beside the weights.

    Raises:
        ValueError: a weight has a number that is NaN or infinite.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith("weight"):
            made[name] = tensor.detach().clone()
            continue
        found = quantized.quantise(f"{kind}: {name}", tensor.detach().numpy())
        made[name] = torch.from_numpy(found.values)
        made[name + SUFFIX] = torch.from_numpy(found.scales)
    return made


class Packed:
    """Weights of a module, packed for its steps.

    Args:
        sizes: what the module is.
        tensors: its parameters by name; of 8 bits, with scales. Packed here, and read no more.
        planes: rows of 8 bits that a row is multiplied as with weights of 8 bits, or 0 for others.

    Raises:
        RuntimeError: sizes that do not fit.
    """

    def __init__(self, sizes: Sizes, tensors: _Tensors, planes: int) -> None:
        sizes.check(tensors)
        self.sizes = sizes
        self.dtype = _dtype_of(sizes, tensors, planes)
        dense = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        addresses = [
            [address(dense.get(end.format(suffix))) for end in _ENDS] for suffix in sizes.suffixes()
        ]
        if sizes.directions == 1:
            addresses = [[each for layer in addresses for each in layer]]
        self._engines = [self._engine(k, planes) for k in range(len(addresses))]
        for engine, of_layers in zip(self._engines, addresses, strict=True):
            engine.load(of_layers)
        # One call of C++ has all of them.
        first, *rest = self._engines
        self.call_from, self.rest = first.call_from, tuple(rest)

    def _engine(self, k: int, planes: int) -> Any:
        sizes, directions = self.sizes, self.sizes.directions
        layers = sizes.layers if directions == 1 else 1
        width = sizes.input if k < directions else directions * sizes.output
        return _core.Stream(
            sizes.cell.number,
            DTYPES[self.dtype],
            planes,
            (layers, 0, width, sizes.hidden, sizes.projection),
            True,
            np.ndarray,
            np.empty,
            FLOATS[self.dtype],
            thread_count,
        )

    def run(
        self,
        input: Tensor,
        initial: States,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        reset_to: States = (),
    ) -> tuple[Tensor, States]:
        """Run all layers over a padded batch.

        Args:
            input: (T, B, I), a plain tensor of `dtype` on the CPU.
            initial: (L * D, B, O), and (L * D, B, H) where there is c; None for zeros.
            lengths: (B,), int64: steps of each row. Past its end a row's output is zero.
            resets: (T, B), bool: a row begins anew before this step.
            reset_to: shaped as `initial`: the states with which it does; None for zeros.

        Returns:
            output (T, B, D * O) and the last states.
        """
        if lengths is None and resets is None:
            found = self._direct(self.call_from, input, initial, self.rest)
            if found is not None:
                return found
        if self.sizes.directions == 1:
            return _pieces(self, 0, input, initial, lengths, resets, reset_to)
        last: list[States] = []
        for layer in range(self.sizes.layers):
            outputs = []
            for direction in range(2):
                k = 2 * layer + direction
                rows, flags = input, resets
                if direction:
                    order = _reversed(input, lengths)
                    rows, flags = _in(order, input), _behind(order, resets, lengths)
                own = (_row(initial, k), lengths, flags, _row(reset_to, k))
                output, states = _pieces(self, k, rows, *own)
                outputs.append(_in(order, output) if direction else output)
                last.append(states)
            input = torch.cat(outputs, -1)
        return input, tuple(torch.cat(states) for states in zip(*last, strict=True))

    @staticmethod
    def _direct(
        call_from: Any, input: Tensor, initial: States, rest: tuple[Any, ...]
    ) -> tuple[Tensor, States] | None:
        """Run what C++ can read: all states or none of them, and something of each."""
        h, *others = initial
        is_given = h is not None
        if not plain.IS_OPEN or any((state is not None) != is_given for state in others):
            return None
        hx = (h, *others) if is_given and others else h
        found = call_from(input, hx, False, False, {}, (), rest)
        if found is None:
            return None
        output, last = found
        return output, last if isinstance(last, tuple) else (last,)

    def of_engine(self, k: int, input: Tensor, initial: States) -> tuple[Tensor, States]:
        """Run one engine over all rows and steps; the states are those of its layers."""
        engine = self._engines[k]
        found = self._direct(engine.call_from, input, initial, ())
        if found is not None:
            return found
        # What has no elements has no address that C++ would read.
        input = _dense(input)
        steps, rows, _ = input.shape
        widths = self.sizes.output, self.sizes.hidden
        layers = self.sizes.layers if self.sizes.directions == 1 else 1
        output = input.new_empty(steps, rows, self.sizes.output)
        dense = [None if state is None else _dense(state) for state in initial]
        last = tuple(
            input.new_empty(layers, rows, width) for width, _ in zip(widths, initial, strict=False)
        )
        before, after = (
            (*map(address, states), 0)[:2]
            for states in (dense, last)  # no c: 0
        )
        states = (*before, *after)
        engine.run_from(address(input), address(output), steps, rows, states, thread_count())
        return output, last


def _dtype_of(sizes: Sizes, tensors: _Tensors, planes: int) -> torch.dtype:
    """Return what all is of but weights of 8 bits; refuse a tensor of something else."""
    first = next(iter(tensors.values())).dtype
    dtype = torch.float32 if planes or first not in FLOATS else first
    for name, tensor in tensors.items():
        is_small = planes and name.startswith("weight") and not name.endswith(SUFFIX)
        expected = torch.int8 if is_small else dtype
        if tensor.dtype != expected or tensor.device.type != "cpu":
            raise RuntimeError(
                f"{sizes.kind}: {name}: expected {expected} on the CPU, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    return dtype


def _pieces(
    packed: Packed,
    k: int,
    input: Tensor,
    initial: States,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_to: States,
) -> tuple[Tensor, States]:
    """Run an engine between the steps at which rows end or begin anew, on the rows under way."""
    if lengths is None and resets is None:
        return packed.of_engine(k, input, initial)
    steps, rows, _ = input.shape
    layers = packed.sizes.layers if packed.sizes.directions == 1 else 1
    widths = packed.sizes.output, packed.sizes.hidden
    state = [
        input.new_zeros(layers, rows, width) if given is None else given.clone()
        for width, given in zip(widths, initial, strict=False)
    ]
    cuts = {0, steps}
    if lengths is not None:
        cuts |= set(lengths.tolist())
    if resets is not None:
        cuts |= set(resets.any(1).nonzero().flatten().tolist())
    output = input.new_zeros(steps, rows, packed.sizes.output)
    for start, end in pairwise(sorted(cuts)):
        active = torch.ones(rows, dtype=torch.bool) if lengths is None else lengths > start
        if resets is not None:
            begins = resets[start] & active
            for now, new in zip(state, reset_to or (None,) * len(state), strict=True):
                now[:, begins] = 0 if new is None else new[:, begins]
        ids = active.nonzero().flatten()
        own = tuple(each.index_select(1, ids) for each in state)
        y, last = packed.of_engine(k, input[start:end].index_select(1, ids), own)
        output[start:end, ids] = y
        for now, new in zip(state, last, strict=True):
            now[:, ids] = new
    return output, tuple(state)


def _row(states: States, k: int) -> States:
    return tuple(None if state is None else state[k : k + 1] for state in states)


def _reversed(input: Tensor, lengths: Tensor | None) -> Tensor:
    """Return (T, B): which step of each row is at which step of the reversed row."""
    steps, rows, _ = input.shape
    times = torch.arange(steps).unsqueeze(1).expand(steps, rows)
    ends = torch.full((rows,), steps) if lengths is None else lengths
    return torch.where(times < ends, ends - 1 - times, times)


def _in(order: Tensor, rows: Tensor) -> Tensor:
    """Return rows (T, B, ...) in another order of steps, its own inverse."""
    return rows.gather(0, order.unsqueeze(-1).expand_as(rows))


def _behind(order: Tensor, resets: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """Return resets of the reversed rows: what lay before a step lies behind it."""
    if resets is None:
        return None
    flags = resets.roll(-1, 0)
    flags[-1:] = False
    if lengths is not None:
        times = torch.arange(len(flags)).unsqueeze(1)
        flags &= times + 1 < lengths
    return flags.gather(0, order)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_neg().contiguous()
