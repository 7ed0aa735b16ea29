"""The GPU engine's kernels, forward and backward, on host fibers against the float64 reference.

Fibers find wrong indices, wrong phases of barriers and deadlocks; what they do not know of a device
is said in csrc/cuda/emulation.h.
"""

import pytest
import torch

from ostinato import reference_backend
from ostinato.call import Results
from ostinato.cuda.plan import A100, H200, plan
from support import emulation
from support.cells import CELLS
from support.emulation import EPS, KINDS, errors, pair, widened

MATHS = ("bf16", "fp16", "tf32", "fp32")

# hidden, blocks, units, warps, groups, resident, exchange: rows that a tile does not fill, units
# that do not exist, fragments in registers and in shared memory, sums that warps share.
SHAPES = {
    "block": (64, 1, 64, 4, 1, 99, "block"),
    "block, odd": (61, 1, 64, 8, 1, 3, "block"),
    "block, two groups": (48, 1, 48, 3, 2, 99, "block"),
    "block, four groups": (16, 1, 16, 1, 4, 0, "block"),
    "cluster of 2": (60, 2, 32, 4, 1, 2, "cluster"),
    "cluster of 4, two groups": (61, 4, 16, 2, 2, 99, "cluster"),
    "cluster of 8": (128, 8, 16, 2, 1, 99, "cluster"),
    "cluster of 2, four groups": (31, 2, 16, 1, 4, 1, "cluster"),
    "grid of 4": (64, 4, 16, 2, 1, 99, "grid"),
    "grid of 8, two groups": (125, 8, 16, 2, 2, 2, "grid"),
    "grid of 12, three times four sums": (190, 12, 16, 1, 1, 5, "grid"),
}
# The same, and rows of a group: tiles of several eights.
WIDE = {
    "block, sixteen rows": (45, 1, 48, 3, 1, 2, "block", 16),
    "cluster of 4, two groups of 16 rows": (61, 4, 16, 2, 2, 99, "cluster", 16),
    "grid of 4, 32 rows": (64, 4, 16, 4, 1, 3, "grid", 32),
    "grid of 3, two groups of 16 rows": (48, 3, 16, 2, 2, 99, "grid", 16),
}


