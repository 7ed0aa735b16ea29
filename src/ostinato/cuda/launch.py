"""From machine code to a running kernel: loading and launching through cuda-core.

Loading happens once per kernel and device, and before a kernel's first launch. A launch neither
allocates nor waits: it may be captured in a CUDA graph, and it goes to torch's current stream.

Every argument of a kernel is a pointer or a long long, in eight bytes. C++ launches
(csrc/gpu.cpp), by functions whose addresses the driver gives.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ostinato import _core
from ostinato.cuda import compiler
from ostinato.cuda.compiler import Compiled, Instantiation

_log = logging.getLogger("ostinato")

# Dynamic shared memory that every kernel may have; more is to be asked for.
_SHARED_BYTES = 48 * 1024
# The largest cluster that every device with clusters takes; a larger one is to be asked for.
_PORTABLE_CLUSTER = 8
# DLPack's number of CUDA.
DEVICE_TYPE = 2
# What C++ launches with, and the version of CUDA that each is asked for in: where it changed last.
_FUNCTIONS = {
    "cuLaunchKernelEx": 11080,
    "cuCtxGetCurrent": 4000,
    "cuCtxPushCurrent": 4000,
    "cuCtxPopCurrent": 4000,
}


class Launchable(Instantiation, Protocol):
    """What this module asks of a kernel's configuration, which must be hashable."""

    @property
    def threads(self) -> int:
        """Threads of a block."""

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""

    @property
    def blocks(self) -> int:
        """Blocks that work on one batch tile."""

    @property
    def exchange(self) -> str:
        """How those blocks exchange states; "grid" needs all blocks on the device at once."""

    @property
    def needs(self) -> str:
        """The least architecture: "sm_80" or "sm_90"."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A kernel on one device; `compiled` says what it uses."""

    config: Launchable
    device_index: int
    compiled: Compiled
    code: Any  # cuda-core's object, which keeps the machine code loaded
    kernel: _core.GpuKernel


@functools.cache
def available() -> bool:
    """Find out once whether this process can compile and load kernels; the log says why not.

    It cannot without cuda-core, cuda-bindings or NVRTC, and where the driver is older than NVRTC.
    """
    advice = "torch's cuDNN operator serves GPUs: pip install ostinato[cuda] for kernels of ours"
    try:
        compiler.core()
        version, driver = compiler.nvrtc_version(), driver_version()
    except (ImportError, RuntimeError) as error:
        _log.warning("%s (%s)", advice, error)
        return False
    # A driver loads what compilers up to its own major version made.
    if version[0] > driver[0]:
        _log.warning(
            "torch's cuDNN operator serves GPUs: kernels of ours need a compiler for CUDA %d, the "
            "driver's version, but NVRTC is of CUDA %d",
            driver[0],
            version[0],
        )
        return False
    return True


def architecture(device_index: int) -> str:
    """Name the architecture that kernels are compiled for, by torch's index of the device.

    Such as "sm_80", or "sm_90a", with the instructions of Hopper alone.
    """
    capability = _capability(device_index)
    return f"sm_{capability}" + ("a" if capability == 90 else "")


def _capability(device_index: int) -> int:
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


# ---- loading ----

_loaded: dict[tuple[Launchable, int], Loaded] = {}
_lock = threading.Lock()


def load(config: Launchable, device_index: int) -> Loaded:
    """Compile a kernel, or take it from the cache, and load it onto a device; once for both.

    `device_index` is torch's. Every call returns the same object.

    Raises:
        CompileError: the compiler refused it.
        RuntimeError: the device is older than the kernel needs, or the driver refused it.
    """
    key = config, device_index
    found = _loaded.get(key)
    if found is None:
        with _lock:
            found = _loaded.get(key)
            if found is None:
                found = _loaded[key] = _load(config, device_index)
    return found


