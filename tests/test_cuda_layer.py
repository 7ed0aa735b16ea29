"""The operators' CUDA side and who runs a layer, on CPU tensors and stand-ins for the device."""

import pathlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ostinato
from ostinato import cuda, nn, operators, route
from ostinato.cuda import choice, launch, layer, sequence, trial
from ostinato.cuda.plan import A100, H200, Device, at_once, configs, nanoseconds, plan
from ostinato.tensors import check_call
from support import emulation
from support.cells import FIRST_CELLS, MODULES
from support.devices import OnGpu, pack

ROW = {"cell": "gru", "math": "bf16", "form": "padded", "is_training": False}
ROWS = [
    {**ROW, "hidden": hidden, "batch": batch, "ratio": ratio}
    for hidden, batch, ratio in [
        (128, 1, 2.0),
        (128, 16, 1.5),
        (256, 1, 1.2),
        (256, 16, 0.9),
        (512, 1, 3.0),
    ]
]


def question(hidden, batch, **changes):
    found = choice.Question("gru", "bf16", hidden, batch, "padded", False)
    return found._replace(**changes)


@pytest.mark.parametrize(
    ("asked", "is_ours", "reason"),
    [
        (question(128, 1), True, "2.00 times as fast as torch.nn at H 128, B 1"),
        (question(64, 1), True, "2.00 times"),
        (question(160, 1), True, "1.20 times as fast as torch.nn at H 256, B 1"),
        (question(128, 300), True, "1.50 times"),
        (question(160, 7), False, "0.90 times as fast as torch.nn at H 256, B 16"),
        (question(256, 16), False, "0.90 times"),
        (question(512, 16), False, "H 512 at B 16 was not measured"),
        (question(128, 1, is_training=True), False, "no such layer was measured"),
        (question(128, 1, form="packed"), False, "no such layer was measured"),
        (question(128, 1, cell="lstm"), False, "no such layer was measured"),
        (question(128, 1, math="tf32"), False, "no such layer was measured"),
    ],
)
def test_ours_runs_where_it_was_faster_at_every_size_around(asked, is_ours, reason):
    found = choice.answer(ROWS, asked)
    assert found.is_ours is is_ours
    assert reason in found.reason


@pytest.mark.parametrize(
    ("hidden", "batch", "is_covered"),
    [
        (128, 1, True),
        (160, 7, True),
        (64, 1, False),
        (128, 300, False),
        (512, 16, False),
        (600, 1, False),
    ],
)
def test_sizes_past_the_last_measured_are_not_covered(hidden, batch, is_covered):
    assert choice.answer(ROWS, question(hidden, batch)).is_covered is is_covered


def test_the_measured_file_has_what_a_choice_reads():
    for device, rows in choice._measured().items():
        assert isinstance(device, str)
        for row in rows:
            assert set(row) == {*choice.Question._fields, "ratio"}


def test_an_unmeasured_device_runs_cudnn_unless_asked():
    found = choice.is_ours("a device that nobody has", question(128, 1))
    assert not found.is_ours
    assert not found.is_covered
    assert "nothing was measured" in found.reason
    assert not choice.is_known("a device that nobody has")
    with choice.forced(True):
        assert choice.is_ours("a device that nobody has", question(128, 1))[0]
        assert choice.is_known("a device that nobody has")
        with choice.forced(False):
            assert not choice.is_ours("a device that nobody has", question(128, 1))[0]


# ---- plans ----


@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize("cell", FIRST_CELLS)
@pytest.mark.parametrize("math", ["bf16", "fp16", "tf32", "fp32"])
@pytest.mark.parametrize("device", [H200, A100, Device(84, 101_376, 0), Device(170, 101_376, 8)])
def test_every_plan_fits_its_device(device, math, cell, is_backward):
    for hidden in (1, 16, 100, 128, 257):
        for config in configs(cell, math, hidden, is_backward, device):
            assert config.is_even
            assert config.shared_bytes <= device.shared_bytes
            assert config.padded >= hidden
            assert config.threads <= 1024
            assert 0 <= config.resident <= config.fragments
            assert config.exchange != "cluster" or config.blocks <= device.cluster
            if config.exchange == "grid":
                assert at_once(config, device) * config.blocks <= device.processors
            few, many = (nanoseconds(config, batch, 2, device) for batch in (1, 1000))
            assert 0 < few <= many


def test_sizes_that_a_plan_serves():
    for hidden in (64, 128, 160, 192, 256, 512, 768, 963, 1024, 1925, 2048):
        for cell in FIRST_CELLS:
            for is_backward in (False, True):
                for math in ("bf16", "fp16", "tf32", "fp32"):
                    found = plan(cell, math, hidden, 16, 1, is_backward, H200)
                    # Weights of 4 bytes are larger than all multiprocessors together can hold.
                    too_large = hidden > 1900 and math in ("tf32", "fp32") and cell != "rnn_tanh"
                    assert (found is None) == too_large
    assert plan("gru", "bf16", 4096, 16, 1, False, H200) is None
    assert plan("gru", "bf16", 2048, 4096, 2, False, H200) is not None
    assert plan("gru", "bf16", 64, 16, 1, False, layer.NO_DEVICE) is None


