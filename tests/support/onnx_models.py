"""Models to export to ONNX, and what runs the result: ONNX Runtime's numbers beside ours.

Legend: T steps, B batch, H hidden.
"""

import itertools

import onnx
import onnxruntime
import torch
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from ostinato import nn
from support.cells import TORCH_CELLS, TORCH_LAYERS, options_of, record_of
from support.devices import assert_near

T, B = Dim("T"), Dim("B")
RECURRENT = set(TORCH_LAYERS)


def kinds(program):
    return [node.op_type for node in program.model.graph]


def recurrent(program):
    return [node for node in program.model.graph if node.op_type in RECURRENT]


def run(model, *args):
    """ONNX Runtime's outputs; `model` is bytes or a path."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    arrays = [value.numpy() for value in tree_leaves(args)]
    outputs = session.run(None, dict(zip(names, arrays, strict=True)))
    return [torch.from_numpy(output) for output in outputs]


def compare(proto, module, *args, steps=16):
    """Compare ONNX Runtime's outputs with ours."""
    onnx.checker.check_model(proto, full_check=True)
    with torch.no_grad():
        expected = module(*args)
    assert_near(run(proto.SerializeToString(), *args), expected, steps)


class Several(torch.nn.Module):
    """One cell with every option; each layer has its own states and returns all it has."""

    def __init__(self, cls, **more):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            cls(3, 4, num_layers=layers, bidirectional=both, bias=bias, **more)
            for layers, both, bias in itertools.product((1, 2), (False, True), (True, False))
        )

    def forward(self, x, states=None):
        if states is None:
            return [layer(x) for layer in self.layers]
        return [layer(x, hx) for layer, hx in zip(self.layers, states, strict=True)]

    def states(self, batch):
        """Initial states for each layer."""
        found = []
        for layer in self.layers:
            rows = layer.num_layers * (2 if layer.bidirectional else 1)
            h_0, c_0 = torch.randn(2, rows, batch, 4)
            found.append((h_0, c_0) if isinstance(layer, nn.LSTM) else h_0)
        return found


# ONNX has an operator for the cells of torch.nn.
LAYERS = {cell: (getattr(nn, record_of(cell).layer), options_of(cell)) for cell in TORCH_CELLS}


class Model(torch.nn.Module):
    """A batch-first stack among other layers, a parametrized layer, and a cell."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 6)
        self.gru = nn.GRU(6, 5, 2, batch_first=True, bidirectional=True, dropout=0.5)
        self.rnn = torch.nn.utils.parametrizations.weight_norm(nn.RNN(10, 4), "weight_hh_l0")
        self.cell = nn.LSTMCell(4, 3)

    def forward(self, x):
        y, h_n = self.gru(torch.nn.functional.gelu(self.first(x)))
        y, _ = self.rnn(y.transpose(0, 1))
        return torch.tanh(y), h_n, *self.cell(y[-1])


class Resets(torch.nn.Module):
    """Rows that begin anew."""

    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(3, 4)

    def forward(self, x, resets):
        return self.layer(x, resets=resets)


class Ragged(torch.nn.Module):
    """Rows of different lengths; `cls` may have two directions."""

    def __init__(self, cls, **options):
        super().__init__()
        self.layer = cls(3, 4, 2, **options)

    def forward(self, x, hx, lengths):
        return self.layer(x, hx, lengths=lengths)
