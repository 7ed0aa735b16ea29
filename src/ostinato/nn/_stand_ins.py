"""Arguments that stand for tensors: proxies of torch.fx, and objects with __torch_function__."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Proxy


def is_tensor_like(value: object) -> bool:
    """Whether torch's functions take an argument: a tensor, or what has its own way with them."""
    return isinstance(value, torch.Tensor) or hasattr(type(value), "__torch_function__")


def are_tensors(*values: object) -> bool:
    """Whether all are tensors or None: the quick answer to both other questions."""
    return all(value is None or isinstance(value, torch.Tensor) for value in values)


def is_symbolic(*values: object) -> bool:
    """Whether torch.fx follows what is computed from any of these, or from what they hold."""
    return any(
        isinstance(value, Proxy) or (isinstance(value, (tuple, list)) and is_symbolic(*value))
        for value in values
    )


def leaf(module: torch.nn.Module, *arguments: Any, **named: Any) -> Any:
    """Write one node that calls the module into the graph of torch.fx.

    What torch.nn's layers are to a tracer by the name of their package, ours are by this.

    Args:
        module: a layer or a cell that forward was called on.
        arguments: of forward; some are symbolic. None at the end is left out.
        named: likewise by name; None and False are left out.

    Returns:
        The proxy of the result.
    """
    pending, tracer = [*arguments, *named.values()], None
    while tracer is None:
        value = pending.pop()
        if isinstance(value, Proxy):
            tracer = value.tracer
        elif isinstance(value, (tuple, list)):
            pending += value
    path = tracer.path_of_module(module)  # type: ignore[attr-defined]
    if not path:
        kind = type(module).__name__
        raise torch.fx.proxy.TraceError(
            f"{kind}: torch.fx can not look into the layer itself, which is one node of a graph; "
            f"trace a module that holds it, such as torch.nn.Sequential({kind.lower()})"
        )
    while arguments and arguments[-1] is None:
        arguments = arguments[:-1]
    named = {
        name: value for name, value in named.items() if value is not None and value is not False
    }
    return tracer.create_proxy("call_module", path, arguments, named)
