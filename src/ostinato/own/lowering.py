"""From the graph of a step to what the engines run: forward, and backward from what is kept.

Legend: H hidden, P rows of numbers per unit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from ostinato.own import graph as graphs
from ostinato.own import kept
from ostinato.own.arithmetic import LOADS, Arithmetic, Instruction
from ostinato.own.block import Block, Store, Writer, is_mask
from ostinato.own.derivative import differentiate
from ostinato.own.graph import Graph, Node

# What a leaf of a graph is as a load.
_LOADS = {"x": "x", "h": "h", "s": "state", "p": "parameter", "d": "drive"}
# Between -1 and 1: a sum of these loses nothing that counts.
_BOUNDED = ("sigmoid", "tanh")


class Lowered(NamedTuple):
    """What the engines know of a cell.

    Slots are the gradients of sums that backward returns, in order: ("h", g) of the hidden product
    of gate g, which is also that of the input's where the gate is joint; ("x", g) of the input's
    alone; ("p", k) of row k of the parameters.
    """

    graph: Graph
    joint: tuple[int, ...]  # gates whose two products are used as their sum alone
    slots: tuple[tuple[str, int], ...]
    # Values per unit that forward keeps; the last (states - 1) are the new states behind h.
    saved: int
    reads_output: bool  # whether backward reads the new h
    forward: Block  # without saves
    forward_keep: Block  # with saves; the new states by the very same operations
    backward: Block


def lower(graph: Graph) -> Lowered:
    """Lower a graph.

    Args:
        graph: the graph of a step.

    Returns:
        Its blocks: instructions whose `args` are places in the same block. Loads come before their
        first use, stores stand at the end.

    Example:
        >>> elman = Graph.parse("own:Elman(x=1,h=1,s=1,p=0,d=0){x0;h0;add 0 1;tanh 2}->3")
        >>> lowered = lower(elman)
        >>> [instruction.op for instruction in lowered.forward], lowered.saved
        (['gate', 'tanh', 'next'], 0)
        >>> [instruction.op for instruction in lowered.backward]
        ['output', 'grad', 'tanh_slope', 'number', 'slot', 'to_state']
    """
    return _lower(graph.text())


@lru_cache(maxsize=256)
def _lower(text: str) -> Lowered:
    read = _Read(Graph.parse(text))
    grads = [read.values.value("grad", index=k) for k in range(read.graph.states)]
    stores = read.stores(differentiate(read.values, zip(read.outputs, grads, strict=True)))
    expanded = _Expanded(read.values)
    return _blocks(
        read,
        expanded.values,
        [expanded.places[place] for place in read.outputs],
        [(op, index, expanded.places[place]) for op, index, place in stores],
    )


def _blocks(read: _Read, values: Arithmetic, news: list[int], stores: list[Store]) -> Lowered:
    """Choose what is kept, and write the three blocks."""
    output, *cells = news
    chosen = _chosen(values.items, news, [place for *_, place in stores])
    reads_output = output in chosen and output not in cells
    # The new states behind h are kept in any case.
    more = [place for place in chosen if place not in news]
    saved = [*(_as_number(values, place) for place in more), *cells]

    forward = Writer(values.items, news)
    forward.write()
    nexts = [("next", k, place) for k, place in enumerate(news)]
    inference = forward.stored(nexts)
    forward.write_more(saved)
    keep = forward.stored([*nexts, *(("save", k, place) for k, place in enumerate(saved))])

    loaded = {place: Instruction("saved", index=k) for k, place in enumerate([*more, *cells])}
    if reads_output:
        loaded[output] = Instruction("output")
    # What is there without being kept.
    loaded = {p: load for p, load in loaded.items() if values.items[p].op not in _FREE}
    backward = Writer(values.items, [place for *_, place in stores], loaded)
    backward.write()
    return Lowered(
        read.graph,
        read.joint,
        read.slots,
        len(saved),
        reads_output,
        inference,
        keep,
        backward.stored(stores),
    )


# Loads that backward has as well as forward.
_FREE = ("state", "parameter", "drive", "number")
# Those that it has not.
_GATES = ("gate", "x", "h")


def _chosen(items: list[Instruction], news: list[int], stored: list[int]) -> list[int]:
    """Return the places that backward is to have beside states, parameters and drives."""
    # What comes of the gradients that arrive.
    behind = [False] * len(items)
    for place, item in enumerate(items):
        behind[place] = item.op == "grad" or any(behind[argument] for argument in item.args)
    needed, seen, stack = set(), set(), list(stored)
    while stack:
        place = stack.pop()
        if not behind[place]:
            needed.add(place)
        elif place not in seen:
            seen.add(place)
            stack.extend(items[place].args)
    costs = {place: kept.COST + 1 for place, item in enumerate(items) if is_mask(item)}
    output, *cells = news
    # The new h lies in the output, the other new states are kept in any case.
    costs |= {output: 1, **dict.fromkeys(cells, 0)}
    sources = [place for place, item in enumerate(items) if item.op in _GATES]
    return kept.choose(items, sources, needed, costs)


def _as_number(values: Arithmetic, place: int) -> int:
    """Return what is kept of a value: of a mask 1 or 0."""
    if not is_mask(values.items[place]):
        return place
    return values.apply("select", place, values.number(1.0), values.number(0.0))


class _Read:
    """A graph as arithmetic: gates are joined, and what a derivative has a rule for stays whole.

    Beside the graph's own operations there are between(z, a, b) = (1 - z) * a + z * b, and
    logsigmoid, whose derivative is one sigmoid.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.values = Arithmetic()
        self._uses = Counter(graph.outputs)
        self._user: dict[int, int] = {}
        for place, node in enumerate(graph.nodes):
            self._uses.update(node.args)
            self._user.update(dict.fromkeys(node.args, place))
        self._leaves = {
            (node.op, node.value): place
            for place, node in enumerate(graph.nodes)
            if node.op in graphs.LEAVES
        }
        sums = {gate: self._sum(gate) for gate in range(min(graph.x_gates, graph.h_gates))}
        self.joint = tuple(gate for gate, place in sums.items() if place is not None)
        # Sums that hold both products of a gate, but not side by side.
        self._spread = {
            place
            for gate, place in sums.items()
            if place not in (None, _UNUSED)
            if not self._is_pair(graph.nodes[self._user[self._leaves["x", gate]]])
        }
        self._places: list[int] = []
        for place, node in enumerate(graph.nodes):
            self._places.append(self._value(place, node))
        self.outputs = [self._places[place] for place in graph.outputs]

    @property
    def slots(self) -> tuple[tuple[str, int], ...]:
        """What the slots of backward are the gradients of."""
        return (
            *(("h", gate) for gate in range(self.graph.h_gates)),
            *(("x", gate) for gate in range(self.graph.x_gates) if gate not in self.joint),
            *(("p", row) for row in range(self.graph.parameters)),
        )

    def stores(self, grads: dict[int, int]) -> list[Store]:
        """Return what backward stores, with the gradients' places."""
        wanted = {
            "slot": self.slots,
            "to_state": [("s", k) for k in range(self.graph.states)],
            "to_drive": [("d", k) for k in range(self.graph.drives)],
        }
        return [
            (store, index, self._grad(grads, *leaf))
            for store, leaves in wanted.items()
            for index, leaf in enumerate(leaves)
        ]

    def _grad(self, grads: dict[int, int], letter: str, index: int) -> int:
        op, index = self._load(letter, index)
        leaf = self.values.value(op, index=index)
        return grads[leaf] if leaf in grads else self.values.number(0.0)

    def _load(self, letter: str, index: int) -> tuple[str, int]:
        is_joint = letter in ("x", "h") and index in self.joint
        return ("gate" if is_joint else _LOADS[letter]), index

    # ---- gates whose products are used as a sum alone ----

    def _sum(self, gate: int) -> int | None:
        """Return the sum that both products of a gate end in, if they have no other use."""
        found = {self._top(letter, gate) for letter in ("x", "h")}
        return found.pop() if len(found) == 1 else None

    def _top(self, letter: str, gate: int) -> int | None:
        """Return the last sum of those that a product goes into and that have no other use."""
        place = self._leaves.get((letter, gate))
        if place is None:
            return _UNUSED
        top = None
        while self._uses[place] == 1 and self._is_sum(self._user.get(place)):
            place = top = self._user[place]
        return top if top is not None else -2 - place

    def _is_sum(self, place: int | None) -> bool:
        return place is not None and self.graph.nodes[place].op == "add"

    def _is_pair(self, node: Node) -> bool:
        """Whether a sum is that of both products of a joint gate."""
        if node.op != "add":
            return False
        x, h = sorted((self.graph.nodes[place] for place in node.args), reverse=True)
        return (x.op, h.op) == ("x", "h") and x.value == h.value and x.value in self.joint

    def _terms(self, place: int) -> list[int]:
        """Return what a sum of sums adds up."""
        terms, stack = [], [place]
        while stack:
            each = stack.pop()
            if each == place or (self._is_sum(each) and self._uses[each] == 1):
                stack.extend(reversed(self.graph.nodes[each].args))
            else:
                terms.append(each)
        return terms

    # ---- nodes ----

    def _value(self, place: int, node: Node) -> int:
        values = self.values
        if node.op in graphs.LEAVES:
            assert isinstance(node.value, int)
            op, index = self._load(node.op, node.value)
            return values.value(op, index=index)
        if node.op == "const":
            assert node.value is not None
            return values.number(node.value)
        if place in self._spread:
            return self._gathered(place)
        if self._is_pair(node):
            return self._places[next(iter(node.args))]
        if parts := self._between(node):
            return values.apply("between", *(self._places[part] for part in parts))
        if (inner := self._logsigmoid(node)) is not None:
            return values.apply("logsigmoid", self._places[inner])
        args = [self._places[argument] for argument in node.args]
        if node.op == "pow":
            assert isinstance(node.value, int)
            return values.value("pow", *args, index=node.value)
        if node.op in _PARTS:
            return _PARTS[node.op](values, *args)
        return values.apply("select" if node.op == "where" else node.op, *args)

    def _gathered(self, place: int) -> int:
        """Return a sum with its gates in front, each once."""
        terms = [self._places[term] for term in self._terms(place)]
        gates = [term for term in terms if self.values.items[term].op == "gate"]
        rest = [term for term in terms if term not in gates]
        first, *others = [*dict.fromkeys(gates), *rest]
        for other in others:
            first = self.values.apply("add", first, other)
        return first

    def _between(self, node: Node) -> tuple[int, int, int] | None:
        """Return z, a and b of (1 - z) * a + z * b."""
        nodes = self.graph.nodes
        if node.op != "add" or any(nodes[p].op != "mul" or self._uses[p] > 1 for p in node.args):
            return None
        (one, other) = node.args
        for first, second in ((one, other), (other, one)):
            for rest, a in _both_ways(nodes[first].args):
                z = self._rest_of(rest)
                for gate, b in _both_ways(nodes[second].args):
                    if gate == z:
                        return gate, a, b
        return None

    def _logsigmoid(self, node: Node) -> int | None:
        """Return x of minimum(x, 0) - softplus(-abs(x)), as logsigmoid(x) is recorded."""
        nodes = self.graph.nodes
        if node.op != "sub":
            return None
        least, rest = (nodes[place] for place in node.args)
        inner = rest
        for op in ("softplus", "neg", "abs"):
            if inner.op != op:
                return None
            (place,) = inner.args
            inner = nodes[place]
        if least.op != "minimum":
            return None
        x, zero = least.args
        return place if x == place and nodes[zero] == Node("const", (), 0.0) else None

    def _rest_of(self, place: int) -> int | None:
        """Return z of 1 - z."""
        node = self.graph.nodes[place]
        if node.op != "sub":
            return None
        one, z = node.args
        return z if self.graph.nodes[one] == Node("const", (), 1.0) else None


