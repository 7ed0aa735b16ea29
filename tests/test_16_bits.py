"""16-bit storage: the float32 engine's numbers on widened arguments, rounded once to nearest even.

Legend: T steps, B batch, I input, H hidden.
"""

import itertools

import numpy as np
import pytest

from support.calls import ragged
from support.cells import CELLS, KINDS
from support.engine import COTANGENTS, Layer
from support.storage import narrow, stored, widen, widened

STORAGES = ("bfloat16", "float16")


def assert_rounded(actual, wide, storage):
    """Hold narrow results to wide ones: the same bits after rounding, a NaN for a NaN."""
    for name, array in actual.items():
        expected = narrow(wide[name], storage)
        same = array.view(np.uint16) == expected.view(np.uint16)
        same |= np.isnan(widen(array)) & np.isnan(wide[name])
        assert same.all(), f"{name}: {np.count_nonzero(~same)} of {same.size} differ"


def check(rng, layer, storage, *, threads=1):
    """Hold forward and every gradient of a narrow layer to the float32 engine's."""
    layer = stored(layer, storage)
    cotangents = widened(layer).cotangents(rng)
    given = {n: narrow(a, storage) for n, a in cotangents.items()}
    results = layer.forward(threads=threads)
    wide = widened(layer).forward()
    # Kept for backward is float32, and the very same.
    np.testing.assert_array_equal(results["reserve"], wide["reserve"])
    reserve = results.pop("reserve")
    assert_rounded(results, wide, storage)
    without = layer.forward(threads=threads, keep=False)
    for name, array in results.items():
        np.testing.assert_array_equal(without[name].view(np.uint16), array.view(np.uint16))
    # Backward reads the output as it was stored.
    grads = layer.backward(results | {"reserve": reserve}, given, threads=threads)
    wide = widened(layer).backward(
        {"y": widen(results["y"]), "reserve": reserve}, {n: widen(given[n]) for n in COTANGENTS}
    )
    assert grads.keys() == wide.keys()
    assert_rounded(grads, wide, storage)


def test_the_oracle_rounds():
    near = np.array([1, 1 + 2**-8, 1 + 2**-8 + 2**-20, 1 + 3 * 2**-8, -1 - 2**-8], np.float32)
    expected = np.array([1, 1, 1 + 2**-7, 1 + 2**-6, -1], np.float32)
    np.testing.assert_array_equal(widen(narrow(near, "bfloat16")), expected)
    largest = (2 - 2**-7) * 2.0**127
    last = np.array([np.finfo(np.float32).max, largest * (1 + 2**-10), -np.inf, np.nan], np.float32)
    found = widen(narrow(last, "bfloat16"))
    np.testing.assert_array_equal(found, np.array([np.inf, largest, -np.inf, np.nan], np.float32))


@pytest.mark.parametrize("storage", STORAGES)
def test_every_16_bit_number_is_widened_exactly(isa, storage):
    bits = np.arange(2**16, dtype=np.uint16)
    every = bits if storage == "bfloat16" else bits.view(np.float16)
    kind = np.isfinite(widen(every))
    # x -> relu(x), and relu(-x) for the negative half.
    for weight in (1.0, -1.0):
        one = narrow(np.full((1, 1), weight, np.float32), storage)
        weights = {"ih": one, "hh": np.zeros_like(one), "b_ih": None, "b_hh": None, "hr": None}
        layer = Layer(
            "rnn_relu", every[kind][:, None], None, 1, int(kind.sum()), None, None, [weights]
        )
        found = widen(layer.forward(keep=False)["y"].ravel())
        np.testing.assert_array_equal(found, np.maximum(0, weight * widen(every[kind])))


@pytest.mark.parametrize("storage", STORAGES)
def test_rounding_over_all_magnitudes(isa, rng, storage):
    # Products over the whole range, subnormal, infinite and NaN; their gradients have both signs.
    spread = 30 if storage == "bfloat16" else 5

    def drawn(count):
        with np.errstate(over="ignore"):
            numbers = rng.standard_normal(count) * np.exp(spread * rng.standard_normal(count))
            return numbers.astype(np.float32)[:, None]

    special = [np.inf, -np.inf, np.nan, 65520.0, 65519.0, 2.0**-25, 0.0]
    x = np.concatenate([drawn(200), np.array(special, np.float32)[:, None]])
    weights = dict.fromkeys(("b_ih", "b_hh", "hr")) | {"ih": drawn(120)}
    weights["hh"] = np.zeros((120, 120), np.float32)
    layer = Layer("rnn_relu", x, None, 1, len(x), None, None, [weights])
    with np.errstate(all="ignore"):
        check(rng, layer, storage)


@pytest.mark.parametrize("layout", ["padded", "ragged", "rows of no steps"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_rounded(isa, rng, kind, storage, directions, layout):
    sizes = {"padded": None, "ragged": ragged(rng, 6, 5)}
    sizes |= {"rows of no steps": ragged(rng, 6, 5, empty=2)}
    options = {"directions": directions, "dtype": "float32", "sizes": sizes[layout]}
    check(rng, Layer.draw(rng, kind, 6, 5, 3, 19, **options), storage)


@pytest.mark.parametrize("hidden", [1, 7, 8, 15, 17, 33, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_whose_weights_stay_narrow(isa, rng, kind, hidden):
    # Up to two rows of a tile read their panels in pairs of k, an odd k standing alone.
    for storage, batch, steps in itertools.product(STORAGES, (1, 2, 3, 4), (1, 3)):
        layer = Layer.draw(rng, kind, steps, batch, 5, hidden, dtype="float32")
        check(rng, layer, storage)


# Inputs that end within a cache line of bfloat16, within a piece of 16 bytes, and neither.
@pytest.mark.parametrize("size", [64, 75, 131])
@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_read_as_they_lie(isa, rng, kind, size):
    for batch, steps, hidden in itertools.product((1, 3, 6), (1, 4), (16, 41)):
        layer = Layer.draw(rng, kind, steps, batch, size, hidden, dtype="float32")
        check(rng, layer, "bfloat16")


@pytest.mark.parametrize("cell", CELLS)
def test_members_that_walk_together(isa, rng, cell):
    # Sizes at which two threads share the blocks of each step, and tiles of one row.
    for batch, hidden in ((1, 190), (3, 131), (4, 150)):
        layer = Layer.draw(rng, cell, 9, batch, 20, hidden, dtype="float32")
        check(rng, layer, "bfloat16", threads=2)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_biases_and_states(isa, rng, kind):
    for states, bias in itertools.product(((), ("h_0",), ("c_0",)), (True, False)):
        options = {"states": states, "bias": bias, "directions": 2, "dtype": "float32"}
        check(rng, Layer.draw(rng, kind, 4, 5, 3, 9, **options), "bfloat16")
