"""What the GPU charges for a handoff between blocks and for a launch: micro.cu, compiled and run.

A figure is the median of several runs. A handoff that this GPU cannot do, or that failed, is an
entry with its reason.

Usage: python benchmarks/micro.py    a line of JSON for each figure; gpu.py runs it
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("micro.cu")
# Long enough for the ticks of %globaltimer, short enough for a second in all.
ROUNDS = 2000
RUNS = 5
# A cluster of more than eight blocks is granted on request only.
CLUSTERS = (2, 4, 8, 16)
THREADS = 128
# 16-byte pushes of each thread to each block: slices of 2, 4 and 6 KiB.
CHUNKS = (1, 2, 3)


def architecture(capability: tuple[int, int]) -> str:
    """Name the target of a device for NVRTC; from Hopper on with what only that one has."""
    major, minor = capability
    return f"sm_{major}{minor}" + "a" * (major >= 9)


def compile_kernels(arch: str) -> Any:
    """Return cuda.core's ObjectCode of micro.cu; a GPU is not needed.

    Raises:
        ImportError: cuda.core is not installed.
    """
    from cuda.core import Program, ProgramOptions

    program = Program(SOURCE.read_text(), "c++", ProgramOptions(arch=arch, std="c++17"))
    return program.compile("cubin")


class Bench:
    """The kernels of micro.cu on torch's current device and stream."""

    def __init__(self) -> None:
        import torch
        from cuda.core import Device

        self.torch = torch
        index = torch.cuda.current_device()
        self.device = Device(index)
        self.device.set_current()
        self.properties = torch.cuda.get_device_properties(index)
        self.blocks = self.properties.multi_processor_count
        capability = torch.cuda.get_device_capability(index)
        self.clusters = capability >= (9, 0)
        self.code = compile_kernels(architecture(capability))
        self.out = torch.zeros(3, dtype=torch.int64, device="cuda")
        # A line for each block, and for a pair of them.
        self.flags = torch.zeros(32 * max(2, self.blocks), dtype=torch.int32, device="cuda")

    def stream(self) -> Any:
        """Torch's stream of the moment, a graph's while it is captured."""
        from cuda.core import Stream

        return Stream.from_handle(self.torch.cuda.current_stream().cuda_stream)

    def kernel(self, name: str, shared: int = 0, wide: bool = False) -> Any:
        """Look a kernel up, with leave to use this much shared memory and a wide cluster."""
        kernel = self.code.get_kernel(name)
        if shared or wide:
            from cuda.bindings import driver

            attribute = driver.CUfunction_attribute
            wanted = {
                attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: shared,
                attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED: int(wide),
            }
            for which, value in wanted.items():
                (status,) = driver.cuKernelSetAttribute(
                    which, value, kernel.handle, driver.CUdevice(self.device.device_id)
                )
                if status != driver.CUresult.CUDA_SUCCESS:
                    raise RuntimeError(f"{name}: {which.name} = {value} was refused: {status.name}")
        return kernel

    def cost(
        self, name: str, *, expected: int, handoffs: int = 1, extra: tuple[int, ...] = (), **options
    ) -> dict[str, float]:
        """Run a kernel of ROUNDS rounds, check its sum, and return the cost of one handoff.

        Args:
            name: the kernel.
            expected: the sum that it must report.
            handoffs: handoffs of a round.
            extra: arguments after the rounds.
            options: of LaunchConfig.

        Returns:
            Cycles and nanoseconds, medians over RUNS.

        Raises:
            RuntimeError: the sum differs, or the launch failed.
        """
        from cuda.core import LaunchConfig, launch

        cluster = options.get("cluster", 1)
        kernel = self.kernel(name, options.get("shmem_size", 0), cluster > 8)
        flags = () if name in WITHOUT_FLAGS else (self.flags.data_ptr(),)
        found = []
        # The first run loads the module and wakes the clocks.
        for _ in range(1 + RUNS):
            self.flags.zero_()
            self.out.zero_()
            config = LaunchConfig(**options)
            launch(self.stream(), config, kernel, self.out.data_ptr(), *flags, ROUNDS, *extra)
            self.torch.cuda.synchronize()
            cycles, nanoseconds, total = self.out.tolist()
            if total != expected:
                raise RuntimeError(f"{name}: expected the sum {expected}, got {total}")
            found.append((cycles, nanoseconds))
        steps = ROUNDS * handoffs
        cycles, nanoseconds = (statistics.median(t) / steps for t in zip(*found[1:], strict=True))
        return {"cycles": cycles, "ns": nanoseconds}

    def elapsed(self, call: Callable[[], Any], calls: int) -> float:
        """Microseconds of a call, the median over RUNS of `calls` calls between two events."""
        cuda = self.torch.cuda
        found = []
        for _ in range(1 + RUNS):
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            call()
            start.record()
            for _ in range(calls):
                call()
            end.record()
            cuda.synchronize()
            found.append(start.elapsed_time(end) * 1e3 / calls)
        return statistics.median(found[1:])


WITHOUT_FLAGS = {"block_barrier", "cluster_barrier", "push_pingpong", "push_exchange"}
# Sums over the rounds 1..n and 0..n-1.
RISING, FROM_ZERO = ROUNDS * (ROUNDS + 1) // 2, ROUNDS * (ROUNDS - 1) // 2


