"""The graph of a step: operations on each unit's gates, states, parameters and drives.

It imports no array library, and runs on NumPy arrays and torch tensors alike. Its text is the name
of the cell in operators, so that an exported program holds all that there is to know of it.

Legend: B batch, H hidden, P rows of numbers per unit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ostinato import reference

Array = Any

# Leaves by the letter that they have in a text: which list of the step's arguments they are of.
LEAVES = ("x", "h", "s", "p", "d")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
LOGICAL = ("logical_and", "logical_or", "logical_not")
# What each operation takes: n is a number, m a mask. Comparisons and LOGICAL make masks.
TAKES = {
    **dict.fromkeys(("add", "sub", "mul", "div", "minimum", "maximum"), "nn"),
    **dict.fromkeys(("neg", "sigmoid", "tanh", "relu", "exp", "log", "sqrt", "rsqrt", "abs"), "n"),
    **dict.fromkeys(("softplus", "silu", "gelu", "erf", "pow"), "n"),
    **dict.fromkeys(COMPARISONS, "nn"),
    "logical_and": "mm",
    "logical_or": "mm",
    "logical_not": "m",
    "clamp": "nnn",
    "where": "mnn",
}
# The largest exponent of a power, without its sign.
LARGEST_POWER = 64
# Beyond this softplus(x) is x, as in torch.
SOFTPLUS_THRESHOLD = 20.0


class Node(NamedTuple):
    """One leaf, number or operation of a graph."""

    op: str  # of LEAVES or TAKES, or "const"
    args: tuple[int, ...] = ()  # places of earlier nodes
    # The index of a leaf, the number of a constant, the exponent of a power.
    value: float | int | None = None

    @property
    def is_mask(self) -> bool:
        """Whether it is true or false, and no number."""
        return self.op in COMPARISONS or self.op in LOGICAL

    def text(self) -> str:
        """Return the node as it stands in a graph's text."""
        if self.op in LEAVES:
            return f"{self.op}{self.value}"
        if self.op == "const":
            assert self.value is not None
            return "c" + _hex(float(self.value))
        words = [self.op, *map(str, self.args)]
        return " ".join(words if self.value is None else [*words, str(self.value)])


class Sizes(NamedTuple):
    """How many leaves of each letter a graph may have, in the order of LEAVES."""

    x_gates: int
    h_gates: int
    states: int
    parameters: int
    drives: int


