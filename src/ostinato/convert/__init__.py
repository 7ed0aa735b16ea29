"""Models from elsewhere: weights of other libraries under torch's names and in torch's gate order.

- `from_keras`, `to_keras`: what `get_weights()` returns and `set_weights` takes.
- `from_flax`: parameters of Flax's cells, linen and nnx.
- `from_onnx`, `to_onnx`: RNN, GRU and LSTM nodes. `Node` is one of them, as arrays.
- `from_r`: names of R's torch, which counts layers from 1.

Each is a function of arrays. None imports torch or the other library, but that TensorProtos are
read by onnx.
"""

from ostinato.convert._flax import from_flax
from ostinato.convert._keras import from_keras, to_keras
from ostinato.convert._onnx import Node, from_onnx, to_onnx
from ostinato.convert._r import from_r

__all__ = ["Node", "from_flax", "from_keras", "from_onnx", "from_r", "to_keras", "to_onnx"]
