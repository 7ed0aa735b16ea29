"""What stands for a tensor: proxies of torch.fx, and objects with __torch_function__."""

import copy
from typing import ClassVar

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from ostinato import nn, ops
from support.cells import CELL_MODULES, LAYERS, MODULES, SIX, TORCH_LAYERS
from support.pairs import TORCH_WARNS, each, flat, pair, shapes

pytestmark = pytest.mark.filterwarnings(TORCH_WARNS)


class Model(torch.nn.Module):
    """A layer or a cell behind another module; `call` says how it is called."""

    def __init__(self, inner, call):
        super().__init__()
        self.first, self.inner, self.call = torch.nn.Linear(4, 4), inner, call

    def forward(self, x, hx):
        return self.call(self.inner, self.first(x), hx)


class Stateless(Model):
    """The same without a state."""

    def forward(self, x):
        return super().forward(x, None)


def by_position(inner, x, hx):
    return inner(x) if hx is None else inner(x, hx)


def by_name(inner, x, hx):
    return inner(input=x, hx=hx)


def twice(inner, x, hx):
    """Hand states on, as they come out of a first call."""
    results = inner(x, hx)
    return inner(
        x, results if isinstance(inner, nn.GRUCell | nn.LSTMCell | nn.RNNCell) else results[1]
    )


def unpacked(inner, x, hx):
    """Take the results apart, and give a pair of states as a tuple or a list."""
    if isinstance(inner, nn.LSTMCell):
        h, c = inner(x, hx)
        h, c = inner(h[:, :4], (h, c))
        return inner(x, [h, c])[1].relu()
    if isinstance(inner, nn.LSTM):
        output, (h, c) = inner(x, hx)
        return inner(x, (h, c))[0] + output
    if isinstance(inner, torch.nn.RNNBase):
        output, h = inner(x, hx)
        return inner(x, hx=h)[0] + output
    return inner(x, inner(x, hx)).relu()


WAYS = {way.__name__: way for way in (by_position, by_name, twice, unpacked)}


# ---- torch.fx ----


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("name", SIX)
def test_fx_makes_a_node_of_each_call(name, with_state, way):
    kind = Model if with_state else Stateless
    model = kind(getattr(nn, name)(4, 8), WAYS[way])
    x, hx = shapes(name)
    given = (x, hx) if with_state else (x,)
    traced = torch.fx.symbolic_trace(model)
    calls = [n for n in traced.graph.nodes if n.op == "call_module" and n.target == "inner"]
    assert len(calls) == {"twice": 2, "unpacked": 3 if name == "LSTMCell" else 2}.get(way, 1)
    expected = flat(model(*given))
    again = torch.fx.symbolic_trace(traced)
    for module in traced, again, copy.deepcopy(traced):
        for mine, other in zip(flat(module(*given)), expected, strict=True):
            assert torch.equal(mine, other)
    # The same graph as for torch's layer.
    if way in ("by_position", "by_name"):
        other = torch.fx.symbolic_trace(kind(getattr(torch.nn, name)(4, 8), WAYS[way]))
        assert [n.op for n in other.graph.nodes] == [n.op for n in traced.graph.nodes]


@pytest.mark.parametrize("name", LAYERS)
def test_fx_follows_what_is_given_by_name(name):
    class Cut(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = getattr(nn, name)(4, 8)

        def forward(self, x, lengths, resets):
            return self.inner(x, lengths=lengths, resets=resets, return_all_states=True)

    model = Cut()
    x = torch.randn(5, 3, 4)
    lengths, resets = torch.tensor([5, 0, 2], device="cpu"), torch.rand(5, 3) > 0.5
    traced = torch.fx.symbolic_trace(model)
    for mine, other in zip(
        flat(traced(x, lengths, resets)), flat(model(x, lengths, resets)), strict=True
    ):
        assert torch.equal(mine, other)
    # Only one of the arguments is followed.

    class Half(Cut):
        def forward(self, resets):
            return self.inner(x, resets=resets)

    (node,) = (n for n in torch.fx.Tracer().trace(Half()).nodes if n.kwargs)
    assert list(node.kwargs) == ["resets"]


@pytest.mark.parametrize("name", MODULES)
def test_fx_follows_a_state_beside_a_tensor(name):
    """A decoder that starts from what it holds."""

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = getattr(nn, name)(4, 8)
            self.start = [shapes(name)[0]]

        def forward(self, hx):
            return self.inner(self.start[0], hx)

    model, (_, hx) = Decoder(), shapes(name)
    graph = torch.fx.Tracer().trace(model)
    (node,) = (n for n in graph.nodes if n.op == "call_module")
    assert node.target == "inner"
    # The input is in the graph, as a constant of the module.
    traced = torch.fx.GraphModule(model, graph)
    for mine, other in zip(flat(traced(hx)), flat(model(hx)), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", MODULES)
def test_fx_looks_at_no_weights(name):
    """A parametrization runs within the layer's node and nowhere else."""
    model = Stateless(getattr(nn, name)(4, 8), by_position)
    weight = "weight_hh" if name in CELL_MODULES else "weight_hh_l0"
    torch.nn.utils.parametrizations.weight_norm(model.inner, weight)
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["first", "inner"]
    x, _ = shapes(name)
    for mine, other in zip(flat(traced(x)), flat(model(x)), strict=True):
        assert torch.equal(mine, other)


def test_fx_follows_a_packed_sequence():
    class Packs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.GRU(4, 8)

        def forward(self, packed):
            return self.inner(packed)[1]

    model = Packs()
    packed = pack_sequence([torch.randn(n, 4) for n in (5, 2)])
    assert torch.equal(torch.fx.symbolic_trace(model)(packed), model(packed))


def test_fx_of_the_layer_itself_is_refused_with_a_way_out():
    with pytest.raises(
        torch.fx.proxy.TraceError, match=r"a module that holds it.*Sequential\(gru\)"
    ):
        torch.fx.symbolic_trace(nn.GRU(4, 8))
    layer, x = nn.GRU(4, 8), torch.randn(5, 3, 4)
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(layer))
    assert torch.equal(traced(x)[0], layer(x)[0])


def test_fx_shapes_reach_past_a_layer():
    from torch.fx.passes.shape_prop import ShapeProp

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), nn.GRU(4, 8))
    traced = torch.fx.symbolic_trace(model)
    ShapeProp(traced).propagate(torch.randn(5, 3, 4))
    (node,) = (n for n in traced.graph.nodes if n.target == "1")
    assert node.meta["tensor_meta"][0].shape == (5, 3, 8)


