"""Lengths, resets and c at every step: the engine against the reference, and against pieces.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step, D directions.
"""

import itertools

import pytest
import torch

from ostinato import ops, reference
from support.cells import CELLS
from support.devices import assert_equal, engine_dtype, moved
from support.samples import SAMPLES, close, cut_of, draw, gradients

LENGTHS = {"none": None, "some": (4, 0, 7, 2, 7), "all whole": (7,) * 5, "all empty": (0,) * 5}
RESETS = {"none": None, "some": 0.3, "every step": 1.0, "never": 0.0}


def run(function, sample, cuts, **options):
    """Return results that are there, and all leaves."""
    options |= {"has_biases": sample.has_biases, "bidirectional": sample.bidirectional}
    return [r for r in function(*sample[:6], **options, **cuts) if r is not None]


def by_reference(*arguments, reset_h=None, reset_c=None, **options):
    """The reference under the arguments of `ops.cut_layer`."""
    *given, h_0, c_0, weights = arguments
    output, last, every = reference.states(
        *given, (h_0, c_0), weights, reset_to=(reset_h, reset_c), **options
    )
    return output, *last, *every


def both(sample, cuts, **options):
    """Results and gradients of the engine and of the reference."""
    found = []
    for function in (ops.cut_layer, by_reference):
        mine = sample.training()
        states = {
            name: t.detach().clone().requires_grad_() if name.startswith("reset_") else t
            for name, t in cuts.items()
            if t is not None
        }
        extra = options | {"all_c": True} if function is ops.cut_layer else {}
        if function is by_reference and "lengths" in states:
            states["lengths"] = states["lengths"].to(mine.input.device)
        results = run(function, mine, states, **extra)
        torch.manual_seed(1)
        cotangents = [torch.randn_like(r) for r in results]
        leaves = mine.leaves() + [t for n, t in states.items() if n.startswith("reset_")]
        found.append((results, gradients(results, leaves, cotangents, allow_unused=True)))
    return found


def hold(found, steps=8):
    (results, grads), (expected, expected_grads) = found
    close(results, expected, steps)
    close(grads, expected_grads, steps)


