"""torch.onnx.export as everybody writes it: by torch.export, by TorchScript, and both say the same.

Legend: T steps, B batch, I input, H hidden.
"""

import io

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

from ostinato import cudnn, nn
from support.cells import FIRST_CELLS, has_c, record_of
from support.devices import OnGpu
from support.pairs import cell_module
from support.tolerances import tolerance

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx.reference import ReferenceEvaluator  # noqa: E402

from support.onnx_models import (  # noqa: E402
    LAYERS,
    RECURRENT,
    B,
    Model,
    Ragged,
    Resets,
    Several,
    T,
    compare,
    run,
)

pytestmark = [
    # torch's exporter, where one Dim stands at several arguments.
    pytest.mark.filterwarnings("ignore:# The axis name. B will not be used:UserWarning"),
    # The exporter by TorchScript: about its age, and about every comparison of sizes.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def by_program(model, args, shapes):
    """Export by torch.export."""
    return torch.onnx.export(
        model.eval(), args, dynamic_shapes=shapes, dynamo=True, verbose=False
    ).model_proto


def by_script(model, args, shapes, **options):
    """Export by TorchScript, which names what changes otherwise."""
    names = [f"input_{k}" for k in range(len(tree_leaves(args)))]
    axes = {}
    if shapes is not None:
        found = tree_leaves(shapes, is_leaf=lambda shape: isinstance(shape, dict))
        axes = {
            name: {dim: each.__name__ for dim, each in shape.items()}
            for name, shape in zip(names, found, strict=True)
        }
    file = io.BytesIO()
    torch.onnx.export(
        model.eval(), args, file, dynamo=False, input_names=names, dynamic_axes=axes, **options
    )
    return onnx.load_from_string(file.getvalue())


WAYS = {"program": by_program, "script": by_script}
ways = pytest.mark.parametrize("export", WAYS.values(), ids=WAYS)


def recurrent(proto):
    return [node.op_type for node in proto.graph.node if node.op_type in RECURRENT]


@ways
@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_one_node_for_each_layer_and_any_number_of_steps_and_rows(name, with_states, export):
    """Layers, directions, biases or none, initial states or none."""
    cls, options = LAYERS[name]
    model = Several(cls, **options)

    def arguments(steps, batch):
        x = torch.randn(steps, batch, 3)
        return (x, model.states(batch)) if with_states else (x,)

    shapes = [{0: T, 1: B}]
    if with_states:
        each = ({1: B}, {1: B}) if cls is nn.LSTM else {1: B}
        shapes.append([each] * len(model.layers))
    proto = export(model, arguments(5, 2), tuple(shapes))
    assert recurrent(proto) == [record_of(name).layer] * sum(x.num_layers for x in model.layers)
    for steps, batch in ((5, 2), (9, 3), (1, 1)):
        compare(proto, model, *arguments(steps, batch))


@ways
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "bidirectional": True}])
def test_fixed_sizes(options, export):
    layer = nn.GRU(3, 4, 2, dropout=0.5, **options)
    proto = export(layer, (torch.randn(5, 2, 3),), None)
    assert recurrent(proto) == ["GRU", "GRU"]
    assert not any(d.dim_param for v in proto.graph.input for d in v.type.tensor_type.shape.dim)
    compare(proto, layer, torch.randn(5, 2, 3))


@ways
def test_one_sequence_without_a_batch(export):
    layer = nn.LSTM(3, 4, bidirectional=True)
    proto = export(layer, (torch.randn(5, 3),), ({0: T},))
    assert recurrent(proto) == ["LSTM"]
    compare(proto, layer, torch.randn(8, 3))


@ways
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_cell_is_a_node_of_one_step(name, with_states, bias, export):
    cell = cell_module(name, 3, 4, bias=bias)

    def arguments(batch):
        h, c = torch.randn(2, batch, 4)
        states = [(h, c) if has_c(name) else h] if with_states else []
        return torch.randn(batch, 3), *states

    each = ({0: B}, {0: B}) if has_c(name) else {0: B}
    proto = export(cell, arguments(2), ({0: B}, each) if with_states else ({0: B},))
    assert recurrent(proto) == [record_of(name).layer]
    for batch in (2, 5, 1):
        compare(proto, cell, *arguments(batch))


