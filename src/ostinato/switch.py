"""Whole models: torch.nn's recurrent layers become ours, and back.

Nothing is built, copied or moved. A layer of ours keeps what torch's keeps, under the same names,
so a module is switched by giving the object another class, as parametrizations do it. Parameters,
hooks, buffers, flags and attributes stay because nobody touches them, and whoever holds the module,
in a list, in a closure or twice in one model, holds the switched one.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn import Module
from torch.nn.utils import parametrize

from ostinato import nn
from ostinato.frozen_layers import CLASSES, STATE, Frozen
from ostinato.versions import drop_compiled_graphs

_Classes = Mapping[type[Module], type[Module]]

OURS: _Classes = {
    getattr(torch.nn, kind): getattr(nn, kind) for kind in nn.__all__ if hasattr(torch.nn, kind)
}
_TORCHS: _Classes = {ours: theirs for theirs, ours in OURS.items()}


class Layer(NamedTuple):
    """One layer in a report.

    Args:
        name: as in `model.named_modules()`, empty for the model itself. A module that stands at
            several places has the first of its names.
        kind: "RNN", "GRU", "LSTM", "RNNCell", "GRUCell" or "LSTMCell".
        why: the reason why it was left alone, or nothing.
    """

    name: str
    kind: str
    why: str = ""

    def __str__(self) -> str:
        why = f", left alone: {self.why}" if self.why else ""
        return f"{self.name or '(the model itself)'}: {self.kind}{why}"


@dataclass(frozen=True)
class Report:
    """What `replace`, `restore` or `freeze` did; `str` of it is made for reading.

    Args:
        model: the object that was given. Layers are switched in place, a model that is itself a
            layer too.
        library: whose the changed layers are now, "ostinato.nn", "torch.nn" or "ostinato.frozen";
            after `restore` of a model that was frozen in part, "ostinato.nn and torch.nn".
        changed: the layers that were switched.
        left: the layers that were left alone, each with the reason.

    Example:
        >>> import ostinato, torch
        >>> print(ostinato.replace(torch.nn.Sequential(torch.nn.GRUCell(4, 8))))
        now of ostinato.nn: 1, left alone: 0
          0: GRUCell
    """

    model: Module = field(repr=False)
    library: str
    changed: tuple[Layer, ...]
    left: tuple[Layer, ...]

    def __str__(self) -> str:
        counts = f"now of {self.library}: {len(self.changed)}, left alone: {len(self.left)}"
        return "\n  ".join([counts, *map(str, self.changed + self.left)])


def replace(model: Module) -> Report:
    """Make every recurrent layer of torch.nn in a model one of ours, in place.

    Each stays the same object with the same Parameters, hooks, buffers, flags and attributes. An
    optimizer made before goes on working, and a layer that stands at several places stays one.
    Parametrized layers stay parametrized.

    Left alone, and named in the report: classes derived from torch's, since their methods may rely
    on it (derive them from ours); a layer whose `forward` was replaced on the object, which would
    go on to run; one that has an attribute whose name means something in ours; what
    torch.jit has compiled.

    Args:
        model: any module, also a layer by itself. What `model.modules()` finds is switched.

    Returns:
        A `Report`: `changed`, `left`, and `model`, which is the argument.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Example:
        >>> import ostinato, torch
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.GRU(4, 8)})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> print(ostinato.replace(model))
        now of ostinato.nn: 1, left alone: 0
          encoder: GRU
        >>> type(model["encoder"])
        <class 'ostinato.nn.GRU'>
    """
    return _switch("replace", model, OURS)


def restore(model: Module) -> Report:
    """Make every recurrent layer of ours in a model one of torch.nn, in place.

    The way back of `replace`, for what knows torch's own classes alone. It does not matter whether
    a layer was switched before or built as ours. What torch's layers have no word for, such as
    `memory="recompute"`, is dropped.

    It is the way back of `ostinato.freeze`, too: a frozen layer becomes what it was when it was
    frozen, ours or torch's, and what became ours a second `restore` makes torch's. One with weights
    of 8 bits is left alone, since its float weights are gone.

    Args:
        model: any module, also a layer by itself. What `model.modules()` finds is switched.

    Returns:
        A `Report`: `changed`, `left`, and `model`, which is the argument.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Example:
        >>> import ostinato
        >>> type(ostinato.restore(ostinato.nn.GRU(4, 8)).model)
        <class 'torch.nn.modules.rnn.GRU'>
    """
    return _switch("restore", model, _TORCHS)


def _switch(function: str, model: Module, classes: _Classes) -> Report:
    """Give every module of these classes the class that stands opposite."""
    if not isinstance(model, Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    changed, left, libraries = [], [], set()
    library = "ostinato.nn" if classes is OURS else "torch.nn"
    # The list is complete before the first change.
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.jit.ScriptModule):
            if module.original_name in nn.__all__:
                left.append(Layer(name, module.original_name, "torch.jit has compiled it"))
            continue
        if isinstance(module, Frozen) and classes is _TORCHS:
            kind, why = module.ours.__name__, _why_not_thawed(module)
            if why:
                left.append(Layer(name, kind, why))
                continue
            libraries.add(module.setting.library)
            _thaw(module)
            changed.append(Layer(name, kind))
            continue
        found = next((cls for cls in classes if isinstance(module, cls)), None)
        if found is None:
            continue
        why = obstacle(module, found)
        if why:
            left.append(Layer(name, found.__name__, why))
            continue
        if found in OURS:
            become_ours(module, found)
        else:
            _become_torchs(module, found)
        libraries.add(library)
        changed.append(Layer(name, found.__name__))
    if changed:
        drop_compiled_graphs()
    return Report(model, " and ".join(sorted(libraries)) or library, tuple(changed), tuple(left))


def _why_not_thawed(module: Frozen) -> str:
    """Return why a frozen module has to stay one, or nothing."""
    if module.setting.is_int8:
        return "it was frozen with weights of 8 bits, and its float weights are gone"
    cls = parametrize.type_before_parametrizations(module)
    if cls is not CLASSES[module.ours]:
        return f"{cls.__qualname__} is derived from a frozen {module.ours.__name__}"
    return ""


def _thaw(module: Frozen) -> None:
    """Give a frozen module the class that it was of."""
    ours, library = module.ours, module.setting.library
    for name in STATE:
        vars(module).pop(name, None)
    module.__class__ = _with_parametrizations(module, ours)  # type: ignore[assignment]
    if library == "torch.nn":
        _become_torchs(module, ours)


def obstacle(module: Module, found: type[Module]) -> str:
    """Return why this module has to stay what it is, or nothing."""
    library, other = ("torch.nn", "ostinato.nn") if found in OURS else ("ostinato.nn", "torch.nn")
    cls = parametrize.type_before_parametrizations(module)
    if cls is not found:
        return f"{cls.__qualname__} is derived from {library}.{found.__name__}"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    if found in OURS:
        taken = _stored(module) & _added_by(OURS[found]) - {"_flat_weights"}
        if taken:
            return f"its attribute {min(taken)} means something else in {other}.{found.__name__}"
    return ""


def become_ours(module: Module, theirs: type[Module]) -> None:
    """Give a module of torch.nn our class."""
    module.__class__ = _with_parametrizations(module, OURS[theirs])
    # Ours computes it when it is asked; what torch kept would hold on to weights that are gone.
    vars(module).pop("_flat_weights", None)


def _become_torchs(module: Module, ours: type[Module]) -> None:
    for name in _stored(module) & _added_by(ours):
        delattr(module, name)
    module.__class__ = _with_parametrizations(module, _TORCHS[ours])
    if not isinstance(module, torch.nn.RNNBase):
        return
    # Not torch's _init_flat_weights: it would compute parametrized weights, and a power iteration
    # or a random mask is not ours to spend. A reference to anything but the weight makes torch
    # gather the list in its next call.
    held = {**vars(module), **module._parameters}
    weights: list[Any] = [held.get(name) for name in module._flat_weights_names]
    module._flat_weights = weights
    module._flat_weight_refs = [
        weakref.ref(module if weight is None else weight)  # type: ignore[arg-type]
        for weight in weights
    ]


def _with_parametrizations(module: Module, target: type[Module]) -> type[Module]:
    """Return the class to give: the target, or what torch would have made of it to parametrize.

    torch.nn.utils.parametrize derives a class for each parametrized module, in which each of these
    weights is a property. A class with the same contents over the target does the same.
    """
    if not parametrize.is_parametrized(module):
        return target
    derived = type(module)
    contents = {
        name: value
        for name, value in vars(derived).items()
        if name not in ("__dict__", "__weakref__", "__doc__")
    }
    return type(derived.__name__, (target,), contents)


def _stored(module: Module) -> set[str]:
    """The names under which this object itself has something."""
    return {*vars(module), *module._parameters, *module._buffers, *module._modules}


def _added_by(ours: type[Module]) -> set[str]:
    """The names that a class of ours has and torch's has not."""
    return set(dir(ours)) - set(dir(_TORCHS[ours]))
