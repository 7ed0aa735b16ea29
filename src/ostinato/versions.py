"""What differs between the versions of torch that pyproject.toml allows.

The oldest is 2.10, the first whose tensors C++ can read without Python (`ostinato.fast_path`):
without that, a call of a cell would be slower than torch.nn's.
"""

from __future__ import annotations

import sys

import torch


def drop_compiled_graphs() -> None:
    """Drop compiled graphs where they do not see that the class of a module has changed.

    Until torch 2.12 a graph of torch.nn's cells asks for the module, but not for its class.
    """
    if torch.__version__ < "2.13" and "torch._dynamo" in sys.modules:
        torch.compiler.reset()
