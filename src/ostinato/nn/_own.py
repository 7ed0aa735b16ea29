"""Cell: a step of the user's own, and what a layer of such cells has beside its weights.

Legend: T steps, B batch, N packed rows, I input_size, H hidden_size, L layers, D directions,
P rows of numbers per unit, n drives, S states.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ostinato.call import States
from ostinato.cells import Cell as Record
from ostinato.cells import cell_of, known
from ostinato.nn._arguments import (
    attribute,
    cast,
    reject_type,
)
from ostinato.nn._neighbours import Neighbour
from ostinato.nn._stand_ins import is_tensor_like
from ostinato.own.graph import Graph
from ostinato.own.records import untraced
from ostinato.own.trace import bind, parameter_rows, trace
from ostinato.tensors import reject_nested, unrecorded

_MOST_GATES, _MOST_STATES, _MOST_DRIVES, _MOST_PARAMETERS = 8, 16, 16, 64


class Cell(torch.nn.Module):
    """A step of your own: derive from it, say how many gates there are, and write `step`.

    `step(x, h, state)` is torch code on each unit. x[g] is gate g of W_ih x + b_ih and h[g] gate g
    of W_hh h + b_hh, each (B, H); `state` is the state before, a tuple where there are several. It
    returns the new state, or a tuple of them; the first is the output and what W_hh multiplies.
    docs/cells.md says what a step may do.

    Attributes:
        x_gates: gates that read the input, rows of weight_ih for each unit, 1 to 8.
        h_gates: gates that read the first state, 0 to 8; 0: there is no weight_hh.
        states: how many states a step hands on, 1 to 16.
        drives: numbers for each unit and step that `layer(x, drives=...)` brings, 0 to 16. `step`
            takes them as its last argument, a tuple of (B, H).
        engine: False: the step is not traced, and the reference runs it.

    Parameters of the module, of shape (H,) or (n, H), are numbers per unit: `step` reads them as
    attributes, and they train. All else that a step reads of
    `self` is read when the layer is made.

    Args:
        hidden_size: H.
        device: where parameters are created.
        dtype: of the parameters.

    Example:
        >>> import torch
        >>> from ostinato import nn
        >>> class MinimalGatedUnit(nn.Cell):
        ...     x_gates = h_gates = 2
        ...
        ...     def step(self, x, h, state):
        ...         f = torch.sigmoid(x[0] + h[0])
        ...         n = torch.tanh(x[1] + f * h[1])
        ...         return (1 - f) * state + f * n
        >>> layer = nn.Recurrent(MinimalGatedUnit, 12, 64, num_layers=2, bidirectional=True)
        >>> output, h_n = layer(torch.randn(100, 8, 12), lengths=[100] * 8)
        >>> output.shape, h_n.shape
        (torch.Size([100, 8, 128]), torch.Size([4, 8, 64]))
    """

    x_gates: int = 1
    h_gates: int = 1
    states: int = 1
    drives: int = 0
    engine: bool = True

    def __init__(self, hidden_size: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.hidden_size = hidden_size

    # Not annotated as a method: a step's arguments depend on the class.
    step: Callable[..., Any]

    def forward(self, *arguments: Any) -> Any:
        """Compute one step: what `step` does."""
        return self.step(*arguments)


def _check_cell(cell: Any, kind: str) -> None:
    """Refuse what is no cell, or says no sizes."""
    if not isinstance(cell, Cell):
        reject_type(kind, "cell", "a class derived from ostinato.nn.Cell", cell)
    name = type(cell).__name__
    if not callable(getattr(cell, "step", None)):
        raise TypeError(f"{kind}: {name} must have a method step(self, x, h, state)")
    for word, least, most in (
        ("x_gates", 1, _MOST_GATES),
        ("h_gates", 0, _MOST_GATES),
        ("states", 1, _MOST_STATES),
        ("drives", 0, _MOST_DRIVES),
    ):
        count = getattr(cell, word)
        if not isinstance(count, int) or isinstance(count, bool):
            reject_type(kind, f"{name}.{word}", "a whole number", count)
        if not least <= count <= most:
            raise ValueError(f"{kind}: {name}.{word} must be {least} to {most}, got {count}")


def _name_of(cell: Cell, kind: str, rows: dict[str, int]) -> str:
    """Return the name under which a cell's record is found: the text of its step's graph."""
    name, count = type(cell).__name__, sum(rows.values())
    if not cell.engine:
        empty = Graph(name, cell.x_gates, cell.h_gates, cell.states, count, cell.drives, (), ())
        return untraced(empty, _Untraced(cell, tuple(rows)))
    if count > _MOST_PARAMETERS:
        raise ValueError(f"{kind}: {name} has {count} numbers per unit, at most {_MOST_PARAMETERS}")
    sizes = cell.x_gates, cell.h_gates, cell.states, rows, cell.drives
    return trace(cell.step, name, *sizes).text()


class _Untraced:
    """A cell's step as `Graph.run` is called, on parameters that are given."""

    def __init__(self, cell: Cell, names: tuple[str, ...]) -> None:
        self._cell, self._names = cell, names

    def __call__(
        self,
        x: Any,
        h: Any,
        states: Any,
        parameters: Any,
        drives: Any,
    ) -> tuple[Any, ...]:
        cell = self._cell
        values: dict[str, Any] = {}
        rows = [] if parameters is None else list(parameters)
        for name in self._names:
            shape = getattr(cell, name).shape
            count = math.prod(shape[:-1])
            values[name] = torch.stack(rows[:count]).reshape(shape)
            rows = rows[count:]
        given = [tuple(x), tuple(h), states[0] if cell.states == 1 else tuple(states)]
        if cell.drives:
            given.append(tuple(drives))
        if torch.compiler.is_compiling():
            found = torch.func.functional_call(cell, values, tuple(given))
        else:  # which a trace allows
            found = bind(cell, values).step(*given)
        found = (found,) if cell.states == 1 else tuple(found)
        _check_returned(cell, found, states)
        return found


