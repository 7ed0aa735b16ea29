"""torch's own operator for a layer or a stack, cuDNN's on a GPU: a call as its arguments.

Legend: H hidden, O output of a step, L layers, D directions.
"""

from __future__ import annotations

import contextlib

import torch
from torch.backends.cudnn.rnn import get_cudnn_mode

from ostinato.call import Call, Results
from ostinato.sizes import Sizes
from ostinato.tensors import TORCH_OPERATORS


def run(call: Call, sizes: Sizes) -> Results:
    """Run torch's operator on a layer or a stack; it chooses cuDNN where that can serve.

    `sizes` are the first layer's; all is checked before.

    Source: torch.nn.GRU.forward.
    """
    input, rows = call.input, call.layers * sizes.directions
    widths = sizes.output, *[sizes.hidden] * (len(call.initial) - 1)
    # It takes input of any strides, but nothing else.
    weights = [weight.contiguous() for weight in call.weights]
    states = [
        input.new_zeros(rows, sizes.batch, width) if state is None else state.contiguous()
        for width, state in zip(widths, call.initial, strict=True)
    ]
    hx = states if len(states) > 1 else states[0]
    # cuDNN keeps what backward needs only in training mode, which changes nothing but dropout.
    train = torch.is_grad_enabled() or call.dropout > 0
    options = call.has_biases, call.layers, call.dropout, train, call.bidirectional
    operator = TORCH_OPERATORS[call.cell]
    if call.batch_sizes is None:
        output, *last = operator(input, hx, weights, *options, False)
    else:
        output, *last = operator(input, call.batch_sizes.contiguous(), hx, weights, *options)
    return Results(output, tuple(last))


def lay_out(call: Call, sizes: Sizes) -> None:
    """Move the weights of a call, which nobody else holds, into one buffer as cuDNN wants them.

    Otherwise it copies them at each call. torch.nn lays its parameters out so, but for bfloat16.
    """
    if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return
    per_layer = (4 if call.has_biases else 2) + (sizes.projection > 0)
    options = call.layers, False, call.bidirectional
    mode = get_cudnn_mode(call.cell.upper())  # type: ignore[no-untyped-call]
    # Where cuDNN refuses, each call copies them, as torch.nn's does.
    with torch.no_grad(), contextlib.suppress(RuntimeError):
        torch._cudnn_rnn_flatten_weight(
            call.weights,
            per_layer,
            sizes.input,
            mode,
            sizes.hidden,
            sizes.projection,
            *options,
        )