def test_the_kernels_take_what_the_host_gives():
    source = pathlib.Path(__file__).parents[1] / "csrc" / "cuda" / "sequence.cu"
    text = source.read_text("utf-8")
    more = re.search(r"#define OSTINATO_MORE (.+)", text).group(1)
    assert tuple(re.findall(r"(\w+)(?:,|$)", more)) == sequence.EXTRAS
    text = text.replace(" OSTINATO_MORE", "")
    for entry, names in (("forward", sequence.FORWARD), ("backward", sequence.BACKWARD)):
        signature = re.search(rf"ostinato_{entry}\(([^)]*)\)", text).group(1)
        found = re.findall(r"(\w+)(?:,|$)", signature)
        short = [n.replace("output", "y").replace("grad_", "d") for n in names]
        sizes = ["first", "steps", "rows", "batch", "directions"]
        assert found == [*sizes, *sequence.Rows._fields, *short, "exchange"]


# ---- the operators on CUDA tensors, with the kernels on host fibers ----

FORWARD, BACKWARD = operators._forward_on(layer.forward), operators._backward_on(layer.backward)


@pytest.fixture
def gpu(monkeypatch):
    """Let CPU tensors take the way of CUDA tensors, of which nothing is tried."""
    monkeypatch.setattr(trial, "_is_on", False)
    monkeypatch.setattr(launch, "available", lambda: True)
    monkeypatch.setattr(layer, "device_of", lambda index: H200)
    monkeypatch.setattr(layer, "launcher_of", lambda call: emulation.launcher())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a stand-in")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", ["padded", "resets packed"])
def test_the_operators_of_cuda_tensors(kind):
    call = emulation.draw("lstm", 16, kind, math="fp32", batch=3)
    leaves = [t.requires_grad_() for t in call.tensors() if t is not None]
    with torch.no_grad():
        found = FORWARD(*call.parameters(), True, True)
    output, *_, reserve = found
    results = found[:-1]
    fake = operators._fake_forward(*call.parameters(), True, True)
    for mine, theirs in zip(results, fake[:4], strict=True):
        assert mine.shape == theirs.shape
    assert reserve.numel() == sequence.reserve_bytes(call, check_call(call))
    grads = [torch.randn_like(t) for t in results]
    wanted = [t is not None for t in call.tensors()]
    with torch.no_grad():
        found = BACKWARD(*grads, output, reserve, wanted, *call.parameters())
    other = tuple(emulation.cut_layer(call))
    torch.testing.assert_close(results, other, rtol=2e-3, atol=2e-3)
    expected = torch.autograd.grad(other, leaves, grads)
    mine = [grad for grad, want in zip(found, wanted, strict=True) if want]
    torch.testing.assert_close(tuple(mine), expected, rtol=5e-3, atol=1e-2)


@pytest.mark.usefixtures("gpu")
def test_an_operator_without_a_kernel_says_so():
    call = emulation.draw("gru", 16, math="fp32")
    wide = call.with_tensors([None if t is None else t.double() for t in call.tensors()])
    with pytest.raises(RuntimeError, match=r"no kernel on cpu for gru of torch\.float64"):
        FORWARD(*wide.parameters(), False, False)


@pytest.mark.usefixtures("gpu")
def test_who_runs_a_layer():
    call = emulation.draw("gru", 16, math="bf16")
    assert not layer.decide(call, is_training=True).is_ours
    with choice.forced(True):
        decision = layer.decide(call, is_training=True)
        assert decision.is_ours
        wide = call._replace(input=call.input.double())
        assert "no kernel computes in torch.float64" in layer.decide(wide, is_training=True).reason
        empty = call._replace(input=call.input[:0])
        assert "nothing to compute" in layer.decide(empty, is_training=False).reason
        more = call._replace(weights=[*call.weights[:4], call.weights[1]], bidirectional=False)
        assert "proj_size" in layer.decide(more, is_training=False).reason
        large = torch.zeros(3 * 4096, 4096, dtype=torch.bfloat16)
        huge = call._replace(weights=[large, large], bidirectional=False, has_biases=False)
        assert "no forward kernel of this size" in layer.decide(huge, is_training=True).reason
    assert not layer.decide(call._replace(lengths=torch.ones(5)), is_training=False).is_ours


