"""The fast path on a GPU: CPU tensors stand for CUDA tensors, host fibers for the device."""

import contextlib
import pathlib
import sys

import pytest
import torch

from ostinato import cpu, cuda, fast_path, nn, plain, steps
from ostinato.call import Call
from ostinato.cuda import choice, fast, layer, sequence, trial
from support import stand_in
from support.plain_calls import BATCH, FORMS, HIDDEN, SIZE, STEPS, drawn, numbers

sys.path.append(str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import host

pytestmark = pytest.mark.skipif(
    not plain.IS_OPEN, reason="this torch has no table of C functions for its tensors"
)


@pytest.fixture
def gpu():
    with stand_in.emulated() as driver:
        yield driver


@pytest.fixture
def silent():
    """A GPU that runs nothing."""
    with stand_in.recording() as asked:
        yield asked


def assert_alike(found, expected, bound):
    for mine, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().clamp_min(0.1)
        assert ((mine - theirs).abs().max() / scale).item() < bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_its_numbers_are_those_of_the_cpu_engine(name, directions, form):
    call = drawn(name, form, bidirectional=directions == 2)
    expected = numbers(*call)
    with stand_in.emulated() as driver:
        found = numbers(*call)
    # Forward, backward and, where rows are cut, what gathers the states before each step.
    is_plain = form in ("padded", "batch_first", "states")
    assert driver.asked["launch"] == (2 if is_plain else 3)
    assert_alike(found, expected, 0.02)


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bias": False}])
def test_stacks_and_layers_without_biases(gpu, options):
    call = drawn("GRU", "states", torch.float32, **options)
    found = numbers(*call)
    assert gpu.asked["launch"] == 2 * options.get("num_layers", 1)
    with choice.forced(False):
        expected = numbers(*call)
    assert_alike(found, expected, 5e-3)


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0", "bias_ih_l0"])
def test_a_frozen_weight(gpu, frozen):
    module, x, given, cuts = drawn("GRU", "packed")
    everything = numbers(module, x, given, cuts)
    getattr(module, frozen).requires_grad_(False)
    output, _ = module(*given)
    leaves = [p for p in module.parameters() if p.requires_grad]
    torch.autograd.grad(output.data.float().sum(), leaves, retain_graph=True)
    getattr(module, frozen).requires_grad_(True)
    assert all(map(torch.equal, numbers(module, x, given, cuts), everything))


def test_gradients_are_differentiated_again_and_many_at_once(gpu):
    module, x, given, _ = drawn("GRU", "padded", torch.float32)
    output, _ = module(*given)
    assert gpu.asked["launch"] == 1
    (dx,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(dx.square().sum(), x)
    seeds = torch.randn(3, *output.shape)
    (many,) = torch.autograd.grad(module(*given)[0], x, seeds, is_grads_batched=True)
    with choice.forced(False):
        output, _ = module(*given)
        (dx,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(dx.square().sum(), x)
        (rows,) = torch.autograd.grad(module(*given)[0], x, seeds, is_grads_batched=True)
    assert_alike([found, many], [expected, rows], 5e-3)


def test_a_region_of_autocast_around_backward_changes_no_bit(gpu):
    module, x, given, _ = drawn("LSTM", "padded", torch.float32)
    leaves = [x, *module.parameters()]

    def grads(region):
        output, _ = module(*given)
        with region:
            return torch.autograd.grad(output.sum(), leaves)

    plain_grads = grads(contextlib.nullcontext())
    assert all(map(torch.equal, grads(torch.autocast("cpu", torch.bfloat16)), plain_grads))
    assert gpu.asked["launch"] == 4


def test_a_profile_shows_a_call_and_its_gradient_once(gpu):
    module, _, given, _ = drawn("GRU", "padded")
    with torch.profiler.profile() as profile:
        output, _ = module(*given)
        output.float().sum().backward()
    names = [event.name for event in profile.events()]
    assert names.count("ostinato::gru_forward") == names.count("ostinato::gru_backward") == 1


# ---- what it declines ----


def strided(module):
    module.weight_hh_l0 = torch.nn.Parameter(module.weight_hh_l0.data.t().contiguous().t())


def shifted(tensor):
    """The same numbers, beside the place where a pair of them may lie."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    "case", ["strided", "float64", "projected", "recompute", "shifted", "many"]
)
def test_what_it_declines_runs_elsewhere(silent, case):
    options = {"proj_size": 4} if case == "projected" else {}
    options |= {"memory": "recompute"} if case == "recompute" else {}
    dtype = torch.float64 if case == "float64" else torch.float32
    name = "LSTM" if case == "projected" else "GRU"
    module, _, given, _ = drawn(name, "padded", dtype, **options)
    if case == "strided":
        strided(module)
    if case == "shifted":
        given.append(shifted(torch.zeros(1, BATCH, HIDDEN)))
    if case == "many":
        module = nn.GRU(SIZE, 4096).to(dtype)
    output, _ = module(*given)
    assert silent["launch"] == 0
    assert output.isfinite().all()


def test_inference_that_could_recompute_is_served(silent):
    module, _, given, _ = drawn("GRU", "padded", memory="recompute")
    with torch.no_grad():
        module(*given)
    assert silent["launch"] == 1


def test_a_cell_goes_to_torch_s_own(monkeypatch):
    cell = nn.GRUCell(3, 4)
    call = Call(torch.zeros(2, 3), None, 0, (None,), list(cell.parameters()), "gru", True, False)
    assert not steps._is_torch_s(call)
    with monkeypatch.context() as patch:
        patch.setattr(steps, "is_on_gpu", lambda input: True)
        assert steps._is_torch_s(call)
        mapped = torch.func.vmap(lambda _: torch.tensor(steps._is_torch_s(call)))
        assert mapped(torch.zeros(2)).tolist() == [False, False]
        # What it is given is checked before, in our words.
        with pytest.raises(ValueError, match="GRUCell input dtype"):
            cell(torch.zeros(2, 3, dtype=torch.float64))
    # Its numbers are torch.nn's.
    monkeypatch.setattr(steps, "_is_torch_s", lambda call: True)
    monkeypatch.setattr(cpu, "IS_OPEN", False)
    monkeypatch.setattr(steps, "is_on_gpu", lambda input: True)
    theirs = torch.nn.GRUCell(3, 4)
    theirs.load_state_dict(cell.state_dict())
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    for states in ((), (h,)):
        assert torch.equal(cell(x, *states), theirs(x, *states))


# ---- what is kept ----


def test_who_runs_a_call_is_asked_once(silent, monkeypatch):
    module, _, given, _ = drawn("GRU", "padded")
    asked, decide = [], layer.decide

    def counted(call, **options):
        asked.append(call)
        return decide(call, **options)

    monkeypatch.setattr(layer, "decide", counted)
    for _ in range(3):
        module(*given)
    assert len(asked) == 1
    with torch.no_grad():
        module(*given)
    assert len(asked) == 2
    monkeypatch.setattr(fast, "_MOST_WAYS", 1)
    launched = silent["launch"]
    with choice.forced(False):
        module(*given)
        assert silent["launch"] == launched
    module(*given)
    assert silent["launch"] == launched + 1


def test_what_may_change_is_asked_again_and_layers_are_asked_as_a_stack(silent, monkeypatch):
    decisions = [(False, "a place"), (True, "a place"), (True, None)]
    asked = []

    def decide(call, *, is_training):
        asked.append((call.layers, call.stack))
        is_ours, place = decisions[len(asked) - 1]
        return layer.Decision(is_ours, "", place)

    monkeypatch.setattr(layer, "decide", decide)
    module, x, _, _ = drawn("GRU", "padded")
    config = "gru", False, (SIZE, HIDDEN, 0, 1), True, False, 3
    tensors = None, x.detach(), None, None, *module.parameters()
    for is_served in (False, True, True, True):
        assert (fast.forward(config, False, tensors) is not None) == is_served
    assert asked == [(1, 3)] * 3
    assert silent["launch"] == 3


def test_switching_trials_off_lets_choices_be_asked_again():
    before = choice.version()
    with cuda.trials(False):
        assert choice.version() == before + 1
    assert choice.version() == before + 2


def test_a_trial_times_what_a_call_of_the_user_s_takes(silent, monkeypatch):
    monkeypatch.setattr(fast, "IS_OPEN", True)
    module, x, _, _ = drawn("GRU", "padded")
    call = module.call_of(x, None, None, None)
    with choice.forced(False):
        assert fast_path.layer(call) is None
        output = trial.past_dispatcher(call).output
    assert silent["launch"] == 1
    output.float().sum().backward()
    assert silent["launch"] == 2
    # Of the call that was asked about, not of the trial.
    assert list(fast._ways.values()) == [None]


def test_ragged_rows_are_copied_once(silent, monkeypatch):
    monkeypatch.setattr(sequence, "_ragged", {})
    copied, copy = [], sequence._copied
    monkeypatch.setattr(sequence, "_copied", lambda *given: (copied.append(given), copy(*given))[1])
    module, x, given, _ = drawn("LSTM", "packed", num_layers=2)
    numbers(module, x, given, {})
    assert len(copied) == 1
    # By the counts themselves, whoever wrote them.
    counts = given[0].batch_sizes
    counts.numpy()[:] = [4, 3, 3, 1, 1]
    module(*given)
    assert len(copied) == 2
    call = Call(x, counts, 4, (None,), [], "gru", True, False)
    found = sequence.rows_of(call, may_keep=True)
    assert found.offsets.tolist() == [0, 4, 7, 10, 11]
    assert found.lengths.tolist() == [5, 3, 3, 1]
    # Another stream does not wait for the first one's copies.
    monkeypatch.setattr(sequence, "stream_of", lambda index: 7)
    module(*given)
    assert len(copied) == 3
    for n in range(2 * sequence._MOST_RAGGED):
        module(x, lengths=[5, 1, 1 + n // 5 % 5, 1 + n % 5])
    assert len(sequence._ragged) <= sequence._MOST_RAGGED


def test_a_layer_of_an_odd_size_may_lie_anywhere(silent):
    module = nn.GRU(SIZE, 61)
    for name, weight in list(module.named_parameters()):
        module.register_parameter(name, torch.nn.Parameter(shifted(weight.data)))
    with torch.no_grad():
        module(torch.zeros(STEPS, BATCH, SIZE))
    assert silent["launch"] == 1


def test_modes_and_default_devices_do_not_meet_what_a_layer_is_made_of(silent):
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    module, _, given, _ = drawn("GRU", "packed")
    with torch.no_grad(), Watch():
        module(*given)
    assert torch.nn.functional.linear not in seen
    with torch.no_grad(), torch.device("meta"):
        module(*given)
    assert silent["launch"] == 2


def test_the_operator_keeps_nothing_and_is_not_captured(silent, monkeypatch):
    """A compiled graph is replayed for other lengths, and owns the memory of what ran in it."""
    monkeypatch.setattr(sequence, "_ragged", {})
    module, _, given, _ = drawn("GRU", "packed")
    call = module._call(module._weights(), given[0].data, given[0].batch_sizes, (None,), None)
    with torch.no_grad():
        layer.forward(call, keep=False)
        assert not sequence._ragged
        monkeypatch.setattr(sequence, "is_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="cannot capture"):
            layer.forward(call, keep=False)


def test_a_graph_captures_ragged_rows_that_are_at_hand(silent, monkeypatch):
    monkeypatch.setattr(sequence, "_ragged", {})
    monkeypatch.setattr(sequence, "_captured", [])
    module, x, _, _ = drawn("GRU", "lengths")
    with torch.no_grad():
        module(x, lengths=[5, 2, 3, 1])
        launched = silent["launch"]
        monkeypatch.setattr(sequence, "is_capturing", lambda: True)
        monkeypatch.setattr(sequence, "_copied", None)
        monkeypatch.setattr(sequence, "stream_of", lambda index: 9)
        for _ in range(2):
            module(x, lengths=[5, 2, 3, 1])
        assert silent["launch"] == launched + 2
        assert len(sequence._captured) == 1
        # To copy these now would belong to the graph.
        module(x, lengths=[5, 2, 2, 1])
    assert silent["launch"] == launched + 2


# ---- what it costs ----


def test_a_call_s_work_on_the_host(silent):
    """Bounds on what benchmarks/host.py counts: a third of 239 and 908 functions, before."""
    counts = {}
    for name, is_training, run in host.cases():
        with torch.set_grad_enabled(is_training):
            counts[name, is_training] = host.count(run, silent, times=1)
    assert counts["GRU", False]["functions"] <= 239 // 3
    assert counts["GRU", True]["functions"] <= 908 // 3
    assert counts["GRU", False]["operators"] <= 4
    assert counts["GRU", True]["operators"] <= 41 // 2 + 1
    assert counts["GRU", True]["launches"] == 2
    assert counts["GRU packed", True]["launches"] == 3
