"""replace and restore: whole models, switched in place between torch.nn and ours."""

import contextlib
import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

import ostinato
from ostinato import nn
from ostinato.switch import Layer
from support.cells import MODULES, SIX, TORCH_LAYERS
from support.devices import device_type, without_cudnn
from support.pairs import TORCH_WARNS, assert_same, flat, shapes

pytestmark = pytest.mark.filterwarnings(TORCH_WARNS)

CONFIGURATIONS = [
    *((name, {}) for name in SIX),
    *((name, {"bias": False}) for name in SIX),
    *((name, {"dtype": torch.float64}) for name in SIX),
    *((name, {"dtype": torch.bfloat16}) for name in TORCH_LAYERS),
    *(
        (name, {"num_layers": 2, "bidirectional": True, "batch_first": True})
        for name in TORCH_LAYERS
    ),
    *((name, {"num_layers": 3, "dropout": 0.5}) for name in TORCH_LAYERS),
    ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
    ("RNNCell", {"nonlinearity": "relu"}),
    ("LSTM", {"proj_size": 3}),
    ("LSTM", {"proj_size": 3, "num_layers": 2, "bidirectional": True, "bias": False}),
]


def weight_names(module):
    return [name for name, _ in module.named_parameters()]


def first_weight(module):
    """The hidden weight of the first layer, whose name differs between layers and cells."""
    return next(name for name in weight_names(module) if name.startswith("weight_hh"))


