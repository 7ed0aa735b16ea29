"""Memory that shows what touches it."""

import ctypes

import numpy as np

# Quiet NaNs with a payload that arithmetic does not make by itself.
_PATTERNS = {1: 0xA5, 2: 0x7FE5, 4: 0x7FE5A5A5, 8: 0x7FFDA5A5A5A5A5A5}
# Wider than the widest run of vectors that a kernel handles at once.
_GUARD = 1024

# Present where AddressSanitizer is loaded before Python: then the zones may not even be read.
_process = ctypes.CDLL(None)
SANITIZED = hasattr(_process, "__asan_poison_memory_region")


class Poison:
    """Arrays between guard zones, and outputs that are NaN until somebody writes them.

    Leaving the context checks that no guard zone was written, that every input still holds what it
    held and that every element of every output was written. What is read past an array's end is
    NaN and shows in the result, or ends the process where AddressSanitizer runs.
    """

    def __enter__(self):
        self._blocks = []
        return self

    def __exit__(self, kind, *_):
        for words, first, count, _, _ in self._blocks:
            _guard("__asan_unpoison_memory_region", words, first, count)
        if kind is None:
            for words, first, count, before, name in self._blocks:
                pattern = _PATTERNS[words.itemsize]
                payload = words[first : first + count]
                assert (words[:first] == pattern).all(), f"written in front of {name}"
                assert (words[first + count :] == pattern).all(), f"written past {name}"
                if before is None:
                    unwritten = np.flatnonzero(payload == pattern)
                    assert not unwritten.size, f"{name}: never written at {unwritten[:8]}"
                elif before is not payload:
                    assert (payload == before).all(), f"written into {name}"

    def _block(self, shape, dtype):
        dtype = np.dtype(dtype)
        count, size = int(np.prod(shape, dtype=np.int64)), dtype.itemsize
        zone = _GUARD // size
        words = np.full(count + 2 * zone + 1, _PATTERNS[size], f"u{size}")
        # Every other array begins one element off, since callers' arrays are not aligned to more.
        first = zone + len(self._blocks) % 2
        array = words[first : first + count].view(dtype).reshape(shape)
        return words, first, count, array

    def empty(self, shape, dtype, name="output"):
        """Return an array that must be written in full."""
        words, first, count, array = self._block(shape, dtype)
        self._keep(words, first, count, None, name)
        return array

    def room(self, shape, dtype, name="room"):
        """Return an array that may be written in part."""
        words, first, count, array = self._block(shape, dtype)
        self._keep(words, first, count, words[first : first + count], name)
        return array

    def copy(self, array, name="input"):
        """Return a copy that may only be read; None stays None."""
        if array is None:
            return None
        words, first, count, copy = self._block(array.shape, array.dtype)
        copy[...] = array
        self._keep(words, first, count, words[first : first + count].copy(), name)
        return copy

    def _keep(self, words, first, count, before, name):
        self._blocks.append((words, first, count, before, name))
        _guard("__asan_poison_memory_region", words, first, count)


def _guard(function, words, first, count):
    if not SANITIZED:
        return
    start, size = words.ctypes.data, words.itemsize
    for a, b in ((0, first), (first + count, len(words))):
        getattr(_process, function)(
            ctypes.c_void_p(start + a * size), ctypes.c_size_t((b - a) * size)
        )
