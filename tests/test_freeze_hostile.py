"""freeze and frozen modules, used wrongly: each refusal names what was expected and what came."""

import copy

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import ostinato
from ostinato import Stream, frozen, nn
from support.pairs import flat

X = torch.arange(24.0).view(2, 3, 4) / 24
GRAD = torch.ones(2, 3, 4, requires_grad=True)


def module_of(kind, dtype, *sizes, **options):
    module = getattr(nn, kind)(*(sizes or (4, 6)), **options)
    ostinato.freeze(module, dtype)
    return module


# What is called, what with, the error, and its words. Each for both dtypes.
CALLS = {
    "a list": ("GRU", lambda m: m([1.0]), TypeError, "input must be a Tensor .* got list"),
    "no dimensions": ("GRU", lambda m: m(torch.ones(())), ValueError, "2D or 3D, got 0D"),
    "four dimensions": ("GRU", lambda m: m(X[None]), ValueError, "2D or 3D, got 4D"),
    "features": ("GRU", lambda m: m(X[..., :3]), RuntimeError, "Expected 4, got 3"),
    "dtype": ("GRU", lambda m: m(X.double()), ValueError, "input dtype .*float64.* does not match"),
    "nested": (
        "GRU",
        lambda m: m(torch.nested.nested_tensor([X[0], X[1]])),
        RuntimeError,
        "input must not be a nested tensor",
    ),
    "whole numbers": ("GRU", lambda m: m(X.long()), ValueError, "input dtype .*int64"),
    "half": ("GRU", lambda m: m(X.half()), ValueError, "input dtype .*float16"),
    "meta": ("GRU", lambda m: m(X.to("meta")), RuntimeError, "not at the same device"),
    "hx of another batch": (
        "GRU",
        lambda m: m(X, torch.ones(1, 2, 6)),
        RuntimeError,
        r"Expected hidden size \(1, 3, 6\), got \[1, 2, 6\]",
    ),
    "hx of another size": (
        "GRU",
        lambda m: m(X, torch.ones(1, 3, 5)),
        RuntimeError,
        r"Expected hidden size \(1, 3, 6\), got \[1, 3, 5\]",
    ),
    "hx of another dimension": (
        "GRU",
        lambda m: m(X, torch.ones(3, 6)),
        RuntimeError,
        "hx should also be 3-D but got 2-D",
    ),
    "hx of another dtype": (
        "GRU",
        lambda m: m(X, torch.ones(1, 3, 6).double()),
        ValueError,
        "hx dtype .*float64",
    ),
    "hx is a number": ("GRU", lambda m: m(X, 1), TypeError, "hx must be a Tensor or None, got int"),
    "one state of two": (
        "LSTM",
        lambda m: m(X, torch.ones(1, 3, 6)),
        TypeError,
        r"hx must be a tuple or list of two Tensors .* got Tensor",
    ),
    "three states": ("LSTM", lambda m: m(X, (X, X, X)), RuntimeError, "two states .* got 3"),
    "c is None": (
        "LSTM",
        lambda m: m(X, (torch.ones(1, 3, 6), None)),
        TypeError,
        r"hx\[1\] must be a Tensor, got NoneType",
    ),
    "c of another size": (
        "LSTM",
        lambda m: m(X, (torch.ones(1, 3, 6), torch.ones(1, 3, 7))),
        RuntimeError,
        r"Expected hidden\[1\] size \(1, 3, 6\), got \[1, 3, 7\]",
    ),
    "lengths too long": ("GRU", lambda m: m(X, lengths=[1, 2, 3]), ValueError, "lengths must be"),
    "lengths of another batch": (
        "GRU",
        lambda m: m(X, lengths=[1, 2]),
        RuntimeError,
        r"lengths must have shape \(3,\), one per row, got \(2,\)",
    ),
    "resets of numbers": (
        "GRU",
        lambda m: m(X, resets=torch.ones(2, 3)),
        ValueError,
        "resets must be torch.bool, got torch.float32",
    ),
    "reset_to without resets": (
        "GRU",
        lambda m: m(X, reset_to=torch.ones(1, 6)),
        ValueError,
        "reset_to says what resets bring, but resets is None",
    ),
    "packed of other features": (
        "GRU",
        lambda m: m(pack_padded_sequence(X[..., :3], [2, 1, 1])),
        RuntimeError,
        "Expected 4, got 3",
    ),
    "an input that wants a gradient": (
        "GRU",
        lambda m: m(GRAD),
        RuntimeError,
        "GRU: input: expected a tensor that needs no gradient.*got one with requires_grad",
    ),
    "packed that wants a gradient": (
        "GRU",
        lambda m: m(pack_padded_sequence(GRAD, [2, 1, 1])),
        RuntimeError,
        "input.data: expected a tensor that needs no gradient",
    ),
    "h that wants a gradient": (
        "GRU",
        lambda m: m(X, torch.ones(1, 3, 6, requires_grad=True)),
        RuntimeError,
        "hx: expected a tensor that needs no gradient",
    ),
    "reset_to that wants a gradient": (
        "GRU",
        lambda m: m(X, resets=X[..., 0] > 0, reset_to=torch.ones(1, 6, requires_grad=True)),
        RuntimeError,
        "reset_to: expected a tensor that needs no gradient",
    ),
    "c that wants a gradient": (
        "LSTMCell",
        lambda m: m(X[0], (torch.ones(3, 6), torch.ones(3, 6, requires_grad=True))),
        RuntimeError,
        "LSTMCell: hx: expected a tensor that needs no gradient",
    ),
    "torch.func.grad": (
        "GRU",
        lambda m: torch.func.grad(lambda x: m(x)[0].sum())(X),
        RuntimeError,
        "input: expected a tensor that needs no gradient",
    ),
    "torch.func.grad of a cell": (
        "GRUCell",
        lambda m: torch.func.grad(lambda x: m(x).sum())(X[0]),
        RuntimeError,
        "input: expected a tensor that needs no gradient",
    ),
    "a cell's list": ("GRUCell", lambda m: m([1.0]), TypeError, "input must be a Tensor, got list"),
    "a cell's dimensions": ("GRUCell", lambda m: m(X), ValueError, "1D or 2D, got 3D"),
    "a cell's features": ("GRUCell", lambda m: m(X[0, :, :3]), RuntimeError, "got 3 expected 4"),
    "a cell's dtype": ("GRUCell", lambda m: m(X[0].double()), ValueError, "input dtype .*float64"),
    "a cell's hx": (
        "GRUCell",
        lambda m: m(X[0], torch.ones(2, 6)),
        RuntimeError,
        "Input batch size 3 doesn't match hidden0 batch size 2",
    ),
    "a cell's hx is a number": ("RNNCell", lambda m: m(X[0], 1), TypeError, "hx must be a Tensor"),
    "one state of a cell": (
        "LSTMCell",
        lambda m: m(X[0], torch.ones(3, 6)),
        TypeError,
        "hx must be a tuple or list of two",
    ),
    "functional_call": (
        "GRU",
        lambda m: torch.func.functional_call(m, copy.deepcopy(m.state_dict()), (X,)),
        RuntimeError,
        "weight_ih_l0: expected the weights that were frozen, got another tensor in its place",
    ),
    "half precision": ("GRU", lambda m: m.half(), RuntimeError, "got torch.float16 on cpu"),
    "another device": ("GRU", lambda m: m.to("meta"), RuntimeError, "got torch.* on meta"),
    "explain": ("GRU", lambda m: ostinato.explain(m, X), TypeError, "explain: .* got FrozenGRU"),
    "torch.jit.script": ("GRU", torch.jit.script, RuntimeError, "torch.jit.script does not take"),
    "the class": ("GRU", lambda m: type(m)(4, 6), TypeError, r"made by ostinato.freeze\(model\)"),
    "loading another shape": (
        "GRU",
        lambda m: m.load_state_dict({**m.state_dict(), "weight_hh_l0": torch.ones(3)}),
        RuntimeError,
        "size mismatch for weight_hh_l0",
    ),
    "loading a list": (
        "GRU",
        lambda m: m.load_state_dict({**m.state_dict(), "weight_hh_l0": [1.0]}),
        RuntimeError,
        "weight_hh_l0",
    ),
    "loading complex numbers": (
        "GRU",
        lambda m: m.load_state_dict(
            {**m.state_dict(), "bias_hh_l0": m.bias_hh_l0.detach().to(torch.complex64)}
        ),
        RuntimeError,
        "GRU: bias_hh_l0: expected .* got torch.complex64",
    ),
    "assigning half precision": (
        "GRU",
        lambda m: m.load_state_dict(
            {**m.state_dict(), "bias_hh_l0": m.bias_hh_l0.detach().half()}, assign=True
        ),
        RuntimeError,
        "GRU: bias_hh_l0: expected torch.float32 on the CPU, got torch.float16",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("label", CALLS)
def test_a_call_that_is_wrong(label, dtype):
    kind, wrong, error, words = CALLS[label]
    module = module_of(kind, dtype)
    x = X[0] if kind.endswith("Cell") else X
    before, saved = flat(module(x)), copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=words):
        wrong(module)
    assert all(map(torch.equal, before, flat(module(x))))
    assert all(map(torch.equal, saved.values(), module.state_dict().values()))


# ---- of one dtype ----


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["GRU", "LSTMCell"])
def test_nobody_traces_weights_of_8_bits(kind):
    module, x = module_of(kind, "int8"), X[0]
    for wrong, words in (
        (lambda: torch.export.export(module, (x,)), "expected a call that nobody traces"),
        (lambda: torch.jit.trace(module, (x,)), "expected a call that nobody traces"),
        (lambda: torch.vmap(module)(X), "expected a plain tensor.*in a transform"),
        (lambda: torch.func.jvp(module, (x,), (x,)), "expected a plain tensor.*in a transform"),
    ):
        with pytest.raises(NotImplementedError, match=f"{kind}: .*{words}.*dtype='float32'"):
            wrong()
    torch.compiler.reset()  # frames that it has given up before run uncompiled, and raise nothing
    with pytest.raises(torch._dynamo.exc.Unsupported, match="packed weights are no operator"):
        torch.compile(module, fullgraph=True, backend="eager")(x)


