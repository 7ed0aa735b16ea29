"""Each cell of the zoo against a plain loop of its own, in float64, from the paper's equations.

A loop takes one row in one direction: its steps in order, the weights by gate, and the paper's one
bias. It shares no line with the zoo, knows no batch, and autograd differentiates it.
"""

import ast
import inspect
import math
import re
from pathlib import Path

import pytest
import torch

import ostinato
from ostinato import nn, zoo
from support.devices import device_type
from support.tolerances import tolerance

I, H, B, T = 3, 5, 4, 7
LENGTHS = [7, 3, 0, 5]
PAGE = Path(__file__).parent.parent / "docs/cells.md"
sigma, tanh = torch.sigmoid, torch.tanh


class Weights:
    """The weights of one direction by gate: W[g] (H, I), U[g] (H, H), b[g] (H,), and `own`."""

    def __init__(self, layer, suffix, kind):
        def gates(name, count):
            weight = getattr(layer, f"{name}_{suffix}", None)
            return (0.0,) * count if weight is None else weight.reshape(count, H, *weight.shape[1:])

        self.W = gates("weight_ih", kind.x_gates)
        self.U = gates("weight_hh", kind.h_gates) if kind.h_gates else ()
        b_ih, b_hh = gates("bias_ih", kind.x_gates), gates("bias_hh", kind.h_gates)
        self.b_ih, self.b_hh = b_ih, b_hh
        # Where both sides have the gate, the paper has one bias.
        self.b = [b_ih[g] + (b_hh[g] if g < kind.h_gates else 0) for g in range(kind.x_gates)]
        self.own = dict(getattr(layer, f"cell_{suffix}").named_parameters())


# ---- the papers ----


def minimal_gated_unit(xs, h, w):
    """Zhou 2016, section 4; f * (U h) for the paper's U (f * h)."""
    outputs = []
    for x in xs:
        f = sigma(w.W[0] @ x + w.U[0] @ h + w.b[0])
        candidate = tanh(w.W[1] @ x + w.b_ih[1] + f * (w.U[1] @ h + w.b_hh[1]))
        h = h - f * h + f * candidate
        outputs.append(h)
    return outputs, (h,)


def light_gru(xs, h, w):
    """Ravanelli 2018, equations of Li-GRU without batch normalisation."""
    outputs = []
    for x in xs:
        z = sigma(w.W[0] @ x + w.U[0] @ h + w.b[0])
        a = w.W[1] @ x + w.U[1] @ h + w.b[1]
        h = z * h + (1 - z) * a.clamp(min=0)
        outputs.append(h)
    return outputs, (h,)


def peephole_lstm(xs, y, c, w):
    """Gers & Schmidhuber 2000: input and forget gate see the old state, the output gate the new."""
    outputs, (p_in, p_forget, p_out) = [], w.own["peephole"]
    for x in xs:
        net_in, net_forget, net_c, net_out = (
            W @ x + U @ y + b for W, U, b in zip(w.W, w.U, w.b, strict=True)
        )
        y_in, y_forget = sigma(net_in + p_in * c), sigma(net_forget + p_forget * c)
        c = y_forget * c + y_in * tanh(net_c)
        y = sigma(net_out + p_out * c) * tanh(c)
        outputs.append(y)
    return outputs, (y, c)


def coupled_lstm(xs, y, c, w):
    """Greff 2017, appendix: CIFG has f = 1 - i."""
    outputs = []
    for x in xs:
        i, z, o = (W @ x + U @ y + b for W, U, b in zip(w.W, w.U, w.b, strict=True))
        forget = sigma(-i)  # 1 - sigma(i)
        c = tanh(z) * sigma(i) + c * forget
        y = tanh(c) * sigma(o)
        outputs.append(y)
    return outputs, (y, c)


def update_gate_rnn(xs, h, w):
    """Collins 2017, UGRNN."""
    outputs = []
    for x in xs:
        c = tanh(w.U[1] @ h + w.W[1] @ x + w.b[1])
        g = sigma(w.U[0] @ h + w.W[0] @ x + w.b[0])
        h = g * h + (1 - g) * c
        outputs.append(h)
    return outputs, (h,)


