"""Steps that cannot be recorded: each is refused with the operation, the line and what there is.

A long file, because it is one list: ninety steps, each with what is to be said of it.
"""

import copy
import inspect
import math
import random

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ostinato.own.errors import StepError
from ostinato.own.trace import trace
from support.steps import Step

CASES = {}


def refused(operation, *words, **sizes):
    """Enter a step that is refused, and words of its error."""

    def enter(step):
        CASES[step.__name__] = (step, operation, words, sizes)
        return step

    return enter


def cell_of(step, sizes):
    attributes = {"x_gates": 2, "h_gates": 2, "step": step, **sizes}
    return type("Hostile", (Step,), attributes)()


# ---- branches and numbers of Python ----


@refused("bool(value)", "branch", "torch.where")
def branch(self, x, h, state):
    if x[0] > 0:  # here
        return state
    return x[0]


@refused("bool(value)", "torch.where")
def loop_while(self, x, h, state):
    while state < 1:  # here
        state = state + x[0]
    return state


@refused("bool(value)", "& | ~")
def both(self, x, h, state):
    mask = x[0] > 0 and h[0] > 0  # here
    return torch.where(mask, x[0], state)


@refused("bool(value)")
def chained(self, x, h, state):
    mask = 0 < x[0] < 1  # here
    return torch.where(mask, x[0], state)


@refused("bool(value)")
def builtin_max(self, x, h, state):
    return max(x[0], state)  # here


@refused("bool(value)")
def in_list(self, x, h, state):
    return state if state in [x[0], h[0]] else x[0]  # here


@refused("float(value)")
def as_float(self, x, h, state):
    return x[0] * float(state)  # here


@refused("int(value)")
def as_int(self, x, h, state):
    return x[0] * int(state)  # here


@refused("float(value)")
def by_math(self, x, h, state):
    return x[0] * math.exp(state)  # here


@refused("range(value)")
def as_range(self, x, h, state):
    for _ in range(state):  # here
        pass
    return state


@refused("complex(value)", "two states")
def as_complex(self, x, h, state):
    return complex(state)  # here


@refused("value.item")
def item(self, x, h, state):
    return x[0] * state.item()  # here


@refused("torch.round")
def rounded(self, x, h, state):
    return round(state)  # here


# ---- NumPy ----


@refused("TypeError", "ufunc")
def numpy_function(self, x, h, state):
    return np.tanh(state)  # here


@refused("numpy(value)", "torch's words")
def numpy_array(self, x, h, state):
    return torch.from_numpy(np.asarray(state))  # here


@refused("value.numpy")
def numpy_method(self, x, h, state):
    return state.numpy()  # here


# ---- shapes ----


@refused("len(value)", "(B, H)")
def length(self, x, h, state):
    return state * len(state)  # here


@refused("iteration over a value", "x[g]")
def iterated(self, x, h, state):
    return sum(state)  # here


@refused("value[index]")
def indexed(self, x, h, state):
    return state[:, 0]  # here


@refused("value.shape")
def shape(self, x, h, state):
    return state * state.shape[-1]  # here


@refused("value.reshape")
def reshaped(self, x, h, state):
    return state.reshape(-1)  # here


@refused("torch.cat", "come apart already")
def concatenated(self, x, h, state):
    return torch.cat([x[0], state], -1)  # here


@refused("torch.chunk")
def chunked(self, x, h, state):
    a, b = torch.chunk(state, 2, -1)  # here
    return a + b


@refused("value.unsqueeze")
def unsqueezed(self, x, h, state):
    return state.unsqueeze(0)  # here


@refused("torch.matmul", "x_gates and h_gates")
def product(self, x, h, state):
    return state @ x[0]  # here


@refused("torch.linear", "x_gates and h_gates")
def linear(self, x, h, state):
    return functional.linear(state, torch.ones(5, 5))  # here


@refused("torch.sum", "a sum over")
def total(self, x, h, state):
    return state - torch.sum(state, -1, keepdim=True)  # here


@refused("torch.max", "a sum over")
def largest(self, x, h, state):
    return x[0] - torch.max(state)  # here


@refused("torch.softmax")
def softmax(self, x, h, state):
    return functional.softmax(state, -1)  # here


