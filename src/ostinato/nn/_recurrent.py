"""Recurrent and RecurrentCell: cells of the user's own over whole sequences, and one step of them.

Legend: T steps, B batch, N packed rows, I input_size, H hidden_size, L layers, D directions,
n drives, S states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ostinato import route
from ostinato.call import Call, Shape, States
from ostinato.nn._arguments import (
    cast,
    check_devices,
    check_weights,
    reject_dtype,
    reject_type,
)
from ostinato.nn._cuts import Cuts
from ostinato.nn._own import Cell, WithCells
from ostinato.nn._shared import Sequences, check_memory
from ostinato.nn._stand_ins import is_tensor_like
from ostinato.tensors import unrecorded, without_autocast


class Recurrent(WithCells, Sequences):
    """A cell of your own over whole sequences, in layers and directions.

    Weights have torch's names: weight_ih_l0, (x_gates * H, I), weight_hh_l0, (h_gates * H, H), and
    bias_ih_l0, bias_hh_l0; a second direction's end in _reverse. Each layer and direction has its
    own cell, cell_l0 and so on, with its numbers per unit. So a GRU that is written as a cell
    loads what nn.GRU saved.

    Args:
        cell: a class derived from `Cell`, or what returns such a cell for (hidden_size, device=,
            dtype=).
        input_size: I, features of an input step.
        hidden_size: H, features of a state.
        num_layers: L; each layer after the first reads the output of the one before it.
        bias: whether b_ih and b_hh exist.
        batch_first: whether batched input and output are (B, T, features); states never are.
        dropout: probability of zeroing an element of each layer's output but the last, in training.
        bidirectional: whether a second direction runs from the end; D is then 2.
        device: where parameters are created.
        dtype: of the parameters.
        memory: "keep", or "recompute" to keep nothing but states for backward.

    `forward` takes and returns what nn.GRU's does. With S states, hx, reset_to and h_n are tuples
    of S. `drives`, (T, B, n * H) in the layout of input, is for a cell that asks for n: each layer
    and direction is given the same.

    Raises:
        StepError: the step does what cannot be recorded; the message names the line.
        TypeError: no cell, or an argument of another Python type.
        ValueError: gates, states, drives or parameters out of range or of another shape.

    Example:
        >>> import torch
        >>> from ostinato import nn
        >>> class Elman(nn.Cell):
        ...     def step(self, x, h, state):
        ...         return torch.tanh(x[0] + h[0])
        >>> layer = nn.Recurrent(Elman, 10, 20, num_layers=2)
        >>> layer.load_state_dict(nn.RNN(10, 20, 2).state_dict())
        <All keys matched successfully>

    Source: the interface of torch.nn.GRU.
    """

    _kind = "Recurrent"
    proj_size = 0

    def __init__(
        self,
        cell: Callable[..., Cell],
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
        memory: str = "keep",
    ) -> None:
        super().__init__()
        check_memory(memory)
        # What torch.nn.RNNBase refuses, and how.
        torch.nn.RNNBase(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device="meta",
        )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional, self.memory = bidirectional, memory
        directions = ("", "_reverse") if bidirectional else ("",)
        later = hidden_size * len(directions)
        suffixes = {
            f"_l{k}{way}": later if k else input_size
            for k in range(num_layers)
            for way in directions
        }
        self._make(cell, suffixes, device, dtype)

    def extra_repr(self) -> str:
        """Say what torch's layers say."""
        words = [f"{self.input_size}, {self.hidden_size}"]
        for name, default in (
            ("num_layers", 1),
            ("bias", True),
            ("batch_first", False),
            ("dropout", 0.0),
            ("bidirectional", False),
            ("memory", "keep"),
        ):
            value = getattr(self, name)
            if value != default:
                words.append(f"{name}={value}")
        return ", ".join(words)

    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Any = None,
        resets: Any = None,
        reset_to: Any = None,
        return_all_states: bool = False,
        drives: Any = None,
    ) -> Any:
        """Run the layers over a batch or a sequence.

        Args:
            input: (T, B, I), (B, T, I) with batch_first, (T, I) for one sequence, or a
                PackedSequence.
            hx: the initial state, (L * D, B, H), or a tuple of S; without B for one sequence; None
                means zeros.
            lengths: as in nn.GRU.
            resets: as in nn.GRU.
            reset_to: shaped as hx.
            return_all_states: whether to return the states of every layer and step as well.
            drives: n * H for I, in the layout of input: a tensor, or for packed input a
                PackedSequence of the same batch_sizes.

        Returns:
            output, (T, B, D * H) in the layout of `input`, and the last states shaped as hx; with
            return_all_states those of all steps as a third, (L * D, T, B, H) or (L * D, N, H) each.

        Raises:
            TypeError: an argument of another Python type.
            ValueError: input of another number of dimensions or another dtype than the weights;
                lengths out of range; drives missing.
            RuntimeError: sizes that do not fit.
        """
        if drives is not None or self._drives_of_cell:
            input = self._with_drives(input, drives)
        return super().forward(input, hx, lengths, resets, reset_to, return_all_states)

    def _cuts(
        self, input: Any, lengths: Any, resets: Any, reset_to: Any, return_all_states: bool
    ) -> Cuts | None:
        reset_to = self._packed_states("reset_to", reset_to)
        return super()._cuts(input, lengths, resets, reset_to, return_all_states)

    def _states(self, hx: Any) -> States | None:
        if self._states_of_cell == 1:
            return super()._states(hx)
        found = self._packed_states("hx", hx)
        return (None, None) if found is None else found

    def _result(self, output: Any, last: States, every: States) -> Any:
        states = self._unpacked(last)
        return (output, states, self._unpacked(every)) if every else (output, states)

    def _shape(self) -> Shape:
        return self.input_size, self.hidden_size, 0, 2 if self.bidirectional else 1

    def _weights(self) -> list[Tensor]:
        return self._all_weights()

    def _check_input(self, dtype: torch.dtype, input: Tensor, batch_sizes: Tensor | None) -> None:
        if input.dtype != dtype:
            reject_dtype("RNN", "input", input, dtype)
        if batch_sizes is not None and input.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {input.dim()}")
        behind = self._drives_of_cell * self.hidden_size
        if input.size(-1) != self.input_size + behind:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1) - behind}"
            )

    def _check_weights(self, input: Tensor, weights: list[Tensor]) -> None:
        rest = list(self._shapes_of_cell().values())
        of_input = self._record().input_gates * self.hidden_size
        directions = 2 if self.bidirectional else 1
        shapes: list[tuple[int, ...]] = []
        for k in range(self.num_layers):
            features = directions * self.hidden_size if k else self.input_size
            shapes += [(of_input, features), *rest] * directions
        check_weights(self._kind, self._flat_weights_names, weights, shapes, input)

    def call_of(self, input: Any, hx: Any, lengths: Any, resets: Any) -> Call:
        """Return the call that forward would make; drives, which `explain` is not given, are 0."""
        count = self._drives_of_cell
        if count:
            data = input.data if isinstance(input, PackedSequence) else input
            width = count * self.hidden_size
            input = self._with_drives(input, data.new_zeros((*data.shape[:-1], width)))
        return super().call_of(input, hx, lengths, resets)

    def _reject_size(self, index: int, expected: tuple[int, int, int], got: Tensor) -> NoReturn:
        rows, batch, _ = expected
        raise RuntimeError(
            f"Expected hidden size {(rows, batch, self.hidden_size)}, got {list(got.shape)}"
        )


