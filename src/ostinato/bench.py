"""What a user would gain: our layer beside torch.nn's, for one shape, on this machine.

`compare` is how every figure of this project is measured; `benchmarks/` builds on it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ostinato import nn
from ostinato.cells import LAYERS

# A sample is at least this long, so that the clock's resolution does not show, and follows so much
# that is not timed: threads that slept need milliseconds until they all run.
_SAMPLE, _WARM = 2e-3, 10e-3
_FEWEST_ROUNDS, _MOST_ROUNDS = 7, 101


def compare(
    calls: Mapping[str, Callable[[], Any]],
    seconds: float,
    progress: Callable[[int, int], None] | None = None,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Time several calls in turns.

    In each round everyone is timed once, one right after the other, so that a disturbance of the
    machine falls on all. Before its sample each runs for 10 ms, one call at least, that is not
    timed.

    Args:
        calls: what is timed, by name.
        seconds: how long to go on, for each of them; seven rounds at least.
        progress: is told (rounds done, rounds in all).
        pause: seconds before each turn, in which the threads of the one before go to sleep. Where
            libraries with threads of their own are compared, these spin for some milliseconds.

    Returns:
        Seconds per call, one for each round, by name.

    Raises:
        ValueError: there is nothing to time.

    Example:
        >>> samples = compare({"a": lambda: None, "b": lambda: None}, seconds=0.001)
        >>> len(samples["a"]) == len(samples["b"]) >= 7
        True
    """
    if not calls:
        raise ValueError("calls: expected at least one, got none")
    one = {name: min(_seconds(call, 1) for _ in range(3)) for name, call in calls.items()}
    repeats = {name: max(1, int(_SAMPLE / max(duration, 1e-9))) for name, duration in one.items()}
    warm = {name: max(1, int(_WARM / max(duration, 1e-9))) for name, duration in one.items()}
    round_time = sum(one[name] * (repeats[name] + warm[name]) + pause for name in calls)
    rounds = int(seconds * len(calls) / round_time)
    rounds = min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, rounds))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        if progress:
            progress(done, rounds)
        for name, call in calls.items():
            time.sleep(pause)
            _seconds(call, warm[name])
            samples[name].append(_seconds(call, repeats[name]))
    if progress:
        progress(rounds, rounds)
    return samples


