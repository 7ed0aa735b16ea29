"""tools/: which Pythons are tried, what is shown of a build, what is run on a GPU."""

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import gpu_bundle
import gpu_tests
import progress
import pythons
from pythons import Python

OLD, EARLY, LATE = Python((3, 9, 18), "a"), Python((3, 10, 2), "b"), Python((3, 10, 13), "c")
BARE, NEW = Python((3, 13, 0), "d", ("no headers",)), Python((3, 12, 1), "e")


def test_the_newest_usable_python_of_each_minor_version_is_taken():
    assert pythons.best([OLD, EARLY, LATE, BARE, NEW]) == [LATE, NEW, BARE]
    assert (
        pythons.best([Python((3, 13, 9), "x", ("no venv",)), Python((3, 13, 0), "y")])[0].path
        == "y"
    )
    assert (
        pythons.best([Python((3, 13, 0), "first"), Python((3, 13, 0), "second")])[0].path == "first"
    )


def test_versions_are_chosen_by_words():
    all_of_them = [Python((3, minor, 0), str(minor)) for minor in range(10, 15)]

    def minors(wanted, without=""):
        return [python.minor for python in pythons.select(all_of_them, wanted, without)]

    assert minors("all") == ["3.10", "3.11", "3.12", "3.13", "3.14"]
    assert minors("ends", "3.11") == ["3.10", "3.14"]
    assert minors("ends", "3.10") == ["3.11", "3.14"]
    assert minors("3.13 3.10") == ["3.13", "3.10"]
    assert pythons.select([NEW], "ends", "3.12") == []
    with pytest.raises(ValueError, match=r"no Python 3\.9 here"):
        minors("3.9")


def test_arguments_for_pytest_stand_behind_two_dashes():
    assert pythons.split_arguments(["a", "--b", "--", "-k", "--"]) == (["a", "--b"], ["-k", "--"])
    assert pythons.split_arguments(["a"]) == (["a"], [])


def test_this_python_is_found_and_what_does_not_run_is_passed_over(tmp_path, monkeypatch):
    broken = tmp_path / "python3.99"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    assert pythons.ask(str(broken)) is None
    assert pythons.ask(str(tmp_path / "absent")) is None
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    found, notes = pythons.find()
    own = pythons.ask(sys.executable)
    assert own.version == sys.version_info[:3]
    assert found == ([] if own.lacks else [own])
    assert sum("not on this machine" in note for note in notes) == 4 + (sys.version_info.minor > 14)


NINJA = """\
  Running command Building wheel for ostinato (pyproject.toml)
  [3/14] Building CXX object CMakeFiles/ostinato_kernels_avx2_float.dir/csrc/cpu/kernels.cpp.o
  [14/14] Linking CXX shared module _core.so
"""


def test_of_a_build_ninjas_steps_are_shown(tmp_path, capfd):
    log = tmp_path / "logs" / "build.log"
    assert progress.run(log, [sys.executable, "-c", f"print({NINJA!r})"]) == 0
    shown = capfd.readouterr()
    lines = [line.split(" s ")[1] for line in shown.out.splitlines()]
    assert lines == [
        "[3/14] kernels.cpp (ostinato_kernels_avx2_float)",
        "[14/14] Linking CXX shared module _core.so",
    ]
    assert shown.err == ""
    assert "Running command" in log.read_text()


def test_a_build_that_fails_shows_all_of_its_log(tmp_path, capfd):
    code = "import sys; print('error: no such type'); sys.exit(3)"
    assert progress.run(tmp_path / "build.log", [sys.executable, "-c", code]) == 3
    assert "error: no such type" in capfd.readouterr().err


# ---- for a GPU ----


def test_parts_of_the_tests_on_a_gpu_are_summed_up(monkeypatch, capfd):
    prints = [sys.executable, "-c"]
    commands = {
        "own": [*prints, "print('3 passed, 1 skipped, 2 deselected in 0.10s')"],
        "suite 1/2": [*prints, "print('2 failed, 5 passed in 1.00s'); raise SystemExit(1)"],
        "suite 2/2": [*prints, "print('1 passed in 1s', flush=True); import time; time.sleep(60)"],
        "memcheck grid": [*prints, "print('1 passed in 0.10s')"],
    }
    monkeypatch.setattr(gpu_tests, "parts", lambda sanitizer: commands)
    monkeypatch.setattr(gpu_tests, "find_sanitizer", lambda: "a sanitizer")
    monkeypatch.setattr(gpu_tests, "find_workers", list)
    assert gpu_tests.main(["--limit", "3"]) == 1
    last = capfd.readouterr().out.splitlines()[-3:]
    assert last == [
        "tests on a GPU: 10 passed, 2 failed, 0 error, 1 skipped; 2 of 4 parts well",
        "  suite 1/2: exit status 1",
        "  suite 2/2: ended after 3 s",
    ]
    assert gpu_tests.main(["--only", "own", "memcheck"]) == 0
    monkeypatch.setattr(gpu_tests, "find_sanitizer", lambda: None)
    assert gpu_tests.main(["--only", "memcheck"]) == 1
    assert "memcheck grid: there is no compute-sanitizer" in capfd.readouterr().out


def test_every_part_of_the_tests_on_a_gpu_is_named():
    names = list(gpu_tests.parts("a sanitizer"))
    assert names[:2] == ["own", "suite 1/4"]
    assert names[-6:] == [f"{t} {e}" for t in ("memcheck", "racecheck") for e in EXCHANGES]


EXCHANGES = ("block", "cluster", "grid")


def test_kernels_that_are_brought_along():
    few = list(itertools.islice(gpu_bundle.wanted("sm_90a"), 200))
    assert few[:2] == [gpu_bundle.Previous(2), gpu_bundle.Previous(4)]
    assert {config.exchange for config in few[2:]} == set(EXCHANGES)
    assert not any(
        c.exchange == "cluster" for c in itertools.islice(gpu_bundle.wanted("sm_80"), 200)
    )