class RecurrentCell(WithCells):
    """One step of a cell of your own.

    Weights have the names of nn.GRUCell: weight_ih, weight_hh, bias_ih, bias_hh; numbers per unit
    are those of `cell`.

    Args:
        cell: as in `Recurrent`.
        input_size: I, features of the input.
        hidden_size: H, features of each state.
        bias: whether b_ih and b_hh exist.
        device: where parameters are created.
        dtype: of the parameters.

    `forward(input, hx=None, drives=None)` takes input (B, I) or (I,), hx (B, H) or (H,), or a tuple
    of S of these, None meaning zeros, and drives (B, n * H) or (n * H,).

    Returns:
        From `forward`: the new state, or a tuple of S.

    Raises:
        StepError: the step does what cannot be recorded.
        TypeError: no cell, or an argument of another Python type.
        ValueError: input or hx of another number of dimensions or another dtype than the weights.
        RuntimeError: sizes that do not fit.

    Example:
        >>> import torch
        >>> from ostinato import nn
        >>> class Elman(nn.Cell):
        ...     def step(self, x, h, state):
        ...         return torch.tanh(x[0] + h[0])
        >>> nn.RecurrentCell(Elman, 10, 20)(torch.randn(3, 10)).shape
        torch.Size([3, 20])

    Source: the interface of torch.nn.GRUCell.
    """

    _kind = "RecurrentCell"

    def __init__(
        self,
        cell: Callable[..., Cell],
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        torch.nn.GRUCell(input_size, hidden_size, bias, device="meta")  # refuses what it refuses
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self._make(cell, {"": input_size}, device, dtype)

    def extra_repr(self) -> str:
        """Say what torch's cells say."""
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")

    def forward(self, input: Any, hx: Any = None, drives: Any = None) -> Any:
        """Return the new states of one step."""
        if not is_tensor_like(input):
            reject_type(self._kind, "input", "a Tensor", input)
        dim = input.dim()
        if dim not in (1, 2):
            raise ValueError(f"{self._kind}: Expected input to be 1D or 2D, got {dim}D instead")
        if drives is not None or self._drives_of_cell:
            input = self._with_drives(input, drives)
        states = self._states(hx)
        weights, name = self._all_weights(), self._cell_name()
        sizes = self.input_size, self.hidden_size, 0, 1
        h, c = (*states, None) if len(states) == 1 else states
        found = route.fast(name, sizes, input, None, h, c, weights, self.bias, is_step=True)
        if found is not None:
            h, _, c = found
            return self._unpacked((h,) if c is None else (h, c))
        with without_autocast(input):
            last = route.run(self._call(weights, input, states)).last
        return self._unpacked(tuple(state[0] if dim == 2 else state[0, 0] for state in last))

    def _states(self, hx: Any) -> States:
        if self._states_of_cell == 1:
            if hx is not None and not is_tensor_like(hx):
                reject_type(self._kind, "hx", "a Tensor or None", hx)
            return (hx,)
        found = self._packed_states("hx", hx)
        return (None, None) if found is None else found

    def _call(self, weights: list[Tensor], input: Tensor, states: States) -> Call:
        """Check everything; return the call of a layer with one step."""
        dtype = weights[0].dtype
        if torch._C._is_any_autocast_enabled():
            input, *given = cast(dtype, input, *states)
            states = tuple(given)
        missing = (None,) * (3 - input.dim())
        one = tuple(None if s is None else s[missing] for s in states)
        self._check(weights, input, states)
        batch = input.shape[0] if input.dim() == 2 else 1
        front = input[missing], None, batch, one, weights, self._cell_name()
        return Call(*front, self.bias, False)

    @unrecorded
    def _check(self, weights: list[Tensor], input: Tensor, states: States) -> None:
        size = input.shape[-1] - self._drives_of_cell * self.hidden_size
        if size != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {size} expected {self.input_size}"
            )
        kind, dtype = self._kind_of_cell(), weights[0].dtype
        for k, state in enumerate(states):
            width = (kind.behind if k else 1) * self.hidden_size
            if state is not None and state.shape != (*input.shape[:-1], width):
                expected = (*input.shape[:-1], self.hidden_size)
                raise RuntimeError(
                    f"{self._kind}: hx must have shape {tuple(expected)}, got {tuple(state.shape)}"
                )
        if input.dtype != dtype:
            reject_dtype(self._kind, "input", input, dtype)
        for state in states:
            if state is not None and state.dtype != dtype:
                reject_dtype(self._kind, "hx", state, dtype)
        check_devices(input, weights[0], states)
        of_input = kind.input_gates * self.hidden_size
        shapes = [(of_input, self.input_size), *self._shapes_of_cell().values()]
        names = ["weight_ih", *self._shapes_of_cell()]
        check_weights(self._kind, names, weights, shapes, input)

    def call_of(self, input: Any, hx: Any, lengths: Any, resets: Any) -> Call:
        """Return the call that forward would make, as a layer's; drives are 0."""
        for name, given in (("lengths", lengths), ("resets", resets)):
            if given is not None:
                reject_type(self._kind, name, "None for a cell", given)
        count = self._drives_of_cell
        if count:
            width = count * self.hidden_size
            input = self._with_drives(input, input.new_zeros((*input.shape[:-1], width)))
        return self._call(self._all_weights(), input, self._states(hx))
