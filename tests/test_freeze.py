"""freeze with float weights: the bits of our modules, and what becomes of a model."""

import concurrent.futures
import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import ostinato
from ostinato import frozen, nn
from ostinato.switch import Layer
from support.cells import CELL_MODULES, LAYERS, SIX, TORCH_CELL_MODULES, TORCH_LAYERS, has_c
from support.own import Elman
from support.pairs import each, flat, state

OPTIONS = (
    {},
    {"bias": False, "dtype": torch.float64},
    {"num_layers": 3, "bias": False},
    {"batch_first": True, "num_layers": 2},
    {"bidirectional": True},
    {"bidirectional": True, "num_layers": 3, "batch_first": True, "dtype": torch.float64},
)
PROJECTED = (
    {"proj_size": 5},
    {"proj_size": 5, "num_layers": 3},
    {"proj_size": 5, "num_layers": 2, "bidirectional": True},
)
LAYER_CASES = [
    *((name, options) for name in LAYERS for options in OPTIONS),
    *(("LSTM", options) for options in PROJECTED),
    ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
]
CELL_CASES = [
    *((name, options) for name in CELL_MODULES for options in ({}, {"bias": False})),
    *((name, {"dtype": torch.float64}) for name in CELL_MODULES),
    ("RNNCell", {"nonlinearity": "relu"}),
]


@pytest.fixture(autouse=True)
def inferring():
    with torch.no_grad():
        yield


def same(ours, theirs):
    return len(flat(ours)) == len(flat(theirs)) and all(map(torch.equal, flat(ours), flat(theirs)))


def twins(name, *sizes, library=nn, **options):
    """A frozen module, and ours of the same weights."""
    module, twin = getattr(library, name)(*sizes, **options), getattr(nn, name)(*sizes, **options)
    twin.load_state_dict(module.state_dict())
    assert ostinato.freeze(module).changed == (Layer("", name),)
    return module, twin


def states_of(module, batch, dtype):
    """A state of a layer, with another size for c of a projection."""
    rows = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(rows, batch, module.proj_size or module.hidden_size, dtype=dtype)
    if not has_c(module._kind):
        return h
    return h, torch.randn(rows, batch, module.hidden_size, dtype=dtype)


# ---- bits ----


@pytest.mark.parametrize("size", [(1, 1), (5, 17), (130, 33)])
@pytest.mark.parametrize(("name", "options"), LAYER_CASES)
def test_a_layer_has_the_bits_that_it_had(name, options, size):
    if options.get("proj_size", 0) >= size[-1]:
        return
    module, twin = twins(name, *size, **options)
    dtype = options.get("dtype", torch.float32)
    for steps, batch in (7, 3), (1, 1), (1, 4), (6, 1):
        sides = (batch, steps) if options.get("batch_first") else (steps, batch)
        x, hx = torch.randn(*sides, size[0], dtype=dtype), states_of(twin, batch, dtype)
        assert same(module(x), twin(x))
        assert same(module(x, hx), twin(x, hx))
        row = torch.randn(steps, size[0], dtype=dtype)
        assert same(module(row), twin(row))
        of_row = each(hx, lambda h: h[:, 0])
        assert same(module(row, of_row), twin(row, of_row))
    # Nothing is kept between two calls.
    assert same(module(x), twin(x))


@pytest.mark.parametrize("size", [(1, 1), (5, 17), (130, 64)])
@pytest.mark.parametrize(("name", "options"), CELL_CASES)
def test_a_cell_has_the_bits_that_it_had(name, options, size):
    module, twin = twins(name, *size, **options)
    dtype = options.get("dtype", torch.float32)
    for batch in 1, 3, 20:
        x, hx = torch.randn(batch, size[0], dtype=dtype), state(name, batch, size[1], dtype=dtype)
        assert same(module(x), twin(x))
        assert same(module(x, hx), twin(x, hx))
        assert same(module(x[0]), twin(x[0]))
        assert same(module(x[0], each(hx, lambda h: h[0])), twin(x[0], each(hx, lambda h: h[0])))


@pytest.mark.parametrize("name", CELL_MODULES)
def test_a_cell_has_the_bits_of_ours_on_every_instruction_set(isa, name):
    module, twin = twins(name, 5, 19)
    x = torch.randn(3, 5)
    hx = module(x)
    assert same(module(x, hx), twin(x, hx))


