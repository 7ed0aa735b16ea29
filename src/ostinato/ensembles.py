"""A layer's call as torch.func maps it: as rows or as an ensemble, on the engine.

A mapped dimension enters in one of two ways:

- as rows: each row becomes V neighbours, and the engine runs once;
- as an ensemble: the engine runs once for each of V models, in one call that spreads them over the
  threads. An array that all models share has no dimension for them.

Both can be mapped again. Which it is to be, `ostinato.transforms` says.

Legend: T steps, B batch, N packed rows, H hidden, D directions, V models of an ensemble, or
elements of a mapped dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from ostinato import arrays, cpu, profile
from ostinato.arrays import Array
from ostinato.call import Call, Results

Maybe = Sequence[Tensor | None]


class Taken(NamedTuple):
    """What a gradient takes, or one entry for each of these."""

    arrived: Results
    output: Any
    reserve: Any
    arrays: list[Any]  # of the call

    def flat(self) -> list[Any]:
        """Return all in one list."""
        return [*self.front(), *self.arrays]

    def front(self) -> list[Any]:
        """Return what stands before the call's own arrays."""
        return [*self.arrived.flat(), self.output, self.reserve]


@dataclass(frozen=True)
class Plan:
    """What the rules are told besides tensors. No tuple, whose items torch.func would map."""

    form: Call  # without arrays
    keep: bool
    gradients: tuple[bool, ...]  # which of the transforms, innermost last, are gradients
    models: int = 0  # V of an ensemble; 0: this is none
    per_model: tuple[bool, ...] = ()  # which of the tensors have V as their first dimension
    wanted: tuple[bool, ...] = ()  # which of a call's tensors are to have a gradient

    def call(self, values: Sequence[Any]) -> Call:
        """Return the call on these arrays."""
        return self.form.with_arrays(values)

    def taken(self, values: Sequence[Any]) -> Taken:
        """Name values that stand for what the gradient takes, one for each."""
        count = len(self.form.initial)
        # Gradients of the output, of all last states, and of all but h at every step.
        output, reserve, *given = values[2 * count :]
        return Taken(Results.of(values[: 2 * count], count), output, reserve, given)

    def ensemble(self, of_results: Sequence[bool] = (), of_arrays: Sequence[bool] = ()) -> Any:
        """Return what the engine is to know of an ensemble, or None where this is none."""
        if not self.models:
            return None
        return cpu.Ensemble(self.models, tuple(of_arrays or self.per_model), tuple(of_results))


def replaced(values: Maybe, places: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """Return the values with others at some places."""
    replaced = list(values)
    for place, value in zip(places, new, strict=True):
        replaced[place] = value
    return replaced


# ---- the two ways in which a dimension is mapped ----


def fold(
    size: int, dims: Sequence[int | None], plan: Plan, values: Maybe, table: Sequence[Array]
) -> tuple[Plan, list[Tensor | None]]:
    """Make of each row `size` neighbours; `table` says what each value is."""

    def folded(array: Array, value: Tensor | None, dim: int | None) -> Tensor | None:
        if value is None or array is arrays.WEIGHTS:
            return value
        if array is arrays.BATCH_SIZES:
            return value * size
        rows = -2 if array is arrays.RESERVE else array.row_dim
        assert rows is not None
        if dim is None:
            shape = list(value.shape)
            shape.insert(len(shape) + rows + 1, size)
            value = value.unsqueeze(rows).expand(shape)
        else:
            value = value.movedim(dim, rows)
        return value.flatten(rows - 1, rows)

    mapped = [folded(*each) for each in zip(table, values, dims, strict=True)]
    return replace(plan, form=plan.form._replace(batch=plan.form.batch * size)), mapped


def ensemble(
    size: int, dims: Sequence[int | None], plan: Plan, values: Maybe, table: Sequence[Array]
) -> tuple[Plan, list[Tensor | None]]:
    """Make an ensemble of `size` models, or of an ensemble one with so many times its models."""
    models = plan.models
    before = plan.per_model if models else (False,) * len(values)

    def mapped(value: Tensor | None, dim: int | None, is_per_model: bool) -> Tensor | None:
        if value is None or (dim is None and not is_per_model):
            return value
        value = value.unsqueeze(0) if dim is None else value.movedim(dim, 0)
        if not models:
            return value
        if not is_per_model:
            value = value.unsqueeze(1)
        return value.expand(size, models, *value.shape[2:]).flatten(0, 1)

    per_model = tuple(old or dim is not None for old, dim in zip(before, dims, strict=True))
    arguments = zip(values, dims, before, strict=True)
    return (
        replace(plan, models=size * max(models, 1), per_model=per_model),
        [mapped(*argument) for argument in arguments],
    )


def unmapped(
    found: Sequence[Tensor], size: int, plan: Plan, is_ensemble: bool
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Return results of a plan with the mapped dimension on its own again, and where it is."""
    if not is_ensemble:
        shapes = [(*r.shape[:-2], r.shape[-2] // size, size, r.shape[-1]) for r in found]
        pieces = tuple(r.view(shape) for r, shape in zip(found, shapes, strict=True))
        return pieces, tuple(r.dim() - 1 for r in found)
    if plan.models:
        return tuple(r.view(size, plan.models, *r.shape[1:]) for r in found), (0,) * len(found)
    return tuple(found), (0,) * len(found)


# ---- the engine ----


def run(plan: Plan, values: Maybe) -> tuple[Tensor, ...]:
    """Run a layer, or each model of an ensemble."""
    call = plan.call(values)
    results, reserve = cpu.forward(call, plan.keep, plan.ensemble())
    if plan.keep and not call.is_cut:
        reserve = by_rows(call, results.output, reserve, plan.models)
    return *results.flat(), reserve


def run_backward(plan: Plan, values: Maybe) -> tuple[Tensor, ...]:
    """Run the gradient of a layer, or of each model of an ensemble."""
    taken = plan.taken(values)
    call = plan.call(taken.arrays)
    flags = plan.taken(plan.per_model or (False,) * len(values))
    reserve = taken.reserve.contiguous()
    reserve = reserve.view(plan.models, -1) if plan.models and flags.reserve else reserve.view(-1)
    given = call, taken.arrived, taken.output, reserve, plan.wanted
    with profile.shown(call.cell, "backward") if profile.is_on() else nullcontext():
        found = cpu.backward(*given, plan.ensemble(flags.front(), flags.arrays))
    return tuple(grad for grad in found if grad is not None)


def by_rows(call: Call, output: Tensor, reserve: Tensor, models: int = 0) -> Tensor:
    """Bring what is kept to (D, N, ...), of an ensemble to (V, D, N, ...)."""
    front = (models,) if models else ()
    directions, rows = 2 if call.bidirectional else 1, output.shape[len(front) : -1].numel()
    count = reserve.numel() // max(directions * rows * max(models, 1), 1)
    return reserve.view(*front, directions, rows, count)
