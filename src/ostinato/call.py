"""One call of a layer: its arguments, and every check in front of a kernel.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step (proj_size, or H),
D directions.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ostinato import _core
from ostinato.cells import CELLS, Cell
from ostinato.engine import Sizes, check_batch_sizes

# The engine's number of each dtype (csrc/cpu/engine.h). The last two are computed in float32.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


# input_size, hidden_size, proj_size, directions
Shape = tuple[int, int, int, int]


class Call(NamedTuple):
    """The arguments that both operators share, in the order of their schemas."""

    input: Tensor
    batch_sizes: Tensor | None
    batch: int
    h_0: Tensor | None
    c_0: Tensor | None
    weights: list[Tensor]
    cell: str
    has_biases: bool
    bidirectional: bool
    recompute: bool = False
    lengths: Tensor | None = None
    resets: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        """Return what can have a gradient: input, four states, then the weights."""
        return [self.input, self.h_0, self.c_0, self.reset_h, self.reset_c, *self.weights]

    @property
    def kind(self) -> Cell:
        """What cell this is."""
        return CELLS[self.cell]

    @property
    def is_cut(self) -> bool:
        """Whether rows end early or begin anew."""
        return self.lengths is not None or self.resets is not None


def shape_of(call: Call) -> Shape | None:
    """Return the sizes that the weights say, or None if they make no sense."""
    directions = 2 if call.bidirectional else 1
    weights, kind = call.weights, CELLS.get(call.cell)
    count = len(weights) // directions
    if kind is None or count < 2 or not call.input.dim() or not weights[0].dim():
        return None
    projection = 0
    if kind.projects and count == (5 if call.has_biases else 3):
        if not weights[count - 1].dim():
            return None
        projection = weights[count - 1].shape[0]
    return call.input.shape[-1], weights[0].shape[0] // kind.gates, projection, directions


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


def is_traced() -> bool:
    """Whether what runs becomes a graph, compiled or traced, for sizes that are not known yet."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


# Known without asking: torch 2.10 to 2.12 cannot compile the question.
_HAVE_AUTOCAST = ("cpu", "cuda", "xpu")


def without_autocast(input: Tensor) -> torch.autocast:
    """Return a region in which the operators under a layer keep the dtypes that they are given.

    Args:
        input: of the layer.

    Returns:
        The region.
    """
    kind = input.device.type
    # A device without autocast, such as meta, has nothing to switch off; "cpu" stands in for it.
    known = kind in _HAVE_AUTOCAST or torch.amp.is_autocast_available(kind)
    return torch.autocast(kind if known else "cpu", enabled=False)


def batch_of(
    input: Tensor, batch_sizes: Tensor | None, h_0: Tensor | None, c_0: Tensor | None
) -> int:
    """Return B as the arguments of a layer say it; a wrong form is left to `check`."""
    if batch_sizes is None:
        return input.shape[1] if input.dim() == 3 else 0
    _check_batch_sizes_form(batch_sizes)
    state = h_0 if h_0 is not None else c_0
    if state is not None:
        return state.shape[1] if state.dim() == 3 else 0
    return int(batch_sizes[0]) if len(batch_sizes) else 0


