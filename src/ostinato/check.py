"""The check of a call, for torch and for NumPy: is it well formed.

It asks structure alone: how many arrays, of which shapes, all of one kind with the input. What a
module says of its own arguments, in torch's words, `ostinato.nn` says before; what an array is
made of, `ostinato.tensors` and `ostinato.numpy` do. The fast path asks the same in C++
(csrc/tensors.cpp), and tests hold its answers to this one's.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step (proj_size, or H),
D directions, G gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NoReturn

from ostinato import arrays
from ostinato.call import Call, Results, Shape
from ostinato.cells import CELLS, find
from ostinato.sizes import Sizes

# Of an array: dtype, and of a tensor device and layout too. All arrays share them with the input.
Shared = Callable[[Any], Sequence[Any]]
_SHARED = "dtype", "device", "layout"


def shape_of(call: Call) -> Shape | None:
    """Return the sizes that the weights say, or None if they make no sense."""
    directions = 2 if call.bidirectional else 1
    weights, kind = call.weights, find(call.cell)
    count = len(weights) // directions
    if kind is None or count < 2 or not call.input.ndim or not weights[0].ndim:
        return None
    projection = 0
    if kind.projects and count == (5 if call.has_biases else 3):
        if not weights[count - 1].ndim:
            return None
        projection = weights[count - 1].shape[0]
    if kind.is_own:
        _, weight_hh, *_ = weights
        hidden = weight_hh.shape[1] if weight_hh.ndim == 2 else 0
        return call.input.shape[-1] - kind.drives * hidden, hidden, 0, directions
    return call.input.shape[-1], weights[0].shape[0] // kind.gates, projection, directions


def check(call: Call, shared: Shared, names: Sequence[str] = ()) -> Sizes:
    """Check number and shapes of all arrays, but no values of masks; return the sizes.

    What `shared` returns is to be the same for all arrays and the input. `names` are the weights'
    where these are not one layer's. Of a stack the sizes are the first layer's.

    Raises:
        ValueError: an unknown cell, or another dtype than the input's.
        RuntimeError: another shape, number of arrays, device or layout.
    """
    kind = find(call.cell)
    if kind is None:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {call.cell!r}")
    input, batch_sizes = call.input, call.batch_sizes
    if input.ndim != (3 if batch_sizes is None else 2):
        expected = "3D" if batch_sizes is None else "2D (packed)"
        raise RuntimeError(f"input: expected {expected}, got {input.ndim}D")
    if batch_sizes is None and call.batch != input.shape[1]:
        raise RuntimeError(
            f"batch: expected {input.shape[1]}, the batch of input, got {call.batch}"
        )
    steps = input.shape[0] if batch_sizes is None else len(batch_sizes)
    rows = steps * call.batch if batch_sizes is None else input.shape[0]
    hidden, projection = _hidden(call, names)
    directions = 2 if call.bidirectional else 1
    own = input.shape[-1] - kind.drives * hidden
    sizes = Sizes(steps, rows, call.batch, own, hidden, projection, directions)
    if own < 0:
        raise RuntimeError(
            f"input: expected at least {kind.drives} * {hidden} numbers in a row, which drive the "
            f"steps, got {input.shape[-1]}"
        )
    like = shared(input)
    for name, weight, shape in _weights(call, sizes, names):
        require(name, weight, shape, like, shared)
    _check_states(call, sizes, like, shared)
    return sizes


def _hidden(call: Call, names: Sequence[str]) -> tuple[int, int]:
    """Return H and proj_size, or 0, as the weights say them."""
    kind = call.kind
    ways = call.layers * (2 if call.bidirectional else 1)
    count, rest = divmod(len(call.weights), ways)
    plain = (4 if call.has_biases else 2) + (kind.parameters > 0)
    is_projected = kind.projects and count == plain + 1
    if rest or not (count == plain or is_projected):
        extra = f" or {plain + 1}" if kind.projects else ""
        raise RuntimeError(
            f"weights: expected {plain}{extra} per direction for {call.cell}, "
            f"got {len(call.weights)} in all for {ways}"
        )
    (_, weight_hh, *_), (_, name, *_) = call.weights, names or ("weight_ih", "weight_hh")
    if weight_hh.ndim != 2:
        raise RuntimeError(f"{name}: expected 2D, got {weight_hh.ndim}D")
    rows, output = weight_hh.shape
    hidden = output if kind.is_own else rows // kind.gates
    if rows != kind.gates * hidden or (not is_projected and output != hidden):
        columns = "proj_size" if is_projected else "hidden_size"
        raise RuntimeError(
            f"{name}: expected shape ({kind.gates} * hidden_size, {columns}), "
            f"got {tuple(weight_hh.shape)}"
        )
    return hidden, output if is_projected else 0


def _weights(
    call: Call, sizes: Sizes, names: Sequence[str]
) -> Iterator[tuple[str, Any, tuple[int, ...]]]:
    """Yield name and expected shape with each weight."""
    kind, output = call.kind, sizes.output
    of_input, of_state = kind.input_gates * sizes.hidden, kind.gates * sizes.hidden
    layout: list[tuple[str, tuple[int, ...]]] = [
        ("weight_ih", (of_input, sizes.input)),
        ("weight_hh", (of_state, output)),
    ]
    if call.has_biases:
        layout += [("bias_ih", (of_input,)), ("bias_hh", (of_state,))]
    if sizes.projection:
        layout.append(("weight_hr", (output, sizes.hidden)))
    if kind.parameters:
        layout.append(("per_unit", (kind.parameters, sizes.hidden)))
    count = len(layout)
    for index, weight in enumerate(call.weights):
        name, shape = layout[index % count]
        way = index // count
        if index % count == 0 and way >= sizes.directions:
            shape = of_input, sizes.directions * output  # a later layer reads outputs
        if names:
            name = names[index]
        elif way % sizes.directions:
            name += "_reverse"
        yield name, weight, shape


def _check_states(call: Call, sizes: Sizes, like: Sequence[Any], shared: Shared) -> None:
    """Check the initial states, and the masks and states of rows that are cut."""
    count, widths = len(call.kind.states), sizes.widths(call.kind)
    if call.lengths is not None and call.batch_sizes is not None:
        raise RuntimeError("lengths: expected None for packed input, which has its own")
    for table, states in ((arrays.INITIAL, call.initial), (arrays.RESET_TO, call.reset_to)):
        for k, state in enumerate(states):
            if state is None:
                continue
            name = table[k].name
            if k >= count:
                raise RuntimeError(f"{name}: expected None for {call.cell}")
            if table is arrays.RESET_TO and call.resets is None:
                raise RuntimeError(f"{name}: expected None without resets")
            shape = call.layers * sizes.directions, sizes.batch, widths[table[k].width]
            require(name, state, shape, like, shared)


def check_backward(call: Call, sizes: Sizes, arrived: Results, output: Any, shared: Shared) -> None:
    """Check what backward takes beyond forward's arguments, but for what is kept."""
    shapes, like = shapes_of(call, sizes), shared(call.input)
    for array, tensor in (
        (arrays.OUTPUT, output),
        *zip(gradients(call), arrived.flat(), strict=False),
    ):
        if tensor is not None:
            expected = shapes[array.name.removeprefix("grad_")]
            require(array.name, tensor, expected, like, shared)


