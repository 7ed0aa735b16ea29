"""R: names of its torch, which counts layers from 1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

_Array = TypeVar("_Array")

# A weight of a layer, after the names of the modules that hold it.
_OF_LAYER = re.compile(r"(.*\.)?(weight_ih|weight_hh|bias_ih|bias_hh|weight_hr)_l(\d+)(_reverse)?")
# The R object itself, as bytes, which R's torch_save puts beside the weights.
_R_OBJECT = "__robj__"


def from_r(weights: Mapping[str, _Array]) -> dict[str, _Array]:
    """Bring weights from R's torch to the names of Python's.

    weight_ih_l1 in R is weight_ih_l0 in Python, weight_hh_l2_reverse is weight_hh_l1_reverse: R
    counts layers from 1. Shapes, the order of the gates and everything else are the same.

    Args:
        weights: by R's names: what a reader of safetensors makes of a file that R's
            `torch_save(module, path)` has written, or any part of it. Tensors or arrays; they are
            not touched.

    Returns:
        A new dict in the same order, for `load_state_dict` and `ostinato.numpy`. Names of anything
        but a recurrent layer are as they were. The R object, `__robj__`, is left out.

    Raises:
        ValueError: a layer 0, which R does not have: the names are Python's already.

    Example:
        >>> from_r({"encoder.weight_ih_l1": 1, "encoder.bias_hh_l2_reverse": 2, "head.weight": 3})
        {'encoder.weight_ih_l0': 1, 'encoder.bias_hh_l1_reverse': 2, 'head.weight': 3}

    Source: nn_rnn, nn_gru and nn_lstm of the R package torch.
    """
    found = {}
    for name, weight in weights.items():
        if name == _R_OBJECT:
            continue
        match = _OF_LAYER.fullmatch(name)
        if match is None:
            found[name] = weight
            continue
        holder, kind, layer, reverse = match.groups(default="")
        if int(layer) == 0:
            raise ValueError(
                f"weights: expected R's names, which count layers from 1, got {name!r}"
            )
        found[f"{holder}{kind}_l{int(layer) - 1}{reverse}"] = weight
    return found