@pytest.mark.parametrize(
    ("capability", "shared", "expected"),
    [
        ((7, 5), 65_536, layer.NO_DEVICE),
        ((8, 0), 166_912, Device(100, 166_912, 0)),
        ((8, 9), 101_376, Device(100, 101_376, 0)),
        ((9, 0), 232_448, Device(100, 232_448, 16)),
        ((10, 0), 232_448, Device(100, 232_448, 16)),
        ((12, 0), 101_376, Device(100, 101_376, 8)),
    ],
)
def test_what_plans_know_of_a_device(monkeypatch, capability, shared, expected):
    major, minor = capability
    properties = SimpleNamespace(
        major=major, minor=minor, multi_processor_count=100, shared_memory_per_block_optin=shared
    )
    monkeypatch.setattr(layer, "_devices", {})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert layer.device_of(0) == expected


@pytest.mark.usefixtures("gpu")
def test_an_older_device_is_told_apart(monkeypatch):
    monkeypatch.setattr(layer, "device_of", lambda index: layer.NO_DEVICE)
    decision = layer.decide(emulation.draw("gru", 16, math="bf16"), is_training=False)
    assert "sm_80 or later" in decision.reason


@pytest.mark.usefixtures("gpu")
def test_one_step_runs_cudnn(monkeypatch):
    row = {**ROW, "form": "bidirectional", "hidden": 16, "batch": 5, "ratio": 2.0}
    monkeypatch.setattr(choice, "_measured", lambda: {"a stand-in": [row]})
    call = emulation.draw("gru", 16, math="bf16")
    assert layer.decide(call, is_training=False).is_ours
    decision = layer.decide(call._replace(input=call.input[:1]), is_training=False)
    assert not decision.is_ours
    assert "one step" in decision.reason


@pytest.mark.skipif(
    not hasattr(torch.backends.cudnn.rnn, "fp32_precision"), reason="torch 2.10 has one switch"
)
def test_tf32_follows_torchs_switch_for_recurrent_layers():
    assert layer.math_of(torch.bfloat16) == "bf16"
    assert layer.math_of(torch.float16) == "fp16"
    assert layer.math_of(torch.float64) is None
    before = torch.backends.cudnn.rnn.fp32_precision
    try:
        torch.backends.cudnn.rnn.fp32_precision = "ieee"
        assert layer.math_of(torch.float32) == "fp32"
        torch.backends.cudnn.rnn.fp32_precision = "tf32"
        assert layer.math_of(torch.float32) == "tf32"
    finally:
        torch.backends.cudnn.rnn.fp32_precision = before


@pytest.mark.parametrize("outside", ["none", "tf32", "ieee"])
def test_products_have_the_walks_precision_and_leave_torchs_switch(outside):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = outside
    try:
        for math, wanted in (("tf32", "tf32"), ("fp32", "ieee"), ("bf16", outside)):
            with sequence.products_in(math, torch.zeros(1)):
                assert matmul.fp32_precision == wanted
            assert matmul.fp32_precision == outside
    finally:
        matmul.fp32_precision = before


def last_line(*arguments, **named):
    """What `explain` says of the backend that runs the call."""
    assert cuda.explain is ostinato.explain
    return ostinato.explain(*arguments, **named).splitlines()[-1]


def test_explain_says_who_runs_a_call_and_why_nobody_before():
    gru, x = nn.GRU(3, 4), torch.zeros(5, 2, 3)
    assert ostinato.explain(gru, x) == "fast path: runs it"
    assert last_line(gru, x, torch.zeros(1, 2, 4)) == "fast path: runs it"
    wide = nn.GRU(3, 4, dtype=torch.complex64), torch.zeros(5, 2, 3, dtype=torch.complex64)
    assert last_line(*wide) == "reference: runs it"
    assert "GPU engine: the tensors are not on a GPU" in ostinato.explain(*wide)
    resets = torch.zeros(5, 2, dtype=torch.bool)
    assert ostinato.explain(gru, x, resets=resets) == "fast path: runs it"
    strided = nn.GRU(3, 4)
    strided.weight_hh_l0 = torch.nn.Parameter(torch.zeros(4, 12).t())
    assert ostinato.explain(strided, x).startswith("fast path: a weight is not dense")
    assert last_line(strided, x, resets=resets) == "CPU engine: runs it"
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        ostinato.explain(gru, x, torch.zeros(1, 3, 4))
    seen = []
    torch.func.vmap(lambda x: (seen.append(last_line(gru, x)), x)[1])(torch.zeros(2, 5, 2, 3))
    assert seen == ["CPU engine under transforms: runs it"]
    # One step, and resets: a step with other states.
    assert last_line(gru, x[:1], resets=resets[:1]) == "fast path: runs it"
    cell, seen = nn.GRUCell(3, 4), []

    def watched(x):
        seen.append(last_line(cell, x))
        return cell(x).sum()

    once = torch.func.grad(watched)
    once(x[0])
    torch.func.grad(lambda x: once(x).sum())(x[0])
    assert ["torch's operator" in line for line in seen] == [True, False]
    assert "reference for one step" in seen[1]
    for module in (nn.RNN(3, 4, 2), nn.LSTM(3, 4, 2)):
        assert ostinato.explain(module, x) == "fast path: runs it"