def gradients(call: Call) -> tuple[arrays.Array, ...]:
    """List the gradients of a call's results."""
    return arrays.arrived(len(call.kind.states))


def shapes_of(call: Call, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the shape of each result of a call, and of each state, by its name in the table."""
    rows = {"N": tuple(call.input.shape[:-1]), "D*B": (sizes.directions, sizes.batch)}
    widths = sizes.widths(call.kind)
    return {array.name: (*rows[array.rows], widths[array.width]) for array in _SHAPED}


_SHAPED = (*arrays.INITIAL, *arrays.RESET_TO, arrays.OUTPUT, *arrays.LAST, *arrays.EVERY)


def require(
    name: str, array: Any, shape: Sequence[int], like: Sequence[Any], shared: Shared
) -> None:
    """Refuse an array of another shape, or that does not share `like` with the input."""
    if array.shape != shape:
        raise RuntimeError(f"{name}: expected shape {tuple(shape)}, got {tuple(array.shape)}")
    given = shared(array)
    if given != like:
        _refuse(name, like, given)


def _refuse(name: str, expected: Sequence[Any], given: Sequence[Any]) -> NoReturn:
    """Raise for the first trait that differs."""
    word, asked, got = next(
        each for each in zip(_SHARED, expected, given, strict=False) if each[1] != each[2]
    )
    error = ValueError if word == "dtype" else RuntimeError
    raise error(f"{name}: expected the {word} of input, {asked}, got {got}")


def check_batch_sizes(sizes: list[int], batch: int, rows: int) -> None:
    """Refuse sizes that would make the engine leave its arrays.

    Raises ValueError where the rows active at each step rise, exceed `batch`, fall below 0, or do
    not add up to `rows`, which is N.
    """
    if any(a < b for a, b in pairwise([batch, *sizes, 0])):
        raise ValueError(
            f"batch_sizes: expected sizes that fall from at most {batch} to at least 0, got {sizes}"
        )
    if sum(sizes) != rows:
        raise ValueError(
            f"batch_sizes: expected a sum of {rows}, the rows of input, got {sum(sizes)}"
        )


def check_lengths(lengths: Any, steps: int, what: str = "lengths: expected") -> None:
    """Refuse lengths that no row of so many steps can have; `what` begins the message."""
    wrong = [n for n in lengths.tolist() if not 0 <= n <= steps]
    if wrong:
        raise ValueError(f"{what} numbers from 0 to {steps}, the steps, got {wrong[0]}")
