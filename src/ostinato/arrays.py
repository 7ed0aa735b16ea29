"""The arrays of a call: one table, from which everything that lists them derives.

The schemas of the operators, `ostinato.call.Call`, the check, the transforms' rules and what the
engines are given take names, order and shapes from here; csrc/cpu/engine.h states the same for the
CPU engine, and a test holds both equal.

Legend: T steps, B batch, N packed rows (T * B of a padded batch), I input, H hidden, O output of a
step (proj_size, or H), D directions, E states behind h (several of an own cell, beside each other),
n numbers for each unit that drive a step of an own cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from ostinato.cells import CELLS

# h, and what further states any cell has.
STATES = max((cell.states for cell in CELLS.values()), key=len)


@dataclass(frozen=True)
class Array:
    """One array of a call."""

    name: str  # in the operators' schemas and in messages
    # "N" (T, B of a padded batch), "D*B", "B" or "T"; nothing for an array that has no rows
    rows: str
    width: str  # how many numbers a row has: "I+n*H", "O", "E*H", "D*O", "D*E*H" or "1"
    role: str  # "input", "state", "weight", "mask", "result" or "kept"
    type: str = "Tensor?"  # in a schema

    @property
    def is_differentiable(self) -> bool:
        """Whether it can have a gradient."""
        return self.role in ("input", "state", "weight")

    @property
    def row_dim(self) -> int | None:
        """The dimension in which a batch's rows lie beside each other, or None."""
        if self.rows in ("", "T"):
            return None
        return -1 if self.width == "1" else -2


def _of_states(name: str, role: str, rows: str = "D*B", width: str = "") -> tuple[Array, ...]:
    """Return an array for each state: h as wide as the output, the other as the layer."""
    return tuple(
        Array(name.format(state), rows, width + ("E*H" if k else "O"), role)
        for k, state in enumerate(STATES)
    )


INPUT = Array("input", "N", "I+n*H", "input", "Tensor")
BATCH_SIZES = Array("batch_sizes", "T", "1", "mask")
INITIAL = _of_states("{}_0", "state")
WEIGHTS = Array("weights", "", "", "weight", "Tensor[]")
LENGTHS = Array("lengths", "B", "1", "mask")
RESETS = Array("resets", "N", "1", "mask")
RESET_TO = _of_states("reset_{}", "state")

OUTPUT = Array("output", "N", "D*O", "result", "Tensor")
LAST = tuple(replace(a, type="Tensor") for a in _of_states("{}_n", "result"))
# Of the states behind h, which the output has: the state after every step.
EVERY = tuple(
    replace(a, name=a.name.replace("c_all", "cells"), type="Tensor")
    for a in _of_states("{}_all", "result", "N", "D*")[1:]
)
RESERVE = Array("reserve", "", "", "kept", "Tensor")


@dataclass(frozen=True)
class Option:
    """What an operator is told beside arrays."""

    name: str
    type: str = "bool"
    is_differentiable: bool = False


# What both operators take of a call, in order.
PARAMETERS: tuple[Array | Option, ...] = (
    INPUT,
    BATCH_SIZES,
    Option("batch", "SymInt"),
    *INITIAL,
    WEIGHTS,
    Option("cell", "str"),
    Option("has_biases"),
    Option("bidirectional"),
    Option("recompute"),
    LENGTHS,
    RESETS,
    *RESET_TO,
)
RESULTS = (OUTPUT, *LAST, *EVERY, RESERVE)
# Of input, initial states, states of resets and weights.
GRADIENTS = Array("grads", "", "", "result", "Tensor[]")


@cache
def gradient_of(array: Array) -> Array:
    """Return the gradient of an array."""
    return replace(array, name=f"grad_{array.name}", type="Tensor?")


def schema(
    name: str, parameters: Sequence[Array | Option], results: Sequence[Array] = RESULTS
) -> str:
    """Write an operator's schema.

    Example:
        >>> schema("double", [INPUT, Option("is_fast")], [OUTPUT])
        'double(Tensor input, bool is_fast) -> (Tensor output)'
    """
    taken, returned = (
        ", ".join(f"{each.type} {each.name}" for each in group) for group in (parameters, results)
    )
    return f"{name}({taken}) -> ({returned})"


@cache
def arguments(states: int, weights: int) -> tuple[Array, ...]:
    """List the arrays of `Call.arrays`, by the number of states and of weights.

    Example:
        >>> [array.name for array in arguments(1, 2)][:4]
        ['batch_sizes', 'lengths', 'resets', 'input']
    """
    masks = BATCH_SIZES, LENGTHS, RESETS
    return *masks, INPUT, *INITIAL[:states], *RESET_TO[:states], *[WEIGHTS] * weights


@cache
def backward_arguments(states: int, weights: int) -> tuple[Array, ...]:
    """List the arrays that a gradient takes: gradients, two results, then `arguments`."""
    return *arrived(states), OUTPUT, RESERVE, *arguments(states, weights)


@cache
def arrived(states: int) -> tuple[Array, ...]:
    """List the gradients of the results of a cell with so many states."""
    return tuple(map(gradient_of, (OUTPUT, *LAST[:states], *EVERY[: states - 1])))