@ways
@pytest.mark.parametrize("name", LAYERS)
def test_lengths(name, export):
    """Unsorted, also of no steps; a row of no steps keeps its state."""
    cls, options = LAYERS[name]
    model = Ragged(cls, bidirectional=True, **options)

    def arguments(steps, *lengths):
        h_0, c_0 = torch.randn(2, 4, len(lengths), 4)
        hx = (h_0, c_0) if cls is nn.LSTM else h_0
        return torch.randn(steps, len(lengths), 3), hx, torch.tensor(lengths)

    each = ({1: B}, {1: B}) if cls is nn.LSTM else {1: B}
    proto = export(model, arguments(5, 5, 3), ({0: T, 1: B}, each, {0: B}))
    assert recurrent(proto) == [record_of(name).layer] * 2
    for steps, *lengths in ((5, 2, 5), (7, 7, 0, 4), (6, 1, 5)):
        compare(proto, model, *arguments(steps, *lengths))


class Packed(torch.nn.Module):
    """Rows that are packed, run and padded again, as torch's users write it."""

    def __init__(self, cls, is_sorted, **options):
        super().__init__()
        self.layer, self.is_sorted = cls(3, 4, **options), is_sorted

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=self.is_sorted)
        output, states = self.layer(packed)
        return pad_packed_sequence(output)[0], states


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("name", LAYERS)
def test_rows_that_the_model_packs(name, options, is_sorted):
    """By TorchScript, which knows what to do with them."""
    cls, more = LAYERS[name]
    model = Packed(cls, is_sorted, **options, **more)
    proto = by_script(model, (torch.randn(5, 2, 3), torch.tensor([5, 3])), ({0: T, 1: B}, {0: B}))
    assert recurrent(proto) == [record_of(name).layer] * model.layer.num_layers
    for lengths in ([5, 3], [9, 7, 2], [1]):
        lengths = lengths if is_sorted else lengths[::-1]
        compare(proto, model, torch.randn(max(lengths), len(lengths), 3), torch.tensor(lengths))


@ways
def test_a_model(export):
    model = Model()
    proto = export(model, (torch.randn(2, 5, 3),), ({0: B, 1: T},))
    assert recurrent(proto) == ["GRU", "GRU", "RNN", "LSTM"]
    compare(proto, model, torch.randn(3, 8, 3))


class States(torch.nn.Module):
    """A layer that returns every state."""

    def __init__(self, cls):
        super().__init__()
        self.layer = cls(3, 4, bidirectional=True)

    def forward(self, x):
        return self.layer(x, return_all_states=True)


@ways
def test_every_state_of_a_gru(export):
    """They are its output."""
    model = States(nn.GRU)
    proto = export(model, (torch.randn(5, 2, 3),), ({0: T, 1: B},))
    assert recurrent(proto) == ["GRU"]
    compare(proto, model, torch.randn(7, 3, 3))


@ways
@pytest.mark.parametrize("name", LAYERS)
def test_large_layers(name, export):
    """At sizes at which an exporter computes nothing ahead: here W_hh has 4 * 160 * 160."""
    cls, options = LAYERS[name]
    layer = cls(8, 160, bidirectional=True, **options)
    proto = export(layer, (torch.randn(5, 2, 8),), ({0: T, 1: B},))
    assert recurrent(proto) == [record_of(name).layer]
    compare(proto, layer, torch.randn(6, 3, 8))


@ways
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", [cell for cell in FIRST_CELLS if cell in LAYERS])
def test_other_dtypes(name, dtype, export):
    """ONNX's own evaluator runs them, but relu; ONNX Runtime has none of these in float64."""
    cls, options = LAYERS[name]
    layer = cls(3, 4, dtype=dtype, **options)
    proto = export(layer, (torch.randn(5, 2, 3, dtype=dtype),), ({0: T, 1: B},))
    x = torch.randn(7, 3, 3, dtype=dtype)
    names = [value.name for value in proto.graph.input]
    found = ReferenceEvaluator(proto).run(None, {names[0]: x.numpy()})
    with torch.no_grad():
        for a, e in zip(found, tree_leaves(layer(x)), strict=True):
            torch.testing.assert_close(torch.from_numpy(a), e, **tolerance(dtype, 16))


