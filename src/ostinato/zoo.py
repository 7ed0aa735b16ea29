"""The zoo: recurrent cells of the literature, each a few lines of `nn.Cell`.

`nn.Recurrent(zoo.JANET, 12, 64)` is a layer of any of them; docs/cells.md shows how one is written.

Legend: B batch, H hidden_size. In the equations * is elementwise, and a prime marks the state after
the step. `x_g` and `h_g` are gate g of W_ih x + b_ih and of W_hh h + b_hh, (B, H) each, where h is
the first state before the step; docstrings name gates in their order. Where a paper has one bias,
it is b_ih + b_hh here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import softplus

from ostinato import nn

__all__ = [
    "GRUD",
    "JANET",
    "LEM",
    "SLSTM",
    "UGRNN",
    "CoRNN",
    "CoupledLSTM",
    "IndRNN",
    "LiGRU",
    "MinimalGatedUnit",
    "PeepholeLSTM",
    "ZoneoutGRU",
    "ZoneoutLSTM",
]

# Gates, or inputs per unit and step: (B, H) each.
_Gates = Sequence[Tensor]


def _uniform(low: float, high: float, *shape: int, **factory: Any) -> Parameter:
    """Return a parameter of numbers drawn evenly between two bounds."""
    return Parameter(torch.nn.init.uniform_(torch.empty(shape, **factory), low, high))


class MinimalGatedUnit(nn.Cell):
    """Minimal gated unit: a GRU whose one gate forgets and updates.

    f = sigmoid(x_f + h_f), n = tanh(x_n + f * h_n), h' = (1 - f) * h + f * n. Gates f, n.

    weight_ih is (2 H, I), weight_hh (2 H, H). f multiplies after the product with W_hn and its
    bias, as r does in nn.GRU; in the paper it multiplies h before the product.

    Example:
        >>> import torch
        >>> from ostinato import nn, zoo
        >>> layer = nn.Recurrent(zoo.MinimalGatedUnit, 10, 20)
        >>> output, h_n = layer(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))

    Source: Zhou, Wu, Zhang, Zhou 2016, arXiv:1603.09420.
    """

    x_gates = h_gates = 2

    def step(self, x: _Gates, h: _Gates, state: Tensor) -> Tensor:
        """Return h', (B, H)."""
        f = torch.sigmoid(x[0] + h[0])
        n = torch.tanh(x[1] + f * h[1])
        return (1 - f) * state + f * n


class LiGRU(nn.Cell):
    """Light GRU: no reset gate, and a rectifier for the candidate.

    z = sigmoid(x_z + h_z), n = relu(x_n + h_n), h' = z * h + (1 - z) * n. Gates z, n.

    weight_ih is (2 H, I), weight_hh (2 H, H). The paper normalises W_ih x over the batch, which
    keeps the rectifier's output small. Here nothing does: put a norm in front of the layer, or clip
    gradients.

    Example:
        >>> import torch
        >>> from ostinato import nn, zoo
        >>> layer = nn.Recurrent(zoo.LiGRU, 10, 20, bidirectional=True)
        >>> output, h_n = layer(torch.randn(5, 3, 10), lengths=[5, 2, 0])
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]))

    Source: Ravanelli, Brakel, Omologo, Bengio 2018, arXiv:1803.10225, without batch normalisation.
    """

    x_gates = h_gates = 2

    def step(self, x: _Gates, h: _Gates, state: Tensor) -> Tensor:
        """Return h', (B, H)."""
        z = torch.sigmoid(x[0] + h[0])
        n = torch.relu(x[1] + h[1])
        return z * state + (1 - z) * n


