"""Arguments of one layer, drawn at random: what the tests of the operators and of the engine share.

Legend: T steps, B batch, N packed rows, I input, H hidden, O output of a step, D directions.
"""

from typing import NamedTuple

import torch

from ostinato import ops, reference

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


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
    directions, rows, out = 1 + bidirectional, GATES[cell] * hidden, projection or hidden
    shapes = [
        (rows, size),
        (rows, out),
        *[(rows,)] * (2 * bias),
        *[(out, hidden)] * bool(projection),
    ]
    # Small enough that no gate saturates, where it would hide what comes in.
    weights = [torch.randn(shape, dtype=dtype) * 0.5 for shape in shapes * directions]
    sizes = None
    if lengths is None:
        input = torch.randn(steps, batch, size, dtype=dtype)
    else:
        sizes = [sum(n > t for n in lengths) for t in range(max(lengths, default=0))]
        sizes = torch.tensor(sizes, dtype=torch.int64, device="cpu")
        input, batch = torch.randn(sum(lengths), size, dtype=dtype), len(lengths)
    h_0 = torch.randn(directions, batch, out, dtype=dtype) if "h" in states else None
    c_0 = None
    if cell == "lstm" and "c" in states:
        c_0 = torch.randn(directions, batch, hidden, dtype=dtype)
    return Sample(cell, input, sizes, h_0, c_0, weights, bias, bidirectional, recompute)


def gradients(results, leaves, cotangents, **options):
    """Gradients of `results`, weighted by `cotangents`; zeros where there is none."""
    options.setdefault("materialize_grads", True)
    return torch.autograd.grad(results, leaves, cotangents, **options)


# Every way a call can differ in kind: name -> arguments of `draw`.
SAMPLES = {
    "rnn_tanh": {"cell": "rnn_tanh"},
    "rnn_relu": {"cell": "rnn_relu"},
    "gru": {"cell": "gru"},
    "lstm": {"cell": "lstm"},
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
