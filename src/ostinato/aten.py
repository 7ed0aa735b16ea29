"""Our operator as torch's own, step by step, for a program that may hold nothing else.

A program of torch.export has one node for each layer. Runtimes that bring a fixed set of operators
(ExecuTorch, LiteRT, and whoever reads core ATen) do not know it. `decompositions` is a table for
`run_decompositions`, which writes the reference in its place.

Legend: T steps, B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ostinato import operators  # noqa: F401  registers them
from ostinato.call import Call
from ostinato.reference_backend import results

# Stored in 16 bits, computed in float32, as the engine does.
_NARROW = (torch.bfloat16, torch.float16)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return what turns our layers in an exported program into operators of ATen.

    Each layer becomes its steps, one after the other: some ten operators for each step and
    direction, so the program grows with T, and T must be fixed when it is exported. B may be
    dynamic. `lengths=`, `resets=` and initial states are served, packed rows are not.

    Returns:
        A table for `torch.export.ExportedProgram.run_decompositions`, by itself or merged with
        `torch.export.default_decompositions()`, which leaves core ATen alone. It raises
        NotImplementedError where T is dynamic, and for packed rows.

    Example:
        >>> import torch
        >>> from ostinato import nn
        >>> with torch.no_grad():
        ...     program = torch.export.export(nn.GRU(3, 4).eval(), (torch.randn(5, 2, 3),))
        >>> table = {**torch.export.default_decompositions(), **decompositions()}
        >>> program = program.run_decompositions(table)
        >>> calls = [n for n in program.graph.nodes if n.op == "call_function"]
        >>> {n.target.namespace for n in calls if hasattr(n.target, "namespace")}
        {'aten'}

    Source: docs/math.md, by `ostinato.reference`.
    """
    return {torch.ops.ostinato.layer.default: _layer}


def _layer(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute what `ostinato::layer` returns by operators of ATen."""
    *parameters, all_c, _ = arguments
    call = Call.of(*parameters, all_states=all_c)
    input = call.input
    if call.batch_sizes is not None:
        raise NotImplementedError(
            "batch_sizes: how many rows a step has is part of the data, and operators of ATen are "
            "written for each step; give the layer a padded batch and lengths="
        )
    if isinstance(input.shape[0], torch.SymInt):
        raise NotImplementedError(
            f"input: operators of ATen are written for each step, so the number of steps must be "
            f"fixed, got {input.shape[0]}; export without a dynamic shape for it"
        )
    if input.dtype in _NARROW:
        call = _widened(call)
    # An absent result has no elements, and what backward reads is not computed.
    found = (
        input.new_empty((0,)) if result is None else result.to(input.dtype)
        for result in results(call).padded()
    )
    return *found, input.new_empty((0,), dtype=torch.uint8)


def _widened(call: Call) -> Call:
    """Return the call in float32."""
    return call.with_tensors([None if t is None else t.float() for t in call.tensors()])
