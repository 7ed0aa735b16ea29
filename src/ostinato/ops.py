"""The operators: schemas, every check, fake kernels, autograd, and one registration per backend.

`layer` is what the modules call. It runs one recurrent layer, in one or two directions:

- float32, float64, bfloat16 and float16 on the CPU: the compiled engine, by the short way where
  nobody looks on and all tensors are plain (`short`), otherwise by the operator `ostinato::layer`;
- CUDA: torch's cuDNN operator where that can serve (`ostinato.cuda`);
- anything else: the reference, which torch's autograd differentiates.

Every way but the short one starts at `_check`, which says what is wrong. The short way asks the
same in C++ (csrc/tensors.h) and, where the answer is no, declines and says nothing.

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
from torch.utils.checkpoint import checkpoint

from ostinato import _core, cuda, reference

_log = logging.getLogger("ostinato")

# The engine's number of each cell (csrc/cpu/engine.h) and its gates.
_CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "gru": 2, "lstm": 3}
_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
# The engine's number of each dtype, likewise. The last two are computed in float32.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# What the engine keeps for backward: values per unit and row, units padded to a multiple
# (csrc/cpu/engine.h, saved_of and padded). The fake kernel cannot ask it, since sizes are symbols.
_SAVED = {"rnn_tanh": 0, "rnn_relu": 0, "gru": 4, "lstm": 5}
_PAD = 16

_LAYER = """layer(
    Tensor input, Tensor? batch_sizes, SymInt batch, Tensor? h_0, Tensor? c_0, Tensor[] weights,
    str cell, bool has_biases, bool bidirectional, bool recompute, bool keep
) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor reserve)"""
_LAYER_BACKWARD = """layer_backward(
    Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor output, Tensor reserve,
    bool[] wanted,
    Tensor input, Tensor? batch_sizes, SymInt batch, Tensor? h_0, Tensor? c_0, Tensor[] weights,
    str cell, bool has_biases, bool bidirectional, bool recompute
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
    recompute: bool = False

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
    recompute: bool = False,
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
        recompute: whether backward computes the gates again, so that forward need not keep them.

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
    batch = _batch(input, batch_sizes, h_0, c_0)
    call = _Call(
        input, batch_sizes, batch, h_0, c_0, weights, cell, has_biases, bidirectional, recompute
    )
    if _has_engine(call):
        if (shape := _shape(call)) is not None:
            found = short(
                cell, shape, input, batch_sizes, h_0, c_0, tuple(weights), has_biases, recompute
            )
            if found is not None:
                return found
        if not _is_transformed():
            keep = torch.is_grad_enabled() and any(
                tensor is not None and tensor.requires_grad for tensor in call.tensors()
            )
            output, h_n, c_n, _ = torch.ops.ostinato.layer(*call, keep)
            return output, h_n, c_n if cell == "lstm" else None
    sizes = _check(call)
    device = input.device.type

    def run() -> tuple[Tensor, Tensor, Tensor | None]:
        if device == "cuda" and cuda.serves(input):
            return cuda.layer(cell, input, batch_sizes, sizes, h_0, c_0, weights, has_biases)
        if input.dtype not in _DTYPES or device not in ("cpu", "meta"):
            _tell_reference(device, input.dtype)
        return _reference(call)

    if recompute and torch.is_grad_enabled() and not _is_transformed():
        return checkpoint(run, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
    return run()


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
        input.dtype in _DTYPES
        and input.device.type in ("cpu", "meta")
        and not any(weight.numel() == 0 for weight in call.weights[:2])
        and all(t is None or t.layout is torch.strided for t in call.tensors())
    )


def _is_transformed() -> bool:
    """Whether vmap, torch.func or forward-mode differentiation is at work.

    They get the reference, operation by operation: the operators have no rules for them.
    """
    if torch.compiler.is_compiling():
        return False
    return _interpreter() is not None or _forward_ad._current_level >= 0


# Looked up once: a cell's whole call takes a few microseconds.
_functorch = torch._C._functorch
_interpreter = _functorch.peek_interpreter_stack
_forward_ad = torch.autograd.forward_ad
_is_autocast = torch._C._is_any_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_modes = torch._C._len_torch_dispatch_stack
_is_profiled = torch._C._autograd._profiler_enabled


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


# ---- the short way ----

# input_size, hidden_size, proj_size, directions
Shape = tuple[int, int, int, int]
# cell, is_cell, shape, has_biases, recompute
_Config = tuple[str, bool, Shape, bool, bool]


def _connect() -> bool:
    """Open the short way if this torch has DLPack's table of C functions (2.10 and later)."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return table is not None and _core.connect(table, Tensor, torch.nn.Parameter, torch.empty_like)


_IS_SHORT = _connect()


class _DeclinedError(Exception):
    """The short way does not serve these tensors."""


def short(
    cell: str,
    shape: Shape,
    input: Any,
    batch_sizes: Any,
    h_0: Any,
    c_0: Any,
    weights: tuple[Any, ...],
    has_biases: bool,
    recompute: bool = False,
    is_cell: bool = False,
) -> tuple[Any, Any, Any] | None:
    """Run a layer, or one step of a cell, past the dispatcher: a tenth of its cost per call.

    Everything is checked in C++ against `shape`, the sizes that the module was made with.

    Args:
        cell: as in `layer`.
        shape: input_size, hidden_size, proj_size, directions.
        input: as in `layer`, or (B, I) or (I,) with `is_cell`.
        batch_sizes: as in `layer`.
        h_0: as in `layer`, or (B, H) or (H,) with `is_cell`.
        c_0: likewise.
        weights: as in `layer`.
        has_biases: as in `layer`.
        recompute: as in `layer`.
        is_cell: whether input and states have no dimensions for steps and directions.

    Returns:
        output, h_n and c_n, where h_n is None with `is_cell` and c_n but for LSTM; or None instead
        of the three where somebody looks on, or where anything is not as expected.
    """
    if not _IS_SHORT or not _is_alone():
        return None
    config = cell, is_cell, shape, has_biases, recompute
    arguments = batch_sizes, input, h_0, c_0, *weights
    if torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in arguments):
        try:
            found: Any = _Short.apply(config, *arguments)  # type: ignore[no-untyped-call]
        except _DeclinedError:
            return None
        if is_cell:
            return (found[0], None, found[1]) if cell == "lstm" else (found, None, None)
        return found if cell == "lstm" else (*found, None)
    found = _run_short(config, False, *arguments)
    return None if found is None else found[:3]


def _run_short(
    config: _Config,
    keep: bool,
    batch_sizes: Any,
    input: Any,
    h_0: Any,
    c_0: Any,
    *weights: Any,
) -> Any:
    """Return output, h_n, c_n and what is kept for backward, or None if these are declined."""
    cell, is_cell, shape, has_biases, recompute = config
    return _core.tensors_forward(
        _CELLS.get(cell, -1),
        is_cell,
        shape,
        input,
        batch_sizes,
        h_0,
        c_0,
        weights,
        has_biases,
        keep,
        recompute,
        _threads(),
    )


def _is_alone() -> bool:
    """Whether no compiler, tracer, mode, profiler, autocast or transform is to see the operator."""
    return not (
        torch.compiler.is_compiling()
        or _is_autocast()
        or _tracing_state() is not None
        or _modes()
        or _is_profiled()
        or _interpreter() is not None
        or _forward_ad._current_level >= 0
    )


def _shape(call: _Call) -> Shape | None:
    """Return the sizes that the weights say, or None if they make no sense."""
    directions = 2 if call.bidirectional else 1
    weights, gates = call.weights, _GATES.get(call.cell)
    count = len(weights) // directions
    if gates is None or count < 2 or not call.input.dim() or not weights[0].dim():
        return None
    projection = 0
    if call.cell == "lstm" and count == (5 if call.has_biases else 3):
        if not weights[count - 1].dim():
            return None
        projection = weights[count - 1].shape[0]
    return call.input.shape[-1], weights[0].shape[0] // gates, projection, directions


# ---- checks ----


def _require_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def _check(call: _Call, values: bool = True) -> _Sizes:
    """Check shapes, dtypes and devices of everything; return the sizes.

    The values of batch_sizes are checked too, unless they are those of a fake tensor.
    """
    input, batch_sizes, batch, h_0, c_0, weights, cell, has_biases, bidirectional, _ = call
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
    dtype = _DTYPES[input.dtype]
    needed = _core.reserve_bytes(_CELLS[call.cell], dtype, sizes, call.recompute)
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


def _layer_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Check, allocate and run the engine; c_n and reserve are empty where there is none."""
    *fields, keep = arguments
    call = _Call(*fields)
    sizes = _check(call)
    dtype = _DTYPES[call.input.dtype]
    # Named, so that dense copies outlive the call that reads their addresses.
    x, steps, h, c = call.input.contiguous(), *map(_dense, (call.batch_sizes, call.h_0, call.c_0))
    weights = [weight.contiguous() for weight in call.weights]
    output = x.new_empty((*x.shape[:-1], sizes.directions * sizes.output))
    h_n = x.new_empty((sizes.directions, sizes.batch, sizes.output))
    has_cell = call.cell == "lstm"
    c_n = x.new_empty((sizes.directions, sizes.batch, sizes.hidden) if has_cell else (0,))
    cell = _CELLS[call.cell]
    kept = _core.reserve_bytes(cell, dtype, sizes, call.recompute) if keep else 0
    reserve = x.new_empty((kept,), dtype=torch.uint8)
    _core.layer_forward(
        cell,
        dtype,
        sizes,
        _address(steps),
        x.data_ptr(),
        _address(h),
        _address(c),
        _addresses(weights, sizes, call.has_biases),
        output.data_ptr(),
        h_n.data_ptr(),
        c_n.data_ptr() if has_cell else 0,
        reserve.data_ptr() if keep else 0,
        _threads(),
        call.recompute,
    )
    return output, h_n, c_n, reserve


def _layer_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape the results: output, h_n, c_n (empty but for LSTM) and what backward will read."""
    *fields, keep = arguments
    call = _Call(*fields)
    input, sizes = call.input, _check(call, values=False)
    state = (sizes.directions, sizes.batch)
    padded = (sizes.hidden + _PAD - 1) // _PAD * _PAD
    values = int(call.cell == "lstm") if call.recompute else _SAVED[call.cell]
    kept = sizes.directions * sizes.rows * values * padded * max(4, input.element_size())
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
        _DTYPES[x.dtype],
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
        call.recompute,
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
    grads = grads[:3]
    if _is_beyond_engine(grads):
        found = _reference_gradients(call, grads, wanted)
    elif any(grad is not None for grad in grads):
        dx, dh_0, dc_0, dw = torch.ops.ostinato.layer_backward(*grads, y, reserve, wanted, *call)
        found = [g if want else None for g, want in zip((dx, dh_0, dc_0, *dw), wanted, strict=True)]
    else:
        found = [None] * len(wanted)
    dx, dh_0, dc_0, *dw = found
    return dx, None, None, dh_0, dc_0, dw, None, None, None, None, None


class _Short(torch.autograd.Function):
    """The short way with its gradient. Raises _DeclinedError."""

    @staticmethod
    def forward(
        ctx: Any,
        config: _Config,
        batch_sizes: Any,
        input: Any,
        h_0: Any,
        c_0: Any,
        *weights: Any,
    ) -> Any:
        cell, is_cell, *_ = config
        found = _run_short(config, True, batch_sizes, input, h_0, c_0, *weights)
        if found is None:
            raise _DeclinedError
        output, h_n, c_n, reserve = found
        # One step of a GRU or an LSTM is differentiated without its output, which the caller may
        # then change in place, as with torch's cells.
        reads_output = _GATES[cell] == 1 or not is_cell
        ctx.save_for_backward(
            output if reads_output else None, reserve, batch_sizes, input, h_0, c_0, *weights
        )
        ctx.config = config
        ctx.set_materialize_grads(False)
        if is_cell:
            return output if c_n is None else (output, c_n)
        return (output, h_n) if c_n is None else (output, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cell, is_cell, shape, has_biases, recompute = ctx.config
        wanted = ctx.needs_input_grad[2:]
        dy, dh_n, dc_n = (grads[0], None, *grads[1:], None)[:3] if is_cell else (*grads, None)[:3]
        if dy is None and dh_n is None and dc_n is None:
            return (None, None, *[None] * len(wanted))
        # read once: a checkpoint recomputes at every reading
        output, reserve, batch_sizes, input, h_0, c_0, *weights = ctx.saved_tensors
        found: Any = None
        if not _is_beyond_engine((dy, dh_n, dc_n)):
            found = _core.tensors_backward(
                _CELLS[cell],
                is_cell,
                shape,
                input,
                batch_sizes,
                h_0,
                c_0,
                tuple(weights),
                has_biases,
                output,
                reserve,
                dy,
                dh_n,
                dc_n,
                wanted,
                recompute,
                _threads(),
            )
        if found is None:
            call = _Call(
                input,
                batch_sizes,
                0 if is_cell else _batch(input, batch_sizes, h_0, c_0),
                h_0,
                c_0,
                weights,
                cell,
                has_biases,
                shape[3] == 2,
            )
            found = _reference_gradients(call, (dy, dh_n, dc_n), wanted, is_cell)
        return (None, None, *found)


def _is_beyond_engine(grads: Sequence[Tensor | None]) -> bool:
    """Whether gradients are to be differentiated themselves, or are many at once (vmap)."""
    return torch.is_grad_enabled() or any(
        # torch.autograd.grad makes them of the one kind, torch.vmap of the other.
        grad is not None
        and (_functorch.is_legacy_batchedtensor(grad) or _functorch.is_batchedtensor(grad))
        for grad in grads
    )


def _reference_gradients(
    call: _Call,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
    is_cell: bool = False,
) -> list[Tensor | None]:
    """Differentiate the reference: gradients of any order, and of batches of gradients.

    Args:
        call: of a layer, or with `is_cell` of a cell.
        grads: of output, h_n and c_n.
        wanted: whether input, h_0, c_0 and each weight needs a gradient.
        is_cell: whether input and states have no dimensions for steps and directions.

    Returns:
        The gradients, None where not wanted or zero.
    """
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: these derivatives stop at this call's arguments, higher ones go on.
        primals: list[Any] = [None if t is None else t.view_as(t) for t in call.tensors()]
        input, h_0, c_0, *weights = primals
        arguments = call._replace(input=input, h_0=h_0, c_0=c_0, weights=weights)
        results: Sequence[Tensor | None]
        if is_cell:
            results = _reference_cell(arguments)
        else:
            _check(arguments)  # what hooks of saved tensors return need not be what was saved
            results = _reference(arguments)
        pairs = [
            (result, grad)
            for result, grad in zip(results, grads, strict=True)
            if result is not None and grad is not None and result.requires_grad
        ]
        asked = [p for p, want in zip(primals, wanted, strict=True) if want and p is not None]
        found: Sequence[Tensor | None] = [None] * len(asked)
        if pairs and asked:
            found = torch.autograd.grad(
                [result for result, _ in pairs],
                asked,
                [grad for _, grad in pairs],
                create_graph=higher,
                allow_unused=True,
            )
    remaining = iter(found)
    return [
        next(remaining) if want and primal is not None else None
        for primal, want in zip(primals, wanted, strict=True)
    ]


def _reference_cell(call: _Call) -> tuple[Tensor, None, Tensor | None]:
    """Run the reference on (B, I) or (I,) and (B, H) or (H,)."""
    lead = (1, 1) if call.input.dim() == 1 else (1,)
    h_0, c_0 = (None if t is None else t.reshape(*lead, *t.shape) for t in (call.h_0, call.c_0))
    input = call.input.reshape(*lead, *call.input.shape)
    layer_call = call._replace(input=input, batch=input.shape[1], h_0=h_0, c_0=c_0)
    _check(layer_call)
    output, _, c_n = _reference(layer_call)
    shape = (*call.input.shape[:-1], output.shape[-1])
    return output.reshape(shape), None, None if c_n is None else c_n.reshape(shape)


# ---- registration: one line per backend ----

_library.impl("layer", _layer_cpu, "CPU")  # type: ignore[no-untyped-call]
_library.impl("layer_backward", _layer_backward_cpu, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("ostinato::layer", _layer_fake, lib=_library)
torch.library.register_fake("ostinato::layer_backward", _layer_backward_fake, lib=_library)
torch.library.register_autograd(
    "ostinato::layer", _layer_gradient, setup_context=_setup_layer, lib=_library
)
