"""What a call has to know of torch's tensors: dtypes, memory, who looks on; and their check.

Legend: T steps, B batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from ostinato import _core, check
from ostinato.call import Call, Results
from ostinato.cells import CELLS
from ostinato.sizes import Sizes

_P = ParamSpec("_P")
_R = TypeVar("_R")

# The engine's number of each dtype (csrc/cpu/engine.h). The last two are computed in float32.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# torch's own operator of each layer that it has. On a GPU it is cuDNN's.
TORCH_OPERATORS: dict[str, Any] = {
    name: getattr(torch._VF, name) for name in CELLS if hasattr(torch._VF, name)
}


def thread_count() -> int:
    """Return how many threads a call may use."""
    return _core.forced_threads or torch.get_num_threads()


def address(tensor: Tensor | None) -> int:
    """Return where a dense tensor lies, 0 for None."""
    if tensor is None:
        return 0
    found = tensor.data_ptr()
    if not found and tensor.numel():
        raise RuntimeError(
            f"expected memory behind a tensor of shape {tuple(tensor.shape)}, "
            "got none: its storage was freed"
        )
    return found


def require_tensor(name: str, value: object) -> None:
    """Refuse an argument that is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def reject_nested(name: str) -> NoReturn:
    """Refuse a nested tensor, whose rows no kernel finds."""
    raise RuntimeError(
        f"{name} must not be a nested tensor. Give a padded one with lengths=: "
        "torch.nested.to_padded_tensor(x, 0.0), lengths=[len(row) for row in x.unbind()]; "
        "or a PackedSequence: torch.nn.utils.rnn.pack_sequence(x.unbind(), enforce_sorted=False)"
    )


def check_dtype(input: Tensor) -> None:
    """Refuse a dtype that neither an engine nor the reference computes in."""
    dtype = input.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        raise ValueError(f"input: expected a floating or complex dtype, got {dtype}")
    if dtype.itemsize < 2:
        # As in torch, whose operators for such numbers do not exist.
        raise NotImplementedError(
            f"input: nothing computes a layer in {dtype}, which is for storage; "
            "convert input and weights to torch.bfloat16, for example"
        )


def is_recorded() -> bool:
    """Whether torch.jit.trace records what runs."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def unrecorded(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Hide from torch.jit.trace what a function computes, such as the sizes that a check compares.

    Its results are no part of the graph, and sizes are numbers within it.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not is_recorded():
            return function(*args, **kwargs)
        # torch declares the one of these and not the other.
        switch: Any = torch._C
        state = switch._get_tracing_state()
        switch._set_tracing_state(None)
        try:
            return function(*args, **kwargs)
        finally:
            switch._set_tracing_state(state)

    return run


def is_traced() -> bool:
    """Whether what runs becomes a graph, compiled or traced, for sizes that are not known yet."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


# Known without asking: torch 2.10 to 2.12 cannot compile the question.
_HAVE_AUTOCAST = ("cpu", "cuda", "xpu")


def without_autocast(input: Tensor) -> torch.autocast:
    """Return a region in which the operators under a layer keep the dtypes that they are given."""
    kind = input.device.type
    # A device without autocast, such as meta, has nothing to switch off; "cpu" stands in for it.
    known = kind in _HAVE_AUTOCAST or torch.amp.is_autocast_available(kind)
    return torch.autocast(kind if known else "cpu", enabled=False)


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func holds the tensor, so that it has no numbers to look at."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def keeps(call: Call) -> bool:
    """Whether forward is to keep what backward reads."""
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in call.tensors()
    )


@unrecorded
def batch_of(
    input: Tensor, batch_sizes: Tensor | None, h_0: Tensor | None, c_0: Tensor | None = None
) -> int:
    """Return B as the arguments of a layer say it; a wrong form is left to the check."""
    if batch_sizes is None:
        return input.shape[1] if input.dim() == 3 else 0
    _check_batch_sizes_form(batch_sizes)
    state = h_0 if h_0 is not None else c_0
    if state is not None:
        return state.shape[1] if state.dim() == 3 else 0
    return int(batch_sizes[0]) if len(batch_sizes) else 0


def _shared(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.layout


def check_call(call: Call, values: bool = True) -> Sizes:
    """Check shapes, dtypes and devices of everything; return the sizes.

    The values of batch_sizes and lengths are checked too, unless they are those of a fake tensor.
    """
    input, batch_sizes = call.input, call.batch_sizes
    check_dtype(input)
    if input.layout is not torch.strided:
        raise RuntimeError(f"input: expected a strided tensor, got layout {input.layout}")
    if batch_sizes is not None:
        _check_batch_sizes_form(batch_sizes)
    sizes = check.check(call, _shared)
    if batch_sizes is not None and values:
        check.check_batch_sizes(batch_sizes.tolist(), sizes.batch, sizes.rows)
    lengths, resets = call.lengths, call.resets
    if lengths is not None:
        _check_form("lengths", lengths, (call.batch,), torch.int64, torch.device("cpu"))
        if values and not is_wrapped(lengths):
            check.check_lengths(lengths, sizes.steps)
    if resets is not None:
        _check_form("resets", resets, tuple(input.shape[:-1]), torch.bool, input.device)
    return sizes


def check_backward(
    call: Call,
    sizes: Sizes,
    arrived: Results,
    output: Tensor,
    reserve: Tensor,
    needed: int,
) -> None:
    """Check what backward takes beyond forward's arguments; `needed`: bytes of the reserve."""
    check.check_backward(call, sizes, arrived, output, _shared)
    if reserve.dtype != torch.uint8 or reserve.numel() != needed or not reserve.is_contiguous():
        raise RuntimeError(
            f"reserve: expected the {needed} bytes of ostinato::layer with keep=True, "
            f"got {reserve.numel()} of {reserve.dtype}"
        )


def _check_form(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise RuntimeError(
            f"{name}: expected shape {shape} of {dtype} on {device}, "
            f"got {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        )


def _check_batch_sizes_form(batch_sizes: Tensor) -> None:
    """Refuse batch_sizes of another type than a packed batch has."""
    require_tensor("batch_sizes", batch_sizes)
    if (
        batch_sizes.dim() != 1
        or batch_sizes.dtype != torch.int64
        or batch_sizes.device.type != "cpu"
    ):
        raise RuntimeError(
            "batch_sizes: expected a 1D int64 tensor on the CPU, "
            f"got {batch_sizes.dim()}D {batch_sizes.dtype} on {batch_sizes.device}"
        )
