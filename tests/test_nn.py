"""The modules against torch's: outputs and every gradient over the grid of their options."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from ostinato import nn, plain, reference
from ostinato.cells import CELLS
from support.cells import (
    LAYERS,
    MODULES,
    SIX,
    TORCH_KINDS,
    has_c,
    is_projected,
    options_of,
    record_of,
)
from support.devices import assert_equal, device_type
from support.pairs import (
    TOLERANCE,
    TORCH_WARNS,
    assert_same,
    each,
    flat,
    packed,
    pair,
    shapes,
    state,
)

pytestmark = pytest.mark.filterwarnings(TORCH_WARNS)

# float64 on both sides: what differs by more is another function, not another rounding.
EXACT = {"rtol": 1e-11, "atol": 1e-13}

KINDS = {
    kind: (
        record_of(kind).layer,
        options_of(kind) | ({"proj_size": 3} if is_projected(kind) else {}),
    )
    for kind in TORCH_KINDS
}
FORMS = ("padded", "batch_first", "unbatched", "unbatched_batch_first", "sorted", "unsorted")
INPUT, HIDDEN, BATCH = 5, 7, 4


def arguments(kind, form, layers, directions, given, dtype=torch.float64):
    """Input of one form, and a state or None, as leaves that require gradients."""
    name, options = KINDS[kind]
    rows, size = layers * directions, options.get("proj_size", HIDDEN)
    if form in ("sorted", "unsorted"):
        sequences = packed(form == "sorted", (3, 6, 1, 6), INPUT, dtype=dtype)
        input = sequences._replace(data=sequences.data.requires_grad_())
    else:
        shape = {"padded": (6, BATCH, INPUT), "batch_first": (BATCH, 6, INPUT)}
        input = torch.randn(*shape.get(form, (6, INPUT)), dtype=dtype, requires_grad=True)
    if not given:
        return input, None
    middle = () if form.startswith("unbatched") else (BATCH,)
    h = torch.randn(rows, *middle, size, dtype=dtype, requires_grad=True)
    c = torch.randn(rows, *middle, HIDDEN, dtype=dtype, requires_grad=True)
    return input, (h, c) if has_c(name) else h


def gradients(module, input, hx, seed=5):
    """Outputs of a call, and the gradients of a random sum of them."""
    torch.manual_seed(seed)
    result = module(input, hx)
    torch.manual_seed(seed + 1)
    loss = sum((t * torch.randn_like(t)).sum() for t in flat(result))
    wanted = flat([input] if hx is None else [input, hx]) + list(module.parameters())
    return flat(result), torch.autograd.grad(loss, wanted), result


def options_of(kind, form, layers, bidirectional, **more):
    name, options = KINDS[kind]
    options = {"num_layers": layers, "bidirectional": bidirectional, **options, **more}
    return name, {"batch_first": form.endswith("batch_first"), "dtype": torch.float64, **options}


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_torchs(kind, form, layers):
    for bidirectional, bias, given in itertools.product((False, True), repeat=3):
        name, options = options_of(kind, form, layers, bidirectional, bias=bias)
        ours, theirs = pair(name, INPUT, HIDDEN, **options)
        input, hx = arguments(kind, form, layers, 1 + bidirectional, given)
        mine, other = gradients(ours, input, hx), gradients(theirs, input, hx)
        torch.testing.assert_close(mine[0], other[0], **EXACT)
        torch.testing.assert_close(mine[1], other[1], **EXACT)
        for one, twin in zip(mine[0], other[0], strict=True):
            assert one.stride() == twin.stride()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_equals_torchs(kind, form):
    name, options = options_of(kind, form, 2, True)
    ours, theirs = pair(name, INPUT, HIDDEN, **options | {"dtype": torch.float32})
    input, hx = arguments(kind, form, 2, 2, True, dtype=torch.float32)
    mine, other = gradients(ours, input, hx), gradients(theirs, input, hx)
    torch.testing.assert_close(mine[0], other[0], **TOLERANCE)
    torch.testing.assert_close(mine[1], other[1], rtol=1e-4, atol=1e-5)


@pytest.mark.cpu("cuDNN draws dropout's numbers itself")
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_draws_torchs_numbers(kind, form, p):
    for layers, bidirectional in ((2, False), (3, True)):
        name, options = options_of(kind, form, layers, bidirectional, dropout=p)
        ours, theirs = pair(name, INPUT, HIDDEN, **options)
        input, hx = arguments(kind, form, layers, 1 + bidirectional, True)
        mine = gradients(ours, input, hx)
        after = torch.rand(2)
        other = gradients(theirs, input, hx)
        assert_equal(after, torch.rand(2))
        torch.testing.assert_close(mine[0], other[0], **EXACT)
        torch.testing.assert_close(mine[1], other[1], **EXACT)
        ours.eval()
        theirs.eval()
        assert_same(ours(input, hx), theirs(input, hx), **EXACT)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_is_on_between_layers_only(name):
    torch.manual_seed(0)
    module = getattr(nn, name)(INPUT, HIDDEN, 2, dropout=0.5)
    input = torch.randn(6, BATCH, INPUT)
    one, other = flat(module(input)), flat(module(input))
    # The first layer's final state does not depend on it, the second's does.
    assert_equal(one[1][0], other[1][0])
    assert not torch.equal(one[1][1], other[1][1])
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        single = getattr(nn, name)(INPUT, HIDDEN, 1, dropout=0.5)
    assert_equal(flat(single(input))[0], flat(single(input))[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RNNCell", {}),
        ("RNNCell", {"nonlinearity": "relu"}),
        ("GRUCell", {}),
        ("LSTMCell", {}),
    ],
)
def test_cells_in_a_loop_equal_torchs(name, options, batched, bias):
    ours, theirs = pair(name, INPUT, HIDDEN, bias=bias, dtype=torch.float64, **options)
    middle = (BATCH,) if batched else ()
    steps = torch.randn(6, *middle, INPUT, dtype=torch.float64, requires_grad=True)
    start = each(state(name, *middle, HIDDEN, dtype=torch.float64), lambda t: t.requires_grad_())
    found = []
    for module in (ours, theirs):
        found.append([])
        for given in (True, False):
            hx, outputs = start if given else None, []
            for at, step in enumerate(steps):
                hx = module(step, hx)
                outputs += flat(hx)
                if at == 2:
                    # An episode ends here, as in reinforcement learning.
                    hx = each(hx, lambda t: t * 0.5)
            loss = sum((t * (k + 1)).sum() for k, t in enumerate(outputs))
            wanted = [steps, *module.parameters(), *(flat([start]) if given else [])]
            found[-1].append((outputs, torch.autograd.grad(loss, wanted)))
    torch.testing.assert_close(*found, **EXACT)


@pytest.mark.parametrize("name", LAYERS)
def test_a_cell_is_a_layer_of_one_step(name):
    layer = getattr(nn, name)(INPUT, HIDDEN)
    cell = getattr(nn, f"{name}Cell")(INPUT, HIDDEN)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    input, hx = torch.randn(6, BATCH, INPUT), None
    output, *ends = layer(input)
    for at, step in enumerate(input):
        hx = cell(step, hx)
        torch.testing.assert_close(flat(hx)[0], output[at], **TOLERANCE)
    for one, other in zip(flat(hx), flat(ends), strict=True):
        torch.testing.assert_close(one, other[0], **TOLERANCE)


# ---- properties ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_cut_in_two_and_carried_equals_one_run(kind):
    name, options = KINDS[kind]
    module = getattr(nn, name)(INPUT, HIDDEN, 2, **options)
    input = torch.randn(9, BATCH, INPUT)
    whole, *ends = module(input)
    for cut in (0, 1, 4, 9):
        first, carried = module(input[:cut])
        second, *after = module(input[cut:], carried)
        assert_equal(torch.cat([first, second]), whole)
        for one, other in zip(flat(after), flat(ends), strict=True):
            assert_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_reversed_input_equals_the_reverse_direction(kind):
    name, options = KINDS[kind]
    module = getattr(nn, name)(INPUT, HIDDEN, bidirectional=True, **options)
    alone = getattr(nn, name)(INPUT, HIDDEN, **options)
    alone.load_state_dict(
        {k.removesuffix("_reverse"): v for k, v in module.state_dict().items() if "reverse" in k}
    )
    input = torch.randn(6, BATCH, INPUT)
    output, *ends = module(input)
    size = options.get("proj_size", HIDDEN)
    backward, *end = alone(input.flip(0))
    torch.testing.assert_close(output[..., size:], backward.flip(0), **TOLERANCE)
    for one, other in zip(flat(ends), flat(end), strict=True):
        torch.testing.assert_close(one[1], other[0], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_commute_with_permutation(kind):
    name, options = KINDS[kind]
    module = getattr(nn, name)(INPUT, HIDDEN, 2, bidirectional=True, **options)
    input, order = torch.randn(6, BATCH, INPUT), torch.tensor([2, 0, 3, 1])
    for one, other in zip(flat(module(input[:, order])), flat(module(input)), strict=True):
        assert_equal(one, other[:, order])


@pytest.mark.parametrize("kind", KINDS)
def test_packing_full_rows_equals_padding(kind):
    name, options = KINDS[kind]
    module = getattr(nn, name)(INPUT, HIDDEN, 2, bidirectional=True, **options)
    sequences = packed(False, (6, 6, 6, 6), INPUT)
    input, _ = pad_packed_sequence(sequences)
    output, *ends = module(sequences)
    assert_equal(pad_packed_sequence(output)[0], module(input)[0])
    for one, other in zip(flat(ends), flat(module(input)[1:]), strict=True):
        assert_equal(one, other)


# ---- modes of running ----


@pytest.mark.parametrize("name", MODULES)
def test_results_do_not_depend_on_what_autograd_records(name):
    module = getattr(nn, name)(4, 8)
    x, h = shapes(name)
    expected = flat(module(x, h))
    with torch.no_grad():
        plain = flat(module(x, h))
    with torch.inference_mode():
        inference = flat(module(x, h))
    module.requires_grad_(False)
    frozen = flat(module(x, h))
    for results in (plain, inference, frozen):
        for one, other in zip(results, expected, strict=True):
            assert not one.requires_grad
            assert_equal(one, other)
    assert all(t.is_inference() for t in inference)
    through = flat(module(x.requires_grad_(), h))
    sum(t.sum() for t in through).backward()
    assert x.grad is not None
    assert all(weight.grad is None for weight in module.parameters())


@pytest.mark.parametrize("name", MODULES)
def test_compiles_into_one_graph(name):
    torch._dynamo.reset()
    module = getattr(nn, name)(4, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, h = shapes(name)
    for hx in (None, h):
        results = []
        for call in (module, compiled):
            outputs = flat(call(x, hx))
            grads = torch.autograd.grad(sum(t.sum() for t in outputs), list(module.parameters()))
            results.append((outputs, grads))
        torch.testing.assert_close(*results, **TOLERANCE)
    with torch.autocast(device_type()):
        assert_same(compiled(x.bfloat16(), h), module(x.bfloat16(), h))
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_to_be_differentiated_know_no_autocast(name, dtype):
    module = getattr(nn, name)(4, 8, 2).to(dtype)
    x = torch.randn(5, 3, 4).to(dtype)
    output = module(x)[0]
    options = {"retain_graph": True, "create_graph": True}
    grads = []
    for low in (torch.float16, torch.bfloat16):
        for enabled in (False, True):
            with torch.autocast(device_type(), low, enabled=enabled):
                grads.append(
                    torch.autograd.grad(output.sum(), list(module.parameters()), **options)
                )
    for other in grads[1:]:
        for one, two in zip(grads[0], other, strict=True):
            assert_equal(two, one)


@pytest.mark.parametrize("name", LAYERS)
def test_stacks_and_packed_input_compile_into_one_graph(name):
    torch._dynamo.reset()
    module = getattr(nn, name)(4, 8, 2, bidirectional=True, batch_first=True, dropout=0.5).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, 4)
    assert_same(compiled(x), module(x))
    assert_same(compiled(x[0]), module(x[0]))
    sequences = packed(False)
    mine, *ends = compiled(sequences)
    other, *others = module(sequences)
    assert isinstance(mine, PackedSequence)
    assert_same(mine, other)
    assert_same(ends, others)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODULES)
def test_no_recurrent_operator_of_torch_runs(name):
    module = getattr(nn, name)(4, 8)
    x, h = shapes(name)
    calls = [lambda: module(x, h), lambda: module(x)]
    if name in LAYERS:
        calls.append(lambda: module(packed(False)))
    # The double and half precision go by other ways.
    twin = copy.deepcopy(module).bfloat16()
    calls.append(lambda: twin(x.bfloat16()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for call in calls:
            sum(t.sum() for t in flat(call())).backward()
            with torch.no_grad():
                call()
    names = {event.name for event in profile.events()}
    assert names
    recurrent = ("gru", "lstm", "rnn_tanh", "rnn_relu", "_cell", "rnn_layer", "_thnn", "cudnn_rnn")
    assert [n for n in names if n.startswith("aten::") and any(r in n for r in recurrent)] == []


@pytest.mark.parametrize("name", LAYERS)
def test_replicas_read_the_tensors_that_they_are_given(name):
    module = getattr(nn, name)(4, 8)
    replica = module._replicate_for_data_parallel()
    for key, weight in module.named_parameters():
        # As torch.nn.parallel.replicate does: plain tensors, cut off from the module.
        setattr(replica, key, weight.detach() * 0.5)
    halved = getattr(nn, name)(4, 8)
    halved.load_state_dict({k: v * 0.5 for k, v in module.state_dict().items()})
    x, h = shapes(name)
    assert_same(replica(x, h), halved(x, h))


def test_a_derived_class_is_named_in_its_repr_and_not_in_messages():
    class Encoder(nn.GRU):
        def forward(self, input, hx=None):
            return super().forward(input * 2, hx)

    torch.manual_seed(0)
    encoder, plain = Encoder(4, 8), nn.GRU(4, 8)
    plain.load_state_dict(encoder.state_dict())
    x = torch.randn(5, 3, 4)
    assert_same(encoder(x), plain(2 * x))
    assert repr(encoder) == "Encoder(4, 8)"
    with pytest.raises(ValueError, match=r"^GRU: Expected input to be 2D or 3D, got 1D instead$"):
        encoder(x[0, 0])


def test_modules_are_seen_as_recurrent_by_the_base_class():
    model = torch.nn.Sequential(nn.LSTM(4, 8), nn.GRUCell(4, 8), torch.nn.Linear(8, 2))
    assert [isinstance(m, torch.nn.RNNBase) for m in model] == [True, False, False]


@pytest.mark.parametrize("name", SIX)
def test_training_moves_the_loss_like_torchs(name):
    ours, theirs = pair(name, 4, 8)
    x, _ = shapes(name)
    target = torch.randn_like(flat(ours(x))[0])
    losses = []
    for module in (ours, theirs):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(flat(module(x))[0], target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)


# ---- a layer that torch does not have ----


class Mine(nn.GRU.__base__):
    """A GRU by another name, which torch's base class and cuDNN do not know."""

    _kind = "Mine"

    def __init__(self, *args, **kwargs):
        super().__init__("MINE", *args, **kwargs)


