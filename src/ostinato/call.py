"""A call: what one layer, or a stack of layers, is given, by name (`ostinato.arrays`).

A cell's call is that of a layer with one step. Arrays are torch's or NumPy's.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step (proj_size, or H),
D directions, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ostinato import arrays
from ostinato.arrays import STATES, Array
from ostinato.cells import Cell, cell_of, find
from ostinato.reference import namespace

# One for each state of a cell, h first: an array, or None.
States = tuple[Any, ...]
# input_size, hidden_size, proj_size, directions
Shape = tuple[int, int, int, int]


class Results(NamedTuple):
    """What a layer returns, or one entry for each: a gradient, or how it moves."""

    output: Any
    last: States  # h_n, and c_n of an LSTM
    every: States = ()  # c after every step of an LSTM, if asked for

    @classmethod
    def of(cls, values: Iterable[Any], states: int) -> Results:
        """Name values: of the output, of the last of so many states, of all steps' if there."""
        output, *rest = values
        return cls(output, tuple(rest[:states]), tuple(rest[states:]))

    def flat(self) -> list[Any]:
        """Return all in one list."""
        return [self.output, *self.last, *self.every]

    def padded(self) -> list[Any]:
        """Return all as the operators list them: None for states that the cell does not have."""
        return [self.output, *padded(self.last), *padded(self.every, first=1)]


class Parts(NamedTuple):
    """What of a call can have a gradient, or one entry for each of these."""

    input: Any
    initial: States
    reset_to: States
    weights: list[Any]

    def flat(self) -> list[Any]:
        """Return all in one list: the order of `Call.tensors`."""
        return [self.input, *self.initial, *self.reset_to, *self.weights]

    def padded(self, absent: Any = None) -> list[Any]:
        """Return all as the operators list them: an entry for each state that any cell has."""
        states = *padded(self.initial, absent=absent), *padded(self.reset_to, absent=absent)
        return [self.input, *states, *self.weights]


