"""What runs on a GPU: kernels of our own where they were measured to be faster, otherwise cuDNN.

`explain` is `ostinato.explain`, which says who runs a call, and with which kernels. `trials(False)`
switches off that both are timed at the first call of a size.
"""

from __future__ import annotations

__all__ = ["explain", "trials"]


def __getattr__(name: str) -> object:
    if name == "explain":
        import ostinato

        return ostinato.explain
    if name == "trials":
        from ostinato.cuda.trial import trials

        return trials
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
