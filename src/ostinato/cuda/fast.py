"""The fast path on a GPU: a layer's call on plain tensors, checked in C++, past the dispatcher.

What is asked of a call once, whether our kernels run it and which, is kept by its sizes; what a
launch asks is kept with the kernel. So a call takes a few operators of torch and one launch.

Legend: T steps, B batch, N packed rows.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ostinato import _core, plain
from ostinato.call import Call, Results, padded
from ostinato.cells import CELLS
from ostinato.cuda import choice, launch, layer, sequence
from ostinato.cuda.config import Config
from ostinato.plain import NUMBERS, has_cuts, of_tuple, to_tuple
from ostinato.sizes import Sizes

# What tests close or open. A CPU build of torch has no tensors on a GPU.
IS_OPEN = plain.IS_OPEN and torch.version.cuda is not None
# Where C++ looks for tensors.
_device_type = launch.DEVICE_TYPE


def _is_here(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_cuda


_trying = threading.local()


@contextlib.contextmanager
def tried() -> Iterator[None]:
    """Let our kernels run what they can, in this thread: a trial asks for them."""
    _trying.is_on = True
    try:
        yield
    finally:
        _trying.is_on = False


class _Way(NamedTuple):
    """How our kernels run a call."""

    forward: Config
    launcher: sequence.Launcher


# By what a choice depends on; None where another backend runs the call.
_ways: dict[tuple[Any, ...], _Way | None] = {}
_MOST_WAYS = 4096
_ASK: Final = "nobody was asked"


class _Plain(NamedTuple):
    """A call whose tensors are plain, and what C++ read of them."""

    call: Call
    sizes: Sizes
    device: int
    is_ragged: bool


def _read(config: plain.Config, tensors: tuple[Any, ...], kept: Any = None) -> _Plain | None:
    """Let C++ read a call's tensors; None if it declines them."""
    cell, is_step, shape, has_biases, recompute, stack = config
    if is_step:
        return None
    if cell not in CELLS:
        return None
    found: Any = _core.plain_sizes(NUMBERS[cell], shape, tensors, has_biases, kept, _device_type)
    if found is None:
        return None
    device, steps, rows, batch, is_ragged = found
    inputs, hidden, projection, directions = shape
    count = directions * (4 if has_biases else 2)
    (batch_sizes, *masks), parts = of_tuple(tensors, count)
    states = len(CELLS[cell].states)
    initial, reset_to = tuple(parts.initial[:states]), tuple(parts.reset_to[:states])
    options = cell, has_biases, directions == 2, recompute, *masks, reset_to
    beyond: Any = (False, 1, 0.0, stack)  # all states, layers, dropout
    front: Any = parts.input, batch_sizes, batch, initial, list(parts.weights)
    call = Call(*front, *options, *beyond)
    sizes = Sizes(steps, rows, batch, inputs, hidden, projection, directions)
    return _Plain(call, sizes, device, is_ragged)


def forward(config: plain.Config, keep: bool, tensors: tuple[Any, ...]) -> Any:
    """Run a layer as `ostinato.cpu.plain_forward` does, or return None where it is declined."""
    *_, recompute, _ = config
    if recompute and keep:
        return None
    read = _read(config, tensors)
    if read is None:
        return None
    call, sizes, _, is_ragged = read
    if is_ragged and sequence.is_capturing() and not sequence.is_at_hand(call):
        return None
    way = _way(config, keep, read)
    if way is None:
        return None
    # Modes of functions are not to see what a layer is made of.
    with torch._C.DisableTorchFunction():
        rows = sequence.rows_of(call, may_keep=True)
        results, reserve = sequence.forward(call, sizes, rows, way.forward, way.launcher, keep)
    h_n, c_n = padded(results.last)
    return results.output, h_n, c_n, reserve


def _way(config: plain.Config, keep: bool, read: _Plain) -> _Way | None:
    """Return how our kernels run a call, or None."""
    call, sizes, device, _ = read
    math = layer.math_of(call.input.dtype)
    ragged = call.batch_sizes is not None, call.lengths is not None, call.resets is not None
    key = config, keep, math, sizes.steps, sizes.batch, device, ragged, choice.version()
    is_asked = not getattr(_trying, "is_on", False)
    known = _ways.get(key, _ASK)
    if is_asked and not isinstance(known, str):
        return known
    found = None
    decision = layer.decide(call, is_training=keep) if is_asked else None
    if decision is None or decision.is_ours:
        kernel = layer.plan_of(call, sizes, is_backward=False)
        assert kernel is not None
        found = _Way(kernel, layer.launcher_of(call))
    # Another time there may be more to know.
    if decision is None or decision.place is not None or sequence.is_capturing():
        return found
    if len(_ways) >= _MOST_WAYS:
        _ways.clear()
    _ways[key] = found
    return found


def backward(
    config: plain.Config,
    tensors: tuple[Any, ...],
    output: Tensor,
    reserve: Tensor,
    arrived: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> Any:
    """Return gradients as `ostinato.cpu.plain_backward` does, or None where these are declined.

    The call is one that `forward` ran. Who runs such a call now is not asked.
    """
    _, is_step, *_ = config
    if is_step or not _is_here(output):
        return None
    dense = sequence.dense_results(Results.of(arrived, len(arrived) - 1))
    read = _read(config, tensors, (output, reserve, tuple(dense.flat())))
    if read is None:
        return None
    call, sizes, *_ = read
    _, asked = of_tuple(wanted, len(call.weights))
    flags = call.padded_parts(asked.padded()).flat()
    kernel = layer.plan_of(call, sizes, is_backward=True)
    if kernel is None:  # the precision was switched meanwhile, and has no kernel of this size
        return None
    given = layer.launcher_of(call), dense, output, reserve, flags
    with torch._C.DisableTorchFunction():
        rows = sequence.rows_of(call, may_keep=True)
        found = sequence.backward(call, sizes, rows, kernel, *given)
    return to_tuple((None,) * 3, call.parts(found), has_cuts(tensors, len(call.weights)))
