"""The CPU engine for torch: by addresses, or by the tensors themselves.

`forward` and `backward` check a call and hand over addresses. They serve one call or an ensemble:
several calls of one size, in one run that spreads them over the threads; an array that all models
share has no dimension for them, of the others it is the first.

`plain_forward` and `plain_backward` hand over the tensors themselves. C++ checks them
(csrc/tensors.cpp) in a tenth of the time, and declines what it does not know: another type, device
or shape, weights that are not dense.

Legend: T steps, B batch, N packed rows, H hidden, D directions, V models of an ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ostinato import _core, arrays, profile
from ostinato.call import Call, Parts, Results, Shape, padded
from ostinato.cells import CELLS
from ostinato.check import check_lengths, shape_of, shapes_of
from ostinato.sizes import Sizes, five_per_direction
from ostinato.tensors import DTYPES, address, check_backward, check_call, thread_count

_Maybe = Sequence[Tensor | None]


class Ensemble(NamedTuple):
    """Of an ensemble: how many models, and which arrays have a dimension for them."""

    models: int
    of_arrays: tuple[bool, ...]  # of `Call.arrays`
    of_results: tuple[bool, ...] = ()  # in backward: of arrived gradients, output and reserve

    def first(self, values: _Maybe, flags: Sequence[bool]) -> list[Tensor | None]:
        """Return the arrays of the first model."""
        return [
            value[0] if value is not None and is_per_model else value
            for value, is_per_model in zip(values, flags, strict=True)
        ]


def reserve_bytes(call: Call, sizes: Sizes) -> int:
    """Return how much the engine keeps for backward."""
    return _core.reserve_bytes(call.kind.number, DTYPES[call.input.dtype], sizes, call.recompute)


# What the engine asks for, in its own order.
_ORDER = {
    is_backward: tuple(name for name, *_ in _core.arrays(is_backward))
    for is_backward in (False, True)
}


@cache
def _places(
    is_backward: bool,
    states: int,
    has_every: bool,
    weights: int,
    directions: int,
    has_biases: bool,
    projection: bool,
) -> tuple[int, ...]:
    """Return where each array that the engine asks for stands among those that `_run` is given.

    One that is absent has the place behind the last. `has_every` says whether forward returns the
    states behind h after every step; `weights` counts these.
    """
    of_call = arrays.arguments(states, weights)
    if is_backward:
        grads = map(arrays.gradient_of, (a for a in of_call if a.is_differentiable))
        table = [*of_call, *arrays.arrived(states), arrays.OUTPUT, arrays.RESERVE, *grads]
    else:
        every = arrays.EVERY[: states - 1] if has_every else ()
        table = [*of_call, arrays.OUTPUT, *arrays.LAST[:states], *every, arrays.RESERVE]
    table.remove(arrays.BATCH_SIZES)
    at: dict[str, list[int]] = {}
    for place, array in enumerate(table):
        at.setdefault(array.name, []).append(place)
    sizes, absent = Sizes(0, 0, 0, 0, 0, int(projection), directions), len(table)
    found: list[int] = []
    for name in _ORDER[is_backward]:
        if name.endswith("weights"):
            found += five_per_direction(at[name], sizes, has_biases, absent)
        else:
            found += at.get(name, [absent])
    return tuple(found)


def _run(
    is_backward: bool,
    call: Call,
    sizes: Sizes,
    given: _Maybe,
    ensemble: Ensemble | None = None,
    per_model: Sequence[bool] = (),
) -> None:
    """Run the engine on arrays as they lie.

    `call` and `sizes` are the first model's. `given` are a call's arrays but `batch_sizes`, then
    forward's results and reserve; in backward gradients that arrived, output, reserve, and the
    gradients to be written. `per_model` says which of all but the call's own have a dimension for
    the models of `ensemble`.
    """
    # Named, so that dense copies outlive the run that reads their addresses.
    dense = [None if t is None else t.resolve_neg().contiguous() for t in given]
    steps = None if call.batch_sizes is None else call.batch_sizes.contiguous()
    places = _places(
        is_backward,
        len(call.initial),
        call.all_states,
        len(call.weights),
        sizes.directions,
        call.has_biases,
        sizes.projection > 0,
    )
    addresses, strides = [*map(address, dense), 0], []
    if ensemble:
        _, *flags = ensemble.of_arrays
        strides = [
            t[0].numel() * t.element_size() if t is not None and is_per_model else 0
            for t, is_per_model in zip(dense, [*flags, *per_model], strict=True)
        ]
        strides = [[*strides, 0][place] for place in places]
    entry = _core.backward if is_backward else _core.forward
    entry(
        call.kind.number,
        DTYPES[call.input.dtype],
        sizes,
        address(steps),
        ensemble.models if ensemble else 1,
        [addresses[place] for place in places],
        strides,
        thread_count(),
        call.recompute,
    )


def _sizes(call: Call, ensemble: Ensemble | None) -> tuple[Call, Sizes]:
    """Check a call, or all calls of an ensemble; return the first and its sizes."""
    if ensemble is None:
        sizes = check_call(call)
        return call, sizes
    first = call.with_arrays(ensemble.first(call.arrays(), ensemble.of_arrays))
    sizes = check_call(first)
    if call.lengths is not None:
        check_lengths(call.lengths.flatten(), sizes.steps)
    return first, sizes


def forward(call: Call, keep: bool, ensemble: Ensemble | None = None) -> tuple[Results, Tensor]:
    """Check, allocate and run a layer, or an ensemble of layers.

    Returns the results, and what is kept for backward: bytes, (V, ...) of an ensemble.
    """
    first, sizes = _sizes(call, ensemble)
    input, models = call.input, (ensemble.models,) if ensemble else ()
    table, shapes = call.results().flat(), shapes_of(first, sizes)
    found = [input.new_empty((*models, *shapes[array.name])) for array in table]
    kept = reserve_bytes(first, sizes) if keep else 0
    reserve = input.new_empty((*models, kept), dtype=torch.uint8)
    if kept and call.lengths is not None:
        # Steps that are not taken leave their part as it was, but reserve depends on the inputs
        # alone.
        rows = 0 if ensemble else int(call.lengths.sum())
        reserve[..., reserve_bytes(first, sizes._replace(rows=rows)) :].zero_()
    _, *own = call.arrays()
    written = [*found, reserve if keep else None]
    _run(False, first, sizes, [*own, *written], ensemble, [True] * len(written))
    return Results.of(found, len(call.kind.states)), reserve


def backward(
    call: Call,
    arrived: Results,
    output: Tensor,
    reserve: Tensor,
    wanted: Sequence[bool],
    ensemble: Ensemble | None = None,
) -> list[Tensor | None]:
    """Check, allocate and run the gradient of a layer, or of an ensemble of layers.

    `output` and `reserve` are what forward returned: `reserve` has one dimension, or (V, ...) of an
    ensemble. Gradients that did not arrive are None. `wanted` has a flag for each of
    `call.tensors()`; returned are the gradients, of an ensemble one of each model, and None where
    not wanted.
    """
    first, sizes = _sizes(call, ensemble)
    given = [*arrived.flat(), output, reserve]
    flags = ensemble.of_results if ensemble else (False,) * len(given)
    *grads, first_output, first_reserve = ensemble.first(given, flags) if ensemble else given
    first_arrived = Results.of(grads, len(arrived.last))
    assert first_output is not None
    assert first_reserve is not None
    needed = reserve_bytes(first, sizes)
    wanted = list(wanted)
    kept = first_reserve.contiguous().view(-1) if ensemble else first_reserve
    check_backward(first, sizes, first_arrived, first_output, kept, needed)
    models = (ensemble.models,) if ensemble else ()
    shapes = shapes_of(first, sizes)
    table = call.table()[-len(wanted) :]
    found: list[Tensor | None] = []
    for array, tensor, want in zip(table, first.tensors(), wanted, strict=True):
        shape = tensor.shape if tensor is not None else shapes.get(array.name)
        found.append(call.input.new_empty((*models, *shape)) if want else None)  # type: ignore[misc]
    _, *own = call.arrays()
    per_model = [*flags, *[True] * len(found)]
    _run(True, first, sizes, [*own, *given, *found], ensemble, per_model)
    return found


# ---- plain tensors ----

# cell, is_step, shape, has_biases, recompute. With is_step input and states have no dimensions for
# steps and directions.
Config = tuple[str, bool, Shape, bool, bool]

# Of the records, what each call asks: a cell's whole call takes a few microseconds.
_NUMBERS = {name: cell.number for name, cell in CELLS.items()}


def plain_forward(
    config: Config,
    keep: bool,
    batch_sizes: Any,
    input: Any,
    h_0: Any,
    c_0: Any,
    *weights: Any,
) -> Any:
    """Return output, h_n, c_n and what is kept for backward, or None if these are declined."""
    cell, is_step, shape, has_biases, recompute = config
    return _core.tensors_forward(
        _NUMBERS.get(cell, -1),
        is_step,
        shape,
        input,
        batch_sizes,
        h_0,
        c_0,
        weights,
        has_biases,
        keep,
        recompute,
        thread_count(),
    )


def plain_backward(
    config: Config,
    tensors: _Maybe,
    output: Tensor | None,
    reserve: Tensor | None,
    arrived: _Maybe,
    wanted: Sequence[bool],
) -> Any:
    """Return the gradients of input, h_0, c_0 and weights, or None if these are declined.

    `config` and `tensors` are what forward took, `output` and `reserve` what it returned; output
    may be None where one step does not read it. `arrived` holds the gradients of output, h_n and
    c_n; `wanted` has a flag for input, h_0, c_0 and each weight.
    """
    cell, is_step, shape, has_biases, recompute = config
    batch_sizes, input, h_0, c_0, *weights = tensors
    arguments: Any = (
        _NUMBERS[cell],
        is_step,
        shape,
        input,
        batch_sizes,
        h_0,
        c_0,
        tuple(weights),
        has_biases,
        output,
        reserve,
        *arrived,
        wanted,
        recompute,
        thread_count(),
    )
    if not profile.is_on():
        return _core.tensors_backward(*arguments)
    with profile.shown(cell, "backward"):
        return _core.tensors_backward(*arguments)


def _plain(call: Call) -> tuple[Config, list[Any]] | None:
    """Return what both take of a call without cuts; None where its sizes make no sense."""
    shape = shape_of(call)
    if shape is None:
        return None
    config = call.cell, False, shape, call.has_biases, call.recompute
    return config, [call.batch_sizes, call.input, *padded(call.initial), *call.weights]


def forward_plainly(call: Call, keep: bool) -> tuple[Results, Tensor] | None:
    """`forward` on plain tensors, without cuts; None where C++ declines."""
    plain = _plain(call)
    if plain is None:
        return None
    config, tensors = plain
    found = plain_forward(config, keep, *tensors)
    if found is None:
        return None
    output, *last, kept = found
    kept = call.input.new_empty((0,)) if kept is None else kept
    return Results(output, tuple(s for s in last if s is not None)), kept.view(torch.uint8)


def backward_plainly(
    call: Call, arrived: Results, output: Tensor, reserve: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None] | None:
    """`backward` on plain tensors, without cuts; None where C++ declines."""
    plain = _plain(call)
    if plain is None or any(grad is not None for grad in arrived.every):
        return None
    parts, count = call.parts(wanted), len(call.initial)
    reserve = reserve.contiguous().view(-1).view(call.input.dtype)
    asked = (parts.input, *padded(parts.initial, absent=False), *parts.weights)
    grads = arrived.output, *padded(arrived.last)
    found = plain_backward(*plain, output, reserve, grads, asked)
    if found is None:
        return None
    dx, dh_0, dc_0, *dw = found
    return Parts(dx, (dh_0, dc_0)[:count], (None,) * count, dw).flat()
