"""A cell is a value: one record for each, and nobody else knows a cell by its name.

The name of a cell of the user's own, an own cell, is the text of its graph
(`ostinato.own.graph`). So whoever meets the name can make the record (`ostinato.own.records`).

Legend: H hidden, G gates, P numbers per unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Onnx:
    """What ONNX's operator for a cell's layer is told."""

    gates: tuple[int, ...]  # ours, in ONNX's order
    # what makes it compute our equations
    attributes: dict[str, int] = field(default_factory=dict)
    activation: str = ""  # the function that it is told for each direction, or nothing
    functions: tuple[str, ...] = ()  # all that it applies, in its order


@dataclass(frozen=True)
class Cell:
    """What is asked of a cell beside its step, which is in `ostinato.reference` and csrc/cells.h.

    csrc/cells.h states the same of each type there, and a test holds both equal.

    Example:
        >>> CELLS["lstm"].states, CELLS["gru"].has_c
        (('h', 'c'), False)
    """

    name: str  # in operators and messages, and in `ostinato.reference.STEPS`
    number: int  # the engine's: its place in the list of csrc/cells.h
    kernel: str  # the type's name in csrc/cells.h
    layer: str  # the name of the layer in torch.nn, and of its operator in ONNX
    gates: int  # G, rows of weight_hh for each unit
    # Gradients of the gates' products for each unit; more than G where a gate takes the two
    # products apart.
    grads: int
    saved: int  # values for each unit and row that forward keeps for backward
    states: tuple[str, ...]  # what a step hands on; the first is h, the output
    projects: bool  # whether h may be projected by weight_hr
    reads_output: bool  # whether backward of a step reads its output
    reads_previous: bool  # whether a step reads the last h beside its product with weight_hh
    onnx: Onnx | None = None  # how ONNX's operator is told to compute this, if it has one
    dim_word: str = ""  # a word that torch's layer adds when it refuses an input's dimensions
    letters: str = ""  # of the gates, where there are several (docs/math.md)
    keras: tuple[int, ...] = ()  # our gates, in the order of Keras's layer, if it has one
    timed_as: str = ""  # the cell whose measured times stand for this one's, or nothing
    # What only an own cell says; of the others it follows from the fields above.
    of_input: int | None = None  # rows of weight_ih for each unit, where not G
    others: int | None = None  # states behind h, which lie in one array, where there may be several
    parameters: int = 0  # P, numbers for each unit
    drives: int = 0  # numbers for each unit and step, which lie behind the input
    # Its step (`ostinato.reference.STEPS` has the others').
    step: Callable[..., tuple[Any, ...]] | None = field(default=None, compare=False)

    @property
    def has_c(self) -> bool:
        """Whether there is a second state."""
        return len(self.states) > 1

    @property
    def input_gates(self) -> int:
        """Rows of weight_ih for each unit."""
        return self.gates if self.of_input is None else self.of_input

    @property
    def behind(self) -> int:
        """How many states there are behind h."""
        return len(self.states) - 1 if self.others is None else self.others

    @property
    def recomputed(self) -> int:
        """How many of `saved` are still kept where backward computes the others again: c."""
        return self.behind

    @property
    def is_own(self) -> bool:
        """Whether this is a cell of the user's own."""
        return self.step is not None

    @property
    def has_engine(self) -> bool:
        """Whether anything but the reference runs it."""
        return self.number >= 0


_RNN = Cell(
    name="rnn_tanh",
    number=0,
    kernel="Rnn<false>",
    layer="RNN",
    gates=1,
    grads=1,
    saved=0,
    states=("h",),
    projects=False,
    reads_output=True,
    reads_previous=False,
    onnx=Onnx((0,), activation="Tanh", functions=("Tanh",)),
    keras=(0,),
    dim_word=" tensor",
)
_RELU = replace(
    _RNN,
    name="rnn_relu",
    number=1,
    kernel="Rnn<true>",
    onnx=Onnx((0,), activation="Relu", functions=("Relu",)),
    timed_as="rnn_tanh",
)
_GRU = Cell(
    name="gru",
    number=2,
    kernel="Gru",
    layer="GRU",
    gates=3,
    grads=4,
    saved=4,
    states=("h",),
    projects=False,
    reads_output=False,
    reads_previous=True,
    onnx=Onnx((1, 0, 2), {"linear_before_reset": 1}, functions=("Sigmoid", "Tanh")),
    letters="rzn",
    keras=(1, 0, 2),
)
_LSTM = Cell(
    name="lstm",
    number=3,
    kernel="Lstm",
    layer="LSTM",
    gates=4,
    grads=4,
    saved=5,
    states=("h", "c"),
    projects=True,
    reads_output=False,
    reads_previous=False,
    onnx=Onnx((0, 3, 1, 2), functions=("Sigmoid", "Tanh", "Tanh")),
    letters="ifgo",
    keras=(0, 1, 2, 3),
)
CELLS = {cell.name: cell for cell in (_RNN, _RELU, _GRU, _LSTM)}
# By the name of a layer, in small letters. An RNN's two cells differ in nothing that is asked here.
LAYERS = {cell.layer.lower(): cell for cell in CELLS.values()}


# Records of cells that are not listed above, and who makes them, by what their names begin with. A
# compiler sees the first dictionary alone, where a layer puts its cell's when it is made.
known: dict[str, Cell] = {}
makers: dict[str, Callable[[str], Cell | None]] = {}


def find(name: str) -> Cell | None:
    """Return the record of a cell, or None for a name that no cell has."""
    found = CELLS.get(name)
    if found is None:
        found = known.get(name)
    if found is not None or not isinstance(name, str):
        return found
    kind, _, rest = name.partition(":")
    return makers[kind](name) if rest and kind in makers else None


def cell_of(name: str) -> Cell:
    """Return the record of a cell.

    Raises:
        KeyError: no cell has this name.

    Example:
        >>> cell_of("gru").gates
        3
    """
    found = find(name)
    if found is None:
        raise KeyError(name)
    return found
