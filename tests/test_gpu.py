"""The GPU engine on a GPU (`make test-gpu`): numbers, graphs, streams, compilation, equal bits.

Every test runs our kernels, measured or not (`choice.forced`). The judge is the float64 reference
on the same rounded numbers; torch.nn runs beside it.
"""

import contextlib
import random

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

from ostinato import cpu, cuda, fast_path, nn, operators
from ostinato.cuda import choice, layer
from ostinato.cuda.plan import configs
from ostinato.reference_backend import results
from support import emulation
from support.cells import CELLS, FIRST_CELLS, TORCH_LAYERS
from support.emulation import EPS, KINDS, errors, widened
from support.plain_calls import FORMS, drawn, numbers
from support.samples import SAMPLES, draw, gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.fixture(autouse=True)
def ours():
    with choice.forced(True):
        yield


@contextlib.contextmanager
def precisely(math):
    """Let recurrent layers multiply float32 in TF32 where `math` says so, else in float32."""
    switch, name = torch.backends.cudnn.rnn, "fp32_precision"
    value = "tf32" if math == "tf32" else "ieee"
    if not hasattr(switch, name):  # one switch for all of cuDNN, in older versions of torch
        switch, name, value = torch.backends.cudnn, "allow_tf32", math == "tf32"
    before = getattr(switch, name)
    setattr(switch, name, value)
    try:
        yield
    finally:
        setattr(switch, name, before)


@pytest.fixture(params=["tf32", "fp32"])
def precision(request):
    """How float32 is multiplied."""
    with precisely(request.param):
        yield request.param


def on_gpu(call):
    def move(tensor):
        return None if tensor is None else tensor.cuda().requires_grad_()

    resets = None if call.resets is None else call.resets.cuda()
    return call.with_tensors([move(t) for t in call.tensors()])._replace(resets=resets)


def compare(call, math):
    """Hold every result and gradient of a call on the GPU to the reference."""
    eps = EPS[math]
    mine = on_gpu(call)
    assert layer.decide(mine, is_training=True).is_ours
    mine_results = emulation.cut_layer(mine)
    wide = widened(call)
    expected = results(wide._replace(all_states=True)).flat()
    seeds = [torch.randn(r.shape).to(call.input.dtype) for r in expected]
    leaves = [t for t in mine.tensors() if t is not None]
    wide_leaves = [t for t in wide.tensors() if t is not None]
    found = gradients(mine_results, leaves, [s.cuda() for s in seeds], allow_unused=True)
    options = {"allow_unused": True}
    other = gradients(expected, wide_leaves, [s.double() for s in seeds], **options)
    steps = call.input.shape[0] if call.batch_sizes is None else len(call.batch_sizes)
    bound = 8 * eps * max(1.0, steps / 16)
    for a, b in zip(mine_results, expected, strict=True):
        assert errors(a.cpu(), b) <= bound
    for a, b in zip(found, other, strict=True):
        # A gradient of relu jumps where rounding makes a state just zero: of few elements.
        judge = spread if call.cell == "rnn_relu" and eps > EPS["tf32"] / 4 else errors
        assert judge(a.cpu(), b) <= 2 * bound


def spread(found, expected):
    """The norm of the error, relative to that of what is expected."""
    if found is None or expected is None or not expected.numel():
        return errors(found, expected)
    return ((found.double() - expected).norm() / expected.norm().clamp_min(0.1)).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("math", ["bf16", "fp16"])
def test_small_layers(cell, math, kind):
    for hidden in (16, 61, 128):
        compare(emulation.draw(cell, hidden, kind, math=math), math)


@pytest.mark.parametrize("kind", ["padded", "packed", "resets lengths"])
@pytest.mark.parametrize("batch", [5, 12])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("math", ["bf16", "tf32"])
@pytest.mark.parametrize("exchange", ["block", "cluster", "grid"])
def test_sanitized(monkeypatch, exchange, math, cell, batch, kind):
    """Small enough for compute-sanitizer, which `make test-gpu` runs on these: each exchange."""

    def plan(cell, math, hidden, batch, directions, is_backward, device):
        fitting = configs(cell, math, hidden, is_backward, device)
        return next((config for config in fitting if config.exchange == exchange), None)

    if plan(cell, math, 61, batch, 2, False, layer.device_of(0)) is None:
        pytest.skip(f"no kernel of this device has the exchange {exchange}")
    monkeypatch.setattr(layer, "plan", plan)
    with precisely(math):
        compare(emulation.draw(cell, 61, kind, batch=batch, math=math), math)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", FIRST_CELLS)
