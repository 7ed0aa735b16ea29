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
    lines = {
        name.strip(): value.strip()
        for name, value in info(OSTINATO_ISA="portable", OSTINATO_NUM_THREADS="3").items()
    }
    assert lines["in use"] == "portable (OSTINATO_ISA)"
    assert lines["threads"] == "3 (OSTINATO_NUM_THREADS)"


def test_a_command_is_required(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "command" in capsys.readouterr().err
