"""What forward keeps for backward: as few values as possible, of these the nearest to their use.

A minimum cut: what backward needs is to be computed from what is kept, and from states, parameters
and drives, which cost nothing. Of the smallest sets the cut nearest to the need is taken, so that
the least is computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from ostinato.own.arithmetic import Instruction

# What one kept value costs; what costs less is chosen where it spares one.
COST = 1000
_ENDLESS = 1 << 40


def choose(
    items: list[Instruction],
    sources: Iterable[int],
    needed: Iterable[int],
    costs: Mapping[int, int],
) -> list[int]:
    """Return the places to keep.

    Args:
        items: arithmetic.
        sources: places of what backward does not have: the gates' products.
        needed: places of what backward needs.
        costs: by place, where it is not COST.

    Returns:
        Places, in order.

    Example:
        >>> items = [Instruction("x"), Instruction("exp", (0,)), Instruction("mul", (1, 1))]
        >>> choose(items, [0], [2, 1], {})
        [1]
    """
    network = _Network()
    seen, stack = set(), list(needed)
    for place in stack:
        network.add((place, True), _SINK, _ENDLESS)
    while stack:
        place = stack.pop()
        if place in seen:
            continue
        seen.add(place)
        network.add((place, False), (place, True), costs.get(place, COST))
        for argument in items[place].args:
            network.add((argument, True), (place, False), _ENDLESS)
            stack.append(argument)
    for place in sources:
        if place in seen:
            network.add(_SOURCE, (place, False), _ENDLESS)
    near = network.near_sink()
    return sorted(place for place in seen if (place, False) not in near and (place, True) in near)


_Node = tuple[int, bool]
_SOURCE, _SINK = (-1, False), (-1, True)


class _Network:
    """Nodes, and how much may flow between them."""

    def __init__(self) -> None:
        self.room: dict[_Node, dict[_Node, int]] = {_SOURCE: {}, _SINK: {}}

    def add(self, start: _Node, end: _Node, room: int) -> None:
        forth = self.room.setdefault(start, {})
        forth[end] = forth.get(end, 0) + room
        self.room.setdefault(end, {}).setdefault(start, 0)

    def near_sink(self) -> set[_Node]:
        """Let as much flow as can, and return the nodes that still reach the sink."""
        while path := self._path():
            amount = min(self.room[start][end] for start, end in path)
            for start, end in path:
                self.room[start][end] -= amount
                self.room[end][start] += amount
        near, stack = {_SINK}, [_SINK]
        while stack:
            end = stack.pop()
            for start in self.room[end]:
                if start not in near and self.room[start][end]:
                    near.add(start)
                    stack.append(start)
        return near

    def _path(self) -> list[tuple[_Node, _Node]]:
        """Return the shortest way from source to sink, or nothing."""
        came: dict[_Node, _Node] = {_SOURCE: _SOURCE}
        queue = deque([_SOURCE])
        while queue and _SINK not in came:
            start = queue.popleft()
            for end, room in self.room[start].items():
                if room and end not in came:
                    came[end] = start
                    queue.append(end)
        path, end = [], _SINK
        while end in came and end != _SOURCE:
            path.append((came[end], end))
            end = came[end]
        return path
