"""What all tests share: the device, seeds, tolerances, and memory that shows what touches it.

No import of torch here: the engine's tests run where there is none.
"""

import collections
import contextlib
import ctypes
import platform
import sys
import zlib

import hypothesis
import numpy as np
import pytest

# One run is as good as the next on a busy machine, and every run draws the same examples.
hypothesis.settings.register_profile("ostinato", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ostinato")


# ---- the device ----

# Modules that are of the CPU alone, by reason; a single test says so by the marker `cpu`.
CPU_ALONE = {
    "the compiled engine": "architectures core lengths narrow threads",
    "bits that the CPU engine promises": "invariance",
    "the short way past torch's dispatcher": "tensors",
    "NumPy": "math numpy numpy_input",
    "ONNX Runtime": "onnx onnx_node",
    "the package, its commands and documents": "bench documents init main report",
    "no operator of torch's runs, which is cuDNN's way": "seams",
    "they choose their devices themselves": (
        "bench_gpu cuda_compiler cuda_kernels cuda_launch cuda_layer cuda_report gpu"
    ),
}
_REASONS = {f"test_{name}": why for why, names in CPU_ALONE.items() for name in names.split()}


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="where tests make tensors; not all tests can elsewhere"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu(reason): of the CPU alone; not run on other devices")


def reason_of(item):
    """Say why a test is of the CPU alone; None where it is not."""
    mark = item.get_closest_marker("cpu")
    return mark.args[0] if mark else _REASONS.get(item.path.stem)


def pytest_collection_modifyitems(config, items):
    """Leave out what is of the CPU alone."""
    if config.getoption("device") == "cpu":
        return
    left = [item for item in items if reason_of(item)]
    items[:] = [item for item in items if not reason_of(item)]
    config.hook.pytest_deselected(items=left)
    config.stash[_LEFT] = collections.Counter(map(reason_of, left))


_LEFT = pytest.StashKey()


def pytest_report_collectionfinish(config):
    """Tell what was left out."""
    left = config.stash.get(_LEFT, {})
    lines = [f"  {count:4}  {why}" for why, count in sorted(left.items())]
    return [f"of the CPU alone: {sum(left.values())} tests", *lines] if left else []


@pytest.fixture(autouse=True)
def on_device(request):
    """Let torch make tensors on `--device`, where our kernels run wherever they fit."""
    torch, name = sys.modules.get("torch"), request.config.getoption("device")
    if torch is None or name == "cpu":
        yield
        return
    from ostinato.cuda import choice

    torch.set_default_device(name)
    try:
        with choice.forced(True), exact_float32(torch.backends):
            yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def exact_float32(backends):
    """Keep TF32 out of the products of float32."""
    # By the older switches: torch.export reads them, and fails where the newer ones say otherwise.
    # Those of cuDNN by its context, which torch's own test tools leave as the only way.
    matmul = backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


# ---- seeds ----


def seed_of(name):
    """Return a seed for a test of this name, the same in every process and in any order."""
    return zlib.crc32(name.encode())


@pytest.fixture
def rng(request):
    """NumPy's generator, seeded by the name of the test."""
    return np.random.default_rng(seed_of(request.node.name))


@pytest.fixture(autouse=True)
def torch_seeded(request):
    """Seed torch's generator likewise, where a test module has loaded torch."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed_of(request.node.name))


# What a build for this architecture has (csrc/cpu/dispatch.cpp).
INSTRUCTION_SETS = ["neon"] if platform.machine() == "aarch64" else ["avx512", "avx2", "portable"]


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    """Run the test on each instruction set in turn."""
    from engine import instruction_set  # which imports this file

    from ostinato import _core

    if request.param not in _core.instruction_sets():
        pytest.skip(f"{request.param}: neither this processor nor this build has it")
    with instruction_set(request.param):
        yield request.param


# ---- tolerances ----

EPS = {
    "bfloat16": 2.0**-7,
    "float16": 2.0**-10,
    "float32": 2.0**-23,
    "float64": 2.0**-52,
    "complex64": 2.0**-23,
    "complex128": 2.0**-52,
}


def tolerance(dtype, steps=1):
    """Return rtol and atol for numbers of this dtype, NumPy's or torch's, after so many steps.

    A step of a cell rounds a few times; what it rounds is carried through the later ones and mostly
    forgotten. Measured over cells, sizes and up to 300 steps, the worst is 0.4 of this bound.
    """
    bound = (16 + steps / 2) * EPS[str(dtype).removeprefix("torch.")]
    return {"rtol": bound, "atol": bound}


def assert_close(actual, expected, steps=1, name=""):
    """Compare an array with its float64 or complex128 counterpart, NaN being equal to NaN.

    A sum rounds in proportion to its terms, which may cancel: the largest number of the array
    stands for them.
    """
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    bound = tolerance(actual.dtype, steps)
    finite = np.abs(expected[np.isfinite(expected)])
    bound["atol"] *= max(1.0, finite.max(initial=0.0))
    np.testing.assert_allclose(actual.astype(expected.dtype), expected, err_msg=name, **bound)


def assert_same_bits(actual, expected, name=""):
    """Compare bit by bit; tells -0 from 0 and takes a NaN for itself."""
    assert actual.dtype == expected.dtype, name
    assert actual.shape == expected.shape, name
    bits = np.dtype(f"u{actual.dtype.itemsize}")
    actual, expected = np.ascontiguousarray(actual), np.ascontiguousarray(expected)
    np.testing.assert_array_equal(actual.view(bits), expected.view(bits), err_msg=name)


# ---- poison ----

# Quiet NaNs with a payload that arithmetic does not make by itself.
_PATTERNS = {1: 0xA5, 2: 0x7FE5, 4: 0x7FE5A5A5, 8: 0x7FFDA5A5A5A5A5A5}
# Wider than the widest run of vectors that a kernel handles at once.
_GUARD = 1024

# Present where AddressSanitizer is loaded before Python: then the zones may not even be read.
_process = ctypes.CDLL(None)
SANITIZED = hasattr(_process, "__asan_poison_memory_region")


class Poison:
    """Arrays between guard zones, and outputs that are NaN until somebody writes them.

    Leaving the context checks that no guard zone was written, that every input still holds what it
    held and that every element of every output was written. What is read past an array's end is
    NaN and shows in the result, or ends the process where AddressSanitizer runs.
    """

    def __enter__(self):
        self._blocks = []
        return self

    def __exit__(self, kind, *_):
        for words, first, count, _, _ in self._blocks:
            _guard("__asan_unpoison_memory_region", words, first, count)
        if kind is None:
            for words, first, count, before, name in self._blocks:
                pattern = _PATTERNS[words.itemsize]
                payload = words[first : first + count]
                assert (words[:first] == pattern).all(), f"written in front of {name}"
                assert (words[first + count :] == pattern).all(), f"written past {name}"
                if before is None:
                    unwritten = np.flatnonzero(payload == pattern)
                    assert not unwritten.size, f"{name}: never written at {unwritten[:8]}"
                elif before is not payload:
                    assert (payload == before).all(), f"written into {name}"

    def _block(self, shape, dtype):
        dtype = np.dtype(dtype)
        count, size = int(np.prod(shape, dtype=np.int64)), dtype.itemsize
        zone = _GUARD // size
        words = np.full(count + 2 * zone + 1, _PATTERNS[size], f"u{size}")
        # Every other array begins one element off, since callers' arrays are not aligned to more.
        first = zone + len(self._blocks) % 2
        array = words[first : first + count].view(dtype).reshape(shape)
        return words, first, count, array

    def empty(self, shape, dtype, name="output"):
        """Return an array that must be written in full."""
        words, first, count, array = self._block(shape, dtype)
        self._keep(words, first, count, None, name)
        return array

    def room(self, shape, dtype, name="room"):
        """Return an array that may be written in part."""
        words, first, count, array = self._block(shape, dtype)
        self._keep(words, first, count, words[first : first + count], name)
        return array

    def copy(self, array, name="input"):
        """Return a copy that may only be read; None stays None."""
        if array is None:
            return None
        words, first, count, copy = self._block(array.shape, array.dtype)
        copy[...] = array
        self._keep(words, first, count, words[first : first + count].copy(), name)
        return copy

    def _keep(self, words, first, count, before, name):
        self._blocks.append((words, first, count, before, name))
        _guard("__asan_poison_memory_region", words, first, count)


def _guard(function, words, first, count):
    if not SANITIZED:
        return
    start, size = words.ctypes.data, words.itemsize
    for a, b in ((0, first), (first + count, len(words))):
        getattr(_process, function)(
            ctypes.c_void_p(start + a * size), ctypes.c_size_t((b - a) * size)
        )


@pytest.fixture
def poison():
    """Arrays between guard zones, checked when the test is over."""
    with Poison() as memory:
        yield memory
