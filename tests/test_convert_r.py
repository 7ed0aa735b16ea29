"""Weights as R's torch saves them: a file written that way, loaded by all three.

Legend: T steps, B batch, L layers, D directions, H hidden.
"""

import json
import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

import ostinato
import ostinato.numpy
from ostinato import nn

safetensors_torch = pytest.importorskip("safetensors.torch")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

LAYERS = {
    "RNN": {},
    "RNN relu": {"nonlinearity": "relu", "num_layers": 2},
    "GRU": {"num_layers": 3, "bidirectional": True},
    "GRU without biases": {"num_layers": 2, "bias": False},
    "LSTM": {"num_layers": 2, "bidirectional": True},
}


def to_r(name):
    """The name that R gives a weight: its layers begin with 1."""
    return re.sub(r"_l(\d+)", lambda found: f"_l{int(found[1]) + 1}", name)


def save_as_r(path, weights, object_bytes=b"X\n\0\0\0\3"):
    """Write what R's torch_save(module, path) writes since torch 0.12, byte by byte.

    The size of the header in 8 bytes, the header, which R does not pad, the arrays in order. The
    last array is the R object itself, serialized.
    """
    arrays = {name: weight.numpy() for name, weight in weights.items()}
    arrays["__robj__"] = np.frombuffer(object_bytes, np.uint8)
    kinds = {np.dtype("float32"): "F32", np.dtype("float64"): "F64", np.dtype("uint8"): "U8"}
    header, offset = {}, 0
    for name, array in arrays.items():
        end = offset + array.nbytes
        header[name] = {
            "shape": list(array.shape),
            "dtype": kinds[array.dtype],
            "data_offsets": [offset, end],
        }
        offset = end
    notes = {"type": "module", "version": 3, "requires_grad": dict.fromkeys(weights, True)}
    header["__metadata__"] = {"__r__": json.dumps({**notes, "special_dtype": []})}
    text = json.dumps(header, separators=(",", ":")).encode()
    data = b"".join(array.tobytes() for array in arrays.values())
    path.write_bytes(struct.pack("<q", len(text)) + text + data)


def make(library, name, **more):
    return getattr(library, name.split()[0])(3, 4, **LAYERS[name], **more)


@pytest.fixture(params=LAYERS)
def saved(request, tmp_path):
    """A layer, and a file that holds its weights as R's torch has them."""
    layer = make(nn, request.param)
    path = tmp_path / "layer.pt"
    save_as_r(path, {to_r(name): weight for name, weight in layer.state_dict().items()})
    return request.param, layer, path


def test_a_file_of_r_s_loads_into_both_libraries(saved):
    name, layer, path = saved
    weights = safetensors_torch.load_file(path)
    assert "weight_ih_l1" in weights
    assert "weight_ih_l0" not in weights
    loaded = ostinato.from_r(weights)
    assert "weight_ih_l1" in weights  # the caller's own is as it was
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        expected, (h_n, *_) = layer(x)[0], layer(x)[1:]
        for library in (nn, torch.nn):
            other = make(library, name)
            other.load_state_dict(loaded)
            output, (h, *_) = other(x)[0], other(x)[1:]
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close(h, h_n)


def test_a_file_of_r_s_runs_without_torch(saved):
    name, layer, path = saved
    weights = ostinato.from_r(safetensors_numpy.load_file(path))
    run = getattr(ostinato.numpy, name.split()[0].lower())
    options = {"nonlinearity": "relu"} if "relu" in name else {}
    x = torch.randn(5, 2, 3)
    output, _ = run(x.numpy(), weights, **options)
    with torch.no_grad():
        assert np.array_equal(output, layer(x)[0].numpy())


def test_layers_within_a_model(tmp_path):
    """Names of holders, which R counts from 0 too, and of other modules stay."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoders = torch.nn.ModuleList([nn.GRU(3, 4), nn.LSTM(4, 5, 2)])
            self.head_l1 = torch.nn.Linear(5, 2)

    model = Model()
    names = {
        name: to_r(name) if name.startswith("encoders") else name for name in model.state_dict()
    }
    assert names["encoders.1.weight_hh_l1"] == "encoders.1.weight_hh_l2"
    path = tmp_path / "model.pt"
    save_as_r(path, {names[name]: weight for name, weight in model.state_dict().items()})
    other = Model()
    other.load_state_dict(ostinato.from_r(safetensors_torch.load_file(path)))
    for a, b in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_h_n_stands_in_r_s_order():
    """nn_gru's h_n$view(num_layers, num_directions, batch, hidden_size), as its page says."""
    layer = make(nn, "GRU")
    output, h_n = layer(torch.randn(5, 2, 3))
    by_layer = h_n.view(3, 2, 2, 4)
    assert torch.equal(by_layer[2, 0], output[-1, :, :4])
    assert torch.equal(by_layer[2, 1], output[0, :, 4:])


def test_names_of_python_s_are_refused():
    with pytest.raises(ValueError, match=r"expected R's names, .* got 'rnn.weight_ih_l0'"):
        ostinato.from_r({"rnn.weight_ih_l0": 0})


def test_torch_is_not_needed():
    code = """
import sys
import ostinato
assert ostinato.from_r({"weight_ih_l1": 1}) == {"weight_ih_l0": 1}
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
