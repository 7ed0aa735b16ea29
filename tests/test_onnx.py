"""ONNX: one node for each layer, and ONNX Runtime's numbers beside ours.

Legend: T steps, B batch, H hidden.
"""

import subprocess
import sys

import pytest
import torch

from ostinato import nn
from ostinato.onnx import export, translations

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from support.cells import record_of  # noqa: E402
from support.onnx_models import (  # noqa: E402
    LAYERS,
    B,
    Model,
    Ragged,
    Resets,
    Several,
    T,
    compare,
    kinds,
    recurrent,
    run,
)

# torch's exporter, where one Dim stands at several arguments.
pytestmark = pytest.mark.filterwarnings("ignore:# The axis name. B will not be used:UserWarning")


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_one_node_for_each_layer_and_the_same_numbers(name, with_states):
    cls, options = LAYERS[name]
    model = Several(cls, **options).eval()

    def arguments(steps, batch):
        x = torch.randn(steps, batch, 3)
        return (x, model.states(batch)) if with_states else (x,)

    shapes = [{0: T, 1: B}]
    if with_states:
        each = ({1: B}, {1: B}) if cls is nn.LSTM else {1: B}
        shapes.append([each] * len(model.layers))
    program = export(model, arguments(5, 2), dynamic_shapes=tuple(shapes))
    nodes = recurrent(program)
    assert {node.op_type for node in nodes} == {record_of(name).layer}
    assert len(nodes) == sum(layer.num_layers for layer in model.layers)
    for steps, batch in ((5, 2), (9, 3), (1, 1)):
        compare(program.model_proto, model, *arguments(steps, batch))


def test_a_layer_is_its_node_and_the_transposition_of_its_output():
    """At sizes, too, at which the exporter folds no constants: here W_hh has 3 * 96 * 96."""
    x = torch.randn(5, 2, 8)
    shapes = ({0: T, 1: B},)
    layer = nn.GRU(8, 96).eval()
    program = export(layer, (x,), dynamic_shapes=shapes)
    assert kinds(program) == ["GRU", "Squeeze"]
    compare(program.model_proto, layer, torch.randn(11, 3, 8))
    layer = nn.LSTM(8, 96, bidirectional=True).eval()
    program = export(layer, (x,), dynamic_shapes=shapes)
    assert kinds(program) == ["LSTM", "Transpose", "Reshape"]
    # The weights in torch's order are gone.
    elements = sum(value.const_value.size for value in program.model.graph.initializers.values())
    assert elements < 1.01 * sum(p.numel() for p in layer.parameters())


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is:DeprecationWarning")
def test_a_model(tmp_path):
    model = Model().eval()
    program = export(
        model,
        (torch.randn(2, 5, 3),),
        tmp_path / "model.onnx",
        dynamic_shapes=({0: B, 1: T},),
        input_names=["x"],
        output_names=["y", "h_n", "h", "c"],
    )
    assert [node.op_type for node in recurrent(program)] == ["GRU", "GRU", "RNN", "LSTM"]
    x = torch.randn(3, 8, 3)
    compare(program.model_proto, model, x)
    saved = onnx.load(tmp_path / "model.onnx")
    assert [value.name for value in saved.graph.input] == ["x"]
    assert [value.name for value in saved.graph.output] == ["y", "h_n", "h", "c"]
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "model.onnx", x)[0], model(x)[0])


def test_weights_in_a_file_of_their_own(tmp_path):
    layer = nn.GRU(3, 40).eval()
    x = torch.randn(5, 2, 3)
    export(layer, (x,), tmp_path / "layer.onnx", external_data=True)
    assert (tmp_path / "layer.onnx.data").stat().st_size > 4 * 3 * 40 * 40
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "layer.onnx", x)[0], layer(x)[0])


def test_torch_s_own_function_takes_the_translations():
    layer = nn.LSTM(3, 4).eval()
    x = torch.randn(5, 2, 3)
    program = torch.onnx.export(
        layer, (x,), verbose=False, custom_translation_table=translations(), optimize=False
    )
    assert kinds(program).count("LSTM") == 1
    compare(program.model_proto, layer, x)


