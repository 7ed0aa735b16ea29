"""What whole layers share: torch's arguments and words, and the call that they make.

Legend: T steps, B batch, N packed rows, I input_size, H hidden_size, O size of an output
(proj_size, or H), L layers, D directions.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ostinato import route
from ostinato.call import Call, Shape, States, padded
from ostinato.cells import Cell, cell_of
from ostinato.nn._arguments import (
    attribute,
    cast,
    check_devices,
    check_weights,
    named_copy,
    reject_dtype,
    reject_type,
)
from ostinato.nn._cuts import Cuts, first_size, padded_lengths, reset_states, resets_of
from ostinato.nn._neighbours import Neighbour
from ostinato.nn._stand_ins import is_symbolic, is_tensor_like, leaf
from ostinato.tensors import (
    TORCH_OPERATORS,
    batch_of,
    reject_nested,
    unrecorded,
    without_autocast,
)


def check_memory(memory: object) -> None:
    """Refuse another word than forward knows."""
    if memory not in ("keep", "recompute"):
        raise ValueError(f"memory: expected 'keep' or 'recompute', got {memory!r}")


class Sequences(Neighbour):
    """What layers share that run whole sequences: `Layers`, and those of own cells."""

    # Stands in messages; the class name would differ in a parametrized or derived module.
    _kind: ClassVar[str]
    _flat_weights_names: list[str]
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    memory: str = "keep"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give each public class a forward of its own name, which Python puts into messages."""
        super().__init_subclass__(**kwargs)
        if "_kind" in cls.__dict__ and "forward" not in cls.__dict__:
            cls.forward = named_copy(cls.forward, cls.__name__)  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        # Checked where it is set, so that forward can read it at no cost.
        if name == "memory":
            check_memory(value)
        super().__setattr__(name, value)

    def forward(
        self,
        input: Any,
        hx: Any = None,
        # By name, as documented. torch's exporter by TorchScript hands on every default by place.
        lengths: Any = None,
        resets: Any = None,
        reset_to: Any = None,
        return_all_states: bool = False,
    ) -> Any:
        """Run the layers over a batch or a sequence.

        Computes in the dtype of the weights, under torch.autocast too. O is proj_size, or H.

        Args:
            input: (T, B, I), (B, T, I) with batch_first, (T, I) for one sequence, or a
                PackedSequence.
            hx: h_0, (L * D, B, O); of an LSTM (h_0, c_0) as a tuple or a list, where c_0 has H for
                O. Without B for one sequence; None means zeros.
            lengths: (B,), steps of each row, unsorted, from 0 to T: a tensor on any device, a NumPy
                array, or a list of whole numbers. Past its end a row's output is zero; h_n is its
                last state; the reverse direction starts there.
            resets: bool, (T, B) in the layout of `input`: a row begins anew before this step.
            reset_to: shaped as hx, or without B for all rows: the state with which it does; None
                means zeros.
            return_all_states: whether to return the states of every layer and step as well.

        Returns:
            output, (T, B, D * O) in the layout of `input`, and h_n, of an LSTM (h_n, c_n), shaped
            as hx in the order layer 0, layer 0 reverse, layer 1, ... No steps: an empty output and
            the initial states. With return_all_states h of all steps as a third, of an LSTM (h, c):
            (L * D, T, B, O), where c has H for O, or with N for T and B in the order of packed
            input.

        Raises:
            TypeError: an argument of another Python type.
            ValueError: input of another number of dimensions or another dtype than the weights;
                lengths out of range.
            RuntimeError: sizes that do not fit.
        """
        cuts = None
        if (
            lengths is not None
            or resets is not None
            or reset_to is not None
            or return_all_states is not False
        ):
            if is_symbolic(input, hx, lengths, resets, reset_to):
                return leaf(
                    self,
                    input,
                    hx,
                    lengths=lengths,
                    resets=resets,
                    reset_to=reset_to,
                    return_all_states=return_all_states,
                )
            cuts = self._cuts(input, lengths, resets, reset_to, return_all_states)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, cuts)
        if not isinstance(input, Tensor):
            if is_symbolic(input):
                return leaf(self, input, hx)
            if not is_tensor_like(input):
                reject_type(self._kind, "input", "a Tensor or a PackedSequence", input)
        elif input.is_nested:
            reject_nested(f"{self._kind}: input")
        dim = input.dim()
        if dim not in (2, 3):
            self._reject_dim(dim)
        states = self._states(hx)
        if states is None:
            return leaf(self, input, hx)
        for state in states:
            if state is not None and state.dim() != dim:
                self._reject_dims(dim, states)
        if dim == 2:
            # One sequence is a batch of one; batch_first says nothing about it.
            states = tuple(None if state is None else state.unsqueeze(1) for state in states)
            output, last, every = self._run(input.unsqueeze(1), None, None, states, cuts)
            last = tuple(state.squeeze(1) for state in last)
            every = tuple(state.squeeze(2) for state in every)
            return self._result(output.squeeze(1), last, every)
        if self.batch_first:
            output, last, every = self._run(input.transpose(0, 1), None, None, states, cuts)
            return self._result(output.transpose(0, 1), last, every)
        return self._result(*self._run(input, None, None, states, cuts))

    def _cuts(
        self, input: Any, lengths: Any, resets: Any, reset_to: Any, return_all_states: bool
    ) -> Cuts | None:
        """Check what cuts the rows; None where forward is to say first what is wrong with input."""
        kind = self._kind
        if isinstance(return_all_states, Tensor) and torch.onnx.is_in_onnx_export():
            # The exporter by TorchScript makes a tensor of every default.
            return_all_states = bool(return_all_states)
        if not isinstance(return_all_states, bool):
            reject_type(kind, "return_all_states", "a bool", return_all_states)
        if lengths is None and resets is None and reset_to is None and not return_all_states:
            return None
        data = input.data if isinstance(input, PackedSequence) else input
        is_nested = getattr(data, "is_nested", False)
        if not is_tensor_like(data) or is_nested or data.dim() not in (2, 3):
            return None
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(f"{kind}: lengths must be None where input is packed: it has them")
            steps, batch = 0, first_size(input.batch_sizes)
        elif data.dim() == 2:
            steps, batch = data.size(0), 1
        else:
            batch, steps = data.shape[:2] if self.batch_first else (data.size(1), data.size(0))
        lengths = padded_lengths(kind, lengths, steps, batch, data.dim() == 3)
        resets = resets_of(kind, resets, input, tuple(data.shape[:-1]))
        if resets is not None and not isinstance(input, PackedSequence):
            if data.dim() == 2:
                resets = resets.unsqueeze(1)
            elif self.batch_first:
                resets = resets.transpose(0, 1)
        rows = self.num_layers * (2 if self.bidirectional else 1)
        shapes = [(rows, self.proj_size or self.hidden_size)]
        if behind := self._record().behind:
            shapes.append((rows, behind * self.hidden_size))
        states = reset_states(kind, reset_to, resets, batch, tuple(shapes), data)
        return Cuts(lengths, resets, states, return_all_states)

    def _forward_packed(self, input: PackedSequence, hx: Any, cuts: Cuts | None) -> Any:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        states = self._states(hx)
        if states is None or is_symbolic(data):
            return leaf(self, input, hx)
        output, last, every = self._run(data, batch_sizes, sorted_indices, states, cuts)
        if unsorted_indices is not None:
            last = tuple(state.index_select(1, unsorted_indices) for state in last)
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return self._result(packed, last, every)

    def _states(self, hx: Any) -> States | None:
        """Return the states that the caller gave as `hx`; None if torch.fx follows it."""
        if hx is not None and not isinstance(hx, Tensor):
            if is_symbolic(hx):
                return None
            if not is_tensor_like(hx):
                reject_type(self._kind, "hx", "a Tensor or None", hx)
        return (hx,)

    def _result(self, output: Any, last: States, every: States) -> Any:
        return (output, *last, *every[:1]) if every else (output, *last)

    def _run(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        sorted_indices: Tensor | None,
        states: States,
        cuts: Cuts | None = None,
    ) -> tuple[Tensor, States, States]:
        """Check dtypes and sizes, then go the route.

        Input is (T, B, I), or packed (N, I) with `batch_sizes`. `sorted_indices` say which of the
        caller's rows each packed row is. States, each of which may be None, are (L * D, B, O), and
        of an LSTM (L * D, B, H); they and `cuts` are in the caller's order of rows.

        Returns output, (T, B, D * O) or (N, D * O), and the last states in the packed order of
        rows; and the states of all steps, if cuts ask for them.
        """
        weights = self._weights()
        h_0, c_0 = (*states, None) if len(states) == 1 else states
        is_one, is_asked, given = self.num_layers == 1, True, ()
        if cuts is not None:
            is_asked = not cuts.all_states
            given = cuts.lengths, cuts.resets, *padded(cuts.reset_to)
        if sorted_indices is not None:
            # States are still in the caller's order of rows.
            is_asked = is_asked and h_0 is None and (cuts is None or cuts.resets is None)
        if is_asked and (is_one or not (self.dropout and self.training)):
            fast = route.fast if is_one else route.fast_stack
            found = fast(
                self._cell_name(),
                self._shape(),
                input,
                batch_sizes,
                h_0,
                c_0,
                weights,
                self.bias,
                self.memory == "recompute",
                given,
            )
            if found is not None:
                output, h_n, c_n = found
                return output, (h_n,) if c_n is None else (h_n, c_n), ()
        call = self._call(weights, input, batch_sizes, states, cuts)
        if sorted_indices is not None:
            call = call.each_state(lambda state: state.index_select(1, sorted_indices))
        if not torch._C._is_any_autocast_enabled():
            return route.run_stack(call, is_declined=is_asked and is_one)
        with without_autocast(input):
            return route.run_stack(call)

    def _call(
        self,
        weights: list[Tensor],
        input: Tensor,
        batch_sizes: Tensor | None,
        states: States,
        cuts: Cuts | None,
    ) -> Call:
        """Check what a caller gave, in torch's words; return it as a call."""
        reset_to = cuts.reset_to if cuts else ()
        if torch._C._is_any_autocast_enabled():
            dtype = weights[0].dtype
            input, *given = cast(dtype, input, *states)
            states = tuple(given)
            reset_to = tuple(None if state is None else state.to(dtype) for state in reset_to)
        self._check(weights, input, batch_sizes, states)
        resets = cuts.resets if cuts else None
        # An agent's call: one step, and resets. Without cuts the fast path may take it.
        if cuts is not None and not self.bidirectional and cuts.is_start():
            reset_to = reset_to or (None,) * len(states)
            states = tuple(map(cuts.begin, states, reset_to))
            resets, reset_to = None, ()
        return Call(
            input,
            batch_sizes,
            input.shape[1] if batch_sizes is None else batch_of(input, batch_sizes, *states),
            states,
            weights,
            self._cell_name(),
            self.bias,
            self.bidirectional,
            self.memory == "recompute",
            cuts.lengths if cuts else None,
            resets,
            reset_to,
            cuts is not None and cuts.all_states,
            self.num_layers,
            self.dropout if self.training and self.num_layers > 1 else 0.0,
        )

    def _cell_name(self) -> str:
        raise NotImplementedError

    def _record(self) -> Cell:
        return cell_of(self._cell_name())

    def _shape(self) -> Shape:
        directions = 2 if self.bidirectional else 1
        return self.input_size, self.hidden_size, self.proj_size, directions

    def _weights(self) -> list[Tensor]:
        # nn.Module takes 0.6 us to answer an attribute, its dict 0.05.
        plain = self._parameters.get
        return [
            attribute(self, name) if (weight := plain(name)) is None else weight
            for name in self._flat_weights_names
        ]

    @unrecorded
    def _check(
        self, weights: list[Tensor], input: Tensor, batch_sizes: Tensor | None, states: States
    ) -> None:
        dtype = weights[0].dtype
        self._check_input(dtype, input, batch_sizes)
        h_0, *_ = states
        if h_0 is not None:
            self._check_states(dtype, input, batch_sizes, states)
        check_devices(input, weights[0], states)
        self._check_weights(input, weights)

    def _check_input(self, dtype: torch.dtype, input: Tensor, batch_sizes: Tensor | None) -> None:
        if input.dtype != dtype:
            reject_dtype("RNN", "input", input, dtype)
        if batch_sizes is not None and input.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )

    def _check_states(
        self, dtype: torch.dtype, input: Tensor, batch_sizes: Tensor | None, states: States
    ) -> None:
        h_0, *_ = states
        if batch_sizes is None:
            batch = input.size(1)
        elif batch_sizes.numel():
            batch = int(batch_sizes[0])
        else:
            # Without a first step only the states say how many rows there are.
            batch = h_0.size(1) if h_0.dim() > 1 else 0
        rows = self.num_layers * (2 if self.bidirectional else 1)
        for k, state in enumerate(states):
            output = self.proj_size or self.hidden_size
            size = self._record().behind * self.hidden_size if k else output
            if state.shape != (rows, batch, size):
                self._reject_size(k, (rows, batch, size), state)
        for k, state in enumerate(states):
            if state.dtype != dtype:
                reject_dtype("RNN", f"hx[{k}]" if len(states) > 1 else "hx", state, dtype)

    def _check_weights(self, input: Tensor, weights: list[Tensor]) -> None:
        """Check all layers before the first one runs, and against this module's own sizes."""
        rows = self._record().gates * self.hidden_size
        out = self.proj_size or self.hidden_size
        directions = 2 if self.bidirectional else 1
        rest: list[tuple[int, ...]] = [(rows, out)]
        if self.bias:
            rest += [(rows,), (rows,)]
        if self.proj_size:
            rest.append((out, self.hidden_size))
        shapes = [(rows, self.input_size), *rest] * directions
        if self.num_layers > 1:
            shapes += [(rows, directions * out), *rest] * (directions * (self.num_layers - 1))
        check_weights(self._kind, self._flat_weights_names, weights, shapes, input)

    def call_of(self, input: Any, hx: Any, lengths: Any, resets: Any) -> Call:
        """Return the call that forward would make, or refuse what it refuses."""
        cuts = self._cuts(input, lengths, resets, None, False)
        data, batch_sizes = input, None
        if isinstance(input, PackedSequence):
            data, batch_sizes = input.data, input.batch_sizes
        if not isinstance(data, Tensor):
            reject_type(self._kind, "input", "a Tensor or a PackedSequence", input)
        if data.is_nested:
            reject_nested(f"{self._kind}: input")
        states = self._states(hx) or ()
        if batch_sizes is None:
            dim = data.dim()
            if dim not in (2, 3):
                self._reject_dim(dim)
            for state in states:
                if state is not None and state.dim() != dim:
                    self._reject_dims(dim, states)
            if dim == 2:
                data = data.unsqueeze(1)
                states = tuple(None if state is None else state.unsqueeze(1) for state in states)
            elif self.batch_first:
                data = data.transpose(0, 1)
        return self._call(self._weights(), data, batch_sizes, states, cuts)

    def _reject_dim(self, dim: int) -> NoReturn:
        word = self._record().dim_word
        raise ValueError(f"{self._kind}: Expected input to be 2D or 3D, got {dim}D{word} instead")

    def _reject_dims(self, dim: int, states: States) -> NoReturn:
        batched = "unbatched 2-D" if dim == 2 else "batched 3-D"
        got = ", ".join(f"{state.dim()}-D" for state in states)
        what, got = (
            ("hx", f"{got} tensor") if len(states) == 1 else ("hx and cx", f"({got}) tensors")
        )
        raise RuntimeError(f"For {batched} input, {what} should also be {dim}-D but got {got}")

    def _reject_size(self, index: int, expected: tuple[int, int, int], got: Tensor) -> NoReturn:
        raise RuntimeError(f"Expected hidden size {expected}, got {list(got.shape)}")


