"""A layer's call as torch.func maps it: as rows or as a stack, on the engine.

A mapped dimension enters in one of two ways:

- as rows: each row becomes V neighbours, and the engine runs once;
- as a stack: the engine runs once for each of V models, in one call that spreads them over the
  threads. An array that all models share has no dimension for them.

Both can be mapped again. Which it is to be, `ostinato.transforms` says.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step (proj_size, or H),
D directions, V models of a stack, or elements of a mapped dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ostinato import _core, profile
from ostinato.call import (
    DTYPES,
    Call,
    Shape,
    address,
    check,
    check_backward,
    check_lengths,
    reserve_bytes,
    shape_of,
    thread_count,
)
from ostinato.cells import CELLS
from ostinato.engine import Sizes, five_per_direction

Maybe = Sequence[Tensor | None]

# A call's tensors as the rules take them: batch_sizes, lengths and resets, which have no gradient,
# then `Call.tensors()`: input, four states, weights. The last dimension of the first three is
# rows; in all others features follow.
FLAGS, WEIGHTS = 3, 8
# What the gradient takes in front of them: four gradients, output and reserve.
FRONT, OUTPUT, RESERVE = 6, 4, 5


@dataclass(frozen=True)
class Plan:
    """What the rules are told besides tensors. No tuple, whose items torch.func would map."""

    batch: int
    config: tuple[str, bool, bool, bool]  # cell, has_biases, bidirectional, recompute
    all_c: bool
    keep: bool
    gradients: tuple[bool, ...]  # which of the transforms, innermost last, are gradients
    models: int = 0  # V of a stack; 0: this is none
    stacked: tuple[bool, ...] = ()  # which of the tensors have V as their first dimension
    wanted: tuple[bool, ...] = ()  # which of a call's tensors are to have a gradient

    @staticmethod
    def is_cut(tensors: Sequence[Any]) -> bool:
        """Whether rows end early or begin anew."""
        return tensors[1] is not None or tensors[2] is not None

    def knows_states(self, values: Sequence[Any]) -> bool:
        """Whether what the gradient takes holds every state: all but c of an LSTM."""
        return not CELLS[self.config[0]].has_c and not self.is_cut(values[FRONT:])

    def call(self, tensors: Sequence[Any]) -> Call:
        """Return the call on these tensors."""
        batch_sizes, lengths, resets, input, h_0, c_0, reset_h, reset_c, *weights = tensors
        cuts = lengths, resets, reset_h, reset_c
        return Call(input, batch_sizes, self.batch, h_0, c_0, weights, *self.config, *cuts)


def replaced(values: Maybe, places: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """Return the values with others at some places."""
    replaced = list(values)
    for place, value in zip(places, new, strict=True):
        replaced[place] = value
    return replaced


# ---- the two ways in which a dimension is mapped ----


def fold(
    size: int, dims: Sequence[int | None], plan: Plan, values: Maybe, front: int
) -> tuple[Plan, list[Tensor | None]]:
    """Make of each row `size` neighbours; `front` values stand before a call's tensors."""

    def folded(index: int, value: Tensor | None, dim: int | None) -> Tensor | None:
        if value is None or index >= front + WEIGHTS:
            return value
        if index == front:
            return value * size  # batch_sizes
        # Rows are the last dimension of lengths and resets, and elsewhere the one before it.
        rows = -1 if front <= index < front + FLAGS else -2
        if dim is None:
            shape = list(value.shape)
            shape.insert(len(shape) + rows + 1, size)
            value = value.unsqueeze(rows).expand(shape)
        else:
            value = value.movedim(dim, rows)
        return value.flatten(rows - 1, rows)

    mapped = [
        folded(index, value, dim)
        for index, (value, dim) in enumerate(zip(values, dims, strict=True))
    ]
    return replace(plan, batch=plan.batch * size), mapped


def stack(
    size: int, dims: Sequence[int | None], plan: Plan, values: Maybe, front: int
) -> tuple[Plan, list[Tensor | None]]:
    """Make a stack of `size` models, or of a stack one with so many times its models."""
    models = plan.models
    before = plan.stacked if models else (False,) * len(values)

    def mapped(value: Tensor | None, dim: int | None, is_stacked: bool) -> Tensor | None:
        if value is None or (dim is None and not is_stacked):
            return value
        value = value.unsqueeze(0) if dim is None else value.movedim(dim, 0)
        if not models:
            return value
        if not is_stacked:
            value = value.unsqueeze(1)
        return value.expand(size, models, *value.shape[2:]).flatten(0, 1)

    stacked = tuple(old or dim is not None for old, dim in zip(before, dims, strict=True))
    arguments = zip(values, dims, before, strict=True)
    return (
        replace(plan, models=size * max(models, 1), stacked=stacked),
        [mapped(*argument) for argument in arguments],
    )


