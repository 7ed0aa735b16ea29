"""The fast path: a call on plain tensors that nobody watches, past the dispatcher.

It asks in C++ (csrc/tensors.cpp) what the check and the modules ask and, where the answer is no,
declines and says nothing.

Legend: T steps, B batch, I input, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from ostinato import cpu, profile
from ostinato.call import Call, Results, Shape, padded
from ostinato.cells import CELLS, cell_of
from ostinato.check import shape_of
from ostinato.cuda import fast as gpu
from ostinato.cuda import trial
from ostinato.gradients import gradients, is_asked, is_beyond_engine
from ostinato.plain import Config, has_cuts, of_tuple, to_tuple
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


class _HaveC(dict[str, bool]):
    """Which cells have states behind h."""

    def __missing__(self, name: str) -> bool:
        found = self[name] = cell_of(name).has_c
        return found


_HAVE_C = _HaveC((name, cell.has_c) for name, cell in CELLS.items())


class _DeclinedError(Exception):
    """The fast path does not serve these tensors."""


def why_not(call: Call) -> str | None:
    """Say why it does not serve a call; None where C++ is to look at the tensors."""
    if not cpu.IS_OPEN:
        return "this torch has no table of C functions (DLPack 1)"
    if not is_alone():
        return "a compiler, tracer, mode, transform or region of autocast looks on"
    if call.all_states:
        return "the states of all steps are asked for"
    if type(call.input) is not Tensor and type(call.input) is not torch.nn.Parameter:
        return "input is of a class of tensors of its own"
    if has_torch_function((*call.arrays(),)):
        return "a class of tensors, or a mode, has its own way with functions"
    if call.input.device.type == "cuda":
        return "on a GPU it runs what the GPU engine would run"
    if call.input.device.type != "cpu" or call.input.dtype not in DTYPES:
        return "it runs float32, float64, bfloat16 and float16 on the CPU"
    if shape_of(call) is None:
        return "the weights are not those of a layer"
    if not call.kind.has_engine:
        return "this cell asks for the reference"
    if not all(weight.is_contiguous() for weight in call.weights):
        return "a weight is not dense"
    if not all(t is None or t.numel() for t in (call.batch_sizes, *_filled(call))):
        return "a tensor has no elements"
    return None


def _filled(call: Call) -> list[Any]:
    """Return the tensors that are to have elements: not the weights of a side without gates."""
    kind, (_, *tensors) = call.kind, call.tensors()
    if kind.gates and kind.input_gates:
        return [call.input, *tensors]
    return [call.input, *call.initial, *call.reset_to]


_PLAIN = (Tensor, torch.nn.Parameter)


def layer(call: Call) -> Results | None:
    """Run a layer, or decline: at less cost than `why_not` takes to say why."""
    # A class of tensors, or a mode, is not to see that somebody asks for shapes.
    plain, (first, *_) = _PLAIN, call.weights or (None,)
    if call.all_states or type(call.input) not in plain or type(first) not in plain:
        return None
    if torch._C._len_torch_function_stack():
        return None
    shape = shape_of(call)
    if shape is None:
        return None
    h_0, c_0 = padded(call.initial)
    arguments = call.batch_sizes, h_0, c_0, call.weights, call.has_biases, call.recompute
    cuts: tuple[Any, ...] = ()
    if call.is_cut or call.reset_to:
        cuts = call.lengths, call.resets, *padded(call.reset_to)
    found = run(call.cell, shape, call.input, *arguments, cuts, stack=call.stack)
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
    weights: Sequence[Any],
    has_biases: bool,
    recompute: bool = False,
    cuts: tuple[Any, ...] = (),
    is_step: bool = False,
    stack: int = 1,
) -> tuple[Tensor, Any, Any] | None:
    """Run a layer, or one step of a cell, at a tenth of the dispatcher's cost per call.

    The arguments are those of `ostinato.ops.layer`; `cuts` are nothing, or lengths, resets
    and the two states of resets. With `is_step` input is (B, I) or (I,), and states are (B, H) or
    (H,), without dimensions for steps and directions. `stack` says how many layers the stack has
    that the layer is one of. Everything is checked in C++ against `shape`, the sizes that the
    module was made with.

    Returns output, h_n and c_n, where h_n is None with `is_step`, and c_n but for an LSTM. Returns
    None instead of the three where somebody looks on, or where anything is not as expected.
    """
    if not cpu.IS_OPEN or not is_alone():
        return None
    config = cell, is_step, shape, has_biases, recompute, stack
    tensors = batch_sizes, input, h_0, c_0, *weights, *cuts
    if torch.is_grad_enabled() and _any_requires_grad(*tensors):
        try:
            found: Any = _apply(config, *tensors)
        except _DeclinedError:
            return None
        if not is_step:
            return found if _HAVE_C[cell] else (*found, None)
        if not _HAVE_C[cell]:
            return found, None, None
        h, c = found
        return h, None, c
    forward = _shown_forward if _is_profiled() else _forward
    found = forward(config, False, tensors)
    if found is None:
        return None
    output, h_n, c_n, _ = found
    return output, h_n, c_n


def run_stack(
    cell: str,
    shape: Shape,
    input: Any,
    batch_sizes: Any,
    h_0: Any,
    c_0: Any,
    weights: Sequence[Any],
    has_biases: bool,
    recompute: bool,
    cuts: tuple[Any, ...],
) -> tuple[Tensor, Any, Any] | None:
    """Run a stack of layers without dropout, or decline it as a whole.

    The arguments are those of `run`; states are (L * D, B, ...), `shape` is of the first layer.
    """
    # A mode of functions is to see each layer.
    if not is_alone() or torch._C._len_torch_function_stack():
        return None
    _, hidden, projection, directions = shape
    if cell not in CELLS and cell_of(cell).drives:
        return None  # each layer's input has these beside the output of the layer before
    later = (projection or hidden) * directions, hidden, projection, directions
    count = _weights(cell, shape, has_biases)
    layers, last = len(weights) // count, []
    masks, reset_to = cuts[:2], cuts[2:]
    states: list[Any] = []
    for state in (h_0, c_0, *reset_to):
        if state is None:
            states.append((None,) * layers)
        elif type(state) in _PLAIN and state.dim() == 3 and len(state) == layers * directions:
            states.append(state.split(directions))
        else:
            return None
    for k, (h_0, c_0, *to) in enumerate(zip(*states, strict=True)):
        own = h_0, c_0, weights[k * count : (k + 1) * count], has_biases, recompute
        rest = *own, (*masks, *to), False, layers
        found = run(cell, later if k else shape, input, batch_sizes, *rest)
        if found is None:
            return None
        input, *ends = found
        last.append(ends)
    h_n, c_n = (None if ends[0] is None else torch.cat(ends) for ends in zip(*last, strict=True))
    return input, h_n, c_n


def _weights(cell: str, shape: Shape, has_biases: bool) -> int:
    """Return how many weights a layer has."""
    *_, projection, directions = shape
    per_unit = cell not in CELLS and cell_of(cell).parameters > 0
    return directions * (2 + 2 * has_biases + (projection > 0) + per_unit)


def _on_either_forward(config: Config, keep: bool, tensors: tuple[Any, ...]) -> Any:
    found = cpu.plain_forward(config, keep, tensors)
    return gpu.forward(config, keep, tensors) if found is None else found


def _on_either_backward(config: Config, *given: Any) -> Any:
    found = cpu.plain_backward(config, *given)
    return gpu.backward(config, *given) if found is None else found


# Whom the fast path asks. Where no tensor can be on a GPU, there is no step between.
_forward = _on_either_forward if gpu.IS_OPEN else cpu.plain_forward
_backward = _on_either_backward if gpu.IS_OPEN else cpu.plain_backward


def _shown_forward(config: Config, keep: bool, tensors: tuple[Any, ...]) -> Any:
    with profile.shown(config[0], "forward"):
        return _forward(config, keep, tensors)


def _shown_backward(config: Config, *given: Any) -> Any:
    with profile.shown(config[0], "backward"):
        return _backward(config, *given)


def is_alone() -> bool:
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
    def forward(ctx: Any, config: Config, *tensors: Any) -> Any:
        cell, is_step, *_ = config
        forward = _shown_forward if _is_profiled() else _forward
        found = forward(config, True, tensors)
        if found is None:
            raise _DeclinedError
        output, h_n, c_n, reserve = found
        # One step of a GRU or an LSTM is differentiated without its output, which the caller may
        # then change in place, as with torch's cells.
        reads_output = not is_step or cell_of(cell).reads_output
        ctx.save_for_backward(output if reads_output else None, reserve, *tensors)
        ctx.config = config
        ctx.set_materialize_grads(False)
        if is_step:
            return output if c_n is None else (output, c_n)
        return (output, h_n) if c_n is None else (output, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        for grad in grads:
            if grad is not None:
                break
        else:
            return (None, *[None] * len(wanted))
        # read once: a checkpoint recomputes at every reading
        output, reserve, *tensors = ctx.saved_tensors
        found: Any = None
        if not is_beyond_engine(grads):
            backward = _shown_backward if _is_profiled() else _backward
            found = backward(ctx.config, tuple(tensors), output, reserve, grads, wanted)
        if found is None:
            found = _differentiate(ctx, tensors, output, reserve, grads)
        return (None, *found)


def _differentiate(ctx: Any, tensors: Any, output: Any, reserve: Any, arrived: Any) -> Any:
    """Differentiate where C++ does not: in any order, or many gradients at once."""
    cell, is_step, shape, has_biases, recompute, _ = ctx.config
    *_, directions = shape
    count = _weights(cell, shape, has_biases)
    (batch_sizes, *cuts), parts = of_tuple(tensors, count)
    input, initial, reset_to, weights = parts
    batch = 0 if is_step else batch_of(input, batch_sizes, *initial)
    options = cell, has_biases, directions == 2, recompute, *cuts
    call = Call.of(input, batch_sizes, batch, *initial, weights, *options, *reset_to)
    dy, *last = arrived
    ends = (None, *last) if is_step else tuple(last)
    results = Results(dy, ends, (None,) * (len(ends) - 1))
    kept = None if reserve is None else reserve.view(torch.uint8)
    _, asked = of_tuple(is_asked(ctx, tensors), count)
    wanted = call.padded_parts(asked.padded()).flat()
    found = call.parts(gradients(call, results, output, kept, wanted, is_step))
    return to_tuple((None,) * 3, found, has_cuts(tensors, count))


# torch's own `Function.apply` first asks for transforms and what they left behind; the engine
# declines these.
_apply: Any = super(torch.autograd.Function, _FastPath).apply


def _as_tried(call: Call) -> Results | None:
    """Run a layer for a trial, which is to time what a call of the user's takes."""
    if not gpu.IS_OPEN:
        return None
    with gpu.tried():
        return layer(call)


trial.past_dispatcher = _as_tried
