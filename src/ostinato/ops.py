"""The operators: schemas, every check, fake kernels, autograd, and one registration per backend.

`layer` is what the modules call. It runs one recurrent layer, in one or two directions:

- float32 and float64 on the CPU: the operator `ostinato::layer`, which is the compiled engine;
- CUDA: torch's cuDNN operator where that can serve (`ostinato.cuda`);
- anything else: the reference, which torch's autograd differentiates.

Every way starts at `_check`, and the engine can be reached through nothing else.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step (proj_size, or H), D directions.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ostinato import _core, cuda, reference

_log = logging.getLogger("ostinato")

# The engine's number of each cell (csrc/cpu/engine.h) and its gates.
_CELLS = {"rnn_tanh": 0, "rnn_relu": 1, "gru": 2, "lstm": 3}
_GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
_ENGINE_DTYPES = (torch.float32, torch.float64)
# The engine pads units to a multiple of this in what it keeps for backward (csrc/cpu/engine.h, padded).
_SAVED = {"rnn_tanh": 0, "rnn_relu": 0, "gru": 4, "lstm": 5}
_PAD = 16

_LAYER = (
    "layer(Tensor input, Tensor? batch_sizes, SymInt batch, Tensor? h_0, Tensor? c_0, Tensor[] weights, "
    "str cell, bool has_biases, bool bidirectional, bool keep) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor reserve)"
)
_LAYER_BACKWARD = (
    "layer_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? batch_sizes, "
    "SymInt batch, Tensor? h_0, Tensor? c_0, Tensor[] weights, Tensor output, Tensor reserve, "
    "str cell, bool has_biases, bool bidirectional, bool[] wanted) "
    "-> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor[] grad_weights)"
)

_library = torch.library.Library("ostinato", "DEF")
_library.define(_LAYER)
_library.define(_LAYER_BACKWARD)


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
        output, (T, B, D * O) or (N, D * O); h_n, (D, B, O); c_n, (D, B, H), or None where the cell is no LSTM.

    Raises:
        ValueError: a dtype that differs from the weights', an unknown cell, wrong batch_sizes.
        RuntimeError: a wrong shape or device, or more or fewer weights than the cell has.

    Example:
        >>> gru = torch.nn.GRUCell(3, 4)
        >>> output, h_n, _ = layer("gru", torch.zeros(5, 2, 3), None, None, None, list(gru.parameters()),
        ...                        has_biases=True, bidirectional=False)
        >>> output.shape, h_n.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))

    Source: torch.nn.RNN, GRU and LSTM.
    """
    if batch_sizes is None:
        batch = input.shape[1] if input.dim() == 3 else 0
    else:
        state = h_0 if h_0 is not None else c_0
        batch = state.shape[1] if state is not None else int(batch_sizes[0]) if len(batch_sizes) else 0
    device = input.device.type
    if input.dtype in _ENGINE_DTYPES and device in ("cpu", "meta"):
        keep = torch.is_grad_enabled() and _any_requires_grad(input, h_0, c_0, weights)
        output, h_n, c_n, _ = torch.ops.ostinato.layer(
            input, batch_sizes, batch, h_0, c_0, weights, cell, has_biases, bidirectional, keep
        )
        return output, h_n, c_n if cell == "lstm" else None
    sizes = _check(cell, input, batch_sizes, batch, h_0, c_0, weights, has_biases, bidirectional)
    if device == "cuda" and cuda.serves(input):
        return cuda.layer(cell, input, batch_sizes, sizes, h_0, c_0, weights, has_biases)
    _tell_reference(device, input.dtype)
    return reference.layer(
        cell, input, batch_sizes, h_0, c_0, weights, has_biases=has_biases, bidirectional=bidirectional
    )


def _any_requires_grad(input: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: list[Tensor]) -> bool:
    return (
        input.requires_grad
        or (h_0 is not None and h_0.requires_grad)
        or (c_0 is not None and c_0.requires_grad)
        or any(weight.requires_grad for weight in weights)
    )


