"""From a step, which is ordinary torch code, to its graph.

The step runs with values that record what it does (`ostinato.own.values`). It runs twice: what does
not come out the same, such as a random number of Python's, is no graph.

Legend: H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ostinato.own.errors import StepError, user_line
from ostinato.own.functions import TorchRecorder
from ostinato.own.graph import LEAVES, Graph, Sizes
from ostinato.own.values import Buffer, Gates, Recorder, Rows, Value

Step = Callable[..., Any]
# What a step raises when it takes a value for what it is not; said again with the line.
_MISTAKES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(NameError, RuntimeError, TypeError, ValueError),
)


def trace(
    step: Step,
    name: str,
    x_gates: int,
    h_gates: int,
    states: int,
    parameters: Mapping[str, int],
    drives: int = 0,
) -> Graph:
    """Record what a step computes.

    Args:
        step: a bound method `step(x, h, state)`, or `step(x, h, state, drives)` where there are
            drives; torch code on each element.
        name: of the user's class.
        x_gates: how many gates have a product with the input: x is a tuple of so many.
        h_gates: how many have one with h; h is a tuple of so many, which may be empty.
        states: how many states there are; `state` is a tuple where they are more than one.
        parameters: rows of numbers per unit by the attribute of the cell that holds them: 1 for
            shape (H,), n for (n, H); in order of registration.
        drives: inputs per unit and step.

    Returns:
        The graph.

    Raises:
        StepError: the step does something that cannot be recorded; the message names it, the line,
            and what there is instead.

    Example:
        >>> def step(x, h, state):
        ...     return torch.tanh(x[0] + h[0])
        >>> trace(step, "Elman", 1, 1, 1, {}).text()
        'own:Elman(x=1,h=1,s=1,p=0,d=0){x0;h0;add 0 1;tanh 2}->3'
    """
    sizes = Sizes(x_gates, h_gates, states, sum(parameters.values()), drives)
    _check_signature(step, name, drives)
    first, second = (_recorded(step, name, sizes, parameters) for _ in range(2))
    if first.text() != second.text():
        raise _at_definition(
            StepError(
                "two runs",
                "the step does not compute the same each time: a random number, or a counter",
                "a drive for what differs from step to step",
            ),
            step,
            name,
        )
    return first


def bind(cell: Any, values: Mapping[str, Any]) -> Any:
    """Return a stand-in for a cell, whose attributes `values` are others; all else is the cell's.

    Methods, properties and `super()` work as they do on the cell. Nothing that is set on one of the
    two is set on the other.

    Args:
        cell: the user's cell.
        values: by attribute.

    Returns:
        An object of the cell's class, or of one derived from it.
    """
    kind = type(cell)
    # A property would be asked before the object itself: so torch's parametrizations are.
    hidden = {name: None for name in values if isinstance(getattr(kind, name, None), property)}
    if hidden:
        kind = type(kind.__name__, (kind,), hidden)
    stand_in = object.__new__(kind)
    stand_in.__dict__.update(cell.__dict__)
    stand_in.__dict__.update(values)
    return stand_in


def parameter_rows(cell: nn.Module, hidden_size: int) -> dict[str, int]:
    """Return how many rows of numbers per unit each parameter of a cell has.

    Args:
        cell: the user's cell.
        hidden_size: H.

    Returns:
        By attribute, 1 for shape (H,) and n for (n, H); what torch.nn.utils.parametrize computes
        comes last.

    Raises:
        StepError: a parameter has another shape, or is a submodule's.
    """
    own = [name for name, _ in cell.named_parameters() if not name.startswith("parametrizations.")]
    # torch says no more of the type than that it is a module.
    computed: Any = cell.parametrizations if parametrize.is_parametrized(cell) else ()
    return {name: _rows_of(cell, name, hidden_size) for name in (*own, *computed)}


def _rows_of(cell: nn.Module, name: str, hidden_size: int) -> int:
    if "." in name:
        reason = "expected a parameter of the cell itself, got one of a submodule"
        raise StepError(f"self.{name}", reason, "self.name = nn.Parameter(...)")
    tensor: torch.Tensor = getattr(cell, name)
    shape = tuple(tensor.shape)
    rows = 1 if len(shape) == 1 else next(iter(shape), 0)
    if shape not in ((hidden_size,), (rows, hidden_size)) or not rows or tensor.is_complex():
        expected = f"expected a real tensor ({hidden_size},) or (n, {hidden_size})"
        raise StepError(f"self.{name}", f"{expected}, got {shape}, {tensor.dtype}")
    return rows


def _recorded(step: Step, name: str, sizes: Sizes, parameters: Mapping[str, int]) -> Graph:
    """Run a step once, with values."""
    recorder = TorchRecorder(name)
    with torch.enable_grad():
        # All leaves first, so that the text does not depend on which is asked for first.
        for letter, count in zip(LEAVES, sizes, strict=True):
            for index in range(count):
                recorder.node(letter, value=index)
        run, stand_in = _bound(step, recorder, parameters)
        before = dict(stand_in.__dict__) if stand_in is not None else {}
        try:
            made = run(*_arguments(recorder, sizes))
        except _MISTAKES as error:
            raise _located(error, step, name) from (None if isinstance(error, StepError) else error)
        try:
            _check_same(stand_in, before)
            outputs = _outputs(recorder, made, states=sizes.states)
        except StepError as error:
            # Whoever is on the stack now is not to blame.
            error.lineno = 0
            raise _at_definition(error, step, name) from None
    return recorder.graph(outputs, sizes)


def _arguments(recorder: Recorder, sizes: Sizes) -> tuple[Any, ...]:
    """Return what a step is given."""

    def leaves(letter: str, label: str, count: int, hint: str) -> Gates:
        values = [recorder.node(letter, value=index) for index in range(count)]
        return Gates.of(recorder, label, hint, values)

    states = leaves("s", "state", sizes.states, f"states = {sizes.states}, said by the class")
    arguments: list[Any] = [
        leaves("x", "x", sizes.x_gates, f"x_gates = {sizes.x_gates}, said by the class"),
        leaves("h", "h", sizes.h_gates, f"h_gates = {sizes.h_gates}, said by the class"),
        states if sizes.states > 1 else states[0],
    ]
    if sizes.drives:
        hint = f"drives = {sizes.drives}, said by the class"
        arguments.append(leaves("d", "drives", sizes.drives, hint))
    return tuple(arguments)


def _bound(step: Step, recorder: Recorder, parameters: Mapping[str, int]) -> tuple[Step, Any]:
    """Return the step with values in place of its cell's parameters, and the stand-in."""
    if not isinstance(step, MethodType):
        return step, None
    cell = step.__self__
    buffers = [*getattr(cell, "_buffers", {})]
    values: dict[str, Any] = {name: Buffer(recorder, name) for name in buffers}
    row = 0
    for name, count in parameters.items():
        rows = tuple(recorder.node("p", value=row + k) for k in range(count))
        row += count
        values[name] = rows[0] if _is_single(cell, name, count) else Rows(recorder, name, rows)
    stand_in = bind(cell, values)
    return step.__func__.__get__(stand_in), stand_in


