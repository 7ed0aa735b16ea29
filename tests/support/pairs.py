"""The same module of both libraries, and arguments that suit it: what the tests of `nn` share."""

import torch
from torch.nn.utils.rnn import PackedSequence

from ostinato import nn
from support.cells import CELL_MODULES, has_c, is_projected, options_of, record_of
from support.devices import device_type, pack, to

# float32 on both sides, few steps.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
# torch's own LSTM says so where it runs beside ours.
TORCH_WARNS = "ignore:LSTM with projections is not supported with oneDNN"


def pair(name, *args, seed=0, **kwargs):
    """The same module of both libraries, after the same seed."""
    torch.manual_seed(seed)
    ours = getattr(nn, name)(*args, **kwargs)
    torch.manual_seed(seed)
    return ours, getattr(torch.nn, name)(*args, **kwargs)


def layer_of(kind, size, hidden, **options):
    """Our layer of a kind; where it is projected, with more than half of its units."""
    if is_projected(kind):
        options["proj_size"] = hidden // 2 + 1
    return getattr(nn, record_of(kind).layer)(size, hidden, **options_of(kind), **options)


def cell_module(cell, size, hidden, **options):
    """Our module that takes one step."""
    return getattr(nn, f"{record_of(cell).layer}Cell")(size, hidden, **options_of(cell), **options)


def state(name, *shape, **kwargs):
    """An initial state: a tensor, or two where there is c."""
    h = torch.randn(*shape, **kwargs)
    return (h, torch.randn(*shape, **kwargs)) if has_c(name) else h


def each(hx, change):
    """Change every tensor of a state."""
    return tuple(change(h) for h in hx) if isinstance(hx, tuple) else change(hx)


def shapes(name, batch=3, **kwargs):
    """An input and a state that suit the module of four features and eight units."""
    if name in CELL_MODULES:
        return torch.randn(batch, 4, **kwargs), state(name, batch, 8, **kwargs)
    return torch.randn(5, batch, 4, **kwargs), state(name, 1, batch, 8, **kwargs)


def packed(enforce_sorted, lengths=(2, 5, 3), features=4, **kwargs):
    """Three sequences of different lengths."""
    if enforce_sorted:
        lengths = sorted(lengths, reverse=True)
    rows = [torch.randn(length, features, **kwargs) for length in lengths]
    return pack(rows, enforce_sorted)


def by_cpu(module, *arguments):
    """What torch's module gives on the CPU, for what its operators for GPUs lack."""
    return to(module.cpu()(*to(arguments, "cpu")), device_type())


def flat(result):
    """The tensors of what a module returns, in order; of a PackedSequence, the data."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def assert_same(ours, theirs, **tolerance):
    """Compare what two modules return."""
    assert type(ours) is type(theirs)
    torch.testing.assert_close(flat(ours), flat(theirs), **(tolerance or TOLERANCE))
