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

from ostinato import ops
from ostinato.call import Call, check
from ostinato.cells import CELLS
from ostinato.cuda import sequence

SOURCES = pathlib.Path(__file__).parents[1] / "csrc"
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}


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
    command += ["-shared", "-fPIC", "-x", "c++", str(SOURCES / "cuda" / config.source)]
    subprocess.run([*command, *defines, "-o", str(library)], check=True)
    entry = ctypes.CDLL(str(library)).ostinato_emulate
    entry.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return entry


def build_all(configs):
    """Compile many at once."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(build, dict.fromkeys(configs)))


def launcher(schedule=0):
    """Return what launches kernels.

    Fibers take turns upward (0), downward (1) or at random (2), or one warp starves (3).
    """

    def launch(config, walks, arguments):
        values = (ctypes.c_int64 * len(arguments))(*arguments)
        if build(config)(values, walks, schedule):
            raise RuntimeError(f"deadlock: {config}")

    # More than one walk, and fewer than most calls have.
    launch.at_once = lambda config: 3
    return launch


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
    dtype, gates = DTYPES[math], CELLS[cell].gates

    def some(*shape, scale=0.5):
        return (torch.randn(shape) * scale).to(dtype)

    lengths = resets = batch_sizes = reset_h = reset_c = None
    rows = (steps, batch)
    if "packed" in kind:
        ends = [steps, *sorted(torch.randint(1, steps + 1, (batch - 1,)).tolist(), reverse=True)]
        batch_sizes = torch.tensor([sum(end > t for end in ends) for t in range(steps)])
        rows = (sum(ends),)
    if "lengths" in kind:
        lengths = torch.randint(0, steps + 1, (batch,))
    state = (directions, batch, hidden)
    has_c = CELLS[cell].has_c
    if "resets" in kind:
        resets = torch.rand(rows) < 0.3
        if states:
            reset_h, reset_c = some(*state), some(*state) if has_c else None
    h_0 = some(*state) if states else None
    c_0 = some(*state) if states and has_c else None
    weights = []
    for _ in range(directions):
        weights += [some(gates * hidden, size, scale=0.3)]
        # Where nothing saturates, a state must not grow from step to step.
        scale = 0.7 if cell == "rnn_relu" else 1.5
        weights += [some(gates * hidden, hidden, scale=scale * hidden**-0.5)]
        weights += [some(gates * hidden, scale=0.3), some(gates * hidden, scale=0.3)] * bias
    input = some(*rows, size, scale=1.0)
    return Call(
        input,
        batch_sizes,
        batch,
        h_0,
        c_0,
        weights,
        cell,
        bias,
        directions == 2,
        False,
        lengths,
        resets,
        reset_h,
        reset_c,
    )


def forward(config, call, schedule=0):
    """Return output, h_n, c_n, cells and reserve."""
    launch = launcher(schedule)
    return sequence.forward(call, check(call), config, launch, all_c=True, keep=True)


def backward(config, call, grads, output, reserve, schedule=0):
    """Return the gradients of `call.tensors()`."""
    wanted = [tensor is not None for tensor in call.tensors()]
    launch = launcher(schedule)
    return sequence.backward(call, check(call), config, launch, grads, output, reserve, wanted)


def cut_layer(call):
    """Run a call by `ops.cut_layer`; return what there is of its results, c at every step too."""
    results = ops.cut_layer(
        *(call.cell, call.input, call.batch_sizes, call.h_0, call.c_0, call.weights),
        has_biases=call.has_biases,
        bidirectional=call.bidirectional,
        lengths=call.lengths,
        resets=call.resets,
        reset_h=call.reset_h,
        reset_c=call.reset_c,
        all_c=call.kind.has_c,
    )
    return [result for result in results if result is not None]
