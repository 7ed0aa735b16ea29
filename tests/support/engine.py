"""One layer, run on the engine by its addresses and by the equations, for the engine's tests.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step, D directions.
"""

import contextlib
import dataclasses
import platform

import numpy as np

from ostinato import _core, reference
from support import calls
from support.calls import STATES, WEIGHTS
from support.cells import RECORDS, cell_of, is_projected
from support.equations import walk
from support.poison import Poison

# What a build for this architecture has (csrc/cpu/dispatch.cpp).
INSTRUCTION_SETS = ["neon"] if platform.machine() == "aarch64" else ["avx512", "avx2", "portable"]
DTYPES = ("float32", "float64")
# In the engine's order. NumPy has no bfloat16: its bits stand in a uint16.
STORED = ("float32", "float64", "uint16", "float16")
GRADIENTS = ("dx", "dh_0", "dc_0")
CUT_GRADIENTS = ("dcut_h", "dcut_c")
COTANGENTS = ("dy", "dh_n", "dc_n")


@contextlib.contextmanager
def instruction_set(name):
    """Run what stands inside on another instruction set."""
    before = _core.isa()
    _core.set_isa(name)
    try:
        yield
    finally:
        _core.set_isa(before)


class Layer(calls.Call):
    """A call, run on the engine or by the equations."""

    @classmethod
    def draw(cls, rng, kind, steps, batch, size, hidden, *, whole=False, **options):
        """Draw a layer; `options` are those of `calls.draw`."""
        cell = cell_of(kind)
        if is_projected(kind):
            hidden = max(2, hidden)
            options["projection"] = max(1, hidden * 2 // 3)
        # As after training: states neither die out nor grow.
        scale = 1 / np.sqrt(hidden)
        scales = calls.Scales(1 / np.sqrt(size), calls.steady(cell, scale), hr=scale, whole=whole)
        call = calls.draw(rng, cell, steps, batch, size, hidden, scales, **options)
        return cls(**vars(call))

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    @property
    def cuts(self):
        """Where rows end and begin anew, and at which states."""
        return self.lengths, self.resets, (self.reset_h, self.reset_c)

    @property
    def record(self):
        return RECORDS[self.cell]

    @property
    def projected(self):
        return self.weights[0]["hr"] is not None

    @property
    def dims(self):
        """The engine's sizes: T, N, B, I, H, projection or 0, D."""
        rows, out = self.weights[0]["hh"].shape
        hidden = rows // self.record.gates
        proj = out if self.projected else 0
        return (*self.count, self.x.shape[1], hidden, proj, len(self.weights))

    @property
    def count(self):
        return self.steps, len(self.x), self.batch

    @property
    def out(self):
        return self.weights[0]["hh"].shape[1]

    def shapes(self):
        """Shapes of all results by name; weights' gradients as dih, dhh, ... and _reverse."""
        _, rows, batch, size, hidden, _, ways = self.dims
        shapes = {"y": (rows, ways * self.out), "h_n": (ways, batch, self.out)}
        shapes |= {"dx": (rows, size), "dh_0": (ways, batch, self.out)}
        if self.record.has_c:
            shapes |= {"c_n": (ways, batch, hidden), "dc_0": (ways, batch, hidden)}
        for name, array in self.named_weights():
            shapes["d" + name] = array.shape
        return shapes

    def named_weights(self):
        for d, weights in enumerate(self.weights):
            for name, array in weights.items():
                if array is not None:
                    yield name + "_reverse" * d, array

    def gradients(self):
        """Names of all gradients that this layer has."""
        return [name for name in self.shapes() if name not in ("y", "h_n", "c_n")]

    def cotangents(self, rng, names=COTANGENTS):
        """Draw gradients of y, h_n and c_n; those not in `names` are None."""
        shapes = self.shapes()
        drawn = [
            rng.standard_normal(shapes[name[1:]]).astype(self.x.dtype)
            if name in names and name[1:] in shapes
            else None
            for name in COTANGENTS
        ]
        return dict(zip(COTANGENTS, drawn, strict=True))

    # ---- the oracles, in float64 ----

    def reference(self):
        """Return y, h_n and c_n of `ostinato.reference`."""
        wide = self.wide()
        x = wide.x if self.sizes is not None else wide.x.reshape(self.steps, self.batch, -1)
        bias = self.weights[0]["b_ih"] is not None
        y, h_n, c_n = reference.layer(
            self.cell,
            x,
            self.sizes,
            wide.h_0,
            wide.c_0,
            [array for _, array in wide.named_weights()],
            has_biases=bias,
            bidirectional=len(self.weights) == 2,
        )
        results = {"y": y.reshape(len(self.x), y.shape[-1]), "h_n": h_n}
        return results | ({"c_n": c_n} if self.record.has_c else {})

    def equations(self, cotangents):
        """Return the results and every gradient, by docs/math.md."""
        wide, shapes = self.wide(), self.shapes()
        sizes = self.sizes if self.sizes is not None else [self.batch] * self.steps
        given = {"h_0": wide.h_0, "c_0": wide.c_0}
        given |= {n: None if a is None else a.astype("f8") for n, a in cotangents.items()}
        for name, like in zip(
            (*STATES, *COTANGENTS), ("h_n", "c_n", "y", "h_n", "c_n"), strict=True
        ):
            if given[name] is None and like in shapes:
                given[name] = np.zeros(shapes[like])
        ends = "h_n", *(["c_n"] if self.record.has_c else [])
        found = {"dx": 0.0} | {name: [] for name in ("y", *ends, "dh_0", "dc_0")}
        for d, weights in enumerate(wide.weights):
            # Without biases, both are zero.
            zeros = np.zeros(len(weights["ih"]))
            w = weights | {n: zeros for n in ("b_ih", "b_hh") if weights[n] is None}
            states = [None if given[n] is None else given[n][d] for n in ("h_0", "c_0")]
            ends = [None if given[n] is None else given[n][d] for n in ("dh_n", "dc_n")]
            dy = given["dy"][:, d * self.out : (d + 1) * self.out]
            y, h_n, c_n, dx, dw, dh_0, dc_0 = walk(
                self.cell, w, wide.x, sizes, *states, *ends, dy, reverse=d == 1
            )
            found["dx"] = found["dx"] + dx
            ways = {"y": y, "h_n": h_n, "c_n": c_n, "dh_0": dh_0, "dc_0": dc_0}
            for name, array in ways.items():
                found.setdefault(name, []).append(array)
            found |= {f"d{n}{'_reverse' * d}": a for n, a in dw.items()}
        found["y"] = np.concatenate(found["y"], -1)
        for name in ("h_n", "c_n", "dh_0", "dc_0"):
            if name in shapes:
                found[name] = np.stack(found[name])
        return {name: found[name] for name in shapes}

    def wide(self):
        """Return the same layer in float64."""

        def widen(array):
            return None if array is None else array.astype("f8")

        weights = [{n: widen(a) for n, a in w.items()} for w in self.weights]
        return self.replace(
            x=widen(self.x), h_0=widen(self.h_0), c_0=widen(self.c_0), weights=weights
        )

    # ---- the engine ----

    def forward(self, *, threads=1, keep=True):
        """Return y, h_n, c_n and reserve, in memory that shows a write out of bounds."""
        with Poison() as poison:
            dtype, shapes = self.x.dtype, self.shapes()
            names = [n for n in ("y", "h_n", "c_n") if n in shapes]
            results = {n: poison.empty(shapes[n], dtype, n) for n in names}
            results["reserve"] = self._reserve(poison, keep=keep)
            self._forward(self._inputs(poison), results, threads)
        return results

    def backward(self, results, cotangents, *, wanted=None, threads=1):
        """Return the wanted gradients by name; all of them if `wanted` is None."""
        with Poison() as poison:
            dtype, shapes = self.x.dtype, self.shapes()
            wanted = self.gradients() if wanted is None else wanted
            grads = {n: poison.empty(shapes[n], dtype, n) for n in wanted}
            self._backward(poison, self._inputs(poison), results, cotangents, grads, threads)
        return grads

    def run(self, cotangents, *, threads=1, wanted=None):
        """Return results and gradients of forward and backward."""
        results = self.forward(threads=threads)
        grads = self.backward(results, cotangents, threads=threads, wanted=wanted)
        del results["reserve"]
        return results | grads

    def run_cut(self, lengths, resets, states, cotangents, *, threads=1, recompute=False):
        """Return results and gradients where rows are cut, and c of every step.

        `lengths` (B), `resets` (N) and the two `states` that rows begin anew at may be None.
        """
        dtype, shapes = self.x.dtype, self.shapes()
        _, rows, _, _, hidden, _, ways = self.dims
        if self.record.has_c:
            shapes |= {"cells": (rows, ways * hidden)}
        with Poison() as poison:
            out = {
                n: poison.empty(shapes[n], dtype, n)
                for n in ("y", "h_n", "c_n", "cells")
                if n in shapes
            }
            reserve = self._reserve(poison, recompute=recompute)
            inputs = self._inputs(poison, lengths, resets, *states)
            self._forward(inputs, out | {"reserve": reserve}, threads, recompute)
            grads = {n: poison.empty(shapes[n], dtype, n) for n in self.gradients()}
            for name, state in zip(CUT_GRADIENTS, states, strict=True):
                if state is not None:
                    grads[name] = poison.empty(state.shape, dtype, name)
            results = {"y": out["y"], "reserve": reserve}
            self._backward(poison, inputs, results, cotangents, grads, threads, recompute)
        return out | grads

    def soil(self):
        """Leave NaN wherever in its own scratch memory the engine puts numbers of this layer."""

        def spoil(array):
            return None if array is None else np.full_like(array, np.nan)

        weights = [{n: spoil(a) for n, a in w.items()} for w in self.weights]
        bad = self.replace(
            x=spoil(self.x), h_0=spoil(self.h_0), c_0=spoil(self.c_0), weights=weights
        )
        shapes = self.shapes()
        bad.run(
            {
                n: np.full(shapes[n[1:]], np.nan, self.x.dtype) if n[1:] in shapes else None
                for n in COTANGENTS
            }
        )

    def _head(self):
        return self.record.number, STORED.index(self.x.dtype.name), self.dims

    def _reserve(self, poison, *, keep=True, recompute=False):
        """Return room for what forward keeps for backward, in the numbers it computes in."""
        computed = np.dtype("float64" if self.x.dtype == np.float64 else "float32")
        kept = _core.reserve_bytes(*self._head(), recompute) if keep else 0
        return poison.room(kept // computed.itemsize, computed, "reserve")

    def _inputs(self, poison, *cuts):
        """Return batch_sizes, and what forward and backward read, in the engine's order."""
        sizes = None if self.sizes is None else np.array(self.sizes, np.int64)
        named = {n: getattr(self, n) for n in ("x", *STATES)}
        named |= dict(
            zip(("lengths", "resets", "reset_h", "reset_c"), cuts or [None] * 4, strict=True)
        )
        copies = [poison.copy(a, n) for n, a in named.items()]
        copies += [poison.copy(w.get(n), n) for w in self.weights for n in (*WEIGHTS, "per_unit")]
        return _address(poison.copy(sizes, "batch_sizes")), list(map(_address, copies))

    def _forward(self, inputs, results, threads, recompute=False):
        batch_sizes, first = inputs
        outputs = [results.get(n) for n in ("y", "h_n", "c_n", "cells", "reserve")]
        if not outputs[-1].size:
            outputs[-1] = None
        first = [*first, *map(_address, outputs)]
        _core.forward(*self._head(), batch_sizes, 1, first, [], threads, recompute)

    def _backward(self, poison, inputs, results, cotangents, grads, threads, recompute=False):
        batch_sizes, first = inputs
        given = results | cotangents
        copies = [poison.copy(given.get(n), n) for n in ("y", "reserve", *COTANGENTS, "dcells")]
        outputs = [grads.get(n) for n in (*GRADIENTS, *CUT_GRADIENTS)]
        for d in range(len(self.weights)):
            outputs += [grads.get(f"d{n}{'_reverse' * d}") for n in (*WEIGHTS, "per_unit")]
        first = [*first, *map(_address, copies + outputs)]
        _core.backward(*self._head(), batch_sizes, 1, first, [], threads, recompute)


def _address(array):
    return 0 if array is None else array.ctypes.data


# ---- activations ----


def every_kind_of_number(dtype, count=4000):
    """Return numbers of both signs over all exponents, denormals and the special ones included."""
    info, bits = np.finfo(dtype), np.dtype(dtype).itemsize * 8
    top = int(np.array(info.max, dtype).view(f"u{bits // 8}"))
    spread = np.linspace(0, top, count // 2).astype(f"u{bits // 8}").view(dtype)
    near = np.linspace(0, 720 if bits == 64 else 90, count // 2).astype(dtype)
    special = [0.0, info.smallest_subnormal, info.tiny, 1.0, info.max, np.inf, np.nan]
    x = np.concatenate([spread, near, np.array(special, dtype)])
    return np.concatenate([x, -x])


def first_step(cell, gate, numbers, *, h_0=0.0, others=-0.0):
    """Return the first step's results where `gate` is applied to exactly these numbers.

    They come as biases of as many units. All products are -0, which leaves the sign of a
    zero alone, and nothing but the units' own gates sees an infinity.
    """
    found = []
    for x in np.array_split(numbers, len(numbers) // 500 + 1):
        hidden, dtype = len(x), x.dtype
        gates = RECORDS[cell].gates
        rows = gates * hidden
        bias = np.full((gates, hidden), -0.0, dtype)
        bias[2:3] = others
        bias[gate] = x
        minus = np.full((rows, hidden), -0.0, dtype)
        weights = {"ih": minus[:, :1].copy(), "hh": minus, "b_ih": bias.ravel(), "hr": None}
        weights["b_hh"] = np.full(rows, -0.0, dtype)
        first = np.full((1, 1, hidden), h_0, dtype)
        layer = Layer(cell, np.zeros((1, 1), dtype), None, 1, 1, first, None, [weights])
        found.append(layer.forward(keep=False))
    return {name: np.concatenate([part[name].ravel() for part in found]) for name in found[0]}