class PeepholeLSTM(nn.Cell):
    """LSTM whose gates see the cell's state.

    i = sigmoid(x_i + h_i + p_i * c), f = sigmoid(x_f + h_f + p_f * c), g = tanh(x_g + h_g),
    c' = f * c + i * g, o = sigmoid(x_o + h_o + p_o * c'), h' = o * tanh(c'). Gates i, f, g, o.

    weight_ih is (4 H, I), weight_hh (4 H, H), states h and c. The parameter `peephole`, (3, H),
    holds p_i, p_f, p_o.

    Example:
        >>> import torch
        >>> from ostinato import nn, zoo
        >>> layer = nn.Recurrent(zoo.PeepholeLSTM, 10, 20)
        >>> output, (h_n, c_n) = layer(torch.randn(5, 3, 10))
        >>> layer.cell_l0.peephole.shape
        torch.Size([3, 20])

    Source: Gers, Schmidhuber 2000, doi:10.1109/IJCNN.2000.861302, with the output's tanh as in
    Greff et al. 2017, arXiv:1503.04069.
    """

    x_gates = h_gates = 4
    states = 2

    def __init__(self, hidden_size: int, **factory: Any) -> None:
        super().__init__(hidden_size, **factory)
        bound = 1 / math.sqrt(hidden_size)
        self.peephole = _uniform(-bound, bound, 3, hidden_size, **factory)

    def step(self, x: _Gates, h: _Gates, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return h' and c', (B, H) each."""
        _, c = state
        i = torch.sigmoid(x[0] + h[0] + self.peephole[0] * c)
        f = torch.sigmoid(x[1] + h[1] + self.peephole[1] * c)
        c = f * c + i * torch.tanh(x[2] + h[2])
        o = torch.sigmoid(x[3] + h[3] + self.peephole[2] * c)
        return o * torch.tanh(c), c


class CoupledLSTM(nn.Cell):
    """LSTM that forgets what it writes over: coupled input and forget gate (CIFG).

    i = sigmoid(x_i + h_i), g = tanh(x_g + h_g), o = sigmoid(x_o + h_o), c' = (1 - i) * c + i * g,
    h' = o * tanh(c'). Gates i, g, o.

    weight_ih is (3 H, I), weight_hh (3 H, H), states h and c. The paper's has peepholes too.

    Example:
        >>> import torch
        >>> from ostinato import nn, zoo
        >>> layer = nn.Recurrent(zoo.CoupledLSTM, 10, 20)
        >>> output, (h_n, c_n) = layer(torch.randn(5, 3, 10))
        >>> c_n.shape
        torch.Size([1, 3, 20])

    Source: Greff, Srivastava, Koutník, Steunebrink, Schmidhuber 2017, arXiv:1503.04069, without
    peepholes.
    """

    x_gates = h_gates = 3
    states = 2

    def step(self, x: _Gates, h: _Gates, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return h' and c', (B, H) each."""
        _, c = state
        i = torch.sigmoid(x[0] + h[0])
        c = (1 - i) * c + i * torch.tanh(x[1] + h[1])
        return torch.sigmoid(x[2] + h[2]) * torch.tanh(c), c


class UGRNN(nn.Cell):
    """Update gate RNN: an RNN of tanh that may keep its state.

    g = sigmoid(x_g + h_g), n = tanh(x_n + h_n), h' = g * h + (1 - g) * n. Gates g, n.

    weight_ih is (2 H, I), weight_hh (2 H, H).

    Example:
        >>> import torch
        >>> from ostinato import nn, zoo
        >>> layer = nn.Recurrent(zoo.UGRNN, 10, 20, num_layers=2)
        >>> output, h_n = layer(torch.randn(5, 3, 10))
        >>> h_n.shape
        torch.Size([2, 3, 20])

    Source: Collins, Sohl-Dickstein, Sussillo 2017, arXiv:1611.09913.
    """

    x_gates = h_gates = 2

    def step(self, x: _Gates, h: _Gates, state: Tensor) -> Tensor:
        """Return h', (B, H)."""
        g = torch.sigmoid(x[0] + h[0])
        n = torch.tanh(x[1] + h[1])
        return g * state + (1 - g) * n


class JANET(nn.Cell):
    """LSTM reduced to its forget gate ("just another network").

    s = x_f + h_f, n = tanh(x_n + h_n), h' = sigmoid(s) * h + (1 - sigmoid(s - beta)) * n.
    Gates f, n.

    weight_ih is (2 H, I), weight_hh (2 H, H). `beta` is 1, as in the paper; a class of yours that
    derives from this one may set another. The paper draws the forget gate's bias for the longest
    dependence, T steps ("chrono"), as the example does. PyTorch's initial values forget early.

    Example:
        >>> import torch
        >>> from ostinato import nn, zoo
        >>> layer = nn.Recurrent(zoo.JANET, 10, 20)
        >>> with torch.no_grad():
        ...     b = layer.bias_hh_l0.zero_()[:20].copy_(torch.log(1 + 98 * torch.rand(20)))
        >>> output, h_n = layer(torch.randn(100, 3, 10))

    Source: van der Westhuizen, Lasenby 2018, arXiv:1804.04849.
    """

    x_gates = h_gates = 2
    beta = 1.0

    def step(self, x: _Gates, h: _Gates, state: Tensor) -> Tensor:
        """Return h', (B, H)."""
        s = x[0] + h[0]
        n = torch.tanh(x[1] + h[1])
        return torch.sigmoid(s) * state + (1 - torch.sigmoid(s - self.beta)) * n