def test_weights_of_8_bits_have_no_states_of_all_steps():
    with pytest.raises(NotImplementedError, match=r"return_all_states: expected False .* got True"):
        module_of("GRU", "int8")(X, return_all_states=True)


def test_weights_of_another_kind_do_not_load():
    floats, small = module_of("GRU", "float32"), module_of("GRU", "int8")
    kept = [t.clone() for m in (floats, small) for t in m.state_dict().values()]
    with pytest.raises(RuntimeError, match=r"weight_ih_l0: expected torch.int8 .* torch.float32"):
        small.load_state_dict(floats.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r"weight_ih_l0: expected floating point .* torch.int8"):
        floats.load_state_dict(small.state_dict(), strict=False)
    for name, value, words in (
        ("weight_hh_l0_scale", float("nan"), "weight_hh_l0_scale: expected finite numbers"),
        ("weight_hh_l0_scale", -1.0, "weight_hh_l0_scale: expected finite numbers from 0 on"),
        ("weight_ih_l0", -128, "weight_ih_l0: expected values from -127 to 127, got -128"),
    ):
        wrong = torch.full_like(small.state_dict()[name], value)
        with pytest.raises(RuntimeError, match=words):
            small.load_state_dict({**small.state_dict(), name: wrong})
        with pytest.raises(RuntimeError, match=words):
            small.load_state_dict({name: wrong}, strict=False)
    now = [t for m in (floats, small) for t in m.state_dict().values()]
    assert all(map(torch.equal, kept, now))


