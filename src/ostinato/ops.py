"""The operators: schemas, every check, fake kernels, autograd, and one registration per backend.

`layer` is what the modules call. It runs one recurrent layer, in one or two directions:

- float32 and float64 on the CPU: the operator `ostinato::layer`, which is the compiled engine;
- CUDA: torch's cuDNN operator where that can serve (`ostinato.cuda`);
- anything else: the reference, which torch's autograd differentiates.

Every way starts at `_check`, and the engine can be reached through nothing else.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step (proj_size, or H),
D directions.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ostinato import _core, cuda, reference

_log = logging.getLogger("ostinato")

# The engine's number of each cell (csrc/cpu/engine.h) and its gates.
_CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "gru": 2, "lstm": 3}
_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
_ENGINE_DTYPES = (torch.float32, torch.float64)
# What the engine keeps for backward: values per unit and row, units padded to a multiple
# (csrc/cpu/engine.h, saved_of and padded). The fake kernel cannot ask it, since sizes are symbols.
_SAVED = {"rnn_tanh": 0, "rnn_relu": 0, "gru": 4, "lstm": 5}
_PAD = 16

_LAYER = """layer(
    Tensor input, Tensor? batch_sizes, SymInt batch, Tensor? h_0, Tensor? c_0, Tensor[] weights,
    str cell, bool has_biases, bool bidirectional, bool keep
) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor reserve)"""
_LAYER_BACKWARD = """layer_backward(
    Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor output, Tensor reserve,
    bool[] wanted,
    Tensor input, Tensor? batch_sizes, SymInt batch, Tensor? h_0, Tensor? c_0, Tensor[] weights,
    str cell, bool has_biases, bool bidirectional
) -> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor[] grad_weights)"""

_library = torch.library.Library("ostinato", "DEF")  # type: ignore[no-untyped-call]
_library.define(_LAYER)  # type: ignore[no-untyped-call]
_library.define(_LAYER_BACKWARD)  # type: ignore[no-untyped-call]


class _Call(NamedTuple):
    """The arguments that both operators share, in the order of their schemas."""

    input: Tensor
    batch_sizes: Tensor | None
    batch: int
    h_0: Tensor | None
    c_0: Tensor | None
    weights: list[Tensor]
    cell: str
    has_biases: bool
    bidirectional: bool

    def tensors(self) -> list[Tensor | None]:
        """Return what can have a gradient: input, h_0, c_0, then the weights."""
        return [self.input, self.h_0, self.c_0, *self.weights]


class _Sizes(NamedTuple):
    """Sizes of one layer, in the engine's order."""

    steps: int
    rows: int
    batch: int
    input: int
    hidden: int
    projection: int  # 0 where there is none
    directions: int

    @property
    def output(self) -> int:
        return self.projection or self.hidden


