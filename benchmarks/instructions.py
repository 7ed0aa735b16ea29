"""What a step of a time loop costs in instructions: the GPU engine's kernels, disassembled.

No GPU takes part. A kernel is compiled as a user's machine would compile it, and of its machine
code those instructions are counted that a warp can come back to: the body of the time loop. Not
all of them run in each step, since packed rows, resets and plain batches share one loop. So each
kernel is counted once more as a padded call sees it: compiled with those rows' arrays known to be
absent, which leaves out what such a call branches over. How long an instruction takes, and what
it waits for, no count shows.

Needs NVRTC and NVIDIA's disassembler: `nvdisasm` on PATH, of the CUDA toolkit or of the package
nvidia-cuda-nvdisasm.

Usage: python benchmarks/instructions.py [--arch sm_90a] [--listing FOLDER]
"""

from __future__ import annotations

import argparse
import collections
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ostinato.cells import cell_of
from ostinato.cuda import compiler
from ostinato.cuda.config import Config
from ostinato.cuda.plan import H200, configs, nanoseconds
from ostinato.own import records  # noqa: F401  (who makes the records of own cells)

# Cell, precision, H and exchange: where a step is short, the addresses are most of it.
KERNELS: tuple[tuple[str, str, int, str], ...] = (
    ("gru", "bf16", 64, "block"),
    ("gru", "bf16", 128, "block"),
    ("gru", "tf32", 64, "block"),
    ("gru", "bf16", 256, "cluster"),
    ("gru", "bf16", 1024, "grid"),
)
# The same cell as a user writes it: its struct is made of the graph of the step.
OWN = (
    "own:Gru(x=3,h=3,s=1,p=0,d=0){x0;x1;x2;h0;h1;h2;s0;add 0 3;sigmoid 7;add 1 4;sigmoid 9;mul 8 5;"
    "add 2 11;tanh 12;c0x1.0p+0;sub 14 10;mul 15 13;mul 10 6;add 16 17}->18"
)
KERNELS += tuple((OWN, math, hidden, exchange) for _, math, hidden, exchange in KERNELS)
BATCH = 16

# Instructions by what they do, without modifiers; those of the uniform datapath begin with U.
CLASSES = {
    "integers": "IMAD IADD VIADD LEA SHF LOP3 PRMT SEL MOV CS2R IABS IMNMX P2R R2P R2UR S2R S2UR "
    "LDC ULDC UMOV UIADD UIMAD ULEA USHF ULOP3 USEL UPRMT VOTE",
    "compares": "ISETP UISETP PLOP3 UPLOP3",
    "branches": "BRA BSSY BSYNC CALL RET WARPSYNC YIELD BREAK",
    "global": "LDG STG CCTL LD ST RED ATOM",
    "shared": "LDS STS STAS SHFL",
    "matrix": "HMMA",
    "activations": "MUFU",
    "floats": "FADD FMUL FFMA FSETP FSEL FMNMX F2F F2FP HADD2",
    "barriers": "BAR SYNCS MEMBAR",
}


class Block(NamedTuple):
    """Instructions without a branch among them, and the blocks that may come next."""

    instructions: list[str]
    following: list[int]


def config_of(cell: str, math: str, hidden: int, exchange: str, is_backward: bool) -> Config:
    """Choose the plan of this exchange whose modelled time is shortest."""
    found = configs(cell, math, hidden, is_backward, H200)
    return min(
        (c for c in found if c.exchange == exchange), key=lambda c: nanoseconds(c, BATCH, 1, H200)
    )


def cubin_of(config: Config, arch: str, is_padded: bool) -> tuple[bytes, str]:
    """Compile a kernel; return its machine code and what the compiler said of its registers."""
    folder = compiler.text_folder() / "cuda"
    text = compiler.text_of(config, folder)
    if is_padded:
        text = as_padded(text)
    core = compiler.core()
    options = core.ProgramOptions(
        name=config.source,
        arch=arch,
        include_path=[str(folder)],
        define_macro=[(name, str(value)) for name, value in config.defines.items()],
        no_cache=True,
        **compiler._OPTIONS,
    )
    log = compiler._Log()
    code = core.Program(text, "c++", options).compile("cubin", logs=log).code
    used = re.search(r"Used (\d+) registers", log.text)
    return bytes(code), used[1] if used else "?"


def as_padded(text: str) -> str:
    """Change the text of sequence.cu: the entries hand on that all rows are plain."""
    rows = "offsets, lengths, order, flags}"
    if text.count(rows) != 2:
        raise ValueError(f"sequence.cu: expected {rows!r} in its two entries")
    return text.replace(rows, "nullptr, nullptr, nullptr, nullptr}")


