"""The operators: schemas, fake kernels, autograd, and one registration per backend.

`layer` is what the modules call. It runs one recurrent layer, in one or two directions:

- float32, float64, bfloat16 and float16 on the CPU: the compiled engine, by the short way where
  nobody looks on and all tensors are plain (`ostinato.short`), by `ostinato.transforms` where
  torch.func is at work, otherwise by the operator `ostinato::layer`;
- CUDA: the GPU engine (`ostinato.cuda`) by the same operator, where it was measured to be faster;
  otherwise torch's cuDNN operator where that can serve;
- anything else: the reference, which torch's autograd differentiates.

Every way but the short one starts at `ostinato.call.check`, which says what is wrong.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step (proj_size, or H),
D directions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

from ostinato import (
    _core,
    fallback,
    flops,
    onnx_node,
    profile,
    short,
    traced,
    transforms,
)
from ostinato.call import (
    DTYPES,
    Call,
    address,
    batch_of,
    check,
    check_backward,
    is_traced,
    reject_nested,
    require_tensor,
    reserve_bytes,
    shape_of,
    thread_count,
)
from ostinato.cells import CELLS
from ostinato.cuda import layer as gpu
from ostinato.cuda.sequence import reserve_bytes as gpu_reserve_bytes
from ostinato.engine import PAD, Sizes, five_per_direction
from ostinato.gradients import Results, is_beyond_engine, reference_gradients, reference_results
from ostinato.later import when_imported

_log = logging.getLogger("ostinato")
# Looked up once: each layer of a stack asks.
_tracing_state = torch._C._get_tracing_state

_LAYER = """layer(
    Tensor input, Tensor? batch_sizes, SymInt batch, Tensor? h_0, Tensor? c_0, Tensor[] weights,
    str cell, bool has_biases, bool bidirectional, bool recompute,
    Tensor? lengths, Tensor? resets, Tensor? reset_h, Tensor? reset_c, bool all_c, bool keep
) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor reserve)"""
_LAYER_BACKWARD = """layer_backward(
    Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells,
    Tensor output, Tensor reserve, bool[] wanted,
    Tensor input, Tensor? batch_sizes, SymInt batch, Tensor? h_0, Tensor? c_0, Tensor[] weights,
    str cell, bool has_biases, bool bidirectional, bool recompute,
    Tensor? lengths, Tensor? resets, Tensor? reset_h, Tensor? reset_c
) -> (Tensor[] grads)"""

_library = torch.library.Library("ostinato", "DEF")  # type: ignore[no-untyped-call]
_library.define(_LAYER)  # type: ignore[no-untyped-call]
_library.define(_LAYER_BACKWARD)  # type: ignore[no-untyped-call]


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
    is_compiled = torch.compiler.is_compiling()  # a compiler pays for each line, in each layer
    if not is_compiled:
        tensors = (input, batch_sizes, h_0, c_0, *weights)
        if has_torch_function(tensors):
            return handle_torch_function(
                layer,
                tensors,
                *(cell, input, batch_sizes, h_0, c_0, weights),
                has_biases=has_biases,
                bidirectional=bidirectional,
                recompute=recompute,
            )
        _require_tensors(input, h_0, c_0, weights)
        if _tracing_state() is not None and _is_recorded(cell):
            flags = has_biases, bidirectional, recompute, *[None] * 4, False
            return traced.record(cell, input, batch_sizes, h_0, c_0, weights, *flags)[:3]
    batch = batch_of(input, batch_sizes, h_0, c_0)
    call = Call(
        input, batch_sizes, batch, h_0, c_0, weights, cell, has_biases, bidirectional, recompute
    )
    if is_compiled:
        return _run(call)[:3]
    if _has_engine(call) and (shape := shape_of(call)) is not None:
        found = short.run(
            cell, shape, input, batch_sizes, h_0, c_0, tuple(weights), has_biases, recompute
        )
        if found is not None:
            return found
    return _run(call)[:3]


def cut_layer(
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
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    all_c: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run one recurrent layer whose rows end early or begin anew on the way.

    A row is cut before each reset. Every piece is a sequence of its own, in both directions: where
    the walk of a direction enters a piece over a cut, it starts from reset_h and reset_c, otherwise
    from h_0 and c_0.

    Args:
        cell: as in `layer`, like all others up to `recompute`.
        input: likewise.
        batch_sizes: likewise.
        h_0: likewise.
        c_0: likewise.
        weights: likewise.
        has_biases: likewise.
        bidirectional: likewise.
        recompute: likewise.
        lengths: steps of each row of a padded batch, (B,), int64 on the CPU, from 0 to T.
        resets: where a row begins anew, (T, B) or (N,), bool, on the device of `input`.
        reset_h: (D, B, O), or None for zeros.
        reset_c: (D, B, H), or None for zeros; LSTM only.
        all_c: whether c is to be returned at every step.

    Returns:
        output, zero past a row's end; h_n and c_n, the states at the true ends (h_0 and c_0 of a
        row without steps); c at every step, (T, B, D * H) or (N, D * H), or None.

    Raises:
        ValueError: as `layer`, and lengths out of range.
        RuntimeError: as `layer`, and lengths or resets of another shape, dtype or device.

    Example:
        >>> weights = list(torch.nn.GRUCell(3, 4).parameters())
        >>> output, h_n, _, _ = cut_layer(
        ...     "gru", torch.zeros(5, 2, 3), None, None, None, weights, has_biases=True,
        ...     bidirectional=False, lengths=torch.tensor([5, 2]))
        >>> bool((output[2:, 1] == 0).all() and (h_n[0, 1] == output[1, 1]).all())
        True

    Source: torch.nn.RNN, GRU and LSTM.
    """
    arguments: Any = cell, input, batch_sizes, h_0, c_0, weights
    flags: Any = {
        "has_biases": has_biases,
        "bidirectional": bidirectional,
        "recompute": recompute,
    }
    cuts: Any = {"lengths": lengths, "resets": resets, "reset_h": reset_h, "reset_c": reset_c}
    if not torch.compiler.is_compiling():
        tensors = (input, batch_sizes, h_0, c_0, *weights, *cuts.values())
        if has_torch_function(tensors):
            options = {**flags, **cuts, "all_c": all_c}
            return handle_torch_function(cut_layer, tensors, *arguments, **options)
    _require_tensors(input, h_0, c_0, weights)
    for name, tensor in cuts.items():
        if tensor is not None:
            require_tensor(name, tensor)
    if _is_recorded(cell):
        return traced.record(*arguments, *flags.values(), *cuts.values(), all_c)
    batch = batch_of(input, batch_sizes, h_0, c_0)
    places = input, batch_sizes, batch, h_0, c_0, weights, cell
    return _run(Call(*places, *flags.values(), *cuts.values()), all_c)


