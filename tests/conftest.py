"""The device, seeds, the instruction set, and memory that shows what touches it.

Fixtures and hooks alone: what tests import is in support. No import of torch here: the engine's
tests run where there is none.
"""

import collections
import sys

import hypothesis
import numpy as np
import pytest

# Before anything is imported from it: its assertions say what differs.
pytest.register_assert_rewrite("support")

from ostinato import _core  # noqa: E402
from support.calls import seed_of  # noqa: E402
from support.cpu_alone import REASONS, is_in_part  # noqa: E402
from support.engine import INSTRUCTION_SETS, instruction_set  # noqa: E402
from support.poison import Poison  # noqa: E402

# One run is as good as the next on a busy machine, and every run draws the same examples.
hypothesis.settings.register_profile("ostinato", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ostinato")


# ---- the device ----


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="where tests make tensors; not all tests can elsewhere"
    )
    parser.addoption(
        "--part", default="1/1", help="a share of the tests, as 2/5: equal ones for equal names"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu(reason): of the CPU alone; not run on other devices")


def reason_of(item):
    """Say why a test is of the CPU alone; None where it is not."""
    mark = item.get_closest_marker("cpu")
    return mark.args[0] if mark else REASONS.get(item.path.stem)


def pytest_collection_modifyitems(config, items):
    """Leave out what is of the CPU alone, and what is another part's."""
    part = config.getoption("part")
    others = [item for item in items if not is_in_part(item.nodeid, part)]
    items[:] = [item for item in items if is_in_part(item.nodeid, part)]
    config.hook.pytest_deselected(items=others)
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
    from support.devices import exact_float32

    torch.set_default_device(name)
    try:
        with choice.forced(True), exact_float32(torch.backends):
            yield
    finally:
        torch.set_default_device(None)


# ---- seeds ----


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


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    """Run the test on each instruction set in turn."""
    if request.param not in _core.instruction_sets():
        pytest.skip(f"{request.param}: neither this processor nor this build has it")
    with instruction_set(request.param):
        yield request.param


@pytest.fixture
def poison():
    """Arrays between guard zones, checked when the test is over."""
    with Poison() as memory:
        yield memory
