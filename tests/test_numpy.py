"""The NumPy face: rnn, gru, lstm and layer against the reference, and no torch.

What they refuse is in test_numpy_input.py.

Legend: T steps, B batch, I input, H hidden, O output of a step, L layers, D directions.
"""

import itertools
import logging
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ostinato
from ostinato import _core, reference
from ostinato.numpy import gru, layer
from support.cells import cell_of, has_c
from support.faces import KINDS, call, draw_parameters, output_size
from support.tolerances import assert_close, assert_same_bits

BOTH = (False, True)


def draw_states(rng, kind, rows, hidden, dtype="float64"):
    """Draw hx: h_0, or (h_0, c_0); `rows` is all but the last dimension."""
    out = output_size(kind, hidden)
    h_0 = rng.standard_normal((*rows, out)).astype(dtype)
    if not has_c(kind):
        return h_0
    return h_0, rng.standard_normal((*rows, hidden)).astype(dtype)


def pair(hx):
    """Return h_0 and c_0 of hx."""
    return hx if isinstance(hx, (tuple, list)) else (hx, None)


def expected(kind, input, parameters, hx=None, *, layers=1, ways=1):
    """Return what the reference makes of (T, B, I), layer by layer, in float64."""
    ends = ([], [])
    for k in range(layers):
        # The parameters were drawn in the reference's order.
        own = [a.astype("f8") for n, a in parameters.items() if f"_l{k}" in n]
        states = [
            None if s is None else s[k * ways : (k + 1) * ways].astype("f8") for s in pair(hx)
        ]
        input, *found = reference.layer(
            cell_of(kind),
            input.astype("f8"),
            None,
            *states,
            own,
            has_biases="bias_ih_l0" in parameters,
            bidirectional=ways == 2,
        )
        for end, state in zip(ends, found, strict=True):
            end.append(state)
    h_n, c_n = ends
    return input, np.concatenate(h_n), np.concatenate(c_n) if has_c(kind) else None


def assert_all(compare, actual, other, **options):
    for a, b, name in zip(actual, other, ("output", "h_n", "c_n"), strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            compare(a, b, name=name, **options)


# ---- against the reference ----


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bias", BOTH, ids=["no bias", "bias"])
@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_equals_the_reference(rng, kind, layers, ways, bias, dtype):
    options = {"layers": layers, "ways": ways}
    parameters = draw_parameters(rng, kind, 5, 9, bias=bias, dtype=dtype, **options)
    input = rng.standard_normal((7, 4, 5)).astype(dtype)
    for hx in (None, draw_states(rng, kind, (layers * ways, 4), 9, dtype)):
        whole = expected(kind, input, parameters, hx, **options)
        actual = call(kind, input, parameters, hx)
        assert all(a is None or a.dtype == dtype for a in actual)
        assert_all(assert_close, actual, whole, steps=7 * layers)
        turned = call(kind, input.swapaxes(0, 1), parameters, hx, batch_first=True)
        assert_all(assert_same_bits, (turned[0].swapaxes(0, 1), *turned[1:]), actual)
        # One sequence, without the dimension of the batch; batch_first says nothing about it.
        one = None if hx is None else tuple(s if s is None else s[:, 2] for s in pair(hx))
        one = one[0] if one and not has_c(kind) else one
        single = call(kind, input[:, 2], parameters, one, batch_first=bias)
        cut = [actual[0][:, 2], *(s if s is None else s[:, 2] for s in actual[1:])]
        assert_all(assert_same_bits, single, cut)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (kind, dtype)
        for kind, dtype in itertools.product(KINDS, ("float32", "float64", "float16", "complex128"))
        # Complex numbers have no order, hence no relu.
        if (kind, dtype) != ("rnn_relu", "complex128")
    ],
)
@pytest.mark.parametrize("packed", BOTH)
@pytest.mark.parametrize("ways", [1, 2])
def test_layer_takes_what_the_reference_takes(rng, kind, ways, packed, dtype):
    parameters = draw_parameters(rng, kind, 5, 9, ways=ways, dtype=dtype)
    sizes = [4, 4, 1, 0] if packed else None
    input = rng.standard_normal((9, 5) if packed else (4, 6, 5)).astype(dtype)
    states = pair(draw_states(rng, kind, (ways, 6), 9, dtype))
    weights = list(parameters.values())
    options = {"has_biases": True, "bidirectional": ways == 2}
    wide = "complex128" if dtype == "complex128" else "float64"
    for h_0, c_0 in (states, (None, states[1]), (states[0], None)):
        arguments = (sizes, h_0, c_0, weights)
        actual = layer(cell_of(kind), input, *arguments, **options)
        widened = (sizes, *(None if s is None else s.astype(wide) for s in (h_0, c_0)))
        whole = reference.layer(
            cell_of(kind),
            input.astype(wide),
            *widened,
            [w.astype(wide) for w in weights],
            **options,
        )
        assert all(a is None or a.dtype == dtype for a in actual)
        assert_all(assert_close, actual, whole, steps=4)


