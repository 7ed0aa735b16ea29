"""Layers of own cells: beside the built-in layers, and beside a Python loop over their steps.

Legend: T steps, B batch, I input, H hidden, L layers, D directions.
"""

import copy
import pickle

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import ostinato
from ostinato import nn
from support import own
from support.pairs import flat

LENGTHS = (3, 7, 1, 5)
KINDS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bidirectional": True},
    {"num_layers": 2, "bias": False},
    {"memory": "recompute"},
]
cells = pytest.mark.parametrize("cell", **own.names(own.CELLS))
traced = pytest.mark.parametrize("cell", **own.names(own.TRACED))
built_in = pytest.mark.parametrize("cell", **own.names(tuple(own.BUILT_IN)))


def layer_of(cell, *sizes, seed=0, **options):
    torch.manual_seed(seed)
    return nn.Recurrent(cell, *(sizes or (4, 6)), **options)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def given(module, cell, steps=7, batch=4, hidden=6, dtype=torch.float32):
    """Input, initial states and drives for a layer of four features and six units."""
    torch.manual_seed(1)
    front = (batch, steps) if module.batch_first else (steps, batch)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    drives = own.drives_of(cell, *front, hidden=hidden, dtype=dtype)
    x = torch.randn(*front, module.input_size, dtype=dtype)
    return x, own.states_of(cell, rows, batch, hidden, dtype=dtype), drives


