"""`python -m ostinato`."""

import os
import re
import subprocess
import sys

import pytest
import torch

import ostinato
from ostinato import _core, bench
from ostinato.__main__ import main
from support.cells import TORCH_LAYERS


def info(**environment):
    """Return the lines of `info` in a process with these variables, as a dict."""
    result = subprocess.run(
        [sys.executable, "-m", "ostinato", "info"],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    return dict(line.split("  ", 1) for line in result.stdout.splitlines())


def test_info_shows_versions_and_instruction_sets(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert ostinato.__version__ in out
    assert ", ".join(_core.instruction_sets()) in out


def test_info_shows_what_the_environment_forces():
    last = _core.instruction_sets()[-1]
    lines = {
        name.strip(): value.strip()
        for name, value in info(OSTINATO_ISA=last, OSTINATO_NUM_THREADS="3").items()
    }
    assert lines["in use"] == f"{last} (OSTINATO_ISA)"
    assert lines["threads"] == "3 (OSTINATO_NUM_THREADS)"


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "command" in capsys.readouterr().err


BENCH = ["bench", "--input-size", "5", "--hidden-size", "7", "--seconds", "0.01"]


@pytest.mark.parametrize("cell", [layer.lower() for layer in TORCH_LAYERS])
@pytest.mark.parametrize(
    "options",
    [["--steps", "3"], ["--steps", "0", "--batch", "2"], ["--layers", "2", "--bidirectional"]],
)
@pytest.mark.parametrize("train", [[], ["--train"]])
def test_bench_compares_a_shape_with_torchs(cell, options, train, capsys):
    assert main([*BENCH, "--cell", cell, *options, *train]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("forward and backward" if train else "inference")
    times = [float(line.split()[-2]) for line in lines[1:3]]
    shown = float(lines[3].split()[3])
    assert all(time > 0 for time in times)
    assert shown > 0
    assert float(lines[4].split()[-1]) < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        ["--cell", "qrnn"],
        ["--hidden-size", "0"],
        ["--batch", "-1"],
        ["--steps", "-1"],
        ["--steps", "0", "--layers", "2"],
        ["--steps", "0", "--bidirectional"],
        ["--input-size", "many"],
        ["--batch", "1e3"],
        ["--seconds", "-1"],
        ["--seconds", "0"],
        ["--seconds", "nan"],
        ["--seconds", "inf"],
        ["--seconds", "long"],
    ],
)
def test_bench_refuses_wrong_sizes(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*BENCH, *wrong])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert wrong[0] in message
    assert "invalid _" not in message


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("OSTINATO_ISA", "sse9", "OSTINATO_ISA must be one of "),
        ("OSTINATO_NUM_THREADS", "x", "OSTINATO_NUM_THREADS must be a number from 1 to 256"),
    ],
)
@pytest.mark.parametrize("command", ["info", "bench"])
def test_a_wrong_variable_is_one_line_and_a_status(name, value, words, command):
    result = subprocess.run(
        [sys.executable, "-m", "ostinato", command],
        capture_output=True,
        text=True,
        env=os.environ | {name: value},
    )
    assert result.returncode == 1
    assert not result.stdout
    assert result.stderr.startswith(f"python -m ostinato: {words}")
    assert len(result.stderr.splitlines()) == 1


def test_every_option_of_bench_has_help(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out.partition("options:")[2]
    options = re.findall(r"^  (--[a-z-]+)(.*\n(?: {8,}.*\n)*)", text, re.M)
    assert {name for name, _ in options} >= {"--cell", "--threads", "--layers", "--bidirectional"}
    for name, rest in options:
        assert re.search(r"\s{2,}[a-z0-9]", rest), name


def test_bench_of_a_layer_that_no_memory_holds(capsys):
    assert main([*BENCH, "--hidden-size", "100000000"]) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"bench: at least \d+\.\d GiB of memory are needed, .*there\n", err)


def exhausted(*_):
    return torch.empty(2**58, dtype=torch.uint8)


def out_of_memory(*_):
    raise MemoryError


@pytest.mark.parametrize("fail", [exhausted, out_of_memory])
def test_bench_that_runs_out_of_memory_on_the_way(fail, capsys, monkeypatch):
    monkeypatch.setattr(bench, "gain", fail)
    assert main(BENCH) == 1
    assert "bench: the memory is not enough: at least 0.0 GiB" in capsys.readouterr().err


def test_another_error_of_bench_is_not_taken_for_that(monkeypatch):
    monkeypatch.setattr(bench, "gain", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main(BENCH)


@pytest.mark.parametrize(
    ("ratio", "doubtful"), [((47.0, 112.0, 2517.0), True), ((1.9, 2.0, 2.1), False)]
)
def test_bench_says_when_its_rounds_differ(ratio, doubtful, capsys, monkeypatch):
    monkeypatch.setattr(bench, "gain", lambda *_: bench.Gain(3.0, 2.0, ratio, 0.0))
    assert main(BENCH) == 0
    assert ("The quartiles are far apart" in capsys.readouterr().out) == doubtful