_told: set[tuple[str, torch.dtype]] = set()


def _tell_reference(device: str, dtype: torch.dtype) -> None:
    """Say once per device and dtype that no engine serves it."""
    if torch.compiler.is_compiling() or (device, dtype) in _told:
        return
    _told.add((device, dtype))
    _log.warning("no engine for %s on %s: the reference runs, correctly and slowly", dtype, device)


# ---- checks ----

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def _check(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    batch: int,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    has_biases: bool,
    bidirectional: bool,
) -> _Sizes:
    """Check shapes, dtypes and devices of everything; return the sizes."""
    gates = _GATES.get(cell)
    if gates is None:
        raise ValueError(f"cell: expected one of {', '.join(_GATES)}, got {cell!r}")
    if input.dim() != (3 if batch_sizes is None else 2):
        expected = "3D" if batch_sizes is None else "2D (packed)"
        raise RuntimeError(f"input: expected {expected}, got {input.dim()}D")
    directions = 2 if bidirectional else 1
    count, rest = divmod(len(weights), directions)
    plain = 4 if has_biases else 2
    projected = cell == "lstm" and count == plain + 1
    if rest or not (count == plain or projected):
        raise RuntimeError(f"weights: expected {plain} per direction for {cell}, got {len(weights)} in all")
    for weight in weights[:2]:
        if weight.dim() != 2:
            raise RuntimeError(f"weight_ih and weight_hh: expected 2D, got {weight.dim()}D")
    size = input.shape[-1]
    output = weights[1].shape[1]
    hidden = weights[1].shape[0] // gates
    if hidden < 1 or (not projected and output != hidden):
        raise RuntimeError(
            f"weight_hh: expected shape ({gates} * hidden, {'proj' if projected else 'hidden'}), "
            f"got {tuple(weights[1].shape)}"
        )
    shapes: list[tuple[int, ...]] = [(gates * hidden, size), (gates * hidden, output)]
    names = _NAMES[:2]
    if has_biases:
        shapes += [(gates * hidden,)] * 2
        names = _NAMES[:4]
    if projected:
        shapes.append((output, hidden))
        names = (*names, "weight_hr")
    dtype, device = input.dtype, input.device
    for index, weight in enumerate(weights):
        shape = shapes[index % count]
        if tuple(weight.shape) != shape or weight.dtype != dtype or weight.device != device:
            _refuse(names[index % count] + "_reverse" * (index // count), weight, shape, input)
    if h_0 is not None:
        shape = (directions, batch, output)
        if tuple(h_0.shape) != shape or h_0.dtype != dtype or h_0.device != device:
            _refuse("h_0", h_0, shape, input)
    if c_0 is not None:
        shape = (directions, batch, hidden)
        if cell != "lstm":
            raise RuntimeError(f"c_0: expected None for {cell}")
        if tuple(c_0.shape) != shape or c_0.dtype != dtype or c_0.device != device:
            _refuse("c_0", c_0, shape, input)
    if batch_sizes is None:
        steps, rows = input.shape[0], input.shape[0] * batch
    else:
        steps, rows = _check_batch_sizes(batch_sizes, batch, input.shape[0]), input.shape[0]
    return _Sizes(steps, rows, batch, size, hidden, output if projected else 0, directions)


def _check_batch_sizes(batch_sizes: Tensor, batch: int, rows: int) -> int:
    """Return the number of steps. A wrong entry would make the engine leave its arrays."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise RuntimeError(
            f"batch_sizes: expected a 1D int64 tensor on the CPU, got {batch_sizes.dim()}D {batch_sizes.dtype} "
            f"on {batch_sizes.device}"
        )
    steps = len(batch_sizes)
    if not isinstance(batch_sizes, torch._subclasses.FakeTensor):
        sizes = batch_sizes.tolist()
        if any(a < b for a, b in zip([batch, *sizes], [*sizes, 0], strict=True)):
            raise ValueError(f"batch_sizes: expected sizes that fall from at most {batch} to at least 0, got {sizes}")
        if sum(sizes) != rows:
            raise ValueError(f"batch_sizes: expected a sum of {rows}, the rows of input, got {sum(sizes)}")
    return steps


def _refuse(name: str, tensor: Tensor, shape: tuple[int, ...], input: Tensor) -> None:
    """Raise for the first of shape, dtype and device that does not fit."""
    if tuple(tensor.shape) != shape:
        raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != input.dtype:
        raise ValueError(f"{name}: expected the dtype of input, {input.dtype}, got {tensor.dtype}")
    raise RuntimeError(f"{name}: expected the device of input, {input.device}, got {tensor.device}")


# ---- the CPU engine ----


def _threads() -> int:
    return _core.forced_threads or torch.get_num_threads()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _addresses(weights: list[Any], sizes: _Sizes, has_biases: bool) -> list[int]:
    """Five addresses per direction, 0 where a weight is absent."""
    addresses = []
    count = len(weights) // sizes.directions
    for d in range(0, len(weights), count):
        ih, hh, *others = (_address(weight) for weight in weights[d : d + count])
        biases = others[:2] if has_biases else [0, 0]
        addresses += [ih, hh, *biases, others[-1] if sizes.projection else 0]
    return addresses


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _layer_cpu(
    input: Tensor,
    batch_sizes: Tensor | None,
    batch: int,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    cell: str,
    has_biases: bool,
    bidirectional: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = _check(cell, input, batch_sizes, batch, h_0, c_0, weights, has_biases, bidirectional)
    # Named, so that dense copies outlive the call that reads their addresses.
    x, sizes_of_steps, h, c = input.contiguous(), _dense(batch_sizes), _dense(h_0), _dense(c_0)
    dense = [weight.contiguous() for weight in weights]
    output, h_n, c_n, reserve = _layer_fake(
        input, batch_sizes, batch, h_0, c_0, weights, cell, has_biases, bidirectional, keep
    )
    _core.layer_forward(
        _CELLS[cell],
        input.dtype == torch.float64,
        sizes,
        _address(sizes_of_steps),
        x.data_ptr(),
        _address(h),
        _address(c),
        _addresses(dense, sizes, has_biases),
        output.data_ptr(),
        h_n.data_ptr(),
        c_n.data_ptr(),
        reserve.data_ptr() if keep else 0,
        _threads(),
    )
    return output, h_n, c_n, reserve


def _layer_fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    batch: int,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    cell: str,
    has_biases: bool,
    bidirectional: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the results: output, h_n, c_n (empty where there is none) and what backward will read."""
    directions = 2 if bidirectional else 1
    hidden, output = weights[1].shape[0] // _GATES[cell], weights[1].shape[1]
    rows = input.shape[0] * (input.shape[1] if batch_sizes is None else 1)
    c_shape = (directions, batch, hidden) if cell == "lstm" else (0,)
    saved = _SAVED[cell] * ((hidden + _PAD - 1) // _PAD * _PAD) * input.element_size() if keep else 0
    return (
        input.new_empty((*input.shape[:-1], directions * output)),
        input.new_empty((directions, batch, output)),
        input.new_empty(c_shape),
        input.new_empty((directions * rows * saved,), dtype=torch.uint8),
    )


def _layer_backward_cpu(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    batch: int,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    output: Tensor,
    reserve: Tensor,
    cell: str,
    has_biases: bool,
    bidirectional: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    sizes = _check(cell, input, batch_sizes, batch, h_0, c_0, weights, has_biases, bidirectional)
    _check_backward(grad_output, grad_h_n, grad_c_n, input, output, reserve, cell, sizes, wanted, weights)
    x, sizes_of_steps, h, c = input.contiguous(), _dense(batch_sizes), _dense(h_0), _dense(c_0)
    dense, y = [weight.contiguous() for weight in weights], output.contiguous()
    dy, dh_n = _dense(grad_output), _dense(grad_h_n)
    dc_n = _dense(grad_c_n) if cell == "lstm" else None
    dx, dh_0, dc_0, grads = _layer_backward_fake(
        grad_output, grad_h_n, grad_c_n, input, batch_sizes, batch, h_0, c_0, weights, output, reserve, cell,
        has_biases, bidirectional, wanted,
    )  # fmt: skip
    _core.layer_backward(
        _CELLS[cell],
        input.dtype == torch.float64,
        sizes,
        _address(sizes_of_steps),
        x.data_ptr(),
        _address(h),
        _address(c),
        _addresses(dense, sizes, has_biases),
        y.data_ptr(),
        reserve.data_ptr(),
        _address(dy),
        _address(dh_n),
        _address(dc_n),
        dx.data_ptr() if wanted[0] else 0,
        dh_0.data_ptr() if wanted[1] else 0,
        dc_0.data_ptr() if wanted[2] else 0,
        _addresses([grad if want else None for grad, want in zip(grads, wanted[3:], strict=True)], sizes, has_biases),
        _threads(),
    )
    return dx, dh_0, dc_0, grads


def _check_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    output: Tensor,
    reserve: Tensor,
    cell: str,
    sizes: _Sizes,
    wanted: list[bool],
    weights: list[Tensor],
) -> None:
    """Check what backward takes beyond forward's arguments."""
    shape = (*input.shape[:-1], sizes.directions * sizes.output)
    state = (sizes.directions, sizes.batch, sizes.output)
    cell_state = (sizes.directions, sizes.batch, sizes.hidden)
    for name, tensor, expected in (
        ("output", output, shape),
        ("grad_output", grad_output, shape),
        ("grad_h_n", grad_h_n, state),
        ("grad_c_n", grad_c_n if cell == "lstm" else None, cell_state),
    ):
        if tensor is not None and (
            tuple(tensor.shape) != expected or tensor.dtype != input.dtype or tensor.device != input.device
        ):
            _refuse(name, tensor, expected, input)
    needed = _core.reserve_bytes(_CELLS[cell], input.dtype == torch.float64, sizes)
    if reserve.dtype != torch.uint8 or reserve.numel() != needed or not reserve.is_contiguous():
        raise RuntimeError(f"reserve: expected {needed} bytes from ostinato::layer(keep=True), got {reserve.numel()}")
    if len(wanted) != 3 + len(weights):
        raise RuntimeError(f"wanted: expected {3 + len(weights)} flags, got {len(wanted)}")


def _layer_backward_fake(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    batch: int,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    output: Tensor,
    reserve: Tensor,
    cell: str,
    has_biases: bool,
    bidirectional: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Allocate the gradients; one that is not wanted is empty."""
    directions = 2 if bidirectional else 1
    hidden, out = weights[1].shape[0] // _GATES[cell], weights[1].shape[1]
    shapes = [tuple(input.shape), (directions, batch, out), (directions, batch, hidden)]
    dx, dh_0, dc_0 = (input.new_empty(s if want else (0,)) for s, want in zip(shapes, wanted[:3], strict=True))
    grads = [input.new_empty(w.shape if want else (0,)) for w, want in zip(weights, wanted[3:], strict=True)]
    return dx, dh_0, dc_0, grads


# ---- autograd ----


def _setup_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, batch_sizes, batch, h_0, c_0, weights, *config, keep = inputs
    y, _, _, reserve = output
    ctx.save_for_backward(input, batch_sizes, h_0, c_0, y, reserve, *weights)
    ctx.batch, ctx.config, ctx.keep = batch, config, keep
    ctx.set_materialize_grads(False)


def _layer_gradient(
    ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, _: None
) -> tuple[Any, ...]:
    if not ctx.keep:
        raise RuntimeError("ostinato::layer: backward needs the forward call to have keep=True")
    input, batch_sizes, h_0, c_0, y, reserve, *weights = ctx.saved_tensors
    needs_input, _, _, needs_h_0, needs_c_0, needs_weights, *_ = ctx.needs_input_grad
    # `needs_weights` is a list with one flag per weight.
    wanted = [needs_input, needs_h_0, needs_c_0, *needs_weights]
    if grad_output is None and grad_h_n is None and grad_c_n is None:
        return None, None, None, None, None, [None] * len(weights), None, None, None, None
    dx, dh_0, dc_0, grads = torch.ops.ostinato.layer_backward(
        grad_output, grad_h_n, grad_c_n, input, batch_sizes, ctx.batch, h_0, c_0, weights, y, reserve, *ctx.config, wanted
    )
    dx, dh_0, dc_0, *grads = (g if want else None for g, want in zip((dx, dh_0, dc_0, *grads), wanted, strict=True))
    return dx, None, None, dh_0, dc_0, grads, None, None, None, None


def _setup_layer_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *grads, input, batch_sizes, batch, h_0, c_0, weights, _, _, cell, has_biases, bidirectional, wanted = inputs
    ctx.save_for_backward(*grads, input, batch_sizes, h_0, c_0, *weights)
    ctx.config, ctx.wanted = (cell, has_biases, bidirectional), wanted
    ctx.set_materialize_grads(False)


def _layer_backward_gradient(ctx: Any, *outer: Any) -> tuple[Any, ...]:
    """Second derivatives: the reference differentiated twice.

    `output` and `reserve` are functions of the other arguments, whose derivatives are taken in full here, so they get
    none of their own.
    """
    dy, dh_n, dc_n, input, batch_sizes, h_0, c_0, *weights = ctx.saved_tensors
    cell, has_biases, bidirectional = ctx.config
    with torch.enable_grad():
        # Aliases, so that a derivative with respect to the argument of this call stops here and higher ones go on.
        seeds = [_alias(t) for t in (dy, dh_n, dc_n)]
        primals = [_alias(t) for t in (input, h_0, c_0, *weights)]
        results = reference.layer(
            cell, primals[0], batch_sizes, primals[1], primals[2], primals[3:], has_biases=has_biases,
            bidirectional=bidirectional,
        )  # fmt: skip
        pairs = [(r, s) for r, s in zip(results, seeds, strict=True) if r is not None and s is not None]
        asked = [p for p, want in zip(primals, ctx.wanted, strict=True) if want]
        inner = torch.autograd.grad(
            [r for r, _ in pairs], asked, [s for _, s in pairs], create_graph=True, allow_unused=True
        )
        flat_outer = [g for g, want in zip((*outer[:3], *(outer[3] or ())), ctx.wanted, strict=True) if want]
        terms = [(i, o) for i, o in zip(inner, flat_outer, strict=True) if i is not None and o is not None]
        arguments = [t for t in (*seeds, *primals) if t is not None]
        found = iter(
            torch.autograd.grad(
                [i for i, _ in terms], arguments, [o for _, o in terms], create_graph=True, allow_unused=True
            )
            if terms
            else [None] * len(arguments)
        )
    gradients = [None if t is None else next(found) for t in (*seeds, *primals)]
    dy, dh_n, dc_n, dx, dh_0, dc_0, *dw = gradients
    return dy, dh_n, dc_n, dx, None, None, dh_0, dc_0, dw, None, None, None, None, None, None


def _alias(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


# ---- registration: one line per backend ----

_library.impl("layer", _layer_cpu, "CPU")
_library.impl("layer_backward", _layer_backward_cpu, "CPU")
torch.library.register_fake("ostinato::layer", _layer_fake, lib=_library)
torch.library.register_fake("ostinato::layer_backward", _layer_backward_fake, lib=_library)
torch.library.register_autograd("ostinato::layer", _layer_gradient, setup_context=_setup_layer, lib=_library)
torch.library.register_autograd(
    "ostinato::layer_backward", _layer_backward_gradient, setup_context=_setup_layer_backward, lib=_library
)