def unmapped(
    found: Sequence[Tensor], size: int, plan: Plan, is_stack: bool
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Return results of a plan with the mapped dimension on its own again, and where it is."""
    if not is_stack:
        shapes = [(*r.shape[:-2], r.shape[-2] // size, size, r.shape[-1]) for r in found]
        pieces = tuple(r.view(shape) for r, shape in zip(found, shapes, strict=True))
        return pieces, tuple(r.dim() - 1 for r in found)
    if plan.models:
        return tuple(r.view(size, plan.models, *r.shape[1:]) for r in found), (0,) * len(found)
    return tuple(found), (0,) * len(found)


# ---- the engine ----


def run_one(plan: Plan, tensors: Maybe) -> tuple[Tensor, ...]:
    """Run a layer."""
    call = plan.call(tensors)
    if not (call.is_cut or plan.all_c):
        found = _run_plainly(call, plan.keep)
        if found is not None:
            return found
    output, h_n, c_n, cells, reserve = torch.ops.ostinato.layer(*call, plan.all_c, plan.keep)
    if plan.keep and not call.is_cut:
        reserve = reserve.view(kept_shape(output, len(h_n), reserve.numel()))
    return _present(plan, output, h_n, c_n, cells, reserve)


def _plain_arguments(call: Call, shape: Shape) -> Any:
    """Return what both entries for plain tensors (csrc/tensors.cpp) take first, as a tuple."""
    states = call.h_0, call.c_0
    start = call.kind.number, False, shape, call.input, call.batch_sizes
    return *start, *states, tuple(call.weights), call.has_biases


def _run_plainly(call: Call, keep: bool) -> tuple[Tensor, ...] | None:
    """Run a layer past the dispatcher; None where the engine declines."""
    shape = shape_of(call)
    if shape is None:
        return None
    arguments = *_plain_arguments(call, shape), keep, call.recompute, thread_count()
    found: Any = _core.tensors_forward(*arguments)
    if found is None:
        return None
    *results, kept = found
    kept = call.input.new_empty((0,)) if kept is None else kept
    kept = kept.view(torch.uint8)
    if keep:
        kept = kept.view(kept_shape(found[0], shape[3], kept.numel()))
    return *(r for r in results if r is not None), kept


def _differentiate_plainly(call: Call, values: Maybe, wanted: Sequence[bool]) -> Any:
    """Differentiate a layer past the dispatcher; None where `_run_plainly` returns None."""
    shape = None if call.is_cut else shape_of(call)
    dy, dh_n, dc_n, dcells, output, reserve = values
    if shape is None or dcells is not None:
        return None
    assert reserve is not None
    arguments = (
        *_plain_arguments(call, shape),
        output,
        reserve.contiguous().view(-1).view(call.input.dtype),
        dy,
        dh_n,
        dc_n if call.kind.has_c else None,
        (*wanted[:3], *wanted[5:]),
        call.recompute,
        thread_count(),
    )
    if not profile.is_on():
        return _core.tensors_backward(*arguments)
    with profile.shown(call.cell, "backward"):
        return _core.tensors_backward(*arguments)


def kept_shape(output: Tensor, directions: int, count: int) -> tuple[int, int, int]:
    """Return the shape of what is kept for each direction and row."""
    rows = output.shape[:-1].numel()
    return directions, rows, count // max(directions * rows, 1)


def _present(
    plan: Plan, output: Tensor, h_n: Tensor, c_n: Tensor, cells: Tensor, reserve: Tensor
) -> tuple[Tensor, ...]:
    """Leave out what a cell, or a call, does not have."""
    if not CELLS[plan.config[0]].has_c:
        return output, h_n, reserve
    return (output, h_n, c_n, cells, reserve) if plan.all_c else (output, h_n, c_n, reserve)


def run_one_backward(plan: Plan, values: Maybe) -> tuple[Tensor, ...]:
    """Run the gradient of a layer."""
    *grads, output, reserve = values[:FRONT]
    assert reserve is not None
    wanted = list(plan.wanted[FLAGS:])
    call = plan.call(values[FRONT:])
    plain = _differentiate_plainly(call, values[:FRONT], wanted)
    if plain is not None:
        return tuple(grad for grad in plain if grad is not None)
    found = torch.ops.ostinato.layer_backward(
        *grads, output, reserve.contiguous().view(-1), wanted, *call
    )
    return tuple(grad for grad, want in zip(found, wanted, strict=True) if want)


# An array, and whether it has a dimension for the models.
_Pair = tuple[Tensor | None, bool]


class _Arrays:
    """Dense arrays of a stack: addresses in the first model, and bytes from one to the next."""

    def __init__(self) -> None:
        self.first: list[int] = []
        self.strides: list[int] = []
        self._held: list[Tensor | None] = []  # dense copies must outlive the call

    def add(self, tensor: Tensor | None, is_stacked: bool) -> None:
        tensor = None if tensor is None else tensor.resolve_neg().contiguous()
        self._held.append(tensor)
        self.first.append(address(tensor))
        dense = 0 if tensor is None or not is_stacked else tensor[0].numel() * tensor.element_size()
        self.strides.append(dense)

    def add_weights(self, call: Call, sizes: Sizes, pairs: Sequence[_Pair]) -> None:
        """Add five arrays per direction, of which some are absent."""
        for pair in five_per_direction(pairs, sizes, call.has_biases, (None, False)):
            self.add(*pair)


def _first_call(plan: Plan, tensors: Maybe, stacked: Sequence[bool]) -> tuple[Call, Sizes]:
    """Check the calls of a stack; return the first and the sizes of all."""
    first = [
        tensor[0] if tensor is not None and is_stacked else tensor
        for tensor, is_stacked in zip(tensors, stacked, strict=True)
    ]
    call = plan.call(first)
    sizes = check(call)
    lengths = tensors[1]
    if lengths is not None:
        check_lengths(lengths.flatten(), sizes.steps)
    return call, sizes


def _add_inputs(
    arrays: _Arrays, call: Call, sizes: Sizes, tensors: Maybe, stacked: Sequence[bool]
) -> None:
    pairs = list(zip(tensors, stacked, strict=True))
    _, lengths, resets, *states = pairs[:WEIGHTS]
    for pair in (*states[:3], lengths, resets, *states[3:]):
        arrays.add(*pair)
    arrays.add_weights(call, sizes, pairs[WEIGHTS:])


def run_stack(plan: Plan, tensors: Maybe) -> tuple[Tensor, ...]:
    """Run each model of a stack."""
    call, sizes = _first_call(plan, tensors, plan.stacked)
    input, models, directions = call.input, plan.models, sizes.directions
    has_cell = call.kind.has_c
    dtype = DTYPES[input.dtype]
    output = input.new_empty((models, *input.shape[:-1], directions * sizes.output))
    h_n = input.new_empty((models, directions, sizes.batch, sizes.output))
    c_n = input.new_empty((models, directions, sizes.batch, sizes.hidden) if has_cell else (0,))
    cells = output.new_empty(
        (*output.shape[:-1], directions * sizes.hidden) if plan.all_c else (0,)
    )
    reserve = input.new_empty((0,), dtype=torch.uint8)
    if plan.keep:
        kept = _core.reserve_bytes(call.kind.number, dtype, sizes, call.recompute)
        if call.is_cut:
            # What stands for steps that are not taken is nobody's, but this is to be a function of
            # the inputs.
            reserve = reserve.new_zeros((models, kept))
        else:
            reserve = reserve.new_empty((models, *kept_shape(output[0], directions, kept)))
    arrays = _Arrays()
    _add_inputs(arrays, call, sizes, tensors, plan.stacked)
    present = (True, True, has_cell, plan.all_c, plan.keep)
    for result, is_there in zip((output, h_n, c_n, cells, reserve), present, strict=True):
        arrays.add(result if is_there else None, True)
    _core.forward(
        call.kind.number,
        dtype,
        sizes,
        address(call.batch_sizes),
        models,
        arrays.first,
        arrays.strides,
        thread_count(),
        call.recompute,
    )
    return _present(plan, output, h_n, c_n, cells, reserve)


def run_stack_backward(plan: Plan, values: Maybe) -> tuple[Tensor, ...]:
    """Run the gradient of each model of a stack."""
    tensors, stacked = values[FRONT:], plan.stacked[FRONT:]
    call, sizes = _first_call(plan, tensors, stacked)
    front = list(zip(values[:FRONT], plan.stacked[:FRONT], strict=True))
    dy, dh_n, dc_n, dcells, output, reserve = (
        tensor[0] if tensor is not None and is_stacked else tensor for tensor, is_stacked in front
    )
    assert output is not None
    assert reserve is not None
    kept = reserve.contiguous().view(-1)
    wanted = list(plan.wanted[FLAGS:])
    check_backward(
        call, sizes, (dy, dh_n, dc_n, dcells), output, kept, wanted, reserve_bytes(call, sizes)
    )
    arrays = _Arrays()
    _add_inputs(arrays, call, sizes, tensors, stacked)
    for index in (OUTPUT, RESERVE, 0, 1, 2, 3):
        # c has no gradient where there is none.
        is_absent = index in (2, 3) and not call.kind.has_c
        arrays.add(*((None, False) if is_absent else front[index]))
    found = [
        call.input.new_empty((plan.models, *first.shape)) if want and first is not None else None
        for first, want in zip(call.tensors(), wanted, strict=True)
    ]
    for grad in found[: WEIGHTS - FLAGS]:
        arrays.add(grad, True)
    arrays.add_weights(call, sizes, [(grad, True) for grad in found[WEIGHTS - FLAGS :]])
    _core.backward(
        call.kind.number,
        DTYPES[call.input.dtype],
        sizes,
        address(call.batch_sizes),
        plan.models,
        arrays.first,
        arrays.strides,
        thread_count(),
        call.recompute,
    )
    return tuple(grad for grad in found if grad is not None)
