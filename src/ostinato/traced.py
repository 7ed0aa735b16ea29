"""One node for each layer in a graph of torch.jit.trace, which decides as it runs.

A trace writes down what it sees: a number that Python read of a tensor is a constant for ever, and
so is a decision. `ostinato::layer` is told how many rows there are, and whether backward will
follow. So a trace gets other operators, as torch has them: `ostinato::gru` and its siblings, which
take tensors and the layer's own constants. They are composite: each run of the graph goes the
route again (`ostinato.route`), with all checks and with the choice of who runs it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ostinato import arrays, transforms
from ostinato.arrays import Option
from ostinato.call import Call, Results
from ostinato.cells import CELLS
from ostinato.tensors import batch_of, is_recorded, without_autocast

# What a node takes: all but what its name and the input say.
_PARAMETERS = [each for each in arrays.PARAMETERS if each.name not in ("batch", "cell")]


def why_not(call: Call) -> str | None:
    """Say why no node is written for a call."""
    if not is_recorded():
        return "it does not record"
    if call.cell not in CELLS:
        return "it has a node for each built-in cell alone"
    if transforms.is_active():
        return "a transform looks on"
    if torch.onnx.is_in_onnx_export():
        return "the exporter by TorchScript knows other nodes"
    return None


def layer(call: Call) -> Results:
    """Write down one layer, and run it."""
    named = call.named_parameters()
    given = [named[each.name] for each in _PARAMETERS]
    found = getattr(torch.ops.ostinato, call.cell)(*given, call.all_states)
    output, *states = found
    count = len(call.initial)
    last, every = states[:count], states[len(arrays.LAST) :][: count - 1]
    return Results(output, tuple(last), tuple(every) if call.all_states else ())


def define(library: torch.library.Library, run: Callable[[Call], Results]) -> None:
    """Define an operator for each cell.

    Each calls `run`, which is `ostinato.route.run`, whenever the graph runs.
    """
    results = [result for result in arrays.RESULTS if result is not arrays.RESERVE]
    for cell in CELLS:
        parameters = [*_PARAMETERS, Option("all_c")]
        library.define(arrays.schema(cell, parameters, results))  # type: ignore[no-untyped-call]
        kernel = functools.partial(_run, run, cell)
        library.impl(cell, kernel, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


def _run(run: Callable[[Call], Results], cell: str, *arguments: Any) -> tuple[Tensor, ...]:
    """Run a node as its module would run now. What there is not of the results is empty."""
    *given, all_c = arguments
    named = dict(zip((each.name for each in _PARAMETERS), given, strict=True))
    named.update(cell=cell, batch=0)
    call = Call.of(*(named[each.name] for each in arrays.PARAMETERS), all_states=all_c)
    with contextlib.ExitStack() as stack:
        if torch._C._is_any_autocast_enabled():
            # The module's cast is no part of a graph that was traced without autocast.
            stack.enter_context(without_autocast(call.input))
            dtype = call.weights[0].dtype
            call = call.each_state(lambda state: state.to(dtype))
            call = call._replace(input=call.input.to(dtype))
        batch = batch_of(call.input, call.batch_sizes, *call.initial)
        found = run(call._replace(batch=batch))
    return tuple(found.output.new_empty(0) if r is None else r for r in found.padded())
