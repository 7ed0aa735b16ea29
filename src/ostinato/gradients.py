"""The gradient of a call, beyond what an engine's kernel computes: who does, is said here alone.

A backend asks `is_beyond_engine`, runs its own kernel where the answer is no, and asks `gradients`
otherwise. What torch.func asks, the rules in `ostinato.transforms` answer. torch's operator on a
GPU (`ostinato.cudnn`) has only the reference beside it.

Legend: T steps, B batch, I input, H hidden, O output of a step (proj_size, or H), D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ostinato import reference_backend, transforms
from ostinato.batches import is_batch
from ostinato.call import Call, Results

_functorch = torch._C._functorch
_is_legacy_batch = _functorch.is_legacy_batchedtensor

_Maybe = Sequence[Tensor | None]


def save(ctx: Any, call: Call, output: Tensor, reserve: Tensor | None = None) -> None:
    """Save what `saved` is to return in backward; `reserve` is what is kept for it."""
    ctx.save_for_backward(output, reserve, *call.arrays())
    ctx.form = call.bare()
    ctx.set_materialize_grads(False)


def saved(ctx: Any) -> tuple[Call, Any, Any]:
    """Return the call, its output and what was kept."""
    output, reserve, *arrays = ctx.saved_tensors  # read once: a checkpoint recomputes each time
    return ctx.form.with_arrays(arrays), output, reserve


def is_beyond_engine(grads: _Maybe) -> bool:
    """Whether gradients are to be differentiated themselves, or are many at once (vmap)."""
    if torch.is_grad_enabled():
        return True
    for grad in grads:
        # torch.autograd.grad makes them of the one kind, torch.vmap of the other.
        if grad is not None and (_is_legacy_batch(grad) or _functorch.is_batchedtensor(grad)):
            return True
    return False


def is_asked(ctx: Any, tensors: Sequence[Tensor | None]) -> list[bool]:
    """Say which gradients the backward that runs is to have.

    torch tells its own operators, a Function only which of its arguments could have one: in the
    gradient of one input those of the weights would be computed, and thrown away. `ctx` is the
    Function's in its backward, `tensors` are all arguments that can be tensors, in order; the
    answer is False where there is none.
    """
    edges = iter(ctx.next_functions)
    return [t is not None and _will_run(next(edges)[0]) for t in tensors]


def _will_run(node: Any) -> bool:
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # so it says of a leaf that torch.autograd.grad is to differentiate by
        return True


def gradients(
    call: Call,
    arrived: Results,
    output: Tensor | None,
    reserve: Tensor | None,
    wanted: Sequence[bool],
    is_step: bool = False,
) -> list[Tensor | None]:
    """Differentiate a call that an engine ran, so that the gradients can be differentiated again.

    Or many at once. On a CPU the rules over the engine do it, elsewhere the reference; and the
    reference for one step, which is short enough to be its own graph.

    The call is that of a layer, or with `is_step` of a cell, whose input and states have no
    dimensions for steps and directions. Gradients that did not arrive are None; so are `output`
    where one step does not read it, and `reserve` where the engine kept nothing. `wanted` has a
    flag for each of `call.tensors()`, and the result is None where it is False.
    """
    grads, tensors = arrived.flat(), call.tensors()
    if all(grad is None for grad in grads):
        return [None] * len(wanted)
    wanted = [bool(w) and t is not None for w, t in zip(wanted, tensors, strict=True)]
    if is_step and (torch.is_grad_enabled() or not any(map(is_batch, grads))):
        return reference_backend.gradients(call, arrived, wanted, is_step)
    if is_step:
        return _of_step(call, arrived, output, reserve, wanted)
    assert output is not None
    if call.input.device.type == "cpu":
        return transforms.gradients(call, arrived, output, reserve, wanted)
    return reference_backend.gradients(call, arrived, wanted)


def _of_step(
    call: Call,
    arrived: Results,
    output: Tensor | None,
    reserve: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiate one step, many gradients at once, as a layer."""
    missing = (None,) * (3 - call.input.dim())

    def lifted(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[missing]

    layer = call.each_state(lifted)._replace(input=lifted(call.input))
    layer = layer._replace(batch=layer.input.shape[1])
    if output is None:
        _, weight_hh, *_ = call.weights
        size = weight_hh.shape[1]
        output = call.input.new_empty((*call.input.shape[:-1], size))  # only its shape is read
    results = Results(lifted(arrived.output), tuple(map(lifted, arrived.last)), arrived.every)
    shown = lifted(output)
    assert shown is not None
    parts = call.parts(transforms.gradients(layer, results, shown, reserve, wanted))
    first = (0,) * len(missing)
    dx, *initial = (None if g is None else g[first] for g in (parts.input, *parts.initial))
    return parts._replace(input=dx, initial=tuple(initial)).flat()