def _seconds(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def ratio(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile of theirs / ours, round by round.

    Args:
        theirs: seconds per round.
        ours: seconds of the same rounds.

    Returns:
        The three ratios; above 1 ours is faster.

    Raises:
        ValueError: the numbers of rounds differ.

    Example:
        >>> ratio([2.0, 4.0, 6.0], [1.0, 1.0, 2.0])
        (2.0, 3.0, 4.0)
    """
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    quarter = len(ratios) // 4
    return ratios[quarter], statistics.median(ratios), ratios[-1 - quarter]


class Shape(NamedTuple):
    """A layer and its input, as the command line gives them.

    `cell` is "rnn", "gru" or "lstm"; `steps` 0 means one step of RNNCell, GRUCell or LSTMCell.
    """

    cell: str
    input_size: int
    hidden_size: int
    batch: int
    steps: int
    layers: int = 1
    bidirectional: bool = False
    train: bool = False


def least_bytes(shape: Shape) -> int:
    """Return how much memory a comparison needs at the very least.

    Args:
        shape: the layer and its input.

    Returns:
        Bytes of both layers' weights, in training with gradients, of the input and both outputs.

    Example:
        >>> least_bytes(Shape("rnn", 1, 1, batch=1, steps=1))
        44
    """
    gates, directions = LAYERS[shape.cell].gates, 1 + shape.bidirectional
    wide = directions * shape.hidden_size
    inputs = shape.input_size + (shape.layers - 1) * wide
    weights = gates * wide * (inputs + shape.layers * (shape.hidden_size + 2))
    rows = max(1, shape.steps) * shape.batch
    return 4 * (2 * weights * (1 + shape.train) + rows * (shape.input_size + 2 * wide))


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Say whether an error is that of an allocation.

    Args:
        error: what a call raised.

    Returns:
        Whether it is Python's, ours or that of torch's allocator, which is a plain RuntimeError.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("sizes differ"))
        (True, False)
    """
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def is_doubtful(quartiles: tuple[float, float, float]) -> bool:
    """Say whether the rounds of a comparison differ so much that its median says little.

    Args:
        quartiles: as `ratio` returns them.

    Returns:
        Whether the upper quartile is more than 1.5 times the lower one.

    Example:
        >>> is_doubtful((1.9, 2.0, 2.1)), is_doubtful((47.0, 112.0, 2517.0))
        (False, True)
    """
    low, _, high = quartiles
    return high > 1.5 * low


class Gain(NamedTuple):
    """Median microseconds of both, and the quartiles of torch.nn / ours."""

    torch_us: float
    ostinato_us: float
    ratio: tuple[float, float, float]
    difference: float  # the largest between the two outputs


def gain(
    shape: Shape, seconds: float = 1.0, progress: Callable[[int, int], None] | None = None
) -> Gain:
    """Compare our layer with torch.nn's, float32, after their outputs were compared.

    Args:
        shape: the layer and its input.
        seconds: how long to measure each.
        progress: is told (rounds done, rounds in all).

    Returns:
        Times and ratio.

    Raises:
        ValueError: an unknown cell, or a size out of range.
        AssertionError: the outputs differ by more than rounding.

    Example:
        >>> gain(Shape("gru", 3, 4, batch=1, steps=5), seconds=0.001).difference < 1e-5
        True
    """
    if shape.cell not in LAYERS:
        raise ValueError(f"cell: expected one of {', '.join(LAYERS)}, got {shape.cell!r}")
    if shape.batch < 1 or shape.steps < 0:
        raise ValueError(f"expected batch >= 1 and steps >= 0, got {shape.batch}, {shape.steps}")
    name, options = LAYERS[shape.cell].layer, {}
    if shape.steps:
        options = {"num_layers": shape.layers, "bidirectional": shape.bidirectional}
    elif shape.layers != 1 or shape.bidirectional:
        raise ValueError("layers and bidirectional: expected steps >= 1 with them, got a cell")
    else:
        name += "Cell"
    if not hasattr(torch.nn, name):
        raise ValueError(f"cell: expected one that torch.nn has, got {shape.cell!r}")
    theirs = getattr(torch.nn, name)(shape.input_size, shape.hidden_size, **options)
    ours = getattr(nn, name)(shape.input_size, shape.hidden_size, **options)
    ours.load_state_dict(theirs.state_dict())
    lead = (shape.steps, shape.batch) if shape.steps else (shape.batch,)
    x = torch.randn(*lead, shape.input_size)
    with torch.no_grad():
        expected, actual = _first(theirs(x)), _first(ours(x))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    calls = {"theirs": _call(theirs, x, shape.train), "ours": _call(ours, x, shape.train)}
    with torch.set_grad_enabled(shape.train):
        samples = compare(calls, seconds, progress)
    theirs_s, ours_s = samples["theirs"], samples["ours"]
    return Gain(
        statistics.median(theirs_s) * 1e6,
        statistics.median(ours_s) * 1e6,
        ratio(theirs_s, ours_s),
        float((actual - expected).abs().max()),
    )


def _first(output: Any) -> torch.Tensor:
    """The sequence, or a cell's next h."""
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, torch.Tensor)
    return first


def _call(module: torch.nn.Module, x: torch.Tensor, train: bool) -> Callable[[], Any]:
    if not train:
        return lambda: module(x)

    def step() -> None:
        for parameter in module.parameters():
            parameter.grad = None
        _first(module(x)).sum().backward()  # type: ignore[no-untyped-call]

    return step
