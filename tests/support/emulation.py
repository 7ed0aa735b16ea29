"""The GPU engine's kernels on host fibers (csrc/cuda/emulation.h), called with CPU tensors."""

import atexit
import concurrent.futures
import ctypes
import functools
import hashlib
import pathlib
import subprocess
import tempfile

import torch

from ostinato import route
from ostinato.call import Call
from ostinato.cuda import sequence
from ostinato.cuda.config import Config, Previous
from ostinato.tensors import check_call
from support import calls
from support.samples import generator, tensor, weights_of

SOURCES = pathlib.Path(__file__).parents[2] / "csrc"
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
# Of what a product reads: the largest relative error of one rounding is half of this.
EPS = {"bf16": 2**-7, "fp16": 2**-10, "tf32": 2**-10, "fp32": 2**-23}
# What a call's rows have.
KINDS = ("padded", "packed", "lengths", "resets", "resets packed", "resets lengths")


@functools.cache
def _folder():
    folder = tempfile.TemporaryDirectory(prefix="ostinato-emulation-")
    atexit.register(folder.cleanup)
    return pathlib.Path(folder.name)


@functools.cache
def build(config):
    """Compile one instantiation; return its entry."""
    defines = [f"-D{name}={value}" for name, value in config.defines.items()]
    library = _folder() / f"{hashlib.sha256(repr(config).encode()).hexdigest()[:24]}.so"
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    # An own cell's kernel begins with its struct.
    text = library.with_suffix(".cpp")
    text.write_text(f'{config.head}#include "{config.source}"\n', "utf-8")
    command += ["-shared", "-fPIC", f"-I{SOURCES / 'cuda'}", str(text)]
    subprocess.run([*command, *defines, "-o", str(library)], check=True)
    entry = ctypes.CDLL(str(library)).ostinato_emulate
    entry.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return entry


def build_all(configs):
    """Compile many at once."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(build, dict.fromkeys(configs)))


def argument_count(config):
    """How many arguments a kernel takes."""
    if isinstance(config, Previous):
        return 12
    count = len(sequence.BACKWARD if config.is_backward else sequence.FORWARD)
    return 10 + count + (len(sequence.EXTRAS) if config.has_extras else 0)


def _value(argument):
    """What a kernel is given for a number, a tensor or None."""
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous()
        return argument.data_ptr() if argument.numel() else 0
    return argument or 0


# Where there is no GPU, no tensor has a stream, and none is captured.
if not torch.cuda.is_available():
    sequence.stream_of = lambda device_index: 0
    sequence.is_capturing = lambda: False


def launcher(schedule=0):
    """Return what launches kernels.

    Fibers take turns upward (0), downward (1) or at random (2), or one warp starves (3).
    """

    def launch(config, loops, arguments):
        assert len(arguments) == argument_count(config)
        values = (ctypes.c_int64 * len(arguments))(*map(_value, arguments))
        if build(config)(values, loops, schedule):
            raise RuntimeError(f"deadlock: {config}")

    # More than one loop, and fewer than most calls have.
    launch.at_once = lambda config: 3
    return launch


def pair(cell, math, shape):
    """The kernels of both time loops, with as many warps as share their products evenly.

    `shape` is hidden, blocks, units, warps, groups, resident, exchange and, if not 8, rows of a
    group.
    """
    hidden, blocks, units, warps, groups, resident, exchange, *rows = shape
    found = []
    for is_backward in (False, True):
        for count in (warps, 2, 1, 4, 3, 6, 8):
            front = cell, math, hidden, blocks, units, count, groups
            config = Config(*front, resident, exchange, is_backward, *rows)
            if config.is_even:
                break
        if math == "fp32":
            # There a step in k is held whole or not at all.
            config = config._replace(resident=resident * config.width)
        found.append(config)
    return found


def draw(
    cell,
    hidden,
    kind="padded",
    *,
    steps=5,
    batch=5,
    size=7,
    directions=2,
    math="fp32",
    bias=True,
    states=True,
):
    """Draw a call; `kind` names what its rows have: packed, lengths, resets."""
    rng, sizes = generator(), None
    if "packed" in kind:
        ends = [steps, *sorted(rng.integers(1, steps + 1, batch - 1), reverse=True)]
        sizes = calls.batch_sizes_of(ends, steps)
    scales = calls.Scales(0.3, calls.steady(cell, 1.5 * hidden**-0.5), bias=0.3, state=0.5)
    options = {"bias": bias, "directions": directions, "sizes": sizes, "dtype": "float32"}
    options |= {"states": calls.STATES if states else (), "anew": states}
    options |= {"lengths": "some"} if "lengths" in kind else {}
    options |= {"resets": 0.3} if "resets" in kind else {}
    drawn = calls.draw(rng, cell, steps, batch, size, hidden, scales, **options)
    rows = (steps, batch) if sizes is None else (-1,)
    sizes = None if sizes is None else torch.tensor(sizes)
    resets = None if drawn.resets is None else tensor(drawn.resets.reshape(rows))
    input, h_0, c_0, reset_h, reset_c = (
        tensor(getattr(drawn, name), DTYPES[math])
        for name in ("x", *calls.STATES, "reset_h", "reset_c")
    )
    cuts = (tensor(drawn.lengths), resets, reset_h, reset_c)
    weights = weights_of(drawn, DTYPES[math])
    options = (cell, bias, directions == 2, False)
    return Call.of(input.reshape(*rows, size), sizes, batch, h_0, c_0, weights, *options, *cuts)


def forward(config, call, schedule=0):
    """Return results, c of every step too, and reserve."""
    launch, call = launcher(schedule), sequence.dense(call._replace(all_states=True))
    rows = sequence.rows_of(call, may_keep=False)
    return sequence.forward(call, check_call(call), rows, config, launch, keep=True)


def backward(config, call, arrived, output, reserve, schedule=0):
    """Return the gradients of `call.tensors()`."""
    wanted = [tensor is not None for tensor in call.tensors()]
    launch, call = launcher(schedule), sequence.dense(call)
    sizes, arrived = check_call(call), sequence.dense_results(arrived)
    rows = sequence.rows_of(call, may_keep=False)
    return sequence.backward(call, sizes, rows, config, launch, arrived, output, reserve, wanted)


def cut_layer(call):
    """Run a call by its route; return its results, c at every step too."""
    return route.run(call._replace(all_states=True)).flat()


def errors(found, expected, terms=0.0):
    """Return the largest error, relative to the largest element or, if larger, to `terms`."""
    assert (found is None) == (expected is None) or not (
        found if expected is None else expected
    ).any()
    if found is None or expected is None or not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp_min(max(0.1, terms))
    return ((found.double() - expected).abs().max() / scale).item()


def widened(call):
    def widen(tensor):
        return None if tensor is None else tensor.detach().double().requires_grad_()

    return call.with_tensors([widen(t) for t in call.tensors()])
