"""The specification: what each recurrent cell computes, and the plain loop over packed rows.

Every function runs on NumPy arrays and on torch tensors alike, in any float or complex dtype that
the library itself has, and imports neither: the namespace is found from the array. Nothing is
written in place, so torch's autograd differentiates through it as often as asked, also under
`torch.func.vmap`.
Equation numbers refer to docs/math.md.

A long file, since the specification is to be read in one place.

Legend: T steps, B batch, N packed rows (N = sum of batch_sizes), I input, H hidden,
O output of a step (proj_size, or H), D directions, G gates (1 RNN, 3 GRU, 4 LSTM).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from ostinato.cells import Cell, cell_of, find

# One array of one library. There is no common base class to name, and a Protocol wide enough for
# both libraries would say no more than this.
Array = Any

_State = tuple[Array, ...]
_Step = Callable[[Array, Array, _State, Array | None], _State]


def namespace(array: Array) -> Any:
    """Return the module whose functions take `array`: numpy, torch, or any that speaks their names.

    Args:
        array: a NumPy array, a torch tensor (any subclass), or an array of the array API.

    Returns:
        The array's module.

    Raises:
        TypeError: `array` belongs to no array library.

    Example:
        >>> import numpy
        >>> namespace(numpy.zeros(3)).__name__
        'numpy'
    """
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):  # torch's compiler sees no further
        return torch
    return _library(type(array))  # type: ignore[arg-type]


@lru_cache
def _library(kind: type) -> Any:
    """Return the library of torch tensors and NumPy 1 arrays: of the class, or of a base of it."""
    for base in kind.__mro__:
        module = sys.modules.get(base.__module__.partition(".")[0])
        if hasattr(module, "tanh") and hasattr(module, "concatenate"):
            return module
    raise TypeError(f"expected a NumPy array or a torch tensor, got {kind.__name__}")


def sigmoid(x: Array) -> Array:
    """Logistic function.

    sigmoid(x) = 1 / (1 + exp(-x)) = (1 + tanh(x / 2)) / 2

    Args:
        x: any shape.

    Returns:
        Same shape and dtype as `x`.

    Example:
        >>> import numpy
        >>> sigmoid(numpy.array([-1000.0, 0.0, 1000.0])).tolist()
        [0.0, 0.5, 1.0]
    """
    xp = namespace(x)
    if hasattr(xp, "sigmoid"):  # torch has it as one operator
        return xp.sigmoid(x)
    # exp(-x) overflows for large |x| and turns gradients into inf * 0 = NaN; tanh saturates.
    return 0.5 * xp.tanh(0.5 * x) + 0.5


def relu(x: Array) -> Array:
    """Rectifier.

    relu(x) = max(x, 0); NaN stays NaN and the derivative at 0 is 0, as in torch.

    Args:
        x: any shape, a real dtype.

    Returns:
        Same shape and dtype as `x`.

    Raises:
        TypeError: `x` is complex; complex numbers have no order.

    Example:
        >>> import numpy
        >>> relu(numpy.array([-2.0, 0.0, 3.0])).tolist()
        [0.0, 0.0, 3.0]
    """
    # NumPy would compare complex numbers by their real parts and answer something.
    if "complex" in str(x.dtype):
        raise TypeError(f"relu: expected a real dtype, got {x.dtype}")
    xp = namespace(x)
    # x <= 0 is false for NaN, so NaN goes through; a maximum would split the gradient at 0.
    return xp.where(x <= 0, xp.zeros_like(x), x)


def rnn_step(gates_x: Array, gates_h: Array, nonlinearity: str = "tanh") -> Array:
    """One RNN step (docs/math.md, equation 2).

    h' = phi(W_ih x + b_ih + W_hh h + b_hh), phi being tanh or relu.

    Args:
        gates_x: input @ weight_ih.T + bias_ih, shape (batch, hidden).
        gates_h: h @ weight_hh.T + bias_hh, same shape.
        nonlinearity: "tanh" or "relu".

    Returns:
        Next state, shape (batch, hidden).

    Raises:
        ValueError: `nonlinearity` is neither "tanh" nor "relu".
        TypeError: relu of a complex number.

    Example:
        >>> import numpy
        >>> rnn_step(numpy.array([[1.0, -1.0]]), numpy.array([[1.0, -1.0]]), "relu").tolist()
        [[2.0, 0.0]]

    Source: Elman 1990, doi:10.1207/s15516709cog1402_1, with torch's two biases.
    """
    a = gates_x + gates_h  # (B, H)
    if nonlinearity == "tanh":
        return namespace(a).tanh(a)
    if nonlinearity == "relu":
        return relu(a)
    raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")


def gru_step(gates_x: Array, gates_h: Array, h: Array) -> Array:
    """One GRU step (docs/math.md, equations 7-10).

    r, z = sigmoid(x-side + h-side); n = tanh(x-side + r * h-side); h' = (1 - z) * n + z * h.

    Args:
        gates_x: input @ weight_ih.T + bias_ih, shape (batch, 3 * hidden), order r, z, n.
        gates_h: h @ weight_hh.T + bias_hh, same shape and order.
        h: previous state, shape (batch, hidden).

    Returns:
        Next state, shape (batch, hidden).

    Example:
        >>> import numpy
        >>> gru_step(numpy.zeros((1, 3)), numpy.zeros((1, 3)), numpy.ones((1, 1))).tolist()
        [[0.5]]

    Source: Cho et al. 2014, arXiv:1406.1078v1, reset after the matrix product as in cuDNN.
    """
    rz_x, n_x = _cut(gates_x, 2 * h.shape[-1])
    rz_h, n_h = _cut(gates_h, 2 * h.shape[-1])
    r, z = _gates(sigmoid(rz_x + rz_h), 2)  # both in one: fewer operators
    n = namespace(h).tanh(_add_product(n_x, r, n_h))
    return _between(n, h, z)


def lstm_step(
    gates_x: Array, gates_h: Array, c: Array, weight_hr: Array | None = None
) -> tuple[Array, Array]:
    """One LSTM step (docs/math.md, equations 16-22).

    i, f, o = sigmoid(x-side + h-side); g = tanh(x-side + h-side);
    c' = f * c + i * g; h' = o * tanh(c'), then W_hr h' if there is a projection.

    Args:
        gates_x: input @ weight_ih.T + bias_ih, shape (batch, 4 * hidden), order i, f, g, o.
        gates_h: h @ weight_hh.T + bias_hh, same shape and order.
        c: previous cell state, shape (batch, hidden).
        weight_hr: projection, shape (proj_size, hidden), or None.

    Returns:
        Next state, shape (batch, proj_size or hidden), and next cell state, shape (batch, hidden).

    Example:
        >>> import numpy
        >>> h, c = lstm_step(numpy.zeros((1, 4)), numpy.zeros((1, 4)), numpy.ones((1, 1)))
        >>> c.tolist()
        [[0.5]]

    Source: Hochreiter and Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735, with the forget gate of
    Gers et al. 2000 and without peepholes; projection: Sak et al. 2014, arXiv:1402.1128.
    """
    xp = namespace(c)
    a_i, a_f, a_g, a_o = _gates(gates_x + gates_h, 4)
    i = sigmoid(a_i)
    f = sigmoid(a_f)
    g = xp.tanh(a_g)
    o = sigmoid(a_o)
    c = _add_product(f * c, i, g)
    h = o * xp.tanh(c)
    return (h if weight_hr is None else h @ weight_hr.T), c


def layer(
    cell: str,
    input: Array,
    batch_sizes: Iterable[int] | Array | None,
    h_0: Array | None,
    c_0: Array | None,
    weights: Sequence[Array],
    *,
    has_biases: bool,
    bidirectional: bool,
) -> tuple[Array, Array, Array | None]:
    """One recurrent layer over a padded or packed batch (docs/math.md, equations 31-34).

    state_t[:n_t] = step(input_t, state_{t-1}[:n_t]), n_t rows being active at step t; the other
    rows keep their state. The reverse direction takes t downwards.

    Args:
        cell: "rnn_tanh", "rnn_relu", "gru" or "lstm".
        input: (T, B, I), or packed (N, I) if `batch_sizes` is given.
        batch_sizes: None, or the number of active rows at each of the T steps, never increasing
            and at most B (a list, a NumPy array or a CPU tensor).
        h_0: (D, B, O), or None for zeros.
        c_0: (D, B, H), or None for zeros; LSTM only.
        weights: for each direction weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr]; a
            projected LSTM is one whose weights end in weight_hr, shape (O, H).
        has_biases: whether `weights` holds bias_ih and bias_hh.
        bidirectional: whether `weights` holds a second, reverse direction.

    Returns:
        output, (T, B, D * O) or packed (N, D * O); h_n, (D, B, O); c_n, (D, B, H), or None where
        the cell is no LSTM. With T = 0 the output is empty and the states are the initial ones.

    Raises:
        ValueError: an unknown `cell`, a number of weights that does not fit it, or `batch_sizes`
            that increase or do not add up to the rows of `input`.

    Example:
        >>> import numpy
        >>> weights = [numpy.ones((2, 3)), numpy.zeros((2, 2))]
        >>> output, h_n, c_n = layer("rnn_relu", numpy.ones((5, 1, 3)), None, None, None, weights,
        ...                          has_biases=False, bidirectional=False)
        >>> output.shape, h_n.tolist(), c_n
        ((5, 1, 2), [[[3.0, 3.0]]], None)

    Source: torch.nn.RNN, GRU and LSTM; packed rows as in torch.nn.utils.rnn.PackedSequence.
    """
    output, last, _ = states(
        cell,
        input,
        batch_sizes,
        (h_0, c_0),
        weights,
        has_biases=has_biases,
        bidirectional=bidirectional,
    )
    return output, last[0], last[1] if len(last) > 1 else None


def states(  # noqa: D417
    cell: str,
    input: Array,
    batch_sizes: Iterable[int] | Array | None,
    initial: Sequence[Array | None],
    weights: Sequence[Array],
    *,
    has_biases: bool,
    bidirectional: bool,
    lengths: Array | None = None,
    resets: Array | None = None,
    reset_to: Sequence[Array | None] = (),
) -> tuple[Array, _State, _State]:
    """`layer` by a cell's states, with rows that end early or begin anew.

    A row is cut before each step at which `resets` says so. Each piece is a sequence of its own in
    both directions: where a direction enters a piece over a cut, the state is `reset_to` instead of
    what the steps before brought. Past its length a row keeps its state, and its output is zero.
    All other arguments are as in `layer`.

    Args:
        initial: h_0 and the cell's other states, (D, B, O) and (D, B, H), each None for zeros; more
            than the cell has are not looked at.
        lengths: (B,), steps of each row of a padded batch, or None.
        resets: (T, B) or packed (N,), bool, or None.
        reset_to: shaped as `initial`.

    Returns:
        output as in `layer`; the last states, shaped as `initial`; and all states behind h after
        every step, (T, B, D * H) or (N, D * H), zero past a row's end.

    Raises:
        ValueError: as in `layer`.

    Example:
        >>> import numpy
        >>> weights = [numpy.ones((1, 1)), numpy.ones((1, 1))]
        >>> output, (h_n,), _ = states(
        ...     "rnn_relu", numpy.ones((4, 1, 1)), None, (None,), weights, has_biases=False,
        ...     bidirectional=False, resets=numpy.array([[False], [False], [True], [False]]))
        >>> output.ravel().tolist()
        [1.0, 2.0, 1.0, 2.0]

    Source: torch.nn.RNN, GRU and LSTM.
    """
    xp = namespace(input)
    given = next((state for state in initial if state is not None), None)
    rows, sizes, batch = _packed(input, batch_sizes, given)
    flags = None if resets is None else resets.reshape((rows.shape[0],))
    visited, ends = [], []
    for d, weight in enumerate(directions(cell, weights, has_biases, bidirectional)):
        state, anew = (
            _initial(cell_of(cell), weight, batch, [None if s is None else s[d] for s in given])
            for given in (initial, reset_to)
        )
        cuts = _Cuts(lengths, flags, anew)
        found, state = _run(cell, weight, rows, sizes, state, cuts, reverse=d == 1)
        visited.append(found)
        ends.append(state)
    # (N, D * O) and (N, D * H)
    every = [xp.concatenate(list(each), -1) for each in zip(*visited, strict=True)]
    if batch_sizes is None:
        every = [each.reshape((len(sizes), batch, each.shape[-1])) for each in every]
    last = tuple(xp.stack(list(each)) for each in zip(*ends, strict=True))
    return every[0], last, tuple(every[1:])


def one_step(
    cell: str,
    input: Array,
    state: Sequence[Array | None],
    weights: Sequence[Array],
    *,
    has_biases: bool,
) -> _State:
    """One step of one direction (docs/math.md, equations 1 to 22).

    Args:
        cell: as in `layer`.
        input: (B, I).
        state: h, (B, O), and the cell's other states, (B, H), each None for zeros.
        weights: of one direction, as in `layer`.
        has_biases: as in `layer`.

    Returns:
        The next states.

    Example:
        >>> import numpy
        >>> weights = [numpy.ones((2, 3)), numpy.zeros((2, 2))]
        >>> one_step("rnn_relu", numpy.ones((1, 3)), (None,), weights, has_biases=False)
        (array([[3., 3.]]),)
    """
    (weight,) = directions(cell, weights, has_biases, False)
    kind = cell_of(cell)
    before = _initial(kind, weight, input.shape[0], state)
    gates_x = _of_input(kind, weight, input)
    gates_h = linear(before[0], weight.hh, weight.bias_hh)
    return step_of(kind)(gates_x, gates_h, before, weight.hr)


class Weights(NamedTuple):
    """The parameters of one direction."""

    ih: Array  # (G * H, I)
    hh: Array  # (G * H, O)
    bias_ih: Array | None  # (G * H,)
    bias_hh: Array | None
    hr: Array | None  # (O, H); of an own cell its numbers per unit, (P, H)


class _Cuts(NamedTuple):
    """Where the rows of one direction end early or begin anew."""

    lengths: Array | None  # (B,)
    resets: Array | None  # (N,)
    state: _State  # of a row that begins anew


def _gates(a: Array, count: int) -> list[Array]:
    """Cut (..., count * H) into `count` arrays (..., H)."""
    if hasattr(a, "chunk"):  # torch differentiates it as one operator
        return a.chunk(count, -1)  # type: ignore[no-any-return]
    hidden = a.shape[-1] // count
    return [a[..., k * hidden : (k + 1) * hidden] for k in range(count)]


def _add_product(a: Array, b: Array, c: Array) -> Array:
    """A + b * c."""
    xp = namespace(a)
    return xp.addcmul(a, b, c) if hasattr(xp, "addcmul") else a + b * c


def _between(a: Array, b: Array, z: Array) -> Array:
    """(1 - z) * a + z * b."""
    xp = namespace(a)
    return xp.lerp(a, b, z) if hasattr(xp, "lerp") else (1 - z) * a + z * b


def _cut(a: Array, at: int) -> tuple[Array, Array]:
    """Cut (..., n) into (..., at) and (..., n - at)."""
    if hasattr(a, "split_with_sizes"):
        first, rest = a.split_with_sizes([at, a.shape[-1] - at], -1)
        return first, rest
    return a[..., :at], a[..., at:]


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """One side of equation 1: x @ weight.T + bias.

    Args:
        x: (N, I).
        weight: (O, I).
        bias: (O,), or None.

    Returns:
        (N, O).

    Example:
        >>> import numpy
        >>> linear(numpy.ones((1, 2)), numpy.ones((3, 2)), numpy.ones(3)).tolist()
        [[3.0, 3.0, 3.0]]
    """
    if bias is None:
        return x @ weight.T
    xp = namespace(x)
    if hasattr(xp, "addmm"):  # torch has it as one operator
        return xp.addmm(bias, x, weight.T)
    return x @ weight.T + bias


def _packed(
    input: Array, batch_sizes: Iterable[int] | Array | None, states: Array | None
) -> tuple[Array, list[int], int]:
    """Return packed rows (N, I), the active rows of each step, and B."""
    if batch_sizes is None:
        # A padded batch is a packed batch in which no row ends early.
        steps, batch, size = input.shape
        return input.reshape((steps * batch, size)), [batch] * steps, batch
    sizes = [int(n) for n in batch_sizes]
    batch = states.shape[1] if states is not None else max(sizes, default=0)
    # A wrong entry would not fail below but drop rows, or broadcast one state over many.
    if any(a < b for a, b in pairwise([batch, *sizes, 0])):
        raise ValueError(
            f"batch_sizes: expected sizes that fall from at most {batch} to at least 0, got {sizes}"
        )
    if sum(sizes) != input.shape[0]:
        raise ValueError(
            f"batch_sizes: expected a sum of {input.shape[0]}, the rows of input, got {sum(sizes)}"
        )
    return input, sizes, batch


def directions(
    cell: str, weights: Sequence[Array], has_biases: bool, bidirectional: bool
) -> list[Weights]:
    """Give each array of the flat sequence its name."""
    kind = find(cell)
    if kind is None:
        raise ValueError(f"cell: expected one of {', '.join(STEPS)}, got {cell!r}")
    directions = 2 if bidirectional else 1
    count, rest = divmod(len(weights), directions)
    plain = (4 if has_biases else 2) + (kind.parameters > 0)
    projected = kind.projects and count == plain + 1
    if rest or not (count == plain or projected):
        extra = f" or {plain + 1}" if kind.projects else ""
        raise ValueError(
            f"weights: expected {plain}{extra} per direction for {directions} direction(s) of "
            f"{cell}, got {len(weights)}"
        )
    named = []
    for d in range(directions):
        ih, hh, *rest_of = weights[d * count : (d + 1) * count]
        bias_ih, bias_hh = rest_of[:2] if has_biases else (None, None)
        last = rest_of[-1] if projected or kind.parameters else None
        named.append(Weights(ih, hh, bias_ih, bias_hh, last))
    return named


def _of_input(kind: Cell, weight: Weights, rows: Array) -> Array:
    """Return the input's side of equation 1, and behind it what drives each step."""
    if not kind.drives:
        return linear(rows, weight.ih, weight.bias_ih)
    size = weight.ih.shape[1]
    gates_x = linear(rows[..., :size], weight.ih, weight.bias_ih)
    return namespace(rows).concatenate([gates_x, rows[..., size:]], -1)


