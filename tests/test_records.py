"""The records of cells beside what the engine states of itself."""

import pytest

from ostinato import _core, reference
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
    )


def test_the_engine_has_these_cells_and_the_reference_their_steps():
    numbers = [cell.number for cell in CELLS.values()]
    assert sorted(numbers) == list(range(len(CELLS)))
    with pytest.raises(ValueError, match="cell must be"):
        _core.traits(len(CELLS))
    assert list(CELLS) == list(reference.STEPS)
    assert all(name == cell.name for name, cell in CELLS.items())
