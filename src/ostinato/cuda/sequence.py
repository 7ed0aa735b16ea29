"""One layer on the GPU engine: its walk by our kernels, the products over all steps by torch's.

Forward: the input product (cuBLAS), then the walk, which adds biases and leaves the states and what
backward needs. Backward: the walk, which leaves gate gradients, then their products with x, h and
weight_ih. Nothing here waits for the device.

Legend: T steps, B batch, N rows of input (packed, or T * B), I input, H hidden, D directions,
G gates.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ostinato.call import Call
from ostinato.cuda.config import Config
from ostinato.engine import Sizes


class Launcher(Protocol):
    """What runs kernels."""

    def at_once(self, config: Config) -> int:
        """Return how many walks of a kernel whose blocks wait for each other a launch may have."""

    def __call__(self, config: Config, walks: int, arguments: Sequence[int]) -> None:
        """Launch a kernel for so many walks."""


class Rows(NamedTuple):
    """Where rows begin, end and begin anew, on the device; None where all is plain."""

    offsets: Tensor | None  # (T,), int64: the row of input where a step begins
    lengths: Tensor | None  # (B,), int32
    order: Tensor | None  # (B,), int32: rows of like length beside each other
    flags: Tensor | None  # (N,), uint8: where a row begins anew


def rows_of(call: Call, sizes: Sizes) -> Rows:
    """Describe the rows of a call."""
    device = call.input.device
    offsets = lengths = order = flags = None
    if call.batch_sizes is not None:
        counts = call.batch_sizes
        offsets = (counts.cumsum(0) - counts).to(device, non_blocking=True)
        lengths = (counts[:, None] > torch.arange(sizes.batch)).sum(0)
    elif call.lengths is not None:
        lengths = call.lengths
        order = lengths.argsort(descending=True, stable=True)
    if call.resets is not None:
        flags = call.resets.reshape(-1).view(torch.uint8)
    lengths, order = (
        None if t is None else t.to(torch.int32).to(device, non_blocking=True)
        for t in (lengths, order)
    )
    return Rows(offsets, lengths, order, flags)


def forward(
    call: Call, sizes: Sizes, config: Config, launch: Launcher, all_c: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run a layer.

    Args:
        call: checked; without a projection.
        sizes: of the call.
        config: of a forward kernel for its cell, precision and hidden size.
        launch: runs a kernel.
        all_c: whether c is wanted at every step.
        keep: whether backward is to follow.

    Returns:
        output, h_n, c_n, cells, reserve; what there is not is empty.
    """
    x, hidden, directions = call.input.contiguous(), sizes.hidden, sizes.directions
    gates, has_c = call.kind.gates, call.kind.has_c
    rows = rows_of(call, sizes)
    flat = x.reshape(sizes.rows, sizes.input)
    weights = _directions(call, sizes)
    gates_x = x.new_empty(directions, sizes.rows, gates * hidden)
    with products_in(config.math):
        for d, (weight_ih, *_) in enumerate(weights):
            assert weight_ih is not None
            torch.mm(flat, weight_ih.t(), out=gates_x[d])
    # Past the end of a row nothing is written.
    make = x.new_zeros if call.lengths is not None else x.new_empty
    output = make((*x.shape[:-1], directions * hidden))
    h_n = x.new_empty(directions, sizes.batch, hidden)
    c_n = x.new_empty((directions, sizes.batch, hidden) if has_c else (0,))
    cells = make((*x.shape[:-1], directions * hidden) if has_c and all_c else (0,))
    reserve = x.new_empty(reserve_bytes(call, sizes) if keep else 0, dtype=torch.uint8)
    states = [_dense(t) for t in (call.h_0, call.c_0, call.reset_h, call.reset_c)]
    held = [_pair([w[i] for w in weights]) for i in (1, 2, 3)]
    arguments = [
        *_batch(sizes, rows),
        gates_x.data_ptr(),
        *(address(t) for pair in held for t in pair),
        *map(address, states),
        *map(address, (output, h_n, c_n, reserve, cells)),
    ]
    _walk(config, launch, sizes, x, arguments)
    return output, h_n, c_n, cells, reserve


