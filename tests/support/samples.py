"""Calls of `ops.layer`, drawn at random.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step, D directions.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from ostinato import ops, reference
from ostinato.call import Call
from support import calls
from support.cells import CELLS
from support.devices import device_type
from support.tolerances import tolerance

# torch scripts its own formulas when forward-mode differentiation is first used.
forward_mode = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script` is deprecated")
# Small enough that no gate saturates, where it would hide what comes in.
SMALL = calls.Scales(ih=0.5, hh=0.5, bias=0.5, hr=0.5)


class Sample(NamedTuple):
    """One call of `ops.layer`."""

    cell: str
    input: torch.Tensor
    batch_sizes: torch.Tensor | None
    h_0: torch.Tensor | None
    c_0: torch.Tensor | None
    weights: list[torch.Tensor]
    has_biases: bool
    bidirectional: bool
    recompute: bool = False

    def run(self, function=ops.layer):
        """Return output and h_n, and c_n where there is one."""
        options = {"has_biases": self.has_biases, "bidirectional": self.bidirectional}
        if function is ops.layer:
            options["recompute"] = self.recompute
        results = function(*self[:6], **options)
        return [result for result in results if result is not None]

    def reference(self):
        return self.run(reference.layer)

    def leaves(self):
        """The tensors that can have a gradient."""
        return [t for t in (self.input, self.h_0, self.c_0, *self.weights) if t is not None]

    def replaced(self, leaves):
        """The same call with other tensors in place of `leaves()`."""
        rest = iter(leaves)
        input = next(rest)
        h_0, c_0 = (None if state is None else next(rest) for state in (self.h_0, self.c_0))
        return self._replace(input=input, h_0=h_0, c_0=c_0, weights=list(rest))

    def each(self, change):
        """The same call with every tensor that can have a gradient changed."""
        return self.replaced([change(leaf) for leaf in self.leaves()])

    def training(self):
        """The same call on leaves that require gradients."""
        return self.each(lambda t: t.detach().clone().requires_grad_())

    def operator_arguments(self, keep=True):
        """The arguments of the operator `ostinato::layer`."""
        if self.batch_sizes is None:
            batch = self.input.shape[1]
        else:
            state = self.h_0 if self.h_0 is not None else self.c_0
            batch = int(self.batch_sizes[0]) if state is None else state.shape[1]
        tensors = (self.input, self.batch_sizes, batch, self.h_0, self.c_0, self.weights)
        options = (self.cell, self.has_biases, self.bidirectional, self.recompute)
        return (*tensors, *options, None, None, None, None, False, keep)


def draw(
    cell,
    steps=4,
    batch=3,
    size=2,
    hidden=3,
    *,
    projection=0,
    bias=True,
    bidirectional=False,
    lengths=None,
    states="hc",
    recompute=False,
    dtype=torch.float32,
):
    """Draw a call; `lengths` packs it, `states` says which of h_0 and c_0 are there."""
    sizes = None
    if lengths is not None:
        sizes, batch = calls.batch_sizes_of(lengths), len(lengths)
    options = {"projection": projection, "bias": bias, "directions": 1 + bidirectional}
    options |= {"sizes": sizes, "states": [f"{state}_0" for state in states]}
    options["dtype"] = numpys(dtype)
    call = calls.draw(generator(), cell, steps, batch, size, hidden, SMALL, **options)
    input, h_0, c_0 = (tensor(array, dtype) for array in (call.x, call.h_0, call.c_0))
    if lengths is None:
        input = input.reshape(steps, batch, size)
    else:
        sizes = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    weights = weights_of(call, dtype)
    return Sample(cell, input, sizes, h_0, c_0, weights, bias, bidirectional, recompute)


def call_of(sample):
    """Return a sample as the backends take it."""
    *parameters, all_c, _ = sample.operator_arguments()
    return Call.of(*parameters, all_states=all_c)


def generator():
    """Return NumPy's generator, seeded by torch's."""
    return np.random.default_rng(int(torch.randint(2**62, (), device="cpu")))


def numpys(dtype):
    """Return NumPy's name of a dtype; it has no bfloat16."""
    return "float32" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")


def tensor(array, dtype=None):
    """Return an array on the tests' device; None stays None."""
    return None if array is None else torch.tensor(array, dtype=dtype, device=device_type())


def weights_of(call, dtype):
    """Return a call's weights in the operators' order."""
    arrays = (way[name] for way in call.weights for name in calls.WEIGHTS)
    return [tensor(array, dtype) for array in arrays if array is not None]


def cut_of(sample, lengths, probability, *, with_state=True):
    """Draw the keyword arguments of `ops.cut_layer` for a sample."""
    cuts = {"lengths": None}
    if lengths is not None:
        cuts["lengths"] = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    if probability is None:
        return cuts
    cuts["resets"] = torch.rand(sample.input.shape[:-1]) < probability
    if with_state:
        cuts["reset_h"] = None if sample.h_0 is None else torch.randn_like(sample.h_0)
        cuts["reset_c"] = None if sample.c_0 is None else torch.randn_like(sample.c_0)
    return cuts


def close(actual, expected, steps=8):
    """Hold tensors to others, both up to the roundings of so many steps."""
    for a, e in zip(actual, expected, strict=True):
        bound = tolerance(e.dtype, steps)
        # A sum rounds in proportion to its terms, which may cancel.
        bound["atol"] *= max(1.0, e.detach().abs().max().item() if e.numel() else 0.0)
        torch.testing.assert_close(a, e, **bound)


def gradients(results, leaves, cotangents, **options):
    """Gradients of `results`, weighted by `cotangents`; zeros where there is none."""
    options.setdefault("materialize_grads", True)
    return torch.autograd.grad(results, leaves, cotangents, **options)


# Every way a call can differ in kind: name -> arguments of `draw`.
SAMPLES = {
    **{cell: {"cell": cell} for cell in CELLS},
    "projected": {"cell": "lstm", "projection": 2},
    "without bias": {"cell": "gru", "bias": False, "states": ""},
    "without states": {"cell": "lstm", "states": ""},
    "h_0 alone": {"cell": "lstm", "states": "h"},
    "c_0 alone": {"cell": "lstm", "states": "c"},
    "bidirectional": {"cell": "gru", "bidirectional": True},
    "packed": {"cell": "gru", "lengths": (4, 2, 1)},
    "packed both ways": {"cell": "lstm", "lengths": (4, 4, 1), "bidirectional": True},
    "packed projected": {
        "cell": "lstm",
        "lengths": (3, 2),
        "bidirectional": True,
        "projection": 1,
        "bias": False,
    },
    "packed rnn": {"cell": "rnn_tanh", "lengths": (5, 1), "bidirectional": True, "states": ""},
    "row of no steps": {"cell": "gru", "lengths": (3, 1, 0), "bidirectional": True},
    "one element": {"cell": "gru", "steps": 1, "batch": 1, "size": 1, "hidden": 1},
    "recomputed": {"cell": "gru", "bidirectional": True, "recompute": True},
    "recomputed packed": {"cell": "lstm", "lengths": (4, 2, 1), "projection": 2, "recompute": True},
}