def _initial(kind: Cell, weight: Weights, batch: int, state: Sequence[Array | None]) -> _State:
    """Return the initial state of a direction, zeros where absent."""

    def zeros(size: int) -> Array:
        # Made from a weight, so that dtype, device and subclass are right in every library; a sum,
        # so that a weight without elements has a zero too.
        xp = namespace(weight.hh)
        return xp.broadcast_to(xp.zeros_like(weight.hh[:1, :1]).sum(), (batch, size))

    # h is as wide as an output; of an own cell all others lie in one array.
    hidden = weight.hh.shape[1] if kind.is_own else weight.hh.shape[0] // kind.gates
    rest = [kind.behind * hidden] * (len(kind.states) - 1)
    given = (*state, *[None] * len(kind.states))
    return tuple(
        zeros(size) if s is None else s
        for size, s in zip((weight.hh.shape[1], *rest), given, strict=False)
    )


# The steps under the one signature that loops call: gates_x, gates_h, state, weight_hr.
STEPS: dict[str, _Step] = {
    "rnn_tanh": lambda gates_x, gates_h, state, hr: (rnn_step(gates_x, gates_h, "tanh"),),
    "rnn_relu": lambda gates_x, gates_h, state, hr: (rnn_step(gates_x, gates_h, "relu"),),
    "gru": lambda gates_x, gates_h, state, hr: (gru_step(gates_x, gates_h, state[0]),),
    "lstm": lambda gates_x, gates_h, state, hr: lstm_step(gates_x, gates_h, state[1], hr),
}


