"""The count of a time loop's instructions (benchmarks/instructions.py); no disassembler runs."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import instructions

from ostinato.cuda import compiler

# A loop with a branch over a part of it, an end that lies behind the kernel's, and, before it, a
# loop without a product.
LISTING = """
.text.kernel:
.L_x_0:
        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0010*/              @!P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDS.64 R2, [R3] ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/              @!P2 LDG.E.U8.CONSTANT R4, desc[UR4][R6.64] ;
.L_x_2:
        /*0050*/                   HMMA.16816.F32.BF16 R8, R12, R2, RZ ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/               @P3 BRA `(.L_x_3) ;
.L_x_4:
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   UISETP.NE.AND UP0, UPT, UR4, URZ, UPT ;
        /*00a0*/                   BRA `(.L_x_1) ;
"""


def test_a_loop_is_what_can_be_come_back_to():
    loop = instructions.loop_of(instructions.blocks_of(LISTING))
    names = ["LDS", "BRA", "LDG", "HMMA", "BAR", "BRA", "UISETP", "BRA"]
    assert [instructions.name_of(line) for line in loop] == names
    found = {kind: count for kind, count in instructions.classes_of(loop).items() if count}
    assert found == {
        "compares": 1,
        "branches": 3,
        "global": 1,
        "shared": 1,
        "matrix": 1,
        "barriers": 1,
    }


def test_every_kernel_has_a_plan_of_its_exchange():
    for *layer, exchange in instructions.KERNELS:
        for is_backward in (False, True):
            config = instructions.config_of(*layer, exchange, is_backward)
            assert (config.exchange, config.is_backward) == (exchange, is_backward)


def test_a_padded_call_has_no_rows_of_its_own():
    text = (compiler.text_folder() / "cuda" / "sequence.cu").read_text("utf-8")
    assert instructions.as_padded(text).count("nullptr, nullptr, nullptr, nullptr") == 2
    with pytest.raises(ValueError, match="its two entries"):
        instructions.as_padded("")


def test_a_missing_disassembler_is_said(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["instructions.py"])
    assert instructions.main() == 1
    assert "nvdisasm: expected" in capsys.readouterr().err