def _is_single(cell: Any, name: str, count: int) -> bool:
    """Whether a parameter is (H,); one of one row may be (1, H)."""
    tensor = getattr(cell, name, None)
    return count == 1 and not (isinstance(tensor, torch.Tensor) and tensor.dim() == 2)


def _outputs(recorder: Recorder, made: Any, states: int) -> list[int]:
    """Return the places of the new states, as a step returned them."""
    if states == 1:
        if isinstance(made, tuple | list):
            raise StepError(
                "return", f"expected one state, got a {type(made).__name__} of {len(made)}"
            )
        return [_output(recorder, made, "the new state")]
    if not isinstance(made, tuple | list):
        raise StepError("return", f"expected a tuple of {states} states, got {type(made).__name__}")
    if len(made) != states:
        raise StepError("return", f"expected {states} states, got {len(made)}")
    return [_output(recorder, state, f"new state {k}") for k, state in enumerate(made)]


def _output(recorder: Recorder, state: Any, what: str) -> int:
    value = recorder.value(f"return of {what}", state)
    if value.is_mask:
        raise StepError(f"return of {what}", "got a mask", "mask.float(), or torch.where")
    return value.place


def _check_signature(step: Step, name: str, drives: int) -> None:
    words = ("x", "h", "state", "drives")[: 4 if drives else 3]
    try:
        inspect.signature(step).bind(*words)
    except TypeError as error:
        expected = f"expected step(self, {', '.join(words)})"
        raise _at_definition(StepError("arguments", f"{expected}: {error}"), step, name) from None


def _check_same(stand_in: Any, before: dict[str, Any]) -> None:
    after = {} if stand_in is None else stand_in.__dict__
    changed = [
        key for key in {**before, **after} if before.get(key, before) is not after.get(key, after)
    ]
    if changed:
        raise StepError(
            f"self.{changed[0]} =",
            "a step hands on nothing but the states that it returns",
            "one more state",
        )


def _located(error: BaseException, step: Step, name: str) -> StepError:
    """Return a mistake with the line that made it."""
    if isinstance(error, StepError):
        return error if error.lineno else _at_definition(error, step, name)
    traceback = error.__traceback__
    filename, lineno = user_line(traceback.tb_next if traceback else None)
    made = StepError(type(error).__name__, str(error))
    return made.at(name, filename, lineno) if lineno else _at_definition(made, step, name)


def _at_definition(error: StepError, step: Step, name: str) -> StepError:
    """Locate an error of a step as a whole at its first line."""
    code = getattr(inspect.unwrap(step), "__code__", None)
    if code is None:
        return error
    return error.at(name, code.co_filename, code.co_firstlineno)


__all__ = ["StepError", "Value", "bind", "trace"]
