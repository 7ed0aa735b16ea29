"""Training on two processes, resumed elsewhere, and through copies: the numbers of one process.

`torchrun` starts support/two_processes.py and examples/train.py on this machine's loopback.
"""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_packed_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ostinato import nn
from support.cells import CELL_MODULES, LAYERS, MODULES
from support.devices import assert_equal
from support.pairs import each, flat, shapes
from support.tolerances import tolerance
from support.two_processes import (
    CASES,
    DTYPE,
    SAVED,
    SAVED_AFTER,
    TIME,
    TIMEOUT,
    UPDATES,
    WAYS,
    Model,
    load,
    optimizer_of,
    share,
    train,
)

TESTS = Path(__file__).parent
EXAMPLE = TESTS.parent / "examples" / "train.py"
TORCHRUN = (
    *("-m", "torch.distributed.run", "--standalone"),
    *("--local-addr", "127.0.0.1", "--nproc-per-node", "2"),
)
SCRIPT = ("-m", "support.two_processes")
processes = pytest.mark.cpu("processes on this machine")
# torch says so wherever a checkpoint is loaded without a process group.
alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def run(*arguments):
    """Run Python on one thread per process; return what it printed, and leave no process behind."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        printed, _ = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            # torchrun ends its workers before itself, those that do not listen after 30 seconds.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(45)
            process.kill()
            process.communicate()
    assert process.returncode == 0, printed
    return printed


@functools.cache
def one_process(name):
    """What a case finds without torchrun."""
    model = Model(CASES[name])
    return train(CASES[name], model, optimizer_of(model), range(UPDATES))


def assert_close(actual, expected, dtype=DTYPE, steps=TIME * UPDATES):
    torch.testing.assert_close(actual, expected, **tolerance(dtype, steps))


def assert_same_bits(actual, expected):
    torch.utils._pytree.tree_map(assert_equal, actual, expected)


# ---- DDP and FSDP2 ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the two processes trained every case, and left their results and checkpoints."""
    folder = tmp_path_factory.mktemp("two_processes")
    run(*TORCHRUN, *SCRIPT, "start", folder)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    """What each of the two processes found."""
    return [torch.load(folder / f"start_{rank}.pt") for rank in range(2)]


@processes
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_and_parameters_are_those_of_one_process(two, way, name):
    expected = one_process(name)
    for found in two:
        assert_close(found[way, name]["gradients"], expected["gradients"])
        assert_close(found[way, name]["parameters"], expected["parameters"])


@processes
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_each_row_has_the_bits_of_one_process(two, way, name):
    """Those of the first update, before which the parameters are still the same bit for bit."""
    case, rows = CASES[name], []
    for rank, found in enumerate(two):
        output = found[way, name]["outputs"][0]
        rows.append(padded(case, output, rank, 2))
    assert_same_bits(torch.cat(rows, 1), padded(case, one_process(name)["outputs"][0]))


def padded(case, output, rank=0, world=1):
    """Return an output as (T, B, O) in the order of the batch."""
    if not case.packed:
        return output
    input, _ = share(case, 0, rank, world)
    return pad_packed_sequence(input._replace(data=output), total_length=TIME)[0]


@processes
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("saving", "keeping"),
    [
        ("GRU, recompute", "GRU, both directions, two layers"),
        ("LSTM, recompute", "LSTM"),
        ("LSTM, packed, recompute", "LSTM, packed"),
    ],
)
def test_recompute_changes_no_bit(two, way, saving, keeping):
    for found in two:
        assert_same_bits(found[way, saving], found[way, keeping])


@processes
@pytest.mark.parametrize("name", LAYERS)
def test_fsdp2_in_bfloat16(two, name):
    """MixedPrecisionPolicy: weights are gathered, and gradients averaged, in bfloat16."""
    model = Model(CASES[name], dtype=torch.float32).bfloat16()
    output, _ = model(share(CASES[name], 0, dtype=torch.bfloat16)[0])
    output.float().sum().backward()
    found = [process["bfloat16", name] for process in two]
    assert_same_bits(torch.cat([process["outputs"][0] for process in found], 1), output.detach())
    gradients = [p.grad.float() for p in model.rnn.parameters()]
    for process in found:
        # The average of two halves of a sum.
        halved = [2 * gradient for gradient in process["gradients"][0]]
        assert_close(halved, gradients, torch.bfloat16, steps=0)


# ---- torch.distributed.checkpoint ----


@pytest.fixture(scope="module")
def resumed(folder, two):
    """What each of two fresh processes found that went on from the checkpoints."""
    run(*TORCHRUN, *SCRIPT, "resume", folder)
    return [torch.load(folder / f"resume_{rank}.pt") for rank in range(2)]


@processes
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("saved", WAYS)
def test_two_processes_resume_a_checkpoint_of_two(two, resumed, saved, way):
    for before, after in zip(two, resumed, strict=True):
        straight, rest = before[way, SAVED], after[saved, way]
        compare = assert_same_bits if saved == way else assert_close
        compare(rest["gradients"], straight["gradients"][SAVED_AFTER:])
        compare(rest["parameters"], straight["parameters"])


@processes
@alone
@pytest.mark.parametrize("saved", WAYS)
def test_one_process_resumes_a_checkpoint_of_two(folder, two, saved):
    case = CASES[SAVED]
    model = Model(case, seed=1)
    optimizer = optimizer_of(model)
    load(model, optimizer, folder / saved)
    assert_same_bits([p.detach() for p in model.parameters()], two[0][saved, "saved"])
    rest = train(case, model, optimizer, range(SAVED_AFTER, UPDATES))
    assert_close(rest["gradients"], one_process(SAVED)["gradients"][SAVED_AFTER:])
    assert_close(rest["parameters"], one_process(SAVED)["parameters"])


