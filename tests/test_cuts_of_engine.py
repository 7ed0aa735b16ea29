"""Cuts of rows by addresses (csrc/cpu/lengths.cpp, both time loops): every piece against one alone.

tests/test_cuts_of_operators.py holds the operator to the reference. Here arrays stand between guard
zones, and the sanitizers look on.
Legend: T steps, B batch, I input, H hidden, O output of a step, D directions.
"""

import itertools

import numpy as np
import pytest

from ostinato import reference
from support.cells import KINDS, has_c
from support.engine import Layer
from support.tolerances import assert_close


def by_pieces(layer, lengths, resets, states, cotangents):
    """The same by running each piece alone, in any order."""
    steps, _, batch, size, hidden, _, ways = layer.dims
    wide = layer.wide()
    given = {n: None if a is None else a.astype("f8") for n, a in cotangents.items()}
    x = wide.x.reshape(steps, batch, size)
    dy = given["dy"].reshape(steps, batch, -1)
    shapes = layer.shapes()
    found = {n: np.zeros(shape) for n, shape in shapes.items()}
    for name, state in zip(("dcut_h", "dcut_c"), states, strict=True):
        if state is not None:
            found[name] = np.zeros(state.shape)
    kinds = [("h", wide.h_0, states[0], layer.out)]
    if layer.record.has_c:
        kinds.append(("c", wide.c_0, states[1], hidden))
    for b in range(batch):
        flags = resets.reshape(steps, batch)[: lengths[b], b]
        starts = [t for t in range(lengths[b]) if t == 0 or flags[t]]
        for kind, first, _, _ in kinds:
            if not starts:
                found[f"{kind}_n"][:, b] = 0 if first is None else first[:, b]
                found[f"d{kind}_0"][:, b] = given[f"d{kind}_n"][:, b]
        for start, end in itertools.pairwise([*starts, int(lengths[b])]):
            is_cut = [bool(flags[start]), end < lengths[b]]
            is_last = [end == lengths[b], start == 0]
            begin, arrive = {}, {"dy": dy[start:end, b].reshape(end - start, -1)}
            arrive |= {"dh_n": None, "dc_n": None}
            for kind, first, anew, width in kinds:
                begin[f"{kind}_0"] = np.zeros((ways, 1, width))
                arrive[f"d{kind}_n"] = np.zeros((ways, 1, width))
                for d in range(ways):
                    source = anew if is_cut[d] else first
                    if source is not None:
                        begin[f"{kind}_0"][d, 0] = source[d, b]
                    if is_last[d]:
                        arrive[f"d{kind}_n"][d, 0] = given[f"d{kind}_n"][d, b]
            piece = wide.replace(x=x[start:end, b].copy(), steps=end - start, batch=1, **begin)
            results = piece.run(arrive)
            found["y"].reshape(steps, batch, -1)[start:end, b] = results["y"]
            found["dx"].reshape(steps, batch, size)[start:end, b] = results["dx"]
            for kind, _, anew, _ in kinds:
                for d in range(ways):
                    if is_last[d]:
                        found[f"{kind}_n"][d, b] = results[f"{kind}_n"][d, 0]
                    if not is_cut[d]:
                        found[f"d{kind}_0"][d, b] = results[f"d{kind}_0"][d, 0]
                    elif anew is not None:
                        found[f"dcut_{kind}"][d, b] += results[f"d{kind}_0"][d, 0]
            for name, _ in layer.named_weights():
                found["d" + name] += results["d" + name]
    return found


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_sequences_of_their_own(isa, rng, kind, directions, probability):
    for dtype, threads, size in (("float64", 1, 19), ("float32", 2, 33)):
        options = {"directions": directions, "dtype": dtype, "lengths": (7, 0, 3, 5, 7)}
        options |= {"resets": probability, "anew": True}
        layer = Layer.draw(rng, kind, 7, 5, 3, size, **options)
        cotangents = layer.cotangents(rng)
        actual = layer.run_cut(*layer.cuts, cotangents, threads=threads)
        expected = by_pieces(layer, *layer.cuts, cotangents)
        for name, array in expected.items():
            assert_close(actual[name], array, 2 * layer.steps, name)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if has_c(kind)])
def test_every_c(isa, rng, kind, directions):
    options = {"directions": directions, "lengths": (6, 2, 0, 5), "resets": 0.3}
    layer = Layer.draw(rng, kind, 6, 4, 3, 17, **options)
    lengths, resets, _ = layer.cuts
    cotangents = layer.cotangents(rng)
    hidden = layer.dims[4]
    cotangents["dcells"] = rng.standard_normal((24, directions * hidden))
    actual = layer.run_cut(lengths, resets, (None, None), cotangents)
    *_, (cells,) = reference.states(
        layer.cell,
        layer.x.reshape(6, 4, 3),
        None,
        (layer.h_0, layer.c_0),
        [array for _, array in layer.named_weights()],
        has_biases=True,
        bidirectional=directions == 2,
        lengths=lengths,
        resets=resets.reshape(6, 4),
    )
    assert_close(actual["cells"], cells.reshape(24, -1), 6, "cells")
    # A difference quotient in the direction of the bias, where nothing else is asked.
    bias = layer.weights[0]["b_ih"]
    step = 1e-6 * rng.standard_normal(bias.shape)
    losses = []
    for sign in (1, -1):
        weights = [layer.weights[0] | {"b_ih": bias + sign * step}, *layer.weights[1:]]
        moved = layer.replace(weights=weights).run_cut(lengths, resets, (None, None), cotangents)
        losses.append(
            (moved["y"] * cotangents["dy"]).sum()
            + (moved["cells"] * cotangents["dcells"]).sum()
            + (moved["h_n"] * cotangents["dh_n"]).sum()
            + (moved["c_n"] * cotangents["dc_n"]).sum()
        )
    slope = (actual["db_ih"] * step).sum()
    np.testing.assert_allclose((losses[0] - losses[1]) / 2, slope, rtol=1e-6)
