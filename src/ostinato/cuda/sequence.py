"""One layer on the GPU engine: its time loop by our kernels, its products by torch's.

Forward: the input product (cuBLAS), then the time loop, which adds biases and leaves the states and
what backward needs. Backward: the time loop, which leaves gate gradients, then their products with
x, h and weight_ih. Nothing here waits for the device.

Legend: T steps, B batch, N rows of input (packed, or T * B), I input, H hidden, D directions,
G gates, E states behind h, P numbers per unit, n numbers per unit that drive a step.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ostinato import arrays
from ostinato.arrays import STATES
from ostinato.call import Call, Parts, Results, padded
from ostinato.cuda.columns import Columns, columns_of, ordered, part, restored
from ostinato.cuda.config import Config, Previous
from ostinato.sizes import Sizes
from ostinato.tensors import without_autocast


class Launcher(Protocol):
    """What runs kernels."""

    def at_once(self, config: Config) -> int:
        """Return how many loops of a kernel whose blocks wait for each other a launch may have."""

    def __call__(self, config: Config | Previous, loops: int, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel for so many loops; arguments are numbers, dense tensors and None."""


class Rows(NamedTuple):
    """Where rows begin, end and begin anew, on the device; None where all is plain."""

    offsets: Tensor | None = None  # (T,), int64: the row of input where a step begins
    lengths: Tensor | None = None  # (B,), int32
    order: Tensor | None = None  # (B,), int32: rows of like length beside each other
    flags: Tensor | None = None  # (N,), uint8: where a row begins anew


_PLAIN = Rows()


def rows_of(call: Call, may_keep: bool) -> Rows:
    """Describe the rows of a call.

    With `may_keep` what ragged rows have on the device is kept for other calls. Within a compiled
    graph it may not: its memory could be the graph's, and it would be replayed for other lengths.
    """
    if call.batch_sizes is None and call.lengths is None:
        found = _PLAIN
    elif may_keep:
        found = _kept(call.input, *_counts(call))
    elif is_capturing():
        raise RuntimeError("a graph cannot capture how lengths come to the device")
    else:
        found = _copied(call.input.device, *_counts(call))
    if call.resets is not None:
        found = found._replace(flags=call.resets.reshape(-1).view(torch.uint8))
    return found


# What ragged batches have on the device, by the bytes of their counts: what is given again, as in
# every layer and in backward, is copied once. By stream too, since another would not wait for the
# copy. Those that a graph has captured stay, since nobody says when it is gone.
_ragged: dict[tuple[bytes, int, int], dict[int, Rows]] = {}
_captured: list[Rows] = []
_ragged_lock = threading.Lock()
_MOST_RAGGED = 64


def is_at_hand(call: Call) -> bool:
    """Whether what the rows of a ragged batch need is on the device, so that nothing is copied."""
    return _key(call.input, *_counts(call)) in _ragged


def _counts(call: Call) -> tuple[Tensor, int]:
    if call.batch_sizes is None:
        return call.lengths, 0
    return call.batch_sizes, call.batch


def _key(input: Tensor, counts: Tensor, batch: int) -> tuple[bytes, int, int]:
    return counts.numpy().tobytes(), batch, input.get_device()


def _kept(input: Tensor, counts: Tensor, batch: int) -> Rows:
    """Return ragged rows. `counts` are batch_sizes or, where `batch` is 0, lengths."""
    key = _key(input, counts, batch)
    by_stream = _ragged.get(key)
    if by_stream and is_capturing():
        # Before it captures, torch waits for all streams.
        found = next(iter(by_stream.values()))
        if not any(found is each for each in _captured):
            _captured.append(found)
        return found
    if is_capturing():
        raise RuntimeError("a graph cannot capture how lengths come to the device")
    stream = stream_of(input.get_device())
    if by_stream and stream in by_stream:
        return by_stream[stream]
    found = _copied(input.device, counts, batch)
    with _ragged_lock:
        if len(_ragged) >= _MOST_RAGGED:
            del _ragged[next(iter(_ragged))]
        # A copy, because another thread may look into what is there.
        _ragged[key] = {**_ragged.get(key, {}), stream: found}
    return found


