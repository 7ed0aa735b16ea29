"""Lengths, resets and the states that resets bring: what a caller gives, and what a layer needs.

Legend: T steps, B batch, N packed rows, L layers, D directions, O output of a step, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ostinato import call
from ostinato.nn._arguments import reject_type, state_pair
from ostinato.traced import is_recorded, unrecorded


class Cuts(NamedTuple):
    """Where rows end early or begin anew, in the layout of the input; and what else to return."""

    lengths: Tensor | None  # (B,), int64 on the CPU
    resets: Tensor | None  # (T, B) or (N,), bool
    reset_h: Tensor | None  # (L * D, B, O)
    reset_c: Tensor | None  # (L * D, B, H)
    all_states: bool

    def each_state(self, change: Callable[[Tensor], Tensor]) -> Cuts:
        """Return the same with the states that resets bring changed."""
        h, c = (None if s is None else change(s) for s in (self.reset_h, self.reset_c))
        return self._replace(reset_h=h, reset_c=c)

    def is_start(self) -> bool:
        """Whether all that is asked is how the only step of a padded batch begins."""
        resets = self.resets
        if resets is None or self.lengths is not None or self.all_states:
            return False
        # A graph is for any number of steps.
        return not call.is_traced() and resets.dim() == 2 and resets.shape[0] == 1

    def begin(self, first: Tensor | None, reset: Tensor | None) -> Tensor | None:
        """Return the states before the only step: of resets where a row begins anew."""
        assert self.resets is not None
        begins = self.resets.unsqueeze(-1)
        if first is None:
            return None if reset is None else reset.masked_fill(~begins, 0)
        return first.masked_fill(begins, 0) if reset is None else torch.where(begins, reset, first)


def first_size(batch_sizes: Tensor) -> Any:
    """Return B of a packed batch; while torch.jit.trace records, what it can follow."""
    if is_recorded():
        return batch_sizes[0]
    return int(batch_sizes[0]) if len(batch_sizes) else 0


def padded_lengths(kind: str, lengths: Any, steps: int, batch: int, batched: bool) -> Tensor | None:
    """Return lengths as the operators take them, after every check.

    Args:
        kind: name of the layer, for messages.
        lengths: None, a tensor on any device, a list or a tuple of ints; an int for one sequence.
        steps: T.
        batch: B.
        batched: whether the input has a batch dimension.

    Returns:
        (B,), int64 on the CPU, or None.
    """
    if lengths is None:
        return None
    if isinstance(lengths, int) and not isinstance(lengths, bool) and not batched:
        lengths = [lengths]
    if isinstance(lengths, (list, tuple)):
        for length in lengths:
            if not isinstance(length, (int, torch.SymInt)) or isinstance(length, bool):
                reject_type(kind, "lengths", "a Tensor or a list of ints", length)
        lengths = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    if not isinstance(lengths, Tensor):
        reject_type(kind, "lengths", "a Tensor or a list of ints", lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"{kind}: lengths must be whole numbers, got {lengths.dtype}")
    if not batched and lengths.dim() == 0:
        lengths = lengths.reshape(1)
    found: Tensor = lengths.to("cpu", torch.int64)
    _check_lengths(kind, found, steps, batch)
    return found


@unrecorded
def _check_lengths(kind: str, lengths: Tensor, steps: int, batch: int) -> None:
    if lengths.shape != (batch,):
        raise RuntimeError(
            f"{kind}: lengths must have shape {(int(batch),)}, one per row, "
            f"got {tuple(lengths.shape)}"
        )
    if not torch.compiler.is_compiling() and not call.is_wrapped(lengths):
        call.check_lengths(lengths, steps)


@unrecorded
def resets_of(kind: str, resets: Any, input: Any, shape: tuple[int, ...]) -> Tensor | None:
    """Return resets in the layout of the caller's input, after every check.

    Args:
        kind: name of the layer, for messages.
        resets: None, or bool: a tensor of `shape`, or a PackedSequence if the input is one.
        input: a tensor or a PackedSequence.
        shape: the caller's input without features.
    """
    if resets is None:
        return None
    if isinstance(input, PackedSequence):
        if not isinstance(resets, PackedSequence):
            reject_type(kind, "resets", "a PackedSequence, as input is", resets)
        if not torch.equal(resets.batch_sizes, input.batch_sizes):
            raise RuntimeError(f"{kind}: resets must be packed with the lengths of input")
        resets = resets.data
        input = input.data
    if not isinstance(resets, Tensor):
        reject_type(kind, "resets", "a Tensor", resets)
    if resets.dtype != torch.bool:
        raise ValueError(f"{kind}: resets must be torch.bool, got {resets.dtype}")
    if resets.shape != shape:
        raise RuntimeError(
            f"{kind}: resets must have shape {shape}, one for each step and row of input, "
            f"got {tuple(resets.shape)}"
        )
    if resets.device != input.device:
        raise RuntimeError(f"{kind}: resets must be on input's device, got {resets.device}")
    found: Tensor = resets
    return found


def reset_states(
    kind: str,
    reset_to: Any,
    resets: Tensor | None,
    batch: int,
    shapes: tuple[tuple[int, int], ...],
    input: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the states that resets bring, for every row.

    Args:
        kind: name of the layer, for messages.
        reset_to: None, or shaped as hx; its batch dimension may be 1 or missing.
        resets: as `resets_of` returns them.
        batch: B.
        shapes: (L * D, O), and for an LSTM (L * D, H).
        input: of the layer, for dtype and device.
    """
    if reset_to is None:
        return None, None
    if resets is None:
        raise ValueError(f"{kind}: reset_to says what resets bring, but resets is None")
    if len(shapes) == 2:
        # None would be a proxy of torch.fx, with which forward does not come here.
        given: tuple[Any, ...] = state_pair(kind, reset_to, "reset_to") or ()
    else:
        given = (reset_to,)
    found: list[Tensor | None] = []
    for state, (rows, size) in zip(given, shapes, strict=True):
        if not isinstance(state, Tensor):
            reject_type(kind, "reset_to", "a Tensor or None", state)
        full = state.unsqueeze(1) if state.dim() == 2 else state
        _check_reset_state(kind, full, state, (rows, batch, size), input)
        found.append(full.expand(rows, batch, size))
    return (found[0], found[1]) if len(found) == 2 else (found[0], None)


@unrecorded
def _check_reset_state(
    kind: str, full: Tensor, given: Tensor, shape: tuple[int, int, int], input: Tensor
) -> None:
    rows, batch, size = shape
    if full.dim() != 3 or full.shape not in ((rows, batch, size), (rows, 1, size)):
        raise RuntimeError(
            f"{kind}: reset_to must have shape {(rows, batch, size)} or {(rows, size)}, "
            f"got {tuple(given.shape)}"
        )
    # In a region of autocast all are cast to the dtype of the weights.
    if full.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"{kind}: reset_to must have input's dtype, {input.dtype}, got {full.dtype}"
        )
    if full.device != input.device:
        raise RuntimeError(f"{kind}: reset_to must be on input's device, got {full.device}")
