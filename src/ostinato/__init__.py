"""Recurrent layers with PyTorch's interface, weights and numbers, on kernels of their own.

- `ostinato.nn`: RNNCell, GRUCell, LSTMCell, RNN, GRU and LSTM for torch.
- `ostinato.zoo`: recurrent cells of the literature, for `ostinato.nn.Recurrent`.
- `ostinato.replace(model)`: torch.nn's recurrent layers in a model become these;
  `ostinato.restore(model)`: and back.
- `ostinato.freeze(model)`: weights that are packed once, for inference, in float or 8 bits.
- `ostinato.explain(layer, x)`: who would run a call, and why nobody before.
- `ostinato.numpy`: inference on NumPy arrays, without torch.
- `ostinato.Stream`: frozen weights and the states inside, step by step, without torch.
- `ostinato.ops`: the operators under the modules. `ostinato.cuda`: what runs on a GPU.
- `ostinato.decompositions()`: a program of torch.export in operators of ATen alone.
- `ostinato.convert`: weights of Keras, Flax, ONNX and R's torch, and back to Keras and ONNX;
  `ostinato.from_r(weights)` is one of these functions.
- `ostinato.onnx`: ONNX models with one node for each layer.
- `ostinato.opacus`: gradients of each sample for Opacus.
- `ostinato.bench`: what a shape would gain.
- `ostinato.reference`: the specification, each cell's step and the plain loop.

Modules are loaded when they are first used, so `import ostinato` never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from ostinato import bench, convert, cuda, nn, numpy, onnx, opacus, ops, reference, zoo
    from ostinato.aten import decompositions
    from ostinato.convert import from_r
    from ostinato.explained import explain
    from ostinato.frozen import freeze
    from ostinato.stream import Stream
    from ostinato.switch import replace, restore

__version__ = "0.1.0"

__all__ = [
    "Stream",
    "__version__",
    "bench",
    "convert",
    "cuda",
    "decompositions",
    "explain",
    "freeze",
    "from_r",
    "nn",
    "numpy",
    "onnx",
    "opacus",
    "ops",
    "reference",
    "replace",
    "restore",
    "zoo",
]

# Functions and classes, and the module that each stands in.
_FUNCTIONS = {
    "Stream": "stream",
    "decompositions": "aten",
    "explain": "explained",
    "freeze": "frozen",
    "from_r": "convert",
    "replace": "switch",
    "restore": "switch",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_FUNCTIONS.get(name, name)}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"{__name__}.{name} needs PyTorch: pip install {__name__}[torch]", name="torch"
        ) from error
    return getattr(module, name) if name in _FUNCTIONS else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
