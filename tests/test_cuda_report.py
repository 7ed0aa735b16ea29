"""What the compiler makes of the GPU engine: registers, shared memory and spills, within a budget.

Every plan of every layer that `make bench-gpu` measures is compiled for the architecture that it is
for, and the report is printed (`pytest -s`). No GPU takes part. A kernel may not spill: a spilled
weight would be read from memory at every step.
"""

import concurrent.futures

import pytest

from ostinato.cuda import compiler
from ostinato.cuda.config import Previous
from ostinato.cuda.plan import A100, H200, Device, configs, plan
from support.cells import FIRST_CELLS
from support.own_steps import OWN, ZOO

pytest.importorskip("cuda.core", reason="cuda-core is not installed")

ARCHITECTURES = {"sm_90a": H200, "sm_80": A100}
# Multiprocessors, shared memory and clusters of a card of each; sm_75 and older have no kernels.
OTHERS = {
    "sm_86": Device(82, 101_376, 0),  # RTX 3090
    "sm_89": Device(128, 101_376, 0),  # RTX 4090
    "sm_100": Device(148, 232_448, 16),  # B200
    "sm_120": Device(170, 101_376, 8),  # RTX 5090
}
DEVICES = ARCHITECTURES | OTHERS
MATHS = ("bf16", "fp16", "tf32", "fp32")
# The benchmark's sizes, and one that no power of two divides.
SIZES = (64, 112, 128, 160, 192, 256, 512, 768, 1024, 2048)
# Rows and directions of few and of many tiles.
WALKS = ((1, 1), (16, 2), (64, 1), (256, 2))


def plans(cell, math, hidden, arch):
    """Every kernel that some batch, direction and walk of a layer would run."""
    # Few rows only where there are no clusters: the report would double.
    found = {}
    for batch, directions in WALKS if arch == "sm_90a" else WALKS[1:2]:
        for is_backward in (False, True):
            device = DEVICES[arch]
            config = plan(cell, math, hidden, batch, directions, is_backward, device)
            if config is not None:
                found.setdefault(config, []).append(batch)
    return found


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Keep the cubins out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        # NVRTC's own: what it finds there it says nothing of.
        patch.setitem(compiler._OPTIONS, "no_cache", True)
        yield


# Whose units warps share less evenly.
ODD = (630, 963, 1088, 1481, 1664, 1925)
# float16's kernels are bfloat16's with exact activations.
LAYERS = [
    (cell, math, hidden)
    for cell in FIRST_CELLS
    for math in MATHS
    for hidden in (SIZES if math != "fp16" else SIZES[::3])
]
LAYERS += [
    (FIRST_CELLS[i % len(FIRST_CELLS)], MATHS[(i + j) % 3], hidden)
    for i, hidden in enumerate(ODD)
    for j in (0, 1)
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("cell", "math", "hidden"), LAYERS)
def test_no_kernel_spills(cell, math, hidden, arch):
    # What is not served is said in docs/architecture.md, and held by test_cuda_layer.py.
    report(cell, math, hidden, arch, plans(cell, math, hidden, arch))


# Of the other architectures a cell, a precision and a few sizes each, in turns.
@pytest.mark.parametrize("arch", OTHERS)
@pytest.mark.parametrize("hidden", [128, 512, 1024])
def test_no_kernel_spills_on_another_architecture(arch, hidden):
    turn = list(OTHERS).index(arch) + hidden // 512
    cell, math = FIRST_CELLS[turn % len(FIRST_CELLS)], MATHS[turn % len(MATHS)]
    report(cell, math, hidden, arch, plans(cell, math, hidden, arch))


# A sample of own cells: as the built-in ones, and with what these have not. The zoo has more.
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sm_120"])
@pytest.mark.parametrize("name", ["stabilised", "peephole", "driven"])
def test_no_kernel_of_an_own_cell_spills(name, arch):
    # Not H 1024 on sm_120: there the built-in LSTM spills six registers.
    for math, hidden in (("bf16", 128), ("bf16", 512), ("tf32", 256), ("fp32", 256)):
        report(name, math, hidden, arch, plans(OWN[name], math, hidden, arch))


@pytest.mark.parametrize("name", ZOO)
def test_no_kernel_of_the_zoo_spills(name):
    report(name, "bf16", 512, "sm_90a", plans(ZOO[name], "bf16", 512, "sm_90a"))


# Tiles of more than eight rows, of which plans take few.
@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("math", ["bf16", "tf32"])
@pytest.mark.parametrize("cell", FIRST_CELLS)
def test_no_kernel_of_wide_tiles_spills(cell, math, rows):
    chosen = {}
    for is_backward in (False, True):
        found = [
            config
            for config in configs(cell, math, 512, is_backward, H200, (rows,))
            if config.warps in (4, 8)
        ]
        chosen.update({config: [256] for config in found[:: len(found) // 3 + 1]})
    report(cell, math, 512, "sm_90a", chosen)


def report(cell, math, hidden, arch, configs):
    """Compile kernels, print what they take, and hold that they spill nothing."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda config: compiler.compile(config, arch), configs))
    for (config, batches), found in zip(configs.items(), compiled, strict=True):
        print(
            f"\n{arch} {cell} {math} H{hidden} B{','.join(map(str, batches))} "
            f"{'backward' if config.is_backward else 'forward'}: {config.exchange} of "
            f"{config.blocks} x {config.units} units, {config.warps} warps, {config.rows} rows: "
            f"{found.registers} registers, {config.shared_bytes} bytes shared, "
            f"{config.resident} of {config.fragments} fragments held, {found.spill_stores} spills",
            end="",
        )
        assert max(found.spill_stores, found.spill_loads, found.stack_bytes) == 0
        assert found.registers * config.threads <= 65_536
        assert config.shared_bytes <= DEVICES[arch].shared_bytes


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100", "sm_120"])
@pytest.mark.parametrize("size", [2, 4])
def test_the_kernel_that_gathers_states(size, arch):
    found = compiler.compile(Previous(size), arch)
    assert max(found.spill_stores, found.spill_loads, found.stack_bytes) == 0
    assert found.registers * Previous.threads <= 65_536
