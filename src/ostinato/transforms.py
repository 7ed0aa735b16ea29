"""What torch.func and autograd make of a layer: rules for vmap, gradients and forward mode.

torch.func asks an autograd.Function for its rules. There are two, a layer and its gradient, and a
mapped dimension enters either in one of two ways:

- as rows, where weights are not mapped and no element has a gradient of its own: each row becomes V
  neighbours, and the engine runs once;
- as an ensemble, elsewhere: the engine runs once for each of V models, in one call that spreads
  them over the threads. An array that all models share has no dimension for them.

Both can be mapped again (`ostinato.ensembles`). Forward mode, and a gradient that is differentiated
once more, take the engine's states and look at all steps at once (`ostinato.adjoint`); where rows
are cut, they are the reference's.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step (proj_size, or H),
D directions, V models of an ensemble, or elements of a mapped dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType

from ostinato import arrays
from ostinato.adjoint import autograd_alone, tangents
from ostinato.adjoint import gradients as adjoint_gradients
from ostinato.batches import current_level, is_batch, over_batches, unbatched
from ostinato.call import Call, Results
from ostinato.ensembles import (
    Maybe,
    Plan,
    by_rows,
    ensemble,
    fold,
    replaced,
    run,
    run_backward,
    unmapped,
)
from ostinato.levels import apply
from ostinato.reference_backend import results as reference_results
from ostinato.tensors import is_wrapped, without_autocast

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


def why_not(call: Call) -> str | None:
    """Say why the rules do not serve a call of an engine's dtype under the transforms at work."""
    if not is_active():
        return "no transform of torch.func is at work, and no forward mode"
    if call.input.device.type != "cpu":
        return "the engine under the rules is the CPU's"
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack():
        return "a tracer or mode looks on"
    if _is_forward_mode() and (call.is_cut or call.kind.is_own):
        return "forward mode has no rule for rows that are cut, nor for own cells"
    if any(kind not in _KINDS for kind in _transforms()):
        return "torch.func.functionalize, or another transform without a rule, is at work"
    if any(
        type(_unwrapped(t)).__torch_dispatch__ is not Tensor.__torch_dispatch__
        for t in call.tensors()
        if t is not None
    ):
        return "another class of tensors is below the transforms"
    return None


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


def layer(call: Call) -> Results:
    """Run by the rules a layer that was checked and that `why_not` does not refuse.

    Example:
        >>> weights = list(torch.nn.GRUCell(3, 4).parameters())
        >>> def output(x):
        ...     call = Call(x, None, 2, (None,), weights, "gru", True, False, reset_to=(None,))
        ...     return layer(call).output
        >>> torch.func.vmap(output)(torch.zeros(6, 5, 2, 3)).shape
        torch.Size([6, 5, 2, 4])
    """
    # Each transform knows of its own gradients alone.
    gradients = tuple(kind == TransformType.Grad for kind in _transforms())
    keep = any(gradients) or (
        torch.is_grad_enabled()
        and any(t is not None and _unwrapped(t).requires_grad for t in call.tensors())
    )
    # What tangents are made of.
    form = call.bare()._replace(all_states=call.all_states or _is_forward_mode())
    *found, _ = apply(_Layer, Plan(form, keep, gradients), *call.arrays())
    results = Results.of(found, len(form.initial))
    return results if call.all_states else results._replace(every=())