@refused("torch.layer_norm")
def normalized(self, x, h, state):
    return functional.layer_norm(state, (5,))  # here


# ---- in place ----


@refused("value.add_", "in-place")
def added(self, x, h, state):
    return x[0].clone().add_(1)  # here


@refused("value[index] =", "in-place")
def assigned(self, x, h, state):
    state[0] = 0  # here
    return state


@refused("value +=", "in-place", "a = a + b")
def argument_grows(self, x, h, state):
    state += x[0]  # here
    return state


@refused("torch.relu", "in-place")
def relu_in_place(self, x, h, state):
    return functional.relu(x[0], inplace=True)  # here


@refused("torch.relu_", "in-place")
def relu_underscore(self, x, h, state):
    return torch.relu_(x[0])  # here


@refused("torch.tanh", "out")
def out(self, x, h, state):
    return torch.tanh(x[0], out=state)  # here


@refused("value.data =", "no attributes")
def data_set(self, x, h, state):
    state.data = x[0]  # here
    return state


# ---- the gradient ----


@refused("value.detach", "gradient")
def detached(self, x, h, state):
    return torch.tanh(x[0]) + state.detach()  # here


@refused("value.data", "gradient")
def data(self, x, h, state):
    return torch.tanh(x[0]) + state.data  # here


@refused("torch.no_grad", "gradient")
def without_grad(self, x, h, state):
    with torch.no_grad():
        state = torch.tanh(state)  # here
    return state


class Straight(torch.autograd.Function):
    """Without a gradient."""

    @staticmethod
    def forward(ctx, a):
        return a * 2  # here

    @staticmethod
    def backward(ctx, g):
        return g


@refused("torch.no_grad", "gradient")
def own_function(self, x, h, state):
    return Straight.apply(state)


# ---- random numbers, and what differs from run to run ----


@refused("torch.rand_like", "a drive")
def random_like(self, x, h, state):
    return state * torch.rand_like(state)  # here


@refused("torch.dropout", "a drive")
def dropout(self, x, h, state):
    return functional.dropout(state, 0.5)  # here


@refused("torch.bernoulli", "a drive")
def bernoulli(self, x, h, state):
    return torch.bernoulli(state)  # here


@refused("two runs", "a random number")
def random_number(self, x, h, state):  # first
    return state * random.random()


@refused("two runs", "a random number")
def random_tensor(self, x, h, state):  # first
    return state * torch.rand(())


@refused("self.count =", "one more state")
def counter(self, x, h, state):  # first
    self.count = 1
    return state


KEPT = []


@refused("torch.add", "another run")
def kept_for_later(self, x, h, state):
    KEPT.append(state)
    return x[0] + KEPT[0]  # here


@refused("copy(value)")
def copied(self, x, h, state):
    return copy.deepcopy(state)  # here


# ---- tensors, parameters and dtypes ----


@refused("torch.mul", "(5,)", "nn.Parameter")
def tensor(self, x, h, state):
    return state * torch.ones(5)  # here


@refused("torch.mul", "(5,)", "nn.Parameter")
def tensor_first(self, x, h, state):
    return torch.ones(5) * state  # here


@refused("torch.add", "got a tensor ()", "(H,)")
def trained_number(self, x, h, state):
    return state + torch.zeros((), requires_grad=True)  # here


@refused("torch.mul", "all 2 rows of self.rate", "self.rate[0]", rows={"rate": 2})
def all_rows(self, x, h, state):
    return state * self.rate  # here


@refused("self.rate[2]", "below 2", rows={"rate": 2})
def row_too_far(self, x, h, state):
    return state * self.rate[2]  # here


@refused("value[index]", rows={"rate": 1})
def element_of_parameter(self, x, h, state):
    return state * self.rate[0]  # here


@refused("value.add_", "in-place", rows={"rate": 1})
def parameter_in_place(self, x, h, state):
    self.rate.add_(1)  # here
    return state


@refused("AttributeError", "no attribute 'missing'")
def missing(self, x, h, state):
    return state * self.missing  # here


@refused("value.to(torch.float64)", "dtype")
def other_dtype(self, x, h, state):
    return state.to(torch.float64)  # here


@refused("value.half", "dtype")
def half(self, x, h, state):
    return state.half()  # here


