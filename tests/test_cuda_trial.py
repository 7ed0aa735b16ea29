"""Trials of ours beside torch's, on a device whose times are given, and how answers are kept."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.fx.experimental.symbolic_shapes  # which a compiler has loaded
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import ostinato
from ostinato import cudnn, nn, route
from ostinato.call import Results
from ostinato.cuda import choice, compiler, kept, launch, layer, trial
from ostinato.cuda.plan import H200
from support.cells import TORCH_CELLS
from support.devices import OnGpu
from support.samples import call_of, draw
from support.trials import FASTER, SLOWER, Recorded, gru, place_of

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A user without answers, in a process without any."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept._TRIALS, "has_told", False)
    forget(monkeypatch)
    return tmp_path / "cache/ostinato/trials"


def forget(monkeypatch):
    """Begin a process."""
    monkeypatch.setattr(kept, "_known", {})
    monkeypatch.setattr(kept, "_absent", set())


def tried(device, call=None, **place):
    call = gru() if call is None else call
    return trial.run(call, place_of(call, **place), device)


# ---- who is faster ----


@pytest.mark.parametrize(
    ("times", "queued", "is_ours", "says"),
    [
        (FASTER, None, True, "2.00 times as fast"),
        (SLOWER, None, False, "0.50 times as fast"),
        ((1.02e-3, 1e-3), None, False, "1.02 times"),
        ((1.05e-3, 1e-3), None, True, "1.05 times"),
        # Whoever launches less is faster as calls, and a graph has no launches.
        (FASTER, (0.9e-3, 1e-3), False, "0.90 times"),
        (SLOWER, FASTER, False, "0.50 times"),
        ((50e-3, 20e-3), (1.0, 9.0), True, "2.50 times"),
    ],
)
def test_the_faster_one_is_chosen(times, queued, is_ours, says):
    device = Recorded(times, queued)
    found = tried(device)
    assert found.is_ours is is_ours
    assert f"tried on this device: {says}" in found.reason
    runs = device.runs
    assert tried(device) == found
    assert device.runs == runs


def test_samples_take_turns_and_some_tens_of_milliseconds():
    for times in ((1e-5, 1e-5), (1e-3, 2e-3), (1e-2, 2e-2), (0.5, 1.0)):
        device = Recorded(times)
        trial._ratio(device, [lambda: None, lambda: None])
        spent = sum(times[who] * (calls + 1) for who, calls, _ in device.samples)
        assert spent < max(0.1, 8 * sum(times) * 2)
        for calls in (calls for _, calls, _ in device.samples):
            assert 1 <= calls <= 20
        # Long calls hide their launches.
        assert any(queued for _, _, queued in device.samples) == (max(times) < 5e-3)
        kinds = [queued for _, _, queued in device.samples]
        assert kinds.count(False) >= 2 * 3


KINDS = {
    "padded": {},
    "states": {"states": "hc"},
    "packed": {"lengths": (5, 3, 1)},
    "bidirectional": {"bidirectional": True},
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_every_kind_of_layer_is_tried(cell, kind, is_training):
    sample = draw(cell, 5, 3, 6, 8, dtype=torch.bfloat16, **KINDS[kind])
    call = call_of(sample.training() if is_training else sample)
    found = tried(Recorded(), call, is_training=is_training)
    assert found == kept.Kept(True, "tried on this device: 2.00 times as fast as torch.nn")


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_a_stack_is_tried_as_a_whole(name, is_training):
    module = getattr(nn, name)(6, 8, 3, bidirectional=True, dropout=0.5).bfloat16()
    module.requires_grad_(is_training)
    call = module.call_of(torch.zeros(5, 3, 6, dtype=torch.bfloat16), None, None, None)
    assert call.layers == 3
    device = Recorded()
    assert tried(device, call, is_training=is_training).is_ours
    assert device.runs % 3 == 0


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("cut", ["lengths", "resets", "all_states"])
def test_what_cudnn_lacks_is_compared_alone(cut, is_training):
    call = call_of(draw("lstm", 5, 3, 6, 8, states="hc", dtype=torch.bfloat16))
    cuts = {
        "lengths": {"lengths": torch.tensor([5, 0, 2])},
        "resets": {"resets": torch.rand(5, 3) < 0.3},
        "all_states": {"all_states": True},
    }
    call = call._replace(**cuts[cut])
    if is_training:
        for tensor in call.tensors():
            if tensor is not None:
                tensor.requires_grad_()
    device = Recorded()
    found = tried(device, call, is_training=is_training)
    assert found.is_ours
    assert "right" in found.reason
    assert not device.samples


def test_long_sequences_and_large_batches_are_compared_in_part():
    call = trial._shortened(gru(steps=100, batch=4))
    assert call.input.shape == (32, 4, 6)
    call = trial._shortened(gru(steps=100, batch=2**15))
    assert call.input.shape == (4, 2**15, 6)
    packed = call_of(draw("gru", lengths=(50, 40, 2)))
    packed = trial._shortened(packed._replace(lengths=None))
    assert len(packed.batch_sizes) == 32
    assert len(packed.input) == 32 + 32 + 2
    cut = gru(steps=100)._replace(
        lengths=torch.tensor([100, 40, 32, 0]), resets=torch.zeros(100, 4, dtype=torch.bool)
    )
    cut = trial._shortened(cut)
    assert cut.lengths.tolist() == [32, 32, 32, 0]
    assert cut.resets.shape == (32, 4)


# ---- who is right ----


def more(by, after=0):
    """Spoil the output past some steps."""

    def spoil(call, found):
        output = found.output.clone()
        output[after:] += by
        return found._replace(output=output)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (more(0.1), "wrong: a result of ours errs by"),
        (more(float("nan")), "wrong: a result of ours errs by inf"),
        (more(0.1, after=40), "apart over all steps"),
        (lambda call, found: Results(found.output, (found.last[0] * 1.5,)), "wrong: a result"),
    ],
)
def test_a_kernel_that_is_wrong_is_refused_and_reported(spoil, says, caplog, monkeypatch):
    device = Recorded(spoil=spoil)
    found = tried(device, gru(steps=60))
    assert not found.is_ours
    assert says in found.reason
    assert not device.samples
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "please report" in record.getMessage()
    # The next process need not find it out again.
    forget(monkeypatch)
    assert tried(Recorded(), gru(steps=60)) == found


def test_a_gradient_that_is_wrong_is_refused():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.2

    def spoil(call, found):
        return found._replace(output=Doubled.apply(found.output))

    call = gru()
    call.input.requires_grad_()
    found = tried(Recorded(spoil=spoil), call, is_training=True)
    assert "wrong: a gradient of ours" in found.reason


def test_a_kernel_that_rounds_more_than_torch_s_is_not_chosen(caplog):
    def rounded(call, found):
        if found.output.dtype != torch.float32:
            return found
        return found._replace(output=found.output.half().float())

    found = tried(Recorded(spoil=rounded), gru(dtype=torch.float32), math="tf32")
    assert not found.is_ours
    assert found.reason.startswith("less exact")
    assert not caplog.records


class Tf32(Recorded):
    """Rounds what products read, as tensor cores do, and hands gradients on."""

    def ours(self, call):
        def rounded(tensor):
            return None if tensor is None else tensor + (tensor.half().float() - tensor).detach()

        if call.input.dtype == torch.float32:
            call = call.with_tensors([rounded(tensor) for tensor in call.tensors()])
        return super().ours(call)


def test_a_gradient_that_jumps_is_no_error_of_ours(monkeypatch):
    call = call_of(draw("rnn_relu", 30, 64, 6, 32, dtype=torch.float32).training())
    call = call._replace(resets=torch.rand(30, 64) < 0.1)
    options = {"math": "tf32", "is_training": True}
    assert tried(Tf32(), call, **options).is_ours
    # The reference, which has no TF32, is no measure of how far rounding goes.
    monkeypatch.setattr(trial._Draw, "moved", lambda draw, call, by: call)
    other = Tf32()
    other.identity = "of another stand-in"
    assert "wrong: a gradient" in tried(other, call, **options).reason


# ---- nothing of the user's is touched ----


def test_generators_modes_and_hooks_see_nothing():
    call = gru()
    call.weights[0].requires_grad_()

    def refuse(_):
        raise AssertionError("a trial is not the user's to save")

    before = torch.get_rng_state()
    with (
        torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
        torch.autocast("cpu", torch.float16),
        torch.inference_mode(),
        torch.device("meta"),
    ):
        device = Recorded()
        assert tried(device, call, is_training=True).is_ours
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(tensor is None or not tensor.any() for tensor in call.tensors())
    assert all(weight.grad is None for weight in call.weights)
    assert device.samples


def test_an_error_of_the_user_s_is_the_user_s():
    call = gru()
    with pytest.raises(RuntimeError, match="h_0"):
        tried(Recorded(), call._replace(initial=(torch.zeros(1, 9, 9),)))
    assert not kept._known
    assert tried(Recorded()).is_ours


def test_nobody_waits_for_a_trial_of_another_thread():
    seen = []

    class Busy(Recorded):
        def seconds(self, *given):
            if not seen:
                thread = threading.Thread(target=lambda: seen.append(tried(Recorded())))
                thread.start()
                thread.join(60)
            return super().seconds(*given)

    assert tried(Busy()).is_ours
    assert seen == [None]


def test_a_trial_does_not_ask_who_runs_a_layer(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a trial in a trial")

    monkeypatch.setattr(layer, "decide", refuse)
    monkeypatch.setattr(route, "run", refuse)
    assert tried(Recorded()).is_ours


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "no memory for a trial"),
        (compiler.CompileError("NVRTC cannot", "log"), "a trial failed"),
        (ValueError("a grid is too large"), "a trial failed"),
    ],
)
def test_a_trial_that_fails_means_torch_s_in_this_process(error, says, cache, caplog, monkeypatch):
    def fail(call, found):
        raise error

    device = Recorded(spoil=fail)
    assert not tried(device).is_ours
    assert not tried(device).is_ours
    (record,) = caplog.records
    assert says in record.getMessage()
    assert not cache.exists()
    forget(monkeypatch)
    assert tried(Recorded()).is_ours


def test_the_log_tells_of_a_trial(caplog):
    with caplog.at_level(logging.INFO, "ostinato"):
        tried(Recorded())
        tried(Recorded())
    (record,) = caplog.records
    assert record.getMessage() == (
        "ours runs from now on: gru in bf16, H 8, padded, about B 4, T 8, I 8, L 1, inference, on "
        "a stand-in: tried on this device: 2.00 times as fast as torch.nn"
    )


# ---- what is kept ----


def test_sizes_of_a_power_of_two_share_an_answer():
    device = Recorded()
    tried(device, gru(steps=65, batch=5))
    count = len(device.samples)
    tried(device, gru(steps=128, batch=8))
    assert len(device.samples) == count
    tried(device, gru(steps=129, batch=8))
    tried(device, gru(steps=128, batch=9))
    assert len(device.samples) == 3 * count


def test_a_later_process_reads_what_an_earlier_one_found(cache, monkeypatch):
    found = tried(Recorded(SLOWER))
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert cache.stat().st_mode & 0o777 == 0o700
    assert json.loads(file.read_bytes().partition(b"\n")[2])["is_ours"] is False
    forget(monkeypatch)
    device = Recorded(FASTER)
    assert trial.known(device, place_of(gru())) == found
    assert tried(device) == found
    assert not device.runs


def test_another_device_or_version_is_tried_again(cache):
    tried(Recorded(SLOWER))
    other = Recorded(FASTER)
    other.identity = "of another driver"
    assert tried(other).is_ours
    assert len(list(cache.iterdir())) == 2


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:-1], id="a byte short"),
        pytest.param(lambda content: content[: len(content) // 2], id="half"),
        pytest.param(lambda content: os.urandom(200), id="garbage"),
        pytest.param(lambda content: flip(content, 20), id="another key"),
        pytest.param(lambda content: flip(content, -30), id="another answer"),
    ],
)
def test_a_spoilt_file_is_replaced(cache, spoil, monkeypatch):
    tried(Recorded(SLOWER))
    (file,) = cache.iterdir()
    file.write_bytes(spoil(file.read_bytes()))
    forget(monkeypatch)
    assert tried(Recorded(FASTER)).is_ours
    assert list(cache.iterdir()) == [file]
    forget(monkeypatch)
    assert tried(Recorded(SLOWER)).is_ours


def test_a_file_that_others_may_write_is_not_believed(cache, monkeypatch):
    tried(Recorded(SLOWER))
    (file,) = cache.iterdir()
    file.chmod(0o622)
    forget(monkeypatch)
    assert tried(Recorded(FASTER)).is_ours
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_file_of_another_place_is_not_taken(cache, monkeypatch):
    tried(Recorded(SLOWER))
    (file,) = cache.iterdir()
    tried(Recorded(FASTER), gru(steps=50))
    (other,) = set(cache.iterdir()) - {file}
    other.write_bytes(file.read_bytes())
    forget(monkeypatch)
    assert tried(Recorded(FASTER), gru(steps=50)).is_ours


def a_file(base):
    base.write_text("no folder")


def read_only(base):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    base.mkdir(mode=0o500)


def full(base):
    base.symlink_to("/proc/self")


@pytest.mark.parametrize("make", [a_file, read_only, full])
def test_without_a_folder_to_write_each_process_tries(tmp_path, caplog, make, monkeypatch):
    make(tmp_path / "cache")
    device = Recorded()
    assert tried(device).is_ours
    count = len(device.samples)
    assert tried(device).is_ours
    assert len(device.samples) == count
    forget(monkeypatch)
    assert tried(device).is_ours
    assert len(device.samples) == 2 * count
    (record,) = caplog.records
    assert "tried in each process" in record.getMessage()


def test_a_full_disk_leaves_nothing_behind(cache, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    assert tried(Recorded()).is_ours
    assert "No space left" in caplog.text
    assert list(cache.iterdir()) == []


def test_a_file_system_without_links(cache, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert tried(Recorded(SLOWER)) == kept._read(cache, next(cache.iterdir()).stem)
    forget(monkeypatch)
    monkeypatch.setattr(kept, "of", lambda *_, **__: None)
    # As if it had been written while this process measured.
    assert not tried(Recorded(FASTER)).is_ours
    assert len(list(cache.iterdir())) == 1


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from support.trials import in_a_process
kind, theirs, ours = sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
if kind == "wait":
    print("ready", flush=True)
    sys.stdin.readline()
found, samples = in_a_process((theirs, ours), kill=kind == "kill")
print(int(found.is_ours), samples)
"""


