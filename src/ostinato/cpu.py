"""The CPU engine for torch: by the tensors themselves, or by addresses.

`plain_forward` and `plain_backward` hand over tensors. C++ checks them (csrc/tensors.cpp) in a
tenth of the time, and declines what it does not know: another type, device or shape, weights that
are not dense.

`forward` and `backward` ask it too. What it declines they check, and hand over addresses. They
serve one call or an ensemble: several calls of one size, in one run that spreads them over the
threads; an array that all models share has no dimension for them, of the others it is the first.

Legend: T steps, B batch, N packed rows, H hidden, D directions, V models of an ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ostinato import _core, arrays, plain
from ostinato.call import Call, Results
from ostinato.check import check_lengths, shape_of, shapes_of
from ostinato.plain import NUMBERS, Config, of_tuple, to_tuple
from ostinato.sizes import Sizes, six_per_direction
from ostinato.tensors import (
    DTYPES,
    address,
    batch_of,
    check_backward,
    check_call,
    thread_count,
)

_Maybe = Sequence[Tensor | None]


# What tests close, to see the other ways.
IS_OPEN = plain.IS_OPEN


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
    per_unit: bool,
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
            found += six_per_direction(at[name], sizes, has_biases, absent, per_unit)
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
        call.kind.parameters > 0,
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
    if (plain := _plain(call, ensemble)) is not None:
        config, _, tensors = plain
        returned = plain_forward(config, keep, tensors)
        if returned is not None:
            output, *last, bytes_kept = returned
            bytes_kept = call.input.new_empty(0) if bytes_kept is None else bytes_kept
            return Results(output, tuple(last[: len(call.initial)])), bytes_kept.view(torch.uint8)
    first, sizes = _sizes(call, ensemble)
    input, models = call.input, (ensemble.models,) if ensemble else ()
    table, shapes = call.results().flat(), shapes_of(first, sizes)
    found = [input.new_empty((*models, *shapes[array.name])) for array in table]
    kept = reserve_bytes(first, sizes) if keep else 0
    reserve = input.new_empty((*models, kept), dtype=torch.uint8)
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
    # C++ has no gradient of states after every step, and none of a state that is not there.
    pairs = zip(wanted, call.tensors(), strict=True)
    is_beyond = any(grad is not None for grad in arrived.every) or any(
        want and tensor is None for want, tensor in pairs
    )
    if not is_beyond and (plain := _plain(call, ensemble)) is not None:
        config, is_cut, tensors = plain
        asked = to_tuple((False,) * 3, call.parts(wanted), is_cut, absent=False)
        ends = arrived.output, *arrived.last
        returned = plain_backward(config, tensors, output, reserve, ends, asked)
        if returned is not None:
            _, parts = of_tuple(returned, len(call.weights))
            return call.padded_parts(parts.padded()).flat()
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


def _plain(call: Call, ensemble: Ensemble | None) -> tuple[Config, bool, Any] | None:
    """Return what C++ takes of tensors, and whether rows are cut; None where it takes none."""
    shape = None if ensemble or call.all_states or not IS_OPEN else shape_of(call)
    # It takes B from the arrays.
    if shape is None or call.batch != batch_of(call.input, call.batch_sizes, None):
        return None
    masks = call.batch_sizes, call.lengths, call.resets
    parts = call.parts(call.tensors())
    is_cut = call.is_cut or any(state is not None for state in parts.reset_to)
    config = call.cell, False, shape, call.has_biases, call.recompute, call.stack
    return config, is_cut, to_tuple(masks, parts, is_cut)


# `thread_count` without a function between, which is 3% of a small call.
_num_threads = torch.get_num_threads


def plain_forward(config: Config, keep: bool, tensors: tuple[Any, ...]) -> Any:
    """Return output, h_n, c_n and what is kept for backward, or None if these are declined.

    `tensors` are in the order of `to_tuple`.
    """
    cell, is_step, shape, has_biases, recompute, _ = config
    threads = _core.forced_threads or _num_threads()
    number, options = NUMBERS[cell], (has_biases, keep, recompute, threads)
    return _core.tensors_forward(number, is_step, shape, tensors, *options)


def plain_backward(
    config: Config,
    tensors: tuple[Any, ...],
    output: Tensor | None,
    reserve: Tensor | None,
    arrived: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> Any:
    """Return the gradients of `tensors`, or None if these are declined.

    `config` and `tensors` are what forward took, `output` and `reserve` what it returned; output
    may be None where one step does not read it. `arrived` holds the gradients of output, of h_n but
    for one step, and of c_n where the cell has c; `wanted` has a flag for each of `tensors`.
    """
    cell, is_step, shape, has_biases, recompute, _ = config
    threads = _core.forced_threads or _num_threads()
    given: Any = (output, reserve, arrived, wanted, recompute, threads)
    return _core.tensors_backward(NUMBERS[cell], is_step, shape, tensors, has_biases, *given)