def test_small_weights_are_of_one_dtype():
    module = module_of("GRU", "int8")
    with pytest.raises(RuntimeError, match=r"weight_ih_l0_scale: .* got torch.float64 on cpu"):
        module.double()
    assert module(X)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_writes_are_refused(dtype):
    module = module_of("LSTMCell", dtype)
    with torch.no_grad():
        module.bias_hh.add_(1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="bias_hh: expected the weights that were frozen"):
            module(X[0])
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    assert module(X[0])[0].shape == (3, 6)
    torch.nn.utils.parametrize.register_parametrization(
        module, "bias_hh", torch.nn.Identity(), unsafe=True
    )
    with pytest.raises(RuntimeError, match=r"bias_hh: .* got another tensor in its place"):
        module(X[0])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_dropout_is_of_training(dtype):
    module = module_of("GRU", dtype, 4, 6, 2, dropout=0.5)
    with pytest.raises(RuntimeError, match=r"expected eval mode.* got training with dropout=0.5"):
        module(X)
    assert module.eval()(X)[0].shape == (2, 3, 6)
    one = module_of("GRU", dtype)
    assert one.training
    assert one(X)[0].shape == (2, 3, 6)


# ---- freeze itself ----


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3,), TypeError, "freeze: model must be a torch.nn.Module, got int"),
        ((nn.GRU,), TypeError, "freeze: model must be a torch.nn.Module, got type"),
        ((nn.GRU(1, 1).state_dict(),), TypeError, "got OrderedDict"),
        ((nn.GRU(1, 1), torch.int8), TypeError, "freeze: dtype must be a str .*got torch.int8"),
        ((nn.GRU(1, 1), None), TypeError, "freeze: dtype must be a str .*got None"),
        ((nn.GRU(1, 1), "int4"), ValueError, "dtype must be one of float32, int8, got 'int4'"),
        ((nn.GRU(1, 1), "float64"), ValueError, "dtype must be one of float32, int8"),
    ],
)
def test_arguments_of_freeze(arguments, error, words):
    with pytest.raises(error, match=words):
        ostinato.freeze(*arguments)


