"""The same bits on another processor: results are written on one machine and compared on another.

    python -m support.architectures write DIRECTORY
    python -m support.architectures check DIRECTORY [--part 1/4] [--threads 1 2 3]

`write` draws layers, runs them forward and backward, and leaves a .npz for each: all arguments, and
every output, final state and gradient. `check` takes the arguments from there, since a generator's
numbers go through functions of the C library, runs them on this machine and compares the bits.

Legend: T steps, B batch, N packed rows, I input, H hidden, D directions.
"""

import argparse
import dataclasses
import itertools
import platform
import sys
import time
from pathlib import Path

import numpy as np

from ostinato import Stream, _core
from support.calls import STATES, ragged, seed_of
from support.cells import KINDS, cell_of, has_c
from support.engine import COTANGENTS, Layer, every_kind_of_number, first_step
from support.faces import draw_parameters
from support.storage import narrow, stored

STORAGES = ("float32", "float64", "bfloat16", "float16")
LAYOUTS = ("padded", "packed", "lengths", "resets")
# T, B, I, H: one row and many, one step and many, less than a vector and many, sums over k that are
# cut (128), rows that threads share by units, and steps that are taken in several pieces.
SIZES = (
    (1, 1, 3, 1),
    (1, 3, 140, 35),
    (1, 19, 9, 49),
    (5, 1, 7, 33),
    (6, 2, 300, 17),
    (7, 13, 9, 48),
    (4, 37, 17, 31),
)
# Of streams: one row, rows that threads share by units, and many.
STREAM_SIZES = ((5, 1, 70, 33), (6, 2, 40, 210), (4, 37, 17, 31))
LARGE = ((9, 3, 5, 131), (90, 5, 2, 97))  # in one direction: two would be walked apart
# What is applied to every kind of number: cell, gate and options of `first_step`.
ACTIVATIONS = {
    "tanh": ("rnn_tanh", 0, {}),
    "relu": ("rnn_relu", 0, {}),
    "sigmoid": ("gru", 1, {"h_0": 1.0}),
    "sigmoid times tanh": ("lstm", 0, {"others": 100.0}),
    "tanh times sigmoid": ("lstm", 2, {}),
}

ORIGIN = "origin.txt"  # where the results come from
MOST = 50  # how many runs that differ are named


@dataclasses.dataclass
class Case:
    """A layer, the gradients that arrive, and where rows are cut; absent arrays are None."""

    layer: Layer
    cotangents: dict
    lengths: np.ndarray | None = None  # (B)
    resets: np.ndarray | None = None  # (N)
    states: tuple = (None, None)  # at which rows begin anew, (D, B, O) and (D, B, H)

    def runs(self, threads):
        """Yield a way to run the layer and its results; the first has all."""
        cut = (self.lengths, self.resets, self.states, self.cotangents)
        if self.lengths is None and self.resets is None:
            yield "training", self.layer.run(self.cotangents, threads=threads)
            results = self.layer.forward(keep=False, threads=threads)
            yield "inference", {n: a for n, a in results.items() if n != "reserve"}
        else:
            yield "training", self.layer.run_cut(*cut, threads=threads)
            yield "recompute", self.layer.run_cut(*cut, threads=threads, recompute=True)

    def arrays(self):
        """Return all arguments by name."""
        layer = self.layer
        given = {n: getattr(layer, n) for n in ("cell", "x", "sizes", "steps", "batch", *STATES)}
        given |= dict(layer.named_weights()) | self.cotangents
        given |= {"lengths": self.lengths, "resets": self.resets}
        given |= dict(zip(("cut_h", "cut_c"), self.states, strict=True))
        return {n: np.asarray(a) for n, a in given.items() if a is not None}

    @classmethod
    def of(cls, arrays):
        """Make a case of what `arrays` returned."""
        directions = 1 + ("ih_reverse" in arrays)
        names = ("ih", "hh", "b_ih", "b_hh", "hr")
        sizes = arrays.get("sizes")
        layer = Layer(
            str(arrays["cell"]),
            arrays["x"],
            None if sizes is None else sizes.tolist(),
            int(arrays["steps"]),
            int(arrays["batch"]),
            *(arrays.get(n) for n in STATES),
            [{n: arrays.get(n + "_reverse" * d) for n in names} for d in range(directions)],
        )
        cotangents = {n: arrays.get(n) for n in (*COTANGENTS, "dcells")}
        cut = [arrays.get(n) for n in ("cut_h", "cut_c")]
        return cls(layer, cotangents, arrays.get("lengths"), arrays.get("resets"), tuple(cut))


