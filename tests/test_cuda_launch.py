"""Loading and launching kernels: what cuda-core and the driver are asked for.

Without a GPU they are stood in for by objects that write down what they are asked.
"""

import contextlib
import ctypes
import inspect
import logging
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from ostinato.cuda import compiler, launch
from ostinato.cuda.compiler import Compiled
from support import stand_in
from support.stand_in import CONTEXT

OK = "CUDA_SUCCESS"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@dataclass(frozen=True)
class Config:
    source: str = "sequence.cu"
    head: str = ""
    entry: str = "walk"
    threads: int = 256
    shared_bytes: int = 1000
    blocks: int = 4
    exchange: str = "cluster"
    needs: str = "sm_90"

    @property
    def defines(self):
        return {"BLOCKS": self.blocks}


class Refusal(Exception):
    """What cuda-core raises."""


class Machine:
    """Two devices, their driver and cuda-core."""

    def __init__(self):
        self.asked = []
        self.current = 0
        self.capability = (9, 0)
        self.refuse = set()
        self.driver = SimpleNamespace(
            CUresult=SimpleNamespace(CUDA_SUCCESS=OK),
            CUfunction_attribute=SimpleNamespace(
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared",
                CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED="cluster",
            ),
            CUstreamCaptureMode=SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed"),
            cuDeviceGet=lambda index: (OK, f"device {index}"),
            cuKernelSetAttribute=self.call("set", None),
            cuKernelGetFunction=self.call("get function", 1),
            cuFuncLoad=self.call("load function", None),
            cuThreadExchangeStreamCaptureMode=self.call("capture", "global"),
            cuCtxGetCurrent=self.call("context", CONTEXT),
            CUdriverProcAddress_flags=SimpleNamespace(CU_GET_PROC_ADDRESS_LEGACY_STREAM="legacy"),
            cuGetProcAddress=self.address,
        )
        kernel = SimpleNamespace(
            handle=1,
        )
        self.core = SimpleNamespace(
            Device=lambda index: SimpleNamespace(set_current=self.record(f"bind {index}", None)),
            ObjectCode=SimpleNamespace(
                from_cubin=lambda cubin, name: SimpleNamespace(
                    get_kernel=self.record("kernel", kernel)
                )
            ),
        )
        self.kernel = kernel
        self.launching = stand_in.Driver()
        self.launching.kernels = [None]

    def address(self, name, version, flag):
        self.asked.append(("address", name, version, flag))
        return (OK, self.launching.addresses[name.decode()], "found")

    def record(self, name, answer):
        def asked(*arguments, **options):
            self.asked.append((name, *arguments, *options.values(), f"on {self.current}"))
            if name in self.refuse:
                raise Refusal("no")
            return answer

        return asked

    def call(self, name, value):
        recorded = self.record(name, value)

        def called(*arguments):
            recorded(*arguments)
            error = "CUDA_ERROR" if f"call {name}" in self.refuse else OK
            return (error,) if value is None else (error, value)

        return called

    @contextlib.contextmanager
    def device(self, index):
        before, self.current = self.current, index
        yield
        self.current = before

    def names(self):
        return [name for name, *_ in self.asked]

    def of(self, name):
        return [entry[1:] for entry in self.asked if entry[0] == name]


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(compiler, "core", lambda: machine.core)
    monkeypatch.setattr(launch, "_driver", lambda: machine.driver)
    monkeypatch.setattr(launch, "driver_version", lambda: (13, 0))
    monkeypatch.setattr(launch, "_loaded", {})
    monkeypatch.setattr(launch, "_connect", launch._connect.__wrapped__)
    monkeypatch.setattr(launch, "DEVICE_TYPE", stand_in.CPU)
    monkeypatch.setattr(compiler, "cuda_error", lambda: Refusal)
    monkeypatch.setattr(compiler, "compile", lambda config, arch: compiled(arch))
    monkeypatch.setattr(torch.cuda, "device", machine.device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: machine.capability)
    return machine


def compiled(arch):
    return Compiled(f"cubin for {arch}".encode(), 100, 0, 0, 0, "")


# ---- loading ----


def test_a_kernel_is_loaded_once_per_device(machine):
    first = launch.load(Config(), 0)
    assert launch.load(Config(), 0) is first
    assert first.compiled.cubin == b"cubin for sm_90a"
    assert machine.of("kernel") == [("walk", "on 0")]
    second = launch.load(Config(), 1)
    assert second is not first
    assert second.device_index == 1
    assert machine.of("kernel")[1:] == [("walk", "on 1")]
    assert launch.load(Config(threads=128), 0) is not first
    assert machine.current == 0


