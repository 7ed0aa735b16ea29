"""One step of a cell by torch's operators, where torch.func or forward mode wants these.

Legend: B batch, I input, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ostinato import reference, transforms
from ostinato.call import Call, States
from ostinato.cells import CELLS
from ostinato.tensors import is_traced


def one_step(call: Call) -> States | None:
    """Run one step by the reference, where transforms are at work that want operators.

    The call holds a cell's own arrays, checked: input (B, I), states (B, H) or None. Returns the
    next states, or None instead where the step is to run as a layer.
    """
    if not transforms.is_active() or not transforms.sees_through_step():
        return None
    return reference.one_step(
        call.cell, call.input, call.initial, call.weights, has_biases=call.has_biases
    )


# torch's operator for one step. On a CPU it is composed of others.
_TORCH_STEPS: dict[str, Callable[..., Any]] = {
    name: getattr(torch._VF, f"{name}_cell") for name in CELLS if hasattr(torch._VF, f"{name}_cell")
}


def is_on_gpu(input: Any) -> bool:
    """Whether a cell's input is a tensor on a GPU."""
    return isinstance(input, torch.Tensor) and input.is_cuda


def torch_step(call: Call) -> States | None:
    """Run one step by torch's operator: on a GPU, and where one gradient of torch.func is at work.

    On a GPU it is one kernel, and its cost is that of torch.nn's cell. On a CPU it calls the
    operators of the reference with less time between them. It checks for itself: the call is as in
    `one_step`, but not checked. Returns the next states, or None instead where the step is to run
    in another way.
    """
    if not _is_torch_s(call):
        return None
    h, *rest = call.initial
    if h is None:
        _, weight_hh, *_ = call.weights
        h = call.input.new_zeros((call.input.shape[0], weight_hh.shape[1]))
    if not rest:
        return (_TORCH_STEPS[call.cell](call.input, h, *call.weights),)
    hx = h, *(h if state is None else state for state in rest)
    found: States = _TORCH_STEPS[call.cell](call.input, hx, *call.weights)
    return found


def _is_torch_s(call: Call) -> bool:
    if call.cell not in _TORCH_STEPS:
        return False
    if is_on_gpu(call.input):
        return not is_traced() and not transforms.is_active()
    return transforms.is_one_gradient() and bool(call.input.is_cpu)


def why(call: Call) -> str | None:
    """Say which of both runs a cell's step, or None where it runs as a layer."""
    if _is_torch_s(call):
        return "torch's operator for one step: runs it"
    if transforms.is_active() and transforms.sees_through_step():
        return "reference for one step: runs it"
    return None
