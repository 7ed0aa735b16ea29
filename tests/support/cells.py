"""Which cells the tests go through, from their records; no torch.

What goes through CELLS, KINDS, LAYERS, CELL_MODULES or MODULES tests a new cell by itself. What
compares with torch.nn goes through SIX and the lists whose names begin with TORCH.
"""

from ostinato.cells import CELLS as RECORDS

# By the operators' names: "rnn_tanh", ...
CELLS = tuple(RECORDS)
# And with the projections that there are: "lstm_projected".
KINDS = (*CELLS, *(f"{name}_projected" for name, cell in RECORDS.items() if cell.projects))
# Our modules' names: layers, cells that take one step, and both.
LAYERS = tuple(dict.fromkeys(cell.layer for cell in RECORDS.values()))
CELL_MODULES = tuple(f"{layer}Cell" for layer in LAYERS)
MODULES = LAYERS + CELL_MODULES

# The only list by hand: torch.nn has these and no others, whatever we add.
TORCH_LAYERS = ("RNN", "GRU", "LSTM")
TORCH_CELLS = tuple(name for name, cell in RECORDS.items() if cell.layer in TORCH_LAYERS)
TORCH_KINDS = tuple(kind for kind in KINDS if kind.removesuffix("_projected") in TORCH_CELLS)
TORCH_CELL_MODULES = tuple(f"{layer}Cell" for layer in TORCH_LAYERS)
SIX = TORCH_LAYERS + TORCH_CELL_MODULES


def cell_of(kind):
    """Return the cell's name without what says that it is projected."""
    return kind.removesuffix("_projected")


def record_of(name):
    """Return the record of a cell or kind, or of a module: the first that has this layer."""
    if name in KINDS:
        return RECORDS[cell_of(name)]
    layer = name.removesuffix("Cell")
    return next(cell for cell in RECORDS.values() if cell.layer == layer)


# The first cell of each layer, where its others differ in nothing that is asked.
FIRST_CELLS = tuple(record_of(layer).name for layer in LAYERS)


def is_projected(kind):
    return kind != cell_of(kind)


def has_c(name):
    """Say whether a cell, kind or module has a second state."""
    return record_of(name).has_c


def options_of(kind):
    """Return what a module is told to be of this kind, but for the projection's size."""
    cell, layer = cell_of(kind), record_of(kind).layer
    return {"nonlinearity": cell.partition("_")[2]} if cell != layer.lower() else {}
