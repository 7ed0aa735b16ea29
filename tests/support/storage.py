"""16-bit numbers in NumPy, which has no bfloat16, and layers that are stored in them."""

import numpy as np

from support.calls import STATES


def widen(array):
    """Return the numbers of an array of float16, or of the bits of bfloat16, in float32."""
    if array is None or array.dtype == np.float32:
        return array
    if array.dtype == np.float16:
        # On Arm the conversion of a signalling NaN raises the processor's flag.
        with np.errstate(invalid="ignore"):
            return array.astype(np.float32)
    return (array.astype(np.uint32) << 16).view(np.float32)


def narrow(array, storage):
    """Round float32 to the nearest number of a storage, half way to the even one."""
    if array is None:
        return None
    if storage == "float16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16)
    below = array.view(np.uint32) & 0xFFFF0000
    above = below + 0x10000
    # Past the largest number comes 2^128, which is infinity's place.
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = (e.view(np.float32).astype("f8") for e in (below, above))
        high = np.where(np.isinf(high), np.copysign(2.0**128, high), high)
        exact = array.astype("f8")
        up, down = np.abs(high - exact), np.abs(exact - low)
        is_up = (up < down) | ((up == down) & ((below >> 16) % 2 == 1))
    bits = np.where(is_up, above, below)
    bits = np.where(np.isfinite(array), bits, array.view(np.uint32) & 0xFFFF0000)
    bits = np.where(np.isnan(array), 0x7FC00000, bits)
    return (bits >> 16).astype(np.uint16)


def stored(layer, storage):
    """Return the layer with every array in this storage."""
    return changed(layer, lambda array: narrow(array, storage))


def widened(layer):
    return changed(layer, widen)


def changed(layer, change):
    weights = [{name: change(array) for name, array in w.items()} for w in layer.weights]
    return layer.replace(
        x=change(layer.x), **{n: change(getattr(layer, n)) for n in STATES}, weights=weights
    )
