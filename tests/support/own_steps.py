"""Steps of own cells for tests of the GPU engine, written as a user writes them.

Each has something that the built-in cells have not: gates of the input alone, several states,
numbers per unit, what drives a step.
"""

import torch
from torch.nn.functional import softplus

from ostinato import nn, zoo
from ostinato.own.trace import trace


def gru(x, h, state):
    r = torch.sigmoid(x[0] + h[0])
    z = torch.sigmoid(x[1] + h[1])
    n = torch.tanh(x[2] + r * h[2])
    return (1 - z) * n + z * state


def lstm(x, h, state):
    _, c = state
    i, f, o = (torch.sigmoid(x[g] + h[g]) for g in (0, 1, 3))
    c = f * c + i * torch.tanh(x[2] + h[2])
    return o * torch.tanh(c), c


def minimal(x, h, state):
    f = torch.sigmoid(x[0] + h[0])
    n = torch.tanh(x[1] + f * h[1])
    return (1 - f) * n + f * state


def middle(x, h, state):
    """Of three gates the first and the second have their products apart."""
    a = torch.sigmoid(x[0] - h[0])
    n = torch.tanh(x[1] + a * h[1])
    z = torch.sigmoid(x[2] + h[2])
    return z * state + (1 - z) * n


def more_input(x, h, state):
    """Four gates of the input, two of the state, of which the second is joint."""
    z = torch.sigmoid(x[1] + h[1])
    n = torch.tanh(x[0] * h[0] + x[2])
    return z * state + (1 - z) * n * torch.sigmoid(x[3])


def more_hidden(x, h, state):
    """One gate of the input, two of the state."""
    z = torch.sigmoid(h[1])
    return z * state + (1 - z) * torch.tanh(x[0] + h[0])


def no_hidden(x, h, state):
    """No hidden product at all."""
    z = torch.sigmoid(x[0])
    return z * state + (1 - z) * torch.tanh(x[1])


def four(x, h, state):
    """Four states, each made of the one before."""
    last, a, b, c = state
    a = torch.sigmoid(x[0] + h[0]) * a + torch.tanh(x[1] + h[1])
    b = 0.5 * b + 0.25 * a * last
    c = torch.sigmoid(c) * b
    return torch.tanh(a + b + c), a, b, c


def stabilised(x, h, state):
    """Four states: exponential gates that a running maximum keeps in range.

    Its gradient jumps where the maximum's sides are a rounding apart.
    """
    _, c, n, m = state
    i, f = x[0] + h[0], x[1] + h[1]
    larger = torch.maximum(f + m, i)
    i, f = torch.exp(i - larger), torch.exp(f + m - larger)
    c = f * c + i * torch.tanh(x[2] + h[2])
    n = f * n + i
    return torch.sigmoid(x[3] + h[3]) * c / (n.abs() + 1), c, n, larger


class Peephole:
    """A second state, and numbers per unit of two shapes."""

    peep = torch.zeros(2, 1)
    scale = torch.zeros(1)

    def step(self, x, h, state):
        _, c = state
        i = torch.sigmoid(x[0] + h[0] + self.peep[0] * c)
        f = torch.sigmoid(x[1] + h[1] + self.peep[1] * c)
        c = f * c + i * torch.tanh(x[2] + h[2])
        return self.scale * torch.tanh(c), c


class Driven:
    """Numbers per unit without a hidden product, and two drives."""

    decay = torch.zeros(1)

    def step(self, x, h, state, drives):
        keep, gain = drives
        state = state * torch.exp(-softplus(self.decay) * keep * keep)
        return torch.tanh(x[0] + gain * state)


def zoneout(x, h, state, drives):
    """A mask keeps what was."""
    new = torch.tanh(x[0] + h[0])
    return torch.where(drives[0] > 0.5, state, new)


# x_gates, h_gates, states, parameters, drives
_SIZES = {
    gru: (3, 3, 1, {}, 0),
    lstm: (4, 4, 2, {}, 0),
    minimal: (2, 2, 1, {}, 0),
    middle: (3, 3, 1, {}, 0),
    more_input: (4, 2, 1, {}, 0),
    more_hidden: (1, 2, 1, {}, 0),
    no_hidden: (2, 0, 1, {}, 0),
    four: (2, 2, 4, {}, 0),
    stabilised: (4, 4, 4, {}, 0),
    Peephole: (3, 3, 2, {"peep": 2, "scale": 1}, 0),
    Driven: (1, 0, 1, {"decay": 1}, 2),
    zoneout: (1, 1, 1, {}, 1),
}


def _name(cell, sizes):
    step = cell().step if isinstance(cell, type) else cell
    return trace(step, cell.__name__, *sizes).text()


# Their names in operators, by a short one.
OWN = {cell.__name__.lower(): _name(cell, sizes) for cell, sizes in _SIZES.items()}
ZOO = {
    name: nn.Recurrent(getattr(zoo, name), 1, 1)._cell_name()
    for name in zoo.__all__
    if getattr(zoo, name).engine
}
