"""Gradients of each sample for torch.nn.utils._expanded_weights.

torch wraps a module's weights in a class of tensors, and asks a table which function gives the
gradient of each sample for the functions that they reach. This enters `ostinato.ops.layer`, whose
gradients come from vmap on the engine.

Legend: T steps, B samples, N packed rows.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ostinato import route
from ostinato.later import when_imported

_NAME = "torch.nn.utils._expanded_weights.expanded_weights_impl"


def register() -> None:
    """Enter the function into torch's table, when somebody imports it."""
    when_imported(_NAME, _register)


def _register(module: ModuleType) -> None:
    module.implements_per_sample_grads(route.layer)(_OfSamples)


class _OfSamples:
    """What torch's table holds: it is called by `apply`, as an autograd.Function is."""

    @staticmethod
    def apply(names: tuple[str, ...], function: Any, *values: Any) -> Any:
        """Run `ostinato.ops.layer` on its arguments, of which some weights are wrapped.

        `names` are those of the keyword arguments, whose values come last.
        """
        first = len(values) - len(names)
        cell, input, batch_sizes, h_0, c_0, weights = values[:first]
        options = dict(zip(names, values[first:], strict=True))
        wrapped = [w for w in weights if hasattr(w, "orig_weight")]
        batch = input.shape[1] if batch_sizes is None else wrapped[0].batch_size
        for weight in wrapped:
            if weight.batch_size != batch:
                raise RuntimeError(
                    "Expected ExpandedWeights to have batch size matching input but got "
                    f"input batch size of {batch} with ExpandedWeight of batch size "
                    f"{weight.batch_size}"
                )
        output, h_n, *c_n = _Layer.apply(cell, options, batch_sizes, input, h_0, c_0, *weights)  # type: ignore[no-untyped-call]
        return output, h_n, c_n[0] if c_n else None


class _Layer(torch.autograd.Function):
    """A layer whose weights get gradients of each sample, beside the graph."""

    @staticmethod
    def forward(
        ctx: Any, cell: str, options: Any, batch_sizes: Any, input: Any, h_0: Any, c_0: Any, *w: Any
    ) -> Any:
        plain = [getattr(weight, "orig_weight", weight).detach() for weight in w]
        found = route.layer(cell, input, batch_sizes, h_0, c_0, plain, **options)
        ctx.save_for_backward(batch_sizes, input, h_0, c_0, *plain)
        ctx.cell, ctx.options, ctx.wrapped = cell, options, w
        return tuple(result for result in found if result is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        from torch.nn.utils._expanded_weights import expanded_weights_utils

        batch_sizes, input, h_0, c_0, *weights = ctx.saved_tensors
        dy, dh_n, *dc_n = grads
        lengths = places = None
        if batch_sizes is not None:
            lengths, places = _places(batch_sizes, dh_n.shape[1])
            input, dy = _padded(input, places, lengths), _padded(dy, places, lengths)
        found = _gradients(
            ctx.cell, ctx.options, weights, (input, h_0, c_0, dy, dh_n, *dc_n), lengths
        )
        dx, dh_0, dc_0, *dw = found
        assert dx is not None
        for weight, gradient in zip(ctx.wrapped, dw, strict=True):
            expanded_weights_utils.set_grad_sample_if_exists(weight, lambda _, g=gradient: g)
        dx = dx if places is None else dx[places]
        return None, None, None, dx, dh_0, dc_0, *[None] * len(weights)


def _places(batch_sizes: Tensor, batch: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the lengths of packed rows, (B,), and step and sample of each, (N,)."""
    active = torch.arange(batch)[None] < batch_sizes[:, None]  # (T, B)
    steps, samples = active.nonzero(as_tuple=True)
    return active.sum(0), (steps, samples)


def _padded(packed: Tensor, places: tuple[Tensor, Tensor], lengths: Tensor) -> Tensor:
    """Bring (N, ...) to (T, B, ...)."""
    steps = int(lengths.max()) if len(lengths) else 0
    padded = packed.new_zeros((steps, len(lengths), *packed.shape[1:]))
    padded[places] = packed
    return padded


def _gradients(
    cell: str,
    options: dict[str, Any],
    weights: list[Tensor],
    tensors: tuple[Tensor | None, ...],
    lengths: Tensor | None,
) -> list[Tensor | None]:
    """Return gradients of input, h_0, c_0, and for each sample of the weights.

    `cell`, `options` and `weights` are those of `ostinato.ops.layer`. `tensors` are input, h_0,
    c_0, and the gradients of output, h_n and, for an LSTM, c_n, all with samples second. `lengths`
    are those of each sample, (B,), or None.
    """

    def of_one(tensors: Any, length: Tensor | None) -> Any:
        input, h_0, c_0, *grads = tensors
        leaves = input, h_0, c_0
        places = [k for k, leaf in enumerate(leaves) if leaf is not None]

        def run(weights: list[Tensor], *given: Tensor) -> Any:
            rows: list[Tensor | None] = [None] * 3
            for place, tensor in zip(places, given, strict=True):
                rows[place] = tensor.unsqueeze(1)
            input, h_0, c_0 = rows
            arguments: Any = cell, input, None, h_0, c_0, weights
            if length is None:
                found = route.layer(*arguments, **options)
            else:
                found = route.cut_layer(*arguments, **options, lengths=length.unsqueeze(0))[:3]
            return tuple(result.squeeze(1) for result in found if result is not None)

        pull = torch.func.vjp(run, weights, *[leaves[k] for k in places])[1]
        return pull(tuple(grads))

    dims = tuple(None if tensor is None else 1 for tensor in tensors)
    dim_x, dim_h, dim_c, *_ = dims
    out_dims = 0, *(dim for dim in (dim_x, dim_h, dim_c) if dim is not None)
    in_dims = dims, None if lengths is None else 0
    dw, *rest = torch.func.vmap(of_one, in_dims=in_dims, out_dims=out_dims)(tensors, lengths)
    given = iter(rest)
    return [*(None if dim is None else next(given) for dim in (dim_x, dim_h, dim_c)), *dw]
