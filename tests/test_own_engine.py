"""The engine on programs of own cells, by addresses and without torch; and what it refuses.

Legend: T steps, B batch, N packed rows, I input, H hidden, D directions, E states behind h, P
numbers per unit, n drives.
"""

import numpy as np
import pytest

from ostinato import _core, reference
from ostinato.cells import cell_of
from ostinato.own import records
from support.own_graphs import TEXTS

cells = pytest.mark.parametrize("name", TEXTS)
SIZES = [(1, 1, 1, 1), (1, 3, 2, 17), (4, 2, 3, 16), (3, 5, 2, 33), (2, 40, 4, 70)]
FORWARD = ("output", "h_n", "c_n", "cells", "reserve")


class Engine:
    """One layer of an own cell, its arrays exactly as large as the engine may touch."""

    def __init__(self, name, sizes, directions, dtype=np.float64, seed=0):
        self.kind = records.of_text(TEXTS[name])
        self.name, self.dtype, self.directions = TEXTS[name], np.dtype(dtype), directions
        self.steps, self.batch, self.inputs, self.hidden = sizes
        random = np.random.default_rng(seed)
        kind, hidden, rows = self.kind, self.hidden, self.steps * self.batch

        def draw(*shape, scale=0.5):
            return random.uniform(-scale, scale, shape).astype(dtype)

        drives = draw(rows, kind.drives * hidden) + self.dtype.type(0.5)
        self.given = {
            "input": np.concatenate([draw(rows, self.inputs), drives], 1),
            "h_0": draw(directions, self.batch, hidden),
            "c_0": draw(directions, self.batch, kind.behind * hidden) if kind.behind else None,
        }
        self.weights = [
            {
                "ih": draw(kind.input_gates * hidden, self.inputs),
                "hh": draw(kind.gates * hidden, hidden, scale=hidden**-0.5),
                "bias_ih": draw(kind.input_gates * hidden),
                "bias_hh": draw(kind.gates * hidden),
                "hr": None,
                "per_unit": draw(kind.parameters, hidden) if kind.parameters else None,
            }
            for _ in range(directions)
        ]

    @property
    def head(self):
        sizes = self.steps, self.steps * self.batch, self.batch, self.inputs, self.hidden, 0
        return self.kind.number, int(self.dtype == np.float64), (*sizes, self.directions)

    def addresses(self, is_backward, arrays):
        """In the engine's order; what has no elements is absent, as for tensors."""
        found = []
        for name, *_ in _core.arrays(is_backward):
            values = [arrays.get(name)]
            if name.endswith("weights"):
                values = [array for each in arrays[name] for array in each.values()]
            found += [0 if a is None or not a.size else a.ctypes.data for a in values]
        return found

    def forward(self, recompute=False, threads=1):
        rows, width = self.steps * self.batch, self.directions * self.hidden
        reserve = _core.reserve_bytes(*self.head, recompute)
        behind = self.kind.behind
        shapes = {
            "output": (rows, width),
            "h_n": (self.directions, self.batch, self.hidden),
            "c_n": (self.directions, self.batch, behind * self.hidden),
            "cells": (rows, behind * width),
        }
        found = {n: np.full(s, np.nan, self.dtype) for n, s in shapes.items()}
        found["reserve"] = np.full(reserve, 255, np.uint8)
        arrays = self.given | {"weights": self.weights} | found
        _core.forward(*self.head, 0, 1, self.addresses(False, arrays), [], threads, recompute)
        return found

    def backward(self, found, seeds, recompute=False, threads=1):
        grads = {
            f"grad_{n}": np.full_like(a, np.nan) for n, a in self.given.items() if a is not None
        }
        weights = [
            {n: None if a is None else np.full_like(a, np.nan) for n, a in each.items()}
            for each in self.weights
        ]
        arrays = self.given | {"weights": self.weights, "grad_weights": weights} | grads
        arrays |= {"output": found["output"], "reserve": found["reserve"]}
        arrays |= {f"grad_{n}": seed for n, seed in seeds.items()}
        _core.backward(*self.head, 0, 1, self.addresses(True, arrays), [], threads, recompute)
        return grads, weights

    def reference(self):
        weights = [a for each in self.weights for n, a in each.items() if a is not None]
        rows = self.given["input"].reshape(self.steps, self.batch, -1)
        initial = [s for s in (self.given["h_0"], self.given["c_0"]) if s is not None]
        output, last, every = reference.states(
            *(self.name, rows, None, initial, weights),
            has_biases=True,
            bidirectional=self.directions == 2,
        )
        found = dict(zip(("output", "h_n", "c_n", "cells"), (output, *last, *every), strict=False))
        return {n: a.reshape(-1, a.shape[-1]) for n, a in found.items()}

    def loss(self, seeds):
        found = self.reference()
        return sum((found[n].ravel() * seed.ravel()).sum() for n, seed in seeds.items())

    def seeds(self, found):
        random = np.random.default_rng(1)
        names = [n for n in FORWARD[:-1] if found[n].size]
        return {n: random.standard_normal(found[n].shape).astype(self.dtype) for n in names}


