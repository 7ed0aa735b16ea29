"""`ostinato.explain`: who runs a layer's call, and why."""

from __future__ import annotations

from typing import Any

import torch

from ostinato import route, steps
from ostinato.tensors import check_dtype, without_autocast


def explain(layer: Any, x: Any, hx: Any = None, *, lengths: Any = None, resets: Any = None) -> str:
    """Say who would run a layer's call, and why nobody before.

    The backends are asked in order (docs/architecture.md), and the first that serves the call runs
    it. Nothing is computed.

    Args:
        layer: one of the modules of `ostinato.nn`; what drives an own cell's steps is 0.
        x: its input, a tensor or, but for a cell, a PackedSequence.
        hx: as in the module's call.
        lengths: likewise.
        resets: likewise.

    Returns:
        A line for each backend up to the one that runs the call: its name, and why it does not
        serve, or "runs it". Where the layers of a stack differ, such lines for each.

    Raises:
        TypeError: another module, or an argument that forward refuses so.
        ValueError: input of another dtype or number of dimensions than forward takes.
        RuntimeError: sizes that do not fit.
        NotImplementedError: a dtype that nothing computes in.

    Example:
        >>> import torch
        >>> from ostinato import nn
        >>> meta = {"device": "meta"}
        >>> print(explain(nn.GRU(3, 4, **meta), torch.zeros(5, 2, 3, **meta)))
        fast path: it runs float32, float64, bfloat16 and float16 on the CPU
        class of tensors: no argument has a __torch_function__ of its own
        torch.jit.trace: it does not record
        torch.onnx.export: nothing is traced
        CPU engine: runs it
    """
    # The modules stand beside this one, which knows them by this method.
    call_of: Any = getattr(layer, "call_of", None)
    if call_of is None:
        kind = type(layer)
        raise TypeError(
            "explain: layer must be a layer or a cell of ostinato.nn, followed by its "
            f"input, got {kind.__module__}.{kind.__qualname__}"
        )
    call = call_of(x, hx, lengths, resets)
    check_dtype(call.input)
    # As forward runs it: all is in the dtype of the weights by then.
    with without_autocast(call.input):
        is_step = isinstance(layer, torch.nn.modules.rnn.RNNCellBase)
        return (steps.why(call) if is_step else None) or route.explain(call)
