"""The float32 error of outputs and gradients, held against torch.nn's own over a grid of cases.

The error of a tensor is its largest distance from the float64 reference, in units of the largest
number of that reference: max |t - truth| / max |truth|. A case's error is the largest of its output,
final states, and the gradients of its input, initial states and every weight. Ours may be 4 times
torch.nn's, and in no single tensor may it be 4 times the larger of torch's error there and FLOOR.

FLOOR is four roundings. A tensor of few numbers may come out of torch.nn exact by luck, and a bound
of 4 times nothing would measure that luck. But each of these numbers has been through at least four
operations that round (input product, hidden product, activation, blend of old and new), half an eps
each, so an error of 2 eps is what float32 has to give.
"""

import itertools
import warnings
from collections import Counter

import pytest
import torch
from conftest import seed_of
from torch.nn.utils.rnn import pack_padded_sequence

from ostinato import nn, reference

EPS = torch.finfo(torch.float32).eps
FLOOR = 2 * EPS
TIMES = 4

CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm", "lstm_projected")
FORMS = ("padded", "packed", "unbatched")
BOTH = (False, True)
GRID = list(itertools.product(CELLS, (1, 2, 3), BOTH, FORMS, BOTH, BOTH, (0, 1)))
# Ones, odd numbers, neighbours of vector widths, more than one row tile.
STEPS, BATCHES, SIZES = (1, 2, 5, 16, 33), (1, 2, 3, 7, 9, 17), (1, 2, 3, 7, 8, 15, 16, 17, 31, 33)


def one_of(values):
    return values[int(torch.randint(len(values), ()))]


def module_of(library, cell, *arguments, **options):
    if cell.startswith("rnn"):
        return library.RNN(*arguments, nonlinearity=cell.removeprefix("rnn_"), **options)
    if cell == "gru":
        return library.GRU(*arguments, **options)
    if cell == "lstm_projected":
        options["proj_size"] = max(1, arguments[1] // 2)
    return library.LSTM(*arguments, **options)


class Case:
    """Two modules with the same weights, and arguments for them, drawn from the name of the case."""

    def __init__(self, cell, layers, bidirectional, form, bias, batch_first, index):
        self.name = f"{cell} x{layers} {form} {bidirectional=} {bias=} {batch_first=} {index}"
        torch.manual_seed(seed_of(self.name))
        self.cell, self.form, self.batch_first = cell, form, batch_first
        steps, size, hidden = one_of(STEPS), one_of(SIZES), one_of(SIZES)
        batch = 1 if form == "unbatched" else one_of(BATCHES)
        hidden = max(hidden, 2) if cell == "lstm_projected" else hidden
        arguments = (cell, size, hidden, layers)
        options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
        self.ours = module_of(nn, *arguments, **options)
        self.theirs = module_of(torch.nn, *arguments, **options)
        self.theirs.load_state_dict(self.ours.state_dict())
        self.name += f" T{steps} B{batch} I{size} H{hidden}"
        self.input = torch.randn(steps, batch, size)
        self.lengths = torch.randint(1, steps + 1, (batch,)) if form == "packed" else None
        states = layers * (1 + bidirectional)
        self.h_0 = torch.randn(states, batch, self.ours.proj_size or hidden)
        self.c_0 = torch.randn(states, batch, hidden) if cell.startswith("lstm") else None

    def leaves(self, module, dtype):
        """Return input, states and weights to differentiate by."""
        tensors = [self.input, self.h_0, self.c_0, *module.parameters()]
        return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]

    def packed(self, input):
        return pack_padded_sequence(input, self.lengths, enforce_sorted=False)

    def run(self, module):
        """Return outputs and gradients of a module, in the layout of the reference."""
        input, h_0, c_0, *weights = leaves = self.leaves(module, torch.float32)
        hx, x = (h_0 if c_0 is None else (h_0, c_0)), input
        if self.form == "packed":
            x = self.packed(input)
        elif self.form == "unbatched":
            x, hx = x[:, 0], (h_0[:, 0] if c_0 is None else (h_0[:, 0], c_0[:, 0]))
        elif self.batch_first:
            x = x.transpose(0, 1)
        weights = dict(zip([n for n, _ in module.named_parameters()], weights, strict=True))
        output, states = torch.func.functional_call(module, weights, (x, hx))
        if self.form == "packed":
            output = output.data
        elif self.form == "unbatched":
            output = output[:, None]
            states = states[:, None] if c_0 is None else tuple(s[:, None] for s in states)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return self.with_gradients([output, *([states] if c_0 is None else states)], leaves)

    def truth(self):
        """Return what `run` returns, from the reference in float64."""
        input, h_0, c_0, *weights = leaves = self.leaves(self.ours, torch.float64)
        x, sizes, order = input, None, slice(None)
        if self.form == "packed":
            x, sizes, order, back = self.packed(input)
        layers, directions = self.ours.num_layers, 1 + self.ours.bidirectional
        width = len(weights) // layers
        ends = []
        for k in range(layers):
            x, *states = reference.layer(
                self.cell.removesuffix("_projected"),
                x,
                sizes,
                h_0[k * directions : (k + 1) * directions, order],
                None if c_0 is None else c_0[k * directions : (k + 1) * directions, order],
                weights[k * width : (k + 1) * width],
                has_biases=self.ours.bias,
                bidirectional=self.ours.bidirectional,
            )
            ends.append(states)
        results = [x, torch.cat([h for h, _ in ends])]
        if c_0 is not None:
            results.append(torch.cat([c for _, c in ends]))
        if self.form == "packed":
            results[1:] = [state[:, back] for state in results[1:]]
        return self.with_gradients(results, leaves)

    def with_gradients(self, results, leaves):
        torch.manual_seed(seed_of(self.name) + 1)
        seeds = [torch.randn(result.shape).to(result.dtype) for result in results]
        leaves = [leaf for leaf in leaves if leaf is not None]
        grads = torch.autograd.grad(results, leaves, seeds)
        return [t.detach().double() for t in (*results, *grads)]

    def labels(self):
        states = ["h", "h"] if self.c_0 is None else ["h", "c", "h", "c"]
        ends, begins = states[: len(states) // 2], states[len(states) // 2 :]
        weights = [f"grad {name}" for name, _ in self.ours.named_parameters()]
        return ["output", *[f"{s}_n" for s in ends], "grad input", *[f"grad {s}_0" for s in begins], *weights]


def errors(results, truth):
    # A tensor of zeros, which a relu may give, has no error or an infinite one.
    tiny = torch.finfo(torch.float32).tiny
    return [
        ((t - e).abs().max() / e.abs().max().clamp_min(tiny)).item()
        for t, e in zip(results, truth, strict=True)
    ]


def measured(case):
    """Return ours and torch's error of every tensor of a case."""
    truth = case.truth()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        theirs = errors(case.run(case.theirs), truth)
    return errors(case.run(case.ours), truth), theirs
