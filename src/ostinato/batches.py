"""Batches that torch.autograd.grad makes (is_grads_batched, a vectorized Jacobian).

They are of an older kind than those of torch.func.vmap, which runs most operators in a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_Maybe = Sequence[Tensor | None]


def over_batches(function: Any, tensors: _Maybe) -> Any:
    """Call a function of tensors, of which some may be batches that torch.autograd.grad made.

    The function takes these tensors, each of which may be None, and returns tensors, or None in
    place of some. What it returns comes in a tuple: batches, if any of the tensors is one.

    Example:
        >>> over_batches(lambda x, y: (x, y), [torch.ones(2), None])
        (tensor([1., 1.]), None)
    """
    batched = [is_batch(t) for t in tensors]
    if not any(batched):
        return tuple(function(*tensors))
    # The operators' own vmap, of today, instead of the one that torch.autograd.grad still has: that
    # runs most operators in a loop.
    level = current_level()
    plain = unbatched(tensors, level)
    absent: list[int] = []

    def present(*tensors: Any) -> tuple[Tensor, ...]:
        found = list(function(*tensors))
        absent[:] = [k for k, t in enumerate(found) if t is None]
        return tuple(t for t in found if t is not None)

    dims = tuple(0 if is_batch else None for is_batch in batched)
    found: list[Any] = [
        torch._add_batch_dim(t, 0, level) for t in torch.func.vmap(present, in_dims=dims)(*plain)
    ]
    for place in absent:
        found.insert(place, None)
    return tuple(found)


def is_batch(tensor: Tensor | None) -> bool:
    """Whether a tensor is a batch that torch.autograd.grad made (is_grads_batched)."""
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


def current_level() -> int:
    """Return how deep torch.autograd.grad's vmap is nested."""
    torch._C._vmapmode_increment_nesting()
    return torch._C._vmapmode_decrement_nesting()


def unbatched(tensors: _Maybe, level: int) -> list[Tensor | None]:
    """Return batches as plain tensors with a first dimension more; others as they are."""
    return [
        torch._remove_batch_dim(t, level, 0, 0) if t is not None and is_batch(t) else t
        for t in tensors
    ]