class Layers(Sequences, torch.nn.RNNBase):
    """What RNN, GRU and LSTM share: torch's shell."""

    if not TYPE_CHECKING:

        def __init__(self, mode, *args, memory="keep", **kwargs):
            check_memory(memory)
            if mode.lower() in TORCH_OPERATORS:
                super().__init__(mode, *args, **kwargs)
            else:
                self._begin(mode, args, kwargs)
            self.memory = memory

    def _begin(self, mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Do what torch's constructor does, for a layer that torch does not have.

        It names the parameters of one that torch has, with one gate; ours, with all gates, replace
        them. The dtype and device are given by name.
        """
        super().__init__("RNN_TANH", *args, **{**kwargs, "device": "meta"})
        self.mode = mode
        made = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        for name, (rows, *rest) in [(n, p.shape) for n, p in self.named_parameters()]:
            size = self._record().gates * rows, *rest
            setattr(self, name, torch.nn.Parameter(torch.empty(size, **made)))
        self._init_flat_weights()
        self.reset_parameters()

    def flatten_parameters(self) -> None:
        """Lay the weights out as one for cuDNN, as torch does, where cuDNN has such a layer."""
        if self.mode.lower() in TORCH_OPERATORS:
            super().flatten_parameters()

    def extra_repr(self) -> str:
        """Say what torch's layers say, and `memory` where it is not the default."""
        return super().extra_repr() + (f", memory={self.memory}" if self.memory != "keep" else "")

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        """The weights of this moment, in the order of `_flat_weights_names`.

        torch keeps a list here and refreshes it in forward. User code reads it, so it exists; as a
        property it can not go stale between two forwards.
        """
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            if weight is not None:
                setattr(self, name, weight)

    def _init_flat_weights(self) -> None:
        # torch's own assigns the list to itself, which would overwrite what a parametrized weight
        # is computed from.
        self._flat_weight_refs = [
            None if weight is None else weakref.ref(weight)  # type: ignore[arg-type]
            for weight in self._flat_weights
        ]
        self.flatten_parameters()

    def _cell_name(self) -> str:
        return self.mode.lower()