def step_by_step(module, cell, x, hx, drives):
    """A loop over `step` itself, on plain operators: padded input, all rows whole."""
    if module.batch_first:
        x = x.transpose(0, 1)
        drives = None if drives is None else drives.transpose(0, 1)
    first = hx if isinstance(hx, tuple) else (hx,)
    ways = ("", "_reverse") if module.bidirectional else ("",)
    last = []
    for k in range(module.num_layers):
        outputs = []
        for d, way in enumerate(ways):
            row = k * len(ways) + d
            states = [state[row] for state in first]
            weights = {
                name: getattr(module, f"{name}_l{k}{way}", None)
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            step = getattr(module, f"cell_l{k}{way}").step
            found = {}
            order = reversed(range(len(x))) if way else range(len(x))
            for t in order:
                gates_x = torch.nn.functional.linear(x[t], weights["weight_ih"], weights["bias_ih"])
                gates_x = gates_x.chunk(cell.x_gates, -1)
                gates_h = ()
                if cell.h_gates:
                    product = torch.nn.functional.linear(
                        states[0], weights["weight_hh"], weights["bias_hh"]
                    )
                    gates_h = product.chunk(cell.h_gates, -1)
                taken = [gates_x, gates_h, tuple(states) if cell.states > 1 else states[0]]
                if cell.drives:
                    taken.append(drives[t].chunk(cell.drives, -1))
                new = step(*taken)
                states = list(new) if cell.states > 1 else [new]
                found[t] = states[0]
            outputs.append(torch.stack([found[t] for t in range(len(x))]))
            last.append(states)
        x = torch.cat(outputs, -1)
    last = [torch.stack(each) for each in zip(*last, strict=True)]
    return x.transpose(0, 1) if module.batch_first else x, last


def differentiated(results, leaves):
    generator = torch.Generator().manual_seed(2)
    seeds = [torch.randn(r.shape, generator=generator, dtype=r.dtype) for r in results]
    return torch.autograd.grad(results, leaves, seeds, materialize_grads=True, allow_unused=True)


def leaves_of(module, *arguments):
    tensors = [t for t in flat([a for a in arguments if a is not None]) if t.requires_grad]
    return [*tensors, *module.parameters()]


# ---- beside the built-in layers ----


@pytest.mark.parametrize("cuts", ["none", "packed", "lengths", "resets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", KINDS, ids=str)
@built_in
def test_a_built_in_cell_written_as_a_step_has_its_numbers(cell, options, dtype, cuts):
    # Four roundings, of each element beside the largest.
    bound = 4 * torch.finfo(dtype).eps
    ours = layer_of(cell, dtype=dtype, **options)
    built = own.BUILT_IN[cell](4, 6, dtype=dtype, **options)
    built.load_state_dict(ours.state_dict())
    x, hx, _ = given(ours, cell, dtype=dtype)
    named = {}
    if cuts == "packed":
        first = options.get("batch_first", False)
        x = pack_padded_sequence(x, LENGTHS, batch_first=first, enforce_sorted=False)
    elif cuts == "lengths":
        named = {"lengths": LENGTHS}
    elif cuts == "resets":
        named = {"resets": torch.rand(x.shape[:2]) < 0.3, "return_all_states": True}
        named["reset_to"] = hx
    found = []
    for module in (ours, built):
        data = x.data if cuts == "packed" else x
        data, states = leaf(data), [leaf(s) for s in flat([hx])]
        taken = tuple(states) if len(states) > 1 else states[0]
        if cuts == "resets":
            named["reset_to"] = taken
        inputs = PackedSequence(data, *x[1:]) if cuts == "packed" else data
        results = flat(module(inputs, taken, **named))
        found.append([*results, *differentiated(results, leaves_of(module, data, states))])
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).abs().max() <= bound * theirs.abs().max()


@built_in
def test_weights_and_names_are_those_of_the_built_in_layer(cell):
    options = {"num_layers": 2, "bidirectional": True}
    ours, theirs = layer_of(cell, **options), own.BUILT_IN[cell](4, 6, **options)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [
        (n, p.shape) for n, p in theirs.named_parameters()
    ]


# ---- beside the step itself ----


@pytest.mark.parametrize("options", KINDS, ids=str)
@cells
def test_a_layer_is_a_loop_over_its_step(cell, options):
    module = layer_of(cell, dtype=torch.float64, **options)
    x, hx, drives = given(module, cell, dtype=torch.float64)
    x, hx = leaf(x), (tuple(map(leaf, hx)) if isinstance(hx, tuple) else leaf(hx))
    drives = None if drives is None else leaf(drives)
    leaves = leaves_of(module, x, hx, drives)
    results = flat(module(x, hx, drives=drives))
    expected = flat(step_by_step(module, cell, x, hx, drives))
    torch.testing.assert_close(results, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        differentiated(results, leaves), differentiated(expected, leaves), rtol=1e-10, atol=1e-11
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 16), (1, 3, 33), (5, 40, 70), (3, 2, 100)], ids=str)
@traced
def test_odd_sizes_are_those_of_float64(cell, sizes, dtype):
    steps, batch, hidden = sizes
    module = layer_of(cell, 3, hidden, dtype=dtype)
    exact = layer_of(cell, 3, hidden, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    x, hx, drives = given(module, cell, steps, batch, hidden, dtype)
    found = []
    for layer, kind in ((module, dtype), (exact, torch.float64)):
        data = x.to(kind).requires_grad_()
        moved = None if drives is None else drives.to(kind).requires_grad_()
        states = tuple(h.to(kind) for h in hx) if isinstance(hx, tuple) else hx.to(kind)
        results = flat(layer(data, states, drives=moved))
        grads = differentiated([r.double() for r in results], leaves_of(layer, data, moved))
        found.append([t.double() for t in (*results, *grads)])
    bound = 1e-4 if dtype == torch.float32 else 64 * torch.finfo(dtype).eps
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).abs().max() <= bound * (theirs.abs().max() + 1)


