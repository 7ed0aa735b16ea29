"""Trials of ours beside torch's, on a device whose times are given."""

import logging
import threading

import pytest
import torch
import torch.fx.experimental.symbolic_shapes  # which a compiler has loaded

from ostinato import nn, route
from ostinato.call import Results
from ostinato.cuda import compiler, kept, layer, trial
from support.cells import TORCH_CELLS
from support.samples import call_of, draw
from support.trials import FASTER, SLOWER, Recorded, forget, gru, tried, without_answers


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A user without answers, in a process without any."""
    return without_answers(tmp_path, monkeypatch)


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