def test_layer_takes_every_form_of_batch_sizes(rng):
    weights = list(draw_parameters(rng, "gru", 3, 4).values())
    input, sizes = rng.standard_normal((8, 3)), [4, 3, 1]
    options = {"has_biases": True, "bidirectional": False}
    whole = layer("gru", input, sizes, None, None, weights, **options)
    forms = [tuple(sizes), *(np.array(sizes, t) for t in ("u1", "i4", ">i8", "u8"))]
    strided = np.array([4, 9, 3, 9, 1, 9])[::2]
    for form in (*forms, strided, [np.int16(n) for n in sizes]):
        assert_all(
            assert_same_bits, layer("gru", input, form, None, None, weights, **options), whole
        )


# ---- dtypes that have no engine ----


def test_other_dtypes_run_the_reference_and_say_so_once(rng, caplog, monkeypatch):
    monkeypatch.setattr(ostinato.numpy, "_told", set())
    exact = draw_parameters(rng, "gru", 3, 4)
    input = rng.standard_normal((5, 2, 3))
    whole = expected("gru", input, exact)
    for dtype in (np.longdouble, "complex64", ">f4", ">f8"):
        parameters = {n: a.astype(dtype) for n, a in exact.items()}
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ostinato"):
            for _ in range(2):
                output, h_n = gru(input.astype(dtype), parameters)
        eps = max(2.0**-52, float(np.finfo(dtype).eps))
        np.testing.assert_allclose(output, whole[0], rtol=16 * eps, atol=16 * eps)
        np.testing.assert_allclose(h_n, whole[1], rtol=16 * eps, atol=16 * eps)
        assert output.dtype == np.dtype(dtype).newbyteorder("=")
        (record,) = caplog.records
        assert f"no engine for {np.dtype(dtype)}" in record.getMessage()
    caplog.clear()
    gru(input, exact)
    gru(input.astype("f4"), {n: a.astype("f4") for n, a in exact.items()})
    assert not caplog.records