def janet(xs, c, w):
    """Van der Westhuizen & Lasenby 2018, with beta = 1."""
    outputs = []
    for x in xs:
        s = w.U[0] @ c + w.W[0] @ x + w.b[0]
        candidate = tanh(w.U[1] @ c + w.W[1] @ x + w.b[1])
        c = sigma(s) * c + sigma(1 - s) * candidate
        outputs.append(c)
    return outputs, (c,)


def independent_rnn(xs, h, w):
    """Li 2018: h' = relu(W x + u * h + b)."""
    outputs = []
    for x in xs:
        h = (w.W[0] @ x + w.own["u"] * h + w.b[0]).clamp(min=0)
        outputs.append(h)
    return outputs, (h,)


def slstm(xs, h, c, n, m, w, forget="sigmoid"):
    """Beck 2024, equations 8 to 14 as they are, not stabilised; c and n come times exp(-m)."""
    outputs = []
    c, n = c * m.exp(), n * m.exp()
    for x in xs:
        i, f, z, o = (W @ x + R @ h + b for W, R, b in zip(w.W, w.U, w.b, strict=True))
        f = sigma(f) if forget == "sigmoid" else f.exp()
        c = f * c + i.exp() * tanh(z)
        n = f * n + i.exp()
        h = sigma(o) * (c / n)
        outputs.append(h)
    return outputs, (h, c, n)


def slstm_of_logarithms(xs, h, w, forget="sigmoid"):
    """The same from zeros: c / n is a mean of all z, with weights whose logarithms are sums."""
    outputs, logs, zs = [], torch.zeros(0, H, dtype=h.dtype), torch.zeros(0, H, dtype=h.dtype)
    for x in xs:
        i, f, z, o = (W @ x + R @ h + b for W, R, b in zip(w.W, w.U, w.b, strict=True))
        f = torch.nn.functional.logsigmoid(f) if forget == "sigmoid" else f
        logs, zs = torch.cat([logs + f, i[None]]), torch.cat([zs, tanh(z)[None]])
        h = sigma(o) * (logs.softmax(0) * zs).sum(0)
        outputs.append(h)
    return outputs, (h,)


def coupled_oscillators(xs, y, z, _, w, dt=0.042, gamma=2.7, epsilon=4.7):
    """Rusch & Mishra 2021, equation 3, with z_(n-1) in the damping: two products of two states."""
    outputs = []
    for x in xs:
        force = tanh(w.U[0] @ y + w.U[1] @ z + w.W[0] @ x + w.b[0])
        z = z + dt * force - dt * gamma * y - dt * epsilon * z
        y = y + dt * z
        outputs.append(y)
    return outputs, (y, z)


def long_expressive_memory(xs, y, z, w, dt=1.0):
    """Rusch 2022, equation 3."""
    outputs, V = [], w.own["weight_zy"]
    for x in xs:
        first, second, third = (w.U[g] @ y + w.W[g] @ x + w.b[g] for g in range(3))
        step, other = dt * sigma(first), dt * sigma(second)
        z = z - step * z + step * tanh(third)
        y = y - other * y + other * tanh(V @ z + w.W[3] @ x + w.b_ih[3])
        outputs.append(y)
    return outputs, (y, z)


def gru_d(xs, decays, decayed, unread, w):
    """Che 2018, equations of the cell: the state decays, then a GRU takes it.

    decays[k] stands between step k and step k + 1. The paper's z is 1 - z of nn.GRU.
    """
    outputs, h = [], decayed
    for k, x in enumerate(xs):
        hat = decays[k - 1] * h if k else decayed
        r = sigma(w.W[0] @ x + w.U[0] @ hat + w.b[0])
        z = sigma(-(w.W[1] @ x) - w.U[1] @ hat - w.b[1])
        candidate = tanh(w.W[2] @ x + w.b_ih[2] + r * (w.U[2] @ hat + w.b_hh[2]))
        h = (1 - z) * hat + z * candidate
        outputs.append(decays[k] * h)
    return outputs, (outputs[-1], h) if outputs else (decayed, unread)