@pytest.mark.parametrize(
    ("lengths", "resets"),
    # Without either there is no cut: tests/test_ops.py.
    [pair for pair in itertools.product(LENGTHS, RESETS) if pair != ("none", "none")],
)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_results_and_gradients(cell, bidirectional, lengths, resets):
    sample = draw(cell, 7, 5, 3, 6, bidirectional=bidirectional, dtype=torch.float64)
    cuts = cut_of(sample, LENGTHS[lengths], RESETS[resets])
    hold(both(sample, cuts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", [n for n, o in SAMPLES.items() if "lengths" not in o])
def test_every_kind_of_call(name, recompute, dtype):
    options = {k: v for k, v in SAMPLES[name].items() if k != "recompute"}
    sample = draw(**options, dtype=dtype)
    steps, batch = sample.input.shape[:2]
    lengths = torch.randint(0, steps + 1, (batch,)).tolist()
    hold(both(sample, cut_of(sample, lengths, 0.3), recompute=recompute), steps)
    hold(both(sample, cut_of(sample, None, 0.3, with_state=False)), steps)


@pytest.mark.parametrize("name", [n for n, o in SAMPLES.items() if "lengths" in o])
def test_resets_of_packed_rows(name):
    options = {k: v for k, v in SAMPLES[name].items() if k != "recompute"}
    sample = draw(**options, dtype=torch.float64)
    hold(both(sample, cut_of(sample, None, 0.4)))


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_kept_where_there_are_no_steps(cell):
    for steps, batch in ((0, 3), (4, 0), (0, 0)):
        sample = draw(cell, steps, batch, 3, 6, bidirectional=True, dtype=torch.float64)
        cuts = cut_of(sample, [0] * batch, 0.5)
        hold(both(sample, cuts))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_piece_has_the_bits_that_it_has_alone(cell, bidirectional):
    sample = draw(cell, 9, 3, 4, 17, bidirectional=bidirectional)
    resets = torch.rand(9, 3) < 0.3
    lengths = torch.tensor([9, 5, 7], device="cpu")
    cuts = {"lengths": lengths, "resets": resets}
    output, h_n, *_ = run(ops.cut_layer, sample, cuts)
    for b in range(3):
        starts = [t for t in range(int(lengths[b])) if t == 0 or resets[t, b]]
        for start, end in itertools.pairwise([*starts, int(lengths[b])]):
            piece = sample._replace(input=sample.input[start:end, b : b + 1])
            at_cut = bool(resets[start, b]), end < int(lengths[b])
            states = {}
            for name in ("h_0", "c_0"):
                state = getattr(sample, name)
                if state is not None:
                    state = state[:, b : b + 1].clone()
                    for d in range(len(state)):
                        if at_cut[d]:
                            state[d] = 0
                states[name] = state
            alone, h_end, *_ = piece._replace(**states).run()
            assert_equal(alone[:, 0], output[start:end, b])
            if end == int(lengths[b]):
                assert_equal(h_end[0, 0], h_n[0, b])
    for b in range(3):
        assert not output[int(lengths[b]) :, b].any()


@pytest.mark.cpu("the compiled engine")
# Few rows of many units are walked by all threads together.
@pytest.mark.parametrize(("batch", "hidden"), [(12, 40), (2, 160)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_a_piece_have_the_bits_that_they_have_alone(
    isa, cell, bidirectional, recompute, batch, hidden
):
    sample = draw(cell, 9, batch, 6, hidden, bidirectional=bidirectional, recompute=recompute)
    cuts = cut_of(sample, None, 0.3)
    resets, anew = cuts["resets"], {"h_0": cuts["reset_h"], "c_0": cuts["reset_c"]}
    whole = sample.training()
    output, h_n, *_ = run(ops.cut_layer, whole, cuts, recompute=recompute)
    cotangents = [torch.randn_like(output), torch.randn_like(h_n)]
    states = [state for state in (whole.h_0, whole.c_0) if state is not None]
    dx, *dstates = gradients([output, h_n], [whole.input, *states], cotangents)
    for b in range(batch):
        starts = [t for t in range(9) if t == 0 or resets[t, b]]
        for start, end in itertools.pairwise([*starts, 9]):
            at_cut, is_last = (bool(resets[start, b]), end < 9), (end == 9, start == 0)
            begin = {}
            for name, state in anew.items():
                first = getattr(sample, name)
                if state is not None:
                    rows = [(state if at_cut[d] else first)[d, b] for d in range(len(first))]
                    begin[name] = torch.stack(rows).unsqueeze(1)
            piece = sample._replace(input=sample.input[start:end, b : b + 1], **begin).training()
            alone, h_end, *_ = piece.run()
            dh_n = torch.stack([g[b] * is_last[d] for d, g in enumerate(cotangents[1])])
            leaves = [t for t in (piece.input, piece.h_0, piece.c_0) if t is not None]
            arrived = [cotangents[0][start:end, b : b + 1], dh_n.unsqueeze(1)]
            found = gradients([alone, h_end], leaves, arrived)
            assert_equal(alone[:, 0], output[start:end, b])
            assert_equal(found[0][:, 0], dx[start:end, b])
            for mine, other in zip(dstates, found[1:], strict=True):
                for d in range(len(other)):
                    if not at_cut[d]:
                        assert_equal(mine[d, b], other[d, 0])


@pytest.mark.parametrize("cell", CELLS)
def test_the_gradient_ends_at_a_reset(cell):
    sample = draw(cell, 6, 2, 3, 5).training()
    resets = torch.zeros(6, 2, dtype=torch.bool)
    resets[3, 1] = True
    output, *_ = run(ops.cut_layer, sample, {"resets": resets})
    (grad,) = torch.autograd.grad(output[3:, 1].sum(), sample.input, retain_graph=True)
    assert not grad[:3].any()
    assert grad[3:, 1].any()
    (grad,) = torch.autograd.grad(output[3:, 0].sum(), sample.input)
    assert grad[:3, 0].any()


@pytest.mark.cpu("kernels for GPUs carry states in 16 bits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_16_bits(cell, dtype):
    sample = draw(cell, 7, 4, 3, 9, bidirectional=True, dtype=dtype)
    cuts = cut_of(sample, (3, 7, 0, 5), 0.3)
    wide = sample.each(torch.Tensor.float)
    wide_cuts = {
        n: t.float() if n.startswith("reset_") else t for n, t in cuts.items() if t is not None
    }
    results = run(ops.cut_layer, sample, cuts, all_c=True)
    for mine, other in zip(results, run(ops.cut_layer, wide, wide_cuts, all_c=True), strict=True):
        assert_equal(mine, other.to(dtype))
    hold(both(sample, cuts))


@pytest.mark.cpu("the compiled engine")
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_bits(threads):
    before = torch.get_num_threads()
    sample = draw("lstm", 60, 40, 64, 64, bidirectional=True)
    cuts = cut_of(sample, torch.randint(0, 61, (40,)).tolist(), 0.1)
    expected = run(ops.cut_layer, sample, cuts, all_c=True)
    torch.set_num_threads(threads)
    try:
        actual = run(ops.cut_layer, sample, cuts, all_c=True)
    finally:
        torch.set_num_threads(before)
    for mine, other in zip(actual, expected, strict=True):
        assert_equal(mine, other)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_operator_by_torchs_own_rules(name):
    sample = draw(name, 5, 3, 2, 3, bidirectional=True, dtype=engine_dtype()).training()
    cuts = cut_of(sample, (5, 2, 0), 0.4)
    states = [t if t is None else t.requires_grad_() for t in map(cuts.get, ("reset_h", "reset_c"))]
    arguments = list(sample.operator_arguments())
    arguments[-6:-2] = [cuts["lengths"], cuts["resets"], *states]
    arguments[-2] = True
    torch.library.opcheck(torch.ops.ostinato.layer.default, tuple(arguments))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lengths": torch.tensor([8, 1])}, ValueError, "lengths: expected numbers from 0 to 7"),
        ({"lengths": torch.tensor([-1, 1])}, ValueError, "lengths: expected numbers from 0 to 7"),
        ({"lengths": torch.tensor([1])}, RuntimeError, "lengths: expected shape"),
        ({"lengths": torch.tensor([1.0, 2.0])}, RuntimeError, "lengths: expected shape"),
        ({"lengths": [1, 2]}, TypeError, "lengths: expected a tensor"),
        ({"resets": torch.zeros(7, 3, dtype=torch.bool)}, RuntimeError, "resets: expected shape"),
        ({"resets": torch.zeros(7, 2)}, RuntimeError, "resets: expected shape"),
        ({"reset_h": torch.zeros(1, 2, 4)}, RuntimeError, "reset_h: expected None"),
        (
            {"resets": torch.zeros(7, 2, dtype=torch.bool), "reset_h": torch.zeros(1, 2, 5)},
            RuntimeError,
            "reset_h: expected shape",
        ),
        (
            {"resets": torch.zeros(7, 2, dtype=torch.bool), "reset_c": torch.zeros(1, 2, 4)},
            RuntimeError,
            "reset_c: expected None for gru",
        ),
    ],
)
def test_wrong_arguments(changes, error, message):
    sample = draw("gru", 7, 2, 3, 4)
    with pytest.raises(error, match=message):
        run(ops.cut_layer, sample, changes if "lengths" in changes else moved(changes))


def test_packed_rows_have_their_own_lengths():
    sample = draw("gru", lengths=(3, 2))
    with pytest.raises(RuntimeError, match="lengths: expected None"):
        run(ops.cut_layer, sample, {"lengths": torch.tensor([3, 2], device="cpu")})


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_what_has_no_engine(cell):
    sample = draw(cell, 7, 3, 2, 4, bidirectional=True, dtype=torch.complex128)
    hold(both(sample, cut_of(sample, (7, 0, 3), 0.3)))


def test_second_derivatives():
    sample = draw("lstm", 4, 2, 2, 3, dtype=torch.float64).training()
    resets = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 1]], dtype=torch.bool)

    def function(*leaves):
        cuts = {"lengths": torch.tensor([4, 2], device="cpu"), "resets": resets}
        return tuple(run(ops.cut_layer, sample.replaced(leaves), cuts, all_c=True))

    assert torch.autograd.gradgradcheck(function, sample.leaves())


@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script` is deprecated")
def test_vmap_and_forward_mode():
    sample = draw("gru", 4, 2, 2, 3, dtype=torch.float64)
    resets = torch.rand(4, 2) < 0.4

    def function(input):
        return ops.cut_layer(
            *sample[:1], input, *sample[2:6], has_biases=True, bidirectional=False, resets=resets
        )[0]

    inputs = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    expected = torch.stack([function(input) for input in inputs])
    torch.testing.assert_close(torch.func.vmap(function)(inputs), expected)
    torch.func.jvp(function, (inputs[0],), (inputs[1],))
