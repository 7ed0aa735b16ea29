"""What runs under the modules: our operators, and none of torch's recurrent ones."""

import re
import subprocess
import sys

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from ostinato import nn
from support.cells import TORCH_CELL_MODULES, TORCH_LAYERS

# torch's own recurrent operators by every name that its profiler knows them by.
RECURRENT = re.compile(r"(^|::|_)(gru|lstm|rnn_tanh|rnn_relu)(_cell|$)|rnn_layer|_fused_(gru|lstm)")


def packed():
    return pack_sequence([torch.randn(n, 3) for n in (5, 3, 2)])


CASES = {
    "RNNCell": (lambda: nn.RNNCell(3, 4), lambda: torch.randn(2, 3)),
    "GRUCell": (lambda: nn.GRUCell(3, 4), lambda: torch.randn(2, 3)),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), lambda: torch.randn(2, 3)),
    "RNN relu": (lambda: nn.RNN(3, 4, nonlinearity="relu"), lambda: torch.randn(5, 2, 3)),
    "RNN": (lambda: nn.RNN(3, 4, 2, bidirectional=True), lambda: torch.randn(5, 2, 3)),
    "GRU": (lambda: nn.GRU(3, 4, 2, dropout=0.5), lambda: torch.randn(5, 2, 3)),
    "LSTM": (lambda: nn.LSTM(3, 4, bidirectional=True, proj_size=2), lambda: torch.randn(5, 2, 3)),
    "GRU packed": (lambda: nn.GRU(3, 4), packed),
    "LSTM packed": (lambda: nn.LSTM(3, 4, bidirectional=True), packed),
}


def names_in_profile(function):
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        function()
    return {event.name for event in profile.events()}


def tensors_of(output):
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    return [t for part in output if part is not None for t in tensors_of(part)]


@pytest.mark.parametrize("name", CASES)
def test_no_recurrent_operator_of_torch_runs(name):
    module, inputs = (make() for make in CASES[name])

    def infer():
        with torch.no_grad():
            module(inputs)

    def train():
        sum(t.sum() for t in tensors_of(module(inputs))).backward()

    for function, ours in ((infer, "_forward"), (train, "_backward")):
        names = names_in_profile(function)
        assert any(name.startswith("ostinato::") and name.endswith(ours) for name in names)
        assert not [n for n in names if RECURRENT.search(n)]


def test_the_pattern_knows_torch_s_operators():
    """The test above would see them: here they are."""
    layers, cells = (
        [getattr(torch.nn, name)(3, 4) for name in names]
        for names in (TORCH_LAYERS, TORCH_CELL_MODULES)
    )

    def run():
        with torch.no_grad():
            for layer in layers:
                layer(torch.randn(5, 2, 3))
            for cell in cells:
                cell(torch.randn(2, 3))

    seen = names_in_profile(run)
    found = {n for n in seen if RECURRENT.search(n)}
    assert {"aten::gru", "aten::lstm", "aten::rnn_tanh", "aten::gru_cell"} <= found


@pytest.mark.parametrize("name", CASES)
def test_nor_where_no_profiler_looks(name, monkeypatch):
    """A profile shows what a call is without it; this does not rest on the profiler's word."""

    def refuse(*_, **__):
        pytest.fail("an operator of torch ran")

    for found in filter(RECURRENT.search, dir(torch)):
        monkeypatch.setattr(torch, found, refuse)
        monkeypatch.setattr(torch._VF, found, refuse, raising=False)
    module, inputs = (make() for make in CASES[name])
    with torch.no_grad():
        module(inputs)
    sum(t.sum() for t in tensors_of(module(inputs))).backward()
    # They would have been seen.
    with pytest.raises(pytest.fail.Exception):
        torch.nn.GRU(3, 4)(torch.randn(5, 2, 3))


def test_importing_ostinato_does_not_import_torch():
    code = "import ostinato, sys; assert 'torch' not in sys.modules; print(ostinato.__version__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip()
