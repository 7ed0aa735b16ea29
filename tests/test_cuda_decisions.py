"""Who is asked before a call runs on a GPU, and when: what is known, a trial, or neither."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.fx.experimental.symbolic_shapes  # which a compiler has loaded
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import ostinato
from ostinato import cudnn, nn, route
from ostinato.cuda import choice, launch, layer, trial
from ostinato.cuda.plan import H200
from support.devices import OnGpu
from support.trials import SLOWER, Recorded, forget, gru, without_answers


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A user without answers, in a process without any."""
    return without_answers(tmp_path, monkeypatch)


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