def layer(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    *,
    has_biases: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run one recurrent layer over a padded or packed batch.

    state_t = step(input_t, state_{t-1}), by docs/math.md.

    Args:
        cell: "rnn_tanh", "rnn_relu", "gru" or "lstm".
        input: (T, B, I), or packed (N, I) if `batch_sizes` is given.
        batch_sizes: None, or active rows per step, (T,), int64 on the CPU, never increasing.
        h_0: (D, B, O), or None for zeros.
        c_0: (D, B, H), or None for zeros; LSTM only.
        weights: per direction weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr].
        has_biases: whether `weights` holds biases.
        bidirectional: whether `weights` holds a second, reverse direction.

    Returns:
        output, (T, B, D * O) or (N, D * O); h_n, (D, B, O); c_n, (D, B, H), or None where the cell
        is no LSTM.

    Raises:
        ValueError: a dtype that differs from the weights', an unknown cell, wrong batch_sizes.
        RuntimeError: a wrong shape or device, or more or fewer weights than the cell has.

    Example:
        >>> weights = list(torch.nn.GRUCell(3, 4).parameters())
        >>> output, h_n, _ = layer("gru", torch.zeros(5, 2, 3), None, None, None, weights,
        ...                        has_biases=True, bidirectional=False)
        >>> output.shape, h_n.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))

    Source: torch.nn.RNN, GRU and LSTM.
    """
    _require_tensor("input", input)
    if h_0 is not None:
        _require_tensor("h_0", h_0)
    if c_0 is not None:
        _require_tensor("c_0", c_0)
    for weight in weights:
        _require_tensor("weights", weight)
    call = _Call(
        input,
        batch_sizes,
        _batch(input, batch_sizes, h_0, c_0),
        h_0,
        c_0,
        weights,
        cell,
        has_biases,
        bidirectional,
    )
    tensors = call.tensors()
    device = input.device.type
    if _has_engine(call) and not _is_transformed():
        keep = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in tensors
        )
        if device == "cpu" and not _is_watched() and all(map(_is_plain, tensors)):
            return _PlainLayer.run(call) if keep else _run(call, False)[:3]
        output, h_n, c_n, _ = torch.ops.ostinato.layer(*call, keep)
        return output, h_n, c_n if cell == "lstm" else None
    sizes = _check(call)
    if device == "cuda" and cuda.serves(input):
        return cuda.layer(cell, input, batch_sizes, sizes, h_0, c_0, weights, has_biases)
    if input.dtype not in _ENGINE_DTYPES or device not in ("cpu", "meta"):
        _tell_reference(device, input.dtype)
    return _reference(call)


def _batch(
    input: Tensor, batch_sizes: Tensor | None, h_0: Tensor | None, c_0: Tensor | None
) -> int:
    """Return B; what does not have the right form is left to `_check`."""
    if batch_sizes is None:
        return input.shape[1] if input.dim() == 3 else 0
    _check_batch_sizes_form(batch_sizes)
    state = h_0 if h_0 is not None else c_0
    if state is not None:
        return state.shape[1] if state.dim() == 3 else 0
    return int(batch_sizes[0]) if len(batch_sizes) else 0


def _has_engine(call: _Call) -> bool:
    """Whether an engine serves device and dtype. A layer without units is left to the reference."""
    input = call.input
    return (
        input.dtype in _ENGINE_DTYPES
        and input.device.type in ("cpu", "meta")
        and not any(weight.numel() == 0 for weight in call.weights[:2])
    )


def _is_transformed() -> bool:
    """Whether vmap, torch.func or forward-mode differentiation is at work.

    They get the reference, operation by operation: the operators have no rules for them.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _is_watched() -> bool:
    """Whether a compiler, tracer, mode or profiler is to see the operator.

    Where none is, the dispatcher is left out: it costs several times a step of a small cell.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
    )


def _is_plain(tensor: Tensor | None) -> bool:
    """Whether memory holds the values as they are: no subclass, lazy negation or lazy zeros."""
    return tensor is None or (
        type(tensor) in _PLAIN and not tensor.is_neg() and not tensor._is_zerotensor()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _reference(call: _Call) -> tuple[Tensor, Tensor, Tensor | None]:
    return reference.layer(
        call.cell,
        call.input,
        call.batch_sizes,
        call.h_0,
        call.c_0,
        call.weights,
        has_biases=call.has_biases,
        bidirectional=call.bidirectional,
    )


_told: set[tuple[str, torch.dtype]] = set()


def _tell_reference(device: str, dtype: torch.dtype) -> None:
    """Say once per device and dtype that no engine serves it."""
    if torch.compiler.is_compiling() or (device, dtype) in _told:
        return
    _told.add((device, dtype))
    _log.warning("no engine for %s on %s: the reference runs, correctly and slowly", dtype, device)


# ---- checks ----


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def _check(call: _Call, values: bool = True) -> _Sizes:
    """Check shapes, dtypes and devices of everything; return the sizes.

    The values of batch_sizes are checked too, unless they are those of a fake tensor.
    """
    input, batch_sizes, batch, h_0, c_0, weights, cell, has_biases, bidirectional = call
    gates = _GATES.get(cell)
    if gates is None:
        raise ValueError(f"cell: expected one of {', '.join(_GATES)}, got {cell!r}")
    if input.dim() != (3 if batch_sizes is None else 2):
        expected = "3D" if batch_sizes is None else "2D (packed)"
        raise RuntimeError(f"input: expected {expected}, got {input.dim()}D")
    if not (input.is_floating_point() or input.is_complex()):
        raise ValueError(f"input: expected a floating or complex dtype, got {input.dtype}")
    if input.layout is not torch.strided:
        raise RuntimeError(f"input: expected a strided tensor, got layout {input.layout}")
    if batch_sizes is None and batch != input.shape[1]:
        raise RuntimeError(f"batch: expected {input.shape[1]}, the batch of input, got {batch}")
    directions = 2 if bidirectional else 1
    count, rest = divmod(len(weights), directions)
    plain = 4 if has_biases else 2
    projected = cell == "lstm" and count == plain + 1
    if rest or not (count == plain or projected):
        raise RuntimeError(
            f"weights: expected {plain} per direction for {cell}, got {len(weights)} in all"
        )
    weight_hh = weights[1]
    if weight_hh.dim() != 2:
        raise RuntimeError(f"weight_hh: expected 2D, got {weight_hh.dim()}D")
    rows_hh, output = weight_hh.shape
    hidden = rows_hh // gates
    if rows_hh != gates * hidden or (not projected and output != hidden):
        columns = "proj_size" if projected else "hidden_size"
        raise RuntimeError(
            f"weight_hh: expected shape ({gates} * hidden_size, {columns}), "
            f"got {tuple(weight_hh.shape)}"
        )
    layout: list[tuple[str, tuple[int, ...]]] = [
        ("weight_ih", (rows_hh, input.shape[-1])),
        ("weight_hh", (rows_hh, output)),
    ]
    if has_biases:
        layout += [("bias_ih", (rows_hh,)), ("bias_hh", (rows_hh,))]
    if projected:
        layout.append(("weight_hr", (output, hidden)))
    for index, weight in enumerate(weights):
        name, shape = layout[index % count]
        if not _fits(weight, shape, input):
            _refuse(name + "_reverse" * (index // count), weight, shape, input)
    if h_0 is not None and not _fits(h_0, (directions, batch, output), input):
        _refuse("h_0", h_0, (directions, batch, output), input)
    if c_0 is not None:
        if cell != "lstm":
            raise RuntimeError(f"c_0: expected None for {cell}")
        if not _fits(c_0, (directions, batch, hidden), input):
            _refuse("c_0", c_0, (directions, batch, hidden), input)
    if batch_sizes is None:
        steps, rows = input.shape[0], input.shape[0] * batch
    else:
        _check_batch_sizes_form(batch_sizes)
        steps, rows = len(batch_sizes), input.shape[0]
        if values:
            _check_batch_sizes(batch_sizes.tolist(), batch, rows)
    return _Sizes(
        steps, rows, batch, input.shape[-1], hidden, output if projected else 0, directions
    )


def _fits(tensor: Tensor, shape: tuple[int, ...], input: Tensor) -> bool:
    return (
        tensor.shape == shape
        and tensor.dtype == input.dtype
        and tensor.device == input.device
        and tensor.layout is torch.strided
    )


def _refuse(name: str, tensor: Tensor, shape: tuple[int, ...], input: Tensor) -> NoReturn:
    """Raise for the first of shape, dtype, device and layout that does not fit."""
    if tensor.shape != shape:
        raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != input.dtype:
        raise ValueError(f"{name}: expected the dtype of input, {input.dtype}, got {tensor.dtype}")
    if tensor.device != input.device:
        raise RuntimeError(
            f"{name}: expected the device of input, {input.device}, got {tensor.device}"
        )
    raise RuntimeError(f"{name}: expected a strided tensor, got layout {tensor.layout}")


def _check_batch_sizes_form(batch_sizes: Tensor) -> None:
    _require_tensor("batch_sizes", batch_sizes)
    if (
        batch_sizes.dim() != 1
        or batch_sizes.dtype != torch.int64
        or batch_sizes.device.type != "cpu"
    ):
        raise RuntimeError(
            "batch_sizes: expected a 1D int64 tensor on the CPU, "
            f"got {batch_sizes.dim()}D {batch_sizes.dtype} on {batch_sizes.device}"
        )


def _check_batch_sizes(sizes: list[int], batch: int, rows: int) -> None:
    """Refuse what would make the engine leave its arrays."""
    if any(a < b for a, b in itertools.pairwise([batch, *sizes, 0])):
        raise ValueError(
            f"batch_sizes: expected sizes that fall from at most {batch} to at least 0, got {sizes}"
        )
    if sum(sizes) != rows:
        raise ValueError(
            f"batch_sizes: expected a sum of {rows}, the rows of input, got {sum(sizes)}"
        )


def _check_backward(
    call: _Call,
    sizes: _Sizes,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    output: Tensor,
    reserve: Tensor,
    wanted: list[bool],
) -> None:
    """Check what backward takes beyond forward's arguments."""
    input = call.input
    shape = (*input.shape[:-1], sizes.directions * sizes.output)
    state = (sizes.directions, sizes.batch, sizes.output)
    cell_state = (sizes.directions, sizes.batch, sizes.hidden)
    for name, tensor, expected in (
        ("output", output, shape),
        ("grad_output", grads[0], shape),
        ("grad_h_n", grads[1], state),
        ("grad_c_n", grads[2] if call.cell == "lstm" else None, cell_state),
    ):
        if tensor is not None and not _fits(tensor, expected, input):
            _refuse(name, tensor, expected, input)
    needed = _core.reserve_bytes(_CELLS[call.cell], input.dtype == torch.float64, sizes)
    if reserve.dtype != torch.uint8 or reserve.numel() != needed or not reserve.is_contiguous():
        raise RuntimeError(
            f"reserve: expected the {needed} bytes of ostinato::layer with keep=True, "
            f"got {reserve.numel()} of {reserve.dtype}"
        )
    if len(wanted) != len(call.tensors()):
        raise RuntimeError(f"wanted: expected {len(call.tensors())} flags, got {len(wanted)}")


