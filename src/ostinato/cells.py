"""A cell is a value: one record for each, and nobody else knows a cell by its name.

Legend: H hidden, G gates.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Onnx:
    """What ONNX's operator for a cell's layer is told.

    Args:
        gates: our gates in ONNX's order.
        attributes: what makes it compute our equations.
        activation: the function that the operator is told for each direction, or nothing.
    """

    gates: tuple[int, ...]
    attributes: dict[str, int] = field(default_factory=dict)
    activation: str = ""


@dataclass(frozen=True)
class Cell:
    """What is asked of a cell beside its step, which is in `ostinato.reference` and csrc/cells.h.

    csrc/cells.h states the same of each type there, and a test holds both equal.

    Args:
        name: in operators and messages, and in `ostinato.reference.STEPS`.
        number: the engine's (csrc/cpu/engine.h).
        kernel: the type's name in csrc/cells.h.
        layer: the name of the layer in torch.nn, and of its operator in ONNX.
        gates: G, rows of weight_hh for each unit.
        grads: gradients of the gates' products for each unit; more than G where a gate takes the
            two products apart.
        saved: values for each unit and row that forward keeps for backward.
        states: what a step hands on; the first is h, the output.
        projects: whether h may be projected by weight_hr.
        reads_output: whether backward of a step reads its output.
        reads_previous: whether a step reads the last h beside its product with weight_hh.
        onnx: how ONNX's operator is told to compute this.
        dim_word: a word that torch's layer adds when it refuses an input's dimensions.
        timed_as: the cell whose measured times stand for this one's, or nothing.

    Example:
        >>> CELLS["lstm"].states, CELLS["gru"].has_c
        (('h', 'c'), False)
    """

    name: str
    number: int
    kernel: str
    layer: str
    gates: int
    grads: int
    saved: int
    states: tuple[str, ...]
    projects: bool
    reads_output: bool
    reads_previous: bool
    onnx: Onnx
    dim_word: str = ""
    timed_as: str = ""

    @property
    def has_c(self) -> bool:
        """Whether there is a second state."""
        return len(self.states) > 1

    @property
    def recomputed(self) -> int:
        """How many of the values saved are kept where backward computes the gates again: c."""
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
