"""Blocks of own cells, interpreted by torch's operators on one step."""

import torch

from ostinato.own.arithmetic import LOADS, STORES

# Every operation of a block, and how many values it takes: what an engine has to have. A graph has
# others beside these, which are taken apart (silu, gelu, clamp, powers). Masks are what comparisons
# make; `select` and the logical operations take them.
OPERATIONS = {
    **dict.fromkeys(LOADS, 0),
    **dict.fromkeys(STORES, 1),
    **dict.fromkeys(("add", "sub", "mul", "div", "minimum", "maximum"), 2),
    # a * b + c; c - a * b
    **dict.fromkeys(("fma", "fnma"), 3),
    **dict.fromkeys(("neg", "abs", "sigmoid", "tanh", "relu", "softplus"), 1),
    **dict.fromkeys(("exp", "log", "sqrt", "rsqrt", "erf"), 1),
    # sigmoid(a) * tanh(b)
    "sigmoid_times_tanh": 2,
    # g * (y * (1 - y)); g * (1 - y * y); 0 where y <= 0, otherwise g
    **dict.fromkeys(("sigmoid_slope", "tanh_slope", "relu_slope"), 2),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or"), 2),
    "logical_not": 1,
    # b where mask a is true, otherwise c
    "select": 3,
}

_CALLS = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "fma": lambda a, b, c: a * b + c,
    "fnma": lambda a, b, c: c - a * b,
    "sigmoid_times_tanh": lambda a, b: torch.sigmoid(a) * torch.tanh(b),
    "sigmoid_slope": lambda g, y: g * (y * (1 - y)),
    "tanh_slope": lambda g, y: g * (1 - y * y),
    "relu_slope": lambda g, y: torch.where(y <= 0, torch.zeros_like(g), g),
    "softplus": torch.nn.functional.softplus,
    "select": torch.where,
}


def call(op, *values):
    """Compute one operation."""
    assert len(values) == OPERATIONS[op]
    return _CALLS[op](*values) if op in _CALLS else getattr(torch, op)(*values)


def interpret(block, loads):
    """Run a block.

    Args:
        block: instructions.
        loads: by the name of a load, arrays by index; without an index, one array.

    Returns:
        By the name of a store, arrays by index.
    """
    like = loads["state"][0]
    values, stores = [], {}
    for instruction in block:
        op, args, index, number = instruction
        given = [values[place] for place in args]
        if op in ("next", "save", "slot", "to_state", "to_drive"):
            (value,) = given
            assert index not in stores.setdefault(op, {})
            stores[op][index] = value.expand_as(like)
        elif op == "number":
            values.append(torch.full_like(like, number))
        elif index is not None:
            values.append(loads[op][index])
        elif op == "output":
            values.append(loads[op])
        else:
            values.append(call(op, *given))
    return {op: [found[k] for k in range(len(found))] for op, found in stores.items()}


def run_program(program, operations, loads):
    """Run an encoded block, whose numbers of operations are places in `operations`."""
    like = loads["state"][0]
    registers = [torch.full_like(like, number) for number in program.constants]
    registers += [None] * (program.registers - len(registers))
    stores = {}
    for start in range(0, len(program.code), 5):
        number, first, *rest = program.code[start : start + 5]
        op = operations[number]
        if op in ("next", "save", "slot", "to_state", "to_drive"):
            stores.setdefault(op, {})[first] = registers[rest[0]].expand_as(like)
            continue
        assert len(program.constants) <= first < program.registers
        if op == "output":
            registers[first] = loads[op]
        elif op in loads:
            registers[first] = loads[op][rest[0]]
        else:
            registers[first] = call(op, *(registers[r] for r in rest[: OPERATIONS[op]]))
    return {op: [found[k] for k in range(len(found))] for op, found in stores.items()}