# Every shape with every cell and half of the precisions, in each a kind of rows and an order of
# fibers. Below fp32, a ReLU's gradient jumps where a rounded state is just zero.
CASES = [
    (cell, math, shape, KINDS[(3 * i + j + 2 * k) % len(KINDS)], (i + k + j // 2) % 4)
    for i, shape in enumerate(SHAPES)
    for j, cell in enumerate(CELLS)
    for k, math in enumerate(MATHS)
    if (i + j + k) % 2 == 0 and not (math != "fp32" and cell == "rnn_relu")
]
CASES += [
    (cell, math, shape, KINDS[(2 * i + j) % len(KINDS)], (i + j) % 4)
    for i, shape in enumerate(WIDE)
    for j, (cell, math) in enumerate((("gru", "bf16"), ("lstm", "tf32")))
]
SHAPES |= WIDE


@pytest.fixture(scope="module")
def built():
    """Compile all kernels of this file beforehand, side by side."""
    emulation.build_all(
        config for cell, math, shape, *_ in CASES for config in pair(cell, math, SHAPES[shape])
    )


def compare(forward, backward, call, schedule=0):
    """Run both time loops and hold every result and gradient to the reference."""
    eps = EPS[forward.math]
    found, reserve = emulation.forward(forward, call, schedule)
    results, wide = found.flat(), widened(call)
    expected = reference_backend.results(wide._replace(all_states=True)).flat()
    # A sum of H products rounds in proportion to the root of H; but never may ours err more than 6
    # roundings where the reference itself, in float32, does not.
    longest = 6 * eps * max(1.0, forward.hidden**0.5 / 10)
    single = wide.with_tensors([t if t is None else t.detach().float() for t in wide.tensors()])
    singles = reference_backend.results(single._replace(all_states=True)).flat()
    for mine, other, third in zip(results, expected, singles, strict=True):
        assert errors(mine, other) <= min(longest, max(6 * eps, errors(third, other)))
    grads = [torch.randn(r.shape).to(r.dtype) for r in results]
    arrived = Results.of(grads, len(call.initial))
    found = emulation.backward(backward, call, arrived, found.output, reserve, schedule)
    leaves = [t for t in wide.tensors() if t is not None]
    seeds = [grad.double() for grad in grads]
    options = {"allow_unused": True, "materialize_grads": True}
    other = dict(zip(leaves, torch.autograd.grad(expected, leaves, seeds, **options), strict=True))
    # dx is a sum that may cancel, and rounds in proportion to its terms.
    terms = {wide.input: terms_of_input(wide, seeds)} if call.input[0].numel() == 1 else {}
    for mine, leaf in zip(found, wide.tensors(), strict=True):
        assert errors(mine, other.get(leaf), terms.get(leaf, 0.0)) <= 12 * eps
    return results, found


def terms_of_input(call, seeds):
    """What the terms of an element of dx add up to at most, for one row of one input feature.

    These are dgate * w, for each gate, unit and direction. Features that tell the steps apart, with
    weights of zero, have the dgate of each step as the gradients of these weights.
    """
    steps, width = len(call.input), 4 if call.has_biases else 2
    told = torch.eye(steps, dtype=torch.float64).unsqueeze(1)
    weights = [weight.detach() for weight in call.weights]
    own = weights[::width]
    weights[::width] = [torch.cat([w, w.new_zeros(len(w), steps)], -1) for w in own]
    leaves = [w.requires_grad_() for w in weights[::width]]
    wide = call._replace(input=torch.cat([call.input.detach(), told], -1), weights=weights)
    results = reference_backend.results(wide._replace(all_states=True)).flat()
    options = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(results, leaves, seeds, **options)
    terms = sum((w * g[:, 1:]).abs().sum(0) for w, g in zip(own, grads, strict=True))
    return terms.max().item()


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(("cell", "math", "shape", "kind", "schedule"), CASES)
def test_every_shape(cell, math, shape, kind, schedule):
    forward, backward = pair(cell, math, SHAPES[shape])
    call = emulation.draw(cell, forward.hidden, kind, batch=forward.rows + 3, math=math)
    compare(forward, backward, call, schedule)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_what_is_kept_depends_on_the_inputs_alone(cell, kind, monkeypatch):
    forward, _ = pair(cell, "fp32", SHAPES["cluster of 2, four groups"])
    call, new_empty, kept = emulation.draw(cell, forward.hidden, kind), torch.Tensor.new_empty, []
    for before in (0, 255):

        def used(self, *shape, before=before, **options):
            found = new_empty(self, *shape, **options)
            found.view(torch.uint8).fill_(before)
            return found

        monkeypatch.setattr(torch.Tensor, "new_empty", used)
        kept.append(emulation.forward(forward, call)[1])
    assert torch.equal(*kept)


@pytest.mark.usefixtures("built")
def test_a_region_of_autocast_changes_no_bit():
    # Users call backward in it, where forward's own precautions are over.
    forward, backward = pair("gru", "fp32", SHAPES["cluster of 2, four groups"])
    call = emulation.draw("gru", forward.hidden)
    seeds = Results.of([torch.randn(5, 5, 2 * forward.hidden), None], 1)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results, reserve = emulation.forward(forward, call)
            grads = emulation.backward(backward, call, seeds, results.output, reserve)
        found.append([t for t in [*results.flat(), *grads] if t is not None])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("kind", ["padded", "lengths", "resets packed"])
@pytest.mark.parametrize("shape", ["block, odd", "cluster of 4, two groups", "grid of 4"])
def test_every_kind_of_rows_in_every_order_of_fibers(shape, kind):
    forward, backward = pair("gru", "tf32", SHAPES[shape])
    call = emulation.draw("gru", forward.hidden, kind, batch=forward.rows + 3, math="tf32")
    state = torch.get_rng_state()
    runs = []
    for schedule in range(4):
        torch.set_rng_state(state)
        runs.append(compare(forward, backward, call, schedule))
    for results, grads in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, runs[0][0], strict=True))
        for a, b in zip(grads, runs[0][1], strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", ["padded", "resets"])
@pytest.mark.parametrize(("steps", "batch", "directions"), [(1, 1, 1), (2, 1, 2), (7, 9, 1)])
def test_few_rows_no_states_no_biases(cell, kind, steps, batch, directions):
    forward, backward = pair(cell, "fp32", SHAPES["cluster of 2, four groups"])
    options = {"steps": steps, "batch": batch, "directions": directions, "size": 1}
    call = emulation.draw(cell, forward.hidden, kind, bias=False, states=False, **options)
    compare(forward, backward, call)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    "shape", ["block, two groups", "cluster of 4, two groups", "grid of 4", "grid of 4, 32 rows"]
)
def test_a_row_has_the_bits_it_has_anywhere(shape):
    forward, backward = pair("lstm", "bf16", SHAPES[shape])
    call = emulation.draw("lstm", forward.hidden, batch=forward.rows + 3, math="bf16")
    order = torch.randperm(call.batch)
    moved = call.each_state(lambda state: state[:, order])
    moved = moved._replace(input=call.input[:, order])
    mine, reserve = emulation.forward(forward, call)
    theirs, other_reserve = emulation.forward(forward, moved)
    for one, other in zip(mine.flat(), theirs.flat(), strict=True):
        assert torch.equal(one[:, order], other)
    grad, (output, last, every) = torch.randn(mine.output.shape).to(mine.output.dtype), mine
    absent = (None,) * len(last), (None,) * len(every)
    seed, moved_seed = Results(grad, *absent), Results(grad[:, order], *absent)
    mine = emulation.backward(backward, call, seed, output, reserve)
    theirs = emulation.backward(backward, moved, moved_seed, theirs.output, other_reserve)
    assert torch.equal(mine[0][:, order], theirs[0])
    assert torch.equal(mine[1][:, order], theirs[1])


@pytest.mark.parametrize("math", ["bf16", "fp32"])
@pytest.mark.parametrize("device", [H200, A100])
@pytest.mark.parametrize(("cell", "hidden", "batch"), [("gru", 128, 16), ("lstm", 256, 9)])
def test_what_a_plan_chooses(cell, hidden, batch, device, math):
    forward, backward = (
        plan(cell, math, hidden, batch, 2, is_backward, device) for is_backward in (False, True)
    )
    call = emulation.draw(cell, hidden, "packed", steps=3, batch=batch, math=math)
    compare(forward, backward, call)


def test_rows_without_steps():
    forward, backward = pair("gru", "fp32", SHAPES["cluster of 2"])
    call = emulation.draw("gru", forward.hidden, "lengths", batch=3)
    call = call._replace(lengths=torch.zeros(3, dtype=torch.int64))
    (output, h_n), _ = compare(forward, backward, call)
    assert not output.any()
    assert torch.equal(h_n, *call.initial)
