"""Frozen layers and cells: ours, over weights that are packed once (`ostinato.packed`).

A frozen module is of a class derived from ours, so that it checks its arguments in torch's words.
With float weights, what the packed ones do not serve goes the way of our module, over the
parameters, which are kept. With weights of 8 bits there is no other way, and so it is refused.

Legend: T steps, B batch, N packed rows, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import PackedSequence

from ostinato import nn, quantized
from ostinato.call import States
from ostinato.cells import CELLS
from ostinato.check import check_batch_sizes
from ostinato.fast_path import is_alone
from ostinato.later import when_imported
from ostinato.nn._arguments import cast, check_devices, reject_type, state_pair
from ostinato.nn._cuts import Cuts
from ostinato.nn._shared import Layers
from ostinato.nn._stand_ins import is_symbolic, is_tensor_like, leaf
from ostinato.packed import FLOATS, SUFFIX, Packed, Sizes

_PLAIN = Tensor, torch.nn.Parameter
# Attributes of a frozen module that it does not have before: what is packed, and how it was frozen.
_PACKED = "_packed", "_watched"
STATE = (*_PACKED, "setting")
_ARGUMENTS = "input", "hx", "reset_to", "resets"
_CELL_WEIGHTS = "weight_ih", "weight_hh", "bias_ih", "bias_hh"


class Setting(NamedTuple):
    """How a module was frozen."""

    library: str  # whose its class was, "ostinato.nn" or "torch.nn"
    is_int8: bool
    activations: str


def sizes_of(module: Any, ours: type[Module]) -> Sizes:
    """Return the sizes of a module, of this class of ours or of its counterpart in torch.nn."""
    kind, is_cell = ours.__name__, issubclass(ours, torch.nn.modules.rnn.RNNCellBase)
    if is_cell:
        cell: Any = getattr(ours, "_cell")  # noqa: B009 - of a RNNCell it is a property
        name = str(cell.__get__(module) if isinstance(cell, property) else cell)
    else:
        name = module.mode.lower()
    if name not in CELLS:
        raise ValueError(f"{kind}: expected one of {', '.join(CELLS)}, got {name!r}")
    return Sizes(
        kind,
        CELLS[name],
        module.input_size,
        module.hidden_size,
        0 if is_cell else module.proj_size,
        1 if is_cell else module.num_layers,
        2 if not is_cell and module.bidirectional else 1,
        is_cell,
    )


def weight_names(module: Any) -> list[str]:
    """Return the names of a module's parameters, also of those that are None."""
    names = getattr(module, "_flat_weights_names", None)
    return list(_CELL_WEIGHTS if names is None else names)