@refused("value.cuda", "device")
def moved(self, x, h, state):
    return state.cuda()  # here


@refused("TypeError", "dtype")
def zeros_of_dtype(self, x, h, state):
    return torch.zeros_like(state, dtype=state.dtype)  # here


# ---- functions that a graph has not ----


@refused("torch.sin", "it is not recorded", "sigmoid")
def sine(self, x, h, state):
    return torch.sin(state)  # here


@refused("torch.pow", "torch.exp")
def fraction_power(self, x, h, state):
    return state**1.5  # here


@refused("torch.pow", "the exponent is a value")
def value_power(self, x, h, state):
    return 2**state  # here


@refused("torch.pow", "at most 64")
def large_power(self, x, h, state):
    return state**65  # here


@refused("torch.floor", "derivative")
def floored(self, x, h, state):
    return torch.floor(state)  # here


@refused("torch.remainder")
def remainder(self, x, h, state):
    return state % 2  # here


@refused("value.frobnicate", "it is not recorded")
def unknown_method(self, x, h, state):
    return state.frobnicate()  # here


@refused("torch.sigmoid", "got a mask")
def sigmoid_of_mask(self, x, h, state):
    return torch.sigmoid(x[0] > 0)  # here


@refused("torch.sub", "got a mask")
def one_minus_mask(self, x, h, state):
    return state * (1 - (x[0] > 0))  # here


@refused("torch.where", "expected a mask")
def where_of_number(self, x, h, state):
    return torch.where(x[0], state, h[0])  # here


@refused("torch.where", "two values")
def where_of_mask(self, x, h, state):
    return torch.where(x[0] > 0)  # here


@refused("torch.mul", "str")
def text(self, x, h, state):
    return state * "2"  # here


# ---- arguments ----


@refused("x[5]", "below 2", "x_gates = 2")
def gate_out_of_range(self, x, h, state):
    return x[5] + state  # here


@refused("h[0]", "below 0", "h_gates = 0", h_gates=0)
def no_hidden_gates(self, x, h, state):
    return x[0] + h[0]  # here


@refused("state[2]", "below 2", "states = 2", states=2)
def state_out_of_range(self, x, h, state):
    return state[2], state[0]  # here


@refused("ValueError", "unpack")
def too_many_gates(self, x, h, state):
    r, z, n = x  # here
    return r + z + n


@refused("TypeError", "must be Tensor")
def gates_as_value(self, x, h, state):
    return torch.tanh(x)  # here


@refused("TypeError")
def gates_added(self, x, h, state):
    return x + 1  # here


@refused("arguments", "step(self, x, h, state)")
def too_few_arguments(self, x, state):  # first
    return state


@refused("arguments", "step(self, x, h, state, drives)", drives=1)
def no_drives(self, x, h, state):  # first
    return state


# ---- results ----


@refused("return", "expected 2 states, got 3", states=2)
def three_states(self, x, h, state):  # first
    return x[0], h[0], x[1]


@refused("return", "expected a tuple of 2 states", states=2)
def one_state(self, x, h, state):  # first
    return x[0]


@refused("return", "expected one state, got a tuple of 2")
def two_states(self, x, h, state):  # first
    return x[0], h[0]


@refused("return of the new state", "NoneType")
def nothing(self, x, h, state):  # first
    torch.tanh(x[0])


@refused("return of the new state", "got a mask")
def mask(self, x, h, state):  # first
    return x[0] > 0


@refused("return of new state 1", "str", states=2)
def text_as_state(self, x, h, state):  # first
    return x[0], "c"


@refused("return of the new state", "(5,)")
def tensor_as_state(self, x, h, state):  # first
    return torch.zeros(5)


@refused("return of the new state", "all 2 rows", rows={"rate": 2})
def rows_as_state(self, x, h, state):  # first
    return self.rate


# ---- mistakes that are Python's to tell ----


@refused("NameError", "undefined")
def undefined(self, x, h, state):
    return undefined_name  # noqa: F821 # here


@refused("ZeroDivisionError")
def division(self, x, h, state):
    return state * (1 / 0)  # here


@refused("AssertionError")
def asserted(self, x, h, state):
    assert self.x_gates == 7, "seven gates"  # here
    return state


