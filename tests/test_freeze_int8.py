"""freeze with weights of 8 bits: the bits of a stream, row by row, and what is kept."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load, save
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import ostinato
from ostinato import Stream, nn
from support.cells import SIX, TORCH_CELL_MODULES, TORCH_LAYERS, has_c
from support.pairs import each, flat, state

ACTIVATIONS = "int8", "int16"
KINDS = (*((name, {}) for name in TORCH_LAYERS), ("LSTM", {"proj_size": 5}))


@pytest.fixture(autouse=True)
def inferring():
    with torch.no_grad():
        yield


def same(ours, theirs):
    return len(flat(ours)) == len(flat(theirs)) and all(map(torch.equal, flat(ours), flat(theirs)))


def frozen(name, *sizes, library=nn, activations="int8", **options):
    """A module of 8 bits, and the module that it was."""
    module = getattr(library, name)(*sizes, **options)
    twin = copy.deepcopy(module)
    assert len(ostinato.freeze(module, "int8", activations=activations).changed) == 1
    return module, twin


def states_of(module, batch):
    rows = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(rows, batch, module.proj_size or module.hidden_size)
    return (h, torch.randn(rows, batch, module.hidden_size)) if has_c(module._kind) else h


def row_of(hx, b):
    return each(hx, lambda h: h[:, b : b + 1].contiguous())


# ---- numbers ----


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_a_layer_has_the_bits_of_a_stream(name, options, activations):
    module, twin = frozen(name, 7, 19, 2, activations=activations, **options)
    x, hx = torch.randn(9, 3, 7), states_of(twin, 3)
    stream = Stream.of(twin, batch=3, dtype="int8", activations=activations)
    output, last = module(x)
    assert torch.equal(stream(x), output)
    assert same([torch.from_numpy(s) for s in flat_arrays(stream.state)], last)
    stream.state = hx
    output, last = module(x, hx)
    assert torch.equal(stream(x), output)
    assert same([torch.from_numpy(s) for s in flat_arrays(stream.state)], last)
    one = Stream.of(twin, dtype="int8", activations=activations)
    assert torch.equal(one(x[:, 1]), module(x[:, 1])[0])


@pytest.mark.parametrize("name", SIX)
def test_a_stream_of_a_frozen_module(name):
    module, twin = frozen(name, 7, 19)
    x = torch.randn(2, 7)
    for each_of in module, twin:
        stream = Stream.of(each_of, batch=2)
        y = each_of(x if name in TORCH_CELL_MODULES else x[None])
        assert torch.equal(stream(x), flat(y)[0].view(2, 19))
        ostinato.freeze(twin)


def flat_arrays(state):
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("name", TORCH_CELL_MODULES)
def test_a_cell_has_the_bits_of_a_stream(name, activations):
    module, twin = frozen(name, 7, 19, activations=activations)
    parameters = {f"{n}_l0": t for n, t in twin.state_dict().items()}
    kind = name.removesuffix("Cell").lower()
    stream = Stream(kind, parameters, batch=3, dtype="int8", activations=activations)
    hx = None
    for x in torch.randn(4, 3, 7):
        hx = module(x, hx)
        assert torch.equal(stream(x), flat(hx)[0])
    alone = module(x[1], each(hx, lambda h: h[1]))
    assert same(alone, each(module(x, hx), lambda h: h[1]))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_errors_are_those_of_rounding(name, options, bidirectional):
    options = {**options, "num_layers": 2, "bidirectional": bidirectional}
    x, errors = torch.randn(30, 4, 40), {}
    for activations in ACTIVATIONS:
        module, twin = frozen(name, 40, 96, activations=activations, **options)
        (y, _), (exact, _) = module(x), twin(x)
        errors[activations] = ((y - exact).square().mean() / exact.square().mean()).sqrt()
    assert max(errors.values()) < 0.05


def dequantised(module, twin):
    """The float module of the weights that a module of 8 bits stands for."""
    saved, found = module.state_dict(), copy.deepcopy(twin)
    for name, parameter in found.named_parameters():
        scale = saved.get(f"{name}_scale")
        parameter.copy_(saved[name] if scale is None else saved[name] * scale[:, None])
    return found


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_what_cuts_rows_is_what_it_is_for_floats(name, options, bidirectional):
    options = {**options, "num_layers": 2, "bidirectional": bidirectional}
    module, twin = frozen(name, 6, 11, activations="int16", **options)
    floats = dequantised(module, twin)
    x, hx = torch.randn(8, 4, 6), states_of(twin, 4)
    lengths, resets = torch.tensor([3, 8, 0, 5]), torch.rand(8, 4) < 0.3
    resets[0, 1] = resets[7, 1] = True
    to = each(hx, lambda h: h[:, :1] * 2)
    packed = pack_padded_sequence(x, torch.tensor([3, 8, 1, 5]), enforce_sorted=False)
    flags = PackedSequence(torch.rand(len(packed.data)) < 0.4, *packed[1:])
    for arguments, given in (
        ((x,), {"lengths": lengths}),
        ((x, hx), {"lengths": lengths}),
        ((x, hx), {"resets": resets}),
        ((x, hx), {"resets": resets, "reset_to": to, "lengths": lengths}),
        ((x[:, 0], each(hx, lambda h: h[:, 0])), {"resets": resets[:, 0], "lengths": 5}),
        ((packed,), {}),
        ((packed, hx), {}),
        ((packed, hx), {"resets": flags, "reset_to": to}),
    ):
        found, expected = module(*arguments, **given), floats(*arguments, **given)
        torch.testing.assert_close(flat(found), flat(expected), rtol=2e-3, atol=2e-3)
    if isinstance(found[0], PackedSequence):
        assert torch.equal(found[0].batch_sizes, packed.batch_sizes)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("name", "options"), KINDS)
def test_a_row_has_the_bits_that_it_has_alone(name, options, bidirectional):
    module, twin = frozen(name, 6, 11, 2, bidirectional=bidirectional, **options)
    x, hx = torch.randn(7, 4, 6), states_of(twin, 4)
    lengths = [3, 7, 2, 5]
    output, last = module(x, hx, lengths=lengths)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    again, last_again = module(packed, hx)
    assert torch.equal(torch.nn.utils.rnn.pad_packed_sequence(again)[0], output)
    assert same(last, last_again)
    for b, length in enumerate(lengths):
        y, of_row = module(x[:length, b : b + 1], row_of(hx, b))
        assert torch.equal(output[:length, b : b + 1], y)
        assert not output[length:, b].any()
        assert same(row_of(last, b), of_row)
    flat_first = type(module).forward(module, x.transpose(0, 1).contiguous().transpose(0, 1), hx)
    assert same(flat_first, module(x, hx))


def test_resets_are_cuts():
    module, _ = frozen("GRU", 6, 11)
    x, h, to = torch.randn(7, 2, 6), torch.randn(1, 2, 11), torch.randn(1, 2, 11)
    resets = torch.zeros(7, 2, dtype=torch.bool)
    resets[3] = resets[0, 1] = True
    y, h_n = module(x, h, resets=resets, reset_to=to)
    start = torch.stack([h[:, 0], to[:, 1]], 1)
    first, _ = module(x[:3], start)
    second, last = module(x[3:], to)
    assert torch.equal(y, torch.cat([first, second]))
    assert torch.equal(h_n, last)


def test_layouts():
    module, _ = frozen("GRU", 6, 11, 2, batch_first=True, bidirectional=True)
    x = torch.randn(3, 5, 6)
    time_first = copy.deepcopy(module)
    time_first.batch_first = False
    expected, h_n = time_first(x.transpose(0, 1))
    for found in module(x), module(x, lengths=[5, 5, 5]), module(x, torch.zeros(4, 3, 11)):
        assert torch.equal(found[0], expected.transpose(0, 1))
        assert torch.equal(found[1], h_n)
    assert module(x[:, :0])[0].shape == (3, 0, 22)
    assert module(x[:0])[0].shape == (0, 5, 22)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x.bfloat16())[0].dtype == torch.float32


# ---- what is kept ----


@pytest.mark.parametrize("library", [nn, torch.nn], ids=["ours", "torch's"])
@pytest.mark.parametrize("name", SIX)
def test_weights_of_8_bits_are_all_there_is(name, library):
    module, twin = frozen(name, 4, 9, library=library)
    saved = module.state_dict()
    assert list(module.parameters()) == []
    for key, weight in twin.state_dict().items():
        assert saved[key].shape == weight.shape
        if not key.startswith("weight"):
            assert torch.equal(saved[key], weight)
            continue
        assert saved[key].dtype == torch.int8
        scale = saved[f"{key}_scale"]
        assert scale.dtype == torch.float32
        error = saved[key] * scale[:, None] - weight
        assert (error.abs() <= scale[:, None] * 0.501).all()
    assert len(saved) == len(twin.state_dict()) + 2
    assert "dtype=int8, activations=int8" in repr(module)


@pytest.mark.parametrize("name", SIX)
def test_a_state_dict_goes_through_safetensors_and_loads(name):
    module, _ = frozen(name, 4, 9)
    other, _ = frozen(name, 4, 9)
    x, hx = torch.randn(3, 4), None
    assert not same(module(x, hx), other(x, hx))
    other.load_state_dict(load(save(module.state_dict())))
    assert same(module(x), other(x))
    third, _ = frozen(name, 4, 9)
    third.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    assert same(module(x), third(x))


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("name", SIX)
def test_copies(name, activations):
    module, _ = frozen(name, 4, 9, activations=activations)
    x = torch.randn(3, 4)
    for made in copy.deepcopy(module), pickle.loads(pickle.dumps(module)):
        assert same(made(x), module(x))
        assert made.setting == module.setting


def test_float_first_and_8_bits_then():
    module, x = nn.LSTM(4, 9), torch.randn(3, 4)
    twin = copy.deepcopy(module)
    ostinato.freeze(module)
    ostinato.freeze(module, "int8")
    ostinato.freeze(twin, "int8")
    assert same(module(x), twin(x))
    (left,) = ostinato.restore(module).left
    assert left.why == "it was frozen with weights of 8 bits, and its float weights are gone"
    (left,) = ostinato.freeze(module).left
    assert left.why == "it is frozen with weights of 8 bits already"
    assert same(module(x), twin(x))
    module.float().to("cpu")
    assert same(module(x), twin(x))


def test_a_weight_in_two_modules_is_dropped_from_one():
    one, other = nn.GRUCell(4, 9), nn.GRUCell(4, 9)
    other.weight_hh = one.weight_hh
    model = torch.nn.ModuleList([one, other])
    ostinato.freeze(model[0], "int8")
    assert isinstance(other.weight_hh, torch.nn.Parameter)
    assert other(torch.randn(2, 4)).shape == (2, 9)


def test_states_of_every_kind():
    module, _ = frozen("LSTMCell", 4, 9)
    x, hx = torch.randn(3, 4), state("LSTMCell", 3, 9)
    wide = each(hx, lambda h: torch.stack([h, h], -1)[..., 0])
    assert same(module(x, wide), module(x, hx))
    assert same(module(x, list(hx)), module(x, hx))
    assert module(x[:0], each(hx, lambda h: h[:0]))[0].shape == (0, 9)


@pytest.mark.parametrize("name", ["GRU", "LSTMCell"])
def test_a_compiled_graph_breaks(name):
    module, _ = frozen(name, 4, 9)
    x = torch.randn(3, 4)
    compiled = torch.compile(lambda x: flat(module(x))[0] * 2, backend="eager")
    assert torch.equal(compiled(x), flat(module(x))[0] * 2)
    assert same(torch.fx.symbolic_trace(torch.nn.Sequential(module))(x), module(x))
