"""The struct of an own cell, as the GPU engine compiles it (csrc/cells.h, the wider contract).

Each instruction of the lowered step becomes one line: `const V v7 = sigmoid(v3);`. Elementary
functions over V are csrc/cuda/device.h's.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

from ostinato.own.arithmetic import Instruction
from ostinato.own.block import Block
from ostinato.own.graph import Graph
from ostinato.own.lowering import Lowered, lower

# The type's name, for whoever instantiates a kernel with it.
STRUCT = "OwnCell"
# Values that are kept, which the bits of a constant tell apart.
MOST_SAVED = 64

# How an operation is written, where not as a call of its name.
_WRITTEN: dict[str, Callable[..., str]] = {
    "add": lambda a, b: f"{a} + {b}",
    "sub": lambda a, b: f"{a} - {b}",
    "mul": lambda a, b: f"{a} * {b}",
    "div": lambda a, b: f"{a} / {b}",
    "neg": lambda a: f"-{a}",
    # (1 - z) * a + z * b
    "between": lambda z, a, b: f"fma({z}, {b} - {a}, {a})",
    "clamp": lambda a, low, high: f"minimum(maximum({a}, {low}), {high})",
}
# Where a load finds its number, and a store leaves it.
_LOADS = {
    "gate": "a",
    "h": "a",
    "state": "states",
    "parameter": "parameters",
    "drive": "drives",
    "saved": "saved",
    "grad": "grads",
}
_STORES = {
    "next": "next",
    "save": "saved",
    "slot": "slots",
    "to_state": "to_states",
    "to_drive": "to_drives",
}
_FORWARD = (
    *("const V* a", "const V* x", "const V* states", "const V* parameters", "const V* drives"),
    *("V* next", "V* saved"),
)
_BACKWARD = (
    *("const V* grads", "const V* saved", "const V* states", "V h"),
    *("const V* parameters", "const V* drives", "V* slots", "V* to_states", "V* to_drives"),
)


@lru_cache(maxsize=256)
def head_of(cell: str) -> str:
    """Return what stands before the text of a kernel of an own cell, by the cell's name."""
    text = struct_of(lower(Graph.parse(cell)))
    front = '#include "sequence.cuh"\n\nnamespace ostinato {\nnamespace {\n\n'
    return f'{front}{text}\n}}  // namespace\n}}  // namespace ostinato\n#line 1 "sequence.cu"\n'


def struct_of(lowered: Lowered) -> str:
    """Write the struct of a lowered step.

    Args:
        lowered: the step and its derivative in single assignments
            (`ostinato.own.lowering.Lowered`).

    Returns:
        The text of `struct OwnCell`, in the form that csrc/cells.h states for `Wide`.

    Raises:
        ValueError: more values kept than MOST_SAVED.
    """
    graph = lowered.graph
    if lowered.saved > MOST_SAVED:
        raise ValueError(
            f"{graph.name}: expected at most {MOST_SAVED} values kept per unit, got {lowered.saved}"
        )
    apart = [gate for gate in range(graph.x_gates) if gate not in lowered.joint]
    numbers = {
        "kInputGates": graph.x_gates,
        "kGates": graph.h_gates,
        "kBehind": graph.states - 1,
        "kParameters": graph.parameters,
        "kDrives": graph.drives,
        "kSaved": lowered.saved,
        "kSlots": graph.h_gates + len(apart) + graph.parameters,
    }
    read = {name: _bits(_read(lowered.backward, name)) for name in ("state", "saved")}
    traits = ", ".join(f"{name} = {number}" for name, number in numbers.items())
    lines = [
        f"// {graph.name}",
        f"struct {STRUCT} {{",
        f"    static constexpr int {traits};",
        f"    static constexpr bool kUsesOutput = {str(lowered.reads_output).lower()}, "
        "kIsFinite = false;",
        _question("is_joint", "gate", _bits(lowered.joint)),
        _question("reads_state", "k", read["state"]),
        _question("reads_saved", "k", read["saved"]),
        "",
        *_function("forward", _FORWARD, lowered.forward_keep, apart),
        "",
        *_function("backward", _BACKWARD, lowered.backward, apart),
        "};",
    ]
    return "\n".join(lines) + "\n"


def _bits(places: Iterable[int]) -> int:
    return sum(1 << place for place in set(places))


def _read(block: Block, load: str) -> set[int]:
    """Return which of a kind a block loads."""
    return {each.index for each in block if each.op == load and each.index is not None}


def _question(name: str, what: str, bits: int) -> str:
    return f"    static constexpr bool {name}(int {what}) {{ return {bits:#x}ull >> {what} & 1; }}"


def _function(
    name: str, parameters: tuple[str, ...], block: Block, apart: list[int]
) -> Iterator[str]:
    """Write a block as a function; what it does not use of its parameters has no name."""
    body = [_line(place, each, apart) for place, each in enumerate(block)]
    text = "\n".join(body)
    named = [_named(parameter, text) for parameter in parameters]
    yield "    template <class V>"
    yield f"    OSTINATO_CELL static void {name}({', '.join(named)}) {{"
    yield from body
    yield "    }"


def _named(parameter: str, text: str) -> str:
    type, _, name = parameter.rpartition(" ")
    is_used = f" {name}[" in text or f" {name};" in text
    return parameter if is_used else type


def _line(place: int, each: Instruction, apart: list[int]) -> str:
    """Write one instruction; values are named by their places."""
    values = [f"v{argument}" for argument in each.args]
    if each.op in _STORES:
        (value,) = values
        return f"        {_STORES[each.op]}[{each.index}] = {value};"
    if each.number is not None:
        found = _number(each.number)
    elif each.op == "x" and each.index is not None:
        found = f"x[{apart.index(each.index)}]"
    elif each.op == "output":
        found = "h"
    elif each.op in _LOADS:
        found = f"{_LOADS[each.op]}[{each.index}]"
    elif each.op in _WRITTEN:
        found = _WRITTEN[each.op](*values)
    else:
        found = f"{each.op}({', '.join(values)})"
    return f"        const V v{place} = {found};"


def _number(number: float) -> str:
    """Write a number as a float of C++, by its bits where it is none that C++ can write."""
    try:
        (single,) = struct.unpack("f", struct.pack("f", number))
    except OverflowError:
        single = math.copysign(math.inf, number)
    if math.isfinite(single):
        return f"V({float(single).hex()}f)"
    (bits,) = struct.unpack("I", struct.pack("f", single))
    return f"V(float_of({bits:#x}u))"
