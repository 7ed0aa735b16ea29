"""torch.export: programs for any number of steps and rows, saved, loaded and trained.

Legend: T steps, B batch.
"""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.export import Dim

from ostinato import nn
from support.cells import CELL_MODULES
from support.devices import assert_near, on_cpu

# torch's own modules use what torch has deprecated.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning"
)

T, B = Dim("T"), Dim("B")
SHAPES = [(5, 2), (9, 3), (1, 1), (0, 2), (3, 0)]

LAYERS = {
    "RNN": lambda: nn.RNN(3, 4),
    "RNN relu": lambda: nn.RNN(3, 4, 2, nonlinearity="relu", bidirectional=True),
    "GRU": lambda: nn.GRU(3, 4),
    "GRU layers": lambda: nn.GRU(3, 4, 3, bias=False),
    "GRU both ways": lambda: nn.GRU(3, 4, 2, bidirectional=True),
    "LSTM": lambda: nn.LSTM(3, 4),
    "LSTM projected": lambda: nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
}
# torch's operator is exported for one number of steps.
projects = pytest.mark.cpu("no kernel for GPUs projects")
per_layer = [pytest.param(k, marks=[projects] * ("projected" in k)) for k in LAYERS]


def leaves(results):
    return torch.utils._pytree.tree_leaves(results)


def nodes(program):
    """The calls of our operator."""
    return [n for n in program.graph.nodes if "ostinato.layer" in str(n.target)]


def arguments(node):
    """The arguments of a call of our operator, by name."""
    schema = torch.ops.ostinato.layer.default._schema.arguments
    return {**dict(zip([a.name for a in schema], node.args, strict=False)), **node.kwargs}


