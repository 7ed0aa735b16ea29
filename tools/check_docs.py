"""Runs the Python examples in our Markdown and follows its links.

    python tools/check_docs.py

A block that opens with ```python runs; the blocks of one file share their names, as a reader would
type them one after the other. A link to a file of ours must lead to it, and its #anchor to a
heading there. Links to the web are left alone.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def pages() -> list[Path]:
    """Lists the Markdown files that a reader is meant to find."""
    folders = (ROOT, ROOT / "docs", ROOT / "benchmarks", ROOT / "examples")
    return [page for folder in folders for page in sorted(folder.glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """Names the headings of a page as links spell them."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    kept = (re.sub(r"[^\w\- ]", "", title.lower()) for title in HEADING.findall(prose))
    return {title.strip().replace(" ", "-") for title in kept}


def broken_links(page: Path) -> list[str]:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target in LINK.findall(prose):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists():
            broken.append(f"{page.relative_to(ROOT)}: no file {target}")
        elif anchor and anchor not in anchors(file):
            broken.append(f"{page.relative_to(ROOT)}: no heading {target}")
    return broken


def run_examples(page: Path) -> int:
    """Runs the blocks of one page, of which the first exception ends all, and counts them."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": page.stem}
    blocks = [block for block in FENCE.finditer(text) if block[1] == "python"]
    for block in blocks:
        # Blank lines in front, so that a traceback shows the line of the page.
        source = "\n" * (text.count("\n", 0, block.start()) + 1) + block[2]
        exec(compile(source, str(page), "exec"), names)
    return len(blocks)


def main() -> int:
    broken = [line for page in pages() for line in broken_links(page)]
    if broken:
        print(*broken, sep="\n", file=sys.stderr)
        return 1
    # What an example writes is not left in the tree.
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for page in pages():
            print(f"{page.relative_to(ROOT)}: links hold, {run_examples(page)} examples run")
        os.chdir(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
