"""The reference in an engine's place: results of a call, and gradients that no engine computes.

Legend: T steps, B batch, I input, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ostinato import reference
from ostinato.call import Call, check, without_autocast

_functorch = torch._C._functorch

# output, h_n, c_n (LSTM only) and c at every step (if asked for)
Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def reference_results(call: Call, all_c: bool = False) -> Results:
    """Run the reference on a call.

    Args:
        call: of a layer.
        all_c: whether c is to be returned at every step.

    Returns:
        output, h_n, c_n or None, c at every step or None, as `ostinato.ops.cut_layer`.

    Example:
        >>> weights = list(torch.nn.GRUCell(3, 4).parameters())
        >>> call = Call(torch.zeros(5, 2, 3), None, 2, None, None, weights, "gru", True, False)
        >>> reference_results(call)[0].shape
        torch.Size([5, 2, 4])
    """
    # The engines read lengths on the CPU; the reference compares them with what it computes.
    lengths = None if call.lengths is None else call.lengths.to(call.input.device)
    found = reference.states(
        call.cell,
        call.input,
        call.batch_sizes,
        call.h_0,
        call.c_0,
        call.weights,
        has_biases=call.has_biases,
        bidirectional=call.bidirectional,
        lengths=lengths,
        resets=call.resets,
        reset_h=call.reset_h,
        reset_c=call.reset_c,
    )
    return found if all_c else (*found[:3], None)


def is_beyond_engine(grads: Sequence[Tensor | None]) -> bool:
    """Whether gradients are to be differentiated themselves, or are many at once (vmap)."""
    return torch.is_grad_enabled() or any(
        # torch.autograd.grad makes them of the one kind, torch.vmap of the other.
        grad is not None
        and (_functorch.is_legacy_batchedtensor(grad) or _functorch.is_batchedtensor(grad))
        for grad in grads
    )


def is_asked(ctx: Any, tensors: Sequence[Tensor | None]) -> list[bool]:
    """Say which gradients the backward that runs is to have.

    torch tells its own operators, a Function only which of its arguments could have one: in the
    gradient of one input those of the weights would be computed, and thrown away.

    Args:
        ctx: of an autograd.Function in its backward.
        tensors: all arguments that can be tensors, in order.

    Returns:
        An answer for each; False where there is no tensor.
    """
    edges = iter(ctx.next_functions)
    return [t is not None and _will_run(next(edges)[0]) for t in tensors]


def _will_run(node: Any) -> bool:
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # so it says of a leaf that torch.autograd.grad is to differentiate by
        return True


def reference_gradients(
    call: Call,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
    is_cell: bool = False,
) -> list[Tensor | None]:
    """Differentiate the reference: gradients of any order, and of batches of gradients.

    Args:
        call: of a layer, or with `is_cell` of a cell.
        grads: of output, h_n, c_n and c at every step.
        wanted: whether each of `call.tensors()` needs a gradient.
        is_cell: whether input and states have no dimensions for steps and directions.

    Returns:
        The gradients, None where not wanted or zero.
    """

    def run(primals: Sequence[Any]) -> Sequence[Tensor | None]:
        input, h_0, c_0, reset_h, reset_c, *weights = primals
        arguments = call._replace(
            input=input, h_0=h_0, c_0=c_0, weights=weights, reset_h=reset_h, reset_c=reset_c
        )
        if is_cell:
            return _reference_cell(arguments)
        check(arguments)  # what hooks of saved tensors return need not be what was saved
        return reference_results(arguments, grads[3] is not None)

    return _gradients(run, call.tensors(), grads, wanted)


def _gradients(
    run: Callable[[Sequence[Any]], Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiate what `run` makes of tensors; again, where gradients are asked for."""
    higher = torch.is_grad_enabled()
    # Backward may stand in a region of autocast that forward did not see.
    first = next(t for t in tensors if t is not None)
    is_autocast = torch._C._is_any_autocast_enabled()
    with torch.enable_grad(), without_autocast(first) if is_autocast else nullcontext():
        # Aliases: these derivatives stop at this call's arguments, higher ones go on.
        primals = [
            t.view_as(t) if t is not None and want else t
            for t, want in zip(tensors, wanted, strict=True)
        ]
        results = run(primals)
        pairs = [
            (result, grad)
            for result, grad in zip(results, grads, strict=True)
            if result is not None and grad is not None and result.requires_grad
        ]
        asked = [p for p, want in zip(primals, wanted, strict=True) if want and p is not None]
        found: Sequence[Tensor | None] = [None] * len(asked)
        if pairs and asked:
            found = torch.autograd.grad(
                [result for result, _ in pairs],
                asked,
                [grad for _, grad in pairs],
                create_graph=higher,
                allow_unused=True,
            )
    remaining = iter(found)
    return [
        next(remaining) if want and primal is not None else None
        for primal, want in zip(primals, wanted, strict=True)
    ]