class Call(NamedTuple):
    """The arguments of a layer."""

    input: Any  # (T, B, I), or packed (N, I) with batch_sizes
    batch_sizes: Any  # active rows at each step, (T,), int64 on the CPU, or None
    batch: int
    initial: States  # (L * D, B, O), and (L * D, B, H) of an LSTM; None for zeros
    weights: list[Any]  # per layer and direction weight_ih, weight_hh[, biases][, weight_hr]
    cell: str
    has_biases: bool
    bidirectional: bool
    recompute: bool = False  # whether backward computes the gates again
    lengths: Any = None  # steps of each row of a padded batch, (B,), int64 on the CPU
    resets: Any = None  # where a row begins anew, (T, B) or (N,), bool
    reset_to: States = ()  # shaped as initial: from what it does; none means zeros
    all_states: bool = False  # whether states after every step are to be returned
    layers: int = 1
    dropout: float = 0.0  # share of a layer's output that the next one does not see
    stack: int = 1  # how many layers the stack has that this layer is one of

    @classmethod
    def of(cls, *parameters: Any, **options: Any) -> Call:
        """Return the call of an operator's arguments, in the order of `arrays.PARAMETERS`.

        There is a tensor or None for each of the most states that a cell has; `options` are fields
        that operators do not know.

        Example:
            >>> Call.of("x", None, 2, "h", None, ["w"], "gru", True, False).initial
            ('h',)
        """
        most = len(STATES)
        input, batch_sizes, batch, *rest = parameters
        initial, (weights, cell, has_biases, bidirectional, *more) = rest[:most], rest[most:]
        filled: list[Any] = [*more, *_LEFT_OUT[len(more) :]]
        recompute, lengths, resets, *reset_to = filled
        kind = find(cell)
        count = 1 if kind is None else len(kind.states)
        # One too many is left for the check to refuse.
        for k in range(count, most):
            if initial[k] is not None or reset_to[k] is not None:
                count = k + 1
        front = input, batch_sizes, batch, tuple(initial[:count]), weights
        masks = recompute, lengths, resets, tuple(reset_to[:count])
        return cls(*front, cell, has_biases, bidirectional, *masks, **options)

    def parameters(self) -> list[Any]:
        """Return the arguments of an operator, in the order of `arrays.PARAMETERS`."""
        front = self.input, self.batch_sizes, self.batch, *padded(self.initial), self.weights
        options = self.cell, self.has_biases, self.bidirectional, self.recompute
        return [*front, *options, self.lengths, self.resets, *padded(self.reset_to)]

    def named_parameters(self) -> dict[str, Any]:
        """Return `parameters` by name."""
        return dict(zip(_PARAMETERS, self.parameters(), strict=True))

    def of_parameters(self, values: Sequence[Any]) -> Parts:
        """Name values that stand for `parameters`, one for each."""
        named, count = dict(zip(_PARAMETERS, values, strict=True)), len(self.initial)
        states = {k: tuple(named[p] for p in places[:count]) for k, places in _STATES.items()}
        return Parts(input=named["input"], weights=list(named["weights"] or ()), **states)

    def as_parameters(self, grads: Sequence[Any]) -> list[Any]:
        """Return gradients of `tensors` as those of `parameters`, None for what has none."""
        filled = self.with_tensors(grads).parameters()
        pairs = zip(arrays.PARAMETERS, filled, strict=True)
        return [value if parameter.is_differentiable else None for parameter, value in pairs]

    @property
    def kind(self) -> Cell:
        """What cell this is."""
        return cell_of(self.cell)

    @property
    def is_cut(self) -> bool:
        """Whether rows end early or begin anew."""
        return self.lengths is not None or self.resets is not None

    def tensors(self) -> list[Any]:
        """Return what can have a gradient: input, initial states, states of resets, weights."""
        reset_to = self.reset_to or (None,) * len(self.initial)
        return [self.input, *self.initial, *reset_to, *self.weights]

    def arrays(self) -> list[Any]:
        """Return all arrays: masks, then `tensors`."""
        return [self.batch_sizes, self.lengths, self.resets, *self.tensors()]

    def table(self) -> tuple[Array, ...]:
        """Say what each of `arrays` is."""
        return arrays.arguments(len(self.initial), len(self.weights))

    def results(self) -> Results:
        """Say what each result is."""
        count = len(self.kind.states)
        every = arrays.EVERY[: count - 1] if self.all_states else ()
        return Results(arrays.OUTPUT, arrays.LAST[:count], every)

    def returned(self, values: Sequence[Any]) -> Results:
        """Name what the operator `ostinato::layer` returned, or its gradients."""
        count = len(self.initial)
        output, *states = values
        every = states[len(arrays.LAST) :][: count - 1] if self.all_states else ()
        return Results(output, tuple(states[:count]), tuple(every))

    def parts(self, values: Sequence[Any]) -> Parts:
        """Name values that stand for `tensors`, one for each."""
        count = len(self.initial)
        input, *rest = values
        initial, reset_to = tuple(rest[:count]), tuple(rest[count : 2 * count])
        return Parts(input, initial, reset_to, list(rest[2 * count :]))

    def padded_parts(self, values: Sequence[Any]) -> Parts:
        """Name values that the operators list, one for each of `Parts.padded`."""
        count, most = len(self.initial), len(STATES)
        input, *rest = values
        initial, reset_to = tuple(rest[:most]), tuple(rest[most : 2 * most])
        return Parts(input, initial[:count], reset_to[:count], list(rest[2 * most :]))

    def with_tensors(self, values: Sequence[Any]) -> Call:
        """Return the call on other `tensors`."""
        return self._replace(**self.parts(values)._asdict())

    def with_arrays(self, values: Sequence[Any]) -> Call:
        """Return the call on other `arrays`."""
        batch_sizes, lengths, resets, *tensors = values
        masks = {"batch_sizes": batch_sizes, "lengths": lengths, "resets": resets}
        return self._replace(**masks, **self.parts(tensors)._asdict())

    def bare(self) -> Call:
        """Return the call without arrays: what a rule has to know beside these."""
        return self.with_arrays([None] * len(self.arrays()))

    def each_state(self, change: Callable[[Any], Any]) -> Call:
        """Return the call with every state changed that is there."""
        initial, reset_to = (
            tuple(None if state is None else change(state) for state in states)
            for states in (self.initial, self.reset_to)
        )
        return self._replace(initial=initial, reset_to=reset_to)

    def of_layer(self, k: int, input: Any) -> Call:
        """Return the call of layer `k` of a stack, on what the layer before it returned.

        What drives the steps of an own cell drives those of each layer.
        """
        if self.layers == 1:
            return self
        count, rows = len(self.weights) // self.layers, 2 if self.bidirectional else 1

        drives = self.kind.drives
        if k and drives:
            _, weight_hh, *_ = self.weights
            behind = self.input[..., self.input.shape[-1] - drives * weight_hh.shape[1] :]
            input = namespace(input).concatenate([input, behind], -1)

        def own(states: States) -> States:
            return tuple(None if s is None else s[k * rows : (k + 1) * rows] for s in states)

        return self._replace(
            input=input,
            initial=own(self.initial),
            reset_to=own(self.reset_to),
            weights=self.weights[k * count : (k + 1) * count],
            layers=1,
            dropout=0.0,
            stack=self.layers,
        )


# By name: where the operators' arguments go.
_LEFT_OUT = [False, None, None, *[None] * len(STATES)]
_PARAMETERS = [each.name for each in arrays.PARAMETERS]
_STATES = {
    "initial": [array.name for array in arrays.INITIAL],
    "reset_to": [array.name for array in arrays.RESET_TO],
}


def padded(states: Sequence[Any], first: int = 0, absent: Any = None) -> list[Any]:
    """Return one entry for each state that any cell has, from the state `first` on."""
    return [*states, *[absent] * (len(STATES) - first - len(states))]
