"""The float32 error of outputs and gradients, held against torch.nn's own over a grid of cases.

A case is a module and a shape; its data and weights are drawn several times. The error of a tensor
(the output, a final state, the gradient of the input, of an initial state, of a weight) is its
largest distance from the float64 reference, max |t - truth|, averaged over the draws, in units of
max |truth|, averaged likewise. Both libraries get the same numbers and the same truth.

Ours is at most 4 times the larger of torch.nn's error of the same tensor and 2 eps, for every
tensor of every case, which is more than holding the largest error of a case to that.

Why 2 eps: every number has been through at least four operations that round (input product, hidden
product, activation, the blend of old and new), half an eps each; that is what float32 has to give.
Tensors of few numbers come out of either library better than that by luck, and 4 times nothing
would be a test of luck. Why several draws: the same luck, the other way round. Small shapes, which
have few numbers to show, are drawn more often.
"""

import itertools
import time
import warnings

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from ostinato import nn, reference
from support.calls import seed_of
from support.cells import TORCH_KINDS, has_c, is_projected, options_of, record_of
from support.devices import device_type

EPS = torch.finfo(torch.float32).eps
TIMES, FLOOR = 4, 2 * EPS

FORMS = ("padded", "packed", "unbatched")
BOTH = (False, True)
# layers, bidirectional, form, bias, batch_first, and two shapes each; the steps of a cell besides.
GRID = list(itertools.product((1, 2, 3), BOTH, FORMS, BOTH, BOTH, (0, 1)))
GRID += itertools.product((1,), (False,), ("cell",), BOTH, (False,), range(4))
# Ones, odd numbers, neighbours of vector widths, more than one row tile.
STEPS, BATCHES, SIZES = (1, 2, 5, 16, 33), (1, 2, 3, 7, 9, 17), (1, 2, 3, 7, 8, 15, 16, 17, 31, 33)
# Steps, batch, input and hidden size where sums are long: over rows, and over units.
LONG = [(1000, 32, 16, 32), (100, 32, 64, 64), (300, 1, 7, 129), (20, 8, 300, 300)]


def grid_of(cell):
    # A projection belongs to the layer alone.
    return [g for g in GRID if not is_projected(cell) or g[2] != "cell"]


def one_of(values):
    return values[int(torch.randint(len(values), ()))]


def module_of(library, cell, form, size, hidden, layers, bias, batch_first, bidirectional):
    name = record_of(cell).layer
    options = {"bias": bias} | options_of(cell)
    if form == "cell":
        return getattr(library, f"{name}Cell")(size, hidden, **options)
    if is_projected(cell):
        options["proj_size"] = max(1, hidden // 2)
    options |= {"batch_first": batch_first, "bidirectional": bidirectional}
    return getattr(library, name)(size, hidden, layers, **options)


class Case:
    """A module of both libraries, of a shape drawn from its name, and numbers for it."""

    def __init__(self, cell, layers, bidirectional, form, bias, batch_first, index, shape=None):
        self.name = f"{cell} x{layers} {form} {bidirectional=} {bias=} {batch_first=} {index}"
        torch.manual_seed(seed_of(self.name))
        steps, batch, size, hidden = shape or map(one_of, (STEPS, BATCHES, SIZES, SIZES))
        batch = 1 if form == "unbatched" else batch
        hidden = max(hidden, 2) if is_projected(cell) else hidden
        self.name += f" T{steps} B{batch} I{size} H{hidden}"
        self.cell, self.form, self.batch_first, self.bias = cell, form, batch_first, bias
        self.layers, self.directions = layers, 1 + bidirectional
        self.shape = steps, batch, size, hidden
        arguments = (cell, form, size, hidden, layers, bias, batch_first, bidirectional)
        self.ours, self.theirs = module_of(nn, *arguments), module_of(torch.nn, *arguments)
        names = [name for name, _ in self.ours.named_parameters()]
        states = record_of(cell).states
        self.labels = ["output", *[f"{s}_n" for s in states], "grad of input"]
        self.labels += [f"grad of {name}" for name in [*(f"{s}_0" for s in states), *names]]

    def draw(self):
        """Draw weights, input, lengths and states."""
        steps, batch, size, hidden = self.shape
        self.ours.reset_parameters()
        self.theirs.load_state_dict(self.ours.state_dict())
        self.input = torch.randn(steps, batch, size)
        self.lengths = torch.randint(1, steps + 1, (batch,), device="cpu")
        rows = self.layers * self.directions
        self.h_0 = torch.randn(rows, batch, getattr(self.ours, "proj_size", 0) or hidden)
        self.c_0 = torch.randn(rows, batch, hidden) if has_c(self.cell) else None

    def leaves(self, dtype):
        tensors = [self.input, self.h_0, self.c_0, *self.ours.parameters()]
        return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]

    def packed(self, input):
        return pack_padded_sequence(input, self.lengths, enforce_sorted=False)

    def run(self, module):
        """Return output, states and gradients of a module, in the layout of the reference."""
        input, h_0, c_0, *weights = leaves = self.leaves(torch.float32)
        x, hx = input, [h_0] if c_0 is None else [h_0, c_0]
        if self.form == "packed":
            x = self.packed(input)
        elif self.form == "unbatched":
            x, hx = x[:, 0], [state[:, 0] for state in hx]
        elif self.batch_first:
            x = x.transpose(0, 1)
        elif self.form == "cell":
            hx = [state[0] for state in hx]
        names = [name for name, _ in module.named_parameters()]
        named = dict(zip(names, weights, strict=True))

        def call(x, hx):
            hx = hx[0] if c_0 is None else tuple(hx)
            return torch.func.functional_call(module, named, (x, hx))

        if self.form == "cell":
            outputs = []
            for step in x:
                hx = call(step, hx)
                hx = [hx] if c_0 is None else hx
                outputs.append(hx[0])
            return self.with_gradients([torch.stack(outputs), *[s[None] for s in hx]], leaves)
        output, states = call(x, hx)
        states = [states] if c_0 is None else states
        if self.form == "packed":
            output = output.data
        elif self.form == "unbatched":
            output, states = output[:, None], [state[:, None] for state in states]
        elif self.batch_first:
            output = output.transpose(0, 1)
        return self.with_gradients([output, *states], leaves)

    def truth(self):
        """Return what `run` returns, from the reference in float64."""
        x, h_0, c_0, *weights = leaves = self.leaves(torch.float64)
        sizes, order, back = None, slice(None), slice(None)
        if self.form == "packed":
            x, sizes, order, back = self.packed(x)
        width = len(weights) // self.layers
        ends = []
        for k in range(self.layers):
            rows = slice(k * self.directions, (k + 1) * self.directions)
            x, *states = reference.layer(
                self.cell.removesuffix("_projected"),
                x,
                sizes,
                h_0[rows][:, order],
                None if c_0 is None else c_0[rows][:, order],
                weights[k * width : (k + 1) * width],
                has_biases=self.bias,
                bidirectional=self.directions == 2,
            )
            ends.append(states[: 1 if c_0 is None else 2])
        states = [torch.cat(state)[:, back] for state in zip(*ends, strict=True)]
        return self.with_gradients([x, *states], leaves)

    def with_gradients(self, results, leaves):
        generator = torch.Generator(device_type()).manual_seed(seed_of(self.name))
        seeds = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
        leaves = [leaf for leaf in leaves if leaf is not None]
        grads = torch.autograd.grad(results, leaves, seeds)
        return [t.detach().double() for t in (*results, *grads)]


