"""RNNCell, GRUCell and LSTMCell: one step per call.

Legend: B batch, I input_size, H hidden_size.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from ostinato import route, steps
from ostinato.call import Call, States
from ostinato.cells import CELLS
from ostinato.nn._arguments import (
    attribute,
    cast,
    check_devices,
    check_weights,
    named_copy,
    reject_dtype,
    reject_type,
    state_pair,
)
from ostinato.nn._neighbours import Neighbour
from ostinato.nn._stand_ins import are_tensors, is_symbolic, is_tensor_like, leaf
from ostinato.tensors import is_recorded, reject_nested, unrecorded, without_autocast

_unsafe_view = torch.ops.aten._unsafe_view.default
_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _alone(state: Tensor, size: int, dim: int) -> Tensor:
    """Bring (1, B, H) to (B, H), or (1, 1, H) to (H,), as a tensor that is no view of another.

    A view could not be detached in place. Nobody else holds this memory.
    """
    # A trace must not take the rows of its example for those of every call.
    shape = (size,) if dim == 1 else (-1 if size else state.shape[1], size)
    if is_recorded() and torch.onnx.is_in_onnx_export():
        return state.reshape(shape)  # that exporter does not know the other
    found: Tensor = _unsafe_view(state, shape)
    return found


def _as_layer(call: Call) -> Call:
    """Return the call of a layer with one step."""
    layer = call.each_state(lambda state: state.unsqueeze(0))
    return layer._replace(input=call.input.unsqueeze(0), batch=call.input.shape[0])


class _Cell(Neighbour, torch.nn.modules.rnn.RNNCellBase):
    """What the cells share: torch's arguments and words, and the call that they make."""

    # Stands in messages; the class name would differ in a parametrized or derived module.
    _kind: ClassVar[str]
    _cell: ClassVar[str]  # its record's name

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give each public class a forward of its own name, which Python puts into messages."""
        super().__init_subclass__(**kwargs)
        if "_kind" in cls.__dict__ and "forward" not in cls.__dict__:
            cls.forward = named_copy(cls.forward, cls.__name__)  # type: ignore[method-assign]

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Return h' of one step."""
        cell, weights = self._cell, self._weights()
        sizes = self.input_size, self.hidden_size, 0, 1
        biases = len(weights) == 4
        found = route.fast(cell, sizes, input, None, hx, None, weights, biases, is_step=True)
        if found is not None:
            h, _, _ = found
            return h
        if not are_tensors(input, hx):
            if is_symbolic(input, hx):
                return leaf(self, input, hx)
            if hx is not None and not is_tensor_like(hx):
                reject_type(self._kind, "hx", "a Tensor or None", hx)
        (h,) = self._step(cell, weights, input, hx)
        return h

    def _step(
        self, cell: str, weights: tuple[Any, ...], input: Any, *states: Tensor | None
    ) -> States:
        """Check the arguments in the order of torch and run one step.

        `weights` are what `_weights` found, input is (B, I) or (I,), states are (B, H) or (H,), or
        None. Returns the next states, shaped as these: no views, and on a CPU backward does not
        read them, so that they may be changed or detached in place.
        """
        dim = self._check_dims(input, states)
        if dim == 1:
            input = input.unsqueeze(0)
            states = tuple(None if state is None else state.unsqueeze(0) for state in states)
        for name, weight in zip(_NAMES, weights, strict=False):
            if weight is None:
                attribute(self, name)  # says so
        is_autocast = torch._C._is_any_autocast_enabled()
        if is_autocast:
            input, *rest = cast(weights[0].dtype, input, *states)
            states = tuple(rest)
        # On its own arrays, without dimensions for steps and directions.
        call = Call(input, None, 0, states, list(weights), cell, len(weights) == 4, False)
        if not is_autocast and not steps.is_on_gpu(input):
            found = steps.torch_step(call)
            if found is not None:
                return self._shaped(found, dim)
        self._check(weights, input, states)
        if not is_autocast:
            return self._run(call, dim, is_declined=True)
        with without_autocast(input):
            return self._run(call, dim, is_declined=False)

    def _check_dims(self, input: Any, states: States) -> int:
        """Refuse what is no tensor, or has not one or two dimensions; return those of input."""
        if not isinstance(input, Tensor) and not is_tensor_like(input):
            reject_type(self._kind, "input", "a Tensor", input)
        elif getattr(input, "is_nested", False) and input.dim() in (1, 2):
            reject_nested(f"{self._kind}: input")
        dim: int = input.dim()
        if dim not in (1, 2):
            raise ValueError(f"{self._kind}: Expected input to be 1D or 2D, got {dim}D instead")
        for k, state in enumerate(states):
            if state is not None and state.dim() not in (1, 2):
                what = f"hx[{k}]" if len(states) > 1 else "hidden"
                raise ValueError(
                    f"{self._kind}: Expected {what} to be 1D or 2D, got {state.dim()}D instead"
                )
        return dim

    def call_of(self, input: Any, hx: Any, lengths: Any, resets: Any) -> Call:
        """Return the call that forward would make as a layer, or refuse what it refuses."""
        for name, given in (("lengths", lengths), ("resets", resets)):
            if given is not None:
                reject_type(self._kind, name, "None for a cell", given)
        kind = CELLS[self._cell]
        states = (hx,) if len(kind.states) == 1 else state_pair(self._kind, hx) or ()
        dim = self._check_dims(input, states)
        weights = self._weights()
        if torch._C._is_any_autocast_enabled():
            input, *rest = cast(weights[0].dtype, input, *states)
            states = tuple(rest)
        missing = (None,) * (2 - dim)
        input, *rest = (None if t is None else t[missing] for t in (input, *states))
        self._check(weights, input, tuple(rest))
        call = Call(input, None, 0, tuple(rest), list(weights), kind.name, len(weights) == 4, False)
        return _as_layer(call)

    def _run(self, call: Call, dim: int, *, is_declined: bool) -> States:
        """Run one step, by operators or as a layer."""
        found = steps.torch_step(call) if steps.is_on_gpu(call.input) else None
        if found is None:
            found = steps.one_step(call)
        if found is not None:
            return self._shaped(found, dim)
        # Not the output, which backward may read: h_n is memory of its own in every backend.
        last = route.run(_as_layer(call), is_declined).last
        return tuple(_alone(state, self.hidden_size, dim) for state in last)

    @staticmethod
    def _shaped(states: States, dim: int) -> States:
        # Copies, since backward may read these states: an alias would hide a change from it.
        return states if dim == 2 else tuple(state.squeeze(0).clone() for state in states)

    def _weights(self) -> tuple[Any, ...]:
        """Return weight_ih, weight_hh and, unless there are none, bias_ih and bias_hh."""
        # nn.Module takes 0.6 us to answer an attribute, its dict 0.05.
        plain: dict[str, Any] = self._parameters
        found: tuple[Any, ...]
        try:
            found = plain["weight_ih"], plain["weight_hh"], plain["bias_ih"], plain["bias_hh"]
        except KeyError:  # buffers, parametrized, or replaced by plain tensors
            found = tuple(map(self._any_attribute, _NAMES))
        weight_ih, weight_hh, one, other = found
        if one is not None and other is not None:
            return found
        given = other if one is None else one
        if given is None:
            return weight_ih, weight_hh
        # torch's cells take a bias on one side alone.
        biases = (torch.zeros_like(given) if bias is None else bias for bias in (one, other))
        return weight_ih, weight_hh, *biases

    def _any_attribute(self, name: str) -> Any:
        """Return a weight wherever the module keeps it; a bias may be None."""
        found = self._buffers.get(name)
        return getattr(self, name) if found is None else found

    @unrecorded
    def _check(self, weights: tuple[Tensor, ...], input: Tensor, states: States) -> None:
        # As in torch, sizes come before dtypes.
        batch, size = input.shape
        if size != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {size} expected {self.input_size}"
            )
        expected = (batch, self.hidden_size)
        for k, state in enumerate(states):
            if state is not None and state.shape != expected:
                self._reject_size(k, batch, state)
        dtype = weights[0].dtype
        if input.dtype != dtype:
            reject_dtype(self._kind, "input", input, dtype)
        for k, state in enumerate(states):
            if state is not None and state.dtype != dtype:
                reject_dtype(self._kind, f"hx[{k}]" if len(states) > 1 else "hx", state, dtype)
        check_devices(input, weights[0], states)
        rows = CELLS[self._cell].gates * self.hidden_size
        shapes = [(rows, self.input_size), (rows, self.hidden_size), (rows,), (rows,)]
        count = len(weights)
        check_weights(self._kind, _NAMES[:count], weights, shapes[:count], input)

    def _reject_size(self, index: int, batch: int, state: Tensor) -> NoReturn:
        if state.dim() != 2:
            raise RuntimeError(
                f"Expected 2D hidden{index} (batch x hidden_size), but got {state.dim()}D tensor"
            )
        if state.size(0) != batch:
            raise RuntimeError(
                f"Input batch size {batch} doesn't match hidden{index} batch size {state.size(0)}"
            )
        got: object = list(state.shape)
        if state.dim() > 1 and state.size(1) != self.hidden_size:
            got = state.size(1)
        raise RuntimeError(
            f"hidden{index} has inconsistent hidden_size: got {got}, expected {self.hidden_size}"
        )


