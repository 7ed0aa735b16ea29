"""A cell is a value: one record for each, and nobody else knows a cell by its name.

Legend: H hidden, G gates.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Onnx:
    """What ONNX's operator for a cell's layer is told."""

    gates: tuple[int, ...]  # ours, in ONNX's order
    # what makes it compute our equations
    attributes: dict[str, int] = field(default_factory=dict)
    activation: str = ""  # the function that it is told for each direction, or nothing


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
    timed_as: str = ""  # the cell whose measured times stand for this one's, or nothing

    @property
    def has_c(self) -> bool:
        """Whether there is a second state."""
        return len(self.states) > 1

    @property
    def recomputed(self) -> int:
        """How many of `saved` are still kept where backward computes the others again: c."""
        return len(self.states) - 1


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
    onnx=Onnx((0,), activation="Tanh"),
    dim_word=" tensor",
)
_RELU = replace(
    _RNN,
    name="rnn_relu",
    number=1,
    kernel="Rnn<true>",
    onnx=Onnx((0,), activation="Relu"),
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
    onnx=Onnx((1, 0, 2), {"linear_before_reset": 1}),
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
    onnx=Onnx((0, 3, 1, 2)),
)
CELLS = {cell.name: cell for cell in (_RNN, _RELU, _GRU, _LSTM)}
# By the name of a layer, in small letters. An RNN's two cells differ in nothing that is asked here.
LAYERS = {cell.layer.lower(): cell for cell in CELLS.values()}
