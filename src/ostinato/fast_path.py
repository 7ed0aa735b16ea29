"""The fast path: a call on plain tensors that nobody watches, past the dispatcher.

It asks in C++ (csrc/tensors.cpp) what the check and the modules ask and, where the answer is no,
declines and says nothing.

Legend: T steps, B batch, I input, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from ostinato import _core, profile
from ostinato.call import Call, Results, Shape, padded
from ostinato.cells import CELLS
from ostinato.check import shape_of
from ostinato.cpu import Config, plain_backward, plain_forward
from ostinato.gradients import gradients, is_asked, is_beyond_engine
from ostinato.tensors import DTYPES, batch_of

# Looked up once: a cell's whole call takes a few microseconds.
_interpreter = torch._C._functorch.peek_interpreter_stack
_forward_ad = torch.autograd.forward_ad
_is_autocast = torch._C._is_any_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_modes = torch._C._len_torch_dispatch_stack
# Looks at tensors alone, and does not ask a class of tensors that has its own way with functions.
_any_requires_grad = torch._C._any_requires_grad
_is_profiled = torch._C._autograd._profiler_enabled

_HAVE_C = {name for name, cell in CELLS.items() if cell.has_c}


def _connect() -> bool:
    """Open the fast path if this torch has DLPack's table of C functions (2.10 and later)."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return table is not None and _core.connect(table, Tensor, torch.nn.Parameter, torch.empty_like)


_IS_OPEN = _connect()


class _DeclinedError(Exception):
    """The fast path does not serve these tensors."""


def why_not(call: Call) -> str | None:
    """Say why it does not serve a call; None where C++ is to look at the tensors."""
    if not _IS_OPEN:
        return "this torch has no table of C functions (DLPack 1)"
    if not _is_alone():
        return "a compiler, tracer, mode, transform or region of autocast looks on"
    if call.is_cut or call.all_states:
        return "rows are cut, or the states of all steps are asked for"
    if type(call.input) is not Tensor and type(call.input) is not torch.nn.Parameter:
        return "input is of a class of tensors of its own"
    if has_torch_function((*call.arrays(),)):
        return "a class of tensors, or a mode, has its own way with functions"
    if call.input.device.type != "cpu" or call.input.dtype not in DTYPES:
        return "it runs float32, float64, bfloat16 and float16 on the CPU"
    if shape_of(call) is None:
        return "the weights are not those of a layer"
    if not all(weight.is_contiguous() for weight in call.weights):
        return "a weight is not dense"
    if not all(t is None or t.numel() for t in (call.batch_sizes, *call.tensors())):
        return "a tensor has no elements"
    return None


_PLAIN = (Tensor, torch.nn.Parameter)
# Of states of resets.
_NOTHING = ((), *((None,) * len(cell.states) for cell in CELLS.values()))


def layer(call: Call) -> Results | None:
    """Run a layer, or decline: at less cost than `why_not` takes to say why."""
    # A class of tensors, or a mode, is not to see that somebody asks for shapes.
    is_cut = call.lengths is not None or call.resets is not None or call.reset_to not in _NOTHING
    plain, (first, *_) = _PLAIN, call.weights or (None,)
    if is_cut or call.all_states or type(call.input) not in plain or type(first) not in plain:
        return None
    if torch._C._len_torch_function_stack():
        return None
    shape = shape_of(call)
    if shape is None:
        return None
    h_0, c_0 = padded(call.initial)
    arguments = call.batch_sizes, h_0, c_0, tuple(call.weights), call.has_biases, call.recompute
    found = run(call.cell, shape, call.input, *arguments)
    if found is None:
        return None
    output, *last = found
    return Results(output, tuple(state for state in last if state is not None))


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
    is_step: bool = False,
) -> tuple[Tensor, Any, Any] | None:
    """Run a layer, or one step of a cell, at a tenth of the dispatcher's cost per call.

    The arguments are those of `ostinato.ops.layer`. With `is_step` input is (B, I) or (I,), and
    states are (B, H) or (H,), without dimensions for steps and directions. Everything is checked in
    C++ against `shape`, the sizes that the module was made with.

    Returns output, h_n and c_n, where h_n is None with `is_step`, and c_n but for an LSTM. Returns
    None instead of the three where somebody looks on, or where anything is not as expected.
    """
    if not _IS_OPEN or not _is_alone():
        return None
    config = cell, is_step, shape, has_biases, recompute
    arguments = batch_sizes, input, h_0, c_0, *weights
    if torch.is_grad_enabled() and _any_requires_grad(*arguments):
        try:
            found: Any = _apply(config, *arguments)
        except _DeclinedError:
            return None
        if not is_step:
            return found if cell in _HAVE_C else (*found, None)
        if cell not in _HAVE_C:
            return found, None, None
        h, c = found
        return h, None, c
    forward = _shown_forward if _is_profiled() else plain_forward
    found = forward(config, False, *arguments)
    if found is None:
        return None
    output, h_n, c_n, _ = found
    return output, h_n, c_n


