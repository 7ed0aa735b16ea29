"""The six modules: torch's shell, our computation.

Constructor, parameters, initialisation, state_dict, pickling and repr are inherited from torch's
base classes, so they are torch's own on every torch version. Everything from `forward` down is
ours: the checks, with torch's messages and in torch's order, then the route (`ostinato.route`),
once for a stack or a step of a cell. PyTorch's own layer classes are no bases, because
torch.compile breaks the graph at their instances.

Weights are looked up by name in every forward and never kept: `assign=True`, functional_call,
parametrizations, replaced attributes and `.data.copy_()` all count from the next call on.

Under torch.autocast all six modules compute in the dtype of their weights: input and states are
cast to it, autocast is off inside, and the results have it. Lower precision is a property of the
weights (`module.to(torch.bfloat16)`), not of the region that a call stands in.
"""

from ostinato import expanded
from ostinato.nn._cells import GRUCell, LSTMCell, RNNCell
from ostinato.nn._layers import GRU, LSTM, RNN
from ostinato.nn._own import Cell
from ostinato.nn._recurrent import Recurrent, RecurrentCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "RecurrentCell",
]

# Pickles and error pages show the public path, which outlives the layout of this package.
for _module in (GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell, Cell, Recurrent, RecurrentCell):
    _module.__module__ = __name__
del _module

expanded.register()