@dataclasses.dataclass
class Numbers:
    """An activation of every kind of number."""

    activation: str
    numbers: np.ndarray

    def runs(self, threads):
        """Yield the results of one step, whatever the number of threads."""
        cell, gate, options = ACTIVATIONS[self.activation]
        found = first_step(cell, gate, self.numbers, **options)
        yield "inference", {n: a for n, a in found.items() if n != "reserve"}

    def arrays(self):
        """Return all arguments by name."""
        return {"activation": np.asarray(self.activation), "numbers": self.numbers}

    @classmethod
    def of(cls, arrays):
        """Make a case of what `arrays` returned."""
        return cls(str(arrays["activation"]), arrays["numbers"])


@dataclasses.dataclass
class Small:
    """A stream with weights of 8 bits over a sequence."""

    kind: str
    activations: str
    x: np.ndarray  # (T, B, I)
    parameters: dict  # int8, with scales

    def runs(self, threads):
        """Yield output and states."""
        steps, rows, _ = self.x.shape
        stream = stream_of(self.kind, self.parameters, self.activations, rows)
        before = stream.state if has_c(self.kind) else (stream.state,)
        y = np.empty((steps, rows, next(iter(before)).shape[-1]), np.float32)
        stream._core.run(self.x.ctypes.data, y.ctypes.data, steps, rows, 0, threads)
        states = stream.state if has_c(self.kind) else (stream.state,)
        yield "inference", {"y": y} | dict(zip(("h_n", "c_n"), states, strict=False))

    def arrays(self):
        """Return all arguments by name."""
        words = {"stream": self.kind, "activations": self.activations}
        return {n: np.asarray(word) for n, word in words.items()} | {"x": self.x} | self.parameters

    @classmethod
    def of(cls, arrays):
        """Make a case of what `arrays` returned."""
        parameters = {n: a for n, a in arrays.items() if n.startswith(("weight", "bias"))}
        return cls(str(arrays["stream"]), str(arrays["activations"]), arrays["x"], parameters)

    @classmethod
    def draw(cls, name, kind, activations, shape):
        """Draw one case; the weights are rounded here."""
        steps, batch, size, hidden = shape
        rng = np.random.default_rng(seed_of(name))
        given = draw_parameters(rng, kind, size, hidden, layers=2, dtype="float32")
        x = rng.standard_normal((steps, batch, size)).astype("f4")
        return cls(kind, activations, x, stream_of(kind, given, activations, batch).parameters)


def stream_of(kind, parameters, activations, batch):
    """Make a stream of 8 bits."""
    options = {"dtype": "int8", "activations": activations, "batch": batch}
    return Stream(cell_of(kind), parameters, **options)


