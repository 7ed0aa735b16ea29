"""torch's own cuDNN operator, for what the GPU engine does not run.

One layer at a time, in one or two directions, so that the modules above see the same thing on every
device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def serves(input: Tensor) -> bool:
    """Whether torch's operator takes this input: real floating numbers, and at least one of them.

    Args:
        input: (T, B, I) or packed (N, I).

    Returns:
        False for complex numbers and for empty inputs, which the reference serves.
    """
    return input.dtype.is_floating_point and input.numel() > 0


def layer(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    sizes: Any,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: list[Tensor],
    has_biases: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run one layer by torch's operator, which chooses cuDNN where that can serve.

    Args:
        cell: "rnn_tanh", "rnn_relu", "gru" or "lstm".
        input: (T, B, I), or packed (N, I) if `batch_sizes` is given.
        batch_sizes: active rows per step, or None.
        sizes: the layer's sizes, checked.
        h_0: (D, B, O), or None for zeros.
        c_0: (D, B, H), or None for zeros.
        weights: per direction weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr].
        has_biases: whether `weights` holds biases.

    Returns:
        output, h_n, and c_n or None.

    Source: torch.nn.GRU.forward, one layer.
    """
    import torch

    if h_0 is None:
        h_0 = input.new_zeros(sizes.directions, sizes.batch, sizes.output)
    hx: Any = h_0
    if cell == "lstm":
        hx = (
            h_0,
            input.new_zeros(sizes.directions, sizes.batch, sizes.hidden) if c_0 is None else c_0,
        )
    # It takes weights and input of any strides, but nothing else.
    batch_sizes = None if batch_sizes is None else batch_sizes.contiguous()
    hx = hx.contiguous() if cell != "lstm" else tuple(state.contiguous() for state in hx)
    operator = getattr(torch._VF, cell)
    # cuDNN keeps what backward needs only in training mode. Dropout is 0: nothing else changes.
    train = torch.is_grad_enabled()
    options = (has_biases, 1, 0.0, train, sizes.directions == 2)
    if batch_sizes is None:
        output, *states = operator(input, hx, weights, *options, False)
    else:
        output, *states = operator(input, batch_sizes, hx, weights, *options)
    return output, states[0], states[1] if cell == "lstm" else None
