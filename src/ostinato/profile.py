"""Names that a user knows, where torch's profiler looks on: ostinato::gru_forward and the like."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ostinato.cells import cell_of

_is_profiled = torch._C._autograd._profiler_enabled


def is_on() -> bool:
    """Whether a profiler looks on."""
    return not torch.compiler.is_compiling() and _is_profiled()


def shown(cell: str, way: str) -> Any:
    """Return a range that a profiler shows; `way` is "forward" or "backward"."""
    # Half a microsecond; torch.profiler.record_function takes ten, twice as long as a small cell.
    name = cell if cell.isidentifier() else cell_of(cell).layer  # an own cell's class
    return torch._C._profiler._RecordFunctionFast(f"ostinato::{name}_{way}")


def named(operator: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Show a kernel to the profiler by its cell and direction, within its operator.

    The kernel takes the arguments of the operator's schema, "cell" among them. What is returned
    does the same, with a range of its own while a profiler is on.
    """
    schema = getattr(torch.ops.ostinato, operator).default._schema
    place = [argument.name for argument in schema.arguments].index("cell")
    way = "backward" if operator.endswith("backward") else "forward"

    @functools.wraps(kernel)
    def run(*arguments: Any) -> Any:
        if not _is_profiled():
            return kernel(*arguments)
        with shown(arguments[place], way):
            return kernel(*arguments)

    return run
