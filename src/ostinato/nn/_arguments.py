"""What layers and cells say of the arguments of forward, and how they bring them to one dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ostinato.nn._stand_ins import is_symbolic, is_tensor_like
from ostinato.traced import unrecorded

States = tuple[Tensor | None, Tensor | None]


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


def cast(
    dtype: torch.dtype, input: Tensor, h_0: Tensor | None, c_0: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Bring real floating point arguments to `dtype`; others go on to the dtype check unchanged."""
    if not dtype.is_floating_point:
        return input, h_0, c_0
    if input.is_floating_point():
        input = input.to(dtype)
    if h_0 is not None and h_0.is_floating_point():
        h_0 = h_0.to(dtype)
    if c_0 is not None and c_0.is_floating_point():
        c_0 = c_0.to(dtype)
    return input, h_0, c_0


def check_devices(input: Tensor, weight: Tensor, h_0: Tensor | None, c_0: Tensor | None) -> None:
    """Check that input, weights and states are in one place, in torch's words."""
    device = input.device
    if weight.device != device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, "
            f"found input tensor at {device} and parameter tensor at {weight.device}"
        )
    for state in (h_0, c_0):
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


def reject_type(kind: str, argument: str, expected: str, got: object) -> NoReturn:
    """Raise for an argument of another Python type."""
    raise TypeError(f"{kind}: {argument} must be {expected}, got {type(got).__name__}")


def reject_dtype(kind: str, argument: str, got: Tensor, dtype: torch.dtype) -> NoReturn:
    """Raise for an argument of another dtype than the weights."""
    raise ValueError(
        f"{kind} {argument} dtype ({got.dtype}) does not match weight dtype ({dtype}). "
        f"Convert {argument}: {argument}.to({dtype}), or convert model: model.to({got.dtype})"
    )