def _shown_forward(config: Config, keep: bool, *tensors: Any) -> Any:
    with profile.shown(config[0], "forward"):
        return plain_forward(config, keep, *tensors)


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


class _FastPath(torch.autograd.Function):
    """The fast path with its gradient. Raises _DeclinedError."""

    @staticmethod
    def forward(
        ctx: Any,
        config: Config,
        batch_sizes: Any,
        input: Any,
        h_0: Any,
        c_0: Any,
        *weights: Any,
    ) -> Any:
        cell, is_step, *_ = config
        forward = _shown_forward if _is_profiled() else plain_forward
        found = forward(config, True, batch_sizes, input, h_0, c_0, *weights)
        if found is None:
            raise _DeclinedError
        output, h_n, c_n, reserve = found
        # One step of a GRU or an LSTM is differentiated without its output, which the caller may
        # then change in place, as with torch's cells.
        reads_output = CELLS[cell].reads_output or not is_step
        ctx.save_for_backward(
            output if reads_output else None, reserve, batch_sizes, input, h_0, c_0, *weights
        )
        ctx.config = config
        ctx.set_materialize_grads(False)
        if is_step:
            return output if c_n is None else (output, c_n)
        return (output, h_n) if c_n is None else (output, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _, is_step, *_ = ctx.config
        wanted = ctx.needs_input_grad[2:]
        dy, *last = grads
        arrived = dy, *padded((None, *last) if is_step else last)
        if all(grad is None for grad in arrived):
            return (None, None, *[None] * len(wanted))
        # read once: a checkpoint recomputes at every reading
        output, reserve, *tensors = ctx.saved_tensors
        found: Any = None
        if not is_beyond_engine(arrived):
            found = plain_backward(ctx.config, tensors, output, reserve, arrived, wanted)
        if found is None:
            _, *wanted = is_asked(ctx, tensors)
            found = _differentiate(ctx.config, tensors, output, reserve, arrived, wanted)
        return (None, None, *found)


def _differentiate(
    config: Config, tensors: Any, output: Any, reserve: Any, arrived: Any, wanted: Any
) -> list[Tensor | None]:
    """Differentiate where C++ does not: in any order, or many gradients at once."""
    cell, is_step, shape, has_biases, recompute = config
    batch_sizes, input, h_0, c_0, *weights = tensors
    count = len(CELLS[cell].states)
    batch = 0 if is_step else batch_of(input, batch_sizes, h_0, c_0)
    *_, directions = shape
    options = cell, has_biases, directions == 2, recompute
    call = Call(input, batch_sizes, batch, (h_0, c_0)[:count], weights, *options)
    of_input, of_h, of_c, *of_weights = wanted
    asked = [of_input, *(of_h, of_c)[:count], *[False] * count, *of_weights]
    dy, *last = arrived
    kept = None if reserve is None else reserve.view(torch.uint8)
    results = Results(dy, tuple(last[:count]), (None,) * (count - 1))
    parts = call.parts(gradients(call, results, output, kept, asked, is_step))
    return [parts.input, *padded(parts.initial), *parts.weights]


# torch's own `Function.apply` first asks for transforms and what they left behind; the engine
# declines these.
_apply: Any = super(torch.autograd.Function, _FastPath).apply