class IndRNN(nn.Cell):
    """Independently recurrent network: a unit sees its own past alone.

    h' = relu(x_0 + u * h).

    weight_ih is (H, I); there is no weight_hh, since no product has the state. The parameter
    `u`, (H,), starts evenly between 0 and 1, so a unit's memory is short or long. Units meet in the
    next layer, so stack at least two.

    Example:
        >>> import torch
        >>> from ostinato import nn, zoo
        >>> layer = nn.Recurrent(zoo.IndRNN, 10, 20, num_layers=2)
        >>> output, h_n = layer(torch.randn(5, 3, 10))
        >>> layer.cell_l1.u.shape
        torch.Size([20])

    Source: Li, Li, Cook, Zhu, Gao 2018, arXiv:1803.04831.
    """

    x_gates, h_gates = 1, 0

    def __init__(self, hidden_size: int, **factory: Any) -> None:
        super().__init__(hidden_size, **factory)
        self.u = _uniform(0.0, 1.0, hidden_size, **factory)

    def step(self, x: _Gates, h: _Gates, state: Tensor) -> Tensor:
        """Return h', (B, H)."""
        return torch.relu(x[0] + self.u * state)


class SLSTM(nn.Cell):
    """xLSTM's sLSTM: an LSTM with an exponential input gate, normalised and stabilised.

    With a_g = x_g + h_g, i = exp(a_i), f = sigmoid(a_f) or exp(a_f), z = tanh(a_z) and
    o = sigmoid(a_o): c' = f * c + i * z, n' = f * n + i, h' = o * c' / n'. Gates i, f, z, o.

    Since exp overflows, c and n are kept times exp(-m), which leaves h' as it is. m' is
    max(log f + m, a_i), or a_i where n = 0. Then exp(a_i - m') stands for i and
    exp(log f + m - m') for f.

    weight_ih is (4 H, I), weight_hh (4 H, H), states h, c, n, m. f is chosen by the class's
    `forget`: "sigmoid", or "exp" in a class of yours that derives from this one. All states begin
    as zeros. The rule for n = 0 is ours: with m = 0 before the first step, n would underflow and h'
    be 0 / 0 where the first a_i is far below zero. With it n is at least 1 after every step.
    One head: W_hh is dense. The rest of the paper's block (norms, convolution, projections) is
    left to the model.

    Example:
        >>> import torch
        >>> from ostinato import nn, zoo
        >>> layer = nn.Recurrent(zoo.SLSTM, 10, 20)
        >>> output, (h_n, c_n, n_n, m_n) = layer(1e4 * torch.randn(5, 3, 10))
        >>> bool(output.abs().max() <= 1)
        True

    Source: Beck et al. 2024, arXiv:2405.04517, section 2.2.
    """

    x_gates = h_gates = 4
    states = 4
    forget: Literal["sigmoid", "exp"] = "sigmoid"

    def step(self, x: _Gates, h: _Gates, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return h', c', n' and m', (B, H) each."""
        _, c, n, m = state
        i, f = x[0] + h[0], x[1] + h[1]  # logarithms
        before = m + (f if self.forget == "exp" else -softplus(-f))
        m = torch.where(n == 0, i, torch.maximum(before, i))
        i = torch.exp(i - m)
        # Above 0 in the first step alone, where c and n are zeros; infinity would make NaN of them.
        f = torch.exp(torch.clamp(before - m, max=80.0))
        c = f * c + i * torch.tanh(x[2] + h[2])
        n = f * n + i
        return torch.sigmoid(x[3] + h[3]) * (c / n), c, n, m


class CoRNN(nn.Cell):
    """Coupled oscillators: each unit has a position y and a velocity z.

    z' = z + dt * (tanh(x_0 + h_0 + W z) - gamma * y - epsilon * z), y' = y + dt * z'.
    y is the output.

    weight_ih is (H, I), weight_hh (2 H, H): the rows for h_0, then W. States y, z and p. `dt`,
    `gamma` and `epsilon` are those of the authors' sequential MNIST; a class of yours that derives
    from this one may set others.

    A layer multiplies the first state alone, which is y. Since y = y_before + dt * z, W z is
    (W y - W y_before) / dt, and the state p keeps h_1 = W y + b from the last step. So b, the
    second half of bias_hh, cancels: it changes nothing, and its gradient is zero. The first step
    has no last one: where p is 0, W z counts as 0, which is exact if z begins as zeros. p is never
    0 afterwards; 1e-30 stands for it. To begin with another z_0, give p_0 = W (y_0 - dt * z_0) + b
    as well. The difference loses log2(1 / dt) bits, so float32 is better than 16 bits here.

    Example:
        >>> import torch
        >>> from ostinato import nn, zoo
        >>> class Slow(zoo.CoRNN):
        ...     dt, gamma, epsilon = 0.01, 1.0, 0.1
        >>> layer = nn.Recurrent(Slow, 10, 20)
        >>> output, (y_n, z_n, p_n) = layer(torch.randn(5, 3, 10))
        >>> torch.equal(output[-1], y_n[0])
        True

    Source: Rusch, Mishra 2021, arXiv:2010.00951, with the damping epsilon z taken before the step.
    """

    x_gates, h_gates = 1, 2
    states = 3
    dt, gamma, epsilon = 0.042, 2.7, 4.7

    def step(self, x: _Gates, h: _Gates, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return y', z' and p', (B, H) each."""
        y, z, p = state
        last = torch.where(p == 0, h[1], p)
        force = torch.tanh(x[0] + h[0] + (h[1] - last) / self.dt)
        z = z + self.dt * (force - self.gamma * y - self.epsilon * z)
        p = torch.where(h[1] == 0, h[1] + 1e-30, h[1])
        return y + self.dt * z, z, p


class LEM(nn.Cell):
    """Long expressive memory: two states, with time scales that gates choose.

    a = dt * sigmoid(x_a + h_a), b = dt * sigmoid(x_b + h_b),
    z' = (1 - a) * z + a * tanh(x_z + h_z), y' = (1 - b) * y + b * tanh(x_y + V z').
    y is the output. Gates a, b, z, y; y has no product with the state.

    weight_ih is (4 H, I), weight_hh (3 H, H), states y and z. `dt` is 1; a class of yours that
    derives from this one may set another. V is the parameter `weight_zy`, (H, H).

    No engine runs it (`engine = False`): V multiplies the z of the same step. So a step has two
    products, one after the other, and an engine computes one. The reference runs it, a Python loop
    over the steps.

    Example:
        >>> import torch
        >>> from ostinato import nn, zoo
        >>> layer = nn.Recurrent(zoo.LEM, 10, 20)
        >>> output, (y_n, z_n) = layer(torch.randn(5, 3, 10))
        >>> layer.weight_hh_l0.shape, layer.cell_l0.weight_zy.shape
        (torch.Size([60, 20]), torch.Size([20, 20]))

    Source: Rusch, Mishra, Erichson, Mahoney 2022, arXiv:2110.04744.
    """

    engine = False
    x_gates, h_gates = 4, 3
    states = 2
    dt = 1.0

    def __init__(self, hidden_size: int, **factory: Any) -> None:
        super().__init__(hidden_size, **factory)
        bound = 1 / math.sqrt(hidden_size)
        self.weight_zy = _uniform(-bound, bound, hidden_size, hidden_size, **factory)

    def step(self, x: _Gates, h: _Gates, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return y' and z', (B, H) each."""
        y, z = state
        a = self.dt * torch.sigmoid(x[0] + h[0])
        b = self.dt * torch.sigmoid(x[1] + h[1])
        z = (1 - a) * z + a * torch.tanh(x[2] + h[2])
        y = (1 - b) * y + b * torch.tanh(x[3] + z @ self.weight_zy.T)
        return y, z


class GRUD(nn.Cell):
    """GRU-D's decay of the state: a GRU that forgets with the time between observations.

    r = sigmoid(x_r + h_r), z = sigmoid(x_z + h_z), n = tanh(x_n + r * h_n),
    h' = (1 - z) * n + z * d, d' = gamma * h'. Gates r, z, n as in nn.GRU.
    d, the decayed state, is the first state: it is what W_hh multiplies, and the output.

    weight_ih is (3 H, I), weight_hh (3 H, H), states d and h, one drive: gamma.

    The paper decays the state at the beginning of a step, here a step decays it at its end. So
    gamma of step t is the decay from step t to the next one, and 1 where there is none. In the
    reverse direction the next one is step t - 1. h is the state before its decay: the second of
    `h_n` and of what `return_all_states=True` gives. Initial states are (d_0, h_0), of which d_0
    alone is read.

    The example has the paper's decay, gamma = exp(-max(0, W delta + b)), where delta is the time
    from one observation to the next. The paper also decays missing inputs towards their means, and
    gives the mask to the cell. Do both in front of the layer; the mask is a part of x.

    Example:
        >>> import torch
        >>> from ostinato import nn, zoo
        >>> layer = nn.Recurrent(zoo.GRUD, 10, 20)
        >>> decay = torch.nn.Linear(10, 20)
        >>> x, gaps = torch.randn(5, 3, 10), torch.rand(5, 3, 10)  # gaps[t]: from t to t + 1
        >>> gamma = torch.exp(-torch.relu(decay(gaps)))  # (T, B, H)
        >>> output, (d_n, h_n) = layer(x, drives=gamma)
        >>> torch.allclose(d_n[0], gamma[-1] * h_n[0])
        True

    Source: Che, Purushotham, Cho, Sontag, Liu 2018, arXiv:1606.01865, with nn.GRU's order of
    reset and product, and its 1 - z for the paper's z.
    """

    x_gates = h_gates = 3
    states, drives = 2, 1

    def step(
        self, x: _Gates, h: _Gates, state: tuple[Tensor, ...], drives: _Gates
    ) -> tuple[Tensor, ...]:
        """Return d' and h', (B, H) each; drives is gamma."""
        r = torch.sigmoid(x[0] + h[0])
        z = torch.sigmoid(x[1] + h[1])
        n = torch.tanh(x[2] + r * h[2])
        new = (1 - z) * n + z * state[0]
        return drives[0] * new, new


class ZoneoutGRU(nn.Cell):
    """GRU with zoneout: units that keep their state, chosen at random per step.

    With g the new state of nn.GRU: h' = d * h + (1 - d) * g. Gates r, z, n, one drive d.

    weight_ih is (3 H, I), weight_hh (3 H, H). In training d is 1 where a unit keeps its state, with
    probability p, and otherwise 0; in evaluation it is p everywhere.

    Example:
        >>> import torch
        >>> from ostinato import nn, zoo
        >>> layer = nn.Recurrent(zoo.ZoneoutGRU, 10, 20)
        >>> rate = torch.full((5, 3, 20), 0.1)  # (T, B, H)
        >>> output, h_n = layer(torch.randn(5, 3, 10), drives=torch.bernoulli(rate))
        >>> output, h_n = layer.eval()(torch.randn(5, 3, 10), drives=rate)

    Source: Krueger et al. 2017, arXiv:1606.01305.
    """

    x_gates = h_gates = 3
    drives = 1

    def step(self, x: _Gates, h: _Gates, state: Tensor, drives: _Gates) -> Tensor:
        """Return h', (B, H); drives is d."""
        r = torch.sigmoid(x[0] + h[0])
        z = torch.sigmoid(x[1] + h[1])
        n = torch.tanh(x[2] + r * h[2])
        return drives[0] * state + (1 - drives[0]) * ((1 - z) * n + z * state)


class ZoneoutLSTM(nn.Cell):
    """LSTM with zoneout: units that keep h or c, chosen at random per step.

    With i, f, g, o of nn.LSTM and k = f * c + i * g: c' = d_c * c + (1 - d_c) * k,
    h' = d_h * h + (1 - d_h) * o * tanh(k). Gates i, f, g, o, drives d_h, d_c.

    weight_ih is (4 H, I), weight_hh (4 H, H), states h and c. In training d is 1 where a unit keeps
    its state, with a probability for h and one for c, and otherwise 0; in evaluation it is that
    probability.

    Example:
        >>> import torch
        >>> from ostinato import nn, zoo
        >>> layer = nn.Recurrent(zoo.ZoneoutLSTM, 10, 20)
        >>> rates = torch.tensor([0.05, 0.5]).repeat_interleave(20)  # of h, of c: (2 * H,)
        >>> rates = rates.expand(5, 3, -1)
        >>> output, (h_n, c_n) = layer(torch.randn(5, 3, 10), drives=torch.bernoulli(rates))

    Source: Krueger et al. 2017, arXiv:1606.01305.
    """

    x_gates = h_gates = 4
    states = drives = 2

    def step(
        self, x: _Gates, h: _Gates, state: tuple[Tensor, ...], drives: _Gates
    ) -> tuple[Tensor, ...]:
        """Return h' and c', (B, H) each; drives are d_h and d_c."""
        last, c = state
        keep_h, keep_c = drives
        i, f = torch.sigmoid(x[0] + h[0]), torch.sigmoid(x[1] + h[1])
        g, o = torch.tanh(x[2] + h[2]), torch.sigmoid(x[3] + h[3])
        new = f * c + i * g
        c = keep_c * c + (1 - keep_c) * new
        return keep_h * last + (1 - keep_h) * (o * torch.tanh(new)), c
