"""A program of torch.export in operators of ATen alone, by `ostinato.decompositions()`.

Legend: T steps, B batch.
"""

import subprocess
import sys

import pytest
import torch
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import ostinato
from ostinato import nn
from support.cells import CELL_MODULES, has_c
from support.devices import assert_near

# torch's own modules use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning"
)

B = Dim("B")
LAYERS = {
    "RNN": lambda **more: nn.RNN(3, 4, **more),
    "RNN relu": lambda **more: nn.RNN(3, 4, 2, nonlinearity="relu", bidirectional=True, **more),
    "GRU": lambda **more: nn.GRU(3, 4, 2, bidirectional=True, **more),
    "GRU without biases": lambda **more: nn.GRU(3, 4, bias=False, batch_first=True, **more),
    "LSTM": lambda **more: nn.LSTM(3, 4, 2, bidirectional=True, **more),
    "LSTM projected": lambda **more: nn.LSTM(3, 4, proj_size=2, **more),
}
TABLES = {
    "ours alone": ostinato.decompositions,
    "merged": lambda: {**torch.export.default_decompositions(), **ostinato.decompositions()},
}


def merged():
    return TABLES["merged"]()


def export(model, *args, shapes=None):
    with torch.no_grad():
        return torch.export.export(model.eval(), args, dynamic_shapes=shapes)


def namespaces(program):
    """The libraries whose operators a program calls."""
    found = set()
    for node in program.graph.nodes:
        if node.op == "call_function":
            found.add(getattr(node.target, "namespace", node.target.__module__))
    return found


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", LAYERS)
def test_nothing_but_aten_and_the_same_numbers(name, table):
    layer = LAYERS[name]()
    x = torch.randn(5, 2, 3)
    program = export(layer, x)
    assert "ostinato" in namespaces(program)
    program = program.run_decompositions(TABLES[table]())
    assert namespaces(program) <= {"aten", "_operator"}
    with torch.no_grad():
        assert_near(program.module()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """16 bits are how arrays are stored, as on the engine: the sums are of float32."""
    layer = nn.LSTM(8, 32, dtype=dtype)
    x = torch.randn(12, 2, 8, dtype=dtype)
    program = export(layer, x).run_decompositions(merged())
    found = tree_leaves(program.module()(x))
    with torch.no_grad():
        expected = tree_leaves(layer(x))
    for a, e in zip(found, expected, strict=True):
        assert a.dtype == dtype
        # One rounding at the end: at most the last bit apart.
        eps = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-13
        torch.testing.assert_close(a, e, rtol=eps, atol=eps / 16)


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_initial_states_lengths_and_resets_for_any_number_of_rows(name):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LAYERS[name]()

        def forward(self, x, hx, lengths, resets):
            return self.layer(
                x, hx, lengths=lengths, resets=resets, reset_to=hx, return_all_states=True
            )

    model = Model()

    def arguments(*lengths):
        batch = len(lengths)
        h_0, c_0 = torch.randn(2, 4, batch, 4)
        resets = torch.rand(6, batch) < 0.3
        hx = (h_0, c_0) if has_c(name) else h_0
        return torch.randn(6, batch, 3), hx, torch.tensor(lengths), resets

    each = ({1: B}, {1: B}) if has_c(name) else {1: B}
    shapes = ({1: B}, each, {0: B}, {1: B})
    program = export(model, *arguments(6, 4), shapes=shapes).run_decompositions(merged())
    assert namespaces(program) <= {"aten", "_operator"}
    for lengths in ((6, 4), (0, 6, 1), (3, 3, 3, 3)):
        args = arguments(*lengths)
        with torch.no_grad():
            assert_near(program.module()(*args), model(*args))


@pytest.mark.parametrize("name", CELL_MODULES)
def test_a_cell_for_any_number_of_rows(name):
    cell = getattr(nn, name)(3, 4)
    program = export(cell, torch.randn(2, 3), shapes=({0: B},)).run_decompositions(merged())
    assert namespaces(program) <= {"aten", "_operator"}
    x = torch.randn(7, 3)
    with torch.no_grad():
        assert_near(program.module()(x), cell(x))


def test_a_program_that_is_to_be_trained():
    """Exported with gradients on: torch differentiates what stands in the operator's place."""
    layer = nn.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    program = torch.export.export(layer, (x,)).run_decompositions(ostinato.decompositions())
    assert namespaces(program) <= {"aten", "_operator"}
    module = program.module()
    actual, expected = (
        torch.autograd.grad(f(x)[0].square().sum(), list(f.parameters())) for f in (module, layer)
    )
    assert_near(actual, expected)


def test_steps_that_may_change_are_refused():
    program = export(nn.GRU(3, 4), torch.randn(5, 2, 3), shapes=({0: Dim("T")},))
    with pytest.raises(NotImplementedError, match=r"the number of steps must be fixed, got s"):
        program.run_decompositions(ostinato.decompositions())


def test_packed_rows_are_refused():
    weights = list(torch.nn.GRUCell(3, 4).parameters())

    class Model(torch.nn.Module):
        def forward(self, rows, batch_sizes):
            return torch.ops.ostinato.layer(
                *(rows, batch_sizes, 3, None, None, weights, "gru", True, False, False),
                *(None, None, None, None, False, False),
            )[0]

    program = export(Model(), torch.randn(7, 3), torch.tensor([3, 2, 2]))
    with pytest.raises(NotImplementedError, match=r"^batch_sizes: .* give the layer a padded"):
        program.run_decompositions(ostinato.decompositions())


LOAD = """
import sys
import torch
module = torch.export.load({program!r}).module()
for x, expected in torch.load({cases!r}):
    for a, e in zip(torch.utils._pytree.tree_leaves(module(x)), expected, strict=True):
        torch.testing.assert_close(a, e)
assert not any(name.startswith("ostinato") for name in sys.modules)
print("loaded")
"""


def test_a_saved_program_needs_no_ostinato(tmp_path):
    layer = nn.LSTM(3, 4, 2, bidirectional=True)
    program = export(layer, torch.randn(5, 2, 3), shapes=({1: B},)).run_decompositions(merged())
    torch.export.save(program, tmp_path / "layer.pt2")
    with torch.no_grad():
        inputs = [torch.randn(5, 3, 3), torch.randn(5, 1, 3)]
        torch.save([(x, tree_leaves(layer(x))) for x in inputs], tmp_path / "cases.pt")
    names = {"program": str(tmp_path / "layer.pt2"), "cases": str(tmp_path / "cases.pt")}
    run = subprocess.run(
        [sys.executable, "-c", LOAD.format(**names)], capture_output=True, text=True
    )
    assert run.stdout.strip() == "loaded", run.stderr