def zoneout_gru(xs, keeps, h, w):
    """Krueger 2017: the states of a GRU, some of which are kept."""
    outputs = []
    for x, d in zip(xs, keeps, strict=True):
        r, z = (sigma(w.W[g] @ x + w.U[g] @ h + w.b[g]) for g in range(2))
        n = tanh(w.W[2] @ x + w.b_ih[2] + r * (w.U[2] @ h + w.b_hh[2]))
        h = d * h + (1 - d) * (n + z * (h - n))
        outputs.append(h)
    return outputs, (h,)


def zoneout_lstm(xs, keeps, h, c, w):
    """Krueger 2017, equations 3 and 4: h is made of the c that nothing was kept of."""
    outputs = []
    for x, both in zip(xs, keeps, strict=True):
        d_h, d_c = both[:H], both[H:]
        i, f, g, o = (W @ x + U @ h + b for W, U, b in zip(w.W, w.U, w.b, strict=True))
        c, h = (
            d_c * c + (1 - d_c) * (sigma(f) * c + sigma(i) * tanh(g)),
            d_h * h + (1 - d_h) * (sigma(o) * tanh(sigma(f) * c + sigma(i) * tanh(g))),
        )
        outputs.append(h)
    return outputs, (h, c)


class ExpForget(zoo.SLSTM):
    forget = "exp"


class Faster(zoo.CoRNN):
    dt, gamma, epsilon = 0.5, 0.3, 0.2


PAPERS = {
    zoo.MinimalGatedUnit: minimal_gated_unit,
    zoo.LiGRU: light_gru,
    zoo.PeepholeLSTM: peephole_lstm,
    zoo.CoupledLSTM: coupled_lstm,
    zoo.UGRNN: update_gate_rnn,
    zoo.JANET: janet,
    zoo.IndRNN: independent_rnn,
    zoo.SLSTM: slstm,
    ExpForget: lambda *given: slstm(*given, forget="exp"),
    zoo.CoRNN: coupled_oscillators,
    Faster: lambda *given: coupled_oscillators(*given, dt=0.5, gamma=0.3, epsilon=0.2),
    zoo.LEM: long_expressive_memory,
    zoo.GRUD: gru_d,
    zoo.ZoneoutGRU: zoneout_gru,
    zoo.ZoneoutLSTM: zoneout_lstm,
}
# States that the paper has, of those of the cell.
KNOWN = {zoo.CoRNN: 2, Faster: 2, zoo.SLSTM: 1, ExpForget: 1}
kinds = pytest.mark.parametrize("kind", PAPERS, ids=lambda kind: kind.__name__)


# ---- what holds the layer against a paper ----


def states_of(kind, hx):
    """A tuple of all states, of whatever a layer takes or gives."""
    return (hx,) if kind.states == 1 else hx


def by_the_paper(layer, kind, x, hx, lengths, drives):
    """Run a paper's loop over every row, direction and layer of `layer`.

    Returns output and the last states that the paper has, (L * D, B, H) each.
    """
    directions = 2 if layer.bidirectional else 1
    known = KNOWN.get(kind, kind.states)
    places = [[None] * B for _ in range(layer.num_layers * directions)]
    for k in range(layer.num_layers):
        sides = []
        for d in range(directions):
            place = k * directions + d
            w = Weights(layer, f"l{k}{'_reverse' * d}", kind)
            rows = []
            for b, length in enumerate(lengths):
                order = list(range(length))[:: -1 if d else 1]
                given = [x[order, b]]
                if kind.drives:
                    given.append(drives[order, b])
                outputs, last = PAPERS[kind](*given, *(s[place, b] for s in hx), w)
                zero = x.new_zeros(H)
                at = dict(zip(order, outputs, strict=True))
                rows.append(torch.stack([at.get(t, zero) for t in range(len(x))]))
                places[place][b] = last[:known]
            sides.append(torch.stack(rows, 1))
        x = torch.cat(sides, 2)
    last = [
        torch.stack([torch.stack([row[k] for row in place]) for place in places])
        for k in range(known)
    ]
    return x, last


