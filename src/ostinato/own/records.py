"""Records of own cells: of a graph, whose text is the cell's name, or of a step that is not traced.

Legend: H hidden, P rows of numbers per unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from ostinato import _core
from ostinato.cells import Cell, known, makers
from ostinato.own.encoding import encode
from ostinato.own.graph import Graph
from ostinato.own.lowering import lower

Step = Callable[..., tuple[Any, ...]]


def of_text(text: str) -> Cell | None:
    """Return the record of the cell whose graph has this text, or None if it is no graph's.

    Each text is parsed, lowered and told to the engine once.

    Example:
        >>> cell = of_text("own:Elman(x=1,h=1,s=1,p=0,d=0){x0;h0;add 0 1;tanh 2}->3")
        >>> cell.layer, cell.gates, cell.saved
        ('Elman', 1, 0)
    """
    if text in known:
        return known[text]
    try:
        graph = Graph.parse(text)
    except ValueError:
        return None
    lowered = lower(graph)
    sizes = graph.x_gates, graph.h_gates, graph.states - 1, graph.parameters, graph.drives
    blocks = lowered.forward, lowered.forward_keep, lowered.backward
    reads = lowered.reads_output, True
    programs = map(encode, blocks)
    number = _core.define_cell(sizes, list(lowered.joint), lowered.saved, *reads, *programs)
    gates = graph.h_gates + graph.x_gates - len(lowered.joint)
    known[text] = found = _record(
        text,
        graph,
        number=number,
        grads=gates + graph.parameters + graph.drives,
        saved=lowered.saved,
        reads_output=lowered.reads_output,
        step=graph.run,
    )
    return found


def _record(name: str, graph: Graph, **fields: Any) -> Cell:
    return Cell(
        name=name,
        kernel="",
        layer=graph.name,
        gates=graph.h_gates,
        states=("h", "c") if graph.states > 1 else ("h",),
        projects=False,
        reads_previous=True,
        of_input=graph.x_gates,
        others=graph.states - 1,
        parameters=graph.parameters,
        drives=graph.drives,
        **fields,
    )


_numbers = itertools.count()


def untraced(sizes: Graph, step: Step) -> str:
    """Add a cell that the reference alone runs, and return the name that it has in this process.

    Whoever adds it takes it out of `ostinato.cells.known` again.

    Args:
        sizes: a graph without nodes.
        step: takes and returns what `Graph.run` does.
    """
    name = f"untraced:{sizes.name}:{next(_numbers)}"
    options = {"number": -1, "grads": 0, "saved": 0, "reads_output": True, "step": step}
    known[name] = _record(name, sizes, **options)
    return name


makers["own"] = of_text