@cells
def test_one_step_is_a_layer_of_one_step(cell):
    torch.manual_seed(0)
    one = nn.RecurrentCell(cell, 4, 6, dtype=torch.float64)
    layer = nn.Recurrent(cell, 4, 6, dtype=torch.float64)
    renamed = {
        (f"cell_l0{name[4:]}" if name.startswith("cell") else f"{name}_l0"): value
        for name, value in one.state_dict().items()
    }
    layer.load_state_dict(renamed)
    x, hx, drives = given(layer, cell, steps=1, dtype=torch.float64)
    h = tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0]
    mine = flat([one(x[0], h, None if drives is None else drives[0])])
    _, last = layer(x, hx, drives=drives)
    theirs = flat([last])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b[0], rtol=1e-12, atol=1e-13)
    row = tuple(s[0] for s in h) if isinstance(h, tuple) else h[0]
    alone = flat([one(x[0, 0], row, None if drives is None else drives[0, 0])])
    for a, b in zip(alone, mine, strict=True):
        torch.testing.assert_close(a, b[0], rtol=1e-12, atol=1e-13)


# ---- rows that are cut ----


@cells
def test_lengths_resets_and_packing_are_pieces(cell):
    module = layer_of(cell, dtype=torch.float64)
    x, hx, drives = given(module, cell, dtype=torch.float64)
    output, last = module(x, hx, lengths=LENGTHS, drives=drives)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    driven = None if drives is None else pack_padded_sequence(drives, LENGTHS, enforce_sorted=False)
    in_packed, last_of_packed = module(packed, hx, drives=driven)
    rows, _ = torch.nn.utils.rnn.pad_packed_sequence(in_packed, total_length=7)
    # Bits are promised of the engine.
    exact = {"rtol": 0, "atol": 0} if cell.engine else {}
    torch.testing.assert_close(output, rows, **exact)
    torch.testing.assert_close(flat([last]), flat([last_of_packed]), **exact)
    resets = torch.zeros(7, 4, dtype=torch.bool)
    resets[3, 1] = True
    cut, _, every = module(x, hx, resets=resets, reset_to=hx, return_all_states=True, drives=drives)
    anew, _ = module(x[3:, 1:2], _row(hx, 1), drives=None if drives is None else drives[3:, 1:2])
    torch.testing.assert_close(cut[3:, 1:2], anew, **exact)
    assert torch.equal(flat([every])[0][0], cut)


def _row(hx, b):
    return tuple(h[:, b : b + 1] for h in hx) if isinstance(hx, tuple) else hx[:, b : b + 1]


# ---- numbers that are none ----


class Odd(nn.Cell):
    """Divides, takes logarithms and roots of what may be 0, negative or huge."""

    x_gates = 3
    h_gates = 1

    def step(self, x, h, state):
        divided = x[0] / state
        rooted = torch.sqrt(x[1]) + torch.log(x[2]) + torch.exp(x[1])
        return torch.where(x[0] > 0, divided, rooted) + 0 * h[0]


class Ignores(nn.Cell):
    def step(self, x, h, state):
        return torch.tanh(x[0])


class Returns(nn.Cell):
    def step(self, x, h, state):
        return state


class Constant(nn.Cell):
    def step(self, x, h, state):
        return torch.full_like(state, 0.25)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e38, -1e38, float("inf"), float("nan")])
@pytest.mark.parametrize("cell", [Odd, Ignores, Returns, Constant])
def test_odd_steps_and_numbers_give_what_the_step_gives(cell, value):
    module = layer_of(cell, 4, 20)
    x, hx, _ = given(module, cell, hidden=20)
    x[2, 1] = value
    hx[0, 2] = value
    results = flat(module(x, hx))
    expected = flat(step_by_step(module, cell, x, hx, None))
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    x = x.requires_grad_()
    differentiated(flat(module(x, hx)), [x, *module.parameters()])  # does not crash


# ---- a module like torch's ----


@cells
def test_a_layer_is_copied_and_pickled(cell):
    module = layer_of(cell, num_layers=2)
    x, hx, drives = given(module, cell)
    expected = module(x, hx, drives=drives)
    copied = copy.deepcopy(module)
    again = pickle.loads(pickle.dumps(module))
    del module
    for other in (copied, again):
        assert all(map(torch.equal, flat(other(x, hx, drives=drives)), flat(expected)))