def test_a_program_of_torch_export_and_another_opset():
    layer = nn.GRU(3, 4).eval()
    program = torch.export.export(layer, (torch.randn(5, 2, 3),), dynamic_shapes=({0: T, 1: B},))
    converted = export(program, opset_version=22)
    assert kinds(converted) == ["GRU", "Squeeze"]
    assert converted.model.opset_imports[""] == 22
    compare(converted.model_proto, layer, torch.randn(7, 3, 3))


def test_a_translation_of_the_caller_s_is_used():
    from onnxscript import opset18

    seen = []

    def tanh(x):
        seen.append(x)
        return opset18.Tanh(x)

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
    arguments = model.eval(), (torch.randn(2, 3),)
    options = {"custom_translation_table": {torch.ops.aten.tanh.default: tanh}}
    torch.onnx.export(*arguments, dynamo=True, verbose=False, **options)
    if not seen:
        pytest.skip("torch itself does not use it, which is so on 2.10")
    seen.clear()
    export(*arguments, **options)
    assert len(seen) == 1


@pytest.mark.parametrize("name", LAYERS)
def test_lengths(name):
    """Unsorted, also of no steps; a row of no steps keeps its state."""
    cls, options = LAYERS[name]

    def states(batch):
        h_0, c_0 = torch.randn(2, 4, batch, 4)
        return (h_0, c_0) if cls is nn.LSTM else h_0

    def arguments(steps, *lengths):
        batch = len(lengths)
        return torch.randn(steps, batch, 3), states(batch), torch.tensor(lengths)

    each = ({1: B}, {1: B}) if cls is nn.LSTM else {1: B}
    shapes = ({0: T, 1: B}, each, {0: B})
    model = Ragged(cls, bidirectional=True, **options).eval()
    program = export(model, arguments(5, 5, 3), dynamic_shapes=shapes)
    assert len(recurrent(program)) == 2
    for steps, *lengths in ((5, 2, 5), (7, 7, 0, 4), (6, 1, 5)):
        compare(program.model_proto, model, *arguments(steps, *lengths))


def test_what_has_no_counterpart_is_refused():
    layer = nn.LSTM(3, 4, proj_size=2).eval()
    with pytest.raises(NotImplementedError, match=r"^proj_size: ONNX has no LSTM with"):
        export(layer, (torch.randn(5, 2, 3),))
    with pytest.raises(NotImplementedError, match=r"^dtype: ONNX has no GRU in bfloat16"):
        export(
            nn.GRU(3, 4, dtype=torch.bfloat16).eval(), (torch.randn(5, 2, 3, dtype=torch.bfloat16),)
        )
    with pytest.raises(NotImplementedError, match=r"^resets: ONNX has no resets"):
        export(Resets().eval(), (torch.randn(5, 2, 3), torch.zeros(5, 2, dtype=torch.bool)))
    # torch's own function wraps the same words.
    with pytest.raises(torch.onnx.OnnxExporterError, match="proj_size"):
        torch.onnx.export(
            layer,
            (torch.randn(5, 2, 3),),
            verbose=False,
            custom_translation_table=translations(),
        )


def test_what_torch_cannot_export_is_torch_s_error():
    class Branch(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(torch.onnx.OnnxExporterError):
        export(Branch().eval(), (torch.randn(2),))


def test_without_onnxscript_the_error_names_it():
    code = """
import sys
import ostinato.onnx
assert not {"onnx", "onnxscript"} & set(sys.modules)
sys.modules["onnxscript"] = None
try:
    ostinato.onnx.translations()
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "ostinato.onnx needs onnxscript: pip install onnxscript"


def test_the_older_exporter_is_refused_in_words():
    x = torch.randn(5, 2, 3)
    with pytest.raises(ValueError, match=r"dynamo: expected True, got False.*torch.onnx.export"):
        export(nn.GRU(3, 4).eval(), (x,), dynamo=False)
    assert export(nn.GRU(3, 4).eval(), (x,), dynamo=True).model.graph
