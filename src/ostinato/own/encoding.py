"""From a block to the engine's program: numbers of operations, registers and constants."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from ostinato.own.arithmetic import STORES, Instruction
from ostinato.own.block import Block
from ostinato.own.errors import StepError

LARGEST_REGISTERS = 250
# Integers of one instruction: operation, register of the result, and three arguments.
WIDTH = 5


class Program(NamedTuple):
    """What the engine is told of a block.

    An instruction is five integers: (operation, result, a, b, c); of a load (operation, result,
    index, 0, 0), of a store (operation, index, value, 0, 0). A result may take the register of one
    of its arguments. Registers 0 to len(constants) - 1 hold the constants and are not written to.
    """

    code: list[int]
    constants: list[float]
    registers: int


def encode(block: Block, operations: Sequence[str] | None = None) -> Program:
    """Allocate registers, and write numbers for names.

    Args:
        block: of `ostinato.own.lowering.Lowered`.
        operations: the engine's operations, each at its number; None for those of `ostinato._core`.

    Returns:
        The program.

    Raises:
        StepError: it takes more registers than an engine has.

    Example:
        >>> two = (Instruction("state", (), 0), Instruction("number", number=2.0))
        >>> block = (*two, Instruction("mul", (0, 1)), Instruction("next", (2,), 0))
        >>> encode(block, ["state", "mul", "next"])
        Program(code=[0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 2, 0, 1, 0, 0], constants=[2.0], registers=2)
    """
    if operations is None:
        from ostinato import _core

        operations = _core.operations()  # type: ignore[attr-defined,unused-ignore]
    numbers = {name: number for number, name in enumerate(operations)}
    constants, registers = _constants(block)
    pool = _Registers(len(constants))
    code: list[int] = []
    dying = _dying(block)
    for place, instruction in enumerate(block):
        if instruction.op == "number":
            continue
        arguments = [registers[argument] for argument in instruction.args]
        for argument in dying[place]:
            if block[argument].op != "number":
                pool.free(registers[argument])
        if instruction.op in STORES:
            assert instruction.index is not None
            words = [instruction.index, *arguments]
        else:
            registers[place] = pool.take()
            index = [] if instruction.index is None else [instruction.index]
            words = [registers[place], *index, *arguments]
        code += [numbers[instruction.op], *words, *[0] * (WIDTH - 1 - len(words))]
    if pool.count > LARGEST_REGISTERS:
        raise StepError(
            "size",
            f"the step takes {pool.count} values at once, expected at most {LARGEST_REGISTERS}",
            "fewer operations; engine = False runs any step",
        )
    return Program(code, constants, pool.count)


def _constants(block: Block) -> tuple[list[float], dict[int, int]]:
    """Return the numbers of a block, each once, and the registers of the places that hold them."""
    known: dict[str, int] = {}
    constants: list[float] = []
    registers: dict[int, int] = {}
    for place, instruction in enumerate(block):
        if instruction.number is None:
            continue
        # 0 and -0 are equal, and NaN is not.
        register = known.setdefault(instruction.number.hex(), len(constants))
        if register == len(constants):
            constants.append(instruction.number)
        registers[place] = register
    return constants, registers


def _dying(block: Sequence[Instruction]) -> dict[int, list[int]]:
    """Return by place the arguments that are used there last."""
    last: dict[int, int] = {}
    for place, instruction in enumerate(block):
        last[place] = place
        last.update(dict.fromkeys(instruction.args, place))
    dying = defaultdict(list)
    for value, place in last.items():
        if value != place:
            dying[place].append(value)
    return dying


class _Registers:
    """Registers behind those of the constants."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free: list[int] = []

    def take(self) -> int:
        if self._free:
            return self._free.pop()
        self.count += 1
        return self.count - 1

    def free(self, register: int) -> None:
        self._free.append(register)