def test_activations():
    for wrong, error, words in (
        (8, TypeError, "freeze: activations must be a str or None, got int"),
        ("int4", ValueError, "activations must be one of int8, int16, got 'int4'"),
    ):
        with pytest.raises(error, match=words):
            ostinato.freeze(nn.GRU(1, 1), "int8", activations=wrong)
    with pytest.raises(TypeError, match="positional"):
        ostinato.freeze(nn.GRU(1, 1), "int8", "int8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_leaves_the_whole_model_as_it_was(value):
    model = torch.nn.Sequential(nn.GRUCell(4, 6), torch.nn.LSTMCell(6, 6))
    with torch.no_grad():
        model[1].weight_hh[3, 2] = value
    classes, names = [type(m) for m in model], list(model.state_dict())
    words = rf"LSTMCell: weight_hh: expected finite numbers to quantise, got {value} at \[3, 2\]"
    with pytest.raises(ValueError, match=words):
        ostinato.freeze(model, "int8")
    assert [type(m) for m in model] == classes
    assert list(model.state_dict()) == names
    assert ostinato.freeze(model).changed  # floats are taken as they are


def test_a_weight_of_another_shape_leaves_the_model_as_it_was():
    model = torch.nn.Sequential(nn.GRUCell(4, 6), nn.GRUCell(4, 6))
    model[1].weight_hh = torch.nn.Parameter(torch.ones(3, 3))
    for dtype in "float32", "int8":
        with pytest.raises(
            RuntimeError, match=r"weight_hh: expected shape \(18, 6\), got \(3, 3\)"
        ):
            ostinato.freeze(model, dtype)
    assert type(model[0]) is nn.GRUCell


def test_derived_from_a_frozen_class():
    class Derived(frozen.FrozenGRU):
        pass

    module = module_of("GRU", "float32")
    module.__class__ = Derived
    for report in ostinato.freeze(module), ostinato.restore(module):
        (left,) = report.left
        assert left.why.endswith("Derived is derived from a frozen GRU")


def test_replace_passes_frozen_modules_by():
    module = module_of("GRU", "float32")
    report = ostinato.replace(module)
    assert (report.changed, report.left) == ((), ())
    assert type(module) is frozen.FrozenGRU


def test_a_torch_layer_whose_attribute_means_something_else():
    layer = torch.nn.GRU(4, 6)
    layer.memory = "mine"
    (left,) = ostinato.freeze(layer).left
    assert "its attribute memory means something else" in left.why


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_module_without_a_weight_is_left_alone(dtype):
    for module, name in ((nn.GRUCell(3, 4), "weight_hh"), (nn.LSTM(3, 4), "weight_ih_l0")):
        setattr(module, name, None)
        (left,) = ostinato.freeze(module, dtype).left
        assert left.why == f"its {name} is missing"


def test_what_is_packed_anew_is_of_one_dtype():
    cell = nn.GRUCell(3, 4)
    ostinato.freeze(cell)
    cell.weight_hh = torch.nn.Parameter(cell.weight_hh.detach().half())
    with pytest.raises(RuntimeError, match=r"weight_hh: expected torch.float32 .*torch.float16"):
        copy.deepcopy(cell)
    small = nn.GRUCell(3, 4)
    ostinato.freeze(small, "int8")
    small.weight_hh = small.weight_hh.float()
    with pytest.raises(RuntimeError, match=r"weight_hh: expected torch.int8 .*torch.float32"):
        copy.deepcopy(small)
    small = nn.GRUCell(3, 4)
    ostinato.freeze(small, "int8")
    small.weight_hh_scale = None
    with pytest.raises((RuntimeError, ValueError), match="every scale"):
        small.float()


def test_packed_rows_that_do_not_fall_are_refused():
    layer = nn.GRU(3, 4)
    ostinato.freeze(layer, "int8")
    for sizes, message in (([1, 3], "sizes that fall"), ([3, 2], "expected a sum of 4")):
        packed = torch.nn.utils.rnn.PackedSequence(torch.randn(4, 3), torch.tensor(sizes))
        with pytest.raises(ValueError, match=message):
            layer(packed)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_nothing_is_no_input(dtype):
    for module in (nn.GRU(3, 4), nn.GRUCell(3, 4)):
        with pytest.raises((TypeError, AttributeError)) as expected:
            module(None)
        ostinato.freeze(module, dtype)
        with pytest.raises(expected.type) as found:
            module(None)
        assert str(found.value) == str(expected.value)


def test_scales_of_another_dtype_are_named_when_they_are_loaded():
    cell = nn.GRUCell(3, 4)
    ostinato.freeze(cell, "int8")
    state = cell.state_dict()
    state["weight_hh_scale"] = state["weight_hh_scale"].bfloat16()
    with pytest.raises(RuntimeError, match=r"weight_hh_scale: expected torch.float32"):
        cell.load_state_dict(state)


def test_a_stream_of_a_frozen_module_has_its_activations():
    layer = nn.GRU(5, 9)
    x = torch.randn(6, 2, 5)
    ostinato.freeze(layer, "int8", activations="int16")
    assert torch.equal(Stream.of(layer, batch=2)(x), layer(x)[0])
    with pytest.raises(ValueError, match="activations: expected None beside dtype='float32'"):
        Stream.of(nn.GRU(5, 9), activations="int16")
    with pytest.raises(ValueError, match="activations: expected None beside dtype='float32'"):
        ostinato.freeze(nn.GRU(5, 9), activations="int16")
