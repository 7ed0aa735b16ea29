"""What runs on a GPU where no engine does: torch's operator (cuDNN), for a layer or a stack.

Derivatives that it does not have are the reference's.

Legend: T steps, B batch, H hidden, O output of a step, L layers, D directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ostinato import onnx_node, transforms
from ostinato.call import Call, batch_of, check, is_traced
from ostinato.cuda import cudnn
from ostinato.cuda import layer as gpu
from ostinato.engine import Sizes
from ostinato.gradients import Results, differentiable_again


def serves(call: Call, all_c: bool = False) -> bool:
    """Say whether torch's operator serves a call, if no engine does.

    Args:
        call: of a layer.
        all_c: whether c is wanted at every step.

    Returns:
        The answer.
    """
    if call.input.device.type != "cuda" or call.is_cut or all_c or not cudnn.serves(call.input):
        return False
    # It knows no transforms, and no packed rows without steps.
    counts = call.batch_sizes
    if transforms.is_active():
        return False
    if counts is None or torch.compiler.is_compiling():
        return True
    return len(counts) > 0 and bool(call.batch == counts[0])


def run(call: Call, sizes: Sizes, keep: bool, layers: int = 1, dropout: float = 0.0) -> Results:
    """Run torch's operator.

    Args:
        call: of a layer, or of a stack: states and weights of its layers in order.
        sizes: of the first layer.
        keep: whether backward is to follow.
        layers: L.
        dropout: the share of a layer's output that the next one does not see.

    Returns:
        output, h_n, c_n of an LSTM, and no c of every step.
    """
    states = call.h_0, call.c_0, call.weights, call.has_biases, layers, dropout
    found = *cudnn.layer(call.cell, call.input, call.batch_sizes, sizes, *states), None
    # What dropout drew is cuDNN's own.
    is_plain = not keep or dropout > 0 or is_traced()
    return found if is_plain else differentiable_again(call, found, layers)


def stack(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    *,
    layers: int,
    has_biases: bool,
    bidirectional: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Run a stack of layers in one call of torch's operator, where no engine runs its layers.

    torch lays the weights of a stack out as one for cuDNN, which runs its layers side by side;
    layer by layer, weights would be copied and launches wait for each other.

    Args:
        cell: as in `ostinato.ops.layer`.
        input: likewise.
        batch_sizes: likewise.
        h_0: (L * D, B, O), or None for zeros. All is checked by the caller.
        c_0: (L * D, B, H), or None for zeros; LSTM only.
        weights: of all layers.
        layers: L.
        has_biases: as in `ostinato.ops.layer`.
        bidirectional: likewise.
        dropout: the share of a layer's output that the next one does not see.

    Returns:
        output, h_n and c_n, or None where the layers are to run one by one.
    """
    batch = batch_of(input, batch_sizes, h_0, c_0)
    options = cell, has_biases, bidirectional
    first = Call(input, batch_sizes, batch, None, None, weights[: len(weights) // layers], *options)
    # ONNX has a node for each layer.
    if not serves(first) or (is_traced() and onnx_node.is_wanted(first)):
        return None
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, h_0, c_0, *weights)
    )
    if gpu.decide(first, is_training=keep).is_ours:
        return None
    sizes = check(first)
    call = first._replace(h_0=h_0, c_0=c_0, weights=weights)
    return run(call, sizes, keep, layers, dropout)[:3]
