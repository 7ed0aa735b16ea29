"""torch's own cuDNN operator, for what the GPU engine does not run.

A layer, or a stack of them in one call: torch lays the weights of a stack out as one, and cuDNN
runs its layers side by side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ostinato.cells import CELLS

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
    layers: int = 1,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a layer or a stack by torch's operator, which chooses cuDNN where that can serve.

    Args:
        cell: "rnn_tanh", "rnn_relu", "gru" or "lstm".
        input: (T, B, I), or packed (N, I) if `batch_sizes` is given.
        batch_sizes: active rows per step, or None.
        sizes: the first layer's sizes, checked.
        h_0: (L * D, B, O), or None for zeros.
        c_0: (L * D, B, H), or None for zeros.
        weights: per layer and direction weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr].
        has_biases: whether `weights` holds biases.
        layers: L.
        dropout: the share of a layer's output that the next one does not see.

    Returns:
        output, h_n, and c_n or None.

    Source: torch.nn.GRU.forward.
    """
    import torch

    rows = layers * sizes.directions
    if h_0 is None:
        h_0 = input.new_zeros(rows, sizes.batch, sizes.output)
    hx: Any = h_0
    has_c = CELLS[cell].has_c
    if has_c:
        hx = h_0, input.new_zeros(rows, sizes.batch, sizes.hidden) if c_0 is None else c_0
    # It takes weights and input of any strides, but nothing else.
    batch_sizes = None if batch_sizes is None else batch_sizes.contiguous()
    hx = tuple(state.contiguous() for state in hx) if has_c else hx.contiguous()
    operator = getattr(torch._VF, cell)
    # cuDNN keeps what backward needs only in training mode, which changes nothing but dropout.
    train = torch.is_grad_enabled() or dropout > 0
    options = (has_biases, layers, dropout, train, sizes.directions == 2)
    if batch_sizes is None:
        output, *states = operator(input, hx, weights, *options, False)
    else:
        output, *states = operator(input, batch_sizes, hx, weights, *options)
    return output, states[0], states[1] if has_c else None