def check(call: Call, values: bool = True) -> Sizes:
    """Check shapes, dtypes and devices of everything; return the sizes.

    The values of batch_sizes are checked too, unless they are those of a fake tensor.
    """
    input, batch_sizes, batch, h_0, c_0, weights, cell, has_biases, bidirectional, *_ = call
    kind = CELLS.get(cell)
    if kind is None:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")
    gates = kind.gates
    if input.dim() != (3 if batch_sizes is None else 2):
        expected = "3D" if batch_sizes is None else "2D (packed)"
        raise RuntimeError(f"input: expected {expected}, got {input.dim()}D")
    check_dtype(input)
    if input.layout is not torch.strided:
        raise RuntimeError(f"input: expected a strided tensor, got layout {input.layout}")
    if batch_sizes is None and batch != input.shape[1]:
        raise RuntimeError(f"batch: expected {input.shape[1]}, the batch of input, got {batch}")
    directions = 2 if bidirectional else 1
    count, rest = divmod(len(weights), directions)
    plain = 4 if has_biases else 2
    projected = kind.projects and count == plain + 1
    if rest or not (count == plain or projected):
        raise RuntimeError(
            f"weights: expected {plain} per direction for {cell}, got {len(weights)} in all"
        )
    weight_hh = weights[1]
    if weight_hh.dim() != 2:
        raise RuntimeError(f"weight_hh: expected 2D, got {weight_hh.dim()}D")
    rows_hh, output = weight_hh.shape
    hidden = rows_hh // gates
    if rows_hh != gates * hidden or (not projected and output != hidden):
        columns = "proj_size" if projected else "hidden_size"
        raise RuntimeError(
            f"weight_hh: expected shape ({gates} * hidden_size, {columns}), "
            f"got {tuple(weight_hh.shape)}"
        )
    layout: list[tuple[str, tuple[int, ...]]] = [
        ("weight_ih", (rows_hh, input.shape[-1])),
        ("weight_hh", (rows_hh, output)),
    ]
    if has_biases:
        layout += [("bias_ih", (rows_hh,)), ("bias_hh", (rows_hh,))]
    if projected:
        layout.append(("weight_hr", (output, hidden)))
    for index, weight in enumerate(weights):
        name, shape = layout[index % count]
        if not _fits(weight, shape, input):
            _refuse(name + "_reverse" * (index // count), weight, shape, input)
    if h_0 is not None and not _fits(h_0, (directions, batch, output), input):
        _refuse("h_0", h_0, (directions, batch, output), input)
    if c_0 is not None:
        if not kind.has_c:
            raise RuntimeError(f"c_0: expected None for {cell}")
        if not _fits(c_0, (directions, batch, hidden), input):
            _refuse("c_0", c_0, (directions, batch, hidden), input)
    if batch_sizes is None:
        steps, rows = input.shape[0], input.shape[0] * batch
    else:
        _check_batch_sizes_form(batch_sizes)
        steps, rows = len(batch_sizes), input.shape[0]
        if values:
            check_batch_sizes(batch_sizes.tolist(), batch, rows)
    _check_cuts(call, (directions, batch, output), (directions, batch, hidden), values)
    return Sizes(
        steps, rows, batch, input.shape[-1], hidden, output if projected else 0, directions
    )


def _check_cuts(
    call: Call, shape_h: tuple[int, ...], shape_c: tuple[int, ...], values: bool
) -> None:
    """Check lengths, resets and the states that resets bring."""
    input, lengths, resets = call.input, call.lengths, call.resets
    if lengths is not None:
        if call.batch_sizes is not None:
            raise RuntimeError("lengths: expected None for packed input, which has its own")
        _check_form("lengths", lengths, (call.batch,), torch.int64, torch.device("cpu"))
        if values and not is_wrapped(lengths):
            check_lengths(lengths, input.shape[0])
    if resets is not None:
        _check_form("resets", resets, tuple(input.shape[:-1]), torch.bool, input.device)
    for name, state, shape in (
        ("reset_h", call.reset_h, shape_h),
        ("reset_c", call.reset_c, shape_c),
    ):
        if state is None:
            continue
        if resets is None:
            raise RuntimeError(f"{name}: expected None without resets")
        if name == "reset_c" and not call.kind.has_c:
            raise RuntimeError(f"reset_c: expected None for {call.cell}")
        if not _fits(state, shape, input):
            _refuse(name, state, shape, input)


def _check_form(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise RuntimeError(
            f"{name}: expected shape {shape} of {dtype} on {device}, "
            f"got {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        )


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of torch.func holds the tensor, so that it has no numbers to look at."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_lengths(lengths: Tensor, steps: int, what: str = "lengths: expected") -> None:
    """Refuse lengths that no row of so many steps can have; `what` begins the message."""
    wrong = [n for n in lengths.tolist() if not 0 <= n <= steps]
    if wrong:
        raise ValueError(f"{what} numbers from 0 to {steps}, the steps, got {wrong[0]}")


def _fits(tensor: Tensor, shape: tuple[int, ...], input: Tensor) -> bool:
    return (
        tensor.shape == shape
        and tensor.dtype == input.dtype
        and tensor.device == input.device
        and tensor.layout is torch.strided
    )


def _refuse(name: str, tensor: Tensor, shape: tuple[int, ...], input: Tensor) -> NoReturn:
    """Raise for the first of shape, dtype, device and layout that does not fit."""
    if tensor.shape != shape:
        raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != input.dtype:
        raise ValueError(f"{name}: expected the dtype of input, {input.dtype}, got {tensor.dtype}")
    if tensor.device != input.device:
        raise RuntimeError(
            f"{name}: expected the device of input, {input.device}, got {tensor.device}"
        )
    raise RuntimeError(f"{name}: expected a strided tensor, got layout {tensor.layout}")


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


def reserve_bytes(call: Call, sizes: Sizes) -> int:
    """Return how much the CPU engine keeps for backward."""
    return _core.reserve_bytes(call.kind.number, DTYPES[call.input.dtype], sizes, call.recompute)


def check_backward(
    call: Call,
    sizes: Sizes,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    output: Tensor,
    reserve: Tensor,
    wanted: list[bool],
    needed: int,
) -> None:
    """Check what backward takes beyond forward's arguments; `needed`: bytes of the reserve."""
    input = call.input
    shape = (*input.shape[:-1], sizes.directions * sizes.output)
    state = (sizes.directions, sizes.batch, sizes.output)
    cell_state = (sizes.directions, sizes.batch, sizes.hidden)
    cells = (*input.shape[:-1], sizes.directions * sizes.hidden)
    has_c = call.kind.has_c
    for name, tensor, expected in (
        ("output", output, shape),
        ("grad_output", grads[0], shape),
        ("grad_h_n", grads[1], state),
        ("grad_c_n", grads[2] if has_c else None, cell_state),
        ("grad_cells", grads[3] if has_c else None, cells),
    ):
        if tensor is not None and not _fits(tensor, expected, input):
            _refuse(name, tensor, expected, input)
    if reserve.dtype != torch.uint8 or reserve.numel() != needed or not reserve.is_contiguous():
        raise RuntimeError(
            f"reserve: expected the {needed} bytes of ostinato::layer with keep=True, "
            f"got {reserve.numel()} of {reserve.dtype}"
        )
    if len(wanted) != len(call.tensors()):
        raise RuntimeError(f"wanted: expected {len(call.tensors())} flags, got {len(wanted)}")