# ---- properties ----


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_cut_in_two_and_carried_has_the_same_bits(rng, kind, dtype):
    parameters = draw_parameters(rng, kind, 5, 17, layers=2, dtype=dtype)
    input = rng.standard_normal((13, 3, 5)).astype(dtype)
    whole = call(kind, input, parameters)
    for cut in (0, 1, 6, 12, 13):
        first, h, c = call(kind, input[:cut], parameters)
        second, *ends = call(kind, input[cut:], parameters, h if c is None else (h, c))
        assert_all(assert_same_bits, (np.concatenate([first, second]), *ends), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_reversed_input_equals_the_reverse_direction(rng, kind):
    parameters = draw_parameters(rng, kind, 5, 9, ways=2)
    input = rng.standard_normal((6, 4, 5))
    output, h_n, c_n = call(kind, input, parameters)
    own = {n.removesuffix("_reverse"): a for n, a in parameters.items() if n.endswith("_reverse")}
    turned, h, c = call(kind, input[::-1], own)
    half = output.shape[-1] // 2
    assert_same_bits(output[..., half:], turned[::-1])
    assert_same_bits(h_n[1:], h)
    assert (c is None) or (c_n[1:] == c).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_commute_with_permutation(rng, kind):
    parameters = draw_parameters(rng, kind, 5, 9, layers=2, ways=2)
    input, order = rng.standard_normal((6, 11, 5)), rng.permutation(11)
    hx = draw_states(rng, kind, (4, 11), 9)
    whole = call(kind, input, parameters, hx)
    moved = tuple(s if s is None else s[:, order] for s in pair(hx))
    moved = moved if has_c(kind) else moved[0]
    actual = call(kind, input[:, order], parameters, moved)
    assert_all(assert_same_bits, actual, [a if a is None else a[:, order] for a in whole])


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_and_no_rows(rng, kind):
    parameters = draw_parameters(rng, kind, 5, 9, layers=2, ways=2)
    hx = draw_states(rng, kind, (4, 3), 9)
    output, *ends = call(kind, np.zeros((0, 3, 5)), parameters, hx)
    width = 2 * pair(hx)[0].shape[-1]
    assert output.shape == (0, 3, width)
    for end, start in zip(ends, pair(hx), strict=True):
        assert (end is None) == (start is None)
        if end is not None:
            assert_same_bits(end, start)
            assert not np.shares_memory(end, start)
    output, h_n, _ = call(kind, np.zeros((6, 0, 5)), parameters)
    assert (output.shape, h_n.shape[:2]) == ((6, 0, width), (4, 0))


def layouts(array):
    """Return the same numbers as other callers might hold them."""
    gap = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    gap[..., ::2] = array
    raw = np.zeros(array.nbytes + 1, np.uint8)
    odd = raw[1:].view(array.dtype).reshape(array.shape)
    odd[...] = array
    locked = array.copy()
    locked.flags.writeable = False
    turned = np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    return [gap[..., ::2], odd, locked, turned, np.asfortranarray(array)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_memory_layout_has_the_same_bits(rng, kind):
    parameters = draw_parameters(rng, kind, 5, 9, ways=2, dtype="float32")
    input = rng.standard_normal((6, 3, 5)).astype("float32")
    hx = draw_states(rng, kind, (2, 3), 9, "float32")
    whole = call(kind, input, parameters, hx)
    arrays = [a for a in (input, *parameters.values(), *pair(hx)) if a is not None]
    kept = [a.copy() for a in arrays]
    for i in range(len(layouts(input))):
        states = [s if s is None else layouts(s)[i] for s in pair(hx)]
        actual = call(
            kind,
            layouts(input)[i],
            {n: layouts(a)[i] for n, a in parameters.items()},
            states if whole[2] is not None else states[0],
        )
        assert_all(assert_same_bits, actual, whole)
    for before, after in zip(kept, arrays, strict=True):
        assert_same_bits(after, before)
    broad = np.broadcast_to(np.float32(0.25), input.shape)
    assert_all(
        assert_same_bits, call(kind, broad, parameters), call(kind, broad.copy(), parameters)
    )


def test_memory_mapped_files_and_archives(rng, tmp_path):
    parameters = draw_parameters(rng, "gru", 5, 9)
    input = rng.standard_normal((6, 3, 5))
    whole = gru(input, parameters)
    np.savez(tmp_path / "gru.npz", **parameters)
    with np.load(tmp_path / "gru.npz") as archive:
        assert_all(assert_same_bits, (*gru(input, archive), None), (*whole, None))
    np.save(tmp_path / "input.npy", input)
    mapped = np.load(tmp_path / "input.npy", mmap_mode="r")
    assert_all(assert_same_bits, (*gru(mapped, parameters), None), (*whole, None))


def test_threads_are_those_of_the_environment(rng, monkeypatch):
    asked = []

    class Recorder:
        forced_threads = 0

        @staticmethod
        def forward(*arguments):
            asked.append(arguments[-1])
            _core.forward(*arguments)

    monkeypatch.setattr(ostinato.numpy, "_core", Recorder)
    parameters = draw_parameters(rng, "gru", 5, 9)
    gru(np.zeros((6, 3, 5)), parameters)
    Recorder.forced_threads = 5
    gru(np.zeros((6, 3, 5)), parameters)
    assert asked == [len(os.sched_getaffinity(0)), 5]


# ---- what reaches the engine ----


def test_no_mixture_of_shapes_reaches_the_engine():
    accepted = []

    @settings(max_examples=200)
    @given(st.data())
    def check(data):
        # Each shape is now and then a wrong one. Whatever is accepted must be computed right.
        kind = data.draw(st.sampled_from(KINDS))
        rng = np.random.default_rng(0)
        steps, batch, size, hidden = (data.draw(st.integers(1, 3)) for _ in range(4))
        hidden += 1
        lengths = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=batch, max_size=batch))
        sizes = None if lengths is None else [sum(n > t for n in lengths) for t in range(steps)]
        rows = (steps, batch) if sizes is None else (sum(sizes),)
        parameters = draw_parameters(rng, kind, size, hidden, dtype="float32")
        hx = pair(draw_states(rng, kind, (1, batch), hidden, "float32"))
        arrays = {"input": rng.standard_normal((*rows, size)).astype("f4"), **parameters}
        arrays |= {n: s for n, s in zip(("h_0", "c_0"), hx, strict=True) if s is not None}
        for name in data.draw(st.sets(st.sampled_from(sorted(arrays)), max_size=2)):
            shape = list(arrays[name].shape)
            shape[data.draw(st.integers(0, len(shape) - 1))] = data.draw(st.integers(0, 9))
            if data.draw(st.integers(0, 3)) == 3:
                shape.pop()
            arrays[name] = rng.standard_normal(shape).astype("f4")
        if sizes and data.draw(st.booleans()):
            sizes[data.draw(st.integers(0, steps - 1))] = data.draw(st.integers(-1, 4))
        input, h_0, c_0 = arrays.pop("input"), arrays.pop("h_0"), arrays.pop("c_0", None)
        arguments = (cell_of(kind), input, sizes, h_0, c_0, list(arrays.values()))
        options = {"has_biases": True, "bidirectional": False}
        try:
            actual = layer(*arguments, **options)
        except (ValueError, RuntimeError):
            return
        accepted.append(kind)
        assert_all(assert_close, actual, reference.layer(*arguments, **options), steps=8)

    check()
    # Neither all nor none of it, lest the test be about nothing.
    assert 20 < len(accepted) < 180
    assert set(accepted) == set(KINDS)


