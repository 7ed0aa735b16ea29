"""What runs on a GPU: kernels of our own where they were measured to be faster, otherwise cuDNN.

`explain(layer, x)` says which kernel a call would run, and why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ostinato.cuda.layer import explain

__all__ = ["explain"]


def __getattr__(name: str) -> object:
    if name == "explain":
        from ostinato.cuda.layer import explain

        return explain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
