"""The fast path (csrc/tensors.cpp, `fast_path.run`): what it takes, and what it declines.

Legend: T steps, B batch, I input, H hidden.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from ostinato import cpu, fast_path, nn
from support.cells import FIRST_CELLS, RECORDS, has_c
from support.pairs import cell_module
from support.samples import SAMPLES, draw, gradients

pytestmark = pytest.mark.skipif(
    not cpu.IS_OPEN, reason="this torch has no table of C functions for its tensors"
)

cells = pytest.mark.parametrize("kind", FIRST_CELLS)


def same(actual, expected):
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"result {index}: {a} is not {e}"


def call(cell="lstm", weight=None, **changes):
    """Call `fast_path.run` for two rows of I 3 and H 4; `weight` is (index, another weight)."""
    gates = RECORDS[cell].gates if cell in RECORDS else 1
    arguments = {
        "cell": cell,
        "shape": (3, 4, 0, 1),
        "input": torch.randn(5, 2, 3),
        "batch_sizes": None,
        "h_0": torch.randn(1, 2, 4),
        "c_0": torch.randn(1, 2, 4) if cell in RECORDS and has_c(cell) else None,
        "weights": (*(torch.randn(gates * 4, size) for size in (3, 4)), *torch.randn(2, gates * 4)),
        "has_biases": True,
    }
    if weight is not None:
        index, other = weight
        before = arguments["weights"]
        arguments["weights"] = (*before[:index], other, *before[index + 1 :])
    return fast_path.run(**{**arguments, **changes})


def test_it_takes_what_is_plain():
    assert all(result is not None for result in call())
    assert call("gru")[2] is None
    assert call(h_0=None, c_0=None) is not None


class Subclass(torch.Tensor):
    pass


def fake():
    with FakeTensorMode():
        return torch.randn(5, 2, 3)


DECLINED = {
    "no tensor": {"input": [[1.0]]},
    "None": {"input": None},
    "integers": {"input": torch.ones(5, 2, 3, dtype=torch.int64)},
    "half": {"input": torch.randn(5, 2, 3).half()},
    "complex": {"input": torch.randn(5, 2, 3, dtype=torch.complex64)},
    "double among floats": {"h_0": torch.randn(1, 2, 4).double()},
    "float among doubles": {"input": torch.randn(5, 2, 3).double()},
    "meta": {"input": torch.randn(5, 2, 3, device="meta")},
    "fake": {"input": fake()},
    "sparse": {"input": torch.randn(5, 2, 3).to_sparse()},
    "mkldnn": {"h_0": torch.randn(1, 2, 4).to_mkldnn()},
    "subclass": {"input": torch.randn(5, 2, 3).as_subclass(Subclass)},
    "lazy sign": {"c_0": torch._neg_view(torch.randn(1, 2, 4))},
    "lazy zeros": {"input": torch._efficientzerotensor((5, 2, 3))},
    "wrapped": {"input": torch._to_functional_tensor(torch.randn(5, 2, 3))},
    "1D": {"input": torch.randn(3)},
    "4D": {"input": torch.randn(1, 5, 2, 3)},
    "2D without batch_sizes": {"input": torch.randn(5, 3)},
    "input size": {"input": torch.randn(5, 2, 4)},
    "no steps": {"input": torch.randn(0, 2, 3)},
    "no rows": {"input": torch.randn(5, 0, 3), "h_0": None, "c_0": None},
    "batch of h_0": {"h_0": torch.randn(1, 3, 4)},
    "size of c_0": {"c_0": torch.randn(1, 2, 5)},
    "dimensions of h_0": {"h_0": torch.randn(2, 4)},
    "c_0 of a GRU": {"cell": "gru", "c_0": torch.randn(1, 2, 4)},
    "cell": {"cell": "rnn_sine"},
    "hidden size": {"shape": (3, 5, 0, 1)},
    "no hidden size": {"shape": (3, 0, 0, 1)},
    "directions": {"shape": (3, 4, 0, 2)},
    "three directions": {"shape": (3, 4, 0, 3)},
    "projection": {"shape": (3, 4, 2, 1)},
    "no weight": {"weight": (0, None)},
    "number of weights": {"has_biases": False},
    "shape of a weight": {"weight": (1, torch.randn(16, 5))},
    "transposed weight": {"weight": (0, torch.randn(3, 16).t())},
    "dtype of a bias": {"weight": (2, torch.randn(16).double())},
    "shape of a bias": {"weight": (3, torch.randn(15))},
    "a cell's input": {"is_step": True},
    "batch_sizes of padded input": {"batch_sizes": torch.tensor([2] * 5)},
}
LENGTHS, RESETS, STATE = torch.tensor([5, 0]), torch.zeros(5, 2) > 0, torch.randn(1, 2, 4)
# lengths, resets, reset_h and reset_c
DECLINED |= {
    f"cuts: {what}": {"cuts": cuts}
    for what, cuts in {
        "too few": (LENGTHS, RESETS, None),
        "lengths past the steps": (torch.tensor([5, 6]), None, None, None),
        "lengths below 0": (torch.tensor([-1, 5]), None, None, None),
        "lengths of three rows": (torch.tensor([5, 5, 5]), None, None, None),
        "lengths 2D": (LENGTHS[None], None, None, None),
        "lengths int32": (LENGTHS.int(), None, None, None),
        "lengths float": (LENGTHS.double(), None, None, None),
        "lengths list": ([5, 0], None, None, None),
        "lengths meta": (LENGTHS.to("meta"), None, None, None),
        "resets of a step": (None, RESETS[0], None, None),
        "resets of three rows": (None, torch.zeros(5, 3) > 0, None, None),
        "resets 3D": (None, RESETS[None], None, None),
        "resets of bytes": (None, RESETS.to(torch.uint8), None, None),
        "a list of resets": (None, [[False] * 2] * 5, None, None),
        "reset_h without resets": (LENGTHS, None, STATE, None),
        "reset_c without resets": (LENGTHS, None, None, STATE),
        "shape of reset_h": (None, RESETS, STATE[0], None),
        "dtype of reset_c": (None, RESETS, None, STATE.double()),
    }.items()
}
DECLINED |= {
    "reset_c of a GRU": {"cell": "gru", "c_0": None, "cuts": (None, RESETS, None, STATE)},
    "cuts: a cell's": {"input": torch.randn(2, 3), "h_0": None, "c_0": None, "is_step": True}
    | {"cuts": (LENGTHS, None, None, None)},
    "cuts: lengths of packed input": {"input": torch.randn(6, 3), "h_0": None, "c_0": None}
    | {"batch_sizes": torch.tensor([2] * 3), "cuts": (torch.tensor([3, 3]), None, None, None)},
}


def test_it_takes_cuts():
    for cuts in (
        (LENGTHS, None, None, None),
        (None, RESETS, STATE, None),
        (LENGTHS, RESETS.t().contiguous().t(), STATE[:, :1].expand(1, 2, 4), STATE),
        (None, None, None, None),
    ):
        assert call(cuts=cuts) is not None
    states = {"h_0": None, "c_0": None, "batch_sizes": torch.tensor([2] * 3)}
    assert call(input=torch.randn(6, 3), **states, cuts=(None, RESETS[:3].flatten(), None, None))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", DECLINED)
def test_it_declines_and_says_nothing(case, training):
    changes = dict(DECLINED[case])
    if training and "h_0" not in changes:
        changes["h_0"] = torch.randn(1, 2, 4, requires_grad=True)
    assert call(**changes) is None


PACKED = torch.randn(6, 3)


@pytest.mark.parametrize(
    "sizes",
    [
        [2, 2, 1],
        [1, 2, 3],
        [3, 2, 2],
        [7, -1],
        [0, 6],
        [6.0],
        [],
        [[6]],
        torch.tensor([6], dtype=torch.int32),
        [3, 3],
    ],
)
def test_it_declines_wrong_batch_sizes(sizes):
    assert call(input=PACKED, batch_sizes=torch.tensor([2, 2, 2])) is not None
    assert call(input=PACKED, batch_sizes=torch.tensor([3, 2, 1]), h_0=None, c_0=None) is not None
    assert call(input=PACKED, batch_sizes=torch.as_tensor(sizes)) is None
    assert call(input=PACKED, batch_sizes=list(sizes)) is None


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_it_steps_aside_where_somebody_looks_on(monkeypatch):
    def refuse(*_):
        pytest.fail("the fast path was taken")

    monkeypatch.setattr(cpu._core, "tensors_forward", refuse)
    with pytest.raises(pytest.fail.Exception):
        call()
    with Mode():
        assert call() is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call() is None
    with forward_ad.dual_level():
        assert call() is None

    def transformed(x):
        assert call() is None
        return x

    torch.func.vmap(transformed, randomness="same")(torch.ones(2))
    torch.func.grad(transformed)(torch.ones(()))


@pytest.mark.parametrize("kind", SAMPLES)
def test_without_it_the_bits_are_the_same(kind, monkeypatch):
    # As with a torch that is older than 2.10.
    sample = draw(**SAMPLES[kind]).training()
    results = sample.run()
    seeds = [torch.randn_like(result) for result in results]
    expected = [*results, *gradients(results, sample.leaves(), seeds)]
    monkeypatch.setattr(cpu, "IS_OPEN", False)
    results = sample.run()
    same([*results, *gradients(results, sample.leaves(), seeds)], expected)


CUT_LAYERS = [
    (nn.GRU, {}),
    (nn.LSTM, {"bidirectional": True, "batch_first": True}),
    (nn.LSTM, {"num_layers": 2, "proj_size": 2}),
    (nn.RNN, {"num_layers": 3, "bidirectional": True, "bias": False}),
]


def cut_layer(kind, options, dtype=torch.float32):
    """Return a layer, its input, states and states of resets as leaves, and where to cut."""
    layer = kind(3, 4, dtype=dtype, **options)
    rows = layer.num_layers * (1 + layer.bidirectional)
    widths = [layer.proj_size or 4, 4][: 1 + (kind is nn.LSTM)]
    x = torch.randn(3, 5, 3) if layer.batch_first else torch.randn(5, 3, 3)
    leaves = [x, *(torch.randn(rows, 3, width) for width in widths * 2)]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    return layer, leaves, {"lengths": [5, 0, 3], "resets": torch.rand(x.shape[:2]) < 0.4}


def run_cut(layer, leaves, cuts):
    """Return output and last states."""
    x, *states = leaves
    count = len(states) // 2
    hx, reset_to = (s[0] if count == 1 else s for s in (states[:count], states[count:]))
    if "resets" in cuts:
        cuts = cuts | {"reset_to": reset_to}
    output, last = layer(x, hx, **cuts)
    return [output, *outputs(last)]


@pytest.mark.parametrize(("kind", "options"), CUT_LAYERS)
@pytest.mark.parametrize("without", ["nothing", "lengths", "resets"])
def test_without_it_cut_rows_and_stacks_have_the_same_bits(kind, options, without, monkeypatch):
    layer, leaves, cuts = cut_layer(kind, options)
    cuts.pop(without, None)
    every, found = [*leaves, *layer.parameters()], []
    for is_open in (True, False):
        monkeypatch.setattr(cpu, "IS_OPEN", is_open)
        results = run_cut(layer, leaves, cuts)
        seeds = [torch.full_like(result, 0.5) for result in results]
        found.append([*results, *gradients(results, every, seeds)])
        with torch.no_grad():
            found[-1] += run_cut(layer, leaves, cuts)
    same(*found)


@pytest.mark.parametrize(("kind", "options"), CUT_LAYERS)
def test_cut_rows_and_stacks_take_it(kind, options, monkeypatch):
    layer, leaves, cuts = cut_layer(kind, options)
    counted, forward = [], cpu._core.tensors_forward
    monkeypatch.setattr(
        cpu._core, "tensors_forward", lambda *a: counted.append(forward(*a)) or counted[-1]
    )
    monkeypatch.setattr(cpu._core, "forward", lambda *_: pytest.fail("it declined"))
    run_cut(layer, leaves, cuts)
    assert len(counted) == layer.num_layers
    assert None not in counted


@pytest.mark.parametrize(("kind", "options"), CUT_LAYERS)
def test_gradgradcheck_of_cut_rows(kind, options):
    layer, leaves, cuts = cut_layer(kind, options, torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda *leaves: tuple(run_cut(layer, leaves, cuts)), leaves, fast_mode=True
    )


@pytest.mark.parametrize("wrong", ["layers", "batch", "dims"])
def test_a_stack_with_wrong_states_is_refused_as_ever(wrong):
    layer = nn.GRU(3, 4, num_layers=2)
    shape = {"layers": (4, 2, 4), "batch": (2, 3, 4), "dims": (4, 4)}[wrong]
    with pytest.raises(RuntimeError, match=r"hidden size|hx should"):
        layer(torch.randn(5, 2, 3), torch.randn(shape))


def test_a_stack_whose_later_layer_declines_runs_on_the_route():
    layer, x = nn.GRU(3, 4, num_layers=2), torch.randn(5, 2, 3)
    expected = layer(x)
    dense = layer.weight_hh_l1.detach()
    layer.weight_hh_l1 = torch.nn.Parameter(dense.t().contiguous().t())
    same(layer(x), expected)


def cell_call(kind, batch=None, training=True):
    """Return a cell, its input and state, which are leaves."""
    cell, lead = cell_module(kind, 3, 4), () if batch is None else (batch,)
    x, h, c = (torch.randn(*lead, size, requires_grad=training) for size in (3, 4, 4))
    return cell, x, ((h, c) if has_c(kind) else h)


def outputs(result):
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("batch", [None, 1, 3])
@cells
def test_without_it_a_cell_gives_the_same_bits(kind, batch, monkeypatch):
    cell, x, hx = cell_call(kind, batch)
    leaves = [x, *outputs(hx), *cell.parameters()]
    found = []
    for is_open in (True, False):
        monkeypatch.setattr(cpu, "IS_OPEN", is_open)
        results = outputs(cell(x, hx))
        seeds = [torch.ones_like(result) for result in results]
        found.append([*results, *torch.autograd.grad(results, leaves, seeds)])
    same(*found)


@cells
def test_a_cell_s_state_may_change_in_place(kind):
    """As torch's cells allow it before backward; RNNCell's reads its output in torch too."""
    cell, x, hx = cell_call(kind, 2)
    first, *rest = outputs(cell(x, hx))
    expected = torch.autograd.grad([first, *rest], x, [torch.ones_like(first)] * (1 + len(rest)))
    first, *rest = outputs(cell(x, hx))
    first.mul_(1)
    values = [first, *rest], x, [torch.ones_like(first)] * (1 + len(rest))
    if kind == "rnn_tanh":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(*values)
    else:
        same(torch.autograd.grad(*values), expected)


def test_results_are_tensors_of_their_own():
    layer, x = nn.GRU(3, 4, batch_first=True), torch.randn(2, 5, 3)
    x.requires_grad_()
    h_0 = torch.nn.Parameter(torch.randn(1, 2, 4))
    output, h_n = layer(x, h_0)
    assert type(h_n) is torch.Tensor
    assert h_n.is_contiguous()
    (grad,) = torch.autograd.grad(output.sum(), x)
    assert grad.shape == x.shape
    with torch.no_grad():
        output, _ = layer(x, h_0)
    assert not output.requires_grad
    output.resize_(100, 100)


@pytest.mark.parametrize("wrong", ["shape", "dtype"])
def test_what_hooks_of_saved_tensors_return_is_checked_again(wrong):
    def unpack(t):
        if t.dim() != 3:
            return t
        return t[..., :1] if wrong == "shape" else t.half()

    layer = nn.GRU(3, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        output, _ = layer(torch.randn(5, 2, 3))
    with pytest.raises((RuntimeError, ValueError)):
        output.sum().backward()


# ---- gradients beyond the engine ----


@cells
def test_batched_gradients_of_a_cell(kind):
    cell, x, hx = cell_call(kind, 2)

    def function(x, *states):
        return outputs(cell(x, tuple(states) if len(states) == 2 else states[0]))[0]

    inputs = (x, *outputs(hx))
    loops = torch.autograd.functional.jacobian(function, inputs)
    vectorized = torch.autograd.functional.jacobian(function, inputs, vectorize=True)
    for a, e in zip(vectorized, loops, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("way", ["fast", "operator"])
@pytest.mark.parametrize("kind", [*FIRST_CELLS, "packed both ways", "projected"])
def test_batched_gradients_of_a_layer(kind, way, monkeypatch):
    monkeypatch.setattr(cpu, "IS_OPEN", way == "fast")
    sample = draw(**SAMPLES[kind], dtype=torch.float64).training()
    output = sample.run()[0]
    seeds = torch.randn(3, *output.shape, dtype=torch.float64)
    batched = torch.autograd.grad(
        output, sample.leaves(), seeds, is_grads_batched=True, retain_graph=True
    )
    for index, seed in enumerate(seeds):
        expected = torch.autograd.grad(output, sample.leaves(), seed, retain_graph=True)
        torch.testing.assert_close([grad[index] for grad in batched], list(expected))


@pytest.mark.parametrize("way", ["fast", "operator"])
def test_second_derivatives_where_there_are_no_steps(way, monkeypatch):
    monkeypatch.setattr(cpu, "IS_OPEN", way == "fast")
    for h_0 in (None, torch.randn(1, 2, 4, requires_grad=True)):
        layer, x = nn.GRU(3, 4), torch.randn(0, 2, 3, requires_grad=True)
        output, h_n = layer(x, h_0)
        (grad,) = torch.autograd.grad(
            output.sum() + h_n.square().sum(), x, create_graph=True, materialize_grads=True
        )
        assert grad.shape == x.shape
        if h_0 is not None:
            output, h_n = layer(x, h_0)
            (grad,) = torch.autograd.grad(h_n.square().sum(), h_0, create_graph=True)
            (grad,) = torch.autograd.grad(grad.sum(), h_0)
            torch.testing.assert_close(grad, torch.full_like(h_0, 2))


@pytest.mark.parametrize("way", ["fast", "operator"])
def test_the_last_derivative_asks_for_no_further_one(way, monkeypatch):
    monkeypatch.setattr(cpu, "IS_OPEN", way == "fast")
    sample = draw("gru").training()
    first = torch.autograd.grad(sample.run()[0].square().sum(), sample.input, create_graph=True)
    (second,) = torch.autograd.grad(first[0].square().sum(), sample.input)
    assert first[0].requires_grad
    assert not second.requires_grad


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "packed both ways", "projected"])
def test_gradgradcheck_through_the_operator(kind, monkeypatch):
    monkeypatch.setattr(cpu, "IS_OPEN", False)
    sample = draw(**SAMPLES[kind], dtype=torch.float64).training()

    def function(*leaves):
        return tuple(sample.replaced(leaves).run())

    assert torch.autograd.gradgradcheck(function, sample.leaves(), fast_mode=True)


@cells
def test_gradgradcheck_of_a_cell(kind):
    cell, x, hx = cell_call(kind, 2)
    cell, x, hx = cell.double(), x.detach().double(), [t.detach().double() for t in outputs(hx)]
    inputs = [t.requires_grad_() for t in (x, *hx)]

    def function(x, *states):
        return tuple(outputs(cell(x, tuple(states) if len(states) == 2 else states[0])))

    assert torch.autograd.gradgradcheck(function, inputs)


def test_only_what_projects_is_projected():
    for cell, record in RECORDS.items():
        rows = record.gates * 4
        weights = *(torch.randn(rows, n) for n in (3, 2)), *torch.randn(2, rows), torch.randn(2, 4)
        found = fast_path.run(
            cell, (3, 4, 2, 1), torch.randn(5, 2, 3), None, None, None, weights, has_biases=True
        )
        assert (found is not None) == record.projects, cell
