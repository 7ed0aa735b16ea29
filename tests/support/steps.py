"""Steps of own cells, and the values that a step is given.

Legend: B batch, H hidden.
"""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from ostinato.own.trace import bind, trace

BATCH, HIDDEN = 3, 5


class Step:
    """What a test needs of a user's class."""

    x_gates = h_gates = states = 1
    drives = 0
    rows: ClassVar[dict] = {}

    def __init__(self):
        for name, count in self.rows.items():
            shape = (HIDDEN,) if count == 1 else (count, HIDDEN)
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))

    def graph(self):
        """Trace the step."""
        sizes = self.x_gates, self.h_gates, self.states
        return trace(self.step, type(self).__name__, *sizes, self.rows, self.drives)

    def draw(self, dtype=torch.float64, *, scale=1.0):
        """Draw x, h, states, parameters as (P, H), and drives."""

        def arrays(count):
            return [scale * torch.randn(BATCH, HIDDEN, dtype=dtype) for _ in range(count)]

        parameters = scale * torch.randn(sum(self.rows.values()), HIDDEN, dtype=dtype)
        counts = self.x_gates, self.h_gates, self.states
        return (*map(arrays, counts), parameters, arrays(self.drives))

    def run(self, x, h, states, parameters, drives):
        """Run the step as it is written; the new states come in a tuple."""
        values, row = {}, 0
        for name, count in self.rows.items():
            values[name] = parameters[row] if count == 1 else parameters[row : row + count]
            row += count
        state = tuple(states) if self.states > 1 else states[0]
        more = (tuple(drives),) if self.drives else ()
        made = bind(self, values).step(tuple(x), tuple(h), state, *more)
        return made if self.states > 1 else (made,)


class Elman(Step):
    def step(self, x, h, state):
        return torch.tanh(x[0] + h[0])


class Rectified(Step):
    def step(self, x, h, state):
        return torch.relu(h[0] + x[0])


class Gru(Step):
    x_gates = h_gates = 3

    def step(self, x, h, state):
        r = torch.sigmoid(x[0] + h[0])
        z = torch.sigmoid(x[1] + h[1])
        n = torch.tanh(x[2] + r * h[2])
        return (1 - z) * n + z * state


class Lstm(Step):
    x_gates = h_gates = 4
    states = 2

    def step(self, x, h, state):
        _, c = state
        i, f, g, o = (a + b for a, b in zip(x, h, strict=True))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class MinimalGatedUnit(Step):
    x_gates = h_gates = 2

    def step(self, x, h, state):
        f = torch.sigmoid(x[0] + h[0])
        n = torch.tanh(x[1] + f * h[1])
        return (1 - f) * n + f * state


class Peephole(Step):
    """Sums with a gate's two products apart, and a parameter (n, H)."""

    x_gates = h_gates = 4
    states = 2
    rows: ClassVar[dict] = {"peep": 3}

    def step(self, x, h, state):
        _, c = state
        p_i, p_f, p_o = self.peep
        i = torch.sigmoid(x[0] + p_i * c + h[0])
        f = torch.sigmoid(x[1] + h[1] + p_f * c)
        c = f * c + i * torch.tanh(x[2] + h[2])
        o = (p_o * c + x[3] + h[3]).sigmoid()
        return o * c.tanh(), c


class Exponential(Step):
    """Like the sLSTM: exponential gates, four states, and the largest exponent kept apart."""

    x_gates = h_gates = 4
    states = 4

    def step(self, x, h, state):
        _, c, n, m = state
        z, i, f, o = (a + b for a, b in zip(x, h, strict=True))
        f = functional.logsigmoid(f)
        m_new = torch.maximum(f + m, i)
        i, f = torch.exp(i - m_new), torch.exp(f + m - m_new)
        c = f * c + i * torch.tanh(z)
        n = f * n + i
        return torch.sigmoid(o) * c / torch.maximum(torch.abs(n), torch.ones_like(n)), c, n, m_new


class Independent(Step):
    """IndRNN: no hidden product."""

    h_gates = 0
    rows: ClassVar[dict] = {"u": 1}

    def step(self, x, h, state):
        return torch.relu(x[0] + self.u * state)


class Zoneout(Step):
    """A drive that says which units keep their state."""

    x_gates = h_gates = 1
    drives = 2

    def step(self, x, h, state, drives):
        keep, decay = drives
        new = torch.tanh(x[0] + h[0]) * torch.exp(-torch.relu(decay))
        return torch.where(keep > 0, state, new)


class Mixed(Step):
    """More gates of the input than hidden ones, and h as a whole."""

    x_gates, h_gates = 3, 2

    def step(self, x, h, state):
        gate = torch.sigmoid(x[2])
        return gate * h[0] + (1 - gate) * torch.tanh(x[0] + h[1]) + 0.1 * x[1] * state


