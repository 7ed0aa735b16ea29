"""An autograd.Function under torch.func's transforms, one level after the other.

`apply` does what `Function.apply` does there, by the same rules of the Function and with the same
results. torch makes a class at each call and looks for tensors in nested containers, which takes
longer than a short layer; here the classes are made once, and arguments are flat.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch._C._functorch import TransformType

_forward_ad = torch.autograd.forward_ad
_SingleLevel = torch.autograd.function._SingleLevelFunction


class Info(NamedTuple):
    """What the rule for vmap is told."""

    batch_size: int


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Apply a Function that has `setup_context` to tensors or anything else, not in containers.

    Its forward returns a tuple of new tensors; a rule for vmap may give such an output no
    dimension. It has `backward`, and under vmap and forward mode their rules.

    Example:
        >>> class Twice(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(x):
        ...         return (2 * x,)
        ...     @staticmethod
        ...     def setup_context(ctx, inputs, output):
        ...         pass
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         return 2 * grad
        >>> torch.func.grad(lambda x: apply(Twice, x)[0].sum())(torch.ones(3))
        tensor([2., 2., 2.])
    """
    # What a transform left behind that has ended.
    plain = [_functorch.unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in arguments]
    top = _functorch.peek_interpreter_stack()
    if top is None:
        return super(torch.autograd.Function, function).apply(*plain)
    kind = top.key()
    if kind == TransformType.Vmap:
        return _apply_mapped(function, top, plain)
    pointer = _POINTERS[kind](top)
    lifted = [pointer.lift(a) if isinstance(a, Tensor) else a for a in plain]
    before = _functorch.get_single_level_autograd_function_allowed()
    _functorch.set_single_level_autograd_function_allowed(True)
    try:
        return _single_level(function).apply(*lifted)
    finally:
        _functorch.set_single_level_autograd_function_allowed(before)


_POINTERS: dict[TransformType, Any] = {
    TransformType.Grad: _functorch.CGradInterpreterPtr,
    TransformType.Jvp: _functorch.CJvpInterpreterPtr,
}


def _below(run: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function without the innermost transform."""
    saved = _functorch.pop_dynamic_layer_stack()
    try:
        return run(*arguments)
    finally:
        _functorch.push_dynamic_layer_stack(saved)


def _apply_mapped(function: type[torch.autograd.Function], top: Any, arguments: list[Any]) -> Any:
    """Apply a Function by its rule for vmap."""
    level = top.level()
    pairs = [
        _functorch._unwrap_batched(a, level) if isinstance(a, Tensor) else (a, None)
        for a in arguments
    ]
    plain, dims = zip(*pairs, strict=True)
    if all(dim is None for dim in dims):
        return _below(apply, function, *arguments)
    info = Info(_functorch.CVmapInterpreterPtr(top).batchSize())
    found, places = _below(function.vmap, info, dims, *plain)
    return tuple(
        result if place is None else _functorch._add_batch_dim(result, place, level)
        for result, place in zip(found, places, strict=True)
    )


@cache
def _single_level(function: type[torch.autograd.Function]) -> type[Any]:
    """Return a Function for one transform that differentiates, on what lies below it."""

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        top = _functorch.peek_interpreter_stack()
        level, pointer = top.level(), _POINTERS[top.key()](top)
        plain = [
            _functorch._unwrap_for_grad(a, level) if isinstance(a, Tensor) else a for a in arguments
        ]
        # A Function's forward stands without gradients. Those of the transforms below go on, but
        # for what was switched off around this one.
        reverse = top.key() != TransformType.Grad or pointer.prevGradMode()
        forward = top.key() != TransformType.Jvp or pointer.prevFwdGradMode()
        with torch.set_grad_enabled(reverse), _forward_ad._set_fwd_grad_enabled(forward):
            found = _below(apply, function, *plain)
        return tuple(_functorch._wrap_for_grad(result, level) for result in found)

    members: dict[str, Any] = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(function.setup_context),
        "backward": staticmethod(function.backward),
        "jvp": staticmethod(function.jvp),
    }
    return type(function.__name__, (_SingleLevel,), members)
