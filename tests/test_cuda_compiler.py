"""Kernels from text to machine code, and the cache of it. No GPU takes part."""

import inspect
import logging
import os
import pwd
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("cuda.core", reason="cuda-core is not installed")

from ostinato.cuda import compiler
from ostinato.cuda.compiler import CompileError
from support.folders import NO_FOLDERS

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "#pragma once\n#define DEV __device__ __forceinline__\n"
SEQUENCE = """#pragma once
#include "../cells.h"
#include "device.h"
DEV long long scaled(long long x) { return HIDDEN * x + ostinato::Gru::input_slot(2); }
"""
# A function beside the kernel has properties of its own in ptxas's log.
KERNEL = """#include "sequence.cuh"
__device__ __noinline__ float beside(float* x) {
    float kept[64];
    for (int i = 0; i < 64; i++) kept[(i * 7) % 64] = x[i];
    return kept[(int)x[0]];
}
extern "C" __global__ void walk(float* x, long long n) { x[threadIdx.x] = beside(x) + scaled(n); }
"""


@dataclass(frozen=True)
class Config:
    source: str = "walk.cu"
    head: str = ""
    entry: str = "walk"
    defines: dict = field(default_factory=lambda: {"HIDDEN": 64})


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A folder of small kernels, in a place with a name that some shells would stumble over."""
    folder = tmp_path / "some téxt"
    (folder / "cuda").mkdir(parents=True)
    (folder / "cells.h").write_text((ROOT / "csrc/cells.h").read_text())
    for name, content in (("device.h", DEVICE), ("sequence.cuh", SEQUENCE), ("walk.cu", KERNEL)):
        (folder / "cuda" / name).write_text(content)
    monkeypatch.setattr(compiler, "text_folder", lambda: folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler._CUBINS, "has_told", False)
    return tmp_path / "cache/ostinato/cubins"


@pytest.fixture
def compilations(monkeypatch):
    """What was compiled and not taken from the cache."""
    seen = []
    compile_now = compiler._compile

    def record(text, config, arch):
        seen.append((config, arch))
        return compile_now(text, config, arch)

    monkeypatch.setattr(compiler, "_compile", record)
    return seen


# ---- the compiler ----


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_a_kernel_becomes_a_cubin(text, arch):
    compiled = compiler.compile(Config(), arch)
    assert compiled.cubin.startswith(b"\x7fELF")
    assert b"walk" in compiled.cubin
    assert 0 < compiled.registers <= 255
    assert compiled.spill_stores == compiled.spill_loads == 0
    assert f"'walk' for '{arch}'" in compiled.log


def test_what_ptxas_says_is_read_for_the_kernel_alone(text):
    compiled = compiler.compile(Config(), "sm_80")
    assert "beside" in compiled.log
    # The function is given the array by the kernel.
    assert compiled.stack_bytes == 256
    # Here are more values than the registers that a block of this size leaves.
    many = """
