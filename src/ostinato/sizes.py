"""Sizes of a layer, and the order of its weights, as the engine has them (csrc/cpu/engine.h).

Legend: T steps, B batch, N packed rows, I input, O output of a step (proj_size, or H), H hidden,
D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from ostinato.cells import Cell

_T = TypeVar("_T")

# The engine rounds H up to a multiple of this in what it keeps for backward. A fake kernel cannot
# ask the engine, since sizes are symbols.
PAD = 16


class Sizes(NamedTuple):
    """Sizes of one layer, in the engine's order."""

    steps: int
    rows: int
    batch: int
    input: int
    hidden: int
    projection: int  # 0 where there is none
    directions: int

    @property
    def output(self) -> int:
        """O, the size of a step's output."""
        return self.projection or self.hidden

    def widths(self, kind: Cell) -> dict[str, int]:
        """Return how many numbers a row of an array has, by the words of `ostinato.arrays`."""
        count, output, behind = self.directions, self.output, kind.behind * self.hidden
        return {
            "I+n*H": self.input + kind.drives * self.hidden,
            "O": output,
            "E*H": behind,
            "D*O": count * output,
            "D*E*H": count * behind,
        }


def six_per_direction(
    weights: Sequence[_T], sizes: Sizes, has_biases: bool, absent: _T, per_unit: bool = False
) -> list[_T]:
    """Bring what stands for a layer's weights into the engine's order, six per direction.

    That is weight_ih, weight_hh, bias_ih, bias_hh, weight_hr and an own cell's numbers per unit,
    with `absent` for one that the layer does not have. What stands for them is the weights
    themselves or, for example, their addresses.

    Example:
        >>> sizes = Sizes(5, 10, 2, 3, 4, 0, directions=2)
        >>> six_per_direction([1, 2, 3, 4], sizes, has_biases=False, absent=0)
        [1, 2, 0, 0, 0, 0, 3, 4, 0, 0, 0, 0]
    """
    found = []
    count = len(weights) // sizes.directions
    for first in range(0, len(weights), count):
        ih, hh, *others = weights[first : first + count]
        biases = others[:2] if has_biases else (absent, absent)
        last = others[-1] if others else absent
        found += [ih, hh, *biases, last if sizes.projection else absent]
        found.append(last if per_unit else absent)
    return found