def process(kind, times):
    command = [sys.executable, "-c", PROGRAM, str(TESTS), kind, *map(str, times)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def test_a_process_that_dies_before_it_writes_leaves_no_answer(cache):
    dead = process("kill", FASTER)
    dead.communicate()
    assert dead.returncode == -signal.SIGKILL
    assert not list(cache.glob("*.json"))
    output, _ = process("run", SLOWER).communicate()
    is_ours, samples = map(int, output.split())
    assert not is_ours
    assert samples
    output, _ = process("run", FASTER).communicate()
    assert output.split() == ["0", "0"]
    assert len(list(cache.glob("*.json"))) == 1


def test_processes_that_measure_at_once_agree(cache):
    running = [process("wait", times) for times in (FASTER, SLOWER, FASTER)]
    for each in running:
        assert each.stdout.readline() == "ready\n"
    for each in running:
        each.stdin.write("go\n")
        each.stdin.flush()
    outputs = [each.communicate()[0].split() for each in running]
    assert [each.returncode for each in running] == [0, 0, 0]
    assert len({is_ours for is_ours, _ in outputs}) == 1
    assert len(list(cache.iterdir())) == 1


def test_who_measures_later_takes_what_was_written(monkeypatch):
    class Slow(Recorded):
        """Another process is sooner."""

        def seconds(self, *given):
            if not self.samples:
                known, absent = kept._known, kept._absent
                forget(monkeypatch)
                kept.keep(self.identity, place_of(gru()), kept.Kept(False, "by another"))
                monkeypatch.setattr(kept, "_known", known)
                monkeypatch.setattr(kept, "_absent", absent)
            return super().seconds(*given)

    assert tried(Slow(FASTER)) == kept.Kept(False, "by another")
    assert trial.known(Recorded(), place_of(gru())).reason == "by another"


def test_all_that_an_answer_depends_on_is_in_the_identity(monkeypatch):
    class Properties:
        major, minor, multi_processor_count = 9, 0, 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"device {index}")
    monkeypatch.setattr(trial, "_driver_release", lambda: ("580.1", 13000))
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    sources = compiler.sources(compiler.text_folder())
    monkeypatch.setattr(compiler, "sources", lambda folder: sources)
    seen = [trial.Gpu(0).identity]
    assert trial.Gpu(0).identity == seen[0]

    def change(target, name, value):
        monkeypatch.setattr(target, name, value)
        seen.append(trial.Gpu(0).identity)

    seen.append(trial.Gpu(1).identity)
    change(Properties, "multi_processor_count", 66)
    change(Properties, "minor", 1)
    change(trial, "_driver_release", lambda: ("580.2", 13000))
    change(compiler, "nvrtc_version", lambda: (13, 1))
    change(compiler, "sources", lambda folder: {**sources, "cells.h": "edited"})
    change(torch, "__version__", "99.0")
    change(torch.backends.cudnn, "version", lambda: 99000)
    change(trial, "__version__", "99.0")
    assert len(set(seen)) == len(seen)


