"""The drop-in contract: construction, parameters and attributes, held against torch itself.

What forward accepts, returns and refuses is in test_contract_forward.py and _dtypes.py.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune

from ostinato import nn
from support.cells import CELL_MODULES, LAYERS, SIX, TORCH_CELL_MODULES, TORCH_LAYERS, has_c
from support.pairs import TORCH_WARNS, assert_same, flat, pair, shapes

pytestmark = pytest.mark.filterwarnings(TORCH_WARNS)


def outcome(call):
    """A call's result, or the type and text of what it raises, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result, error = call(), None
        except (TypeError, ValueError, RuntimeError) as raised:
            result, error = None, (type(raised), str(raised))
    return result, error, [(w.category, str(w.message)) for w in caught]


def assert_constructed_alike(name, args, kwargs):
    """Compare the modules, the errors and the warnings of both libraries."""
    ours, our_error, our_warnings = outcome(lambda: getattr(nn, name)(*args, **kwargs))
    theirs, their_error, their_warnings = outcome(lambda: getattr(torch.nn, name)(*args, **kwargs))
    assert our_error == their_error
    assert our_warnings == their_warnings
    assert repr(ours) == repr(theirs)


# ---- bases and signatures ----


@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_layers_derive_from_the_base_and_not_from_torchs_layers(name):
    ours = getattr(nn, name)
    assert issubclass(ours, torch.nn.RNNBase)
    assert not issubclass(ours, (torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM))
    assert ours.__module__ == "ostinato.nn"


@pytest.mark.parametrize("name", TORCH_CELL_MODULES)
def test_cells_derive_from_the_base_and_not_from_torchs_cells(name):
    ours = getattr(nn, name)
    assert issubclass(ours, torch.nn.modules.rnn.RNNCellBase)
    assert not issubclass(ours, (torch.nn.RNNCell, torch.nn.GRUCell, torch.nn.LSTMCell))
    assert ours.__module__ == "ostinato.nn"


# ---- constructor ----

LAYER_CONSTRUCTIONS = [
    ((), {}),
    ((4,), {}),
    ((4, 8, 2), {"hidden": 3}),
    ((4, 8, 2), {"dropout": None}),
    ((4, 8, 2), {"dropout": "half"}),
    ((4, 8, 2), {"dropout": "0.5"}),
    ((4, 8, 2), {"dropout": True}),
    ((4, 8, 2), {"dropout": -0.1}),
    ((4, 8, 2), {"dropout": 1.1}),
    ((4, 8, 2), {"dropout": float("nan")}),
    ((4, 8, 2), {"dropout": 1}),
    ((4, 8, 2), {"dropout": 0.5}),
    ((4, 8, 1), {"dropout": 0.5}),
    ((4, 8), {"dropout": "half", "bias": 1}),
    ((4, 8), {"bias": 1}),
    ((4, 8), {"bias": None}),
    ((4, 8), {"bias": False}),
    ((4, 8), {"batch_first": 0}),
    ((4, 8), {"batch_first": "True"}),
    ((4, 8), {"batch_first": True}),
    ((4, 8), {"bidirectional": True}),
    ((4.0, 8), {}),
    (("4", 8), {}),
    ((None, 8), {}),
    ((0, 8), {}),
    ((-4, 8), {}),
    ((4, 8.0), {}),
    ((4, None), {}),
    ((4, 0), {}),
    ((4, -8), {}),
    ((4, 8, 0), {}),
    ((4, 8, -1), {}),
    ((4, 8, "1"), {}),
    ((4, 8, None), {}),
    ((4, 8, 1.0), {}),
    ((4, 8), {"dtype": torch.float64}),
    ((4, 8), {"dtype": torch.int64}),
    ((4, 8), {"device": "meta"}),
]


@pytest.mark.parametrize("name", TORCH_LAYERS)
@pytest.mark.parametrize(("args", "kwargs"), LAYER_CONSTRUCTIONS)
def test_layer_constructors_accept_refuse_and_warn_alike(name, args, kwargs):
    assert_constructed_alike(name, args, kwargs)


@pytest.mark.parametrize("name", TORCH_CELL_MODULES)
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((4, 8), {}),
        ((4, 8, False), {}),
        ((4, 8, 0), {}),
        ((4, 8), {"dtype": torch.float64, "device": "cpu"}),
        ((4, 8), {"device": "meta"}),
        (("4", 8), {}),
        ((4, 8.0), {}),
        ((-4, 8), {}),
    ],
)
def test_cell_constructors_accept_and_refuse_alike(name, args, kwargs):
    assert_constructed_alike(name, args, kwargs)


@pytest.mark.parametrize("name", CELL_MODULES)
def test_cell_constructors_name_a_missing_argument(name):
    with pytest.raises(TypeError, match="hidden_size"):
        getattr(nn, name)(4)