def _load(config: Launchable, device_index: int) -> Loaded:
    arch = architecture(device_index)
    if _capability(device_index) < int(config.needs.removeprefix("sm_")):
        raise RuntimeError(
            f"device_index: expected a device of {config.needs} or later, got cuda:{device_index}, "
            f"which is {arch}"
        )
    compiled = compiler.compile(config, arch)
    driver = _driver()
    with torch.cuda.device(device_index), _outside_capture(driver):
        _bind(device_index)
        try:
            code = compiler.core().ObjectCode.from_cubin(compiled.cubin, name=config.entry)
            kernel = code.get_kernel(config.entry)
        except compiler.cuda_error() as error:
            raise RuntimeError(f"cuda:{device_index} cannot load {config}: {error}") from error
        device = _checked("cuDeviceGet", driver.cuDeviceGet(device_index))
        attributes = driver.CUfunction_attribute
        asked = []
        if config.shared_bytes > _SHARED_BYTES:
            name = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            asked.append((name, config.shared_bytes))
        if config.blocks > _PORTABLE_CLUSTER and config.exchange != "grid":
            asked.append((attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1))
        for name, value in asked:
            result = driver.cuKernelSetAttribute(name, value, kernel.handle, device)
            _checked(f"cuKernelSetAttribute({name}, {value}) of {config}", result)
        # The driver loads lazily; a first launch may be one that a graph captures.
        function = _checked("cuKernelGetFunction", driver.cuKernelGetFunction(kernel.handle))
        if driver_version() >= (12, 4):
            _checked("cuFuncLoad", driver.cuFuncLoad(function))
        context = _checked("cuCtxGetCurrent", driver.cuCtxGetCurrent())
        _connect()
    shape = config.threads, config.blocks if config.exchange == "cluster" else 1
    options = *shape, config.shared_bytes, config.exchange == "grid"
    # The driver takes a kernel's handle for a function's; what was set above is set of that one.
    entry = _core.GpuKernel(int(kernel.handle), int(context), DEVICE_TYPE, device_index, *options)
    return Loaded(config, device_index, compiled, kernel, entry)


@functools.cache
def _connect() -> None:
    """Give C++ the functions that it launches with."""
    driver = _driver()
    # torch's default stream is the null handle, which is the legacy one.
    flag = driver.CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_LEGACY_STREAM
    found = []
    for name, version in _FUNCTIONS.items():
        result = driver.cuGetProcAddress(name.encode(), version, flag)
        address = int(_checked(f"cuGetProcAddress({name})", result))
        if not address:
            raise RuntimeError(f"cuGetProcAddress({name}): expected an address, got none")
        found.append(address)
    _core.connect_driver(*found)


@contextlib.contextmanager
def _outside_capture(driver: Any) -> Iterator[None]:
    """Let this thread load a kernel while some stream is being captured, which would end that."""
    name = "cuThreadExchangeStreamCaptureMode"
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    mode = _checked(name, driver.cuThreadExchangeStreamCaptureMode(mode))
    try:
        yield
    finally:
        _checked(name, driver.cuThreadExchangeStreamCaptureMode(mode))


# ---- launching ----


def launch(loaded: Loaded, blocks: int, stream: int, arguments: tuple[Any, ...]) -> None:
    """Launch a kernel on its device.

    The caller keeps what the arguments point to alive in the stream's order, as torch's allocator
    does for tensors that are made and dropped on the current stream.

    Args:
        loaded: the kernel.
        blocks: how many blocks; where they work in clusters or as one cooperative grid, the kernel
            says so.
        stream: the driver's handle of a stream of the device.
        arguments: numbers, dense tensors on the device, and None for a null pointer.

    Raises:
        RuntimeError: the driver refused the launch; a cooperative grid may be larger than the
            device holds at once.
        TypeError, ValueError: an argument is none of these.
    """
    try:
        loaded.kernel.launch(blocks, stream, arguments)
    except RuntimeError as error:
        raise RuntimeError(
            f"cuda:{loaded.device_index} cannot launch {blocks} blocks of {loaded.config}: {error}"
        ) from error


def _bind(device_index: int) -> None:
    """Give this thread a context, which torch's calls may not have done in a new thread."""
    compiler.core().Device(device_index).set_current()


# ---- NVIDIA's modules, which are optional and slow to import ----


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


@functools.cache
def driver_version() -> tuple[int, int]:
    """Ask the driver which version of CUDA it serves, major and minor."""
    version = _checked("cuDriverGetVersion", _driver().cuDriverGetVersion())
    return version // 1000, version % 1000 // 10


def _checked(call: str, result: tuple[Any, ...]) -> Any:
    """Return what a call of the driver gave beside its error code."""
    error, value, *_ = (*result, None)
    if error != _driver().CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{call}: expected CUDA_SUCCESS, got {error!r}")
    return value
