"""Arithmetic in single assignments: each value is written once, and what is equal is one value.

The ops are those of a graph (ostinato.own.graph; a leaf `x` is the load `x`, a number `number`, a
choice `select`) and those that the engine has beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

# What reads an array, by the name of the load; `index` says which.
LOADS = ("gate", "x", "h", "state", "parameter", "drive", "saved", "output", "grad")
# What writes one; its argument is the value.
STORES = ("next", "save", "slot", "to_state", "to_drive")


class Instruction(NamedTuple):
    """One load, number, operation or store."""

    op: str
    args: tuple[int, ...] = ()  # places of earlier instructions
    # Of a load or a store; the exponent of a power.
    index: int | None = None  # type: ignore[assignment]
    number: float | None = None


class Arithmetic:
    """Values under construction; a value is known by its place in `items`."""

    def __init__(self) -> None:
        self.items: list[Instruction] = []
        self._places: dict[tuple[str, tuple[int, ...], int | None, str], int] = {}

    def value(
        self, op: str, *args: int, index: int | None = None, number: float | None = None
    ) -> int:
        """Return the place of an operation as it is."""
        # By the hexadecimal digits, which tell 0 from -0.
        key = (op, args, index, "" if number is None else number.hex())
        place = self._places.setdefault(key, len(self.items))
        if place == len(self.items):
            self.items.append(Instruction(op, args, index, number))
        return place

    def number(self, number: float) -> int:
        """Return the place of a number."""
        return self.value("number", number=float(number))

    def number_at(self, place: int) -> float | None:
        """Return the number that stands at a place, if one does."""
        return self.items[place].number

    def apply(self, op: str, *args: int, index: int | None = None) -> int:
        """Return the place of an operation, or of what is equal to it and simpler."""
        folded = self._folded(op, args)
        if folded is not None:
            return self.number(folded)
        simpler = self._simpler(op, args)
        return self.value(op, *args, index=index) if simpler is None else simpler

    def power(self, base: int, exponent: int) -> int:
        """Return base ** exponent as products, and one division where the exponent is negative."""
        if exponent < 0:
            return self.apply("div", self.number(1.0), self.power(base, -exponent))
        if exponent == 0:
            return self.number(1.0)
        half = self.power(base, exponent // 2) if exponent > 1 else base
        if exponent == 1:
            return base
        square = self.apply("mul", half, half)
        return self.apply("mul", square, base) if exponent % 2 else square

    def _folded(self, op: str, args: tuple[int, ...]) -> float | None:
        if op not in _FOLDS or not args:
            return None
        numbers = [number for place in args if (number := self.number_at(place)) is not None]
        if len(numbers) < len(args):
            return None
        try:
            return float(_FOLDS[op](*numbers))
        except ArithmeticError:
            # The engine says what becomes of it: infinity, or no number.
            return None

    def _simpler(self, op: str, args: tuple[int, ...]) -> int | None:
        numbers = tuple(self.number_at(place) for place in args)
        if op == "neg":
            (place,) = args
            return self._without("neg", place)
        if op == "select":
            _, a, b = args
            return a if a == b else None
        if len(args) != _TWO:
            return None
        (a, b), (left, right) = args, numbers
        if op == "mul":
            return self._product(a, b, left, right)
        if op == "add":
            return b if left == 0 else a if right == 0 else None
        if op == "sub" and left == 0:
            return self.apply("neg", b)
        if op == "sub" and right == 0:
            return a
        if op == "div" and right is not None and _is_power_of_two(right):
            return self.apply("mul", a, self.number(1 / right))
        return None

    def _product(self, a: int, b: int, left: float | None, right: float | None) -> int | None:
        if left in (1, -1):
            return b if left == 1 else self.apply("neg", b)
        if right in (1, -1):
            return a if right == 1 else self.apply("neg", a)
        return None

    def _without(self, op: str, place: int) -> int | None:
        """Return the argument of an operation of one argument, if it stands at `place`."""
        item = self.items[place]
        return next(iter(item.args)) if item.op == op else None


_TWO = 2
_FOLDS: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": abs,
}


def _is_power_of_two(number: float) -> bool:
    return math.isfinite(number) and number != 0 and abs(math.frexp(number)[0]) == _HALF


_HALF = 0.5
