"""Weights from elsewhere, by the published equations; there and back; what is refused, and how.

test_convert_keras.py, test_convert_flax.py and test_convert_onnx.py ask the libraries themselves.

Legend: T steps, B batch, I input, H hidden, L layers, D directions.
"""

import re
import subprocess
import sys
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch

import ostinato
from ostinato.convert import Node, from_flax, from_keras, from_onnx, to_keras, to_onnx
from support.cells import TORCH_CELLS, options_of, record_of
from support.elsewhere import (
    GATES,
    flax_cell,
    flax_params,
    joined,
    keras_layer,
    keras_weights,
)
from support.faces import call, draw_parameters
from support.tolerances import assert_close

KINDS = tuple(GATES)
T, B, I, H = 7, 3, 5, 4


def both_ways(run, x):
    """Run the first of two over x and the second over x turned around, as a Bidirectional does."""
    forward, reverse = run
    return np.concatenate([forward(x), reverse(x[::-1])[::-1]], -1)


def test_these_are_all_the_kinds():
    assert KINDS == TORCH_CELLS


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_keras_by_its_equations(rng, kind, bias):
    weights = keras_weights(rng, kind, I, H, bias=bias)
    x = rng.standard_normal((T, B, I))
    found = from_keras(weights)
    assert len(found) == (4 if bias else 2)
    assert_close(call(kind, x, found)[0], keras_layer(kind, weights, x))


