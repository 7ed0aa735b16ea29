"""Runs the Python examples in our Markdown, follows its links, and checks its measured figures.

    python tools/check_docs.py

A block that opens with ```python runs; the blocks of one file share their names, as a reader would
type them one after the other. A link to a file of ours must lead to it, and its #anchor to a
heading there. Links to the web are left alone. A table between `<!-- ratios: FILE.json -->` and
`<!-- end of ratios -->` has rows of that benchmark's result, or of one on a GPU; one between
`<!-- figures: ... -->` is its summary.
"""

import json
import linecache
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import report  # noqa: E402

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
TABLE = re.compile(
    r"^<!-- (ratios|figures): (\S+\.json) -->\n(.*?)^<!-- end of \1 -->$", re.MULTILINE | re.DOTALL
)


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


def measured_cells(found: dict[str, Any], head: list[str]) -> dict[tuple[str, str], list[str]]:
    """Writes each measured row as a table with these columns has it, by layer and shape."""
    if "device" in found:
        return gpu_cells(found)
    peers = [title.removesuffix(" / ours") for title in head[2:]]
    return {
        (row["name"], row["shape"]): [
            f"{row['ratios'][peer][1]:.2f}" if peer in row["ratios"] else "" for peer in peers
        ]
        for row in found["rows"]
    }


def gpu_cells(found: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """Writes rows of a GPU: torch.nn / ours of calls and, where it was measured, of graphs."""
    cells = {}
    for row in found["rows"]:
        shape = f"T{row['steps']} B{row['batch']} H{row['hidden']}"
        layer = f"{row['cell']} {row['precision']} {row['kind']} {row['form']}"
        graph = (row.get("graph") or {}).get("ratio")
        cells[layer, shape] = [f"{row['ratio'][1]:.2f}", f"{graph[1]:.2f}" if graph else ""]
    return cells


def wrong_figures(text: str) -> list[str]:
    """Lists the rows of a page's tables that are not what the named result says."""
    wrong = []
    for what, name, body in TABLE.findall(text):
        found = json.loads((ROOT / name).read_text(encoding="utf-8"))
        lines = body.strip().splitlines()
        if what == "figures":
            summary = report.summary(found).strip().splitlines()
            wrong += [f"{name} does not say: {line}" for line in lines if line not in summary]
            wrong += [f"{name} says also: {line}" for line in summary if line not in lines]
            continue
        head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
        measured = measured_cells(found, head)
        for layer, shape, *ratios in rows:
            if (is_so := measured.get((layer, shape))) != ratios:
                wrong.append(f"{layer} {shape}: {ratios}, but {name} says {is_so}")
    return wrong


def run_examples(page: Path) -> int:
    """Runs the blocks of one page, of which the first exception ends all, and counts them."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": page.stem}
    blocks = [block for block in FENCE.finditer(text) if block[1] == "python"]
    # Tracebacks show the page's lines. Not by its path: torch's compiler would read it as Python.
    name = f"<{page.relative_to(ROOT)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    for block in blocks:
        # Blank lines in front, so that a traceback has the line's number.
        source = "\n" * (text.count("\n", 0, block.start()) + 1) + block[2]
        exec(compile(source, name, "exec"), names)
    return len(blocks)


def main() -> int:
    broken = [line for page in pages() for line in broken_links(page)]
    for page in pages():
        text = page.read_text(encoding="utf-8")
        broken += [f"{page.relative_to(ROOT)}: {line}" for line in wrong_figures(text)]
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
