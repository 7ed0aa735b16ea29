"""Small layers and arguments for them, in every form that the fast path on a GPU takes."""

import torch

from ostinato import nn
from support.devices import pack

STEPS, BATCH, SIZE, HIDDEN = 5, 4, 7, 16
FORMS = ("padded", "batch_first", "states", "lengths", "resets", "packed", "packed resets")


def drawn(name, form, dtype=torch.bfloat16, **options):
    """Draw a layer and arguments for it."""
    module = getattr(nn, name)(SIZE, HIDDEN, batch_first=form == "batch_first", **options)
    x = torch.randn(STEPS, BATCH, SIZE, dtype=dtype, requires_grad=True)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    given, cuts = [x], {}
    if form == "states":
        states = torch.randn(2, rows, BATCH, HIDDEN, dtype=dtype, requires_grad=True)
        given.append(tuple(states) if name == "LSTM" else states[0])
    if "packed" in form:
        given = [pack([x[:n, i] for i, n in enumerate((5, 4, 2, 1))])]
    if "resets" in form:
        cuts["resets"] = torch.rand(STEPS, BATCH) < 0.4
        if "packed" in form:
            cuts["resets"] = given[0]._replace(data=torch.rand(12) < 0.4)
        cuts["reset_to"] = torch.randn(rows, BATCH, HIDDEN, dtype=dtype)
        if name == "LSTM":
            cuts["reset_to"] = (cuts["reset_to"],) * 2
    if form == "lengths":
        cuts["lengths"] = [5, 2, 3, 1]
    return module.to(dtype), x, given, cuts


def numbers(module, x, given, cuts):
    """Results and gradients of a call, by a loss that tells all elements apart."""
    output, last = module(*given, **cuts)
    output = getattr(output, "data", output)
    last = last if isinstance(last, tuple) else (last,)
    weights = torch.arange(output.numel(), dtype=torch.float32).view_as(output).cos()
    loss = (output.float() * weights).sum() + sum(state.float().sum() for state in last)
    leaves = [x, *module.parameters()]
    grads = torch.autograd.grad(loss, leaves, retain_graph=True)
    return [output, *last, *grads]