def drawn(kind, num_layers=1, bidirectional=False, bias=True):
    """A layer in float64, its input and its drives, all of which want gradients."""
    layer = nn.Recurrent(
        kind, I, H, num_layers, bias=bias, bidirectional=bidirectional, dtype=torch.float64
    )
    with torch.no_grad():
        for weight in layer.parameters():
            weight.uniform_(-1, 1)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    drives = torch.rand(T, B, kind.drives * H, dtype=torch.float64, requires_grad=True)
    return layer, x, drives if kind.drives else None


def drawn_states(kind, layer):
    """Initial states: those that are free, and all of them."""
    directions = 2 if layer.bidirectional else 1
    shape = layer.num_layers * directions, B, H
    free = [torch.randn(shape, dtype=torch.float64) for _ in range(kind.states)]
    if issubclass(kind, zoo.SLSTM):
        free[2].abs_().add_(0.5)  # a normaliser
    if not issubclass(kind, zoo.CoRNN):
        free = [state.requires_grad_() for state in free]
        return free, free
    # p is W times y of the step before, and b.
    y, z = free = [state.requires_grad_() for state in free[:2]]
    p = []
    for place, before in enumerate(y - kind.dt * z):
        k, d = divmod(place, directions)
        w = Weights(layer, f"l{k}{'_reverse' * d}", kind)
        p.append(before @ w.U[1].T + w.b_hh[1])
    return free, [y, z, torch.stack(p)]


def run(layer, kind, x, hx, lengths, drives):
    more = {} if drives is None else {"drives": drives}
    output, last = layer(x, hx[0] if kind.states == 1 else tuple(hx), lengths=lengths, **more)
    return output, list(states_of(kind, last))[: KNOWN.get(kind, kind.states)]


def assert_near(actual, expected, kind, name):
    # A difference of products divided by dt, and quotients of small numbers.
    bound = tolerance(torch.float64, 100 * T if kind in KNOWN else T)
    # A sum rounds in proportion to its terms: the largest number stands for them.
    largest = expected.abs().max().item() if expected.numel() else 0.0
    bound["atol"] *= max(1.0, largest)
    torch.testing.assert_close(actual, expected, msg=lambda text: f"{name}: {text}", **bound)


@kinds
@pytest.mark.parametrize("with_states", [False, True], ids=["from zeros", "from states"])
@pytest.mark.parametrize(
    ("num_layers", "bidirectional", "bias", "lengths"),
    [
        (1, False, True, [T] * B),
        (1, False, False, [T] * B),
        (2, False, True, LENGTHS),
        (1, True, True, LENGTHS),
        (2, True, True, LENGTHS),
    ],
    ids=["one", "no bias", "two layers", "two directions", "two of both"],
)
def test_a_layer_is_the_papers_loop(kind, num_layers, bidirectional, bias, lengths, with_states):
    if device_type() != "cpu":
        pytest.skip("the loops are compared in float64")
    layer, x, drives = drawn(kind, num_layers, bidirectional, bias)
    rows = num_layers * (1 + bidirectional)
    free, hx = [], [torch.zeros(rows, B, H, dtype=torch.float64)] * kind.states
    if with_states:
        free, hx = drawn_states(kind, layer)
    output, last = run(layer, kind, x, hx, lengths, drives)
    expected, known = by_the_paper(layer, kind, x, hx, lengths, drives)
    assert_near(output, expected, kind, "output")
    for k, (state, paper) in enumerate(zip(last, known, strict=True)):
        assert_near(state, paper, kind, f"state {k}")

    leaves = {"input": x, **dict(layer.named_parameters())}
    leaves |= {f"initial state {k}": state for k, state in enumerate(free)}
    leaves |= {} if drives is None else {"drives": drives}
    cotangents = [torch.randn_like(t) for t in (output, *last)]
    ours, papers = (
        torch.autograd.grad(found, list(leaves.values()), cotangents, materialize_grads=True,
                            allow_unused=True)
        for found in ((output, *last), (expected, *known))
    )  # fmt: skip
    for name, actual, paper in zip(leaves, ours, papers, strict=True):
        assert_near(actual, paper, kind, f"gradient of {name}")