def test_threads_that_load_at_once_get_one_kernel(machine, monkeypatch):
    barrier = threading.Barrier(4)
    counted = Counter()

    def count(config, arch):
        counted[config] += 1
        return compiled(arch)

    monkeypatch.setattr(compiler, "compile", count)
    found = []

    def run():
        barrier.wait()
        found.append(launch.load(Config(), 0))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1
    assert counted == {Config(): 1}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Config(shared_bytes=48 * 1024, blocks=8), []),
        (Config(shared_bytes=48 * 1024 + 1, blocks=8), [("shared", 48 * 1024 + 1)]),
        (Config(shared_bytes=200_000, blocks=16), [("shared", 200_000), ("cluster", 1)]),
        # Blocks of a cooperative grid are no cluster.
        (Config(blocks=32, exchange="grid"), []),
    ],
)
def test_what_a_kernel_is_allowed(machine, config, expected):
    launch.load(config, 1)
    asked = [(*attribute, 1, "device 1", "on 1") for attribute in expected]
    assert machine.of("set") == asked


def test_a_kernel_is_all_there_before_its_first_launch_and_captures_go_on(machine):
    launch.load(Config(), 1)
    assert machine.asked[0] == ("capture", "relaxed", "on 1")
    assert machine.asked[-1] == ("capture", "global", "on 1")
    assert machine.of("load function") == [(1, "on 1")]
    assert machine.of("bind 1") == [("on 1",)]


def test_an_old_driver_is_not_asked_for_what_it_does_not_know(machine, monkeypatch):
    monkeypatch.setattr(launch, "driver_version", lambda: (12, 3))
    launch.load(Config(), 0)
    assert "get function" in machine.names()
    assert "load function" not in machine.names()


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100")],
)
def test_the_architecture_is_the_device_s(machine, capability, arch):
    machine.capability = capability
    assert launch.architecture(0) == arch
    assert launch.load(Config(needs="sm_80"), 0).compiled == compiled(arch)


def test_an_older_device_is_refused(machine):
    machine.capability = (8, 6)
    with pytest.raises(RuntimeError, match=r"expected a device of sm_90.*got cuda:1.*sm_86"):
        launch.load(Config(), 1)
    assert machine.asked == []


@pytest.mark.parametrize("call", ["kernel", "call set", "call get function", "call load function"])
def test_a_driver_that_refuses_a_kernel(machine, call):
    machine.refuse = {call}
    config = Config(shared_bytes=300_000)
    with pytest.raises(RuntimeError, match=r"expected CUDA_SUCCESS|cannot load"):
        launch.load(config, 0)
    # The capture mode is what it was, and nothing is left that looks loaded.
    assert machine.of("capture")[-1] == ("global", "on 0")
    machine.refuse = set()
    assert launch.load(config, 0).code is machine.kernel


# ---- launching ----


def launched(machine, loaded, blocks=12, stream=77, arguments=()):
    """Launch a kernel; return the driver's configuration and the eight bytes of each argument."""
    seen = []

    def run(kernel, config, parameters):
        count = len(arguments)
        attributes = stand_in.attributes_of(config)
        shape = [*config.grid], [*config.block], config.shared_bytes, config.stream, attributes
        seen.append((*shape, [parameters[i][0] for i in range(count)]))

    machine.launching.run = run
    launch.launch(loaded, blocks, stream, arguments)
    return seen.pop()


def test_a_launch(machine):
    loaded, x = launch.load(Config(), 0), torch.zeros(3)
    arguments = (1 << 40, -5, x, None, torch.zeros(0, 3), torch.nn.Parameter(x))
    found = launched(machine, loaded, arguments=arguments)
    values = [1 << 40, -5, x.data_ptr(), 0, 0, x.data_ptr()]
    assert found == ([12, 1, 1], [256, 1, 1], 1000, 77, {"cluster": (4, 1, 1)}, values)
    assert machine.asked[-1][0] == "capture"  # of loading


def test_the_default_stream_is_the_null_one_of_the_legacy_functions(machine):
    loaded = launch.load(Config(), 0)
    assert {entry[2] for entry in machine.of("address")} == {"legacy"}
    *_, stream, _, _ = launched(machine, loaded, stream=0)
    assert stream is None


def test_a_cluster_of_one_is_none_and_a_grid_is_cooperative(machine):
    for config, expected in (
        (Config(blocks=1), {}),
        (Config(blocks=32, exchange="grid"), {"cooperative": 1}),
        (Config(blocks=16), {"cluster": (16, 1, 1)}),
    ):
        *_, attributes, _ = launched(machine, launch.load(config, 0), blocks=64)
        assert attributes == expected