def test_float32(cell, kind, precision):
    for hidden in (16, 61, 128):
        compare(emulation.draw(cell, hidden, kind, math=precision), precision)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("hidden", [256, 512, 768, 1024, 2048])
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_large_layers(cell, hidden, batch):
    compare_large(emulation.draw(cell, hidden, batch=batch, math="bf16", directions=1), "bf16")


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("hidden", [160, 192, 512, 1024])
def test_large_layers_in_float32(cell, hidden, precision):
    compare_large(emulation.draw(cell, hidden, batch=16, math=precision), precision)


@pytest.mark.parametrize("kind", ["padded", "lengths"])
def test_more_rows_than_a_launch_has(kind):
    """Whose blocks wait for each other through global memory: several launches follow."""
    compare_large(emulation.draw("gru", 2048, kind, batch=200, math="bf16"), "bf16")


def compare_large(call, math):
    if not layer.decide(on_gpu(call), is_training=True).is_ours:
        pytest.skip("no kernel of this size fits this device")
    compare(call, math)


def test_a_thousand_random_shapes():
    chance = random.Random(0)
    for _ in range(1000):
        math = chance.choice(["bf16", "fp16"])
        hidden = chance.choice([chance.randint(1, 70), chance.randint(71, 400)])
        options = {
            "steps": chance.randint(1, 12),
            "batch": chance.randint(1, 40),
            "size": chance.randint(1, 40),
            "directions": chance.randint(1, 2),
            "bias": chance.random() < 0.8,
            "states": chance.random() < 0.8,
        }
        cell = chance.choice(FIRST_CELLS)
        torch.manual_seed(chance.randrange(2**31))
        compare(emulation.draw(cell, hidden, chance.choice(KINDS), math=math, **options), math)


@pytest.mark.parametrize("kind", [k for k, o in SAMPLES.items() if not o.get("recompute")])
def test_what_the_cpu_engine_is_tested_with(kind):
    """The samples of tests/test_ops.py, whichever way they go on a GPU."""
    sample = draw(**SAMPLES[kind], dtype=torch.float32)
    on_device = sample.each(lambda t: t.cuda().requires_grad_())
    wide = sample.each(lambda t: t.double().requires_grad_())
    results, expected = on_device.run(), wide.reference()
    seeds = [torch.randn_like(r) for r in expected]
    found = gradients(results, on_device.leaves(), [s.float().cuda() for s in seeds])
    other = gradients(expected, wide.leaves(), seeds)
    for a, b in zip([*results, *found], [*expected, *other], strict=True):
        assert errors(a.cpu(), b) <= 64 * EPS["tf32"]


