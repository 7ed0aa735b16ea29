"""The route: one ordered list of backends, of which the first that serves a call runs it.

Each backend says why it does not serve a call, or runs it. `explain` prints the list. A stack is a
call with L layers: a backend that takes stacks gets it whole, otherwise its layers go the route one
after the other. A cell is a call with one step.

The modules ask the fast path before, with what they were given (`fast`, `fast_stack`): that a call
is well formed is checked there in C++, at a tenth of what all else here costs.

Legend: T steps, B batch, N packed rows, H hidden, O output of a step (proj_size, or H), L layers,
D directions.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

from ostinato import (
    cudnn,
    fast_path,
    onnx_node,
    operators,
    profile,
    reference_backend,
    traced,
    transforms,
)
from ostinato.call import Call, Results, States, padded
from ostinato.cells import find
from ostinato.cuda import layer as gpu
from ostinato.cuda import trial
from ostinato.tensors import DTYPES, batch_of, check_call, keeps, reject_nested, require_tensor

_log = logging.getLogger("ostinato")

fast, fast_stack = fast_path.run, fast_path.run_stack


class Backend(NamedTuple):
    """One way to run a call."""

    name: str
    why_not: Callable[[Call], str | None]
    run: Callable[[Call], Results | None]  # None where it declines after all
    takes_stacks: bool = False
    # Whether `run` is called without asking `why_not`: to decline costs less than to say why.
    declines: bool = False
    compiles: bool = True  # whether a compiler, which pays for each line, may meet it
    recomputes: bool = True  # whether backward can compute the gates again by itself
    is_shown: bool = False  # to a profiler, by a name that a user knows


def _why_not_overridden(call: Call) -> str | None:
    if torch.compiler.is_compiling() or not has_torch_function((*call.arrays(),)):
        return "no argument has a __torch_function__ of its own"
    return None


def _overridden(call: Call) -> Results:
    """Leave a call to the class of its tensors, as torch leaves its own functions to it."""
    function = cut_layer if call.is_cut or call.all_states else layer
    parameters = call.named_parameters()
    del parameters["batch"]
    positional = ("cell", "input", "batch_sizes", "h_0", "c_0", "weights")
    given = [parameters.pop(name) for name in positional]
    if function is layer:
        for name in ("lengths", "resets", "reset_h", "reset_c"):
            del parameters[name]
    else:
        parameters["all_c"] = call.all_states
    found = handle_torch_function(function, (*call.arrays(),), *given, **parameters)
    output, h_n, c_n, *every = found
    last = (h_n, c_n)[: len(call.initial)]
    return Results(output, last, tuple(every) if call.all_states else ())


def _why_not_cpu(call: Call) -> str | None:
    if transforms.is_active():
        return "a transform looks on"
    return _why_no_engine(call)


def _why_no_engine(call: Call) -> str | None:
    if call.input.dtype not in DTYPES or call.input.device.type not in ("cpu", "meta"):
        return "it runs float32, float64, bfloat16 and float16 on the CPU"
    kind = find(call.cell)
    if kind is not None and not kind.has_engine:
        return "this cell asks for the reference"
    weight_ih, weight_hh, *_ = (*call.weights, call.input, call.input)
    if kind is None or not kind.is_own:
        is_empty = not (weight_ih.numel() and weight_hh.numel())
    else:  # either side may have no gates
        is_empty = not (weight_ih.shape[-1] and weight_hh.shape[-1])
    if is_empty:
        return "a layer without units or features has nothing to compute"
    if not all(t is None or t.layout is torch.strided for t in call.tensors()):
        return "not all tensors are strided"
    return None


def _operator(call: Call) -> Results:
    return operators.layer(call, keeps(call))


def _gpu(call: Call) -> Results:
    # It keeps all that backward reads, or nothing.
    return operators.layer(call._replace(recompute=False), keeps(call))


def _why_not_mapped(call: Call) -> str | None:
    return transforms.why_not(call) or _why_no_engine(call)


def _mapped(call: Call) -> Results:
    check_call(call)
    return transforms.layer(call)


def _why_not_gpu(call: Call) -> str | None:
    return "a transform looks on" if transforms.is_active() else gpu.why_not(call)


def _reference(call: Call) -> Results:
    check_call(call)
    device, dtype = call.input.device.type, call.input.dtype
    if dtype not in DTYPES or device not in ("cpu", "meta"):
        _tell(device, dtype)
    return reference_backend.results(call)


_told: set[tuple[str, torch.dtype]] = set()


def _tell(device: str, dtype: torch.dtype) -> None:
    """Say once per device and dtype that no engine serves it."""
    if torch.compiler.is_compiling() or (device, dtype) in _told:
        return
    _told.add((device, dtype))
    _log.warning("no engine for %s on %s: the reference runs, correctly and slowly", dtype, device)


BACKENDS = (
    Backend("fast path", fast_path.why_not, fast_path.layer, declines=True, compiles=False),
    Backend("class of tensors", _why_not_overridden, _overridden, compiles=False),
    Backend("torch.jit.trace", traced.why_not, traced.layer, compiles=False),
    Backend("torch.onnx.export", onnx_node.why_not, onnx_node.layer),
    Backend("CPU engine", _why_not_cpu, _operator),
    Backend("CPU engine under transforms", _why_not_mapped, _mapped, compiles=False, is_shown=True),
    Backend("GPU engine", _why_not_gpu, _gpu, recomputes=False),
    Backend("cuDNN", cudnn.why_not, cudnn.layer, True, recomputes=False, is_shown=True),
    Backend("reference", lambda call: None, _reference, recomputes=False, is_shown=True),
)
_, *_DECLINED = BACKENDS
_COMPILED = tuple(backend for backend in BACKENDS if backend.compiles)


def run(call: Call, is_declined: bool = False) -> Results:
    """Run one layer on the first backend that serves it.

    `is_declined` says whether the fast path has declined it.

    Raises:
        ValueError: an unknown cell, a dtype that differs from the weights', wrong batch_sizes.
        RuntimeError: a wrong shape or device, or more or fewer weights than the cell has.
    """
    asked = _DECLINED if is_declined else BACKENDS
    for backend in _COMPILED if torch.compiler.is_compiling() else asked:
        if backend.declines:
            found = backend.run(call)
        elif backend.why_not(call) is None:
            found = _through(backend, call)
        else:
            continue
        if found is not None:
            return found
    raise AssertionError("the reference serves every call")


def _through(backend: Backend, call: Call) -> Results | None:
    if backend.is_shown and profile.is_on():
        with profile.shown(call.cell, "forward"):
            return _recomputed(backend, call)
    return _recomputed(backend, call)


def _recomputed(backend: Backend, call: Call) -> Results | None:
    if backend.recomputes or not call.recompute or not keeps(call) or transforms.is_active():
        return backend.run(call)
    return checkpoint(  # type: ignore[no-any-return]
        backend.run, call, use_reentrant=False, preserve_rng_state=False
    )


def run_stack(call: Call, is_declined: bool = False) -> tuple[Tensor, States, States]:
    """Run the layers of a stack, which may be one.

    Returns output of the last layer and the last states of all, (L * D, B, ...); and, with
    `call.all_states`, each state after every step, (L * D, T, B, ...) or (L * D, N, ...).
    """
    if call.layers > 1:
        for backend in BACKENDS:
            if backend.takes_stacks and backend.why_not(call) is None:
                found = _through(backend, call)
                if found is not None:
                    return found.output, found.last, ()
    output, last, every = call.input, [], []
    for k in range(call.layers):
        if k and call.dropout:
            output = torch.dropout(output, call.dropout, True)
        results = run(call.of_layer(k, output), is_declined)
        output = results.output
        last.append(results.last)
        if call.all_states:
            every.append([_by_direction(call, t) for t in (output, *results.every)])
    all_states = tuple(torch.cat(list(each)) for each in zip(*every, strict=True))
    if call.layers == 1:
        return output, results.last, all_states
    return output, tuple(torch.cat(list(each)) for each in zip(*last, strict=True)), all_states


def _by_direction(call: Call, rows: Tensor) -> Tensor:
    """Bring (T, B, D * O) to (D, T, B, O), or (N, D * O) to (D, N, O)."""
    if not call.bidirectional:
        return rows.unsqueeze(0)
    return torch.stack(rows.chunk(2, -1))


# ---- the route as functions of tensors ----


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
    options = has_biases, bidirectional, recompute
    output, last, _ = run(_call(cell, input, batch_sizes, h_0, c_0, weights, *options))
    h_n, c_n = padded(last)
    return output, h_n, c_n


def cut_layer(  # noqa: D417
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
    a direction enters a piece over a cut, it starts from reset_h and reset_c, otherwise from h_0
    and c_0. What stands before `lengths` is as in `layer`.

    Args:
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
    options = has_biases, bidirectional, recompute, lengths, resets, reset_h, reset_c
    call = _call(cell, input, batch_sizes, h_0, c_0, weights, *options)
    output, last, every = run(call._replace(all_states=all_c))
    (h_n, c_n), (cells,) = padded(last), padded(every, first=1)
    return output, h_n, c_n, cells


def _call(
    cell: str, input: Any, batch_sizes: Any, h_0: Any, c_0: Any, weights: Any, *options: Any
) -> Call:
    """Return the call of such arguments, each of which is a tensor, or stands for one."""
    has_biases, bidirectional, recompute, *masks = options
    call = Call.of(
        *(input, batch_sizes, 0, h_0, c_0, weights),
        *(cell, has_biases, bidirectional, recompute, *masks),
    )
    if not torch.compiler.is_compiling():
        if has_torch_function((*call.arrays(),)):
            return call
        _require_tensors(call)
    return call._replace(batch=batch_of(input, batch_sizes, h_0, c_0))


def _require_tensors(call: Call) -> None:
    require_tensor("input", call.input)
    if getattr(call.input, "is_nested", False):
        reject_nested("input:")
    for array, value in zip(call.table(), call.arrays(), strict=True):
        if value is not None or array.type != "Tensor?":
            require_tensor(array.name, value)


def explain(call: Call) -> str:
    """Say who would run a call of a layer or a stack, and why nobody before.

    Returns a line for each backend up to the one that runs the call; of a stack whose layers run by
    themselves, such lines for each that differs from the one before.
    """
    with trial.only_asked():
        calls = [call]
        if call.layers > 1 and not any(
            backend.takes_stacks and backend.why_not(call) is None for backend in BACKENDS
        ):
            calls = [call.of_layer(k, call.input) for k in range(call.layers)]
        texts = map(_explain_one, calls)
        return "\n".join(text for text, _ in itertools.groupby(texts))


def _explain_one(call: Call) -> str:
    lines: list[str] = []
    for backend in BACKENDS:
        if call.layers > 1 and not backend.takes_stacks:
            continue
        why_not = backend.why_not(call)
        if why_not is None:
            return "\n".join([*lines, f"{backend.name}: runs it{_detail(backend, call)}"])
        lines.append(f"{backend.name}: {why_not}")
    raise AssertionError("the reference serves every call")


def _detail(backend: Backend, call: Call) -> str:
    """Say with which kernels, and of a whole stack why not with ours."""
    if backend.run is _gpu:
        return f": {gpu.detail(call)}"
    if call.layers > 1:
        return f" ({gpu.decide(call, is_training=keeps(call)).reason})"
    return ""


traced.define(operators.library, run)
