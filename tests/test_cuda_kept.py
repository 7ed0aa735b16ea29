"""How answers of trials are kept: files that a later process believes, or does not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ostinato.cuda import compiler, kept, trial
from support.folders import NO_FOLDERS
from support.trials import (
    FASTER,
    SLOWER,
    Recorded,
    forget,
    gru,
    place_of,
    tried,
    without_answers,
)

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A user without answers, in a process without any."""
    return without_answers(tmp_path, monkeypatch)


def test_sizes_of_a_power_of_two_share_an_answer():
    device = Recorded()
    tried(device, gru(steps=65, batch=5))
    count = len(device.samples)
    tried(device, gru(steps=128, batch=8))
    assert len(device.samples) == count
    tried(device, gru(steps=129, batch=8))
    tried(device, gru(steps=128, batch=9))
    assert len(device.samples) == 3 * count


def test_a_later_process_reads_what_an_earlier_one_found(cache, monkeypatch):
    found = tried(Recorded(SLOWER))
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert cache.stat().st_mode & 0o777 == 0o700
    assert json.loads(file.read_bytes().partition(b"\n")[2])["is_ours"] is False
    forget(monkeypatch)
    device = Recorded(FASTER)
    assert trial.known(device, place_of(gru())) == found
    assert tried(device) == found
    assert not device.runs


def test_another_device_or_version_is_tried_again(cache):
    tried(Recorded(SLOWER))
    other = Recorded(FASTER)
    other.identity = "of another driver"
    assert tried(other).is_ours
    assert len(list(cache.iterdir())) == 2


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:-1], id="a byte short"),
        pytest.param(lambda content: content[: len(content) // 2], id="half"),
        pytest.param(lambda content: os.urandom(200), id="garbage"),
        pytest.param(lambda content: flip(content, 20), id="another key"),
        pytest.param(lambda content: flip(content, -30), id="another answer"),
    ],
)
def test_a_spoilt_file_is_replaced(cache, spoil, monkeypatch):
    tried(Recorded(SLOWER))
    (file,) = cache.iterdir()
    file.write_bytes(spoil(file.read_bytes()))
    forget(monkeypatch)
    assert tried(Recorded(FASTER)).is_ours
    assert list(cache.iterdir()) == [file]
    forget(monkeypatch)
    assert tried(Recorded(SLOWER)).is_ours


def test_a_file_that_others_may_write_is_not_believed(cache, monkeypatch):
    tried(Recorded(SLOWER))
    (file,) = cache.iterdir()
    file.chmod(0o622)
    forget(monkeypatch)
    assert tried(Recorded(FASTER)).is_ours
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_file_of_another_place_is_not_taken(cache, monkeypatch):
    tried(Recorded(SLOWER))
    (file,) = cache.iterdir()
    tried(Recorded(FASTER), gru(steps=50))
    (other,) = set(cache.iterdir()) - {file}
    other.write_bytes(file.read_bytes())
    forget(monkeypatch)
    assert tried(Recorded(FASTER), gru(steps=50)).is_ours


@pytest.mark.parametrize("make", NO_FOLDERS)
def test_without_a_folder_to_write_each_process_tries(tmp_path, caplog, make, monkeypatch):
    make(tmp_path / "cache")
    device = Recorded()
    assert tried(device).is_ours
    count = len(device.samples)
    assert tried(device).is_ours
    assert len(device.samples) == count
    forget(monkeypatch)
    assert tried(device).is_ours
    assert len(device.samples) == 2 * count
    (record,) = caplog.records
    assert "tried in each process" in record.getMessage()


def test_a_full_disk_leaves_nothing_behind(cache, caplog, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    assert tried(Recorded()).is_ours
    assert "No space left" in caplog.text
    assert list(cache.iterdir()) == []


def test_a_file_system_without_links(cache, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert tried(Recorded(SLOWER)) == kept._read(cache, next(cache.iterdir()).stem)
    forget(monkeypatch)
    monkeypatch.setattr(kept, "of", lambda *_, **__: None)
    # As if it had been written while this process measured.
    assert not tried(Recorded(FASTER)).is_ours
    assert len(list(cache.iterdir())) == 1


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from support.trials import in_a_process
kind, theirs, ours = sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
if kind == "wait":
    print("ready", flush=True)
    sys.stdin.readline()
found, samples = in_a_process((theirs, ours), kill=kind == "kill")
print(int(found.is_ours), samples)
"""


def process(kind, times):
    command = [sys.executable, "-c", PROGRAM, str(TESTS), kind, *map(str, times)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)


def test_a_process_that_dies_before_it_writes_leaves_no_answer(cache):
    dead = process("kill", FASTER)
    dead.communicate()
    assert dead.returncode == -signal.SIGKILL
    assert not list(cache.glob("*.json"))
    output, _ = process("run", SLOWER).communicate()
    is_ours, samples = map(int, output.split())
    assert not is_ours
    assert samples
    output, _ = process("run", FASTER).communicate()
    assert output.split() == ["0", "0"]
    assert len(list(cache.glob("*.json"))) == 1


def test_processes_that_measure_at_once_agree(cache):
    running = [process("wait", times) for times in (FASTER, SLOWER, FASTER)]
    for each in running:
        assert each.stdout.readline() == "ready\n"
    for each in running:
        each.stdin.write("go\n")
        each.stdin.flush()
    outputs = [each.communicate()[0].split() for each in running]
    assert [each.returncode for each in running] == [0, 0, 0]
    assert len({is_ours for is_ours, _ in outputs}) == 1
    assert len(list(cache.iterdir())) == 1


def test_who_measures_later_takes_what_was_written(monkeypatch):
    class Slow(Recorded):
        """Another process is sooner."""

        def seconds(self, *given):
            if not self.samples:
                known, absent = kept._known, kept._absent
                forget(monkeypatch)
                kept.keep(self.identity, place_of(gru()), kept.Kept(False, "by another"))
                monkeypatch.setattr(kept, "_known", known)
                monkeypatch.setattr(kept, "_absent", absent)
            return super().seconds(*given)

    assert tried(Slow(FASTER)) == kept.Kept(False, "by another")
    assert trial.known(Recorded(), place_of(gru())).reason == "by another"


def test_all_that_an_answer_depends_on_is_in_the_identity(monkeypatch):
    class Properties:
        major, minor, multi_processor_count = 9, 0, 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"device {index}")
    monkeypatch.setattr(trial, "_driver_release", lambda: ("580.1", 13000))
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    sources = compiler.sources(compiler.text_folder())
    monkeypatch.setattr(compiler, "sources", lambda folder: sources)
    seen = [trial.Gpu(0).identity]
    assert trial.Gpu(0).identity == seen[0]

    def change(target, name, value):
        monkeypatch.setattr(target, name, value)
        seen.append(trial.Gpu(0).identity)

    seen.append(trial.Gpu(1).identity)
    change(Properties, "multi_processor_count", 66)
    change(Properties, "minor", 1)
    change(trial, "_driver_release", lambda: ("580.2", 13000))
    change(compiler, "nvrtc_version", lambda: (13, 1))
    change(compiler, "sources", lambda folder: {**sources, "cells.h": "edited"})
    change(torch, "__version__", "99.0")
    change(torch.backends.cudnn, "version", lambda: 99000)
    change(trial, "__version__", "99.0")
    assert len(set(seen)) == len(seen)
