"""What torch.func makes of a layer: rules for vmap and gradients, and beyond them the reference.

torch.func asks an autograd.Function for its rules. There are two, a layer and its gradient, and a
mapped dimension enters either in one of two ways:

- as rows, where weights are not mapped and no element has a gradient of its own: each row becomes V
  neighbours, and the engine runs once;
- as a stack, elsewhere: the engine runs once for each of V models, in one call that spreads them
  over the threads. An array that all models share has no dimension for them.

Both can be mapped again. What is differentiated in forward mode, or a gradient that is
differentiated once more, is the reference's.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step (proj_size, or H),
D directions, V models of a stack, or elements of a mapped dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType

from ostinato import _core
from ostinato.adjoint import current_level, is_batch, over_batches, tangents, unbatched
from ostinato.adjoint import gradients as adjoint_gradients
from ostinato.call import (
    DTYPES,
    Call,
    address,
    check,
    check_backward,
    check_lengths,
    is_wrapped,
    reserve_bytes,
    thread_count,
    without_autocast,
)
from ostinato.engine import CELLS, Sizes, five_per_direction
from ostinato.gradients import Results, reference_results

_functorch = torch._C._functorch
_peek_transform = _functorch.peek_interpreter_stack
_forward_ad = torch.autograd.forward_ad

_Maybe = Sequence[Tensor | None]

# A call's tensors as the rules take them: batch_sizes, lengths and resets, which have no gradient,
# then `Call.tensors()`: input, four states, weights. The last dimension of the first three is
# rows; in all others features follow.
_FLAGS, _WEIGHTS = 3, 8
# What the gradient takes in front of them: four gradients, output and reserve.
_FRONT, _OUTPUT, _RESERVE = 6, 4, 5
_KINDS = TransformType.Vmap, TransformType.Grad, TransformType.Jvp


def is_active() -> bool:
    """Whether vmap, torch.func or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling():
        return False
    return _peek_transform() is not None or _forward_ad._current_level >= 0


def serves(call: Call) -> bool:
    """Whether the rules serve a call of an engine's dtype under the transforms at work.

    Args:
        call: whose tensors may be wrapped by transforms.

    Returns:
        True if plain CPU tensors are below the transforms; in forward mode, if no row is cut.

    Example:
        >>> weights = list(torch.nn.GRUCell(3, 4).parameters())
        >>> def asked(x):
        ...     return serves(Call(x, None, 2, None, None, weights, "gru", True, False)), x.sum()
        >>> torch.func.vmap(lambda x: x * asked(x)[0])(torch.ones(1, 5, 2, 3)).any()
        tensor(True)
    """
    return (
        call.input.device.type == "cpu"
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not (call.is_cut and _is_forward_mode())
        and all(kind in _KINDS for kind in _transforms())
        and all(
            type(_unwrapped(t)).__torch_dispatch__ is Tensor.__torch_dispatch__
            for t in call.tensors()
            if t is not None
        )
    )


def sees_through_step() -> bool:
    """Whether one step is best left to torch's elementary operators, which transforms see through.

    They take less time than the rules. vmap alone, and gradients for each of its elements, have the
    engine: its bits are those of a loop.
    """
    kinds = _transforms()
    return _is_forward_mode() or bool(kinds) and TransformType.Vmap not in kinds


def run(call: Call, all_c: bool) -> Results:
    """Run a layer by the rules.

    Args:
        call: one that `serves` takes, and that has been checked.
        all_c: whether c is to be returned at every step.

    Returns:
        output, h_n, c_n or None, c at every step or None, as `ostinato.ops.cut_layer`.

    Example:
        >>> weights = list(torch.nn.GRUCell(3, 4).parameters())
        >>> def output(x):
        ...     return run(Call(x, None, 2, None, None, weights, "gru", True, False), False)[0]
        >>> torch.func.vmap(output)(torch.zeros(6, 5, 2, 3)).shape
        torch.Size([6, 5, 2, 4])
    """
    # Each transform knows of its own gradients alone.
    gradients = tuple(kind == TransformType.Grad for kind in _transforms())
    keep = any(gradients) or (
        torch.is_grad_enabled()
        and any(t is not None and _unwrapped(t).requires_grad for t in call.tensors())
    )
    has_c = call.cell == "lstm" and (all_c or _is_forward_mode())  # what tangents are made of
    plan = _Plan(call[2], call[6:10], has_c, keep, gradients)
    tensors = call.batch_sizes, call.lengths, call.resets, *call.tensors()
    *found, _ = _Layer.apply(plan, *tensors)  # type: ignore[no-untyped-call]
    output, h_n, c_n, cells = (*found, None, None)[:4]
    return output, h_n, c_n, cells if all_c else None