def _reference_cell(call: Call) -> tuple[Tensor, None, Tensor | None, None]:
    """Run the reference on (B, I) or (I,) and (B, H) or (H,)."""
    shape = call.input.shape[:-1]

    def row(tensor: Tensor) -> Tensor:
        return tensor if shape else tensor.unsqueeze(0)

    input, h, c = row(call.input), *(s if s is None else row(s) for s in (call.h_0, call.c_0))
    h_0, c_0 = (None if state is None else state.unsqueeze(0) for state in (h, c))
    # what hooks of saved tensors return need not be what was saved
    check(call._replace(input=input.unsqueeze(0), batch=len(input), h_0=h_0, c_0=c_0))
    found = reference.one_step(call.cell, input, h, c, call.weights, has_biases=call.has_biases)
    output, c_n = (*(t if shape else t.squeeze(0) for t in found), None)[:2]
    return output, None, c_n, None


def differentiable_again(call: Call, results: Results, layers: int = 1) -> Results:
    """Make the reference stand in for gradients that torch's operator on a GPU does not have.

    cuDNN's gradients can be neither differentiated nor be many at once. Where that is asked for,
    none of them is computed.

    Args:
        call: of a layer without cuts, or of a stack: states and weights of its layers in order.
        results: of torch's operator, with its gradients.
        layers: how many.

    Returns:
        The same numbers, differentiable any number of times.

    Example:
        >>> layer, x = torch.nn.GRU(3, 4), torch.zeros(5, 2, 3, requires_grad=True)
        >>> call = Call(x, None, 2, None, None, list(layer.parameters()), "gru", True, False)
        >>> output, *_ = differentiable_again(call, (*layer(x), None, None))
        >>> (dx,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        >>> torch.autograd.grad(dx.sum(), x)[0].shape
        torch.Size([5, 2, 3])
    """
    there = [result for result in results if result is not None]
    options = call.batch, call[6:10], layers
    tensors = call.input, call.batch_sizes, call.h_0, call.c_0, *call.weights
    found = _Again.apply(options, len(there), *there, *tensors)  # type: ignore[no-untyped-call]
    output, h_n, c_n, cells = (*found, None, None)[:4]
    return output, h_n, c_n, cells


class _Again(torch.autograd.Function):
    """Passes results on, and their gradients to torch's operator or to the reference."""

    @staticmethod
    def forward(ctx: Any, options: Any, count: int, *tensors: Tensor | None) -> Any:
        # No views, which could not be changed in place, but tensors on the same memory. Of these
        # the operator's gradient reads the first.
        found = tuple(result.data for result in tensors[:count] if result is not None)
        ctx.save_for_backward(found[0], *tensors[count:])
        ctx.options, ctx.count = options, count
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, input, batch_sizes, h_0, c_0, *weights = ctx.saved_tensors
        if not is_beyond_engine(grads):
            return None, None, *grads, *[None] * (4 + len(weights))
        batch, config, layers = ctx.options

        def run(primals: Sequence[Any]) -> Sequence[Tensor | None]:
            input, h_0, c_0, *weights = primals
            call = Call(input, batch_sizes, batch, h_0, c_0, weights, *config)
            return _stack_results(call, layers)[: len(grads)]

        of_input, _, *of_rest = ctx.needs_input_grad[2 + ctx.count :]
        tensors, wanted = [input, h_0, c_0, *weights], [of_input, *of_rest]
        dx, *rest = _gradients(run, tensors, grads, wanted)
        return None, None, *[None] * ctx.count, dx, None, *rest


def _stack_results(call: Call, layers: int) -> Results:
    """Run the reference on a stack of layers without dropout."""
    count = len(call.weights) // layers
    h_0, c_0 = (
        [None] * layers if state is None else state.chunk(layers) for state in (call.h_0, call.c_0)
    )
    output, states = call.input, []
    for k in range(layers):
        weights = call.weights[k * count : (k + 1) * count]
        one = call._replace(input=output, h_0=h_0[k], c_0=c_0[k], weights=weights)
        check(one)  # what hooks of saved tensors return need not be what was saved
        output, h_n, c_n, _ = reference_results(one)
        states.append((h_n, c_n))
    h, c = zip(*states, strict=True)
    return output, torch.cat(h), None if c[0] is None else torch.cat(c), None