class RNNCell(_Cell):
    """One step of an Elman RNN.

    h' = phi(W_ih x + b_ih + W_hh h + b_hh), phi being tanh or relu (docs/math.md, 2).

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether b_ih and b_hh exist.
        nonlinearity: "tanh" or "relu".
        device: where parameters are created.
        dtype: of the parameters.

    `forward(input, hx=None)` takes input (B, I) or (I,) and hx (B, H) or (H,), None meaning
    zeros. Under torch.autocast it computes in the dtype of the weights.

    Returns:
        From `forward`: h', shaped as hx.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: input or hx of another number of dimensions or another dtype than the weights.
        RuntimeError: sizes that do not fit, or an unknown nonlinearity.

    Example:
        >>> import torch
        >>> from ostinato import nn
        >>> cell = nn.RNNCell(10, 20)
        >>> h = torch.zeros(3, 20)
        >>> for x in torch.randn(6, 3, 10):
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([3, 20])

    Source: Elman 1990, doi:10.1207/s15516709cog1402_1, with torch's two biases.
    """

    _kind = "RNNCell"
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    @property
    def _cell(self) -> str:  # type: ignore[override]
        return f"rnn_{self.nonlinearity}"

    def _step(
        self, cell: str, weights: tuple[Any, ...], input: Any, *states: Tensor | None
    ) -> States:
        # As in torch, the attribute counts when it is used, not when it is set.
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return super()._step(cell, weights, input, *states)