@traced
def test_the_engine_runs_it_and_explain_says_so(cell):
    module = layer_of(cell)
    x, _, _ = given(module, cell)
    text = ostinato.explain(module, x)
    assert text.splitlines()[-1] in ("fast path: runs it", "CPU engine: runs it")
    one = nn.RecurrentCell(cell, 4, 6)
    assert "runs it" in ostinato.explain(one, x[0])


def test_an_untraced_cell_runs_on_the_reference():
    module = layer_of(own.Untraced)
    text = ostinato.explain(module, torch.zeros(2, 1, 4))
    assert "this cell asks for the reference" in text
    assert text.splitlines()[-1] == "reference: runs it"


def test_autocast_computes_in_the_dtype_of_the_weights():
    module = layer_of(own.Everything)
    x, hx, drives = given(module, own.Everything)
    expected = flat(module(x, hx, drives=drives))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, flat(module(x, hx, drives=drives)), expected))


# ---- what is refused ----


class Wide(nn.Cell):
    x_gates = 9

    def step(self, x, h, state):
        return x[0]


class NoGates(nn.Cell):
    x_gates = 0

    def step(self, x, h, state):
        return state


class BadParameter(nn.Cell):
    def __init__(self, hidden_size, **factory):
        super().__init__(hidden_size)
        self.weight = torch.nn.Parameter(torch.ones(3))

    def step(self, x, h, state):
        return x[0] + self.weight


class NoStep(nn.Cell):
    pass


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        (Wide, ValueError, "Wide.x_gates must be 1 to 8, got 9"),
        (NoGates, ValueError, "NoGates.x_gates must be 1 to 8, got 0"),
        (BadParameter, ValueError, r"self.weight: expected .* \(6,\) or \(n, 6\), got \(3,\)"),
        (NoStep, TypeError, "NoStep must have a method step"),
        (3, TypeError, "cell must be a class derived from ostinato.nn.Cell, got int"),
        (lambda size, **factory: torch.nn.Linear(1, 1), TypeError, "ostinato.nn.Cell, got Linear"),
    ],
)
def test_what_is_no_cell_is_refused_when_the_layer_is_made(cell, error, message):
    with pytest.raises(error, match=message):
        nn.Recurrent(cell, 4, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"drives": None}, ValueError, r"expected drives of 2 \* 6 numbers"),
        ({"drives": torch.rand(7, 4, 6)}, RuntimeError, r"drives must have shape \(7, 4, 12\)"),
        ({"drives": torch.rand(7, 4, 12).double()}, ValueError, "drives must have input's dtype"),
        ({"drives": 3}, TypeError, "drives must be a Tensor, got int"),
        ({"hx": torch.zeros(1, 4, 6)}, TypeError, "hx must be a tuple of 3 Tensors"),
        ({"hx": (torch.zeros(1, 4, 6),) * 2}, RuntimeError, "expected hx to hold 3 states, got 2"),
        ({"hx": (torch.zeros(1, 4, 5),) * 3}, RuntimeError, r"hx\[0\] must have shape \(1, 4, 6\)"),
        ({"hx": (torch.zeros(1, 3, 6),) * 3}, RuntimeError, r"Expected hidden size \(1, 4, 6\)"),
        ({"x": torch.zeros(7, 4, 5)}, RuntimeError, "Expected 4, got 5"),
        ({"x": torch.zeros(7, 4, 4).double()}, ValueError, "drives must have input's dtype"),
        ({"lengths": [1, 2]}, RuntimeError, "lengths"),
        ({"reset_to": (torch.zeros(1, 4, 6),) * 3}, ValueError, "resets is None"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, error, message):
    module = layer_of(own.Everything)
    x, hx, drives = given(module, own.Everything)
    taken = {"x": x, "hx": hx, "drives": drives} | change
    with pytest.raises(error, match=message):
        module(taken.pop("x"), **taken)


def test_drives_for_a_cell_that_takes_none_are_refused():
    with pytest.raises(ValueError, match="drives must be None"):
        layer_of(own.Gru)(torch.zeros(2, 1, 4), drives=torch.zeros(2, 1, 6))