class Frozen(Module):
    """What frozen layers and cells share. Made by `ostinato.freeze` alone."""

    ours: type[Module]  # the class over which this one stands
    setting: Setting
    _kind: Any
    _packed: Packed
    # name, tensor and version of each weight that was packed, one after the other, for C++
    _watched: tuple[Any, ...]

    if not TYPE_CHECKING:

        def __init__(self, *args, **kwargs):
            raise TypeError(
                f"{type(self).__name__}: expected to be made by ostinato.freeze(model), "
                "got a call of the class"
            )

    # ---- weights ----

    def pack(self) -> None:
        """Pack the weights as they are now."""
        setting = self.setting
        held, names = self._held(), weight_names(self)
        if setting.is_int8:
            names += [name + SUFFIX for name in names if name.startswith("weight")]
        tensors = {name: held[name] for name in names if held.get(name) is not None}
        check_memory(self._kind, tensors)
        planes = quantized.PLANES[setting.activations] if setting.is_int8 else 0
        packed = Packed(sizes_of(self, self.ours), tensors, planes)
        # Not __setattr__, which looks whether these are parameters or modules.
        vars(self)["_packed"] = packed
        vars(self)["_watched"] = tuple(
            part
            for name, tensor in tensors.items()
            for part in (name, tensor, None if tensor.is_inference() else tensor._version)
        )

    def _held(self) -> dict[str, Any]:
        """Return where the module has its weights: not kept, since export puts another there."""
        return self._buffers if self.setting.is_int8 else self._parameters

    def _check_weights_stay(self) -> None:
        """Refuse a call after the weights were written to."""
        watched, all_held = iter(self._watched), self._held()
        for name, tensor, version in zip(watched, watched, watched, strict=True):
            held = all_held.get(name)
            if held is not tensor:
                self._reject_weight(name, "another tensor in its place")
            if version is not None and held._version != version:
                self._reject_weight(name, "a tensor that was written to")

    def _reject_weight(self, name: str, got: str) -> NoReturn:
        again = "" if self.setting.is_int8 else ", or call ostinato.freeze again"
        raise RuntimeError(
            f"{self._kind}: {name}: expected the weights that were frozen, got {got}; "
            f"load them with load_state_dict{again}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for name, tensor in self._weights_now():
            probe = fn(tensor.detach().new_empty(0))
            is_same = probe.dtype == tensor.dtype
            is_fine = is_same if self.setting.is_int8 else probe.dtype in FLOATS
            if probe.device.type != "cpu" or not is_fine:
                expected = tensor.dtype if self.setting.is_int8 else "float32 or float64"
                raise RuntimeError(
                    f"{self._kind}: {name}: a frozen module is to stay on the CPU and of "
                    f"{expected}, got {probe.dtype} on {probe.device}"
                    f"{'' if self.setting.is_int8 else '; call ostinato.restore first'}"
                )
        found = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.pack()
        return found

    def _weights_now(self) -> Iterator[tuple[str, Tensor]]:
        for name in weight_names(self):
            for each in (name, name + SUFFIX):
                parameter = self._parameters.get(each)
                tensor = self._buffers.get(each) if parameter is None else parameter
                if tensor is not None:
                    yield each, tensor

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        assigns = bool(local_metadata.get("assign_to_params_buffers", False))
        wrong = list(self._wrong_entries(state_dict, prefix, assigns))
        if wrong:
            error_msgs += wrong
            return
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        self.pack()

    def _wrong_entries(
        self, state_dict: Mapping[str, Any], prefix: str, assigns: bool
    ) -> Iterator[str]:
        """Say what is wrong with weights of a kind that would be loaded as numbers of another."""
        now = dict(self._weights_now())
        given = {name: state_dict.get(prefix + name, tensor) for name, tensor in now.items()}
        for name, tensor in now.items():
            new = given[name]
            # What is no tensor, or of another shape, torch refuses.
            if not isinstance(new, Tensor) or new.shape != tensor.shape:
                continue
            is_strict = self.setting.is_int8 or assigns
            is_same = new.dtype == tensor.dtype if is_strict else new.is_floating_point()
            if not is_same or (assigns and new.device.type != "cpu"):
                expected = tensor.dtype if is_strict else "floating point"
                yield (
                    f"{self._kind}: {prefix}{name}: expected {expected} on the CPU, "
                    f"got {new.dtype} on {new.device}"
                )
                continue
            scales = given.get(name + SUFFIX)
            if not (self.setting.is_int8 and isinstance(scales, Tensor)):
                continue
            # Scales of another dtype have a line of their own.
            if scales.dtype == torch.float32 and scales.device.type == "cpu":
                try:
                    quantized.checked(self._kind, prefix + name, _array(new), _array(scales))
                except (ValueError, RuntimeError) as error:
                    yield str(error)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is packed for this processor."""
        inherited: Any = getattr(super(), "__getstate__", None)  # Python 3.11 and later
        state = dict(vars(self) if inherited is None else inherited())
        for name in _PACKED:
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack anew."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.pack()

    def extra_repr(self) -> str:
        """Say what the module said before, and of how many bits its weights are."""
        said, setting = super().extra_repr(), self.setting
        if not setting.is_int8:
            return said
        return f"{said}, dtype=int8, activations={setting.activations}"

    # ---- calls ----

    def _run_weights(self, *arguments: Any) -> tuple[Tensor, States]:
        """Run what `Packed.run` runs, over weights that are still those."""
        self._check_weights_stay()
        return self._packed.run(*arguments)

    # A graph of torch.compile breaks here.
    _run_untraced = _run_weights

    def _check_call(self, *arguments: Any) -> None:
        """Refuse a call that would want more than inference."""
        if torch.is_grad_enabled():
            for name, tensor in _tensors(arguments):
                if tensor.requires_grad:
                    way = "" if self.setting.is_int8 else ", or call ostinato.restore first"
                    raise RuntimeError(
                        f"{self._kind}: {name}: expected a tensor that needs no gradient, since a "
                        "frozen module only infers, got one with requires_grad; call it under "
                        f"torch.no_grad(), pass a detached tensor{way}"
                    )

    def _check_plain(self, *arguments: Any) -> None:
        """Refuse what cannot see the weights of 8 bits: there is no operator behind them."""
        kind = self._kind
        if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
            raise NotImplementedError(
                f"{kind}: expected a call that nobody traces, since weights of 8 bits are no "
                "operator of torch's, got an export or a trace; freeze the float model with "
                "dtype='float32'"
            )
        if torch.compiler.is_compiling():
            return
        for name, tensor in _tensors(arguments):
            is_plain = type(tensor) in _PLAIN and tensor.layout == torch.strided
            if is_plain and (tensor.numel() == 0 or not _is_wrapped(tensor)):
                continue
            raise NotImplementedError(
                f"{kind}: {name}: expected a plain tensor, since weights of 8 bits know no "
                "transforms and no tensors of other classes, got one of "
                f"{type(tensor).__name__}{' in a transform' * is_plain}; freeze the "
                "float model with dtype='float32'"
            )

    def call_of(self, input: Any, hx: Any, lengths: Any, resets: Any) -> NoReturn:
        """Refuse to be explained: no backend is asked."""
        raise TypeError(
            f"explain: layer must go the route of backends, got {type(self).__name__}, "
            "which runs its packed weights"
        )


class FrozenLayer(Frozen, Layers):
    """A frozen RNN, GRU or LSTM."""

    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Any = None,
        resets: Any = None,
        reset_to: Any = None,
        return_all_states: bool = False,
    ) -> Any:
        """Run the layers, as the module that was frozen does (`ostinato.nn`)."""
        if self.dropout and self.training and self.num_layers > 1:
            raise RuntimeError(
                f"{self._kind}: expected eval mode, since a frozen module only infers, got "
                f"training with dropout={self.dropout}; call model.eval()"
            )
        packed = self._packed
        is_whole = lengths is None and resets is None and reset_to is None
        if is_whole and return_all_states is False and is_alone():
            held, watched = self._held(), self._watched
            found = packed.call_from(input, hx, False, self.batch_first, held, watched, packed.rest)
            if found is not None:
                return found
        self._check_call(input, hx, reset_to)
        with torch.no_grad():
            return super().forward(input, hx, lengths, resets, reset_to, return_all_states)

    def _run(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        sorted_indices: Tensor | None,
        states: States,
        cuts: Cuts | None = None,
    ) -> tuple[Tensor, States, States]:
        if self.setting.is_int8:
            return self._run_int8(input, batch_sizes, sorted_indices, states, cuts)
        if is_alone():
            self._check_weights_stay()
            if cuts is None and batch_sizes is None and _are_plain(input, *states):
                self._check(self._weights(), input, None, states)
                return *self._packed.run(input, states), ()
        return super()._run(input, batch_sizes, sorted_indices, states, cuts)

    def _run_int8(
        self,
        input: Tensor,
        batch_sizes: Tensor | None,
        sorted_indices: Tensor | None,
        states: States,
        cuts: Cuts | None,
    ) -> tuple[Tensor, States, States]:
        if cuts is not None and cuts.all_states:
            raise NotImplementedError(
                f"{self._kind}: return_all_states: expected False with weights of 8 bits, got True"
            )
        cuts = cuts or Cuts(None, None, (), False)
        self._check_plain(input, states, cuts.reset_to, cuts.resets)
        reset_to, dtype = cuts.reset_to, self._packed.dtype
        if torch._C._is_any_autocast_enabled():
            input, *given = cast(dtype, input, *states)
            states, reset_to = tuple(given), cast(dtype, *reset_to)
        self._check_input(dtype, input, batch_sizes)
        first, *_ = states
        if first is not None:
            self._check_states(dtype, input, batch_sizes, states)
        scale = self._buffers[f"{weight_names(self)[0]}{SUFFIX}"]
        assert scale is not None
        check_devices(input, scale, states)
        if batch_sizes is None:
            return *self._run_untraced(input, states, cuts.lengths, cuts.resets, reset_to), ()
        if sorted_indices is not None:
            states, reset_to = (
                tuple(None if s is None else s.index_select(1, sorted_indices) for s in each)
                for each in (states, reset_to)
            )
        return self._run_packed(input, batch_sizes, states, cuts.resets, reset_to)

    def _run_packed(
        self,
        input: Tensor,
        batch_sizes: Tensor,
        states: States,
        resets: Tensor | None,
        reset_to: States,
    ) -> tuple[Tensor, States, States]:
        """Run packed rows as a padded batch with lengths."""
        first, *_ = states
        batch = int(batch_sizes.max()) if len(batch_sizes) else 0
        check_batch_sizes(batch_sizes.tolist(), batch, len(input))
        if not len(batch_sizes) and first is not None:
            batch = first.shape[1]
        is_there = torch.arange(batch) < batch_sizes.unsqueeze(1)  # (T, B)
        rows = input.new_zeros(*is_there.shape, self.input_size)
        rows[is_there] = input
        flags = None
        if resets is not None:
            flags = torch.zeros_like(is_there)
            flags[is_there] = resets
        output, last = self._run_untraced(rows, states, is_there.sum(0), flags, reset_to)
        return output[is_there], last, ()


class FrozenCell(Frozen, torch.nn.modules.rnn.RNNCellBase):
    """A frozen RNNCell, GRUCell or LSTMCell."""

    if TYPE_CHECKING:

        def _check_dims(self, input: Any, states: States) -> int: ...
        def _check(self, weights: tuple[Any, ...], input: Tensor, states: States) -> None: ...

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Take one step, as the module that was frozen does (`ostinato.nn`)."""
        if is_alone():
            held, watched = self._held(), self._watched
            found = self._packed.call_from(input, hx, True, False, held, watched, ())
            if found is not None:
                return found
        self._check_call(input, hx)
        with torch.no_grad():
            if self.setting.is_int8:
                return self._step_int8(input, hx)
            if is_alone():
                self._check_weights_stay()
            return super().forward(input, hx)

    def _step_int8(self, input: Any, hx: Any) -> Any:
        kind, packed = self._kind, self._packed
        has_c = packed.sizes.cell.has_c
        if is_symbolic(input, hx):
            return leaf(self, input, hx)
        if not has_c and hx is not None and not is_tensor_like(hx):
            reject_type(kind, "hx", "a Tensor or None", hx)
        states: States = state_pair(kind, hx) or () if has_c else (hx,)
        dim = self._check_dims(input, states)
        self._check_plain(input, states)
        if torch._C._is_any_autocast_enabled():
            input, *given = cast(packed.dtype, input, *states)
            states = tuple(given)
        missing = (None,) * (2 - dim)
        input, *rest = (None if t is None else t[missing] for t in (input, *states))
        # What stands for weights, which are checked where they are packed.
        sizes, blank = packed.sizes, torch.zeros((), dtype=packed.dtype)
        stand_ins = (blank.expand(sizes.shape(name, 0)) for name in _CELL_WEIGHTS)
        self._check(tuple(stand_ins), input, tuple(rest))
        layer = tuple(None if state is None else state.unsqueeze(0) for state in rest)
        _, last = self._run_untraced(input.unsqueeze(0), layer)
        shape = (sizes.hidden,) if dim == 1 else (-1, sizes.hidden)
        found = tuple(state.view(shape) for state in last)
        h, *_ = found
        return found if has_c else h


class FrozenRNN(FrozenLayer, nn.RNN):
    """An RNN with frozen weights."""

    ours = nn.RNN


class FrozenGRU(FrozenLayer, nn.GRU):
    """A GRU with frozen weights."""

    ours = nn.GRU


class FrozenLSTM(FrozenLayer, nn.LSTM):
    """An LSTM with frozen weights."""

    ours = nn.LSTM


class FrozenRNNCell(FrozenCell, nn.RNNCell):
    """An RNNCell with frozen weights."""

    ours = nn.RNNCell


class FrozenGRUCell(FrozenCell, nn.GRUCell):
    """A GRUCell with frozen weights."""

    ours = nn.GRUCell


class FrozenLSTMCell(FrozenCell, nn.LSTMCell):
    """An LSTMCell with frozen weights."""

    ours = nn.LSTMCell


CLASSES: Mapping[type[Module], type[Frozen]] = {
    cls.ours: cls
    for cls in (FrozenRNN, FrozenGRU, FrozenLSTM, FrozenRNNCell, FrozenGRUCell, FrozenLSTMCell)
}
# Pickles show the public path.
for _class in CLASSES.values():
    _class.__module__ = "ostinato.frozen"
del _class


def _keep_out(dynamo: Any) -> None:
    reason = "packed weights are no operator of torch's"
    Frozen._run_untraced = dynamo.disable(Frozen._run_weights, reason=reason)


# An import of it takes seconds, which is nothing for who does not compile.
when_imported("torch._dynamo", _keep_out)


def check_memory(kind: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse to pack what is not in the memory of this process."""
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise RuntimeError(f"{kind}: {name}: expected it on the CPU, got {tensor.device}")


def _tensors(arguments: Any) -> list[tuple[str, Tensor]]:
    """Name the tensors among input, hx and what else a call has."""
    found: list[tuple[str, Tensor]] = []
    for name, value in zip(_ARGUMENTS, arguments, strict=False):
        if isinstance(value, PackedSequence):
            found.append((f"{name}.data", value.data))
        elif isinstance(value, Tensor):
            found.append((name, value))
        elif isinstance(value, (tuple, list)):
            found += [(name, each) for each in value if isinstance(each, Tensor)]
    return found


def _are_plain(*tensors: Tensor | None) -> bool:
    return all(
        t is None or (type(t) in _PLAIN and t.layout == torch.strided and t.device.type == "cpu")
        for t in tensors
    )


def _is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform has wrapped it, or a forward derivative goes with it."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()