@pytest.mark.parametrize("kind", KINDS)
def test_keras_in_both_directions_and_layers(rng, kind):
    layers = [[keras_weights(rng, kind, size, H) for _ in range(2)] for size in (I, 2 * H, 2 * H)]
    x = y = rng.standard_normal((T, B, I))
    for each in layers:
        y = both_ways([lambda x, w=w: keras_layer(kind, w, x) for w in each], y)
    stack = [[*forward, *reverse] for forward, reverse in layers]
    found = from_keras(stack, bidirectional=True, prefix="encoder.")
    assert "encoder.bias_hh_l2_reverse" in found
    assert_close(call(kind, x, found, prefix="encoder.")[0], y, 3 * T)
    single = from_keras(tuple(stack[0]), bidirectional=True)
    assert list(single) == [name.removeprefix("encoder.") for name in found if "_l0" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_flax_by_its_equations(rng, kind):
    params = flax_params(rng, kind, I, H)
    x = rng.standard_normal((T, B, I))
    expected = flax_cell(kind, params, x)
    for given in (params, {"params": params}, MappingProxyType({"params": {"cell": params}})):
        assert_close(call(kind, x, from_flax(given))[0], expected)
    # nnx has the same denses under other names, or all gates in one.
    renamed = {"if_" if name == "if" else name: dense for name, dense in params.items()}
    assert_close(call(kind, x, from_flax(renamed))[0], expected)
    if kind == "gru":
        del params["hn"]["bias"]
    assert_close(call(kind, x, from_flax(joined(kind, params)))[0], flax_cell(kind, params, x))


@pytest.mark.parametrize("kind", KINDS)
def test_flax_in_both_directions_and_layers(rng, kind):
    layers = [[flax_params(rng, kind, size, H) for _ in range(2)] for size in (I, 2 * H)]
    x = y = rng.standard_normal((T, B, I))
    for each in layers:
        y = both_ways([lambda x, p=p: flax_cell(kind, p, x) for p in each], y)
    stack = [
        {"params": {"backward_rnn": {"cell": reverse}, "forward_rnn": {"cell": forward}}}
        for forward, reverse in layers
    ]
    found = from_flax(stack, prefix="decoder.")
    assert_close(call(kind, x, found, prefix="decoder.")[0], y, 2 * T)


def test_which_biases_flax_has(rng):
    def zeros(kind):
        found = from_flax(flax_params(rng, kind, I, H))
        names = [name for name in ("bias_ih_l0", "bias_hh_l0") if not found[name].all()]
        return {name: np.flatnonzero(found[name] == 0).tolist() for name in names}

    assert zeros("rnn_tanh") == {"bias_hh_l0": list(range(H))}
    assert zeros("gru") == {"bias_hh_l0": list(range(2 * H))}
    assert zeros("lstm") == {"bias_ih_l0": list(range(4 * H))}
    without = {side: {"kernel": np.zeros((H, H))} for side in "ih"}
    assert list(from_flax(without)) == ["weight_ih_l0", "weight_hh_l0"]
    # An attribute of nnx's that is not used.
    without["h"]["bias"] = None
    assert list(from_flax(without)) == ["weight_ih_l0", "weight_hh_l0"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(rng, kind, layers, ways, bias):
    given = draw_parameters(rng, kind, I, H, layers=layers, ways=ways, bias=bias)
    more = {"head.weight": np.zeros((2, 2)), "weight_ih_l9": None}
    parameters = {**{f"rnn.{name}": array for name, array in given.items()}, **more}
    lists = to_keras(parameters, prefix="rnn.")
    assert [len(each) for each in lists] == [ways * (3 if bias else 2)] * layers
    x = rng.standard_normal((T, B, I))
    y = x
    for each in lists:
        parts = [each[way * len(each) // ways :][: len(each) // ways] for way in range(ways)]
        runs = [lambda x, w=w: keras_layer(kind, w, x) for w in parts]
        y = both_ways(runs, y) if ways == 2 else runs[0](y)
    assert_close(call(kind, x, given)[0], y, layers * T)
    again = from_keras(lists, bidirectional=ways == 2)
    assert list(again) == list(given)
    assert_close(call(kind, x, again)[0], call(kind, x, given)[0], layers * T)
    if kind == "gru":  # both of its biases are kept
        assert all(np.array_equal(again[name], given[name]) for name in given)

    options = options_of(kind)
    nodes = to_onnx(parameters, prefix="rnn.", **options)
    assert [node.op_type for node in nodes] == [record_of(kind).layer] * layers
    again = from_onnx(nodes, prefix="rnn.")
    assert list(again) == [f"rnn.{name}" for name in given]
    assert all(np.array_equal(again[f"rnn.{name}"], given[name]) for name in given)


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_are_new_and_load_into_torch(rng, kind):
    """Memory of their own that may be written, in rows, and the dtype that was given."""
    layer = getattr(torch.nn, record_of(kind).layer)(I, H, bidirectional=True, **options_of(kind))
    state = {name: weight.clone() for name, weight in layer.state_dict().items()}
    lists, nodes = to_keras(state), to_onnx(state, **options_of(kind))
    for array in [*lists[0], *nodes[0].weights.values()]:
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert array.flags.owndata
        array.flags.writeable = False  # as those of JAX
    for found in (from_keras(lists, bidirectional=True), from_onnx(nodes)):
        other = getattr(torch.nn, record_of(kind).layer)(
            I, H, bidirectional=True, **options_of(kind)
        )
        other.load_state_dict({name: torch.from_numpy(array) for name, array in found.items()})
        x = torch.randn(T, B, I)
        torch.testing.assert_close(other(x)[0], layer(x)[0])
    for name in layer.state_dict():
        assert torch.equal(layer.state_dict()[name], state[name])


def test_bfloat16(rng):
    """Arrays of JAX's may have it, and keep it. The ways back refuse it, as the NumPy face does."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    params = flax_params(rng, "gru", I, H, dtype=ml_dtypes.bfloat16)
    found = from_flax(params)
    assert {array.dtype for array in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    wide = from_flax(
        {n: {k: a.astype("f4") for k, a in dense.items()} for n, dense in params.items()}
    )
    assert all(np.array_equal(found[name].astype("f4"), wide[name]) for name in wide)
    with refuses(ValueError, "must have a floating or complex dtype, got bfloat16"):
        to_onnx(found)
    with refuses(ValueError, "expected a floating dtype, got |V2"):
        from_keras([F((5, 4), "V2"), F((4, 4))])


def test_a_node_of_arrays_and_what_it_may_say(rng):
    (node,) = to_onnx(draw_parameters(rng, "lstm", I, H, ways=2))
    assert node.attributes == {"hidden_size": H, "direction": "bidirectional"}
    (relu,) = to_onnx(draw_parameters(rng, "rnn_relu", I, H), nonlinearity="relu")
    assert relu.attributes == {"hidden_size": H, "activations": ["Relu"]}
    for more in (
        {"activations": ["sigmoid", "tanh", "TANH"] * 2},
        {"layout": 1, "input_forget": 0, "clip": 0.0},
    ):
        from_onnx(node._replace(attributes={**node.attributes, **more}))
    from_onnx(node._replace(weights={**node.weights, "B": None}))


def test_torch_is_not_needed():
    code = """
import sys
import numpy as np
import ostinato
weights = ostinato.convert.from_keras([np.zeros((2, 4)), np.zeros((4, 4))])
assert len(ostinato.convert.to_onnx(weights)) == 1
assert not {"torch", "onnx", "keras", "jax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_its_public_names():
    assert ostinato.convert.from_r is ostinato.from_r
    assert "convert" in dir(ostinato)


# ---- what is refused ----

F = np.zeros


def refuses(error, message):
    return pytest.raises(error, match=re.escape(message))


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        (None, {}, TypeError, "weights must be a list of arrays, as get_weights() returns, got No"),
        (F((2, 2)), {}, TypeError, "weights must be a list of arrays, as get_weights() returns, g"),
        ({}, {}, TypeError, "weights must be a list of arrays, as get_weights() returns, got dict"),
        ([], {}, ValueError, "weights: expected 2 or 3 arrays of a layer in one direction, got 0"),
        ([F((5, 4))], {}, ValueError, "expected 2 or 3 arrays of a layer in one direction, got 1"),
        ([F((4, 4))] * 6, {}, ValueError, "got 6; bidirectional is True for Bidirectional, and a"),
        ([F((4, 4))] * 4, {}, ValueError, "got 4; bidirectional is True for Bidirectional, and a"),
        (
            [F((4, 4))] * 3,
            {"bidirectional": True},
            ValueError,
            "expected 4 or 6 arrays of Bidirectional, got 3; bidirectional is False for a layer in",
        ),
        (
            [F((5, 4)), F((4, 4))],
            {"bidirectional": 1},
            TypeError,
            "bidirectional must be a bool, g",
        ),
        ([F((5, 4)), F((4, 4))], {"prefix": None}, TypeError, "prefix must be a str, got NoneType"),
        (
            [F((5, 12)), F((4, 12)), F(12)],
            {},
            NotImplementedError,
            "weights[2] (bias): expected (2, 3 * H), got (3 * H,): a GRU with reset_after=False",
        ),
        ([F((5, 12)), F((4, 12)), F((12, 2))], {}, ValueError, "(2, 3 * H) = (2, 12), got (12, 2)"),
        ([F((5, 16)), F((4, 16)), F((2, 16))], {}, ValueError, "(G * H,) = (16,), got (2, 16)"),
        (
            [F((5, 4)), F((4, 4)), F(5)],
            {},
            ValueError,
            "(bias): expected (G * H,) = (4,), got (5,)",
        ),
        (
            [F((12, 5)), F((12, 4))],
            {},
            ValueError,
            "expected (H, G * H), that is 1 * H for RNN, 3",
        ),
        (
            [F((5, 8)), F((4, 8))],
            {},
            ValueError,
            "weights[1] (recurrent_kernel): expected (H, G * ",
        ),
        ([F((5, 20)), F((4, 20))], {}, ValueError, "4 * H for LSTM, got (4, 20)"),
        ([F((5, 4)), F(4)], {}, ValueError, "weights[1] (recurrent_kernel): expected (H, G * H), "),
        ([F((5, 4)), F((0, 0))], {}, ValueError, "weights[1] (recurrent_kernel): expected (H, G *"),
        (
            [F((5, 8)), F((4, 16))],
            {},
            ValueError,
            "(kernel): expected (I, G * H) = (I, 16), got (5",
        ),
        ([F(16), F((4, 16))], {}, ValueError, "(kernel): expected (I, G * H) = (I, 16), got (16,)"),
        (
            [F((5, 4), int), F((4, 4))],
            {},
            ValueError,
            "(kernel): expected a floating dtype, got int",
        ),
        ([F((5, 4)), None], {}, TypeError, "(recurrent_kernel): expected an array, got NoneType"),
        ([F((5, 4)), "kernel"], {}, TypeError, "(recurrent_kernel): expected an array, got str"),
        (
            [F((5, 4)), [[1.0], []]],
            {},
            TypeError,
            "(recurrent_kernel): expected an array, got list",
        ),
        ([np.ma.zeros((5, 4)), F((4, 4))], {}, TypeError, "expected an array, got MaskedArray"),
        ([F((5, 4)), F((4, 4), "f4")], {}, ValueError, "weight_hh: expected float64, got float32"),
        (
            [[F((5, 4)), F((4, 4))], [F((5, 4)), F((4, 4))]],
            {},
            ValueError,
            "layer 1: expected the input size 4, as one module of torch's has it, got 5; convert",
        ),
        (
            [[F((5, 4)), F((4, 4))], [F((4, 6)), F((6, 6))]],
            {},
            ValueError,
            "layer 1: expected the hidden size 4, as one module of torch's has it, got 6",
        ),
        (
            [[F((5, 4)), F((4, 4))], [F((4, 16)), F((4, 16))]],
            {},
            ValueError,
            "layer 1: expected the cell RNN, as one module of torch's has it, got LSTM",
        ),
        (
            [[F((5, 4)), F((4, 4)), F(4)], [F((4, 4)), F((4, 4))]],
            {},
            ValueError,
            "layer 1: expected the biases True, as one module of torch's has it, got False",
        ),
        (
            [F((5, 4)), F((4, 4)), F((6, 4)), F((4, 4))],
            {"bidirectional": True},
            ValueError,
            "layer 0, reverse: expected the input size 5, as one module of torch's has it, got 6",
        ),
        (
            [[F((5, 4)), F((4, 4))], F((4, 4))],
            {},
            TypeError,
            "weights[0] (kernel): expected an arr",
        ),
    ],
)
def test_refused_of_keras(weights, options, error, message):
    with refuses(error, message):
        from_keras(weights, **options)


def simple(**more):
    return {"i": {"kernel": F((5, 4)), "bias": F(4)}, "h": {"kernel": F((4, 4))}, **more}


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (None, TypeError, "params: expected a mapping, got NoneType"),
        (F((4, 4)), TypeError, "params: expected a mapping, got ndarray"),
        ([], ValueError, "params: expected a cell's parameters, got an empty list"),
        (
            {},
            ValueError,
            "params: expected the names of one cell (dense_i dense_h; i h; ir iz in h",
        ),
        ([simple(), 3], TypeError, "params[1]: expected a mapping, got int"),
        ({"params": F(4)}, TypeError, "params['params']: expected a mapping, got ndarray"),
        ({"params": {"GRUCell_0": {}, "Dense_0": {}}}, ValueError, "got ['GRUCell_0', 'Dense_0']"),
        (
            {"if": {}, "in": {}, "hf": {}, "hn": {}},
            ValueError,
            "expected the names of one cell (dense_i dense_h; i h; ir iz in hr hz hn; ii if ig io ",
        ),
        (simple(rngs={}), ValueError, "got ['i', 'h', 'rngs']"),
        (simple(i_={}), ValueError, "got ['i', 'h', 'i_']"),
        (simple(h=F((4, 4))), TypeError, "params['h']: expected a mapping, got ndarray"),
        (simple(h={}), ValueError, "params['h']: expected kernel and perhaps bias, got []"),
        (simple(h={"kernel": F((4, 4)), "scale": 1}), ValueError, "got ['kernel', 'scale']"),
        (
            simple(h={"kernel": F(4)}),
            ValueError,
            "['kernel']: expected (inputs, outputs), got (4,)",
        ),
        (simple(h={"kernel": F((5, 4))}), ValueError, "(inputs, H) = (5, 5), got (5, 4)"),
        (simple(i={"kernel": F((5, 3))}), ValueError, "(inputs, H) = (5, 4), got (5, 3)"),
        (
            {"i": {"kernel": F((5, 16))}, "h": {"kernel": F((4, 16))}},
            ValueError,
            "params['i']['kernel']: expected (inputs, H) = (5, 4), got (5, 16)",
        ),
        (
            {
                **{name: {"kernel": F((5, 4))} for name in ("ir", "iz", "in")},
                **{name: {"kernel": F((4, 4))} for name in ("hr", "hz", "hn")},
                "iz": {"kernel": F((6, 4))},
            },
            ValueError,
            "params: expected kernels of one shape, got (5, 4), (6, 4), (5, 4)",
        ),
        (
            {"dense_i": {"kernel": F((5, 4))}, "dense_h": {"kernel": F((4, 12))}},
            ValueError,
            "kernels of the input: expected (I, G * H) = (I, 12), got (5, 4)",
        ),
        (simple(i={"kernel": F((5, 4)), "bias": F(5)}), ValueError, "(outputs,) = (4,), got (5,)"),
        (simple(i={"kernel": F((5, 4), int)}), ValueError, "expected a floating dtype, got int64"),
        (simple(i={"kernel": None}), TypeError, "['kernel']: expected an array, got NoneType"),
        (
            {"forward_rnn": simple(), "backward_rnn": {"cell": 1}},
            TypeError,
            "params['backward_rnn']['cell']: expected a mapping, got int",
        ),
        ([simple(), simple()], ValueError, "layer 1: expected the input size 4, as one module of"),
        (
            {"dense_i": {"kernel": F((5, 8))}, "dense_h": {"kernel": F((4, 8))}},
            ValueError,
            "kernels of h: expected (H, G * H), that is 1 * H for RNN, 3 * H for GRU",
        ),
    ],
)
def test_refused_of_flax(params, error, message):
    with refuses(error, message):
        from_flax(params)


W, R = F((1, 12, 5)), F((1, 12, 4))
LBR = {"linear_before_reset": 1}
BOTH = Node("RNN", {"W": F((2, 4, 4)), "R": F((2, 4, 4))}, {"direction": "bidirectional"})


def gru(weights=None, **attributes):
    return Node("GRU", {"W": W, "R": R, **(weights or {})}, {**LBR, **attributes})


def proto(*input, op_type="GRU", attribute=()):
    return SimpleNamespace(op_type=op_type, input=input, attribute=attribute)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (None,),
            TypeError,
            "node: expected a NodeProto or an ostinato.convert.Node, got NoneType",
        ),
        (("GRU",), TypeError, "node: expected a NodeProto or an ostinato.convert.Node, got str"),
        (([],), ValueError, "node: expected a node, got an empty list"),
        (([gru(), {}],), TypeError, "node[1]: expected a NodeProto or an ostinato.convert.Node, g"),
        ((Node("Gemm", {}),), ValueError, "expected one of RNN, GRU, LSTM, got 'Gemm'"),
        ((Node("gru", {}),), ValueError, "expected one of RNN, GRU, LSTM, got 'gru'"),
        ((Node("GRU", [W, R]),), TypeError, "weights must be a mapping, got list"),
        ((Node("GRU", {}, None),), TypeError, "attributes must be a mapping, got NoneType"),
        ((Node("GRU", {"W": W}, LBR),), ValueError, "expected weights to hold 'R', which is missi"),
        ((Node("GRU", {"R": R}, LBR),), ValueError, "expected weights to hold 'W', which is missi"),
        ((gru({"W": None}),), ValueError, "expected weights to hold 'W', which is missing"),
        ((gru({"b": W}),), ValueError, "expected the weights W, R and B, got 'b' as well"),
        ((gru({"P": W}),), NotImplementedError, "P: torch's LSTM has no peepholes"),
        (
            (Node("GRU", {"W": W, "R": R}),),
            NotImplementedError,
            "linear_before_reset: expected 1, got 0: torch's GRU multiplies r with (W_hn h + b_hn)",
        ),
        ((gru(linear_before_reset=0),), NotImplementedError, "linear_before_reset: expected 1, go"),
        ((gru(clip=3.0),), NotImplementedError, "clip: expected 0.0, got 3.0: torch clips nothing"),
        (
            (Node("LSTM", {}, {"input_forget": 1}),),
            NotImplementedError,
            "input_forget: expected 0, got 1: torch's LSTM has a forget gate of its own",
        ),
        ((Node("LSTM", {}, LBR),), ValueError, "expected attributes of LSTM, got 'linear_before_r"),
        ((gru(bias=True),), ValueError, "expected attributes of GRU, got 'bias'"),
        ((gru(direction="reverse"),), NotImplementedError, "torch has no reverse direction alone"),
        ((gru(activations="Tanh"),), TypeError, "activations must be a list of names, got str"),
        ((gru(direction=[]),), ValueError, "expected forward or bidirectional, got []"),
        ((gru(direction="both"),), ValueError, "expected forward or bidirectional, got 'both'"),
        (
            (gru(activations=["HardSigmoid", "Tanh"]),),
            NotImplementedError,
            "activations: expected ['Sigmoid', 'Tanh'] for each direction, got ['HardSigmoid', '",
        ),
        (
            (Node("RNN", {}, {"activations": ["Elu"]}),),
            NotImplementedError,
            "activations: expected ['Tanh'] or ['Relu'] for each direction, got ['Elu']",
        ),
        (
            (Node("RNN", {}, {"activations": ["Tanh", "Relu"], "direction": "bidirectional"}),),
            NotImplementedError,
            "for each direction, got ['Tanh', 'Relu']",
        ),
        ((gru(hidden_size=5),), ValueError, "hidden_size: expected 4, as in R, got 5"),
        ((gru(direction="bidirectional"),), ValueError, "= (2, 12, 4), got (1, 12, 4)"),
        ((gru({"R": F((12, 4))}),), ValueError, "R: expected (D, 3 * H, H) = (1, 12, 4), got (12,"),
        ((gru({"W": F((1, 5, 12))}),), ValueError, "W: expected (D, 3 * H, I) = (1, 12, 12), got"),
        ((gru({"W": F(())}),), ValueError, "W: expected (D, 3 * H, I) = (1, 12, 0), got ()"),
        ((gru({"W": F((1, 12, 0))}),), ValueError, "expected weights that are not empty, got W of"),
        ((gru({"B": F((1, 12))}),), ValueError, "B: expected (D, 6 * H) = (1, 24), got (1, 12)"),
        ((gru({"B": F((1, 24), int)}),), ValueError, "B: expected a floating dtype, got int64"),
        ((gru({"B": F((1, 24), "f4")}),), ValueError, "bias_ih: expected float64, got float32"),
        (
            ([Node("RNN", {"W": F((1, 4, 4)), "R": F((1, 4, 4))}), BOTH],),
            ValueError,
            "layer 1: expected D = 1, got 2",
        ),
        (([gru(), gru()],), ValueError, "layer 1: expected the input size 4, as one module of to"),
        ((proto("X", "w", "r"),), ValueError, "W: expected initializers to hold 'w', which is mi"),
        ((proto("X", "w", "r"), {"w": W}), ValueError, "R: expected initializers to hold 'r', whi"),
        ((proto("X"), {}), NotImplementedError, "linear_before_reset: expected 1, got 0"),
        ((proto("X"), 3), TypeError, "initializers must be a mapping of names to arrays, or Tenso"),
        ((proto("X"), "model.onnx"), TypeError, "initializers must be a mapping of names to arra"),
    ],
)
def test_refused_of_onnx(arguments, error, message):
    with refuses(error, message):
        from_onnx(*arguments)