@pytest.mark.parametrize("name", TORCH_LAYERS)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_cuts_rows_goes_the_layers_own_way(name, bidirectional):
    module, twin = twins(name, 4, 9, 2, bidirectional=bidirectional)
    x, hx = torch.randn(6, 3, 4), states_of(twin, 3, torch.float32)
    resets = torch.rand(6, 3) < 0.3
    packed = pack_padded_sequence(x, torch.tensor([3, 6, 1]), enforce_sorted=False)
    for arguments, options in (
        ((x, hx), {"lengths": [3, 0, 6]}),
        ((x,), {"resets": resets}),
        ((x, hx), {"resets": resets, "reset_to": each(hx, lambda h: h + 1)}),
        ((x, hx), {"return_all_states": True}),
        ((packed,), {}),
        ((packed, hx), {}),
    ):
        assert same(module(*arguments, **options), twin(*arguments, **options))


@pytest.mark.parametrize("name", SIX)
def test_layouts_and_kinds_of_arguments(name):
    module, twin = twins(name, 4, 9)
    is_cell = name in TORCH_CELL_MODULES
    x = torch.randn(3, 4) if is_cell else torch.randn(5, 3, 4)
    hx = state(name, 3, 9) if is_cell else state(name, 1, 3, 9)
    flipped = x.transpose(0, -1).contiguous().transpose(0, -1)
    for given in (
        flipped,
        torch.nn.Parameter(x),
        torch._neg_view(-x),
        x[..., ::1],
        x.expand(x.shape),
    ):
        assert same(module(given, hx), twin(x, hx))
    wide = each(hx, lambda h: torch.stack([h, h], -1)[..., 0])
    assert same(module(x, wide), twin(x, hx))
    if has_c(name):
        assert same(module(x, list(hx)), twin(x, hx))
    empty = x[:0]
    none = each(hx, lambda h: h[:0]) if is_cell else hx
    assert same(module(empty, none), twin(empty, none))
    with torch.autocast("cpu", torch.bfloat16):
        assert same(module(x.bfloat16(), hx), twin(x.bfloat16(), hx))
    with torch.inference_mode():
        assert flat(module(x, hx))[0].is_inference()


def test_outputs_are_nobody_elses_memory():
    cell, twin = twins("GRUCell", 4, 9)
    x, h = torch.randn(2, 4), torch.randn(2, 9)
    before, kept = h.clone(), cell(x, h)
    again = cell(x, kept)
    kept.zero_()
    assert torch.equal(h, before)
    assert torch.equal(again, twin(x, twin(x, h)))


def test_a_call_takes_one_way_into_c(monkeypatch):
    """The fast path serves what is plain: nothing else of the module is asked."""
    cell, layer = twins("LSTMCell", 4, 9)[0], twins("GRU", 4, 9, 2, bidirectional=True)[0]
    monkeypatch.setattr(type(cell), "_check_call", None)
    monkeypatch.setattr(type(layer), "_check_call", None)
    x = torch.randn(3, 4)
    assert len(cell(x, cell(x))) == 2
    assert layer(x)[0].shape == (3, 18)
    assert layer(x.view(3, 1, 4), torch.zeros(4, 1, 9))[0].shape == (3, 1, 18)


def test_several_threads_at_once():
    module, twin = twins("GRU", 64, 128, 2, bidirectional=True)
    inputs = [torch.randn(60, b, 64) for b in (1, 3, 8, 16)] * 3
    expected = [twin(x) for x in inputs]

    def run(x):
        with torch.no_grad():
            return module(x)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(map(same, pool.map(run, inputs), expected))


# ---- gradients ----


@torch.enable_grad()
@pytest.mark.parametrize("name", SIX)
def test_no_output_has_a_grad_fn(name):
    module, twin = twins(name, 4, 9)
    x = torch.randn(3, 4)
    assert all(p.requires_grad for p in module.parameters())
    assert not any(t.requires_grad for t in flat(module(x)))
    assert same(module(x), [t.detach() for t in flat(twin(x))])
    if name in TORCH_LAYERS:
        assert not any(t.requires_grad for t in flat(module(x[:, None], lengths=[2])))


def test_an_input_that_requires_a_gradient_is_taken_without_gradients():
    module, twin = twins("GRU", 4, 9)
    x = torch.randn(3, 2, 4, requires_grad=True)
    assert same(module(x), twin(x))


# ---- what becomes of a model ----


class Model(torch.nn.Module):
    def __init__(self, library):
        super().__init__()
        self.encoder = library.LSTM(4, 8, 2, bidirectional=True)
        self.cell = library.GRUCell(16, 8)
        self.again = self.cell
        self.head = torch.nn.Linear(8, 2)

    def forward(self, x):
        y, _ = self.encoder(x)
        return self.head(self.again(y[-1], self.cell(y[0])))


