"""The short way: a call that nobody watches, past the dispatcher, with its gradient.

It asks in C++ (csrc/tensors.h) what `ostinato.call.check` and the modules ask and, where the answer
is no, declines and says nothing.

Legend: T steps, B batch, I input, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ostinato import _core, profile, transforms
from ostinato.adjoint import is_batch
from ostinato.call import Call, Shape, batch_of, thread_count
from ostinato.cells import CELLS
from ostinato.gradients import is_asked, is_beyond_engine, reference_gradients

# Looked up once: a cell's whole call takes a few microseconds.
_interpreter = torch._C._functorch.peek_interpreter_stack
_forward_ad = torch.autograd.forward_ad
_is_autocast = torch._C._is_any_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_modes = torch._C._len_torch_dispatch_stack
# Looks at tensors alone, and does not ask a class of tensors that has its own way with functions.
_any_requires_grad = torch._C._any_requires_grad
_is_profiled = torch._C._autograd._profiler_enabled

# Of the records, what each call asks: a cell's whole call takes a few microseconds.
_NUMBERS = {name: cell.number for name, cell in CELLS.items()}
_HAVE_C = {name for name, cell in CELLS.items() if cell.has_c}

# cell, is_cell, shape, has_biases, recompute
_Config = tuple[str, bool, Shape, bool, bool]


def _connect() -> bool:
    """Open the short way if this torch has DLPack's table of C functions (2.10 and later)."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return table is not None and _core.connect(table, Tensor, torch.nn.Parameter, torch.empty_like)


_IS_SHORT = _connect()


class _DeclinedError(Exception):
    """The short way does not serve these tensors."""


def run(
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
) -> tuple[Tensor, Any, Any] | None:
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
    if torch.is_grad_enabled() and _any_requires_grad(*arguments):
        try:
            found: Any = _apply(config, *arguments)
        except _DeclinedError:
            return None
        if is_cell:
            return (found[0], None, found[1]) if cell in _HAVE_C else (found, None, None)
        return found if cell in _HAVE_C else (*found, None)
    forward = _shown_forward if _is_profiled() else _forward
    found = forward(config, False, *arguments)
    return None if found is None else found[:3]


def _forward(
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
        _NUMBERS.get(cell, -1),
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
        thread_count(),
    )


def _shown_forward(config: _Config, keep: bool, *tensors: Any) -> Any:
    with profile.shown(config[0], "forward"):
        return _forward(config, keep, *tensors)


def _is_alone() -> bool:
    """Whether no compiler, tracer, mode, autocast or transform is to see the operator."""
    return not (
        torch.compiler.is_compiling()
        or _interpreter() is not None
        or _is_autocast()
        or _tracing_state() is not None
        or _modes()
        or _forward_ad._current_level >= 0
    )


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
        forward = _shown_forward if _is_profiled() else _forward
        found = forward(config, True, batch_sizes, input, h_0, c_0, *weights)
        if found is None:
            raise _DeclinedError
        output, h_n, c_n, reserve = found
        # One step of a GRU or an LSTM is differentiated without its output, which the caller may
        # then change in place, as with torch's cells.
        reads_output = CELLS[cell].reads_output or not is_cell
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
        if not is_beyond_engine((dy, dh_n, dc_n)):
            arguments = (
                _NUMBERS[cell],
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
                thread_count(),
            )
            if not _is_profiled():
                found = _core.tensors_backward(*arguments)
            else:
                with profile.shown(cell, "backward"):
                    found = _core.tensors_backward(*arguments)
        if found is None:
            call = Call(
                input,
                batch_sizes,
                0 if is_cell else batch_of(input, batch_sizes, h_0, c_0),
                h_0,
                c_0,
                weights,
                cell,
                has_biases,
                shape[3] == 2,
                recompute,
            )
            _, *wanted = is_asked(ctx, (batch_sizes, input, h_0, c_0, *weights))
            places = [*wanted[:3], False, False, *wanted[3:]]
            arrived = dy, dh_n, dc_n, None
            if is_cell and (torch.is_grad_enabled() or not any(map(is_batch, arrived))):
                # One step is its own graph: torch's elementary operators.
                all_found = reference_gradients(call, arrived, places, is_cell)
            else:
                run = transforms.cell_gradients if is_cell else transforms.gradients
                all_found = run(call, arrived, output, reserve, places)
            dx, dh_0, dc_0, _, _, *dw = all_found
            found = dx, dh_0, dc_0, *dw
        return (None, None, *found)


# torch's own `Function.apply` first asks for transforms and what they left behind; the engine
# declines these.
_apply: Any = super(torch.autograd.Function, _Short).apply