@kinds
def test_a_cell_has_its_parameters_and_no_others(kind):
    layer = nn.Recurrent(kind, I, H, 2, bidirectional=True)
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        width = I if suffix.startswith("l0") else 2 * H
        assert getattr(layer, f"weight_ih_{suffix}").shape == (kind.x_gates * H, width)
        if kind.h_gates:
            assert getattr(layer, f"weight_hh_{suffix}").shape == (kind.h_gates * H, H)
        else:
            assert not hasattr(layer, f"weight_hh_{suffix}")
    own = {
        zoo.PeepholeLSTM: {"peephole": (3, H)},
        zoo.IndRNN: {"u": (H,)},
        zoo.LEM: {"weight_zy": (H, H)},
    }
    for suffix in ("l0", "l1_reverse"):
        cell = getattr(layer, f"cell_{suffix}")
        found = {name: tuple(weight.shape) for name, weight in cell.named_parameters()}
        assert found == own.get(kind, {})


@pytest.mark.parametrize("name", zoo.__all__)
def test_a_cell_is_twenty_lines_at_most_and_names_its_paper(name):
    kind = getattr(zoo, name)
    (tree,) = ast.parse(inspect.getsource(kind)).body
    lines = tree.end_lineno - len(ast.get_docstring(tree, clean=False).splitlines())
    assert lines <= 20
    paper = kind.__doc__.partition("Source: ")[2]
    assert re.search(r"(19|20)\d\d, (arXiv:\d{4}\.\d{5}|doi:10\.\S+)", paper)


@pytest.mark.parametrize("name", zoo.__all__)
def test_the_page_says_what_a_cell_keeps_for_backward(name):
    (row,) = re.findall(
        rf"^\| `{name}` \|.*\| (\d*) \| .*\|$", PAGE.read_text("utf-8"), re.MULTILINE
    )
    kind = getattr(zoo, name)
    assert row == (str(nn.Recurrent(kind, I, H)._record().saved) if kind.engine else "")


@kinds
def test_the_engine_runs_all_but_lem(kind):
    layer = nn.Recurrent(kind, I, H, 2)
    who = ostinato.explain(layer, torch.randn(T, B, I))
    assert (
        who.rpartition("\n")[2] == ("reference" if kind is zoo.LEM else "fast path") + ": runs it"
    )


# ---- what single cells promise ----


@pytest.mark.parametrize("forget", ["sigmoid", "exp"])
@pytest.mark.parametrize("size", [1e0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_slstm_at_gates_of_any_size(size, forget, dtype):
    """An exponential would overflow from 88 on in float32, from 709 on in float64."""
    kind = zoo.SLSTM if forget == "sigmoid" else ExpForget
    layer, x, _ = drawn(kind)
    with torch.no_grad():
        layer.weight_ih_l0[: 2 * H] *= size
    layer = layer.to(dtype)
    x = x.detach().to(dtype)
    output, (_, c, n, m) = layer(x)
    assert all(state.isfinite().all() for state in (output, c, n, m))
    assert (n >= 1).all()
    output.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in layer.parameters())
    # From the same numbers, as float64 has them.
    w = Weights(layer.double(), "l0", kind)
    for b in range(B):
        h_0 = torch.zeros(H, dtype=torch.float64)
        expected, _ = slstm_of_logarithms(x[:, b].double(), h_0, w, forget)
        # An exponent is a difference of numbers of this size, summed over the steps.
        bound = tolerance(dtype, T)
        bound = {name: value * size * T for name, value in bound.items()}
        torch.testing.assert_close(output[:, b].double(), torch.stack(expected), **bound)


def test_slstm_begins_where_exp_of_every_gate_is_zero():
    layer, x, _ = drawn(zoo.SLSTM)
    layer.float()
    with torch.no_grad():
        layer.bias_ih_l0[:H] = -1e3
        output, _ = layer(x.float())
        layer.bias_ih_l0[:H] = 0
        expected, _ = layer(x.float())
    # c / n does not change where all input gates are smaller by one factor.
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-3)


