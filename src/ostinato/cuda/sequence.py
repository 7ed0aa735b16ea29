"""One layer on the GPU engine: its time loop by our kernels, its products by torch's.

Forward: the input product (cuBLAS), then the time loop, which adds biases and leaves the states and
what backward needs. Backward: the time loop, which leaves gate gradients, then their products with
x, h and weight_ih. Nothing here waits for the device.

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

from ostinato import arrays
from ostinato.call import Call, Parts, Results
from ostinato.check import gradients, shapes_of
from ostinato.cuda.config import Config
from ostinato.sizes import Sizes
from ostinato.tensors import without_autocast


class Launcher(Protocol):
    """What runs kernels."""

    def at_once(self, config: Config) -> int:
        """Return how many loops of a kernel whose blocks wait for each other a launch may have."""

    def __call__(self, config: Config, loops: int, arguments: Sequence[int]) -> None:
        """Launch a kernel for so many loops."""


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
    call: Call, sizes: Sizes, config: Config, launch: Launcher, keep: bool
) -> tuple[Results, Tensor]:
    """Run a layer; return its results, and what is kept for backward.

    The call is checked and has no projection; `config` is of a forward kernel for its cell,
    precision and hidden size. `keep` says whether backward is to follow.
    """
    x, directions = call.input.contiguous(), sizes.directions
    rows = rows_of(call, sizes)
    flat = x.reshape(sizes.rows, sizes.input)
    weights = _directions(call, sizes)
    gates_x = x.new_empty(directions, sizes.rows, call.kind.gates * sizes.hidden)
    with products_in(config.math, x):
        for d, (weight_ih, *_) in enumerate(weights):
            assert weight_ih is not None
            torch.mm(flat, weight_ih.t(), out=gates_x[d])
    shapes, table = shapes_of(call, sizes), call.results()
    # Past the end of a row nothing is written.
    make = x.new_zeros if call.lengths is not None else x.new_empty
    results = Results(
        make(shapes["output"]),
        tuple(x.new_empty(shapes[array.name]) for array in table.last),
        tuple(make(shapes[array.name]) for array in table.every),
    )
    reserve = make(reserve_bytes(call, sizes) if keep else 0, dtype=torch.uint8)
    given = {**_both(weights), **_states(call), "gates_x": gates_x, "reserve": reserve}
    given.update(zip((array.name for array in table.flat()), results.flat(), strict=True))
    _launch(config, launch, sizes, rows, x, [given.get(name) for name in FORWARD])
    return results, reserve


def backward(
    call: Call,
    sizes: Sizes,
    config: Config,
    launch: Launcher,
    arrived: Results,
    output: Tensor,
    reserve: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiate a layer; return the gradients, None where not wanted.

    `config` is of a backward kernel; `output` and `reserve` are what `forward` returned. Gradients
    that did not arrive are None. `wanted` has a flag for each of `call.tensors()`.
    """
    x, hidden, directions = call.input.contiguous(), sizes.hidden, sizes.directions
    rows, asked = rows_of(call, sizes), call.parts(wanted)
    weights = _directions(call, sizes)
    # Where a row has no step or no first piece, nothing is written.
    make = x.new_zeros if call.lengths is not None else x.new_empty
    dgates = make((directions, sizes.rows, call.kind.grads * hidden))
    make = x.new_empty if rows.flags is None else x.new_zeros
    shape = (directions, sizes.batch, hidden)
    initial = tuple(make(shape) if want else None for want in asked.initial)
    reset_to = [
        x.new_zeros(shape, dtype=torch.float32) if want else None for want in asked.reset_to
    ]
    dense = dict(zip((array.name for array in gradients(call)), arrived.flat(), strict=False))
    given = {**_both(weights), **_states(call), **{k: _dense(t) for k, t in dense.items()}}
    given.update(output=_dense(output), reserve=reserve, dgates=dgates)
    for table, grads in ((arrays.INITIAL, initial), (arrays.RESET_TO, reset_to)):
        given.update((f"grad_{a.name}", grad) for a, grad in zip(table, grads, strict=False))
    _launch(config, launch, sizes, rows, x, [given.get(name) for name in BACKWARD])
    rounded = tuple(None if t is None else t.to(x.dtype) for t in reset_to)
    with products_in(config.math, x):
        dx, dweights = _products(call, sizes, rows, dgates, output, weights, asked)
    return Parts(dx, initial, rounded, dweights).flat()


# What the kernels of csrc/cuda/sequence.cu take between their sizes and `exchange`, in order.
_GIVEN = ("h_0", "c_0", "reset_h", "reset_c")
FORWARD = (
    *("gates_x", "weight_hh", "weight_hh_reverse", "bias_ih", "bias_ih_reverse"),
    *("bias_hh", "bias_hh_reverse", *_GIVEN, "output", "h_n", "c_n", "reserve", "cells"),
)
BACKWARD = (
    *("weight_hh", "weight_hh_reverse", *_GIVEN, "output", "reserve", "grad_output"),
    *("grad_cells", "grad_h_n", "grad_c_n", "dgates"),
    *("grad_h_0", "grad_c_0", "grad_reset_h", "grad_reset_c"),
)


