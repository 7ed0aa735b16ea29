"""Weights of Keras's layers beside what Keras computes with them, and back.

On the backend that KERAS_BACKEND names, torch's if it names none.

Legend: T steps, B batch, I input, H hidden, D directions.
"""

import os

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", exc_type=ImportError)

from ostinato.convert import from_keras, to_keras  # noqa: E402
from support.cells import TORCH_CELLS, options_of, record_of  # noqa: E402
from support.faces import call, draw_parameters  # noqa: E402
from support.tolerances import assert_close  # noqa: E402

# Keras's, where NumPy reads its variables.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

T, B, I, H = 7, 3, 5, 4


def name_of(kind):
    layer = record_of(kind).layer
    return {"RNN": "SimpleRNN"}.get(layer, layer)


def options(kind, **more):
    """What tells Keras's layer or cell to be of this kind."""
    given = options_of(kind)
    return {"activation": given["nonlinearity"], **more} if given else more


def make(kind, *, both=False, **more):
    cls = getattr(keras.layers, name_of(kind))
    layer = cls(H, return_sequences=True, **options(kind, **more))
    return keras.layers.Bidirectional(layer) if both else layer


def drawn(rng, layer, size):
    """Build a layer, and give it weights without zeros."""
    layer.build((B, T, size))
    layer.set_weights([rng.uniform(-1, 1, w.shape) / 2 for w in layer.get_weights()])
    return layer


def run(layer, x):
    """Run over (T, B, I); Keras has the batch first."""
    return np.asarray(keras.ops.convert_to_numpy(layer(x.swapaxes(0, 1)))).swapaxes(0, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", TORCH_CELLS)
def test_a_layer_of_keras_s(rng, kind, both, bias):
    layer = drawn(rng, make(kind, both=both, use_bias=bias), I)
    x = rng.standard_normal((T, B, I)).astype("float32")
    found = from_keras(layer.get_weights(), bidirectional=both)
    assert_close(call(kind, x, found)[0], run(layer, x), T)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", TORCH_CELLS)
def test_a_stack_of_keras_s(rng, kind, both):
    ways = 2 if both else 1
    layers = [drawn(rng, make(kind, both=both), size) for size in (I, ways * H, ways * H)]
    x = y = rng.standard_normal((T, B, I)).astype("float32")
    for layer in layers:
        y = run(layer, y)
    found = from_keras([layer.get_weights() for layer in layers], bidirectional=both)
    assert_close(call(kind, x, found)[0], y, 3 * T)


@pytest.mark.parametrize("kind", TORCH_CELLS)
def test_stacked_cells_and_states(rng, kind):
    cells = [getattr(keras.layers, f"{name_of(kind)}Cell")(H, **options(kind)) for _ in range(2)]
    layer = keras.layers.RNN(cells, return_sequences=True, return_state=True)
    drawn(rng, layer, I)
    x = rng.standard_normal((T, B, I)).astype("float32")
    expected, *states = layer(x.swapaxes(0, 1))
    expected = np.asarray(keras.ops.convert_to_numpy(expected)).swapaxes(0, 1)
    output, h_n, c_n = call(kind, x, from_keras([cell.get_weights() for cell in cells]))
    assert_close(output, expected, 2 * T)
    for k, of_layer in enumerate(states):
        each = of_layer if isinstance(of_layer, (list, tuple)) else [of_layer]
        for ours, theirs in zip((h_n, c_n), each, strict=False):
            assert_close(ours[k], np.asarray(keras.ops.convert_to_numpy(theirs)), 2 * T)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("kind", TORCH_CELLS)
def test_back_to_keras(rng, kind, ways, bias):
    given = draw_parameters(rng, kind, I, H, layers=2, ways=ways, bias=bias, dtype="float32")
    x = y = rng.standard_normal((T, B, I)).astype("float32")
    for size, weights in zip((I, ways * H), to_keras(given), strict=True):
        layer = make(kind, both=ways == 2, use_bias=bias)
        layer.build((B, T, size))
        layer.set_weights(weights)
        y = run(layer, y)
    assert_close(y, call(kind, x, given)[0], 2 * T)


def test_a_gru_that_resets_before_is_refused(rng):
    layer = drawn(rng, make("gru", reset_after=False), I)
    with pytest.raises(NotImplementedError, match="a GRU with reset_after=False, which multiplies"):
        from_keras(layer.get_weights())