@pytest.mark.parametrize("library", [nn, torch.nn], ids=["ours", "torch's"])
def test_a_model_is_frozen_and_goes_back_to_what_it_was(library):
    model = Model(library).eval()
    model.tag = tag = object()
    seen = []
    model.cell.register_forward_hook(lambda *_: seen.append(1))
    fresh = {name: set(vars(m)) for name, m in model.named_modules()}
    parameters, x = list(model.parameters()), torch.randn(5, 3, 4)
    cell, saved, expected = model.cell, copy.deepcopy(model.state_dict()), model(x)
    report = ostinato.freeze(model)
    assert report.model is model
    assert report.changed == (Layer("encoder", "LSTM"), Layer("cell", "GRUCell"))
    assert report.left == ()
    assert str(report).startswith("now of ostinato.frozen: 2, left alone: 0\n")
    assert model.cell is model.again is cell
    assert type(cell) is frozen.FrozenGRUCell
    assert isinstance(cell, nn.GRUCell)
    assert all(map(torch.equal, model.state_dict().values(), saved.values()))
    assert list(model.state_dict()) == list(saved)
    assert all(mine is one for mine, one in zip(model.parameters(), parameters, strict=True))
    assert model.tag is tag
    torch.testing.assert_close(model(x), expected)
    assert len(seen) == 4
    name = library.__name__
    assert ostinato.restore(model).library == name
    assert type(model.cell) is library.GRUCell
    assert {name: set(vars(m)) for name, m in model.named_modules()} == fresh
    assert torch.equal(model(x), expected)
    assert len(ostinato.restore(model).changed) == (2 if library is nn else 0)
    assert type(model.encoder) is torch.nn.LSTM


def test_a_model_that_is_frozen_in_part():
    model = torch.nn.ModuleList([nn.GRU(4, 8), nn.GRU(4, 8), torch.nn.GRU(4, 8)])
    ostinato.freeze(model[0])
    report = ostinato.restore(model)
    assert report.library == "ostinato.nn and torch.nn"
    assert [type(m) for m in model] == [nn.GRU, torch.nn.GRU, torch.nn.GRU]
    assert ostinato.restore(torch.nn.Linear(1, 1)).library == "torch.nn"


def test_what_is_left_alone_is_named():
    class Derived(torch.nn.GRU):
        pass

    class Ours(nn.LSTMCell):
        pass

    parametrized = nn.GRU(3, 4)
    torch.nn.utils.parametrizations.weight_norm(parametrized, "weight_hh_l0")
    replaced = nn.GRUCell(3, 4)
    replaced.forward = lambda x: x
    computed = nn.GRUCell(3, 4)
    del computed.weight_hh
    computed.weight_hh = torch.zeros(12, 4)
    frozen_int8 = nn.GRUCell(3, 4)
    ostinato.freeze(frozen_int8, "int8")
    cases = {
        "Derived is derived from torch.nn.GRU": Derived(3, 4),
        "Ours is derived from ostinato.nn.LSTMCell": Ours(3, 4),
        "are parametrized": parametrized,
        "its forward was replaced on the object": replaced,
        "its weight_hh is no parameter": computed,
        "its weight_ih_l0 is of torch.bfloat16, and float32 or float64": nn.GRU(
            3, 4, dtype=torch.bfloat16
        ),
        "its weight_ih is on meta": torch.nn.RNNCell(3, 4, device="meta"),
        "it is frozen with weights of 8 bits already": frozen_int8,
    }
    model = torch.nn.ModuleList(cases.values())
    classes = [type(m) for m in model]
    report = ostinato.freeze(model)
    assert report.changed == ()
    assert [type(m) for m in model] == classes
    for why, layer in zip(cases, report.left, strict=True):
        assert why in layer.why, (why, layer)
    (left,) = ostinato.freeze(nn.GRU(3, 4, dtype=torch.float64), "int8").left
    assert left.why == "its weight_ih_l0 is of torch.float64, and float32 is packed"


def test_own_cells_are_left_alone():
    layer = nn.Recurrent(Elman, 3, 4)
    assert ostinato.freeze(layer).left == (
        Layer("", "Recurrent", "a cell of one's own has no packed weights"),
    )