@pytest.mark.parametrize("opset", [11, 14, 17])
def test_older_versions_of_onnx(opset):
    layer = nn.GRU(3, 4, 2)
    args = (torch.randn(5, 2, 3),)
    proto = by_script(layer, args, ({0: T, 1: B},), opset_version=opset)
    assert proto.opset_import[0].version == opset
    compare(proto, layer, torch.randn(7, 3, 3))


class PackedOutside(torch.nn.Module):
    """Rows that the caller has packed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(3, 4)

    def forward(self, rows, batch_sizes):
        packed = torch.nn.utils.rnn.PackedSequence(rows, batch_sizes)
        return self.layer(packed)[0].data


_X = torch.randn(5, 2, 3)
REFUSED = {
    "proj_size": (lambda: nn.LSTM(3, 4, proj_size=2), (_X,), "ONNX has no LSTM with a projection"),
    "dtype": (
        lambda: nn.GRU(3, 4, dtype=torch.bfloat16),
        (_X.bfloat16(),),
        "ONNX has no GRU in bfloat16",
    ),
    "resets": (Resets, (_X, torch.zeros(5, 2, dtype=torch.bool)), "ONNX has no resets"),
    "all_c": (lambda: States(nn.LSTM), (_X,), "ONNX's LSTM returns the last c alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_onnx_has_no_node_for_is_refused_by_name(name):
    make, args, words = REFUSED[name]
    # torch's exporter tries twice, and tells the first error among words of its own.
    with pytest.raises(torch.onnx.OnnxExporterError, match=f"{name}: {words}"):
        by_program(make(), args, None)
    with pytest.raises(NotImplementedError, match=f"^{name}: {words}"):
        by_script(make(), args, None)


def test_rows_that_were_packed_outside_are_refused_by_name():
    args = torch.randn(7, 3), torch.tensor([3, 2, 2])
    with pytest.raises(NotImplementedError, match=r"^batch_sizes: ONNX has no packed sequences"):
        by_script(PackedOutside(), args, None)


class StrictAlone(torch.nn.Module):
    """What only the strict mode of torch.export traces."""

    def __init__(self):
        super().__init__()
        self.layer, self.cell = nn.LSTM(3, 4, 2, bidirectional=True), nn.GRUCell(8, 5)

    def forward(self, x):
        if not torch.compiler.is_dynamo_compiling():
            raise RuntimeError("only read, never run")
        y, states = self.layer(x)
        return y, states, self.cell(y[-1])


def test_the_strict_mode_of_torch_export_writes_nodes_too():
    """The exporter goes on to it where its first way does not trace a model."""
    model = StrictAlone()
    proto = by_program(model, (torch.randn(5, 2, 3),), ({0: T, 1: B},))
    assert recurrent(proto) == ["LSTM", "LSTM", "GRU"]
    x = torch.randn(7, 3, 3)
    with torch.no_grad():
        y, states = model.layer(x)
        expected = tree_leaves((y, states, model.cell(y[-1])))
    for a, e in zip(run(proto.SerializeToString(), x), expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance(e.dtype, 16))


def test_a_stack_on_a_gpu_is_written_layer_by_layer(monkeypatch):
    """Where cuDNN would run it as one."""
    call = nn.GRU(3, 4, 2).call_of(_X, None, None, None)
    call = call._replace(input=OnGpu(call.input))
    assert cudnn.why_not(call) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert cudnn.why_not(call) is None
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert "by itself" in cudnn.why_not(call)


def test_nothing_changes_outside_an_export_to_onnx():
    layer = nn.GRU(3, 4).eval()
    x = torch.randn(5, 2, 3)
    by_program(layer, (x,), None)
    by_script(layer, (x,), None)
    program = torch.export.export(layer, (x,))
    assert sum("ostinato.layer" in str(node.target) for node in program.graph.nodes) == 1