def export(model, *args, shapes, strict=False):
    with torch.no_grad():
        return torch.export.export(model.eval(), args, dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", per_layer)
def test_any_number_of_steps_and_rows(name, strict):
    layer = LAYERS[name]()
    program = export(layer, torch.randn(5, 2, 3), shapes=({0: T, 1: B},), strict=strict)
    assert len(nodes(program)) == layer.num_layers
    # Nothing was found that would bound T or B.
    assert {str(r) for r in program.range_constraints.values()} == {"VR[0, int_oo]"}
    module = program.module()
    with torch.no_grad():
        for steps, batch in SHAPES:
            x = torch.randn(steps, batch, 3)
            assert_near(module(x), layer(x))


@pytest.mark.parametrize("cls", [nn.RNN, nn.GRU])
def test_initial_states(cls):
    layer = cls(3, 4, 2, batch_first=True)
    program = export(
        layer, torch.randn(2, 5, 3), torch.randn(2, 2, 4), shapes=({0: B, 1: T}, {1: B})
    )
    x, h_0 = torch.randn(3, 7, 3), torch.randn(2, 3, 4)
    with torch.no_grad():
        assert_near(program.module()(x, h_0), layer(x, h_0))


def test_both_initial_states_of_an_lstm():
    out = 2 if on_cpu() else 4  # no kernel for GPUs projects
    layer = nn.LSTM(3, 4, bidirectional=True, proj_size=out % 4)
    states = torch.randn(2, 2, out), torch.randn(2, 2, 4)
    shapes = ({0: T, 1: B}, ({1: B}, {1: B}))
    program = export(layer, torch.randn(5, 2, 3), states, shapes=shapes)
    x, states = torch.randn(7, 3, 3), (torch.randn(2, 3, out), torch.randn(2, 3, 4))
    with torch.no_grad():
        assert_near(program.module()(x, states), layer(x, states))


def test_one_sequence_and_cells():
    program = export(nn.GRU(3, 4), torch.randn(5, 3), shapes=({0: T},))
    assert program.module()(torch.randn(8, 3))[0].shape == (8, 4)
    for name in CELL_MODULES:
        cell = getattr(nn, name)(3, 4)
        program = export(cell, torch.randn(2, 3), shapes=({0: B},))
        assert len(nodes(program)) == 1
        x = torch.randn(6, 3)
        with torch.no_grad():
            assert_near(program.module()(x), cell(x))


class Ragged(torch.nn.Module):
    """Rows of different lengths within a model."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.gru = nn.GRU(3, 4, 2, bidirectional=True)
        self.lstm = nn.LSTM(8, 5)

    def forward(self, x, lengths):
        y, h_n = self.gru(torch.tanh(self.first(x)), lengths=lengths)
        return y, h_n, *self.lstm(y, lengths=lengths)


def test_lengths():
    model = Ragged()
    program = export(
        model, torch.randn(5, 2, 3), torch.tensor([3, 5]), shapes=({0: T, 1: B}, {0: B})
    )
    assert len(nodes(program)) == 3
    for lengths in ([3, 5], [7, 0, 4]):
        x = torch.randn(max(lengths), len(lengths), 3)
        with torch.no_grad():
            actual, expected = (f(x, torch.tensor(lengths)) for f in (program.module(), model))
        assert_near(actual, expected)


def test_what_backward_needs_is_kept_only_where_gradients_are_on():
    x = torch.randn(5, 2, 3)
    layer = nn.GRU(3, 4)
    with torch.no_grad():
        (node,) = nodes(torch.export.export(layer, (x,)))
    assert arguments(node)["keep"] is False
    (node,) = nodes(torch.export.export(layer, (x,)))
    assert arguments(node)["keep"] is True


def test_a_program_trains():
    layer = nn.LSTM(3, 4, 2)
    program = torch.export.export(layer, (torch.randn(5, 2, 3),), dynamic_shapes=({0: T, 1: B},))
    module = program.module()
    x = torch.randn(7, 3, 3)
    actual, expected = (
        torch.autograd.grad(f(x)[0].square().sum(), list(f.parameters())) for f in (module, layer)
    )
    assert_near(actual, expected)


def test_decompositions_leave_the_operator():
    program = export(nn.GRU(3, 4, 2), torch.randn(5, 2, 3), shapes=({0: T, 1: B},))
    assert len(nodes(program.run_decompositions())) == 2


LOAD = """
import sys
import torch
{import_}
program = torch.export.load({program!r})
module = program.module()
for x, expected in torch.load({cases!r}):
    for a, e in zip(torch.utils._pytree.tree_leaves(module(x)), expected, strict=True):
        assert torch.equal(a, e)
assert "ostinato.nn" not in sys.modules
print("loaded")
"""


def load(folder, import_):
    """Load and run a program in a process of its own."""
    names = {"program": str(folder / "layer.pt2"), "cases": str(folder / "cases.pt")}
    code = LOAD.format(import_=import_, **names)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_a_saved_program_needs_the_operators_and_not_the_modules(tmp_path):
    layer = nn.LSTM(3, 4, 2, bidirectional=True)
    program = export(layer, torch.randn(5, 2, 3), shapes=({0: T, 1: B},))
    torch.export.save(program, tmp_path / "layer.pt2")
    with torch.no_grad():
        inputs = [torch.randn(7, 3, 3), torch.randn(2, 1, 3)]
        torch.save([(x, leaves(layer(x))) for x in inputs], tmp_path / "cases.pt")
    run = load(tmp_path, "import ostinato.ops")
    assert run.stdout.strip() == "loaded", run.stderr
    run = load(tmp_path, "")
    assert run.returncode
    assert "torch.ops.ostinato.layer.default" in run.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a compiler")
def test_compiled_ahead_of_time(tmp_path):
    layer = nn.GRU(3, 4, 2)
    program = export(layer, torch.randn(5, 2, 3), shapes=({0: T, 1: B},))
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "layer.pt2")
    )
    loaded = torch._inductor.aoti_load_package(path)
    x = torch.randn(9, 3, 3)
    with torch.no_grad():
        assert_near(loaded(x), layer(x))