def _is_recorded(cell: str) -> bool:
    """Whether torch.jit.trace gets one node for this layer (`ostinato.traced`)."""
    return (
        cell in CELLS
        and traced.is_recorded()
        and not transforms.is_active()
        # The exporter by TorchScript records too, and knows other nodes.
        and not torch.onnx.is_in_onnx_export()
    )


def _run(call: Call, all_c: bool = False) -> Results:
    """Run a layer, or write it down where torch.onnx.export traces it."""
    if is_traced() and onnx_node.is_wanted(call):
        traced.unrecorded(check)(call, values=False)
        return onnx_node.trace(call, all_c, lambda: _compute(call, all_c))
    return _compute(call, all_c)


def _compute(call: Call, all_c: bool) -> Results:
    """Run a layer on an engine, on torch's operator or on the reference."""
    device = call.input.device.type
    keep = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in call.tensors()
    )
    is_engines = _has_engine(call)
    if not transforms.is_active():
        if is_engines:
            return _run_operator(call, all_c, keep)
        if device == "cuda" and gpu.decide(call, is_training=keep, all_c=all_c).is_ours:
            return _run_gpu(call, all_c, keep)
    if not profile.is_on():
        return _run_elsewhere(call, all_c, keep, is_engines)
    with profile.shown(call.cell, "forward"):
        return _run_elsewhere(call, all_c, keep, is_engines)


