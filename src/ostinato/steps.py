"""One step of a cell by torch's operators, where torch.func or forward mode wants these.

Legend: B batch, I input, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ostinato import reference, transforms
from ostinato.cells import CELLS


def one_step(
    cell: str, input: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None] | None:
    """Run one step of a cell by the reference, where transforms are at work that want operators.

    Args:
        cell: as in `ostinato.ops.layer`.
        input: (B, I). All is checked by the caller.
        h: (B, H), or None for zeros.
        c: likewise; LSTM only.
        weights: weight_ih, weight_hh[, bias_ih, bias_hh].

    Returns:
        h', and c' or None; or None instead where the step is to run as a layer.
    """
    if not transforms.is_active() or not transforms.sees_through_step():
        return None
    found = reference.one_step(cell, input, h, c, weights, has_biases=len(weights) == 4)
    return found[0], found[1] if CELLS[cell].has_c else None


# torch's operator for one step. On a CPU it is composed of others.
_TORCH_STEPS: dict[str, Callable[..., Any]] = {
    name: getattr(torch._VF, f"{name}_cell") for name in CELLS
}


def torch_step(
    cell: str, input: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None] | None:
    """Run one step of a cell by torch's operator, where one gradient of torch.func is at work.

    It calls the operators of the reference with less time between them, and checks for itself.

    Args:
        cell: as in `ostinato.ops.layer`.
        input: (B, I). Nothing is checked before.
        h: (B, H), or None for zeros.
        c: likewise; LSTM only.
        weights: weight_ih, weight_hh[, bias_ih, bias_hh].

    Returns:
        h', and c' or None; or None instead where the step is to run in another way.
    """
    if not transforms.is_one_gradient() or not input.is_cpu:
        return None
    if h is None:
        h = input.new_zeros((input.shape[0], weights[1].shape[1]))
    if CELLS[cell].has_c:
        return _TORCH_STEPS[cell](input, (h, c if c is not None else h), *weights)  # type: ignore[no-any-return]
    return _TORCH_STEPS[cell](input, h, *weights), None