def _both(weights: Sequence[Sequence[Tensor | None]]) -> dict[str, Tensor | None]:
    """Name the weights of both directions, which the kernels take; one stands for both."""
    (first, *_), (*_, last) = weights, weights
    found = dict(zip(_WEIGHTS, first, strict=True))
    found.update(zip((f"{name}_reverse" for name in _WEIGHTS), last, strict=True))
    return found


_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _states(call: Call) -> dict[str, Tensor | None]:
    """Name the states that a layer is given, dense."""
    found: dict[str, Tensor | None] = {}
    for table, states in ((arrays.INITIAL, call.initial), (arrays.RESET_TO, call.reset_to)):
        found.update((a.name, _dense(s)) for a, s in zip(table, states, strict=False))
    return found


def _launch(
    config: Config,
    launch: Launcher,
    sizes: Sizes,
    rows: Rows,
    x: Tensor,
    given: Sequence[Tensor | None],
) -> None:
    """Launch a kernel for all tiles of all directions.

    Blocks that wait for each other through global memory must be on the device together: where not
    all loops are, several launches follow each other.
    """
    arguments = *_batch(sizes, rows), *map(address, given)
    loops = config.loops(sizes.batch, sizes.directions)
    most = launch.at_once(config) if config.exchange == "grid" else loops
    exchange = x.new_empty(config.exchange_bytes(min(loops, most)), dtype=torch.uint8)
    for first in range(0, loops, most):
        exchange.zero_()
        launch(config, min(most, loops - first), [first, *arguments, address(exchange)])


def _products(
    call: Call,
    sizes: Sizes,
    rows: Rows,
    dgates: Tensor,
    output: Tensor,
    weights: list[list[Tensor | None]],
    wanted: Parts,
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
        if wanted.input:
            assert weight_ih is not None
            dx = of_input @ weight_ih if dx is None else dx.addmm_(of_input, weight_ih)
        want_ih, want_hh, *want_biases = wanted.weights[d * count : (d + 1) * count]
        dweights.append(of_input.t() @ flat if want_ih else None)
        of_states = (
            _weight_hh_gradient(call, sizes, rows, of_hidden, output, d) if want_hh else None
        )
        dweights.append(None if of_states is None else _turned(of_states, turn))
        sides = zip((of_input, of_hidden), (0, turn), want_biases, strict=False)
        dweights += [_turned(grad.sum(0), by) if want else None for grad, by, want in sides]
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
        h_0, *_ = call.initial
        if h_0 is not None:
            first = slice(sizes.rows - batch, None) if direction else slice(0, batch)
            found.addmm_(of_hidden[first].t(), h_0[direction])
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
            # A row is cut before the step that the loop comes from.
            cut = ~is_end & cut[torch.where(is_end, 0, found)]
        found = torch.where(cut, count + batch + row, found)
    zeros = y.new_zeros(batch, sizes.hidden)
    (h_0, *_), (reset_h, *_) = call.initial, call.reset_to or (None,)
    states = [zeros if s is None else s[direction] for s in (h_0, reset_h)]
    return torch.cat([y, *states]).index_select(0, found)


def reserve_bytes(call: Call, sizes: Sizes) -> int:
    """Return how much forward keeps for backward: values of each unit and row, in its dtype."""
    values = sizes.rows * sizes.directions * call.kind.saved * sizes.hidden
    return values * int(call.input.element_size())


def _directions(call: Call, sizes: Sizes) -> list[list[Tensor | None]]:
    """Return weight_ih, weight_hh and biases (None where absent) of each direction."""
    count = len(call.weights) // sizes.directions
    found = []
    for first in range(0, len(call.weights), count):
        dense = [_dense(w) for w in call.weights[first : first + count]]
        found.append([*dense, None, None][:4])
    return found


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
def products_in(math: str, input: Tensor) -> Iterator[None]:
    """Let torch's products have the precision that the time loop has.

    A region of autocast, in which backward may stand where forward did not, would round them. torch
    has one switch for all products of the process. It is turned only where it stands
    otherwise, and back as soon as these products are on their way.
    """
    matmul = torch.backends.cuda.matmul
    # From torch 2.9 on the first name is there, and reading the second fails where a program has
    # turned the first.
    name = "allow_tf32"
    values: dict[str, object] = {"tf32": True, "fp32": False}
    if hasattr(matmul, "fp32_precision"):
        name, values = "fp32_precision", {"tf32": "tf32", "fp32": "ieee"}
    is_autocast = torch._C._is_any_autocast_enabled()
    with without_autocast(input) if is_autocast else contextlib.nullcontext():
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
