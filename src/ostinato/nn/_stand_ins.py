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
    """Write one node that calls a layer or a cell into the graph of torch.fx; return its proxy.

    What torch.nn's layers are to a tracer by the name of their package, ours are by this. Some
    of the arguments of forward are symbolic. The node leaves out None at the end of those by place,
    and None and False of those by name.
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
    positional = list(arguments)
    while positional and positional[-1] is None:
        positional.pop()
    named = {
        name: value for name, value in named.items() if value is not None and value is not False
    }
    return tracer.create_proxy("call_module", path, tuple(positional), named)
