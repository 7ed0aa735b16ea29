"""Own cells for tests: the built-in ones, written as steps, and others that have more."""

import torch

from ostinato import nn


class Elman(nn.Cell):
    def step(self, x, h, state):
        return torch.tanh(x[0] + h[0])


class Rectified(nn.Cell):
    def step(self, x, h, state):
        return torch.relu(x[0] + h[0])


class Gru(nn.Cell):
    x_gates = h_gates = 3

    def step(self, x, h, state):
        r, z = torch.sigmoid(x[0] + h[0]), torch.sigmoid(x[1] + h[1])
        n = torch.tanh(x[2] + r * h[2])
        return (1 - z) * n + z * state


class Lstm(nn.Cell):
    x_gates = h_gates = 4
    states = 2

    def step(self, x, h, state):
        _, c = state
        i, f, g, o = (a + b for a, b in zip(x, h, strict=True))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class Independent(nn.Cell):
    """No gate of the state, and numbers per unit."""

    h_gates = 0

    def __init__(self, hidden_size, **factory):
        super().__init__(hidden_size)
        self.recurrent = torch.nn.Parameter(torch.linspace(-0.9, 0.9, hidden_size, **factory))
        self.shift = torch.nn.Parameter(torch.full((2, hidden_size), 0.1, **factory))

    def step(self, x, h, state):
        return torch.tanh(x[0] + self.recurrent * state + self.shift[1]) + self.shift[0]


class Everything(nn.Cell):
    """Three states, a gate apart in the middle, one of the input alone, numbers, two drives."""

    x_gates = 4
    h_gates = 3
    states = 3
    drives = 2

    def __init__(self, hidden_size, **factory):
        super().__init__(hidden_size)
        self.peephole = torch.nn.Parameter(torch.full((hidden_size,), 0.3, **factory))

    def step(self, x, h, state, drives):
        last, c, m = state
        f = torch.sigmoid(x[0] + h[0] + self.peephole * c)
        g = torch.tanh(x[1] * h[1] + x[3])
        c = f * c + (1 - f) * g
        m = torch.maximum(m * drives[0], c)
        o = torch.sigmoid(x[2] + h[2])
        return torch.where(drives[1] > 0.5, o * torch.tanh(c + 0.1 * m), last), c, m


class Five(nn.Cell):
    """More gates than a product takes at once."""

    x_gates = h_gates = 5

    def step(self, x, h, state):
        a, b, c, d, e = (torch.tanh(i + j) for i, j in zip(x, h, strict=True))
        return a * b + c * d + 0.5 * e


class Untraced(nn.Cell):
    """A second product within the step, which no engine has."""

    engine = False

    def __init__(self, hidden_size, **factory):
        super().__init__(hidden_size)
        self.mix = torch.nn.Parameter(torch.eye(hidden_size, **factory) * 0.5)

    def step(self, x, h, state):
        return torch.tanh(x[0] + h[0]) @ self.mix


# The built-in layer of a cell that is written as a step.
BUILT_IN = {
    Elman: nn.RNN,
    Rectified: lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    Gru: nn.GRU,
    Lstm: nn.LSTM,
}
CELLS = (*BUILT_IN, Independent, Everything, Five, Untraced)
TRACED = tuple(cell for cell in CELLS if cell.engine)


def drives_of(cell, *shape, hidden, **options):
    """What drives a cell, or None."""
    return torch.rand(*shape, cell.drives * hidden, **options) if cell.drives else None


def states_of(cell, *shape, **options):
    """Initial states, as a caller gives them."""
    drawn = tuple(torch.randn(*shape, **options) * 0.5 for _ in range(cell.states))
    return drawn if cell.states > 1 else drawn[0]


def names(cells):
    """Ids for pytest."""
    return {"ids": [cell.__name__ for cell in cells], "argvalues": cells}
