"""The benchmark of real models (benchmarks/real*.py), on small ones that are made here.

Legend: T steps, I input, H hidden.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("threadpoolctl")
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import real  # noqa: E402
import real_models  # noqa: E402
import real_onnx  # noqa: E402

from ostinato.convert import to_onnx  # noqa: E402
from support.faces import call, draw_parameters  # noqa: E402

T, I, H = 6, 5, 8
helper = onnx.helper


@pytest.fixture
def model(rng):
    """From (T, 1, I): a dense layer, two GRUs, an LSTM, and what the dense layer made once more."""
    arrays = {"dense": rng.standard_normal((I, H)), "axis": np.array([1])}
    nodes = [helper.make_node("MatMul", ["x", "dense"], ["first"])]
    value = "first"
    for k, kind in enumerate(("gru", "gru", "lstm")):
        (node,) = to_onnx(draw_parameters(rng, kind, H, H, dtype="float32"))
        arrays.update({f"{word}{k}": array for word, array in node.weights.items()})
        names = [value, *(f"{word}{k}" for word in node.weights)]
        nodes.append(helper.make_node(node.op_type, names, [f"Y{k}"], **node.attributes))
        nodes.append(helper.make_node("Squeeze", [f"Y{k}", "axis"], [f"y{k}"]))
        value = f"y{k}"
        if k == 1:
            # Not a layout: the layers behind it are a stream of their own.
            nodes.append(helper.make_node("Tanh", [value], ["between"]))
            value = "between"
    nodes.append(helper.make_node("Add", [value, "first"], ["y"]))
    value_of = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "model",
        [value_of("x", onnx.TensorProto.FLOAT, ["T", 1, I])],
        [value_of("y", onnx.TensorProto.FLOAT, None)],
        [
            onnx.numpy_helper.from_array(a if name == "axis" else a.astype("f4"), name)
            for name, a in arrays.items()
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.fixture
def x(rng):
    return rng.standard_normal((T, 1, I)).astype("f4")


def test_a_model_is_cut_at_its_recurrent_layers(model, x):
    (expected,) = real_onnx.session_of(model, 1).run(None, {"x": x})
    cut = real_onnx.Cut(model, 1, "float32")
    assert [repr(stream) for stream in cut.streams] == [
        "Stream('gru', input 8, hidden 8, 2 layers, dtype='float32')",
        "Stream('lstm', input 8, hidden 8, dtype='float32')",
    ]
    np.testing.assert_allclose(cut(x), expected, atol=1e-5)
    cut.reset()
    steps = np.concatenate([cut(step[None]) for step in x])
    np.testing.assert_allclose(steps, expected, atol=1e-5)


def test_states_go_in_and_come_out(model, x):
    (expected,) = real_onnx.session_of(model, 1).run(None, {"x": x})
    stateful, states = real_onnx.with_states(model)
    assert states == {f"{name}_before": f"{name}_after" for name in ("h0", "h1", "h2", "c2")}
    peer = real_onnx.Peer(stateful, states, 1)
    for _ in range(2):
        steps = np.concatenate([peer(step[None]) for step in x])
        np.testing.assert_allclose(steps, expected, atol=1e-5)
        peer.reset()


def test_layers_alone_are_what_is_recurrent(model, x):
    layers = real_onnx.layers_alone(model)
    assert "MatMul" not in [node.op_type for node in layers.graph.node]
    for way in real_models.alone(model, x, 1):
        assert way.units == T
        assert way.judge(way.ours("float32")(), way.theirs()).difference < 1e-5


def test_a_value_that_nothing_makes_is_named(model):
    with pytest.raises(ValueError, match=r"y: expected it to depend on .*, but it needs x"):
        real_onnx.between(model, ["Y0"], "y")


def test_dtlns_single_operators_are_a_stack(rng):
    """Two layers, under the names of its second file."""
    layers = [draw_parameters(rng, "lstm", H, H, dtype="float32") for _ in range(2)]
    arrays = {}
    for layer, given in zip(("lstm_6", "lstm_7"), layers, strict=True):
        for word, array in (
            ("MatMul", given["weight_ih_l0"].T),
            ("MatMul_1", given["weight_hh_l0"].T),
            ("BiasAdd", given["bias_ih_l0"] + given["bias_hh_l0"]),
        ):
            name = f"model_2/{layer}/{word}/ReadVariableOp/resource:0"
            arrays[name] = np.ascontiguousarray(array)
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    stack = real_models.unrolled(helper.make_model(helper.make_graph([], "g", [], [], tensors)))
    steps = rng.standard_normal((T, 1, H)).astype("f4")
    expected = steps
    for given in layers:
        expected = call("lstm", expected, given)[0]
    np.testing.assert_allclose(call("lstm", steps, stack.weights)[0], expected, atol=1e-5)


def made(model, x, coarse=0.25):
    """Return what makes a model whose package is there."""

    def make(threads):
        ways = [way._replace(coarse=coarse) for way in real_models.alone(model, x, threads)]
        versions = real_models.versions_of("numpy")
        return real_models.Model("small", "none", "3 layers", "step", "ORT", versions, ways)

    return make


def absent(threads):
    return real_models.versions_of("no-such-package")


def test_a_missing_package_is_named_and_the_rest_is_measured(
    model, x, monkeypatch, capsys, tmp_path
):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(real, "MODELS", {"gone": absent, "small": made(model, x)})
    arguments = ["--threads", "1", "--seconds", "0", "--dtypes", "float32", "nibble"]
    monkeypatch.setattr(sys, "argv", ["real.py", *arguments, "--out", str(tmp_path)])
    assert real.main() == 0
    printed = capsys.readouterr().out
    assert "gone is left out: no package no-such-package" in printed
    assert "nibble is left out: Stream: dtype must be one of" in printed
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert [row["way"] for each in found["models"] for row in each["rows"]] == [
        "layers alone, frame by frame",
        "layers alone, whole",
    ]
    assert all(row["agreement"]["float32"]["difference"] < 1e-5
               for row in found["models"][0]["rows"])  # fmt: skip
    assert file.with_suffix(".png").stat().st_size > 10_000
    assert file.with_suffix(".md").read_text() == real.table(found)


def test_wrong_numbers_are_not_timed(model, x):
    def make(threads):
        told = made(model, x)(threads)
        way = told.ways[0]
        return told._replace(ways=[way._replace(theirs=lambda: way.theirs() + 1)])

    with pytest.raises(AssertionError, match="small, layers alone, frame by frame, float32"):
        real.measure(make, 1, ["float32"], 0)


# A package leaves a file open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", real_models.MODELS)
def test_models_whose_packages_are_here(name):
    try:
        model = real_models.MODELS[name](1)
    except metadata.PackageNotFoundError as error:
        pytest.skip(f"no package {error.name}")
    way = model.ways[0]
    assert way.judge(way.ours("float32")(), way.theirs()).difference <= way.exact