class Event:
    """A CUDA event of a device that needs a second between two of them."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.log.append("event")

    def synchronize(self):
        Event.log.append("wait")

    def elapsed_time(self, end):
        return 1000.0


def test_a_sample_is_taken_between_events(monkeypatch):
    Event.log = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: Event.log.append("sleep"))
    gpu, run = trial.Gpu(0), lambda: Event.log.append("run")
    assert gpu.seconds(run, 2, False) == 0.5
    assert Event.log == ["run", "event", "run", "run", "event", "wait"]
    Event.log = []
    gpu.seconds(run, 1, True)
    assert Event.log == ["run", "sleep", "event", "run", "event", "wait"]


# ---- who may be asked, and when ----


@pytest.fixture
def gpu(monkeypatch):
    """Let CPU tensors be decided as CUDA tensors of a device that nobody measured."""
    device = Recorded()
    monkeypatch.setattr(launch, "available", lambda: True)
    monkeypatch.setattr(layer, "device_of", lambda index: H200)
    monkeypatch.setattr(layer, "device_of_trials", lambda index: device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a stand-in")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return device


def decided(call, is_training=False):
    return layer.decide(call, is_training=is_training)


def test_the_first_call_tries_and_later_ones_know(gpu):
    first = decided(gru())
    assert first.is_ours
    count = len(gpu.samples)
    assert count
    assert decided(gru()) == first
    assert len(gpu.samples) == count
    gpu.times = {False: SLOWER, True: SLOWER}
    assert decided(gru()) == first
    assert not decided(gru(steps=100)).is_ours


ROW = {"cell": "gru", "math": "bf16", "form": "padded", "is_training": False, "ratio": 2.0}


def test_what_ships_is_not_tried(gpu, monkeypatch):
    rows = [{**ROW, "hidden": 8, "batch": 1}, {**ROW, "hidden": 8, "batch": 16, "ratio": 0.5}]
    monkeypatch.setattr(choice, "_measured", lambda: {"a stand-in": rows})
    assert "measured 0.50 times" in decided(gru()).reason
    assert not gpu.runs
    # Past the last measured size a trial knows better.
    assert decided(gru(batch=20)).is_ours
    assert gpu.samples
    with choice.forced(False):
        assert not decided(gru(batch=20)).is_ours


def test_what_cudnn_lacks_runs_ours_untried_where_any_kernel_was_measured(gpu, monkeypatch):
    call = gru()._replace(lengths=torch.tensor([5, 4, 3, 2]))
    monkeypatch.setattr(
        choice, "_measured", lambda: {"a stand-in": [{**ROW, "hidden": 8, "batch": 1}]}
    )
    assert decided(call).is_ours
    assert not gpu.runs
    monkeypatch.setattr(choice, "_measured", dict)
    found = decided(call)
    assert found.is_ours
    assert "right" in found.reason
    assert gpu.runs


def test_one_step_is_not_tried(gpu):
    assert "one step" in decided(gru(steps=1)).reason
    assert not gpu.runs


def test_no_trial_while_a_graph_is_captured(gpu):
    gpu.is_captured = True
    assert "graph is captured" in decided(gru()).reason
    assert not gpu.runs
    gpu.is_captured = False
    assert decided(gru()).is_ours
    gpu.is_captured = True
    # What is known counts.
    assert decided(gru()).is_ours


def test_a_compiled_graph_takes_what_is_known(gpu, monkeypatch):
    def compiled():
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            return decided(gru())

    assert "nothing was measured" in compiled().reason
    assert not gpu.runs
    decided(gru(steps=100))
    decided(gru(batch=200))
    assert compiled() == layer.Decision(True, "chosen by 2 of 2 trials on this device")
    gpu.times = {False: SLOWER, True: SLOWER}
    decided(gru(steps=1000))
    assert not compiled().is_ours
    # A later process reads all.
    forget(monkeypatch)
    assert compiled().reason == "chosen by 2 of 3 trials on this device"


def test_a_compiler_meets_no_trial(gpu):
    seen = []

    @torch.compile(backend="eager", fullgraph=True)
    def asked(x, *weights):
        call = gru()._replace(input=x, weights=list(weights))
        return x + layer.decide(call, is_training=False).is_ours

    call = gru()
    x = asked(call.input, *call.weights)
    assert not x.any()
    assert not gpu.runs
    assert not seen


def test_no_trial_where_somebody_looks_on(gpu):
    with FlopCounterMode(display=False):
        assert "mode" in decided(gru()).reason
    with FakeTensorMode() as mode:
        call = gru()
    assert "class of tensors" in decided(call).reason
    del mode
    with torch.backends.cudnn.flags(enabled=False):
        assert "without cuDNN" in decided(gru()).reason
    assert not gpu.runs


def test_no_trial_on_autograd_s_threads(gpu):
    seen = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(decided(gru()))
            return grad

    Asks.apply(torch.ones(1, requires_grad=True)).backward()
    assert "during backward" in seen[0].reason
    assert not gpu.runs


def test_a_checkpoint_saves_the_same_with_a_trial_and_without(gpu):
    x = torch.ones(3, requires_grad=True)

    def function(x):
        factor = 2 if decided(gru()).is_ours else 3
        return (x.sin() * factor).cos()

    torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False).sum().backward()
    expected = torch.autograd.grad((x.sin() * 2).cos().sum(), x)
    torch.testing.assert_close((x.grad,), expected)
    assert gpu.samples


def test_trials_are_switched_off(gpu):
    with ostinato.cuda.trials(False):
        assert "ostinato.cuda.trials" in decided(gru()).reason
        with ostinato.cuda.trials(True):
            assert decided(gru()).is_ours
        count = gpu.runs
        # Nor does what a trial found count.
        assert not decided(gru()).is_ours
        assert gpu.runs == count
    assert decided(gru()).is_ours
    off = ostinato.cuda.trials(False)
    assert not decided(gru()).is_ours
    off.__exit__()
    assert decided(gru()).is_ours


def explained(module, x):
    call = module.call_of(x, None, None, None)
    return route.explain(call._replace(input=OnGpu(call.input)))


def test_explain_says_what_is_known_and_tries_nothing(gpu):
    one, stack = (nn.GRU(3, 8, layers).bfloat16().requires_grad_(False) for layers in (1, 2))
    x = torch.zeros(5, 4, 3, dtype=torch.bfloat16)
    says = "nothing was measured on a stand-in; a trial at the first call will say"
    assert f"GPU engine: {says}" in explained(one, x)
    assert explained(one, x).endswith("cuDNN: runs it")
    assert explained(stack, x).endswith(f"cuDNN: runs it ({says})")
    assert not gpu.runs
    for module in (one, stack):
        decided(module.call_of(x, None, None, None))
    says = "(tried on this device: 2.00 times as fast as torch.nn)"
    assert explained(one, x).splitlines()[-1].endswith(says)
    assert explained(stack, x).splitlines()[-1].endswith(says)
    assert "a trial at the first call will say" not in explained(stack, x)
    gpu.times = {False: SLOWER, True: SLOWER}
    decided(one.call_of(x.repeat(20, 1, 1), None, None, None))
    assert "GPU engine: tried on this device: 0.50 times" in explained(one, x.repeat(20, 1, 1))


@pytest.mark.parametrize(("size", "hidden"), [(6, 8), (40, 16)])
def test_a_stack_goes_to_whom_the_trial_chose(gpu, size, hidden):
    stack = nn.GRU(size, hidden, 2).bfloat16().requires_grad_(False)
    call = stack.call_of(torch.zeros(5, 4, size, dtype=torch.bfloat16), None, None, None)
    on_gpu = call._replace(input=OnGpu(call.input))
    assert cudnn.why_not(on_gpu) is None
    assert decided(call).is_ours
    assert cudnn.why_not(on_gpu) == "our kernels run its layers"
    # Each layer hears so, whatever its own input is.
    runs = gpu.runs
    for k, width in enumerate((size, hidden)):
        own = call.of_layer(k, torch.zeros(5, 4, width, dtype=torch.bfloat16))
        assert decided(own).is_ours
    assert gpu.runs == runs


@pytest.mark.parametrize("cuts", [{"lengths": [5, 2, 1, 1]}, {"memory": "recompute"}])
def test_layers_that_cudnn_would_not_run_as_a_stack_are_tried_one_by_one(gpu, cuts):
    memory = {"memory": cuts["memory"]} if "memory" in cuts else {}
    stack = nn.GRU(6, 8, 2, **memory).bfloat16().requires_grad_(False)
    x = torch.zeros(5, 4, 6, dtype=torch.bfloat16)
    call = stack.call_of(x, None, cuts.get("lengths"), None)
    for k, width in enumerate((6, 8)):
        own = call.of_layer(k, torch.zeros(5, 4, width, dtype=torch.bfloat16))
        decision = decided(own)
        assert decision.is_ours
        assert decision.place is None
    assert gpu.runs


def test_an_answer_is_of_what_ran_alone(gpu):
    call = gru()
    lengths = torch.tensor([5, 4, 2, 1])
    resets = torch.zeros(5, 4, dtype=torch.bool)
    seen = []
    for changed in (
        {},
        {"lengths": lengths},
        {"resets": resets},
        {"lengths": lengths, "resets": resets},
        {"all_states": True},
    ):
        runs = gpu.runs
        decided(call._replace(**changed))
        seen.append(gpu.runs > runs)
    assert all(seen)


def test_in_training_every_gradient_is_compared(gpu):
    call = gru()
    call = call.with_tensors([None if t is None else t.clone() for t in call.tensors()])
    call.input.requires_grad_()  # the weights are frozen
    asked = []

    def spoil(tried, found):
        asked.append([weight.requires_grad for weight in tried.weights])
        return found

    gpu.spoil = spoil
    assert decided(call, is_training=True).is_ours
    assert all(all(flags) for flags in asked)


def test_no_error_of_a_trial_reaches_the_call_unless_the_device_is_broken(gpu, caplog):
    def spoil(call, found):
        raise TypeError("of a kind that nobody thought of")

    gpu.spoil = spoil
    assert not decided(gru()).is_ours
    assert "a trial failed" in caplog.text
    gpu.lives = False
    with pytest.raises(RuntimeError, match="a trial of our kernels broke it: of a kind"):
        decided(gru(batch=40))


def test_the_driver_is_named(monkeypatch):
    driver = SimpleNamespace(
        cuDriverGetVersion=lambda: ("ok", 13010), CUresult=SimpleNamespace(CUDA_SUCCESS="ok")
    )
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    launch.driver_version.cache_clear()
    release, version = trial._driver_release()
    launch.driver_version.cache_clear()
    assert isinstance(release, str)
    assert version == (13, 1)


def test_wide_tiles_are_tried_even_where_rows_were_measured(gpu, monkeypatch):
    row = {"cell": "gru", "math": "bf16", "form": "padded", "is_training": False}
    rows = [{**row, "hidden": 8, "batch": batch, "ratio": 2.0} for batch in (1, 400)]
    monkeypatch.setattr(choice, "_measured", lambda: {"a stand-in": rows})
    assert decided(gru()).reason.startswith("measured")
    wide = layer.plan("gru", "bf16", 8, 4, 1, False, H200)._replace(group_rows=16)
    monkeypatch.setattr(layer, "plan", lambda *asked: wide)
    assert decided(gru()).reason.startswith("tried on this device")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_a_trial_on_a_gpu(name, dtype, is_training, cache, monkeypatch, caplog):
    monkeypatch.setattr(choice, "_measured", dict)
    options = {"device": "cuda", "dtype": dtype}
    module = getattr(nn, name)(64, 256, **options).requires_grad_(is_training)
    x = torch.randn(100, 16, 64, **options)
    says = "a trial at the first call will say"
    assert (says in ostinato.explain(module, x)) is launch.available()
    state, bytes_before = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    with caplog.at_level(logging.INFO, "ostinato"):
        output, _ = module(x)
    print(caplog.text)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert len(list(cache.glob("*.json"))) == launch.available()
    assert "please report" not in caplog.text
    assert "failed" not in caplog.text
    assert says not in ostinato.explain(module, x)
    assert torch.equal(module(x)[0], output)
    if not is_training:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured, _ = module(x)
        graph.replay()
        assert torch.equal(captured, output)
        del graph, captured
    del output
    assert torch.cuda.memory_allocated() - bytes_before < 2**27