def test_a_launch_has_the_context_of_its_kernel(machine):
    loaded, driver = launch.load(Config(), 0), machine.launching
    launch.launch(loaded, 1, 0, ())
    assert driver.asked == {"current": 1, "launch": 1}
    for other in (0, 5):
        driver.context = other
        launch.launch(loaded, 1, 0, ())
        assert driver.context_of_last == CONTEXT
        assert driver.context == other


@pytest.mark.parametrize("context", [CONTEXT, 5])
def test_a_driver_that_refuses_a_launch(machine, context):
    loaded, driver = launch.load(Config(), 1), machine.launching
    driver.error, driver.context = 719, context
    with pytest.raises(RuntimeError, match=r"cuda:1 cannot launch 6 blocks of Config.*error 719"):
        launch.launch(loaded, 6, 0, ())
    assert driver.context == context


@pytest.mark.parametrize(
    ("argument", "error", "words"),
    [
        (1.5, TypeError, "expected numbers, plain tensors or None"),
        (torch.zeros(3, 2).t(), ValueError, "expected dense tensors"),
        (torch.zeros(3, device="meta"), (ValueError, BufferError, RuntimeError), None),
        (1 << 64, OverflowError, "too large|too big"),
    ],
    ids=["a float", "strided", "on another device", "a large number"],
)
def test_a_launch_refuses_what_a_kernel_cannot_read(machine, argument, error, words):
    with pytest.raises(error, match=words):
        launch.launch(launch.load(Config(), 0), 1, 0, (argument,))
    assert machine.launching.asked["launch"] == 0