def backward(
    call: Call,
    sizes: Sizes,
    config: Config,
    launch: Launcher,
    grads: Sequence[Tensor | None],
    output: Tensor,
    reserve: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiate a layer.

    Args:
        call: as in `forward`.
        sizes: of the call.
        config: of a backward kernel.
        launch: runs a kernel.
        grads: of output, h_n, c_n and cells, or None.
        output: of forward.
        reserve: of forward.
        wanted: whether each of `call.tensors()` needs a gradient.

    Returns:
        The gradients, None where not wanted.
    """
    x, hidden, directions = call.input.contiguous(), sizes.hidden, sizes.directions
    rows = rows_of(call, sizes)
    weights = _directions(call, sizes)
    slots = call.kind.grads
    # Where a row has no step or no first piece, nothing is written.
    make = x.new_zeros if call.lengths is not None else x.new_empty
    dgates = make((directions, sizes.rows, slots * hidden))
    make = x.new_empty if rows.flags is None else x.new_zeros
    shape = (directions, sizes.batch, hidden)
    dh_0, dc_0 = (make(shape) if want else None for want in wanted[1:3])
    dreset_h, dreset_c = (
        x.new_zeros(shape, dtype=torch.float32) if want else None for want in wanted[3:5]
    )
    y = _dense(output)
    states = [_dense(t) for t in (call.h_0, call.c_0, call.reset_h, call.reset_c)]
    arrived = [_dense(t) for t in grads]
    dy, dh_n, dc_n, dcells = arrived
    held = _pair([w[1] for w in weights])
    arguments = [
        *_batch(sizes, rows),
        *map(address, (*held, *states, y, reserve, dy, dcells, dh_n, dc_n)),
        *map(address, (dgates, dh_0, dc_0, dreset_h, dreset_c)),
    ]
    _walk(config, launch, sizes, x, arguments)
    dresets = [None if t is None else t.to(x.dtype) for t in (dreset_h, dreset_c)]
    with products_in(config.math):
        dx, dweights = _products(call, sizes, rows, dgates, output, weights, wanted)
    return [dx, dh_0, dc_0, *dresets, *dweights]


def _walk(
    config: Config, launch: Launcher, sizes: Sizes, x: Tensor, arguments: Sequence[int]
) -> None:
    """Launch a kernel for all tiles of all directions.

    Blocks that wait for each other through global memory must be on the device together: where not
    all walks are, several launches follow each other.
    """
    walks = config.walks(sizes.batch, sizes.directions)
    most = launch.at_once(config) if config.exchange == "grid" else walks
    exchange = x.new_empty(config.exchange_bytes(min(walks, most)), dtype=torch.uint8)
    for first in range(0, walks, most):
        exchange.zero_()
        launch(config, min(most, walks - first), [first, *arguments, address(exchange)])


def _products(
    call: Call,
    sizes: Sizes,
    rows: Rows,
    dgates: Tensor,
    output: Tensor,
    weights: list[list[Tensor | None]],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of input and weights, products over all steps."""
    hidden, gates = sizes.hidden, call.kind.gates
    flat = call.input.reshape(sizes.rows, sizes.input)
    dx: Tensor | None = None
    dweights: list[Tensor | None] = []
    count = len(call.weights) // sizes.directions
    for d, (weight_ih, *_) in enumerate(weights):
        # csrc/cuda/sequence.cuh, position_of: the last columns belong to the input product, the
        # first to the hidden one, where a GRU's n comes before r and z.
        of_input = dgates[d][:, dgates.shape[2] - gates * hidden :]
        of_hidden = dgates[d][:, : gates * hidden]
        turn = hidden if dgates.shape[2] > gates * hidden else 0
        wants = wanted[5 + d * count : 5 + (d + 1) * count]
        found: list[Tensor | None] = [None] * count
        if wanted[0]:
            assert weight_ih is not None
            dx = of_input @ weight_ih if dx is None else dx.addmm_(of_input, weight_ih)
        if wants[0]:
            found[0] = of_input.t() @ flat
        if wants[1]:
            found[1] = _turned(_weight_hh_gradient(call, sizes, rows, of_hidden, output, d), turn)
        if count > 2 and wants[2]:
            found[2] = of_input.sum(0)
        if count > 2 and wants[3]:
            found[3] = _turned(of_hidden.sum(0), turn)
        dweights += found
    return None if dx is None else dx.reshape(call.input.shape), dweights


def _turned(gradient: Tensor, by: int) -> Tensor:
    """Bring what belongs to the last gate behind the others."""
    return torch.cat([gradient[by:], gradient[:by]]) if by else gradient


def _weight_hh_gradient(
    call: Call, sizes: Sizes, rows: Rows, of_hidden: Tensor, output: Tensor, direction: int
) -> Tensor:
    """Sum the products of gate gradients and the states before them over all steps."""
    hidden, batch = sizes.hidden, sizes.batch
    y = output.reshape(sizes.rows, -1)[:, direction * hidden : (direction + 1) * hidden]
    if rows.offsets is None and rows.lengths is None and rows.flags is None:
        later, earlier = slice(batch, None), slice(0, sizes.rows - batch)
        if direction:
            later, earlier = earlier, later
        found = of_hidden[later].t() @ y[earlier]
        if call.h_0 is not None:
            first = slice(sizes.rows - batch, None) if direction else slice(0, batch)
            found.addmm_(of_hidden[first].t(), call.h_0[direction])
        return found
    return of_hidden.t() @ _previous(call, sizes, rows, y, direction)


def _previous(call: Call, sizes: Sizes, rows: Rows, y: Tensor, direction: int) -> Tensor:
    """Return the state before each step of a direction, (N, H)."""
    batch, count, device = sizes.batch, sizes.rows, y.device
    if call.batch_sizes is None:
        taken = torch.full((sizes.steps,), batch)
        lengths = call.lengths if call.lengths is not None else torch.full((batch,), sizes.steps)
    else:
        taken = call.batch_sizes
        lengths = (taken[:, None] > torch.arange(batch)).sum(0)
    offsets = taken.cumsum(0) - taken
    steps = torch.arange(sizes.steps).repeat_interleave(taken)
    row = torch.arange(count) - offsets[steps]
    near = steps + 1 if direction else steps - 1
    is_end = near >= lengths[row] if direction else near < 0
    # The table below: states of all steps, then h_0, then the states of resets.
    found = torch.where(is_end, count + row, offsets[near.clamp(0, sizes.steps - 1)] + row)
    found, is_end, row = (t.to(device, non_blocking=True) for t in (found, is_end, row))
    if rows.flags is not None:
        cut = rows.flags.bool()
        if direction:
            # A row is cut before the step that the walk comes from.
            cut = ~is_end & cut[torch.where(is_end, 0, found)]
        found = torch.where(cut, count + batch + row, found)
    zeros = y.new_zeros(batch, sizes.hidden)
    states = [zeros if s is None else s[direction] for s in (call.h_0, call.reset_h)]
    return torch.cat([y, *states]).index_select(0, found)


def reserve_bytes(call: Call, sizes: Sizes) -> int:
    """Return how much forward keeps for backward: values of each unit and row, in its dtype."""
    values = sizes.rows * sizes.directions * call.kind.saved * sizes.hidden
    return values * call.input.element_size()


def _directions(call: Call, sizes: Sizes) -> list[list[Tensor | None]]:
    """Return weight_ih, weight_hh and biases (None where absent) of each direction."""
    count = len(call.weights) // sizes.directions
    found = []
    for first in range(0, len(call.weights), count):
        dense = [_dense(w) for w in call.weights[first : first + count]]
        found.append([*dense, None, None][:4])
    return found


def _pair(tensors: list[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Return one for each direction; the kernels take two."""
    return tensors[0], tensors[-1]


def _batch(sizes: Sizes, rows: Rows) -> list[int]:
    numbers = [sizes.steps, sizes.rows, sizes.batch, sizes.directions]
    return numbers + [address(t) for t in rows]


def _dense(tensor: Tensor | None) -> Tensor | None:
    """Make a tensor dense, its memory aligned as pairs of numbers are read."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    is_aligned = tensor.data_ptr() % (2 * tensor.element_size()) == 0
    return tensor if is_aligned else tensor.clone()


def address(tensor: Tensor | None) -> int:
    """Return where a tensor lies; 0 where there is none, or nothing in it."""
    return 0 if tensor is None or not tensor.numel() else tensor.data_ptr()


_precision = threading.Lock()


@contextlib.contextmanager
def products_in(math: str) -> Iterator[None]:
    """Let torch's products of float32 have the precision that the walk has.

    torch has one switch for all products of the process. It is turned only where it stands
    otherwise, and back as soon as these products are on their way.
    """
    matmul = torch.backends.cuda.matmul
    # From torch 2.9 on the first name is there, and reading the second fails where a program has
    # turned the first.
    name = "allow_tf32"
    values: dict[str, object] = {"tf32": True, "fp32": False}
    if hasattr(matmul, "fp32_precision"):
        name, values = "fp32_precision", {"tf32": "tf32", "fp32": "ieee"}
    if math not in values or getattr(matmul, name) == values[math]:
        yield
        return
    with _precision:
        before = getattr(matmul, name)
        setattr(matmul, name, values[math])
        try:
            yield
        finally:
            setattr(matmul, name, before)
