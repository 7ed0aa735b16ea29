"""torch's own operator (cuDNN) as a backend: what runs on a GPU where our kernels do not.

It takes a whole stack: torch lays the weights of its layers out as one, and cuDNN runs them side by
side. Derivatives that it does not have are the reference's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ostinato import onnx_node, reference_backend, traced
from ostinato.call import Call, Results
from ostinato.cuda import layer as gpu
from ostinato.gradients import is_beyond_engine, save, saved
from ostinato.tensors import TORCH_OPERATORS, check_call, is_traced, keeps
from ostinato.torch_operator import run
from ostinato.transforms import is_active


def why_not(call: Call) -> str | None:
    """Say why torch's operator does not serve a call, of a layer or of a stack."""
    input, counts = call.input, call.batch_sizes
    if input.device.type != "cuda":
        return "the tensors are not on a GPU"
    if call.cell not in TORCH_OPERATORS:
        return "torch has no operator for this cell"
    if gpu.is_cut(call) or call.all_states:
        return "it has no resets and no lengths, and returns the last c alone"
    if not input.dtype.is_floating_point or not input.numel():
        return "it takes real numbers, and at least one"
    if is_active():
        return "it knows no transforms"
    if call.layers > 1:
        # A trace gets a node for each layer, and a layer that is run again runs by itself.
        has_nodes = not traced.why_not(call) or not onnx_node.why_not(call)
        if has_nodes or call.recompute:
            return "each layer runs by itself here"
        if gpu.decide(call, is_training=keeps(call)).is_ours:
            return "our kernels run its layers"
    if counts is None or torch.compiler.is_compiling():
        return None
    if not len(counts) or call.batch != counts[0]:
        return "it takes no packed rows without steps"
    return None


def layer(call: Call) -> Results:
    """Run a layer or a stack that `why_not` does not refuse."""
    sizes = check_call(call.of_layer(0, call.input))
    found = run(call, sizes)
    # What dropout drew is cuDNN's own.
    if not keeps(call) or call.dropout > 0 or is_traced():
        return found
    return differentiable_again(call, found)


def differentiable_again(call: Call, results: Results) -> Results:
    """Make the reference stand in for gradients that torch's operator does not have.

    Takes a layer without cuts or a stack without dropout, and its results from torch's operator.
    Returns the same numbers, differentiable any number of times. cuDNN's gradients can be neither
    differentiated nor be many at once; where that is asked for, none of them is computed.

    Example:
        >>> layer, x = torch.nn.GRU(3, 4), torch.zeros(5, 2, 3, requires_grad=True)
        >>> call = Call(x, None, 2, (None,), list(layer.parameters()), "gru", True, False)
        >>> output, h_n = layer(x)
        >>> output = differentiable_again(call, Results(output, (h_n,))).output
        >>> (dx,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        >>> torch.autograd.grad(dx.sum(), x)[0].shape
        torch.Size([5, 2, 3])
    """
    there = results.flat()
    found = _Again.apply(call.bare(), len(there), *there, *call.arrays())  # type: ignore[no-untyped-call]
    return Results.of(found, len(call.initial))


class _Again(torch.autograd.Function):
    """Passes results on, and their gradients to torch's operator or to the reference."""

    @staticmethod
    def forward(ctx: Any, form: Call, count: int, *tensors: Tensor | None) -> Any:
        # No views, which could not be changed in place, but tensors on the same memory. Of these
        # the operator's gradient reads the first.
        found = tuple(result.data for result in tensors[:count] if result is not None)
        output, *_ = found
        save(ctx, form.with_arrays(tensors[count:]), output)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, _, _ = saved(ctx)
        if not is_beyond_engine(grads):
            return None, None, *grads, *[None] * len(call.arrays())
        _, _, *needs = ctx.needs_input_grad
        wanted = call.with_arrays(needs[len(grads) :]).tensors()
        found = reference_backend.gradients(call, Results.of(grads, len(grads) - 1), wanted)
        return None, None, *[None] * len(grads), *call.bare().with_tensors(found).arrays()