CELLS = [
    *(Elman, Rectified, Gru, Lstm, MinimalGatedUnit, Peephole),
    *(Exponential, Independent, Zoneout, Mixed),
]


def cell_of(function, x_gates=2):
    """Make a cell of a function of gates, of which the last is a plain factor."""

    class Function(Step):
        h_gates = 1

        def step(self, x, h, state):
            return function(*x[:-1]) * x[-1] + 0.5 * state + h[0]

    Function.x_gates = x_gates
    return Function()


# Each operation that a step may call, as functions of one or two values.
ONE = {
    **{
        name: getattr(torch, name)
        for name in ("neg", "abs", "sigmoid", "tanh", "relu", "exp", "erf", "square", "sign")
    },
    "log": lambda a: torch.log(a * a + 0.1),
    "sqrt": lambda a: torch.sqrt(a * a + 0.1),
    "rsqrt": lambda a: torch.rsqrt(a * a + 0.1),
    "root": lambda a: (a * a + 0.1) ** 0.5,
    "reciprocal": lambda a: torch.reciprocal(a * a + 0.1),
    "softplus": functional.softplus,
    "softplus with beta": lambda a: functional.softplus(a, beta=2.0),
    "softplus beyond its threshold": lambda a: functional.softplus(30 * a),
    "logsigmoid": functional.logsigmoid,
    "silu": functional.silu,
    "gelu": lambda a: functional.gelu(a, approximate="tanh"),
    "gelu by erf": functional.gelu,
    "mish": functional.mish,
    "softsign": functional.softsign,
    "hardtanh": functional.hardtanh,
    "relu6": lambda a: functional.relu6(4 * a),
    "hardsigmoid": lambda a: functional.hardsigmoid(3 * a),
    "hardswish": lambda a: functional.hardswish(3 * a),
    "leaky_relu": functional.leaky_relu,
    "threshold": lambda a: functional.threshold(a, 0.5, 0.25),
    "clamp": lambda a: torch.clamp(a, -0.5, 0.5),
    "clamp from below": lambda a: a.clamp(min=0.1),
    "clamp from above": lambda a: torch.clip(a, max=0.1),
    "cube": lambda a: a**3,
    "power": lambda a: a**5,
    "negative power": lambda a: (a * a + 1) ** -2,
    "inverse": lambda a: (a * a + 1) ** -1,
    "no power": lambda a: a**0 + a**1,
    "numbers": lambda a: (1 - a) * 2.5 / 3 + 1 / (a * a + 2) - (-a) * 1,
    "mask as number": lambda a: (a > 0) * a + 2 * (a < 0.1).float(),
    "mask by dtype": lambda a: (a > 0).to(a.dtype) * a,
    "mask logic": lambda a: torch.where(((a > 0) & ~(a > 1)) | (a < -1) ^ (a < -2), a, 2 * a),
    "masked_fill": lambda a: a.masked_fill(a > 0.5, 0.5),
    "isnan": lambda a: torch.where(torch.isnan(a), 0.0, a),
    "constants": lambda a: a + torch.ones_like(a) * torch.full_like(a, 0.3) - torch.zeros_like(a),
    "0-dim tensor": lambda a: a * torch.tensor(0.3) + torch.tensor(2),
    "clone": lambda a: +a.clone().contiguous(),
}
TWO = {
    **{
        name: getattr(torch, name)
        for name in ("add", "sub", "mul", "minimum", "maximum", "min", "max")
    },
    "div": lambda a, b: a / (b * b + 0.1),
    "alpha": lambda a, b: torch.add(a, b, alpha=0.3) + torch.rsub(a, b, alpha=2),
    "where": lambda a, b: torch.where(a > b, a, b * b),
    "where eq": lambda a, b: torch.where((a == b) | (a >= b) & (a != b), a, b),
    "where le": lambda a, b: (a <= b).type_as(a) * a + torch.where(a < 0, 1.0, b),
    "tensor's where": lambda a, b: a.where(a < b, b),
    "between": lambda a, b: (1 - torch.sigmoid(a)) * b + torch.sigmoid(a) * 3 * a,
    "lerp": lambda a, b: torch.lerp(a, b, torch.sigmoid(a)),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.5),
    "addcdiv": lambda a, b: torch.addcdiv(a, a, b * b + 1),
    "clamp by values": lambda a, b: torch.clamp(a, -abs(b), abs(b) + 0.1),
    "crossed clamp": lambda a, b: torch.clamp(a, b, b - 0.5),
    "shared": lambda a, b: (s := torch.sigmoid(a)) * torch.tanh(b) + s * s - torch.tanh(b),
    "squares": lambda a, b: 1 - (a * a - b * b) + a * -b,
}
FUNCTIONS = {name: (function, 2) for name, function in ONE.items()}
FUNCTIONS |= {name: (function, 3) for name, function in TWO.items()}
