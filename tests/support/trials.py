"""A device whose times are given, for trials without a GPU: it runs on the CPU."""

import os
import signal

import torch

import ostinato.ops  # noqa: F401, it registers the operator
from ostinato.call import Call
from ostinato.cuda import kept, trial
from ostinato.cuda import layer as layer_module

# Seconds of torch's and ours.
FASTER, SLOWER = (2e-3, 1e-3), (1e-3, 2e-3)


class Recorded(trial.Gpu):
    """Runs what a trial runs, and says times that it was given.

    `times` are of calls, `queued` of the device alone. `spoil` changes what ours returns.
    """

    name = "a stand-in"
    identity = "of a stand-in"

    def __init__(self, times=FASTER, queued=None, spoil=None):
        self.index = 0
        self.times = {False: times, True: queued or times}
        self.spoil = spoil
        self.samples = []
        self.runs = 0
        self.is_captured = False
        self.lives = True

    def is_capturing(self):
        return self.is_captured

    def is_alive(self):
        return self.lives

    def _here(self, do):
        return do

    def ours(self, call):
        self.runs += 1
        found = super().ours(call)
        return self.spoil(call, found) if self.spoil else found

    def seconds(self, run, calls, is_queued):
        run()
        # A trial times torch's and ours in turns.
        who = len(self.samples) % 2
        self.samples.append((who, calls, is_queued))
        return self.times[is_queued][who]


def place_of(call, math="bf16", is_training=False):
    """The place of a call of a layer or a stack."""
    _, weight_hh, *_ = call.weights
    form = "packed" if call.batch_sizes is not None or call.lengths is not None else "padded"
    layer = kept.Layer(
        *(call.cell, math, weight_hh.shape[1], form, is_training),
        *(1 + call.bidirectional, call.layers, call.is_cut or call.all_states),
        layer_module._has(call),
    )
    steps = len(call.input if call.batch_sizes is None else call.batch_sizes)
    return kept.Place.of(layer, call.batch, steps, call.input.shape[-1])


def gru(steps=5, batch=4, dtype=torch.bfloat16):
    """A call of a small GRU."""
    weights = [torch.zeros(shape, dtype=dtype) for shape in ((24, 6), (24, 8), (24,), (24,))]
    input = torch.zeros(steps, batch, 6, dtype=dtype)
    return Call.of(input, None, batch, None, None, weights, "gru", True, False)


def in_a_process(times, kill=False):
    """Run a trial as a process of its own would, which may die before its answer has a name."""
    if kill:
        os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    device, call = Recorded(times), gru()
    found = trial.run(call, place_of(call), device)
    return found, len(device.samples)


def without_answers(tmp_path, monkeypatch):
    """Begin as a user who has none, in a process that has none; return where files will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept._TRIALS, "has_told", False)
    forget(monkeypatch)
    return tmp_path / "cache/ostinato/trials"


def forget(monkeypatch):
    """Begin a process."""
    monkeypatch.setattr(kept, "_known", {})
    monkeypatch.setattr(kept, "_absent", set())


def tried(device, call=None, **place):
    """Run a trial of a small GRU, or of a call."""
    call = gru() if call is None else call
    return trial.run(call, place_of(call, **place), device)