extern "C" __global__ void __launch_bounds__(1024, 2) walk(volatile float* x, long long n) {
    float kept[60];
    #pragma unroll
    for (int i = 0; i < 60; i++) kept[i] = x[i * n];
    #pragma unroll
    for (int i = 0; i < 60; i++) x[(59 - i) * n] = kept[i];
}
"""
    (text / "cuda/walk.cu").write_text(many)
    compiled = compiler.compile(Config(), "sm_80")
    assert compiled.registers == 32
    assert compiled.stack_bytes > 0
    assert compiled.spill_stores > 0
    assert compiled.spill_loads > 0


def test_a_compiler_that_says_nothing_is_believed(text, cache, monkeypatch):
    # As NVRTC does where another process of the user has just compiled the same.
    monkeypatch.setattr(compiler._Log, "write", lambda log, text: None)
    compiled = compiler.compile(Config(), "sm_80")
    assert b"walk" in compiled.cubin
    assert compiled.registers is compiled.spill_stores is None
    assert compiler._read(cache, compiler._key(text, Config(), "sm_80")) == compiled
    with pytest.raises(CompileError, match="expected a kernel named wal"):
        compiler.compile(Config(entry="wal"), "sm_80")


@pytest.mark.parametrize(
    ("arch", "defines", "entry", "says"),
    [
        ("sm_80", {}, "walk", '"HIDDEN" is undefined'),
        ("sm_12", {"HIDDEN": 64}, "walk", "gpu-architecture"),
        ("sm_80", {"HIDDEN": 64}, "run", "expected a kernel named run"),
    ],
)
def test_errors_carry_the_compiler_s_log(text, cache, arch, defines, entry, says):
    with pytest.raises(CompileError, match=says) as caught:
        compiler.compile(Config(entry=entry, defines=defines), arch)
    assert caught.value.log
    assert "walk.cu" in str(caught.value)
    assert "\0" not in str(caught.value)
    assert not cache.exists()


def test_multiplications_and_additions_are_not_contracted(text):
    def cubin(value):
        source = f'extern "C" __global__ void walk(float* x) {{ x[0] = {value}; }}'
        (text / "cuda/walk.cu").write_text(source)
        return compiler.compile(Config(), "sm_80").cubin

    plain = cubin("x[1] * x[2] + x[3]")
    assert plain == cubin("__fadd_rn(__fmul_rn(x[1], x[2]), x[3])")
    assert plain != cubin("__fmaf_rn(x[1], x[2], x[3])")


def test_headers_of_the_working_directory_are_not_ours(text, tmp_path, monkeypatch):
    for name in ("device.h", "sequence.cuh"):
        (tmp_path / name).write_text('#error "a file of the user"')
    monkeypatch.chdir(tmp_path)
    compiler.compile(Config(), "sm_80")


def test_the_text_of_this_tree_is_found():
    folder = compiler.text_folder()
    assert "Gru" in (folder / "cells.h").read_text()


# ---- the cache ----


def test_a_kernel_is_compiled_once(text, cache, compilations):
    first = compiler.compile(Config(), "sm_80")
    assert compiler.compile(Config(), "sm_80") == first
    assert len(compilations) == 1
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert cache.stat().st_mode & 0o777 == 0o700
    assert cache.parent.stat().st_mode & 0o777 == 0o700


def test_whatever_a_cubin_depends_on_makes_another(text, cache, compilations, monkeypatch):
    def compile_and_count(config, arch):
        compiler.compile(config, arch)
        return len(compilations)

    assert compile_and_count(Config(), "sm_80") == 1
    assert compile_and_count(Config(), "sm_86") == 2
    assert compile_and_count(Config(defines={"HIDDEN": 32}), "sm_80") == 3
    for number, name in enumerate(("cells.h", "cuda/device.h", "cuda/walk.cu"), 4):
        with open(text / name, "a") as file:
            file.write("// changed\n")
        assert compile_and_count(Config(), "sm_80") == number
    (text / "cuda/notes.md").write_text("no part of it")
    assert compile_and_count(Config(), "sm_80") == 6
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 0))
    assert compile_and_count(Config(), "sm_80") == 7
    monkeypatch.setitem(compiler._OPTIONS, "lineinfo", True)
    assert compile_and_count(Config(), "sm_80") == 8
    assert len(list(cache.iterdir())) == 8


def test_text_that_changes_while_it_is_compiled_is_not_kept(text, cache, monkeypatch):
    compile_now = compiler._compile

    def change(*arguments):
        compiled = compile_now(*arguments)
        (text / "cuda/device.h").write_text(DEVICE + "// changed\n")
        return compiled

    monkeypatch.setattr(compiler, "_compile", change)
    compiler.compile(Config(), "sm_80")
    assert not cache.exists()


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:-1], id="a byte short"),
        pytest.param(lambda content: content[: len(content) // 2], id="half"),
        pytest.param(lambda content: content + b"\0", id="a byte more"),
        pytest.param(lambda content: flip(content, -100), id="another cubin"),
        pytest.param(lambda content: flip(content, 20), id="another key"),
        pytest.param(lambda content: flip(content, 100), id="another content hash"),
        pytest.param(lambda content: flip(content, 160), id="other facts"),
        pytest.param(lambda content: b"\n" * len(content), id="no header"),
    ],
)
def test_a_spoilt_file_is_compiled_again(text, cache, compilations, spoil):
    first = compiler.compile(Config(), "sm_80")
    (file,) = cache.iterdir()
    good = file.read_bytes()
    assert good[160:180] in good.splitlines()[1]
    file.write_bytes(spoil(good))
    assert compiler.compile(Config(), "sm_80").cubin == first.cubin
    assert len(compilations) == 2
    compiler.compile(Config(), "sm_80")
    assert len(compilations) == 2


def test_the_file_of_another_kernel_is_not_taken(text, cache, compilations):
    compiler.compile(Config(), "sm_80")
    (file,) = cache.iterdir()
    other = compiler.compile(Config(), "sm_86")
    (second,) = set(cache.iterdir()) - {file}
    second.write_bytes(file.read_bytes())
    assert compiler.compile(Config(), "sm_86").cubin == other.cubin
    assert len(compilations) == 3


def test_a_file_that_others_may_write_is_not_taken(text, cache, compilations):
    compiler.compile(Config(), "sm_80")
    (file,) = cache.iterdir()
    file.chmod(0o620)
    compiler.compile(Config(), "sm_80")
    assert len(compilations) == 2
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("make", NO_FOLDERS)
def test_without_a_folder_to_write_it_works_and_says_so_once(
    text, tmp_path, compilations, caplog, make
):
    make(tmp_path / "cache")
    with caplog.at_level(logging.WARNING, "ostinato"):
        for _ in range(2):
            assert compiler.compile(Config(), "sm_80").cubin
    assert len(compilations) == 2
    (record,) = caplog.records
    assert "compiled anew" in record.getMessage()


def test_a_full_disk_leaves_nothing_behind(text, cache, compilations, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        assert compiler.compile(Config(), "sm_80").cubin
    assert "No space left" in caplog.text
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("home", [None, "somewhere/relative"])
def test_without_a_home_there_is_no_cache(text, compilations, caplog, monkeypatch, home):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", nobody)
    else:
        monkeypatch.setenv("HOME", home)
    assert compiler.cache_folder() is None
    assert compiler.compile(Config(), "sm_80").cubin
    assert len(compilations) == 1
    assert caplog.text.count("no home folder") == 1


def test_the_folder_is_that_of_the_user(tmp_path, monkeypatch):
    assert compiler.cache_folder() == tmp_path / "cache/ostinato/cubins"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert compiler.cache_folder() == Path("/home/someone/.cache/ostinato/cubins")


PROCESS = f"""
import sys
from dataclasses import dataclass, field
from pathlib import Path
from ostinato.cuda import compiler
{inspect.getsource(Config)}
folder = Path(sys.argv[1])
compiler.text_folder = lambda: folder
first = compiler.compile(Config(), "sm_80")
key = compiler._key(folder, Config(), "sm_80")
cache = compiler.cache_folder()
for _ in range(300):
    compiler._write(cache, key, first)
    # Never half a file, never none.
    assert compiler._read(cache, key) == first
print(first.registers)
"""


def test_processes_at_once(text, cache, compilations):
    command = [sys.executable, "-c", PROCESS, str(text)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3
    assert {int(output) for output in outputs} == {compiler.compile(Config(), "sm_80").registers}
    assert compilations == []
    assert len(list(cache.iterdir())) == 1


# ---- the wheel ----


@pytest.mark.parametrize("wheel", sorted(ROOT.glob("dist/*.whl")) or [None])
def test_a_wheel_has_the_text(wheel):
    if wheel is None:
        pytest.skip("no wheel in dist: make wheel")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "csrc/cells.h", *(ROOT / "csrc/cuda").glob("*")):
        if path.suffix in compiler._SUFFIXES:
            assert f"ostinato/cuda/csrc/{path.relative_to(ROOT / 'csrc')}" in names