# ---- copies ----


def outcome(module, input, hx):
    """Return the results of a call and the gradients of input, state and parameters."""
    input, hx = input.clone().requires_grad_(), each(hx, lambda h: h.clone().requires_grad_())
    results = flat(module(input, hx))
    loss = sum(result.square().sum() for result in results)
    wanted = [input, *flat(hx), *module.parameters()]
    return [result.detach() for result in results], list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("name", MODULES)
def test_an_ema_copy_counts_at_every_call(name):
    """AveragedModel writes in place: each call sees the average of this moment, and no older."""
    model = getattr(nn, name)(4, 8, dtype=DTYPE)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = [p.detach().clone() for p in model.parameters()]
    input, hx = shapes(name, dtype=DTYPE)
    for update in range(4):
        optimizer.zero_grad()
        sum(result.square().sum() for result in flat(model(input, hx))).backward()
        optimizer.step()
        average.update_parameters(model)
        for mean, p in zip(expected, model.parameters(), strict=True):
            # The first update copies.
            mean.copy_(0.75 * mean + 0.25 * p.detach() if update else p.detach())
        assert_close([p.detach() for p in average.parameters()], expected)
        fresh = getattr(nn, name)(4, 8, dtype=DTYPE)
        fresh.load_state_dict(average.module.state_dict())
        assert_same_bits(outcome(average, input, hx), outcome(fresh, input, hx))


@pytest.mark.parametrize("name", MODULES)
def test_a_target_network_written_through_data_counts_at_the_next_call(name):
    online, target = (getattr(nn, name)(4, 8, dtype=DTYPE) for _ in range(2))
    input, hx = shapes(name, dtype=DTYPE)
    before = outcome(target, input, hx)
    for p, q in zip(target.parameters(), online.parameters(), strict=True):
        p.data.copy_(q.data)
    after = outcome(target, input, hx)
    assert_same_bits(after, outcome(online, input, hx))
    assert not torch.equal(after[0][0], before[0][0])


@pytest.mark.cpu("DataParallel without a GPU")
@pytest.mark.skipif(torch.cuda.is_available(), reason="DataParallel would take the GPU")
@pytest.mark.parametrize("name", MODULES)
def test_data_parallel_on_a_cpu_is_the_module(name):
    module = getattr(nn, name)(4, 8)
    input, hx = shapes(name)
    parallel = torch.nn.DataParallel(module)
    assert_same_bits(outcome(parallel, input, hx), outcome(module, input, hx))


@pytest.mark.parametrize("name", MODULES)
def test_replicas_of_data_parallel_train_their_original(name, monkeypatch):
    """A replica has tensors where its original has parameters, to which their gradients flow."""
    # Stands in for the broadcast from one GPU to others; doubled, so that it shows whose weights
    # a replica takes.
    monkeypatch.setattr(
        sys.modules["torch.nn.parallel.replicate"],
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[2 * t for t in tensors] for _ in devices],
    )
    module, doubled = (getattr(nn, name)(4, 8, dtype=DTYPE) for _ in range(2))
    input, hx = shapes(name, batch=6, dtype=DTYPE)
    batch = 0 if name in CELL_MODULES else 1
    # Again after an update, which new replicas must see.
    for _ in range(2):
        # A list of weights that this call kept would be the replicas', too.
        module(input, hx)
        doubled.load_state_dict({key: 2 * value for key, value in module.state_dict().items()})
        results, gradients = outcome(doubled, input, hx)
        parts = []
        for k, replica in enumerate(torch.nn.parallel.replicate(module, [0, 1])):
            rows = functools.partial(torch.narrow, dim=batch, start=3 * k, length=3)
            parts.append(flat(replica(rows(input), each(hx, rows))))
        found = [torch.cat(halves, batch) for halves in zip(*parts, strict=True)]
        assert_same_bits([result.detach() for result in found], results)
        sum(result.square().sum() for result in found).backward()
        weights = list(module.parameters())
        assert_close([p.grad for p in weights], [2 * g for g in gradients[-len(weights) :]])
        with torch.no_grad():
            for p in weights:
                p.sub_(0.1 * p.grad)
                p.grad = None


# ---- the example ----


def losses(printed):
    """Return the losses that the example printed, by step, and the last without one."""
    found = re.findall(r"^(?:step +(\d+) +|final )loss (\d+\.\d+)$", printed, re.MULTILINE)
    return {int(step) if step else "final": float(loss) for step, loss in found}


@processes
def test_the_example_scales_and_resumes(tmp_path):
    alone = losses(run(EXAMPLE, "--steps", 240, "--log-every", 20))
    assert alone["final"] < 0.05  # a guess without memory reaches 1/6

    few = ("--steps", 60, "--log-every", 20, "--checkpoint")
    first = run(*TORCHRUN, EXAMPLE, *few, tmp_path / "two", "--save-every", 40)
    expected = losses(first)
    assert expected.keys() == {20, 40, 60, "final"}
    for step in (20, 40, 60):
        assert expected[step] == pytest.approx(alone[step], rel=1e-5)

    # As if the processes had been stopped while they saved the last one.
    (tmp_path / "two" / "step_000060" / ".metadata").unlink()
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    for printed in (
        run(EXAMPLE, *few, tmp_path / "one"),
        run(*TORCHRUN, EXAMPLE, "--fsdp", *few, tmp_path / "two"),
    ):
        assert "steps behind: 40" in printed
        found = losses(printed)
        assert found.keys() == {60, "final"}
        for step, loss in found.items():
            assert loss == pytest.approx(expected[step], rel=1e-5)