def step_of(kind: Cell) -> _Step:
    """Return the step of a cell under that signature."""
    run = kind.step
    if run is None:
        return STEPS[kind.name]

    def step(gates_x: Array, gates_h: Array, state: _State, per_unit: Array | None) -> _State:
        h, *others = state
        behind = _gates(others[0], kind.behind) if others else []
        x = _gates(gates_x, kind.input_gates + kind.drives)
        rows = [] if per_unit is None else [per_unit[k] for k in range(kind.parameters)]
        gates = _gates(gates_h, kind.gates) if kind.gates else []
        x, drives = x[: kind.input_gates], x[kind.input_gates :]
        h, *behind = run(x, gates, (h, *behind), rows, drives)
        return (h, namespace(h).concatenate(list(behind), -1)) if behind else (h,)

    return step


def _run(
    cell: str,
    weight: Weights,
    rows: Array,
    sizes: list[int],
    state: _State,
    cuts: _Cuts,
    *,
    reverse: bool,
) -> tuple[_State, _State]:
    """Drive the cell along the packed rows (equations 31-33).

    Returns the packed states of all steps, (N, O) and for LSTM (N, H), and the last ones.
    """
    xp = namespace(rows)
    kind = cell_of(cell)
    step = step_of(kind)
    starts = list(accumulate(sizes, initial=0))
    gates_x = _of_input(kind, weight, rows)  # (N, G * H)
    visited = []
    times = range(len(sizes))
    for t in reversed(times) if reverse else times:
        n = sizes[t]
        # Forward a reset lies before its step, in reverse behind the step before it.
        entered = t + 1 if reverse else t
        if cuts.resets is not None and entered < len(sizes):
            state = _begin_anew(xp, cuts, state, entered, starts[entered], sizes[entered])
        is_whole = n == state[0].shape[0]
        active = state if is_whole else tuple(s[:n] for s in state)
        gates_h = linear(active[0], weight.hh, weight.bias_hh)  # (n, G * H)
        after = step(gates_x[starts[t] : starts[t] + n], gates_h, active, weight.hr)
        shown = after
        if cuts.lengths is not None:
            lives = (cuts.lengths[:n] > t)[:, None]
            after = tuple(xp.where(lives, a, s) for a, s in zip(after, active, strict=True))
            shown = tuple(xp.where(lives, a, xp.zeros_like(a)) for a in after)
        visited.append(shown)
        # Rows past n have ended (forward) or not begun (reverse): they keep their state.
        if not is_whole:
            after = tuple(xp.concatenate([a, s[n:]]) for a, s in zip(after, state, strict=True))
        state = after
    if reverse:
        visited.reverse()
    # The empty last piece is what T = 0 has to show.
    steps = zip(*visited, tuple(s[:0] for s in state), strict=True)
    return tuple(xp.concatenate(list(pieces)) for pieces in steps), state


def _begin_anew(xp: Any, cuts: _Cuts, state: _State, t: int, start: int, n: int) -> _State:
    """Replace the states of the rows that are cut between t - 1 and t."""
    assert cuts.resets is not None
    flags = cuts.resets[start : start + n]  # (n,)
    if cuts.lengths is not None:
        flags = flags & (cuts.lengths[:n] > t)
    cut = flags[:, None]
    return tuple(
        xp.concatenate([xp.where(cut, new[:n], s[:n]), s[n:]])
        for new, s in zip(cuts.state, state, strict=True)
    )