# ---- the CPU engine ----


def _threads() -> int:
    return _core.forced_threads or torch.get_num_threads()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(weights: Sequence[Tensor | None], sizes: _Sizes, has_biases: bool) -> list[int]:
    """Five addresses per direction, 0 where a weight is absent."""
    addresses = []
    count = len(weights) // sizes.directions
    for first in range(0, len(weights), count):
        ih, hh, *others = map(_address, weights[first : first + count])
        biases = others[:2] if has_biases else (0, 0)
        addresses += [ih, hh, *biases, others[-1] if sizes.projection else 0]
    return addresses


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _run(call: _Call, keep: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Check, allocate and run the engine; c_n and reserve are None where there is none."""
    sizes = _check(call)
    is_double = call.input.dtype == torch.float64
    # Named, so that dense copies outlive the call that reads their addresses.
    x, steps, h, c = call.input.contiguous(), *map(_dense, (call.batch_sizes, call.h_0, call.c_0))
    weights = [weight.contiguous() for weight in call.weights]
    output = x.new_empty((*x.shape[:-1], sizes.directions * sizes.output))
    h_n = x.new_empty((sizes.directions, sizes.batch, sizes.output))
    c_n = reserve = None
    if call.cell == "lstm":
        c_n = x.new_empty((sizes.directions, sizes.batch, sizes.hidden))
    if keep:
        kept = _core.reserve_bytes(_CELLS[call.cell], is_double, sizes)
        reserve = x.new_empty((kept,), dtype=torch.uint8)
    _core.layer_forward(
        _CELLS[call.cell],
        is_double,
        sizes,
        _address(steps),
        x.data_ptr(),
        _address(h),
        _address(c),
        _addresses(weights, sizes, call.has_biases),
        output.data_ptr(),
        h_n.data_ptr(),
        _address(c_n),
        _address(reserve),
        _threads(),
    )
    return output, h_n, c_n, reserve


def _layer_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_run` for the dispatcher, whose results are always tensors."""
    *call, keep = arguments
    output, h_n, c_n, reserve = _run(_Call(*call), keep)
    if c_n is None:
        c_n = output.new_empty((0,))
    if reserve is None:
        reserve = output.new_empty((0,), dtype=torch.uint8)
    return output, h_n, c_n, reserve


def _layer_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape the results: output, h_n, c_n (empty but for LSTM) and what backward will read."""
    *fields, keep = arguments
    call = _Call(*fields)
    input, sizes = call.input, _check(call, values=False)
    state = (sizes.directions, sizes.batch)
    padded = (sizes.hidden + _PAD - 1) // _PAD * _PAD
    kept = sizes.directions * sizes.rows * _SAVED[call.cell] * padded * input.element_size()
    return (
        input.new_empty((*input.shape[:-1], sizes.directions * sizes.output)),
        input.new_empty((*state, sizes.output)),
        input.new_empty((*state, sizes.hidden) if call.cell == "lstm" else (0,)),
        input.new_empty((kept if keep else 0,), dtype=torch.uint8),
    )


def _layer_backward_cpu(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    wanted: list[bool],
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    call = _Call(*arguments)
    sizes = _check(call)
    _check_backward(call, sizes, (grad_output, grad_h_n, grad_c_n), output, reserve, wanted)
    x, steps, h, c = call.input.contiguous(), *map(_dense, (call.batch_sizes, call.h_0, call.c_0))
    weights, y = [weight.contiguous() for weight in call.weights], output.contiguous()
    dy, dh_n = _dense(grad_output), _dense(grad_h_n)
    dc_n = _dense(grad_c_n) if call.cell == "lstm" else None
    dx, dh_0, dc_0, grads = _gradients(call, sizes, wanted)
    # An empty result stands for one that is not wanted; the engine must not touch it.
    places = [
        result if want else None
        for result, want in zip((dx, dh_0, dc_0, *grads), wanted, strict=True)
    ]
    _core.layer_backward(
        _CELLS[call.cell],
        x.dtype == torch.float64,
        sizes,
        _address(steps),
        x.data_ptr(),
        _address(h),
        _address(c),
        _addresses(weights, sizes, call.has_biases),
        y.data_ptr(),
        reserve.data_ptr(),
        _address(dy),
        _address(dh_n),
        _address(dc_n),
        _address(places[0]),
        _address(places[1]),
        _address(places[2]),
        _addresses(places[3:], sizes, call.has_biases),
        _threads(),
    )
    return dx, dh_0, dc_0, grads


def _gradients(
    call: _Call, sizes: _Sizes, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Allocate the gradients; one that is not wanted is empty."""
    shapes: list[Sequence[int]] = [
        call.input.shape,
        (sizes.directions, sizes.batch, sizes.output),
        (sizes.directions, sizes.batch, sizes.hidden),
        *(weight.shape for weight in call.weights),
    ]
    dx, dh_0, dc_0, *grads = (
        call.input.new_empty(tuple(shape) if want else (0,))
        for shape, want in zip(shapes, wanted, strict=True)
    )
    return dx, dh_0, dc_0, grads


def _layer_backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    _, _, _, _, _, wanted, *fields = arguments
    call = _Call(*fields)
    return _gradients(call, _check(call, values=False), wanted)


# ---- autograd ----


def _setup_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *fields, ctx.keep = inputs
    call = _Call(*fields)
    y, _, _, reserve = output
    ctx.save_for_backward(y, reserve, call.batch_sizes, *call.tensors())
    ctx.weights, ctx.batch, ctx.config = len(call.weights), call.batch, call[6:]
    ctx.set_materialize_grads(False)


def _saved_call(ctx: Any) -> tuple[list[Any], _Call]:
    """Return what was saved before the call's own tensors, and the call."""
    saved = ctx.saved_tensors  # read once: a checkpoint recomputes at every reading
    *before, batch_sizes, input, h_0, c_0 = saved[: -ctx.weights]
    weights = list(saved[-ctx.weights :])
    return before, _Call(input, batch_sizes, ctx.batch, h_0, c_0, weights, *ctx.config)


def _layer_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    if not ctx.keep:
        raise RuntimeError("ostinato::layer: backward needs a forward call with keep=True")
    (y, reserve), call = _saved_call(ctx)
    needs_input, _, _, needs_h_0, needs_c_0, needs_weights, *_ = ctx.needs_input_grad
    wanted = [needs_input, needs_h_0, needs_c_0, *needs_weights]
    found: list[Tensor | None] = [None] * len(wanted)
    if any(grad is not None for grad in grads[:3]):
        dx, dh_0, dc_0, dw = torch.ops.ostinato.layer_backward(
            *grads[:3], y, reserve, wanted, *call
        )
        found = [g if want else None for g, want in zip((dx, dh_0, dc_0, *dw), wanted, strict=True)]
    dx, dh_0, dc_0, *dw = found
    return dx, None, None, dh_0, dc_0, dw, None, None, None, None


class _PlainLayer(torch.autograd.Function):
    """`ostinato::layer` with its gradient, for calls that only autograd needs to see.

    The same kernels and formulas as behind the operator, at a fifth of the cost per call.
    """

    @staticmethod
    def run(call: _Call) -> tuple[Tensor, Tensor, Tensor | None]:
        input, batch_sizes, batch, h_0, c_0, weights, *config = call
        results = _PlainLayer.apply(  # type: ignore[no-untyped-call]
            batch_sizes, batch, config, input, h_0, c_0, *weights
        )
        return results if call.cell == "lstm" else (*results, None)

    @staticmethod
    def forward(
        ctx: Any,
        batch_sizes: Tensor | None,
        batch: int,
        config: tuple[str, bool, bool],
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        call = _Call(input, batch_sizes, batch, h_0, c_0, list(weights), *config)
        output, h_n, c_n, reserve = _run(call, True)
        ctx.save_for_backward(output, reserve, batch_sizes, input, h_0, c_0, *weights)
        ctx.weights, ctx.batch, ctx.config = len(weights), batch, config
        ctx.set_materialize_grads(False)
        return (output, h_n) if c_n is None else (output, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, dh_n, dc_n = (*grads, None)[:3]
        wanted = list(ctx.needs_input_grad[3:])
        if dy is None and dh_n is None and dc_n is None:
            return (None, None, None, *[None] * len(wanted))
        (y, reserve), call = _saved_call(ctx)
        # A gradient to be differentiated, or one that is no plain memory, takes the operator.
        plain = not torch.is_grad_enabled() and all(map(_is_plain, grads))
        backward = _layer_backward_cpu if plain else torch.ops.ostinato.layer_backward
        dx, dh_0, dc_0, dw = backward(dy, dh_n, dc_n, y, reserve, wanted, *call)
        found = zip((dx, dh_0, dc_0, *dw), wanted, strict=True)
        return (None, None, None, *[grad if want else None for grad, want in found])


def _setup_layer_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *grads, _, _, ctx.wanted = inputs[:6]
    call = _Call(*inputs[6:])
    ctx.save_for_backward(*grads, call.batch_sizes, *call.tensors())
    ctx.weights, ctx.batch, ctx.config = len(call.weights), call.batch, call[6:]
    ctx.set_materialize_grads(False)


def _layer_backward_gradient(ctx: Any, *outer: Any) -> tuple[Any, ...]:
    """Second derivatives: the reference differentiated twice.

    `output` and `reserve` are functions of the other arguments, whose derivatives are taken in full
    here, so they get none of their own.
    """
    grads, call = _saved_call(ctx)
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: derivatives with respect to this call's arguments stop here, higher ones go on.
        seeds = [_alias(grad) for grad in grads]
        input, h_0, c_0, *weights = primals = [_alias(tensor) for tensor in call.tensors()]
        results = _reference(call._replace(input=input, h_0=h_0, c_0=c_0, weights=weights))
        pairs = [
            (result, seed)
            for result, seed in zip(results, seeds, strict=True)
            if result is not None and seed is not None
        ]
        asked = [
            primal
            for primal, want in zip(primals, ctx.wanted, strict=True)
            if want and primal is not None
        ]
        inner: Sequence[Tensor | None] = torch.autograd.grad(
            [result for result, _ in pairs],
            asked,
            [seed for _, seed in pairs],
            create_graph=True,
            allow_unused=True,
        )
        given = [
            grad for grad, want in zip((*outer[:3], *outer[3]), ctx.wanted, strict=True) if want
        ]
        terms = [
            (found, grad)
            for found, grad in zip(inner, given, strict=True)
            if found is not None and grad is not None
        ]
        arguments: list[Any] = [t for t in (*seeds, *primals) if t is not None]
        second: Sequence[Tensor | None] = [None] * len(arguments)
        if terms:
            second = torch.autograd.grad(
                [found for found, _ in terms],
                arguments,
                [grad for _, grad in terms],
                create_graph=higher,
                allow_unused=True,
            )
    remaining = iter(second)
    dy, dh_n, dc_n, dx, dh_0, dc_0, *dw = (
        None if tensor is None else next(remaining) for tensor in (*seeds, *primals)
    )
    return dy, dh_n, dc_n, None, None, None, dx, None, None, dh_0, dc_0, dw, None, None, None


def _alias(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


# ---- registration: one line per backend ----

_library.impl("layer", _layer_cpu, "CPU")  # type: ignore[no-untyped-call]
_library.impl("layer_backward", _layer_backward_cpu, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("ostinato::layer", _layer_fake, lib=_library)
torch.library.register_fake("ostinato::layer_backward", _layer_backward_fake, lib=_library)
torch.library.register_autograd(
    "ostinato::layer", _layer_gradient, setup_context=_setup_layer, lib=_library
)
torch.library.register_autograd(
    "ostinato::layer_backward",
    _layer_backward_gradient,
    setup_context=_setup_layer_backward,
    lib=_library,
)
