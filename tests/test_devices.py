"""The option `--device`: what it leaves out, and that it says so. To collect needs no device."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import torch

from support.cpu_alone import CPU_ALONE, is_in_part
from support.devices import exact_float32

TESTS = Path(__file__).parent


def collect(*arguments):
    """Return how many tests of a file that has both kinds are kept, and what is printed."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider"]
    command += [TESTS / "test_cuts_of_operators.py", TESTS / "test_cuts_of_engine.py", *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"<Function ", printed)), printed


def test_what_is_of_the_cpu_alone_is_left_out_and_counted():
    every, printed = collect()
    assert "of the CPU alone" not in printed
    kept, printed = collect("--device", "cuda")
    assert 0 < kept < every
    assert f"of the CPU alone: {every - kept} tests" in printed
    assert f"({every - kept} deselected)" in printed
    counted = re.findall(r"^ +(\d+)  \D", printed, re.MULTILINE)
    assert sum(map(int, counted)) == every - kept


def test_parts_share_the_tests():
    names = [f"tests/test_one.py::test_{i}" for i in range(300)]
    kept = [[name for name in names if is_in_part(name, f"{part}/3")] for part in (1, 2, 3)]
    assert sorted(itertools.chain(*kept)) == sorted(names)
    assert min(map(len, kept)) > 70
    assert all(is_in_part(name, "1/1") for name in names)


def test_every_module_in_the_table_exists():
    names = [name for names in CPU_ALONE.values() for name in names.split()]
    assert len(set(names)) == len(names)
    assert [name for name in names if not (TESTS / f"test_{name}.py").exists()] == []


def test_tf32_is_off_and_back_again(monkeypatch):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    # torch's own test tools freeze the switches, wherever a test has loaded them.
    monkeypatch.setattr(torch.backends, "flags_frozen", lambda: True)
    with exact_float32(torch.backends):
        assert not matmul.allow_tf32
        assert not cudnn.allow_tf32
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before