@pytest.mark.parametrize("math", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize("cell", TORCH_LAYERS)
@pytest.mark.parametrize("hidden", [128, 256, 512])
def test_errors_are_no_larger_than_cudnns(cell, hidden, math):
    torch.manual_seed(0)
    with precisely(math):
        compare_with_cudnn(cell, hidden, math, emulation.DTYPES[math])


def compare_with_cudnn(cell, hidden, math, dtype):
    theirs = getattr(torch.nn, cell)(hidden, hidden).cuda().to(dtype)
    mine = getattr(nn, cell)(hidden, hidden).cuda().to(dtype)
    mine.load_state_dict(theirs.state_dict())
    exact = getattr(torch.nn, cell)(hidden, hidden).cuda().double()
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(64, 16, hidden, device="cuda").to(dtype)
    found = []
    for net in (exact, mine, theirs):
        leaf = x.to(next(net.parameters()).dtype).requires_grad_()
        output = net(leaf)[0]
        grads = torch.autograd.grad(output.square().mean(), [leaf, *net.parameters()])
        found.append([t.detach().double() for t in (output, *grads)])
    for i, name in enumerate(["output", "dx", *(name for name, _ in mine.named_parameters())]):
        ours, cudnns = ((found[k][i] - found[0][i]).norm().item() for k in (1, 2))
        print(f"\n{cell} {math} H{hidden} {name}: ours {ours:.3e}, cuDNN {cudnns:.3e}", end="")
        assert ours <= 1.1 * cudnns


@pytest.mark.parametrize("hidden", [64, 256, 1024])
def test_the_same_bits_at_every_run(hidden):
    gru = nn.GRU(32, hidden).cuda().bfloat16()
    x = torch.randn(50, 24, 32, device="cuda").bfloat16()
    runs = []
    for _ in range(20):
        gru.zero_grad()
        output = gru(x)[0]
        output.sum().backward()
        runs.append([output, *(p.grad.clone() for p in gru.parameters())])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


@pytest.mark.parametrize("hidden", [64, 256, 1024])
def test_a_graph_captures_a_layer(hidden):
    gru = nn.GRU(32, hidden).cuda().bfloat16()
    x = torch.randn(20, 8, 32, device="cuda").bfloat16()
    with torch.no_grad():
        expected = gru(x)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = gru(x)[0]
        for _ in range(5):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(found, gru(x)[0])
    assert expected.shape == found.shape


@pytest.mark.parametrize("kind", ["packed", "lengths"])
def test_a_graph_captures_ragged_rows(kind):
    """After a call with the same lengths, which brings them to the device."""
    gru = nn.GRU(32, 64).cuda().bfloat16()
    x, lengths = torch.randn(20, 3, 32, device="cuda").bfloat16(), [20, 7, 1]

    def run():
        if kind == "lengths":
            return gru(x, lengths=lengths)[0]
        return gru(pack_padded_sequence(x, lengths))[0].data

    with torch.no_grad():
        run()
        graph = torch.cuda.CUDAGraph()
        packed = pack_padded_sequence(x, lengths)
        with torch.cuda.graph(graph):
            found = gru(packed)[0].data if kind == "packed" else run()
        for _ in range(3):
            packed.data.copy_(torch.randn_like(packed.data))
            x.copy_(torch.randn_like(x))
            graph.replay()
            expected = gru(packed)[0].data if kind == "packed" else run()
            assert torch.equal(found, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_the_fast_path_has_the_operators_bits(monkeypatch, name, form):
    module, x, given, cuts = drawn(name, form, bidirectional=True)
    module = module.cuda()
    leaf = x.detach().cuda().requires_grad_()

    def there(value):
        if value is x:
            return leaf
        if isinstance(value, torch.nn.utils.rnn.PackedSequence) and value.data.is_floating_point():
            return pack_padded_sequence(leaf, [5, 4, 2, 1])
        return value.to("cuda") if hasattr(value, "to") else tuple(v.to("cuda") for v in value)

    given = [there(value) for value in given]
    cuts = {k: value if k == "lengths" else there(value) for k, value in cuts.items()}
    with monkeypatch.context() as patch:
        patch.setattr(operators, "layer", None)
        found = numbers(module, leaf, given, cuts)
    monkeypatch.setattr(fast_path, "_forward", cpu.plain_forward)
    expected = numbers(module, leaf, given, cuts)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_a_cell_is_torch_s_own(name):
    theirs = getattr(torch.nn, name)(32, 64).cuda()
    mine = getattr(nn, name)(32, 64).cuda()
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(8, 32, device="cuda")
    for found, expected in zip(tree_leaves(mine(x)), tree_leaves(theirs(x)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("hidden", [64, 256])
def test_two_streams(hidden):
    gru = nn.GRU(32, hidden).cuda().bfloat16()
    inputs = [torch.randn(200, 8, 32, device="cuda").bfloat16() for _ in range(2)]
    with torch.no_grad():
        expected = [gru(x)[0] for x in inputs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in inputs]
        for _ in range(10):
            found = []
            for stream, x in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    found.append(gru(x)[0])
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_compiled(cell, mode):
    net = getattr(nn, cell)(32, 64, 2).cuda().bfloat16()
    compiled = torch.compile(net, fullgraph=True, mode=mode)
    for batch in (4, 4, 9):
        x = torch.randn(12, batch, 32, device="cuda").bfloat16()
        torch.testing.assert_close(compiled(x)[0], net(x)[0], rtol=2**-6, atol=2**-7)


def test_what_the_operator_checks():
    call = on_gpu(emulation.draw("gru", 16, math="bf16"))
    torch.library.opcheck(torch.ops.ostinato.layer, (*call.parameters(), False, True))
    # Without what backward needs there is none.
    checks = ("test_schema", "test_faketensor")
    arguments = (*call.parameters(), False, False)
    torch.library.opcheck(torch.ops.ostinato.layer, arguments, test_utils=checks)


def test_explain_names_a_kernel():
    gru = nn.GRU(32, 64).cuda().bfloat16()
    text = cuda.explain(gru, torch.zeros(5, 2, 32, device="cuda").bfloat16())
    assert "ostinato_forward in bf16" in text