def flags(bench: Bench, kernel: str) -> dict[str, Any]:
    """One-way handoff of a word between block 0 and others, which lie on other multiprocessors."""
    step = max(1, bench.blocks // 12)
    pairs = {
        partner: bench.cost(
            kernel,
            expected=RISING,
            handoffs=2,
            extra=(partner,),
            grid=bench.blocks,
            block=32,
            is_cooperative=True,
        )
        for partner in range(1, bench.blocks, step)
    }
    near = min(pairs.values(), key=lambda cost: cost["ns"])
    far = max(pairs.values(), key=lambda cost: cost["ns"])
    return {
        "ns": statistics.median(cost["ns"] for cost in pairs.values()),
        "cycles": statistics.median(cost["cycles"] for cost in pairs.values()),
        "nearest_ns": near["ns"],
        "farthest_ns": far["ns"],
    }


def exchange(bench: Bench, cluster: int) -> dict[str, Any]:
    """Every block pushes a slice to every block, slices of several sizes."""
    costs = {}
    for chunks in CHUNKS:
        size = chunks * THREADS * 16
        costs[size] = bench.cost(
            "push_exchange",
            expected=FROM_ZERO,
            extra=(chunks,),
            grid=1,
            cluster=cluster,
            block=THREADS,
            shmem_size=2 * cluster * size,
        )
    (small, first), *_, (large, last) = costs.items()
    # What a block sends in a round to all blocks, over the time by which it takes longer.
    more, longer = (large - small) * cluster, last["cycles"] - first["cycles"]
    return {
        "by_slice_bytes": {str(size): cost for size, cost in costs.items()},
        "bytes_per_cycle_sent": more / longer if longer > 0 else None,
    }


def launches(bench: Bench) -> dict[str, float]:
    """Microseconds of an empty kernel: from Python, in a graph, and as one node of many."""
    from cuda.core import LaunchConfig, launch

    torch, config, kernel = bench.torch, LaunchConfig(grid=1, block=32), bench.kernel("nothing")

    def graph(nodes: int) -> Any:
        found = torch.cuda.CUDAGraph()
        with torch.cuda.graph(found):
            for _ in range(nodes):
                launch(bench.stream(), config, kernel)
        return found.replay

    one, many = bench.elapsed(graph(1), 200), bench.elapsed(graph(101), 50)
    stream = bench.stream()
    return {
        "kernel_us": bench.elapsed(lambda: launch(stream, config, kernel), 500),
        "graph_us": one,
        "graph_node_us": (many - one) / 100,
    }


def figures(bench: Bench) -> dict[str, Callable[[], Any]]:
    """Everything that is measured, by name."""
    # The sum of the kernels that only count.
    counted = {"expected": ROUNDS, "block": THREADS}
    wanted: dict[str, Callable[[], Any]] = {
        "kernel and graph launch": lambda: launches(bench),
        "barrier of a block": lambda: bench.cost("block_barrier", grid=1, **counted),
        "barrier of the grid": lambda: bench.cost(
            "grid_barrier", grid=bench.blocks, is_cooperative=True, **counted
        ),
        "words of all blocks of the grid": lambda: bench.cost(
            "grid_words", expected=RISING, grid=bench.blocks, block=THREADS, is_cooperative=True
        ),
    }
    for kind in ("relaxed", "volatile", "ordered"):
        wanted[f"flag through L2, {kind}, one way"] = lambda kind=kind: flags(bench, f"flag_{kind}")
    if bench.clusters:
        wanted["push into shared memory, one way"] = lambda: bench.cost(
            "push_pingpong", expected=FROM_ZERO, handoffs=2, grid=1, cluster=2, block=32
        )
        for size in CLUSTERS:
            wanted[f"barrier of a cluster of {size}"] = lambda size=size: bench.cost(
                "cluster_barrier", grid=1, cluster=size, **counted
            )
            wanted[f"exchange in a cluster of {size}"] = lambda size=size: exchange(bench, size)
    return wanted


def measure() -> Iterator[tuple[str, Any]]:
    """Yield every figure with its name; where one failed, its error; what is left out, and why."""
    bench = Bench()
    if not bench.clusters:
        yield "left out", "clusters: they need compute capability 9.0 or later"
    for name, figure in figures(bench).items():
        try:
            yield name, figure()
        except (cuda_error(), RuntimeError, ValueError) as error:
            yield name, {"error": str(error)}


def cuda_error() -> type[BaseException]:
    """The class of cuda.core's errors, which has no public name."""
    try:
        from cuda.core._utils.cuda_utils import CUDAError
    except ImportError:
        return RuntimeError
    return CUDAError


def in_a_process(seconds: float = 60, command: tuple[str, ...] = ()) -> dict[str, Any]:
    """Measure in a process of its own, whose failure or hang costs the caller nothing but time.

    Args:
        seconds: after which it is ended.
        command: instead of this file.

    Returns:
        What it found, and under "left out" what kept it from the rest.
    """
    command = command or (sys.executable, str(Path(__file__)))
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        output = ended.stdout
        reason = ended.stderr.strip().splitlines()[-1:] if ended.returncode else []
    except subprocess.TimeoutExpired as error:
        # Bytes, whatever `text` says.
        output = (error.stdout or b"").decode()
        reason = [f"not done after {seconds:g} s"]
    found: dict[str, Any] = {}
    for line in output.splitlines():
        found.update(json.loads(line))
    if reason:
        found["left out"] = f"{'what follows' if found else 'all'}: {reason[0]}"
    return found


if __name__ == "__main__":
    # A line for each figure, so that those before a hang are kept.
    for each in measure():
        print(json.dumps(dict([each])), flush=True)
