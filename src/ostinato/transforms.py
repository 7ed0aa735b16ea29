"""What torch.func and autograd make of a layer: rules for vmap, gradients and forward mode.

torch.func asks an autograd.Function for its rules. There are two, a layer and its gradient, and a
mapped dimension enters either in one of two ways:

- as rows, where weights are not mapped and no element has a gradient of its own: each row becomes V
  neighbours, and the engine runs once;
- as a stack, elsewhere: the engine runs once for each of V models, in one call that spreads them
  over the threads. An array that all models share has no dimension for them.

Both can be mapped again (`ostinato.stacks`). Forward mode, and a gradient that is differentiated
once more, take the engine's states and look at all steps at once (`ostinato.adjoint`); where rows
are cut, they are the reference's.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step (proj_size, or H),
D directions, V models of a stack, or elements of a mapped dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType

from ostinato.adjoint import (
    autograd_alone,
    current_level,
    is_batch,
    over_batches,
    tangents,
    unbatched,
)
from ostinato.adjoint import gradients as adjoint_gradients
from ostinato.call import (
    Call,
    is_wrapped,
    without_autocast,
)
from ostinato.gradients import Results, reference_results
from ostinato.levels import apply
from ostinato.stacks import (
    FLAGS,
    FRONT,
    OUTPUT,
    RESERVE,
    WEIGHTS,
    Maybe,
    Plan,
    fold,
    kept_shape,
    replaced,
    run_one,
    run_one_backward,
    run_stack,
    run_stack_backward,
    stack,
    unmapped,
)

_functorch = torch._C._functorch
_peek_transform = _functorch.peek_interpreter_stack
_forward_ad = torch.autograd.forward_ad

_GRAD = TransformType.Grad
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
    if _forward_ad._current_level >= 0:  # those of torch.func count, too
        return True
    kinds = _transforms()
    return bool(kinds) and TransformType.Vmap not in kinds


def is_one_gradient() -> bool:
    """Whether one torch.func.grad, or one of its kind, is all that is at work."""
    innermost = None if torch.compiler.is_compiling() else _peek_transform()
    return (
        innermost is not None
        and innermost.level() == 1
        and innermost.key() == _GRAD
        and _forward_ad._current_level < 0
    )


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
    has_c = call.kind.has_c and (all_c or _is_forward_mode())  # what tangents are made of
    plan = Plan(call[2], call[6:10], has_c, keep, gradients)
    tensors = call.batch_sizes, call.lengths, call.resets, *call.tensors()
    *found, _ = apply(_Layer, plan, *tensors)
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
    has_c = arrived[3] is not None
    plan = Plan(call[2], call[6:10], has_c, True, (), wanted=(False,) * FLAGS + flags)
    if reserve is None:
        kept = output.new_empty((0,), dtype=torch.uint8)
    else:
        kept = reserve.view(torch.uint8)  # the short way has numbers of the input's dtype
    if not call.is_cut:
        kept = kept.view(kept_shape(output, 2 if call.bidirectional else 1, kept.numel()))
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
        None if g is None else g[(0,) * missing] if k < WEIGHTS - FLAGS else g
        for k, g in enumerate(found)
    ]


def _transforms() -> list[Any]:
    """List what kinds of transforms are at work."""
    innermost = _peek_transform()
    if innermost is None:
        return []
    if innermost.level() == 1:
        return [innermost.key()]  # sooner than the list
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
    def forward(plan: Plan, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return run_stack(plan, tensors) if plan.models else run_one(plan, tensors)

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
    def vmap(info: Any, in_dims: Any, plan: Plan, *tensors: Tensor | None) -> tuple[Any, Any]:
        size, dims = info.batch_size, in_dims[1:]
        is_cut = plan.is_cut(tensors)
        below = len(_transforms())
        is_stack = (
            any(dim is not None for dim in dims[WEIGHTS:])
            # What a call with lengths keeps is in the order of these; resets go the same way.
            or (plan.keep and is_cut)
            # Each element is to have a gradient of its own, of weights as well.
            or any(plan.gradients[below + 1 :])
        )
        mapped_plan, mapped = (stack if is_stack else fold)(size, dims, plan, tensors, 0)
        found = apply(_Layer, mapped_plan, *mapped)
        if plan.keep:
            return unmapped(found, size, plan, is_stack)
        results, places = unmapped(found[:-1], size, plan, is_stack)
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
        plan = replace(plan, stacked=(bool(plan.models),) * FRONT + shared, wanted=wanted)
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
                None if t is None else _forward_ad.unpack_dual(t).primal  # type: ignore[no-untyped-call]
                for t in ctx.saved_tensors
            ]
            return *_tangents(ctx.plan, values, moves), None


def _apply_backward(plan: Plan, values: Maybe) -> Sequence[Tensor]:
    """Return the gradients that the plan names, so that they can be differentiated."""
    if _is_forward_mode():
        return _again(plan, values, ())()
    if not torch.is_grad_enabled() and any(map(is_batch, values[:FRONT])) and not plan.models:
        return _engine_batch(plan, values)
    found: Sequence[Tensor] = over_batches(
        lambda *values: apply(_LayerBackward, plan, *values),
        values,
    )
    return found


def _engine_batch(plan: Plan, values: Maybe) -> list[Tensor]:
    """Run the engine on a batch of gradients that torch.autograd.grad made, as a stack."""
    level = current_level()
    plain = unbatched(values, level)
    dims = [0 if is_batch(value) else None for value in values]
    size = next(len(p) for p, dim in zip(plain, dims, strict=True) if p is not None and dim == 0)
    stacked_plan, stacked = stack(size, dims, plan, plain, FRONT)
    return [
        torch._add_batch_dim(grad, 0, level) for grad in run_stack_backward(stacked_plan, stacked)
    ]


class _LayerBackward(torch.autograd.Function):
    """Gradients of a layer: those that `plan.wanted` names, in a stack one of each model."""

    @staticmethod
    def forward(plan: Plan, *values: Tensor | None) -> tuple[Tensor, ...]:
        run = run_stack_backward if plan.models else run_one_backward
        return run(plan, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plan, *values = inputs
        ctx.save_for_backward(*values)

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: Plan, *values: Tensor | None) -> tuple[Any, Any]:
        size, dims = info.batch_size, in_dims[1:]
        is_cut = plan.is_cut(values[FRONT:])
        is_stack = (
            is_cut
            or any(plan.wanted[WEIGHTS:])
            or any(dim is not None for dim in dims[FRONT + WEIGHTS :])
            # Then forward was a stack.
            or dims[FRONT - 1] is not None
        )
        mapped_plan, mapped = (stack if is_stack else fold)(size, dims, plan, values, FRONT)
        found = apply(_LayerBackward, mapped_plan, *mapped)
        return unmapped(found, size, plan, is_stack)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, values = ctx.plan, ctx.saved_tensors
        # What is kept is what the layer makes of the others. So is the output; but where it is all
        # states, it leads back to the layer, whose gradient is the engine's.
        apart = (RESERVE,) if plan.knows_states(values) else (OUTPUT, RESERVE)
        asked = [
            index
            for index, need in enumerate(ctx.needs_input_grad[1:])
            if need and index not in apart
        ]

        def found(*grads: Tensor) -> tuple[Tensor, ...]:
            gradients = _again(plan, values, asked)
            return _pulled_back(gradients, [values[index] for index in asked], grads)

        return None, *replaced([None] * len(values), asked, over_batches(found, grads))


# ---- derivatives of both ----


def _tangents(plan: Plan, values: Maybe, moves: Maybe) -> tuple[Tensor, ...]:
    """Return how the results of `_Layer` move, but for what it keeps.

    Args:
        plan: of the layer.
        values: output, c at every step of an LSTM, and what the layer takes.
        moves: how that moves.
    """

    def of_one(*values: Any) -> tuple[Tensor, ...]:
        values, moves = values[:count], values[count:]
        y, cells, *tensors = values
        found = tangents(plan.call(tensors), y, cells, moves[FLAGS:])
        return tuple(t for t in found if t is not None)

    count = len(values)
    if not plan.models:
        return of_one(*values, *moves)
    is_stacked = True, True, *plan.stacked, *plan.stacked
    dims = tuple(
        0 if value is not None and stacked else None
        for value, stacked in zip((*values, *moves), is_stacked, strict=True)
    )
    return torch.func.vmap(of_one, in_dims=dims)(*values, *moves)


def _again(plan: Plan, values: Maybe, asked: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
    """Return what `_LayerBackward` does as a function of some values that any transform sees."""

    def of_one(*values: Any) -> tuple[Tensor, ...]:
        grads, tensors = values[: FRONT - 2], values[FRONT:]
        call = plan.call(tensors)
        output, cells = values[OUTPUT], None
        if call.kind.has_c:
            output, _, _, cells = run(call, all_c=True)
        found = adjoint_gradients(call, output, cells, grads, plan.wanted[FLAGS:])
        return tuple(grad for grad in found if grad is not None)

    def function(*chosen: Any) -> tuple[Tensor, ...]:
        arguments = replaced(values, asked, chosen)
        # Backward may stand in a region of autocast that forward did not see.
        with without_autocast(arguments[FRONT + FLAGS]):
            if plan.is_cut(values[FRONT:]):
                return _reference_gradients(plan, arguments)
            if not plan.models:
                return of_one(*arguments)
            dims = tuple(
                0 if value is not None and stacked else None
                for value, stacked in zip(arguments, plan.stacked, strict=True)
            )
            return torch.func.vmap(of_one, in_dims=dims)(*arguments)

    return function


# ---- the reference ----


def _reference_gradients(plan: Plan, values: Maybe) -> tuple[Tensor, ...]:
    """Return what `_LayerBackward` does, from the reference: any transform sees through it."""
    grads, tensors = values[: FRONT - 2], values[FRONT:]
    asked = [index for index, want in enumerate(plan.wanted) if want]
    stacked = list(plan.stacked[FRONT:])

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
        arguments = replaced(tensors, asked, chosen)
        if not plan.models:
            return results_of_one(*arguments)
        # One that is asked for belongs to each model, so that each has a gradient of it.
        dims = tuple(
            0 if value is not None and (index in asked or stacked[index]) else None
            for index, value in enumerate(tensors)
        )
        return torch.func.vmap(results_of_one, in_dims=dims)(*arguments)

    cotangents = tuple(of_each_model(i) for i, grad in enumerate(grads) if grad is not None)
    return _pulled_back(results, [of_each_model(FRONT + index) for index in asked], cotangents)


def _pulled_back(
    function: Callable[..., tuple[Tensor, ...]],
    primals: Sequence[Tensor],
    cotangents: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Return the gradients of a function's arguments under any transform."""
    if not autograd_alone(*primals):
        return torch.func.vjp(function, *primals)[1](cotangents)  # type: ignore[no-any-return]
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: these derivatives stop at these arguments, higher ones go on, but not through
        # what a transform left behind that has ended.
        views = [primal.view_as(primal) for primal in primals]
        aliases = [v if v.requires_grad else v.detach().requires_grad_() for v in views]
        pairs = zip(function(*aliases), cotangents, strict=True)
        moving = [(result, grad) for result, grad in pairs if result.requires_grad]
        if not moving:
            return tuple(map(torch.zeros_like, primals))
        results, grads = zip(*moving, strict=True)
        options = {"create_graph": higher, "materialize_grads": True}
        return torch.autograd.grad(results, aliases, grads, **options)