def _copied(device: torch.device, counts: Tensor, batch: int) -> Rows:
    """Copy to the device what kernels ask of ragged rows."""

    def there(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(dtype).to(device, non_blocking=True)

    if not batch:
        order = counts.argsort(descending=True, stable=True)
        return Rows(None, there(counts, torch.int32), there(order, torch.int32))
    lengths = (counts[:, None] > torch.arange(batch, device="cpu")).sum(0)
    return Rows(there(counts.cumsum(0) - counts, torch.int64), there(lengths, torch.int32))


def is_capturing() -> bool:
    """Whether this thread's stream is being captured in a graph."""
    return torch.cuda.is_current_stream_capturing()


def stream_of(device_index: int) -> int:
    """Return the driver's handle of torch's current stream."""
    found: int = torch._C._cuda_getCurrentRawStream(device_index)
    return found


def forward(
    call: Call, sizes: Sizes, rows: Rows, config: Config, launch: Launcher, keep: bool
) -> tuple[Results, Tensor | None]:
    """Run a layer; return its results, and what is kept for backward, if anything is.

    The call is checked, has no projection, and its weights and states are dense (`dense`);
    `config` is of a forward kernel for its cell, precision and hidden size. `keep` says whether
    backward is to follow.
    """
    x, directions, behind = call.input, sizes.directions, call.kind.behind
    gates_x = _input_products(call, sizes, config.math)
    # Past the end of a row nothing is written.
    make = x.new_empty if call.lengths is None else x.new_zeros
    *rows_of_x, _ = x.shape
    wide, state = directions * sizes.hidden, (directions, sizes.batch, sizes.hidden)
    output, h_n = make((*rows_of_x, wide)), x.new_empty(state)
    c_n = x.new_empty((*state[:2], behind * sizes.hidden)) if behind else None
    cells = make((*rows_of_x, behind * wide)) if behind and call.all_states else None
    reserve = make(reserve_bytes(call, sizes), dtype=torch.uint8) if keep else None
    given = {"gates_x": gates_x, **_by_direction(call, directions), **_states(call)}
    given |= {"output": output, "h_n": h_n, "c_n": c_n, "reserve": reserve, "cells": cells}
    _launch(config, launch, sizes, rows, call, given)
    last = (h_n,) if c_n is None else (h_n, c_n)
    return Results(output, last, () if cells is None else (cells,)), reserve


def _input_products(call: Call, sizes: Sizes, math: str) -> Tensor:
    """Multiply all rows by weight_ih, (D, N, G * H)."""
    flat, count = _flat(call, sizes), len(call.weights) // sizes.directions
    with products_in(math, flat):
        if sizes.directions == 1:
            weight_ih, *_ = call.weights
            found: Tensor = torch.nn.functional.linear(flat, weight_ih)
            return found
        found = flat.new_empty(sizes.directions, sizes.rows, call.kind.input_gates * sizes.hidden)
        for product, weight_ih in zip(found.unbind(), call.weights[::count], strict=True):
            torch.mm(flat, weight_ih.t(), out=product)
        return found


def _flat(call: Call, sizes: Sizes) -> Tensor:
    """Return the rows of input, (N, I)."""
    found: Tensor = call.input
    if call.kind.drives:
        return _rows(call, sizes)[:, : sizes.input]
    return found if found.dim() == 2 else found.reshape(sizes.rows, sizes.input)


def _rows(call: Call, sizes: Sizes) -> Tensor:
    """Return the rows of input with the drives behind them, (N, I + n * H)."""
    found: Tensor = call.input.reshape(sizes.rows, call.input.shape[-1])
    return found


def _drives(call: Call, sizes: Sizes) -> Tensor | None:
    """Return what drives each step, (N, n * H), or None.

    A copy, since kernels read pairs of numbers, which need not be aligned behind the input.
    """
    if not call.kind.drives:
        return None
    return _rows(call, sizes)[:, sizes.input :].contiguous()


def backward(
    call: Call,
    sizes: Sizes,
    rows: Rows,
    config: Config,
    launch: Launcher,
    arrived: Results,
    output: Tensor,
    reserve: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiate a layer; return the gradients, None where not wanted.

    `config` is of a backward kernel; `output` and `reserve` are what `forward` returned. Gradients
    that did not arrive are None, those that did are dense. `wanted` has a flag for each of
    `call.tensors()`.
    """
    x, hidden, directions = call.input, sizes.hidden, sizes.directions
    asked, kind = call.parts(wanted), call.kind
    # Where a row has no step or no first piece, nothing is written.
    make = x.new_empty if call.lengths is None else x.new_zeros
    shape = sizes.rows, kind.grads * hidden
    dgates = make(shape if directions == 1 else (directions, *shape))
    make = x.new_empty if rows.flags is None else x.new_zeros
    shapes = [(directions, sizes.batch, width * hidden) for width in (1, kind.behind)]
    initial = tuple(
        [make(s) if want else None for s, want in zip(shapes, asked.initial, strict=False)]
    )
    reset_to = [
        x.new_zeros(s, dtype=torch.float32) if want else None
        for s, want in zip(shapes, asked.reset_to, strict=False)
    ]
    given = {"output": output, "reserve": reserve, "dgates": dgates, "grad_output": arrived.output}
    given |= {**_by_direction(call, directions), **_states(call)}
    for names, grads in zip(_GRADS, (arrived.every, arrived.last, initial, reset_to), strict=True):
        given.update(zip(names, padded(grads, first=len(STATES) - len(names)), strict=True))
    _launch(config, launch, sizes, rows, call, given)
    previous, count = None, len(call.weights) // directions
    if rows is not _PLAIN and kind.gates and any(asked.weights[1::count]):
        previous = _previous(call, sizes, rows, launch, output)
    with products_in(config.math, x):
        dx, dweights = _products(call, sizes, previous, dgates, output, asked)
    rounded = tuple([None if t is None else t.to(x.dtype) for t in reset_to])
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
# What they take behind `exchange` of a cell that has any of it.
EXTRAS = ("parameters", "parameters_reverse", "drives")


# Gradients of the states behind h after every step, of the last, and of those that begin.
_GRADS = tuple(
    tuple(f"grad_{array.name}" for array in table)
    for table in (arrays.EVERY, arrays.LAST, arrays.INITIAL, arrays.RESET_TO)
)


def _by_direction(call: Call, directions: int) -> dict[str, Tensor | None]:
    """Name weight_hh, biases and parameters of both directions; one stands for both."""
    count = len(call.weights) // directions
    (hh, ih, both, own), (hh_reverse, ih_reverse, both_reverse, own_reverse) = (
        _named(call, weights) for weights in (call.weights[:count], call.weights[-count:])
    )
    return {
        "parameters": own,
        "parameters_reverse": own_reverse,
        "weight_hh": hh,
        "bias_ih": ih,
        "bias_hh": both,
        "weight_hh_reverse": hh_reverse,
        "bias_ih_reverse": ih_reverse,
        "bias_hh_reverse": both_reverse,
    }


_NONE = (None, None)


def _named(call: Call, weights: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return weight_hh, bias_ih, bias_hh and the parameters of a direction."""
    _, hh, *others = weights
    own = others.pop() if call.kind.parameters else None
    return hh, *(others or _NONE), own


def _states(call: Call) -> dict[str, Tensor | None]:
    """Name h_0, c_0 and the states of resets, None for what there is not."""
    return dict(zip(_GIVEN, (*padded(call.initial), *padded(call.reset_to)), strict=True))


def _launch(
    config: Config,
    launch: Launcher,
    sizes: Sizes,
    rows: Rows,
    call: Call,
    given: dict[str, Tensor | None],
) -> None:
    """Launch a kernel for all tiles of all directions; `given` are its arrays by name.

    Blocks that wait for each other through global memory must be on the device together: where not
    all loops are, several launches follow each other.
    """
    arrays = [given[name] for name in (BACKWARD if config.is_backward else FORWARD)]
    arguments = sizes.steps, sizes.rows, sizes.batch, sizes.directions, *rows, *arrays
    extras: tuple[Tensor | None, ...] = ()
    if config.has_extras:
        given["drives"] = _drives(call, sizes)
        extras = tuple([given[name] for name in EXTRAS])
    loops = config.loops(sizes.batch, sizes.directions)
    if config.exchange != "grid":
        launch(config, loops, (0, *arguments, None, *extras))
        return
    most = launch.at_once(config)
    exchange = call.input.new_zeros(config.exchange_bytes(min(loops, most)), dtype=torch.uint8)
    for first in range(0, loops, most):
        if first:
            exchange.zero_()
        launch(config, min(most, loops - first), (first, *arguments, exchange, *extras))


def _products(
    call: Call,
    sizes: Sizes,
    previous: Tensor | None,
    dgates: Tensor,
    output: Tensor,
    wanted: Parts,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of input and weights, products over all steps."""
    hidden, columns, directions = sizes.hidden, columns_of(call.cell), sizes.directions
    flat, count = _flat(call, sizes), len(call.weights) // directions
    dx: Tensor | None = None
    dweights: list[Tensor | None] = []
    for d in range(directions):
        own = dgates if directions == 1 else dgates[d]
        of_input = part(own, columns.alone, columns.parameters, hidden)
        of_hidden = part(own, 0, len(columns.hidden), hidden)
        if wanted.input:
            weight_ih = ordered(call.weights[d * count], columns.input, hidden)
            dx = torch.mm(of_input, weight_ih) if dx is None else dx.addmm_(of_input, weight_ih)
        want_ih, want_hh, *want_others = wanted.weights[d * count : (d + 1) * count]
        of_x = torch.mm(of_input.t(), flat) if want_ih else None
        dweights.append(None if of_x is None else restored(of_x, columns.input, hidden))
        of_states = None
        if want_hh and not columns.hidden:
            of_states = own.new_zeros(0, hidden)
        elif want_hh and previous is None:
            of_states = _of_plain_rows(call, sizes, of_hidden, output, d)
        elif want_hh and previous is not None:
            of_states = torch.mm(of_hidden.t(), previous if directions == 1 else previous[d])
        dweights.append(None if of_states is None else restored(of_states, columns.hidden, hidden))
        if want_others:
            dweights += _sums(own, columns, hidden, want_others)
    if dx is not None and columns.drives:
        dx = torch.cat([dx, _of_drives(dgates, columns, hidden)], -1)
    if dx is not None and call.input.dim() != 2:
        dx = dx.view(call.input.shape)
    return dx, dweights


def _sums(
    dgates: Tensor, columns: Columns, hidden: int, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of what is the same in every row: biases, then the parameters."""
    if not any(wanted):
        return [None] * len(wanted)
    total = part(dgates, 0, columns.slots, hidden).sum(0)
    want_biases, found = list(wanted), []
    want_own = want_biases.pop() if columns.slots > columns.parameters else False
    if want_biases:
        found = _of_biases(total, columns, hidden, want_biases)
    if len(found) < len(wanted):
        own = part(total, columns.parameters, columns.slots, hidden)
        found.append(own.reshape(-1, hidden) if want_own else None)
    return found


def _of_biases(
    total: Tensor, columns: Columns, hidden: int, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of bias_ih and bias_hh."""
    want_ih, want_hh = wanted
    of_input = of_hidden = None
    if want_ih:
        of_input = part(total, columns.alone, columns.parameters, hidden)
        of_input = restored(of_input, columns.input, hidden)
    if want_hh:
        shared = part(total, 0, len(columns.hidden), hidden)
        of_hidden = restored(shared, columns.hidden, hidden)
        # What may be the same numbers is not the same memory.
        if want_ih and of_hidden is shared:
            of_hidden = of_hidden.clone()
    return [of_input, of_hidden]


def _of_drives(dgates: Tensor, columns: Columns, hidden: int) -> Tensor:
    """Return the gradient of what drives the steps of all directions, (N, n * H)."""
    own = dgates[..., columns.slots * hidden :]
    return own.sum(0) if own.dim() == 3 else own


def _of_plain_rows(
    call: Call, sizes: Sizes, of_hidden: Tensor, output: Tensor, direction: int
) -> Tensor:
    """Sum the products of gate gradients and the states before them, where no row is cut."""
    hidden, batch, rows = sizes.hidden, sizes.batch, sizes.rows
    y = output.view(rows, sizes.directions * hidden)
    if sizes.directions > 1:
        y = y[:, direction * hidden : (direction + 1) * hidden]
    if direction:
        later, earlier = of_hidden[: rows - batch], y[batch:]
    else:
        later, earlier = of_hidden[batch:], y[: rows - batch]
    found = torch.mm(later.t(), earlier)
    h_0, *_ = call.initial
    if h_0 is not None:
        first = of_hidden[rows - batch :] if direction else of_hidden[:batch]
        found.addmm_(first.t(), h_0[direction])
    return found


def _previous(call: Call, sizes: Sizes, rows: Rows, launch: Launcher, output: Tensor) -> Tensor:
    """Return the state before each step, (D, N, H), or (N, H) of one direction."""
    shape = sizes.rows, sizes.hidden
    found = output.new_empty(shape if sizes.directions == 1 else (sizes.directions, *shape))
    (h_0, *_), (reset_h, *_) = call.initial, call.reset_to or (None,)
    numbers = sizes.steps, sizes.rows, sizes.batch, sizes.directions, sizes.hidden
    marks = rows.offsets, rows.lengths, rows.flags
    launch(
        Previous(output.element_size()),
        sizes.steps,
        (*numbers, *marks, output, h_0, reset_h, found),
    )
    return found


def reserve_bytes(call: Call, sizes: Sizes) -> int:
    """Return how much forward keeps for backward: values of each unit and row, in its dtype."""
    values = sizes.rows * sizes.directions * call.kind.saved * sizes.hidden
    return values * int(call.input.element_size())


def dense(call: Call) -> Call:
    """Return a call whose weights, states and resets are dense, and aligned for the kernels."""
    resets = None if call.resets is None else call.resets.contiguous()
    weights = [_dense(weight) for weight in call.weights]
    call = call._replace(weights=weights, resets=resets)
    return call.each_state(_dense)


def dense_results(results: Results) -> Results:
    """Return gradients of results that are dense, and aligned for the kernels."""
    found = [None if t is None else _dense(t) for t in results.flat()]
    return Results.of(found, len(results.last))


def _dense(tensor: Tensor) -> Tensor:
    """Make a tensor dense, its memory aligned as pairs of numbers are read."""
    tensor = tensor.contiguous()
    is_aligned = tensor.data_ptr() % (2 * tensor.element_size()) == 0
    return tensor if is_aligned else tensor.clone()


# How torch names the precision of float32 products; others have one alone.
_PRECISIONS = {"tf32": "tf32", "fp32": "ieee"}
_as_it_is = contextlib.nullcontext()
_precision = threading.Lock()


def products_in(math: str, input: Tensor) -> contextlib.AbstractContextManager[None]:
    """Let torch's products have the precision that the time loop has.

    A region of autocast, in which backward may stand where forward did not, would round them. torch
    has one switch for all products of the process. It is turned only where it stands
    otherwise, and back as soon as these products are on their way.
    """
    wanted = _PRECISIONS.get(math)
    if wanted is not None and torch.backends.cuda.matmul.fp32_precision != wanted:
        return _switched(wanted, input)
    return without_autocast(input) if torch._C._is_any_autocast_enabled() else _as_it_is


@contextlib.contextmanager
def _switched(precision: str, input: Tensor) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    is_autocast = torch._C._is_any_autocast_enabled()
    with without_autocast(input) if is_autocast else _as_it_is, _precision:
        before = matmul.fp32_precision
        matmul.fp32_precision = precision
        try:
            yield
        finally:
            matmul.fp32_precision = before
