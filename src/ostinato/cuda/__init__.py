"""What runs on a GPU: kernels of our own where they were measured to be faster, otherwise cuDNN.

`explain` is `ostinato.explain`, which says who runs a call, and with which kernels.
"""

from __future__ import annotations

__all__ = ["explain"]


def __getattr__(name: str) -> object:
    if name == "explain":
        import ostinato

        return ostinato.explain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
