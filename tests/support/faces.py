"""The functions of `ostinato.numpy` by the kinds of layers, and parameters for them; no torch."""

import itertools

import numpy as np

import ostinato.numpy
from support import cells
from support.cells import is_projected, options_of, record_of

# The kinds that it has a function for.
KINDS = tuple(
    kind for kind in cells.KINDS if hasattr(ostinato.numpy, record_of(kind).layer.lower())
)


def call(kind, *args, **kwargs):
    """Call the function of this kind; return output, h_n and c_n or None."""
    record = record_of(kind)
    function = getattr(ostinato.numpy, record.layer.lower())
    output, end = function(*args, **kwargs, **options_of(kind))
    return (output, *end) if record.has_c else (output, end, None)


def output_size(kind, hidden):
    return hidden - is_projected(kind)


def draw_parameters(rng, kind, size, hidden, *, layers=1, ways=1, bias=True, dtype="float64"):
    """Draw a layer's parameters under torch's names."""
    rows = record_of(kind).gates * hidden
    out = output_size(kind, hidden)
    parameters = {}
    for k, way in itertools.product(range(layers), ("", "_reverse")[:ways]):
        shapes = {"weight_ih": (rows, ways * out if k else size), "weight_hh": (rows, out)}
        if bias:
            shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
        if out != hidden:
            shapes["weight_hr"] = (out, hidden)
        for name, shape in shapes.items():
            drawn = rng.uniform(-1, 1, shape) / np.sqrt(hidden)
            parameters[f"{name}_l{k}{way}"] = drawn.astype(dtype)
    return parameters
