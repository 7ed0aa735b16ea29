"""Own cells on the GPU engine: emulated kernels against a float64 loop over the step itself."""

import pytest
import torch

from ostinato import operators
from ostinato.call import Call, Results
from ostinato.cells import cell_of
from ostinato.cuda import choice, launch, sequence, trial
from ostinato.cuda import layer as gpu_layer
from ostinato.cuda.plan import H200
from ostinato.own import records
from ostinato.own.cuda import struct_of
from ostinato.own.graph import Graph
from ostinato.own.lowering import lower
from ostinato.sizes import Sizes
from support import emulation, trials
from support.emulation import DTYPES, EPS, errors, pair, widened
from support.own_judge import layer
from support.own_steps import OWN, ZOO

# hidden, blocks, units, warps, groups, resident, exchange.
SHAPES = {
    "block": (30, 1, 32, 2, 1, 99, "block"),
    "block, odd, two groups": (61, 1, 64, 4, 2, 3, "block"),
    "cluster of 2": (60, 2, 32, 4, 1, 2, "cluster"),
    "cluster of 4, two groups": (61, 4, 16, 2, 2, 99, "cluster"),
    "grid of 4": (64, 4, 16, 2, 1, 99, "grid"),
    "grid of 8, two groups": (125, 8, 16, 2, 2, 2, "grid"),
    "grid of 3, 16 rows": (48, 3, 16, 2, 1, 99, "grid", 16),
}
# Where there is no product, blocks share units and exchange nothing.
APART = {
    "one block": (45, 1, 48, 2, 1, 0, "block"),
    "three blocks, two groups": (46, 3, 16, 1, 2, 0, "block"),
    "two blocks, 16 rows": (30, 2, 16, 3, 1, 0, "block", 16),
}
EVERY = OWN | ZOO
MATHS = ("bf16", "tf32", "fp32")
ROWS = ("padded", "packed", "lengths", "resets", "resets packed", "resets lengths")
MULTIPLYING = [name for name in OWN if name not in ("no_hidden", "driven")]
# Of relu and maximum: below fp32 a gradient that jumps is another one where a rounding decides.
JUMPING = ("stabilised", "SLSTM", "LiGRU")
BEGINNING_AT_ZERO = ("SLSTM",)
# Every cell in half of the shapes; precisions, rows and orders of fibers in turns.
CASES = [
    (
        name,
        MATHS[(i + j) % 3],
        shape,
        ROWS[(2 * i + j) % 6],
        (i + j) % 4,
    )
    for i, name in enumerate(OWN)
    for j, shape in enumerate(SHAPES if name in MULTIPLYING else APART)
    if (i + j) % 2 == 0 or name not in MULTIPLYING
]


def draw(
    name,
    hidden,
    rows="padded",
    *,
    steps=5,
    batch=5,
    size=7,
    directions=2,
    math="fp32",
    states=True,
):
    """Draw a call of an own cell, and its sizes."""
    cell = EVERY[name]
    call = Call.of(None, None, batch, None, None, [], cell, True, directions == 2)
    kind, dtype = call.kind, DTYPES[math]

    def array(scale, *shape):
        return (scale * torch.randn(*shape)).to(dtype)

    weights = []
    for _ in range(directions):
        of_x, of_h = kind.input_gates * hidden, kind.gates * hidden
        weights += [array(0.3, of_x, size), array(1.5 * hidden**-0.5, of_h, hidden)]
        weights += [array(0.3, of_x), array(0.3, of_h)]
        weights += [array(0.5, kind.parameters, hidden)] if kind.parameters else []
    sizes, lengths, resets = None, None, None
    if "packed" in rows:
        ends = torch.randint(1, steps + 1, (batch,)).sort(descending=True).values
        ends[0] = steps
        sizes = (ends[:, None] > torch.arange(steps)).sum(0)
    if "lengths" in rows:
        lengths = torch.randint(0, steps + 1, (batch,))
    shape = (steps, batch) if sizes is None else (int(sizes.sum()),)
    if "resets" in rows:
        resets = torch.rand(shape) < 0.3
    initial = [array(0.5, directions, batch, width * hidden) for width in (1, kind.behind) if width]
    initial = initial if states else [torch.zeros_like(state) for state in initial]
    call = call._replace(
        input=torch.cat(
            [array(1.0, *shape, size), torch.rand(*shape, kind.drives * hidden).to(dtype)], -1
        ),
        batch_sizes=sizes,
        initial=tuple(initial),
        weights=weights,
        lengths=lengths,
        resets=resets,
        reset_to=tuple(torch.randn_like(s) if states else torch.zeros_like(s) for s in initial)
        if resets is not None
        else (),
        all_states=True,
    )
    flat = shape[0] if sizes is not None else steps * batch
    return call, Sizes(steps, flat, batch, size, hidden, 0, directions)


