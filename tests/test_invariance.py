"""The same bits whatever the threads, the batch, the cuts, the packing and the instruction set.

Outputs, final states and the gradients of input and initial states are held with torch.equal; where
the same rows are summed, over threads and instruction sets, the gradients of the weights as well.

Legend: T steps, B batch, I input, H hidden, O output of a step.
"""

import time

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ostinato import _core, nn
from support.calls import seed_of
from support.cells import FIRST_CELLS, KINDS
from support.engine import INSTRUCTION_SETS
from support.pairs import cell_module, layer_of

layers = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(autouse=True)
def settings():
    """Give threads and instruction set back as they were."""
    threads, isa = torch.get_num_threads(), _core.isa()
    yield
    torch.set_num_threads(threads)
    _core.set_isa(isa)


def states_of(module, batch):
    """Draw h_0, and c_0 for an LSTM, in a list."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    states = [torch.randn(rows, batch, module.proj_size or module.hidden_size)]
    if isinstance(module, nn.LSTM):
        states.append(torch.randn(rows, batch, module.hidden_size))
    return states


def hx(states):
    return states[0] if len(states) == 1 else tuple(states)


def flat(states):
    return [states] if isinstance(states, torch.Tensor) else list(states)


def leaf(t):
    return t.detach().clone().requires_grad_()


def cotangents(results):
    """Draw one for each result, the same for the same shapes."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(r.shape, generator=generator, dtype=r.dtype) for r in results]


def run(module, x, states, seeds=None, weights=True):
    """Return outputs, gradients of input and states, and gradients of the weights."""
    x, states = leaf(x), [leaf(s) for s in states]
    output, ends = module(x, hx(states))
    results = [output, *flat(ends)]
    seeds = seeds or cotangents(results)
    leaves = [x, *states, *(module.parameters() if weights else ())]
    grads = torch.autograd.grad(results, leaves, seeds)
    return [r.detach() for r in (*results, *grads)]


def same(actual, expected, what=""):
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if not torch.equal(a, e):
            differ = int((a != e).sum())
            raise AssertionError(f"{what}: result {index} differs in {differ} of {e.numel()}")


# ---- threads and instruction sets ----

# steps, batch, I, H, options. One to three rows of a wide layer go through the steps together, the
# threads sharing its units (csrc/cpu/sequence.h, Relay); other batches are cut into tiles of rows.
SHAPES = {
    "few rows": (9, 3, 33, 257, {}),
    "one row": (40, 1, 64, 256, {}),
    "two rows, two layers": (7, 2, 31, 263, {"num_layers": 2}),
    "one row both ways": (11, 1, 17, 259, {"bidirectional": True}),
    "tiles": (13, 37, 19, 65, {}),
    "tiles both ways": (6, 37, 40, 129, {"bidirectional": True}),
    "without bias": (5, 18, 33, 131, {"bias": False}),
    "too small to share": (5, 3, 4, 7, {}),
}
PACKED = {
    "packed": (17, 23, 21, 67, {}),
    "packed both ways": (17, 23, 21, 67, {"bidirectional": True}),
    "packed, few rows": (30, 2, 40, 257, {}),
}


def draw(name, shape, dtype=torch.float32):
    steps, batch, size, hidden, options = {**SHAPES, **PACKED}[shape]
    torch.manual_seed(seed_of(name + shape))
    module = layer_of(name, size, hidden, dtype=dtype, **options)
    x = torch.randn(steps, batch, size, dtype=dtype)
    states = [s.to(dtype) for s in states_of(module, batch)]
    if shape not in PACKED:
        return lambda: run(module, x, states)
    lengths = torch.randint(1, steps + 1, (batch,))
    lengths[0] = steps

    def packed():
        data, inits = leaf(x), [leaf(s) for s in states]
        sequence = pack_padded_sequence(data, lengths, enforce_sorted=False)
        output, ends = module(sequence, hx(inits))
        results = [output.data, *flat(ends)]
        leaves = [data, *inits, *module.parameters()]
        grads = torch.autograd.grad(results, leaves, cotangents(results))
        return [r.detach() for r in (*results, *grads)]

    return packed