class Model(torch.nn.Module):
    """Layers in every kind of container, at several depths, one of them twice."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.GRU(4, 8)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"rnn": torch.nn.LSTM(8, 8), "norm": torch.nn.LayerNorm(8)})
            for _ in range(2)
        )
        self.cell = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.RNNCell(8, 8))
        self.again = self.encoder

    def forward(self, x):
        x, _ = self.encoder(x)
        for block in self.blocks:
            x = block["norm"](block["rnn"](x)[0])
        return self.cell(x[-1])


# ---- what becomes of a layer ----


@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS)
def test_a_layer_stays_what_it_was_and_computes_what_it_did(name, options):
    module = getattr(torch.nn, name)(4, 8, **options)
    weights = [weight.requires_grad_(i != 1) for i, weight in enumerate(module.parameters())]
    module.eval().register_buffer("mean", torch.zeros(3), persistent=False)
    module.tag = tag = object()
    twin = getattr(torch.nn, name)(4, 8, **options).eval()
    twin.load_state_dict(module.state_dict())
    input = shapes(name, dtype=options.get("dtype", torch.float32))[0]

    report = ostinato.replace(module)
    assert report.model is module
    assert report.changed == (Layer("", name),)
    assert report.left == ()
    assert type(module) is getattr(nn, name)
    assert all(mine is one for mine, one in zip(module.parameters(), weights, strict=True))
    assert [weight.requires_grad for weight in weights] == [i != 1 for i in range(len(weights))]
    assert not module.training
    assert module.tag is tag
    assert "mean" in dict(module.named_buffers())
    assert "mean" not in module.state_dict()
    assert repr(module) == repr(twin)
    narrow = options.get("dtype") == torch.bfloat16
    # torch rounds to bfloat16 at every step.
    tolerance = {"rtol": 0.05, "atol": 0.02} if narrow else {}
    assert_same(module(input), twin(input), **tolerance)

    assert ostinato.restore(module).changed == (Layer("", name),)
    assert type(module) is type(twin)
    assert all(mine is one for mine, one in zip(module.parameters(), weights, strict=True))
    for one, other in zip(flat(module(input)), flat(twin(input)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", SIX)
def test_a_switched_layer_keeps_what_one_that_was_built_keeps(name):
    theirs, ours = getattr(torch.nn, name)(4, 8), getattr(nn, name)(4, 8)
    fresh = set(vars(theirs))
    ostinato.replace(theirs)
    assert all(hasattr(theirs, attribute) for attribute in vars(ours))
    assert "_flat_weights" not in vars(theirs)
    for module in (theirs, ours):
        ostinato.restore(module)
        assert set(vars(module)) == fresh


@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_what_torch_has_no_word_for_is_dropped(name):
    module = getattr(nn, name)(4, 8, memory="recompute")
    ostinato.restore(module)
    assert not hasattr(module, "memory")
    ostinato.replace(module)
    assert module.memory == "keep"


@pytest.mark.parametrize("name", SIX)
def test_on_the_meta_device(name):
    module = getattr(torch.nn, name)(4, 8, device="meta")
    ostinato.replace(module)
    assert type(module) is getattr(nn, name)
    output = flat(module(shapes(name, device="meta")[0]))[0]
    assert output.is_meta
    module.to_empty(device=device_type()).reset_parameters()
    assert flat(module(shapes(name)[0]))[0].shape == output.shape


@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_a_restored_layer_sees_weights_that_were_replaced_meanwhile(name):
    module, twin = getattr(torch.nn, name)(4, 8), getattr(torch.nn, name)(4, 8)
    ostinato.replace(module)
    module.weight_hh_l0 = torch.nn.Parameter(twin.weight_hh_l0.detach().clone())
    del module.weight_ih_l0
    module.weight_ih_l0 = twin.weight_ih_l0.detach().clone()
    ostinato.restore(module)
    assert module._flat_weights[0] is module.weight_ih_l0
    assert module._flat_weights[1] is module.weight_hh_l0
    twin.bias_ih_l0, twin.bias_hh_l0 = module.bias_ih_l0, module.bias_hh_l0
    input = shapes(name)[0]
    assert_same(module(input), twin(input))


# ---- hooks ----


def load(module):
    module.load_state_dict(module.state_dict())


def call(module):
    module(torch.randn(5, 3, 4))


def train(module):
    module(torch.randn(5, 3, 4, requires_grad=True))[0].sum().backward()


def fail(module):
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D"):
        module(torch.randn(4))


# How a hook is registered, and what sets it off.
HOOKS = {
    "forward_pre": (lambda m, seen: m.register_forward_pre_hook(seen), call),
    "forward_pre with_kwargs": (
        lambda m, seen: m.register_forward_pre_hook(seen, with_kwargs=True),
        call,
    ),
    "forward": (lambda m, seen: m.register_forward_hook(seen), call),
    "forward with_kwargs": (lambda m, seen: m.register_forward_hook(seen, with_kwargs=True), call),
    "forward always_call": (lambda m, seen: m.register_forward_hook(seen, always_call=True), fail),
    "full_backward_pre": (lambda m, seen: m.register_full_backward_pre_hook(seen), train),
    "full_backward": (lambda m, seen: m.register_full_backward_hook(seen), train),
    "state_dict_pre": (lambda m, seen: m.register_state_dict_pre_hook(seen), load),
    "state_dict_post": (lambda m, seen: m.register_state_dict_post_hook(seen), load),
    "load_state_dict_pre": (lambda m, seen: m.register_load_state_dict_pre_hook(seen), load),
    "load_state_dict_post": (lambda m, seen: m.register_load_state_dict_post_hook(seen), load),
    "of a parameter": (lambda m, seen: m.weight_hh_l0.register_hook(lambda grad: seen(m)), train),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_stay_and_their_handles_still_remove_them(kind):
    module = torch.nn.GRU(4, 8)
    seen = []
    register, set_off = HOOKS[kind]
    handle = register(module, lambda first, *_: seen.append(first))
    for switch in (ostinato.replace, ostinato.restore):
        switch(module)
        set_off(module)
        assert len(seen) == 1
        assert seen.pop() is module
    ostinato.replace(module)
    handle.remove()
    set_off(module)
    assert not seen


# ---- whole models ----


def test_every_layer_of_a_model_is_found_and_named():
    torch.manual_seed(1)
    model = Model()
    torch.manual_seed(1)
    twin = Model()
    x = torch.randn(5, 3, 4)
    report = ostinato.replace(model)
    assert report.changed == (
        Layer("encoder", "GRU"),
        Layer("blocks.0.rnn", "LSTM"),
        Layer("blocks.1.rnn", "LSTM"),
        Layer("cell.1", "RNNCell"),
    )
    assert report.left == ()
    assert report.library == "ostinato.nn"
    assert model.again is model.encoder
    assert type(model.again) is nn.GRU
    assert list(model.state_dict()) == list(twin.state_dict())
    assert_same(model(x), twin(x))
    back = ostinato.restore(model)
    assert back.changed == report.changed
    assert back.library == "torch.nn"
    assert torch.equal(model(x), twin(x))
    assert {type(m) for m in model.modules()} == {type(m) for m in twin.modules()}


def test_an_optimizer_from_before_goes_on():
    torch.manual_seed(1)
    models = Model(), Model()
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in models]
    for step in range(6):
        if step == 3:
            ostinato.replace(models[0])
        x = torch.randn(5, 3, 4)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_shared_weights_stay_shared():
    first, second = torch.nn.LSTM(8, 8), torch.nn.LSTM(8, 8)
    second.weight_hh_l0 = first.weight_hh_l0
    model = torch.nn.ModuleList([first, second])
    ostinato.replace(model)
    assert second.weight_hh_l0 is first.weight_hh_l0
    second(torch.randn(5, 3, 8))[0].sum().backward()
    assert first.weight_hh_l0.grad is not None


def test_whoever_holds_a_layer_holds_the_switched_one():
    model = torch.nn.Module()
    model.layer = torch.nn.GRU(4, 8)
    model.plain_list = [model.layer]
    ostinato.replace(model)
    assert model.plain_list[0] is model.layer
    assert type(model.plain_list[0]) is nn.GRU


@pytest.mark.parametrize("name", SIX)
def test_copies_of_a_switched_model(name):
    model = torch.nn.Sequential(getattr(torch.nn, name)(4, 8))
    ostinato.replace(model)
    input = shapes(name)[0]
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
        assert type(twin[0]) is getattr(nn, name)
        for one, other in zip(flat(model(input)), flat(twin(input)), strict=True):
            assert torch.equal(one, other)
        # And a copy goes back by itself.
        ostinato.restore(twin)
        assert type(model[0]) is getattr(nn, name)
        assert_same(model(input), twin(input))


def test_copies_of_a_restored_layer():
    module = nn.GRU(4, 8)
    ostinato.restore(module)
    x = torch.randn(5, 3, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[0], module(x)[0])


def test_a_second_time_there_is_nothing_to_do():
    model = Model()
    ostinato.replace(model)
    assert ostinato.replace(model).changed == ()
    ostinato.restore(model)
    assert ostinato.restore(model).changed == ()


@pytest.mark.parametrize("switch", [ostinato.replace, ostinato.restore])
def test_a_model_is_asked_for(switch):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        switch([torch.nn.GRU(4, 8)])


# ---- compiled models ----


@pytest.mark.parametrize("name", SIX)
def test_a_compiled_model_takes_the_change(name):
    model = torch.nn.Sequential(getattr(torch.nn, name)(4, 8))
    input = shapes(name)[0]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(input)
        ostinato.replace(model)
        for one, other in zip(flat(compiled(input)), flat(model(input)), strict=True):
            assert torch.equal(one, other)
        ostinato.restore(compiled)
        assert type(model[0]) is getattr(torch.nn, name)
        for one, other in zip(flat(compiled(input)), flat(before), strict=True):
            assert torch.equal(one, other)
    torch._dynamo.reset()


def test_a_model_that_was_compiled_in_place_takes_the_change(monkeypatch):
    model = torch.nn.Sequential(torch.nn.GRU(4, 8))
    model.compile(backend="eager")
    x = torch.randn(5, 3, 4)
    with torch.no_grad():
        model(x)
        ostinato.replace(model)
        calls = []
        monkeypatch.setattr(nn.GRU, "forward", lambda *_: calls.append(1))
        model(x)
    assert calls
    torch._dynamo.reset()


@pytest.mark.parametrize("name", SIX)
def test_a_switched_model_compiles_without_a_break(name):
    model = torch.nn.Sequential(getattr(torch.nn, name)(4, 8))
    key = first_weight(model[0])
    parametrizations.weight_norm(model[0], key)
    ostinato.replace(model)
    input = shapes(name)[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one, other in zip(flat(compiled(input)), flat(model(input)), strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()


# ---- parametrized weights ----


class Counted(torch.nn.Module):
    """A parametrization that knows how often it ran."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, weight):
        self.runs += 1
        return 2 * weight


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("name", SIX)
def test_parametrized_layers_stay_parametrized(name, kind):
    theirs = getattr(torch.nn, name)(4, 8)
    key = first_weight(theirs)
    getattr(parametrizations, kind)(theirs, key)
    theirs.eval()
    ours = copy.deepcopy(theirs)
    weights = list(ours.parameters())
    report = ostinato.replace(ours)
    assert report.changed == (Layer("", name),)
    assert isinstance(ours, getattr(nn, name))
    assert parametrize.is_parametrized(ours, key)
    assert repr(ours) == repr(theirs)
    assert all(mine is one for mine, one in zip(ours.parameters(), weights, strict=True))
    # The copy shared its class with the original, which is torch's still.
    assert isinstance(theirs, getattr(torch.nn, name))
    given = shapes(name)
    assert_same(ours(*given), theirs(*given))
    for module in (ours, theirs):
        with without_cudnn() if module is theirs else contextlib.nullcontext():
            sum(tensor.sum() for tensor in flat(module(*given))).backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)

    twin = copy.deepcopy(ours)
    assert_same(twin(*given), ours(*given))
    assert ostinato.restore(twin).changed == (Layer("", name),)
    for module, library in ((ours, nn), (twin, torch.nn)):
        assert isinstance(module, getattr(library, name))
        assert_same(module(*given), theirs(*given))
        parametrize.remove_parametrizations(module, key)
        assert type(module) is getattr(library, name)
        assert_same(module(*given), theirs(*given))