def test_the_fourth_argument_of_rnn_is_the_nonlinearity():
    assert nn.RNN(4, 8, 2, "relu").nonlinearity == "relu"
    assert nn.RNN(4, 8, 2, "relu").mode == "RNN_RELU"
    assert nn.RNN(4, 8).nonlinearity == "tanh"
    ours, theirs = pair("RNN", 4, 8, 2, "relu", False, True, 0.25, True)
    assert repr(ours) == repr(theirs)
    assert (ours.bias, ours.batch_first, ours.dropout, ours.bidirectional) == (
        False,
        True,
        0.25,
        True,
    )
    for bad in ("sigmoid", None, 1, ["tanh"]):
        _, error, _ = outcome(lambda bad=bad: nn.RNN(4, 8, nonlinearity=bad))
        assert error == outcome(lambda bad=bad: torch.nn.RNN(4, 8, nonlinearity=bad))[1]
        assert error[0] is ValueError


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_proj_size_belongs_to_lstm(name):
    text = "proj_size argument is only supported for LSTM, not RNN or GRU"
    for size in (0, 3):
        with pytest.raises(ValueError, match=text):
            getattr(nn, name)(4, 8, proj_size=size)
    # torch takes it by position, and fails in forward.
    positions = (4, 8, 1, *(["tanh"] if name == "RNN" else []), True, False, 0.0, False)
    with pytest.raises(ValueError, match=text):
        getattr(nn, name)(*positions, 3)
    assert getattr(nn, name)(*positions, 0).proj_size == 0


@pytest.mark.parametrize("size", [-1, 8, 9])
def test_proj_size_of_lstm_is_at_least_zero_and_less_than_hidden(size):
    _, error, _ = outcome(lambda: nn.LSTM(4, 8, proj_size=size))
    assert error == outcome(lambda: torch.nn.LSTM(4, 8, proj_size=size))[1]
    assert error[0] is ValueError


def test_rnn_cell_looks_at_its_nonlinearity_when_used():
    cell = nn.RNNCell(4, 8, nonlinearity="relu")
    input = torch.randn(3, 4)
    assert cell(input).min() == 0
    cell.nonlinearity = "tanh"
    assert cell(input).min() < 0
    cell.nonlinearity = "sigmoid"
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: sigmoid"):
        cell(input)


# ---- parameters ----

CONFIGURATIONS = [
    ("RNN", (4, 8), {}),
    ("RNN", (4, 8, 2, "relu"), {"bidirectional": True}),
    ("GRU", (4, 8, 3), {"bias": False}),
    ("GRU", (4, 8, 2), {"bidirectional": True}),
    ("LSTM", (4, 8, 2), {"bidirectional": True}),
    ("LSTM", (4, 8, 2), {"bidirectional": True, "proj_size": 3}),
    ("LSTM", (4, 8), {"bias": False, "proj_size": 3}),
    ("RNNCell", (4, 8), {"nonlinearity": "relu"}),
    ("GRUCell", (4, 8, False), {}),
    ("LSTMCell", (4, 8), {}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), CONFIGURATIONS)
def test_parameters_have_torchs_order_names_and_bits(name, args, kwargs):
    torch.manual_seed(7)
    ours = getattr(nn, name)(*args, **kwargs)
    after = torch.rand(3)
    torch.manual_seed(7)
    theirs = getattr(torch.nn, name)(*args, **kwargs)
    assert torch.equal(after, torch.rand(3))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    torch.manual_seed(8)
    ours.reset_parameters()
    torch.manual_seed(8)
    theirs.reset_parameters()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_parameters_stand_per_layer_then_direction():
    lstm = nn.LSTM(4, 8, 2, bidirectional=True, proj_size=3)
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    assert [n for n, _ in lstm.named_parameters()] == [
        f"{kind}_l{k}{suffix}" for k in (0, 1) for suffix in ("", "_reverse") for kind in kinds
    ]
    assert lstm.weight_ih_l1_reverse.shape == (4 * 8, 2 * 3)


@pytest.mark.parametrize(("name", "args", "kwargs"), CONFIGURATIONS)
def test_state_dict_loads_both_ways(name, args, kwargs):
    ours, _ = pair(name, *args, seed=1, **kwargs)
    _, theirs = pair(name, *args, seed=2, **kwargs)
    input = shapes(name)[0]
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours(input), theirs(input))
    _, other = pair(name, *args, seed=3, **kwargs)
    ours.load_state_dict(other.state_dict())
    assert list(ours.state_dict()) == list(other.state_dict())
    assert_same(ours(input), other(input))
    missing = dict(list(other.state_dict().items())[1:])
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(missing)