def run(forward, backward, call, sizes, seeds, schedule=0):
    """Return results and gradients of both kernels."""
    launch, call = emulation.launcher(schedule), sequence.dense(call)
    rows = sequence.rows_of(call, may_keep=False)
    results, reserve = sequence.forward(call, sizes, rows, forward, launch, keep=True)
    arrived = sequence.dense_results(Results.of(seeds, len(call.initial)))
    wanted = [tensor is not None for tensor in call.tensors()]
    given = launch, arrived, results.output, reserve, wanted
    return results.flat(), sequence.backward(call, sizes, rows, backward, *given)


def compare(name, math, shape, rows="padded", schedule=0, **options):
    """Hold every result and gradient to the judge, by the rules of test_cuda_kernels.py."""
    forward, backward = pair(EVERY[name], math, shape)
    options = {"batch": forward.rows + 3, "math": math} | options
    call, sizes = draw(name, forward.hidden, rows, **options)
    wide, eps = widened(call), EPS[math]
    expected = layer(wide)
    seeds = [torch.randn(result.shape).to(call.input.dtype) for result in expected]
    results, grads = run(forward, backward, call, sizes, seeds, schedule)
    single = wide.with_tensors(
        [t if t is None else t.detach().float().requires_grad_() for t in wide.tensors()]
    )
    singles = layer(single)
    longest = 6 * eps * max(1.0, forward.hidden**0.5 / 10)
    for mine, other, third in zip(results, expected, singles, strict=True):
        assert errors(mine, other) <= min(longest, max(6 * eps, errors(third, other)))
    if name in JUMPING and math != "fp32":
        return
    exact, thirds = gradients(wide, expected, seeds), gradients(single, singles, seeds)
    for mine, other, third in zip(grads, exact, thirds, strict=True):
        # A sum may cancel in float32 too.
        bound = 12 * eps if other is None else max(12 * eps, 2 * errors(third, other))
        assert errors(mine, other) <= bound


def gradients(call, results, seeds):
    """Return the judge's gradients of `call.tensors()`."""
    leaves = [t for t in call.tensors() if t is not None]
    seeds = [seed.to(result.dtype) for seed, result in zip(seeds, results, strict=True)]
    found = torch.autograd.grad(results, leaves, seeds, allow_unused=True, materialize_grads=True)
    grads = dict(zip(leaves, found, strict=True))
    return [grads.get(leaf) for leaf in call.tensors()]


@pytest.fixture(scope="module")
def built():
    """Compile all kernels of this file beforehand, side by side."""
    every = SHAPES | APART
    emulation.build_all(
        config for name, math, shape, *_ in CASES for config in pair(OWN[name], math, every[shape])
    )


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(("name", "math", "shape", "rows", "schedule"), CASES)
def test_every_shape(name, math, shape, rows, schedule):
    compare(name, math, (SHAPES | APART)[shape], rows, schedule)


@pytest.mark.parametrize("math", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name, math):
    kind, turn = cell_of(ZOO[name]), list(ZOO).index(name)
    shapes = SHAPES if kind.gates else APART
    # What normalises must not begin at a random number.
    options = {"states": name not in BEGINNING_AT_ZERO}
    compare(
        name, math, list(shapes.values())[turn % len(shapes)], ROWS[turn % len(ROWS)], **options
    )


def test_a_row_has_the_bits_it_has_anywhere():
    forward, backward = pair(OWN["peephole"], "bf16", SHAPES["cluster of 4, two groups"])
    call, sizes = draw("peephole", forward.hidden, batch=forward.rows + 3, math="bf16")
    order = torch.randperm(call.batch)
    moved = call.each_state(lambda state: state[:, order])._replace(input=call.input[:, order])
    output, *last, every = layer(call)
    seeds = [torch.randn_like(output), *[None] * len(last), torch.randn_like(every)]
    other = [None if seed is None else seed[:, order] for seed in seeds]
    mine, grads = run(forward, backward, call, sizes, seeds)
    theirs, moved_grads = run(forward, backward, moved, sizes, other)
    for one, two in zip(mine, theirs, strict=True):
        assert torch.equal(one[:, order], two)
    # Of the input and the states; those of weights sum over rows.
    for one, two, _ in zip(grads, moved_grads, range(3), strict=False):
        assert torch.equal(one[:, order], two)


