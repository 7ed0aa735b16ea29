"""What is lowered from which step: sums, what is kept, joined operations, and programs."""

import pytest
import torch

from ostinato.own import kept
from ostinato.own.arithmetic import LOADS, STORES, Instruction
from ostinato.own.encoding import encode
from ostinato.own.errors import StepError
from ostinato.own.graph import Graph
from ostinato.own.lowering import lower
from support.blocks import OPERATIONS
from support.steps import (
    CELLS,
    FUNCTIONS,
    Elman,
    Exponential,
    Gru,
    Independent,
    Lstm,
    MinimalGatedUnit,
    Mixed,
    Peephole,
    Rectified,
    Step,
    Zoneout,
    cell_of,
)


def lowered(step, **sizes):
    return lower(type("Lowered", (Step,), {"step": step, **sizes})().graph())


def ops(block):
    return [instruction.op for instruction in block]


def arithmetic(block):
    """Return the operations of a block that are neither loads nor stores."""
    return [op for op in ops(block) if op not in (*LOADS, *STORES, "number")]


@pytest.mark.parametrize(
    ("kind", "joint", "saved", "reads_output"),
    [
        (Elman, (0,), 0, True),
        (Rectified, (0,), 0, True),
        (Gru, (0, 1), 4, False),
        (Lstm, (0, 1, 2, 3), 5, False),
        (MinimalGatedUnit, (0,), 3, False),
        (Peephole, (0, 1, 2, 3), 5, False),
        (Exponential, (0, 1, 2, 3), 7, False),
        (Independent, (), 0, True),
        # tanh(a), of which the rest follows from drives.
        (Zoneout, (0,), 1, False),
        (Mixed, (), 4, False),
    ],
)
def test_cells_keep_what_they_must(kind, joint, saved, reads_output):
    made = lower(kind().graph())
    assert (made.joint, made.saved, made.reads_output) == (joint, saved, reads_output)


def test_slots_are_in_the_order_that_the_engine_is_told():
    assert lower(Gru().graph()).slots == (("h", 0), ("h", 1), ("h", 2), ("x", 2))
    assert lower(Independent().graph()).slots == (("x", 0), ("p", 0))
    assert lower(Mixed().graph()).slots == (("h", 0), ("h", 1), ("x", 0), ("x", 1), ("x", 2))
    made = lower(Peephole().graph())
    assert made.slots == (*(("h", gate) for gate in range(4)), ("p", 0), ("p", 1), ("p", 2))


def test_joined_operations_are_those_of_the_built_in_cells():
    assert arithmetic(lower(Gru().graph()).forward) == [
        *("sigmoid", "sigmoid", "fma", "tanh", "sub", "fma")
    ]
    assert arithmetic(lower(Lstm().graph()).forward) == [
        *("sigmoid", "sigmoid_times_tanh", "fma", "sigmoid_times_tanh")
    ]
    assert arithmetic(lower(Elman().graph()).backward) == ["tanh_slope"]


def test_a_gate_is_joint_wherever_its_products_meet():
    assert lowered(lambda self, x, h, s: s * h[0] + x[0]).joint == ()
    assert lowered(lambda self, x, h, s: (x[0] + s) + (0.5 + h[0])).joint == (0,)
    assert lowered(lambda self, x, h, s: h[0] + s + x[0]).joint == (0,)
    assert lowered(lambda self, x, h, s: x[0] + h[0] + x[0]).joint == ()
    assert lowered(lambda self, x, h, s: torch.tanh(x[0] + h[0]) * h[0]).joint == ()
    assert lowered(lambda self, x, h, s: s).joint == (0,)
    crossed = lowered(lambda self, x, h, s: (x[0] + h[1]) * (x[1] + h[0]), x_gates=2, h_gates=2)
    assert crossed.joint == ()


def test_two_gates_of_one_sum_are_both_in_it():
    def step(self, x, h, state):
        return torch.tanh(x[0] + x[1] + state + h[0] + h[1])

    made = lowered(step, x_gates=2, h_gates=2)
    assert made.joint == (0, 1)
    assert ops(made.forward).count("gate") == 2
    assert ops(made.forward).count("add") == 2


def test_a_mask_is_kept_as_a_number():
    def step(self, x, h, state):
        return torch.where(x[0] + h[0] > 0, state * state, 3 * state)

    made = lowered(step)
    assert made.saved == 1
    assert "select" in ops(made.forward_keep)
    assert ops(made.backward)[:3].count("saved") == 1


