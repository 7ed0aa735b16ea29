"""`python -m ostinato`."""

import os
import subprocess
import sys

import pytest

import ostinato
from ostinato import _core
from ostinato.__main__ import main


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


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
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
    ],
)
def test_bench_refuses_wrong_sizes(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*BENCH, *wrong])
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err