def test_biases_on_one_side_alone():
    for missing in "bias_ih", "bias_hh":
        module = nn.GRUCell(3, 4)
        setattr(module, missing, None)
        twin = copy.deepcopy(module)
        assert ostinato.freeze(module).changed
        x = torch.randn(2, 3)
        assert same(module(x), twin(x))
        ostinato.freeze(module, "int8")
        torch.testing.assert_close(module(x), twin(x), rtol=0.05, atol=0.05)


# ---- weights that change ----


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_packed(name, assign):
    module, _ = twins(name, 4, 9)
    other = getattr(nn, name)(4, 9)
    module.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    x = torch.randn(3, 4)
    assert same(module(x), other(x))
    model = torch.nn.ModuleDict({"it": module})
    model.load_state_dict({f"it.{n}": t * 2 for n, t in other.state_dict().items()})
    other.load_state_dict({n: t * 2 for n, t in other.state_dict().items()})
    assert same(module(x), other(x))


@pytest.mark.parametrize("name", SIX)
def test_a_module_that_is_converted_is_packed_anew(name):
    module, twin = twins(name, 4, 9)
    x = torch.randn(3, 4)
    assert same(torch.nn.Sequential(module).double()[0](x.double()), twin.double()(x.double()))
    assert same(module.float()(x), twin.float()(x))
    assert same(module.to("cpu").share_memory()(x), twin(x))


def test_writes_are_seen():
    module, twin = twins("GRUCell", 4, 9)
    layer, of_layer = twins("LSTM", 4, 9, bidirectional=True)
    x = torch.randn(3, 4)
    for frozen_one, ours in (module, twin), (layer, of_layer):
        name = next(iter(frozen_one.state_dict()))
        for m in frozen_one, ours:
            getattr(m, name).mul_(2)
        with pytest.raises(
            RuntimeError, match=f"{name}: expected the weights that were frozen, got a tensor that"
        ):
            frozen_one(x)
        assert ostinato.freeze(frozen_one).changed
        assert same(frozen_one(x), ours(x))
        setattr(frozen_one, name, torch.nn.Parameter(getattr(ours, name).clone()))
        with pytest.raises(RuntimeError, match=f"{name}: .* got another tensor in its place"):
            frozen_one(x)
        assert same(copy.deepcopy(frozen_one)(x), ours(x))
        ostinato.restore(frozen_one)
        assert same(frozen_one(x), ours(x))


def test_weights_that_two_modules_share():
    model = torch.nn.ModuleList([nn.GRUCell(4, 9), nn.GRUCell(4, 9)])
    model[1].weight_hh = model[0].weight_hh
    twin, x = copy.deepcopy(model), torch.randn(3, 4)
    ostinato.freeze(model)
    assert all(same(m(x), t(x)) for m, t in zip(model, twin, strict=True))
    for m in model, twin:
        m.load_state_dict({name: t / 2 for name, t in m.state_dict().items()})
    with pytest.raises(RuntimeError, match="weight_hh: expected the weights that were frozen"):
        model[0](x)
    ostinato.freeze(model)
    assert all(same(m(x), t(x)) for m, t in zip(model, twin, strict=True))


def test_weights_without_versions():
    with torch.inference_mode():
        module = nn.GRUCell(4, 9)
        twin = copy.deepcopy(module)
        ostinato.freeze(module)
        x = torch.randn(3, 4)
        assert same(module(x), twin(x))
    assert same(module(x), twin(x))


# ---- copies and files ----


@pytest.mark.parametrize("name", SIX)
def test_copies_and_files(name):
    module, twin = twins(name, 4, 9, library=torch.nn)
    x, file = torch.randn(3, 4), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for made in (
        copy.copy(module),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert type(made) is getattr(frozen, f"Frozen{name}")
        assert repr(made) == repr(module)
        assert same(made(x), twin(x))
        ostinato.restore(made)
        assert type(made) is getattr(torch.nn, name)
    assert same(module(x), twin(x))


# ---- torch's tools ----


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_tools_see_the_modules_operator(name):
    module, twin = twins(name, 4, 9)
    x = torch.randn(3, 4)
    holder = torch.nn.Sequential(module)
    for made in (
        torch.compile(holder, backend="eager", fullgraph=True),
        torch.export.export(holder, (x,)).module(),
        torch.jit.trace(holder, (x,)),
        torch.fx.symbolic_trace(holder),
    ):
        other = torch.randn(3, 4)
        assert same(made(other), twin(other))
    assert same(torch.func.jvp(module, (x,), (x,)), torch.func.jvp(twin, (x,), (x,)))
    rows = torch.randn(2, 3, 4)
    assert same(torch.vmap(module)(rows), torch.vmap(twin)(rows))
    assert same(module(x), twin(x))