# ---- names of parameters ----


def test_a_prefix_finds_a_layer_in_a_whole_model(rng):
    own = draw_parameters(rng, "gru", 5, 9, layers=2, ways=2)
    model = {f"encoder.gru.{n}": a for n, a in own.items()}
    model |= {f"decoder.{n}": a for n, a in draw_parameters(rng, "lstm", 3, 4).items()}
    # The first has the length of the prefix and the form of a name behind it.
    model |= {
        "encoder.old.weight_ih_l5": np.ones(1),
        "encoder.gru.norm.weight": np.ones(3),
        "fc.weight": np.ones((2, 2)),
        7: np.ones(1),
    }
    input = rng.standard_normal((6, 3, 5))
    found = gru(input, model, prefix="encoder.gru.")
    assert_all(assert_same_bits, (*found, None), (*gru(input, own), None))
    with pytest.raises(ValueError, match=r"'weight_ih_l0', .* fit: 'encoder.gru.', 'decoder.'"):
        gru(input, model)
    with pytest.raises(ValueError, match=r"to hold 'gru.weight_ih_l0', which is missing"):
        gru(input, model, prefix="gru.")


# ---- without torch ----


def test_importing_and_running_without_torch():
    program = """
        import sys
        import ostinato
        ostinato.numpy
        assert "torch" not in sys.modules, "imported torch"

        sys.modules["torch"] = None  # an import of torch would now raise
        import numpy
        zeros = {"weight_ih_l0": numpy.zeros((6, 3)), "weight_hh_l0": numpy.zeros((6, 2))}
        output, h_n = ostinato.numpy.gru(numpy.zeros((4, 3)), zeros, numpy.ones((1, 2)))
        print(output[:, 0].tolist())
        print(ostinato.numpy.gru(numpy.zeros((4, 3), "c8"),
                                 {n: a.astype("c8") for n, a in zeros.items()})[1].tolist())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    # Each step: r = z = 1/2, n = 0, h' = h / 2.
    assert done.stdout.split("\n")[:2] == ["[0.5, 0.25, 0.125, 0.0625]", "[[0j, 0j]]"]
    assert "no engine for complex64" in done.stderr
