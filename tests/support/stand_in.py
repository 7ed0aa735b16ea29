"""A GPU that is not there: CPU tensors go the way of CUDA tensors, to a driver of ours."""

import collections
import contextlib
import ctypes
import subprocess
import unittest.mock

import torch

from ostinato import _core, fast_path
from ostinato.cuda import choice, fast, launch, layer, sequence
from ostinato.cuda.plan import H200
from support import emulation

CPU = 1  # DLPack's number
CONTEXT = 0xC0


class LaunchConfig(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    ]


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(LaunchConfig),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)),
    ctypes.c_void_p,
)
_CURRENT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_size_t))
_PUSH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t)


class Attribute(ctypes.Structure):
    """The driver's CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


def attributes_of(config):
    """Name the attributes of a launch that our kernels may have."""
    found = {}
    for i in range(config.attribute_count):
        attribute = ctypes.cast(config.attributes, ctypes.POINTER(Attribute))[i]
        x, y, z, *_ = attribute.value
        # By the numbers of CUlaunchAttributeID.
        found |= {4: {"cluster": (x, y, z)}, 2: {"cooperative": x}}[attribute.id]
    return found


class Driver:
    """What C++ launches with; it runs nothing by itself."""

    def __init__(self):
        self.asked = collections.Counter()
        self.context, self.stack, self.error = CONTEXT, [], 0
        self.kernels = []  # by their handles, from 1 on
        self.last = self.failure = None
        self._functions = (
            _LAUNCH(self._launch),
            _CURRENT(self._current),
            _PUSH(self._push),
            _CURRENT(self._pop),
        )
        values = [ctypes.cast(f, ctypes.c_void_p).value for f in self._functions]
        self.addresses = dict(zip(launch._FUNCTIONS, values, strict=True))
        _core.connect_driver(*values)

    def _launch(self, config, function, parameters, extra):
        self.asked["launch"] += 1
        self.last = config[0]
        self.context_of_last = self.context
        if self.error:
            return self.error
        try:
            self.run(self.kernels[function - 1], config[0], parameters)
        except (RuntimeError, subprocess.CalledProcessError) as error:  # lost if it left here
            self.failure = error
            return 719
        return 0

    def run(self, kernel, config, parameters):
        """Run a launch."""

    def _current(self, found):
        self.asked["current"] += 1
        found[0] = self.context
        return 0

    def _push(self, context):
        self.asked["push"] += 1
        self.stack.append(self.context)
        self.context = context
        return 0

    def _pop(self, found):
        self.asked["pop"] += 1
        self.context = self.stack.pop()
        return 0

    def load(self, config, device_index=0):
        """Stand in for `launch.load`."""
        if config not in self.kernels:
            self.kernels.append(config)
        cluster = config.blocks if config.exchange == "cluster" else 1
        options = config.threads, cluster, config.shared_bytes, config.exchange == "grid"
        handle = self.kernels.index(config) + 1
        kernel = _core.GpuKernel(handle, CONTEXT, CPU, 0, *options)
        return launch.Loaded(config, device_index, None, None, kernel)


class Emulator(Driver):
    """A driver that runs kernels on host fibers."""

    def run(self, kernel, config, parameters):
        """Run a launch."""
        count = emulation.argument_count(kernel)
        values = (ctypes.c_int64 * count)(*(parameters[i][0] for i in range(count)))
        blocks, *_ = config.grid
        if emulation.build(kernel)(values, blocks // kernel.blocks, 0):
            raise RuntimeError(f"deadlock: {kernel}")


@contextlib.contextmanager
def _in_place(driver):
    loaded = {}

    def load(config, index):
        if config not in loaded:
            loaded[config] = driver.load(config, index)
        return loaded[config]

    changes = [
        (launch, "load", load),
        (launch, "available", lambda: True),
        (layer, "device_of", lambda index: H200),
        (sequence, "stream_of", lambda index: 0),
        (sequence, "is_capturing", lambda: False),
        (torch.cuda, "get_device_name", lambda index: "a stand-in"),
        (fast, "_device_type", CPU),
        (fast, "_is_here", lambda tensor: True),
        (fast, "_ways", {}),
        (fast_path, "_forward", fast.forward),
        (fast_path, "_backward", fast.backward),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(unittest.mock.patch.object(owner, name, value))
        stack.enter_context(choice.forced(True))
        yield driver
    if driver.failure:
        raise driver.failure


@contextlib.contextmanager
def recording():
    """Let calls of layers go to a driver that runs nothing; yields what it is asked."""
    with _in_place(Driver()) as driver:
        yield driver.asked


@contextlib.contextmanager
def emulated():
    """Let calls of layers run kernels on host fibers; yields the driver."""
    with _in_place(Emulator()) as driver:
        yield driver
