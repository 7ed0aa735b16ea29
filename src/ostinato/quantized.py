"""Weights of 8 bits: one scale for each row, w = scale * q with q from -127 to 127.

It needs no torch. Who multiplies with them is csrc/cpu/int8.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

LARGEST = 127
# So many products of 8 bits always fit a sum of 32.
MOST_COLUMNS = 1 << 17
# Rows of 8 bits that a row is multiplied as, by what `activations` says.
PLANES = {"int8": 1, "int16": 2}
# What the scales of `weight_ih_l0` are called.
SUFFIX = "_scale"


class Quantized(NamedTuple):
    """A weight (rows, columns) of 8 bits, and the scale of each row."""

    values: Array
    scales: Array

    def dequantised(self) -> Array:
        """Return the weight that it stands for, in float32."""
        found: Array = self.values * self.scales[:, None]
        return found


def quantise(name: str, weight: Array) -> Quantized:
    """Quantise a weight: scale = max |w| / 127 of its row, q = w / scale, rounded to nearest.

    Args:
        name: what the weight is called, for errors.
        weight: (rows, columns) of float32.

    Returns:
        The weight in 8 bits. A row of zeros has scale 0.

    Raises:
        ValueError: a number is NaN or infinite, which no scale fits; more columns than a sum of
            32 bits holds products of.

    Example:
        >>> quantise("w", np.array([[1.0, -0.5, 0.004]], "f4")).values
        array([[127, -64,   1]], dtype=int8)
    """
    _check_columns(name, weight)
    if not np.isfinite(weight).all():
        row, column = np.argwhere(~np.isfinite(weight))[0]
        raise ValueError(
            f"{name}: expected finite numbers to quantise, got {weight[row, column]} "
            f"at [{row}, {column}]"
        )
    scales = (np.abs(weight).max(axis=1, initial=0) / np.float32(LARGEST)).astype(np.float32)
    # A row whose scale is no normal number holds nothing that counts.
    scales[scales < np.finfo(np.float32).tiny] = 0
    divisors = np.where(scales == 0, np.float32(1), scales)[:, None]
    rounded = np.where(scales[:, None] == 0, 0, np.rint(weight / divisors))
    return Quantized(np.clip(rounded, -LARGEST, LARGEST).astype(np.int8), scales)


def activations_for(who: str, dtype: str, given: object) -> str:
    """Check the word for what weights of a dtype are multiplied with; None stands for "int8".

    Raises:
        TypeError: no str.
        ValueError: an unknown word, or one beside other weights than those of 8 bits.
    """
    if given is None:
        return "int8"
    if not isinstance(given, str):
        raise TypeError(f"{who}: activations must be a str or None, got {type(given).__name__}")
    if given not in PLANES:
        raise ValueError(f"{who}: activations must be one of {', '.join(PLANES)}, got {given!r}")
    if dtype != "int8":
        raise ValueError(
            f"{who}: activations: expected None beside dtype={dtype!r}, got {given!r}; "
            "dtype='int8' has weights of 8 bits"
        )
    return given


def checked(who: str, name: str, values: Array, scales: object) -> Quantized:
    """Check a weight that is quantised already.

    Args:
        who: who asks, for errors.
        name: what the weight is called, likewise.
        values: of int8.
        scales: what stands under the name of the scales; None where nothing does.

    Raises:
        TypeError: the scales are no NumPy array.
        ValueError: scales that are missing, not float32, negative or not finite; a value of -128;
            too many columns.
        RuntimeError: other than one scale for each row.
    """
    _check_columns(f"{who}: {name}", values)
    beside = f"{name}{SUFFIX}"
    if scales is None:
        raise ValueError(f"{who}: expected {beside!r} beside {name!r} of int8, which is missing")
    if not isinstance(scales, np.ndarray):
        raise TypeError(f"{who}: {beside} must be a NumPy array, got {type(scales).__name__}")
    if scales.dtype != np.float32:
        raise ValueError(f"{who}: {beside}: expected dtype float32, got {scales.dtype}")
    if scales.shape != values.shape[:1]:
        expected, got = values.shape[:1], scales.shape
        raise RuntimeError(f"{who}: {beside}: expected shape {expected}, got {got}")
    if not (is_fine := np.isfinite(scales) & (scales >= 0)).all():
        row = int(np.argmin(is_fine))
        raise ValueError(
            f"{who}: {beside}: expected finite numbers from 0 on, got {scales[row]} at [{row}]"
        )
    if (values < -LARGEST).any():
        raise ValueError(f"{who}: {name}: expected values from -127 to 127, got -128")
    return Quantized(values, scales)


def _check_columns(name: str, weight: Array) -> None:
    columns = weight.shape[-1]
    if columns > MOST_COLUMNS:
        raise ValueError(f"{name}: expected at most {MOST_COLUMNS} columns, got {columns}")


def split(parameters: Any) -> tuple[Any, dict[str, Any]]:
    """Return the parameters, and the scales beside them by the parameters' names.

    What is no mapping is returned as it is, for whoever checks that.
    """
    if not isinstance(parameters, Mapping):
        return parameters, {}
    scales = {
        str(name).removesuffix(SUFFIX): value
        for name, value in parameters.items()
        if str(name).endswith(SUFFIX) and "weight_" in str(name)
        if str(name).removesuffix(SUFFIX) in parameters
    }
    rest = {name: value for name, value in parameters.items() if name not in _named(scales)}
    return rest, scales


def _named(scales: Mapping[str, Any]) -> set[str]:
    return {f"{name}{SUFFIX}" for name in scales}
