"""One node for each layer in a graph of torch.jit.trace, which decides as it runs.

A trace writes down what it sees: a number that Python read of a tensor is a constant for ever, and
so is a decision. `ostinato::layer` is told how many rows there are, and whether backward will
follow. So a trace gets other operators, as torch has them: `ostinato::gru` and its siblings, which
take tensors and the layer's own constants. They are composite: each run of the graph calls
`ostinato.ops.layer` or `cut_layer` again, with all checks and with the choice of who runs it.

Legend: as in `ostinato.ops`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ostinato.call import without_autocast
from ostinato.cells import CELLS
from ostinato.gradients import Results

_P = ParamSpec("_P")
_R = TypeVar("_R")

_SCHEMA = """(
    Tensor input, Tensor? batch_sizes, Tensor? h_0, Tensor? c_0, Tensor[] weights,
    bool has_biases, bool bidirectional, bool recompute,
    Tensor? lengths, Tensor? resets, Tensor? reset_h, Tensor? reset_c, bool all_c
) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells)"""


def is_recorded() -> bool:
    """Whether torch.jit.trace records what runs."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def unrecorded(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Hide from torch.jit.trace what a function computes, such as the sizes that a check compares.

    Args:
        function: whose results are no part of the graph.

    Returns:
        The function, within which sizes are numbers.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not is_recorded():
            return function(*args, **kwargs)
        # torch declares the one of these and not the other.
        switch: Any = torch._C
        state = switch._get_tracing_state()
        switch._set_tracing_state(None)
        try:
            return function(*args, **kwargs)
        finally:
            switch._set_tracing_state(state)

    return run


def define(
    library: torch.library.Library, layer: Callable[..., Any], cut_layer: Callable[..., Any]
) -> None:
    """Define an operator for each cell.

    Args:
        library: where.
        layer: `ostinato.ops.layer`, which they run.
        cut_layer: `ostinato.ops.cut_layer`, likewise.
    """
    for cell in CELLS:
        library.define(cell + _SCHEMA)  # type: ignore[no-untyped-call]
        kernel = functools.partial(_run, layer, cut_layer, cell)
        library.impl(cell, kernel, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


def _run(
    layer: Callable[..., Any],
    cut_layer: Callable[..., Any],
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Run a node as its module would run now. What there is not of the results is empty."""
    *flags, lengths, resets, reset_h, reset_c, all_c = rest
    options = dict(zip(("has_biases", "bidirectional", "recompute"), flags, strict=True))
    with contextlib.ExitStack() as stack:
        if torch._C._is_any_autocast_enabled():
            # The module's cast is no part of a graph that was traced without autocast.
            stack.enter_context(without_autocast(input))
            dtype = weights[0].dtype
            input = input.to(dtype)
            states = h_0, c_0, reset_h, reset_c
            h_0, c_0, reset_h, reset_c = (t if t is None else t.to(dtype) for t in states)
        arguments = cell, input, batch_sizes, h_0, c_0, weights
        if lengths is None and resets is None and not all_c:
            found = *layer(*arguments, **options), None
        else:
            cuts = {"lengths": lengths, "resets": resets, "reset_h": reset_h, "reset_c": reset_c}
            found = cut_layer(*arguments, **options, **cuts, all_c=all_c)
    return tuple(found[0].new_empty(0) if result is None else result for result in found)


def record(cell: str, *arguments: Any) -> Results:
    """Write down one layer, and run it.

    Args:
        cell: as in `ostinato.ops.layer`.
        arguments: of the schema.

    Returns:
        output, h_n, c_n or None, c at every step or None, as `ostinato.ops.cut_layer`.
    """
    output, h_n, c_n, cells = getattr(torch.ops.ostinato, cell)(*arguments)
    if not CELLS[cell].has_c:
        return output, h_n, None, None
    return output, h_n, c_n, cells if arguments[-1] else None