@pytest.mark.parametrize("name", SIX)
def test_switching_computes_no_weight(name):
    module = getattr(torch.nn, name)(4, 8)
    key = first_weight(module)
    counted = Counted()
    parametrize.register_parametrization(module, key, counted)
    counted.runs = 0
    ostinato.replace(module)
    ostinato.restore(module)
    assert counted.runs == 0
    # And torch takes the weights of each moment, in the next call and in those after.
    given, twin = shapes(name), copy.deepcopy(module)
    before = flat(module(*given))
    with torch.no_grad():
        module.parametrizations[key].original.mul_(0.5)
    ostinato.replace(twin)
    assert_same(tuple(before), tuple(flat(twin(*given))))
    assert not torch.equal(before[0], flat(module(*given))[0])


def test_a_weight_can_be_parametrized_after_the_change():
    module = torch.nn.GRU(4, 8)
    ostinato.replace(module)
    parametrize.register_parametrization(module, "weight_hh_l0", Counted())
    parametrize.register_parametrization(module, "weight_ih_l0", Counted())
    x = torch.randn(5, 3, 4)
    ours = module(x)
    ostinato.restore(module)
    assert_same(module(x), ours)


# ---- what is left alone ----


class Derived(torch.nn.GRU):
    """A class of its own that changes nothing."""