def test_the_driver_s_structures_are_cuda_bindings():
    """What C++ writes is laid out as NVIDIA's own Python package has it."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    config, attribute = driver.CUlaunchConfig(), driver.CUlaunchAttribute()
    config.gridDimX, config.gridDimY, config.gridDimZ = 2, 3, 4
    config.blockDimX, config.blockDimY, config.blockDimZ = 5, 6, 7
    config.sharedMemBytes, config.hStream = 8, driver.CUstream(9)
    ours = ctypes.cast(config.getPtr(), ctypes.POINTER(stand_in.LaunchConfig))[0]
    assert ([*ours.grid], [*ours.block]) == ([2, 3, 4], [5, 6, 7])
    assert (ours.shared_bytes, ours.stream, ours.attribute_count) == (8, 9, 0)
    names = driver.CUlaunchAttributeID
    attribute.id = names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    size = driver.CUlaunchAttributeValue()
    size.clusterDim.x, size.clusterDim.y, size.clusterDim.z = 4, 1, 1
    attribute.value = size
    config.attrs, config.numAttrs = [attribute], 1
    ours = ctypes.cast(config.getPtr(), ctypes.POINTER(stand_in.LaunchConfig))[0]
    assert stand_in.attributes_of(ours) == {"cluster": (4, 1, 1)}
    attribute.id = names.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
    size = driver.CUlaunchAttributeValue()
    size.cooperative = 1
    attribute.value = size
    config.attrs = [attribute]
    ours = ctypes.cast(config.getPtr(), ctypes.POINTER(stand_in.LaunchConfig))[0]
    assert stand_in.attributes_of(ours) == {"cooperative": 1}


# ---- whether there is anything to launch with ----


@pytest.fixture
def available(monkeypatch):
    return launch.available.__wrapped__


def test_without_the_extra_the_log_says_what_to_install(available, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.partition(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda", None)
    compiler.core.cache_clear()
    assert not available()
    assert "pip install ostinato[cuda]" in caplog.text


def test_the_log_says_so_once(monkeypatch, caplog):
    def refuse():
        raise ImportError("no such module")

    monkeypatch.setattr(compiler, "core", refuse)
    launch.available.cache_clear()
    with caplog.at_level(logging.WARNING, "ostinato"):
        assert not launch.available()
        assert not launch.available()
    assert len(caplog.records) == 1
    launch.available.cache_clear()


@pytest.mark.parametrize(
    ("compiler_version", "driver_version", "expected"),
    [((13, 0), (13, 1), True), ((12, 9), (13, 0), True), ((13, 0), (12, 9), False)],
)
def test_the_driver_must_know_what_the_compiler_makes(
    available, machine, monkeypatch, caplog, compiler_version, driver_version, expected
):
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: compiler_version)
    monkeypatch.setattr(launch, "driver_version", lambda: driver_version)
    assert available() == expected
    assert ("CUDA 12" in caplog.text) != expected


def test_a_missing_library_is_said(available, machine, monkeypatch, caplog):
    def missing():
        raise RuntimeError("libnvrtc.so: not found")

    monkeypatch.setattr(compiler, "nvrtc_version", missing)
    assert not available()
    assert "libnvrtc.so" in caplog.text


def test_importing_ostinato_does_not_import_cuda_core():
    # torch imports cuda-bindings, where they are.
    code = (
        "import sys, torch, ostinato\n"
        "before = {name for name in sys.modules if name.startswith('cuda')}\n"
        "import ostinato.nn, ostinato.ops, ostinato.cuda.launch\n"
        "after = {name for name in sys.modules if name.startswith('cuda')}\n"
        "assert after == before, after - before\n"
        "assert 'cuda.core' not in after"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_may_import_cuda_core_at_once():
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    code = (
        "import concurrent.futures\n"
        "from ostinato.cuda import compiler\n"
        "with concurrent.futures.ThreadPoolExecutor(4) as pool:\n"
        "    found = [pool.submit(lambda: compiler.core().Program) for _ in range(4)]\n"
        "    assert len({future.result() for future in found}) == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cuda_core_has_what_is_asked_of_it():
    core = pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    from cuda.bindings import driver

    assert inspect.signature(core.ObjectCode.from_cubin).parameters.keys() >= {"module", "name"}
    for owner, name in (
        (core.ObjectCode, "get_kernel"),
        (core.Device, "set_current"),
        (core.Kernel, "handle"),
        (driver, "cuDriverGetVersion"),
        *((driver, name) for name in vars(Machine().driver)),
    ):
        assert hasattr(owner, name), name
    assert issubclass(compiler.cuda_error(), Exception)


# ---- on a GPU ----

KERNEL = """
extern "C" __global__ void walk(float* y, const float* x, long long n, long long add) {
    extern __shared__ float s[];
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        s[threadIdx.x] = x[i];
        y[i] = s[threadIdx.x] + (float)(add >> 33);
    }
}
"""


@pytest.fixture
def text(tmp_path, monkeypatch):
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cells.h").write_text("")
    (tmp_path / "cuda/sequence.cu").write_text(KERNEL)
    monkeypatch.setattr(compiler, "text_folder", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(launch, "_loaded", {})


KINDS = {
    "blocks": Config(needs="sm_80", blocks=1),
    "much shared memory": Config(needs="sm_80", blocks=1, shared_bytes=90_000),
    "cooperative grid": Config(needs="sm_80", blocks=8, exchange="grid"),
    "clusters": Config(blocks=4),
    "large clusters": Config(blocks=16, shared_bytes=150_000),
}


def on_gpu(config, index=0):
    if torch.cuda.get_device_capability(index) < (9, 0) and config.needs == "sm_90":
        pytest.skip("this GPU has no clusters")
    assert launch.available()
    return launch.load(config, index)


def run_on_gpu(loaded, y, x):
    stream = torch.cuda.current_stream().cuda_stream
    launch.launch(loaded, 16, stream, (y, x, x.numel(), 3 << 33))


@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_runs(text, kind):
    config = KINDS[kind]
    loaded = on_gpu(config)
    x = torch.randn(4000, device="cuda")
    y = torch.zeros_like(x)
    run_on_gpu(loaded, y, x)
    torch.testing.assert_close(y, x + 3, rtol=0, atol=0)


@needs_gpu
def test_a_graph_captures_even_the_first_call(text):
    x = torch.randn(4000, device="cuda")
    y = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_on_gpu(on_gpu(KINDS["much shared memory"]), y, x)
    assert y.count_nonzero() == 0
    graph.replay()
    torch.testing.assert_close(y, x + 3, rtol=0, atol=0)


@needs_gpu
def test_a_new_thread_and_a_stream_of_its_own(text):
    loaded = on_gpu(KINDS["blocks"])
    x = torch.randn(4000, device="cuda")
    torch.cuda.synchronize()
    found = []

    def run(stream):
        with stream:
            y = torch.zeros_like(x)
            run_on_gpu(loaded, y, x)
        torch.cuda.synchronize()
        found.append(y)

    for stream in (contextlib.nullcontext(), torch.cuda.stream(torch.cuda.Stream())):
        thread = threading.Thread(target=run, args=(stream,))
        thread.start()
        thread.join()
    assert len(found) == 2
    for y in found:
        torch.testing.assert_close(y, x + 3, rtol=0, atol=0)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU on this machine")
def test_two_devices(text):
    for index in (1, 0, 1):
        x = torch.randn(4000, device=f"cuda:{index}")
        y = torch.zeros_like(x)
        run_on_gpu(on_gpu(KINDS["blocks"], index), y, x)
        torch.testing.assert_close(y, x + 3, rtol=0, atol=0)
        assert torch.cuda.current_device() == 0