def gradients(
    call: Call,
    arrived: Results,
    output: Tensor,
    reserve: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiate a call of the engine: gradients of any order, and of batches of gradients.

    At least one gradient has arrived. `output` and `reserve` are what the engine returned; reserve
    may be None where it kept nothing. `wanted` has a flag for each of `call.tensors()`, and the
    result is None where it is False.
    """
    flags = tuple(bool(w) and t is not None for w, t in zip(wanted, call.tensors(), strict=True))
    is_asked = any(grad is not None for grad in arrived.every)
    plan = Plan(call.bare()._replace(all_states=is_asked), True, (), wanted=flags)
    kept = output.new_empty((0,), dtype=torch.uint8) if reserve is None else reserve
    if not call.is_cut:
        kept = by_rows(call, output, kept)
    found = iter(_apply_backward(plan, [*arrived.flat(), output, kept, *call.arrays()]))
    return [next(found) if flag else None for flag in flags]


def _transforms() -> list[Any]:
    """List what kinds of transforms are at work."""
    innermost = _peek_transform()
    if innermost is None:
        return []
    if innermost.level() == 1:
        return [innermost.key()]  # sooner than the list
    return [level.key() for level in _functorch.get_interpreter_stack() or ()]


def _has_rule(call: Call) -> bool:
    """Whether `ostinato.adjoint` knows the steps of a call."""
    return not (call.is_cut or call.kind.is_own)


def _is_forward_mode() -> bool:
    return _forward_ad._current_level >= 0 or TransformType.Jvp in _transforms()


def _unwrapped(tensor: Tensor) -> Tensor:
    """Return what is below all transforms."""
    while is_wrapped(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


# ---- a layer ----


class _Layer(torch.autograd.Function):
    """A layer. Returns its results, and what is kept for backward."""

    @staticmethod
    def forward(plan: Plan, *values: Tensor | None) -> tuple[Tensor, ...]:
        return run(plan, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plan, *values = inputs
        *found, reserve = output
        ctx.mark_non_differentiable(reserve)
        ctx.set_materialize_grads(False)
        results = Results.of(found, len(ctx.plan.form.initial))
        ctx.save_for_backward(results.output, reserve, *values)
        if _has_rule(ctx.plan.call(values)):
            ctx.save_for_forward(results.output, *results.every, *values)

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: Plan, *values: Tensor | None) -> tuple[Any, Any]:
        (_, *dims), call = in_dims, plan.call(values)
        below = len(_transforms())
        is_ensemble = (
            any(dim is not None for dim in plan.call(dims).weights)
            # What a call with lengths keeps is in the order of these; resets go the same way.
            or (plan.keep and call.is_cut)
            # Each element is to have a gradient of its own, of weights as well.
            or any(plan.gradients[below + 1 :])
        )
        mapped_plan, mapped = (ensemble if is_ensemble else fold)(
            info.batch_size, dims, plan, values, call.table()
        )
        found = apply(_Layer, mapped_plan, *mapped)
        if plan.keep:
            return unmapped(found, info.batch_size, plan, is_ensemble)
        *results, reserve = found
        results, places = unmapped(results, info.batch_size, plan, is_ensemble)
        return (*results, reserve), (*places, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        y, reserve, *values = ctx.saved_tensors  # read once: a checkpoint recomputes each time
        plan: Plan = ctx.plan
        call = plan.call(values)
        _, *needs = ctx.needs_input_grad
        wanted = tuple(
            bool(want) and tensor is not None
            for want, tensor in zip(plan.call(needs).tensors(), call.tensors(), strict=True)
        )
        *arrived, _ = grads
        if not any(wanted) or all(grad is None for grad in arrived):
            return None, *[None] * len(values)
        if not plan.keep:
            raise RuntimeError("backward: expected a forward call that kept what it needs")
        results = Results.of(arrived, len(plan.form.initial))
        if not results.every:
            results = results._replace(every=(None,) * (len(results.last) - 1))
        front = [*results.flat(), y, reserve]
        shared = plan.per_model or (False,) * len(values)
        per_model = (bool(plan.models),) * len(front) + shared
        found = iter(
            _apply_backward(replace(plan, per_model=per_model, wanted=wanted), [*front, *values])
        )
        gradients = [next(found) if want else None for want in wanted]
        if plan.models:
            # The models of an ensemble have each a gradient of what they share.
            gradients = [
                g.sum(0) if g is not None and not is_per_model else g
                for g, is_per_model in zip(gradients, plan.call(shared).tensors(), strict=True)
            ]
        return None, *plan.form.with_tensors(gradients).arrays()

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
    front = plan.taken(values).front()
    if not torch.is_grad_enabled() and any(map(is_batch, front)) and not plan.models:
        return _engine_batch(plan, values)
    found: Sequence[Tensor] = over_batches(
        lambda *values: apply(_LayerBackward, plan, *values),
        values,
    )
    return found


def _table(plan: Plan) -> tuple[arrays.Array, ...]:
    return arrays.backward_arguments(len(plan.form.initial), len(plan.form.weights))


def _engine_batch(plan: Plan, values: Maybe) -> list[Tensor]:
    """Run the engine on a batch of gradients that torch.autograd.grad made, as an ensemble."""
    level = current_level()
    plain = unbatched(values, level)
    dims = [0 if is_batch(value) else None for value in values]
    size = next(len(p) for p, dim in zip(plain, dims, strict=True) if p is not None and dim == 0)
    mapped_plan, per_model = ensemble(size, dims, plan, plain, _table(plan))
    return [torch._add_batch_dim(grad, 0, level) for grad in run_backward(mapped_plan, per_model)]


class _LayerBackward(torch.autograd.Function):
    """Gradients of a layer: those that `plan.wanted` names, in an ensemble one of each model."""

    @staticmethod
    def forward(plan: Plan, *values: Tensor | None) -> tuple[Tensor, ...]:
        return run_backward(plan, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.plan, *values = inputs
        ctx.save_for_backward(*values)

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: Plan, *values: Tensor | None) -> tuple[Any, Any]:
        _, *dims = in_dims
        mapped_dims = plan.taken(dims)
        is_ensemble = (
            plan.call(plan.taken(values).arrays).is_cut
            or any(plan.form.parts(plan.wanted).weights)
            or any(dim is not None for dim in plan.call(mapped_dims.arrays).weights)
            # Then forward was an ensemble.
            or mapped_dims.reserve is not None
        )
        mapped_plan, mapped = (ensemble if is_ensemble else fold)(
            info.batch_size, dims, plan, values, _table(plan)
        )
        found = apply(_LayerBackward, mapped_plan, *mapped)
        return unmapped(found, info.batch_size, plan, is_ensemble)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, values = ctx.plan, ctx.saved_tensors
        taken = plan.taken(range(len(values)))
        call = plan.call(plan.taken(values).arrays)
        # What is kept is what the layer makes of the others. So is the output; but where it is all
        # states, it leads back to the layer, whose gradient is the engine's.
        knows_states = len(call.initial) == 1 and _has_rule(call)
        apart = (taken.reserve,) if knows_states else (taken.output, taken.reserve)
        _, *needs = ctx.needs_input_grad
        asked = [index for index, need in enumerate(needs) if need and index not in apart]

        def found(*grads: Tensor) -> tuple[Tensor, ...]:
            gradients = _again(plan, values, asked)
            return _pulled_back(gradients, [values[index] for index in asked], grads)

        return None, *replaced([None] * len(values), asked, over_batches(found, grads))


# ---- derivatives of both ----


def _tangents(plan: Plan, values: Maybe, moves: Maybe) -> tuple[Tensor, ...]:
    """Return how the results of `_Layer` move, but for what it keeps.

    `values` are output, c at every step of an LSTM, and what the layer takes; `moves` says how what
    the layer takes moves.
    """

    def of_one(*values: Any) -> tuple[Tensor, ...]:
        y, *rest = values[:count]
        every, given = tuple(rest[: -len(moves)]), rest[-len(moves) :]
        moved = plan.call(values[count:]).tensors()
        found = tangents(plan.call(given), y, every, moved)
        return tuple(t for t in found.flat() if t is not None)

    count = len(values)
    if not plan.models:
        return of_one(*values, *moves)
    per_model = *[True] * (count - len(moves)), *plan.per_model, *plan.per_model
    return _of_models(of_one, (*values, *moves), per_model)


def _of_models(
    function: Callable[..., tuple[Tensor, ...]], values: Maybe, per_model: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Call a function of one model's values on those of an ensemble."""
    dims = tuple(
        0 if value is not None and is_per_model else None
        for value, is_per_model in zip(values, per_model, strict=True)
    )
    return torch.func.vmap(function, in_dims=dims)(*values)


def _again(plan: Plan, values: Maybe, asked: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
    """Return what `_LayerBackward` does as a function of some values that any transform sees."""

    def of_one(*values: Any) -> tuple[Tensor, ...]:
        taken = plan.taken(values)
        call, output, every = plan.call(taken.arrays), taken.output, ()
        if len(call.initial) > 1:
            output, _, every = layer(call._replace(all_states=True))
        found = adjoint_gradients(call, output, every, taken.arrived, plan.wanted)
        return tuple(grad for grad in found if grad is not None)

    def function(*chosen: Any) -> tuple[Tensor, ...]:
        arguments = replaced(values, asked, chosen)
        call = plan.call(plan.taken(arguments).arrays)
        # Backward may stand in a region of autocast that forward did not see.
        with without_autocast(call.input):
            if not _has_rule(call):
                return _reference_gradients(plan, arguments)
            if not plan.models:
                return of_one(*arguments)
            return _of_models(of_one, arguments, plan.per_model)

    return function


# ---- the reference ----


def _reference_gradients(plan: Plan, values: Maybe) -> tuple[Tensor, ...]:
    """Return what `_LayerBackward` does, from the reference: any transform sees through it."""
    taken = plan.taken(values)
    flags = plan.taken(plan.per_model or (False,) * len(values))
    wanted = plan.form.with_tensors(plan.wanted).arrays()
    asked = [index for index, want in enumerate(wanted) if want]

    def of_each_model(value: Tensor | None, is_per_model: bool) -> Any:
        assert value is not None
        if not plan.models or is_per_model:
            return value
        return value.expand(plan.models, *value.shape)

    def results_of_one(*values: Any) -> tuple[Tensor, ...]:
        found = reference_results(plan.call(values))
        pairs = zip(found.flat(), taken.arrived.flat(), strict=False)
        return tuple(result for result, grad in pairs if grad is not None)

    def results(*chosen: Tensor) -> tuple[Tensor, ...]:
        arguments = replaced(taken.arrays, asked, chosen)
        if not plan.models:
            return results_of_one(*arguments)
        # One that is asked for belongs to each model, so that each has a gradient of it.
        per_model = [index in asked or flag for index, flag in enumerate(flags.arrays)]
        return _of_models(results_of_one, arguments, per_model)

    arrived = zip(taken.arrived.flat(), flags.arrived.flat(), strict=True)
    cotangents = tuple(of_each_model(t, f) for t, f in arrived if t is not None)
    primals = [of_each_model(taken.arrays[k], flags.arrays[k]) for k in asked]
    return _pulled_back(results, primals, cotangents)


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
