"""The reference in an engine's place: results of a call, and gradients that no engine computes.

Legend: T steps, B batch, I input, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ostinato import reference
from ostinato.call import Call, check

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
    found = reference.states(
        call.cell,
        call.input,
        call.batch_sizes,
        call.h_0,
        call.c_0,
        call.weights,
        has_biases=call.has_biases,
        bidirectional=call.bidirectional,
        lengths=call.lengths,
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
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: these derivatives stop at this call's arguments, higher ones go on.
        primals: list[Any] = [None if t is None else t.view_as(t) for t in call.tensors()]
        input, h_0, c_0, reset_h, reset_c, *weights = primals
        arguments = call._replace(
            input=input, h_0=h_0, c_0=c_0, weights=weights, reset_h=reset_h, reset_c=reset_c
        )
        results: Sequence[Tensor | None]
        if is_cell:
            results = _reference_cell(arguments)
        else:
            check(arguments)  # what hooks of saved tensors return need not be what was saved
            results = reference_results(arguments, grads[3] is not None)
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
    lead = (1, 1) if call.input.dim() == 1 else (1,)
    h_0, c_0 = (None if t is None else t.reshape(*lead, *t.shape) for t in (call.h_0, call.c_0))
    input = call.input.reshape(*lead, *call.input.shape)
    layer_call = call._replace(input=input, batch=input.shape[1], h_0=h_0, c_0=c_0)
    check(layer_call)
    output, _, c_n, _ = reference_results(layer_call)
    shape = (*call.input.shape[:-1], output.shape[-1])
    return output.reshape(shape), None, None if c_n is None else c_n.reshape(shape), None
