"""The operators as torch knows them: schemas, fake kernels, autograd, one registration per backend.

`ostinato::layer` returns results, and `reserve`: what forward keeps for backward, bytes that only
the engine understands. What there is not of the results is empty. `ostinato::layer_backward`
computes the gradients that are wanted. Both schemas are written from `ostinato.arrays`.

Legend: T steps, B batch, N packed rows, H hidden, O output of a step, D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ostinato import arrays, cpu, flops, gradients, profile
from ostinato.arrays import Option
from ostinato.call import Call, Results
from ostinato.check import shapes_of
from ostinato.cuda import layer as gpu
from ostinato.cuda.sequence import reserve_bytes as gpu_reserve_bytes
from ostinato.later import when_imported
from ostinato.sizes import PAD, Sizes
from ostinato.tensors import check_call

library = torch.library.Library("ostinato", "DEF")  # type: ignore[no-untyped-call]

_FORWARD = arrays.schema("layer", [*arrays.PARAMETERS, Option("all_c"), Option("keep")])
_ARRIVED = [arrays.gradient_of(result) for result in (arrays.OUTPUT, *arrays.LAST, *arrays.EVERY)]
_BACKWARD = arrays.schema(
    "layer_backward",
    [*_ARRIVED, arrays.OUTPUT, arrays.RESERVE, Option("wanted", "bool[]"), *arrays.PARAMETERS],
    [arrays.GRADIENTS],
)
for _schema in (_FORWARD, _BACKWARD):
    library.define(_schema)  # type: ignore[no-untyped-call]


def layer(call: Call, keep: bool) -> Results:
    """Run the operator `ostinato::layer`; `keep` says whether backward is to follow."""
    found = torch.ops.ostinato.layer(*call.parameters(), call.all_states, keep)
    return call.returned(found)


# What the operator returns.
_Returned = tuple[Tensor, ...]


def _returned(call: Call, results: Results, reserve: Tensor) -> _Returned:
    """Return what the operator does: what there is not is empty."""
    found = [call.input.new_empty((0,)) if r is None else r for r in results.padded()]
    return *found, reserve


def _forward_on(forward: Callable[[Call, bool], tuple[Results, Tensor]]) -> Any:
    def kernel(*arguments: Any) -> _Returned:
        *parameters, all_c, keep = arguments
        call = Call.of(*parameters, all_states=all_c)
        return _returned(call, *forward(call, keep))

    return kernel


def _backward_on(backward: Callable[..., list[Tensor | None]]) -> Any:
    def kernel(*arguments: Any) -> list[Tensor]:
        call, arrived, output, reserve, wanted = _backward_call(arguments)
        found = call.parts(backward(call, arrived, output, reserve, wanted)).padded()
        return [call.input.new_empty(0) if grad is None else grad for grad in found]

    return kernel


def _backward_call(arguments: Sequence[Any]) -> tuple[Call, Results, Tensor, Tensor, list[bool]]:
    """Name the arguments of `ostinato::layer_backward`."""
    count = len(arguments) - len(arrays.PARAMETERS)
    *arrived, output, reserve, wanted = arguments[:count]
    call = Call.of(*arguments[count:])
    results = call._replace(all_states=True).returned(arrived)
    is_asked = any(grad is not None for grad in results.every)
    count = len(call.parts(call.tensors()).padded())
    if len(wanted) != count:
        raise RuntimeError(f"wanted: expected {count} flags, got {len(wanted)}")
    flags = call.padded_parts(wanted).flat()
    return call._replace(all_states=is_asked), results, output, reserve, flags


# ---- fake kernels ----


def _fake_forward(*arguments: Any) -> _Returned:
    *parameters, all_c, keep = arguments
    call = Call.of(*parameters, all_states=all_c)
    input, sizes = call.input, check_call(call, values=False)
    kept = gpu_reserve_bytes if input.device.type == "cuda" else _reserve_bytes
    shapes = shapes_of(call, sizes)
    found = [input.new_empty(shapes[array.name]) for array in call.results().flat()]
    reserve = input.new_empty((kept(call, sizes) if keep else 0,), dtype=torch.uint8)
    return _returned(call, Results.of(found, len(call.kind.states)), reserve)


def _reserve_bytes(call: Call, sizes: Sizes) -> int:
    """Return what `ostinato.cpu.reserve_bytes` does, of sizes that are symbols."""
    units = (sizes.hidden + PAD - 1) // PAD * PAD
    values = call.kind.recomputed if call.recompute else call.kind.saved
    return sizes.directions * sizes.rows * values * units * max(4, int(call.input.element_size()))


def _fake_backward(*arguments: Any) -> list[Tensor]:
    call, _, _, _, wanted = _backward_call(arguments)
    shapes = shapes_of(call, check_call(call, values=False))
    table = zip(call.table()[-len(wanted) :], call.tensors(), wanted, strict=True)
    found = [
        shapes[array.name] if tensor is None and want else tensor.shape if want else (0,)
        for array, tensor, want in table
    ]
    return [call.input.new_empty(shape) for shape in call.parts(found).padded(absent=(0,))]


# ---- autograd ----


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *parameters, all_c, ctx.keep = inputs
    y, *_, reserve = output
    gradients.save(ctx, Call.of(*parameters, all_states=all_c), y, reserve)


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    if not ctx.keep:
        raise RuntimeError("ostinato::layer: backward needs a forward call with keep=True")
    call, output, reserve = gradients.saved(ctx)
    *needs, _, _ = ctx.needs_input_grad
    arrived = call.returned(grads)
    # What was not asked for has no elements, and nor has its gradient.
    arrived = arrived._replace(every=arrived.every or (None,) * (len(call.initial) - 1))
    needs = call.of_parameters(needs).flat()
    wanted = [bool(n) and t is not None for n, t in zip(needs, call.tensors(), strict=True)]
    if all(grad is None for grad in arrived.flat()):
        found: list[Tensor | None] = [None] * len(wanted)
    elif gradients.is_beyond_engine(arrived.flat()):
        found = gradients.gradients(call, arrived, output, reserve, wanted)
    else:
        flags = call.parts(wanted).padded(absent=False)
        operator = torch.ops.ostinato.layer_backward
        grads_of = operator(*arrived.padded(), output, reserve, flags, *call.parameters())
        pairs = zip(call.padded_parts(grads_of).flat(), wanted, strict=True)
        found = [grad if want else None for grad, want in pairs]
    return *call.as_parameters(found), None, None


# ---- registration: one line per backend ----


def _register(operator: str, kernel: Callable[..., Any], key: str) -> None:
    library.impl(operator, profile.named(operator, kernel), key)  # type: ignore[no-untyped-call]


_register("layer", _forward_on(cpu.forward), "CPU")
_register("layer_backward", _backward_on(cpu.backward), "CPU")
_register("layer", _forward_on(gpu.forward), "CUDA")
_register("layer_backward", _backward_on(gpu.backward), "CUDA")
flops.register()
# In what inductor compiles they stay calls, also where its `implicit_fallbacks` are switched off.
# Arrays may lie as inductor likes: every kernel makes those dense that it wants so.
when_imported(
    "torch._inductor.lowering",
    lambda module: module.FALLBACK_ALLOW_LIST.update(
        ("ostinato::layer", "ostinato::layer_backward")
    ),
)
torch.library.register_fake("ostinato::layer", _fake_forward, lib=library)
torch.library.register_fake("ostinato::layer_backward", _fake_backward, lib=library)
torch.library.register_autograd("ostinato::layer", _gradient, setup_context=_setup, lib=library)