def gradients(
    call: Call,
    arrived: Sequence[Tensor | None],
    output: Tensor,
    reserve: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiate a call of the engine: gradients of any order, and of batches of gradients.

    Args:
        call: that the engine ran.
        arrived: gradients of output, h_n, c_n and c at every step; at least one.
        output: of the engine.
        reserve: what it kept, or None where that is nothing.
        wanted: whether each of `call.tensors()` needs a gradient.

    Returns:
        The gradients, None where not wanted.
    """
    tensors = call.tensors()
    flags = tuple(bool(w) and t is not None for w, t in zip(wanted, tensors, strict=True))
    plan = _Plan(call[2], call[6:10], False, True, (), wanted=(False,) * _FLAGS + flags)
    if reserve is None:
        kept = output.new_empty((0,), dtype=torch.uint8)
    else:
        kept = reserve.view(torch.uint8)  # the short way has numbers of the input's dtype
    front = (*arrived, output, kept)
    values = *front, call.batch_sizes, call.lengths, call.resets, *tensors
    found = iter(_apply_backward(plan, values))
    return [next(found) if flag else None for flag in flags]


def cell_gradients(
    call: Call,
    arrived: Sequence[Tensor | None],
    output: Tensor | None,
    reserve: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """`gradients` of one step of a cell.

    Args:
        call: of a cell: input and states without dimensions for steps and directions.
        arrived: as in `gradients`; no array has these dimensions.
        output: of the engine, or None where it is not read.
        reserve: as in `gradients`.
        wanted: likewise.

    Returns:
        The gradients, None where not wanted.
    """
    missing = 3 - call.input.dim()

    def lifted(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[(None,) * missing]

    input, h_0, c_0 = map(lifted, (call.input, call.h_0, call.c_0))
    assert input is not None
    step = call._replace(input=input, batch=input.shape[1], h_0=h_0, c_0=c_0)
    if output is None:
        size = call.weights[1].shape[1]
        output = call.input.new_empty((*call.input.shape[:-1], size))  # only its shape is read
    result = lifted(output)
    assert result is not None
    found = gradients(step, list(map(lifted, arrived)), result, reserve, wanted)
    return [
        None if g is None else g[(0,) * missing] if k < _WEIGHTS - _FLAGS else g
        for k, g in enumerate(found)
    ]


@dataclass(frozen=True)
class _Plan:
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
        return self.config[0] != "lstm" and not self.is_cut(values[_FRONT:])

    def call(self, tensors: Sequence[Any]) -> Call:
        """Return the call on these tensors."""
        batch_sizes, lengths, resets, input, h_0, c_0, reset_h, reset_c, *weights = tensors
        cuts = lengths, resets, reset_h, reset_c
        return Call(input, batch_sizes, self.batch, h_0, c_0, weights, *self.config, *cuts)


def _transforms() -> list[Any]:
    """List what kinds of transforms are at work."""
    return [level.key() for level in _functorch.get_interpreter_stack() or ()]


def _is_forward_mode() -> bool:
    return _forward_ad._current_level >= 0 or TransformType.Jvp in _transforms()


def _unwrapped(tensor: Tensor) -> Tensor:
    """Return what is below all transforms."""
    while is_wrapped(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


# ---- a layer ----


class _Layer(torch.autograd.Function):
    """A layer. Returns output, h_n[, c_n[, c at every step]] and what is kept for backward."""

    @staticmethod
    def forward(plan: _Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return _run_stack(plan, tensors) if plan.models else _run_one(plan, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plan, *tensors = inputs
        y, *_, reserve = output
        ctx.mark_non_differentiable(reserve)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, reserve, *tensors)
        if not ctx.plan.is_cut(tensors):
            ctx.save_for_forward(y, output[3] if ctx.plan.all_c else None, *tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: _Plan, *tensors: Tensor | None) -> tuple[Any, Any]:
        size, dims = info.batch_size, in_dims[1:]
        is_cut = plan.is_cut(tensors)
        below = len(_transforms())
        is_stack = (
            any(dim is not None for dim in dims[_WEIGHTS:])
            # What a call with lengths keeps is in the order of these; resets go the same way.
            or (plan.keep and is_cut)
            # Each element is to have a gradient of its own, of weights as well.
            or any(plan.gradients[below + 1 :])
        )
        mapped_plan, mapped = (_stack if is_stack else _fold)(size, dims, plan, tensors, 0)
        found = _Layer.apply(mapped_plan, *mapped)  # type: ignore[no-untyped-call]
        if plan.keep:
            return _unmapped(found, size, plan, is_stack)
        results, places = _unmapped(found[:-1], size, plan, is_stack)
        return (*results, found[-1]), (*places, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        y, reserve, *tensors = ctx.saved_tensors  # read once: a checkpoint recomputes each time
        wanted = tuple(
            bool(want) and tensor is not None
            for want, tensor in zip(ctx.needs_input_grad[1:], tensors, strict=True)
        )
        arrived = (*grads[:-1], None, None)[:4]
        if not any(wanted) or all(grad is None for grad in arrived):
            return None, *[None] * len(tensors)
        plan = ctx.plan
        if not plan.keep:
            raise RuntimeError("backward: expected a forward call that kept what it needs")
        shared = plan.stacked or (False,) * len(tensors)
        plan = replace(plan, stacked=(bool(plan.models),) * _FRONT + shared, wanted=wanted)
        values = *arrived, y, reserve, *tensors
        found = _apply_backward(plan, values)
        rest = iter(found)
        gradients = [next(rest) if want else None for want in wanted]
        if plan.models:
            # The models of a stack have each a gradient of what they share.
            gradients = [
                g.sum(0) if g is not None and not is_stacked else g
                for g, is_stacked in zip(gradients, shared, strict=True)
            ]
        return None, *gradients

    @staticmethod
    def jvp(ctx: Any, _: None, *moves: Tensor | None) -> tuple[Tensor | None, ...]:
        # torch switches forward mode off here, with it that of transforms around this one. So it is
        # switched on again, and what moves in this one is taken without its tangent.
        with _forward_ad._set_fwd_grad_enabled(True):
            values = [
                None if t is None else _forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors
            ]
            return *_tangents(ctx.plan, values, moves), None


def _apply_backward(plan: _Plan, values: _Maybe) -> Sequence[Tensor]:
    """Return the gradients that the plan names, so that they can be differentiated."""
    if _is_forward_mode():
        return _again(plan, values, ())()
    if not torch.is_grad_enabled() and any(map(is_batch, values[:_FRONT])) and not plan.models:
        return _engine_batch(plan, values)
    found: Sequence[Tensor] = over_batches(
        lambda *values: _LayerBackward.apply(plan, *values),  # type: ignore[no-untyped-call]
        values,
    )
    return found


def _engine_batch(plan: _Plan, values: _Maybe) -> list[Tensor]:
    """Run the engine on a batch of gradients that torch.autograd.grad made, as a stack."""
    level = current_level()
    plain = unbatched(values, level)
    dims = [0 if is_batch(value) else None for value in values]
    size = next(len(p) for p, dim in zip(plain, dims, strict=True) if p is not None and dim == 0)
    stacked_plan, stacked = _stack(size, dims, plan, plain, _FRONT)
    return [
        torch._add_batch_dim(grad, 0, level) for grad in _run_stack_backward(stacked_plan, stacked)
    ]


class _LayerBackward(torch.autograd.Function):
    """Gradients of a layer: those that `plan.wanted` names, in a stack one of each model."""

    @staticmethod
    def forward(plan: _Plan, *values: Tensor | None) -> tuple[Tensor, ...]:
        run = _run_stack_backward if plan.models else _run_one_backward
        return run(plan, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plan, *values = inputs
        ctx.save_for_backward(*values)

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: _Plan, *values: Tensor | None) -> tuple[Any, Any]:
        size, dims = info.batch_size, in_dims[1:]
        is_cut = plan.is_cut(values[_FRONT:])
        is_stack = (
            is_cut
            or any(plan.wanted[_WEIGHTS:])
            or any(dim is not None for dim in dims[_FRONT + _WEIGHTS :])
            # Then forward was a stack.
            or dims[_FRONT - 1] is not None
        )
        mapped_plan, mapped = (_stack if is_stack else _fold)(size, dims, plan, values, _FRONT)
        found = _LayerBackward.apply(mapped_plan, *mapped)  # type: ignore[no-untyped-call]
        return _unmapped(found, size, plan, is_stack)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, values = ctx.plan, ctx.saved_tensors
        # What is kept is what the layer makes of the others; so is the output, but where it stands in
        # for the states it leads back to the layer, and is differentiated by the engine.
        apart = (_RESERVE,) if plan.knows_states(values) else (_OUTPUT, _RESERVE)
        asked = [
            index
            for index, need in enumerate(ctx.needs_input_grad[1:])
            if need and index not in apart
        ]

        def found(*grads: Tensor) -> tuple[Tensor, ...]:
            gradients = _again(plan, values, asked)
            return _pulled_back(gradients, [values[index] for index in asked], grads)

        return None, *_replaced([None] * len(values), asked, over_batches(found, grads))


def _replaced(values: _Maybe, places: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """Return the values with others at some places."""
    replaced = list(values)
    for place, value in zip(places, new, strict=True):
        replaced[place] = value
    return replaced


# torch asks for the signature in each call, and would find it anew each time.
for _function in (_Layer, _LayerBackward):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[attr-defined]


# ---- the two ways in which a dimension is mapped ----


def _fold(
    size: int, dims: Sequence[int | None], plan: _Plan, values: _Maybe, front: int
) -> tuple[_Plan, list[Tensor | None]]:
    """Make of each row `size` neighbours; `front` values stand before a call's tensors."""

    def folded(index: int, value: Tensor | None, dim: int | None) -> Tensor | None:
        if value is None or index >= front + _WEIGHTS:
            return value
        if index == front:
            return value * size  # batch_sizes
        # Rows are the last dimension of lengths and resets, and elsewhere the one before it.
        rows = -1 if front <= index < front + _FLAGS else -2
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


def _stack(
    size: int, dims: Sequence[int | None], plan: _Plan, values: _Maybe, front: int
) -> tuple[_Plan, list[Tensor | None]]:
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


def _unmapped(
    found: Sequence[Tensor], size: int, plan: _Plan, is_stack: bool
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


def _run_one(plan: _Plan, tensors: _Maybe) -> tuple[Tensor, ...]:
    """Run a layer by its operator."""
    call = plan.call(tensors)
    output, h_n, c_n, cells, reserve = torch.ops.ostinato.layer(*call, plan.all_c, plan.keep)
    if plan.keep and not call.is_cut:
        reserve = reserve.view(_kept_shape(output, len(h_n), reserve.numel()))
    return _present(plan, output, h_n, c_n, cells, reserve)


def _kept_shape(output: Tensor, directions: int, count: int) -> tuple[int, int, int]:
    """Return the shape of what is kept for each direction and row."""
    rows = output.shape[:-1].numel()
    return directions, rows, count // max(directions * rows, 1)


def _present(
    plan: _Plan, output: Tensor, h_n: Tensor, c_n: Tensor, cells: Tensor, reserve: Tensor
) -> tuple[Tensor, ...]:
    """Leave out what a cell, or a call, does not have."""
    if plan.config[0] != "lstm":
        return output, h_n, reserve
    return (output, h_n, c_n, cells, reserve) if plan.all_c else (output, h_n, c_n, reserve)


def _run_one_backward(plan: _Plan, values: _Maybe) -> tuple[Tensor, ...]:
    """Run the gradient of a layer by its operator."""
    *grads, output, reserve = values[:_FRONT]
    assert reserve is not None
    wanted = list(plan.wanted[_FLAGS:])
    call = plan.call(values[_FRONT:])
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


def _first_call(plan: _Plan, tensors: _Maybe, stacked: Sequence[bool]) -> tuple[Call, Sizes]:
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
    arrays: _Arrays, call: Call, sizes: Sizes, tensors: _Maybe, stacked: Sequence[bool]
) -> None:
    pairs = list(zip(tensors, stacked, strict=True))
    _, lengths, resets, *states = pairs[:_WEIGHTS]
    for pair in (*states[:3], lengths, resets, *states[3:]):
        arrays.add(*pair)
    arrays.add_weights(call, sizes, pairs[_WEIGHTS:])


def _run_stack(plan: _Plan, tensors: _Maybe) -> tuple[Tensor, ...]:
    """Run each model of a stack."""
    call, sizes = _first_call(plan, tensors, plan.stacked)
    input, models, directions = call.input, plan.models, sizes.directions
    has_cell = call.cell == "lstm"
    dtype = DTYPES[input.dtype]
    output = input.new_empty((models, *input.shape[:-1], directions * sizes.output))
    h_n = input.new_empty((models, directions, sizes.batch, sizes.output))
    c_n = input.new_empty((models, directions, sizes.batch, sizes.hidden) if has_cell else (0,))
    cells = output.new_empty(
        (*output.shape[:-1], directions * sizes.hidden) if plan.all_c else (0,)
    )
    reserve = input.new_empty((0,), dtype=torch.uint8)
    if plan.keep:
        kept = _core.reserve_bytes(CELLS[call.cell], dtype, sizes, call.recompute)
        if call.is_cut:
            # What stands for steps that are not taken is nobody's, but this is to be a function of
            # the inputs.
            reserve = reserve.new_zeros((models, kept))
        else:
            reserve = reserve.new_empty((models, *_kept_shape(output[0], directions, kept)))
    arrays = _Arrays()
    _add_inputs(arrays, call, sizes, tensors, plan.stacked)
    present = (True, True, has_cell, plan.all_c, plan.keep)
    for result, is_there in zip((output, h_n, c_n, cells, reserve), present, strict=True):
        arrays.add(result if is_there else None, True)
    _core.layers_forward(
        CELLS[call.cell],
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


def _run_stack_backward(plan: _Plan, values: _Maybe) -> tuple[Tensor, ...]:
    """Run the gradient of each model of a stack."""
    tensors, stacked = values[_FRONT:], plan.stacked[_FRONT:]
    call, sizes = _first_call(plan, tensors, stacked)
    front = list(zip(values[:_FRONT], plan.stacked[:_FRONT], strict=True))
    dy, dh_n, dc_n, dcells, output, reserve = (
        tensor[0] if tensor is not None and is_stacked else tensor for tensor, is_stacked in front
    )
    assert output is not None
    assert reserve is not None
    kept = reserve.contiguous().view(-1)
    wanted = list(plan.wanted[_FLAGS:])
    check_backward(
        call, sizes, (dy, dh_n, dc_n, dcells), output, kept, wanted, reserve_bytes(call, sizes)
    )
    arrays = _Arrays()
    for index, pair in enumerate(front):
        # c has no gradient where there is none.
        arrays.add(*((None, False) if index in (2, 3) and call.cell != "lstm" else pair))
    _add_inputs(arrays, call, sizes, tensors, stacked)
    found = [
        call.input.new_empty((plan.models, *first.shape)) if want and first is not None else None
        for first, want in zip(call.tensors(), wanted, strict=True)
    ]
    for grad in found[: _WEIGHTS - _FLAGS]:
        arrays.add(grad, True)
    arrays.add_weights(call, sizes, [(grad, True) for grad in found[_WEIGHTS - _FLAGS :]])
    _core.layers_backward(
        CELLS[call.cell],
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


# ---- derivatives of both ----


def _tangents(plan: _Plan, values: _Maybe, moves: _Maybe) -> tuple[Tensor, ...]:
    """Return how the results of `_Layer` move, but for what it keeps.

    Args:
        plan: of the layer.
        values: output, c at every step of an LSTM, and what the layer takes.
        moves: how that moves.
    """

    def of_one(*values: Any) -> tuple[Tensor, ...]:
        values, moves = values[:count], values[count:]
        y, cells, *tensors = values
        found = tangents(plan.call(tensors), y, cells, moves[_FLAGS:])
        return tuple(t for t in found if t is not None)

    count = len(values)
    if not plan.models:
        return of_one(*values, *moves)
    is_stacked = True, True, *plan.stacked, *plan.stacked
    dims = tuple(
        0 if value is not None and stacked else None
        for value, stacked in zip((*values, *moves), is_stacked, strict=True)
    )
    return torch.func.vmap(of_one, in_dims=dims)(*values, *moves)  # type: ignore[no-any-return]


def _again(plan: _Plan, values: _Maybe, asked: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
    """Return what `_LayerBackward` does as a function of some values that any transform sees."""

    def of_one(*values: Any) -> tuple[Tensor, ...]:
        grads, tensors = values[: _FRONT - 2], values[_FRONT:]
        call = plan.call(tensors)
        output, cells = values[_OUTPUT], None
        if call.cell == "lstm":
            output, _, _, cells = run(call, all_c=True)
        found = adjoint_gradients(call, output, cells, grads, plan.wanted[_FLAGS:])
        return tuple(grad for grad in found if grad is not None)

    def function(*chosen: Any) -> tuple[Tensor, ...]:
        replaced = _replaced(values, asked, chosen)
        # Backward may stand in a region of autocast that forward did not see.
        with without_autocast(replaced[_FRONT + _FLAGS]):
            if plan.is_cut(values[_FRONT:]):
                return _reference_gradients(plan, replaced)
            if not plan.models:
                return of_one(*replaced)
            dims = tuple(
                0 if value is not None and stacked else None
                for value, stacked in zip(replaced, plan.stacked, strict=True)
            )
            return torch.func.vmap(of_one, in_dims=dims)(*replaced)  # type: ignore[no-any-return]

    return function


# ---- the reference ----


def _reference_gradients(plan: _Plan, values: _Maybe) -> tuple[Tensor, ...]:
    """Return what `_LayerBackward` does, from the reference: any transform sees through it."""
    grads, tensors = values[: _FRONT - 2], values[_FRONT:]
    asked = [index for index, want in enumerate(plan.wanted) if want]
    stacked = list(plan.stacked[_FRONT:])

    def of_each_model(index: int) -> Any:
        value = values[index]
        assert value is not None
        if not plan.models or plan.stacked[index]:
            return value
        return value.expand(plan.models, *value.shape)

    def results_of_one(*tensors: Any) -> tuple[Tensor, ...]:
        found = reference_results(plan.call(tensors), plan.all_c)
        pairs = zip(found, grads, strict=True)
        return tuple(r for r, grad in pairs if r is not None and grad is not None)

    def results(*chosen: Tensor) -> tuple[Tensor, ...]:
        arguments = _replaced(tensors, asked, chosen)
        if not plan.models:
            return results_of_one(*arguments)
        # One that is asked for belongs to each model, so that each has a gradient of it.
        dims = tuple(
            0 if value is not None and (index in asked or stacked[index]) else None
            for index, value in enumerate(tensors)
        )
        return torch.func.vmap(results_of_one, in_dims=dims)(*arguments)

    cotangents = tuple(of_each_model(i) for i, grad in enumerate(grads) if grad is not None)
    return _pulled_back(results, [of_each_model(_FRONT + index) for index in asked], cotangents)


def _pulled_back(
    function: Callable[..., tuple[Tensor, ...]],
    primals: Sequence[Tensor],
    cotangents: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Return the gradients of a function's arguments under any transform."""
    if is_active():
        return torch.func.vjp(function, *primals)[1](cotangents)  # type: ignore[no-any-return]
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: these derivatives stop at these arguments, higher ones go on; but not through what
        # a transform left behind that has ended.
        views = [primal.view_as(primal) for primal in primals]
        aliases = [v if v.requires_grad else v.detach().requires_grad_() for v in views]
        pairs = zip(function(*aliases), cotangents, strict=True)
        moving = [(result, grad) for result, grad in pairs if result.requires_grad]
        if not moving:
            return tuple(map(torch.zeros_like, primals))
        results, grads = zip(*moving, strict=True)
        options = {"create_graph": higher, "materialize_grads": True}
        return torch.autograd.grad(results, aliases, grads, **options)
