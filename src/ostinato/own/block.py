"""Blocks: the instructions of one run of the engine, with its joined operations.

Joined are a product and a sum (`fma`, `fnma`), and sigmoid(a) * tanh(b), which takes one division.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ostinato.own.arithmetic import Instruction
from ostinato.own.graph import COMPARISONS, LOGICAL

ZERO = Instruction("number", number=0.0)
Block = tuple[Instruction, ...]
# A store and the place of its value.
Store = tuple[str, int, int]


def is_mask(item: Instruction) -> bool:
    """Return whether an instruction makes what only `select` and logical operations take.

    Example:
        >>> is_mask(Instruction("lt", (0, 1))), is_mask(ZERO)
        (True, False)
    """
    return item.op in COMPARISONS or item.op in LOGICAL


class Writer:
    """Writes what some places need, in the order of the arithmetic."""

    def __init__(
        self,
        items: list[Instruction],
        roots: Iterable[int],
        loaded: Mapping[int, Instruction] | None = None,
    ) -> None:
        """Decide what is joined.

        Args:
            items: arithmetic.
            roots: places of what is to be computed.
            loaded: by place, what is loaded instead of computed.
        """
        self.items = items
        self.loaded = loaded or {}
        self.block: list[Instruction] = []
        self.places: dict[int, int] = {}
        self._roots = list(roots)
        self._needed = self._needs(self._roots)
        self._uses = Counter(self._roots)
        for place in self._needed:
            self._uses.update(self._args(place))
        self._joined: dict[int, Instruction] = {}
        self._swallowed: set[int] = set()
        for place in sorted(self._needed, reverse=True):
            if place not in self._swallowed and place not in self.loaded:
                self._join(place)

    def write(self) -> None:
        """Write the instructions of all roots."""
        for place in sorted(self._needed - self._swallowed):
            self._write(place, self._joined.get(place, self.items[place]))

    def write_more(self, roots: Iterable[int]) -> None:
        """Write further values behind, without a change of those that stand."""
        for place in sorted(self._needs(roots, stop=self.places)):
            self._write(place, self.items[place])

    def stored(self, stores: Iterable[Store]) -> Block:
        """Return the block with its stores at the end, where all is read that they overwrite."""
        made = [Instruction(op, (self.places[place],), index) for op, index, place in stores]
        return (*self.block, *made)

    def _args(self, place: int) -> tuple[int, ...]:
        return () if place in self.loaded else self.items[place].args

    def _needs(self, roots: Iterable[int], stop: Mapping[int, int] | None = None) -> set[int]:
        found: set[int] = set()
        stack = list(roots)
        while stack:
            place = stack.pop()
            if place not in found and place not in (stop or {}):
                found.add(place)
                stack.extend(self._args(place))
        return found

    def _write(self, place: int, item: Instruction) -> None:
        if place in self.places:
            return
        if place in self.loaded:
            self.places[place] = self._load(place)
            return
        args = tuple(self.places[argument] for argument in item.args)
        self.places[place] = self._append(item._replace(args=args))

    def _append(self, instruction: Instruction) -> int:
        self.block.append(instruction)
        return len(self.block) - 1

    def _load(self, place: int) -> int:
        loaded = self._append(self.loaded[place])
        if not is_mask(self.items[place]):
            return loaded
        # A mask is kept as 1 or 0.
        return self._append(Instruction("ne", (loaded, self._append(ZERO))))

    # ---- what is joined ----

    def _join(self, place: int) -> None:
        item = self.items[place]
        if item.op == "mul" and (pair := self._gate(place)):
            self._swallow(place, Instruction("sigmoid_times_tanh", pair), item.args)
        elif item.op == "add":
            self._join_sum(place, *item.args)
        elif item.op == "sub":
            a, b = item.args
            if product := self._product(b):
                self._swallow(place, Instruction("fnma", (*product, a)), (b,))

    def _join_sum(self, place: int, a: int, b: int) -> None:
        for one, other in ((a, b), (b, a)):
            if product := self._product(one):
                self._swallow(place, Instruction("fma", (*product, other)), (one,))
                return
        for one, other in ((a, b), (b, a)):
            if not self._is_single(one, "neg"):
                continue
            (negated,) = self.items[one].args
            if product := self._product(negated):
                joined = Instruction("fnma", (*product, other))
                self._swallow(place, joined, (one, negated))
            else:
                self._swallow(place, Instruction("sub", (other, negated)), (one,))
            return

    def _swallow(self, place: int, joined: Instruction, swallowed: Iterable[int]) -> None:
        self._joined[place] = joined
        self._swallowed.update(swallowed)

    def _is_single(self, place: int, op: str) -> bool:
        """Whether a place has one use, and is an operation of this block that is still whole."""
        is_whole = place not in self.loaded and place not in self._swallowed
        return is_whole and self._uses[place] == 1 and self.items[place].op == op

    def _product(self, place: int) -> tuple[int, int] | None:
        """Return the factors of a product that may become part of a sum."""
        if not self._is_single(place, "mul") or self._gate(place):
            return None
        a, b = self.items[place].args
        return a, b

    def _gate(self, place: int) -> tuple[int, int] | None:
        """Return a and b of sigmoid(a) * tanh(b)."""
        a, b = self.items[place].args
        for gate, other in ((a, b), (b, a)):
            if self._is_single(gate, "sigmoid") and self._is_single(other, "tanh"):
                (left,), (right,) = self.items[gate].args, self.items[other].args
                return left, right
        return None