def _run_elsewhere(call: Call, all_c: bool, keep: bool, is_engines: bool) -> Results:
    """Run a layer past the operator: under a transform, on torch's operator, on the reference."""
    input, device = call.input, call.input.device.type
    sizes = check(call)
    if is_engines and transforms.serves(call):
        return transforms.run(call, all_c)

    def run() -> Results:
        if fallback.serves(call, all_c):
            return fallback.run(call, sizes, keep)
        if input.dtype not in DTYPES or device not in ("cpu", "meta"):
            _tell_reference(device, input.dtype)
        return reference_results(call, all_c)

    if call.recompute and torch.is_grad_enabled() and not transforms.is_active():
        return checkpoint(run, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
    return run()


def _run_operator(call: Call, all_c: bool, keep: bool) -> Results:
    output, h_n, c_n, cells, _ = torch.ops.ostinato.layer(*call, all_c, keep)
    # Not call.kind, which torch 2.10's compiler cannot ask.
    if not CELLS[call.cell].has_c:
        return output, h_n, None, None
    return output, h_n, c_n, cells if all_c else None


def _run_gpu(call: Call, all_c: bool, keep: bool) -> Results:
    """Run the GPU engine, which keeps all that backward reads, or nothing."""
    if not (call.recompute and keep):
        return _run_operator(call, all_c, keep)
    plain = call._replace(recompute=False)
    return checkpoint(  # type: ignore[no-any-return]
        _run_operator, plain, all_c, keep, use_reentrant=False, preserve_rng_state=False
    )


def _require_tensors(input: object, h_0: object, c_0: object, weights: Sequence[object]) -> None:
    require_tensor("input", input)
    if getattr(input, "is_nested", False):
        reject_nested("input:")
    if h_0 is not None:
        require_tensor("h_0", h_0)
    if c_0 is not None:
        require_tensor("c_0", c_0)
    for weight in weights:
        if not isinstance(weight, Tensor):
            require_tensor("weights", weight)


def _has_engine(call: Call) -> bool:
    """Whether an engine serves device and dtype. A layer without units is left to the reference."""
    input = call.input
    return (
        input.dtype in DTYPES
        and input.device.type in ("cpu", "meta")
        and not any(weight.numel() == 0 for weight in call.weights[:2])
        and all(t is None or t.layout is torch.strided for t in call.tensors())
    )


_told: set[tuple[str, torch.dtype]] = set()


def _tell_reference(device: str, dtype: torch.dtype) -> None:
    """Say once per device and dtype that no engine serves it."""
    if torch.compiler.is_compiling() or (device, dtype) in _told:
        return
    _told.add((device, dtype))
    _log.warning("no engine for %s on %s: the reference runs, correctly and slowly", dtype, device)


# ---- the GPU engine ----


def _layer_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *fields, all_c, keep = arguments
    return gpu.forward(Call(*fields), all_c, keep)


def _layer_backward_cuda(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    wanted: list[bool],
    *arguments: Any,
) -> list[Tensor]:
    call = Call(*arguments)
    sizes = check(call)
    arrived = (grad_output, grad_h_n, grad_c_n, grad_cells)
    check_backward(call, sizes, arrived, output, reserve, wanted, gpu_reserve_bytes(call, sizes))
    arrived = arrived if call.kind.has_c else (grad_output, grad_h_n, None, None)
    return gpu.backward(call, sizes, arrived, output, reserve, wanted)


# ---- the CPU engine ----


def _addresses(weights: Sequence[Tensor | None], sizes: Sizes, has_biases: bool) -> list[int]:
    """Five addresses per direction, 0 where a weight is absent."""
    return five_per_direction(list(map(address, weights)), sizes, has_biases, 0)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _dense_cuts(call: Call) -> tuple[Tensor | None, ...]:
    """Return dense lengths, resets and their states, which must outlive the call."""
    return tuple(map(_dense, (call.lengths, call.resets, call.reset_h, call.reset_c)))


def _layer_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Check, allocate and run the engine; what there is not of the results is empty."""
    *fields, all_c, keep = arguments
    call = Call(*fields)
    sizes = check(call)
    dtype = DTYPES[call.input.dtype]
    # Named, so that dense copies outlive the call that reads their addresses.
    x, steps, h, c = call.input.contiguous(), *map(_dense, (call.batch_sizes, call.h_0, call.c_0))
    weights = [weight.contiguous() for weight in call.weights]
    held = _dense_cuts(call)
    output = x.new_empty((*x.shape[:-1], sizes.directions * sizes.output))
    h_n = x.new_empty((sizes.directions, sizes.batch, sizes.output))
    has_cell = call.kind.has_c
    c_n = x.new_empty((sizes.directions, sizes.batch, sizes.hidden) if has_cell else (0,))
    has_cells = has_cell and all_c
    cells = x.new_empty((*x.shape[:-1], sizes.directions * sizes.hidden) if has_cells else (0,))
    cell = call.kind.number
    kept = _core.reserve_bytes(cell, dtype, sizes, call.recompute) if keep else 0
    reserve = x.new_empty((kept,), dtype=torch.uint8)
    if kept and call.lengths is not None:
        # What stands for steps that are not taken is nobody's, but reserve is to be a function of
        # the inputs.
        taken = sizes._replace(rows=int(call.lengths.sum()))
        reserve[_core.reserve_bytes(cell, dtype, taken, call.recompute) :].zero_()
    first = [
        *map(address, (x, h, c, *held)),
        *_addresses(weights, sizes, call.has_biases),
        output.data_ptr(),
        h_n.data_ptr(),
        c_n.data_ptr() if has_cell else 0,
        cells.data_ptr() if has_cells else 0,
        reserve.data_ptr() if keep else 0,
    ]
    steps_at, threads = address(steps), thread_count()
    _core.forward(cell, dtype, sizes, steps_at, 1, first, [], threads, call.recompute)
    return output, h_n, c_n, cells, reserve


def _layer_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shape the results: output, h_n, c_n and cells (but for LSTM empty), what backward reads."""
    *fields, all_c, keep = arguments
    call = Call(*fields)
    input, sizes = call.input, check(call, values=False)
    state = (sizes.directions, sizes.batch)
    if input.device.type == "cuda":
        kept = gpu_reserve_bytes(call, sizes)
    else:
        padded = (sizes.hidden + PAD - 1) // PAD * PAD
        values = call.kind.recomputed if call.recompute else call.kind.saved
        kept = sizes.directions * sizes.rows * values * padded * max(4, input.element_size())
    has_cell = call.kind.has_c
    return (
        input.new_empty((*input.shape[:-1], sizes.directions * sizes.output)),
        input.new_empty((*state, sizes.output)),
        input.new_empty((*state, sizes.hidden) if has_cell else (0,)),
        input.new_empty(
            (*input.shape[:-1], sizes.directions * sizes.hidden) if has_cell and all_c else (0,)
        ),
        input.new_empty((kept if keep else 0,), dtype=torch.uint8),
    )


def _layer_backward_cpu(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    wanted: list[bool],
    *arguments: Any,
) -> list[Tensor]:
    call = Call(*arguments)
    sizes = check(call)
    arrived = (grad_output, grad_h_n, grad_c_n, grad_cells)
    check_backward(call, sizes, arrived, output, reserve, wanted, reserve_bytes(call, sizes))
    x, steps, h, c = call.input.contiguous(), *map(_dense, (call.batch_sizes, call.h_0, call.c_0))
    weights, y = [weight.contiguous() for weight in call.weights], output.contiguous()
    held = _dense_cuts(call)
    has_cell = call.kind.has_c
    dy, dh_n = _dense(grad_output), _dense(grad_h_n)
    dc_n = _dense(grad_c_n) if has_cell else None
    dcells = _dense(grad_cells) if has_cell else None
    grads = _gradients(call, sizes, wanted)
    # An empty result stands for one that is not wanted; the engine must not touch it.
    dx, dh_0, dc_0, dcut_h, dcut_c, *dw = (
        grad if want else None for grad, want in zip(grads, wanted, strict=True)
    )
    first = [
        *map(address, (x, h, c, *held)),
        *_addresses(weights, sizes, call.has_biases),
        *map(address, (y, reserve, dy, dh_n, dc_n, dcells, dx, dh_0, dc_0, dcut_h, dcut_c)),
        *_addresses(dw, sizes, call.has_biases),
    ]
    cell, dtype, steps_at = call.kind.number, DTYPES[x.dtype], address(steps)
    _core.backward(cell, dtype, sizes, steps_at, 1, first, [], thread_count(), call.recompute)
    return grads


def _gradients(call: Call, sizes: Sizes, wanted: list[bool]) -> list[Tensor]:
    """Allocate the gradients; one that is not wanted is empty."""
    h_shape = (sizes.directions, sizes.batch, sizes.output)
    c_shape = (sizes.directions, sizes.batch, sizes.hidden)
    shapes = [call.input.shape, *[h_shape, c_shape] * 2, *(w.shape for w in call.weights)]
    return [
        call.input.new_empty(tuple(shape) if want else (0,))
        for shape, want in zip(shapes, wanted, strict=True)
    ]


def _layer_backward_fake(*arguments: Any) -> list[Tensor]:
    _, _, _, _, _, _, wanted, *fields = arguments
    call = Call(*fields)
    return _gradients(call, check(call, values=False), wanted)


# ---- autograd ----


def _setup_layer(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *fields, ctx.all_c, ctx.keep = inputs
    call = Call(*fields)
    y, _, _, _, reserve = output
    cuts = call.lengths, call.resets
    ctx.save_for_backward(y, reserve, call.batch_sizes, *cuts, *call.tensors())
    ctx.weights, ctx.batch, ctx.config = len(call.weights), call.batch, call[6:10]
    ctx.set_materialize_grads(False)


def _saved_call(ctx: Any) -> tuple[Tensor, Tensor, Call]:
    """Return output, reserve and the call."""
    saved = ctx.saved_tensors  # read once: a checkpoint recomputes at every reading
    y, reserve, batch_sizes, lengths, resets, input, h_0, c_0, reset_h, reset_c, *weights = saved
    call = Call(input, batch_sizes, ctx.batch, h_0, c_0, weights, *ctx.config)
    cuts = {"lengths": lengths, "resets": resets, "reset_h": reset_h, "reset_c": reset_c}
    return y, reserve, call._replace(**cuts)


def _layer_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    if not ctx.keep:
        raise RuntimeError("ostinato::layer: backward needs a forward call with keep=True")
    y, reserve, call = _saved_call(ctx)
    wanted: list[Any] = Call._make(ctx.needs_input_grad[:-2]).tensors()
    # What was not asked for has no elements, and nor has its gradient.
    grads = (*grads[:3], grads[3] if ctx.all_c else None)
    found: Sequence[Tensor | None]
    if is_beyond_engine(grads):
        if call.input.device.type == "cpu" and any(grad is not None for grad in grads):
            found = transforms.gradients(call, grads, y, reserve, wanted)
        else:
            found = reference_gradients(call, grads, wanted)
    elif any(grad is not None for grad in grads):
        # A state that is absent has no gradient, but a place in the list.
        wanted = [bool(want) for want in wanted]
        grads_of = torch.ops.ostinato.layer_backward(*grads, y, reserve, wanted, *call)
        found = [g if want else None for g, want in zip(grads_of, wanted, strict=True)]
    else:
        found = [None] * len(wanted)
    dx, dh_0, dc_0, dreset_h, dreset_c, *dw = found
    nothing = [None] * 4
    return dx, None, None, dh_0, dc_0, dw, *nothing, None, None, dreset_h, dreset_c, None, None


# ---- registration: one line per backend ----


def _register(operator: str, kernel: Callable[..., Any], key: str) -> None:
    _library.impl(operator, profile.named(operator, kernel), key)  # type: ignore[no-untyped-call]


_register("layer", _layer_cpu, "CPU")
_register("layer_backward", _layer_backward_cpu, "CPU")
_register("layer", _layer_cuda, "CUDA")
_register("layer_backward", _layer_backward_cuda, "CUDA")
traced.define(_library, layer, cut_layer)
flops.register()
# In what inductor compiles they stay calls, also where its `implicit_fallbacks` are switched off.
# Arrays may lie as inductor likes: every kernel makes those dense that it wants so.
when_imported(
    "torch._inductor.lowering",
    lambda module: module.FALLBACK_ALLOW_LIST.update(
        ("ostinato::layer", "ostinato::layer_backward")
    ),
)
torch.library.register_fake("ostinato::layer", _layer_fake, lib=_library)
torch.library.register_fake("ostinato::layer_backward", _layer_backward_fake, lib=_library)
torch.library.register_autograd(
    "ostinato::layer", _layer_gradient, setup_context=_setup_layer, lib=_library
)
