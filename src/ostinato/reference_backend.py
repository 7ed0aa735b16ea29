"""The reference as a backend: results of a call, and gradients that no engine computes.

Legend: T steps, B batch, I input, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ostinato import reference
from ostinato.call import Call, Results
from ostinato.tensors import check_call, without_autocast

_Maybe = Sequence[Tensor | None]


def results(call: Call) -> Results:
    """Run the reference on a call of a layer that was checked."""
    # The engines read lengths on the CPU; the reference compares them with what it computes.
    lengths = None if call.lengths is None else call.lengths.to(call.input.device)
    output, last, every = reference.states(
        call.cell,
        call.input,
        call.batch_sizes,
        call.initial,
        call.weights,
        has_biases=call.has_biases,
        bidirectional=call.bidirectional,
        lengths=lengths,
        resets=call.resets,
        reset_to=call.reset_to,
    )
    return Results(output, last, every if call.all_states else ())


def gradients(
    call: Call, arrived: Results, wanted: Sequence[bool], is_step: bool = False
) -> list[Tensor | None]:
    """Differentiate the reference: gradients of any order, and of batches of gradients.

    The call is that of a layer or a stack, or with `is_step` of a cell, whose input and states have
    no dimensions for steps and directions. `wanted` has a flag for each of `call.tensors()`.
    Returns the gradients, None where not wanted or zero.
    """
    run = _step_results if is_step else stack_results
    return _differentiated(lambda tensors: run(call.with_tensors(tensors)), call, arrived, wanted)


def _differentiated(
    run: Callable[[Sequence[Any]], Results], call: Call, arrived: Results, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Differentiate what `run` makes of tensors; again, where gradients are asked for."""
    higher = torch.is_grad_enabled()
    # Backward may stand in a region of autocast that forward did not see.
    is_autocast = torch._C._is_any_autocast_enabled()
    with torch.enable_grad(), without_autocast(call.input) if is_autocast else nullcontext():
        # Aliases: these derivatives stop at this call's arguments, higher ones go on.
        primals = [
            t.view_as(t) if t is not None and want else t
            for t, want in zip(call.tensors(), wanted, strict=True)
        ]
        pairs = [
            (result, grad)
            for result, grad in zip(run(primals).flat(), arrived.flat(), strict=False)
            if grad is not None and result.requires_grad
        ]
        asked = [p for p, want in zip(primals, wanted, strict=True) if want and p is not None]
        found: _Maybe = [None] * len(asked)
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


def _step_results(call: Call) -> Results:
    """Run one step on (B, I) or (I,) and (B, H) or (H,)."""
    shape = call.input.shape[:-1]

    def row(tensor: Tensor) -> Tensor:
        return tensor if shape else tensor.unsqueeze(0)

    rows = call.each_state(row)._replace(input=row(call.input))
    layer = rows.each_state(lambda state: state.unsqueeze(0))
    # What hooks of saved tensors return need not be what was saved.
    check_call(layer._replace(input=rows.input.unsqueeze(0), batch=len(rows.input)))
    states = reference.one_step(
        call.cell, rows.input, rows.initial, call.weights, has_biases=call.has_biases
    )
    h, *rest = (state if shape else state.squeeze(0) for state in states)
    # The output is h; there is no h_n beside it.
    return Results(h, (h, *rest))


def stack_results(call: Call, layer: Callable[[Call], Results] = results) -> Results:
    """Run a layer, or a stack of layers without dropout, each by `layer`."""
    output, last, every = call.input, [], ()
    for k in range(call.layers):
        one = call.of_layer(k, output)
        check_call(one)  # what hooks of saved tensors return need not be what was saved
        output, states, every = layer(one)
        last.append(states)
    if call.layers == 1:
        return Results(output, last[0], every)
    return Results(output, tuple(map(torch.cat, zip(*last, strict=True))))