def _check_returned(cell: Cell, found: tuple[Any, ...], states: Any) -> None:
    name = type(cell).__name__
    if len(found) != cell.states:
        raise RuntimeError(f"{name}.step: expected {cell.states} new states, got {len(found)}")
    for k, (new, old) in enumerate(zip(found, states, strict=True)):
        if not is_tensor_like(new) or new.shape != old.shape:
            got = tuple(new.shape) if is_tensor_like(new) else type(new).__name__
            raise RuntimeError(
                f"{name}.step: expected new state {k} to have shape {tuple(old.shape)}, got {got}"
            )


class WithCells(Neighbour):
    """What a layer and one step of an own cell share: weights, and the cells beside them."""

    _kind: ClassVar[str]
    input_size: int
    hidden_size: int
    bias: bool

    def _make(self, cell: Any, suffixes: Mapping[str, int], device: Any, dtype: Any) -> None:
        """Make the parameters; `suffixes` says how many features each layer and direction reads."""
        hidden, factory = self.hidden_size, {"device": device, "dtype": dtype}
        if not callable(cell):
            reject_type(self._kind, "cell", "a class derived from ostinato.nn.Cell", cell)
        first: Cell | None = None
        for suffix, features in suffixes.items():
            made = cell(hidden, **factory)
            _check_cell(made, self._kind)
            first = made if first is None else first
            setattr(self, f"cell{suffix}", made)
            of_input, of_state = first.x_gates * hidden, first.h_gates * hidden
            shapes: dict[str, tuple[int, ...]] = {"weight_ih": (of_input, features)}
            if of_state:
                shapes["weight_hh"] = (of_state, hidden)
            if self.bias:
                shapes["bias_ih"] = (of_input,)
                if of_state:
                    shapes["bias_hh"] = (of_state,)
            for name, shape in shapes.items():
                weight = torch.nn.Parameter(torch.empty(shape, **factory))
                self.register_parameter(f"{name}{suffix}", weight)
        assert first is not None
        # Known from here on, since forward is to ask the module little.
        self._suffixes = tuple(suffixes)
        self._states_of_cell, self._drives_of_cell = first.states, first.drives
        self._rows_of_cell = parameter_rows(first, hidden)
        self._name_of_cell: str | None = None
        kind = cell_of(self._cell_name())
        # Whether weights are parameters of this module and nothing else.
        self._is_plain = kind.gates > 0 and not kind.parameters
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"][: 4 if self.bias else 2]
        names += ["cell"] * (kind.parameters > 0)
        self._flat_weights_names = [name + suffix for suffix in suffixes for name in names]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases from -1 / sqrt(H) to 1 / sqrt(H); cells keep their own."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for suffix in self._suffixes:
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                weight = self._parameters.get(f"{name}{suffix}")
                if weight is not None:
                    torch.nn.init.uniform_(weight, -bound, bound)

    def flatten_parameters(self) -> None:
        """Do nothing: no library wants these weights as one."""

    def _first(self) -> Cell:
        found: Cell = getattr(self, f"cell{self._suffixes[0]}")
        return found

    def _all_weights(self) -> list[Tensor]:
        """Return the weights of this moment, in the order of the operators."""
        if not self._is_plain:
            return [weight for suffix in self._suffixes for weight in self._weights_of(suffix)]
        plain = self._parameters.get
        return [
            attribute(self, name) if (weight := plain(name)) is None else weight
            for name in self._flat_weights_names
        ]

    def _cell_name(self) -> str:
        name = self._name_of_cell
        if name is None:
            cell = self._first()
            name = self._name_of_cell = _name_of(cell, self._kind, self._rows_of_cell)
            if cell.engine:
                cell_of(name)  # which makes the record
            else:
                weakref.finalize(self, known.pop, name, None)
        return name

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the name of an untraced cell, which is of this process."""
        state = self.__dict__.copy()
        if not self._first().engine:
            state["_name_of_cell"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the cell's record, which another process does not have; a compiler cannot."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        cell_of(self._cell_name())

    def _shapes_of_cell(self) -> dict[str, tuple[int, ...]]:
        kind, hidden = self._kind_of_cell(), self.hidden_size
        of_input, of_state = kind.input_gates * hidden, kind.gates * hidden
        shapes: dict[str, tuple[int, ...]] = {"weight_hh": (of_state, hidden)}
        if self.bias:
            shapes |= {"bias_ih": (of_input,), "bias_hh": (of_state,)}
        if kind.parameters:
            shapes["per_unit"] = (kind.parameters, hidden)
        return shapes

    def _kind_of_cell(self) -> Record:
        return cell_of(self._cell_name())

    def _weights_of(self, suffix: str) -> list[Tensor]:
        """Return the weights of one layer and direction, in the order of the operators."""
        plain = self._parameters.get
        found: list[Tensor] = []
        has_state = self._first().h_gates > 0
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]:
            if has_state or name.endswith("ih"):
                weight = plain(name + suffix)
                found.append(attribute(self, name + suffix) if weight is None else weight)
            else:
                # No gate of the state: a weight without rows.
                shape = (0, self.hidden_size) if name == "weight_hh" else (0,)
                weight_ih, *_ = found
                found.append(weight_ih.new_empty(shape))
        rows = [p.reshape(-1, self.hidden_size) for p in self._cell_parameters(suffix)]
        if rows:
            found.append(rows[0] if len(rows) == 1 else torch.cat(rows))
        return found

    def _cell_parameters(self, suffix: str) -> list[Any]:
        cell = self._modules[f"cell{suffix}"]
        return [getattr(cell, name) for name in self._rows_of_cell]

    def _packed_states(self, name: str, states: Any) -> Any:
        """Return a caller's states as h, or h and all others in one tensor."""
        count = self._states_of_cell
        if count == 1 or states is None:
            return states
        if not isinstance(states, (tuple, list)):
            reject_type(self._kind, name, f"a tuple of {count} Tensors, or None", states)
        if len(states) != count:
            raise RuntimeError(
                f"{self._kind}: expected {name} to hold {count} states, got {len(states)}"
            )
        for k, state in enumerate(states):
            if not is_tensor_like(state):
                reject_type(self._kind, f"{name}[{k}]", "a Tensor", state)
            if state.shape != states[0].shape or state.shape[-1:] != (self.hidden_size,):
                expected = (*states[0].shape[:-1], self.hidden_size)
                raise RuntimeError(
                    f"{self._kind}: {name}[{k}] must have shape {tuple(expected)}, "
                    f"got {tuple(state.shape)}"
                )
        h, *others = states
        return h, others[0] if len(others) == 1 else torch.cat(others, -1)

    def _unpacked(self, states: States) -> Any:
        """Return states as a caller knows them."""
        if len(states) == 1:
            return states[0]
        h, others = states
        return h, *others.chunk(self._states_of_cell - 1, -1)

    def _with_drives(self, input: Any, drives: Any) -> Any:
        """Return input with what drives each step behind it."""
        count, size = self._drives_of_cell, self.hidden_size
        if not count:
            if drives is not None:
                raise ValueError(f"{self._kind}: drives must be None, the cell takes none")
            return input
        if drives is None:
            raise ValueError(
                f"{self._kind}: expected drives of {count} * {size} numbers for each step, got None"
            )
        if isinstance(input, PackedSequence):
            data = self._with_drives(input.data, getattr(drives, "data", drives))
            return PackedSequence(data, *input[1:])
        if not is_tensor_like(input):
            reject_type(self._kind, "input", "a Tensor or a PackedSequence", input)
        if not is_tensor_like(drives):
            reject_type(self._kind, "drives", "a Tensor", drives)
        if input.is_nested:
            reject_nested(f"{self._kind}: input")
        self._check_drives(input, drives, count * size)
        if torch._C._is_any_autocast_enabled():
            weight_ih, *_ = self._all_weights()
            input, drives = cast(weight_ih.dtype, input, drives)
        return torch.cat([input, drives], -1)

    @unrecorded
    def _check_drives(self, input: Tensor, drives: Tensor, width: int) -> None:
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )
        expected = (*input.shape[:-1], width)
        if drives.shape != expected:
            raise RuntimeError(
                f"{self._kind}: drives must have shape {tuple(expected)}, got {tuple(drives.shape)}"
            )
        if drives.dtype != input.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"{self._kind}: drives must have input's dtype, {input.dtype}, got {drives.dtype}"
            )
        if drives.device != input.device:
            raise RuntimeError(f"{self._kind}: drives must be on input's device, {input.device}")
