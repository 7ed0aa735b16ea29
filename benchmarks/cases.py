"""What is measured: one table of cases, in float32."""

from __future__ import annotations

from dataclasses import dataclass


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
        goal: the least median ratio torch.nn / ours that is promised, or 1.
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
    goal: float = 1.0

    @property
    def name(self) -> str:
        """The row's label."""
        words = [self.layer, "training" if self.train else "inference"]
        words += [f"{self.layers} layers"] * (self.layers > 1)
        words += ["bidirectional"] * self.bidirectional
        words += ["packed"] * (self.ragged < 1)
        return ", ".join(words)

    @property
    def shape(self) -> str:
        """T, B, I and H."""
        sizes = f"B{self.batch} I{self.input} H{self.hidden}"
        return f"T{self.steps} {sizes}" if self.steps else sizes


CASES = [
    Case("GRU", 100, 1, 128, 128, goal=4),
    Case("GRU", 100, 32, 256, 256, train=True, goal=2),
    # Lengths fall from T to 24% of it: 62% of the tokens are there.
    Case("GRU", 1000, 32, 64, 64, train=True, ragged=0.24, goal=8),
    *(
        Case(layer, *shape)
        for layer in ("GRU", "LSTM", "RNN")
        for shape in ((100, 1, 64, 64), (100, 1, 256, 256), (100, 8, 128, 128), (100, 32, 256, 256))
    ),
    Case("LSTM", 100, 1, 128, 128),
    Case("RNN", 100, 1, 128, 128),
    Case("GRU", 100, 64, 512, 512),
    Case("GRU", 100, 32, 193, 193),
    *(Case(layer, 100, 1, 128, 128, train=True) for layer in ("GRU", "LSTM", "RNN")),
    *(Case(layer, 100, 32, 256, 256, train=True) for layer in ("LSTM", "RNN")),
    Case("LSTM", 1000, 32, 64, 64, train=True, ragged=0.24),
    Case("GRU", 100, 16, 128, 128, layers=2),
    Case("GRU", 100, 16, 128, 128, bidirectional=True),
    Case("LSTM", 100, 16, 128, 128, train=True, layers=2, bidirectional=True),
    *(
        Case(cell, 0, batch, hidden, hidden, train=train)
        for cell in ("GRUCell", "LSTMCell", "RNNCell")
        for batch, hidden in ((1, 128), (64, 256))
        for train in (False, True)
    ),
]