class GRUCell(_Cell):
    """One step of a gated recurrent unit.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr), z likewise,
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn)), h' = (1 - z) * n + z * h (docs/math.md, 7-10).

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether b_ih and b_hh exist.
        device: where parameters are created.
        dtype: of the parameters.

    `forward(input, hx=None)` takes input (B, I) or (I,) and hx (B, H) or (H,), None meaning
    zeros. Under torch.autocast it computes in the dtype of the weights.

    Returns:
        From `forward`: h', shaped as hx.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: input or hx of another number of dimensions or another dtype than the weights.
        RuntimeError: sizes that do not fit.

    Example:
        >>> import torch
        >>> from ostinato import nn
        >>> cell = nn.GRUCell(10, 20)
        >>> cell(torch.randn(3, 10)).shape, cell(torch.randn(10)).shape
        (torch.Size([3, 20]), torch.Size([20]))

    Source: Cho et al. 2014, arXiv:1406.1078v1, reset after the matrix product as in cuDNN.
    """

    _kind = "GRUCell"
    _cell = "gru"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)


class LSTMCell(_Cell):
    """One step of a long short-term memory.

    i, f, o = sigmoid(W_i x + b_i + W_h h + b_h), g = tanh(likewise), c' = f * c + i * g,
    h' = o * tanh(c') (docs/math.md, 16-21).

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of both states.
        bias: whether b_ih and b_hh exist.
        device: where parameters are created.
        dtype: of the parameters.

    `forward(input, hx=None)` takes input (B, I) or (I,) and hx = (h, c), a tuple or a list of
    (B, H) or (H,), None meaning zeros. Under torch.autocast it computes in the dtype of the
    weights.

    Returns:
        From `forward`: (h', c'), shaped as h and c.

    Raises:
        TypeError: an argument of another Python type.
        ValueError: input or hx of another number of dimensions or another dtype than the weights.
        RuntimeError: sizes that do not fit.

    Example:
        >>> import torch
        >>> from ostinato import nn
        >>> cell = nn.LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10), (torch.zeros(3, 20), torch.zeros(3, 20)))
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))

    Source: Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735, with the forget gate of
    Gers et al. 2000 and without peepholes.
    """

    _kind = "LSTMCell"
    _cell = "lstm"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (h', c') of one step."""
        states = state_pair(self._kind, hx)
        if states is None:
            return leaf(self, input, hx)  # type: ignore[no-any-return]
        h, c = states
        weights = self._weights()
        sizes = self.input_size, self.hidden_size, 0, 1
        biases = len(weights) == 4
        found = route.fast("lstm", sizes, input, None, h, c, weights, biases, is_step=True)
        if found is None:
            if is_symbolic(input):
                return leaf(self, input, hx)  # type: ignore[no-any-return]
            h, c = self._step("lstm", weights, input, h, c)
        else:
            h, _, c = found
        assert c is not None
        return h, c