def disassemble(cubin: bytes) -> str:
    """Return the listing of a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = ["nvdisasm", "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def blocks_of(listing: str) -> list[Block]:
    """Cut a listing into blocks."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            lines.append(found[1])
    starts = {0, *labels.values()} | {i + 1 for i, line in enumerate(lines) if _ends(line)}
    first = sorted(start for start in starts if start < len(lines))
    places = {start: i for i, start in enumerate(first)}
    blocks = []
    for start, end in zip(first, [*first[1:], len(lines)], strict=True):
        last = lines[end - 1]
        following = []
        if target := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", last):
            following.append(places[labels[target[1]]])
        # A call comes back; its own instructions are counted with nobody.
        goes_on = not _ends(last) or last.startswith("@") or "CALL" in last
        if goes_on and end in places:
            following.append(places[end])
        blocks.append(Block(lines[start:end], following))
    return blocks


def _ends(line: str) -> bool:
    return re.search(r"\b(BRA|EXIT|RET|CALL)\b", line) is not None


def loop_of(blocks: list[Block]) -> list[str]:
    """Return the instructions of the largest loop that has a product in it, loops within included.

    Blocks of a loop are those that reach each other.
    """
    best: list[str] = []
    reached = [_reached(blocks, i) for i in range(len(blocks))]
    for i in range(len(blocks)):
        loop = [j for j in sorted(reached[i]) if i in reached[j]]
        lines = [line for j in loop for line in blocks[j].instructions]
        is_product = any(name_of(line) in ("HMMA", "FFMA") for line in lines)
        if is_product and any(name_of(line) in ("BAR", "SYNCS") for line in lines):
            best = max(best, lines, key=len)
    return best


def _reached(blocks: list[Block], start: int) -> set[int]:
    found: set[int] = set()
    waiting = list(blocks[start].following)
    while waiting:
        i = waiting.pop()
        if i not in found:
            found.add(i)
            waiting += blocks[i].following
    return found


def name_of(instruction: str) -> str:
    """Return an instruction's name without predicate and modifiers."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def classes_of(instructions: list[str]) -> dict[str, int]:
    """Count instructions by class; "others" are all that CLASSES does not name."""
    found = dict.fromkeys((*CLASSES, "others"), 0)
    of_name = {name: kind for kind, names in CLASSES.items() for name in names.split()}
    for name, count in collections.Counter(map(name_of, instructions)).items():
        kind = of_name.get(name) or of_name.get(re.sub(r"\d+$", "", name), "others")
        found[kind] += count
    return found


def rows(arch: str, folder: Path | None) -> Iterator[list[object]]:
    """Yield a line of the table for each kernel: its name, what it takes and what it counts."""
    for name, math, hidden, exchange in KERNELS:
        kind = cell_of(name)
        cell = f"own {kind.layer}" if kind.is_own else name
        for is_backward in (False, True):
            config = config_of(name, math, hidden, exchange, is_backward)
            way = "backward" if is_backward else "forward"
            counts, registers = [], ""
            for is_padded in (False, True):
                cubin, used = cubin_of(config, arch, is_padded)
                listing = disassemble(cubin)
                if folder is not None:
                    stem = f"{cell}-{math}-{hidden}-{exchange}-{way}{'-padded' * is_padded}"
                    (folder / f"{stem}.sass").write_text(listing)
                counts.append(loop_of(blocks_of(listing)))
                registers = registers or used
            whole, padded = counts
            shape = f"{config.blocks} x {config.units} units, {config.warps} warps"
            front = f"{cell} {math} H {hidden} {exchange} {way} ({shape})"
            yield [front, registers, len(whole), len(padded), *classes_of(padded).values()]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", default="sm_90a", help="for which architecture to compile")
    parser.add_argument("--listing", type=Path, help="a folder for the listings")
    options = parser.parse_args()
    if shutil.which("nvdisasm") is None:
        print("nvdisasm: expected NVIDIA's disassembler on PATH, found none", file=sys.stderr)
        return 1
    if options.listing is not None:
        options.listing.mkdir(parents=True, exist_ok=True)
    heads = ["kernel", "registers", "loop", "padded", *CLASSES, "others"]
    print("| " + " | ".join(heads) + " |")
    print("|" + " --- |" + " ---: |" * (len(heads) - 1))
    for row in rows(options.arch, options.listing):
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
