"""Lengths, resets and the states that resets bring: what a caller gives, and what a layer needs.

Legend: T steps, B batch, N packed rows, L layers, D directions, O output of a step, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ostinato import check, tensors
from ostinato.call import States
from ostinato.nn._arguments import reject_type, state_pair
from ostinato.tensors import is_recorded, unrecorded


class Cuts(NamedTuple):
    """Where rows end early or begin anew, in the layout of the input; and what else to return."""

    lengths: Tensor | None  # (B,), int64 on the CPU
    resets: Tensor | None  # (T, B) or (N,), bool
    reset_to: States  # (L * D, B, O), and of an LSTM (L * D, B, H)
    all_states: bool

    def is_start(self) -> bool:
        """Whether all that is asked is how the only step of a padded batch begins."""
        resets = self.resets
        if resets is None or self.lengths is not None or self.all_states:
            return False
        # A graph is for any number of steps.
        return not tensors.is_traced() and resets.dim() == 2 and resets.shape[0] == 1

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
    """Check lengths; return them as the operators take them, (B,), int64 on the CPU, or None.

    `lengths` are None; a tensor on any device, a NumPy array or a sequence of whole numbers, which
    may be Python's, NumPy's or tensors of one element; one number for one sequence. `kind` is the
    layer's name, for messages; `batched` says whether the input has a batch dimension.
    """
    if lengths is None:
        return None
    if not batched and _is_whole(lengths):
        lengths = [lengths]
    if isinstance(lengths, (list, tuple, range)):
        lengths = _of_sequence(kind, lengths)
    elif isinstance(lengths, np.ndarray):
        if lengths.dtype.kind not in "iu":
            raise ValueError(f"{kind}: lengths must be whole numbers, got {lengths.dtype}")
        # torch takes neither the other byte order nor strides that run backwards.
        lengths = torch.from_numpy(lengths.astype(np.int64, order="C"))
    if not isinstance(lengths, Tensor):
        reject_type(kind, "lengths", "a Tensor or a list of ints", lengths)
    _check_whole(kind, lengths)
    if not batched and lengths.dim() == 0:
        lengths = lengths.reshape(1)
    found: Tensor = lengths.to("cpu", torch.int64)
    _check_lengths(kind, found, steps, batch)
    return found


def _is_whole(number: object) -> bool:
    return isinstance(number, (int, np.integer, torch.SymInt)) and not isinstance(number, bool)


def _check_whole(kind: str, lengths: Tensor) -> None:
    dtype = lengths.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ValueError(f"{kind}: lengths must be whole numbers, got {dtype}")


def _of_sequence(kind: str, lengths: Sequence[Any]) -> Tensor:
    """Return what a list holds as one tensor."""
    for length in lengths:
        if isinstance(length, Tensor) and length.numel() == 1:
            _check_whole(kind, length)
        elif not _is_whole(length):
            reject_type(kind, "lengths", "a Tensor or a list of ints", length)
    if not any(isinstance(length, Tensor) for length in lengths):
        return torch.tensor(lengths, dtype=torch.int64, device="cpu")
    # Stacked rather than read, which a compiler or a transform could not.
    each = (torch.as_tensor(length).reshape(()).to("cpu", torch.int64) for length in lengths)
    return torch.stack(list(each))


@unrecorded
def _check_lengths(kind: str, lengths: Tensor, steps: int, batch: int) -> None:
    if lengths.shape != (batch,):
        raise RuntimeError(
            f"{kind}: lengths must have shape {(int(batch),)}, one per row, "
            f"got {tuple(lengths.shape)}"
        )
    if not torch.compiler.is_compiling() and not tensors.is_wrapped(lengths):
        check.check_lengths(lengths, steps, f"{kind}: lengths must be")


@unrecorded
def resets_of(kind: str, resets: Any, input: Any, shape: tuple[int, ...]) -> Tensor | None:
    """Return resets in the layout of the caller's input, after every check.

    `resets` are None, or bool: a tensor of `shape`, the shape of the caller's input without
    features, or a PackedSequence if the input is one. `kind` is the layer's name, for messages.
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
) -> States:
    """Return the states that resets bring, for every row.

    `reset_to` is None, or shaped as hx, where its batch dimension may be 1 or missing; `resets` are
    what `resets_of` returned. `shapes` are (L * D, O), and for an LSTM (L * D, H). dtype and device
    are to be those of `input`; `kind` is the layer's name, for messages.
    """
    if reset_to is None:
        return (None,) * len(shapes)
    if resets is None:
        raise ValueError(f"{kind}: reset_to says what resets bring, but resets is None")
    if len(shapes) > 1:
        # None would be a proxy of torch.fx, with which forward does not come here.
        given: tuple[Any, ...] = state_pair(kind, reset_to, "reset_to") or ()
    else:
        given = (reset_to,)
    found: list[Tensor] = []
    for state, (rows, size) in zip(given, shapes, strict=True):
        if not isinstance(state, Tensor):
            reject_type(kind, "reset_to", "a Tensor or None", state)
        full = state.unsqueeze(1) if state.dim() == 2 else state
        _check_reset_state(kind, full, state, (rows, batch, size), input)
        found.append(full.expand(rows, batch, size))
    return tuple(found)


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