@pytest.fixture(autouse=True)
def settings():
    """Give the instruction set back as it was."""
    isa = _core.isa()
    yield
    _core.set_isa(isa)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@cells
@pytest.mark.usefixtures("isa")
def test_results_are_the_reference_s(name, sizes, directions):
    for dtype, bound in ((np.float64, 1e-12), (np.float32, 2e-5)):
        engine = Engine(name, sizes, directions, dtype)
        found, expected = engine.forward(), engine.reference()
        for result, array in expected.items():
            actual = found[result].reshape(array.shape)
            np.testing.assert_allclose(actual, array, bound, bound)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@cells
def test_gradients_are_differences_of_the_reference(name, sizes, directions, recompute):
    engine = Engine(name, sizes, directions)
    found = engine.forward(recompute)
    seeds = engine.seeds(found)
    grads, weights = engine.backward(found, seeds, recompute)
    random = np.random.default_rng(2)
    moved = [(engine.given[n.removeprefix("grad_")], g) for n, g in grads.items()]
    moved += [
        (array, grad[n])
        for each, grad in zip(engine.weights, weights, strict=True)
        for n, array in each.items()
        if array is not None and array.size
    ]
    for array, grad in moved:
        assert np.isfinite(grad).all()
        way = random.standard_normal(array.shape)
        saved, size, losses = array.copy(), 1e-6, []
        for sign in (1, -1):
            array[...] = saved + sign * size * way
            losses.append(engine.loss(seeds))
        array[...] = saved
        expected = (losses[0] - losses[1]) / (2 * size)
        scale = np.abs(grad * way).sum() + 1
        # A drive that crosses the threshold of `where` has a difference and no derivative.
        assert abs((grad * way).sum() - expected) <= 1e-6 * scale


@cells
def test_bits_of_threads_and_instruction_sets(name):
    engine = Engine(name, (6, 20, 5, 37), 2, np.float32)
    expected = engine.forward()
    seeds = engine.seeds(expected)
    grads, weights = engine.backward(expected, seeds)
    for isa in _core.instruction_sets():
        _core.set_isa(isa)
        for threads in (1, 2, 3):
            found = engine.forward(threads=threads)
            assert all(found[n].tobytes() == expected[n].tobytes() for n in FORWARD[:-1])
            again, of_weights = engine.backward(found, seeds, threads=threads)
            assert all(again[n].tobytes() == grads[n].tobytes() for n in grads)
            for one, other in zip(of_weights, weights, strict=True):
                pairs = [(a, other[n]) for n, a in one.items() if a is not None]
                assert all(a.tobytes() == b.tobytes() for a, b in pairs)


# ---- what is refused ----


def program(*instructions, numbers=(), registers=3):
    numbered = {op: k for k, op in enumerate(_core.operations())}
    code = [w for op, *rest in instructions for w in (numbered[op], *rest, *[0] * (4 - len(rest)))]
    return code, list(numbers), registers


