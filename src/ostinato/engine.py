"""What Python has to know of the engine (csrc/cpu/engine.h), with torch and without.

Legend: T steps, B batch, N packed rows, O output of a step (proj_size, or H), H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

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


def five_per_direction(
    weights: Sequence[_T], sizes: Sizes, has_biases: bool, absent: _T
) -> list[_T]:
    """Bring what stands for a layer's weights into the engine's order.

    Args:
        weights: per direction weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr], or anything
            that stands for them, such as addresses.
        sizes: of the layer.
        has_biases: whether `weights` holds biases.
        absent: what stands for a weight that the layer does not have.

    Returns:
        Per direction weight_ih, weight_hh, bias_ih, bias_hh, weight_hr.

    Example:
        >>> sizes = Sizes(5, 10, 2, 3, 4, 0, directions=2)
        >>> five_per_direction([1, 2, 3, 4], sizes, has_biases=False, absent=0)
        [1, 2, 0, 0, 0, 3, 4, 0, 0, 0]
    """
    found = []
    count = len(weights) // sizes.directions
    for first in range(0, len(weights), count):
        ih, hh, *others = weights[first : first + count]
        biases = others[:2] if has_biases else (absent, absent)
        found += [ih, hh, *biases, others[-1] if sizes.projection else absent]
    return found


def check_batch_sizes(sizes: list[int], batch: int, rows: int) -> None:
    """Refuse what would make the engine leave its arrays.

    Args:
        sizes: rows active at each of the T steps.
        batch: B.
        rows: N.

    Raises:
        ValueError: sizes that rise, or that do not add up to N.
    """
    if any(a < b for a, b in pairwise([batch, *sizes, 0])):
        raise ValueError(
            f"batch_sizes: expected sizes that fall from at most {batch} to at least 0, got {sizes}"
        )
    if sum(sizes) != rows:
        raise ValueError(
            f"batch_sizes: expected a sum of {rows}, the rows of input, got {sum(sizes)}"
        )