@pytest.mark.parametrize("name", ["peephole", "driven", "more_input"])
@pytest.mark.parametrize(("steps", "batch", "directions"), [(1, 1, 1), (7, 9, 1)])
def test_few_rows_no_states(name, steps, batch, directions):
    shape = (SHAPES | APART)["cluster of 2" if name in MULTIPLYING else "one block"]
    options = {"steps": steps, "batch": batch, "directions": directions}
    compare(name, "fp32", shape, **options)


# ---- the layer ----


@pytest.fixture
def gpu(monkeypatch):
    """Let CPU tensors take the way of CUDA tensors."""
    monkeypatch.setattr(launch, "available", lambda: True)
    monkeypatch.setattr(gpu_layer, "device_of", lambda index: H200)
    monkeypatch.setattr(gpu_layer, "launcher_of", lambda call: emulation.launcher())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a stand-in")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["peephole", "driven"])
def test_the_operators_of_cuda_tensors(name, monkeypatch):
    monkeypatch.setattr(trial, "_is_on", False)
    call, _ = draw(name, 16, "resets", batch=3)
    leaves = [t.requires_grad_() for t in call.tensors() if t is not None]
    forward = operators._forward_on(gpu_layer.forward)
    backward = operators._backward_on(gpu_layer.backward)
    with torch.no_grad():
        *results, reserve = forward(*call.parameters(), True, True)
    expected = layer(call)
    output, h_n, c_n, cells = results
    mine = [output, h_n, *([c_n, cells] if call.kind.has_c else [])]
    torch.testing.assert_close(mine, expected, rtol=2e-3, atol=2e-3)
    grads = [torch.randn_like(t) for t in expected]
    padded = Results.of(grads, len(call.initial)).padded()
    wanted = call.parts([True] * len(leaves)).padded(False)
    with torch.no_grad():
        found = backward(*padded, output, reserve, wanted, *call.parameters())
    mine = [grad for grad, want in zip(found, wanted, strict=True) if want]
    other = torch.autograd.grad(expected, leaves, grads, materialize_grads=True)
    torch.testing.assert_close(mine, list(other), rtol=2e-3, atol=2e-3)


# ---- who runs it ----


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("is_right", [True, False])
def test_ours_runs_where_it_agrees_with_the_reference(is_right, tmp_path, monkeypatch):
    trials.without_answers(tmp_path, monkeypatch)

    def spoil(call, results):
        return results if is_right else results._replace(output=results.output + 1)

    device = trials.Recorded(spoil=spoil)
    monkeypatch.setattr(gpu_layer, "device_of_trials", lambda index: device)
    call, _ = draw("peephole", 8, math="bf16")
    decision = gpu_layer.decide(call, is_training=True)
    assert decision.is_ours == is_right
    assert ("cuDNN has no such layer" if is_right else "wrong") in decision.reason
    assert device.runs
    assert not device.samples  # nothing is timed


@pytest.mark.usefixtures("gpu")
def test_a_step_without_finite_numbers_is_left_to_the_reference(tmp_path, monkeypatch):
    trials.without_answers(tmp_path, monkeypatch)
    monkeypatch.setattr(gpu_layer, "device_of_trials", lambda index: trials.Recorded())
    call, _ = draw("peephole", 8, math="bf16")
    per_unit = [w.fill_(float("nan")) if len(w) == 3 else w for w in call.weights]
    decision = gpu_layer.decide(call._replace(weights=per_unit), is_training=False)
    assert not decision.is_ours
    assert "no finite numbers" in decision.reason


@pytest.mark.usefixtures("gpu")
def test_what_has_no_kernel_is_said(monkeypatch):
    monkeypatch.setattr(trial, "_is_on", False)
    call, _ = draw("peephole", 8)
    with choice.forced(True):
        assert gpu_layer.decide(call, is_training=True).is_ours
        assert "ostinato_backward in" in gpu_layer.detail(
            call.with_tensors([t if t is None else t.requires_grad_() for t in call.tensors()])
        )
    reason = gpu_layer.decide(call, is_training=True).reason
    assert "cuDNN has no such layer; nothing was measured" in reason
    untraced = records.untraced(Graph("Plain", 1, 1, 1, 0, 0, (), ()), lambda *_: ())
    reason = gpu_layer.decide(call._replace(cell=untraced), is_training=True).reason
    assert reason == "this cell asks for the reference"


def test_a_struct_takes_so_many_values():
    lowered = lower(Graph.parse(OWN["gru"]))._replace(saved=65)
    with pytest.raises(ValueError, match="gru: expected at most 64 values kept per unit, got 65"):
        struct_of(lowered)
