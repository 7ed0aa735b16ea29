"""What layers and cells say of the arguments of forward, and how they bring them to one dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ostinato.call import States
from ostinato.nn._stand_ins import is_symbolic, is_tensor_like
from ostinato.tensors import unrecorded


def state_pair(kind: str, hx: Any, name: str = "hx") -> States | None:
    """Return h and c of an LSTM's hx: None, or two tensors in a tuple, a list or one stack.

    Return None instead of the pair where torch.fx follows what is computed from hx.
    """
    if hx is None:
        return None, None
    if isinstance(hx, Tensor) and _is_pair(hx):
        # torch indexes hx, so a stack of both states has always worked for unbatched input.
        hx = hx.unbind(0)
    if not isinstance(hx, (tuple, list)):
        if is_symbolic(hx):
            return None
        reject_type(kind, name, "a tuple or list of two Tensors (h_0, c_0), or None", hx)
    if len(hx) != 2:
        raise RuntimeError(f"{kind}: expected {name} to hold two states (h_0, c_0), got {len(hx)}")
    h, c = hx
    if isinstance(h, Tensor) and isinstance(c, Tensor):
        return h, c
    if is_symbolic(h, c):
        return None
    if not is_tensor_like(h):
        reject_type(kind, f"{name}[0]", "a Tensor", h)
    if not is_tensor_like(c):
        reject_type(kind, f"{name}[1]", "a Tensor", c)
    return h, c


@unrecorded
def _is_pair(stack: Tensor) -> bool:
    return stack.dim() > 0 and stack.size(0) == 2


def attribute(module: torch.nn.Module, name: str) -> Tensor:
    """Return a weight that is no plain parameter: parametrized, or replaced by a tensor."""
    weight = getattr(module, name)
    if not isinstance(weight, Tensor):
        reject_type(type(module).__name__, name, "a Tensor", weight)
    return weight


def cast(dtype: torch.dtype, *arguments: Tensor | None) -> tuple[Any, ...]:
    """Bring real floating point arguments to `dtype`; others go on to the dtype check unchanged."""
    if not dtype.is_floating_point:
        return arguments
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in arguments)


def check_devices(input: Tensor, weight: Tensor, states: States) -> None:
    """Check that input, weights and states are in one place, in torch's words."""
    device = input.device
    if weight.device != device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, "
            f"found input tensor at {device} and parameter tensor at {weight.device}"
        )
    for state in states:
        if state is not None and state.device != device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, "
                f"found input tensor at {device} and hidden tensor at {state.device}"
            )


def check_weights(
    kind: str,
    names: Sequence[str],
    weights: Sequence[Tensor],
    shapes: Sequence[tuple[int, ...]],
    input: Tensor,
) -> None:
    """Check weights, which may have been replaced since construction, against their module."""
    dtype, device = input.dtype, input.device
    for name, weight, shape in zip(names, weights, shapes, strict=True):
        if weight.shape != shape:
            raise RuntimeError(f"{kind}: {name} must have shape {shape}, got {tuple(weight.shape)}")
        if weight.dtype != dtype:
            raise ValueError(f"{kind}: {name} must have input's dtype, {dtype}, got {weight.dtype}")
        if weight.device != device:
            raise RuntimeError(
                f"{kind}: {name} must be on input's device, {device}, got {weight.device}"
            )


def named_copy(function: Callable[..., Any], owner: str) -> Any:
    """Copy a method that a private class shares, under the name of the public class `owner`."""
    assert isinstance(function, FunctionType)
    code, name = function.__code__, function.__name__
    copy = FunctionType(
        code, function.__globals__, name, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = function.__annotations__
    copy.__doc__, copy.__module__ = function.__doc__, function.__module__
    copy.__qualname__ = f"{owner}.{name}"
    return copy


def reject_type(kind: str, argument: str, expected: str, got: object) -> NoReturn:
    """Raise for an argument of another Python type."""
    # NumPy's scalar types have names that Python's have too.
    name = f"{'numpy.' * isinstance(got, np.generic)}{type(got).__name__}"
    raise TypeError(f"{kind}: {argument} must be {expected}, got {name}")


def reject_dtype(kind: str, argument: str, got: Tensor, dtype: torch.dtype) -> NoReturn:
    """Raise for an argument of another dtype than the weights."""
    raise ValueError(
        f"{kind} {argument} dtype ({got.dtype}) does not match weight dtype ({dtype}). "
        f"Convert {argument}: {argument}.to({dtype}), or convert model: model.to({got.dtype})"
    )
