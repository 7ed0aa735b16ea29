"""Whole models for inference: every recurrent layer and cell gets weights that are packed once.

As `ostinato.replace` does it, each module stays the same object and gets another class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import parametrize

from ostinato import nn, packed, quantized
from ostinato.frozen_layers import (
    CLASSES,
    Frozen,
    FrozenGRU,
    FrozenGRUCell,
    FrozenLSTM,
    FrozenLSTMCell,
    FrozenRNN,
    FrozenRNNCell,
    Setting,
    check_memory,
    sizes_of,
    weight_names,
)
from ostinato.switch import OURS, Layer, Report, become_ours, obstacle
from ostinato.versions import drop_compiled_graphs

# The classes are where their pickles look for them.
__all__ = [
    "FrozenGRU",
    "FrozenGRUCell",
    "FrozenLSTM",
    "FrozenLSTMCell",
    "FrozenRNN",
    "FrozenRNNCell",
    "freeze",
]

_DTYPES = "float32", "int8"


def freeze(model: Module, dtype: str = "float32", *, activations: str | None = None) -> Report:
    """Give every recurrent layer and cell of a model frozen weights, in place.

    The weights are packed once instead of in each call, so that short calls and cells stop paying
    for it. Each module stays the same object with the same hooks and attributes; only its class is
    another. A call that the packed weights do not serve (rows of different lengths, resets,
    return_all_states, a compiler or a transform that looks on) packs as before.

    A frozen module infers. Its outputs have no grad_fn, also where its parameters require
    gradients, which it leaves as they are; a call whose input or hx wants a gradient is refused,
    and so is training mode with dropout. It goes on to take all that the module took before.
    `load_state_dict` and a change of dtype pack anew; a call after weights were written to
    otherwise is refused, as far as torch counts it (`.data.copy_()` it does not).

    Args:
        model: any module, also a layer or a cell by itself, ours or torch.nn's: RNN, GRU, LSTM,
            RNNCell, GRUCell, LSTMCell. What `model.modules()` finds is frozen.
        dtype: "float32" for weights as they are, which may be float64 too: the bits of ours before,
            the same parameters and state_dict, and `ostinato.restore` gives back the class that the
            module was of. "int8" for weights of 8 bits, made of float32 and kept in their place:
            buffers `weight_ih_l0` of int8 and `weight_ih_l0_scale` (rows,) of float32, biases as
            they were. There is no way back.
        activations: what int8 weights are multiplied with, "int8" (None) or "int16", as for a
            `Stream`.

    Returns:
        A `Report`: `changed`; `left`, each with the reason; `model`, which is the argument.

    Raises:
        TypeError: model is no torch.nn.Module; dtype or activations are no str.
        ValueError: an unknown dtype or activations; a weight to be quantised is not finite. What is
            refused leaves the model as it was.
        RuntimeError: weights of other sizes than their module's.

    Example:
        >>> import ostinato, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GRUCell(4, 8))
        >>> print(ostinato.freeze(model))
        now of ostinato.frozen: 1, left alone: 0
          1: GRUCell
        >>> with torch.no_grad():
        ...     model(torch.zeros(1, 4)).shape
        torch.Size([1, 8])
    """
    if not isinstance(model, Module):
        raise TypeError(f"freeze: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(dtype, str):
        raise TypeError(f"freeze: dtype must be a str such as 'int8', got {dtype!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"freeze: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    activations = quantized.activations_for("freeze", dtype, activations)
    is_int8 = dtype == "int8"
    plans, left = [], []
    # All is read and packed before the first change.
    for name, module in list(model.named_modules()):
        kind = _kind(module)
        if not kind:
            continue
        ours = getattr(nn, kind)
        why = _why_not(module, ours, is_int8)
        if why:
            left.append(Layer(name, kind, why))
        else:
            plans.append(_Plan(name, module, ours, _weights_for(module, ours, is_int8)))
    for plan in plans:
        _become_frozen(plan, is_int8, activations)
    if plans:
        drop_compiled_graphs()
    changed = tuple(Layer(plan.name, plan.ours.__name__) for plan in plans)
    return Report(model, "ostinato.frozen", changed, tuple(left))


class _Plan(NamedTuple):
    """What is to be frozen."""

    name: str
    module: Module
    ours: type[Module]
    tensors: Mapping[str, Tensor]  # its weights of 8 bits, or nothing


def _kind(module: Module) -> str:
    """Return the name of a recurrent layer or cell, or nothing."""
    if isinstance(module, torch.jit.ScriptModule):
        name: str = module.original_name
        return name if name in nn.__all__ else ""
    for theirs, ours in OURS.items():
        if isinstance(module, (theirs, ours)):
            return theirs.__name__
    own = nn.Recurrent, nn.RecurrentCell
    return next((cls.__name__ for cls in own if isinstance(module, cls)), "")


def _why_not(module: Module, ours: type[Module], is_int8: bool) -> str:
    """Return why this module has to stay what it is, or nothing."""
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit has compiled it"
    if ours not in CLASSES:
        return "a cell of one's own has no packed weights"
    if parametrize.is_parametrized(module):
        return "its weights are parametrized, so that they are computed at each call"
    if isinstance(module, Frozen):
        if module.setting.is_int8:
            return "it is frozen with weights of 8 bits already"
        if type(module) is not CLASSES[ours]:
            return f"{type(module).__qualname__} is derived from a frozen {ours.__name__}"
    else:
        library = next(cls for pair in OURS.items() for cls in pair if isinstance(module, cls))
        why = obstacle(module, library)
        if why:
            return why
    return _why_not_weights(module, is_int8)


def _why_not_weights(module: Module, is_int8: bool) -> str:
    kind: torch.dtype | None = None
    for name in weight_names(module):
        if name not in module._parameters:
            return f"its {name} is no parameter"
        weight = module._parameters[name]
        if weight is None:
            if name.startswith("weight"):
                return f"its {name} is missing"
            continue
        if type(weight) is not torch.nn.Parameter:
            return f"its {name} is of a class of tensors of its own, {type(weight).__name__}"
        if weight.device.type != "cpu":
            return f"its {name} is on {weight.device}, and packed weights are the CPU's"
        known = (torch.float32,) if is_int8 else tuple(packed.FLOATS)
        if weight.dtype not in known:
            words = " or ".join(str(each).removeprefix("torch.") for each in known)
            return f"its {name} is of {weight.dtype}, and {words} is packed"
        if weight.dtype != (kind or weight.dtype):
            return f"its {name} is of {weight.dtype}, and others are of {kind}"
        kind = weight.dtype
    return "" if kind else "it has no weights"


def _weights_for(module: Module, ours: type[Module], is_int8: bool) -> Mapping[str, Tensor]:
    """Check weights, and make those of 8 bits."""
    sizes = sizes_of(module, ours)
    given = {name: module._parameters[name] for name in weight_names(module)}
    tensors = {name: weight for name, weight in given.items() if weight is not None}
    check_memory(sizes.kind, tensors)
    sizes.check(tensors)
    return packed.quantise(sizes.kind, tensors) if is_int8 else {}


def _become_frozen(plan: _Plan, is_int8: bool, activations: str) -> None:
    module, ours, tensors = plan.module, plan.ours, plan.tensors
    library = "ostinato.nn"
    if isinstance(module, Frozen):
        library = module.setting.library
    elif not isinstance(module, ours):
        library = "torch.nn"
        become_ours(module, type(module))
    for name in weight_names(module) if is_int8 else ():
        if module._parameters[name] is None:
            continue
        del module._parameters[name]
        for each in (name, name + packed.SUFFIX):
            if each in tensors:
                module.register_buffer(each, tensors[each])
    frozen: Any = module
    frozen.__class__ = CLASSES[ours]
    frozen.setting = Setting(library, is_int8, activations)
    frozen.pack()