@pytest.mark.parametrize("isa", _core.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("directions", [1, 2])
@layers
def test_one_step_of_a_few_rows(name, directions, dtype, isa):
    """A few rows use the weights where they lie (csrc/cpu/gemm.h, kFewRows), more a packed copy."""
    _core.set_isa(isa)
    torch.set_num_threads(1)
    for size, hidden in ((1, 3), (3, 5), (300, 33), (64, 128), (257, 16), (16, 65)):
        module = layer_of(name, size, hidden, bidirectional=directions == 2, dtype=dtype)
        x = torch.randn(1, 37, size, dtype=dtype)
        states = [s.to(dtype) for s in states_of(module, 37)]
        seeds = cotangents(run(module, x, states, weights=False)[: 2 + len(states) - 1])
        expected = run(module, x, states, seeds, weights=False)
        for rows in (1, 2, 3, 4, 5, 9):
            part = slice(30 - rows, 30)
            actual = run(
                module,
                x[:, part],
                [s[:, part] for s in states],
                [seed[:, part] for seed in seeds],
                weights=False,
            )
            same(actual, [e[:, part] for e in expected], f"I {size}, H {hidden}, {rows} rows")


@pytest.mark.parametrize("shape", [*SHAPES, *PACKED])
@layers
def test_threads(name, shape):
    call = draw(name, shape)
    torch.set_num_threads(1)
    expected = call()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        # Who takes which task is different every time; and where another process holds the cores,
        # the caller works alone for a tenth of a second, which would show nothing.
        until = time.monotonic() + 0.15
        while time.monotonic() < until:
            same(call(), expected, f"{threads} threads")


@layers
def test_threads_float64(name):
    call = draw(name, "few rows", torch.float64)
    torch.set_num_threads(1)
    expected = call()
    torch.set_num_threads(2)
    same(call(), expected)


def instruction_sets():
    """Pair the best instruction set with every other; a missing one is a skip that says so."""
    best, *others = _core.instruction_sets()
    pairs = [pytest.param(best, other, id=f"{other} against {best}") for other in others]
    for isa in ("avx2", "avx512"):
        if isa not in (best, *others):
            reason = f"this processor has no {isa}, only {', '.join(_core.instruction_sets())}"
            pairs.append(pytest.param(best, isa, id=isa, marks=pytest.mark.skip(reason=reason)))
    return pairs


@pytest.mark.parametrize(("best", "other"), instruction_sets())
@pytest.mark.parametrize("shape", ["few rows", "tiles both ways", "without bias", "packed"])
@layers
def test_instruction_sets(name, shape, best, other):
    # The portable set has no fused multiply-add but libm's, which is a hundred times slower.
    shape = "too small to share" if other == "portable" and shape != "packed" else shape
    call = draw(name, shape)
    _core.set_isa(best)
    expected = call()
    _core.set_isa(other)
    same(call(), expected)


@pytest.mark.parametrize(("best", "other"), instruction_sets())
@layers
def test_instruction_sets_float64(name, best, other):
    call = draw(name, "too small to share", torch.float64)
    _core.set_isa(best)
    expected = call()
    _core.set_isa(other)
    same(call(), expected)


@pytest.mark.parametrize(("best", "other"), instruction_sets())
@layers
def test_instruction_sets_on_numbers_of_every_size(name, best, other):
    """Saturated gates, subnormal numbers, infinities and NaN."""
    torch.manual_seed(seed_of(name))
    module = layer_of(name, 5, 19)
    x = torch.randn(6, 40, 5)
    for index, scale in enumerate(
        (1e-42, 1e-20, 1e-3, 10.0, 1e3, 1e20, float("inf"), float("nan"))
    ):
        x[:, 5 * index : 5 * index + 5] *= scale
    states = [s * 4 for s in states_of(module, 40)]
    found = []
    for isa in (best, other):
        _core.set_isa(isa)
        with torch.no_grad():
            output, ends = module(x, hx(states))
        # NaN is not equal to itself; its place must be.
        found.append([r.nan_to_num(77.0, 88.0, 99.0) for r in (output, *flat(ends))])
    same(*found)


def test_the_instruction_set_can_be_seen_and_must_exist():
    for isa in _core.instruction_sets():
        _core.set_isa(isa)
        assert _core.isa() == isa
    with pytest.raises(ValueError, match=rf"one of .*{INSTRUCTION_SETS[-1]}.*, got sse9"):
        _core.set_isa("sse9")


# ---- batch ----


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("hidden", [5, 129, 256])
@layers
def test_a_row_alone_against_its_row_of_37(name, hidden, bidirectional, threads):
    torch.set_num_threads(threads)
    module = layer_of(name, 33, hidden, bidirectional=bidirectional)
    x, states = torch.randn(6, 37, 33), states_of(module, 37)
    whole = run(module, x, states, weights=False)
    seeds = cotangents(whole[: 1 + len(states)])
    for row in (0, 1, 17, 36):
        part = [t[:, row : row + 1] for t in (x, *states, *seeds)]
        alone = run(module, part[0], part[1 : 1 + len(states)], part[1 + len(states) :], False)
        same(alone, [t[:, row : row + 1] for t in whole], f"row {row}")


@layers
def test_rows_commute_with_permutation(name):
    torch.set_num_threads(2)
    module = layer_of(name, 7, 67, num_layers=2)
    x, states, order = torch.randn(5, 37, 7), states_of(module, 37), torch.randperm(37)
    whole = run(module, x, states, weights=False)
    seeds = [seed[:, order] for seed in cotangents(whole[: 1 + len(states)])]
    moved = run(module, x[:, order], [s[:, order] for s in states], seeds, weights=False)
    same(moved, [t[:, order] for t in whole])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", FIRST_CELLS)
def test_cells(name, threads):
    """A row of a cell against the batch, and the steps of a cell against its layer."""
    torch.set_num_threads(threads)
    layer, cell = layer_of(name, 33, 257), cell_module(name, 33, 257)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    steps, batch = 5, 37
    x, states = torch.randn(steps, batch, 33), states_of(layer, batch)
    expected = run(layer, x, states, weights=False)
    seeds = cotangents(expected[: 1 + len(states)])

    def stepwise(x, states, seeds):
        x, states = leaf(x), [leaf(s) for s in states]
        now, outputs = [s[0] for s in states], []
        for step in x:
            now = flat(cell(step, hx(now)))
            outputs.append(now[0])
        results = [torch.stack(outputs), *[s[None] for s in now]]
        grads = torch.autograd.grad(results, [x, *states], seeds)
        return [r.detach() for r in (*results, *grads)]

    same(stepwise(x, states, seeds), expected)
    for row in (0, 36):
        x_row, *others = [t[:, row : row + 1] for t in (x, *states, *seeds)]
        alone = stepwise(x_row, others[: len(states)], others[len(states) :])
        same(alone, [t[:, row : row + 1] for t in expected], f"row {row}")


# ---- cuts ----


def chunked(module, x, states, seeds, length):
    """What `run` returns without the weights, the states being carried from chunk to chunk."""
    x, states = leaf(x), [leaf(s) for s in states]
    now, outputs = hx(states), []
    for chunk in x.split(length):
        output, now = module(chunk, now)
        outputs.append(output)
    results = [torch.cat(outputs), *flat(now)]
    grads = torch.autograd.grad(results, [x, *states], seeds)
    return [r.detach() for r in (*results, *grads)]


@pytest.mark.parametrize("shape", [(3, 257), (1, 256), (37, 33)])
@pytest.mark.parametrize("length", [1, 7, 64])
@layers
def test_one_run_against_chunks(name, length, shape):
    torch.set_num_threads(2)
    batch, hidden = shape
    module = layer_of(name, 13, hidden)
    x, states = torch.randn(100, batch, 13), states_of(module, batch)
    whole = run(module, x, states, weights=False)
    seeds = cotangents(whole[: 1 + len(states)])
    same(chunked(module, x, states, seeds, length), whole, f"chunks of {length}")


@layers
def test_one_run_against_chunks_of_two_layers(name):
    module = layer_of(name, 5, 19, num_layers=2, bias=False)
    x, states = torch.randn(23, 4, 5), states_of(module, 4)
    whole = run(module, x, states, weights=False)
    seeds = cotangents(whole[: 1 + len(states)])
    same(chunked(module, x, states, seeds, 7), whole)


@layers
def test_rows_past_the_engines_own_chunks(name):
    """A call of more rows than the engine keeps at once is cut by the engine itself."""
    # 2 MiB of gates at a time (csrc/cpu/sequence.h, chunk_rows) hold fewer than these.
    torch.set_num_threads(2)
    module = layer_of(name, 3, 160, bidirectional=True)
    x, states = torch.randn(260, 17, 3), states_of(module, 17)
    whole = run(module, x, states, weights=False)
    seeds = cotangents(whole[: 1 + len(states)])
    part = [t[:, 5:6] for t in (x, *states, *seeds)]
    alone = run(module, part[0], part[1 : 1 + len(states)], part[1 + len(states) :], False)
    same(alone, [t[:, 5:6] for t in whole])


# ---- packing ----


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@layers
def test_packed_of_equal_lengths_against_padded(name, bidirectional, threads):
    torch.set_num_threads(threads)
    module = layer_of(name, 11, 131, bidirectional=bidirectional)
    x, states = torch.randn(9, 5, 11), states_of(module, 5)
    padded = run(module, x, states)
    data, inits = leaf(x), [leaf(s) for s in states]
    sequence = pack_padded_sequence(data, torch.full((5,), 9))
    output, ends = module(sequence, hx(inits))
    results = [pad_packed_sequence(output)[0], *flat(ends)]
    leaves = [data, *inits, *module.parameters()]
    grads = torch.autograd.grad(results, leaves, cotangents(results))
    same([*results, *grads], padded)


class Packed:
    """A layer whose one step is packed: the engine does not cut that into pieces."""

    def __init__(self, module):
        self.module, self.parameters = module, module.parameters

    def __call__(self, x, hx):
        rows = PackedSequence(x[0], torch.tensor([x.shape[1]], device="cpu"))
        output, ends = self.module(rows, hx)
        return output.data[None], ends


# Rows and units that run in pieces (csrc/cpu/dispatch.cpp, run_rows): in backward several and a
# rest, in forward side by side, and one row more than these can share evenly.
PIECES = [(16_501, 16), (3_500, 48), (257, 24)]


@pytest.mark.parametrize(
    ("dtype", "memory"),
    [
        (torch.float32, "keep"),
        (torch.float32, "recompute"),
        (torch.float64, "keep"),
        (torch.bfloat16, "keep"),
    ],
)
@pytest.mark.parametrize(("batch", "hidden"), PIECES)
@layers
def test_one_step_in_pieces_against_one_piece(name, batch, hidden, dtype, memory):
    torch.manual_seed(seed_of(f"{name} {batch} {hidden}"))
    module = layer_of(name, 7, hidden, memory=memory, dtype=dtype)
    x = torch.randn(1, batch, 7, dtype=dtype)
    states = [state.to(dtype) for state in states_of(module, batch)]
    torch.set_num_threads(1)
    expected = run(Packed(module), x, states)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        same(run(module, x, states), expected, f"{threads} threads")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@layers
def test_rows_of_a_ragged_batch_against_each_alone(name, bidirectional, threads):
    torch.set_num_threads(threads)
    module = layer_of(name, 11, 131, bidirectional=bidirectional)
    lengths = torch.tensor([3, 9, 1, 9, 5, 2, 8])
    x, states = torch.randn(9, 7, 11), states_of(module, 7)
    data, inits = leaf(x), [leaf(s) for s in states]
    output, ends = module(pack_padded_sequence(data, lengths, enforce_sorted=False), hx(inits))
    results = [pad_packed_sequence(output)[0], *flat(ends)]
    seeds = cotangents(results)
    grads = torch.autograd.grad(results, [data, *inits], seeds)
    whole = [r.detach() for r in (*results, *grads)]
    for row, length in enumerate(lengths):
        x_row, *others = [t[:, row : row + 1] for t in (x, *states, *seeds)]
        seeds_row = others[len(states) :]
        seeds_row[0] = seeds_row[0][:length]
        alone = run(module, x_row[:length], others[: len(states)], seeds_row, weights=False)
        expected = [t[:, row : row + 1] for t in whole]
        expected[0] = expected[0][:length]
        expected[len(results)] = expected[len(results)][:length]
        same(alone, expected, f"row {row} of {length} steps")


@layers
def test_a_padded_batch_whose_padding_has_no_gradient(name):
    """Forward in time, packing only leaves out what nobody reads."""
    module = layer_of(name, 6, 33)
    lengths = torch.tensor([8, 6, 6, 1])
    x, states = torch.randn(8, 4, 6), states_of(module, 4)
    mask = (torch.arange(8)[:, None] < lengths)[..., None]
    output, _ = module(x, hx(states))
    seed = cotangents([output])[0] * mask
    found = []
    for packed in (False, True):
        data, inits = leaf(x), [leaf(s) for s in states]
        if packed:
            sequence = pack_padded_sequence(data, lengths)
            output = pad_packed_sequence(module(sequence, hx(inits))[0], total_length=8)[0]
        else:
            output = module(data, hx(inits))[0] * mask
        found.append([output, *torch.autograd.grad(output, [data, *inits], seed)])
    same(*found)
