"""Graphs: their text, and the same bits as the step on arrays of both libraries."""

import math

import numpy as np
import pytest
import torch

from ostinato.own.graph import Graph, Node, is_own
from support.steps import CELLS, FUNCTIONS, cell_of

# Written with other operations than torch's one: the last digits may differ.
PARTS = ("lerp", "logsigmoid", "alpha", "addcdiv", "addcmul", "mish", "softsign", "gelu by erf")
NAMES = [name for name in FUNCTIONS if name not in PARTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.__name__)
def test_cells_have_the_bits_of_their_steps(kind, dtype):
    cell = kind()
    arguments = cell.draw(dtype)
    made, wanted = cell.graph().run(*arguments), cell.run(*arguments)
    close = {"rtol": 1e-6, "atol": 1e-6} if kind.__name__ == "Exponential" else {}
    for new, expected in zip(made, wanted, strict=True):
        torch.testing.assert_close(new, expected, **(close or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_functions_have_the_bits_of_their_steps(name, dtype):
    cell = cell_of(*FUNCTIONS[name])
    arguments = cell.draw(dtype, scale=1.5)
    (made,), (wanted,) = cell.graph().run(*arguments), cell.run(*arguments)
    torch.testing.assert_close(made, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numpy_computes_the_same(name):
    cell = cell_of(*FUNCTIONS[name])
    arguments = cell.draw(scale=1.5)
    (wanted,) = cell.run(*arguments)
    for dtype, rtol in ((np.float64, 1e-12), (np.float32, 2e-5)):
        arrays = [[a.numpy().astype(dtype) for a in each] for each in arguments]
        (made,) = cell.graph().run(*arrays)
        assert made.dtype == dtype
        np.testing.assert_allclose(made, wanted.numpy(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.__name__)
def test_a_text_is_a_graph(kind):
    graph = kind().graph()
    assert is_own(graph.text())
    assert Graph.parse(graph.text()) == graph
    # The same step has the same text, whoever runs it.
    assert kind().graph().text() == graph.text()


def test_a_text_tells_all_numbers_apart():
    numbers = [0.0, -0.0, math.inf, -math.inf, math.nan, 0.1, 1e-320, -1.5, 1e300]
    texts = {Node("const", (), number).text() for number in numbers}
    assert len(texts) == len(numbers)
    for number in numbers:
        graph = Graph("One", 1, 0, 1, 0, 0, (Node("const", (), number),), (0,))
        (node,) = Graph.parse(graph.text()).nodes
        assert node.value.hex() == number.hex()


def test_the_text_of_the_documentation_is_read():
    text = (
        "own:MinimalGatedUnit(x=2,h=2,s=1,p=0,d=0)"
        "{x0;h0;add 0 1;sigmoid 2;c0x1.0p+0;sub 4 3;pow 5 2}->6"
    )
    assert Graph.parse(text).text() == text


WRONG = {
    "no graph": "gru",
    "nothing behind": "own:A(x=1,h=0,s=1,p=0,d=0){x0}",
    "more behind": "own:A(x=1,h=0,s=1,p=0,d=0){x0}->0;",
    "an unknown operation": "own:A(x=1,h=0,s=1,p=0,d=0){x0;sin 0}->1",
    "a later place": "own:A(x=1,h=0,s=1,p=0,d=0){x0;neg 1}->1",
    "a place before all": "own:A(x=1,h=0,s=1,p=0,d=0){x0;neg -1}->1",
    "too few arguments": "own:A(x=1,h=0,s=1,p=0,d=0){x0;add 0}->1",
    "too many arguments": "own:A(x=1,h=0,s=1,p=0,d=0){x0;neg 0 0}->1",
    "a leaf out of range": "own:A(x=1,h=0,s=1,p=0,d=0){x1}->0",
    "a leaf of which there is none": "own:A(x=1,h=0,s=1,p=0,d=0){h0}->0",
    "an output out of range": "own:A(x=1,h=0,s=1,p=0,d=0){x0}->1",
    "too few outputs": "own:A(x=1,h=0,s=2,p=0,d=0){x0}->0",
    "a mask as a state": "own:A(x=1,h=0,s=1,p=0,d=0){x0;lt 0 0}->1",
    "a mask as a number": "own:A(x=1,h=0,s=1,p=0,d=0){x0;lt 0 0;neg 1}->2",
    "a number as a mask": "own:A(x=1,h=0,s=1,p=0,d=0){x0;where 0 0 0}->1",
    "a power too high": "own:A(x=1,h=0,s=1,p=0,d=0){x0;pow 0 65}->1",
    "a power of one": "own:A(x=1,h=0,s=1,p=0,d=0){x0;pow 0 1}->1",
    "no exponent": "own:A(x=1,h=0,s=1,p=0,d=0){x0;pow 0}->1",
    "no state": "own:A(x=1,h=0,s=0,p=0,d=0){x0}->0",
    "a name that is none": "own:A b(x=1,h=0,s=1,p=0,d=0){x0}->0",
    "a number in decimals": "own:A(x=1,h=0,s=1,p=0,d=0){c1.5}->0",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=list(WRONG))
def test_what_is_no_graph_is_refused(text):
    with pytest.raises(ValueError, match=r"expected"):
        Graph.parse(text)


def test_states_of_parameters_and_numbers_are_as_large_as_states():
    text = "own:A(x=1,h=0,s=2,p=1,d=0){p0;sigmoid 0;c0x1.8p+1}->1,2"
    like = torch.zeros(3, 5, dtype=torch.float64)
    made = Graph.parse(text).run([like], [], [like, like], torch.zeros(1, 5), [])
    assert [new.shape for new in made] == [(3, 5)] * 2
    assert made[0].eq(0.5).all()
    assert made[1].eq(3).all()
