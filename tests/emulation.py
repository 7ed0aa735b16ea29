"""The GPU engine's kernels on host fibers (csrc/cuda/emulation.h): built by g++, called with CPU tensors."""

import ctypes
import functools
import hashlib
import os
import pathlib
import subprocess
import tempfile

SOURCES = pathlib.Path(__file__).parents[1] / "csrc"


@functools.cache
def folder():
    return tempfile.TemporaryDirectory(prefix="ostinato-emulation-")


@functools.cache
def build(config, sanitize=False):
    """Compile one instantiation; return its entry."""
    defines = [f"-D{name}={value}" for name, value in config.defines.items()]
    name = hashlib.sha256(repr((config, sanitize)).encode()).hexdigest()[:16]
    library = pathlib.Path(folder().name) / f"{name}.so"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += ["-x", "c++", str(SOURCES / "cuda" / config.source), *defines, "-o", str(library)]
    subprocess.run(command, check=True, env={**os.environ, "LC_ALL": "C"})
    entry = ctypes.CDLL(str(library)).ostinato_emulate
    entry.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    return entry


def run(config, tiles, directions, arguments, schedule=0):
    """Run a kernel as a launch would: arguments are addresses and numbers."""
    values = (ctypes.c_int64 * len(arguments))(*arguments)
    if build(config)(values, tiles, directions, schedule):
        raise RuntimeError(f"deadlock: {config}")
