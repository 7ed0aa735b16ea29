"""What the six modules say to tools of torch's that know torch.nn's classes alone."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import torch


class Neighbour(torch.nn.Module):
    """Answers torch.jit.script and torch.ao.quantization, which pass every module of a model by."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse torch.jit.script, which asks each module for something that it can compile."""
        kind = type(self).__name__
        raise RuntimeError(
            f"torch.jit.script does not take ostinato.nn.{kind}, whose forward is not TorchScript. "
            "Use torch.jit.trace or torch.export; or script what ostinato.restore(model) makes of "
            "the model, with torch.nn's layers"
        )

    @property
    def qconfig(self) -> Any:
        """What torch.ao.quantization writes down at each module; there is none before."""
        try:
            return self.__dict__["qconfig"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no attribute 'qconfig'") from None

    @qconfig.setter
    def qconfig(self, config: Any) -> None:
        self.__dict__["qconfig"] = config

    @qconfig.deleter
    def qconfig(self) -> None:
        """Say that a conversion, which ends with this, has left the module as it was."""
        del self.__dict__["qconfig"]
        kind = type(self).__name__
        warnings.warn(
            f"torch.ao.quantization has left ostinato.nn.{kind} as it was, in floating point: it "
            "converts torch.nn's classes alone. To quantize it as well, call "
            "ostinato.restore(model) before",
            UserWarning,
            stacklevel=2,
        )