def largest(tensors):
    return torch.stack([t.abs().max() for t in tensors])


def distance(results, truth):
    return largest([t - e for t, e in zip(results, truth, strict=True)])


def errors(case, draws):
    """Return the error of every tensor, ours and torch.nn's."""
    found = []
    for _ in range(draws):
        case.draw()
        truth = case.truth()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
            theirs = case.run(case.theirs)
        ours = case.run(case.ours)
        found.append(torch.stack([distance(ours, truth), distance(theirs, truth), largest(truth)]))
    # Also where the distances are NaN, which no comparison would see.
    assert all(draw.isfinite().all() for draw in found), case.name
    ours, theirs, scale = torch.stack(found).mean(0)
    # A relu may give nothing but zeros; then there is no error either.
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return ours / scale, theirs / scale


def compare(cases, capsys):
    """Measure the cases, report, and return what exceeds the bounds."""
    started = time.perf_counter()
    wrong, worst_tensor, worst_case, tensors = [], (0.0, ""), (0.0, ""), 0
    for case, draws in cases:
        ours, theirs = errors(case, draws)
        ratio = (ours.max() / theirs.max().clamp_min(FLOOR)).item()
        worst_case = max(worst_case, (ratio, case.name))
        for label, our, their in zip(case.labels, ours, theirs, strict=True):
            ratio = (our / their.clamp_min(FLOOR)).item()
            worst_tensor = max(worst_tensor, (ratio, f"{case.name}, {label}"))
            if ratio > TIMES:
                what = f"{our / EPS:.1f} eps, torch {their / EPS:.1f}"
                wrong.append(f"{case.name}, {label}: {what}")
        tensors += len(case.labels)
    seconds = time.perf_counter() - started
    with capsys.disabled():
        print(
            f"\n{len(cases)} cases, {tensors} tensors, {seconds:.0f} s: error / torch's is at most"
        )
        print(f"  {worst_case[0]:.2f} in a case    ({worst_case[1]})")
        print(f"  {worst_tensor[0]:.2f} in a tensor  ({worst_tensor[1]})")
    return wrong


def test_the_grid_is_large_enough():
    assert sum(len(grid_of(cell)) for cell in TORCH_KINDS) >= 500


@pytest.mark.parametrize("cell", TORCH_KINDS)
def test_float32_error_is_at_most_four_times_torchs(cell, capsys):
    cases = []
    for arguments in grid_of(cell):
        case = Case(cell, *arguments)
        cases.append((case, min(16, max(3, 64 // case.shape[-1]))))
    wrong = compare(cases, capsys)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("shape", LONG)
@pytest.mark.parametrize("cell", TORCH_KINDS)
def test_long_sums(cell, shape, capsys):
    case = Case(cell, 1, False, "padded", True, False, 0, shape)
    wrong = compare([(case, 1)], capsys)
    assert not wrong, "\n".join(wrong)
