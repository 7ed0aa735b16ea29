"""RNNCell, GRUCell and LSTMCell: one step per call.

Legend: B batch, I input_size, H hidden_size.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from ostinato import ops, short, steps
from ostinato.call import reject_nested, without_autocast
from ostinato.nn._arguments import (
    attribute,
    cast,
    check_devices,
    check_weights,
    reject_dtype,
    reject_type,
    state_pair,
)
from ostinato.nn._neighbours import Neighbour
from ostinato.nn._stand_ins import are_tensors, is_symbolic, is_tensor_like, leaf
from ostinato.traced import is_recorded, unrecorded

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


class _Cell(Neighbour, torch.nn.modules.rnn.RNNCellBase):
    """What the cells share: every check, then a layer of one step."""

    # Stands in messages; the class name would differ in a parametrized or derived module.
    _kind: ClassVar[str]
    _gates: ClassVar[int]

    def _step(
        self,
        cell: str,
        weights: tuple[Any, ...],
        input: Any,
        h: Tensor | None,
        c: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Check the arguments in the order of torch and run one step.

        Args:
            cell: name of the cell in `ostinato.ops.layer`.
            weights: what `_weights` found.
            input: (B, I) or (I,).
            h: (B, H) or (H,), or None.
            c: likewise.

        Returns:
            h' and c', shaped as h and c: no views, and backward does not read them, so that they
            may be changed or detached in place.
        """
        if not isinstance(input, Tensor) and not is_tensor_like(input):
            reject_type(self._kind, "input", "a Tensor", input)
        elif getattr(input, "is_nested", False) and input.dim() in (1, 2):
            reject_nested(f"{self._kind}: input")
        dim = input.dim()
        if dim not in (1, 2):
            self._reject_dim(dim)
        if h is not None and h.dim() not in (1, 2):
            self._reject_dims(0, h)
        if c is not None and c.dim() not in (1, 2):
            self._reject_dims(1, c)
        if dim == 1:
            input = input.unsqueeze(0)
            h = None if h is None else h.unsqueeze(0)
            c = None if c is None else c.unsqueeze(0)
        if weights[0] is None or weights[1] is None:
            for name in _NAMES[:2]:
                attribute(self, name)  # says so
        autocast = torch._C._is_any_autocast_enabled()
        if autocast:
            input, h, c = cast(weights[0].dtype, input, h, c)
        else:
            found = steps.torch_step(cell, input, h, c, weights)
            if found is not None:
                return found if dim == 2 else self._one_row(*found)
        self._check(weights, input, h, c)
        if not autocast:
            return self._call(cell, weights, input, h, c, dim)
        with without_autocast(input):
            return self._call(cell, weights, input, h, c, dim)

    def explained(self, input: Any, lengths: Any, resets: Any) -> tuple[Tensor, None, list[Tensor]]:
        """Refuse what forward refuses, and run nothing: for `ostinato.cuda.explain`.

        Args:
            input: of forward.
            lengths: must be None, since a cell takes none.
            resets: likewise.

        Returns:
            input, (1, B, I), no batch_sizes, and the weights.
        """
        for name, given in (("lengths", lengths), ("resets", resets)):
            if given is not None:
                reject_type(self._kind, name, "None for a cell", given)
        if not isinstance(input, Tensor):
            reject_type(self._kind, "input", "a Tensor", input)
        if input.dim() not in (1, 2):
            self._reject_dim(input.dim())
        if input.is_nested:
            reject_nested(f"{self._kind}: input")
        rows = input.unsqueeze(0) if input.dim() == 1 else input
        weights = self._weights()
        if torch._C._is_any_autocast_enabled():
            rows, _, _ = cast(weights[0].dtype, rows, None, None)
        self._check(weights, rows, None, None)
        return rows.unsqueeze(0), None, list(weights)

    def _reject_dim(self, dim: int) -> NoReturn:
        raise ValueError(f"{self._kind}: Expected input to be 1D or 2D, got {dim}D instead")

    def _call(
        self,
        cell: str,
        weights: tuple[Tensor, ...],
        input: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        dim: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Run one step of (B, I), (B, H) as a layer of (1, B, I), (1, B, H)."""
        found = steps.one_step(cell, input, h, c, weights)
        if found is not None:
            return found if dim == 2 else self._one_row(*found)
        # Not the output, which backward may read: h_n is memory of its own in every backend.
        _, h_n, c_n = ops.layer(
            cell,
            input.unsqueeze(0),
            None,
            None if h is None else h.unsqueeze(0),
            None if c is None else c.unsqueeze(0),
            list(weights),
            has_biases=len(weights) == 4,
            bidirectional=False,
        )
        size = self.hidden_size
        return _alone(h_n, size, dim), None if c_n is None else _alone(c_n, size, dim)

    @staticmethod
    def _one_row(h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # Copies, since backward may read these states: an alias would hide a change from it.
        return h.squeeze(0).clone(), None if c is None else c.squeeze(0).clone()

    def _weights(self) -> tuple[Any, ...]:
        """Return weight_ih, weight_hh and, unless there are none, bias_ih and bias_hh."""
        # nn.Module takes 0.6 us to answer an attribute, its dict 0.05.
        plain: dict[str, Any] = self._parameters
        found: tuple[Any, ...]
        try:
            found = plain["weight_ih"], plain["weight_hh"], plain["bias_ih"], plain["bias_hh"]
        except KeyError:  # buffers, parametrized, or replaced by plain tensors
            found = tuple(map(self._any_attribute, _NAMES))
        one, other = found[2:]
        if one is not None and other is not None:
            return found
        given = other if one is None else one
        if given is None:
            return found[:2]
        # torch's cells take a bias on one side alone.
        biases = (torch.zeros_like(given) if bias is None else bias for bias in (one, other))
        return *found[:2], *biases

    def _any_attribute(self, name: str) -> Any:
        """Return a weight wherever the module keeps it; a bias may be None."""
        found = self._buffers.get(name)
        return getattr(self, name) if found is None else found

    @unrecorded
    def _check(
        self, weights: tuple[Tensor, ...], input: Tensor, h: Tensor | None, c: Tensor | None
    ) -> None:
        # As in torch, sizes come before dtypes.
        batch, size = input.shape
        if size != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {size} expected {self.input_size}"
            )
        expected = (batch, self.hidden_size)
        if h is not None and h.shape != expected:
            self._reject_size(0, batch, h)
        if c is not None and c.shape != expected:
            self._reject_size(1, batch, c)
        dtype = weights[0].dtype
        if input.dtype != dtype:
            reject_dtype(self._kind, "input", input, dtype)
        if h is not None and h.dtype != dtype:
            reject_dtype(self._kind, "hx" if c is None else "hx[0]", h, dtype)
        if c is not None and c.dtype != dtype:
            reject_dtype(self._kind, "hx[1]", c, dtype)
        check_devices(input, weights[0], h, c)
        rows = self._gates * self.hidden_size
        shapes = [(rows, self.input_size), (rows, self.hidden_size), (rows,), (rows,)]
        count = len(weights)
        check_weights(self._kind, _NAMES[:count], weights, shapes[:count], input)

    def _reject_dims(self, index: int, state: Tensor) -> NoReturn:
        raise ValueError(
            f"{self._kind}: Expected hidden to be 1D or 2D, got {state.dim()}D instead"
        )

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
    _gates = 1
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

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h' of one step."""
        cell, weights = f"rnn_{self.nonlinearity}", self._weights()
        sizes = self.input_size, self.hidden_size, 0, 1
        biases = len(weights) == 4
        found = short.run(cell, sizes, input, None, hx, None, weights, biases, is_cell=True)
        if found is not None:
            return found[0]
        if not are_tensors(input, hx):
            if is_symbolic(input, hx):
                return leaf(self, input, hx)  # type: ignore[no-any-return]
            if hx is not None and not is_tensor_like(hx):
                reject_type(self._kind, "hx", "a Tensor or None", hx)
        # As in torch, the attribute counts when it is used, not when it is set.
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._step(cell, weights, input, hx, None)[0]


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
    _gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h' of one step."""
        weights = self._weights()
        sizes = self.input_size, self.hidden_size, 0, 1
        biases = len(weights) == 4
        found = short.run("gru", sizes, input, None, hx, None, weights, biases, is_cell=True)
        if found is not None:
            return found[0]
        if not are_tensors(input, hx):
            if is_symbolic(input, hx):
                return leaf(self, input, hx)  # type: ignore[no-any-return]
            if hx is not None and not is_tensor_like(hx):
                reject_type(self._kind, "hx", "a Tensor or None", hx)
        return self._step("gru", weights, input, hx, None)[0]


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
    _gates = 4

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
        found = short.run("lstm", sizes, input, None, h, c, weights, biases, is_cell=True)
        if found is None:
            if is_symbolic(input):
                return leaf(self, input, hx)  # type: ignore[no-any-return]
            h, c = self._step("lstm", weights, input, h, c)
        else:
            h, c = found[0], found[2]
        assert c is not None
        return h, c

    def _reject_dims(self, index: int, state: Tensor) -> NoReturn:
        raise ValueError(
            f"{self._kind}: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead"
        )
