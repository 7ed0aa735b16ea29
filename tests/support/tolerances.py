"""How near numbers must be to what is expected of them; no torch."""

import numpy as np

EPS = {
    "bfloat16": 2.0**-7,
    "float16": 2.0**-10,
    "float32": 2.0**-23,
    "float64": 2.0**-52,
    "complex64": 2.0**-23,
    "complex128": 2.0**-52,
}


def tolerance(dtype, steps=1):
    """Return rtol and atol for numbers of this dtype, NumPy's or torch's, after so many steps.

    A step of a cell rounds a few times; what it rounds is carried through the later ones and mostly
    forgotten. Measured over cells, sizes and up to 300 steps, the worst is 0.4 of this bound.
    """
    bound = (16 + steps / 2) * EPS[str(dtype).removeprefix("torch.")]
    return {"rtol": bound, "atol": bound}


def assert_close(actual, expected, steps=1, name=""):
    """Compare an array with its float64 or complex128 counterpart, NaN being equal to NaN.

    A sum rounds in proportion to its terms, which may cancel: the largest number of the array
    stands for them.
    """
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    bound = tolerance(actual.dtype, steps)
    finite = np.abs(expected[np.isfinite(expected)])
    bound["atol"] *= max(1.0, finite.max(initial=0.0))
    np.testing.assert_allclose(actual.astype(expected.dtype), expected, err_msg=name, **bound)


def assert_same_bits(actual, expected, name=""):
    """Compare bit by bit; tells -0 from 0 and takes a NaN for itself."""
    assert actual.dtype == expected.dtype, name
    assert actual.shape == expected.shape, name
    bits = np.dtype(f"u{actual.dtype.itemsize}")
    actual, expected = np.ascontiguousarray(actual), np.ascontiguousarray(expected)
    np.testing.assert_array_equal(actual.view(bits), expected.view(bits), err_msg=name)