class Graph(NamedTuple):
    """What a step computes of each unit, in the order in which it was written.

    Example:
        >>> text = "own:Decay(x=1,h=0,s=1,p=0,d=0){x0;s0;c0x1.0p-1;mul 1 2;add 0 3}->4"
        >>> graph = Graph.parse(text)
        >>> import numpy
        >>> graph.run((numpy.ones(2),), (), (numpy.ones(2),), None, ())
        (array([1.5, 1.5]),)
        >>> graph.text() == text
        True
    """

    name: str  # of the user's class
    x_gates: int
    h_gates: int
    states: int
    parameters: int  # P: a parameter (n, H) has n rows, in order of registration
    drives: int
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]  # places of the new states

    def text(self) -> str:
        """Return the graph in one line, which `parse` reads: the cell's name in operators."""
        sizes = zip(LEAVES, self.sizes, strict=True)
        head = ",".join(f"{letter}={size}" for letter, size in sizes)
        body = ";".join(node.text() for node in self.nodes)
        return f"own:{self.name}({head}){{{body}}}->{','.join(map(str, self.outputs))}"

    @classmethod
    def parse(cls, text: str) -> Graph:
        """Read a graph's text.

        Args:
            text: as `text` returns it.

        Returns:
            The graph.

        Raises:
            ValueError: `text` is no graph; the message says where it ceases to be one.
        """
        return _parse(text)

    def run(
        self,
        x: Sequence[Array],
        h: Sequence[Array],
        states: Sequence[Array],
        parameters: Any,
        drives: Sequence[Array],
    ) -> tuple[Array, ...]:
        """Compute the new states, by one call of torch's or NumPy's for each node.

        The calls are those of the user's step, so the bits are the same.

        Args:
            x: for each gate the product with the input, (B, H).
            h: for each gate the hidden product, (B, H).
            states: the states before the step, (B, H) each.
            parameters: rows of numbers per unit, (P, H) or P arrays (H,); None where P is 0.
            drives: (B, H) each.

        Returns:
            The new states, (B, H) each.
        """
        leaves = dict(zip(LEAVES, (x, h, states, parameters, drives), strict=True))
        run = _Run(states[0])
        values: list[Any] = []
        for node in self.nodes:
            if node.op in LEAVES:
                values.append(leaves[node.op][node.value])
            elif node.op == "const":
                values.append(node.value)
            else:
                values.append(run.node(node, [values[place] for place in node.args]))
        return tuple(run.state(values[place]) for place in self.outputs)

    @property
    def sizes(self) -> Sizes:
        """How many leaves there may be of each letter."""
        return Sizes(self.x_gates, self.h_gates, self.states, self.parameters, self.drives)

    def check(self) -> None:
        """Raise ValueError unless each node is known, and stands behind what it takes."""
        sizes = dict(zip(LEAVES, self.sizes, strict=True))
        if not self.name.isidentifier():
            raise ValueError(f"name: expected a Python name, got {self.name!r}")
        if min(sizes.values()) < 0 or self.states < 1 or self.x_gates < 1:
            raise ValueError(f"sizes: expected at least one gate and one state, got {sizes}")
        for place, node in enumerate(self.nodes):
            self._check_node(place, node, sizes)
        if len(self.outputs) != self.states:
            raise ValueError(f"outputs: expected {self.states}, got {len(self.outputs)}")
        for output in self.outputs:
            if not 0 <= output < len(self.nodes) or self.nodes[output].is_mask:
                raise ValueError(f"outputs: expected the place of a number, got {output}")

    def _check_node(self, place: int, node: Node, sizes: dict[str, int]) -> None:
        here = f"node {place} ({node.text()})"
        if node.op in LEAVES:
            if not 0 <= int(node.value or 0) < sizes[node.op]:
                raise ValueError(f"{here}: expected an index below {sizes[node.op]}")
            return
        if node.op == "const":
            return
        takes = TAKES[node.op]
        if len(node.args) != len(takes):
            raise ValueError(f"{here}: expected {len(takes)} arguments, got {len(node.args)}")
        for argument, kind in zip(node.args, takes, strict=True):
            if not 0 <= argument < place:
                raise ValueError(f"{here}: expected places before its own, got {argument}")
            if self.nodes[argument].is_mask != (kind == "m"):
                expected = "a mask" if kind == "m" else "a number"
                raise ValueError(f"{here}: expected {expected} at {argument}")
        if node.op == "pow" and not 1 < abs(int(node.value or 0)) <= LARGEST_POWER:
            raise ValueError(f"{here}: expected an exponent from 2 to {LARGEST_POWER} or negative")


def is_own(cell: str) -> bool:
    """Return whether `cell`, a name in operators, is the text of a graph.

    Example:
        >>> is_own("gru")
        False
    """
    return cell.startswith("own:")


_TEXT = re.compile(
    r"own:(?P<name>[^(){};]+)\(x=(\d+),h=(\d+),s=(\d+),p=(\d+),d=(\d+)\)"
    r"\{(?P<body>[^{}]*)\}->(?P<outputs>\d+(?:,\d+)*)"
)
_LEAF = re.compile(rf"([{''.join(LEAVES)}])(\d+)")
_CONST = re.compile(r"c(-?(?:inf|nan|0x[0-9a-f.]+p[+-]\d+))")
_OPERATION = re.compile(r"(?P<op>[a-z_][a-z0-9_]*)(?P<places>(?: -?\d+)+)")


@lru_cache(maxsize=256)
def _parse(text: str) -> Graph:
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(
            f"cell: expected the text of a graph, own:Name(...){{...}}->..., got {text!r}"
        )
    _, *sizes = match.groups()[:6]
    nodes = tuple(_parse_node(word) for word in match["body"].split(";") if word)
    outputs = tuple(map(int, match["outputs"].split(",")))
    graph = Graph(match["name"], *Sizes._make(map(int, sizes)), nodes, outputs)
    graph.check()
    return graph


def _parse_node(word: str) -> Node:
    if leaf := _LEAF.fullmatch(word):
        return Node(leaf[1], (), int(leaf[2]))
    if const := _CONST.fullmatch(word):
        return Node("const", (), float.fromhex(const[1]))
    operation = _OPERATION.fullmatch(word)
    if operation is None or operation["op"] not in TAKES:
        raise ValueError(f"cell: expected a leaf, a number or an operation, got {word!r}")
    places = [int(place) for place in operation["places"].split()]
    exponent = places.pop() if operation["op"] == "pow" else None
    return Node(operation["op"], tuple(places), exponent)