def test_between_is_exact_at_its_ends_unless_it_is_bounded():
    def step(self, x, h, state, drives):
        (keep,) = drives
        return (1 - keep) * (x[0] + h[0]) + keep * state

    assert arithmetic(lowered(step, drives=1).forward) == ["fnma", "fma"]


def test_backward_reads_no_gate_and_forward_no_gradient():
    for kind in CELLS:
        made = lower(kind().graph())
        backward, forward = set(ops(made.backward)), set(ops(made.forward_keep))
        assert not backward & {"gate", "x", "h", "next", "save"}
        assert not forward & {"grad", "saved", "output", "slot", "to_state", "to_drive"}
        assert ops(made.forward).count("save") == 0
        assert ("output" in backward) == made.reads_output


def test_stores_are_at_the_end_and_each_is_there_once():
    for kind in CELLS:
        made = lower(kind().graph())
        graph = made.graph
        wanted = {
            "slot": len(made.slots),
            "to_state": graph.states,
            "to_drive": graph.drives,
            "next": graph.states,
            "save": made.saved,
        }
        for block, stores in (
            (made.forward_keep, ("next", "save")),
            (made.backward, ("slot", "to_state", "to_drive")),
        ):
            expected = [(op, k) for op in stores for k in range(wanted[op])]
            found = [(i.op, i.index) for i in block[len(block) - len(expected) :]]
            assert found == expected


def test_constants_are_folded():
    def step(self, x, h, state):
        zero = torch.zeros_like(state)
        return (x[0] + zero) * (2 * torch.ones_like(state) - 1) + (h[0] - 0) / 4 / 1 - -state

    assert arithmetic(lowered(step).forward) == ["fma", "add"] or arithmetic(
        lowered(step).forward
    ) == ["fma", "neg", "sub"]


def test_only_documented_operations_are_emitted():
    cells = [kind() for kind in CELLS] + [cell_of(*each) for each in FUNCTIONS.values()]
    found = set()
    for cell in cells:
        made = lower(cell.graph())
        for block in (made.forward, made.forward_keep, made.backward):
            found |= set(ops(block)) - {"number"}
            for instruction in block:
                assert len(instruction.args) == OPERATIONS.get(instruction.op, 0)
    assert found == set(OPERATIONS)


def test_one_text_is_lowered_once():
    text = Gru().graph().text()
    assert lower(Graph.parse(text)) is lower(Gru().graph())
    # Equal for Python, and two graphs.
    head = "own:A(x=1,h=0,s=1,p=0,d=0){x0;c"
    plus, minus = (
        lower(Graph.parse(f"{head}{zero};div 1 0}}->2")) for zero in ("0x0.0p+0", "-0x0.0p+0")
    )
    assert encode(plus.forward, list(OPERATIONS)).constants[0].hex() == "0x0.0p+0"
    assert encode(minus.forward, list(OPERATIONS)).constants[0].hex() == "-0x0.0p+0"


# ---- what is kept ----


def test_the_smallest_set_is_kept_and_of_those_the_nearest():
    items = [
        Instruction("x", (), 0),
        Instruction("exp", (0,)),
        Instruction("tanh", (1,)),
        Instruction("neg", (1,)),
    ]
    assert kept.choose(items, [0], [2], {}) == [2]
    assert kept.choose(items, [0], [2, 3], {}) == [1]
    assert kept.choose(items, [0], [2, 3], {2: 0, 3: 0}) == [2, 3]
    assert kept.choose(items, [], [2, 3], {}) == []
    assert kept.choose(items, [0], [], {}) == []


# ---- programs ----


def test_constants_are_never_written_and_registers_are_few():
    for kind in CELLS:
        made = lower(kind().graph())
        for block in (made.forward, made.forward_keep, made.backward):
            program = encode(block, list(OPERATIONS))
            assert program.registers <= 24
            assert len(program.code) == 5 * sum(op != "number" for op in ops(block))
            assert len({number.hex() for number in program.constants}) == len(program.constants)


def test_too_large_a_step_is_refused():
    def step(self, x, h, state):
        values = [torch.tanh(x[0] * k + h[0]) for k in range(300)]
        pairs = zip(values, values[::-1], strict=True)
        return sum(values) * torch.exp(sum(a * b for a, b in pairs))

    made = lowered(step)
    with pytest.raises(StepError, match="at most 250"):
        encode(made.forward, list(OPERATIONS))


def test_a_long_step_is_no_deep_one():
    def step(self, x, h, state):
        for _ in range(3000):
            state = torch.tanh(state + x[0])
        return state

    made = lowered(step)
    assert encode(made.forward, list(OPERATIONS)).registers < 5