@pytest.mark.parametrize(("name", "args", "kwargs"), CONFIGURATIONS)
def test_assigned_state_counts_at_the_next_forward(name, args, kwargs):
    ours, _ = pair(name, *args, seed=1, **kwargs)
    _, theirs = pair(name, *args, seed=2, **kwargs)
    input = shapes(name)[0]
    ours(input)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert_same(ours(input), theirs(input))
    # The tensors themselves moved in: a change of one is a change of both.
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.mul_(0.5)
    assert_same(ours(input), theirs(input))


@pytest.mark.parametrize(("name", "args", "kwargs"), CONFIGURATIONS)
def test_meta_modules_come_alive_by_assignment(name, args, kwargs):
    _, theirs = pair(name, *args, **kwargs)
    ours = getattr(nn, name)(*args, **kwargs, device="meta")
    ours.load_state_dict(theirs.state_dict(), assign=True)
    input = shapes(name)[0]
    assert_same(ours(input), theirs(input))


@pytest.mark.parametrize(("name", "args", "kwargs"), CONFIGURATIONS)
def test_functional_call_uses_what_it_is_given_and_leaves_no_trace(name, args, kwargs):
    ours, _ = pair(name, *args, seed=1, **kwargs)
    _, theirs = pair(name, *args, seed=2, **kwargs)
    input = shapes(name)[0]
    before = ours(input)
    given = {key: value.clone().requires_grad_() for key, value in theirs.state_dict().items()}
    during = torch.func.functional_call(ours, given, (input,))
    assert_same(during, theirs(input))
    gradients = torch.autograd.grad(sum(t.sum() for t in flat(during)), list(given.values()))
    sum(t.sum() for t in flat(theirs(input))).backward()
    torch.testing.assert_close(
        gradients, tuple(weight.grad for weight in theirs.parameters()), rtol=1e-4, atol=1e-5
    )
    assert all(weight.grad is None for weight in ours.parameters())
    for one, other in zip(flat(before), flat(ours(input)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", SIX)
def test_data_copied_under_the_module_counts_at_the_next_forward(name):
    ours, _ = pair(name, 4, 8, seed=1)
    _, theirs = pair(name, 4, 8, seed=2)
    input = shapes(name)[0]
    ours(input)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        version = mine._version
        mine.data.copy_(other.data)
        assert mine._version == version
    assert_same(ours(input), theirs(input))


@pytest.mark.parametrize("name", SIX)
def test_replaced_attributes_count_at_the_next_forward(name):
    ours, theirs = pair(name, 4, 8)
    input = shapes(name)[0]
    key = next(n for n, _ in ours.named_parameters() if n.startswith("weight_hh"))
    weight = torch.nn.Parameter(torch.randn_like(getattr(ours, key)))
    setattr(ours, key, weight)
    setattr(theirs, key, weight)
    assert_same(ours(input), theirs(input))
    # A plain tensor in place of the parameter, as weight dropping does.
    for module in (ours, theirs):
        delattr(module, key)
        setattr(module, key, weight.detach() * 0.5)
    assert key not in dict(ours.named_parameters())
    assert_same(ours(input), theirs(input))
    if name in LAYERS:
        at = ours._flat_weights_names.index(key)
        assert ours._flat_weights[at] is getattr(ours, key)


@pytest.mark.parametrize("name", SIX)
def test_parametrizations_count_at_every_forward(name):
    ours, theirs = pair(name, 4, 8)
    input = shapes(name)[0]
    keys = [n for n, _ in ours.named_parameters() if n.startswith("weight")]
    for module in (ours, theirs):
        for key in keys:
            parametrizations.weight_norm(module, key)
    assert_same(ours(input), theirs(input))
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            noise = 0.1 * torch.randn_like(mine)
            mine.add_(noise)
            other.add_(noise)
    assert_same(ours(input), theirs(input))
    for module in (ours, theirs):
        sum(t.sum() for t in flat(module(input))).backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    # Moving a parametrized module keeps what its weights are computed from.
    originals = {key: value.double() for key, value in ours.state_dict().items()}
    ours.double()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, originals[key])
    for key in keys:
        parametrize.remove_parametrizations(ours, key)
    assert set(dict(ours.named_parameters())) == {
        n for n, _ in getattr(nn, name)(4, 8).named_parameters()
    }


class Doubled(torch.nn.Module):
    """A parametrization without a way back."""

    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_a_parametrization_without_inverse_survives_moving_and_copying(name):
    ours, _ = pair(name, 4, 8)
    input = shapes(name)[0].double()
    parametrize.register_parametrization(ours, "weight_hh_l0", Doubled())
    moved = copy.deepcopy(ours).double()
    plain = getattr(nn, name)(4, 8, dtype=torch.float64)
    plain.load_state_dict({k: v.double() for k, v in pair(name, 4, 8)[0].state_dict().items()})
    with torch.no_grad():
        plain.weight_hh_l0.mul_(2)
    assert_same(moved(input), plain(input), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SIX)
def test_hooks_of_the_older_kind_work(name):
    ours, theirs = pair(name, 4, 8)
    input = shapes(name)[0]
    key = "weight_hh_l0" if name in LAYERS else "weight_hh"
    for module in (ours, theirs):
        prune.l1_unstructured(module, key, amount=0.5)
        with pytest.warns(FutureWarning, match="weight_norm"):
            torch.nn.utils.weight_norm(module, key.replace("hh", "ih"))
    assert (getattr(ours, key) == 0).sum() == getattr(ours, key).numel() // 2
    assert_same(ours(input), theirs(input))
    with torch.no_grad():
        for module in (ours, theirs):
            getattr(module, key.replace("hh", "ih") + "_g").mul_(0.5)
    assert_same(ours(input), theirs(input))


# ---- attributes ----


@pytest.mark.parametrize("name", SIX)
def test_copies_are_equal_and_independent(name):
    ours, _ = pair(name, 4, 8)
    input = shapes(name)[0]
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    before = ours(input)
    for twin in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(saved, weights_only=False),
    ):
        assert type(twin) is type(ours)
        assert repr(twin) == repr(ours)
        for one, other in zip(flat(before), flat(twin(input)), strict=True):
            assert torch.equal(one, other)
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        for one, other in zip(flat(before), flat(ours(input)), strict=True):
            assert torch.equal(one, other)
        assert not torch.equal(flat(before)[0], flat(twin(input))[0])