def draw(name, kind, storage, layout, shape, directions):
    """Draw one case."""
    steps, batch, size, hidden = shape
    rng = np.random.default_rng(seed_of(name))
    sizes = ragged(rng, steps, batch, empty=batch // 6) if layout in ("packed", "resets") else None
    bare = shape == SIZES[3]
    layer = Layer.draw(
        rng,
        kind,
        steps,
        batch,
        size,
        hidden,
        directions=directions,
        dtype="float64" if storage == "float64" else "float32",
        sizes=sizes,
        bias=not bare,
        states=() if bare else STATES,
        lengths="some" if layout == "lengths" else None,
        resets=0.3 if layout in ("lengths", "resets") else None,
        anew=layout == "lengths",
    )
    case = Case(layer, layer.cotangents(rng), *layer.cuts)
    if case.resets is not None:
        case.cotangents["dcells"] = None
        if layer.record.has_c:
            cells = (len(layer.x), directions * layer.dims[4])
            case.cotangents["dcells"] = rng.standard_normal(cells).astype(layer.x.dtype)
    if storage in ("bfloat16", "float16"):
        case.layer = stored(layer, storage)
        case.cotangents = {n: narrow(a, storage) for n, a in case.cotangents.items()}
        case.states = tuple(narrow(a, storage) for a in case.states)
    return case


def cases():
    """Return all cases: a function that draws each, by its name."""
    found = {}
    shapes = [*itertools.product(SIZES, (1, 2)), *((shape, 1) for shape in LARGE)]
    for *options, (shape, directions) in itertools.product(KINDS, STORAGES, LAYOUTS, shapes):
        kind, storage, layout = options
        options = (*options, shape, directions)
        name = f"{kind}-{storage}-{layout}-{'x'.join(map(str, shape))}-{directions}"
        found[name] = lambda name=name, options=options: draw(name, *options)
    for activation, dtype in itertools.product(ACTIVATIONS, ("float32", "float64")):
        found[f"{activation}-{dtype}"] = lambda activation=activation, dtype=dtype: Numbers(
            activation, every_kind_of_number(dtype)
        )
    for kind, activations, shape in itertools.product(KINDS, ("int8", "int16"), STREAM_SIZES):
        options = (kind, activations, shape)
        name = f"{kind}-int8-{activations}-{'x'.join(map(str, shape))}"
        found[name] = lambda name=name, options=options: Small.draw(name, *options)
    return found


def is_nan(array):
    """Say where there is a NaN; 16-bit words are bfloat16."""
    if array.dtype == np.int8:
        return np.zeros(array.shape, bool)
    return array & 0x7FFF > 0x7F80 if array.dtype == np.uint16 else np.isnan(array)


def different(actual, expected):
    """Count the elements whose bits differ; a NaN is a NaN whatever its sign and payload."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return expected.size or 1
    words = f"u{actual.dtype.itemsize}"
    differs = np.ascontiguousarray(actual).view(words) != np.ascontiguousarray(expected).view(words)
    return np.count_nonzero(differs & ~(is_nan(actual) & is_nan(expected)))


def write(directory, names):
    """Write a file for each case."""
    directory.mkdir(parents=True, exist_ok=True)
    drawers = cases()
    for name in names:
        case = drawers[name]()
        written = {f"in {n}": a for n, a in case.arrays().items()}
        first, *others = case.runs(1)
        if not isinstance(case, Numbers):
            # Else a NaN would stand for whatever the other machine has there.
            bad = [n for n, a in first[1].items() if is_nan(a).any()]
            assert not bad, f"{name}: {bad}"
        written |= {f"out {n}": a for n, a in first[1].items()}
        # In 16 bits, gates that are computed again start from rounded states.
        for way, results in others:
            for n, a in results.items():
                if different(a, first[1][n]):
                    written[f"{way} {n}"] = a
        np.savez(directory / f"{name}.npz", **written)
    (directory / ORIGIN).write_text(here(), encoding="utf-8")


def check(directory, names, threads):
    """Compare this machine's bits with those in the files.

    Returns:
        How many numbers were compared, and a line for each run that differs.
    """
    compared, wrong = 0, []
    for name in names:
        with np.load(directory / f"{name}.npz") as file:
            arrays = dict(file.items())
        given, expected = under("in ", arrays), under("out ", arrays)
        drawn = Case if "cell" in given else Small if "stream" in given else Numbers
        case = drawn.of(given)
        for count in threads:
            for index, (way, found) in enumerate(case.runs(count)):
                own = expected | under(f"{way} ", arrays)
                bad = [] if index or found.keys() == own.keys() else ["other results"]
                for array in sorted(found.keys() & own.keys()):
                    compared += own[array].size
                    if number := different(found[array], own[array]):
                        bad.append(f"{number} of {own[array].size} of {array}")
                if bad:
                    wrong.append(f"{name}, {way}, {count} threads: {', '.join(bad)}")
    return compared, wrong


def under(prefix, arrays):
    """Return the arrays whose names begin so, without that."""
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def here():
    """Name this machine and the instruction set in use."""
    return f"{platform.machine()} ({_core.isa()})"


def part_of(names, part):
    """Return the share 'i/n' of the names, every n-th."""
    index, count = map(int, part.split("/"))
    if not 1 <= index <= count:
        raise ValueError(f"part must be i/n with 1 <= i <= n, got {part}")
    return list(names)[index - 1 :: count]


def main(argv=None):
    """Run one command; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["write", "check"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--part", default="1/1", help="i/n: every n-th case")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args(argv)
    names, started = part_of(cases(), arguments.part), time.perf_counter()
    if arguments.command == "write":
        write(arguments.directory, names)
        print(f"{len(names)} cases written on {here()}")
        return 0
    origin = (arguments.directory / ORIGIN).read_text(encoding="utf-8")
    compared, wrong = check(arguments.directory, names, arguments.threads)
    for line in wrong[:MOST]:
        print(line)
    seconds = time.perf_counter() - started
    print(
        f"{len(names)} cases, {arguments.threads} threads: {compared} numbers of {here()} compared "
        f"with those of {origin}, {len(wrong)} runs differ ({seconds:.0f} s)"
    )
    return len(wrong) > 0


if __name__ == "__main__":
    sys.exit(main())