def _hex(number: float) -> str:
    """float.hex without the zeros behind: 0x1.8p+0."""
    return re.sub(r"(\.[0-9a-f]+?)0*p", r"\1p", number.hex())


class _Run:
    """The operations of graphs, on arrays like one that is given."""

    def __init__(self, like: Array) -> None:
        self.like = like
        self.xp = reference.namespace(like)

    def node(self, node: Node, values: list[Any]) -> Array:
        if node.op == "pow":
            (base,) = values
            assert node.value is not None
            return self.array(base) ** int(node.value)
        if node.op == "clamp":
            return self.clamp(*values)
        # Numbers stay numbers beside an array: so a step calls what it calls.
        if node.op in _WHOLE or not any(map(_is_array, values)):
            values = [self.array(value) for value in values]
        return _CALLS[node.op](self.xp, *values)

    def array(self, value: Any) -> Array:
        return value if _is_array(value) else self.xp.full_like(self.like, value)

    def state(self, value: Any) -> Array:
        value = self.array(value)
        if value.shape == self.like.shape:
            return value
        # What parameters alone decide is the same for each row.
        return self.xp.broadcast_to(value, self.like.shape)

    def clamp(self, value: Any, low: Any, high: Any) -> Array:
        value = self.array(value)
        if _is_array(low) or _is_array(high):
            low, high = self.array(low), self.array(high)
            return self.xp.clip(value, low, high)
        low, high = None if low == -math.inf else low, None if high == math.inf else high
        return value if low is None and high is None else self.xp.clip(value, low, high)


def _is_array(value: Any) -> bool:
    return not isinstance(value, int | float)


# What takes no Python numbers in torch, or would forget the dtype over them.
_WHOLE = ("minimum", "maximum", "where")


def _named(name: str) -> Callable[..., Array]:
    return lambda xp, *values: getattr(xp, name)(*values)


def _rsqrt(xp: Any, a: Array) -> Array:
    return xp.rsqrt(a) if hasattr(xp, "rsqrt") else 1 / xp.sqrt(a)


def _relu(xp: Any, a: Array) -> Array:
    return xp.relu(a) if hasattr(xp, "relu") else reference.relu(a)


def _softplus(xp: Any, a: Array) -> Array:
    if hasattr(xp, "nn"):
        return xp.nn.functional.softplus(a)
    is_large = a > SOFTPLUS_THRESHOLD
    return xp.where(is_large, a, xp.log1p(xp.exp(xp.where(is_large, xp.zeros_like(a), a))))


def _silu(xp: Any, a: Array) -> Array:
    return xp.nn.functional.silu(a) if hasattr(xp, "nn") else a * reference.sigmoid(a)


def _gelu(xp: Any, a: Array) -> Array:
    if hasattr(xp, "nn"):
        return xp.nn.functional.gelu(a, approximate="tanh")
    return 0.5 * a * (1 + xp.tanh(GELU_SCALE * (a + GELU_CUBE * (a * a * a))))


def _erf(xp: Any, a: Array) -> Array:
    if hasattr(xp, "erf"):
        return xp.erf(a)
    return xp.vectorize(math.erf, otypes=[a.dtype])(a)


# gelu(x) = x / 2 * (1 + tanh(GELU_SCALE * (x + GELU_CUBE * x^3))).
GELU_SCALE = math.sqrt(2 / math.pi)
GELU_CUBE = 0.044715

_CALLS: dict[str, Callable[..., Array]] = {
    "add": lambda xp, a, b: a + b,
    "sub": lambda xp, a, b: a - b,
    "mul": lambda xp, a, b: a * b,
    "div": lambda xp, a, b: a / b,
    "neg": lambda xp, a: -a,
    "lt": lambda xp, a, b: a < b,
    "le": lambda xp, a, b: a <= b,
    "gt": lambda xp, a, b: a > b,
    "ge": lambda xp, a, b: a >= b,
    "eq": lambda xp, a, b: a == b,
    "ne": lambda xp, a, b: a != b,
    "logical_and": lambda xp, a, b: a & b,
    "logical_or": lambda xp, a, b: a | b,
    "logical_not": lambda xp, a: ~a,
    "sigmoid": lambda xp, a: reference.sigmoid(a),
    "relu": _relu,
    "rsqrt": _rsqrt,
    "softplus": _softplus,
    "silu": _silu,
    "gelu": _gelu,
    "erf": _erf,
}
# The others are functions of torch and of NumPy by the same name.
_CALLS |= {name: _named(name) for name in TAKES if name not in _CALLS}