@pytest.mark.parametrize(("name", "args", "kwargs"), [c for c in CONFIGURATIONS if c[0] in LAYERS])
def test_attributes_that_user_code_reads(name, args, kwargs):
    ours, theirs = pair(name, *args, **kwargs)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours._all_weights == theirs._all_weights
    assert len(ours.all_weights) == len(theirs.all_weights)
    for mine, other in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    for key, weight in zip(ours._flat_weights_names, ours._flat_weights, strict=True):
        assert weight is getattr(ours, key)
    addresses = [weight.data_ptr() for weight in ours.parameters()]
    assert ours.flatten_parameters() is None
    assert addresses == [weight.data_ptr() for weight in ours.parameters()]
    for key in (
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
        "training",
    ):
        assert getattr(ours, key) == getattr(theirs, key)
        assert type(getattr(ours, key)) is type(getattr(theirs, key))


@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_flat_weights_follow_every_change_and_can_be_assigned(name):
    ours, _ = pair(name, 4, 8)
    other, _ = pair(name, 4, 8, seed=1)
    with torch.no_grad():
        torch.func.functional_call(ours, dict(other.named_parameters()), (shapes(name)[0],))
    assert ours._flat_weights[0] is ours.weight_ih_l0
    ours.double()
    assert ours._flat_weights[0] is ours.weight_ih_l0
    assert ours._flat_weights[0].dtype == torch.float64
    # Assigned, they are the weights from then on.
    ours._flat_weights = list(other._flat_weights)
    assert ours.weight_ih_l0 is other.weight_ih_l0
    x, h = shapes(name)
    assert_same(ours(x, h), other(x, h))


@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_methods_that_user_code_calls(name):
    ours, theirs = pair(name, 4, 8, 2, bidirectional=True)
    input, order = shapes(name)[0], torch.tensor([2, 0, 1])
    h = torch.randn(4, 3, 8)
    hx = (h, h + 1) if has_c(name) else h
    assert_same(ours.permute_hidden(hx, order), theirs.permute_hidden(hx, order))
    assert ours.get_expected_hidden_size(input, None) == (4, 3, 8)
    assert ours.check_forward_args(input, hx, None) is None
    wrong = (h[:1], h) if has_c(name) else h[:1]
    _, error, _ = outcome(lambda: ours.check_forward_args(input, wrong, None))
    assert error == outcome(lambda: theirs.check_forward_args(input, wrong, None))[1]
    assert error[0] is RuntimeError
    if has_c(name):
        assert ours.get_expected_cell_size(input, None) == (4, 3, 8)


@pytest.mark.parametrize(("name", "args", "kwargs"), CONFIGURATIONS)
def test_repr_is_torchs(name, args, kwargs):
    ours, theirs = pair(name, *args, **kwargs)
    assert repr(ours) == repr(theirs)
    assert repr(ours).startswith(f"{name}(4, 8")


@pytest.mark.parametrize("name", SIX)
def test_moving_to_a_dtype_and_back(name):
    ours, theirs = pair(name, 4, 8)
    input = shapes(name)[0]
    assert_same(ours.double()(input.double()), theirs.double()(input.double()), rtol=1e-12, atol=0)
    assert_same(ours.float()(input), theirs.float()(input))
    empty = ours.to("meta")
    assert all(weight.is_meta for weight in empty.parameters())
    assert all(weight is None or weight.is_meta for weight in getattr(empty, "_flat_weights", []))