@pytest.fixture
def mine(monkeypatch):
    record = dataclasses.replace(CELLS["gru"], name="mine", layer="Mine", onnx=None)
    monkeypatch.setitem(CELLS, "mine", record)
    monkeypatch.setitem(plain.NUMBERS, "mine", record.number)
    monkeypatch.setitem(reference.STEPS, "mine", reference.STEPS["gru"])


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
def test_a_layer_that_torch_does_not_have(options):
    options = {**options, "dtype": torch.float64}
    torch.manual_seed(1)
    mine = Mine(3, 4, **options)
    torch.manual_seed(1)
    gru = nn.GRU(3, 4, **options)
    assert repr(mine) == repr(gru).replace("GRU", "Mine")
    for (name, found), (other, expected) in zip(
        mine.state_dict().items(), gru.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(found, expected)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    for layer in (mine, copy.deepcopy(mine), mine.double()):
        for found, expected in zip(layer(x), gru(x), strict=True):
            assert torch.equal(found, expected)
    leaves = [[x, *layer.parameters()] for layer in (mine, gru)]
    grads = [
        torch.autograd.grad(layer(x)[0].sum(), own)
        for layer, own in zip((mine, gru), leaves, strict=True)
    ]
    assert all(map(torch.equal, *grads))
    assert Mine(3, 4, device="meta").weight_hh_l0.shape == (12, 4)