def test_refused_of_a_stack_of_onnx():
    nodes = [
        Node("RNN", {"W": F((1, 4, 4)), "R": F((1, 4, 4))}, {"activations": [name]})
        for name in ("Relu", "Tanh")
    ]
    with refuses(ValueError, "expected one kind of layer, got ['rnn_relu', 'rnn_tanh']"):
        from_onnx(nodes)
    with refuses(TypeError, "from_onnx: prefix must be a str, got int"):
        from_onnx(nodes[0], prefix=1)
    with refuses(TypeError, "from_flax: prefix must be a str, got int"):
        from_flax(simple(), prefix=1)


@pytest.mark.parametrize("convert", [to_keras, to_onnx])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weight_ih_l0": None}, ValueError, "to hold 'weight_ih_l0', which is missing"),
        ({"weight_hh_l0": None}, ValueError, "to hold 'weight_hh_l0', which is missing"),
        ({"bias_ih_l0": None}, ValueError, "got 'bias_hh_l0' as well"),
        ({"bias_ih_l0_reverse": F(12)}, ValueError, "got 'bias_ih_l0_reverse' as well"),
        ({"weight_hh_l2": F((12, 4))}, ValueError, "got 'weight_hh_l2' as well"),
        ({"weight_hh_l0": F((8, 4))}, ValueError, "weight_hh_l0.T: expected (H, G * H), that is 1"),
        ({"weight_hh_l0": F((4, 12))}, ValueError, "weight_hh_l0.T: expected (H, G * H), that is"),
        ({"weight_ih_l0": F((5, 12))}, RuntimeError, "weight_ih_l0: expected shape (12, "),
        ({"bias_ih_l0": F(4)}, RuntimeError, "bias_ih_l0: expected shape (12,), got (4,)"),
        ({"bias_ih_l0": F(12, int)}, ValueError, "bias_ih_l0: expected a floating dtype, got int"),
        ({"bias_ih_l0": F(12, "f4")}, ValueError, "expected float64 as bias_hh_l0, got float32"),
        ({"bias_ih_l0": "zeros"}, TypeError, "bias_ih_l0: expected an array, got str"),
        (
            {"weight_hr_l0": F((2, 4))},
            NotImplementedError,
            "weight_hr_l0: ",
        ),
    ],
)
def test_refused_on_the_way_back(rng, convert, changed, error, message):
    parameters = {**draw_parameters(rng, "gru", 5, 4), **changed}
    # None stands for what is taken away.
    with refuses(error, message):
        convert({name: array for name, array in parameters.items() if array is not None})


