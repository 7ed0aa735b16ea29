"""Fails if the kernels of one instruction set define a symbol that may replace another's.

    python tools/check_symbols.py build/cmake

A linker keeps one of several weak definitions of a name. If that one was compiled for AVX-512, a
machine without it runs it too. So the kernels may define no weak and no unique symbol; what they
only refer to is defined elsewhere, for the baseline.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

# nm's letters: weak function, weak object (upper and lower case as bound), unique global.
MERGED = set("WwVvu")
UNDEFINED = re.compile(r"\s+[UwVv] ")
DEFINED = re.compile(r"[0-9a-f]+ (\S) (.*)")


def defined_symbols(path: Path) -> list[tuple[str, str]]:
    """Lists what an object file defines, as nm's letter and the demangled name."""
    listing = subprocess.run(["nm", "-C", path], check=True, capture_output=True, text=True).stdout
    symbols = []
    for line in listing.splitlines():
        if match := DEFINED.fullmatch(line):
            symbols.append((match[1], match[2]))
        elif not UNDEFINED.match(line):
            raise ValueError(f"{path}: expected a line of nm, got {line!r}")
    return symbols


def main(build: str) -> int:
    objects = sorted(Path(build).glob("**/ostinato_*_*.dir/**/*.o"))
    if not objects:
        print(f"{build}: no object file of a kernel; is the package built?", file=sys.stderr)
        return 1
    bad = 0
    for path in objects:
        isa = re.search(r"ostinato_(\w+)\.dir", str(path))[1]
        symbols = defined_symbols(path)
        letters = Counter(letter for letter, _ in symbols)
        exported = [name for letter, name in symbols if letter.isupper() and letter not in MERGED]
        merged = [name for letter, name in symbols if letter in MERGED]
        counts = ", ".join(f"{letter}: {count}" for letter, count in sorted(letters.items()))
        print(f"{isa}: {len(symbols)} symbols defined ({counts}), visible to others: {exported}")
        for name in merged:
            print(f"{path}: weak definition of {name}", file=sys.stderr)
        bad += len(merged)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
