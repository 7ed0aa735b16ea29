"""Lowered steps beside autograd through the step itself, in float64."""

import pytest
import torch
from torch.testing import assert_close

from ostinato.own.encoding import encode
from ostinato.own.lowering import lower
from support.blocks import OPERATIONS, interpret, run_program
from support.steps import CELLS, FUNCTIONS, cell_of

NAMES = list(OPERATIONS)
EXACT = {"rtol": 1e-12, "atol": 1e-13, "equal_nan": True}


def same_bits(found, wanted):
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(found, wanted, strict=True)
    )


def forward(cell, lowered, arguments):
    """Run both blocks of forward; return the loads, what is kept and the new states."""
    x, h, states, parameters, drives = arguments
    loads = {
        "gate": {gate: x[gate] + h[gate] for gate in lowered.joint},
        "x": x,
        "h": h,
        "state": states,
        "parameter": parameters,
        "drive": drives,
    }
    found = interpret(lowered.forward, loads)["next"]
    kept = interpret(lowered.forward_keep, loads)
    assert same_bits(found, kept["next"])
    saved = kept.get("save", [])
    assert len(saved) == lowered.saved
    # The new states behind h come last.
    assert same_bits(saved[len(saved) - cell.states + 1 :], found[1:])
    run_as_program(lowered.forward_keep, loads, kept)
    return loads, saved, found


def run_as_program(block, loads, wanted):
    """Hold a block's program against the block."""
    made = run_program(encode(block, NAMES), NAMES, loads)
    assert made.keys() == wanted.keys()
    assert all(same_bits(made[store], wanted[store]) for store in wanted)


def by_autograd(cell, arguments, grads):
    """Run the step; return the new states, and gradients by leaf."""
    leaves = [[a.clone().requires_grad_() for a in each] for each in arguments]
    made = [new.expand_as(grad) for new, grad in zip(cell.run(*leaves), grads, strict=True)]
    flat = [leaf for each in leaves for leaf in each]
    options = {"allow_unused": True, "materialize_grads": True}
    derivatives = iter(torch.autograd.grad(made, flat, grads, **options))
    named = zip("xhspd", leaves, strict=True)
    found = {(name, k): next(derivatives) for name, each in named for k in range(len(each))}
    return [new.detach() for new in made], found


def compare(cell, arguments, *, gradients=None, **tolerance):
    """Hold forward, what it keeps and backward against the step and autograd."""
    lowered = lower(cell.graph())
    grads = [torch.randn_like(state) for state in arguments[2]]
    expected, wanted = by_autograd(cell, arguments, grads)
    loads, saved, found = forward(cell, lowered, arguments)
    for new, reference in zip(found, expected, strict=True):
        assert_close(new, reference, **tolerance)
    # Backward has no gates.
    loads = {name: loads[name] for name in ("state", "parameter", "drive")}
    loads |= {"saved": saved, "output": found[0], "grad": grads}
    made = interpret(lowered.backward, loads)
    run_as_program(lowered.backward, loads, made)
    stores = [
        *zip(lowered.slots, made.get("slot", []), strict=True),
        *((("s", k), grad) for k, grad in enumerate(made["to_state"])),
        *((("d", k), grad) for k, grad in enumerate(made.get("to_drive", []))),
    ]
    for leaf, grad in stores:
        grad = grad.sum(0) if leaf[0] == "p" else grad
        assert_close(grad, wanted[leaf], **(gradients or tolerance))
    # A joint gate's input product has the gradient of its hidden one.
    assert all(torch.equal(wanted["x", gate], wanted["h", gate]) for gate in lowered.joint)
    return lowered


@pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_cells_have_the_derivatives_of_autograd(kind, scale):
    cell = kind()
    compare(cell, cell.draw(scale=scale), **EXACT)


# torch has a sixth in float32.
COARSE = {"hardsigmoid": {"rtol": 1e-7, "atol": 1e-7, "equal_nan": True}}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_has_the_derivative_of_autograd(name):
    cell = cell_of(*FUNCTIONS[name])
    compare(cell, cell.draw(scale=1.5), **COARSE.get(name, EXACT))


def special(cell, numbers):
    """Arguments in which each number meets each other one."""
    arguments = cell.draw()
    rows = torch.tensor(numbers, dtype=torch.float64)
    first, second = torch.meshgrid(rows, rows, indexing="ij")
    x, h, states, parameters, drives = arguments
    h, states = ([torch.ones_like(first) for _ in each] for each in (h, states))
    x = [first, second, torch.ones_like(first)][-len(x) :] if len(x) > 2 else [first, h[0]]
    return x, h, states, parameters, drives


@pytest.mark.parametrize("name", FUNCTIONS)
def test_at_ties_and_bounds_torch_decides(name):
    cell = cell_of(*FUNCTIONS[name])
    # Bounds of clamp, hardtanh, relu6 and the like, and ties of two values.
    numbers = [-1.0, -0.5, 0.0, 0.1, 0.5, 1.0, 1.5, -0.75, 2 / 3, 20 / 30]
    compare(cell, special(cell, numbers), **COARSE.get(name, EXACT))


# At NaN their gradient is another in torch, if a value is not; of lerp torch has a second formula.
OTHERWISE = ("hardtanh", "relu6", "hardsigmoid", "lerp")


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in OTHERWISE])
def test_what_is_no_number_becomes_what_it_does_in_torch(name):
    cell = cell_of(*FUNCTIONS[name])
    numbers = [float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 0.0]
    compare(cell, special(cell, numbers), **COARSE.get(name, EXACT))