# Where both products of a gate are not used at all.
_UNUSED = -1


def _both_ways(pair: Iterable[int]) -> list[tuple[int, int]]:
    a, b = pair
    return [(a, b), (b, a)]


def _silu(values: Arithmetic, x: int) -> int:
    return values.apply("mul", x, values.apply("sigmoid", x))


def _gelu(values: Arithmetic, x: int) -> int:
    cube = values.apply("mul", values.number(graphs.GELU_CUBE), values.power(x, 3))
    inner = values.apply("mul", values.number(graphs.GELU_SCALE), values.apply("add", x, cube))
    outer = values.apply("add", values.number(1.0), values.apply("tanh", inner))
    return values.apply("mul", values.apply("mul", values.number(0.5), x), outer)


# Operations of a graph that are taken apart before they are differentiated.
_PARTS = {"silu": _silu, "gelu": _gelu}


class _Expanded:
    """Arithmetic in the engine's operations alone: what it has no number for is in parts."""

    def __init__(self, given: Arithmetic) -> None:
        self.values = Arithmetic()
        self.places: list[int] = []
        for item in given.items:
            args = tuple(self.places[place] for place in item.args)
            self.places.append(self._value(item, args))

    def _value(self, item: Instruction, args: tuple[int, ...]) -> int:
        values = self.values
        if item.op == "pow":
            (base,) = args
            assert item.index is not None
            return values.power(base, item.index)
        if item.op == "clamp":
            return self._clamp(*args)
        if item.op == "between":
            return self._between(*args)
        if item.op == "logsigmoid":
            return self._logsigmoid(*args)
        if item.op in LOADS or item.op == "number":
            return values.value(item.op, index=item.index, number=item.number)
        return values.apply(item.op, *args)

    def _clamp(self, x: int, low: int, high: int) -> int:
        values = self.values
        bounds = [("maximum", low, -math.inf), ("minimum", high, math.inf)]
        for op, bound, absent in bounds:
            x = x if values.number_at(bound) == absent else values.apply(op, x, bound)
        return x

    def _logsigmoid(self, x: int) -> int:
        values = self.values
        rest = values.apply("softplus", values.apply("neg", values.apply("abs", x)))
        return values.apply("sub", values.apply("minimum", x, values.number(0.0)), rest)

    def _between(self, z: int, a: int, b: int) -> int:
        values = self.values
        ops = [values.items[place].op for place in (z, a)]
        if ops[0] == "sigmoid" and ops[1] in _BOUNDED:
            # As the built-in GRU computes it.
            difference = values.apply("sub", b, a)
            return values.apply("add", values.apply("mul", z, difference), a)
        # Exactly a where z is 0 and b where it is 1, whichever is the larger.
        rest = values.apply("sub", a, values.apply("mul", z, a))
        return values.apply("add", values.apply("mul", z, b), rest)
