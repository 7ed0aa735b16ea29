"""Parameters of Flax's cells, linen and nnx, beside what Flax computes with them.

Legend: T steps, B batch, I input, H hidden.
"""

import numpy as np
import pytest

jax = pytest.importorskip("jax", exc_type=ImportError)
linen = pytest.importorskip("flax.linen", exc_type=ImportError)
nnx = pytest.importorskip("flax.nnx", exc_type=ImportError)

from ostinato.convert import from_flax  # noqa: E402
from support.faces import call  # noqa: E402
from support.tolerances import assert_close  # noqa: E402

T, B, I, H = 7, 3, 5, 4

# Of each cell its kind here, and what tells it to be of that kind.
LINEN = {
    "SimpleCell": ("rnn_tanh", {}),
    "SimpleCell relu": ("rnn_relu", {"activation_fn": jax.nn.relu}),
    "GRUCell": ("gru", {}),
    "LSTMCell": ("lstm", {}),
    "OptimizedLSTMCell": ("lstm", {}),
}


def drawn(rng, params):
    """Return parameters without zeros, of the same structure."""
    return jax.tree.map(lambda a: jax.numpy.asarray(rng.uniform(-1, 1, a.shape) / 2), params)


def check(kind, x, found, expected, steps=T):
    for weight in found.values():
        assert weight.dtype == np.float32
    output = call(kind, x, found)[0]
    assert_close(output, np.asarray(expected).swapaxes(0, 1), steps)


@pytest.fixture
def x(rng):
    return rng.standard_normal((T, B, I)).astype("float32")


@pytest.mark.parametrize("name", LINEN)
def test_a_cell_of_linen_s(rng, x, name):
    kind, options = LINEN[name]
    layer = linen.RNN(getattr(linen, name.split()[0])(H, **options))
    batch = x.swapaxes(0, 1)
    params = drawn(rng, layer.init(jax.random.key(0), batch))
    expected = layer.apply(params, batch)
    for part in (params, params["params"], params["params"]["cell"]):
        check(kind, x, from_flax(part), expected)


@pytest.mark.parametrize("name", LINEN)
def test_both_directions_of_linen_s(rng, x, name):
    kind, options = LINEN[name]
    cells = [getattr(linen, name.split()[0])(H, **options) for _ in range(2)]
    first, second = (
        linen.Bidirectional(*(linen.RNN(cell) for cell in cells), parent=None) for _ in range(2)
    )
    batch = x.swapaxes(0, 1)
    params = drawn(rng, first.init(jax.random.key(0), batch))
    middle = first.apply(params, batch)
    more = drawn(rng, second.init(jax.random.key(0), middle))
    check(kind, x, from_flax([params, more]), second.apply(more, middle), 2 * T)


def test_the_cell_in_a_scan_of_linen_s(rng, x):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, batch):
            cell = linen.scan(
                linen.GRUCell,
                variable_broadcast="params",
                split_rngs={"params": False},
                in_axes=1,
                out_axes=1,
            )(H, name="gru")
            return cell(jax.numpy.zeros((B, H)), batch)[1]

    batch = x.swapaxes(0, 1)
    params = drawn(rng, Model().init(jax.random.key(0), batch))
    check("gru", x, from_flax(params["params"]["gru"]), Model().apply(params, batch))


NNX = {
    "SimpleCell": ("rnn_tanh", {}),
    "SimpleCell relu": ("rnn_relu", {"activation_fn": jax.nn.relu}),
    "GRUCell": ("gru", {}),
    "LSTMCell": ("lstm", {}),
    "OptimizedLSTMCell": ("lstm", {}),
}


def nnx_cell(name, size=I):
    return getattr(nnx, name.split()[0])(size, H, rngs=nnx.Rngs(0), **NNX[name][1])


@pytest.mark.parametrize("name", NNX)
def test_a_cell_of_nnx_s(rng, x, name):
    layer = nnx.RNN(nnx_cell(name))
    nnx.update(layer, drawn(rng, nnx.state(layer, nnx.Param)))
    expected = layer(x.swapaxes(0, 1))
    state = nnx.state(layer, nnx.Param)
    for part in (state, state["cell"], nnx.to_pure_dict(state), nnx.state(layer.cell, nnx.Param)):
        check(NNX[name][0], x, from_flax(part), expected)


@pytest.mark.parametrize("name", NNX)
def test_both_directions_of_nnx_s(rng, x, name):
    layer = nnx.Bidirectional(*(nnx.RNN(nnx_cell(name)) for _ in range(2)))
    nnx.update(layer, drawn(rng, nnx.state(layer, nnx.Param)))
    expected = layer(x.swapaxes(0, 1))
    check(NNX[name][0], x, from_flax(nnx.state(layer, nnx.Param)), expected)


def test_another_cell_is_refused(x):
    layer = linen.RNN(linen.MGUCell(H))
    params = layer.init(jax.random.key(0), x.swapaxes(0, 1))
    with pytest.raises(ValueError, match=r"expected the names of one cell .*, got \['hf', 'hn'"):
        from_flax(params)