def test_refused_options_on_the_way_back(rng):
    parameters = draw_parameters(rng, "gru", 5, 4)
    with refuses(ValueError, "nonlinearity: expected 'tanh' of GRU, got 'relu'"):
        to_onnx(parameters, nonlinearity="relu")
    with refuses(ValueError, "nonlinearity: expected 'tanh' or 'relu' of RNN, got 'elu'"):
        to_onnx(draw_parameters(rng, "rnn_tanh", 5, 4), nonlinearity="elu")
    with refuses(ValueError, "nonlinearity: expected 'tanh' of GRU, got ['tanh']"):
        to_onnx(parameters, nonlinearity=["tanh"])
    for convert, library in ((to_keras, "Keras"), (to_onnx, "ONNX")):
        with refuses(NotImplementedError, f"{library} has no projection (proj_size)"):
            convert(draw_parameters(rng, "lstm_projected", 5, 4))
        with refuses(TypeError, "parameters must be a mapping of names to arrays, got list"):
            convert([parameters])
        with refuses(TypeError, "prefix must be a str, got NoneType"):
            convert(parameters, prefix=None)
        with refuses(ValueError, "missing; prefixes that would fit: ''"):
            convert(parameters, prefix="rnn.")
        with refuses(TypeError, "expected an array, got Parameter"):
            convert(dict(torch.nn.GRU(5, 4).named_parameters()))
