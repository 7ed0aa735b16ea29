"""The records of cells beside what the engine states of itself."""

import pytest

from ostinato import _core, arrays, reference
from ostinato.call import Call
from ostinato.cells import CELLS


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_a_record_says_what_the_kernels_say(cell):
    assert _core.traits(cell.number) == (
        cell.gates,
        cell.grads,
        cell.saved,
        cell.recomputed,
        cell.has_c,
        cell.projects,
        cell.reads_output,
        cell.reads_previous,
    )


def test_the_engine_has_these_cells_and_the_reference_their_steps():
    numbers = [cell.number for cell in CELLS.values()]
    assert sorted(numbers) == list(range(len(CELLS)))
    with pytest.raises(ValueError, match="cell must be"):
        _core.traits(len(CELLS))
    assert list(CELLS) == list(reference.STEPS)
    assert all(name == cell.name for name, cell in CELLS.items())


@pytest.mark.parametrize("cell", CELLS.values(), ids=list(CELLS))
def test_reserve_is_what_the_record_promises(cell):
    sizes = (7, 20, 4, 3, 17, 0, 2)
    for dtype, bytes_each in ((0, 4), (1, 8), (2, 4), (3, 4)):
        numbers = 2 * 20 * 32 * bytes_each
        assert _core.reserve_bytes(cell.number, dtype, sizes) == cell.saved * numbers
        assert _core.reserve_bytes(cell.number, dtype, sizes, True) == cell.recomputed * numbers


@pytest.mark.parametrize("backward", [False, True])
def test_the_table_of_arrays_counts_what_a_call_takes(backward):
    rows = _core.arrays(backward)
    names, *_ = zip(*rows, strict=True)
    assert names[:8] == (
        *("input", "h_0", "c_0", "lengths", "resets", "reset_h", "reset_c"),
        "weights",
    )
    assert len(set(names)) == len(names)
    for directions in (1, 2):
        count = sum(6 * directions if name.endswith("weights") else 1 for name in names)
        run = _core.backward if backward else _core.forward
        sizes = (0, 0, 0, 1, 1, 0, directions)
        # No models: nothing runs.
        run(0, 0, sizes, 0, 0, [0] * count, [0] * count, 1)
        with pytest.raises(ValueError, match=f"expected {count} addresses"):
            run(0, 0, sizes, 0, 1, [0] * (count + 1), [], 1)


@pytest.mark.parametrize("backward", [False, True])
def test_the_tables_of_arrays_in_python_and_in_cpp_are_one(backward):
    states = len(arrays.STATES)
    if backward:
        of_call = arrays.arguments(states, 1)
        grads = [arrays.gradient_of(array) for array in of_call if array.is_differentiable]
        table = [*arrays.backward_arguments(states, 1), *grads]
    else:
        table = [*arrays.arguments(states, 1), *arrays.RESULTS]
    table = {array.name: (array.rows, array.width) for array in table}
    # The sizes of a call, not an array of it.
    del table[arrays.BATCH_SIZES.name]
    assert table == {name: (rows, width) for name, rows, width, *_ in _core.arrays(backward)}


def test_the_table_of_arrays_says_what_is_written():
    forward, backward = map(_core.arrays, (False, True))
    assert [name for name, *_, is_written in forward if is_written] == [
        *("output", "h_n", "c_n", "cells", "reserve")
    ]
    for name, *_, is_written in backward:
        assert is_written == (
            name.startswith("grad_")
            and name not in ("grad_output", "grad_h_n", "grad_c_n", "grad_cells")
        )
    # A gradient is shaped as what it is the gradient of.
    shapes = {name: tuple(shape) for name, *shape, _ in forward}
    for name, *shape, _ in backward:
        assert shapes[name.removeprefix("grad_")] == tuple(shape)


def test_a_call_lists_the_operators_arguments_in_the_order_of_the_table():
    names = [parameter.name for parameter in arrays.PARAMETERS]
    # An LSTM has every array that a call can have.
    given = [["weights"] if n == "weights" else "lstm" if n == "cell" else n for n in names]
    call = Call.of(*given)
    assert call.parameters() == given
    assert [array.name for array in call.table()] == call.arrays()
    # A cell with fewer states leaves out the others, and lists them as None.
    few = [None if n in ("c_0", "reset_c") else "gru" if n == "lstm" else n for n in given]
    assert Call.of(*few).parameters() == few
    assert Call.of(*few).initial == ("h_0",)
