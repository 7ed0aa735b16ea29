"""What RNN, GRU and LSTM share: every check, and the way through layers and directions.

Legend: T steps, B batch, N packed rows, I input_size, H hidden_size, O size of an output
(proj_size, or H), L layers, D directions.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ostinato import call, fallback, ops, short
from ostinato.call import without_autocast
from ostinato.cells import CELLS, Cell
from ostinato.nn._arguments import (
    States,
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
from ostinato.traced import is_recorded, unrecorded

# Output, h_n, c_n and, if asked for, h and c at every step.
_Run = tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, ...]]


def _per_layer(state: Tensor | None, layers: int) -> Sequence[Tensor | None]:
    """Cut a state into those of the layers."""
    # Slicing costs microseconds that a single layer need not pay.
    return (state,) * layers if state is None or layers == 1 else state.chunk(layers)


def _check_memory(memory: object) -> None:
    if memory not in ("keep", "recompute"):
        raise ValueError(f"memory: expected 'keep' or 'recompute', got {memory!r}")


class Layers(Neighbour, torch.nn.RNNBase):
    """What RNN, GRU and LSTM share: every check, and the way through layers and directions."""

    # Stands in messages; the class name would differ in a parametrized or derived module.
    _kind: ClassVar[str]
    _gates: ClassVar[int]
    memory: str = "keep"

    if not TYPE_CHECKING:

        def __init__(self, *args, memory="keep", **kwargs):
            _check_memory(memory)
            super().__init__(*args, **kwargs)
            self.memory = memory

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give each public class a forward of its own name, which Python puts into messages."""
        super().__init_subclass__(**kwargs)
        if "_kind" in cls.__dict__ and "forward" not in cls.__dict__:
            cls.forward = named_copy(cls.forward, cls.__name__)  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        # Checked where it is set, so that forward can read it at no cost.
        if name == "memory":
            _check_memory(value)
        super().__setattr__(name, value)

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
        """Check the arguments in torch's order, bring them to (T, B, I), and run the layers."""
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
            call.reject_nested(f"{self._kind}: input")
        dim = input.dim()
        if dim not in (2, 3):
            self._reject_dim(dim)
        states = self._states(hx)
        if states is None:
            return leaf(self, input, hx)
        h_0, c_0 = states
        if (h_0 is not None and h_0.dim() != dim) or (c_0 is not None and c_0.dim() != dim):
            self._reject_dims(dim, h_0, c_0)
        if dim == 2:
            # One sequence is a batch of one; batch_first says nothing about it.
            h_0 = None if h_0 is None else h_0.unsqueeze(1)
            c_0 = None if c_0 is None else c_0.unsqueeze(1)
            output, h_n, c_n, all_states = self._run(input.unsqueeze(1), None, None, h_0, c_0, cuts)
            c_n = None if c_n is None else c_n.squeeze(1)
            all_states = tuple(state.squeeze(2) for state in all_states)
            return self._result(output.squeeze(1), h_n.squeeze(1), c_n, all_states)
        if self.batch_first:
            found = self._run(input.transpose(0, 1), None, None, h_0, c_0, cuts)
            return self._result(found[0].transpose(0, 1), *found[1:])
        return self._result(*self._run(input, None, None, h_0, c_0, cuts))

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
        if self._cell().has_c:
            shapes.append((rows, self.hidden_size))
        states = reset_states(kind, reset_to, resets, batch, tuple(shapes), data)
        return Cuts(lengths, resets, *states, return_all_states)

    def _forward_packed(self, input: PackedSequence, hx: Any, cuts: Cuts | None) -> Any:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        states = self._states(hx)
        if states is None or is_symbolic(data):
            return leaf(self, input, hx)
        h_0, c_0 = states
        output, h_n, c_n, all_states = self._run(data, batch_sizes, sorted_indices, h_0, c_0, cuts)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
            c_n = None if c_n is None else c_n.index_select(1, unsorted_indices)
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return self._result(packed, h_n, c_n, all_states)

    def _states(self, hx: Any) -> States | None:
        """Return (h_0, c_0) of what the caller gave as `hx`; None if torch.fx follows it."""
        if hx is not None and not isinstance(hx, Tensor):
            if is_symbolic(hx):
                return None
            if not is_tensor_like(hx):
                reject_type(self._kind, "hx", "a Tensor or None", hx)
        return hx, None

    def _result(
        self, output: Any, h_n: Tensor, c_n: Tensor | None, states: tuple[Tensor, ...]
    ) -> Any:
        return (output, h_n, states[0]) if states else (output, h_n)

    def _run(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        sorted_indices: Tensor | None,
        h_0: Tensor | None,
        c_0: Tensor | None,
        cuts: Cuts | None = None,
    ) -> _Run:
        """Check dtypes and sizes, then walk through the layers.

        Args:
            input: (T, B, I), or packed (N, I) with `batch_sizes`.
            batch_sizes: rows active at each step, or None.
            sorted_indices: which of the caller's rows each packed row is, or None.
            h_0: (L * D, B, O) in the caller's order of rows, or None.
            c_0: (L * D, B, H) likewise, or None.
            cuts: where rows end early or begin anew, likewise, or None.

        Returns:
            output (T, B, D * O) or (N, D * O), h_n and c_n in the packed order of rows; and the
            states of all steps, if cuts ask for them.
        """
        weights = self._weights()
        if cuts is None and self.num_layers == 1 and (sorted_indices is None or h_0 is None):
            found = short.run(
                self.mode.lower(),
                self._shape(),
                input,
                batch_sizes,
                h_0,
                c_0,
                tuple(weights),
                self.bias,
                self.memory == "recompute",
            )
            if found is not None:
                return *found, ()
        autocast = torch._C._is_any_autocast_enabled()
        if autocast:
            input, h_0, c_0 = cast(weights[0].dtype, input, h_0, c_0)
        self._check(weights, input, batch_sizes, h_0, c_0)
        if sorted_indices is not None and h_0 is not None:
            h_0 = h_0.index_select(1, sorted_indices)
            c_0 = None if c_0 is None else c_0.index_select(1, sorted_indices)
        if cuts is not None and sorted_indices is not None:
            cuts = cuts.each_state(lambda state: state.index_select(1, sorted_indices))
        if cuts is not None and autocast:
            cuts = cuts.each_state(lambda state: state.to(weights[0].dtype))
        # An agent's call: one step, and resets. A layer without cuts takes the short way.
        if cuts is not None and not self.bidirectional and cuts.is_start():
            h_0, c_0 = cuts.begin(h_0, cuts.reset_h), cuts.begin(c_0, cuts.reset_c)
            cuts = None
        if not autocast:
            return self._walk(input, batch_sizes, h_0, c_0, weights, cuts)
        with without_autocast(input):
            return self._walk(input, batch_sizes, h_0, c_0, weights, cuts)

    def _cell(self) -> Cell:
        return CELLS[self.mode.lower()]

    def _shape(self) -> call.Shape:
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
        self,
        weights: list[Tensor],
        input: Tensor,
        batch_sizes: Tensor | None,
        h_0: Tensor | None,
        c_0: Tensor | None,
    ) -> None:
        dtype = weights[0].dtype
        self._check_input(dtype, input, batch_sizes)
        if h_0 is not None:
            self._check_states(dtype, input, batch_sizes, h_0, c_0)
        check_devices(input, weights[0], h_0, c_0)
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
        self,
        dtype: torch.dtype,
        input: Tensor,
        batch_sizes: Tensor | None,
        h_0: Tensor,
        c_0: Tensor | None,
    ) -> None:
        if batch_sizes is None:
            batch = input.size(1)
        elif batch_sizes.numel():
            batch = int(batch_sizes[0])
        else:
            # Without a first step only the states say how many rows there are.
            batch = h_0.size(1) if h_0.dim() > 1 else 0
        rows = self.num_layers * (2 if self.bidirectional else 1)
        expected = (rows, batch, self.proj_size or self.hidden_size)
        if h_0.shape != expected:
            self._reject_size(0, expected, h_0)
        expected = (rows, batch, self.hidden_size)
        if c_0 is not None and c_0.shape != expected:
            self._reject_size(1, expected, c_0)
        if h_0.dtype != dtype:
            reject_dtype("RNN", "hx" if c_0 is None else "hx[0]", h_0, dtype)
        if c_0 is not None and c_0.dtype != dtype:
            reject_dtype("RNN", "hx[1]", c_0, dtype)

    def _check_weights(self, input: Tensor, weights: list[Tensor]) -> None:
        """Check all layers before the first one runs, and against this module's own sizes."""
        rows, out = self._gates * self.hidden_size, self.proj_size or self.hidden_size
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

    def explained(
        self, input: Any, lengths: Any, resets: Any
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Refuse what forward refuses, and run nothing: for `ostinato.cuda.explain`.

        Args:
            input: of forward.
            lengths: likewise.
            resets: likewise.

        Returns:
            What the first layer gets: input, (T, B, I) or (N, I); batch_sizes, or None; and the
            weights of all layers.
        """
        self._cuts(input, lengths, resets, None, False)
        data, batch_sizes = input, None
        if isinstance(input, PackedSequence):
            data, batch_sizes = input.data, input.batch_sizes
        if not isinstance(data, Tensor):
            reject_type(self._kind, "input", "a Tensor or a PackedSequence", input)
        if data.is_nested:
            call.reject_nested(f"{self._kind}: input")
        if batch_sizes is None:
            if data.dim() not in (2, 3):
                self._reject_dim(data.dim())
            if data.dim() == 2:
                data = data.unsqueeze(1)
            elif self.batch_first:
                data = data.transpose(0, 1)
        weights = self._weights()
        if torch._C._is_any_autocast_enabled():
            data, _, _ = cast(weights[0].dtype, data, None, None)
        self._check(weights, data, batch_sizes, None, None)
        return data, batch_sizes, weights

    def _reject_dim(self, dim: int) -> NoReturn:
        word = self._cell().dim_word
        raise ValueError(f"{self._kind}: Expected input to be 2D or 3D, got {dim}D{word} instead")

    def _reject_dims(self, dim: int, h_0: Tensor | None, c_0: Tensor | None) -> NoReturn:
        assert h_0 is not None
        batched = "unbatched 2-D" if dim == 2 else "batched 3-D"
        raise RuntimeError(
            f"For {batched} input, hx should also be {dim}-D but got {h_0.dim()}-D tensor"
        )

    def _reject_size(self, index: int, expected: tuple[int, int, int], got: Tensor) -> NoReturn:
        raise RuntimeError(f"Expected hidden size {expected}, got {list(got.shape)}")

    def _walk(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: list[Tensor],
        cuts: Cuts | None,
    ) -> _Run:
        """Run the layers one after the other, with dropout between them."""
        layers = self.num_layers
        is_stack = layers > 1 and cuts is None and self.memory == "keep"
        # A trace gets a node for each layer, which decides as it runs.
        if is_stack and input.device.type == "cuda" and not is_recorded():
            found = fallback.stack(
                self.mode.lower(),
                input,
                batch_sizes,
                h_0,
                c_0,
                weights,
                layers=layers,
                has_biases=self.bias,
                bidirectional=self.bidirectional,
                dropout=self.dropout if self.training else 0.0,
            )
            if found is not None:
                return *found, ()
        width = len(weights) // layers
        h_in, c_in = _per_layer(h_0, layers), _per_layer(c_0, layers)
        h_out: list[Tensor] = []
        c_out: list[Tensor] = []
        h_all: list[Tensor] = []
        c_all: list[Tensor] = []
        for k in range(layers):
            if k and self.dropout and self.training:
                input = torch.dropout(input, self.dropout, True)
            arguments = input, batch_sizes, h_in[k], c_in[k], weights[k * width : (k + 1) * width]
            options: dict[str, Any] = {
                "has_biases": self.bias,
                "bidirectional": self.bidirectional,
                "recompute": self.memory == "recompute",
            }
            if cuts is None:
                input, h_n, c_n = ops.layer(self.mode.lower(), *arguments, **options)
            else:
                input, h_n, c_n, cells = ops.cut_layer(
                    self.mode.lower(),
                    *arguments,
                    **options,
                    lengths=cuts.lengths,
                    resets=cuts.resets,
                    reset_h=_per_layer(cuts.reset_h, layers)[k],
                    reset_c=_per_layer(cuts.reset_c, layers)[k],
                    all_c=cuts.all_states,
                )
                if cuts.all_states:
                    h_all.append(self._directions_first(input))
                    if cells is not None:
                        c_all.append(self._directions_first(cells))
            h_out.append(h_n)
            if c_n is not None:
                c_out.append(c_n)
        states = tuple(torch.cat(found) for found in (h_all, c_all) if found)
        if layers == 1:
            return input, h_n, c_n, states
        return input, torch.cat(h_out), torch.cat(c_out) if c_out else None, states

    def _directions_first(self, output: Tensor) -> Tensor:
        """Bring (T, B, D * O) to (D, T, B, O), or (N, D * O) to (D, N, O)."""
        if not self.bidirectional:
            return output.unsqueeze(0)
        return torch.stack(output.chunk(2, -1))
