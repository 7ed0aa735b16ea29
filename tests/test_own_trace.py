"""What a trace records, and the stand-in for a cell."""

import inspect
import re

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from ostinato.own.errors import StepError
from ostinato.own.trace import bind, parameter_rows, trace
from support.steps import CELLS, Gru, Peephole, Step


def nodes(step, **sizes):
    """Trace a step of one gate; return the words of its nodes."""
    cell = type("Traced", (Step,), {"step": step, **sizes})()
    text = cell.graph().text()
    return text[text.index("{") + 1 : text.index("}")].split(";")


def test_a_graph_has_what_is_needed_alone_and_each_thing_once():
    def step(self, x, h, state):
        torch.exp(state)
        a = torch.tanh(x[0] + h[0])
        return a * torch.tanh(x[0] + h[0]) + 1 * a

    words = "x0;h0;add 0 1;tanh 2;mul 3 3;c0x1.0p+0;mul 5 3;add 4 6"
    assert nodes(step) == words.split(";")


def test_the_order_of_leaves_is_not_that_of_the_step():
    assert nodes(lambda self, x, h, s: s + h[0] + x[0]) == ["x0", "h0", "s0", "add 2 1", "add 3 0"]


WRITTEN = {
    "v.sigmoid()": (lambda v: v.sigmoid(), "sigmoid 0"),
    "torch.special.expit": (torch.special.expit, "sigmoid 0"),
    "F.sigmoid": (functional.sigmoid, "sigmoid 0"),
    "F.tanh": (functional.tanh, "tanh 0"),
    "F.relu": (functional.relu, "relu 0"),
    "nn.Tanh": (nn.Tanh(), "tanh 0"),
    "nn.SiLU": (nn.SiLU(), "silu 0"),
    "nn.GELU": (nn.GELU(approximate="tanh"), "gelu 0"),
    "nn.Softplus": (nn.Softplus(), "softplus 0"),
    "torch.special.erf": (torch.special.erf, "erf 0"),
    "torch.absolute": (torch.absolute, "abs 0"),
    "abs": (abs, "abs 0"),
    "torch.negative": (torch.negative, "neg 0"),
    "v ** 3": (lambda v: v**3, "pow 0 3"),
    "v ** -2.0": (lambda v: v**-2.0, "pow 0 -2"),
    "v ** 0.5": (lambda v: v**0.5, "sqrt 0"),
    "v ** -0.5": (lambda v: v**-0.5, "rsqrt 0"),
    "torch.square": (torch.square, "mul 0 0"),
    "torch.true_divide": (lambda v: torch.true_divide(v, v), "div 0 0"),
    "torch.minimum": (lambda v: torch.minimum(v, v), "minimum 0 0"),
    "torch.min": (lambda v: torch.min(v, v), "minimum 0 0"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_one_operation_has_many_names(name):
    function, expected = WRITTEN[name]
    assert nodes(lambda self, x, h, state: function(x[0])) == ["x0", expected]


class Shy(nn.Module):
    """A cell with a property, a method, a number, a submodule and a base."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.rates = nn.Parameter(torch.ones(2, 5))
        self.row = nn.Parameter(torch.ones(1, 5))
        self.dt = 0.1
        self.act = nn.Tanh()

    @property
    def double(self):
        return self.scale * 2

    def inner(self, a):
        return self.act(a) * self.dt

    def step(self, x, h, state):
        a, b = self.rates
        first, second = torch.exp(self.rates)
        third, fourth = self.rates.unbind()
        (only,) = self.row
        rates = a * b + first * second + third * fourth + len(self.rates) * self.rates[-1]
        return self.inner(x[0]) * self.double + rates * only


ROWS = {"scale": 1, "rates": 2, "row": 1}


def test_a_step_uses_its_cell_as_ever():
    cell = Shy()
    graph = trace(cell.step, "Shy", 1, 0, 1, ROWS)
    assert graph.parameters == 4
    x, state = torch.randn(3, 5), torch.randn(3, 5)
    values = {name: torch.randn_like(getattr(cell, name)) for name in ROWS}
    stand_in = bind(cell, values)
    wanted = stand_in.step((x,), (), state)
    rows = torch.cat([value.reshape(-1, 5) for value in values.values()])
    (made,) = graph.run((x,), (), (state,), rows, ())
    assert torch.equal(made, wanted)
    # The cell is what it was.
    assert not torch.equal(cell.step((x,), (), state), wanted)
    assert isinstance(stand_in, Shy)
    assert isinstance(cell.scale, nn.Parameter)


def test_a_derived_step_calls_that_of_its_base():
    class Derived(Gru):
        def step(self, x, h, state):
            return 2 * super().step(x, h, state)

    cell = Derived()
    arguments = cell.draw()
    assert torch.equal(cell.graph().run(*arguments)[0], cell.run(*arguments)[0])


def test_a_parametrized_parameter_is_replaced_too():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    cell = Shy()
    parametrize.register_parametrization(cell, "scale", Double())
    graph = trace(cell.step, "Shy", 1, 0, 1, ROWS)
    assert graph == trace(Shy().step, "Shy", 1, 0, 1, ROWS)
    assert torch.equal(bind(cell, {"scale": torch.zeros(5)}).double, torch.zeros(5))


def test_parameters_are_counted_in_the_order_of_registration():
    assert parameter_rows(Shy(), 5) == {"scale": 1, "rates": 2, "row": 1}
    assert parameter_rows(nn.Module(), 5) == {}
    cell = Shy()
    parametrize.register_parametrization(cell, "scale", nn.Identity())
    assert parameter_rows(cell, 5) == {"rates": 2, "row": 1, "scale": 1}


@pytest.mark.parametrize(
    "wrong",
    [
        *(torch.zeros(()), torch.zeros(4), torch.zeros(5, 2), torch.zeros(0, 5)),
        *(torch.zeros(1, 1, 5), torch.zeros(5, dtype=torch.complex64)),
    ],
    ids=lambda wrong: f"{tuple(wrong.shape)} {wrong.dtype}",
)
def test_a_parameter_of_another_shape_is_refused(wrong):
    cell = Shy()
    cell.scale = nn.Parameter(wrong)
    expected = r"self.scale: expected a real tensor (5,) or (n, 5), got"
    with pytest.raises(StepError, match=re.escape(expected)):
        parameter_rows(cell, 5)


def test_a_parameter_of_a_submodule_is_refused():
    cell = Shy()
    cell.act = nn.PReLU()
    with pytest.raises(StepError, match=r"self\.act\.weight: expected a parameter of the cell"):
        parameter_rows(cell, 5)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_buffer_is_no_number(shape):
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("tau", torch.ones(shape))

        def step(self, x, h, state):
            return state * self.tau

    with pytest.raises(StepError, match=r"torch\.mul: self\.tau is a buffer"):
        trace(Buffered().step, "Buffered", 1, 0, 1, {})


def test_gradients_reach_what_is_bound():
    cell = Peephole()
    x, h, states, parameters, _ = cell.draw()
    peep = parameters.requires_grad_()
    h_new, _ = bind(cell, {"peep": peep}).step(x, h, tuple(states))
    (grad,) = torch.autograd.grad(h_new.sum(), peep)
    assert grad.shape == (3, 5)


@pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.__name__)
def test_a_trace_leaves_no_mark(kind):
    cell = kind()
    before, state = dict(cell.__dict__), torch.get_rng_state()
    with torch.no_grad():
        cell.graph()
    assert cell.__dict__ == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not inspect.ismethod(cell.__dict__.get("step"))


def test_a_function_has_no_cell():
    graph = trace(lambda x, h, state: x[0] * state, "Plain", 1, 0, 1, {})
    assert graph.text() == "own:Plain(x=1,h=0,s=1,p=0,d=0){x0;s0;mul 0 1}->2"
