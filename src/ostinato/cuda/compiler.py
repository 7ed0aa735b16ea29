"""From a kernel's text to its machine code: NVRTC through cuda-core, and the cache of its results.

The text stands beside this file in a wheel and in csrc/ of a source tree. An instantiation of it
is one set of macros; NVRTC makes a cubin of it in a tenth of a second to some seconds. No driver
and no GPU take part, so every instantiation can be compiled anywhere.

What was compiled is kept in the user's cache (`ostinato.cuda.cache`), in the folder cubins.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from ostinato.cuda.cache import Cache

_SUFFIXES = (".cu", ".cuh", ".h")
# Contraction is off, as for the CPU: the bits must not depend on where a compiler sees a multiply
# next to an add. cells.h has plain constexpr functions, which are the device's here. Without
# no_source_include, a header in the working directory would be taken for ours. -v makes ptxas
# say what registers and stack a kernel uses.
_OPTIONS: dict[str, Any] = {
    "std": "c++17",
    "fma": False,
    "device_as_default_execution_space": True,
    "no_source_include": True,
    "ptxas_options": ["-v"],
}


class Instantiation(Protocol):
    """What this module asks of a kernel's configuration."""

    @property
    def source(self) -> str:
        """The main file's name, relative to csrc/cuda."""

    @property
    def head(self) -> str:
        """What stands before the text of that file."""

    @property
    def entry(self) -> str:
        """The name of the extern "C" kernel."""

    @property
    def defines(self) -> Mapping[str, str | int]:
        """The macros that the text is compiled with."""


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code, and what ptxas said of it.

    Nothing runs by what it said: NVRTC keeps what it compiled, for all processes of a user, and
    says nothing where it finds it there. Facts are None then.
    """

    cubin: bytes
    registers: int | None
    stack_bytes: int | None
    spill_stores: int | None
    spill_loads: int | None
    log: str


class CompileError(RuntimeError):
    """The compiler refused a kernel's text; `log` is what it said."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(f"{message}\n{log}".rstrip())
        self.log = log


def text_folder() -> Path:
    """Find the folder of cells.h, in which cuda/ holds the kernels.

    It is csrc beside this file, where a wheel has it, or else that of the source tree. Raises
    FileNotFoundError where neither is there.
    """
    here = Path(__file__).resolve().parent
    folders = (here / "csrc", here.parents[2] / "csrc")
    for folder in folders:
        if (folder / "cells.h").is_file():
            return folder
    raise FileNotFoundError(f"cells.h: expected in {folders[0]} or {folders[1]}, found in neither")


def nvrtc_version() -> tuple[int, int]:
    """Ask the compiler for its version, major and minor.

    Raises ImportError where cuda-bindings is not installed, and RuntimeError where the compiler's
    library is not found.
    """
    from cuda.bindings import nvrtc

    error, major, minor = nvrtc.nvrtcVersion()
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcVersion: expected NVRTC_SUCCESS, got {error!r}")
    return major, minor


def compile(config: Instantiation, arch: str) -> Compiled:
    """Make machine code of one instantiation, or take it from the cache.

    `arch` is the architecture, such as "sm_80" or "sm_90a".

    Raises:
        CompileError: the compiler refused the text, an option or the architecture.
        ImportError: cuda-core is not installed.
        RuntimeError: the compiler's library is not found.
    """
    text = text_folder()
    key = _key(text, config, arch)
    folder = cache_folder()
    found = None if folder is None else _read(folder, key)
    if found is None:
        found = _compile(text, config, arch)
        # Text that was edited meanwhile may be what the compiler read.
        if folder is not None and _key(text, config, arch) == key:
            _write(folder, key, found)
    return found


def _key(text: Path, config: Instantiation, arch: str) -> str:
    """Hash all that a cubin depends on: every source, macros, architecture, compiler, options."""
    parts = {
        "sources": sources(text),
        "source": config.source,
        "head": config.head,
        "entry": config.entry,
        "defines": {name: str(value) for name, value in config.defines.items()},
        "arch": arch,
        "nvrtc": nvrtc_version(),
        "options": _OPTIONS,
        "facts": [field.name for field in fields(Compiled)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def sources(text: Path) -> dict[str, str]:
    """Hash each source of the kernels, by its name in the folder `text`."""
    files = sorted(path for path in (text / "cuda").glob("*") if path.suffix in _SUFFIXES)
    return {
        path.relative_to(text).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (text / "cells.h", *files)
    }


def text_of(config: Instantiation, folder: Path) -> str:
    """Return what is compiled of an instantiation; the sources are in `folder`."""
    return config.head + (folder / config.source).read_text("utf-8")


def _compile(text: Path, config: Instantiation, arch: str) -> Compiled:
    folder = text / "cuda"
    what = f"{config.source} with {dict(config.defines)} for {arch}"
    options = core().ProgramOptions(
        name=config.source,
        arch=arch,
        include_path=[str(folder)],
        # It takes no empty list.
        define_macro=[(name, str(value)) for name, value in config.defines.items()] or None,
        **_OPTIONS,
    )
    log = _Log()
    try:
        code = core().Program(text_of(config, folder), "c++", options)
        cubin = bytes(code.compile("cubin", logs=log).code)
    except cuda_error() as error:
        raise CompileError(f"NVRTC cannot compile {what}", _clean(str(error))) from error
    return _measured(cubin, config.entry, _clean(log.text), what)


_import = threading.Lock()


@functools.cache
def core() -> Any:
    """Import NVIDIA's `cuda.core`, which is optional and slow to import.

    Raises ImportError where it is not installed.
    """
    # Its package puts another one in its own place while it is imported, which a second thread
    # would find half done (1.2.2).
    with _import:
        import cuda.core

        return cuda.core


def cuda_error() -> type[Exception]:
    """Find what cuda-core raises where the compiler or the driver refuses something.

    The type is neither a RuntimeError nor named by a public module.
    """
    from cuda.core._utils.cuda_utils import CUDAError

    found: type[Exception] = CUDAError
    return found


class _Log:
    """What cuda-core writes the compiler's log into."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


def _clean(log: str) -> str:
    # The C string's end comes along, and ptxas's time, which differs each time.
    return re.sub(r"\n.*Compile time = .*", "", log.replace("\0", "")).strip()


def _measured(cubin: bytes, entry: str, log: str, what: str) -> Compiled:
    """Read from ptxas's log what the kernel uses; functions that it calls are listed as well."""
    # The section of machine code that each kernel has.
    if f".text.{entry}\0".encode() not in cubin:
        raise CompileError(f"{what}: expected a kernel named {entry}, found none", log)
    found = re.search(
        rf"Function properties for {re.escape(entry)}\n\D*(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers",
        log,
    )
    if found is None:
        return Compiled(cubin, None, None, None, None, log)
    stack, stores, loads, registers = map(int, found.groups())
    return Compiled(cubin, registers, stack, stores, loads, log)


# ---- the cache ----

_CUBINS = Cache(
    "cubins", ".cubin", b"ostinato cubin 1", "kernels are compiled anew in each process"
)
cache_folder = _CUBINS.folder


def _read(folder: Path, key: str) -> Compiled | None:
    """Read a cubin, or find that there is none which can be trusted."""
    content = _CUBINS.read(folder, key)
    if content is None:
        return None
    facts, _, cubin = content.partition(b"\n")
    return Compiled(cubin=cubin, **json.loads(facts))


def _write(folder: Path, key: str, compiled: Compiled) -> None:
    facts = {name: value for name, value in vars(compiled).items() if name != "cubin"}
    _CUBINS.write(folder, key, json.dumps(facts).encode() + b"\n" + compiled.cubin)