@pytest.mark.usefixtures("gpu")
def test_explain_names_kernels():
    def on_gpu(module, x):
        call = module.call_of(x, None, None, None)
        assert call.input.device.type == "cpu"
        return route.explain(call._replace(input=OnGpu(call.input)))

    gru, x = nn.GRU(32, 64, 2).bfloat16(), torch.zeros(5, 2, 32, dtype=torch.bfloat16)
    text = on_gpu(gru, x)
    assert text.splitlines()[-1].startswith("cuDNN: runs it (nothing was measured on a stand-in;")
    assert "GPU engine: nothing was measured" in on_gpu(nn.GRU(32, 64).bfloat16(), x)
    with choice.forced(True):
        text = on_gpu(gru, x)
        assert "ostinato_forward in bf16" in text
        assert "ostinato_backward in bf16" in text
        with torch.no_grad():
            assert "ostinato_backward" not in on_gpu(gru, x)
    assert "GPU engine: one step reads" in on_gpu(nn.GRUCell(32, 64).bfloat16(), x[0])


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ((torch.nn.GRU(3, 4), torch.zeros(5, 2, 3)), "torch.nn.modules.rnn.GRU"),
        ((torch.nn.Linear(3, 4), torch.zeros(5, 3)), "torch.nn.modules.linear.Linear"),
        ((torch.zeros(5, 2, 3), nn.GRU(3, 4)), "torch.Tensor"),
    ],
    ids=["torch's layer", "no layer", "swapped"],
)
def test_explain_takes_our_modules_alone(arguments, got):
    match = f"explain: layer must be a layer or a cell of ostinato.nn.*got {got}"
    with pytest.raises(TypeError, match=match):
        ostinato.explain(*arguments)


BAD_INPUTS = {
    "another size": torch.zeros(5, 2, 7),
    "another size of one row": torch.zeros(2, 7),
    "four dimensions": torch.zeros(1, 5, 2, 3),
    "no dimension": torch.zeros(()),
    "another dtype": torch.zeros(5, 2, 3, dtype=torch.float64),
    "an array": np.zeros((5, 2, 3)),
    "a list": [1.0],
    "a layer": nn.GRU(3, 4),
    "packed of another size": pack([torch.zeros(2, 7)]),
    "packed of another dtype": pack([torch.zeros(2, 3, dtype=torch.float64)]),
    "another device": torch.zeros(5, 3, device="meta"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("name", MODULES)
def test_explain_refuses_an_input_as_forward_does(name, case):
    module, x = getattr(nn, name)(3, 4), BAD_INPUTS[case]
    with pytest.raises((TypeError, ValueError, RuntimeError)) as expected:
        module(x)
    with pytest.raises(type(expected.value)) as found:
        ostinato.explain(module, x)
    assert str(found.value) == str(expected.value)


def test_explain_refuses_cuts_and_weights_as_forward_does():
    gru, x = nn.GRU(3, 4, 2, batch_first=True), torch.zeros(2, 5, 3)
    assert ostinato.explain(gru, x, lengths=[5, 2]) == "fast path: runs it"
    for cuts in ({"lengths": [6, 2]}, {"lengths": [1]}, {"resets": torch.zeros(5, 2).bool()}):
        with pytest.raises((ValueError, RuntimeError)) as expected:
            gru(x, **cuts)
        with pytest.raises(type(expected.value)) as found:
            ostinato.explain(gru, x, **cuts)
        assert str(found.value) == str(expected.value)
    with pytest.raises(TypeError, match="GRUCell: lengths must be None for a cell, got list"):
        ostinato.explain(nn.GRUCell(3, 4), x[0], lengths=[1])
    gru.weight_hh_l1 = torch.nn.Parameter(torch.zeros(12, 5))
    with pytest.raises(RuntimeError, match="GRU: weight_hh_l1 must have shape"):
        ostinato.explain(gru, x)


def test_explain_takes_every_form_of_input_that_forward_takes():
    layer = nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True)
    for x in (torch.zeros(5, 3), torch.zeros(2, 5, 3), pack([torch.zeros(n, 3) for n in (2, 1)])):
        assert last_line(layer, x) == "fast path: runs it"
    assert last_line(nn.LSTMCell(3, 4), torch.zeros(3)) == "fast path: runs it"
    with torch.autocast("cpu", torch.bfloat16):
        assert last_line(layer, torch.zeros(5, 3).bfloat16()) == "fast path: runs it"
