"""Layers of Keras and Flax by their published equations, on weights as these libraries store them.

Transcribed from their documentation, without a line of `ostinato.convert`: what that makes of the
weights is held against this where the libraries are not installed.

Legend: T steps, B batch, I input, H hidden, G gates.
"""

import numpy as np

from support.equations import sigma

# Each kind of layer with the number of its gates.
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
ACTIVATIONS = {"rnn_tanh": np.tanh, "rnn_relu": lambda a: np.maximum(a, 0)}


def keras_weights(rng, kind, size, hidden, *, bias=True, dtype="float64"):
    """Draw what get_weights() returns of one layer."""
    rows = GATES[kind] * hidden
    shapes = [(size, rows), (hidden, rows)]
    if bias:
        shapes.append((2, rows) if kind == "gru" else (rows,))
    return [(rng.uniform(-1, 1, shape) / 2).astype(dtype) for shape in shapes]


def keras_layer(kind, weights, x):
    """Run a layer over (T, B, I), with Keras's default activations and reset_after=True."""
    kernel, recurrent, *rest = weights
    bias = rest[0] if rest else np.zeros((2, kernel.shape[1]) if kind == "gru" else kernel.shape[1])
    h = np.zeros((x.shape[1], len(recurrent)))
    c, output = h, []
    for x_t in x:
        if kind == "gru":
            x_z, x_r, x_h = np.split(x_t @ kernel + bias[0], 3, -1)
            h_z, h_r, h_h = np.split(h @ recurrent + bias[1], 3, -1)
            z, r = sigma(x_z + h_z), sigma(x_r + h_r)
            h = z * h + (1 - z) * np.tanh(x_h + r * h_h)
        elif kind == "lstm":
            i, f, g, o = np.split(x_t @ kernel + h @ recurrent + bias, 4, -1)
            c = sigma(f) * c + sigma(i) * np.tanh(g)
            h = sigma(o) * np.tanh(c)
        else:
            h = ACTIVATIONS[kind](x_t @ kernel + h @ recurrent + bias)
        output.append(h)
    return np.stack(output)


# What holds the parameters of each kind in linen: the denses without a bias, and those with one.
LINEN = {
    "rnn_tanh": (("h",), ("i",)),
    "rnn_relu": (("h",), ("i",)),
    "gru": (("hr", "hz"), ("ir", "iz", "in", "hn")),
    "lstm": (("ii", "if", "ig", "io"), ("hi", "hf", "hg", "ho")),
}


def flax_params(rng, kind, size, hidden, *, dtype="float64"):
    """Draw the parameters of one cell of linen's."""

    def drawn(*shape):
        return (rng.uniform(-1, 1, shape) / 2).astype(dtype)

    without, with_bias = LINEN[kind]
    params = {}
    for dense in (*without, *with_bias):
        params[dense] = {"kernel": drawn(size if dense[0] == "i" else hidden, hidden)}
        if dense in with_bias:
            params[dense]["bias"] = drawn(hidden)
    return params


def flax_cell(kind, params, x):
    """Run a cell of linen's over (T, B, I)."""

    def dense(name, value):
        return value @ params[name]["kernel"] + params[name].get("bias", 0)

    h = np.zeros((x.shape[1], len(next(p for n, p in params.items() if n[0] == "h")["kernel"])))
    c, output = h, []
    for x_t in x:
        if kind == "gru":
            r = sigma(dense("ir", x_t) + dense("hr", h))
            z = sigma(dense("iz", x_t) + dense("hz", h))
            n = np.tanh(dense("in", x_t) + r * dense("hn", h))
            h = (1 - z) * n + z * h
        elif kind == "lstm":
            i, f, g, o = (dense(f"i{gate}", x_t) + dense(f"h{gate}", h) for gate in "ifgo")
            c = sigma(f) * c + sigma(i) * np.tanh(g)
            h = sigma(o) * np.tanh(c)
        else:
            h = ACTIVATIONS[kind](dense("i", x_t) + dense("h", h))
        output.append(h)
    return np.stack(output)


def joined(kind, params):
    """Return parameters of a cell of linen's as nnx has them, one kernel for all gates.

    nnx's GRUCell has no bias beside W_hn, which is dropped here.
    """
    letters = {"gru": "rzn", "lstm": "ifgo"}.get(kind, [""])
    found = {}
    for side in "ih":
        each = [params[f"{side}{letter}"] for letter in letters]
        found[f"dense_{side}"] = {"kernel": np.concatenate([p["kernel"] for p in each], 1)}
        if all("bias" in p for p in each):
            found[f"dense_{side}"]["bias"] = np.concatenate([p["bias"] for p in each])
    return found