class Overridden(torch.nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


class DerivedFromOurs(nn.GRU):
    pass


def test_derived_classes_are_left_alone():
    model = torch.nn.Sequential(Derived(4, 8), Overridden(8, 8), torch.nn.GRU(8, 8))
    parametrizations.weight_norm(model[0], "weight_hh_l0")
    report = ostinato.replace(model)
    assert report.changed == (Layer("2", "GRU"),)
    assert report.left == (
        Layer("0", "GRU", "Derived is derived from torch.nn.GRU"),
        Layer("1", "LSTM", "Overridden is derived from torch.nn.LSTM"),
    )
    assert isinstance(model[0], Derived)
    assert type(model[1]) is Overridden
    assert isinstance(model[0], torch.nn.GRU)


def test_classes_derived_from_ours_are_left_alone():
    report = ostinato.restore(torch.nn.Sequential(DerivedFromOurs(4, 8)))
    assert report.changed == ()
    assert report.left == (Layer("0", "GRU", "DerivedFromOurs is derived from ostinato.nn.GRU"),)


@pytest.mark.parametrize("switch", [ostinato.replace, ostinato.restore])
def test_a_forward_on_the_object_would_go_on_to_run(switch):
    module = (torch.nn if switch is ostinato.replace else nn).GRU(4, 8)
    cls = type(module)
    module.forward = lambda input, hx=None: cls.forward(module, 2 * input, hx)
    report = switch(module)
    assert report.left == (Layer("", "GRU", "its forward was replaced on the object"),)
    assert type(module) is cls


@pytest.mark.parametrize(
    "store",
    [
        lambda module: setattr(module, "memory", 7),
        lambda module: setattr(module, "memory", torch.nn.Linear(2, 2)),
        lambda module: setattr(module, "memory", torch.nn.Parameter(torch.ones(2))),
        lambda module: module.register_buffer("memory", torch.ones(2)),
    ],
)
def test_an_attribute_that_ours_would_misread(store):
    module = torch.nn.GRU(4, 8)
    store(module)
    held = module.memory
    (layer,) = ostinato.replace(module).left
    assert layer.why == "its attribute memory means something else in ostinato.nn.GRU"
    assert type(module) is torch.nn.GRU
    assert module.memory is held


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_what_torch_jit_has_compiled_is_named(how):
    model = torch.nn.Sequential(torch.nn.GRU(4, 8))
    x = torch.randn(5, 3, 4)
    made = torch.jit.script(model) if how == "script" else torch.jit.trace(model, x)
    for switch in (ostinato.replace, ostinato.restore):
        report = switch(made)
        assert report.changed == ()
        assert report.left == (Layer("0", "GRU", "torch.jit has compiled it"),)
    assert_same(made(x), model(x))


# ---- the report, and the names ----


def test_the_report_reads():
    model = torch.nn.ModuleDict({"a": torch.nn.GRU(4, 8), "b": Overridden(4, 8)})
    assert str(ostinato.replace(model)) == (
        "now of ostinato.nn: 1, left alone: 1\n"
        "  a: GRU\n"
        "  b: LSTM, left alone: Overridden is derived from torch.nn.LSTM"
    )
    assert str(ostinato.restore(model)) == "now of torch.nn: 1, left alone: 0\n  a: GRU"
    assert str(ostinato.replace(torch.nn.Linear(2, 2))) == "now of ostinato.nn: 0, left alone: 0"
    assert str(ostinato.replace(torch.nn.GRU(4, 8))).endswith("\n  (the model itself): GRU")
    assert "GRU(" not in repr(ostinato.replace(torch.nn.GRU(4, 8)))


def test_the_names_are_functions_in_whatever_order_things_are_imported():
    for first in ("ostinato", "ostinato.switch", "ostinato.nn"):
        code = (
            f"import {first}, ostinato; print(ostinato.replace.__name__, ostinato.restore.__name__)"
        )
        run = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        assert run.stdout.split() == ["replace", "restore"]


def test_all_six_are_covered():
    bases = torch.nn.RNNBase, torch.nn.modules.rnn.RNNCellBase
    like_torchs = {name for name in nn.__all__ if issubclass(getattr(nn, name), bases)}
    assert set(SIX) <= set(MODULES) == like_torchs