def test_slstm_is_the_papers_stabilised_loop_at_large_gates():
    """Beck 2024, equations 15 to 17, m carried as in the paper."""
    layer, x, _ = drawn(zoo.SLSTM)
    with torch.no_grad():
        layer.weight_ih_l0[: 2 * H] *= 200
        output, (_, _, _, m_n) = layer(x)
    w = Weights(layer, "l0", zoo.SLSTM)
    for row in range(B):
        h, c, n = (torch.zeros(H, dtype=torch.float64) for _ in range(3))
        m = torch.full((H,), -math.inf, dtype=torch.float64)
        for t, x_t in enumerate(x[:, row]):
            i, f, z, o = (W @ x_t + R @ h + b for W, R, b in zip(w.W, w.U, w.b, strict=True))
            log_f = torch.nn.functional.logsigmoid(f)
            new = torch.maximum(log_f + m, i)
            weight, kept = torch.exp(i - new), torch.exp(log_f + m - new)
            c, n, m = kept * c + weight * tanh(z), kept * n + weight, new
            h = sigma(o) * (c / n)
            torch.testing.assert_close(output[t, row], h, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(m_n[0, row], m, rtol=1e-9, atol=1e-9)


def test_cornn_does_not_depend_on_the_second_bias():
    layer, x, _ = drawn(zoo.CoRNN)
    output, _ = layer(x)
    output.square().sum().backward()
    assert layer.bias_hh_l0.grad[:H].abs().max() > 1e-6
    assert layer.bias_hh_l0.grad[H:].abs().max() < 1e-12
    with torch.no_grad():
        layer.bias_hh_l0[H:] += 3
    torch.testing.assert_close(layer(x)[0], output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_cornn_goes_on_from_its_last_states(bias):
    layer, x, _ = drawn(zoo.CoRNN, bias=bias)
    whole, last = layer(x)
    first, states = layer(x[:1])
    rest, ends = layer(x[1:], states)
    torch.testing.assert_close(torch.cat([first, rest]), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ends, last, rtol=1e-12, atol=1e-12)


def test_grud_gives_the_states_before_their_decay():
    layer, x, gamma = drawn(zoo.GRUD)
    output, (d_n, h_n), (d, h) = layer(x, drives=gamma, return_all_states=True)
    torch.testing.assert_close(d[0], output)
    torch.testing.assert_close(output, gamma * h[0])
    torch.testing.assert_close(h_n[0], h[0, -1])
    torch.testing.assert_close(d_n[0], d[0, -1])


def test_grud_without_decay_is_a_gru():
    layer, x, gamma = drawn(zoo.GRUD)
    gru = nn.GRU(I, H, dtype=torch.float64)
    gru.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, drives=torch.ones_like(gamma))[0], gru(x)[0])


@pytest.mark.parametrize(("kind", "other"), [(zoo.ZoneoutGRU, nn.GRU), (zoo.ZoneoutLSTM, nn.LSTM)])
def test_zoneout_of_nothing_and_of_all(kind, other):
    layer, x, drives = drawn(kind)
    plain = other(I, H, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, drives=torch.zeros_like(drives))[0], plain(x)[0])
    assert not layer(x, drives=torch.ones_like(drives))[0].any()


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.5])
def test_a_class_that_derives_from_janet_sets_another_beta(beta):
    other = type("Other", (zoo.JANET,), {"beta": beta})
    layer, x, _ = drawn(other)
    w = Weights(layer, "l0", other)
    h = torch.zeros(B, H, dtype=torch.float64)
    for t in range(T):
        s = x[t] @ w.W[0].T + h @ w.U[0].T + w.b[0]
        n = tanh(x[t] @ w.W[1].T + h @ w.U[1].T + w.b[1])
        h = sigma(s) * h + (1 - sigma(s - beta)) * n
    torch.testing.assert_close(layer(x)[0][-1], h)