# ---- __torch_function__ ----


class Like:
    """No tensor, but what has one: it writes down which functions are called on it."""

    seen: ClassVar[list] = []

    def __init__(self, data):
        self.data = data

    def __getattr__(self, name):
        return getattr(self.data, name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        args, kwargs = (
            torch.utils._pytree.tree_map_only(Like, lambda each: each.data, given)
            for given in (args, kwargs or {})
        )
        wrap = torch.utils._pytree.tree_map_only(torch.Tensor, Like, function(*args, **kwargs))
        return wrap


def opened(result):
    return torch.utils._pytree.tree_map_only(Like, lambda each: each.data, result)


@pytest.fixture
def like():
    Like.seen = []
    return Like


@pytest.mark.parametrize("which", ["input", "state", "both"])
@pytest.mark.parametrize("name", SIX)
def test_objects_that_have_their_own_way_with_functions(name, which, like):
    ours, theirs = pair(name, 4, 8)
    x, hx = shapes(name)
    given = (
        like(x) if which != "state" else x,
        each(hx, like) if which != "input" else hx,
    )
    found = ours(*given)
    for mine, other in zip(flat(opened(found)), flat(ours(x, hx)), strict=True):
        assert torch.equal(mine, other)
    # As torch's modules take them.
    for mine, other in zip(flat(opened(theirs(*given))), flat(opened(found)), strict=True):
        torch.testing.assert_close(mine, other)
    if name in LAYERS:
        assert ops.layer in like.seen
        assert all(isinstance(part, Like) for part in torch.utils._pytree.tree_leaves(found))


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_such_objects_in_stacks_and_both_directions(name, options, like):
    ours, _ = pair(name, 4, 8, **options)
    x = torch.randn(5, 3, 4)
    found = flat(opened(ours(like(x))))
    assert all(torch.equal(a, b) for a, b in zip(found, flat(ours(x)), strict=True))
    assert like.seen.count(ops.layer) == options.get("num_layers", 1)


@pytest.mark.parametrize("name", LAYERS)
def test_such_objects_with_lengths(name, like):
    module, x = getattr(nn, name)(4, 8), torch.randn(5, 3, 4)
    lengths = torch.tensor([5, 0, 2], device="cpu")
    found = flat(opened(module(like(x), lengths=lengths)))
    expected = flat(module(x, lengths=lengths))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert ops.cut_layer in like.seen


class Logged(torch.Tensor):
    """A tensor that writes down which functions it meets."""

    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("name", MODULES)
def test_classes_of_tensors_see_a_public_function_and_keep_their_results(name):
    module = getattr(nn, name)(4, 8)
    x, hx = shapes(name, requires_grad=True)
    expected = flat(module(x, hx))
    gradients = torch.autograd.grad(sum(each.sum() for each in expected), [x, *flat(hx)])
    Logged.seen = []
    given = x.as_subclass(Logged)
    found = flat(module(given, hx))
    assert ops.layer in Logged.seen
    assert all(type(result) is Logged for result in found)
    assert all(
        torch.equal(a.as_subclass(torch.Tensor), b) for a, b in zip(found, expected, strict=True)
    )
    again = torch.autograd.grad(sum(each.sum() for each in found), [x, *flat(hx)])
    for mine, other in zip(again, gradients, strict=True):
        assert torch.equal(mine.as_subclass(torch.Tensor), other)


def test_a_mode_sees_each_layer():
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen, module, x = [], nn.LSTM(4, 8, 2), torch.randn(5, 3, 4)
    expected = module(x)[0]
    with Mode():
        found = module(x)[0]
    assert torch.equal(found, expected)
    assert seen.count(ops.layer) == 2


@pytest.mark.parametrize("name", MODULES)
def test_what_stands_for_nothing_is_refused(name):
    module = getattr(nn, name)(4, 8)
    x, hx = shapes(name)
    with pytest.raises(TypeError, match=f"{name}: input must be a Tensor"):
        module(x.tolist(), hx)
    with pytest.raises(TypeError, match=rf"{name}: hx.* must be"):
        module(x, each(hx, lambda t: t.numpy(force=True)))
    if name in CELL_MODULES:
        with pytest.raises(TypeError, match="got ndarray"):
            module(x.numpy(force=True))