@refused("RecursionError")
def endless(self, x, h, state):
    return endless(self, x, h, state)  # here


@refused("torch.sum", "a sum over")
def within_checkpoint(self, x, h, state):
    return checkpoint(lambda a: a - torch.sum(a), state, use_reentrant=False)  # here


def line_of(step):
    """Return the line that is to blame: marked, or the step's first."""
    for sought, mark in ((step, "# here"), (Straight, "# here"), (step, "# first")):
        lines, first = inspect.getsourcelines(sought)
        found = [first + k for k, line in enumerate(lines) if line.rstrip().endswith(mark)]
        if found and not (sought is Straight and step is not own_function):
            return found[0] - (1 if mark == "# first" else 0)
    raise AssertionError(step)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_refused_by_its_line(name):
    step, operation, words, sizes = CASES[name]
    cell = cell_of(step, sizes)
    KEPT.clear()
    with pytest.raises(StepError) as caught:
        cell.graph()
    error = caught.value
    assert error.operation == operation
    for word in (*words, "Hostile.step: ", f"line {line_of(step)}"):
        assert word in str(error)
    assert (error.filename, error.lineno) == (__file__, line_of(step))


def test_there_are_many():
    assert len(CASES) >= 40


def test_a_helper_of_the_users_is_to_blame_where_it_fails():
    def helper(a):
        return a.sum()

    def step(x, h, state):
        return helper(state)

    with pytest.raises(StepError) as caught:
        trace(step, "Helped", 1, 1, 1, {})
    assert caught.value.lineno == inspect.getsourcelines(helper)[1] + 1


def test_an_error_is_what_people_catch():
    error = StepError("torch.sin", "it is not recorded")
    assert isinstance(error, TypeError)
    assert isinstance(error, ValueError)


# ---- what looks odd and is allowed ----


def traced(step, **sizes):
    return cell_of(step, sizes).graph()


ALLOWED = {
    "a step that ignores all": lambda self, x, h, state: 0,
    "a step that returns its input": lambda self, x, h, state: x[0],
    "a step that returns its state": lambda self, x, h, state: state,
    "a step that ignores its state": lambda self, x, h, state: torch.tanh(x[0]),
    "a 0-dim tensor": lambda self, x, h, state: torch.tensor(0.5),
    "zeros": lambda self, x, h, state: torch.zeros_like(state),
    "division by zero": lambda self, x, h, state: state / 0,
    "zero by zero": lambda self, x, h, state: torch.zeros_like(state) / torch.zeros_like(state),
    "NaN": lambda self, x, h, state: state * math.nan,
    "infinity": lambda self, x, h, state: torch.clamp(state, -math.inf, math.inf),
    "huge numbers": lambda self, x, h, state: state * 1e308 * 1e308,
    "numbers that overflow": lambda self, x, h, state: torch.zeros_like(state) + 1e308 * 10,
    "log of a negative number": lambda self, x, h, state: torch.log(torch.ones_like(state) * -1),
    "NumPy's numbers": lambda self, x, h, state: np.float32(0.5) * state + np.int64(2),
    "numbers of Python": lambda self, x, h, state: state * True + (x[0] if self.x_gates else 0),
    "hasattr": lambda self, x, h, state: state.sin() if hasattr(state, "sine") else state,
    "sum of gates": lambda self, x, h, state: sum(x) + sum(h, torch.zeros_like(state)),
    "one gate of all": lambda self, x, h, state: x[-1] * state,
}


@pytest.mark.parametrize("name", ALLOWED)
def test_odd_steps_compute_what_they_say(name):
    cell = cell_of(ALLOWED[name], {})
    arguments = cell.draw()
    (made,) = cell.graph().run(*arguments)
    (wanted,) = cell.run(*arguments)
    wanted = torch.as_tensor(wanted, dtype=torch.float64).expand(made.shape)
    torch.testing.assert_close(made, wanted, rtol=0, atol=0, equal_nan=True)


def test_what_grows_in_place_grows_under_all_its_names():
    def step(self, x, h, state):
        a = x[0] * 2
        b = a
        a += state
        a *= 3
        return a - b / 2

    cell = cell_of(step, {})
    arguments = cell.draw()
    torch.testing.assert_close(cell.graph().run(*arguments), cell.run(*arguments))
