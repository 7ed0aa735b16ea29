"""What is measured: one table of cases, in float32 but for a few in bfloat16."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@dataclass(frozen=True)
class Case:
    """One row: a layer and a shape.

    Args:
        layer: the class's name in torch.nn and in ostinato.nn.
        steps: T; 0 for a cell, which takes one step.
        batch: B.
        input: I.
        hidden: H.
        train: forward and backward of every parameter, instead of inference.
        layers: stacked layers.
        bidirectional: two directions.
        ragged: lengths falling evenly from T to this fraction of it, packed; 1 means padded.
        quick: whether `make bench-quick` measures it.
        odd: whether the row is there for its odd size, beside a round one.
        bfloat16: stored in bfloat16, weights and sequences, instead of float32.
    """

    layer: str
    steps: int
    batch: int
    input: int
    hidden: int
    train: bool = False
    layers: int = 1
    bidirectional: bool = False
    ragged: float = 1.0
    quick: bool = False
    odd: bool = False
    bfloat16: bool = False

    @property
    def is_cell(self) -> bool:
        return self.steps == 0

    @property
    def gates(self) -> int:
        """Gates per unit."""
        return GATES[self.layer.removesuffix("Cell")]

    @property
    def kind(self) -> str:
        """The group whose geometric mean is told."""
        return ("training" if self.train else "inference") + " in bfloat16" * self.bfloat16

    @property
    def name(self) -> str:
        """The row's label."""
        words = [self.layer, self.kind]
        words += [f"{self.layers} layers"] * (self.layers > 1)
        words += ["bidirectional"] * self.bidirectional
        words += ["packed"] * (self.ragged < 1)
        return ", ".join(words)

    @property
    def shape(self) -> str:
        """T, B, I and H."""
        sizes = f"B{self.batch} I{self.input} H{self.hidden}"
        return f"T{self.steps} {sizes}" if self.steps else sizes

    def lengths(self) -> list[int]:
        """Steps of each row, falling."""
        last, rows = self.steps * self.ragged, max(1, self.batch - 1)
        return [int(self.steps + (last - self.steps) * row / rows) for row in range(self.batch)]

    @property
    def tokens(self) -> int:
        """Rows of all steps."""
        return sum(self.lengths()) if self.steps else self.batch

    @property
    def operations(self) -> int:
        """Floating point operations of its matrix products; a multiply-add is two.

        Backward has the hidden product once more, and the weight gradients; the gradient of the
        input only between layers, since the input wants none.
        """
        directions = 2 if self.bidirectional else 1
        total = 0
        for layer in range(self.layers):
            size = self.hidden * directions if layer else self.input
            both = size + self.hidden
            if self.train:
                both += self.hidden + (size if layer else 0) + size + self.hidden
            total += 2 * self.tokens * directions * self.gates * self.hidden * both
        return total

    @property
    def weight_bytes(self) -> int:
        """Bytes of weight_hh of a layer, which each step reads."""
        return (
            (2 if self.bfloat16 else 4)
            * self.gates
            * self.hidden**2
            * (2 if self.bidirectional else 1)
        )


def _grid() -> list[Case]:
    layers = ("GRU", "LSTM", "RNN")
    shapes = [
        (100, 1, 64, 64),
        (100, 1, 128, 128),
        (100, 1, 256, 256),
        (100, 1, 512, 512),
        (100, 8, 128, 128),
        (100, 32, 256, 256),
        (100, 64, 512, 512),
    ]
    quick = {(100, 1, 128, 128), (100, 32, 256, 256)}
    rows = [
        Case(layer, *shape, train=train, quick=shape in quick)
        for train, layer, shape in itertools.product((False, True), layers, shapes)
    ]
    rows += [Case(layer, 50, 128, 1024, 1024) for layer in layers]
    # One series of one feature: nearly nothing but weight_hh is read.
    rows += [Case(layer, 1000, 1, 1, size) for layer, size in itertools.product(layers, (256, 512))]
    # Lengths fall from T to 24% of it: 62% of the tokens are there.
    rows += [
        Case(layer, 1000, 32, 64, 64, train=True, ragged=0.24, quick=layer == "GRU")
        for layer in layers
    ]
    for layer, train in itertools.product(layers, (False, True)):
        rows.append(Case(layer, 100, 16, 128, 128, train=train, layers=2))
        rows.append(Case(layer, 100, 16, 128, 128, train=train, bidirectional=True))
    # Each odd size after its round neighbour.
    for layer, (round_size, size) in itertools.product(
        ("GRU", "LSTM"), ((32, 37), (96, 100), (192, 193), (640, 650))
    ):
        row = Case(layer, 50, 32, round_size, round_size)
        rows += [row, replace(row, input=size, hidden=size, odd=True)]
    # Between the round sizes, where a kernel's tiles do not end with the layer: T, B and H.
    for layer, steps, batch, size in (
        ("LSTM", 60, 24, 180),
        ("LSTM", 60, 24, 250),
        ("LSTM", 60, 4, 150),
        ("LSTM", 100, 96, 90),
        ("LSTM", 60, 1, 333),
        ("GRU", 60, 1, 450),
        ("GRU", 60, 6, 220),
        ("GRU", 60, 48, 144),
        ("RNN", 60, 2, 400),
        ("RNN", 60, 24, 610),
    ):
        rows += [Case(layer, steps, batch, size, size, train=train) for train in (False, True)]
    rows += [
        Case(layer, 100, batch, hidden, hidden, bfloat16=True)
        for layer, (batch, hidden) in itertools.product(
            layers, ((1, 128), (1, 512), (32, 256), (64, 512))
        )
    ]
    rows += [
        Case(f"{layer}Cell", 0, 1, hidden, hidden, train=train, quick=hidden == 64)
        for layer, train, hidden in itertools.product(layers, (False, True), (16, 64, 128, 256))
    ]
    rows += [
        Case(f"{layer}Cell", 0, 64, 256, 256, train=train)
        for layer, train in itertools.product(layers, (False, True))
    ]
    return rows


CASES = _grid()