GATE, TANH, NEXT = ("gate", 0, 0), ("tanh", 1, 0), ("next", 0, 1)
BACK = program(("output", 0), ("slot", 0, 0))


def define(forward=(GATE, TANH, NEXT), backward=BACK, sizes=(1, 1, 0, 0, 0), joint=(0,), **options):
    made = program(
        *forward, **{k: options.pop(k) for k in ("numbers", "registers") if k in options}
    )
    named = {"saved": 0, "uses_output": True, "uses_previous": False} | options
    return _core.define_cell(sizes, list(joint), *named.values(), made, made, backward)


def test_a_cell_is_defined():
    assert define() >= 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (9, 1, 0, 0, 0)}, "at most 8 gates"),
        ({"sizes": (-1, 1, 0, 0, 0)}, "at most 8 gates"),
        ({"sizes": (0, 0, 0, 0, 0), "joint": ()}, "a gate"),
        ({"sizes": (1, 1, 16, 0, 0)}, "at most 16 states"),
        ({"sizes": (1, 1, 0, 65, 0)}, "64 parameters"),
        ({"sizes": (1, 1, 0, 0, 17)}, "16 drives"),
        ({"saved": 129}, "saved values"),
        ({"sizes": (1, 1, 1, 0, 0)}, "saved values"),
        ({"joint": (1,)}, "joint gates of both products"),
        ({"joint": (-1,)}, "joint gates of both products"),
        ({"joint": ()}, "gate of an index that there is, got 0"),
        ({"forward": (("x", 0, 0), NEXT)}, "x of an index that there is"),
        ({"forward": (("gate", 0, 1), NEXT)}, "gate of an index that there is, got 1"),
        ({"forward": (("gate", 0, 200), NEXT)}, "gate of an index that there is, got 200"),
        ({"forward": (("state", 0, 1), NEXT)}, "state of an index that there is, got 1"),
        ({"forward": (("parameter", 0, 0), NEXT)}, "parameter of an index that there is"),
        ({"forward": (("drive", 0, 0), NEXT)}, "drive of an index that there is"),
        ({"forward": (("saved", 0, 0), NEXT)}, "saved of an index that there is"),
        ({"forward": (GATE, ("next", 1, 0))}, "next of an index that there is, got 1"),
        ({"forward": (GATE, ("save", 0, 0))}, "save of an index that there is"),
        ({"forward": (GATE, ("slot", 0, 0))}, "slot of an index that there is"),
        ({"forward": (GATE, ("next", 0, 2))}, "a register that holds something"),
        ({"forward": (GATE, ("next", 0, 300))}, "a register that holds something"),
        ({"forward": (("tanh", 1, 0), NEXT)}, "a register that holds something"),
        ({"forward": (("gate", 7, 0), NEXT)}, "a register to write"),
        ({"forward": (("gate", 0, 0), NEXT), "numbers": (1.0,)}, "a register to write"),
        ({"forward": (GATE, ("next", 0, 0), ("gate", 1, 0))}, "all loads before all stores"),
        ({"registers": 257}, "1 to 256 registers"),
        ({"registers": 0}, "1 to 256 registers"),
        ({"backward": program(("gate", 0, 0))}, "gate of an index that there is"),
        ({"backward": program(("output", 0), ("slot", 1, 0))}, "slot of an index that there is"),
        ({"backward": program(("output", 0)), "uses_output": False}, "output of an index"),
        ({"backward": ([0, 1], [], 1)}, "five numbers for each instruction"),
        ({"backward": ([99, 0, 0, 0, 0], [], 1)}, "an operation"),
    ],
    ids=str,
)
def test_a_program_that_leaves_its_arrays_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        define(**options)


def test_a_text_that_is_no_graph_is_no_cell():
    for text in ("own:", "own:Bad", "own:A(x=1,h=1,s=1,p=0,d=0){x0;tanh 5}->1"):
        with pytest.raises(KeyError):
            cell_of(text)
