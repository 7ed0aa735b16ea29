"""The comparison of two machines' bits (support/architectures.py), on one machine.

What it finds on aarch64 is shown by `make test-arm`.
"""

import itertools

import numpy as np
import pytest

from ostinato import _core
from support import architectures
from support.cells import KINDS

# One of each cell, storage and layout, and activations; together they meet most sizes.
SOME = [name for i, name in enumerate(architectures.cases()) if i % 13 == 0]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("results")
    architectures.write(directory, SOME)
    return directory


def test_instruction_sets_find_the_same_bits(written, isa):
    # The portable set's fma is the C library's on x86-64: a hundred times slower.
    names = SOME[::3] if isa == "portable" else SOME
    compared, wrong = architectures.check(written, names, [1, 2])
    assert not wrong
    assert compared > 100_000


def test_every_cell_storage_and_layout_is_among_the_cases():
    words = [name.split("-") for name in architectures.cases()]
    for options in (architectures.KINDS, architectures.STORAGES, architectures.LAYOUTS):
        for option in options:
            assert sum(option in w for w in words) > 100, option
    assert set(KINDS) == set(architectures.KINDS)
    # The parts are all cases, each once.
    parts = [architectures.part_of(architectures.cases(), f"{i}/3") for i in (1, 2, 3)]
    assert sorted(itertools.chain(*parts)) == sorted(architectures.cases())


def change(directory, tmp_path, name, array, function):
    """Write a changed copy of one case's file."""
    with np.load(directory / f"{name}.npz") as file:
        arrays = dict(file.items())
    arrays[array] = function(arrays[array])
    np.savez(tmp_path / f"{name}.npz", **arrays)


def last_bit(array):
    words = array.copy().view(f"u{array.itemsize}")
    words.flat[-1] ^= 1
    return words.view(array.dtype)


@pytest.mark.parametrize("storage", architectures.STORAGES)
@pytest.mark.parametrize("array", ["out y", "out h_n", "out dx", "out dhh", "out dh_0"])
def test_one_bit_that_differs_is_found(tmp_path, array, storage):
    name = f"gru-{storage}-lengths-7x13x9x48-1"
    architectures.write(tmp_path, [name])
    assert architectures.check(tmp_path, [name], [1])[1] == []
    change(tmp_path, tmp_path, name, array, last_bit)
    _, wrong = architectures.check(tmp_path, [name], [1])
    assert f"{name}, training, 1 threads: 1 of" in wrong[0]
    assert array.removeprefix("out ") in wrong[0]


def test_the_sign_of_a_zero_counts_and_that_of_a_nan_does_not():
    for dtype, nan in (("f4", 0x7FC00000), ("f8", 0x7FF8 << 48), ("u2", 0x7FC0), ("f2", 0x7E00)):
        words = np.array([0, nan, 5], f"u{np.dtype(dtype).itemsize}")
        first, zero, other = (words.copy() for _ in range(3))
        zero[0] ^= words.dtype.type(1 << (8 * words.itemsize - 1))
        other[1] ^= words.dtype.type(1 << (8 * words.itemsize - 1))
        first, zero, other = (array.view(dtype) for array in (first, zero, other))
        assert architectures.different(first, first) == 0
        assert architectures.different(zero, first) == 1
        assert architectures.different(other, first) == 0
        assert architectures.different(first[::-1].copy(), first) == 2
        assert architectures.different(first[:2], first) == 3


def test_the_script_fails_where_bits_differ_or_results_are_missing(tmp_path, capsys):
    directory = str(tmp_path)
    part = ["--part", f"2/{len(architectures.cases())}", "--threads", "1"]
    assert architectures.main(["write", directory, *part]) == 0
    assert architectures.main(["check", directory, *part]) == 0
    assert "0 runs differ" in capsys.readouterr().out
    (name,) = architectures.part_of(architectures.cases(), part[1])
    change(tmp_path, tmp_path, name, "out y", last_bit)
    assert architectures.main(["check", directory, *part]) == 1
    assert f"{name}, training, 1 threads: 1 of" in capsys.readouterr().out
    with np.load(tmp_path / f"{name}.npz") as file:
        arrays = {n: a for n, a in file.items() if n != "out dx"}
    np.savez(tmp_path / f"{name}.npz", **arrays)
    assert architectures.main(["check", directory, *part]) == 1
    assert "other results" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError):
        architectures.main(["check", directory, "--part", "1/1"])
    assert _core.isa() in (tmp_path / architectures.ORIGIN).read_text(encoding="utf-8")
