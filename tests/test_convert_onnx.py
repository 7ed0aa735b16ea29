"""Weights of ONNX nodes beside ONNX Runtime and ONNX's own evaluator, and back.

Legend: T steps, B batch, I input, H hidden, D directions.
"""

import numpy as np
import pytest
import torch

from ostinato import nn
from ostinato.convert import Node, from_onnx, to_onnx
from ostinato.onnx import export
from support.cells import TORCH_CELLS, options_of, record_of
from support.faces import call, draw_parameters
from support.tolerances import assert_close

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
reference = pytest.importorskip("onnx.reference")
helper, numpy_helper = onnx.helper, onnx.numpy_helper

T, B, I, H = 7, 3, 5, 4


def model_of(nodes, dtype):
    """Write a stack of nodes as a model: X (T, B, I) to Y (T, B, D * H)."""
    parts, initializers, value = [], [], "X"
    for k, node in enumerate(nodes):
        inputs = [value]
        for word, array in node.weights.items():
            inputs.append(f"{word}{k}")
            initializers.append(numpy_helper.from_array(array, f"{word}{k}"))
        value = "Y" if k == len(nodes) - 1 else f"Y{k}"
        ways = len(node.weights["W"])
        initializers.append(
            numpy_helper.from_array(np.array([0, 0, ways * H], np.int64), f"shape{k}")
        )
        parts += [
            helper.make_node(node.op_type, inputs, [f"raw{k}"], **node.attributes),
            helper.make_node("Transpose", [f"raw{k}"], [f"turned{k}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"turned{k}", f"shape{k}"], [value]),
        ]
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None)
        for name in "XY"
    ]
    graph = helper.make_graph(parts, "stack", values[:1], values[1:], initializers)
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("kind", TORCH_CELLS)
def test_onnx_runtime_runs_our_weights_and_we_its(rng, kind, ways, bias):
    given = draw_parameters(rng, kind, I, H, layers=2, ways=ways, bias=bias, dtype="float32")
    model = model_of(to_onnx(given, **options_of(kind)), "float32")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = rng.standard_normal((T, B, I)).astype("float32")
    (expected,) = session.run(["Y"], {"X": x})
    assert_close(call(kind, x, given)[0], expected, 2 * T)
    nodes = [node for node in model.graph.node if node.op_type == record_of(kind).layer]
    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    for initializers in (model.graph.initializer, arrays):
        again = from_onnx(nodes, initializers)
        assert list(again) == list(given)
        assert all(np.array_equal(again[name], given[name]) for name in given)


@pytest.mark.parametrize("kind", [kind for kind in TORCH_CELLS if kind != "rnn_relu"])
def test_onnx_s_own_evaluator_runs_weights_of_its_own(rng, kind):
    """In float64, on weights that were drawn in ONNX's order; one direction is what it has."""
    record = record_of(kind)
    shapes = {"W": (record.gates * H, I), "R": (record.gates * H, H), "B": (2 * record.gates * H,)}
    weights = {word: rng.uniform(-1, 1, (1, *shape)) for word, shape in shapes.items()}
    node = Node(record.layer, weights, {"hidden_size": H, **record.onnx.attributes})
    x = rng.standard_normal((T, B, I))
    evaluator = reference.ReferenceEvaluator(model_of([node], "float64"))
    (expected,) = evaluator.run(None, {"X": x})
    assert_close(call(kind, x, from_onnx(node))[0], expected)


def test_weights_of_an_exported_model(tmp_path):
    layer = nn.LSTM(I, H, 2, bidirectional=True).eval()
    export(layer, (torch.randn(T, B, I),), tmp_path / "layer.onnx")
    graph = onnx.load(tmp_path / "layer.onnx").graph
    nodes = [node for node in graph.node if node.op_type == "LSTM"]
    found = from_onnx(nodes, graph.initializer)
    assert all(np.array_equal(found[name], w.numpy()) for name, w in layer.state_dict().items())
    again = nn.LSTM(I, H, 2, bidirectional=True)
    again.load_state_dict({name: torch.from_numpy(array) for name, array in found.items()})


def test_what_a_proto_says_is_refused_by_name(rng):
    (node,) = to_onnx(draw_parameters(rng, "lstm", I, H))

    def proto(op_type, inputs, **attributes):
        return helper.make_node(op_type, inputs, ["Y"], **{**node.attributes, **attributes})

    inputs = ["X", "W", "R", "B"]
    arrays = {**node.weights, "P": np.zeros((1, 3 * H))}
    assert len(from_onnx(proto("LSTM", inputs), arrays)) == 4
    assert len(from_onnx(proto("LSTM", ["X", "W", "R", ""]), arrays)) == 2
    for attributes, message in (
        ({"direction": "reverse"}, "direction: expected forward or bidirectional, got 'reverse'"),
        ({"activations": ["Sigmoid", "Tanh", "Relu"]}, r"activations: expected .*'Relu'\]"),
        ({"clip": 2.0}, "clip: expected 0.0, got 2.0"),
        ({"input_forget": 1}, "input_forget: expected 0, got 1"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            from_onnx(proto("LSTM", inputs, **attributes), arrays)
    with pytest.raises(NotImplementedError, match="P: torch's LSTM has no peepholes"):
        from_onnx(proto("LSTM", [*inputs, "", "", "", "P"]), arrays)
    with pytest.raises(ValueError, match="B: expected initializers to hold 'B', which is missing"):
        from_onnx(proto("LSTM", inputs), {"W": node.weights["W"], "R": node.weights["R"]})
    with pytest.raises(NotImplementedError, match="linear_before_reset: expected 1, got 0"):
        from_onnx(helper.make_node("GRU", inputs, ["Y"], hidden_size=H), arrays)
    with pytest.raises(TypeError, match=r"initializers\[0\]: expected a TensorProto, got ndarray"):
        from_onnx(proto("LSTM", inputs), [arrays["W"]])
